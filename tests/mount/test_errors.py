"""Every errno of the table, produced for real: the sentence in the file, and nothing changed.

A sentence says what, on what, why and what to do: each way below names a word of each part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from krgfs import errors, facts
from tests.faults import harm
from tests.mount.conftest import Start, typing, wait_blocked
from tests.sites import Site, sleeper, until
from tests.workloads.harness import Workload

NOT_YET = {
    errors.TimedOut: "there is no other node yet that could be late",
    errors.Fenced: "two agents on one state directory are kept apart by a lock; nodes come later",
}


class Told(NamedTuple):
    """How a command was refused: the errno that write gave, and what the file reads back."""

    number: int
    line: str


class Ground(NamedTuple):
    """What a way has to work with."""

    site: Site
    tree: Workload
    start: Start
    tmp: Path
    stack: contextlib.ExitStack

    @property
    def place(self) -> Path:
        return self.site.proc(self.tree.pid)

    def tell(self, path: Path, line: str) -> Told:
        fd = os.open(path, os.O_RDWR)
        try:
            os.write(fd, line.encode())
        except OSError as exc:
            return Told(exc.errno or 0, os.read(fd, 8192).decode().rstrip("\n"))
        finally:
            os.close(fd)
        return Told(0, path.read_text())

    def image(self, name: str) -> None:
        """Make an image of the tree and end the tree."""
        assert self.tell(self.place / "checkpoint", f"then=kill name={name}").number == 0
        self.tree.wait_gone([self.tree.pid])


def large(ground: Ground, mib: int) -> Path:
    """Start a process whose checkpoint takes a while; returns its verb file."""
    hold = f"import time; held = bytearray(b'x') * ({mib} << 20); print(flush=True);"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{hold} time.sleep(1000)"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ground.stack.enter_context(process)
    ground.stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return ground.site.proc(process.pid) / "checkpoint"


def bad_words(ground: Ground) -> Told:
    return ground.tell(ground.place / "checkpoint", "then=fly")


def gone(ground: Ground) -> Told:
    return ground.tell(ground.site.mnt / "restart", "nobody.knows/v3")


def not_yours(ground: Ground) -> Told:
    pid = ground.stack.enter_context(sleeper(user=61001, group=61001, extra_groups=[], cwd="/"))
    ground.tell(ground.site.proc(pid) / "checkpoint", "name=annas")
    return ground.tell(ground.place / "checkpoint", "name=annas")


def busy(ground: Ground) -> Told:
    path = large(ground, 300)
    ground.tell(path, "async name=large")
    return ground.tell(path, "name=other")


def unsupported(ground: Ground) -> Told:
    server = ground.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    script = "import socket, sys, time\n"
    script += f"s = socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\n"
    script += "time.sleep(1000)"
    client = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ground.stack.callback(client.wait)
    ground.stack.callback(client.kill)
    accepted, _ = server.accept()
    ground.stack.enter_context(accepted)
    return ground.tell(ground.site.proc(client.pid) / "checkpoint", "1")


def try_again(ground: Ground) -> Told:
    """A task that waits in a mount of another agent: ours cannot have it answered."""
    other = ground.stack.enter_context(Site())
    writer = ground.stack.enter_context(
        typing(other, f"dash -c 'echo 1 > $K/procs/{ground.tree.pid}/wait'; sleep 1000")
    )
    wait_blocked(writer.pid, "wait")
    ground.stack.callback(lambda: os.killpg(writer.pid, signal.SIGKILL))
    return ground.tell(ground.site.proc(writer.pid) / "freeze", "1")


def cannot_run_here(ground: Ground) -> Told:
    program = ground.tmp / "program"
    shutil.copy("/usr/bin/sleep", program)
    process = subprocess.Popen(
        [str(program), "1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ground.stack.callback(process.kill)
    path = ground.site.proc(process.pid) / "checkpoint"
    assert ground.tell(path, "then=kill name=moved").number == 0
    process.wait()
    program.unlink()
    return ground.tell(ground.site.mnt / "restart", "moved")


def exists(ground: Ground) -> Told:
    ground.tell(ground.place / "checkpoint", "name=alive")
    return ground.tell(ground.site.mnt / "restart", "alive")


def unreachable(ground: Ground) -> Told:
    ground.site.stop_agent()
    told = ground.tell(ground.place / "checkpoint", "1")
    come_back(ground.site)
    return told


def come_back(site: Site, *options: str) -> None:
    """Start the agent of a site whose mount is there."""
    site.start_agent(*options)
    state = site.mnt / "nodes" / "n1" / "state"
    until(lambda: state.read_text().startswith("online"), "the mount has its agent again")


def no_room(ground: Ground) -> Told:
    """The store is on a filesystem of its own, which is small."""
    ground.site.stop_agent()
    store = ground.site.state / "images"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "krg", str(store)], check=True)
    ground.stack.callback(come_back, ground.site)
    ground.stack.callback(lambda: subprocess.run(["umount", "-l", str(store)], check=True))
    ground.stack.callback(ground.site.stop_agent)
    come_back(ground.site)
    return ground.tell(ground.place / "checkpoint", "1")


def over_quota(ground: Ground) -> Told:
    ground.site.stop_agent()
    ground.stack.callback(come_back, ground.site)
    ground.stack.callback(ground.site.stop_agent)
    come_back(ground.site, "--quota=1K")
    return ground.tell(ground.place / "checkpoint", "1")


def damaged(ground: Ground) -> Told:
    ground.image("broken")
    harm.chunks(ground.site, "broken/v1", "pages-*.img")[-1].flip()
    return ground.tell(ground.site.mnt / "restart", "broken")


def part_of_it(ground: Ground) -> Told:
    script = f"exec 3<>{ground.site.mnt}/procs/$$/freeze; echo 1 >&3; cat <&3"
    done = ground.site.sh(script)
    number = errno.EDEADLK if "Resource deadlock avoided" in done.stderr else 0
    return Told(number, done.stdout.rstrip("\n"))


def cancelled(ground: Ground) -> Told:
    path = large(ground, 500)
    script = f"trap : ALRM; exec 3<>{path}; echo 1 >&3; cat <&3"
    with typing(ground.site, script) as writer:
        until(lambda: "phase dumping" in ground.site.read(path.parent / "job/status"), "dumping")
        writer.send_signal(signal.SIGALRM)
        out, err = writer.communicate(timeout=30)
    number = errno.EINTR if "Interrupted system call" in err else 0
    return Told(number, out.rstrip("\n"))


def withdrawn(ground: Ground) -> Told:
    path = large(ground, 500)
    with typing(ground.site, f"exec 3<>{path}; echo 1 >&3; cat <&3") as writer:
        until(lambda: "phase dumping" in ground.site.read(path.parent / "job/status"), "dumping")
        ground.site.write(path.parent / "job" / "cancel", "1")
        out, err = writer.communicate(timeout=30)
    number = errno.ECANCELED if "Operation canceled" in err else 0
    return Told(number, out.rstrip("\n"))


def engine_failed(ground: Ground) -> Told:
    path = large(ground, 500)
    with typing(ground.site, f"exec 3<>{path}; echo 1 >&3; cat <&3") as writer:
        assert ground.site.agent is not None
        agent = ground.site.agent.pid

        def engine() -> int:
            found = (task.pid for task in facts.tree(agent)[1:] if task.comm == b"criu")
            return next(found, 0)

        os.kill(int(str(until(engine, "CRIU at work"))), signal.SIGKILL)
        out, err = writer.communicate(timeout=30)
    number = errno.EIO if "Input/output error" in err else 0
    return Told(number, out.rstrip("\n"))


class Way(NamedTuple):
    make: Callable[[Ground], Told]
    says: tuple[str, ...]


WAYS: dict[type[errors.KrgError], Way] = {
    errors.EngineFailed: Way(engine_failed, ("cannot dump tree", "signal KILL", "try again")),
    errors.BadWords: Way(bad_words, ("checkpoint: then: 'fly'", "none of run, stop, kill")),
    errors.Gone: Way(gone, ("no app nobody.knows", "ls /krg/images shows them")),
    errors.NotYours: Way(not_yours, ("the name annas", "belongs to uid 61001", "another name=")),
    errors.Busy: Way(busy, ("is held by jobs/", "(checkpoint, ", "wait for it, or write 1")),
    errors.Unsupported: Way(unsupported, ("cannot dump tree", "TCP", "tcp=close")),
    errors.TryAgain: Way(try_again, ("tree", "try again")),
    errors.CannotRunHere: Way(cannot_run_here, ("cannot restart moved/v1", "/program")),
    errors.Exists: Way(exists, ("alive lives already", "as process", "end that one first")),
    errors.Unreachable: Way(unreachable, ("the agent of this node", "krg up")),
    errors.NoRoom: Way(no_room, ("are free in the image store", "rmdir")),
    errors.OverQuota: Way(over_quota, ("1.0 KiB", "--quota", "rmdir")),
    errors.Damaged: Way(damaged, ("broken/v1 is damaged", "pages-", "another version")),
    errors.PartOfIt: Way(part_of_it, ("is part of the tree", "nobody would be left", "outside")),
    errors.Cancelled: Way(cancelled, ("a signal waits for the caller", "is being cancelled")),
    errors.Withdrawn: Way(withdrawn, ("jobs/", "cancelled", "uid 0 wrote to its cancel")),
}


@pytest.fixture(scope="module")
def reached() -> Iterator[Site]:
    with Site() as made:
        yield made


def test_the_table_is_complete() -> None:
    assert not set(WAYS) & set(NOT_YET)
    missing = [each.__name__ for each in errors.ALL if each not in WAYS and each not in NOT_YET]
    assert missing == []


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: errors.name_of(kind.errno))
def test_an_error_says_all_and_changes_nothing(
    reached: Site, start: Start, tmp_path: Path, kind: type[errors.KrgError]
) -> None:
    way, tree = WAYS[kind], start("small")
    with contextlib.ExitStack() as stack:
        told = way.make(Ground(reached, tree, start, tmp_path, stack))
        print(told.line)
        assert told.number == kind.errno
        assert told.line.startswith(f"error {errors.name_of(kind.errno)} ")
        for part in way.says:
            assert part in told.line, part
        assert "\n" not in told.line and "Traceback" not in told.line
        if kind is not errors.Damaged:
            assert reached.facts(reached.proc(tree.pid) / "status")["state"] == "running"
            tree.wait_progress()
    until(lambda: not spools(reached), "nothing left of any attempt")


def spools(site: Site) -> list[Path]:
    """Return what there is of unfinished dumps and restores."""
    return list((site.state / "spool").iterdir())
