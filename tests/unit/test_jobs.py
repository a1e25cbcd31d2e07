"""Jobs: who joins, who is refused, what a signal does, and what is written down."""

from __future__ import annotations

import msgspec
import pytest
import trio

from agent.jobs import Jobs, Running
from agent.state import State
from agent.store import MemoryStore
from krgfs.errors import Busy, Gone, NotYours
from krgfs.model import App, Caller, Image, Job, Phase

ROOT = Caller(uid=0, gid=0, pid=10, start=1)
ANNA = Caller(uid=1000, gid=1000, pid=20, start=1)
BEN = Caller(uid=1001, gid=1001, pid=30, start=1)


class Bench:
    """Jobs over a store in memory, with an operation that waits to be told."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.store = MemoryStore()
        self.state = State(self.store, "n1")
        self.jobs = Jobs(self.state, nursery)
        self.go = trio.Event()

    async def start(self, caller: Caller = ANNA, words: str = "1", pid: int = 42) -> Running:
        async def operation(job: Running) -> str:
            await self.go.wait()
            return "a/v1"

        holds = frozenset({pid})
        return await self.jobs.start("checkpoint", f"procs/{pid}", words, caller, holds, operation)

    async def stored(self, number: int) -> Job:
        record = await self.store.get(f"jobs/{number:012d}")
        assert record is not None
        return msgspec.json.decode(record.value, type=Job)


async def test_a_job_is_written_down_when_accepted_and_when_over() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        running = await bench.start()
        assert (await bench.stored(running.id)).phase is Phase.QUEUED
        bench.go.set()
        await running.over.wait()
        job = await bench.stored(running.id)
        assert (job.phase, job.line, job.errno) == (Phase.DONE, "a/v1", 0)
        assert "checkpoint procs/42 n1 ok a/v1" in bench.state.log[-1].text


async def test_a_second_job_on_the_same_process_is_refused_with_the_first_named() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        running = await bench.start()
        with pytest.raises(Busy, match=f"jobs/{running.id} "):
            await bench.start(BEN, "name=x")
        await bench.start(BEN, pid=43)
        bench.go.set()


async def test_the_same_line_joins_until_the_tree_is_frozen_then_only_the_same_caller() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        running = await bench.start()
        asked = ("checkpoint", "procs/42", "1")
        assert bench.jobs.joinable(BEN, *asked) is running
        assert bench.jobs.joinable(BEN, "checkpoint", "procs/42", "name=x") is None
        running.frozen = True
        assert bench.jobs.joinable(BEN, *asked) is None
        assert bench.jobs.joinable(ANNA, *asked) is running
        bench.go.set()


async def test_a_fatal_signal_cancels_and_a_caught_one_only_when_nobody_comes_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        killed = await bench.start()
        await bench.jobs.interrupted(killed.id, ANNA, fatal=True)
        await killed.over.wait()
        assert (await bench.stored(killed.id)).phase is Phase.CANCELLED

        left = await bench.start()
        await bench.jobs.interrupted(left.id, ANNA, fatal=False)
        await left.over.wait()
        assert (await bench.stored(left.id)).phase is Phase.CANCELLED

        wanted = await bench.start()
        await bench.jobs.interrupted(wanted.id, ANNA, fatal=False)
        assert bench.jobs.joinable(ANNA, "checkpoint", "procs/42", "1") is wanted
        await trio.sleep(5)
        assert not wanted.over.is_set()
        bench.go.set()


async def test_a_cancel_after_the_commit_line_changes_nothing() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)

        async def operation(job: Running) -> str:
            job.note(line="a/v1")
            await bench.go.wait()
            return "a/v1"

        asked = ("checkpoint", "procs/42", "1", ANNA, frozenset({42}))
        running = await bench.jobs.start(*asked, operation)
        await trio.testing.wait_all_tasks_blocked()
        running.cancel("its caller was interrupted")
        with pytest.raises(Busy, match="wait for it"):
            await bench.start(BEN, "name=x")
        await running.over.wait()
        job = await bench.stored(running.id)
        assert (job.phase, job.line, job.errno) == (Phase.DONE, "a/v1", 0)


async def test_who_only_joined_cancels_nothing() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        running = await bench.start()
        await bench.jobs.interrupted(running.id, BEN, fatal=True)
        assert not running.scope.cancel_called
        bench.go.set()


async def test_only_its_owner_and_root_cancel_a_job() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        running = await bench.start()
        with pytest.raises(NotYours):
            bench.jobs.mine(running.id, BEN)
        assert bench.jobs.mine(running.id, ROOT) is running
        with pytest.raises(Gone):
            bench.jobs.mine(99, ROOT)
        bench.go.set()


async def test_a_crash_of_an_operation_is_an_error_of_its_job_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)

        async def broken(job: Running) -> str:
            raise ZeroDivisionError("on purpose")

        running = await bench.jobs.start("signal", "procs/1", "TERM", ROOT, frozenset(), broken)
        await running.over.wait()
        job = await bench.stored(running.id)
        assert job.phase is Phase.FAILED
        assert "on purpose" in job.message
        assert "job.crashed" in caplog.text


async def test_what_was_stored_is_there_for_the_next_agent_and_told_to_a_mount() -> None:
    store = MemoryStore()
    first = State(store, "n1")
    await first.commit(
        App(name="a", uid=7), Image(app="a", version=3, created=1.0, node="n1", uid=7)
    )
    second = State(store, "n1")
    await second.load("boot")
    assert second.images["a"][3].ref == "a/v3"
    with second.mounted() as (_, changes):
        told = [changes.receive_nowait()]
        while not told[-1].complete:
            told.append(changes.receive_nowait())
        assert [image.ref for change in told for image in change.images] == ["a/v3"]
        await second.commit(delete=[second.images["a"][3]])
        assert changes.receive_nowait().gone_images == [("a", 3)]
