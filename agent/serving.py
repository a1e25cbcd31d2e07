"""Images read back: chunks decompressed ahead of who reads, verified, and kept while they are warm.

One reader serves all: restores, which are lent its memory, and those who look into image files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from .buffers import Piece
from .recipe import ZERO, Recipe, Source

CHUNK_BYTES = WINDOW_BYTES = 1 << 20
WARM_BYTES = 64 << 20
AHEAD_WINDOWS = 16
SPARE = 4  # pieces of memory that are kept to be used again, beside what is warm
SCATTERED = 8  # a window of more runs than this is put together in memory of its own


class Chunks(Protocol):
    """Where chunks are: the chunk store."""

    def read_into(self, id: bytes, buffer: memoryview) -> int: ...


@dataclass(slots=True, eq=False)
class _Warm:
    """A chunk in memory, or on its way there; `readers` keep it."""

    memory: memoryview
    size: Future[int]
    readers: int = 0


class Reader:
    """Chunks in memory: of up to WARM_BYTES, and what is lent beyond that. Any thread may ask."""

    def __init__(self, chunks: Chunks, warm_bytes: int = WARM_BYTES) -> None:
        self._chunks = chunks
        self._most = warm_bytes // CHUNK_BYTES
        self._warm: OrderedDict[bytes, _Warm] = OrderedDict()
        self._spare: list[memoryview] = []
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(os.cpu_count(), "reader")
        self._used = time.monotonic()

    def lend(self, id: bytes) -> Lent:
        """Return a chunk that stays until it is given back; raises Damaged."""
        with self._lock:
            warm = self._get(id)
            warm.readers += 1
        try:
            return Lent(self, warm, warm.memory[: warm.size.result()])
        except BaseException:
            self.give_back(warm)
            self.forget([id])
            raise

    def ahead(self, ids: Iterable[bytes]) -> None:
        """Have these chunks read, because somebody will ask for them."""
        with self._lock:
            for id in ids:
                self._get(id)

    def give_back(self, warm: _Warm) -> None:
        with self._lock:
            warm.readers -= 1

    def forget(self, ids: Iterable[bytes]) -> None:
        """Read these chunks anew when they are asked for again."""
        with self._lock:
            for id in ids:
                self._warm.pop(id, None)

    def spare(self) -> memoryview:
        """Return CHUNK_BYTES of memory, to be handed to `keep` when nobody reads it any more."""
        with self._lock:
            return self._memory()

    def keep(self, memory: memoryview) -> None:
        with self._lock:
            self._put_by(memory)

    def trim(self, idle_s: float) -> None:
        """Let go of all memory that nobody reads, if nobody has for so long."""
        with self._lock:
            if time.monotonic() - self._used < idle_s:
                return
            for id in [id for id, warm in self._warm.items() if _is_idle(warm)]:
                del self._warm[id]
            self._spare.clear()

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)

    # -- inside, with the lock

    def _get(self, id: bytes) -> _Warm:
        self._used = time.monotonic()
        warm = self._warm.get(id)
        if warm is None:
            self._make_room()
            memory = self._memory()
            warm = _Warm(memory, self._workers.submit(self._chunks.read_into, id, memory))
            self._warm[id] = warm
        else:
            self._warm.move_to_end(id)
        return warm

    def _make_room(self) -> None:
        """Forget the chunks that nobody has asked for the longest, down to what may be warm."""
        left = len(self._warm) - self._most + 1
        if left <= 0:
            return
        idle = [id for id, warm in islice(self._warm.items(), 2 * left + 8) if _is_idle(warm)]
        for id in idle[:left]:
            self._put_by(self._warm.pop(id).memory)

    def _put_by(self, memory: memoryview) -> None:
        if len(self._spare) < SPARE:
            self._spare.append(memory)

    def _memory(self) -> memoryview:
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, CHUNK_BYTES))


def _is_idle(warm: _Warm) -> bool:
    return not warm.readers and warm.size.done()


class Lent:
    """A chunk that is held in memory."""

    def __init__(self, reader: Reader, warm: _Warm, data: memoryview) -> None:
        self.data = data
        self._reader, self._warm = reader, warm

    def give_back(self, index: int = 0, /) -> None:
        self._reader.give_back(self._warm)


class _Own:
    """Memory that several runs were put together in."""

    def __init__(self, reader: Reader) -> None:
        self.memory = reader.spare()
        self._reader = reader

    def give_back(self, index: int = 0, /) -> None:
        self._reader.keep(self.memory)


_ZEROS = memoryview(mmap.mmap(-1, WINDOW_BYTES))


class ImageSource:
    """The files of one image, for a restore (stream.Source) and for who looks into them."""

    def __init__(self, reader: Reader, recipe: Recipe) -> None:
        self._reader, self._recipe = reader, recipe
        self._looked: dict[str, tuple[int, int]] = {}  # which bytes were asked for ahead

    def pieces(self, file: str) -> Iterator[Piece] | None:
        """Return the content of a file; see stream.Source."""
        return self._pieces(file) if file in self._recipe.files else None

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Return so many bytes (at most WINDOW_BYTES) of a file, fewer only at its end."""
        parts: list[memoryview | bytes] = []
        with contextlib.ExitStack() as stack:
            for source in self._recipe.sources(file, offset, size):
                piece = self._lent(file, offset, source)
                stack.callback(piece.give_back)
                parts.append(piece.data)
                offset += source.length
            return b"".join(parts)

    def read_into(self, file: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from `offset` of a file on; returns how much there was."""
        at = 0
        for source in self._recipe.sources(file, offset, len(buffer)):
            _copy(self._reader, self._recipe, source, buffer[at : at + source.length])
            at += source.length
        return at

    def ahead(self, file: str, offset: int, size: int) -> None:
        """Have the chunks read that these bytes need. Cheap for who asks again further on."""
        begin, end = self._looked.get(file, (0, 0))
        if not begin <= offset <= end:
            begin = end = offset
        wanted = offset + size
        if wanted - end >= WINDOW_BYTES or begin == end:
            self._reader.ahead(self._ids(file, end, wanted - end))
            self._looked[file] = (offset, wanted)

    def _ids(self, file: str, offset: int, size: int) -> list[bytes]:
        return [
            self._recipe.chunks[number] for number in self._recipe.chunks_of(file, offset, size)
        ]

    def _pieces(self, file: str) -> Iterator[Piece]:
        ahead = AHEAD_WINDOWS * WINDOW_BYTES
        self._reader.ahead(self._ids(file, 0, ahead))
        for at in range(0, self._recipe.size(file), WINDOW_BYTES):
            self._reader.ahead(self._ids(file, at + ahead, WINDOW_BYTES))
            sources = list(self._recipe.sources(file, at, WINDOW_BYTES))
            if len(sources) > SCATTERED:
                yield self._joined(file, at, sources)
                continue
            for source in sources:
                yield self._lent(file, at, source)
                at += source.length

    def _lent(self, file: str, at: int, source: Source) -> Piece:
        if source.chunk == ZERO:
            return Piece(file, at, _ZEROS[: source.length])
        lent = self._reader.lend(self._recipe.chunks[source.chunk])
        return Piece(file, at, lent.data[source.offset : source.offset + source.length], lent)

    def _joined(self, file: str, at: int, sources: Sequence[Source]) -> Piece:
        own = _Own(self._reader)
        try:
            end = 0
            for source in sources:
                _copy(self._reader, self._recipe, source, own.memory[end : end + source.length])
                end += source.length
        except BaseException:
            own.give_back()
            raise
        return Piece(file, at, own.memory[:end], own)


def _copy(reader: Reader, recipe: Recipe, source: Source, into: memoryview) -> None:
    if source.chunk == ZERO:
        into[:] = _ZEROS[: source.length] if source.length <= WINDOW_BYTES else bytes(len(into))
        return
    lent = reader.lend(recipe.chunks[source.chunk])
    try:
        into[:] = lent.data[source.offset : source.offset + source.length]
    finally:
        lent.give_back()
