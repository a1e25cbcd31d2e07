"""Copies of images that are taken in: each grows in a directory of its own until it is a version.

A copy of an image has a manifest, and is whole when all is there that it names, and matches. A
directory that plain CRIU wrote has none, and gets one of what its files say of themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager

import msgspec
import trio

from krgfs.errors import BadWords, CannotRunHere, Damaged, Exists, Gone, NotYours

from . import contents, criu_images, durable
from .manifest import MANIFEST, Manifest, file_name
from .places import Places


class _Import:
    """What is known of an import: `whole` is the manifest that it matches, until it is changed;
    `is_version` says that a version was made of it."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.whole: Manifest | None = None
        self.is_version = False


class Imports:
    """The imports of this node (`vN` or `vN.part` of an app); each is changed by one at a time.

    Errors are those of Images.
    """

    def __init__(self, places: Places, bulk: trio.CapacityLimiter) -> None:
        self._places = places
        self._bulk = bulk
        self._known: dict[tuple[str, str], _Import] = {}

    async def begin(self, app: str, name: str, uid: int, gid: int) -> None:
        """Make an empty import (`vN` or `vN.part`), which will be an image of uid and gid."""
        path = self._places.imported(app, name)

        def work() -> None:
            if os.path.lexists(path):
                raise Exists(f"cannot make {app}/{name}: it exists; remove it, or take another")
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            os.mkdir(path, 0o700)
            durable.own(path, uid, gid, 0o700)
            durable.sync(os.path.dirname(path))

        await durable.run(f"cannot make {app}/{name}", work)

    async def write_file(self, app: str, name: str, file: str, offset: int, data: bytes) -> None:
        """Make `file` of an import if it is not there, and write `data` whole at `offset`."""
        async with self._changing(app, name) as path:

            def work() -> None:
                self._check_size(offset, offset + len(data))
                target = os.path.join(path, file_name(file))
                if "/" in file:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(os.path.dirname(target), 0o700)
                with durable.opened(target, os.O_WRONLY | os.O_CREAT) as fd:
                    at, rest = offset, memoryview(data)
                    while rest:
                        count = os.pwrite(fd, rest, at)
                        at, rest = at + count, rest[count:]

            await durable.run(f"cannot write {app}/{name}/{file}", work)

    async def truncate_file(self, app: str, name: str, file: str, size: int) -> None:
        """Give `file` of an import this size."""
        async with self._changing(app, name) as path:

            def work() -> None:
                self._check_size(size, size)
                with durable.opened(os.path.join(path, file_name(file)), os.O_WRONLY) as fd:
                    os.ftruncate(fd, size)

            await durable.run(f"cannot set the size of {app}/{name}/{file}", work)

    async def remove_file(self, app: str, name: str, file: str) -> None:
        """Remove `file` from an import."""
        async with self._changing(app, name) as path:
            await durable.run(
                f"cannot remove {app}/{name}/{file}",
                lambda: os.unlink(os.path.join(path, file_name(file))),
            )

    async def remove(self, app: str, name: str) -> None:
        """Remove an import and all that was copied into it, if it is there."""
        with contextlib.suppress(Gone):
            async with self._importing(app, name) as (path, known):
                known.whole = None
                await durable.run(f"cannot remove {app}/{name}", lambda: durable.discard(path))
                known.is_version = False

    async def reopen(self, app: str, name: str) -> None:
        """Let an import be changed again: the version that was made of it is no more."""
        with contextlib.suppress(Gone):
            async with self._importing(app, name) as (_, known):
                known.is_version = False

    async def whole(self, app: str, name: str) -> Manifest | None:
        """Return the manifest of an import in which all is there that it names, and matches.

        None also where it has no manifest, or one that cannot be used: `finish` says why. Costs
        little while names or sizes differ; then everything is read.
        """
        async with self._importing(app, name) as (path, known):
            ref = f"{app}/{name}"

            def work() -> Manifest | None:
                try:
                    manifest = contents.read_manifest(path, ref)
                    wrong = contents.damage(path, manifest, ref)
                except (Damaged, CannotRunHere):
                    return None
                return None if wrong else manifest

            known.whole = await durable.run(f"cannot look at {ref}", work, self._bulk)
            return known.whole

    @asynccontextmanager
    async def examined(
        self, app: str, name: str, version: int, manifest: Manifest | None = None
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Yield the directory of an import that is whole, and the manifest of what it becomes.

        `manifest` is what `whole` said. Without it, or where the import was changed since, it is
        looked at here: if it has a manifest it must be what that says; else it must be a directory
        that CRIU wrote, and gets a manifest of what can be read from it. App, version and owner
        become those of this place. Damaged says what is missing or wrong, and the import stays as
        it is. Left without an error there is a version, and no change is taken before `reopen`.
        """
        async with self._importing(app, name) as (path, known):
            ref = f"{app}/{name}"
            checked = manifest if manifest == known.whole else None

            def examine() -> Manifest:
                owner = os.stat(path)
                if os.path.lexists(os.path.join(path, MANIFEST)):
                    found = checked or contents.read_manifest(path, ref)
                    wrong = [] if checked else contents.damage(path, found, ref)
                    contents.refuse(ref, wrong)
                else:
                    found = _plain_manifest(path, ref)
                return _moved(found, app, version, owner.st_uid, owner.st_gid)

            yield path, await durable.run(f"cannot import {ref}", examine, self._bulk)
            known.is_version = True

    def read_file(self, app: str, name: str, file: str, offset: int, size: int) -> bytes:
        """Return bytes of a file of an import. Blocks."""
        path = os.path.join(self._places.imported(app, name), file_name(file))
        with durable.opened(path, os.O_RDONLY) as fd:
            return os.pread(fd, size, offset)

    def drop_all_but(self, known: Collection[tuple[str, str]]) -> Iterator[str]:
        """Delete imports that have no record; yields them. Blocks."""
        root = self._places.imports
        for app in sorted(os.listdir(root)):
            for name in sorted(os.listdir(os.path.join(root, app))):
                path = os.path.join(root, app, name)
                if (app, name) not in known and durable.delete(path):
                    yield f"{app}/{name}"
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(root, app))

    # -- inside

    @asynccontextmanager
    async def _changing(self, app: str, name: str) -> AsyncIterator[str]:
        """Yield the directory of an import that may be changed, and has to be looked at again."""
        async with self._importing(app, name) as (path, known):
            if known.is_version:
                raise NotYours(f"{app}/{name} is committed: an image is never changed")
            known.whole = None
            yield path

    @asynccontextmanager
    async def _importing(self, app: str, name: str) -> AsyncIterator[tuple[str, _Import]]:
        """Yield the directory of an import, which nobody else changes meanwhile."""
        path, key = self._places.imported(app, name), (app, name)
        if not os.path.isdir(path):
            raise Gone(f"there is no import {app}/{name}: make it with mkdir")
        known = self._known.setdefault(key, _Import())
        async with known.lock:
            try:
                if not os.path.isdir(path):
                    raise Gone(f"there is no import {app}/{name} any more: it has ended")
                yield path, known
            finally:
                # whoever waits goes on with this lock, also if the import is made anew
                if not os.path.isdir(path) and not known.lock.statistics().tasks_waiting:
                    del self._known[key]

    def _check_size(self, start: int, end: int) -> None:
        """Refuse holes that no disk could fill: whoever hashes them would be at it for days."""
        if start < 0:
            raise BadWords("a size or an offset is negative")
        room = os.statvfs(self._places.root)
        if end > room.f_blocks * room.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _plain_manifest(path: str, ref: str) -> Manifest:
    """Return what can be known of a dump by its files; Damaged when it is not one."""
    try:
        criu_images.check_inventory(path)
        found = criu_images.tasks(path)
        arch = criu_images.arch(path, found[0].pid)
    except Damaged as exc:
        why = exc.message.removeprefix(f"{path}/")  # where it lies is the agent's own business
        raise Damaged(
            f"cannot import {ref}: it has no {MANIFEST}, and is no whole directory of CRIU's "
            f"either: {why}; copy all of its files, then try again"
        ) from exc
    return Manifest(
        app="",
        version=0,
        created=time.time(),
        uid=0,
        gid=0,
        root=found[0].pid,
        tree=found,
        arch=arch,
    )


def _moved(manifest: Manifest, app: str, version: int, uid: int, gid: int) -> Manifest:
    """Return the manifest as it is of an import that becomes this version of this owner."""
    moved = msgspec.structs.replace(manifest, app=app, version=version, uid=uid, gid=gid)
    if moved.ref != manifest.ref and manifest.app:
        moved = msgspec.structs.replace(moved, copied_from=manifest.ref)
    return moved
