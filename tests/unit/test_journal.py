"""The intent journal: noted before it is done, gone when it is undone, found after a crash."""

import json

import msgspec
import pytest
import trio

from agent.journal import (
    PREFIX,
    Intent,
    Journal,
    KeeperStarted,
    SpoolOpened,
    VersionPending,
)
from agent.store import Conflict, MemoryStore
from agent.store_sqlite import SqliteStore
from krgfs.errors import EngineFailed, NoRoom

SPOOL = SpoolOpened("/store/blast/.spool-7")
KEEPER = KeeperStarted("/run/krgfs/keepers/7")
HOLDS = (4242, "app blast")
EVERY_FACT = (SPOOL, KEEPER, VersionPending("blast", 3))


class Full:
    """A store that refuses commits while `full`, having written them when `wrote`."""

    def __init__(self, store):
        self._store, self.full, self.wrote, self.commits = store, False, False, 0
        self.get, self.list = store.get, store.list

    async def commit(self, expect, put, delete=()):
        self.commits += 1
        if self.full and not self.wrote:
            raise NoRoom("full")
        revision = await self._store.commit(expect, put, delete)
        if self.full:
            raise EngineFailed("the disk failed while it was told to sync")
        return revision

    async def aclose(self):
        await self._store.aclose()


@pytest.fixture
def store():
    return Full(MemoryStore())


@pytest.fixture
def journal(store):
    return Journal(store, "boot-1")


def restarted(journal):
    """The journal as the agent after a crash has it."""
    return Journal(journal._store, "boot-1")


async def test_every_kind_of_fact_is_on_disk_as_it_was_noted(tmp_path):
    store = await SqliteStore.open(tmp_path / "journal.db")
    async with Journal(store, "boot-1").intent(7, "checkpoint", HOLDS) as intent:
        await intent.note(*EVERY_FACT)
        other = await SqliteStore.open(tmp_path / "journal.db")
        (found,) = await Journal(other, "boot-2").left_over()
        await other.aclose()
    await store.aclose()
    assert (found.job, found.verb, found.boot) == (7, "checkpoint", "boot-1")
    assert found.facts == EVERY_FACT
    assert found.holds == HOLDS


async def test_several_facts_are_one_commit(journal, store):
    async with journal.intent(7, "checkpoint") as intent:
        assert store.commits == 0
        await intent.note(SPOOL, KEEPER)
        assert store.commits == 1
        await intent.note(SPOOL)
        assert store.commits == 1, "it was noted already"
        assert intent.facts == (SPOOL, KEEPER)
    assert store.commits == 2


async def test_a_normal_leave_deletes_whatever_is_noted(journal):
    async with journal.intent(7, "checkpoint") as intent:
        await intent.note(SPOOL, KEEPER)
        assert (await restarted(journal).left_over())[0].facts == (SPOOL, KEEPER)
    assert await restarted(journal).left_over() == []


async def test_an_intent_in_which_nothing_is_noted_writes_nothing(journal, store):
    async with journal.intent(7, "wait"):
        pass
    assert store.commits == 0


async def test_what_was_not_forgotten_stays_after_an_exception(journal):
    with pytest.raises(RuntimeError, match="criu"):
        async with journal.intent(7, "checkpoint") as intent:
            await intent.note(SPOOL, KEEPER)
            await intent.forget(SPOOL)
            raise RuntimeError("criu")
    (found,) = await journal.left_over()
    assert found.facts == (KEEPER,)


async def test_nothing_stays_after_an_exception_when_all_is_undone(journal):
    with pytest.raises(RuntimeError):
        async with journal.intent(7, "checkpoint") as intent:
            await intent.note(SPOOL, KEEPER)
            await intent.forget(KEEPER)
            await intent.forget(SPOOL, SPOOL, SpoolOpened("never noted"))
            raise RuntimeError("criu")
    assert await restarted(journal).left_over() == []


async def test_a_block_that_ends_in_an_error_has_undone_its_fact(journal):
    with pytest.raises(RuntimeError):
        async with journal.intent(7, "checkpoint") as intent, intent.noted(SPOOL):
            assert (await restarted(journal).left_over())[0].facts == (SPOOL,)
            raise RuntimeError("criu")
    assert await restarted(journal).left_over() == []


async def test_forgetting_and_leaving_work_in_a_cancelled_scope(journal):
    with trio.CancelScope() as scope:
        async with journal.intent(7, "checkpoint") as intent:
            await intent.note(SPOOL, KEEPER)
            scope.cancel()
            await intent.forget(SPOOL)
            assert (await shielded(restarted(journal).left_over))[0].facts == (KEEPER,)
    assert await shielded(restarted(journal).left_over) == []


