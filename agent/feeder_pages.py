"""What an address space still lacks, and what becomes of that as its process changes its mappings.

A run is a stretch of addresses whose pages are consecutive in a page file of the image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

_START = attrgetter("start")


class Run(NamedTuple):
    """Addresses, where their content is in pages-FILE.img, and whether a child that is forked gets
    it too (not so after MADV_WIPEONFORK)."""

    start: int
    end: int
    file: int
    offset: int
    is_inherited: bool = True

    def clipped(self, start: int, end: int) -> Run:
        """Return what of it lies between two addresses; empty or negative where nothing does."""
        start, end = max(start, self.start), min(end, self.end)
        return self._replace(start=start, end=end, offset=self.offset + start - self.start)

    def is_part_of(self, whole: Run) -> bool:
        """Tell whether the content is where `whole` says that it is."""
        return (
            whole.start <= self.start
            and self.end <= whole.end
            and self.file == whole.file
            and self.start - self.offset == whole.start - whole.offset
        )


class Lacking:
    """The runs that an address space lacks, by address. Not thread-safe."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = sorted(runs)
        self.bytes = sum(run.end - run.start for run in self._runs)

    def forked(self) -> Lacking:
        """Return what a child lacks that is forked now."""
        return Lacking(run for run in self._runs if run.is_inherited)

    def parts(self, start: int, end: int) -> list[Run]:
        """Return what is lacking between two addresses."""
        first, last = self._overlapping(start, end)
        return [run.clipped(start, end) for run in self._runs[first:last]]

    def next(self, start: int, limit_bytes: int) -> Run | None:
        """Return what is lacking first at or after an address, at most so many bytes of it."""
        first, _ = self._overlapping(start, start)
        if first == len(self._runs):
            return None
        run = self._runs[first]
        start = max(start, run.start)
        return run.clipped(start, start + limit_bytes)

    def around(self, address: int, window_bytes: int) -> Run | None:
        """Return the run at an address within the aligned window that it lies in, None where
        nothing is lacking there: such a page is a new one."""
        start = address - address % window_bytes
        for part in self.parts(start, start + window_bytes):
            if part.start <= address < part.end:
                return part
        return None

    def drop(self, start: int, end: int) -> None:
        """Forget what lies between two addresses: it is there now, or shall not be."""
        first, last = self._overlapping(start, end)
        left = []
        for run in self._runs[first:last]:
            gone = run.clipped(start, end)
            self.bytes -= gone.end - gone.start
            left += [run.clipped(run.start, gone.start), run.clipped(gone.end, run.end)]
        if first < last:
            self._runs[first:last] = [run for run in left if run.start < run.end]

    def move(self, start: int, to: int, length: int) -> None:
        """Follow mremap(2): what lay between `start` and `start + length` lies at `to`."""
        moved = self.parts(start, start + length)
        self.drop(start, start + length)
        self.drop(to, to + length)
        by = to - start
        self.bytes += sum(run.end - run.start for run in moved)
        at = bisect_right(self._runs, to, key=_START)
        self._runs[at:at] = [run._replace(start=run.start + by, end=run.end + by) for run in moved]

    def _overlapping(self, start: int, end: int) -> tuple[int, int]:
        """Return the indices of the first run that ends after `start`, and of the first after that
        one which begins at `end` or later."""
        first = max(0, bisect_right(self._runs, start, key=_START) - 1)
        while first < len(self._runs) and self._runs[first].end <= start:
            first += 1
        last = first
        while last < len(self._runs) and self._runs[last].start < end:
            last += 1
        return first, last
