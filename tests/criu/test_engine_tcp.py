"""The engine and TCP connections: refused, kept with their peers, or closed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent import criu, keepers
from agent.criu import DumpReport
from krgfs import facts
from krgfs.errors import Damaged, EngineFailed, Exists, Fate, Unsupported
from krgfs.verbs import Checkpoint, Then
from tests.criu.rig import LONG_S, Rig, end, until
from tests.workloads import harness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")

ECHO = """
listener = socket.create_server(("127.0.0.1", 0))
with open("port.new", "w") as f:
    f.write(str(listener.getsockname()[1]))
os.rename("port.new", "port")
stream, _ = listener.accept()
open(sys.argv[1], "w").close()
while data := stream.recv(65536):
    stream.sendall(data)
"""


async def test_tcp_is_refused_unless_told_what_to_do(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("tcpserver")
    with pytest.raises(Unsupported, match=r"fd \d+ of task \d+ is an established TCP") as error:
        await rig.dump(workload.pid)
    assert "tcp=keep or tcp=close" in error.value.message
    assert error.value.fate is Fate.RUNNING
    assert rig.said.splitlines()[0].endswith("consider using --tcp-established option.")
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_tcp_inside_the_tree_is_kept(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("tcpserver")
    manifest, images, _ = await rig.dump(workload.pid, Checkpoint(tcp="keep"))
    assert workload.wait_progress()
    assert rig.tables() == []
    with pytest.raises(Exists, match="is open in another process"):
        await rig.restore(manifest, images)
    assert rig.tables() == [] and workload.wait_progress(), "who has it is not disturbed"
    await rig.kill(workload.pid, workload)
    await rig.restore(manifest, images)
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_a_restore_that_fails_lets_packets_through(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("tcpserver")
    manifest, images, _ = await rig.dump(workload.pid, Checkpoint(tcp="keep"))
    await rig.kill(workload.pid, workload)
    core = images / f"core-{manifest.root}.img"
    core.rename(rig.path / "core")
    with pytest.raises(Damaged):
        await rig.restore(manifest, images)
    assert rig.tables() == []
    (rig.path / "core").rename(core)
    await rig.restore(manifest, images)
    assert rig.tables() == []
    assert workload.finish() == "PASS"


async def test_a_restore_that_is_cancelled_lets_packets_through(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("tcpserver")
    manifest, images, _ = await rig.dump(workload.pid, Checkpoint(tcp="keep"))
    await rig.kill(workload.pid, workload)
    directory = keepers.directory(str(rig.path), "cancelled")
    plan = rig.plan(manifest, images, directory, private=False, words="own")
    made = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.launch, directory, plan, images)
        await until(lambda: Path(directory, "rules.made").exists())
        made = True
        nursery.cancel_scope.cancel()
    assert made and rig.tables() == []
    assert not workload.tasks()
    await rig.restore(manifest, images)
    assert workload.finish() == "PASS"


async def test_a_tree_that_ends_with_its_dump_keeps_its_peer(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    peer, child = await echo(process, place)
    peer.sendall(b"before")
    assert peer.recv(100) == b"before"
    committed: list[float] = []

    async def commit(report: DumpReport) -> None:
        assert facts.is_alive(child.pid, facts.task(child.pid).start)  # type: ignore[union-attr]
        committed.append(report.frozen_ms)

    words = Checkpoint(tcp="keep", then=Then("kill"))
    manifest, images, report = await rig.dump(child.pid, words, commit=commit)
    assert criu.is_ended_by(report.options)
    assert len(committed) == 1 and committed[0] > 0
    child.wait()
    assert len(rig.tables()) == 1, "packets of the connection are held until it is restored"
    peer.sendall(b"meanwhile")
    await rig.restore(manifest, images)
    assert await trio.to_thread.run_sync(peer.recv, 100) == b"meanwhile"
    assert rig.tables() == []
    peer.close()


async def test_a_commit_that_fails_lets_the_tree_run(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    peer, child = await echo(process, place)

    async def commit(_: DumpReport) -> None:
        raise EngineFailed("the store is gone")

    with pytest.raises(EngineFailed, match="the store is gone"):
        await rig.dump(child.pid, Checkpoint(tcp="keep", then=Then("kill")), commit=commit)
    peer.sendall(b"still there")
    assert peer.recv(100) == b"still there"
    assert rig.tables() == []
    peer.close()


async def test_cancelled_in_its_commit_a_tree_runs(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    peer, child = await echo(process, place)
    async with trio.open_nursery() as nursery:

        async def commit(_: DumpReport) -> None:
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()

        nursery.start_soon(
            lambda: rig.dump(child.pid, Checkpoint(tcp="keep", then=Then("kill")), commit=commit)
        )
    peer.sendall(b"still there")
    assert peer.recv(100) == b"still there"
    peer.close()


async def test_tcp_close(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    peer, child = await echo(process, place)
    manifest, images, _ = await rig.dump(child.pid, Checkpoint(tcp="close"))
    peer.sendall(b"still there")
    assert peer.recv(100) == b"still there"
    await end(child)
    peer.close()
    launched = await rig.restore(manifest, images)
    with trio.fail_after(LONG_S):
        assert await keepers.ended(rig.keeper_dir, launched.root) in ("exit 0", "exit 1")


# -- helpers


async def echo(
    process: Callable[..., subprocess.Popen[bytes]], path: Path
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start an echo server and return our connection to it."""
    made: list[socket.socket] = []

    def connect() -> None:
        while not (path / "port").exists():
            time.sleep(0.01)
        made.append(socket.create_connection(("127.0.0.1", int((path / "port").read_text()))))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, connect)
        child = await trio.to_thread.run_sync(process, ECHO)
    made[0].settimeout(LONG_S)
    return made[0], child
