"""The images of this node: one object each in the store, over chunks that all of them share.

A dump comes in through a spool: its small files lie in a directory, for us and CRIU to look at; its
memory goes through an intake into the chunk store; `seal` makes both durable and `publish` makes
the image be. It is shown from its record in the cluster store on, which is the caller's business,
and `recover` sets right what a crash left in between. Images are read back through one reader.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import trio
from msgspec.structs import replace

from krgfs import model, wire
from krgfs.errors import BadWords, Damaged, Exists

from . import audit, contents, durable, opened, pages, sweep, versions
from .audit import Audit, Damage
from .backend import DAY_S, Backend
from .backend_bounded import kind_of, unbounded
from .buffers import Reserve
from .chunks import ChunkStore
from .imports import Imports
from .intake import Intake
from .manifest import MANIFEST, Manifest
from .opened import READ_AHEAD_BYTES, Opened
from .places import Places
from .recipe import Recipe
from .serving import ImageSource, Reader
from .spool import Spool
from .sweep import Swept

KNOWN_IMAGES = 32
READERS = 8  # threads for who looks into images; others have other work to do
CHECKED_AT_ONCE = 256
IMPORT_BYTES = 64 << 20  # of memory: nobody stands still for an import
IDLE_S = 10.0
SUMS = "sums/"
SEED_BYTES = 8


class Limits(NamedTuple):
    """`memory_bytes` bounds what dumps are taken into, 0 a quarter of what is free; `level` is that
    of zstd."""

    memory_bytes: int = 0
    level: int = 1


class Recovered(NamedTuple):
    """What `recover` did: what it removed, images set aside that have no record, and images that
    are gone. Those without a record are never deleted: it may be the records that were lost."""

    removed: list[str]
    unlisted: list[str]
    missing: list[tuple[str, int]]


class Images:
    """The images of one node in a back end. `owner` tells them from those of others there.

    Every method raises BadWords for a name that cannot be, Gone where the thing is not there,
    Damaged where it is not what was stored, and NoRoom, OverQuota or EngineFailed where the back
    end says no.
    """

    def __init__(
        self,
        state_dir: str,
        backend: Backend,
        store: ChunkStore,
        owner: str,
        limits: Limits,
        alone: bool,
        root: str,
    ) -> None:
        self.places = Places(state_dir)
        self.root = root
        self.backend, self.store = backend, store
        self.reader = Reader(store)
        self.imports = Imports(self.places, trio.CapacityLimiter(2 * (os.cpu_count() or 1)))
        self.alone = alone
        self._owner = owner
        self._limits = limits
        self._known: OrderedDict[str, Opened] = OrderedDict()
        self._removals = 0
        self._lock = threading.Lock()
        self._readers = trio.CapacityLimiter(READERS)
        self._seed = _seed(os.path.join(state_dir, "pages.seed"))
        self._memory = Reserve(limits.memory_bytes)

    @classmethod
    async def open(
        cls,
        state_dir: str,
        backend: Backend,
        owner: str,
        limits: Limits | None = None,
        *,
        alone: bool = False,
        root: str = "",
    ) -> Images:
        """Use what is below `state_dir` on this node, and the images in `backend`, to which nobody
        else writes when `alone`: what an earlier agent left there is then tidied up at once. `root`
        is where the back end lies, if that is a directory here."""

        def prepare() -> Images:
            places = Places(state_dir)
            for path in (places.spools, places.imports, places.tables):
                os.makedirs(path, 0o700, exist_ok=True)
                os.chmod(path, 0o700)
            asked = limits or Limits()
            backend.tidy(0.0 if alone else DAY_S)
            store = ChunkStore.open(backend, level=asked.level)
            return cls(state_dir, backend, store, owner, asked, alone, root)

        return await durable.run(f"cannot keep images in {state_dir}", prepare)

    def close(self) -> None:
        """Let go of threads and memory."""
        self.reader.close()

    def idle(self) -> None:
        """Let go of memory that nobody has used for a while."""
        self.reader.trim(IDLE_S)
        self._memory.trim(IDLE_S)

    # -- writing

    @asynccontextmanager
    async def spool(self, app: str, job: int, expected_bytes: int) -> AsyncIterator[Spool]:
        """Be ready to take in an image of an app, of so many bytes of memory: there is an empty
        directory (0700, the agent's own) for the small files, and buffers are there and touched."""
        path = self.places.spool(job)
        await durable.run(f"cannot begin an image of {app}", partial(os.mkdir, path, 0o700))
        try:
            async with self._writing(app, path, expected_bytes) as spool:
                yield spool
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(durable.delete, path)

    @asynccontextmanager
    async def _writing(self, app: str, path: str, expected_bytes: int) -> AsyncIterator[Spool]:
        with contextlib.ExitStack() as stack:

            def prepare() -> Spool:
                session = stack.enter_context(self.store.session())
                table = self.places.table(app)
                known = pages.load(table)
                buffers = stack.enter_context(
                    self._memory.lent(expected_bytes, trio.from_thread.check_cancelled)
                )
                intake = Intake(buffers, session, known, self._seed)
                stack.callback(intake.close)
                return Spool(path, session, intake, self.store, partial(self.key, app), table)

            try:
                yield await durable.run(f"cannot begin an image of {app}", prepare)
            finally:
                with trio.CancelScope(shield=True):
                    await durable.run(f"cannot end an image of {app}", stack.close)

    def key(self, app: str, version: int) -> str:
        """Return the name of an image among all in the back end, as `Session.publish` takes it."""
        self.places.table(app)
        return f"{self._owner}/{app}/v{version}"

    async def finish_import(
        self, app: str, name: str, version: int, manifest: Manifest | None = None
    ) -> Manifest:
        """Make a version of an import, durably, and return its manifest; see Imports.examined. The
        caller commits the record and then removes the import, or removes the version."""
        async with self.imports.examined(app, name, version, manifest) as (path, found):
            if await self._exists(app, version):
                raise Exists(f"cannot import {app}/{name}: {app}/v{version} exists; take another")
            size = sum(file.size for file in contents.scan(path, found.ref))
            async with self._writing(app, path, min(size, IMPORT_BYTES)) as spool:
                await spool.load(found.ref)
                await spool.seal(found)
                published = await spool.publish(version)
                await spool.remember()
                return published

    async def _exists(self, app: str, version: int) -> bool:
        key = f"manifests/{self.key(app, version)}"
        found = await durable.run(
            f"cannot look for {app}/v{version}",
            partial(self.backend.list, f"{key.rpartition('/')[0]}/"),
        )
        return any(entry.name == key for entry in found)

    # -- reading

    async def opened(self, app: str, version: int) -> Opened:
        """Return an image to be read."""
        return await durable.run(f"cannot read {app}/v{version}", partial(self._open, app, version))

    def _open(self, app: str, version: int) -> Opened:
        key, ref = self.key(app, version), f"{app}/v{version}"
        known, removals = self._known.get(key), self._removals
        if known is None:
            manifest, recipe = versions.decode(self.backend.read(f"manifests/{key}"), ref)
            if manifest.ref != ref:
                raise Damaged(f"{ref} is damaged: its manifest is that of {manifest.ref}")
            known = Opened(manifest, recipe, ImageSource(self.reader, recipe))
            with self._lock:
                if removals == self._removals:  # or it may be another image of that name by now
                    self._known[key] = known
                while len(self._known) > KNOWN_IMAGES:
                    self._known.popitem(last=False)
        return known

    async def unpacked(self, image: Opened, directory: str) -> None:
        """Write the small files of an image into a directory, for CRIU and us to look at."""

        def work() -> None:
            for name in image.small:
                target = os.path.join(directory, name)
                os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
                durable.write(target, opened.whole(image, name))

        await durable.run(f"cannot unpack {image.manifest.ref}", work)

    async def check(self, image: Opened) -> str:
        """Look quickly at every byte that an image needs, and return what is damaged, file by file;
        '' when nothing is. Chunks are verified by their ids again whenever they are read."""

        def work() -> str:
            bad = set[bytes]()
            chunks = image.recipe.chunks
            for at in range(0, len(chunks), CHECKED_AT_ONCE):
                trio.from_thread.check_cancelled()
                bad.update(self.store.check(chunks[at : at + CHECKED_AT_ONCE]))
            return contents.enumerated(_named(image.recipe, bad)) if bad else ""

        return await durable.run(f"cannot check {image.manifest.ref}", work)

    async def verify(self, app: str, version: int) -> str:
        """Read a whole image from the store and return what is damaged; '' when nothing is."""

        def work() -> str:
            self._known.pop(self.key(app, version), None)
            try:
                image = self._open(app, version)
            except Damaged as exc:
                return exc.message
            except FileNotFoundError:
                return "it is not in the store"
            bad = set()
            for id in image.recipe.chunks:
                trio.from_thread.check_cancelled()
                try:
                    self.store.read(id)
                except Damaged:
                    bad.add(id)
            return contents.enumerated(_named(image.recipe, bad))

        return await durable.run(f"cannot verify {app}/v{version}", work)

    async def files(self, app: str, name: str) -> list[model.ImageFile]:
        """Return the files of a version or import, by name; its manifest is one of them."""
        work = partial(self._files, app, name)
        return await durable.run(f"cannot list {app}/{name}", work, self._readers)

    def _files(self, app: str, name: str) -> list[model.ImageFile]:
        if self._is_import(app, name):
            return [
                model.ImageFile(name=found.name, size=found.size, stored_bytes=found.stored)
                for found in contents.scan(self.places.imported(app, name), f"{app}/{name}")
            ]
        image = self._open(app, int(name[1:]))
        stored = self._stored_by_file(image)
        text = opened.blank_manifest_text(image)
        sizes = {name: image.recipe.size(name) for name in image.recipe.files}
        return [
            model.ImageFile(name=name, size=size, stored_bytes=stored.get(name, size))
            for name, size in sorted({**sizes, MANIFEST: len(text)}.items())
        ]

    def _stored_by_file(self, image: Opened) -> dict[str, int]:
        """Return what the bytes of each file take, each chunk shared out among those who use it."""
        try:
            stored = self.store.stored(image.recipe.chunks)
        except Damaged:
            return {}
        share = stored / np.maximum(image.recipe.used_bytes(), 1)
        return {name: int(image.recipe.weighed(name, share)) for name in image.recipe.files}

    async def read(self, app: str, name: str, file: str, offset: int, size: int) -> bytes:
        """Return up to `size` bytes of a file at `offset`, fewer only at its end (or MAX_DATA)."""
        if offset < 0 or size < 0:
            raise BadWords(f"cannot read {app}/{name}/{file}: the offset or size is negative")
        size = min(size, wire.MAX_DATA)

        def work() -> bytes:
            if self._is_import(app, name):
                return self.imports.read_file(app, name, file, offset, size)
            image = self._open(app, int(name[1:]))
            if file == MANIFEST:
                return self._manifest_text(image)[offset : offset + size]
            if file not in image.recipe.files:
                raise FileNotFoundError(2, "No such file")
            image.source.ahead(file, offset, size + READ_AHEAD_BYTES)
            return image.source.read(file, offset, size)

        return await durable.run(f"cannot read {app}/{name}/{file}", work, self._readers)

    def _manifest_text(self, image: Opened) -> bytes:
        key = self.key(image.manifest.app, image.manifest.version)
        return opened.manifest_text(image, self.backend, f"{SUMS}{key}")

    def _is_import(self, app: str, name: str) -> bool:
        return name.endswith(".part") or os.path.isdir(self.places.imported(app, name))

    # -- removing

    async def remove(self, app: str, version: int) -> None:
        """Remove a version, whose record is gone already; its chunks are for a sweep. Removing what
        is not there is no error."""
        key = self.key(app, version)

        def work() -> None:
            self.backend.delete(f"manifests/{key}")
            with self._lock:
                self._removals += 1
                self._known.pop(key, None)
            self.backend.delete(f"{SUMS}{key}")

        await durable.run(f"cannot remove {app}/v{version}", work)

    async def remove_app(self, app: str) -> None:
        """Forget what is kept of an app that has no images any more."""

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.places.table(app))
            with contextlib.suppress(OSError):
                os.rmdir(self.places.app_imports(app))

        await durable.run(f"cannot remove {app}", work)

    async def usage(self) -> model.Store:
        """Return the room in the back end, and what is in it as far as this node has learnt."""

        def work() -> model.Store:
            packs, chunks, stored = self.store.index.totals()
            return replace(
                self.backend.room(),
                kind=kind_of(self.backend),
                packs=packs,
                chunks=chunks,
                stored_bytes=stored,
                last_sweep=self._noted("sweep"),
                last_verify=self._noted("verify"),
            )

        return await durable.run("cannot look at the image store", work)

    async def sweep(self) -> Swept:
        """Remove what no image names, of any node that writes here; raises as `sweep.sweep`."""

        def work() -> Swept:
            check = trio.from_thread.check_cancelled
            with unbounded(self.backend):
                swept = sweep.sweep(self.store, versions.named, alone=self.alone, check=check)
            self._note("sweep")
            return swept

        return await durable.run("cannot sweep the image store", work)

    async def audited(self, told: Callable[[int], None]) -> Audit:
        """Read the whole store, of all nodes; see audit.everything."""

        def work() -> Audit:
            found = audit.everything(self.store, f"{self._owner}/", told)
            self._note("verify")
            return found

        return await durable.run("cannot verify the image store", work)

    async def audited_one(
        self, app: str, version: int, told: Callable[[int], None]
    ) -> list[Damage]:
        """Read one image; see audit.one."""
        key = self.key(app, version)
        return await durable.run(
            f"cannot verify {app}/v{version}",
            partial(audit.one, self.store, key, f"{app}/v{version}", told),
        )

    def _note(self, what: str) -> None:
        """Remember, across our own end, when something was done to the whole store."""
        with open(self.places.mark(what), "w", encoding="ascii"):
            pass

    def _noted(self, what: str) -> float:
        try:
            return os.stat(self.places.mark(what)).st_mtime
        except FileNotFoundError:
            return 0.0

    # -- after a crash

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
        CRIU is still at work: their spools stay. All other spools, imports without a record, and
        versions without one that are unfinished or were to come from an import are deleted.
        """
        partial_ = {*unfinished, *((app, int(name[1:].split(".")[0])) for app, name in imports)}
        return await durable.run(
            "cannot tidy up the image store",
            lambda: Recovered(
                [
                    *self._drop_spools({str(job) for job in running}),
                    *self.imports.drop_all_but(set(imports)),
                    *self._drop_versions(partial_ - {*known}),
                ],
                self._set_aside({*known} | partial_),
                sorted({*known} - self._published()),
            ),
        )

    def _drop_spools(self, kept: set[str]) -> Iterator[str]:
        for name in sorted(os.listdir(self.places.spools)):
            path = os.path.join(self.places.spools, name)
            if name.removesuffix(".work") not in kept and durable.delete(path):
                yield f"spool/{name}"

    def _drop_versions(self, wanted: set[tuple[str, int]]) -> Iterator[str]:
        for app, version in sorted(wanted & self._published()):
            self.backend.delete(f"manifests/{self.key(app, version)}")
            self.backend.delete(f"{SUMS}{self.key(app, version)}")
            yield f"{app}/v{version}"

    def _published(self) -> set[tuple[str, int]]:
        found = set()
        for entry in self.backend.list(f"manifests/{self._owner}/"):
            app, _, name = entry.name.split("/", 2)[2].partition("/")
            if name[1:].isdecimal():
                found.add((app, int(name[1:])))
        return found

    def _set_aside(self, known: set[tuple[str, int]]) -> list[str]:
        """Rename what has no record, so that its number can be used and its chunks stay."""
        aside = []
        for app, version in sorted(self._published() - known):
            key = f"manifests/{self.key(app, version)}"
            target = f"{key}~unlisted.{time.time_ns()}"
            self.backend.put(target, self.backend.read(key), replace=True)
            self.backend.delete(key)
            aside.append(target)
        return aside


def _named(recipe: Recipe, bad: Collection[bytes]) -> list[str]:
    """Say which files have chunks that are damaged."""
    numbers = {number for number, id in enumerate(recipe.chunks) if id in bad}
    wrong = []
    for name in sorted(recipe.files):
        if hit := numbers.intersection(recipe.chunks_of(name)):
            some = recipe.chunks[min(hit)].hex()[:16]
            wrong.append(f"{name} is damaged ({len(hit)} chunks, among them {some})")
    return wrong


def _seed(path: str) -> int:
    """Return the secret of this node that pages are hashed with. Tables that were made with another
    one match nothing."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if len(data := file.read()) == SEED_BYTES:
            return int.from_bytes(data, "little")
    data = secrets.token_bytes(SEED_BYTES)
    durable.write(f"{path}.part", data)
    durable.sync(f"{path}.part")
    os.replace(f"{path}.part", path)
    durable.sync(os.path.dirname(path))
    return int.from_bytes(data, "little")
