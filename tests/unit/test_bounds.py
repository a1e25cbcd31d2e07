"""What an image, its copies and its readers may cost, and what damage may do to them."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest
import zstandard

from agent import recipe
from agent.backend import MemoryBackend
from agent.buffers import Reserve
from agent.manifest import MANIFEST
from agent.serving import Reader
from krgfs.errors import Damaged
from tests.unit.test_imports import PLAIN
from tests.unit.versions import contents_of, copied, finished, flip, make, names_in, opened


async def test_no_byte_of_the_kept_hashes_is_uncovered(tmp_path: Path) -> None:
    backend = MemoryBackend()
    async with opened(tmp_path / "s", backend) as images:
        await make(images, 1)
        before = await images.read("blast", "v1", MANIFEST, 0, 1 << 20)
        (name,) = names_in(backend, "sums/")
        for at in range(len(backend.read(name))):
            flip(backend, name, at)
            assert await images.read("blast", "v1", MANIFEST, 0, 1 << 20) == before


async def test_reading_a_manifest_needs_no_room(tmp_path: Path) -> None:
    backend = MemoryBackend()
    async with opened(tmp_path / "s", backend) as images:
        await make(images, 1)
        backend._room_bytes = 0
        assert MANIFEST in await contents_of(images)


async def test_a_page_file_that_was_cut_off_is_damage(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as images:
        await copied(images, PLAIN | {"pages-1.img": bytes(5000)}, "v2")
        with pytest.raises(Damaged):
            await finished(images, "v2", 2)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_reader_comes_back_to_its_bound(ahead: bool) -> None:
    class Chunks:
        def read_into(self, id: bytes, buffer: memoryview) -> int:
            return 10

    reader = Reader(Chunks(), 4 << 20)
    ids = [bytes([n]) for n in range(200)]
    if ahead:
        reader.ahead(ids[:100])
    held = [reader.lend(id) for id in ids[:100]]
    for lent in held:
        lent.give_back()
    for id in ids[100:]:
        reader.lend(id).give_back()
    kept = len(reader._warm) + len(reader._spare)
    reader.close()
    assert kept <= 8


def test_buffers_of_two_dumps_keep_the_limit() -> None:
    buffers = Reserve(64 << 20)
    with buffers.lent(1 << 40):
        pass
    with buffers.lent(16 << 20) as one, buffers.lent(1 << 40) as other:
        assert one.count + other.count <= 64


async def test_what_recovery_drops_leaves_no_hashes(tmp_path: Path) -> None:
    backend = MemoryBackend()
    async with opened(tmp_path / "s", backend) as images:
        await make(images, 1)
        await images.read("blast", "v1", MANIFEST, 0, 1 << 20)
        await images.recover(set(), set(), {("blast", 1)})
        assert names_in(backend, "sums/") == []


def test_a_recipe_with_a_wild_count_is_damage_at_once() -> None:
    for names, count in (({}, 1 << 31), ({"a": 1 << 62}, 0)):
        head = msgspec.msgpack.encode(names)
        raw = struct.pack("<II", len(head), count) + head
        with pytest.raises(Damaged):
            recipe.decode(zstandard.ZstdCompressor().compress(raw), "it")


async def test_an_imported_copy_has_the_chunks_of_its_original(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as images:
        await make(images, 1)
        await copied(images, await contents_of(images), "v2")
        assert (await finished(images, "v2", 2)).new_bytes == 0
