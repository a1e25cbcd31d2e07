"""Harm done to what the image store keeps of one file of one image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from agent import packs, versions
from agent.backend_directory import DirectoryBackend
from krgfs.errors import Damaged
from tests.sites import Site


class Place(NamedTuple):
    """Where the stored bytes of something lie."""

    path: Path
    offset: int
    size: int

    def flip(self) -> None:
        """Change one byte in the middle."""
        self.path.chmod(0o600)
        with self.path.open("r+b") as file:
            file.seek(self.offset + self.size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x20]))


def store(site: Site) -> Path:
    return site.state / "images"


def manifest(site: Site, ref: str) -> Place:
    """Return where the manifest of an image lies."""
    path = store(site) / "manifests" / site.node / ref
    return Place(path, 0, path.stat().st_size)


def chunks(site: Site, ref: str, pattern: str) -> list[Place]:
    """Return where the chunks lie that the largest file of this name is made of, but for those
    that are stored twice: harm to one copy of them does none."""
    _, recipe = versions.decode(manifest(site, ref).path.read_bytes(), ref)
    name = max((name for name in recipe.files if fnmatch(name, pattern)), key=recipe.size)
    wanted = {recipe.chunks[number] for number in recipe.chunks_of(name)}
    copies: dict[bytes, list[Place]] = {}
    for id, place in _all(store(site)):
        if id in wanted:
            copies.setdefault(id, []).append(place)
    found = [places[0] for places in copies.values() if len(places) == 1]
    assert found, f"no pack has a chunk of {ref}/{name} that is in no other"
    return found


def _all(images: Path) -> Iterator[tuple[bytes, Place]]:
    backend = DirectoryBackend(str(images))
    for entry in backend.list("packs/"):
        with suppress(Damaged):  # harmed before
            for row in packs.read_table(backend, entry.name, entry.size):
                place = Place(images / entry.name, int(row["offset"]), int(row["stored"]))
                yield bytes(row["id"]), place
