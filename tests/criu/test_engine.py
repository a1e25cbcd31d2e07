"""The engine on real processes of this kernel: dump, restore under a keeper, and what goes wrong.

Every process here is started in a session of its own by the workloads' harness and ended by it,
with everything that carries its mark.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from agent import cgroups, criu, criu_run, keepers, outside, procs
from agent.criu import DumpReport, Engine
from agent.freezer import Freezer
from agent.keepers import Launched, LaunchFailed, Plan
from agent.manifest import End, Manifest, Task
from agent.procs import ProcessTree
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
from krgfs.model import Caller, Frozen, ProcessId
from krgfs.verbs import Checkpoint, ImageRef, Restart, Then
from tests.workloads import harness

LONG_S = 60.0
USER = 12345  # a uid that needs no account
ROOT = Caller(uid=0, gid=0, pid=os.getpid())

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")


class Rig:
    """An engine with directories to work in; what it brought to life ends with it."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine = engine
        self.path = path
        self.log = f"{path}.log.zst"
        self.began: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.all_said: list[str] = []
        self._launched: list[Launched] = []
        self._count = 0
        (path / "keepers").mkdir(parents=True)

    def spool(self) -> Path:
        self._count += 1
        images = self.path / f"v{self._count}"
        images.mkdir(mode=0o700)
        return images

    async def started(self, pid: int, start: int) -> None:
        self.began.append((pid, start))

    async def dump(
        self,
        pid: int,
        words: Checkpoint | None = None,
        frozen: Frozen | None = None,
        commit: Callable[[DumpReport], Awaitable[None]] | None = None,
    ) -> tuple[Manifest, Path, DumpReport]:
        words = words or Checkpoint()
        tree = procs.look(pid)
        ends = outside.ends(tree)
        images = self.spool()
        options = criu.dump_options(self.engine, tree, images, words, ends, frozen)
        try:
            with trio.fail_after(LONG_S):
                report = await criu.dump(
                    self.engine, tree, images, options, self.started, self.done.append, commit
                )
        finally:
            self.said = await criu.kept_words(images, self.log)
            self.all_said.append(self.said)
        return self.manifest(tree, ends), images, report

    def manifest(self, tree: ProcessTree, ends: list[outside.End]) -> Manifest:
        ids = tree.credentials[tree.pid]
        task = Task(
            pid=tree.inner_root, ppid=0, sid=tree.root.sid, pgrp=0, uid=ids.uid, gid=ids.gid
        )
        return Manifest(
            app="t",
            version=self._count,
            created=time.time(),
            uid=ids.uid,
            gid=ids.gid,
            root=tree.inner_root,
            tree=(task,),
            cwd=os.fsdecode(facts.link(tree.pid, "cwd")),
            ends=tuple(
                End(kind=end.kind, id=end.id, pid=end.pid, fd=end.fd, mode=end.mode) for end in ends
            ),
        )

    async def kill(self, pid: int, workload: harness.Workload | None = None) -> None:
        """End a tree, its root reaped by its keeper or by the launcher of its workload."""
        tree = procs.look(pid)
        procs.kill(tree)
        if workload is not None:
            await trio.to_thread.run_sync(workload.wait_gone, tree.pids)
        with trio.fail_after(LONG_S):
            await procs.gone(tree.ids)

    async def restore(
        self, manifest: Manifest, images: Path, private: bool = False, words: str = "own"
    ) -> Launched:
        self._count += 1
        directory = keepers.directory(str(self.path), self._count)
        plan = criu.restore_plan(
            self.engine,
            manifest,
            str(images),
            Restart(image=ImageRef("t"), cgroup=words),
            ROOT,
            private,
            directory,
        )
        try:
            with trio.fail_after(LONG_S):
                launched = await keepers.launch(keepers.binary(), directory, plan)
        finally:
            self.said = await criu.kept_words(directory, self.log)
        self.keeper_dir = directory
        self._launched.append(launched)
        return launched

    def tables(self) -> list[str]:
        """Return the firewall tables that are left of the dumps made here."""
        command = ["nft", "list", "tables"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ours = [found[:21] for found in criu_run.RUN_ID.findall("\n".join(self.all_said))]
        return [line for line in done.stdout.splitlines() if any(each in line for each in ours)]

    async def close(self) -> None:
        for launched in self._launched:
            if facts.is_alive(launched.root.pid, launched.root.start):
                procs.kill(procs.look(launched.root.pid))
            with trio.fail_after(LONG_S):
                await procs.ended(launched.keeper)
        keepers.tidy(str(self.path), ())


@pytest.fixture(scope="session")
def engine() -> Engine:
    found: Engine = trio.run(Engine.find)
    return found


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="krg-engine-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def rig(engine: Engine, tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(engine, tmp_path / "rig")
    yield made
    await made.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., harness.Workload]]:
    """Start workloads; they and what was restored of them are ended afterwards."""
    made: list[harness.Workload] = []

    def begin(name: str, *args: object) -> harness.Workload:
        workload = harness.start(name, tmp_path / f"{name}{len(made)}", *args)
        made.append(workload)
        return workload.wait_ready()

    yield begin
    for workload in made:
        workload.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start Python code that writes `ready` when it is, with given standard files."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(code: str, **kwargs: object) -> subprocess.Popen[bytes]:
        sign = tmp_path / f"sign{len(made)}"
        text = f"import os, socket, sys, time\n{code}"
        options: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
            "cwd": tmp_path,
            **kwargs,
        }
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", text, str(sign)],
            **options,  # type: ignore[call-overload]
        )
        made.append(child)
        deadline = time.monotonic() + LONG_S
        while not sign.exists():
            assert child.poll() is None and time.monotonic() < deadline, "it did not get ready"
            time.sleep(0.01)
        return child

    yield begin
    for child in made:
        for task in facts.tree(child.pid):
            procs.signal_process(procs.process_id(task), signal.SIGKILL)
        child.wait()


