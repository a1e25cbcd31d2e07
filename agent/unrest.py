"""Which threads keep a freeze waiting, and what they wait in."""

from __future__ import annotations

import os

from krgfs import facts
from krgfs.model import Frozen

from . import cgroups, texts
from .procs import ProcessTree, title

# What proc_pid_wchan(5) says of a task whose vfork(2) has not come to its exec.
VFORK = ("kernel_clone", "_do_fork", "wait_for_vfork_done")


def starting(tree: ProcessTree) -> dict[int, str] | None:
    """Return the threads that wait for the exec of a child, with their states.

    None when a thread runs: one that was preempted on its way into that wait counts as frozen.
    """
    tasks = [facts.task(tid) for task in tree.live for tid in facts.threads(task.pid)]
    if any(task is not None and task.state == "R" for task in tasks):
        return None
    return {
        task.pid: task.state
        for task in tasks
        if task is not None and texts.read(f"/proc/{task.pid}/wchan") in VFORK
    }


def restless(frozen: Frozen, tree: ProcessTree) -> dict[int, str]:
    """Return the threads that do not look frozen, with their states.

    v2 shows a frozen one as sleeping. v1 shows it as waiting in the kernel, as it shows those
    that cannot be interrupted there: only the thaw will tell them apart.
    """
    at_rest = "StTZX" if frozen.version == 2 else "tTZX"
    tids = (
        tid for pid in {*cgroups.members(frozen.cgroup), *tree.pids} for tid in facts.threads(pid)
    )
    found = {tid: task.state for tid in tids if (task := facts.task(tid)) is not None}
    return {tid: state for tid, state in found.items() if state not in at_rest}


def why(tree: ProcessTree, unrest: dict[int, str]) -> str:
    """Name a task that could not be frozen, now that all the others are thawed."""
    for tid, state in sorted(unrest.items(), key=lambda each: each[1] == "D"):
        task = facts.task(tid)
        if task is not None and (state != "D" or task.state == "D"):
            return (
                f"task {title(task)} of tree {tree.pid} does not come to rest, it waits in "
                f"{_what_it_does(tid)}: nothing is frozen, try again when it has ended"
            )
    return f"tree {tree.pid} does not come to rest: nothing is frozen, try again"


# The calls that hang in a dead server, by their x86_64 numbers; their first argument is a file.
_CALLS = {"0": "read", "1": "write", "3": "close", "17": "pread64", "18": "pwrite64"}
_CALLS |= {"16": "ioctl", "19": "readv", "20": "writev", "74": "fsync", "75": "fdatasync"}


def _what_it_does(tid: int) -> str:
    where = texts.read(f"/proc/{tid}/wchan").strip("0\n") or "the kernel"
    if where in VFORK:
        return "vfork, for a program that it started to come up"
    words = texts.read(f"/proc/{tid}/syscall").split()
    if len(words) < 2 or words[0] not in _CALLS or os.uname().machine != "x86_64":
        return where
    path = facts.link(tid, f"fd/{int(words[1], 16)}").decode(errors="replace")
    return f"{where} ({_CALLS[words[0]]} on {path or 'a closed file'})"
