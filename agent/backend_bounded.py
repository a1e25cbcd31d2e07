"""A back end that stops short: of a quota for packs, and of a floor of room for others.

Bounds hold for packs and manifests alone, which is what dumps write. Records of sessions and sweeps
are small and go through, and so does what a sweep writes anew: it makes room.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from msgspec.structs import replace

from krgfs import model
from krgfs.policy import size_text

from . import chunk_records, packs
from .backend import Backend, Data, Upload

FLOOR_BYTES, FLOOR_SHARE = 256 << 20, 100
LOOK_BYTES = 8 << 20  # so much is written between two looks at the room, at most


class Bounds(NamedTuple):
    """`quota_bytes` is for all packs, 0 no bound; `floor_bytes` of the room stay free, None the
    default: 256 MiB, or 1 % of all there is where that is less."""

    quota_bytes: int = 0
    floor_bytes: int | None = None

    def floor(self, room: model.Store) -> int:
        if self.floor_bytes is not None:
            return self.floor_bytes
        return min(FLOOR_BYTES, room.total // FLOOR_SHARE)


class BoundedBackend:
    """`inner` within bounds. Beyond them ENOSPC or EDQUOT, with a sentence for its strerror."""

    def __init__(self, inner: Backend, bounds: Bounds) -> None:
        self.inner, self.bounds = inner, bounds
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}  # of packs; only with a quota
        self._used = 0
        self._on_their_way = 0
        self._until_look = 0
        self._exempt = threading.local()
        self.list, self.read, self.read_into = inner.list, inner.read, inner.read_into
        self.now, self.tidy, self.close = inner.now, inner.tidy, inner.close
        self.count()

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        if not name.startswith((packs.PREFIX, chunk_records.MANIFESTS)):
            self.inner.put(name, data, replace=replace)
            return
        is_pack = name.startswith(packs.PREFIX)
        self.reserve(name, len(data), is_pack)
        try:
            self.inner.put(name, data, replace=replace)
        except BaseException:
            self.settle(name, len(data), is_pack, stored=False)
            raise
        self.settle(name, len(data), is_pack, stored=True)

    def create(self, name: str) -> Upload:
        return _BoundedUpload(self, name, self.inner.create(name))

    def delete(self, name: str) -> None:
        self.inner.delete(name)
        with self._lock:
            self._used -= self._sizes.pop(name, 0)
            self._until_look = 0

    def room(self) -> model.Store:
        room, quota = self.inner.room(), self.bounds.quota_bytes
        if not quota:
            return room
        left = max(0, quota - self._used)
        return replace(
            room,
            total=min(room.total, quota),
            free=min(room.free, left),
            available=min(room.available, left),
        )

    # -- what there is

    def count(self) -> None:
        """Learn what others have stored and removed."""
        if not self.bounds.quota_bytes:
            return
        with self._lock:
            self._sizes = {entry.name: entry.size for entry in self.inner.list(packs.PREFIX)}
            self._used = sum(self._sizes.values())

    def check(self) -> None:
        """Raise what a dump that began now would be refused with: EDQUOT where the quota is used
        up, ENOSPC where no more than the floor is left."""
        try:
            self._check()
        except OSError:
            self.count()
            self._check()

    def _check(self) -> None:
        with self._lock:
            self._look("", 1)
            self._charge("", 1)

    @contextmanager
    def exempt(self) -> Iterator[None]:
        """Let this thread write beyond the bounds, inside."""
        self._exempt.now = True
        try:
            yield
        finally:
            self._exempt.now = False

    # -- for uploads

    def reserve(self, name: str, size: int, is_pack: bool = True) -> None:
        """Take so much of what is left; raises when it is not there."""
        with self._lock:
            if not getattr(self._exempt, "now", False):
                if size > self._until_look:
                    self._look(name, size)
                if is_pack:
                    self._charge(name, size)
            self._until_look -= size
            self._on_their_way += size if is_pack else 0

    def settle(self, name: str, size: int, is_pack: bool = True, *, stored: bool) -> None:
        """What was reserved is stored now, or given up."""
        with self._lock:
            if is_pack:
                self._on_their_way -= size
            if stored and is_pack and self.bounds.quota_bytes:
                self._sizes[name] = size
                self._used += size

    def _look(self, name: str, size: int) -> None:
        room = self.inner.room()
        floor = self.bounds.floor(room)
        left = room.available - floor
        if left < size:
            raise OSError(
                errno.ENOSPC,
                f"{size_text(room.available)} of {size_text(room.total)} are free in the image "
                f"store, and {size_text(floor)} stay free for others (--floor)",
                name,
            )
        self._until_look = min(left, size + LOOK_BYTES)

    def _charge(self, name: str, size: int) -> None:
        quota = self.bounds.quota_bytes
        used = self._used + self._on_their_way
        if quota and used + size > quota:
            raise OSError(
                errno.EDQUOT,
                f"{size_text(used)} of the {size_text(quota)} that the image store may take "
                "(--quota) are used",
                name,
            )


@contextmanager
def unbounded(backend: Backend) -> Iterator[None]:
    """Let this thread write to a back end beyond its bounds, if it has some."""
    with backend.exempt() if isinstance(backend, BoundedBackend) else nullcontext():
        yield


def kind_of(backend: Backend) -> str:
    """Return a word for what a back end keeps objects in."""
    inner = backend.inner if isinstance(backend, BoundedBackend) else backend
    return type(inner).__name__.removesuffix("Backend").lower()


class _BoundedUpload:
    def __init__(self, backend: BoundedBackend, name: str, inner: Upload) -> None:
        self._backend, self._name, self._inner = backend, name, inner
        self._is_pack = name.startswith(packs.PREFIX)
        self._lock = threading.Lock()
        self._size = 0
        self._is_over = False

    def append(self, *parts: Data) -> int:
        size = sum(memoryview(part).nbytes for part in parts)
        self._backend.reserve(self._name, size, self._is_pack)
        with self._lock:
            self._size += size
        return self._inner.append(*parts)

    def commit(self) -> None:
        self._inner.commit()
        self._settle(stored=True)

    def abort(self) -> None:
        try:
            self._inner.abort()
        finally:
            self._settle(stored=False)

    def _settle(self, *, stored: bool) -> None:
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if not was_over:
            self._backend.settle(self._name, self._size, self._is_pack, stored=stored)
