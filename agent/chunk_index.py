"""Where each chunk lies: the tables of all packs, in memory.

About 70 bytes a chunk, in a few sorted segments that never change: whoever looks something up needs
no lock, and a small pack does not move a million rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent import packs
from agent.backend import Backend, Entry
from agent.chunk_codec import Place, place_of
from agent.packs import CHUNK, ChunkId, Ids, PackId, Rows
from krgfs.errors import Damaged

ROW = np.dtype([*CHUNK.descr, ("pack", "<u4")])
READERS = 8  # tables that are read at once


class Keys(NamedTuple):
    """Keys of equal length in the order of their heads: what is searched by bisection."""

    heads: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.void]

    def search(
        self, wanted: npt.NDArray[np.void], heads: npt.NDArray[np.uint64]
    ) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """Yield pairs of arrays, (index into `wanted`, index of an equal key here), until all of
        the equal ones were named."""
        low = np.searchsorted(self.heads, heads, "left")
        high = np.searchsorted(self.heads, heads, "right")
        which = np.nonzero(low < high)[0]
        low, high = low[which], high[which]
        while len(which):
            equal = self.keys[low] == wanted[which]
            if equal.any():
                yield which[equal], low[equal]
            low = low + 1
            rest = low < high
            which, low, high = which[rest], low[rest], high[rest]

    def has(self, wanted: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(wanted), dtype=bool)
        for which, _ in self.search(wanted, heads_of(wanted)):
            found[which] = True
        return found


class _Segment(NamedTuple):
    keys: Keys
    rows: Rows


def as_ids(ids: Iterable[ChunkId]) -> Ids:
    joined = list(ids)
    array = np.frombuffer(b"".join(joined), dtype="V32")
    if len(array) != len(joined):
        raise ValueError("an id of a chunk has 32 bytes")
    return array


def heads_of(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of each key as a number; they are digests, or begin with one."""
    words = np.ascontiguousarray(keys).view("<u8").reshape(len(keys), keys.itemsize // 8)
    return np.ascontiguousarray(words[:, 0])


def sorted_keys(keys: npt.NDArray[np.void]) -> Keys:
    """Return them to be searched, those that come often once."""
    heads = heads_of(keys)
    order = np.argsort(heads, kind="stable")
    heads, keys = heads[order], keys[order]
    other = np.ones(len(keys), dtype=bool)
    other[1:] = keys[1:] != keys[:-1]
    return Keys(heads[other], keys[other])


def in_order(rows: Rows) -> Rows:
    """Return the rows as they lie: pack after pack, by offset."""
    return rows[np.lexsort((rows["stored"], rows["offset"], rows["pack"]))]


class Index:
    """What chunks the packs of a back end hold, as far as it has learnt of them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._segments: tuple[_Segment, ...] = ()
        self._names: list[str] = []  # by number, which is not used again
        self._ids = b""  # the same, 16 bytes each
        self._numbers: dict[PackId, int] = {}
        self._damaged: dict[PackId, tuple[Entry, str]] = {}
        self._doubted: frozenset[ChunkId] = frozenset()

    def doubt(self, ids: Iterable[ChunkId]) -> None:
        """Remember chunks that were found damaged: nobody relies on them until they are stored
        once more."""
        with self._lock:
            self._doubted |= frozenset(ids)

    def is_doubted(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Tell which of these were found damaged and not stored since."""
        if not self._doubted:
            return np.zeros(len(ids), dtype=bool)
        return np.array([id.tobytes() in self._doubted for id in ids], dtype=bool)

    def refresh(self) -> None:
        """Learn of the packs that others wrote or removed. A pack whose table is damaged is
        remembered as such, and the others are of use."""
        with self._refreshing:
            known = set(self._numbers)
            listed = {
                pack: entry
                for entry in self._backend.list(packs.PREFIX)
                if (pack := packs.id_of(entry.name)) is not None
            }
            for pack in self._damaged.keys() - listed.keys():
                del self._damaged[pack]
            self._forget(known - listed.keys())
            new = [
                (pack, entry)
                for pack, entry in listed.items()
                if pack not in self._numbers and self._damaged.get(pack, (None,))[0] != entry
            ]
            self._load(new)

    def _load(self, new: list[tuple[PackId, Entry]]) -> None:
        if len(new) < READERS:
            tables = [self._table(*each) for each in new]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                tables = list(pool.map(lambda each: self._table(*each), new))
        found = [
            (pack, rows) for (pack, _), rows in zip(new, tables, strict=True) if rows is not None
        ]
        self._learn(found)

    def _table(self, pack: PackId, entry: Entry) -> Rows | None:
        try:
            rows = packs.read_table(self._backend, entry.name, entry.size)
        except FileNotFoundError:
            return None  # removed since it was listed
        except Damaged as exc:
            self._damaged[pack] = (entry, exc.message)
            return None
        self._damaged.pop(pack, None)
        return rows

    def learn(self, pack: PackId, rows: Rows) -> None:
        """Add a pack that was committed just now."""
        self._learn([(pack, rows)])
        if self._doubted:
            with self._lock:
                self._doubted -= {id.tobytes() for id in rows["id"]}

    def _learn(self, found: list[tuple[PackId, Rows]]) -> None:
        with self._lock:
            fresh = []
            for pack, rows in found:
                if pack in self._numbers:
                    continue
                numbered = np.empty(len(rows), dtype=ROW)
                for field in CHUNK.names or ():
                    numbered[field] = rows[field]
                numbered["pack"] = self._numbers[pack] = len(self._names)
                self._names.append(packs.name_of(pack))
                self._ids += pack
                fresh.append(numbered)
            if fresh:
                self._segments = _merged((*self._segments, _segment(np.concatenate(fresh))))

    def forget(self, pack: PackId) -> None:
        """Drop a pack that was removed."""
        self._forget({pack})

    def _forget(self, gone: set[PackId]) -> None:
        with self._lock:
            numbers = [self._numbers.pop(pack) for pack in gone if pack in self._numbers]
            if not numbers:
                return
            kept = []
            for keys, rows in self._segments:
                stay = ~np.isin(rows["pack"], numbers)
                if stay.any():
                    rest = rows[stay]
                    kept.append(_Segment(Keys(keys.heads[stay], rest["id"]), rest))
            self._segments = tuple(kept)

    def find(self, ids: Ids) -> tuple[npt.NDArray[np.intp], Rows]:
        """Return all copies of these chunks: for each its index in `ids`, and its row."""
        heads = heads_of(ids)
        which, found = [np.empty(0, dtype=np.intp)], [np.empty(0, dtype=ROW)]
        for keys, rows in self._segments:
            for asked, at in keys.search(ids, heads):
                which.append(asked)
                found.append(rows[at])
        return np.concatenate(which), np.concatenate(found)

    def places(self, id: ChunkId) -> list[Place]:
        """Return where copies of one chunk lie."""
        return [self.place(row) for row in self.find(as_ids([id]))[1]]

    def place(self, row: np.void) -> Place:
        return place_of(self._names[row["pack"]], row)

    def rows(self) -> Rows:
        """Return the rows of all chunks, in no order."""
        return np.concatenate([np.empty(0, dtype=ROW), *(rows for _, rows in self._segments)])

    def totals(self) -> tuple[int, int, int]:
        """Return how many packs and chunks there are, and the stored bytes of all chunks."""
        rows = [segment.rows for segment in self._segments]
        stored = sum(int(each["stored"].sum(dtype=np.int64)) for each in rows)
        return len(self._numbers), sum(map(len, rows)), stored

    def pack_ids(self, rows: Rows) -> npt.NDArray[np.void]:
        """Return the pack of each row, as 16 bytes."""
        known: npt.NDArray[np.void] = np.frombuffer(self._ids, dtype="V16")
        of_rows: npt.NDArray[np.void] = known[rows["pack"]]
        return of_rows

    def packs(self) -> dict[PackId, int]:
        """Return the packs that are known and readable, with their numbers in rows."""
        with self._lock:
            return dict(self._numbers)

    def damaged(self) -> dict[PackId, str]:
        """Return the packs whose tables cannot be read, with a sentence for each."""
        return {pack: why for pack, (_, why) in sorted(self._damaged.copy().items())}


def _segment(rows: Rows) -> _Segment:
    heads = heads_of(rows["id"])
    order = np.argsort(heads, kind="stable")
    rows = rows[order]
    return _Segment(Keys(heads[order], rows["id"]), rows)


def _merged(segments: tuple[_Segment, ...]) -> tuple[_Segment, ...]:
    """Merge from the smallest on until each has more than twice the rows of the next."""
    *large, last = sorted(segments, key=lambda each: -len(each.rows))
    while large and len(large[-1].rows) <= 2 * len(last.rows):
        last = _segment(np.concatenate((large.pop().rows, last.rows)))
    return (*large, last)
