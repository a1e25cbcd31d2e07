"""The image store: chunks by the digest of their content, in packs in a back end, each once.

    format                 what this is, and the store's own id
    packs/XX/ID            chunks (agent/packs.py); immutable
    manifests/APP/vN       an image; its coming to be is what publishes it
    sessions/ID            a writer at work (agent/chunk_sessions.py)
    condemned/ID           what a sweep is going to remove (agent/sweep.py)

Several processes and nodes write, read and sweep the same back end at once, without locks. All
calls block. What the back end raises (OSError) passes through; damage is `errors.Damaged`.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from agent import chunk_codec, chunk_records, packs
from agent.backend import Backend
from agent.chunk_codec import Place
from agent.chunk_index import Index, as_ids, in_order
from agent.chunk_sessions import Life, Session, Terms
from agent.packs import ChunkId, PackId, Rows
from krgfs.errors import CannotRunHere, Damaged

__all__ = ["ChunkStore", "Session"]

FORMAT = "format"
_FORMAT = re.compile(rb"krgfs image store (\d{1,9})\n([0-9a-f]{24})([0-9a-f]{8})")
VERSION = 1
DEFAULT = Terms()
READERS = 4
SPAN_BYTES = 8 << 20  # of chunks that lie side by side, read at once
TRIES = 3  # packs may be rewritten again while one looks for their chunks

T = TypeVar("T")


class ChunkStore:
    """Chunks by id; see the module. For any number of threads."""

    def __init__(self, backend: Backend, terms: Terms, id: str) -> None:
        self.backend, self.terms, self.id = backend, terms, id
        self.index = Index(backend)
        self.sweeping = threading.Lock()
        self._alive: dict[str, frozenset[str]] = {}

    @classmethod
    def open(
        cls,
        backend: Backend,
        *,
        level: int = DEFAULT.level,
        pack_bytes: int = DEFAULT.pack_bytes,
        grace_s: float = DEFAULT.grace_s,
        clock: Callable[[], float] = DEFAULT.clock,
    ) -> ChunkStore:
        """Open the store in this back end; make one where there is nothing.

        CannotRunHere when a later version made it, Damaged when it cannot be told. All who write
        the same store use the same grace; `clock` need only go on evenly.
        """
        store = cls(backend, Terms(level, pack_bytes, grace_s, clock), _opened(backend))
        store.refresh()
        return store

    @contextmanager
    def session(self, *, sweeps: bool = False) -> Iterator[Session]:
        """Be a writer. Leaving forgets what was not flushed."""
        life = Life(self.backend, self.terms, sweeps)
        self._alive[life.name] = frozenset()  # before it looks what is condemned
        try:
            session = Session(self.backend, self.index, self.terms, life)
            self._alive[life.name] = session.knows
            self.refresh()  # after what is condemned: what is no longer so has gone
        except BaseException:
            del self._alive[life.name]
            life.end()
            raise
        try:
            yield session
        finally:
            session.close()
            del self._alive[life.name]

    def alive(self) -> dict[str, frozenset[str]]:
        """Return the sessions of this process by the names of their records, each with the names of
        the lists of condemned chunks that it knows."""
        return self._alive.copy()

    def refresh(self) -> None:
        """Learn of the packs that others wrote or removed."""
        self.index.refresh()

    def has(self, id: ChunkId) -> bool:
        return bool(self.index.places(id))

    def stored(self, ids: Iterable[ChunkId]) -> npt.NDArray[np.int64]:
        """Return how many bytes each takes in the store; Damaged names those that are nowhere."""
        wanted = as_ids(ids)
        sizes = np.full(len(wanted), -1, dtype=np.int64)
        which, rows = self.index.find(wanted)
        sizes[which] = rows["stored"]
        absent = wanted[sizes < 0]
        if len(absent):
            raise _absent(absent[0].tobytes(), len(absent) - 1, self.index.damaged())
        return sizes

    def read(self, id: ChunkId) -> bytes:
        """Return a chunk's raw bytes, verified; Damaged names it and its pack."""

        def use(place: Place) -> bytes:
            buffer = bytearray(place.raw)
            chunk_codec.read_into(self.backend, place, memoryview(buffer))
            return bytes(buffer)

        return self._with_place(id, use)

    def read_into(self, id: ChunkId, buffer: memoryview) -> int:
        """Fill the caller's memory with a chunk's raw bytes, verified, and return how many.

        ValueError when the buffer is too small. After Damaged the buffer has anything in it.
        """
        return self._with_place(
            id, lambda place: chunk_codec.read_into(self.backend, place, buffer)
        )

    def check(self, ids: Iterable[ChunkId]) -> list[ChunkId]:
        """Return those that are damaged or missing, by the sums of their stored bytes alone."""
        wanted = list(dict.fromkeys(ids))
        which, rows = self.index.find(as_ids(wanted))
        _, first = np.unique(which, return_index=True)
        sound: set[ChunkId] = set()
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(self._sound, spans(in_order(rows[first]))):
                sound |= found
        bad = [id for id in wanted if id not in sound and not self._is_sound(id)]
        self.index.doubt(bad)
        return bad

    def _with_place(self, id: ChunkId, use: Callable[[Place], T]) -> T:
        """Use the first copy that is good; look anew when one has been moved."""
        failure: Exception | None = None
        for _ in range(TRIES):
            places = self.index.places(id)
            moved = not places
            for place in places:
                try:
                    return use(place)
                except FileNotFoundError:
                    moved = True
                except (Damaged, OSError) as exc:
                    failure = failure or exc
            if not moved:
                break
            self.refresh()
        if not isinstance(failure, OSError):
            self.index.doubt([id])
        raise failure or self._lost(id)

    def _lost(self, id: ChunkId) -> Damaged:
        return _absent(id, 0, self.index.damaged())

    def _is_sound(self, id: ChunkId) -> bool:
        def use(place: Place) -> bool:
            stored = self.backend.read(place.pack, place.offset, place.stored)
            if not chunk_codec.is_sound(place, stored):
                raise chunk_codec.damaged(place, "its stored bytes have changed")
            return True

        try:
            return self._with_place(id, use)
        except Damaged:
            return False

    def _sound(self, span: Rows) -> set[ChunkId]:
        places = [self.index.place(row) for row in span]
        try:
            data = read_span(self.backend, places)
        except FileNotFoundError:
            return set()
        return {place.id for place, stored in data if chunk_codec.is_sound(place, stored)}


