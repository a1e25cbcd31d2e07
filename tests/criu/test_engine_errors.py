"""What goes wrong with the engine: it says why, and what became of the tree."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent import criu, procs
from krgfs import facts
from krgfs.errors import (
    CannotRunHere,
    Damaged,
    EngineFailed,
    Exists,
    Fate,
    Gone,
    KrgError,
    TryAgain,
    Unsupported,
)
from krgfs.model import ProcessId
from krgfs.verbs import Checkpoint
from tests.criu.rig import SLEEP, USER, Rig, end, until
from tests.workloads import harness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")


async def test_cancelled_it_waits_and_the_tree_runs(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("memory")
    async with trio.open_nursery() as nursery:

        async def cancel(pid: int, start: int) -> None:
            await rig.__class__.started(rig, pid, start)
            nursery.cancel_scope.cancel()

        rig.started = cancel  # type: ignore[method-assign]
        nursery.start_soon(rig.dump, workload.pid)
    assert not facts.exists(*rig.began[0])
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


BIG = """
block = bytearray(os.urandom(1 << 20) * 200)
listener = socket.create_server(("127.0.0.1", 0))
mine = socket.create_connection(listener.getsockname())
other, _ = listener.accept()
count = os.open("n", os.O_RDWR | os.O_CREAT)
os.pwrite(count, b"%08d" % 0, 0)
open(sys.argv[1], "w").close()
n = 0
while True:
    try:
        mine.sendall(b"%08d" % (n + 1))
        n = int(other.recv(4096)[-8:])
    except OSError:  # while CRIU's firewall table and the sockets that it made mute are found
        time.sleep(0.01)
        continue
    os.pwrite(count, b"%08d" % n, 0)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
async def test_criu_ended_in_the_middle(
    share: float, rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    child = process(BIG)
    images = rig.path / f"v{rig._count + 1}"

    async def end_it() -> None:
        pages = images / "pages-1.img"
        await until(lambda: pages.stat().st_size >= share * (200 << 20))
        pid, begun = rig.began[0]
        criu_itself = ProcessId(pid=pid, start=begun, boot=facts.BOOT_ID)
        procs.signal_process(criu_itself, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_it)
        with pytest.raises(EngineFailed, match="ended by signal KILL") as error:
            await rig.dump(child.pid, Checkpoint(tcp="keep"))
    assert error.value.fate is Fate.RUNNING
    assert "left in the memory" in error.value.message
    assert rig.tables() == []
    n = int((place / "n").read_text())
    await until(lambda: int((place / "n").read_text()) > n + 10)
    manifest, images, _ = await rig.dump(child.pid, Checkpoint(tcp="keep"))
    await end(child)
    n = int((place / "n").read_text())
    await rig.restore(manifest, images)
    await until(lambda: int((place / "n").read_text()) > n + 10)


async def test_a_tree_that_ended_is_gone(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    tree = procs.look(child.pid)
    child.kill()
    await procs.ended(tree.id)
    images = rig.spool()
    options = criu.dump_options(rig.engine, tree, images, Checkpoint(), [], None)
    with pytest.raises(Gone) as error:
        await criu.dump(
            rig.engine, tree, images, rig.intake(images), options, rig.started, rig.done.append
        )
    assert error.value.fate is Fate.GONE


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("f = open('x', 'w'); os.link('x', 'y'); os.unlink('x')", Unsupported, "fd 3 .*deleted"),
        ("f = os.open('/dev/fuse', os.O_RDWR)", Unsupported, r"fd 3 .*\(chr 10:229\)"),
        ("p = os.pidfd_open(os.getppid())", Unsupported, "pidfd of process"),
        ("s = socket.socket(40, 1)", Unsupported, "family 40"),
        (
            "s = socket.create_server(('127.0.0.1', 0))\n"
            "c = socket.create_connection(s.getsockname())\nd = s.accept()",
            Unsupported,
            "tcp=keep",
        ),
    ],
)
async def test_what_cannot_be_dumped_is_named(
    code: str,
    kind: type[KrgError],
    words: str,
    rig: Rig,
    process: Callable[..., subprocess.Popen[bytes]],
) -> None:
    child = process(f"{code}\n{SLEEP}")
    with pytest.raises(kind, match=words) as error:
        await rig.dump(child.pid)
    assert error.value.fate is Fate.RUNNING
    assert str(child.pid) in error.value.message


