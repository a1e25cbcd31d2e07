"""The process that feeds a tree which runs before its memory is back: `DIRECTORY LISTENER-FD`.

Two processes, the holder and the worker it forks, which does the feeding. They share one table of
descriptors (CLONE_FILES), so that the userfaultfds outlive either, also one that the kernel made
for a forked child the instant before. What dies, and then:

* the worker: tasks wait at their faults; the holder starts another, WORKERS times in all, which
  begins anew with what the journal says;
* the holder: the worker goes on to the end, and no other would take its place;
* the source (Damaged), or one worker after the other: the tree is killed. Its descriptors are
  closed only once none of its address spaces lives;
* both at once: the kernel gives zeros for all that is not back yet. So they ignore polite signals,
  have the OOM killer look elsewhere, and are in no cgroup or session of the tree;
* either before CRIU is done: should nobody be left, CRIU misses us and fails the restore.

Modules that take long to import are left to the agent: CRIU runs already.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from krgfs import facts
from krgfs.errors import Damaged

from . import feeder_uffd as uffd
from . import texts
from .feeder_journal import CLOSED, TASK, Journal
from .feeder_pages import Run
from .feeder_source import open_source
from .feeder_worker import Worker, total_bytes

SPEC, PROGRESS, HOLDER, WORKER = "feeder.spec", "feeder.progress", "feeder.holder", "feeder.worker"
CALL_S = 120.0  # from our start to CRIU's call; that comes early in a restore
WORKERS = 5
ENDS_TREE = 3  # the exit code of a worker that knows that no other would do better
FINISHED = 0x52535446  # LAZY_PAGES_RESTORE_FINISHED of CRIU's uffd.c, in place of a pid
NUMBER = struct.Struct("=i")
CLONE_FILES = 0x400
SYS_CLONE = {"x86_64": 56, "aarch64": 220}
KILL_AGAIN_S = 0.01

log = logging.getLogger("feeder")


class Spec(msgspec.Struct, frozen=True):
    """What is to be fed: the source of the pages, the directory of the tree's keeper, how many
    processes the image has, and by their pids there what the memory of each lacks and at which
    address to begin: at its arguments and environment, which ps and others read from outside
    without waiting (they see nothing where nothing is)."""

    source: str
    keeper: str
    processes: int
    runs: dict[int, list[Run]]
    begins: dict[int, int]


# -- what others may read


class Progress:
    """DIRECTORY/feeder.progress: `state` is feeding, done or failed, then with `reason`."""

    def __init__(self, directory: Path, total: int) -> None:
        self._path = directory / PROGRESS
        self._done, self._total = 0, total

    def say(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._write("feeding")

    def done(self) -> None:
        self._done = self._total
        self._write("done")

    def failed(self, reason: str) -> None:
        self._write("failed", reason)

    def _write(self, state: str, reason: str = "") -> None:
        part = self._path.with_suffix(".part")
        said = {"state": state, "done": self._done, "total": self._total, "reason": reason}
        with contextlib.suppress(OSError):  # a full disk ends no tree
            part.write_text(json.dumps(said))
            part.replace(self._path)


# -- the holder


def main() -> None:
    directory, listener = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s", level=logging.INFO)
    _become_hard_to_kill()
    _record(directory / HOLDER)
    spec = msgspec.msgpack.decode((directory / SPEC).read_bytes(), type=Spec)
    progress = Progress(directory, total_bytes(spec.runs.values()))
    progress.say(0, total_bytes(spec.runs.values()))
    journal = Journal()
    listener.settimeout(CALL_S)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return
    listener.close()
    connection.settimeout(None)
    _receive(connection, spec.processes, journal)
    _hold(directory, spec, journal, connection, progress)


def _become_hard_to_kill() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # without CAP_SYS_RESOURCE
        Path("/proc/self/oom_score_adj").write_text("-1000")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each that is forked
    sys.setswitchinterval(0.0005)  # a fault waits for no thread that fills


def _record(path: Path) -> None:
    task = facts.task(os.getpid())
    with contextlib.suppress(OSError):
        path.write_text(f"{os.getpid()} {task.start if task else 0}\n")


def _receive(connection: socket.socket, processes: int, journal: Journal) -> None:
    """Take the userfaultfd of every process: its pid comes first, negative and alone for one that
    has ended (send_uffd of CRIU's uffd.c). A CRIU that hangs up before has failed, or was killed:
    what came is fed all the same, until nobody needs it."""
    for _ in range(processes):
        word = connection.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(word) < NUMBER.size or NUMBER.unpack(word)[0] == FINISHED:
            log.warning("hung_up")
            return
        (pid,) = NUMBER.unpack(word)
        if pid > 0:
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            if not fds:
                return
            journal.task(fds[0], pid)


def _hold(
    directory: Path, spec: Spec, journal: Journal, connection: socket.socket, progress: Progress
) -> NoReturn:
    why = ""
    for _ in range(WORKERS):
        _close_all_but(connection.fileno(), *_userfaultfds(journal))
        pid = clone_sharing_files()
        if pid == 0:
            _work(directory, spec, journal, connection, progress)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            os._exit(0)
        if code == ENDS_TREE:
            os._exit(1)
        why = f"its workers died, the last with {code}"
        log.error("worker_died pid=%d code=%d", pid, code)
        if not journal.is_whole:
            why = f"a worker died with {code} after too many events"
            break
    progress.failed(why)
    _end_tree(spec.keeper, why)
    os._exit(1)


def clone_sharing_files() -> int:
    """Fork as os.fork does, but so that parent and child have one table of descriptors: what either
    opens or is given the other has too, and what either closes is closed. Only from the single
    thread of a process."""
    python = ctypes.pythonapi
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    number = SYS_CLONE[platform.machine()]
    python.PyOS_BeforeFork()
    pid: int = syscall(number, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "cannot clone")
    return pid


def _userfaultfds(journal: Journal) -> set[int]:
    found = set()
    for fd, told in journal.replayed():
        if told.kind == TASK:
            found.add(fd)
        elif told.kind == CLOSED:
            found.discard(fd)
        elif told.kind == uffd.FORK:
            found.add(told.a)
    return found


def _close_all_but(*kept: int) -> None:
    """Close what a dead worker has left open."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)


# -- the worker


def _work(
    directory: Path,
    spec: Spec,
    journal: Journal,
    connection: socket.socket,
    progress: Progress,
) -> NoReturn:
    """Never returns, and leaves by _exit: what an orderly end closes the holder may still need."""
    code = 1
    try:
        _record(directory / WORKER)
        source = open_source(spec.source)
        Worker(journal, spec.runs, spec.begins, source, connection, progress.say).run()
        progress.done()
        code = 0
    except Damaged as exc:
        progress.failed(exc.message)
        _end_tree(spec.keeper, exc.message)
        code = ENDS_TREE
    except BaseException:
        log.exception("defect")
    finally:
        os._exit(code)


# -- the end of a tree


def _end_tree(keeper: str, why: str) -> None:
    """Kill all that is below a keeper, and return when no address space is left that we fill.

    Never before: a tree that cannot be killed waits, as we do, and goes on with nothing wrong.
    """
    log.error("ends_tree keeper=%s reason=%s", keeper, why)
    fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
    left = {fd for fd in fds if fd > 2 and _is_userfaultfd(fd)}
    while left := {fd for fd in left if not uffd.is_gone(fd)}:
        for pid, start in _tasks_below(keeper):
            with contextlib.suppress(ProcessLookupError), _pidfd(pid) as pidfd:
                if facts.exists(pid, start):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        time.sleep(KILL_AGAIN_S)


def _is_userfaultfd(fd: int) -> bool:
    try:
        return uffd.is_one(fd)
    except OSError:
        return False


def _tasks_below(keeper: str) -> Iterator[tuple[int, int]]:
    """Yield pid and start time of all that descends from a keeper: whoever loses its parent becomes
    the keeper's child. Where that one has been killed, of all that descends from the root."""
    pid, start = _numbers(keeper, "keeper")
    if facts.is_alive(pid, start):
        tasks = facts.tree(pid)[1:]
    else:
        root = facts.task(_numbers(keeper, "root")[0])
        ended = texts.read(os.path.join(keeper, "status"))
        tasks = facts.tree(root.pid) if root and root.start >= start and not ended else ()
    yield from ((task.pid, task.start) for task in tasks)


def _numbers(directory: str, name: str) -> tuple[int, int]:
    words = texts.read(os.path.join(directory, name)).split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return 0, 0
    return int(words[0]), int(words[1])


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
