"""A stage for workloads: what a person would type at a /krg, and what has to hold afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.sites import Site, gone, until
from tests.workloads.harness import Workload, start

OTHER_USER = ("1000", "1000")
WORDS: dict[str, tuple[str, ...]] = {
    "otheruid": (*OTHER_USER, "1001,1002"),
    "memory": ("4", "0.5"),
    "execs": ("vfork",),
}
REF = re.compile(r"[^/ ]+/v[1-9][0-9]*\Z")


class Stage:
    """A site, and the workloads that were begun on it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        site.base.chmod(0o711)  # other users have to get at the mount
        self._begun: list[Workload] = []
        self._restarted: set[int] = set()

    def begin(self, name: str, *words: object) -> Workload:
        """Start a workload in a new directory that any user can reach; returns when it works."""
        directory = Path(tempfile.mkdtemp(prefix="workload-"))
        directory.chmod(0o711)
        workload = start(name, directory, *(words or WORDS.get(name, ())))
        self._begun.append(workload)
        workload.wait_ready()
        workload.wait_progress()
        return workload

    def tell(self, path: str, text: str) -> str:
        """Write one line into a verb file and read on: the outcome, as `exec 3<>` gives it."""
        fd = os.open(self.site.mnt / path, os.O_RDWR)
        try:
            os.write(fd, f"{text}\n".encode())
            return os.read(fd, 4096).decode(errors="surrogateescape").strip()
        finally:
            os.close(fd)

    def refused(self, path: str, text: str) -> tuple[int, str]:
        """Write a line that must be refused; returns the errno and the sentence in the file."""
        fd = os.open(self.site.mnt / path, os.O_RDWR)
        try:
            os.write(fd, f"{text}\n".encode())
        except OSError as exc:
            os.lseek(fd, 0, os.SEEK_SET)
            said = os.read(fd, 4096).decode(errors="surrogateescape").strip()
            return exc.errno or 0, said
        finally:
            os.close(fd)
        raise AssertionError(f"{text!r} was taken by {path}")

    def checkpoint(self, workload: Workload, words: str = "1") -> str:
        """Make an image; returns APP/vN."""
        ref = self.tell(f"procs/{workload.pid}/checkpoint", words)
        assert REF.match(ref), ref
        return ref

    def checkpoint_and_end(self, workload: Workload, words: str = "") -> str:
        """Make an image and have the tree killed; returns APP/vN once its pids are free."""
        tree = workload.tree()
        ref = self.checkpoint(workload, f"then=kill {words}")
        workload.wait_gone(tree)
        return ref

    def restart(self, workload: Workload, line: str) -> int:
        """Restart a workload from an image, and watch it from now on as the pid that it got."""
        outcome = self.tell("restart", line)
        assert re.match(r"pid [1-9][0-9]*\Z", outcome), outcome
        workload.adopt(int(outcome.split()[1]))
        self._restarted.add(workload.pid)
        return workload.pid

    def end_pid(self, pid: int) -> None:
        """Kill one process that is no workload, and wait until its pid is free."""
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        until(lambda: gone(pid), f"{pid} is gone")

    def end(self, workload: Workload) -> None:
        """Kill a workload's tree from outside of krgfs, and wait until its pids are free."""
        tree = workload.tree()
        for pid in tree:
            workload.signal(signal.SIGKILL, pid)
        workload.wait_gone(tree)

    def passes(self, workload: Workload) -> None:
        """The workload goes on, and says on SIGTERM that nothing was lost."""
        workload.wait_progress()
        assert workload.finish() == "PASS", workload.said()

    def close(self) -> None:
        for workload in self._begun:
            workload.close()
            shutil.rmtree(workload.directory, ignore_errors=True)
        for pid in self._restarted:  # an agent that still runs removes their cgroups
            until(lambda pid=pid: self._is_over(pid), f"the end of {pid} is noted")

    def _is_over(self, pid: int) -> bool:
        state = self.site.facts(f"procs/{pid}/status").get("state", "gone")
        return state.startswith(("exit", "signal", "ended", "gone", "unknown"))


@contextmanager
def staged(site: Site) -> Iterator[Stage]:
    """Give a stage on a site, and end what was begun on it."""
    stage = Stage(site)
    try:
        yield stage
    finally:
        stage.close()


def as_user(uid: int, script: str, site: Site) -> subprocess.CompletedProcess[str]:
    """Run what a user types, with $K as the mountpoint."""
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return subprocess.run(
        [*user, "bash", "-c", script],
        env={"PATH": os.environ["PATH"], "K": str(site.mnt), "LC_ALL": "C"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def program(
    source: str, directory: Path, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a Python program of a few lines in its own session, descriptors on /dev/null.

    Returns once it has made the file `ready`; ended on leave, also where it was restarted since.
    """
    mark = f"PROGRAM_ID={uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, signal, time\n{source}"],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=directory,
        env={"PATH": os.environ["PATH"], **dict([mark.split("=")])},
    )
    try:
        until((directory / "ready").exists, "the program is ready")
        yield process
    finally:
        for pid in _marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        until(lambda: not _marked(mark), "the program is gone")


def _marked(mark: str) -> list[int]:
    """Return the processes that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def number_in(path: Path) -> int:
    """Return the number that a program keeps in a file, 0 while there is none."""
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


def states(pids: list[int]) -> set[str]:
    """Return the state letters of processes, as ps shows them."""
    return {stat(pid)[0] for pid in pids}


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def inner_pid(pid: int) -> int:
    """Return a process's pid as its own pid namespace numbers it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])


def standstill(workload: Workload) -> bool:
    """Tell whether a workload makes no step while another process gets some time to run."""
    before = workload.progress()
    subprocess.run(["sleep", "0.2"], check=True)
    return workload.progress() == before