_buffers = threading.local()


def spans(rows: Rows) -> Iterator[Rows]:
    """Cut rows, in the order in which they lie, where the next does not follow at once."""
    if not len(rows):
        return
    ends = rows["offset"] + rows["stored"]
    follows = (rows["pack"][1:] == rows["pack"][:-1]) & (rows["offset"][1:] == ends[:-1])
    for run in np.split(rows, np.nonzero(~follows)[0] + 1):
        yield from runs(run)


def runs(rows: Rows) -> Iterator[Rows]:
    """Cut rows that lie side by side into what is read at once."""
    ends = np.cumsum(rows["stored"], dtype=np.int64)
    start = 0
    while start < len(rows):
        before = ends[start] - int(rows["stored"][start])
        until = max(start + 1, int(np.searchsorted(ends, before + SPAN_BYTES, "right")))
        yield rows[start:until]
        start = until


def read_span(backend: Backend, places: list[Place]) -> list[tuple[Place, memoryview]]:
    """Read chunks that lie side by side into this thread's own buffer, good until its next call.

    What a pack is too short for is shorter.
    """
    begin, end = places[0].offset, places[-1].offset + places[-1].stored
    if len(getattr(_buffers, "data", b"")) < end - begin:
        _buffers.data = bytearray(max(SPAN_BYTES, end - begin))
    view = memoryview(_buffers.data)[: end - begin]
    view = view[: backend.read_into(places[0].pack, begin, view)]
    cuts = ((place, place.offset - begin) for place in places)
    return [(place, view[at : at + place.stored]) for place, at in cuts]


def _opened(backend: Backend) -> str:
    """Return the id of the store in the back end, which is made where there is none."""
    data = _format(backend)
    if data is None:
        if backend.list(packs.PREFIX) or backend.list(chunk_records.MANIFESTS):
            data = _format(backend)  # made by another between the two looks
        else:
            seed = secrets.token_bytes(12)
            made = b"krgfs image store %d\n" % VERSION + seed.hex().encode() + _proof(seed)
            try:
                backend.put(FORMAT, made)
            except FileExistsError:
                made = _format(backend) or b""
            data = made
    return check_format(data or b"")


def check_format(data: bytes) -> str:
    """Return the store's id from its `format`."""
    found = _FORMAT.fullmatch(data)
    if found and int(found[1]) > VERSION:
        raise CannotRunHere(
            f"the image store has format {int(found[1])}, and this version of krgfs knows "
            f"{VERSION} only; install a later one"
        )
    if (
        not found
        or int(found[1]) != VERSION
        or _proof(bytes.fromhex(found[2].decode())) != found[3]
    ):
        raise Damaged(
            "the object `format` of the image store is missing or damaged; bring it back from a "
            "copy, or name a place that is empty"
        )
    return (found[2] + found[3]).decode()


def _format(backend: Backend) -> bytes | None:
    try:
        return backend.read(FORMAT)
    except FileNotFoundError:
        return None


def _proof(seed: bytes) -> bytes:
    """Return the last digits of an id, by which a changed one is known."""
    return blake3(seed).hexdigest(4).encode()


def _absent(id: ChunkId, others: int, unreadable: dict[PackId, str]) -> Damaged:
    more = f" and {others} more are" if others else " is"
    why = f" ({next(iter(unreadable.values()))})" if unreadable else ""
    return Damaged(
        f"chunk {id[:8].hex()}{more} in no readable pack of the image store{why}; `krg verify` "
        "names the images that need it"
    )
