"""Starting and ending the two daemons of a node where no init does it: `krg up` and `krg down`.

Each runs under a `krg-keeper respawn` of its own, which starts it again when it dies; the pidfile
in the run directory is the respawner's. Neither daemon's end touches a user process, so one whose
respawner was killed, an orphan, is ended and started again under another.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from . import facts
from .cli_criu import SBIN
from .cli_files import Files
from .errors import Busy, EngineFailed, KrgError, NotYours, TimedOut

STATE, RUN = "/var/lib/krgfs", "/run/krgfs"
AGENT, MOUNT = "agent", "mount"
PROGRAMS = {AGENT: "krg-agent", MOUNT: "krgfs"}
UNITS = ("krg-agent.service", "krgfs.service")
UP_S = 30.0
ENDS_S = {AGENT: 60.0, MOUNT: 15.0}
LOOK_S = 0.02
DIED = "starts again in"


class Places(NamedTuple):
    """Where a node keeps things: state for ever, run until the next boot, and its mountpoint."""

    state: str = STATE
    run: str = RUN
    mount: str = "/krg"

    @property
    def socket(self) -> str:
        return os.path.join(self.run, "agent.sock")

    def pidfile(self, daemon: str) -> str:
        return os.path.join(self.run, f"{daemon}.pid")

    def log(self, daemon: str) -> str:
        return os.path.join(self.state, "log", f"{daemon}.log")


class Up(NamedTuple):
    """What `up` found or made: `started` names the daemons that it had to start."""

    node: str
    agent: int
    started: tuple[str, ...]
    criu: str


class Down(NamedTuple):
    """What `down` ended, and how many trees live on under keepers or stay frozen."""

    ended: tuple[str, ...]
    kept: int
    frozen: int


# -- who is there


def node_online(places: Places) -> str:
    """Return the name of this node when the mount answers and has its agent, else an empty one."""
    files = Files(places.mount)
    try:
        name = files.pairs("self", "status").get("node", "")
        state = files.line("nodes", name, "state").split() if name else []
    except KrgError:
        return ""
    return name if state and state[0] not in ("failed", "left") else ""


def agent_pid(places: Places) -> int:
    """Return the pid of the agent that answers at the socket, 0 when none does (unix(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(2.0)
        try:
            line.connect(places.socket)
            raw = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return 0
    return int(struct.unpack("3i", raw)[0])


@contextmanager
def respawner(places: Places, daemon: str) -> Iterator[tuple[int, int] | None]:
    """Enter the block with pid and pidfd of a daemon's respawner, None when there is none.

    The pidfd is opened before we look whose it is: it cannot come to mean another process.
    """
    pid = _noted(places, daemon)
    with _held(pid) as pidfd:
        is_it = pidfd is not None and is_respawner(arguments(pid), places.pidfile(daemon))
        yield (pid, pidfd) if pidfd is not None and is_it else None


@contextmanager
def orphan(places: Places, daemon: str) -> Iterator[tuple[int, int] | None]:
    """Enter the block with pid and pidfd of a daemon whose respawner was killed, None when there is
    none. A daemon that somebody else started is never one.

    It is known by its session, which was the respawner's: as long as a session has members, no
    new process gets its number (setsid(2), credentials(7)).
    """
    leader = _noted(places, daemon)
    pid = 0 if not leader or arguments(leader) else _in_session(leader, PROGRAMS[daemon])
    with _held(pid) as pidfd:
        is_it = pidfd is not None and _runs(pid, PROGRAMS[daemon])
        yield (pid, pidfd) if pidfd is not None and is_it else None


def _noted(places: Places, daemon: str) -> int:
    """Return the pid in a daemon's pidfile, 0 when there is none."""
    try:
        with open(places.pidfile(daemon), encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


@contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """Enter the block with a pidfd, None when there is no such process."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _in_session(leader: int, program: str) -> int:
    """Return the process of a session that runs a program of ours, 0 when none does. Not a child of
    it, which looks the same until it has become what it was forked for."""
    members = {task.pid: task.ppid for task in facts.processes() if task.sid == leader}
    found = (pid for pid, parent in members.items() if parent not in members)
    return next((pid for pid in found if _runs(pid, program)), 0)


def _runs(pid: int, program: str) -> bool:
    """Tell whether a process runs a program of ours, which may stand after its interpreter."""
    return any(os.path.basename(each) == program for each in arguments(pid)[:2])


def arguments(pid: int) -> list[str]:
    """Return the arguments of a process, none for one that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).split("\0")[:-1]
    except OSError:
        return []


def is_respawner(words: list[str], pidfile: str) -> bool:
    """Tell from its arguments whether a process is the respawner that wrote this pidfile."""
    return words[1:2] == ["respawn"] and pidfile in words


def has_ended(pidfd: int, wait_s: float) -> bool:
    """Wait for the end of a process (pidfd_open(2)); tells whether it came."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


# -- up


def up(places: Places, node: str = "", criu: str = "") -> Up:
    """Have agent and mount running and answering; starts what is missing, and nothing twice.

    An orphan is ended in order, and started again with the words that it had. Raises TimedOut or
    EngineFailed, with what the daemon said, after ending what was started.
    """
    if (name := node_online(places)) and (pid := agent_pid(places)) and not _has_orphan(places):
        return _found(places, name, pid, ())
    if os.geteuid():
        raise NotYours("krgfs is not up, and only root can start it: run `krg up` as root")
    commands = {
        AGENT: _agent_command(places, node, criu),
        MOUNT: [program("krgfs"), places.mount, "--socket", places.socket],
    }
    is_there: Mapping[str, Callable[[], bool]] = {
        AGENT: lambda: bool(agent_pid(places)),
        MOUNT: lambda: answers(places.mount),
    }
    with _alone(places):
        started: list[str] = []
        marks = {each: _size(places.log(each)) for each in commands}
        try:
            for daemon, command in commands.items():
                words = _end_orphan(places, daemon)
                with respawner(places, daemon) as running:
                    if running is None and not is_there[daemon]():
                        started.append(daemon)
                        _start(places, daemon, command if words is None else [command[0], *words])
            name, pid = _await(places, marks)
        except KrgError:
            for daemon in reversed(started):
                _end(places, daemon, ENDS_S[MOUNT])
            raise
    return _found(places, name, pid, tuple(started))


def program(name: str) -> str:
    """Return the path of a program of ours: beside the Python that runs this."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    found = beside if os.access(beside, os.X_OK) else shutil.which(name)
    if not found:
        raise EngineFailed(f"{name} is not beside {sys.executable}: install krgfs there (pip)")
    return found


def keeper() -> str:
    """Return the path of krg-keeper, which is built with the package."""
    spec = importlib.util.find_spec("agent")
    if spec is not None and spec.origin:
        found = os.path.join(os.path.dirname(spec.origin), "krg-keeper")
        if os.access(found, os.X_OK):
            return found
    raise EngineFailed("krg-keeper was not built: install krgfs again, with a C compiler (gcc)")


def answers(mount: str) -> bool:
    """Tell whether a krgfs is mounted and alive."""
    try:
        Files(mount).require()
    except KrgError:
        return False
    return True


def _has_orphan(places: Places) -> bool:
    for daemon in PROGRAMS:
        with orphan(places, daemon) as found:
            if found:
                return True
    return False


def _agent_command(places: Places, node: str, criu: str) -> list[str]:
    found = [program("krg-agent"), "--state", places.state, "--run", places.run]
    found += ["--node", node or socket.gethostname().partition(".")[0]]
    return [*found, "--criu", criu] if criu else found


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Enter the block as the only `up` or `down` of this run directory."""
    os.makedirs(places.run, mode=0o755, exist_ok=True)
    fd = os.open(os.path.join(places.run, "up.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _start(places: Places, daemon: str, command: list[str]) -> None:
    log = places.log(daemon)
    os.makedirs(places.state, mode=0o711, exist_ok=True)
    os.makedirs(os.path.dirname(log), mode=0o700, exist_ok=True)
    own = ["--name", os.path.basename(command[0]), "--pidfile", places.pidfile(daemon)]
    done = subprocess.run(
        [keeper(), "respawn", *own, "--log", log, "--", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PATH": SBIN, "LANG": "C.UTF-8"},  # daemons do not live in the caller's environment
        cwd="/",
        umask=0o022,
        check=False,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().removeprefix("error ")
        raise EngineFailed(f"cannot start the {daemon}: {said or 'krg-keeper failed'}")


def _await(places: Places, marks: Mapping[str, int]) -> tuple[str, int]:
    """Return this node's name and its agent's pid as soon as all answers; raises with a daemon's
    words if one dies."""
    end = time.monotonic() + UP_S
    while not (name := node_online(places)) or not (pid := agent_pid(places)):
        for daemon in (AGENT, MOUNT):
            said = _said(places.log(daemon), marks[daemon])
            if DIED in said:
                raise EngineFailed(f"the {daemon} does not start; it said:\n{_tail(said)}")
        if time.monotonic() > end:
            raise TimedOut(_silence(places, marks))
        time.sleep(LOOK_S)
    return name, pid


def _silence(places: Places, marks: Mapping[str, int]) -> str:
    """Return which daemon does not answer, with the last that it said."""
    if not agent_pid(places):
        silent, what = AGENT, "the agent did not answer"
    elif not answers(places.mount):
        silent, what = MOUNT, "the mount did not answer"
    else:
        silent, what = MOUNT, "agent and mount answer, and the mount has not heard the agent"
    return (
        f"{what} within {UP_S:.0f} s; it said:\n{_tail(_said(places.log(silent), marks[silent]))}"
    )


def _found(places: Places, name: str, pid: int, started: tuple[str, ...]) -> Up:
    criu = Files(places.mount).pairs("nodes", name, "info").get("criu_path", "")
    return Up(name, pid, started, criu)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _said(log: str, since: int) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "backslashreplace")
    except OSError:
        return ""


def _tail(text: str, lines: int = 8) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (nothing)"


# -- down


def down(places: Places) -> Down:
    """End mount and agent, in this order, and unmount; ends no user process. Harmless when not up.

    Raises TimedOut when the agent does not end, Busy when somebody else's service manager runs it.
    """
    if os.geteuid():
        raise NotYours("only root can end krgfs: run `krg down` as root")
    from .mount import is_dead_mount, is_mounted, unmount

    if is_service(agent_pid(places)):
        raise Busy(
            f"systemd keeps krgfs here: `systemctl stop {' '.join(reversed(UNITS))}` ends it"
        )
    kept, frozen = _counts(places)
    ended = []
    with _alone(places):
        if _end_known(places, MOUNT):
            ended.append(MOUNT)
        if is_dead_mount(places.mount) or is_mounted(places.mount):
            unmount(places.mount)
            ended = [MOUNT]
        if _end_known(places, AGENT) or _end_stranger(places):
            ended.append(AGENT)
    return Down(tuple(ended), kept, frozen)


def _counts(places: Places) -> tuple[int, int]:
    try:
        figures = Files(places.mount).pairs("metrics")
    except KrgError:
        return 0, 0
    kept, frozen = (figures.get(f"krg_trees_{which}", "0") for which in ("kept", "frozen"))
    return int(float(kept)), int(float(frozen))


def _end_known(places: Places, daemon: str) -> bool:
    """End a daemon that `up` started, be it an orphan. Returns whether there was one."""
    return _end(places, daemon, ENDS_S[daemon]) or _end_orphan(places, daemon) is not None


def _end(places: Places, daemon: str, patience_s: float) -> bool:
    """Have a respawner and its daemon end. Returns whether there was one."""
    with respawner(places, daemon) as running:
        if running is None:
            return False
        _end_process(places, daemon, *running, patience_s)
    return True


def _end_orphan(places: Places, daemon: str) -> list[str] | None:
    """End an orphan. Returns the words that its program was started with, None if there is none."""
    with orphan(places, daemon) as found:
        if found is None:
            return None
        words = arguments(found[0])
        _end_process(places, daemon, *found, ENDS_S[daemon])
    names = [os.path.basename(each) for each in words]
    return words[names.index(PROGRAMS[daemon]) + 1 :]


def _end_stranger(places: Places) -> bool:
    """End an agent that answers and that `up` did not start. Returns whether there was one."""
    pid = agent_pid(places)
    with _held(pid) as pidfd:
        if pidfd is None:
            return False
        if not _runs(pid, PROGRAMS[AGENT]):
            raise Busy(f"process {pid} answers at {places.socket} and is no krg-agent: it stays")
        _end_process(places, AGENT, pid, pidfd, ENDS_S[AGENT])
    return True


def _end_process(places: Places, daemon: str, pid: int, pidfd: int, patience_s: float) -> None:
    """Have a daemon or its respawner end, and wait until it has.

    A mount that does not end is killed: it has no state. An agent never is: it may be dumping.
    """
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if has_ended(pidfd, patience_s):
        return
    if daemon == AGENT:
        raise TimedOut(
            f"the agent (pid {pid} or below) was told to end {patience_s:.0f} s ago and has not "
            f"ended; {places.log(daemon)} has what it is doing"
        )
    children = [os.pidfd_open(child) for child in facts.children(pid)]
    for each in (os.dup(pidfd), *children):
        _kill(each)


def _kill(pidfd: int) -> None:
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    has_ended(pidfd, ENDS_S[MOUNT])
    os.close(pidfd)


def is_service(pid: int) -> bool:
    """Tell whether a process belongs to one of our units of systemd."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            parts = file.read().replace("\n", "/").split("/")
    except OSError:
        return False
    return any(unit in parts for unit in UNITS)
