"""What a feeder is given of the image store: see feeder_packs, which reads it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import numpy as np

from krgfs.errors import Damaged

from . import chunk_codec, durable, recipe
from .chunk_codec import Codec, Place
from .chunks import ChunkStore
from .feeder_packs import PLAN, ZERO, Chunk, Extents, Plan
from .recipe import Recipe

COPY_BYTES = 1 << 22
TRIES = 3


def make(store: ChunkStore, image: Recipe, directory: str, root: str = "") -> str:
    """Put all that a feeder of an image needs into a new directory, and return the word that names
    it to feeder_source. `root` is where the store lies, if that is a directory of this machine.

    Raises Damaged for a chunk that is nowhere, OSError of the back end.
    """
    for _ in range(TRIES):
        try:
            return _made(store, image, directory, root)
        except FileNotFoundError:  # a sweep has moved what was in a pack
            drop(directory)
            store.refresh()
    return _made(store, image, directory, root)


def _made(store: ChunkStore, image: Recipe, directory: str, root: str) -> str:
    os.mkdir(directory, 0o700)
    names = [name for name in image.files if name.startswith("pages-")]
    wanted = sorted({number for name in names for number in image.chunks_of(name)})
    packs: dict[str, int] = {}
    chunks: list[Chunk] = []
    numbers = np.full(len(image.chunks) + 1, ZERO, np.int64)
    for number in wanted:
        place = _place(store, image.chunks[number])
        pack = packs.setdefault(place.pack, len(packs))
        numbers[number] = len(chunks)
        is_packed = place.codec == Codec.ZSTD
        chunks.append(Chunk(pack, place.offset, place.stored, place.raw, is_packed, place.id))
    for name, pack in packs.items():
        _bring(store, name, os.path.join(directory, str(pack)), root)
    files = {name: _extents(image.files[name], numbers) for name in names}
    plan = Plan([str(pack) for pack in packs.values()], chunks, files)
    durable.write(os.path.join(directory, PLAN), msgspec.msgpack.encode(plan))
    return f"packs:{directory}"


def _place(store: ChunkStore, id: bytes) -> Place:
    """Return where a chunk is that is good, should it be in several packs."""
    if not (found := store.index.places(id)):
        raise Damaged(f"chunk {id.hex()[:16]} is in no pack")
    for place in found[:-1]:
        stored = store.backend.read(place.pack, place.offset, place.stored)
        if chunk_codec.is_sound(place, stored):
            return place
    return found[-1]


def _extents(found: recipe.Extents, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Extents:
    chunk = found["chunk"].astype(np.int64)
    chunk = numbers[np.where(chunk == recipe.ZERO, len(numbers) - 1, chunk)]
    ends = np.cumsum(found["length"], dtype=np.int64)
    return Extents(ends.tobytes(), chunk.tobytes(), found["offset"].astype(np.int64).tobytes())


def _bring(store: ChunkStore, pack: str, target: str, root: str) -> None:
    """Link a pack, or copy it where that cannot be."""
    if root:
        with contextlib.suppress(OSError):
            os.link(os.path.join(root, pack), target)
            return
    offset = 0
    with open(target, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        while data := store.backend.read(pack, offset, COPY_BYTES):
            file.write(data)
            offset += len(data)


def drop(directory: str | Path) -> None:
    """Remove what a feeder was given."""
    durable.delete(str(directory))
