"""The mounted files as the commands of `krg` see them: reading, and writing a verb.

Every error of open, read or write becomes one of `krgfs.errors`, with the sentence that the verb
file itself has. Files are never created here: a bare mountpoint takes no command.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .errors import Gone, KrgError, NotYours, Unreachable, from_errno

ANSWER_BYTES = 65536


class Files(NamedTuple):
    """A mountpoint, by its path."""

    mount: str

    def path(self, *parts: str) -> str:
        return os.path.join(self.mount, *parts)

    def process(self, pid: str) -> str:
        """Return the directory of a process: PID on this node, NODE:PID on any."""
        node, colon, number = pid.rpartition(":")
        if not number.isdecimal():
            raise Gone(f"{pid!r} is not a process: write PID or NODE:PID")
        return self.path("nodes", node, "procs", number) if colon else self.path("procs", number)

    def read(self, *parts: str) -> str:
        """Return the text of a file."""
        path = self.path(*parts)
        with self.explained(path), open(path, "rb") as file:
            return file.read().decode("utf-8", "backslashreplace")

    def line(self, *parts: str) -> str:
        return self.read(*parts).rstrip("\n")

    def pairs(self, *parts: str) -> dict[str, str]:
        """Return a flat-keyed file as a mapping."""
        lines = (line.partition(" ") for line in self.read(*parts).splitlines())
        return {key: value for key, _, value in lines}

    def names(self, *parts: str) -> list[str]:
        """Return the names in a directory."""
        path = self.path(*parts)
        with self.explained(path):
            return os.listdir(path)

    def numbers(self, *parts: str) -> list[int]:
        """Return the names in a directory that are numbers, in order."""
        return sorted(int(name) for name in self.names(*parts) if name.isdecimal())

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """Enter the block with a verb file open for writing and reading back."""
        with self.explained(path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def require(self) -> None:
        """Raise Unreachable, with what to do, when nothing answers at the mountpoint."""
        self.read("version")

    @contextmanager
    def explained(self, path: str) -> Iterator[None]:
        """Enter the block so that what is refused there becomes an error with a sentence."""
        try:
            yield
        except OSError as exc:
            raise self._error(path, exc.errno or errno.EIO) from exc

    def _error(self, path: str, number: int) -> KrgError:
        if number in (errno.ENOTCONN, errno.ECONNABORTED):
            return Unreachable(f"the mount at {self.mount} is dead; `krg up` brings it back")
        if not _is_there(self.path("version")):
            return Unreachable(f"krgfs is not mounted at {self.mount}; `krg up` starts it")
        what = _shown(os.path.relpath(path, self.mount))
        if number in (errno.ENOENT, errno.ESRCH, errno.ENOTDIR):
            return Gone(f"there is no {what}")
        if number in (errno.EACCES, errno.EPERM):
            return NotYours(f"{what} belongs to somebody else; be its owner, or root")
        return from_errno(number, f"{what}: {os.strerror(number)}")


def write(fd: int, line: str) -> None:
    """Write one command, once: a write that ends with EINTR is not repeated as os.write would, for
    the repetition would begin a new job after a cancelled one (PEP 475)."""
    import ctypes

    data = line.encode("utf-8", "surrogateescape")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.write(fd, data, ctypes.c_size_t(len(data))) < 0:
        raise _refusal(ctypes.get_errno(), answer(fd))


def answer(fd: int) -> str:
    """Return the line that a verb file reads back."""
    try:
        return os.read(fd, ANSWER_BYTES).decode("utf-8", "backslashreplace").rstrip("\n")
    except OSError:
        return ""


def error_of(line: str) -> KrgError | None:
    """Return what a read-back line of the form `error ERRNO sentence` stands for, else None."""
    word, _, rest = line.partition(" ")
    if word != "error":
        return None
    name, _, sentence = rest.partition(" ")
    number = getattr(errno, name, errno.EIO)
    return from_errno(number, sentence or os.strerror(number))


def _refusal(number: int, line: str) -> KrgError:
    said = error_of(line)
    if said is not None and said.errno == number:
        return said
    if number in (errno.EACCES, errno.EPERM):
        return NotYours("it belongs to somebody else; be its owner, or root")
    return from_errno(number, said.message if said else os.strerror(number))


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def _shown(relative: str) -> str:
    parts = relative.split("/")
    if "procs" in parts[:-1]:
        return f"process {parts[parts.index('procs') + 1]}"
    if parts[0] == "jobs" and len(parts) > 1:
        return f"job {parts[1]}"
    if parts[0] == "images" and len(parts) > 1:
        return f"app {parts[1]}"
    if parts[0] == "nodes" and len(parts) > 1:
        return f"node {parts[1]}"
    return relative
