"""What the image store keeps its objects in: the protocol that every back end has, and the one in
memory, which tests use.

An object is a name (`packs/ab/ab12…`: words between slashes, of letters, digits and `._~+@%:,=-`,
the dot not first) and bytes. It comes to be whole and durable or not at all, and never changes:
what is replaced is replaced whole. All calls block; any thread makes them.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from krgfs import model

DAY_S = 86400.0
Data = bytes | bytearray | memoryview


_NAME = re.compile(r"(?!\.)[\w.~+@%:,=-]+(/(?!\.)[\w.~+@%:,=-]+)*", re.ASCII)


def refusal(number: int, name: str) -> OSError:
    """Return the error of this errno about an object, as the kernel would word it."""
    return OSError(number, os.strerror(number), name)


def checked(name: str) -> str:
    """Return `name` if an object may have it, else raise EINVAL: no way leads out of the store."""
    if not _NAME.fullmatch(name):
        raise refusal(errno.EINVAL, name)
    return name


class Entry(NamedTuple):
    """An object in a listing; `modified` is by the back end's own clock (seconds since the epoch),
    which `now` reads."""

    name: str
    size: int
    modified: float


class Upload(Protocol):
    """An object on its way. Nobody sees it before `commit`; one of commit and abort is due."""

    def append(self, *parts: Data) -> int:
        """Add bytes at the end, one part after the other, and return the offset of the first.

        Several threads may append at once: each appends without gaps of its own. The parts may be
        changed again on return.
        """
        ...

    def commit(self) -> None:
        """Make the object be: whole, durable and seen by all on return."""
        ...

    def abort(self) -> None:
        """Forget it; after a failed commit too, and more than once."""
        ...


class Backend(Protocol):
    """Objects by name. Whatever goes wrong is an OSError, with the errno that fits: ENOENT
    (FileNotFoundError) for what is not there, EEXIST (FileExistsError), ENOSPC, EDQUOT, EACCES,
    ETIMEDOUT, EIO for the rest; and it names the object."""

    def list(self, prefix: str) -> list[Entry]:
        """Return all whole objects whose names begin with `prefix`, by name; it ends in a slash or
        is empty. What is on its way is not among them."""
        ...

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of an object from `offset` (negative: from its end), fewer at its end."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on, and return how much there was."""
        ...

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        """Make an object of these bytes, durably. Without `replace` FileExistsError where there is
        one of that name, also when two do it at once: one of them has it then."""
        ...

    def create(self, name: str) -> Upload:
        """Begin an object of a name that nobody else uses."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object, durably; it is no error when there is none."""
        ...

    def now(self) -> float:
        """Return the time by the clock that `Entry.modified` has."""
        ...

    def room(self) -> model.Store:
        """Return how much room there is."""
        ...

    def tidy(self, older_s: float = DAY_S) -> None:
        """Remove what writers had not finished that died longer ago than this."""
        ...

    def close(self) -> None:
        """Let go of what is held; nothing is called afterwards."""
        ...


class MemoryBackend:
    """Objects in memory, of up to `room_bytes` in all (ENOSPC beyond)."""

    def __init__(self, room_bytes: int = 1 << 40, clock: Callable[[], float] = time.time) -> None:
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._room_bytes = room_bytes
        self._lock = threading.Lock()
        self.now = clock

    def list(self, prefix: str) -> list[Entry]:
        with self._lock:
            found = sorted(self._objects.items())
        return [
            Entry(name, len(data), modified)
            for name, (data, modified) in found
            if name.startswith(prefix)
        ]

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        data = self._get(name)
        start = max(0, len(data) + offset) if offset < 0 else offset
        return data[start : len(data) if size is None else start + size]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        data = self.read(name, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        checked(name)
        with self._lock:
            if name in self._objects and not replace:
                raise refusal(errno.EEXIST, name)
            rest = sum(len(each) for other, (each, _) in self._objects.items() if other != name)
            if rest + len(data) > self._room_bytes:
                raise refusal(errno.ENOSPC, name)
            self._objects[name] = (bytes(data), self.now())

    def create(self, name: str) -> Upload:
        return _MemoryUpload(self, checked(name))

    def delete(self, name: str) -> None:
        checked(name)
        with self._lock:
            self._objects.pop(name, None)

    def room(self) -> model.Store:
        with self._lock:
            used = sum(len(data) for data, _ in self._objects.values())
        left = self._room_bytes - used
        return model.Store(
            total=self._room_bytes, free=left, available=left, files=1 << 40, files_free=1 << 40
        )

    def tidy(self, older_s: float = DAY_S) -> None:
        pass

    def close(self) -> None:
        pass

    def _get(self, name: str) -> bytes:
        checked(name)
        with self._lock:
            if name not in self._objects:
                raise refusal(errno.ENOENT, name)
            return self._objects[name][0]


class _MemoryUpload:
    def __init__(self, backend: MemoryBackend, name: str) -> None:
        self._backend, self._name = backend, name
        self._data = bytearray()
        self._lock = threading.Lock()

    def append(self, *parts: Data) -> int:
        with self._lock:
            offset = len(self._data)
            for part in parts:
                self._data += part
        return offset

    def commit(self) -> None:
        self._backend.put(self._name, bytes(self._data))

    def abort(self) -> None:
        self._data.clear()
