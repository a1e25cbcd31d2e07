"""Images as plain directories: ROOT/APP/vN, each with CRIU's files and a manifest.

A dump is written into a spool, sealed (hashed, synced, manifest last) and published by one rename;
an import grows in a directory of its own and comes to be a version the same way. What is published
becomes an image only by its record in the store, which is the caller's business, and `recover`
sets right what a crash left in between. ROOT is 0700 of the agent: whoever could write an image
could make himself root by restarting it, so users reach images through the agent alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec
import trio
from blake3 import blake3

from krgfs import model, verbs, wire
from krgfs.errors import (
    BadWords,
    CannotRunHere,
    Damaged,
    EngineFailed,
    Exists,
    Gone,
    KrgError,
    NoRoom,
    OverQuota,
)

from . import criu_images

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 * 1024 * 1024
BUFFER_BYTES = 4 * 1024 * 1024
WINDOW_BYTES = 64 * 1024 * 1024
_IMPORT = re.compile(r"v[1-9][0-9]{0,9}(\.part)?\Z")

T = TypeVar("T")


# -- the manifest


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the tree; its ids are those that CRIU dumped (inner ones, in a pid namespace).

    `start` is 0 and uid and gid are -1 where nobody knows them.
    """

    pid: int
    start: int = 0
    ppid: int
    sid: int
    pgrp: int
    uid: int = -1
    gid: int = -1
    comm: str = ""
    tids: tuple[int, ...] = ()


class End(msgspec.Struct, frozen=True, kw_only=True):
    """A descriptor whose other end is not in the tree; `id` as CRIU's --external names it."""

    kind: str
    id: str
    pid: int
    fd: int
    mode: str = ""


