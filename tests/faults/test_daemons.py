"""Agent and mount end, are away, and come back: what users notice of it, and what not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from krgfs import facts
from tests.faults.ground import Ground, is_held
from tests.sites import BIN, Site, sleeper, until

LARGE = ("300", "0.01", "0.5")


def test_while_the_agent_is_away_one_can_read_and_verbs_say_so(here: Ground) -> None:
    here.begin("counter")
    ref = here.checkpoint()
    here.kill_agent()
    state = f"nodes/{here.site.node}/state"
    until(lambda: here.site.read(state).startswith("failed"), "the mount notices")
    assert here.site.facts(here.of("status"))["last_image"] == ref
    assert here.images() == [ref]
    word, said = here.write(here.of("checkpoint"), "1").outcome()
    assert word == "EHOSTUNREACH" and "krg up" in said, (word, said)
    here.agent_again()
    here.is_sound()


@pytest.mark.parametrize("then", ["run", "freeze"])
def test_an_agent_told_to_end_lets_go_what_its_jobs_froze(here: Ground, then: str) -> None:
    here.begin("memory", *LARGE)
    writer = here.write(here.of("checkpoint"), f"then={then}")
    here.wait_phase(1, "dumping")
    here.site.stop_agent()
    assert not is_held(here.work.pid)
    here.work.wait_progress()
    here.agent_again()
    word, said = writer.outcome()
    assert word == "EIO" and "the agent was ended" in said, (word, said)
    here.is_sound()


def test_a_mount_told_to_end_lets_its_writers_go(here: Ground) -> None:
    here.begin("memory", *LARGE)
    writer = here.write(here.of("checkpoint"), "1")
    waiter = here.write(here.of("wait"), "1")
    here.wait_phase(1, "dumping")
    here.site.stop_mount()
    word, said = writer.outcome()
    assert word == "EHOSTUNREACH", (word, said)
    assert waiter.outcome()[0] == "EHOSTUNREACH"
    here.site.start_mount()
    assert here.wait_over(1)["phase"] == "done"
    here.is_sound()


def test_a_restored_tree_outlives_both_and_its_end_is_known(here: Ground) -> None:
    here.begin("counter")
    ref = here.checkpoint("then=kill")
    here.gone()
    pid = here.restart(ref)
    here.site.stop_mount()
    here.site.stop_agent()
    here.work.wait_progress()
    here.site.start_agent()
    here.site.start_mount()
    here.is_sound()
    here.site.stop_mount()
    here.site.stop_agent()
    assert here.work.finish() == "PASS"
    here.site.start_agent()
    here.site.start_mount()
    until(lambda: here.site.read(f"procs/{pid}/wait").startswith("exit 0"), "its exit status")


def _is_thawed(here: Ground) -> bool:
    """Tell whether the tree runs, and its record says so (which comes after)."""
    return not is_held(here.work.pid) and here.site.facts(here.of("status"))["state"] != "frozen"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_user_froze_stays_frozen_and_thaws_at_its_time(here: Ground, number: int) -> None:
    here.begin("counter")
    here.tell(here.of("freeze"), "1")
    here.site.stop_agent(number)
    here.agent_again()
    here.is_sound(frozen=True)
    here.tell(here.of("freeze"), "1 for=3s")
    here.site.stop_agent(number)
    here.agent_again()
    until(lambda: _is_thawed(here), "thawed at its time")
    here.is_sound()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_freeze_while_open_lasts_as_long_as_its_handle(here: Ground, number: int) -> None:
    here.begin("counter")
    fd = os.open(here.site.mnt / here.of("freeze"), os.O_RDWR)
    try:
        os.write(fd, b"1 while-open\n")
        here.site.stop_agent(number)
        here.agent_again()
        here.is_sound(frozen=True)
        here.site.stop_agent(number)
    finally:
        os.close(fd)
    here.agent_again()
    until(lambda: _is_thawed(here), "thawed, for its handle is gone")
    here.is_sound()


def test_a_freeze_while_open_ends_with_the_mount(here: Ground) -> None:
    here.begin("counter")
    fd = os.open(here.site.mnt / here.of("freeze"), os.O_RDWR)
    try:
        os.write(fd, b"1 while-open\n")
        here.site.stop_mount(signal.SIGKILL)
    finally:
        os.close(fd)
    here.site.start_mount()
    until(lambda: _is_thawed(here), "thawed, for its handle is gone")
    here.is_sound()


# -- where `krg up` started them


class Node:
    """A node that `krg up` starts and `krg down` ends, in directories of a site's own."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.site.node = "n7"

    def krg(self, *words: str) -> str:
        """Run a command that has to succeed; returns what it says."""
        places = [f"--{name}={self.site.base / name}" for name in ("run", "state")]
        done = subprocess.run(
            [str(BIN / "krg"), "--mount", str(self.site.mnt), *words, *places],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    def supervisor(self, daemon: str) -> int:
        return int((self.site.run / f"{daemon}.pid").read_text())

    def daemon(self, daemon: str) -> int:
        (pid,) = facts.children(self.supervisor(daemon))
        return pid

    def lose_supervisor(self, daemon: str) -> int:
        """Kill the supervisor of a daemon; returns the pid of the daemon, which runs on."""
        supervisor, orphan = self.supervisor(daemon), self.daemon(daemon)
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: is_over(supervisor), "the supervisor is dead")
        assert not is_over(orphan)
        return orphan


