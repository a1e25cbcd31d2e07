"""The engine on real processes of this kernel: what is dumped lives again under a keeper.

Every process here is started in a session of its own by the workloads' harness and ended by it,
with everything that carries its mark.
"""

from __future__ import annotations

import os
import pty
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent import cgroups, criu, keepers, procs
from agent.freezer import Freezer
from agent.keepers import LaunchFailed, Plan
from krgfs import facts
from krgfs.errors import Fate
from krgfs.model import Frozen
from krgfs.verbs import ImageRef
from tests.criu.rig import COUNT, LONG_S, READY, SLEEP, USER, Rig, end, until
from tests.workloads import harness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")


async def test_a_dumped_tree_runs_on(rig: Rig, start: Callable[..., harness.Workload]) -> None:
    workload = start("counter")
    _, images, report = await rig.dump(workload.pid)
    assert workload.wait_progress()
    assert (images / "inventory.img").exists()
    assert not (images / "dump.log").exists(), "CRIU's log is no part of an image"
    assert 0 < report.frozen_ms < report.seconds * 1000
    assert report.bytes == report.pages * 4096 > 1 << 20
    assert "Dumping finished successfully" in rig.said
    assert len(rig.began) == 1
    assert workload.finish() == "PASS"


async def test_an_image_lives_again_with_its_pids(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("proctree")
    assert workload.wait_progress()
    pids = workload.tree()
    manifest, images, _ = await rig.dump(workload.pid)
    await rig.kill(workload.pid, workload)
    launched = await rig.restore(manifest, images)
    assert launched.root.pid == launched.inner_pid == pids[0]
    assert facts.task(launched.root.pid).ppid == launched.keeper.pid  # type: ignore[union-attr]
    assert sorted(workload.tree()) == sorted(pids)
    assert criu.image_of_keeper(rig.keeper_dir) == ImageRef("t", f"v{manifest.version}")
    assert workload.wait_progress()
    assert workload.finish() == "PASS"
    assert await keepers.ended(rig.keeper_dir, launched.root) == "exit 0"


@pytest.mark.parametrize(
    "name", ["locks", "sharedmem", "threads", "timers", "unixserver", "deleted", "epoll", "memory"]
)
async def test_what_a_tree_has_comes_back(
    name: str, rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start(name)
    manifest, images, _ = await rig.dump(workload.pid)
    await rig.kill(workload.pid, workload)
    await rig.restore(manifest, images)
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_three_generations_in_a_namespace_of_their_own(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("proctree")
    manifest, images, _ = await rig.dump(workload.pid)
    inner = workload.pid
    await rig.kill(inner, workload)
    for _ in range(3):
        launched = await rig.restore(manifest, images, private=True)
        workload.adopt(launched.root.pid)
        assert launched.inner_pid == inner != launched.root.pid
        assert workload.wait_progress()
        assert procs.look(launched.root.pid).is_in_private_pid_ns
        manifest, images, report = await rig.dump(launched.root.pid)
        assert ("--tree", str(inner)) in [option.words for option in report.options]
        assert workload.wait_progress()
        await rig.kill(launched.root.pid)
        await procs.ended(launched.keeper)
    launched = await rig.restore(manifest, images)
    assert launched.root.pid == inner
    workload.adopt(inner)
    assert workload.finish() == "PASS"


async def test_a_frozen_tree_stays_frozen(rig: Rig, start: Callable[..., harness.Workload]) -> None:
    workload = start("threads")
    tree = procs.look(workload.pid)
    freezer = Freezer.find()

    async def record(_: Frozen) -> None: ...

    frozen = await freezer.freeze(tree, "test-engine", record)
    try:
        manifest, images, report = await rig.dump(workload.pid, frozen=frozen)
        assert freezer.is_frozen(frozen)
        assert procs.fate(tree) is Fate.FROZEN
    finally:
        await freezer.thaw(frozen)
    assert ("--freeze-cgroup", frozen.cgroup) in [option.words for option in report.options]
    await rig.kill(workload.pid, workload)
    await rig.restore(manifest, images)
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_another_user_s_tree(rig: Rig, start: Callable[..., harness.Workload]) -> None:
    workload = start("otheruid", USER, USER + 1, USER + 2)
    manifest, images, _ = await rig.dump(workload.pid)
    assert workload.wait_progress()
    await rig.kill(workload.pid, workload)
    launched = await rig.restore(manifest, images)
    assert facts.ids(launched.root.pid).uid == USER  # type: ignore[union-attr]
    assert workload.wait_progress()
    manifest, images, _ = await rig.dump(launched.root.pid)
    await rig.kill(launched.root.pid)  # two at work on one log would take each other for damage
    launched = await rig.restore(manifest, images, private=True)
    workload.adopt(launched.root.pid)
    assert workload.wait_progress()
    manifest, images, _ = await rig.dump(launched.root.pid)
    await rig.kill(launched.root.pid)
    launched = await rig.restore(manifest, images)
    workload.adopt(launched.root.pid)
    assert facts.ids(launched.root.pid).uid == USER  # type: ignore[union-attr]
    assert workload.finish() == "PASS"


# -- ends that are outside


@pytest.mark.parametrize("private", [False, True])
async def test_a_shell_job_writes_on_into_a_file(
    private: bool, rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("ptyjob")
    manifest, images, report = await rig.dump(workload.pid)
    assert ("--shell-job",) in [option.words for option in report.options]
    await rig.kill(workload.pid, workload)
    launched = await rig.restore(manifest, images, private)
    workload.adopt(launched.root.pid)
    assert workload.wait_progress()
    out = Path(manifest.cwd) / "krg-t.out"
    try:
        text = out.read_text()
        assert "step " in text and "\r\r" not in text
        assert workload.finish() == "PASS"
    finally:
        out.unlink()


async def test_what_was_piped_away_goes_into_a_file_that_grows(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    outer, inner = os.pipe()
    child = process(COUNT, stdout=inner, stderr=inner)
    os.close(inner)
    assert os.read(outer, 100).startswith(b"1\n")
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    os.close(outer)
    out = place / "krg-t.out"
    out.write_text("what was there\n")
    launched = await rig.restore(manifest, images)
    await until(lambda: len(out.read_text().split()) > 10)
    lines = out.read_text().splitlines()
    assert lines[0] == "what was there"
    numbers = list(map(int, lines[1:-1]))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    again, images, _ = await rig.dump(launched.root.pid)
    await rig.kill(launched.root.pid)
    size = out.stat().st_size
    await rig.restore(again, images)
    await until(lambda: out.stat().st_size > size)


async def test_what_was_piped_in_is_read_to_its_end(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    inner, outer = os.pipe()
    code = (
        READY + "got = b''\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n"
        "while part := os.read(0, 100):\n    got += part\n"
        "open('got', 'wb').write(got)\n"
    )
    child = process(code, stdin=inner)
    os.close(inner)
    os.write(outer, b"not read yet")
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    os.close(outer)
    launched = await rig.restore(manifest, images)
    (place / "go").touch()
    with trio.fail_after(LONG_S):
        assert await keepers.ended(rig.keeper_dir, launched.root) == "exit 0"
    assert (place / "got").read_bytes() == b"not read yet"


async def test_a_socket_as_output_becomes_a_file(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    ours, theirs = socket.socketpair()
    child = process(COUNT, stdout=theirs, stderr=theirs)
    theirs.close()
    manifest, images, report = await rig.dump(child.pid)
    assert any(option.words[0] == "--external" for option in report.options)
    await end(child)
    ours.close()
    await rig.restore(manifest, images)
    await until(lambda: (place / "krg-t.out").stat().st_size > 20)


async def test_a_terminal_of_a_session_leader(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    master, slave = pty.openpty()
    child = process(COUNT, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    os.close(master)
    await rig.restore(manifest, images)
    await until(lambda: (place / "krg-t.out").stat().st_size > 20)
    assert b"\r" not in (place / "krg-t.out").read_bytes()


async def test_output_goes_elsewhere_where_the_user_may_not_write(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    outer, inner = os.pipe()
    child = process(COUNT, stdout=inner, cwd="/sys")
    os.close(inner)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    os.close(outer)
    home = Path(os.path.expanduser("~root"))
    launched = await rig.restore(manifest, images)
    target = facts.link(launched.root.pid, "fd/1")
    assert target == os.fsencode(home / "krg-t.out")
    await rig.kill(launched.root.pid)
    (home / "krg-t.out").unlink()


# -- launches that are no restore


async def test_a_program_under_a_keeper(rig: Rig, place: Path) -> None:
    directory = keepers.directory(str(rig.path), "run")
    out = place / "out"
    plan = Plan(command=("/bin/sh", "-c", "echo here; exit 3"), out=str(out))
    launched = await keepers.launch(keepers.binary(), directory, plan)
    with trio.fail_after(LONG_S):
        assert await keepers.ended(directory, launched.root) == "exit 3"
        await procs.ended(launched.keeper)
    assert out.read_text() == "here\n"
    assert keepers.tidy(str(rig.path), {directory}) == []
    assert keepers.tidy(str(rig.path), ()) == [directory]


async def test_a_program_that_is_not_there(rig: Rig) -> None:
    plan = Plan(command=("/no/such/program",))
    with pytest.raises(LaunchFailed, match="No such file"):
        await keepers.launch(keepers.binary(), keepers.directory(str(rig.path), "run"), plan)


async def test_a_launch_that_is_cancelled_leaves_nothing(rig: Rig) -> None:
    directory = keepers.directory(str(rig.path), "run")
    plan = Plan(command=("/bin/sleep", "1000"), pidfile=f"{directory}/pid")
    with trio.move_on_after(0.2) as scope:
        await keepers.launch(keepers.binary(), directory, plan)
    assert scope.cancelled_caught
    keeper = keepers.status(directory).keeper
    assert keeper is not None and not facts.is_alive(keeper.pid, keeper.start)


async def test_own_cgroups_come_and_go(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    launched = await rig.restore(manifest, images)
    places = {each.directory(launched.root.pid) for each in cgroups.hierarchies()}
    own = {place for place in places if place and "/krgfs/krg-t-" in place}
    assert own, "the tree is in no cgroup of its own"
    await rig.kill(launched.root.pid)
    assert await keepers.ended(rig.keeper_dir, launched.root) == "signal KILL"
    with trio.fail_after(LONG_S):
        await keepers.cleared(str(rig.keeper_dir))
    assert not any(os.path.exists(place) for place in own)


async def test_the_caller_s_cgroups(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    launched = await rig.restore(manifest, images, words="caller")
    for each in cgroups.hierarchies():
        assert each.directory(launched.root.pid) == each.directory(os.getpid())


async def test_the_kernel_tells_how_a_stranger_ended() -> None:
    command = ["/bin/sh", "-c", "sleep 0.3; exit 7"]
    child = await trio.lowlevel.open_process(command, start_new_session=True)
    root = procs.look(child.pid).id
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.wait)
        with trio.fail_after(LONG_S):
            assert await keepers.ended("", root) == "exit 7"
