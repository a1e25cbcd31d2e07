"""userfaultfd(2) and ioctl_userfaultfd(2) of Linux: memory that another process fills in.

Whoever holds the last copy of such a descriptor closes it for good: what is not there by then is
zero pages from there on, without a word to anybody.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from typing import NamedTuple

PAGE = mmap.PAGESIZE

UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
RANGE = struct.Struct("=QQ")
COPY = struct.Struct("=QQQQq")  # to, from, length, mode, copied
ZEROPAGE = struct.Struct("=QQQq")

PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
MESSAGE_BYTES = 32
_MESSAGE = struct.Struct("=B7xQQQ")

LOWEST = 1 << 16  # vm.mmap_min_addr
HIGHEST = (1 << 47) - PAGE


class Event(NamedTuple):
    """What the kernel tells of an address space: `kind`, and what that takes.

    PAGEFAULT: flags, address. FORK: descriptor. REMAP: from, to, length. REMOVE, UNMAP: start, end.
    """

    kind: int
    a: int = 0
    b: int = 0
    c: int = 0


def event(message: memoryview | bytes) -> Event:
    """Take apart what was read from a userfaultfd."""
    found = Event(*_MESSAGE.unpack(message))
    return found._replace(a=found.a & 0xFFFFFFFF) if found.kind == FORK else found


def copy(uffd: int, to: int, source: int, length: int) -> tuple[int, int]:
    """Put memory of ours at address `source` where it is missing; wakes who waits for it.

    Returns how many bytes came in, and with 0 the errno: EEXIST, the first page is there already;
    ENOENT, the range is not all in one mapping of this userfaultfd; EAGAIN, there is an event to be
    read first; ESRCH, the address space is gone.
    """
    words = bytearray(COPY.pack(to, source, length, 0, 0))
    try:
        fcntl.ioctl(uffd, UFFDIO_COPY, words)
    except OSError as exc:
        copied = COPY.unpack(words)[4]
        return (copied, 0) if copied > 0 else (0, exc.errno or errno.EIO)
    return length, 0


def zero(uffd: int, at: int) -> int:
    """Put a page of zeros where one is missing. Returns 0 or the errno, as `copy` does."""
    words = bytearray(ZEROPAGE.pack(at, PAGE, 0, 0))
    try:
        fcntl.ioctl(uffd, UFFDIO_ZEROPAGE, words)
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


def wake(uffd: int, start: int = LOWEST, end: int = HIGHEST) -> None:
    """Have all who wait in a range look again: they run on, or fault anew and are told again."""
    fcntl.ioctl(uffd, UFFDIO_WAKE, RANGE.pack(start, end - start))


def is_gone(uffd: int) -> bool:
    """Tell whether no process has this address space any more. Changes nothing in one that lives:
    what it would copy from is memory that we do not have."""
    return copy(uffd, HIGHEST - PAGE, LOWEST, PAGE)[1] == errno.ESRCH


def is_one(fd: int) -> bool:
    """Tell whether an open descriptor is a userfaultfd."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
