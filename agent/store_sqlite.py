"""The store of a node that is alone: one SQLite file, in WAL mode with synchronous=FULL.

Commits that wait while another is being written go into the next transaction together, so that two
hundred verbs at once cost a few fsyncs and not two hundred. One connection, used by one thread at a
time. The file is 0600: its records say who runs what.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import trio

from krgfs.errors import Busy, EngineFailed, KrgError, NoRoom

from .store import Conflict, Expect, Record, check_commit

SCHEMA = 1
APPLICATION = 0x6B726766  # "krgf", in the header of the file
BUSY_MS = 10_000
RETRY_S = 0.005
_CREATE = (
    "CREATE TABLE record (key BLOB PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL)",
    "CREATE TABLE head (revision INTEGER NOT NULL)",
    "INSERT INTO head VALUES (0)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)
_FULL = (sqlite3.SQLITE_FULL,)
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_SHUT = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN)

T = TypeVar("T")


class SqliteStore:
    """The store protocol over one file. Several stores may be open on one file, also in several
    processes; their commits exclude each other as they should.

    A commit that is cancelled before it was begun has not happened; one that was begun is waited
    for, and its result returned.
    """

    def __init__(self, path: str, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._closed = False
        self._thread = trio.CapacityLimiter(1)
        self._writing = trio.Lock()
        self._waiting: list[_Commit] = []

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> SqliteStore:
        """Open the store in the file `path`, and make it if it is not there.

        Raises EngineFailed when the file is damaged, is something else, or was written by a newer
        agent. The directory must exist.
        """
        name = os.fspath(path)
        return cls(name, await trio.to_thread.run_sync(_connect, name))

    async def get(self, key: str) -> Record | None:
        def read() -> Record | None:
            row = self._connection.execute(
                "SELECT key, value, revision FROM record WHERE key = ?", (key.encode(),)
            ).fetchone()
            return _record(row) if row else None

        return await self._run(read)

    async def list(self, prefix: str) -> list[Record]:
        def read() -> list[Record]:
            rows = self._connection.execute(
                "SELECT key, value, revision FROM record WHERE key >= ? AND key < ? ORDER BY key",
                _range(prefix),
            )
            return [_record(row) for row in rows]

        return await self._run(read)

    async def commit(
        self, expect: Sequence[Expect], put: Mapping[str, bytes], delete: Collection[str] = ()
    ) -> int:
        check_commit(expect, put, delete)
        commit = _Commit(expect, put, delete)
        self._waiting.append(commit)
        try:
            async with self._writing:
                await self._write_waiting(commit)
        except trio.Cancelled:
            if commit in self._waiting:
                self._waiting.remove(commit)
                raise
            with trio.CancelScope(shield=True):
                async with self._writing:
                    pass  # another task has begun it: its outcome is there when that one is through
        if isinstance(commit.outcome, Exception):
            raise commit.outcome
        return commit.outcome

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._writing, self._thread:
                self._closed = True
                await trio.to_thread.run_sync(self._connection.close)

    async def _run(self, work: Callable[[], T]) -> T:
        def told() -> T:
            if self._closed:
                raise trio.ClosedResourceError("this store was closed")
            with _explained(self._path):
                return work()

        return await trio.to_thread.run_sync(told, limiter=self._thread)

    async def _write_waiting(self, commit: _Commit) -> None:
        """Write all that wait, unless somebody else has written `commit` meanwhile."""
        if commit in self._waiting:
            batch, self._waiting = self._waiting, []
            with trio.CancelScope(shield=True):
                await self._write(batch)

    async def _write(self, batch: Sequence[_Commit]) -> None:
        """Give every commit of the batch its outcome: all in one transaction, or, when that fails,
        each in its own, so that what one of them lacks (room, say) does not fail the others."""
        try:
            await self._run(lambda: self._transact(batch))
        except (KrgError, trio.ClosedResourceError) as exc:
            if len(batch) == 1:
                batch[0].outcome = exc
                return
            for commit in batch:
                await self._write([commit])

    def _transact(self, batch: Sequence[_Commit]) -> None:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            (before,) = execute("SELECT revision FROM head").fetchone()
            revision = before
            for commit in batch:
                revision = self._apply(commit, revision)
            if revision != before:
                execute("UPDATE head SET revision = ?", (revision,))
            execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                execute("ROLLBACK")

    def _apply(self, commit: _Commit, revision: int) -> int:
        """Make one commit's changes and note its outcome; return the revision after it."""
        execute = self._connection.execute
        for key, expected in commit.expect:
            row = execute("SELECT revision FROM record WHERE key = ?", (key,)).fetchone()
            if expected != (row[0] if row else 0):
                commit.outcome = Conflict(key.decode())
                return revision
        deleted = 0
        for key in commit.delete:
            deleted += execute("DELETE FROM record WHERE key = ?", (key,)).rowcount
        for key, value in commit.put:
            execute("REPLACE INTO record VALUES (?, ?, ?)", (key, value, revision + 1))
        commit.outcome = revision + bool(deleted or commit.put)
        return commit.outcome


