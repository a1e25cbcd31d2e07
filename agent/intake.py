"""What a dump delivers becomes chunks and a recipe.

While the tree stands still its pages only pile up in buffers. Once it runs again they are hashed,
and those that are new are cut into chunks by virtual address, so that memory which did not change
gives the same chunks wherever its mapping lies in the file, compressed and written with every core.
A dump that does not fit into the buffers is worked off while it comes.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from krgfs.errors import EngineFailed

from . import pages, recipe
from .buffers import Buffers, Piece
from .criu_images import is_large
from .pages import PAGE_BYTES, UNKNOWN, Hashes, Numbers, Places, Table
from .recipe import Recipe, Source

PAGES = "pages-"  # begins the names of page files
CHUNK_BYTES = 1 << 20
CHUNK_PAGES = CHUNK_BYTES // PAGE_BYTES
DENSE_PAGES = CHUNK_PAGES // 2  # so many new pages of a range make a chunk of their own
BATCH_PIECES = 64
BATCHES_AT_WORK = 2
SCATTERED = 16  # more parts than this are joined before they are hashed
ZERO_PAGE = -2  # as a chunk number, beside pages.UNKNOWN
STALE = 0.25  # a chunk of which the last version used less than this share
STALE_SHARE = 0.05  # how many of all pages may be stored anew for that, at one time

Addresses = Callable[[str], Numbers]
"""Gives the virtual page number of each page in a page file, or fewer where it is not known."""


class Chunks(Protocol):
    """Where chunks go: a session of the chunk store."""

    def add(self, *parts: bytes | bytearray | memoryview) -> bytes: ...

    def reuse(self, ids: Sequence[bytes]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]: ...


class Stored(NamedTuple):
    """What a dump came to: its recipe, the table of its pages, its logical size in bytes."""

    recipe: Recipe
    table: Table
    logical_bytes: int


@dataclass(slots=True)
class _File:
    """A large file on its way: the pieces that wait, and what became of those that did not."""

    number: int
    waiting: deque[Piece] = field(default_factory=deque)
    done: list[Places] = field(default_factory=list)  # of page files
    hashes: list[Hashes] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)  # of others
    size: int = 0
    worked_off: int = 0


class Intake:
    """Takes the pieces of one dump from `buffers` (see stream.Sink), and stores them.

    `known` is the table of the tree's last version. `take` is for the thread of the capture; an
    error of the store that comes up while the dump still runs is raised there. The caller closes.
    """

    def __init__(self, buffers: Buffers, chunks: Chunks, known: Table, seed: int) -> None:
        self.buffers = buffers
        self._chunks = chunks
        self._seed = seed
        self._zero = pages.zero_hash(seed)
        self._known = known
        self._usable = chunks.reuse(known.chunks) & ~known.stale(STALE, STALE_SHARE)
        self._numbers = np.full(len(known.chunks), UNKNOWN, np.int64)
        self._fresh: list[Table] = []
        self._ids: list[bytes] = []
        self._held: list[int] = []
        self._files: dict[str, _File] = {}
        self._small: dict[str, list[bytes]] = {}
        self._workers = ThreadPoolExecutor(os.cpu_count(), "intake")
        self._at_work: deque[_Batch] = deque()
        self._changed = threading.Condition()
        self._early: threading.Thread | None = None
        self._is_over = False
        self._failure: BaseException | None = None
        self._addresses: Addresses = lambda file: np.empty(0, np.int64)

    # -- while the dump runs

    def take(self, piece: Piece) -> None:
        """Keep a piece of a file, the next one of it."""
        if not is_large(piece.file):
            self._small.setdefault(piece.file, []).append(bytes(piece.data))
            piece.give_back()
            return
        self._keep(piece)

    def _keep(self, piece: Piece) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if piece.file.startswith(PAGES) and len(piece.data) % PAGE_BYTES:
                raise EngineFailed(f"CRIU sent part of a page in {piece.file}")
            if self._early is None and self._is_short_of_buffers():
                early = threading.Thread(target=self._work_off, name="intake early")
                early.start()  # may raise: the piece is not kept then
                self._early = early
            file = self._files.setdefault(piece.file, _File(len(self._files)))
            file.waiting.append(piece)
            file.size += len(piece.data)
            self._changed.notify()

    def _is_short_of_buffers(self) -> bool:
        return self.buffers.free < max(2, self.buffers.count // 8)

    def _work_off(self) -> None:
        """Make room while the dump goes on."""
        while True:
            with self._changed:
                while not (self._is_over or self._is_short_of_buffers() or self._failure):
                    self._changed.wait(0.05)
                if self._is_over or self._failure:
                    return
            try:
                if not self._step():
                    self._settle(0)
                    with self._changed:
                        self._changed.wait(0.05)
            except BaseException as exc:
                self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or exc
        self._give_all_back()

    def load(self, path: str, file: str) -> None:
        """Take all of a file that lies somewhere as a large one of this name."""
        offset = 0
        with open(path, "rb", buffering=0) as opened:
            while True:
                index = self.buffers.lend(unless=lambda: self._failure is not None)
                if index is None:
                    raise self._failure or RuntimeError("no buffer")
                count = _fill(opened, self.buffers[index])
                piece = Piece(file, offset, self.buffers[index][:count], self.buffers, index)
                if not count:
                    piece.give_back()
                    break
                try:
                    self._keep(piece)
                except BaseException:
                    piece.give_back()
                    raise
                offset += count
        self._files.setdefault(file, _File(len(self._files)))

    # -- once it is over

    def unload(self, directory: Path, sizes: Mapping[str, int]) -> None:
        """Write all files but the large ones into a directory; `sizes` names all that there are."""
        for name, parts in self._small.items():
            (directory / name).write_bytes(b"".join(parts))
        for name in sizes.keys() - self._small.keys() - self._files.keys():
            if is_large(name):
                self._files[name] = _File(len(self._files))
            else:
                (directory / name).touch()
        self._small.clear()

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the large files, as far as they have come."""
        return {name: file.size for name, file in self._files.items()}

    def finish(
        self, small: Mapping[str, bytes], addresses: Addresses, check: Callable[[], None]
    ) -> Stored:
        """Store what is left of the large files, and `small` ones beside them.

        `check` is called now and then and may raise. All buffers are given back on return.
        """
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._early is not None:
            self._early.join()
        if self._failure is not None:
            raise self._failure
        self._addresses = addresses
        while self._step():
            check()
        self._settle(0)
        files = {name: _extents(file) for name, file in self._files.items()}
        files |= self._store_small(small)
        made = Recipe(self._ids, files)
        return Stored(made, self._table(), sum(map(made.size, files)))

    def close(self) -> None:
        """Give back every buffer and end all threads; after anything."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._early is not None:
            self._early.join()
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._give_all_back()

    def _give_all_back(self) -> None:
        with self._changed:
            left = [piece for file in self._files.values() for piece in file.waiting]
            for file in self._files.values():
                file.waiting.clear()
        for batch in [*self._at_work]:
            batch.give_back()
        self._at_work.clear()
        for piece in left:
            piece.give_back()

    # -- a batch at a time

    def _step(self) -> bool:
        """Take on the next batch; False where nothing waits."""
        name = self._next()
        if name is None:
            return False
        self._settle(BATCHES_AT_WORK - 1)
        file = self._files[name]
        with self._changed:
            count = min(BATCH_PIECES, len(file.waiting))
            batch = _Batch([file.waiting.popleft() for _ in range(count)])
        self._at_work.append(batch)
        if name.startswith(PAGES):
            self._place(name, file, batch)
        else:
            self._store_bulk(file, batch)
        file.worked_off += batch.size
        return True

    def _next(self) -> str | None:
        with self._changed:
            return next((name for name, file in self._files.items() if file.waiting), None)

    def _settle(self, left: int) -> None:
        """Wait until no more than so many batches are at work."""
        while len(self._at_work) > left:
            batch = self._at_work[0]
            for number, future in batch.futures:
                self._ids[number] = future.result()
            batch.give_back()
            self._at_work.popleft()

    def _place(self, name: str, file: _File, batch: _Batch) -> None:
        """Find out where each page of a batch is, and have the new ones stored."""
        hashes = np.concatenate([pages.hashed(memory, self._seed) for memory in batch.memory])
        places = self._find(hashes)
        new = np.flatnonzero(places.chunk == UNKNOWN)
        first = pages.firsts(hashes[new])
        unique = new[first == np.arange(len(new))]
        start = file.worked_off // PAGE_BYTES
        address = self._addresses(name)[start : start + len(hashes)]
        if len(address) < len(hashes):
            address = np.arange(start, start + len(hashes))
        for positions in _cut(unique, address[unique] // CHUNK_PAGES):
            number = self._number(len(positions))
            places.chunk[positions] = number
            places.page[positions] = np.arange(len(positions))
            batch.store(number, self._workers, self._chunks, batch.parts(positions))
        places.chunk[new] = places.chunk[new[first]]
        places.page[new] = places.page[new[first]]
        if len(unique):
            self._remember(hashes[unique], Places(places.chunk[unique], places.page[unique]))
        file.done.append(places)
        file.hashes.append(hashes)

    def _find(self, hashes: Hashes) -> Places:
        """Return where pages are already, by the numbers of this image."""
        chunk, page = self._known.find(hashes)
        found = np.flatnonzero(chunk >= 0)
        chunk[found[~self._usable[chunk[found]]]] = UNKNOWN
        found = np.flatnonzero(chunk >= 0)
        used = np.unique(chunk[found])
        for old in used[self._numbers[used] == UNKNOWN].tolist():
            self._numbers[old] = self._number(int(self._known.held[old]), self._known.chunks[old])
        chunk[found] = self._numbers[chunk[found]]
        for table in self._fresh:
            missing = np.flatnonzero(chunk == UNKNOWN)
            if not len(missing):
                break
            chunk[missing], page[missing] = table.find(hashes[missing])
        chunk[(hashes == self._zero).all(axis=1)] = ZERO_PAGE
        return Places(chunk, page)

    def _remember(self, hashes: Hashes, places: Places) -> None:
        table = Table([], np.empty(0, np.int64), hashes, places)
        while self._fresh and len(self._fresh[-1]) <= 2 * len(table):
            table = self._fresh.pop().joined(table)
        self._fresh.append(table)

    def _number(self, held: int, known: bytes = b"") -> int:
        self._held.append(held)
        self._ids.append(known)
        return len(self._ids) - 1

    def _store_bulk(self, file: _File, batch: _Batch) -> None:
        for memory in batch.memory:
            for at in range(0, len(memory), CHUNK_BYTES):
                part = memory[at : at + CHUNK_BYTES]
                if not np.frombuffer(part, np.uint8).any():
                    file.sources += recipe.zeros(len(part))
                    continue
                number = self._number(0)
                batch.store(number, self._workers, self._chunks, [part])
                file.sources.append(Source(number, 0, len(part)))

    def _store_small(self, files: Mapping[str, bytes]) -> dict[str, recipe.Extents]:
        """Store small files one after the other in common chunks, as long as these are."""
        joined, made = b"".join(files.values()), {}
        numbers = []
        for at in range(0, len(joined), CHUNK_BYTES):
            numbers.append(self._number(0, self._chunks.add(joined[at : at + CHUNK_BYTES])))
        at = 0
        for name, data in files.items():
            sources, end = [], at + len(data)
            while at < end:
                index, offset = divmod(at, CHUNK_BYTES)
                length = min(end - at, CHUNK_BYTES - offset)
                sources.append(Source(numbers[index], offset, length))
                at += length
            made[name] = recipe.of_sources(sources)
        return made

    def _table(self) -> Table:
        """Return where each page of this image is, the zero ones left out."""
        done = [each for file in self._files.values() for each in file.done]
        if not done:
            return pages.empty()
        hashes = np.concatenate([each for file in self._files.values() for each in file.hashes])
        chunk = np.concatenate([each.chunk for each in done])
        page = np.concatenate([each.page for each in done])
        kept = np.flatnonzero(chunk >= 0)
        kept = kept[pages.firsts(hashes[kept]) == np.arange(len(kept))]
        held = np.array(self._held, np.int64)
        return Table(self._ids, held, hashes[kept], Places(chunk[kept], page[kept]))


class _Batch:
    """Consecutive pieces of one file, and the chunks that are being made of them."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.memory = [memoryview(piece.data) for piece in pieces]
        self.size = sum(map(len, self.memory))
        self.futures: list[tuple[int, Future[bytes]]] = []
        self._pieces = pieces
        self._ends = np.cumsum([len(each) // PAGE_BYTES for each in self.memory])

    def store(
        self, number: int, workers: ThreadPoolExecutor, chunks: Chunks, parts: list[memoryview]
    ) -> None:
        self.futures.append((number, workers.submit(_store, chunks, parts)))

    def parts(self, positions: Numbers) -> list[memoryview]:
        """Return the memory of these pages, in few parts."""
        piece = np.searchsorted(self._ends, positions, side="right")
        apart = (np.diff(positions) != 1) | (np.diff(piece) != 0)
        starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
        lengths = np.diff(np.concatenate([starts, [len(positions)]]))
        found = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            index, page = int(piece[start]), int(positions[start])
            offset = (page - (int(self._ends[index - 1]) if index else 0)) * PAGE_BYTES
            found.append(self.memory[index][offset : offset + length * PAGE_BYTES])
        return found

    def give_back(self) -> None:
        for _, future in self.futures:
            if not future.cancel():
                future.exception()  # until nobody reads the memory any more
        self.futures.clear()
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            piece.give_back()


def _fill(file: io.FileIO, buffer: memoryview) -> int:
    at = 0
    while at < len(buffer) and (count := file.readinto(buffer[at:])):
        at += count
    return at


def _store(chunks: Chunks, parts: list[memoryview]) -> bytes:
    if len(parts) > SCATTERED:
        return chunks.add(b"".join(parts))
    return chunks.add(*parts)


def _cut(positions: Numbers, ranges: Numbers) -> Iterator[Numbers]:
    """Yield the pages that make a chunk: those of one range of addresses where they are many, else
    those of several."""
    if not len(positions):
        return
    bounds = [0, *(np.flatnonzero(np.diff(ranges)) + 1).tolist(), len(positions)]
    begin = bounds[0]
    for start, end in pairwise(bounds):
        is_dense = end - start >= DENSE_PAGES
        if begin < start and (is_dense or end - begin > CHUNK_PAGES):
            yield positions[begin:start]
            begin = start
        while end - begin > CHUNK_PAGES:
            yield positions[begin : begin + CHUNK_PAGES]
            begin += CHUNK_PAGES
        if is_dense and begin < end:
            yield positions[begin:end]
            begin = end
    if begin < len(positions):
        yield positions[begin:]


def _extents(file: _File) -> recipe.Extents:
    if not file.done:
        return recipe.of_sources(file.sources)
    places = Places(
        np.concatenate([each.chunk for each in file.done]),
        np.concatenate([each.page for each in file.done]),
    )
    chunk, page, length = pages.runs(places)
    chunk = np.where(chunk == ZERO_PAGE, recipe.ZERO, chunk)
    page = np.where(chunk == recipe.ZERO, 0, page)
    return recipe.extents(chunk, page * PAGE_BYTES, length * PAGE_BYTES)
