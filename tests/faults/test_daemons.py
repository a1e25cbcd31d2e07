"""Agent and mount end, are away, and come back: what users notice of it, and what not."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.ground import Ground, is_held
from tests.sites import until

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
