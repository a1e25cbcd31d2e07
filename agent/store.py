"""The cluster store: small records under keys, changed only by compare-and-swap.

One protocol, several engines: SQLite for a node alone, etcd for a cluster, memory for tests; one
conformance suite passes on all of them. Keys are text such as `images/APP/vN`, compared as UTF-8
bytes. One counter for the whole store, the revision, rises with every commit that changes something
(etcd's mod_revision), so that a record's revision tells whether it is still the one that was read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import trio

MAX_OPERATIONS = 128
MAX_BYTES = 1024 * 1024


class Record(NamedTuple):
    """A key's value and the revision of the commit that put it there."""

    key: str
    value: bytes
    revision: int


class Expect(NamedTuple):
    """What a commit rests on: `key` has exactly this revision; 0 says that there is no such key."""

    key: str
    revision: int


class Conflict(Exception):
    """What was expected of `key` does not hold; nothing has happened. Read again, decide anew."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is not at the revision that was expected")
        self.key = key


class Store(Protocol):
    """Records by key, for any number of tasks at once.

    Where the engine fails, every method raises a KrgError that says how: NoRoom, Busy, Unreachable,
    EngineFailed. After `aclose` they raise trio.ClosedResourceError.
    """

    async def get(self, key: str) -> Record | None:
        """Return the record of `key` as the last commit left it."""

    async def list(self, prefix: str) -> list[Record]:
        """Return the records whose keys begin with `prefix`, in the order of their keys.

        They are of one revision: no commit is seen by half.
        """

    async def commit(
        self, expect: Sequence[Expect], put: Mapping[str, bytes], delete: Collection[str] = ()
    ) -> int:
        """Change everything that is named here, if all expectations hold; else raise Conflict.

        Returns the store's revision, which every key of `put` has now; the change is durable.
        Deleting what is not there is no change, and a commit without one keeps the revision.
        At most MAX_OPERATIONS expectations and changes and MAX_BYTES of keys and values, each key
        named once in `put` and `delete`: else ValueError.

        Cancelled, or ended by an error other than Conflict, it has happened whole or not at all;
        who must know which reads the keys again.
        """

    async def aclose(self) -> None:
        """Let go of the store, after the commits that are under way. May be called twice."""


def check_commit(
    expect: Sequence[Expect], put: Mapping[str, bytes], delete: Collection[str]
) -> None:
    """Raise ValueError for what no engine may take, so that none takes what another refuses."""
    operations = len(expect) + len(put) + len(delete)
    if operations > MAX_OPERATIONS:
        raise ValueError(f"{operations} operations in one commit, at most {MAX_OPERATIONS}")
    size = sum(len(key.encode()) + len(value) for key, value in put.items())
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes in one commit, at most {MAX_BYTES}")
    if len({*put, *delete}) != len(put) + len(delete):
        raise ValueError("a key is named twice in one commit")
    if len({key for key, _ in expect}) != len(expect):
        raise ValueError("a key is expected twice in one commit")
    if not all([*put, *delete, *(key for key, _ in expect)]):
        raise ValueError("a key is empty")


class MemoryStore:
    """The store in a dictionary, for tests: durable as long as the object is."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._revision = 0
        self._closed = False

    async def get(self, key: str) -> Record | None:
        await self._enter()
        return self._records.get(key)

    async def list(self, prefix: str) -> list[Record]:
        await self._enter()
        return [self._records[key] for key in sorted(self._records) if key.startswith(prefix)]

    async def commit(
        self, expect: Sequence[Expect], put: Mapping[str, bytes], delete: Collection[str] = ()
    ) -> int:
        check_commit(expect, put, delete)
        await self._enter()
        for key, revision in expect:
            found = self._records.get(key)
            if revision != (found.revision if found else 0):
                raise Conflict(key)
        present = [key for key in delete if key in self._records]
        if put or present:
            self._revision += 1
        for key in present:
            del self._records[key]
        for key, value in put.items():
            self._records[key] = Record(key, bytes(value), self._revision)
        return self._revision

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()

    async def _enter(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this store was closed")
        await trio.lowlevel.checkpoint()