READY = "open(sys.argv[1], 'w').close()\n"
COUNT = (
    READY + "n = 0\nwhile True:\n    n += 1\n    os.write(1, b'%d\\n' % n)\n    time.sleep(0.01)\n"
)
SLEEP = READY + "while True:\n    time.sleep(0.05)\n"


# -- dump


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
    launched = await rig.restore(manifest, images, private=True)
    await rig.kill(launched.inner_pid)
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
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    outer, inner = os.pipe()
    child = process(COUNT, stdout=inner, stderr=inner)
    os.close(inner)
    assert os.read(outer, 100).startswith(b"1\n")
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
    os.close(outer)
    out = tmp_path / "krg-t.out"
    out.write_text("what was there\n")
    launched = await rig.restore(manifest, images)
    await _until(lambda: len(out.read_text().split()) > 10)
    lines = out.read_text().splitlines()
    assert lines[0] == "what was there"
    numbers = list(map(int, lines[1:-1]))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    again, images, _ = await rig.dump(launched.root.pid)
    await rig.kill(launched.root.pid)
    size = out.stat().st_size
    await rig.restore(again, images)
    await _until(lambda: out.stat().st_size > size)


async def test_what_was_piped_in_is_read_to_its_end(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
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
    await _end(child)
    os.close(outer)
    launched = await rig.restore(manifest, images)
    (tmp_path / "go").touch()
    with trio.fail_after(LONG_S):
        assert await keepers.ended(rig.keeper_dir, launched.root) == "exit 0"
    assert (tmp_path / "got").read_bytes() == b"not read yet"


async def test_a_socket_as_output_becomes_a_file(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    child = process(COUNT, stdout=theirs, stderr=theirs)
    theirs.close()
    manifest, images, report = await rig.dump(child.pid)
    assert any(option.words[0] == "--external" for option in report.options)
    await _end(child)
    ours.close()
    await rig.restore(manifest, images)
    await _until(lambda: (tmp_path / "krg-t.out").stat().st_size > 20)


async def test_a_terminal_of_a_session_leader(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    master, slave = pty.openpty()
    child = process(COUNT, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
    os.close(master)
    await rig.restore(manifest, images)
    await _until(lambda: (tmp_path / "krg-t.out").stat().st_size > 20)
    assert b"\r" not in (tmp_path / "krg-t.out").read_bytes()


async def test_output_goes_elsewhere_where_the_user_may_not_write(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    outer, inner = os.pipe()
    child = process(COUNT, stdout=inner, cwd="/sys")
    os.close(inner)
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
    os.close(outer)
    home = Path(os.path.expanduser("~root"))
    launched = await rig.restore(manifest, images)
    target = facts.link(launched.root.pid, "fd/1")
    assert target == os.fsencode(home / "krg-t.out")
    await rig.kill(launched.root.pid)
    (home / "krg-t.out").unlink()


# -- TCP


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
    plan = criu.restore_plan(
        rig.engine,
        manifest,
        images,
        Restart(image=ImageRef("t")),
        ROOT,
        private=False,
        directory=directory,
    )
    made = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keepers.launch, keepers.binary(), directory, plan)
        await _until(lambda: Path(directory, "rules.made").exists())
        made = True
        nursery.cancel_scope.cancel()
    assert made and rig.tables() == []
    assert not workload.tasks()
    await rig.restore(manifest, images)
    assert workload.finish() == "PASS"


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


async def test_a_tree_that_ends_with_its_dump_keeps_its_peer(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    peer, child = await _echo(process, tmp_path)
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
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    peer, child = await _echo(process, tmp_path)

    async def commit(_: DumpReport) -> None:
        raise EngineFailed("the store is gone")

    with pytest.raises(EngineFailed, match="the store is gone"):
        await rig.dump(child.pid, Checkpoint(tcp="keep", then=Then("kill")), commit=commit)
    peer.sendall(b"still there")
    assert peer.recv(100) == b"still there"
    assert rig.tables() == []
    peer.close()


async def test_cancelled_in_its_commit_a_tree_runs(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    peer, child = await _echo(process, tmp_path)
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
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    peer, child = await _echo(process, tmp_path)
    manifest, images, _ = await rig.dump(child.pid, Checkpoint(tcp="close"))
    peer.sendall(b"still there")
    assert peer.recv(100) == b"still there"
    await _end(child)
    peer.close()
    launched = await rig.restore(manifest, images)
    with trio.fail_after(LONG_S):
        assert await keepers.ended(rig.keeper_dir, launched.root) in ("exit 0", "exit 1")


# -- what goes wrong


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
    share: float, rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = process(BIG)
    images = rig.path / f"v{rig._count + 1}"

    async def end_it() -> None:
        pages = images / "pages-1.img"
        await _until(lambda: pages.stat().st_size >= share * (200 << 20))
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
    n = int((tmp_path / "n").read_text())
    await _until(lambda: int((tmp_path / "n").read_text()) > n + 10)
    manifest, images, _ = await rig.dump(child.pid, Checkpoint(tcp="keep"))
    await _end(child)
    n = int((tmp_path / "n").read_text())
    await rig.restore(manifest, images)
    await _until(lambda: int((tmp_path / "n").read_text()) > n + 10)


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
        await criu.dump(rig.engine, tree, images, options, rig.started, rig.done.append)
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
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = process(
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "open('port', 'w').write(str(s.getsockname()[1]))\n" + SLEEP
    )
    with socket.create_connection(("127.0.0.1", int((tmp_path / "port").read_text()))):
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
        await _until(lambda: facts.status(child.pid)[b"TracerPid"] != b"0")
        with pytest.raises(Unsupported, match="cannot be traced"):
            await rig.dump(child.pid)
    finally:
        tracer.terminate()
        await tracer.wait()


async def test_no_room(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = process(SLEEP)
    small = tmp_path / "small"
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
    await _end(child)
    assert criu.clashes({child.pid}) == []


async def test_files_that_changed(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    child = process("f = open('data', 'w')\nf.write('x')\nf.flush()\n" + SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
    (tmp_path / "data").write_text("more than before")
    with pytest.raises(CannotRunHere, match="/data has 16 bytes and had 1"):
        await rig.restore(manifest, images)
    (tmp_path / "data").unlink()
    with pytest.raises(CannotRunHere, match="/data cannot be opened"):
        await rig.restore(manifest, images)
    assert facts.task(child.pid) is None


async def test_a_damaged_image_is_told(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
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


# -- launches that are no restore


async def test_a_program_under_a_keeper(rig: Rig, tmp_path: Path) -> None:
    directory = keepers.directory(str(rig.path), "run")
    out = tmp_path / "out"
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
    await _end(child)
    launched = await rig.restore(manifest, images)
    places = {each.directory(launched.root.pid) for each in cgroups.hierarchies()}
    own = {place for place in places if place and "/krgfs/krg-t-" in place}
    assert own, "the tree is in no cgroup of its own"
    await rig.kill(launched.root.pid)
    assert await keepers.ended(rig.keeper_dir, launched.root) == "signal KILL"
    assert not any(os.path.exists(place) for place in own)


async def test_the_caller_s_cgroups(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(SLEEP)
    manifest, images, _ = await rig.dump(child.pid)
    await _end(child)
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


# -- helpers


async def _until(holds: Callable[[], object]) -> None:
    with trio.fail_after(LONG_S):
        while True:
            try:
                if holds():
                    return
            except FileNotFoundError:
                pass
            await trio.sleep(0.001)


async def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with trio.fail_after(LONG_S):
        await trio.to_thread.run_sync(child.wait)


async def _echo(
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
