"""Memory that image files are captured into: a bounded number of buffers, and what is in them."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

BUFFER_BYTES = 1 << 20
MADV_POPULATE_WRITE = 23  # madvise(2), which Python lacks


class Buffers:
    """A bounded number of equal buffers, lent and given back; any thread may do either.

    They are best made once and kept: the first touch of memory costs more than copying into it.
    """

    def __init__(self, count: int, size_bytes: int = BUFFER_BYTES) -> None:
        self.count, self.size_bytes = count, size_bytes
        memory = mmap.mmap(-1, count * size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memory
        whole = memoryview(memory)
        self._views = [whole[at : at + size_bytes] for at in range(0, len(whole), size_bytes)]
        self._free = list(range(count))
        self._changed = threading.Condition()

    def touch(self) -> None:
        """Have the kernel back all of it by real memory. Blocks, other threads run on."""
        with contextlib.suppress(OSError):  # before Linux 5.14 it comes as it is used
            self._memory.madvise(MADV_POPULATE_WRITE)

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
            return self._free.pop()

    def look_again(self) -> None:
        """Let all who wait ask their `unless` again."""
        with self._changed:
            self._changed.notify_all()

    def give_back(self, index: int) -> None:
        """Take a buffer back. Raises ValueError where it was not lent: two would write into it."""
        with self._changed:
            if index in self._free:
                raise ValueError(f"buffer {index} was given back already")
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
