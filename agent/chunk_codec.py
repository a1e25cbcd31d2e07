"""How one chunk is stored: its id, whether it is worth compressing, and back again, verified."""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import zstandard
from blake3 import blake3
from xxhash import xxh3_64

from agent.backend import Backend, Data
from agent.packs import MAX_CHUNK_BYTES, ChunkId, Sealed
from krgfs.errors import Damaged

FAST = 1
SMALL_BYTES = 32 << 10
WORTH = 0.9  # what does not become smaller than this share is stored as it is


class Codec(enum.IntEnum):
    RAW = 0
    ZSTD = 1


class Place(NamedTuple):
    """Where a chunk lies, and what its row says of it."""

    pack: str
    id: ChunkId
    offset: int
    stored: int
    raw: int
    sum: int
    codec: int


def place_of(pack: str, row: np.void) -> Place:
    """Return what a row of this pack's table says."""
    numbers = (int(row[field]) for field in Place._fields[2:])
    return Place(pack, row["id"].tobytes(), *numbers)


class _Tools(threading.local):
    """zstd's contexts are for one thread at a time, and dear to make."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self.compressors:
            self.compressors[level] = zstandard.ZstdCompressor(level=level)
        return self.compressors[level]


_tools = _Tools()


def gathered(parts: Sequence[Data]) -> Sequence[Data]:
    """Return the same bytes in fewer parts where each is so small that handling it costs more than
    a copy: blake3 of single pages runs at a third of its speed."""
    small = len(parts) > 1 and sum(len(part) for part in parts) < SMALL_BYTES * len(parts)
    return (b"".join(parts),) if small else parts


def identify(parts: Sequence[Data]) -> ChunkId:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def seal(id: ChunkId, parts: Sequence[Data], level: int) -> Sealed:
    """Return the chunk as it shall be stored. What does not compress is not copied."""
    raw = sum(len(part) for part in parts)
    if raw > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {raw} bytes; the most is {MAX_CHUNK_BYTES}")
    # What does not compress costs zstd's fast level less than a few samples of it would.
    for tried in dict.fromkeys((min(level, FAST), level)):
        packed = _compressed(parts, raw, tried)
        stored = sum(len(part) for part in packed)
        if stored > raw * WORTH:
            break
        if tried == level:
            return Sealed(id, packed, stored, raw, _sum(packed), Codec.ZSTD)
    return Sealed(id, tuple(parts), raw, raw, _sum(parts), Codec.RAW)


def _compressed(parts: Sequence[Data], raw: int, level: int) -> tuple[bytes, ...]:
    compressor = _tools.compressor(level)
    if len(parts) == 1:
        return (compressor.compress(parts[0]),)
    stream = compressor.compressobj(size=raw)
    packed = [stream.compress(part) for part in parts]
    packed.append(stream.flush())
    return tuple(part for part in packed if part)


def _sum(parts: Sequence[Data]) -> int:
    hasher = xxh3_64()
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()


def is_sound(place: Place, stored: Data) -> bool:
    """Tell whether these are the bytes that were stored, by their sum alone."""
    return len(stored) == place.stored and _sum((stored,)) == place.sum


def read_into(backend: Backend, place: Place, buffer: memoryview) -> int:
    """Bring a chunk's raw bytes into the caller's memory, and return how many.

    Damaged unless they are those of its id; what is in the buffer then is of no use.
    FileNotFoundError when the pack is gone.
    """
    if len(buffer) < place.raw:
        raise ValueError(f"room for {len(buffer)} bytes; the chunk has {place.raw}")
    into = buffer[: place.raw]
    if place.codec == Codec.RAW and place.stored == place.raw:
        if backend.read_into(place.pack, place.offset, into) != place.raw:
            raise damaged(place, "its pack is cut short")
    else:
        open_into(place, backend.read(place.pack, place.offset, place.stored), into)
        return place.raw
    _prove(place, into)
    return place.raw


def open_into(place: Place, stored: Data, buffer: memoryview) -> None:
    """Fill `buffer`, which has the chunk's raw size, from its stored bytes; Damaged as above."""
    if not is_sound(place, stored):
        raise damaged(place, "its stored bytes have changed")
    if place.codec == Codec.RAW:
        buffer[:] = stored
    elif place.codec == Codec.ZSTD:
        _decompress(place, stored, buffer)
    else:
        raise damaged(place, f"it is stored in way {place.codec}, which this version does not know")
    _prove(place, buffer)


def _decompress(place: Place, stored: Data, buffer: memoryview) -> None:
    # Into the buffer and never beyond: decompress() believes the size that the frame claims.
    got = 0
    try:
        with _tools.decompressor.stream_reader(stored) as reader:
            while got < len(buffer) and (more := reader.readinto(buffer[got:])):
                got += more
    except zstandard.ZstdError as exc:
        raise damaged(place, f"it cannot be decompressed ({exc})") from exc
    if got != len(buffer):
        raise damaged(place, f"it has {got} bytes instead of {len(buffer)}")


def _prove(place: Place, raw: memoryview) -> None:
    if blake3(raw).digest() != place.id:
        raise damaged(place, "its bytes are not those of its id")


def damaged(place: Place, why: str) -> Damaged:
    return Damaged(
        f"chunk {place.id[:8].hex()} in {place.pack} is damaged: {why}; "
        "`krg verify` names the images that need it"
    )
