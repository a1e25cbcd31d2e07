"""Blocking work on the files of the image store: in threads, durable, and refused in sentences.

`run` takes such work off the event loop; all else here is such work. What it changes is on the disk
when it returns, except for `write` and `own`, after which `sync` is due. Whatever the kernel
refuses comes out as NoRoom, OverQuota, Gone or EngineFailed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import trio

from krgfs.errors import EngineFailed, Gone, KrgError, NoRoom, OverQuota

MAKE_ROOM = (
    "remove images that nobody needs (rmdir /krg/images/APP/vN, or keep in its policy), "
    "then try again"
)

T = TypeVar("T")


async def run(action: str, work: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """Do blocking work in a thread; what the kernel refuses is told as `action`."""

    def told() -> T:
        with explained(action):
            return work()

    return await trio.to_thread.run_sync(told, limiter=limiter)


@contextlib.contextmanager
def explained(action: str) -> Iterator[None]:
    """Turn the kernel's refusals into sentences that begin with `action`."""
    try:
        yield
    except OSError as exc:
        raise _error(action, exc) from exc


def _reason(exc: OSError, text: str) -> str:
    """Return what an error of ours says, or what is said for one of the kernel's."""
    said = exc.strerror
    return said if said and said != os.strerror(exc.errno or 0) else text


def _error(action: str, exc: OSError) -> KrgError:
    if exc.errno == errno.ENOSPC:
        return NoRoom(f"{action}: {_reason(exc, 'no room left in the image store')}; {MAKE_ROOM}")
    if exc.errno == errno.EDQUOT:
        return OverQuota(f"{action}: {_reason(exc, 'the quota is used up')}; {MAKE_ROOM}")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return Gone(f"{action}: it is not there")
    if exc.errno == errno.EROFS:
        return EngineFailed(
            f"{action}: the filesystem of the image store is read-only; see dmesg, mount it anew"
        )
    return EngineFailed(f"{action}: {exc.strerror or exc}; see the kernel's log (dmesg)")


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Open a regular file, and nothing else."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENOENT, "not a file")
        yield fd
    finally:
        os.close(fd)


def write(path: str, data: bytes) -> None:
    """Make a file (0600) of these contents, or give it them."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)


def own(path: str, uid: int, gid: int, mode: int) -> None:
    """Give a file or directory this owner and mode."""
    facts = os.stat(path)
    if (facts.st_uid, facts.st_gid) != (uid, gid):
        os.chown(path, uid, gid)
    os.chmod(path, mode)


def sync(path: str) -> None:
    """Make a file or directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(path: str) -> None:
    """Take a directory out of sight, then delete it."""
    folder, name = os.path.split(path)
    trash = os.path.join(folder, f".trash-{name.lstrip('.')}-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, trash)
        delete(trash)


def delete(path: str) -> bool:
    """Delete a directory and say whether all of it went; what did not is left to the next agent."""
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)
