"""The feeder against the real CRIU: trees that run before their memory is back.

Its source is plain CRIU files, read slowly where a test needs it to be in the middle.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from agent import feeder, keepers
from agent.criu import Engine
from agent.feeder_source import Directory
from agent.keepers import Launched, Plan
from krgfs import facts
from krgfs.model import ProcessId
from tests.criu.rig import LONG_S, until
from tests.workloads import harness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU and userfaultfds need root")

Start = Callable[..., harness.Workload]
OPTIONS = ("--manage-cgroups=ignore", "--file-locks", "-v3", "-o", "log")

# a feeder whose source looks into PLACE/mood before each read: {"pause": s per MiB, ...}
SLOW = """
import json, os, sys, time
from agent import feeder_process, feeder_source
from krgfs.errors import Damaged

class Slow(feeder_source.Directory):
    def read_into(self, file, offset, buffer):
        mood = json.load(open(os.path.join(self._path, "mood")))
        time.sleep(mood["pause"] * len(buffer) / (1 << 20))
        if offset + len(buffer) > mood["good_bytes"]:
            raise Damaged(f"chunk 77 of {file} is damaged")
        super().read_into(file, offset, buffer)

feeder_source.KINDS["slow"] = Slow
feeder_process.main()
"""


class Lazy:
    """An image of plain CRIU, and a tree restored from it lazily under a keeper of its own."""

    def __init__(self, engine: Engine, place: Path) -> None:
        self.images = place / "images"
        self.images.mkdir()
        self._engine = engine
        self._place = place
        self._count = 0
        self._launched: list[Launched] = []
        self.work = self.keeper = place
        self.mood()

    def mood(self, pause: float = 0.0, good_bytes: int = 1 << 60) -> None:
        part = self.images / "mood.part"
        part.write_text(json.dumps({"pause": pause, "good_bytes": good_bytes}))
        part.replace(self.images / "mood")

    async def dump(self, pid: int) -> None:
        words = ("-D", str(self.images), "-t", str(pid), *OPTIONS)
        code = await self._run(self._engine.path, "dump", *words)
        assert code == 0, (self.images / "log").read_text()

    def stage(self) -> feeder.Staged:
        self._count += 1
        self.staged = self._place / f"staged{self._count}"
        self.work = self._place / f"work{self._count}"
        self.keeper = self._place / f"keeper{self._count}"
        self.staged.mkdir()
        self.work.mkdir()
        return feeder.stage(self.images, self.staged, Directory(str(self.images)))

    def start(self, staged: feeder.Staged) -> None:
        slow = (sys.executable, "-c", SLOW)
        feeder.start(self.work, self.keeper, staged, f"slow:{self.images}", slow)

    async def restore(self, private: bool = False) -> Launched:
        self.start(self.stage())
        return await self.launch(private)

    async def launch(self, private: bool = False) -> Launched:
        pidfile = str(self.keeper / "pid")
        words = ("-D", str(self.staged), "-W", str(self.work), "--lazy-pages", "--shell-job")
        command = (self._engine.path, "restore", "-d", "--pidfile", pidfile, *words, *OPTIONS)
        plan = Plan(command=command, pidfile=pidfile, new_pid=private, log=str(self.work / "said"))
        with trio.fail_after(LONG_S):
            launched = await keepers.launch(keepers.binary(), str(self.keeper), plan)
        self._launched.append(launched)
        return launched

    def progress(self) -> feeder.Progress:
        found = feeder.progress(self.work)
        assert found is not None
        return found

    def said(self) -> str:
        return (self.work / feeder.LOG).read_text()

    async def finished(self) -> feeder.Progress:
        await until(lambda: not feeder.processes(self.work))
        return self.progress()

    async def in_the_middle(self, share: float = 0.1) -> list[ProcessId]:
        """Return holder and worker once so much is there, and not all."""

        def has_come() -> bool:
            found = self.progress()
            return found.total > 0 and found.done > share * found.total

        await until(has_come)
        found = feeder.processes(self.work)
        assert len(found) == 2 and self.progress().state == "feeding", self.said()
        return found

    async def close(self) -> None:
        self.mood()
        for launched in self._launched:
            with trio.fail_after(LONG_S):
                await trio.to_thread.run_sync(_wait_gone, launched.keeper)
        await self.finished()

    async def _run(self, *words: str) -> int:
        process = await trio.lowlevel.open_process(
            words, stdin=subprocess.DEVNULL, start_new_session=True
        )
        with trio.fail_after(LONG_S):
            return await process.wait()


def _wait_gone(process: ProcessId) -> None:
    while facts.is_alive(process.pid, process.start):
        time.sleep(0.01)


@pytest.fixture
async def lazy(engine: Engine, tmp_path: Path) -> AsyncIterator[Lazy]:
    made = Lazy(engine, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def begin(lazy: Lazy, start: Start) -> Iterator[Start]:
    """Start workloads that end before the feeder is waited for."""
    made: list[harness.Workload] = []

    def begin(name: str, *words: object) -> harness.Workload:
        made.append(start(name, *words))
        return made[-1]

    yield begin
    for workload in made:
        workload.kill()


async def dumped(lazy: Lazy, workload: harness.Workload) -> None:
    tree = workload.tree()
    await lazy.dump(workload.pid)
    await trio.to_thread.run_sync(workload.wait_gone, tree)


async def verdict(workload: harness.Workload) -> str:
    await until(workload.alive)  # by its environment, which has to be there first
    return await trio.to_thread.run_sync(workload.finish)


@pytest.mark.parametrize(
    ("name", "words"), [("memory", (64,)), ("proctree", ()), ("threads", ()), ("sharedmem", ())]
)
async def test_a_tree_runs_before_its_memory_is_back(
    name: str, words: tuple[object, ...], lazy: Lazy, begin: Start
) -> None:
    workload = begin(name, *words)
    await dumped(lazy, workload)
    lazy.mood(pause=0.005)
    await lazy.restore()
    assert await trio.to_thread.run_sync(workload.wait_progress)
    lazy.mood()
    found = await lazy.finished()
    assert (found.state, found.done) == ("done", found.total), lazy.said()
    assert found.total > 0
    assert await verdict(workload) == "PASS"


async def test_all_memory_is_right_at_once(lazy: Lazy, begin: Start) -> None:
    """Every page is looked at while nearly none is there."""
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.02)
    await lazy.restore()
    assert lazy.progress().done < lazy.progress().total / 2
    assert await verdict(workload) == "PASS"


CHANGES = """
import ctypes, mmap, struct

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
PAGE, COUNT = 4096, 16384
def take(pages):
    return libc.mmap(None, ctypes.c_size_t(pages * PAGE), 3, 0x22, -1, ctypes.c_size_t(0))
