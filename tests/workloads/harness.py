"""Start a workload, watch it through its files, end it, and leave nothing of it behind.

A workload that was killed and restored by somebody else has its pid again but is no child of ours
any more, so nothing here relies on that: it is watched through DIR and pidfds. What belongs to it
is told by WORKLOAD_ID in the environment, which every process of its tree keeps, restored or not.
"""

from __future__ import annotations

import atexit
import functools
import glob
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEADLINE_S = 30.0
NAP_S = 0.005

C_OPTIONS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
JAVA_OPTIONS = (
    "-Xmx64m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",  # a file in /tmp that the next JVM removes once its process is gone
)


class Stuck(Exception):
    """A condition did not come true within DEADLINE_S. Says which, and what the workload said."""


@dataclass
class Workload:
    """A started workload: a context manager that ends what is left of it, whatever its parent."""

    name: str
    directory: Path
    identity: str
    _launcher: subprocess.Popen[bytes]
    _terminal: _Terminal | None = None
    _pid: int | None = field(default=None)

    @property
    def pid(self) -> int:
        """The root of its tree, by the workload's own word unless `adopt` said otherwise."""
        return self._pid or int(self._ready()[0])

    @property
    def facts(self) -> dict[str, str]:
        """What it said of itself in DIR/ready: ports, addresses, paths."""
        return dict(line.split("=", 1) for line in self._ready()[2:])

    @property
    def terminal(self) -> str | None:
        """The path of its terminal, when it was started on one."""
        return self._terminal.path if self._terminal else None

    def adopt(self, pid: int) -> None:
        """Watch this pid from now on: it was restored as another, or in a pid namespace."""
        self._pid = pid

    def wait_ready(self) -> Workload:
        self._wait("become ready", lambda: (self.directory / "ready").exists() or self._verdict())
        if not (self.directory / "ready").exists():
            raise Stuck(f"{self.name} was never ready: {self._verdict()}\n{self.said()}")
        return self

    def progress(self) -> int:
        """Return how far it says to have come; an older image sets it back."""
        path = self.directory / "progress"
        last = b"?"
        while (text := path.read_bytes()) != last:  # in place: two equal reads are a whole one
            last = text
        return int(text)

    def wait_progress(self, steps: int = 3) -> int:
        """Return the progress once so many steps are made, from where it was set back if it was."""
        start = self.progress()

        def came_on() -> bool:
            nonlocal start
            start = min(start, self.progress())
            return self.progress() >= start + steps

        self._wait(f"make {steps} steps from {start}", came_on)
        return self.progress()

    def alive(self) -> bool:
        """Return whether its root runs (or is frozen); a zombie does not."""
        return self._is_ours(self.pid)

    def tasks(self) -> list[int]:
        """Return the pids of all processes that carry its mark, zombies left out."""
        return [int(e) for e in os.listdir("/proc") if e.isdigit() and self._is_ours(int(e))]

    def tree(self) -> list[int]:
        """Return its root and all descendants, zombies too: the pids that a restore needs free."""
        children: dict[int, list[int]] = {}
        for process in _processes():
            children.setdefault(process.parent, []).append(process.pid)
        found = [self.pid]
        for pid in found:  # grows while it is walked
            found += children.get(pid, [])
        return found

    def wait_gone(self, tree: Iterable[int]) -> None:
        """Return when these pids, as `tree` gave them, are free: killed, and reaped by a parent.

        A pid is also taken while it is the process group or the session of somebody.
        """
        pids = set(tree)

        def gone() -> bool:
            self._launcher.poll()
            return not any(pids & {p.pid, p.group, p.session} for p in _processes())

        self._wait("be gone", gone)

    def signal(self, signum: int, pid: int | None = None) -> bool:
        """Signal its root, or another task of it; returns False when there is no such task."""
        pid = pid or self.pid
        try:
            target = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not self._is_ours(pid):  # asked with the pidfd held: it cannot become another's
                return False
            signal.pidfd_send_signal(target, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(target)
        return True

    def finish(self) -> str:
        """Ask it for its verdict and return that, which is then forgotten.

        A workload that failed earlier has ended and left its verdict. One that left none, or does
        not end, gets a FAIL that says so; the latter is still there.
        """
        pid = self.pid
        try:
            end = os.pidfd_open(pid)
        except ProcessLookupError:
            return self._take_verdict() or f"FAIL: {self.name} was gone without a verdict"
        try:
            if self._is_ours(pid):
                signal.pidfd_send_signal(end, signal.SIGTERM)
            if not _readable(end, DEADLINE_S):
                return f"FAIL: {self.name} made no verdict within {DEADLINE_S} s"
        finally:
            os.close(end)
        self._launcher.poll()
        return self._take_verdict() or f"FAIL: {self.name} ended without a verdict"

    def kill(self) -> None:
        """Kill every process that carries its mark, and return when none of them runs any more.

        One that is in the middle of an exec carries none; by its session it is waited for.
        """

        def killed() -> bool:
            tasks = self.tasks()
            for pid in tasks:
                self.signal(signal.SIGKILL, pid)
            ours = (p for p in _processes() if p.session == self._launcher.pid)
            return not tasks and all(p.state in "ZX" for p in ours)

        self._wait("be killed", killed)

    def said(self) -> str:
        """Return what it wrote to its stdout and stderr."""
        texts = ((self.directory / name).read_text(errors="replace") for name in _OUTPUT)
        return "\n".join(text for text in texts if text)

    def close(self) -> None:
        """Kill every process that carries its mark and remove its names outside DIR."""
        self.kill()
        if self._terminal:
            self._terminal.close()
        self._wait("be reaped", lambda: self._launcher.poll() is not None)
        for path in glob.glob(f"/dev/shm/*{self.identity}*"):
            os.unlink(path)

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _is_ours(self, pid: int) -> bool:
        mark = f"WORKLOAD_ID={self.identity}".encode()
        try:
            return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    def _ready(self) -> list[str]:
        return (self.directory / "ready").read_text().splitlines()

    def _verdict(self) -> str:
        try:
            return (self.directory / "verdict").read_text().strip()
        except FileNotFoundError:
            return ""

    def _take_verdict(self) -> str:
        text = self._verdict()
        (self.directory / "verdict").unlink(missing_ok=True)
        return text

    def _wait(self, what: str, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            if time.monotonic() > deadline:
                raise Stuck(f"{self.name} did not {what}: {self._verdict()}\n{self.said()}")
            time.sleep(NAP_S)


def start(
    name: str, directory: Path, *args: object, env: Mapping[str, str] | None = None
) -> Workload:
    """Start a workload in a session of its own, its output in DIR/stdout and DIR/stderr.

    `ptyjob` becomes a background job of a shell on a terminal, which is kept open until `close`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [*_command(name), str(directory), *map(str, args)]
    mark = uuid.uuid4().hex
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "WORKLOAD_ID": mark,
        **(env or {}),
    }
    terminal = None
    if name == "ptyjob":
        terminal = _Terminal(directory / "stdout")
        # The shell has no terminal yet: the first one that it opens becomes its own.
        script = 'exec <>"$0" >&0 2>&0; set -m; "$@" & wait; exec cat'
        command = ["/bin/sh", "-c", script, terminal.path, *command]
    with (directory / _OUTPUT[0]).open("ab") as out, (directory / _OUTPUT[1]).open("ab") as err:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
    return Workload(name, directory, mark, launcher, terminal)


def build(source: str) -> str:
    """Compile a C workload, once in a run, and return its path."""
    return _build(source, _build_directory())


_OUTPUT = ("stdout", "stderr")


def _command(name: str) -> list[str]:
    if (HERE / f"{name}.c").exists():
        return [build(f"{name}.c")]
    if (HERE / f"{name}.js").exists():
        return ["node", str(HERE / f"{name}.js")]
    if (HERE / f"{name}.java").exists():
        return ["java", *JAVA_OPTIONS, str(HERE / f"{name}.java")]
    return [_python(), str(HERE / f"{name}.py")]


@functools.cache
def _python() -> str:
    """Return a Python that other users can run too: an interpreter below /root is root's alone."""
    system = "/usr/bin/python3"
    question = "import sys; sys.exit(sys.version_info < (3, 11))"
    if os.path.exists(system) and subprocess.run([system, "-c", question]).returncode == 0:
        return os.path.realpath(system)
    return sys.executable


@functools.cache
def _build_directory() -> str:
    directory = tempfile.mkdtemp(prefix="workloads-")
    os.chmod(directory, 0o755)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@functools.cache
def _build(source: str, directory: str) -> str:
    target = os.path.join(directory, source.removesuffix(".c"))
    subprocess.run(
        ["gcc", *C_OPTIONS, "-o", target, str(HERE / source)],
        check=True,
    )
    return target


@dataclass(frozen=True)
class _Process:
    pid: int
    state: str
    parent: int
    group: int
    session: int


def _processes() -> Iterator[_Process]:
    """Give every process there is, zombies too."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, *numbers = stat.rpartition(")")[2].split()[:4]
        yield _Process(int(entry), state, *map(int, numbers))


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _Terminal:
    """The outer end of a terminal: what comes out of it goes into a file, until it is closed."""

    def __init__(self, output: Path) -> None:
        self._outer, inner = os.openpty()
        self.path = os.ttyname(inner)
        self._inner = inner  # held open, or the outer end hangs up between a kill and a restore
        self._wake_r, self._wake_w = os.pipe()
        self._reader = threading.Thread(target=self._drain, args=(output,), daemon=True)
        self._reader.start()

    def close(self) -> None:
        os.write(self._wake_w, b"x")
        self._reader.join()
        for fd in (self._outer, self._inner, self._wake_r, self._wake_w):
            os.close(fd)

    def _drain(self, output: Path) -> None:
        with output.open("ab", buffering=0) as file:
            while True:
                readable, _, _ = select.select([self._outer, self._wake_r], [], [])
                if self._wake_r in readable:
                    return
                file.write(os.read(self._outer, 65536))
