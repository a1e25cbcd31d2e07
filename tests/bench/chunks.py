"""How fast chunks are stored and read, beside what their bytes cost at the least.

`python -m tests.bench.chunks [MIB]` prints JSON, in MiB/s, medians of rounds in turn: add and flush
by two threads of random bytes and of such as compress, in a directory; the same reading them back;
what the same threads do that only write and fsync a file (`bare_write`), or only hash (`blake3`);
and what an index of a million chunks costs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blake3 import blake3

from agent import packs
from agent.backend import MemoryBackend
from agent.backend_directory import DirectoryBackend
from agent.chunk_index import Index
from agent.chunks import ChunkStore
from tests.bench.files import in_turn

THREADS = 2
ROUNDS = 3
CHUNK_BYTES = 1 << 20
PART_BYTES = 64 << 10
MANY = 1_000_000
PACKS = 1000


class Bench:
    def __init__(self, directory: Path, mib: int) -> None:
        self._directory = directory
        self._mib = mib
        self._random = np.random.default_rng(1).bytes(mib << 20)
        words = [b"%x " % (each * each) for each in range(40_000)]
        chosen = np.random.default_rng(2).integers(0, len(words), mib << 18).tolist()
        self._text = b"".join(words[each] for each in itertools.islice(chosen, mib << 17))
        self._text = (self._text * (1 + (mib << 20) // len(self._text)))[: mib << 20]
        self._count = itertools.count()
        self._buffers = [memoryview(bytearray(b"x" * CHUNK_BYTES)) for _ in range(THREADS)]

    def write_random(self) -> float:
        return self._write(self._random)

    def write_text(self) -> float:
        return self._write(self._text)

    def read_random(self) -> float:
        return self._read(self._random)

    def read_text(self) -> float:
        return self._read(self._text)

    def bare_write(self) -> float:
        fd = os.open(self._directory / "bare", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            begun = time.perf_counter()
            chunks = self._chunks(self._random)
            self._on_threads(
                lambda _, at: os.pwritev(fd, chunks[at], at * CHUNK_BYTES), len(chunks)
            )
            os.fsync(fd)
            return self._rate(begun)
        finally:
            os.close(fd)

    def hash_only(self) -> float:
        chunks = self._chunks(self._random)
        begun = time.perf_counter()
        self._on_threads(lambda _, at: [blake3(part) for part in chunks[at]], len(chunks))
        return self._rate(begun)

    def _write(self, data: bytes) -> float:
        chunks = self._chunks(data)
        store = self._fresh()
        begun = time.perf_counter()
        with store.session() as session:
            self._on_threads(lambda _, at: session.add(*chunks[at]), len(chunks))
            session.flush()
        rate = self._rate(begun)
        store.backend.close()
        return rate

    def _read(self, data: bytes) -> float:
        store = self._fresh()
        with store.session() as session:
            ids = [session.add(*parts) for parts in self._chunks(data)]
            session.flush()
        begun = time.perf_counter()
        self._on_threads(
            lambda thread, at: store.read_into(ids[at], self._buffers[thread]), len(ids)
        )
        rate = self._rate(begun)
        store.backend.close()
        return rate

    def _fresh(self) -> ChunkStore:
        root = self._directory / str(next(self._count))
        return ChunkStore.open(DirectoryBackend(str(root)))

    def _rate(self, begun: float) -> float:
        return self._mib / (time.perf_counter() - begun)

    @staticmethod
    def _chunks(data: bytes) -> list[list[memoryview]]:
        view = memoryview(data)
        return [
            [view[at : at + PART_BYTES] for at in range(start, start + CHUNK_BYTES, PART_BYTES)]
            for start in range(0, len(data), CHUNK_BYTES)
        ]

    @staticmethod
    def _on_threads(act: Callable[[int, int], object], count: int) -> None:
        def work(thread: int) -> None:
            for at in range(thread, count, THREADS):
                act(thread, at)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))


def index_figures() -> dict[str, float]:
    """Return what a million chunks in a thousand packs cost to load and to look up."""
    backend = MemoryBackend()
    rng = np.random.default_rng(3)
    for _ in range(PACKS):
        rows = np.zeros(MANY // PACKS, dtype=packs.CHUNK)
        rows["id"] = np.frombuffer(rng.bytes(32 * len(rows)), dtype="V32")
        rows["offset"] = len(packs.MAGIC)
        table = rows.tobytes()
        trailer = packs.TRAILER.pack(len(rows), len(table), blake3(table).digest(), packs.END)
        name = packs.name_of(packs.PackId(rng.bytes(16)))
        # Into the fake's own table: putting them one by one would measure the fake.
        backend._objects[name] = (packs.MAGIC + table + trailer, 0.0)
    index = Index(backend)
    begun = time.perf_counter()
    index.refresh()
    load_s = time.perf_counter() - begun
    ids = index.rows()["id"][:: MANY // 10_000]
    begun = time.perf_counter()
    found, _ = index.find(ids)
    find_s = time.perf_counter() - begun
    assert len(found) == len(ids)
    small = np.zeros(10, dtype=packs.CHUNK)
    begun = time.perf_counter()
    for _ in range(100):
        small["id"] = np.frombuffer(rng.bytes(320), dtype="V32")
        index.learn(packs.PackId(rng.bytes(16)), small)
    learn_s = time.perf_counter() - begun
    return {
        "load_1000_packs_ms": round(load_s * 1e3, 1),
        "find_10000_ms": round(find_s * 1e3, 2),
        "learn_a_small_pack_ms": round(learn_s * 1e3 / 100, 3),
    }


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="krg-bench-") as directory:
        bench = Bench(Path(directory), mib)
        acts = (
            bench.write_random,
            bench.write_text,
            bench.read_random,
            bench.read_text,
            bench.bare_write,
            bench.hash_only,
        )
        rates = in_turn(*acts, rounds=ROUNDS)
    names = ("write_random", "write_text", "read_random", "read_text", "bare_write", "blake3")
    figures = {name: round(rate) for name, rate in zip(names, rates, strict=True)}
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps({f"{mib}_MiB": figures} | index_figures() | loads, indent=1))


if __name__ == "__main__":
    main()
