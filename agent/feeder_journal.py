"""What a feeder's worker has learned, in memory that it shares with the holder.

An event of the kernel is told once, to whoever reads it. So it is read right into this memory: a
worker that is killed at any instant either did not read an event, or left it here for the next one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

from . import feeder_uffd as uffd
from .feeder_uffd import Event

TASK, CLOSED = 1, 2  # records of our own, beside the events: a descriptor that came, and went
HEAD_BYTES = 64
FD = struct.Struct("=Q")
OWN = struct.Struct("=7xQQQ")
RECORD_BYTES = FD.size + uffd.MESSAGE_BYTES
LIMIT_BYTES = 16 << 20  # 400,000 events; takes as much memory as there are


class Journal:
    """Records in the order in which they came. One process at a time may add to them."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._map = mmap.mmap(-1, limit_bytes)  # shared with all who are forked from here
        self._view = memoryview(self._map)
        self._end = HEAD_BYTES
        self._last = limit_bytes - RECORD_BYTES

    @property
    def is_whole(self) -> bool:
        """Tell whether all that came is still here: there is an end to its room."""
        return self._view[0] == 0

    def task(self, fd: int, pid: int) -> None:
        """Write down that `fd` fills the memory of a process (its own number for itself)."""
        self._note(TASK, fd, pid)

    def closed(self, fd: int) -> None:
        """Write down that a descriptor is about to be closed."""
        self._note(CLOSED, fd, 0)

    def take(self, fd: int) -> Event | None:
        """Read what a userfaultfd tells next, None when that is nothing, and keep it unless it is a
        page fault: those come again. Raises OSError."""
        at = self._slot()
        FD.pack_into(self._view, at, fd)
        message = self._view[at + FD.size : at + RECORD_BYTES]
        try:
            os.readv(fd, [message])
        except BlockingIOError:
            return None
        found = uffd.event(message)
        if found.kind != uffd.PAGEFAULT:
            self._keep(at)
        return found

    def replayed(self) -> Iterator[tuple[int, Event]]:
        """Yield what is written down, each with the descriptor that it is about; what is added
        later comes behind it."""
        at = HEAD_BYTES
        while at <= self._last:
            (fd,) = FD.unpack_from(self._view, at)
            found = uffd.event(self._view[at + FD.size : at + RECORD_BYTES])
            if found.kind in (0, uffd.PAGEFAULT):  # nothing is written behind either
                break
            at += RECORD_BYTES
            yield fd, found
        self._end = at

    def _slot(self) -> int:
        if self._end > self._last:
            self._view[0] = 1
            return self._last
        return self._end

    def _keep(self, at: int) -> None:
        if self.is_whole:
            self._end = at + RECORD_BYTES

    def _note(self, kind: int, fd: int, what: int) -> None:
        at = self._slot()
        self._view[at + FD.size] = 0
        FD.pack_into(self._view, at, fd)
        OWN.pack_into(self._view, at + FD.size + 1, what, 0, 0)
        self._view[at + FD.size] = kind
        self._keep(at)