async def test_a_connection_not_accepted_yet(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    child = process(
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "open('port', 'w').write(str(s.getsockname()[1]))\n" + SLEEP
    )
    with socket.create_connection(("127.0.0.1", int((place / "port").read_text()))):
        with pytest.raises(TryAgain, match="waiting to be accepted"):
            await rig.dump(child.pid)
        await rig.dump(child.pid, Checkpoint(tcp="close"))


async def test_a_traced_tree(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], need: Callable[..., None]
) -> None:
    need("strace")
    child = process(SLEEP)
    command = ["strace", "-qq", "-o", "/dev/null", "-p", str(child.pid)]
    tracer = await trio.lowlevel.open_process(command, start_new_session=True)
    try:
        await until(lambda: facts.status(child.pid)[b"TracerPid"] != b"0")
        with pytest.raises(Unsupported, match="cannot be traced"):
            await rig.dump(child.pid)
    finally:
        tracer.terminate()
        await tracer.wait()


async def test_no_room(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    child = process(SLEEP)
    small = place / "small"
    small.mkdir()
    await trio.run_process(["mount", "-t", "tmpfs", "-o", "size=1m", "krg-test", small])
    try:
        rig.path = small
        with pytest.raises(KrgError) as error:
            await rig.dump(child.pid)
        assert error.value.errno == 28, error.value
        assert error.value.fate is Fate.RUNNING
    finally:
        await trio.run_process(["umount", small])


async def test_a_pid_that_somebody_else_has(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    with pytest.raises(Exists, match=f"pid {child.pid} is taken"):
        await rig.restore(manifest, images)
    assert [pid for pid, _ in criu.clashes({child.pid})] == [child.pid]
    launched = await rig.restore(manifest, images, private=True)
    assert launched.inner_pid == child.pid != launched.root.pid
    await end(child)
    assert criu.clashes({child.pid}) == []


async def test_files_that_changed(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], place: Path
) -> None:
    child = process("f = open('data', 'w')\nf.write('x')\nf.flush()\n" + SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    (place / "data").write_text("more than before")
    with pytest.raises(CannotRunHere, match="/data has 16 bytes and had 1"):
        await rig.restore(manifest, images)
    (place / "data").unlink()
    with pytest.raises(CannotRunHere, match="/data cannot be opened"):
        await rig.restore(manifest, images)
    assert facts.task(child.pid) is None


async def test_a_damaged_image_is_told(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await end(child)
    pages = images / "pages-1.img"
    os.truncate(pages, pages.stat().st_size // 2)
    with pytest.raises(Damaged, match=r"pages-1\.img has"):
        await rig.restore(manifest, images)
    (images / f"core-{child.pid}.img").unlink()
    os.truncate(pages, pages.stat().st_size * 4)
    with pytest.raises(Damaged, match="missing or not whole"):
        await rig.restore(manifest, images)


async def test_a_tree_of_several_users_needs_a_capability(
    rig: Rig, start: Callable[..., harness.Workload]
) -> None:
    workload = start("otheruid", USER, USER + 1, USER + 2)
    tree = procs.look(workload.pid)
    mixed = tree._replace(
        credentials={
            pid: ids._replace(uids=(USER, 0, 0, 0)) for pid, ids in tree.credentials.items()
        }
    )
    images = rig.spool()
    with pytest.raises(Unsupported, match="CAP_SYS_RESOURCE"):
        criu.dump_options(rig.engine, mixed, images, Checkpoint(), [], None)


async def test_a_namespace_that_is_nobody_s_of_ours(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process("import ctypes\nctypes.CDLL(None).unshare(0x40000000)\n" + SLEEP)
    with pytest.raises(Unsupported, match="net namespace of its own"):
        await rig.dump(child.pid)