def word(at):
    return ctypes.c_uint64.from_address(at).value
def check(at, first, pages, step=1, zero=False):
    for n in range(0, pages, step):
        wanted = 0 if zero else first + n + 1
        found = word(at + n * PAGE)
        assert found == wanted, f"page {first + n} has {found}, not {wanted}"
def size(pages):
    return ctypes.c_size_t(pages * PAGE)
def at(address):
    return ctypes.c_void_p(address)
def told(name, what):
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(what)
    os.rename(sys.argv[1] + ".new", sys.argv[1] + name)
def forked(look):
    pid = os.fork()
    if pid == 0:
        try:
            look()
        except AssertionError as exc:
            os.write(2, (str(exc) + "\\n").encode())
            os._exit(1)
        os._exit(0)
    return pid
def joined(pid):
    assert os.waitpid(pid, 0)[1] == 0, "a child saw what was wrong"

base = take(COUNT)
for n in range(COUNT):
    ctypes.c_uint64.from_address(base + n * PAGE).value = n + 1
wiped = take(64)
ctypes.memset(at(wiped), 7, size(64))
assert libc.madvise(at(wiped), size(64), 18) == 0  # MADV_WIPEONFORK
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[1] + ".go"):
    time.sleep(0.005)
try:
    Q = COUNT // 8  # what is changed is at the end, which is filled in last
    early = forked(lambda: check(base, 0, COUNT, 64))
    unlike = forked(lambda: check(wiped, 0, 64, zero=True))
    assert libc.munmap(at(base + 7 * Q * PAGE), size(Q)) == 0
    there = take(Q)
    moved = libc.mremap(at(base + 6 * Q * PAGE), size(Q), size(Q), 3, at(there))
    assert moved == there, "mremap failed"
    assert libc.madvise(at(base + 5 * Q * PAGE), size(Q), 4) == 0
    assert libc.mprotect(at(base + (4 * Q + 3) * PAGE), size(Q // 2), 1) == 0
    told(".changed", "")
    late = forked(lambda: (check(moved, 6 * Q, Q, 64), check(base, 0, Q, 64)))
    check(moved, 6 * Q, Q)
    check(base + 5 * Q * PAGE, 5 * Q, Q, zero=True)
    again = take(Q)
    check(again, 0, Q, zero=True)
    grown = libc.mremap(at(moved), size(Q), size(2 * Q), 1)
    check(grown, 6 * Q, Q)
    check(grown + Q * PAGE, 0, Q, zero=True)
    check(base, 0, 5 * Q)
    joined(early)
    joined(unlike)
    joined(late)
    assert ctypes.string_at(wiped, 64 * PAGE) == b"\\x07" * 64 * PAGE
    told(".verdict", "PASS")
except AssertionError as exc:
    told(".verdict", f"FAIL: {exc}")
while True:
    time.sleep(0.01)
"""


async def test_a_process_that_changes_its_mappings_meanwhile(
    lazy: Lazy, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    child = process(CHANGES)
    await lazy.dump(child.pid)
    await trio.to_thread.run_sync(child.wait)
    lazy.mood(pause=0.4)
    launched = await lazy.restore()
    try:
        (place / "sign0.go").touch()
        await until((place / "sign0.changed").exists)
        assert lazy.progress().done < lazy.progress().total / 2
        lazy.mood(pause=0.02)
        await until((place / "sign0.verdict").exists)
        assert (place / "sign0.verdict").read_text() == "PASS"
    finally:
        os.kill(launched.root.pid, signal.SIGKILL)


async def test_a_tree_that_ends_early(lazy: Lazy, begin: Start) -> None:
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.2)
    launched = await lazy.restore()
    await trio.to_thread.run_sync(workload.kill)
    found = await lazy.finished()
    assert found.state == "done" and "defect" not in lazy.said()
    assert await keepers.ended(str(lazy.keeper), launched.root) == "signal KILL"


@pytest.mark.parametrize("who", ["holder", "worker", "workers", "worker then holder"])
async def test_one_of_the_two_is_killed_in_the_middle(who: str, lazy: Lazy, begin: Start) -> None:
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.02)
    await lazy.restore()
    holder, worker = await lazy.in_the_middle()
    if who != "holder":
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker not in feeder.processes(lazy.work))
    for _ in range(2 * (who == "workers")):
        await until(lambda: len(feeder.processes(lazy.work)) == 2)
        await trio.sleep(0.05)
        os.kill(feeder.processes(lazy.work)[1].pid, signal.SIGKILL)
    if who.endswith("holder"):
        await until(lambda: len(feeder.processes(lazy.work)) == 2)
        os.kill(holder.pid, signal.SIGKILL)
        await until(lambda: len(feeder.processes(lazy.work)) == 1)
    assert lazy.progress().state == "feeding"
    assert await trio.to_thread.run_sync(workload.wait_progress)
    assert await verdict(workload) == "PASS"
    assert (await lazy.finished()).state == "done"


async def test_workers_that_die_again_and_again_end_the_tree(lazy: Lazy, begin: Start) -> None:
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.1)
    launched = await lazy.restore()
    killed: set[ProcessId] = set()

    def kill_another() -> bool:
        workers = set(feeder.processes(lazy.work)[1:]) - killed
        for each in workers:
            os.kill(each.pid, signal.SIGKILL)
        killed.update(workers)
        return lazy.progress().state == "failed"

    await until(kill_another)
    assert (await lazy.finished()).reason == "its workers died, the last with -9"
    assert await keepers.ended(str(lazy.keeper), launched.root) == "signal KILL"
    assert workload.finish().startswith("FAIL: memory was gone without")


@pytest.mark.parametrize("private", [False, True])
async def test_a_damaged_source_ends_the_tree(private: bool, lazy: Lazy, begin: Start) -> None:
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.02)
    launched = await lazy.restore(private)
    workload.adopt(launched.root.pid)
    await lazy.in_the_middle()
    lazy.mood(good_bytes=0)
    found = await lazy.finished()
    assert (found.state, found.reason) == ("failed", "chunk 77 of pages-1.img is damaged")
    assert await keepers.ended(str(lazy.keeper), launched.root) == "signal KILL"
    assert workload.finish().startswith("FAIL: memory was gone without")  # it saw nothing wrong


async def test_a_damaged_source_ends_all_of_a_tree(lazy: Lazy, begin: Start) -> None:
    workload = begin("proctree")
    await dumped(lazy, workload)
    lazy.mood(good_bytes=0)
    with contextlib.suppress(keepers.LaunchFailed):  # killed with the tree where it is slow
        await lazy.restore()
    assert (await lazy.finished()).state == "failed"
    await until(lambda: not workload.tasks())


async def test_it_outlives_its_starter(lazy: Lazy, begin: Start) -> None:
    workload = begin("memory", 64, 0)
    await dumped(lazy, workload)
    lazy.mood(pause=0.01)
    staged = lazy.stage()
    starter = os.fork()
    if starter == 0:
        try:
            lazy.start(staged)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, how = await trio.to_thread.run_sync(os.waitpid, starter, 0)
    assert os.WTERMSIG(how) == signal.SIGKILL
    await lazy.launch()
    assert await verdict(workload) == "PASS"


async def test_without_a_feeder_the_restore_fails(lazy: Lazy, begin: Start) -> None:
    """Killed before CRIU has told it all: nothing runs, and the image is as it was."""
    workload = begin("memory", 16, 0)
    await dumped(lazy, workload)
    lazy.start(lazy.stage())
    await until(lambda: feeder.processes(lazy.work))
    os.kill(feeder.processes(lazy.work)[0].pid, signal.SIGKILL)
    with pytest.raises(keepers.LaunchFailed):
        await lazy.launch()
    assert not workload.tasks()
    await lazy.restore()
    assert await verdict(workload) == "PASS"
