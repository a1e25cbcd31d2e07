"""The page files of an image out of packs, for a feeder: a list of where each chunk lies, made by
an agent that knows the store, and a source that reads by it.

The list and the packs, linked or copied, are in a directory of their own, so neither a sweep nor
an agent that ends takes them away. Modules that take long to import are left to the agent.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict

import msgspec
import zstandard
from blake3 import blake3

from krgfs.errors import Damaged

from . import texts

PLAN = "plan"
WARM_CHUNKS = 48
ZERO = -1  # in place of a chunk


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Where a chunk lies: the number of a pack file, and how it is stored there."""

    pack: int
    offset: int
    stored: int
    raw: int
    is_compressed: bool
    id: bytes


class Extents(msgspec.Struct, frozen=True, array_like=True):
    """What a file is made of, as arrays of 64-bit numbers: where each extent ends in the file, its
    chunk (or ZERO), and where it begins in that."""

    ends: bytes
    chunk: bytes
    offset: bytes


class Plan(msgspec.Struct, frozen=True):
    packs: list[str]
    chunks: list[Chunk]
    files: dict[str, Extents]


class _File:
    def __init__(self, found: Extents) -> None:
        self.ends, self.chunk, self.offset = (
            array("q", column) for column in (found.ends, found.chunk, found.offset)
        )


class Packs:
    """A source of pages (feeder_source.PageSource) by the plan in a directory. Every chunk is
    verified by its id."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._files: dict[str, _File] = {}
        self._fds: dict[int, int] = {}
        self._warm: OrderedDict[int, memoryview] = OrderedDict()

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from an offset of a page file on; see PageSource."""
        found = self._file(file)
        at = bisect_right(found.ends, offset)
        while buffer:
            if at >= len(found.ends):
                raise Damaged(f"{file} ends at {offset}, before its pages do")
            start = found.ends[at - 1] if at else 0
            count = min(len(buffer), found.ends[at] - offset)
            number, begin = found.chunk[at], found.offset[at] + offset - start
            if number == ZERO:
                buffer[:count] = bytes(count)
            else:
                buffer[:count] = self._chunk(number)[begin : begin + count]
            buffer, offset, at = buffer[count:], offset + count, at + 1

    def close(self) -> None:
        """Once nobody reads any more."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _file(self, name: str) -> _File:
        with self._lock:
            if self._plan is None:
                with open(os.path.join(self._directory, PLAN), "rb") as file:
                    self._plan = msgspec.msgpack.decode(file.read(), type=Plan)
            if name not in self._files:
                if name not in self._plan.files:
                    raise Damaged(f"the image has no {name}")
                self._files[name] = _File(self._plan.files[name])
            return self._files[name]

    def _chunk(self, number: int) -> memoryview:
        assert self._plan is not None
        with self._lock:
            if number in self._warm:
                self._warm.move_to_end(number)
                return self._warm[number]
        data = memoryview(self._read(self._plan.chunks[number]))
        with self._lock:
            self._warm[number] = data
            while len(self._warm) > WARM_CHUNKS:
                self._warm.popitem(last=False)
        return data

    def _read(self, chunk: Chunk) -> bytes:
        name = chunk.id.hex()[:16]
        stored = os.pread(self._fd(chunk.pack), chunk.stored, chunk.offset)
        try:
            data = _expanded(stored, chunk.raw) if chunk.is_compressed else stored
        except zstandard.ZstdError as exc:
            raise Damaged(f"chunk {name} is damaged: {exc}") from exc
        if len(data) != chunk.raw or blake3(data).digest() != chunk.id:
            raise Damaged(f"chunk {name} is damaged: it is not what its id was made of")
        return data

    def _fd(self, pack: int) -> int:
        assert self._plan is not None
        with self._lock:
            if pack not in self._fds:
                path = os.path.join(self._directory, self._plan.packs[pack])
                self._fds[pack] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fds[pack]


def _expanded(stored: bytes, raw: int) -> bytes:
    data = bytearray(raw + 1)
    with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
        count = reader.readinto(data)
    return bytes(memoryview(data)[:count])


def is_there(directory: str) -> bool:
    """Tell whether a directory has a plan."""
    return bool(texts.read(os.path.join(directory, PLAN))[:1])
