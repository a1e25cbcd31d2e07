"""Remove what no image names, while others write.

In two steps, of two sweeps a grace apart. The first condemns: it lists the copies of chunks that
nobody names, and who begins to write from then on does not rely on them. The second removes what
nobody came to name meanwhile, once all writers that began before the list have ended. A sweep is a
session itself, so that of two at once at most one goes on, and one that stalled removes nothing.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent import chunk_codec, chunk_records, packs
from agent.backend import Entry
from agent.chunk_codec import Place
from agent.chunk_index import Keys, as_ids, heads_of, in_order, sorted_keys
from agent.chunk_records import CONDEMNED, COPY, SLACK, Condemned
from agent.chunk_sessions import Session
from agent.chunk_verify import Named, Report, verify
from agent.chunks import ChunkStore, read_span, spans
from agent.packs import PackId, Rows, Sealed
from krgfs.errors import Damaged, TryAgain

__all__ = ["Report", "Swept", "sweep", "verify"]

Mask = npt.NDArray[np.bool_]


class Swept(NamedTuple):
    """What a sweep did."""

    removed_packs: int
    rewritten_packs: int
    freed_bytes: int  # of packs that are gone; what was kept of them is written anew
    condemned_chunks: int
    waiting: tuple[str, ...]  # lists of condemned chunks that it is too early to remove
    kept: tuple[str, ...]  # sentences: packs that were left alone because they are damaged


def _nothing() -> None:
    pass


def sweep(
    store: ChunkStore,
    named: Named,
    *,
    alone: bool = False,
    check: Callable[[], None] = _nothing,
) -> Swept:
    """Condemn what no manifest names now, and remove what was condemned long enough ago.

    `alone` promises that nobody but this ChunkStore writes to the back end: then what is condemned
    waits for its sessions alone, and not for the grace. `check` is called now and then and may
    raise. Damaged, with nothing removed, when a manifest cannot be read: its chunks are not known.
    TryAgain when another sweep is at work. An OSError leaves the store sound; go on by sweeping
    again.
    """
    if not store.sweeping.acquire(blocking=False):
        raise TryAgain("another sweep of the image store is at work; try again in a moment")
    try:
        with store.session(sweeps=True) as session:
            return _Sweep(store, session, alone, check).run(named)
    finally:
        store.sweeping.release()


class _Sweep:
    def __init__(
        self, store: ChunkStore, session: Session, alone: bool, check: Callable[[], None]
    ) -> None:
        self._store, self._session = store, session
        self._alone, self._check = alone, check
        self._backend, self._index = store.backend, store.index
        self._grace_s = store.terms.grace_s
        self._now = self._backend.now()
        self._removed: list[PackId] = []
        self._rewritten: list[PackId] = []
        self._kept: list[str] = []

    def run(self, named: Named) -> Swept:
        dead, live = self._others()
        self._store.refresh()  # no other sweep moves packs from here on
        self._packs = self._listed()
        lists = chunk_records.condemned(self._backend)
        self._condemned = chunk_records.joined(lists)
        # After the sessions were listed: what the ended ones published is among these.
        self._named = needed(self._store, named, self._check)
        self._rows = in_order(self._index.rows())
        waiting = []
        for each in lists:
            if self._is_due(each, live):
                self._remove(each)
            else:
                waiting.append(each)
        condemned = self._condemn(waiting)
        for name in dead:
            self._backend.delete(name)
        return Swept(
            len(self._removed),
            len(self._rewritten),
            sum(self._packs[pack].size for pack in self._removed if pack in self._packs),
            condemned,
            tuple(each.name for each in waiting),
            (*self._index.damaged().values(), *self._kept),
        )

    def _others(self) -> tuple[list[str], list[chunk_records.Session]]:
        """Return the records of other sessions that are dead, and those that live."""
        mine = self._session.life.name
        others = [each for each in chunk_records.sessions(self._backend) if each.name != mine]
        if self._alone:
            here = self._store.alive()
            return [each.name for each in others if each.name not in here], []
        live = [each for each in others if each.lives(self._now, self._grace_s)]
        for each in live:
            if each.sweeps:
                raise TryAgain(
                    f"another sweep of the image store is at work ({each.name}), or was killed "
                    "less than the store's grace ago; try again later"
                )
        return [each.name for each in others if each not in live], live

    def _listed(self) -> dict[PackId, Entry]:
        entries = self._backend.list(packs.PREFIX)
        return {pack: each for each in entries if (pack := packs.id_of(each.name)) is not None}

    def _is_old(self, modified: float) -> bool:
        return self._alone or self._now - modified > self._grace_s

    def _is_due(self, each: Condemned, live: list[chunk_records.Session]) -> bool:
        if self._alone:
            knowing = self._store.alive()
            del knowing[self._session.life.name]
            return all(each.name in known for known in knowing.values()) and (
                each.copies is not None or not knowing
            )
        if each.copies is None:  # nobody removes what it named; whoever reads it fears the worst
            return not live
        until = each.modified + self._grace_s / SLACK
        return self._is_old(each.modified) and all(other.began > until for other in live)

    # -- the second step: remove

    def _remove(self, each: Condemned) -> None:
        """Remove the copies of a list as far as nobody has come to need them; then the list."""
        partly: list[tuple[PackId, Rows]] = []
        for pack, dead in self._dead_in(each):
            self._check()
            rows = self._rows_of(pack)
            dead &= ~self._needs(rows, dead)
            if dead.all():
                self._delete(pack)
            elif _mostly(rows, dead):
                partly.append((pack, rows[~dead]))
        for pack, rows in partly:
            if self._copy(pack, rows):
                self._rewritten.append(pack)
                self._session.flush()
                self._delete(pack)
        self._session.life.check()
        self._backend.delete(each.name)

    def _dead_in(self, each: Condemned) -> Iterator[tuple[PackId, Mask]]:
        """Yield the packs of a list that are there, with which of their rows it names."""
        copies = np.empty(0, dtype=COPY) if each.copies is None else each.copies
        known = self._index.packs()
        changes = np.nonzero(copies["pack"][1:] != copies["pack"][:-1])[0] + 1
        for group in np.split(copies, changes):
            pack = PackId(group["pack"][0].tobytes()) if len(group) else None
            if pack is not None and pack in known:
                yield pack, sorted_keys(group["id"]).has(self._rows_of(pack)["id"])

    def _rows_of(self, pack: PackId) -> Rows:
        number = self._index.packs()[pack]
        low, high = np.searchsorted(self._rows["pack"], [number, number + 1])
        return self._rows[low:high]

    def _needs(self, rows: Rows, dead: Mask) -> Mask:
        """Tell which of the dead rows are named after all and have no good copy that stays."""
        needed = dead & self._named.has(rows["id"])
        for at in np.nonzero(needed)[0]:
            needed[at] = not self._has_other(rows[at])
        return needed

    def _has_other(self, row: np.void) -> bool:
        _, copies = self._index.find(as_ids([row["id"].tobytes()]))
        copies = copies[copies["pack"] != row["pack"]]
        copies = copies[~self._condemned.has(self._keys(copies))]
        return any(self._is_sound(self._index.place(copy)) for copy in copies)

    def _is_sound(self, place: Place) -> bool:
        try:
            stored = self._backend.read(place.pack, place.offset, place.stored)
        except OSError:
            return False
        return chunk_codec.is_sound(place, stored)

    def _copy(self, pack: PackId, rows: Rows) -> bool:
        """Write these chunks of a pack anew; where one is damaged the pack is left alone."""
        for span in spans(rows):
            self._check()
            places = [self._index.place(row) for row in span]
            try:
                chunks = read_span(self._backend, places)
            except OSError as exc:
                self._kept.append(f"the pack {places[0].pack} cannot be read: {exc}")
                return False
            for place, stored in chunks:
                if not chunk_codec.is_sound(place, stored):
                    self._kept.append(chunk_codec.damaged(place, "its bytes changed").message)
                    return False
                sealed = (place.id, (stored,), place.stored, place.raw, place.sum, place.codec)
                self._session.copy(Sealed(*sealed))
        return True

    def _delete(self, pack: PackId) -> None:
        self._session.life.check()
        self._backend.delete(packs.name_of(pack))
        self._index.forget(pack)
        self._removed.append(pack)

    # -- the first step: condemn

    def _condemn(self, waiting: list[Condemned]) -> int:
        """List the copies that are of no use, of packs where it is worth while; return how many."""
        rows = self._rows[np.isin(self._rows["pack"], self._candidates(waiting))]
        dead = ~self._named.has(rows["id"])
        dead |= self._are_spare(rows)
        worth = [
            each[mask] for each, mask in _by_pack(rows, dead) if mask.all() or _mostly(each, mask)
        ]
        while worth:
            try:
                return self._put_condemned(np.concatenate(worth))
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or len(worth) == 1:
                    raise
                worth = worth[: len(worth) // 2]  # what goes first makes room for the rest
        return 0

    def _put_condemned(self, rows: Rows) -> int:
        copies = np.empty(len(rows), dtype=COPY)
        copies["pack"], copies["id"] = self._index.pack_ids(rows), rows["id"]
        self._session.life.check()
        name = CONDEMNED + secrets.token_hex(16)
        self._backend.put(name, chunk_records.encode_condemned(copies))
        return len(copies)

    def _candidates(self, waiting: list[Condemned]) -> list[int]:
        """Return the numbers of packs that are old enough, and of which no list speaks yet."""
        spoken: set[bytes] = set()
        for each in waiting:
            spoken.update([] if each.copies is None else each.copies["pack"].tolist())
        return [
            number
            for pack, number in self._index.packs().items()
            if pack not in spoken
            and pack in self._packs
            and self._is_old(self._packs[pack].modified)
        ]

    def _are_spare(self, rows: Rows) -> Mask:
        """Tell which rows are the second copy, or third, of a chunk, and are not condemned."""
        free = np.nonzero(~self._condemned.has(self._keys(rows)))[0]
        copies = rows[free]
        order = np.lexsort((heads_of(self._index.pack_ids(copies)), heads_of(copies["id"])))
        ids = copies["id"][order]
        spare = np.zeros(len(rows), dtype=bool)
        spare[free[order[1:]]] = ids[1:] == ids[:-1]
        return spare

    def _keys(self, rows: Rows) -> npt.NDArray[np.void]:
        return chunk_records.by_id(self._index.pack_ids(rows), rows["id"])


def needed(store: ChunkStore, named: Named, check: Callable[[], None] = _nothing) -> Keys:
    """Return the ids of all chunks that manifests name; Damaged when one cannot be read."""
    ids = [np.empty(0, dtype="V32")]
    for name, data in chunk_records.manifests(store.backend):
        check()
        try:
            ids.append(sorted_keys(as_ids(named(data))).keys)
        except Damaged as exc:
            raise Damaged(
                f"nothing is removed from the image store while {name} cannot be read "
                f"({exc.message}): remove that image, or bring it back from a copy"
            ) from exc
    return sorted_keys(np.concatenate(ids))


def _mostly(rows: Rows, dead: Mask) -> bool:
    stored = rows["stored"].astype(np.int64)
    return bool(2 * stored[dead].sum() > stored.sum())


def _by_pack(rows: Rows, mask: Mask) -> Iterator[tuple[Rows, Mask]]:
    if len(rows):
        changes = np.nonzero(rows["pack"][1:] != rows["pack"][:-1])[0] + 1
        yield from zip(np.split(rows, changes), np.split(mask, changes), strict=True)
