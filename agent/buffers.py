"""Memory that image files are captured into: a bounded number of buffers, and what is in them."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

BUFFER_BYTES = 1 << 20
LEAST_BUFFERS, SPARE_BUFFERS = 16, 16
TOUCH_BYTES = 32 << 20
MADV_POPULATE_WRITE = 23  # madvise(2)

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Buffers:
    """A bounded number of equal buffers, lent and given back; any thread may do either.

    They are best made once and kept: the first touch of memory costs more than copying into it.
    """

    def __init__(self, count: int, size_bytes: int = BUFFER_BYTES) -> None:
        self.count, self.size_bytes = count, size_bytes
        memory = mmap.mmap(-1, count * size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # no huge pages: a guest's balloon gives free ones back to the host, and to have them again
        # took five times as long as small ones
        self._memory = memory
        whole = memoryview(memory)
        self._views = [whole[at : at + size_bytes] for at in range(0, len(whole), size_bytes)]
        self._free = list(range(count))
        self._is_free = bytearray(b"\1" * count)
        self._changed = threading.Condition()

    def touch(self, check: Callable[[], None] = lambda: None) -> None:
        """Have the kernel back all of it by real memory. Blocks, other threads run on; `check` is
        called now and then and may raise."""
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            try:
                for _ in workers.map(self._touch, range(0, len(self._memory), TOUCH_BYTES)):
                    check()
            finally:
                workers.shutdown(cancel_futures=True)

    def _touch(self, offset: int) -> None:
        # not mmap.madvise, which keeps all other threads waiting; before Linux 5.14 it fails, and
        # memory comes as it is used
        size = min(TOUCH_BYTES, len(self._memory) - offset)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory, offset))
        _madvise(start, size, MADV_POPULATE_WRITE)

    def __getitem__(self, index: int) -> memoryview:
        return self._views[index]

    def lend(self, unless: Callable[[], bool] | None = None) -> int | None:
        """Return the index of a buffer that is the caller's until given back.

        Waits while there is none, until `unless` holds (see `look_again`), and then returns None;
        without `unless` it does not wait.
        """
        with self._changed:
            while not self._free:
                if unless is None or unless():
                    return None
                self._changed.wait()
            index = self._free.pop()
            self._is_free[index] = False
            return index

    def look_again(self) -> None:
        """Let all who wait ask their `unless` again."""
        with self._changed:
            self._changed.notify_all()

    def give_back(self, index: int) -> None:
        """Take a buffer back. Raises ValueError where it was not lent: two would write into it."""
        with self._changed:
            if self._is_free[index]:
                raise ValueError(f"buffer {index} was given back already")
            self._is_free[index] = True
            self._free.append(index)
            self._changed.notify()

    @property
    def free(self) -> int:
        return len(self._free)


class Home(Protocol):
    """What memory is given back to; the number is its own affair."""

    def give_back(self, index: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of an image file: `data` holds until `give_back`, which is due once.

    The pieces of one file follow each other without gaps. Their lengths mean nothing.
    """

    file: str
    offset: int
    data: memoryview | bytes
    _home: Home | None = None
    _index: int = -1

    def give_back(self) -> None:
        if self._home is not None:
            self._home.give_back(self._index)


class Reserve:
    """Buffers for dumps: bounded for all of them together (0: by a quarter of the memory that is
    free), but for LEAST_BUFFERS that everybody gets. They are kept for a while: they are warm."""

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit = limit_bytes
        self._lent = 0
        self._spare: Buffers | None = None
        self._used = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def lent(
        self, expected_bytes: int, check: Callable[[], None] = lambda: None
    ) -> Iterator[Buffers]:
        """Lend touched buffers for so many bytes, fewer where the limit does not let as many.

        Raises OSError where there is no memory for them.
        """
        most = self._limit or psutil.virtual_memory().available // 4
        with self._lock:
            left = max(0, most - self._lent) // BUFFER_BYTES
            wanted = expected_bytes // BUFFER_BYTES + SPARE_BUFFERS
            count = max(LEAST_BUFFERS, min(wanted, left))
            spare, self._spare = self._spare, None
            if spare is not None and count <= spare.count <= count + count // 4:
                count = spare.count
            self._lent += count * BUFFER_BYTES
        buffers = None
        try:
            if spare is not None and spare.count == count:
                buffers = spare
            else:
                spare = None  # its memory first
                buffers = Buffers(count)
                buffers.touch(check)
            yield buffers
        finally:
            with self._lock:
                self._lent -= count * BUFFER_BYTES
                if buffers is not None and buffers.free == buffers.count:
                    self._spare, self._used = buffers, time.monotonic()

    def trim(self, idle_s: float) -> None:
        with self._lock:
            if time.monotonic() - self._used >= idle_s:
                self._spare = None
