"""Dumps without CRIU for tests: page files made of runs, fed through buffers, and read back."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3
from hypothesis import strategies as st

from agent import pages, recipe
from agent.buffers import Buffers, Piece
from agent.intake import Addresses, Chunks, Intake, Stored
from agent.pages import PAGE_BYTES, Numbers, Table
from agent.recipe import Recipe
from agent.serving import ImageSource, Reader
from krgfs.errors import Damaged

SEED = 7
Files = dict[str, bytes]


class Kept:
    """Chunks in memory: a session and a store at once. Fails at its `fails`th new chunk."""

    def __init__(self, fails: int = -1) -> None:
        self.raw: dict[bytes, bytes] = {}
        self.adds = 0
        self.new_bytes = 0
        self._fails = fails
        self._lock = threading.Lock()

    def add(self, *parts: bytes | bytearray | memoryview) -> bytes:
        data = b"".join(parts)
        id = blake3(data).digest()
        with self._lock:
            self.adds += 1
            if self.adds == self._fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if id not in self.raw:
                self.raw[id] = data
                self.new_bytes += len(data)
        return id

    def reuse(self, ids: Sequence[bytes]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.array([id in self.raw for id in ids], bool)

    def read_into(self, id: bytes, buffer: memoryview) -> int:
        if id not in self.raw:
            raise Damaged(f"chunk {id.hex()} is nowhere")
        buffer[: len(self.raw[id])] = self.raw[id]
        return len(self.raw[id])


@dataclass
class Scribbling:
    """Gives buffers back after writing over them, as the next dump does."""

    buffers: Buffers
    given_back: list[int] = field(default_factory=list)

    def give_back(self, index: int, /) -> None:
        self.buffers[index][:] = b"\xee" * self.buffers.size_bytes
        self.given_back.append(index)
        self.buffers.give_back(index)


def feed(intake: Intake, files: Mapping[str, bytes]) -> None:
    """Hand files to an intake as a capture does, piece by piece and all of them side by side."""
    buffers = intake.buffers
    home, step = Scribbling(buffers), buffers.size_bytes
    parts = [
        (at, name, data[at : at + step])
        for name, data in files.items()
        for at in range(0, len(data), step)
    ]
    for at, name, data in sorted(parts, key=lambda part: part[0]):
        index = buffers.lend(unless=lambda: False)
        assert index is not None
        buffers[index][: len(data)] = data
        piece = Piece(name, at, buffers[index][: len(data)], home, index)
        try:
            intake.take(piece)
        except BaseException:
            piece.give_back()
            raise


def unknown(file: str) -> Numbers:
    return np.empty(0, np.int64)


def dumped(
    chunks: Chunks,
    files: Mapping[str, bytes],
    known: Table | None = None,
    addresses: Addresses = unknown,
    buffers: Buffers | None = None,
    small: Mapping[str, bytes] | None = None,
) -> Stored:
    """Take a dump in; afterwards all buffers are given back and no thread is left."""
    buffers, threads = buffers or Buffers(16), set(threading.enumerate())
    intake = Intake(buffers, chunks, known or pages.empty(), SEED)
    try:
        feed(intake, files)
        return intake.finish(small or {}, addresses, lambda: None)
    finally:
        intake.close()
        assert buffers.free == buffers.count
        assert set(threading.enumerate()) <= threads


def read_back(kept: Kept, made: Recipe) -> Files:
    """Return all files as a restore gets them, by way of the recipe's bytes."""
    again = recipe.decode(recipe.encode(made), "it")
    reader = Reader(kept, 4 << 20)
    try:
        source = ImageSource(reader, again)
        return {name: whole(source, name) for name in again.files}
    finally:
        reader.close()


def whole(source: ImageSource, name: str) -> bytes:
    found = bytearray()
    for piece in source.pieces(name) or ():
        assert (piece.file, piece.offset) == (name, len(found))
        found += piece.data
        piece.give_back()
    return bytes(found)


# -- what is in memory


def memory(values: Sequence[int] | Numbers) -> bytes:
    """Return pages that are told apart by a number each; 0 is a page of zeros."""
    column = np.asarray(values, np.int64).reshape(-1, 1)
    return np.repeat(column, PAGE_BYTES // 8, axis=1).tobytes()


def _run(kind: str, value: int, length: int) -> list[int]:
    if kind == "counting":
        return list(range(value * 100, value * 100 + length))
    return [value if kind == "same" else 0] * length


values = st.lists(
    st.builds(
        _run,
        st.sampled_from(["counting", "counting", "same", "zero"]),
        st.integers(1, 9),
        st.integers(1, 300),
    ),
    max_size=6,
).map(lambda found: [each for run in found for each in run])


def changed(before: Sequence[int], chance: random.Random) -> list[int]:
    """Return pages of which a few runs were written, unmapped or mapped anew, at random."""
    now = list(before)
    for _ in range(chance.randrange(4)):
        at, length = chance.randrange(len(now) + 1), chance.randrange(1, 60)
        fresh = [chance.randrange(1 << 40) for _ in range(length)]
        match chance.randrange(4):
            case 0:
                now[at : at + length] = fresh[: len(now[at : at + length])]
            case 1:
                now[at:at] = fresh
            case 2:
                del now[at : at + length]
            case 3:
                now[at : at + length] = [0] * len(now[at : at + length])
    return now
