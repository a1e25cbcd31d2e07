"""Images read back: chunks decompressed ahead of who reads, verified, and kept while they are warm.

One reader serves all: restores, which are lent its memory, and those who look into image files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
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
STALE = 4  # times WARM_BYTES were read since: what was read ahead then is not waited for any more
SCATTERED = 8  # a window of more runs than this is put together in memory of its own


class Chunks(Protocol):
    """Where chunks are: the chunk store."""

    def read_into(self, id: bytes, buffer: memoryview) -> int: ...


@dataclass(slots=True, eq=False)
class _Warm:
    """A chunk in memory, or on its way there; `readers` keep it.

    `number` tells how many had been read when it was wanted last.
    """

    memory: memoryview
    size: Future[int]
    number: int
    readers: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.readers and self.size.done()

    @property
    def has_failed(self) -> bool:
        return self.size.done() and self.size.exception() is not None


class Reader:
    """Chunks in memory: of up to WARM_BYTES, and what is lent beyond that. Any thread may ask.

    Up to half of them were read ahead. These stay until they are lent once, so that nothing is
    read twice; but not while very many others are: whoever wanted them has left.
    """

    def __init__(self, chunks: Chunks, warm_bytes: int = WARM_BYTES) -> None:
        self._chunks = chunks
        self._most = warm_bytes // CHUNK_BYTES
        self._warm: OrderedDict[bytes, _Warm] = OrderedDict()  # that was lent last comes last
        self._ahead: OrderedDict[bytes, _Warm] = OrderedDict()  # and was not lent yet
        self._count = 0
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
            with self._lock:
                warm.readers -= 1
                if self._warm.get(id) is warm:
                    del self._warm[id]
            raise

    def ahead(self, ids: Iterable[bytes]) -> int:
        """Have these chunks read, because somebody will ask for them in this order.

        Returns how many of them, from the first on, there is room for: the others are not read.
        """
        taken = 0
        with self._lock:
            for id in ids:
                if id in self._warm:
                    self._warm.move_to_end(id)
                elif id in self._ahead:
                    self._ahead[id].number = self._count
                    self._ahead.move_to_end(id)
                elif self._may_read_ahead():
                    self._ahead[id] = self._read(id)
                else:
                    break
                taken += 1
        return taken

    def give_back(self, warm: _Warm) -> None:
        with self._lock:
            warm.readers -= 1

    def forget(self, ids: Iterable[bytes]) -> None:
        """Read these chunks anew when they are asked for again."""
        with self._lock:
            for id in ids:
                self._warm.pop(id, None)
                self._ahead.pop(id, None)

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
            for kept in (self._warm, self._ahead):
                for id in [id for id, warm in kept.items() if warm.is_idle]:
                    del kept[id]
            self._spare.clear()

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)

    # -- inside, with the lock

    def _get(self, id: bytes) -> _Warm:
        self._used = time.monotonic()
        warm = self._warm.pop(id, None) or self._ahead.pop(id, None)
        if warm is None or warm.has_failed:  # before anybody waited: it may be there again
            warm = self._read(id)
        self._warm[id] = warm
        return warm

    def _read(self, id: bytes) -> _Warm:
        self._used = time.monotonic()
        self._make_room()
        memory = self._memory()
        self._count += 1
        return _Warm(memory, self._workers.submit(self._chunks.read_into, id, memory), self._count)

    def _may_read_ahead(self) -> bool:
        if len(self._ahead) < max(1, self._most // 2):
            return True
        id, oldest = next(iter(self._ahead.items()))
        if not oldest.is_idle or self._count - oldest.number < STALE * self._most:
            return False
        self._put_by(self._ahead.pop(id).memory)
        return True

    def _make_room(self) -> None:
        """Forget the chunks that were lent the longest ago, down to what may be warm."""
        left = len(self._warm) + len(self._ahead) - self._most + 1
        if left <= 0:
            return
        idle = [id for id, warm in islice(self._warm.items(), 2 * left + 8) if warm.is_idle]
        for id in idle[:left]:
            self._put_by(self._warm.pop(id).memory)

    def _put_by(self, memory: memoryview) -> None:
        if len(self._spare) < SPARE:
            self._spare.append(memory)

    def _memory(self) -> memoryview:
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, CHUNK_BYTES))


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
            sources = self._recipe.sources(file, end, wanted - end)
            for at, id in _first_uses(self._recipe, sources, end):
                if not self._reader.ahead([id]):
                    wanted = at
                    break
            self._looked[file] = (offset, wanted)

    def _pieces(self, file: str) -> Iterator[Piece]:
        coming = _Coming(self._reader, self._recipe, file)
        for at in range(0, self._recipe.size(file), WINDOW_BYTES):
            sources = coming.window(at)
            if len(sources) > SCATTERED:
                yield self._joined(file, at, sources, coming)
                continue
            for source in sources:
                yield self._lent(file, at, source)
                at += source.length

    def _lent(self, file: str, at: int, source: Source) -> Piece:
        if source.chunk == ZERO:
            return Piece(file, at, _ZEROS[: source.length])
        lent = self._reader.lend(self._recipe.chunks[source.chunk])
        return Piece(file, at, lent.data[source.offset : source.offset + source.length], lent)

    def _joined(self, file: str, at: int, sources: list[Source], coming: _Coming) -> Piece:
        own = _Own(self._reader)
        try:
            end = 0
            for number, source in enumerate(sources):
                if number % SCATTERED == 0:
                    coming.go_on(at + end)
                _copy(self._reader, self._recipe, source, own.memory[end : end + source.length])
                end += source.length
        except BaseException:
            own.give_back()
            raise
        return Piece(file, at, own.memory[:end], own)


class _Coming:
    """The windows of a file one after the other, with chunks read ahead while there is room."""

    def __init__(self, reader: Reader, recipe: Recipe, file: str) -> None:
        self._reader, self._recipe, self._file = reader, recipe, file
        self._windows: deque[list[Source]] = deque()
        self._end = 0
        self._wanted: deque[tuple[int, bytes]] = deque()  # chunks, and where they are used first

    def window(self, at: int) -> list[Source]:
        """Return what makes up the next window, which begins at `at`."""
        while self._end <= at + AHEAD_WINDOWS * WINDOW_BYTES:
            sources = list(self._recipe.sources(self._file, self._end, WINDOW_BYTES))
            self._windows.append(sources)
            self._wanted += _first_uses(self._recipe, sources, self._end)
            self._end += WINDOW_BYTES
        self.go_on(at)
        return self._windows.popleft()

    def go_on(self, at: int) -> None:
        """Read ahead, where the reader has come to `at`."""
        wanted = self._wanted
        while wanted and wanted[0][0] < at:
            wanted.popleft()
        for _ in range(self._reader.ahead(id for _, id in wanted)):
            wanted.popleft()


def _first_uses(recipe: Recipe, sources: Iterable[Source], at: int) -> Iterator[tuple[int, bytes]]:
    """Yield the chunks that these are made of, which begin at `at`, and where each comes first."""
    seen = {ZERO}
    for source in sources:
        if source.chunk not in seen:
            seen.add(source.chunk)
            yield at, recipe.chunks[source.chunk]
        at += source.length


def _copy(reader: Reader, recipe: Recipe, source: Source, into: memoryview) -> None:
    if source.chunk == ZERO:
        into[:] = _ZEROS[: source.length] if source.length <= WINDOW_BYTES else bytes(len(into))
        return
    lent = reader.lend(recipe.chunks[source.chunk])
    try:
        into[:] = lent.data[source.offset : source.offset + source.length]
    finally:
        lent.give_back()
