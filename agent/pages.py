"""Which pages of a dump are new: told page by page, by what was in the tree's last version and
earlier in the same dump.

A page is known by its xxh3-128, seeded with a secret of the node. That is no hash to trust across
owners, and it is not: a table serves one app alone, and is only ever a short cut. Whoever has lost
one stores pages once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

PAGE_BYTES = 4096
ID_BYTES = 32
LONGEST_RUN = 1 << 18  # 1 GiB
UNKNOWN = -1

Hashes = npt.NDArray[np.uint64]  # (pages, 2)
Numbers = npt.NDArray[np.int64]


class Places(NamedTuple):
    """Where pages are: the number of a chunk (UNKNOWN: nowhere) and which page of it, each."""

    chunk: Numbers
    page: Numbers


def hashed(memory: memoryview, seed: int) -> Hashes:
    """Return the hashes of all pages in `memory`, which are whole ones."""
    pages = [memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES)]
    digests = b"".join(map(xxh3_128_digest, pages, repeat(seed)))
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def zero_hash(seed: int) -> Hashes:
    """Return the hash of a page of zeros."""
    return hashed(memoryview(bytes(PAGE_BYTES)), seed)


class Table:
    """Hashes of pages and where these are. `chunks` are the ids by number, `held` how many pages
    each of them holds."""

    def __init__(
        self, chunks: Sequence[bytes], held: Numbers, hashes: Hashes, places: Places
    ) -> None:
        order = np.argsort(hashes[:, 0], kind="stable")
        self.chunks, self.held = chunks, held
        self._hashes = hashes[order]
        self._places = Places(places.chunk[order], places.page[order])

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, hashes: Hashes) -> Places:
        """Return where pages of these hashes are."""
        chunk, page = np.full((2, len(hashes)), UNKNOWN, np.int64)
        if len(self):
            at = np.searchsorted(self._hashes[:, 0], hashes[:, 0])
            at[at == len(self)] = 0
            found = np.flatnonzero((self._hashes[at] == hashes).all(axis=1))
            chunk[found] = self._places.chunk[at[found]]
            page[found] = self._places.page[at[found]]
        return Places(chunk, page)

    def stale(self, share: float, at_once: float) -> npt.NDArray[np.bool_]:
        """Tell which chunks have less than a share of their pages in the table; the least used
        ones, until they have so many of all pages of the table (`at_once`, a share as well)."""
        used = np.bincount(self._places.chunk, minlength=len(self.chunks))
        shares = used / np.maximum(self.held, 1)
        order = np.argsort(shares, kind="stable")
        is_few = np.cumsum(used[order]) <= at_once * len(self)
        stale = np.zeros(len(self.chunks), bool)
        stale[order] = is_few & (shares[order] < share)
        return stale

    def joined(self, other: Table) -> Table:
        """Return both in one; they number the same chunks."""
        return Table(
            self.chunks,
            self.held,
            np.concatenate([self._hashes, other._hashes]),
            Places(
                np.concatenate([self._places.chunk, other._places.chunk]),
                np.concatenate([self._places.page, other._places.page]),
            ),
        )

    def save(self, path: str) -> None:
        """Keep it in a file, which may be lost."""
        body = msgspec.msgpack.encode(
            (
                b"".join(self.chunks),
                self.held.astype("<u2").tobytes(),
                self._hashes.tobytes(),
                self._places.chunk.astype("<u4").tobytes(),
                self._places.page.astype("<u2").tobytes(),
            )
        )
        part = f"{path}.part"
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(xxh3_128_digest(body))
            file.write(body)
        os.replace(part, path)


def empty() -> Table:
    """Return a table in which nothing is."""
    none = np.empty(0, np.int64)
    return Table([], none, np.empty((0, 2), np.uint64), Places(none, none))


def load(path: str) -> Table:
    """Return the table that was saved in a file; an empty one where there is none that is whole."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
        with open(path, "rb") as file:
            check, body = file.read(16), file.read()
        if xxh3_128_digest(body) == check:
            ids, held, hashes, chunk, page = msgspec.msgpack.decode(
                body, type=tuple[bytes, bytes, bytes, bytes, bytes]
            )
            return Table(
                [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)],
                np.frombuffer(held, "<u2").astype(np.int64),
                np.frombuffer(hashes, "<u8").reshape(-1, 2),
                Places(
                    np.frombuffer(chunk, "<u4").astype(np.int64),
                    np.frombuffer(page, "<u2").astype(np.int64),
                ),
            )
    return empty()


def firsts(hashes: Hashes) -> Numbers:
    """Return for each page the position of the first one that is equal; its own mostly."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


def runs(places: Places) -> tuple[Numbers, Numbers, Numbers]:
    """Return the first chunk number, first page and length of runs of pages that lie one after the
    other, up to LONGEST_RUN; where a chunk number is negative, what page says does not matter."""
    chunk, page = places
    follows = (chunk[1:] == chunk[:-1]) & ((page[1:] == page[:-1] + 1) | (chunk[1:] < 0))
    follows[LONGEST_RUN - 1 :: LONGEST_RUN] = False
    starts = np.concatenate([[0], np.flatnonzero(~follows) + 1]) if len(chunk) else np.empty(0, int)
    lengths = np.diff(np.concatenate([starts, [len(chunk)]]))
    return chunk[starts], page[starts], lengths
