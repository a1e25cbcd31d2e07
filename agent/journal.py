"""What this node has under way that would need undoing, noted before it is done.

An operation notes each fact (a spool, a keeper, a version) durably before it makes it true, and
forgets it after it has undone it. The agent that starts after a crash finds in `left_over` what was
still true, and sets it right. The journal is always local, whatever the cluster's store is. How a
tree is frozen is not in it but in the tree's own record.

A fact may be noted and not have become true: undoing must bear that, and look at `Intent.boot`
before it believes in any process.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec
import trio

from krgfs.errors import EngineFailed, KrgError

from .store import Expect, Record, Store

FORMAT = 1
PREFIX = "intents/"


class SpoolOpened(msgspec.Struct, frozen=True, tag=True):
    """A directory of partial data, to be removed once no CRIU writes into it any more."""

    path: str


class KeeperStarted(msgspec.Struct, frozen=True, tag=True):
    """The directory of a keeper whose tree is being restored."""

    directory: str


class VersionPending(msgspec.Struct, frozen=True, tag=True):
    """The directory of a version that is being published or removed; without a record in the
    store it is to be deleted."""

    app: str
    version: int


Fact = SpoolOpened | KeeperStarted | VersionPending


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What one job had under way: the facts in the order in which they were noted.

    `holds` is what the job kept others from: pids, and apps and images by name.
    """

    format: int = FORMAT
    job: int
    verb: str
    boot: str
    started: float
    holds: tuple[int | str, ...] = ()
    facts: tuple[Fact, ...] = ()


class Journal:
    """The intents of this node, kept in `store`; `boot` is the kernel's boot id."""

    def __init__(self, store: Store, boot: str) -> None:
        self.boot = boot
        self._store = store
        self._open: set[int] = set()

    @asynccontextmanager
    async def intent(
        self, job: int, verb: str, holds: Iterable[int | str] = ()
    ) -> AsyncIterator[OpenIntent]:
        """Open the intent of a job. Nothing is written before the first note.

        Left normally, it is deleted, whatever is noted in it. Left by an exception, it is deleted
        if all facts were forgotten, else kept for `left_over`. Deleting is not cut short by
        cancellation.
        """
        begun = Intent(job=job, verb=verb, boot=self.boot, started=time.time(), holds=tuple(holds))
        intent = OpenIntent(self._store, begun)
        self._open.add(job)
        try:
            yield intent
        except BaseException:
            if not intent.facts:
                await intent.close()
            raise
        else:
            await intent.close()
        finally:
            self._open.discard(job)

    async def left_over(self) -> list[Intent]:
        """Return the intents that no running job of this agent has open, oldest job first.

        EngineFailed when a newer agent left one that this one cannot understand.
        """
        intents = [_intent(record) for record in await self._store.list(PREFIX)]
        return [intent for intent in intents if intent.job not in self._open]

    async def settle(self, intent: Intent) -> None:
        """Delete a left-over intent, after everything that it names has been set right."""
        await self._store.commit([], {}, [_key(intent.job)])


class OpenIntent:
    """The facts of a running job. For any number of tasks at once."""

    def __init__(self, store: Store, intent: Intent) -> None:
        self._store = store
        self._intent = intent
        self._touched = False
        self._changing = trio.Lock()

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What is noted now."""
        return self._intent.facts

    @asynccontextmanager
    async def noted(self, fact: Fact) -> AsyncIterator[None]:
        """Enter the block with a fact noted; one that ends in an error has undone it."""
        await self.note(fact)
        try:
            yield
        except BaseException:
            await self.forget(fact)
            raise

    async def note(self, *facts: Fact) -> None:
        """Add facts, in one commit; durable on return. What is noted already stays as it is.

        Once begun it is not cancelled. On an error (NoRoom, ...) none of them counts as noted, and
        what they name must not be done.
        """
        async with self._changing:
            await self._become((*self.facts, *_without(facts, self.facts)))

    async def forget(self, *facts: Fact) -> None:
        """Take facts back that are not true any more, in one commit; unknown ones are ignored.

        Works also in a cancelled scope, so that it can follow the undoing.
        """
        with trio.CancelScope(shield=True):
            async with self._changing:
                await self._become(_without(self.facts, facts))

    async def close(self) -> None:
        """Delete the intent, whatever is noted; `Journal.intent` does it on a normal leave."""
        with trio.CancelScope(shield=True):
            async with self._changing:
                if self._touched:
                    await self._store.commit([], {}, [_key(self._intent.job)])

    async def _become(self, facts: tuple[Fact, ...]) -> None:
        if facts == self.facts:
            return
        intent = msgspec.structs.replace(self._intent, facts=facts)
        key = _key(intent.job)
        expect = [] if self._touched else [Expect(key, 0)]  # a job number is used once
        with trio.CancelScope(shield=True):
            try:
                await self._store.commit(
                    expect, {key: _encoded(intent)} if facts else {}, () if facts else [key]
                )
            except KrgError:
                self._touched = True  # an engine that failed may still have written it
                raise
        self._touched = True
        self._intent = intent


def _without(facts: Iterable[Fact], others: Iterable[Fact]) -> tuple[Fact, ...]:
    known = set(others)
    return tuple(fact for fact in dict.fromkeys(facts) if fact not in known)


def _key(job: int) -> str:
    return f"{PREFIX}{job:012d}"


def _encoded(intent: Intent) -> bytes:
    # not msgspec.json: a path may have bytes in it that are no UTF-8 (surrogates, in a str)
    return json.dumps(msgspec.to_builtins(intent), separators=(",", ":")).encode()


def _intent(record: Record) -> Intent:
    try:
        facts = json.loads(record.value)
        if facts["format"] <= FORMAT:
            return msgspec.convert(facts, Intent)
        why = f"it has format {facts['format']}, this agent knows {FORMAT}"
    except (ValueError, TypeError, KeyError, msgspec.ValidationError) as exc:
        why = str(exc)
    raise EngineFailed(
        f"cannot read what an earlier agent left under way ({record.key}): {why}; "
        "start the agent that wrote it, or a newer one"
    )
