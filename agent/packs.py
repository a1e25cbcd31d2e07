"""The file that holds many chunks: its format, what proves it whole, and a pack on its way.

    b"KRGPACK1" | stored bytes of chunk 0 | chunk 1 | ... | table | trailer

The chunks lie without gaps, in the order of the table; `sum` covers the stored bytes of each, the
trailer's digest the table. So no byte of a pack is without something that tells of its change.
"""

from __future__ import annotations

import secrets
import struct
import threading
from typing import NamedTuple, NewType

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from agent.backend import Backend, Data, Upload
from krgfs.errors import Damaged

PackId = NewType("PackId", bytes)  # 16 bytes at random
ChunkId = bytes  # blake3 of the raw bytes
Rows = npt.NDArray[np.void]
Ids = npt.NDArray[np.void]

PREFIX = "packs/"
MAGIC = b"KRGPACK1"
END = b"KRGTAIL1"
CHUNK = np.dtype(
    [
        ("id", "V32"),
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("sum", "<u8"),
        ("codec", "u1"),
    ]
)
TRAILER = struct.Struct("<II32s8s")  # chunks, bytes of the table, its blake3, END
MAX_CHUNK_BYTES = 4 << 20
TAIL_BYTES = 64 << 10  # one read of that has the whole table of a pack of a thousand chunks


class Sealed(NamedTuple):
    """A chunk as it is stored: parts one after the other, and what its row says of them."""

    id: ChunkId
    parts: tuple[Data, ...]
    stored: int
    raw: int
    sum: int
    codec: int


def name_of(pack: PackId) -> str:
    text = pack.hex()
    return f"{PREFIX}{text[:2]}/{text}"


def id_of(name: str) -> PackId | None:
    """Return the id of the pack of this name; None when no pack is named so."""
    try:
        pack = PackId(bytes.fromhex(name[-32:]))
    except ValueError:
        return None
    return pack if name == name_of(pack) else None


class PackWriter:
    """A pack on its way; threads may add at once, but commit and abort come after all of them."""

    def __init__(self, backend: Backend) -> None:
        self.id = PackId(secrets.token_bytes(16))
        self._upload: Upload = backend.create(name_of(self.id))
        self._lock = threading.Lock()
        self._chunks: list[tuple[bytes, int, int, int, int, int]] = []
        try:
            self._upload.append(MAGIC)
        except BaseException:
            self._upload.abort()
            raise

    def add(self, chunk: Sealed) -> None:
        offset = self._upload.append(*chunk.parts)
        row = (chunk.id, offset, chunk.stored, chunk.raw, chunk.sum, chunk.codec)
        with self._lock:
            self._chunks.append(row)

    def commit(self) -> Rows:
        """Write the table and make the pack be; return its rows."""
        as_they_lie = sorted(self._chunks, key=lambda row: row[1:3])  # an empty one comes first
        rows = np.array(as_they_lie, dtype=CHUNK)
        table = rows.tobytes()
        digest = blake3(table).digest()
        self._upload.append(table, TRAILER.pack(len(rows), len(table), digest, END))
        self._upload.commit()
        return rows

    def abort(self) -> None:
        self._upload.abort()


def read_table(backend: Backend, name: str, size: int) -> Rows:
    """Return the rows of a pack of `size` bytes; Damaged when they cannot be trusted.

    What is returned lies inside of the pack without a gap; the chunks themselves are not read.
    """
    tail = backend.read(name, -TAIL_BYTES)
    if len(tail) < TRAILER.size:
        raise _damaged(name, "is too short for one")
    count, table_bytes, digest, end = TRAILER.unpack_from(tail, len(tail) - TRAILER.size)
    if end != END:
        raise _damaged(name, "does not end as one")
    table_at = size - TRAILER.size - table_bytes
    if table_bytes != count * CHUNK.itemsize or table_at < len(MAGIC):
        raise _damaged(name, "has a trailer that does not fit its length")
    if table_bytes + TRAILER.size > len(tail):
        table = backend.read(name, table_at, table_bytes)
    else:
        table = tail[len(tail) - TRAILER.size - table_bytes : len(tail) - TRAILER.size]
    if blake3(table).digest() != digest:
        raise _damaged(name, "has a damaged table")
    rows = np.frombuffer(table, dtype=CHUNK)
    if not _tiles(rows, table_at):
        raise _damaged(name, "has a table that does not fit its length")
    return rows


def _tiles(rows: Rows, table_at: int) -> bool:
    edges = np.concatenate(([len(MAGIC)], len(MAGIC) + np.cumsum(rows["stored"], dtype=np.uint64)))
    fits = rows["offset"] == edges[:-1].astype(np.uint64)
    small = rows["raw"] <= MAX_CHUNK_BYTES
    return bool(fits.all() and small.all() and int(edges[-1]) == table_at)


def _damaged(name: str, how: str) -> Damaged:
    return Damaged(f"the pack {name} {how}; bring it back from another copy of the store")
