"""The format of a pack: what is written is read back, and no byte of it changes unnoticed."""

from __future__ import annotations

import os

import pytest

from agent import chunk_codec, packs
from agent.backend import MemoryBackend
from agent.chunk_codec import Codec, Place
from agent.packs import PackId, PackWriter, Rows
from krgfs.errors import Damaged

TEXT = b"the same words again and again, " * 64
CHUNKS = (TEXT, os.urandom(500), b"", b"x")


def write(backend: MemoryBackend, *chunks: bytes) -> tuple[PackId, Rows]:
    writer = PackWriter(backend)
    for raw in chunks:
        writer.add(chunk_codec.seal(chunk_codec.identify([raw]), [raw], 1))
    return writer.id, writer.commit()


def read(backend: MemoryBackend, name: str) -> list[bytes]:
    """Return all chunks; Damaged when one is not what its row says."""
    rows = packs.read_table(backend, name, len(backend.read(name)))
    chunks = []
    for row in rows:
        place = Place(name, row["id"].tobytes(), *(int(row[each]) for each in Place._fields[2:]))
        buffer = bytearray(place.raw)
        chunk_codec.read_into(backend, place, memoryview(buffer))
        chunks.append(bytes(buffer))
    return chunks


def test_a_pack_is_read_as_it_was_written() -> None:
    backend = MemoryBackend()
    pack, rows = write(backend, *CHUNKS)
    name = packs.name_of(pack)
    assert name == f"packs/{pack.hex()[:2]}/{pack.hex()}" and packs.id_of(name) == pack
    assert packs.read_table(backend, name, len(backend.read(name))).tobytes() == rows.tobytes()
    assert read(backend, name) == list(CHUNKS)
    assert rows["codec"].tolist() == [Codec.ZSTD, Codec.RAW, Codec.RAW, Codec.RAW]


def test_a_pack_without_chunks_is_one() -> None:
    backend = MemoryBackend()
    pack, _ = write(backend)
    assert read(backend, packs.name_of(pack)) == []


def test_a_table_larger_than_one_read_is_read() -> None:
    backend = MemoryBackend()
    count = packs.TAIL_BYTES // packs.CHUNK.itemsize * 2
    pack, rows = write(backend, *(b"%d" % each for each in range(count)))
    name = packs.name_of(pack)
    assert packs.read_table(backend, name, len(backend.read(name))).tobytes() == rows.tobytes()


@pytest.mark.parametrize("name", ["packs/ab/x", "packs/00/" + "a" * 32, "packs/aa/" + "A" * 32])
def test_other_names_are_no_packs(name: str) -> None:
    assert packs.id_of(name) is None


def test_a_changed_byte_is_found_wherever_it_is() -> None:
    backend = MemoryBackend()
    pack, _ = write(backend, TEXT, os.urandom(50))
    name = packs.name_of(pack)
    whole = backend.read(name)
    for at in range(len(packs.MAGIC), len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        backend.put(name, changed, replace=True)
        with pytest.raises(Damaged):
            read(backend, name)


def test_a_pack_that_is_cut_or_has_grown_is_found() -> None:
    backend = MemoryBackend()
    pack, _ = write(backend, *CHUNKS)
    name = packs.name_of(pack)
    whole = backend.read(name)
    wrong = [whole[:size] for size in range(len(whole))]
    wrong += [whole + b"\0", whole + whole, b"\0" + whole, whole[:8] + b"\0" + whole[8:]]
    for data in wrong:
        backend.put(name, data, replace=True)
        with pytest.raises(Damaged, match=name):
            packs.read_table(backend, name, len(data))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("kind", [Codec.RAW, Codec.ZSTD])
def test_parts_make_up_the_chunk(count: int, kind: Codec) -> None:
    raw = os.urandom(1 << 20) if kind is Codec.RAW else TEXT * 500
    step = -(-len(raw) // count)
    parts = [memoryview(raw)[at : at + step] for at in range(0, len(raw), step)]
    id = chunk_codec.identify(parts)
    sealed = chunk_codec.seal(id, parts, 1)
    assert sealed.codec == kind and id == chunk_codec.identify([raw])
    stored = b"".join(sealed.parts)
    assert len(stored) == sealed.stored and (kind is Codec.ZSTD or sealed.parts == tuple(parts))
    place = Place("p", id, 0, sealed.stored, sealed.raw, sealed.sum, sealed.codec)
    buffer = bytearray(len(raw))
    chunk_codec.open_into(place, stored, memoryview(buffer))
    assert buffer == raw


def test_what_decompresses_to_more_or_less_than_it_says_is_damaged() -> None:
    sealed = chunk_codec.seal(chunk_codec.identify([TEXT]), [TEXT], 1)
    for raw in (len(TEXT) - 1, len(TEXT) + 1, 0):
        place = Place("p", sealed.id, 0, sealed.stored, raw, sealed.sum, sealed.codec)
        with pytest.raises(Damaged, match=sealed.id[:8].hex()):
            chunk_codec.open_into(place, b"".join(sealed.parts), memoryview(bytearray(raw)))


def test_a_chunk_too_large_is_refused() -> None:
    parts = [bytes(packs.MAX_CHUNK_BYTES), b"x"]
    with pytest.raises(ValueError, match="the most is"):
        chunk_codec.seal(chunk_codec.identify(parts), parts, 1)