async def shielded(call):
    with trio.CancelScope(shield=True):
        return await call()


async def test_a_note_in_a_cancelled_scope_is_not_taken(journal):
    with trio.CancelScope() as scope:
        async with journal.intent(7, "checkpoint") as intent:
            scope.cancel()
            await intent.note(SPOOL)
    assert scope.cancelled_caught
    assert await restarted(journal).left_over() == []


async def test_intents_that_are_open_are_not_left_over(journal):
    async with journal.intent(7, "checkpoint") as one, journal.intent(10, "freeze") as other:
        await other.note(KEEPER)
        await one.note(SPOOL)
        assert await journal.left_over() == []
        assert [intent.job for intent in await restarted(journal).left_over()] == [7, 10]


async def test_a_settled_intent_is_gone(journal):
    with pytest.raises(RuntimeError):
        async with journal.intent(7, "checkpoint") as intent:
            await intent.note(SPOOL)
            raise RuntimeError
    (found,) = await journal.left_over()
    await journal.settle(found)
    assert await journal.left_over() == []
    await journal.settle(found)


async def test_a_job_number_is_not_used_twice(journal):
    with pytest.raises(RuntimeError):
        async with journal.intent(7, "checkpoint") as intent:
            await intent.note(SPOOL)
            raise RuntimeError
    with pytest.raises(Conflict):
        async with restarted(journal).intent(7, "checkpoint") as intent:
            await intent.note(KEEPER)
    assert (await journal.left_over())[0].facts == (SPOOL,)


async def test_a_note_that_fails_does_not_count(journal, store):
    async with journal.intent(7, "checkpoint") as intent:
        store.full = True
        with pytest.raises(NoRoom):
            await intent.note(SPOOL)
        assert intent.facts == ()
        store.full = False
        await intent.note(KEEPER)
        assert (await restarted(journal).left_over())[0].facts == (KEEPER,)
    assert await restarted(journal).left_over() == []


async def test_a_note_that_failed_and_was_written_is_deleted_in_the_end(journal, store):
    async with journal.intent(7, "checkpoint") as intent:
        store.full = store.wrote = True
        with pytest.raises(EngineFailed):
            await intent.note(SPOOL)
        assert (await restarted(journal).left_over())[0].facts == (SPOOL,)
        store.full = False
    assert await restarted(journal).left_over() == []


async def test_the_same_when_the_failure_ends_the_job(journal, store):
    with pytest.raises(EngineFailed):
        async with journal.intent(7, "checkpoint") as intent:
            store.full = store.wrote = True
            try:
                await intent.note(SPOOL)
            finally:
                store.full = False
    assert await restarted(journal).left_over() == []


async def test_tasks_of_one_job_note_and_forget_at_the_same_time(journal):
    async with journal.intent(7, "freeze") as intent:

        async def come_and_go(number):
            await intent.note(SpoolOpened(f"{number}"), VersionPending("blast", number))
            await intent.forget(SpoolOpened(f"{number}"))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(come_and_go, number)
        (found,) = await restarted(journal).left_over()
        assert sorted(fact.version for fact in found.facts) == list(range(20))
        assert all(isinstance(fact, VersionPending) for fact in found.facts)


async def test_a_path_that_is_no_utf8_comes_back_as_it_was(journal):
    odd = SpoolOpened(b"/store/\xff\xe9".decode(errors="surrogateescape"))
    async with journal.intent(7, "freeze") as intent:
        await intent.note(odd)
        (found,) = await restarted(journal).left_over()
    assert found.facts == (odd,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "it has format 2, this agent knows 1"),
        ({"facts": [{"type": "LaserAimed", "at": 1}]}, "LaserAimed"),
        ({"job": "seven"}, "int"),
    ],
)
async def test_what_another_agent_left_is_refused_in_words(journal, store, change, words):
    intent = Intent(job=7, verb="checkpoint", boot="b", started=1.0, facts=(SPOOL,))
    record = json.dumps(msgspec.to_builtins(intent) | change).encode()
    await store.commit([], {f"{PREFIX}7": record})
    with pytest.raises(EngineFailed) as caught:
        await journal.left_over()
    assert f"({PREFIX}7)" in caught.value.message
    assert words in caught.value.message
    await store.commit([], {f"{PREFIX}7": b"\xff not json"})
    with pytest.raises(EngineFailed):
        await journal.left_over()