class _Commit:
    """A commit that waits for its turn, and what came of it."""

    def __init__(
        self, expect: Sequence[Expect], put: Mapping[str, bytes], delete: Collection[str]
    ) -> None:
        self.expect = [(key.encode(), revision) for key, revision in expect]
        self.put = [(key.encode(), bytes(value)) for key, value in put.items()]
        self.delete = [key.encode() for key in delete]
        self.outcome: int | Exception = RuntimeError("the commit was never begun")


def _connect(path: str) -> sqlite3.Connection:
    with _explained(path):
        _make_private(path)
        connection = sqlite3.connect(
            path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def _make_private(path: str) -> None:
    """Make sure that the file is there and 0600: its -wal and -shm take their mode from it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    execute = connection.execute
    execute("BEGIN")  # one state for all three: another process may be making the file right now
    application = execute("PRAGMA application_id").fetchone()[0]
    schema = execute("PRAGMA user_version").fetchone()[0]
    tables = execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    execute("COMMIT")
    if application != APPLICATION and (application or schema or tables):
        raise EngineFailed(
            f"cannot use the store {path}: it is a database of something else; "
            "give the agent a file of its own"
        )
    if schema > SCHEMA:
        raise EngineFailed(
            f"cannot use the store {path}: a newer agent wrote it (format {schema}, this one knows "
            f"{SCHEMA}); start that agent"
        )
    _keep_a_log(connection)
    execute("PRAGMA synchronous = FULL")
    found = execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise _damaged(path, found)
    execute("BEGIN IMMEDIATE")
    if execute("PRAGMA user_version").fetchone()[0] == 0:
        for statement in _CREATE:
            execute(statement)
    execute("COMMIT")


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite does not wait here for another that is just doing so."""
    patience = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
                raise
        time.sleep(RETRY_S)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what SQLite or the kernel says about the file into a KrgError with a whole sentence."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _error(path, exc) from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(path) from exc
        raise EngineFailed(
            f"cannot open the store {path}: {exc.strerror}; the agent needs a directory that it "
            "can write"
        ) from exc


def _error(path: str, exc: sqlite3.Error) -> KrgError:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the rest says where SQLite noticed
    if code in _FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return _no_room(path)
    if code in _BROKEN:
        return _damaged(path, str(exc))
    if code in _LOCKED:
        return Busy(
            f"cannot write the store {path}: another process has held it for {BUSY_MS // 1000} s; "
            "look who (fuser) and try again"
        )
    if code in _SHUT:
        return EngineFailed(
            f"cannot write the store {path}: {exc}; is its filesystem mounted read-only, or is the "
            "file not the agent's?"
        )
    return EngineFailed(
        f"cannot use the store {path}: {exc} ({getattr(exc, 'sqlite_errorname', 'SQLite')}); "
        "look at the kernel's log (dmesg) of this node"
    )


def _no_room(path: str) -> NoRoom:
    return NoRoom(
        f"cannot write the store {path}: no room left on its filesystem; make room there and try "
        "again; nothing was changed"
    )


def _damaged(path: str, found: str) -> EngineFailed:
    return EngineFailed(
        f"cannot use the store {path}: it is damaged ({' '.join(found.split())}); stop the agent, "
        f"keep a copy, and try `sqlite3 {path} .recover`, or put a backup in its place"
    )


def _is_full(path: str) -> bool:
    try:
        room = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < 64 * 1024


def _range(prefix: str) -> tuple[bytes, bytes]:
    """Return the first key that has the prefix and the first behind all that have it."""
    start = prefix.encode()
    return start, start[:-1] + bytes([start[-1] + 1]) if start else b"\xff"


def _record(row: tuple[bytes, bytes, int]) -> Record:
    return Record(row[0].decode(), row[1], row[2])
