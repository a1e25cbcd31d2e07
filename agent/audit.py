"""Read an image, or the whole store, and say what is damaged: of which image, file and chunk.

All of it is blocking work, for `durable.run`. Nothing is taken from memory: what is verified is
what a restart would find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from krgfs.errors import Damaged

from . import sweep, versions
from .chunk_records import MANIFESTS
from .chunks import ChunkStore
from .recipe import Recipe
from .sweep import Report

READERS = 4
GONE = "it is not in the store"
ADVICE = "; `krg verify`"  # of a sentence that is for who has not done that yet


class Damage(NamedTuple):
    """One thing that is wrong. `image` is APP/vN, of another node NODE/APP/vN, or the name of the
    object where no image lacks anything; without a `file` it is wrong as a whole."""

    image: str
    why: str
    file: str = ""
    chunk: str = ""

    def __str__(self) -> str:
        where = f" {self.file} chunk {self.chunk}" if self.file else ""
        return f"{self.image} damaged{where}: {self.why}"


class Audit(NamedTuple):
    """What is in the whole store: `whole` are the images by name and digest whose own objects are
    good, `damage` is of images, `spare` of what no image lacks."""

    report: Report
    whole: frozenset[tuple[str, str]]
    damage: list[Damage]
    spare: list[Damage]


def everything(store: ChunkStore, own: str, told: Callable[[int], None]) -> Audit:
    """Read every byte of the store. Images whose keys begin with `own` are named without it; `told`
    is told of bytes as they are read, and may raise."""
    whole: set[tuple[str, str]] = set()

    def named(data: bytes) -> list[bytes]:
        manifest, recipe = versions.decode(data, "an image")
        whole.add((manifest.ref, manifest.digest))
        return recipe.chunks

    report = sweep.verify(store, named, told)
    reasons = {each.id: each.why for each in report.bad_chunks}
    damage: list[Damage] = []
    lacking: set[bytes] = set()
    for name, ids in report.lacking:
        lacking.update(ids)
        damage += _lacking(store, name, _shown(name, own), {id: reasons.get(id, "") for id in ids})
    spare: list[Damage] = []
    for name, why in report.bad_objects:
        found = Damage(_shown(name, own), why)
        (damage if name.startswith(MANIFESTS) else spare).append(found)
    spare += [
        Damage(f"{each.pack} at {each.offset}", each.why.partition(ADVICE)[0])
        for each in report.bad_chunks
        if each.id not in lacking
    ]
    return Audit(report, frozenset(whole), damage, spare)


def _shown(name: str, own: str) -> str:
    return name.removeprefix(MANIFESTS).removeprefix(own)


def _lacking(store: ChunkStore, name: str, ref: str, bad: Mapping[bytes, str]) -> Iterator[Damage]:
    try:
        recipe = versions.decode(store.backend.read(name), ref)[1]
    except FileNotFoundError:
        return  # removed meanwhile
    except Damaged as exc:
        yield Damage(ref, exc.message)
        return
    yield from _by_file(ref, recipe, bad)


def one(store: ChunkStore, key: str, ref: str, told: Callable[[int], None]) -> list[Damage]:
    """Read all that an image needs and return what is damaged. `told` is told of bytes of its
    content as they are read, and may raise."""
    try:
        manifest, recipe = versions.decode(store.backend.read(f"{MANIFESTS}{key}"), ref)
    except FileNotFoundError:
        return [Damage(ref, GONE)]
    except Damaged as exc:
        return [Damage(ref, exc.message)]
    if manifest.ref != ref:
        return [Damage(ref, f"its manifest is that of {manifest.ref}")]

    def look(id: bytes) -> tuple[int, str]:
        try:
            return len(store.read(id)), ""
        except Damaged as exc:
            return 0, exc.message

    bad = {}
    with ThreadPoolExecutor(READERS) as pool:
        for id, (size, why) in zip(recipe.chunks, pool.map(look, recipe.chunks), strict=True):
            told(size)
            if why:
                bad[id] = why
    return list(_by_file(ref, recipe, bad))


def _by_file(ref: str, recipe: Recipe, bad: Mapping[bytes, str]) -> Iterator[Damage]:
    numbers = {number for number, id in enumerate(recipe.chunks) if id in bad}
    for file in sorted(recipe.files):
        for number in sorted(numbers.intersection(recipe.chunks_of(file))):
            id = recipe.chunks[number]
            why = bad[id].partition(ADVICE)[0] or "it is in no readable pack"
            yield Damage(ref, why, file, id.hex())
