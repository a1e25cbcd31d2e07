"""Where faults are made: a site, one workload, callers that wait, and what has to hold then.

`Ground.is_sound` is the one function of invariants: every fault test calls it once the agent and
the mount are up again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio

from agent import cgroups
from agent.backends import open_backend
from agent.images import Images
from krgfs import facts
from tests.sites import Site, until
from tests.workloads.harness import Workload, start

WRITE = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    os.write(fd, sys.argv[2].encode())
    print("ok", os.read(fd, 4096).decode(), end="")
except OSError as exc:
    print(errno.errorcode[exc.errno], end=" ")
    print(os.read(fd, 4096).decode(), end="", flush=True)
"""
FINAL = ("done", "failed", "cancelled")


class Write:
    """A process that writes one line into a verb file and then reads the file."""

    def __init__(self, path: Path, line: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(path), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            text=True,
        )

    def outcome(self, seconds: float = 40.0) -> tuple[str, str]:
        """Return `ok` or the errno's name, and what the file read back."""
        said, _ = self.process.communicate(timeout=seconds)
        word, _, line = said.partition(" ")
        return word, line.strip()

    def kill(self) -> None:
        """End the process, and let go of it."""
        with self.process:
            self.process.kill()


class Ground:
    """A site and the workload that faults befall."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.workload: Workload | None = None
        self._mounts = mounts(site)
        self._tables = tables()
        self._writes: list[Write] = []

    # -- the workload and the verbs on it

    def begin(self, name: str, *words: object) -> Workload:
        """Start the workload; returns when it works."""
        self.workload = start(name, self.site.base / f"workload-{name}", *words)
        self.workload.wait_ready()
        self.workload.wait_progress()
        return self.workload

    @property
    def work(self) -> Workload:
        assert self.workload is not None
        return self.workload

    def write(self, path: str, line: str) -> Write:
        """Begin a write in a process of its own."""
        made = Write(self.site.mnt / path, line)
        self._writes.append(made)
        return made

    def tell(self, path: str, line: str) -> str:
        """Write a line that has to succeed; returns what is read back."""
        word, said = self.write(path, line).outcome()
        assert word == "ok", f"{line!r} into {path}: {word} {said}\n{self.site.logs()}"
        return said

    def of(self, name: str) -> str:
        """Return the path of a file of the workload's root."""
        return f"procs/{self.work.pid}/{name}"

    def checkpoint(self, words: str = "1") -> str:
        return self.tell(self.of("checkpoint"), words)

    def restart(self, line: str) -> int:
        """Restart the workload, which is watched from now on as the pid that it got."""
        self.work.adopt(int(self.tell("restart", line).removeprefix("pid ")))
        return self.work.pid

    def end(self) -> None:
        """Kill the workload, if it lives, and wait until its pids are free."""
        tree = self.work.tree()
        self.work.kill()
        self.work.wait_gone(tree)

    def gone(self) -> None:
        """Return when nothing of the workload runs and its pids are free."""
        self.work.wait_gone([self.work.pid])

    def job(self, number: int) -> dict[str, str]:
        return self.site.facts(f"jobs/{number}/status")

    def last_job(self) -> int:
        return max((int(name) for name in os.listdir(self.site.mnt / "jobs")), default=0)

    def wait_phase(self, number: int, phase: str) -> None:
        """Return with a job in this phase: the fault hits it there. A job past it is a failure."""

        def is_there() -> bool:
            now = self.job(number).get("phase", "")
            assert now not in FINAL, f"jobs/{number} was {now} before it was seen {phase}"
            return now == phase

        until(is_there, f"jobs/{number} {phase}")

    def wait_over(self, number: int) -> dict[str, str]:
        until(lambda: self.job(number).get("phase") in FINAL, f"jobs/{number} over")
        return self.job(number)

    # -- the daemons

    def kill_agent(self) -> None:
        self.site.stop_agent(signal.SIGKILL)

    def kill_engines(self) -> None:
        """Kill the CRIUs that are at work for this site; one has to be."""
        for pid in until(lambda: engines(self.site), "CRIU at work"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def agent_again(self, *options: str) -> None:
        """Start the agent, and return when the mount has heard it."""
        self.site.start_agent(*options)
        state = f"nodes/{self.site.node}/state"
        until(lambda: self.site.read(state).startswith("online"), "the mount hears the agent")

    # -- what has to hold after every fault

    def is_sound(self, *, frozen: bool = False) -> None:
        """Assert all invariants; `frozen` tells that its user has the workload frozen now.

        Every job is over and says what it came to; at most one copy of the tree lives, and it runs
        unless its user froze it; nothing of ours is left in the kernel or in the store; every image
        is whole, and where no tree lives one of them brings it back. At last the next checkpoint.
        """
        self._jobs_are_over()
        assert not engines(self.site), f"CRIU is still at work: {engines(self.site)}"
        roots = self._lives_once(frozen)
        assert mounts(self.site) == self._mounts
        until(lambda: not tables() - self._tables, "firewall tables as before")
        if not frozen:
            assert not self._leaves(), self._leaves()
        self._store_is_clean()
        if frozen:
            return
        if not roots:
            self._comes_back()
        ref = self.checkpoint()
        assert self._verify(ref) == ""
        self.work.wait_progress()

    def _jobs_are_over(self) -> None:
        for name in os.listdir(self.site.mnt / "jobs"):
            job = self.wait_over(int(name))
            assert job["phase"] == "done" or job["message"], f"jobs/{name} says nothing: {job}"
        intents = self._records("intents/")
        assert not intents, f"left in the journal: {intents}"

    def _lives_once(self, frozen: bool) -> list[int]:
        """Return the roots of the copies that live: none, or one."""
        tasks = self.work.tasks()
        roots = [pid for pid in tasks if parent(pid) not in tasks]
        assert len(roots) <= 1, f"several copies of the tree live: {roots}"
        if roots:
            assert is_held(roots[0]) == frozen, f"frozen is {is_held(roots[0])}, not {frozen}"
            assert (self.site.facts(f"procs/{roots[0]}/status")["state"] == "frozen") == frozen
            if not frozen:
                self.work.adopt(roots[0])
                self.work.wait_progress()
        return roots

    def _comes_back(self) -> None:
        images = self.images()
        assert images, f"the tree is gone and there is no image\n{self.site.logs()}"
        self.restart(images[-1])
        self.work.wait_progress()

    def images(self) -> list[str]:
        """Return all images that /krg shows, in order."""
        return [
            f"{app.name}/{version}"
            for app in sorted((self.site.mnt / "images").iterdir())
            for version in sorted(
                (each for each in os.listdir(app) if each[1:].isdecimal()),
                key=lambda each: int(each[1:]),
            )
        ]

    def _store_is_clean(self) -> None:
        images, store = self.images(), self.site.state / "images"
        manifests = store / "manifests" / self.site.node
        stored = {str(each.relative_to(manifests)) for each in manifests.glob("*/*")}
        assert stored <= set(images), f"no record names {stored - set(images)} of the store"
        spools = os.listdir(self.site.state / "spool")
        assert not spools, f"left of dumps and restores: {spools}"
        for ref in images:
            assert self._verify(ref) == "", ref

    def _verify(self, ref: str) -> str:
        """Read all that an image is made of with an eye of our own; returns what is wrong."""
        app, _, version = ref.partition("/v")

        async def verify(state: str) -> str:
            backend = open_backend(str(self.site.state / "images"))
            images = await Images.open(state, backend, self.site.node)
            try:
                return await images.verify(app, int(version))
            finally:
                images.close()

        with tempfile.TemporaryDirectory() as state:
            return trio.run(verify, state)

    def _leaves(self) -> list[str]:
        """Return the cgroups that were made to freeze the workload in."""
        return [
            os.path.join(place, name)
            for each in cgroups.hierarchies()
            if each.can_freeze
            for place, folders, _ in os.walk(each.mount)
            for name in folders
            if name.startswith(f"{cgroups.LEAF_PREFIX}{self.work.pid}.")
        ]

    def _records(self, prefix: str) -> list[str]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self.site.state / 'store.db'}?mode=ro", uri=True)
        ) as store:
            rows = store.execute(
                "SELECT key FROM record WHERE substr(key, 1, ?) = ?", (len(prefix), prefix.encode())
            )
            return [key.decode() for (key,) in rows]

    def close(self) -> None:
        for each in self._writes:
            each.kill()
        agent = self.site.agent
        if agent is not None:
            agent.send_signal(signal.SIGCONT)
        if agent is not None and agent.poll() is not None and self.workload is not None:
            self._let_go()  # a test that failed in between: its agent had something frozen
        if self.workload is not None:
            self.workload.close()

    def _let_go(self) -> None:
        """Have an agent undo what the one that is gone had under way."""
        self.site.start_agent()
        leaf = f"krg-{self.work.pid}.*"
        trees = Path("/sys/fs/cgroup")
        until(lambda: not [*trees.glob(leaf), *trees.glob(f"*/{leaf}")], "its cgroup has gone")


@contextlib.contextmanager
def ground(site: Site) -> Iterator[Ground]:
    made = Ground(site)
    try:
        yield made
    finally:
        made.close()


# -- what the kernel shows


def mounts(site: Site) -> list[str]:
    """Return what is mounted below a site's directory (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo") as lines:
        return sorted(line.split()[4] for line in lines if str(site.base) in line)


def tables() -> set[str]:
    """Return the firewall tables that CRIU made."""
    said = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    return {line for line in said.stdout.splitlines() if "CRIU" in line}


def engines(site: Site) -> list[int]:
    """Return the CRIUs at work for a site: its directories are among their words."""
    mark = os.fsencode(site.base)
    return [
        task.pid
        for task in facts.processes()
        if task.comm == b"criu" and mark in facts.command_line(task.pid)
    ]


def parent(pid: int) -> int:
    task = facts.task(pid)
    return task.ppid if task is not None else 0


def is_held(pid: int) -> bool:
    """Tell whether a freezer, of whichever hierarchy, holds a process."""
    return any(
        cgroups.is_at_rest(place, each.version)
        for each in cgroups.hierarchies()
        if each.can_freeze and (place := each.directory(pid)) is not None
    )
