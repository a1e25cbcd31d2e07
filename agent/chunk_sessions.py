"""A writer at work: adds chunks, in packs, and publishes images that name them.

Against sweeps it keeps one rule: it says that it is at work before it looks what is condemned, and
it publishes only while it is sure that all sweeps still believe it at work.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent import chunk_codec, chunk_records
from agent.backend import Backend, Data
from agent.chunk_index import Index, Keys, as_ids
from agent.packs import ChunkId, Ids, PackWriter, Sealed
from krgfs.errors import EngineFailed

log = logging.getLogger(__name__)

RENEWALS = 10  # in each grace


class Terms(NamedTuple):
    """How a store is written."""

    level: int = 1
    pack_bytes: int = 256 << 20
    grace_s: float = 3600.0
    # Goes on while the machine sleeps, as the clocks of those do who judge whether a writer lives.
    clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)


class Life:
    """The record that tells others of a session, renewed by a thread of its own.

    It is lost for good once a renewal came so late that somebody may have taken it for dead.
    """

    def __init__(self, backend: Backend, terms: Terms, sweeps: bool) -> None:
        self._backend, self._terms = backend, terms
        self.name = chunk_records.SESSIONS + secrets.token_hex(16)
        self._record = chunk_records.encode_session(backend.now(), sweeps)
        self._renewing = threading.Lock()
        self._renewed = terms.clock()
        self._lost = False
        self._failure: OSError | None = None
        self._put()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="krg-session", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Renew the record where it is time; that this fails shows in `check` when it matters."""
        if self._lost or self._age_s() < self._terms.grace_s / RENEWALS:
            return
        if self._renewing.acquire(blocking=False):
            try:
                self._put()
            except OSError as exc:
                self._failure = exc
            finally:
                self._renewing.release()

    def check(self) -> None:
        """Return when all sweeps surely believe this session alive; EngineFailed otherwise."""
        self.renew()
        if self._is_late():
            raise EngineFailed(
                f"the record {self.name} in the image store was not renewed for "
                f"{self._age_s():.0f} s, so that a sweep may have removed what the image needs; "
                "nothing was committed: begin it again",
            ) from self._failure

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._backend.delete(self.name)
        except OSError as exc:  # a sweep removes it when it has been dead for long
            log.warning("session_left name=%s error=%r", self.name, str(exc))

    def _put(self) -> None:
        begun = self._terms.clock()
        self._backend.put(self.name, self._record, replace=True)
        if not self._is_late():  # by now, not when it began
            self._renewed, self._failure = begun, None

    def _is_late(self) -> bool:
        self._lost = self._lost or self._age_s() > self._terms.grace_s / 2
        return self._lost

    def _age_s(self) -> float:
        return self._terms.clock() - self._renewed

    def _keep(self) -> None:
        while not self._over.wait(self._terms.grace_s / RENEWALS):
            self.renew()


class _OpenPack:
    """A pack of a session, and how many threads have it in hand."""

    def __init__(self, backend: Backend) -> None:
        self.writer = PackWriter(backend)
        self.bytes = 0
        self.hands = 0