class FileSum(msgspec.Struct, frozen=True):
    """What a file of an image must be."""

    size: int
    blake3: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one image. Times are seconds since the epoch, sizes bytes.

    `files` names every file but the manifest itself. `digest` covers everything else in here, and
    by it every byte of the image. `copied_from` is set where an import was taken under another
    name than it had been made with. Text from the kernel that is no UTF-8 has surrogates in it.
    """

    format: int = FORMAT
    app: str
    version: int
    node: str = ""
    created: float
    uid: int
    gid: int
    desc: str = ""
    copied_from: str = ""
    root: int
    tree: tuple[Task, ...] = ()
    then: str = ""
    tcp: str = ""
    criu: str = ""
    options: tuple[tuple[str, str], ...] = ()
    kernel: str = ""
    arch: str = ""
    boot: str = ""
    cwd: str = ""
    cgroups: dict[str, str] = {}
    ends: tuple[End, ...] = ()
    freeze_ms: float = 0.0
    timings: dict[str, float] = {}
    logical_bytes: int = 0
    stored_bytes: int = 0
    files: dict[str, FileSum] = {}
    digest: str = ""

    @property
    def ref(self) -> str:
        return f"{self.app}/v{self.version}"


def encode(manifest: Manifest) -> bytes:
    """Return the text of manifest.json, its digest made anew."""
    # json, not msgspec.json: that one has no surrogates
    facts = msgspec.to_builtins(manifest)
    facts["digest"] = _digest(facts)
    return json.dumps(facts, indent=1).encode() + b"\n"


def decode(data: bytes, where: str) -> Manifest:
    """Return the manifest that `data` is; `where` names it in sentences.

    Raises CannotRunHere for a newer format, and Damaged where it is not whole or not consistent.
    """
    try:
        facts = json.loads(data)
        if facts["format"] > FORMAT:
            raise CannotRunHere(
                f"cannot use {where}: its manifest has format {facts['format']}, this agent knows "
                f"{FORMAT}; use a newer krgfs"
            )
        manifest = msgspec.convert(facts, Manifest)
        for name in manifest.files:
            _file_name(name)
    except BadWords as exc:
        raise Damaged(f"the manifest of {where} is damaged: {exc.message}") from exc
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as exc:
        raise Damaged(f"the manifest of {where} is damaged: {exc}; use another copy") from exc
    if manifest.digest != _digest(facts):
        raise Damaged(
            f"the manifest of {where} is damaged: it is not the one that its digest was made of; "
            "use another copy"
        )
    return manifest


def _digest(facts: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return blake3(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- the images of this node


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
        self._bulk = trio.CapacityLimiter(2 * (os.cpu_count() or 1))
        self._holds: Counter[str] = Counter()
        self._doomed: set[str] = set()
        self._imports: dict[tuple[str, str], trio.Lock] = {}

    @classmethod
    async def open(cls, root: str | os.PathLike[str]) -> Images:
        """Use the directory `root`; made if missing, and closed to everybody else."""
        path = os.path.abspath(os.fspath(root))

        def prepare() -> None:
            with _explained(f"cannot keep images in {path}"):
                os.makedirs(path, 0o700, exist_ok=True)
                os.chmod(path, 0o700)

        await trio.to_thread.run_sync(prepare)
        return cls(path)

    @asynccontextmanager
    async def spool(self, job: int, app: str) -> AsyncIterator[Spool]:
        """Open a directory (0700, the agent's own) for the files of one dump.

        On leave it is gone with everything in it, unless it was published.
        """
        path = os.path.join(self._app(app), f".spool-{job}")

        def make() -> None:
            self._make_app(app)
            os.mkdir(path, 0o700)

        await _run(f"cannot begin an image of {app}", make)
        try:
            yield Spool(self, app, path)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_delete, path)

    def path(self, app: str, version: int) -> str:
        """Return the directory of a version, for CRIU; see `held`, which keeps it there."""
        path = self._version(app, version)
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
                        await trio.to_thread.run_sync(_discard, path)

    async def manifest(self, app: str, version: int) -> Manifest:
        """Return the manifest of a version; Damaged or CannotRunHere when it cannot be used."""
        path, ref = self.path(app, version), f"{app}/v{version}"
        return await _run(f"cannot read {ref}", lambda: _manifest_in(path, ref))

    async def files(self, app: str, name: str) -> list[model.ImageFile]:
        """Return the files of a version or import, by name; its manifest is one of them."""
        return await _run(
            f"cannot list {app}/{name}",
            lambda: [
                model.ImageFile(name=found.name, size=found.size, stored_bytes=found.stored)
                for found in _scan(self._either(app, name), f"{app}/{name}")
            ],
        )

    async def read(self, app: str, name: str, file: str, offset: int, size: int) -> bytes:
        """Return up to `size` bytes of a file at `offset`, fewer only at its end (or MAX_DATA)."""
        if offset < 0 or size < 0:
            raise BadWords(f"cannot read {app}/{name}/{file}: the offset or size is negative")

        def work() -> bytes:
            path = os.path.join(self._either(app, name), _file_name(file))
            with _opened(path, os.O_RDONLY) as fd:
                return os.pread(fd, min(size, wire.MAX_DATA), offset)

        return await _run(f"cannot read {app}/{name}/{file}", work)

    async def verify(self, app: str, version: int) -> str:
        """Read a whole version and return what is damaged, file by file; '' when nothing is."""
        path, ref = self._version(app, version), f"{app}/v{version}"

        def work() -> str:
            if not os.path.isdir(path):
                return f"its directory {path} is missing"
            try:
                manifest = _manifest_in(path, ref)
                wrong = [] if manifest.ref == ref else [f"its manifest is that of {manifest.ref}"]
                wrong += _differences(path, manifest, ref) or _wrong_contents(path, manifest)
            except KrgError as exc:
                return exc.message
            return _enumerated(wrong)

        return await _run(f"cannot verify {ref}", work, self._bulk)

    async def remove(self, app: str, version: int) -> None:
        """Delete a version, whose record is gone already. No part of it is seen half removed: it is
        renamed first, and what an interruption leaves is for `recover`. Removing what is not there
        is no error."""
        path = self._version(app, version)
        if self._holds[path]:
            self._doomed.add(path)
            return
        await _run(f"cannot remove {app}/v{version}", lambda: _discard(path))

    async def remove_app(self, app: str) -> None:
        """Forget the directory of an app in which nothing is left; else leave it."""
        path = self._app(app)

        def work() -> None:
            try:
                os.rmdir(path)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise

        await _run(f"cannot remove {app}", work)

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

        return await _run(f"cannot look at {self.root}", work)

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
        return await _run(
            f"cannot tidy up {self.root}",
            lambda: _recover(self.root, set(known), set(imports), set(unfinished), spools),
        )

    # -- imports

    async def begin_import(self, app: str, name: str, uid: int, gid: int) -> None:
        """Make an empty import (`vN` or `vN.part`), which will be an image of uid and gid."""
        path = self._import(app, name)

        def work() -> None:
            if os.path.lexists(self._either(app, name)):
                raise Exists(f"cannot make {app}/{name}: it exists; remove it, or take another")
            self._make_app(app)
            os.mkdir(path, 0o700)
            _own(path, uid, gid, 0o700)

        await _run(f"cannot make {app}/{name}", work)

    async def write_file(self, app: str, name: str, file: str, offset: int, data: bytes) -> None:
        """Make `file` of an import if it is not there, and write `data` whole at `offset`."""
        async with self._importing(app, name) as path:

            def work() -> None:
                self._check_size(offset, offset + len(data))
                target = os.path.join(path, _file_name(file))
                if "/" in file:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(os.path.dirname(target), 0o700)
                with _opened(target, os.O_WRONLY | os.O_CREAT) as fd:
                    at, rest = offset, memoryview(data)
                    while rest:
                        count = os.pwrite(fd, rest, at)
                        at, rest = at + count, rest[count:]

            await _run(f"cannot write {app}/{name}/{file}", work)

    async def truncate_file(self, app: str, name: str, file: str, size: int) -> None:
        """Give `file` of an import this size."""
        async with self._importing(app, name) as path:

            def work() -> None:
                self._check_size(size, size)
                with _opened(os.path.join(path, _file_name(file)), os.O_WRONLY) as fd:
                    os.ftruncate(fd, size)

            await _run(f"cannot set the size of {app}/{name}/{file}", work)

    async def remove_file(self, app: str, name: str, file: str) -> None:
        """Remove `file` from an import."""
        async with self._importing(app, name) as path:
            await _run(
                f"cannot remove {app}/{name}/{file}",
                lambda: os.unlink(os.path.join(path, _file_name(file))),
            )

    async def remove_import(self, app: str, name: str) -> None:
        """Remove an import and all that was copied into it, if it is there."""
        with contextlib.suppress(Gone):
            async with self._importing(app, name) as path:
                await _run(f"cannot remove {app}/{name}", lambda: _discard(path))

    async def import_complete(self, app: str, name: str) -> Manifest | None:
        """Return the manifest of an import in which all is there that it names, and matches.

        None also where it has no manifest, or one that cannot be used: `finish_import` says why.
        Costs little while names or sizes differ; then everything is read.
        """
        async with self._importing(app, name) as path:
            ref = f"{app}/{name}"

            def work() -> Manifest | None:
                try:
                    manifest = _manifest_in(path, ref)
                    wrong = _differences(path, manifest, ref) or _wrong_contents(path, manifest)
                except (Damaged, CannotRunHere):
                    return None
                return None if wrong else manifest

            return await _run(f"cannot look at {ref}", work, self._bulk)

    async def finish_import(
        self, app: str, name: str, version: int, manifest: Manifest | None = None
    ) -> Manifest:
        """Make a version of an import, durably, and return its manifest.

        `manifest` is what `import_complete` said. Without it the import is looked at here: if it
        has a manifest it must be what that says; else it must be a directory that CRIU wrote, and
        gets a manifest of what can be read from it. App, version and owner become those of this
        place. Damaged says what is missing or wrong, and the import stays as it is. The caller
        commits the record, or calls `remove`.
        """
        async with self._importing(app, name) as path:
            ref, target = f"{app}/{name}", self._version(app, version)

            def examine() -> tuple[Manifest, bool]:
                if os.path.lexists(target):
                    raise Exists(f"cannot import {ref}: {app}/v{version} exists; take another")
                owner = os.stat(path)
                whole = os.path.lexists(os.path.join(path, MANIFEST))
                found = manifest or _manifest_in(path, ref) if whole else _plain_manifest(path, ref)
                if whole:
                    _refuse(ref, _differences(path, found, ref))
                return _moved(found, app, version, owner.st_uid, owner.st_gid), whole

            found, whole = await _run(f"cannot import {ref}", examine)
            found = await self._make_durable(path, found, ref, whole=whole)
            await _run(f"cannot import {ref}", lambda: _publish(path, target))
            return found

    # -- inside

    async def _make_durable(
        self, path: str, manifest: Manifest, ref: str, *, whole: bool
    ) -> Manifest:
        """Sync and hash all files at once, write the manifest last, and give all to its owner.

        With `whole` the files must be those of the manifest already; else it gets theirs.
        """
        uid, gid = manifest.uid, manifest.gid

        def take_over() -> list[_Found]:
            found = [file for file in _scan(path, ref) if file.name != MANIFEST]
            for file in found:
                _own(os.path.join(path, file.name), uid, gid, 0o600)
            return found

        def flush() -> None:
            _flush([os.path.join(path, file.name) for file in found])

        sums: dict[str, FileSum] = {}

        def hash_all() -> None:
            sums.update(_sums(path, [file.name for file in found]))

        def finish() -> None:
            target, folder = os.path.join(path, MANIFEST), os.path.join(path, "files")
            _write(target, data)
            _own(target, uid, gid, 0o600)
            _sync(target)
            for directory in (folder, path) if os.path.isdir(folder) else (path,):
                _own(directory, uid, gid, 0o700)
                _sync(directory)

        action = f"cannot store {ref}"
        found = await _run(action, take_over)
        await _together(action, self._bulk, flush, hash_all)
        if whole:
            _refuse(ref, _changed(manifest.files, sums))
        else:
            manifest = msgspec.structs.replace(
                manifest,
                files=sums,
                logical_bytes=sum(entry.size for entry in sums.values()),
                stored_bytes=sum(file.stored for file in found),
            )
        data = encode(manifest)
        await _run(action, finish)
        return decode(data, ref)

    @asynccontextmanager
    async def _importing(self, app: str, name: str) -> AsyncIterator[str]:
        """Yield the directory of an import, which nobody else changes meanwhile."""
        path, key = self._import(app, name), (app, name)
        if not os.path.isdir(path):
            raise Gone(f"there is no import {app}/{name}: make it with mkdir")
        async with self._imports.setdefault(key, trio.Lock()):
            try:
                if not os.path.isdir(path):
                    raise Gone(f"there is no import {app}/{name} any more: it has ended")
                yield path
            finally:
                if not os.path.isdir(path):
                    self._imports.pop(key, None)

    def _check_size(self, start: int, end: int) -> None:
        """Refuse holes that no disk could fill: whoever hashes them would be at it for days."""
        if start < 0:
            raise BadWords("a size or an offset is negative")
        room = os.statvfs(self.root)
        if end > room.f_blocks * room.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _make_app(self, app: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._app(app), 0o700)
            _sync(self.root)

    def _app(self, app: str) -> str:
        try:
            return os.path.join(self.root, verbs.app_name(app))
        except ValueError as exc:
            raise BadWords(str(exc)) from exc

    def _version(self, app: str, version: int) -> str:
        return os.path.join(self._app(app), f"v{version}")

    def _import(self, app: str, name: str) -> str:
        if not _IMPORT.match(name):
            raise BadWords(f"{name!r} cannot be a version: write vN, or vN.part to import")
        return os.path.join(self._app(app), f".import-{name}")

    def _either(self, app: str, name: str) -> str:
        """Return the directory of a version, or where an import of this name is or would be."""
        copied = self._import(app, name)
        published = os.path.join(self._app(app), name)
        return published if os.path.isdir(published) else copied


class Spool:
    """The directory of one dump, until it is published."""

    def __init__(self, images: Images, app: str, path: str) -> None:
        self.path = path
        self._images = images
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
                _write(os.path.join(self.path, name), text.encode(errors="surrogateescape"))

        await _run(f"cannot store {manifest.ref}", write)
        self._sealed = await self._images._make_durable(
            self.path, manifest, manifest.ref, whole=False
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
        target = self._images._version(self._app, version)

        def work() -> Manifest:
            if os.path.lexists(target):
                raise Exists(f"cannot publish {ref}: it exists already")
            data = encode(manifest)
            if manifest != self._sealed:
                _write(os.path.join(self.path, MANIFEST), data)
                _sync(os.path.join(self.path, MANIFEST))
            _publish(self.path, target)
            return decode(data, ref)

        self._sealed = await _run(f"cannot publish {ref}", work)
        return self._sealed


# -- blocking work, for threads


class _Found(NamedTuple):
    name: str
    size: int
    stored: int


async def _run(
    action: str, work: Callable[[], T], limiter: trio.CapacityLimiter | None = None
) -> T:
    """Do blocking work in a thread; what the kernel refuses is told as `action`."""

    def told() -> T:
        with _explained(action):
            return work()

    return await trio.to_thread.run_sync(told, limiter=limiter)


async def _together(action: str, limiter: trio.CapacityLimiter, *works: Callable[[], None]) -> None:
    """Do several pieces of work at once; the first that fails cancels the others and is raised."""
    failures: list[KrgError] = []

    async def run(work: Callable[[], None]) -> None:
        try:
            await _run(action, work, limiter)
        except KrgError as exc:
            failures.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(run, work)
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _explained(action: str) -> Iterator[None]:
    """Turn the kernel's refusals into sentences that begin with `action`."""
    try:
        yield
    except OSError as exc:
        raise _error(action, exc) from exc


def _error(action: str, exc: OSError) -> KrgError:
    if exc.errno == errno.ENOSPC:
        return NoRoom(
            f"{action}: no room left in the image store; remove images that nobody needs "
            "(rmdir /krg/images/APP/vN), then try again"
        )
    if exc.errno == errno.EDQUOT:
        return OverQuota(f"{action}: the quota is used up; remove images (rmdir), then try again")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return Gone(f"{action}: it is not there")
    if exc.errno == errno.EROFS:
        return EngineFailed(
            f"{action}: the filesystem of the image store is read-only; see dmesg, mount it anew"
        )
    return EngineFailed(f"{action}: {exc.strerror or exc}; see the kernel's log (dmesg)")


def _file_name(name: str) -> str:
    """Return `name` if an image may have a file of this name: NAME or files/NAME."""
    *folder, last = name.split("/")
    try:
        fits = len(last.encode()) <= 255
    except UnicodeEncodeError:
        fits = False
    if folder not in ([], ["files"]) or last in ("", ".", "..") or "\0" in last or not fits:
        raise BadWords(f"{name!r} cannot be a file of an image: write NAME or files/NAME")
    if name == "files":
        raise BadWords("'files' is the directory of captured files: write files/NAME")
    return name


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """Open a regular file, and nothing else."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENOENT, "not a file")
        yield fd
    finally:
        os.close(fd)


def _scan(path: str, ref: str) -> list[_Found]:
    """Return the files below `path` by name; Damaged where there is anything but files."""
    found = []
    for folder in ("", "files"):
        if folder and not os.path.isdir(os.path.join(path, folder)):
            continue
        with os.scandir(os.path.join(path, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                    found.append(_Found(name, facts.st_size, facts.st_blocks * 512))
                elif name != "files" or not entry.is_dir(follow_symlinks=False):
                    raise Damaged(f"{ref} holds {name}, which is no plain file; remove it")
    return sorted(found)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)


def _own(path: str, uid: int, gid: int, mode: int) -> None:
    facts = os.stat(path)
    if (facts.st_uid, facts.st_gid) != (uid, gid):
        os.chown(path, uid, gid)
    os.chmod(path, mode)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flush(paths: Iterable[str]) -> None:
    """Make files durable. Their data is sent off first, so that one journal commit does for all.

    Not syncfs: it would wait for what everybody else has written to that filesystem.
    """
    paths = list(paths)
    for path in paths:
        with _opened(path, os.O_RDONLY) as fd:
            _send_off(fd)
    for path in paths:
        _sync(path)
        trio.from_thread.check_cancelled()


_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range(2)
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _send_off(fd: int) -> None:
    """Start to write a file's data, window by window, so that cancellation need not wait for all.

    It only hastens what fsync does and reports, so its own failures do not matter.
    """
    if _sync_file_range is None:
        return
    for start in range(0, os.fstat(fd).st_size, WINDOW_BYTES):
        _sync_file_range(fd, start, WINDOW_BYTES, _WRITE)
        if start:
            before = start - WINDOW_BYTES
            _sync_file_range(fd, before, WINDOW_BYTES, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
        trio.from_thread.check_cancelled()


def _sums(path: str, names: Iterable[str]) -> dict[str, FileSum]:
    """Hash files below `path`."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    return {name: _sum(os.path.join(path, name), buffer) for name in sorted(names)}


def _sum(path: str, buffer: memoryview) -> FileSum:
    # read, not mapped: a page of a mapped file that the disk cannot give is a SIGBUS
    hasher, size = blake3(max_threads=blake3.AUTO), 0
    with _opened(path, os.O_RDONLY) as fd:
        while count := os.readv(fd, [buffer]):
            hasher.update(buffer[:count])
            size += count
            trio.from_thread.check_cancelled()
    return FileSum(size, hasher.hexdigest())


def _manifest_in(path: str, ref: str) -> Manifest:
    try:
        with (
            _opened(os.path.join(path, MANIFEST), os.O_RDONLY) as fd,
            open(fd, "rb", closefd=False) as f,
        ):
            data = f.read(MANIFEST_BYTES + 1)
    except FileNotFoundError as exc:
        raise Damaged(f"{ref} has no {MANIFEST}; use another copy") from exc
    if len(data) > MANIFEST_BYTES:
        raise Damaged(f"the manifest of {ref} is larger than {MANIFEST_BYTES} bytes")
    return decode(data, ref)


def _differences(path: str, manifest: Manifest, ref: str) -> list[str]:
    """Say how names and sizes differ from the manifest, without reading a file."""
    found = {file.name: file.size for file in _scan(path, ref) if file.name != MANIFEST}
    wrong = [f"{name} is missing" for name in sorted(manifest.files.keys() - found.keys())]
    wrong += [
        f"{name} is not in its manifest" for name in sorted(found.keys() - manifest.files.keys())
    ]
    for name in sorted(found.keys() & manifest.files.keys()):
        if found[name] != manifest.files[name].size:
            wrong.append(f"{name} has {found[name]} bytes, not {manifest.files[name].size}")
    return wrong


def _wrong_contents(path: str, manifest: Manifest) -> list[str]:
    """Read everything that the manifest names, and say which files are not what they were."""
    wrong, buffer = [], memoryview(bytearray(BUFFER_BYTES))
    for name, expected in sorted(manifest.files.items()):
        try:
            now = _sum(os.path.join(path, name), buffer)
        except OSError as exc:
            wrong.append(f"{name} cannot be read ({exc.strerror})")
        else:
            wrong += _changed({name: expected}, {name: now})
    return wrong


def _changed(expected: Mapping[str, FileSum], now: Mapping[str, FileSum]) -> list[str]:
    return [
        f"{name} has other contents than it was made with"
        for name in sorted(expected.keys() | now.keys())
        if expected.get(name) != now.get(name)
    ]


def _enumerated(wrong: list[str]) -> str:
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def _refuse(ref: str, wrong: list[str]) -> None:
    if wrong:
        raise Damaged(
            f"cannot import {ref}: {_enumerated(wrong)}; copy it again, or remove its {MANIFEST} "
            "if these are plain files of CRIU"
        )


def _moved(manifest: Manifest, app: str, version: int, uid: int, gid: int) -> Manifest:
    """Return the manifest as it is of an import that becomes this version of this owner."""
    moved = msgspec.structs.replace(manifest, app=app, version=version, uid=uid, gid=gid)
    if moved.ref != manifest.ref and manifest.app:
        moved = msgspec.structs.replace(moved, copied_from=manifest.ref)
    return moved


def _publish(source: str, target: str) -> None:
    """Rename durably, or not at all."""
    os.rename(source, target)
    try:
        _sync(os.path.dirname(target))
    except OSError:
        os.rename(target, source)
        raise


def _discard(path: str) -> None:
    """Take a directory out of sight, then delete it."""
    folder, name = os.path.split(path)
    trash = os.path.join(folder, f".trash-{name.lstrip('.')}-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, trash)
        _delete(trash)


def _delete(path: str) -> bool:
    """Delete a directory; what cannot be deleted now is left to the next `recover`."""
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


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
                if _delete(path):
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


# -- what a directory that plain CRIU wrote says of itself

_INVENTORY, _CORE = 0x58313116, 0x55053847  # criu/include/magic.h
_ENTRY_BYTES = 16 * 1024 * 1024
_DEAD = 2  # state of a task that has ended
_ARCH = {1: "x86_64", 2: "arm", 3: "aarch64", 4: "ppc64le", 5: "s390x", 6: "mips"}
_ARCH |= {7: "loongarch64", 8: "riscv64"}

_Message = dict[int, list[int | bytes]]  # values by field number, as in CRIU's images/*.proto


def _plain_manifest(path: str, ref: str) -> Manifest:
    """Return what can be known of a dump by its files; Damaged when it is not one."""
    try:
        _entries(path, "inventory.img", _INVENTORY)
        found = tasks(path)
        core = _core(path, found[0].pid)
    except Damaged as exc:
        raise Damaged(
            f"cannot import {ref}: it has no {MANIFEST}, and is no whole directory of CRIU's "
            f"either: {exc}; copy all of its files, then try again"
        ) from exc
    return Manifest(
        app="",
        version=0,
        created=time.time(),
        uid=0,
        gid=0,
        root=found[0].pid,
        tree=found,
        arch=_ARCH.get(_numbers(core, 1, -1)[0], ""),
    )


def tasks(path: str) -> tuple[Task, ...]:
    """Return the processes that CRIU dumped into a directory, the root first; Damaged when there
    are none, or a file that tells of one is not whole."""
    tree = _entries(path, "pstree.img", criu_images.COMMON_MAGIC, criu_images.PSTREE_MAGIC)
    if not tree:
        raise Damaged("pstree.img names no process")
    return tuple(_task(path, entry) for entry in tree)


def _task(path: str, entry: _Message) -> Task:
    """Make a task of its entry in pstree.img and of its core file; every thread must have one."""
    pid, ppid, pgrp, sid = (_numbers(entry, field, -1)[0] for field in (1, 2, 3, 4))
    if pid < 1:
        raise Damaged("pstree.img has an entry without a pid")
    core = _core(path, pid)
    tids = tuple(_numbers(entry, 5)) or (pid,)
    if _DEAD in _numbers(_inside(core, 3), 1):
        tids = (pid,)  # CRIU 4.2 leaves that of a zombie to chance
    for tid in {*tids} - {pid}:
        _core(path, tid)
    creds = _inside(core, 5, 10)  # a zombie has none
    return Task(
        pid=pid,
        ppid=ppid,
        pgrp=pgrp,
        sid=sid,
        uid=_numbers(creds, 1, -1)[0],
        gid=_numbers(creds, 2, -1)[0],
        comm=os.fsdecode(_bytes(_inside(core, 3), 6)),
        tids=tids,
    )


def _core(path: str, tid: int) -> _Message:
    entries = _entries(path, f"core-{tid}.img", criu_images.COMMON_MAGIC, _CORE)
    if not entries:
        raise Damaged(f"core-{tid}.img is empty")
    return entries[0]


def _entries(path: str, name: str, *magics: int) -> list[_Message]:
    try:
        with _opened(os.path.join(path, name), os.O_RDONLY) as fd:
            if os.fstat(fd).st_size > _ENTRY_BYTES:
                raise Damaged(f"{name} is larger than CRIU makes it")
            data = os.pread(fd, _ENTRY_BYTES, 0)
    except FileNotFoundError as exc:
        raise Damaged(f"{name} is missing") from exc
    head = struct.pack(f"<{len(magics)}I", *magics)
    if not data.startswith(head):
        raise Damaged(f"{name} does not begin as CRIU's do")
    found, at = [], len(head)
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if at + 4 > len(data) or end > len(data):
            raise Damaged(f"{name} is cut off")
        found.append(_message(data[at + 4 : end]))
        at = end
    return found


def _message(data: bytes) -> _Message:
    fields: _Message = {}
    for field in criu_images.parse(data):
        fields.setdefault(field.number, []).append(field.value)
    return fields


def _numbers(message: _Message, field: int, *missing: int) -> list[int]:
    """Return the numbers of a field, or `missing` where it has none."""
    found = [value for value in message.get(field, ()) if isinstance(value, int)]
    return found or list(missing)


def _bytes(message: _Message, field: int) -> bytes:
    values = [value for value in message.get(field, ()) if isinstance(value, bytes)]
    return values[0] if values else b""


def _inside(message: _Message, *fields: int) -> _Message:
    """Return the message that lies in these fields of one another, empty where there is none."""
    for field in fields:
        message = _message(_bytes(message, field))
    return message
