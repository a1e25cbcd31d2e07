"""Pids at restart that are taken without a process to be seen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.sites import Site, gone, until

SCRIPT = "(sleep 1000 > /dev/null & echo $!); exec sleep 1000 > /dev/null"


@pytest.fixture
def session() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The leader of a session, and another member of it that is not of its tree."""
    process = subprocess.Popen(
        ["sh", "-c", SCRIPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    member = int(process.stdout.readline())
    process.stdout.close()
    try:
        yield process, member
    finally:
        for pid in (process.pid, member):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def test_auto_finds_a_way_where_a_pid_lives_on_as_a_session(
    shared_site: Site, session: tuple[subprocess.Popen[str], int]
) -> None:
    process, member = session
    leader = process.pid
    file = shared_site.proc(leader) / "checkpoint"
    assert shared_site.write(file, "name=leader orphans=drop then=kill") == "leader/v1\n"
    process.wait()
    assert os.getsid(member) == leader
    with pytest.raises(OSError, match="File exists"):
        shared_site.write("restart", "leader pid=keep")
    answer = shared_site.write("restart", "leader")
    assert answer.startswith("pid ")
    pid = int(answer.split()[1])
    assert pid != leader
    shared_site.write(shared_site.proc(pid) / "signal", "KILL")
    until(lambda: gone(pid), "it has ended")
