"""An image on its way into the store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio
from msgspec.structs import replace

from krgfs.errors import Damaged, Exists

from . import contents, criu_images, durable, pages, versions
from .chunk_sessions import Session
from .chunks import ChunkStore
from .intake import PAGES, Intake
from .manifest import MANIFEST, Manifest
from .pages import PAGE_BYTES
from .recipe import Recipe

CHECKED_AT_ONCE = 256
SMALL_BYTES = 64 << 20  # a larger file is nothing that CRIU reads whole, whatever its name


class Spool:
    """An image on its way into the store. `path` has its small files, `intake` takes the rest; it
    is `key(version)` among all in the back end, and its page table comes to lie at `table`."""

    def __init__(
        self,
        path: str,
        session: Session,
        intake: Intake,
        store: ChunkStore,
        key: Callable[[int], str],
        table: str,
    ) -> None:
        self.path = path
        self.intake = intake
        self._session = session
        self._store = store
        self._key = key
        self._table = table
        self._sealed: tuple[Manifest, Recipe, pages.Table] | None = None

    async def load(self, ref: str) -> None:
        """Take in the large files that lie in the directory themselves; Damaged where one is cut
        off."""

        def work() -> None:
            found = {file.name: file.size for file in contents.scan(self.path, ref)}
            criu_images.check_pages(Path(self.path), found)
            for name, size in found.items():
                if name.startswith(PAGES) and size % PAGE_BYTES:
                    raise Damaged(f"cannot import {ref}: {name} ends in the middle of a page")
                if is_large(name, size):
                    self.intake.load(os.path.join(self.path, name), name)

        await durable.run(f"cannot store {ref}", work)

    async def seal(
        self, manifest: Manifest, *, texts: Mapping[str, str] | None = None, sure: bool = False
    ) -> Manifest:
        """Make all that was taken in durable, with small `texts` beside it, and return the manifest
        with files and sizes. Cancelled, it stops soon.

        With `sure` the chunks that it shares with earlier images are looked at too: Damaged where
        one is not what it was; it is stored anew the next time.
        """
        ref = manifest.ref

        def work() -> Manifest:
            small = _small_files(self.path, ref)
            for name, text in (texts or {}).items():
                small[name] = text.encode(errors="surrogateescape")
            addresses = criu_images.Addresses(self.path)
            small = dict(sorted(small.items()))
            stored = self.intake.finish(small, addresses.pages_of, trio.from_thread.check_cancelled)
            self._session.flush()
            if sure and (bad := self._damaged(stored.recipe.chunks)):
                raise Damaged(
                    f"{len(bad)} chunks of the image store that {manifest.app} shares with earlier "
                    "images are damaged; do it again, and they are stored anew"
                )
            taken = int(self._store.stored(stored.recipe.chunks).sum())
            sized = replace(
                manifest,
                logical_bytes=stored.logical_bytes,
                stored_bytes=taken,
                new_bytes=self._session.new_bytes,
            )
            self._sealed = (sized, stored.recipe, stored.table)
            return versions.encode(sized, stored.recipe)[1]

        return await durable.run(f"cannot store {ref}", work)

    def _damaged(self, chunks: Sequence[bytes]) -> list[bytes]:
        bad = []
        for at in range(0, len(chunks), CHECKED_AT_ONCE):
            trio.from_thread.check_cancelled()
            bad += self._store.check(chunks[at : at + CHECKED_AT_ONCE])
        return bad

    async def publish(self, version: int) -> Manifest:
        """Make it version `version` of its app, durably, and return its manifest. Exists when there
        is such a version."""
        if self._sealed is None:
            raise RuntimeError("a spool is sealed before it is published")
        manifest, recipe, _ = self._sealed

        def work() -> Manifest:
            data, published = versions.encode(replace(manifest, version=version), recipe)
            try:
                self._session.publish(self._key(version), data)
            except FileExistsError as exc:
                raise Exists(f"cannot publish {published.ref}: it exists already") from exc
            return published

        return await durable.run(f"cannot publish version {version} of {manifest.app}", work)

    async def remember(self) -> None:
        """Keep which pages it has, for the next one of its app to compare with; no more than a
        short cut, so it does not matter that this fails."""
        if self._sealed is None:
            raise RuntimeError("a spool is sealed before its pages are known")
        table = self._sealed[2]

        def work() -> None:
            with contextlib.suppress(OSError):
                table.save(self._table)

        await durable.run(f"cannot remember pages in {self._table}", work)


def is_large(name: str, size: int) -> bool:
    """Tell whether a file goes through an intake's buffers."""
    return criu_images.is_large(name) or size > SMALL_BYTES


def _small_files(path: str, ref: str) -> dict[str, bytes]:
    found = {}
    for file in contents.scan(path, ref):
        if file.name != MANIFEST and not is_large(file.name, file.size):
            target = os.path.join(path, file.name)
            with (
                durable.opened(target, os.O_RDONLY) as fd,
                open(fd, "rb", closefd=False) as opened,
            ):
                found[file.name] = opened.read()
    return found
