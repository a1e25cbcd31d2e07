"""What /proc says, above all where it is read by a short cut."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from krgfs import facts


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_recent_reads_what_is_now_and_keeps_its_descriptors(child: subprocess.Popen[bytes]) -> None:
    recent = facts.Recent()
    assert recent.stat(child.pid)
    before = descriptors()
    for _ in range(50):
        (seen,) = facts.tree(child.pid, recent)
        assert (seen.pid, seen.ppid) == (child.pid, os.getpid())
    assert descriptors() == before
    child.send_signal(19)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert facts.tree(child.pid, recent)[0].state == "T"


def test_recent_notices_children_and_the_end() -> None:
    recent = facts.Recent()
    shell = subprocess.Popen(["sh", "-c", "read x; sleep 100 & wait"], stdin=subprocess.PIPE)
    assert len(facts.tree(shell.pid, recent)) == 1
    assert shell.stdin
    shell.stdin.write(b"\n")
    shell.stdin.flush()
    while len(facts.tree(shell.pid, recent)) != 2:
        assert shell.poll() is None
    for task in facts.tree(shell.pid):
        os.kill(task.pid, 9)
    shell.wait()
    shell.stdin.close()
    assert recent.stat(shell.pid) is None
    assert facts.tree(shell.pid, recent) == ()


def test_recent_holds_no_more_than_it_may() -> None:
    recent = facts.Recent(size=3)
    before = descriptors()
    pids = [task.pid for task in facts.processes()][:8]
    for pid in pids:
        recent.stat(pid)
    assert descriptors() - before <= 9


def test_recent_sees_a_new_owner() -> None:
    code = "import os; input(); os.setegid(7); os.seteuid(8); print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout
    recent = facts.Recent()
    assert recent.stat(child.pid)
    assert recent.owner(child.pid) == facts.owner(child.pid) == (0, 0)
    child.stdin.write("\n")
    child.stdin.flush()
    child.stdout.readline()
    assert recent.owner(child.pid) == facts.owner(child.pid) == (8, 7)
    child.communicate("\n")


def test_a_listing_shows_who_started_since_and_not_who_ended(
    child: subprocess.Popen[bytes],
) -> None:
    listing = facts.Listing()
    assert listing.entries()[str(child.pid)].start == (facts.task(child.pid) or pytest.fail()).start
    other = subprocess.Popen(["sleep", "100"])
    assert str(other.pid) in listing.entries()
    other.kill()
    other.wait()
    assert str(other.pid) not in listing.entries()
    assert "2" not in listing.entries()  # kthreadd


def test_bytes_that_cannot_be_shown_stay_on_one_line() -> None:
    assert facts.shown(b"plain name") == "plain name"
    assert facts.shown(b"a\nb\xff") == "a\\nb\\xff"


def test_who_opened_is_among_a_tree_when_it_was_forked_below_it(
    child: subprocess.Popen[bytes],
) -> None:
    """From few openers the way up is walked, from many the way down."""
    for openers in ({child.pid}, {child.pid, 1}):
        assert facts.among(openers, [os.getpid()]) == {child.pid}
        assert facts.among(openers, [child.pid]) == {child.pid}
        assert facts.among(openers, [child.pid + 1]) == set()
    assert facts.among(set(), [child.pid]) == set()
