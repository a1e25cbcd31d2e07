"""Images as plain directories: ROOT/APP/vN, each with CRIU's files and a manifest.

A dump is written into a spool, sealed (hashed, synced, manifest last) and published by one rename;
an import comes to be a version the same way. What is published becomes an image only by its record
in the store, which is the caller's business, and `recover` sets right what a crash left in between.
ROOT is 0700 of the agent: whoever could write an image could make himself root by restarting it, so
users reach images through the agent alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
import trio

from krgfs import model, verbs, wire
from krgfs.errors import BadWords, Exists, Gone, KrgError

from . import contents, durable
from .imports import Imports
from .manifest import MANIFEST, Manifest, decode, encode, file_name
from .places import Places


class Recovered(NamedTuple):
    """What `recover` did: paths below ROOT that it removed or set aside, and images that are gone.

    `unlisted` are whole versions without a record. They are never deleted by themselves (it may be
    the store that was lost) but renamed to .unlisted-vN, where only an administrator sees them.
    """

    removed: list[str]
    unlisted: list[str]
    missing: list[tuple[str, int]]


class Images:
    """The versions, spools and imports below one directory, which belongs to one agent at a time.

    Every method raises BadWords for a name that cannot be, Gone where the thing is not there, and
    NoRoom, OverQuota or EngineFailed where the filesystem says no.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._places = Places(root)
        self._bulk = trio.CapacityLimiter(2 * (os.cpu_count() or 1))
        self.imports = Imports(self._places, self._bulk)
        self._holds: Counter[str] = Counter()
        self._doomed: set[str] = set()

    @classmethod
    async def open(cls, root: str | os.PathLike[str]) -> Images:
        """Use the directory `root`; made if missing, and closed to everybody else."""
        path = os.path.abspath(os.fspath(root))

        def prepare() -> None:
            with durable.explained(f"cannot keep images in {path}"):
                os.makedirs(path, 0o700, exist_ok=True)
                os.chmod(path, 0o700)

        await trio.to_thread.run_sync(prepare)
        return cls(path)

    @asynccontextmanager
    async def spool(self, job: int, app: str) -> AsyncIterator[Spool]:
        """Open a directory (0700, the agent's own) for the files of one dump.

        On leave it is gone with everything in it, unless it was published.
        """
        path = self._places.spool(app, job)

        def make() -> None:
            self._places.make_app(app)
            os.mkdir(path, 0o700)

        await durable.run(f"cannot begin an image of {app}", make)
        try:
            yield Spool(self._places, self._bulk, app, path)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(durable.delete, path)

    def path(self, app: str, version: int) -> str:
        """Return the directory of a version, for CRIU; see `held`, which keeps it there."""
        path = self._places.version(app, version)
        if path in self._doomed or not os.path.isdir(path):
            raise Gone(f"there is no {app}/v{version}: it was removed")
        return path

    @asynccontextmanager
    async def held(self, app: str, version: int) -> AsyncIterator[str]:
        """Keep a version on disk while somebody reads it, and yield its path.

        A `remove` meanwhile returns at once; the last one that lets go deletes.
        """
        path = self.path(app, version)
        self._holds[path] += 1
        try:
            yield path
        finally:
            self._holds[path] -= 1
            if not self._holds[path]:
                del self._holds[path]
                if path in self._doomed:
                    self._doomed.remove(path)
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(durable.discard, path)

    async def manifest(self, app: str, version: int) -> Manifest:
        """Return the manifest of a version; Damaged or CannotRunHere when it cannot be used."""
        path, ref = self.path(app, version), f"{app}/v{version}"
        return await durable.run(f"cannot read {ref}", lambda: contents.read_manifest(path, ref))

    async def files(self, app: str, name: str) -> list[model.ImageFile]:
        """Return the files of a version or import, by name; its manifest is one of them."""
        return await durable.run(
            f"cannot list {app}/{name}",
            lambda: [
                model.ImageFile(name=found.name, size=found.size, stored_bytes=found.stored)
                for found in contents.scan(self._places.either(app, name), f"{app}/{name}")
            ],
        )

    async def read(self, app: str, name: str, file: str, offset: int, size: int) -> bytes:
        """Return up to `size` bytes of a file at `offset`, fewer only at its end (or MAX_DATA)."""
        if offset < 0 or size < 0:
            raise BadWords(f"cannot read {app}/{name}/{file}: the offset or size is negative")

        def work() -> bytes:
            path = os.path.join(self._places.either(app, name), file_name(file))
            with durable.opened(path, os.O_RDONLY) as fd:
                return os.pread(fd, min(size, wire.MAX_DATA), offset)

        return await durable.run(f"cannot read {app}/{name}/{file}", work)

    async def verify(self, app: str, version: int) -> str:
        """Read a whole version and return what is damaged, file by file; '' when nothing is."""
        path, ref = self._places.version(app, version), f"{app}/v{version}"

        def work() -> str:
            if not os.path.isdir(path):
                return f"its directory {path} is missing"
            try:
                manifest = contents.read_manifest(path, ref)
                wrong = [] if manifest.ref == ref else [f"its manifest is that of {manifest.ref}"]
                wrong += contents.damage(path, manifest, ref)
            except KrgError as exc:
                return exc.message
            return contents.enumerated(wrong)

        return await durable.run(f"cannot verify {ref}", work, self._bulk)

    async def remove(self, app: str, version: int) -> None:
        """Delete a version, whose record is gone already. No part of it is seen half removed: it is
        renamed first, and what an interruption leaves is for `recover`. Removing what is not there
        is no error."""
        path = self._places.version(app, version)
        if self._holds[path]:
            self._doomed.add(path)
            return
        await durable.run(f"cannot remove {app}/v{version}", lambda: durable.discard(path))

    async def remove_app(self, app: str) -> None:
        """Forget the directory of an app in which nothing is left; else leave it."""
        path = self._places.app(app)

        def work() -> None:
            try:
                os.rmdir(path)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise

        await durable.run(f"cannot remove {app}", work)

    async def usage(self) -> model.Store:
        """Return the room on the filesystem of the images."""

        def work() -> model.Store:
            room = os.statvfs(self.root)
            return model.Store(
                total=room.f_blocks * room.f_frsize,
                free=room.f_bfree * room.f_frsize,
                available=room.f_bavail * room.f_frsize,
                files=room.f_files,
                files_free=room.f_ffree,
            )

        return await durable.run(f"cannot look at {self.root}", work)

    async def recover(
        self,
        known: Collection[tuple[str, int]],
        imports: Collection[tuple[str, str]],
        unfinished: Collection[tuple[str, int]] = (),
        running: Collection[int] = (),
    ) -> Recovered:
        """Set right what an earlier agent left; to be called once, before anything else.

        `known` are the versions and `imports` the imports that have records, `unfinished` the
        versions that the journal names as being published or removed, `running` the jobs whose
        CRIU is still at work: their spools stay. All other spools, trash, imports without a record
        and unfinished versions without one are deleted. An import that was to become the version
        of its name, and has its record still, is an import again.
        """
        spools = {f".spool-{job}" for job in running}
        return await durable.run(
            f"cannot tidy up {self.root}",
            lambda: _recover(self.root, set(known), set(imports), set(unfinished), spools),
        )


