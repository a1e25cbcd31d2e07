"""What the files of an image are made of: which bytes of which chunks, and which are zero.

Every image has a recipe of its own, complete in itself: it names chunks, never another image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from krgfs.errors import Damaged

ZERO = 0xFFFFFFFF  # in place of the number of a chunk: that many zero bytes
ID_BYTES = 32
MAX_LENGTH = 1 << 30
MAX_RECIPE_BYTES = 1 << 32
UNREADABLE = (
    ValueError,
    OverflowError,
    MemoryError,
    struct.error,
    zstandard.ZstdError,
    msgspec.MsgspecError,
)
_HEAD = struct.Struct("<II")

EXTENT = np.dtype([("chunk", "<u4"), ("offset", "<u4"), ("length", "<u4")])
Extents = npt.NDArray[np.void]


class Source(NamedTuple):
    """Bytes of one chunk, `chunk` its number in the recipe; or zeros (ZERO, the offset idle)."""

    chunk: int
    offset: int
    length: int


class Recipe:
    """`chunks` are the ids by number; `files` the extents of each file, one after the other."""

    def __init__(self, chunks: list[bytes], files: Mapping[str, Extents]) -> None:
        self.chunks = chunks
        self.files = dict(files)
        self._ends = {
            name: np.cumsum(extents["length"], dtype=np.int64) for name, extents in files.items()
        }

    def size(self, file: str) -> int:
        """Return the size of a file in bytes."""
        ends = self._ends[file]
        return int(ends[-1]) if len(ends) else 0

    def sources(self, file: str, offset: int, size: int) -> Iterator[Source]:
        """Yield what makes up `size` bytes of a file from `offset` on, fewer at its end."""
        extents, ends = self.files[file], self._ends[file]
        end = min(offset + size, self.size(file))
        at = int(np.searchsorted(ends, offset, side="right"))
        while offset < end:
            chunk, start, length = extents[at].tolist()
            skip = offset - (int(ends[at]) - length)
            taken = min(length - skip, end - offset)
            yield Source(chunk, ZERO if chunk == ZERO else start + skip, taken)
            offset, at = offset + taken, at + 1

    def chunks_of(self, file: str, offset: int = 0, size: int = 1 << 62) -> list[int]:
        """Return the numbers of the chunks that these bytes of a file need, by number."""
        ends = self._ends[file]
        first = int(np.searchsorted(ends, offset, side="right"))
        last = int(np.searchsorted(ends, offset + size, side="left")) + 1
        found = np.unique(self.files[file]["chunk"][first:last])
        return [number for number in found.tolist() if number != ZERO]

    def weighed(self, file: str, share: npt.NDArray[np.float64]) -> float:
        """Return the sum over a file's bytes of what its chunk has in `share`."""
        found = self.files[file]
        real = found[found["chunk"] != ZERO]
        return float((share[real["chunk"]] * real["length"]).sum())

    def used_bytes(self) -> npt.NDArray[np.int64]:
        """Return how many bytes of each chunk are used, those that are used twice twice."""
        used = np.zeros(len(self.chunks), np.int64)
        for extents in self.files.values():
            real = extents[extents["chunk"] != ZERO]
            np.add.at(used, real["chunk"], real["length"].astype(np.int64))
        return used


def extents(chunk: npt.ArrayLike, offset: npt.ArrayLike, length: npt.ArrayLike) -> Extents:
    """Return extents of these columns."""
    chunk = np.asarray(chunk)
    made = np.empty(len(chunk), EXTENT)
    made["chunk"], made["offset"], made["length"] = chunk, offset, length
    return made


def zeros(length: int) -> list[Source]:
    """Return the sources of so many zero bytes."""
    whole, rest = divmod(length, MAX_LENGTH)
    return [Source(ZERO, 0, MAX_LENGTH)] * whole + ([Source(ZERO, 0, rest)] if rest else [])


def of_sources(sources: Iterable[Source]) -> Extents:
    """Return the extents of a file that these make up."""
    return np.array([tuple(each) for each in sources], EXTENT)


def encode(recipe: Recipe) -> bytes:
    """Return a recipe as it is stored."""
    names = {name: len(extents) for name, extents in recipe.files.items()}
    parts = [msgspec.msgpack.encode(names), b"".join(recipe.chunks)]
    joined = np.concatenate([*recipe.files.values(), np.empty(0, EXTENT)])
    parts += [np.ascontiguousarray(joined[column]).tobytes() for column in joined.dtype.names or ()]
    head = _HEAD.pack(len(parts[0]), len(recipe.chunks))
    packer = zstandard.ZstdCompressor(level=3, write_checksum=True)
    return packer.compress(head + b"".join(parts))


def decode(data: bytes, where: str) -> Recipe:
    """Return the recipe that `data` is; raises Damaged, which `where` is named in."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_RECIPE_BYTES)
        names_bytes, count = _HEAD.unpack_from(raw)
        at = _HEAD.size
        names = msgspec.msgpack.decode(raw[at : at + names_bytes], type=dict[str, int])
        at += names_bytes
        total = sum(names.values())
        if at + count * ID_BYTES + total * EXTENT.itemsize != len(raw):
            raise ValueError("its length is wrong")
        chunks = [raw[i : i + ID_BYTES] for i in range(at, at + count * ID_BYTES, ID_BYTES)]
        at += count * ID_BYTES
        columns = np.frombuffer(raw, "<u4", 3 * total, at).reshape(3, total)
    except UNREADABLE as exc:
        raise Damaged(f"the recipe of {where} is damaged: {exc}; use another copy") from exc
    _check(columns, count, where)
    files, first = {}, 0
    for name, length in names.items():
        files[name] = extents(*columns[:, first : first + length])
        first += length
    return Recipe(chunks, files)


def _check(columns: npt.NDArray[np.uint32], count: int, where: str) -> None:
    chunk = columns[0]
    if np.any((chunk >= count) & (chunk != ZERO)):
        raise Damaged(f"the recipe of {where} names a chunk that it does not list")