def is_over(pid: int) -> bool:
    """Tell whether a process runs no more; who is to reap it may not have come to it."""
    task = facts.task(pid)
    return task is None or not task.is_live


@pytest.fixture
def node() -> Iterator[Node]:
    site = Site()
    made = Node(site)
    try:
        made.krg("up", "--node", site.node)
        yield made
        made.krg("down")
        assert not [task for task in facts.processes() if concerns(task.pid, site)]
    finally:
        for task in list(facts.processes()):
            if concerns(task.pid, site):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(task.pid, signal.SIGKILL)
        site.__exit__()


def concerns(pid: int, site: Site) -> bool:
    return os.fsencode(site.base) in facts.command_line(pid)


@pytest.mark.parametrize("daemon", ["agent", "mount"])
def test_up_gives_a_daemon_without_supervisor_another(node: Node, daemon: str) -> None:
    other = "mount" if daemon == "agent" else "agent"
    stays, orphan = node.daemon(other), node.lose_supervisor(daemon)
    assert f"starts pid {orphan} again was ended" in node.krg("doctor")
    assert "krgfs is up" in node.krg("up")
    assert "was ended" not in node.krg("doctor")
    assert is_over(orphan) and node.daemon(other) == stays
    assert node.site.read(f"nodes/{node.site.node}/state").startswith("online")
    again = node.daemon(daemon)
    os.kill(again, signal.SIGKILL)
    until(lambda: is_over(again) and facts.children(node.supervisor(daemon)), "started again")
    until(lambda: node.site.read(f"nodes/{node.site.node}/state").startswith("online"), "online")
    assert "was up already" in node.krg("up")


def test_up_ends_no_tree_for_the_sake_of_a_supervisor(node: Node) -> None:
    with sleeper() as pid:
        ref = node.site.write(f"procs/{pid}/checkpoint", "1 then=kill").strip()
    restored = int(node.site.write("restart", ref).removeprefix("pid "))
    for daemon in ("agent", "mount"):
        node.lose_supervisor(daemon)
    try:
        node.krg("up")
        assert node.site.facts(f"procs/{restored}/status")["last_image"] == ref
    finally:
        os.kill(restored, signal.SIGKILL)
    until(lambda: node.site.read(f"procs/{restored}/wait") != "", "its end is known")


@pytest.mark.parametrize("daemons", [("agent",), ("mount",), ("agent", "mount")])
def test_down_ends_a_daemon_without_supervisor(node: Node, daemons: tuple[str, ...]) -> None:
    orphans = [node.lose_supervisor(daemon) for daemon in daemons]
    with open(node.site.mnt / "procs" / str(os.getpid()) / "status", "rb"):  # keeps it busy
        assert "krgfs is down" in node.krg("down")
        assert all(is_over(orphan) for orphan in orphans)
    assert "was not up" in node.krg("down")