class Spool:
    """The directory of one dump, until it is published."""

    def __init__(self, places: Places, bulk: trio.CapacityLimiter, app: str, path: str) -> None:
        self.path = path
        self._places = places
        self._bulk = bulk
        self._app = app
        self._sealed: Manifest | None = None

    async def seal(
        self, manifest: Manifest, *, description: str = "", user_info: str = ""
    ) -> Manifest:
        """Make the dump whole and durable, and return its manifest with files, sizes and digest.

        The two texts come to lie beside CRIU's files. Everything belongs to the manifest's uid and
        gid now. Cancelled, it stops within a tenth of a second.
        """

        def write() -> None:
            for name, text in (("description", description), ("user_info.txt", user_info)):
                durable.write(os.path.join(self.path, name), text.encode(errors="surrogateescape"))

        await durable.run(f"cannot store {manifest.ref}", write)
        self._sealed = await contents.seal(
            self.path, manifest, manifest.ref, self._bulk, whole=False
        )
        return self._sealed

    async def publish(self, version: int) -> Manifest:
        """Make the sealed dump version `version` of its app, durably, and return its manifest.

        Where another version was in the manifest, that is made right first. Not cancelled
        half-way; after an error the spool is as it was. Exists when there is such a version.
        """
        if self._sealed is None:
            raise RuntimeError("a spool is sealed before it is published")
        manifest = msgspec.structs.replace(self._sealed, version=version)
        ref = manifest.ref
        target = self._places.version(self._app, version)

        def work() -> Manifest:
            if os.path.lexists(target):
                raise Exists(f"cannot publish {ref}: it exists already")
            data = encode(manifest)
            if manifest != self._sealed:
                durable.write(os.path.join(self.path, MANIFEST), data)
                durable.sync(os.path.join(self.path, MANIFEST))
            durable.publish(self.path, target)
            return decode(data, ref)

        self._sealed = await durable.run(f"cannot publish {ref}", work)
        return self._sealed


def _recover(
    root: str,
    known: set[tuple[str, int]],
    imports: set[tuple[str, str]],
    unfinished: set[tuple[str, int]],
    spools: set[str],
) -> Recovered:
    removed, unlisted, there = [], [], set()
    for app, name in imports:
        number = name.removesuffix(".part")
        published = os.path.join(root, app, number)
        copied = os.path.join(root, app, f".import-{name}")
        if (app, int(number[1:])) not in known and not os.path.lexists(copied):
            with contextlib.suppress(FileNotFoundError):
                os.rename(published, copied)
    for app in sorted(os.listdir(root)):
        folder = os.path.join(root, app)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            path, ref = os.path.join(folder, name), f"{app}/{name}"
            version = int(name[1:]) if verbs.VERSION.match(name) else 0
            if name.startswith(".import-"):
                partial = (app, name.removeprefix(".import-")) not in imports
            else:
                spool = name.removesuffix(".work")
                partial = name.startswith((".spool-", ".trash-")) and spool not in spools
            if (app, version) in known:
                there.add((app, version))
            elif partial or (app, version) in unfinished:
                if durable.delete(path):
                    removed.append(ref)
            elif version:
                unlisted.append(f"{app}/{_set_aside(folder, name)}")
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return Recovered(removed, unlisted, sorted(known - there))


def _set_aside(folder: str, name: str) -> str:
    aside, count = f".unlisted-{name}", 1
    while os.path.lexists(os.path.join(folder, aside)):
        count += 1
        aside = f".unlisted-{name}~{count}"
    os.rename(os.path.join(folder, name), os.path.join(folder, aside))
    return aside