class Session:
    """A writer of the store, for several threads. After its first failure every call raises, and
    nothing of what was not flushed stays."""

    def __init__(self, backend: Backend, index: Index, terms: Terms, life: Life) -> None:
        """Begin; `index` is to be refreshed after this and before the first call."""
        self._backend, self._index, self._terms, self.life = backend, index, terms, life
        lists = chunk_records.condemned(backend)
        self.knows = frozenset(each.name for each in lists)
        self._condemned = _unless_damaged(lists)
        self._changed = threading.Condition()
        self._mine: set[ChunkId] = set()
        self._adding: set[object] = set()
        self._open: _OpenPack | None = None
        self._packs: set[_OpenPack] = set()  # that are not committed
        self._failure: BaseException | None = None
        self._new_bytes = 0

    @property
    def new_bytes(self) -> int:
        """Stored bytes that this session has written."""
        return self._new_bytes

    def add(self, *parts: Data) -> ChunkId:
        """Store the chunk that these parts make up, and return its id.

        Where it is there already and stays there, nothing is written. The parts may be changed
        again on return; the chunk is durable after `flush`.
        """
        self._check()
        self.life.renew()
        whole = chunk_codec.gathered(parts)
        id = chunk_codec.identify(whole)
        if id in self._mine or self._stays(as_ids([id]))[0]:
            return id
        with self._added(id) as first:
            if first:
                self._write(chunk_codec.seal(id, whole, self._terms.level))
        return id

    def copy(self, chunk: Sealed) -> None:
        """Store a chunk once more as it is stored already, wherever else it may be."""
        self._check()
        self.life.renew()
        with self._added(None):
            self._write(chunk)

    def reuse(self, ids: Iterable[ChunkId]) -> npt.NDArray[np.bool_]:
        """Tell which of these a new image may name: they are there, and no sweep removes them
        before this session ends."""
        self._check()
        wanted = list(ids)
        stays = self._stays(as_ids(wanted))
        for at in np.nonzero(~stays)[0]:
            stays[at] = wanted[at] in self._mine
        return stays

    def flush(self) -> None:
        """Return when all chunks of calls that came before are durable, and known to the store."""
        self._check()
        self.life.renew()
        with self._changed:
            adding = self._adding.copy()
            self._wait(lambda: not adding & self._adding)
            last, self._open = self._open, None
            due = self._packs.copy()
        if last is not None:
            self._commit(last)
        with self._changed:
            self._wait(lambda: not due & self._packs)

    def publish(self, name: str, data: Data) -> None:
        """Put `manifests/NAME`: from here on the image exists.

        All chunks that it names were added or reused by this session. EngineFailed when a sweep may
        have taken this session for dead: nothing is committed then. FileExistsError when the name
        is taken.
        """
        self._check()
        if self._packs:
            raise ValueError("publish before flush")
        self.life.check()
        whole = chunk_records.MANIFESTS + name
        self._backend.put(whole, data)
        try:
            self.life.check()
        except EngineFailed:  # putting it took so long that its chunks may have gone meanwhile
            self._backend.delete(whole)
            raise

    def close(self) -> None:
        """Forget what was not flushed, and say that this session is over."""
        self._fail(ValueError("the session is over"))
        self.life.end()

    def _check(self) -> None:
        failure = self._failure
        if isinstance(failure, OSError):
            raise OSError(failure.errno, failure.strerror, failure.filename) from failure
        if failure is not None:
            raise EngineFailed(
                f"this writer of the image store failed before ({failure}); begin again"
            ) from failure

    def _stays(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Tell which have a copy in a committed pack that was not condemned when this began."""
        stays = np.zeros(len(ids), dtype=bool)
        if self._condemned is not None:
            which, rows = self._index.find(ids)
            copies = chunk_records.by_id(self._index.pack_ids(rows), rows["id"])
            stays[which[~self._condemned.has(copies)]] = True
        return stays & ~self._index.is_doubted(ids)

    @contextmanager
    def _added(self, id: ChunkId | None) -> Iterator[bool]:
        """Have `flush` wait for what is done inside, and tell whether this thread is to do it."""
        token = object()
        with self._changed:
            first = id is None or id not in self._mine
            if first and id is not None:
                self._mine.add(id)
            self._adding.add(token)
        try:
            yield first
        except BaseException as exc:
            self._fail(exc)
            raise
        finally:
            with self._changed:
                self._adding.remove(token)
                self._changed.notify_all()

    def _write(self, chunk: Sealed) -> None:
        full = None
        with self._changed:
            self._check()
            if self._open and self._open.bytes + chunk.stored > self._terms.pack_bytes:
                full, self._open = self._open, None
            if self._open is None:
                self._open = _OpenPack(self._backend)
                self._packs.add(self._open)
            pack = self._open
            pack.hands += 1
            pack.bytes += chunk.stored
            self._new_bytes += chunk.stored
        with self._in_hand(pack):
            pack.writer.add(chunk)
        if full is not None:
            self._commit(full)

    def _commit(self, pack: _OpenPack) -> None:
        with self._changed:
            self._wait(lambda: not pack.hands)
            pack.hands += 1
        with self._in_hand(pack):
            rows = pack.writer.commit()
            self._index.learn(pack.writer.id, rows)
            with self._changed:
                self._packs.remove(pack)

    @contextmanager
    def _in_hand(self, pack: _OpenPack) -> Iterator[None]:
        """Let go of the pack at the end; the last one to do so after a failure aborts it."""
        try:
            yield
        except BaseException as exc:
            self._fail(exc)
            raise
        finally:
            with self._changed:
                pack.hands -= 1
                self._changed.notify_all()
                if self._failure is not None:
                    self._abort_idle()

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._abort_idle()
            self._changed.notify_all()

    def _abort_idle(self) -> None:
        for pack in [each for each in self._packs if not each.hands]:
            self._packs.remove(pack)
            try:
                pack.writer.abort()
            except OSError as exc:  # the back end forgets it in time
                log.warning("upload_left pack=%s error=%r", pack.writer.id.hex(), str(exc))

    def _wait(self, done: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: done() or self._failure is not None)
        self._check()


def _unless_damaged(lists: list[chunk_records.Condemned]) -> Keys | None:
    """Return what is condemned; None when a list is damaged, so that anything may be."""
    damaged = any(each.copies is None for each in lists)
    return None if damaged else chunk_records.joined(lists)
