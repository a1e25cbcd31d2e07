"""Read the whole image store and say what of it is damaged, and which images that costs."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from agent import chunk_codec, chunk_records, packs
from agent.backend import Backend, Entry
from agent.chunk_codec import Place, place_of
from agent.chunk_index import Keys, as_ids, sorted_keys
from agent.chunks import FORMAT, ChunkStore, check_format, read_span, runs
from agent.packs import MAGIC, MAX_CHUNK_BYTES, ChunkId, Ids, Rows
from krgfs.errors import Damaged

Named = Callable[[bytes], Iterable[ChunkId]]  # of a manifest; Damaged when it is not whole

READERS = 4


class BadChunk(NamedTuple):
    pack: str
    offset: int
    id: ChunkId
    why: str


class Report(NamedTuple):
    """What `verify` found. A copy of a chunk may be damaged and no image lack it."""

    images: int
    packs: int
    chunks: int
    read_bytes: int
    bad_chunks: tuple[BadChunk, ...]
    bad_objects: tuple[tuple[str, str], ...]  # packs, manifests, records: name, and why
    lacking: tuple[tuple[str, tuple[ChunkId, ...]], ...]  # manifest, and its chunks of no good copy

    @property
    def is_sound(self) -> bool:
        return not self.bad_chunks and not self.bad_objects and not self.lacking


class _PackReport(NamedTuple):
    rows: Rows
    good: Ids
    bad_chunks: list[BadChunk]
    bad: list[tuple[str, str]]
    size: int


def _nobody(read_bytes: int) -> None:
    pass


def verify(store: ChunkStore, named: Named, told: Callable[[int], None] = _nobody) -> Report:
    """Read every byte of every object, decompress and compare with what it is to be.

    What is written or removed meanwhile does no harm. OSError, other than a disk's EIO, passes.
    `told` is told, in the caller's thread, of the size of each pack that was read, and may raise.
    """
    entries = [
        entry for entry in store.backend.list(packs.PREFIX) if packs.id_of(entry.name) is not None
    ]
    with ThreadPoolExecutor(READERS) as pool:
        found = []
        for each in pool.map(lambda e: _pack(store.backend, e), entries):
            if each is not None:
                found.append(each)
                told(each.size)
    good = sorted_keys(np.concatenate([np.empty(0, dtype="V32"), *(each.good for each in found)]))
    bad = _bad_records(store.backend)
    bad += [each for pack in found for each in pack.bad]
    unreadable = {name for each in found if not len(each.rows) for name, _ in each.bad}
    images, lacking = 0, []
    store.refresh()
    for name, data in chunk_records.manifests(store.backend):
        images += 1
        try:
            absent = _lacking(store, list(named(data)), good, unreadable)
        except Damaged as exc:
            bad.append((name, exc.message))
            continue
        if absent:
            lacking.append((name, absent))
    store.index.doubt(each.id for pack in found for each in pack.bad_chunks)
    return Report(
        images,
        len(found),
        sum(len(each.rows) for each in found),
        sum(each.size for each in found),
        tuple(each for pack in found for each in pack.bad_chunks),
        tuple(sorted(bad)),
        tuple(lacking),
    )


def _lacking(
    store: ChunkStore, ids: list[ChunkId], good: Keys, unreadable: set[str]
) -> tuple[ChunkId, ...]:
    """Return those of no good copy; what came to be after the packs were listed is read now. A pack
    whose table was damaged under us is of use to us alone, and not after our end."""
    absent = np.nonzero(~good.has(as_ids(ids)))[0]
    lost = []
    for id in dict.fromkeys(ids[at] for at in absent):
        places = store.index.places(id)
        if places and all(place.pack in unreadable for place in places):
            lost.append(id)
            continue
        try:
            store.read(id)
        except Damaged:
            lost.append(id)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            lost.append(id)
    return tuple(lost)


def _bad_records(backend: Backend) -> list[tuple[str, str]]:
    bad = []
    try:
        check_format(backend.read(FORMAT))
    except (Damaged, FileNotFoundError) as exc:
        bad.append((FORMAT, str(exc)))
    why = "it is damaged; a sweep removes it when no writer is at work"
    bad += [(each.name, why) for each in chunk_records.sessions(backend) if not each.whole]
    bad += [(each.name, why) for each in chunk_records.condemned(backend) if each.copies is None]
    return bad


def _pack(backend: Backend, entry: Entry) -> _PackReport | None:
    """Return what a pack is like; None when it was removed meanwhile."""
    none = np.empty(0, dtype=packs.CHUNK)
    try:
        return _read_pack(backend, entry)
    except FileNotFoundError:
        return None
    except Damaged as exc:
        return _PackReport(none, none["id"], [], [(entry.name, exc.message)], entry.size)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        return _PackReport(none, none["id"], [], [(entry.name, str(exc))], entry.size)


def _read_pack(backend: Backend, entry: Entry) -> _PackReport:
    rows = packs.read_table(backend, entry.name, entry.size)
    bad, bad_chunks = [], []
    if backend.read(entry.name, 0, len(MAGIC)) != MAGIC:
        bad.append((entry.name, f"the pack {entry.name} does not begin as one"))
    good = np.ones(len(rows), dtype=bool)
    at = 0
    for run in runs(rows):
        for place, stored in read_span(backend, [place_of(entry.name, row) for row in run]):
            try:
                chunk_codec.open_into(place, stored, _room(place))
            except Damaged as exc:
                good[at] = False
                bad_chunks.append(BadChunk(place.pack, place.offset, place.id, exc.message))
            at += 1
    return _PackReport(rows, rows["id"][good], bad_chunks, bad, entry.size)


_rooms = threading.local()


def _room(place: Place) -> memoryview:
    """Return memory of this thread's own for the raw bytes."""
    if not hasattr(_rooms, "data"):
        _rooms.data = bytearray(MAX_CHUNK_BYTES)
    return memoryview(_rooms.data)[: place.raw]
