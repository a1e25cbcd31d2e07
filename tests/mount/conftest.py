"""Trees to drive, and a way to see that somebody is blocked in a write."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from krgfs import facts, pending
from tests.sites import Site, until
from tests.workloads import harness
from tests.workloads.harness import Workload

Start = Callable[..., Workload]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a workload; all of them are ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(name: str = "small", *args: object) -> Workload:
            directory = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
            return stack.enter_context(harness.start(name, directory, *args)).wait_ready()

        yield start


@pytest.fixture
def small(start: Start) -> Workload:
    """A small tree of one process that counts."""
    return start("small")


@contextlib.contextmanager
def typing(
    site: Site, script: str, shell: str = "bash", stdin_pipe: bool = False, **popen: object
) -> Iterator[subprocess.Popen[str]]:
    """A script under way in a shell of its own session, with $K as the mountpoint."""
    process = subprocess.Popen(
        [shell, "-c", script],
        env={**os.environ, "K": str(site.mnt), "LC_ALL": "C"},
        stdin=subprocess.PIPE if stdin_pipe else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **popen,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def blocked_in(pid: int, ending: str) -> int:
    """Return which task of a process and its descendants is inside a write to such a file, or 0."""
    for task in facts.tree(pid):
        for tid in facts.threads(task.pid):
            if pending.is_writing(tid, ending.encode()):
                return tid
    return 0


def wait_blocked(pid: int, ending: str) -> int:
    """Return the task once it is inside its write."""
    return int(str(until(lambda: blocked_in(pid, ending), f"{pid} blocked in {ending}")))


def is_steady(workload: Workload) -> bool:
    """Tell that a workload goes on, and that its own judgement of itself is good."""
    workload.wait_progress()
    return workload.finish() == "PASS"
