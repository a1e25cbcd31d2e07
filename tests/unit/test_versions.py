"""The object that makes an image exist: all of it is covered, and it names its chunks."""

from __future__ import annotations

import os
import struct

import pytest
from blake3 import blake3
from msgspec.structs import replace

from agent import manifest as manifests
from agent import recipe, versions
from agent.manifest import FileSum
from agent.recipe import ZERO, Recipe, Source
from krgfs.errors import CannotRunHere, Damaged
from tests.unit.versions import manifest_of

CHUNKS = [os.urandom(32) for _ in range(3)]
RECIPE = Recipe(
    CHUNKS,
    {
        "pages-1.img": recipe.of_sources([Source(0, 0, 4096), Source(ZERO, 0, 8192)]),
        "core-1.img": recipe.of_sources([Source(2, 5, 7)]),
        "empty.img": recipe.of_sources([]),
    },
)
DATA, MANIFEST = versions.encode(manifest_of(cwd=os.fsdecode(b"/\xff")), RECIPE)


def wrapped(text: bytes, body: bytes, magic: bytes = versions.MAGIC) -> bytes:
    data = struct.pack("<8sI", magic, len(text)) + text + body
    return data + blake3(data).digest()


def test_an_image_is_read_as_it_was_stored() -> None:
    manifest, made = versions.decode(DATA, "blast/v1")
    assert manifest == MANIFEST
    assert made.chunks == CHUNKS
    assert {n: e.tolist() for n, e in made.files.items()} == {
        n: e.tolist() for n, e in RECIPE.files.items()
    }


def test_the_manifest_has_the_files_of_the_recipe() -> None:
    assert MANIFEST.files == {
        "core-1.img": FileSum(7),
        "empty.img": FileSum(0),
        "pages-1.img": FileSum(12_288),
    }
    assert MANIFEST.recipe == blake3(recipe.encode(RECIPE)).hexdigest()
    assert MANIFEST.digest and MANIFEST.ref == "blast/v1"


def test_it_names_all_of_its_chunks() -> None:
    assert list(versions.named(DATA)) == CHUNKS


def test_every_flipped_bit_is_damage() -> None:
    for at in range(len(DATA)):
        data = bytearray(DATA)
        data[at] ^= 1 << at % 8
        for use in (lambda data: versions.decode(data, "blast/v1"), versions.named):
            with pytest.raises(Damaged):
                use(bytes(data))


def test_whatever_is_cut_off_or_added_is_damage() -> None:
    for data in (*(DATA[:cut] for cut in range(len(DATA))), DATA + b"\0", b"\0" + DATA):
        with pytest.raises(Damaged, match="the record of blast/v1 in the store is damaged"):
            versions.decode(data, "blast/v1")


def test_the_recipe_of_another_image_is_not_taken() -> None:
    body = recipe.encode(Recipe(CHUNKS, RECIPE.files | {"more": recipe.of_sources([])}))
    data = wrapped(manifests.encode(MANIFEST), body)
    with pytest.raises(Damaged, match="the recipe of blast/v1 is not the one"):
        versions.decode(data, "blast/v1")


def test_what_another_version_of_ours_wrote_is_refused_in_words() -> None:
    text, body = manifests.encode(MANIFEST), recipe.encode(RECIPE)
    with pytest.raises(Damaged, match="has another format"):
        versions.decode(wrapped(text, body, b"KRGIMG2\n"), "blast/v1")
    newer = manifests.encode(replace(MANIFEST, format=manifests.FORMAT + 1))
    with pytest.raises(CannotRunHere, match="use a newer krgfs"):
        versions.decode(wrapped(newer, body), "blast/v1")
