"""What changed from one image to another: processes, their memory page by page, their open files.

Equal pages cost nothing: both recipes name the same bytes of the same chunk. Where they do not, the
bytes themselves are compared, as equal ones may have been stored twice. All of it is blocking work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from krgfs.facts import shown

from . import criu_images, criu_maps
from .criu_images import PAGE_BYTES
from .criu_maps import Mapped, OpenFile
from .opened import Opened
from .recipe import ZERO

RUN_PAGES = 256
AHEAD_BYTES = 16 << 20
Numbers = npt.NDArray[np.int64]
Told = Callable[[int], None]


class Side(NamedTuple):
    """An image, and the directory where its small files lie."""

    opened: Opened
    path: Path


class Memory(NamedTuple):
    """The pages of a page map: their numbers, in the order of the page file."""

    file: str
    numbers: Numbers


class Changes(NamedTuple):
    """The numbers of pages that differ, and of those that only one side has."""

    changed: Numbers
    added: Numbers
    removed: Numbers


class Tally(NamedTuple):
    pages: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0

    def __add__(self, other: tuple[int, ...]) -> Tally:  # type: ignore[override]
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return (
            f"pages {self.pages} changed {self.changed} added {self.added} removed {self.removed}"
        )


def differences(before: Side, after: Side, told: Told) -> Iterator[str]:
    """Yield the lines of a diff, the totals last; `told` is told of bytes as they are compared, and
    may raise. Damaged where an image is."""
    return _Comparison(before, after, told).lines()


class _Comparison:
    def __init__(self, before: Side, after: Side, told: Told) -> None:
        self._before, self._after, self._told = before, after, told
        self._files = [criu_maps.known_files(side.path) for side in (before, after)]
        ids = {id: number for number, id in enumerate(before.opened.recipe.chunks)}
        count = len(ids)
        self._renumbered = np.array(
            [ids.get(id, count + n) for n, id in enumerate(after.opened.recipe.chunks)], np.int64
        )
        self._shared: set[tuple[int, int]] = set()
        self._total = Tally()

    def lines(self) -> Iterator[str]:
        tasks = [
            {task.pid: task for task in criu_images.tasks(side.path)}
            for side in (self._before, self._after)
        ]
        for pid in sorted({**tasks[0], **tasks[1]}):
            word = "same" if pid in tasks[0] and pid in tasks[1] else "new"
            word = "gone" if pid not in tasks[1] else word
            task = tasks[1].get(pid) or tasks[0][pid]
            yield f"process {pid} {word} {shown(task.comm.encode(errors='surrogateescape'))}"
            yield from self._memory(pid)
            yield from self._open_files(pid)
        yield f"total processes {len(tasks[0].keys() | tasks[1].keys())} {self._total}"

    # -- memory

    def _memory(self, pid: int) -> Iterator[str]:
        old, new = (
            criu_maps.mappings(side.path, pid, files)
            for side, files in zip((self._before, self._after), self._files, strict=True)
        )
        own = self._changes(f"pagemap-{pid}.img", f"pagemap-{pid}.img")
        present = [_read(side, f"pagemap-{pid}.img") for side in (self._before, self._after)]
        for each in new:
            known = [other for other in old if other.overlaps(each)]
            if each.shmid:
                yield from self._shared_memory(each, known)
                continue
            tally = Tally(_within(present[1], each), *(_within(part, each) for part in own))
            yield from self._mapping(each, "changed" if known else "new", tally)
        for each in old:
            if not each.shmid and not any(other.overlaps(each) for other in new):
                tally = Tally(_within(present[0], each), 0, 0, _within(own.removed, each))
                yield from self._mapping(each, "gone", tally)

    def _shared_memory(self, each: Mapped, known: list[Mapped]) -> Iterator[str]:
        """Tell of memory that processes share, at the first of them."""
        old = next((other.shmid for other in known if other.shmid), 0)
        if (old, each.shmid) in self._shared:
            return
        self._shared.add((old, each.shmid))
        names = f"pagemap-shmem-{old}.img", f"pagemap-shmem-{each.shmid}.img"
        parts = self._changes(*names)
        pages = len(_read(self._after, names[1]))
        tally = Tally(pages, *(len(part) for part in parts))
        yield from self._mapping(each, "changed" if old else "new", tally)

    def _mapping(self, each: Mapped, word: str, tally: Tally) -> Iterator[str]:
        self._total += tally
        if word != "changed" or any(tally[1:]):
            where = f"{each.start:x}-{each.end:x}"
            yield f"mapping {where} {word} {each.kind} {tally} {each.name}".rstrip()

    def _changes(self, old: str, new: str) -> Changes:
        """Compare two page maps; one that is not there is empty."""
        before, after = _memory(self._before, old), _memory(self._after, new)
        _, a, b = np.intersect1d(before.numbers, after.numbers, return_indices=True)
        added, removed = np.delete(after.numbers, b), np.delete(before.numbers, a)
        a, b = a.astype(np.int64), b.astype(np.int64)
        places = _places(self._before, before), _places(self._after, after)
        if places[0] is not None and places[1] is not None:
            chunk = places[1][0].copy()
            is_real = chunk != ZERO
            chunk[is_real] = self._renumbered[chunk[is_real]]
            is_same = (places[0][0][a] == chunk[b]) & (places[0][1][a] == places[1][1][b])
            a, b = a[~is_same], b[~is_same]
        is_other = self._differ(before.file, a, after.file, b)
        return Changes(np.sort(before.numbers[a[is_other]]), np.sort(added), np.sort(removed))

    def _differ(self, old: str, a: Numbers, new: str, b: Numbers) -> npt.NDArray[np.bool_]:
        """Tell which pages of two page files differ, by reading both."""
        order = np.argsort(b, kind="stable")
        differ = np.zeros(len(a), bool)
        buffers = [bytearray(RUN_PAGES * PAGE_BYTES) for _ in range(2)]
        sources = self._before.opened.source, self._after.opened.source
        for run in _runs(a[order], b[order]):
            at = order[run]
            size = len(at) * PAGE_BYTES
            pages = []
            for source, file, first, buffer in zip(
                sources, (old, new), (a[at[0]], b[at[0]]), buffers, strict=True
            ):
                offset = int(first) * PAGE_BYTES
                source.ahead(file, offset, size + AHEAD_BYTES)
                source.read_into(file, offset, memoryview(buffer)[:size])
                pages.append(np.frombuffer(buffer, "<u8", size // 8).reshape(len(at), -1))
            differ[at] = (pages[0] != pages[1]).any(axis=1)
            self._told(2 * size)
        return differ

    # -- open files

    def _open_files(self, pid: int) -> Iterator[str]:
        old, new = (
            criu_maps.open_files(side.path, pid, files) if _has(side, pid) else {}
            for side, files in zip((self._before, self._after), self._files, strict=True)
        )
        for fd in sorted(old.keys() | new.keys()):
            if fd not in new:
                yield f"file {fd} closed {_shown(old[fd])}"
            elif fd not in old:
                yield f"file {fd} new {_shown(new[fd])}"
            elif old[fd] != new[fd]:
                yield f"file {fd} changed {_shown(new[fd])}{_moved(old[fd], new[fd])}"


def _has(side: Side, pid: int) -> bool:
    return (side.path / f"ids-{pid}.img").exists()


def _shown(file: OpenFile) -> str:
    return f"{file.type} {file.name}".rstrip()


def _moved(old: OpenFile, new: OpenFile) -> str:
    if (old.type, old.name) != (new.type, new.name):
        return f", was {_shown(old)}"
    parts = [("position", old.position, new.position), ("size", old.size, new.size)]
    return "".join(f", {what} {was} -> {now}" for what, was, now in parts if was != now)


def _memory(side: Side, name: str) -> Memory:
    if not (side.path / name).exists():
        return Memory("", np.empty(0, np.int64))
    file, ranges = criu_images.pagemap(side.path / name)
    numbers = [np.arange(at, at + count, dtype=np.int64) for at, count in ranges]
    return Memory(f"pages-{file}.img", np.concatenate([*numbers, np.empty(0, np.int64)]))


def _read(side: Side, name: str) -> Numbers:
    return np.sort(_memory(side, name).numbers)


def _within(numbers: Numbers, each: Mapped) -> int:
    low, high = np.searchsorted(numbers, [each.start // PAGE_BYTES, each.end // PAGE_BYTES])
    return int(high - low)


def _places(side: Side, memory: Memory) -> tuple[Numbers, Numbers] | None:
    """Return chunk and offset of each page; None where pages are not stored as such."""
    extents = side.opened.recipe.files.get(memory.file)
    if extents is None or np.any(extents["length"] % PAGE_BYTES):
        return None
    counts = extents["length"].astype(np.int64) // PAGE_BYTES
    if counts.sum() < len(memory.numbers):
        return None
    firsts = np.cumsum(counts) - counts
    within = (np.arange(counts.sum()) - np.repeat(firsts, counts)) * PAGE_BYTES
    chunk = np.repeat(extents["chunk"].astype(np.int64), counts)
    offset = np.repeat(extents["offset"].astype(np.int64), counts) + within
    offset[chunk == ZERO] = 0
    return chunk, offset


def _runs(a: Numbers, b: Numbers) -> Iterator[slice]:
    """Yield which lie one after the other on both sides, some at a time."""
    ends = np.flatnonzero((np.diff(a) != 1) | (np.diff(b) != 1)) + 1
    start = 0
    for end in (*ends.tolist(), len(a)):
        for at in range(start, end, RUN_PAGES):
            yield slice(at, min(at + RUN_PAGES, end))
        start = end
