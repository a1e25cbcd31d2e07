"""The workloads pass when nothing is done to them, and fail when something is: each can tell."""

from __future__ import annotations

import copy
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.workloads import harness
from tests.workloads.harness import Workload, start
from tests.workloads.judge import AppendLog

NEEDS = {"node_counter": "node", "Counter": "java", "small": "gcc", "redisload": "redis-server"}
OTHER_USER = ("4242", "4243", "4244,4245")
WORDS = {
    "otheruid": OTHER_USER,
    "deleted": ("file", "directory", "linked"),
    "execs": ("vfork",),
    "memory": ("4", "0.5"),
}
ALL = sorted(path.stem for path in harness.HERE.iterdir() if path.suffix in (".js", ".java", ".c"))
ALL += sorted(
    path.stem
    for path in harness.HERE.glob("*.py")
    if path.stem not in ("harness", "judge", "blocks", "__init__")
)

PIDFD_GETFD = 438  # the same on every architecture

Begin = Callable[..., Workload]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any user can reach, which tmp_path is not, with a short name for sockets."""
    path = Path(tempfile.mkdtemp(prefix="workload-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def begin(directory: Path, need: Callable[..., None]) -> Iterator[Begin]:
    """Start a workload and bring it to where it works; whatever is left of it is ended."""
    begun: list[Workload] = []

    def go(name: str, *words: object) -> Workload:
        if tool := NEEDS.get(name):
            need(tool)
        if name == "otheruid" and os.getuid() != 0:
            pytest.skip("otheruid needs root to become somebody else")
        if name == "selfckpt" and not words:
            words = (answering(directory, "blast.4242.n1/v3"),)
        workload = start(name, directory, *(words or WORDS.get(name, ())))
        begun.append(workload)
        workload.wait_ready().wait_progress()
        return workload

    yield go
    for workload in begun:
        workload.close()
        assert workload.tasks() == []


def answering(directory: Path, outcome: str) -> Path:
    """Make a file that reads `outcome` behind a written `1` and newline, as a verb file does."""
    path = directory / "checkpoint"
    path.write_text(f"1\n{outcome}\n")
    return path


@pytest.mark.parametrize("name", ALL)
def test_passes_undisturbed(begin: Begin, name: str) -> None:
    workload = begin(name)
    assert workload.pid in workload.tree()
    assert workload.alive()
    assert workload.finish() == "PASS", workload.said()
    assert not workload.alive()


def test_is_judged_also_when_it_is_no_child_of_ours(begin: Begin, directory: Path) -> None:
    workload = begin("counter")
    tree = workload.tree()
    workload.signal(signal.SIGKILL)
    workload.wait_gone(tree)
    (directory / "ready").unlink()
    script = '"$0" "$@" </dev/null >/dev/null 2>&1 &'
    again = ["/bin/sh", "-c", script, sys.executable]
    again += [str(harness.HERE / "counter.py"), str(directory)]
    subprocess.run(again, env={"WORKLOAD_ID": workload.identity}, check=True)
    workload.wait_ready().wait_progress()
    assert workload.tree() != tree
    assert workload.finish() == "PASS"


def test_without_a_verdict_it_has_failed(begin: Begin) -> None:
    workload = begin("counter")
    workload.signal(signal.SIGKILL)
    assert workload.finish().startswith("FAIL: counter ")


def test_only_its_own_are_signalled(begin: Begin) -> None:
    workload = begin("counter")
    workload.adopt(os.getpid())
    assert not workload.alive()
    assert not workload.signal(signal.SIGKILL)


@contextmanager
def borrowed(workload: Workload, link: str, number: int | None = None) -> Iterator[int]:
    """Give one of its descriptors, the very one that it has open."""
    table = Path(f"/proc/{workload.pid}/fd")
    found = next(
        int(fd.name)
        for fd in table.iterdir()
        if link in os.readlink(fd) and number in (None, int(fd.name))
    )
    pidfd = os.pidfd_open(workload.pid)
    fd = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, found, 0)
    os.close(pidfd)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    yield fd
    os.close(fd)


# What somebody does to a workload from outside, and a part of what it says then.


def lose_lines(workload: Workload) -> None:
    log = workload.directory / "log"
    os.truncate(log, log.stat().st_size // 60 * 30)


def write_into_log(workload: Workload) -> None:
    with (workload.directory / "log").open("ab") as file:
        file.write(b"something else\n")


def put_old_records_back(workload: Workload) -> None:
    table = workload.directory / "table"
    old = table.read_bytes()
    workload.wait_progress(70)
    workload.signal(signal.SIGSTOP)
    table.write_bytes(old)
    workload.signal(signal.SIGTERM)
    workload.signal(signal.SIGCONT)


def release_lock(workload: Workload) -> None:
    with borrowed(workload, "/flocked") as fd:
        fcntl.flock(fd, fcntl.LOCK_UN)


def kill_member(workload: Workload) -> None:
    workload.signal(signal.SIGKILL, workload.tree()[-1])


def steal_message(workload: Workload) -> None:
    ends = [fd for pid in workload.tasks() for fd in Path(f"/proc/{pid}/fd").iterdir()]
    pipe = next(end for end in ends if end.is_fifo())
    with pipe.open("rb", buffering=0) as file:
        assert len(file.read(64)) == 64


def poke(fact: str, offset: int) -> Callable[[Workload], None]:
    """Return what changes one byte of memory at an address that the workload tells."""

    def change(workload: Workload) -> None:
        at = int(workload.facts[fact], 16) + offset
        with open(f"/proc/{workload.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(at)
            (byte,) = memory.read(1)
            memory.seek(at)
            memory.write(bytes([byte ^ 0x10]))

    return change


def write_into_shm(workload: Workload) -> None:
    with open(workload.facts["linked"], "r+b") as file:
        file.seek(5 * 4096 + 100)
        file.write(b"?")


def write_into_deleted(workload: Workload) -> None:
    with borrowed(workload, "/file (deleted)") as fd:
        os.pwrite(fd, b"????", 90_000)


def stop_timer(workload: Workload) -> None:
    with borrowed(workload, "[timerfd]") as fd:
        ctypes.CDLL(None).timerfd_settime(fd, 0, (ctypes.c_long * 4)(), None)


def remove_socket(workload: Workload) -> None:
    os.unlink(workload.facts["path"])


def stop_listening(workload: Workload) -> None:
    with borrowed(workload, "socket:") as fd, socket.socket(fileno=os.dup(fd)) as listener:
        listener.shutdown(socket.SHUT_RDWR)


def take_semaphore(workload: Workload) -> None:
    with borrowed(workload, "[eventfd]", int(workload.facts["resting"])) as fd:
        os.eventfd_read(fd)


def change_terminal(workload: Workload) -> None:
    assert workload.terminal is not None
    fd = os.open(workload.terminal, os.O_RDWR | os.O_NOCTTY)
    settings = termios.tcgetattr(fd)
    settings[3] ^= termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, settings)
    os.close(fd)


def signal_children(workload: Workload) -> None:
    """Kill children until one of them is hit while it still runs."""
    while workload.alive():
        for pid in workload.tree()[1:]:
            workload.signal(signal.SIGUSR1, pid)


SABOTAGE = [
    ("counter", lose_lines, "has lost"),
    ("counter", write_into_log, "wrong"),
    ("counter", put_old_records_back, "older than"),
    ("node_counter", lose_lines, "has lost"),
    ("otheruid", lose_lines, "has lost"),
    ("locks", release_lock, "the flock is lost"),
    ("proctree", kill_member, ""),
    ("proctree", steal_message, "came where"),
    ("threads", poke("chains", 17 * 8), "thread 17"),
    ("memory", poke("address", 300 * 4096 + 2000), "page 300 is damaged"),
    ("sharedmem", write_into_shm, "page 5 of the linked shm is damaged"),
    ("sharedmem", kill_member, "the member that answers is gone"),
    ("deleted", write_into_deleted, "changed at byte 90000"),
    ("timers", stop_timer, "the timerfd has stopped"),
    ("unixserver", remove_socket, "FileNotFoundError"),
    ("tcpserver", kill_member, ""),
    ("tcplisten", stop_listening, "OSError"),
    ("epoll", take_semaphore, "the semaphore held 4, not 5"),
    ("ptyjob", change_terminal, "the terminal is set otherwise"),
    ("execs", signal_children, f"ended with {-signal.SIGUSR1}"),
]


STILL = {"memory": ("16", "0")}  # a page that is written anew is whole again


@pytest.mark.parametrize(("name", "harm", "told"), SABOTAGE)
def test_fails_when_it_is_harmed(
    begin: Begin, name: str, harm: Callable[[Workload], None], told: str
) -> None:
    workload = begin(name, *STILL.get(name, ()))
    harm(workload)
    verdict = workload.finish()
    assert verdict.startswith("FAIL: ")
    assert told in verdict


def test_fails_when_it_was_told_of_an_error(begin: Begin, directory: Path) -> None:
    workload = begin("selfckpt", answering(directory, "error EIO it broke"))
    assert workload.finish() == "FAIL: the outcome was 'error EIO it broke'"
    assert (directory / "outcomes").read_text() == "error EIO it broke\n"


def test_log_that_ran_on_before_its_last_line_is_cut_back(tmp_path: Path) -> None:
    file = tmp_path / "log"
    log = AppendLog(str(file))
    log.append()
    image = copy.copy(log)
    for _ in range(3):
        log.append()
    ran_on = file.read_bytes()
    image.append()
    file.write_bytes(ran_on + file.read_bytes()[-30:])
    image.append()
    image.check()
    file.write_bytes(ran_on + ran_on[:30])
    with pytest.raises(AssertionError, match="has a wrong"):
        image.check()


def test_log_that_ran_on_is_cut_back_to_what_memory_knows(tmp_path: Path) -> None:
    log = AppendLog(str(tmp_path / "log"))
    log.append()
    image = copy.copy(log)
    for _ in range(3):
        log.append()
    image.append()
    image.check()
    assert (tmp_path / "log").stat().st_size == 2 * 30
    with pytest.raises(AssertionError, match="has lost its last 60 bytes"):
        log.check()
