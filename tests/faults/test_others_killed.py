"""kill -9 of the mount, of CRIU, of the caller, and of the agent while an image comes to life."""

from __future__ import annotations

import signal

import pytest

from tests.faults.ground import Ground, engines
from tests.sites import until

LARGE = ("300", "0.01", "0.5")


@pytest.mark.parametrize("phase", ["dumping", "storing"])
def test_a_checkpoint_goes_on_when_the_mount_is_killed(here: Ground, phase: str) -> None:
    here.begin("memory", *LARGE)
    writer = here.write(here.of("checkpoint"), "1")
    here.wait_phase(1, phase)
    here.site.stop_mount(signal.SIGKILL)
    assert writer.outcome()[0] != "ok"
    here.site.start_mount()
    assert here.wait_over(1)["phase"] == "done"
    assert len(here.images()) == 1
    here.is_sound()


@pytest.mark.parametrize("then", ["run", "kill", "freeze"])
def test_a_killed_criu_leaves_the_tree_running(here: Ground, then: str) -> None:
    here.begin("memory", *LARGE)
    first = here.checkpoint()
    writer = here.write(here.of("checkpoint"), f"then={then}")
    here.wait_phase(2, "dumping")
    here.kill_engines()
    word, said = writer.outcome()
    assert word == "EIO" and "ended by signal KILL" in said, (word, said)
    assert here.wait_over(2)["fate"] == "running"
    assert here.images() == [first]
    here.is_sound()


def test_a_tree_that_its_user_froze_stays_frozen_when_criu_is_killed(here: Ground) -> None:
    here.begin("memory", *LARGE)
    here.tell(here.of("freeze"), "1")
    writer = here.write(here.of("checkpoint"), "1")
    here.wait_phase(2, "dumping")
    here.kill_engines()
    assert writer.outcome()[0] == "EIO"
    here.is_sound(frozen=True)
    here.tell(here.of("freeze"), "0")
    here.is_sound()


def test_agent_and_criu_killed_together(here: Ground) -> None:
    here.begin("memory", *LARGE)
    writer = here.write(here.of("checkpoint"), "then=kill")
    here.wait_phase(1, "dumping")
    until(lambda: engines(here.site), "CRIU at work")
    assert here.site.agent is not None
    here.site.agent.send_signal(signal.SIGSTOP)  # CRIU would end by itself when it has gone
    here.kill_engines()
    here.kill_agent()
    here.agent_again()
    assert writer.outcome()[0] == "EIO"
    assert here.wait_over(1)["fate"] == "running"
    here.is_sound()


@pytest.mark.parametrize("phase", ["dumping", "storing"])
def test_a_killed_caller_cancels_its_checkpoint(here: Ground, phase: str) -> None:
    here.begin("memory", *LARGE)
    writer = here.write(here.of("checkpoint"), "then=kill")
    here.wait_phase(1, phase)
    writer.kill()
    job = here.wait_over(1)
    assert job["phase"] == "cancelled" and here.work.alive(), job
    assert here.images() == []
    here.is_sound()


WAITS = """#!/bin/sh
# stands in front of the real CRIU, and waits before or after it restores
wait() { : > {reached}; while [ ! -e {go} ]; do sleep 0.1; done; }
case " $* " in *" restore "*) ;; *) exec {criu} "$@";; esac
[ {moment} = after ] || wait
{criu} "$@" || exit
[ {moment} = before ] || wait
"""


class Waits:
    """A CRIU, used from now on, that waits before or after it restores."""

    def __init__(self, here: Ground, moment: str) -> None:
        self._reached, self._go = here.site.base / "reached", here.site.base / "go"
        script = here.site.base / "criu"
        text = WAITS.replace("{moment}", moment)
        for name, what in (
            ("criu", here.site.facts(f"nodes/{here.site.node}/info")["criu_path"]),
            ("reached", self._reached),
            ("go", self._go),
        ):
            text = text.replace(f"{{{name}}}", str(what))
        script.write_text(text)
        script.chmod(0o755)
        here.site.stop_agent()
        here.agent_again("--criu", str(script))

    def reached(self) -> None:
        until(self._reached.exists, "CRIU where it waits")

    def go(self) -> None:
        self._go.touch()


def test_the_next_agent_adopts_a_tree_that_comes_to_life(here: Ground) -> None:
    criu = Waits(here, "after")
    here.begin("memory", *LARGE)
    ref = here.checkpoint("then=kill")
    here.gone()
    writer = here.write("restart", ref)
    here.wait_phase(2, "restoring")
    criu.reached()
    here.kill_agent()
    here.agent_again()
    criu.go()
    word, said = writer.outcome()
    assert (word, said) == ("ok", f"pid {here.work.pid}"), (word, said)
    assert here.site.facts(here.of("status"))["app"] == ref.partition("/")[0]
    assert here.write("restart", ref).outcome()[0] == "EEXIST"
    here.is_sound()
    pid = here.work.pid
    assert here.work.finish() == "PASS"
    until(lambda: here.site.read(f"procs/{pid}/wait").startswith("exit 0"), "its exit status")


def test_nothing_comes_to_life_that_no_agent_serves(here: Ground) -> None:
    criu = Waits(here, "before")
    here.begin("memory", *LARGE)
    ref = here.checkpoint("then=kill")
    here.gone()
    writer = here.write("restart", ref)
    here.wait_phase(2, "restoring")
    criu.reached()
    here.kill_agent()
    here.agent_again()
    criu.go()
    word, said = writer.outcome()
    assert word == "EIO" and "nothing of it runs" in said, (word, said)
    assert not here.work.tasks()
    here.is_sound()


def test_the_next_agent_says_that_nothing_came_to_life(here: Ground) -> None:
    here.begin("memory", *LARGE)
    ref = here.checkpoint("then=kill")
    here.gone()
    writer = here.write("restart", ref)
    here.wait_phase(2, "restoring")
    until(lambda: engines(here.site), "CRIU at work")
    here.kill_agent()
    until(lambda: not engines(here.site), "CRIU ends with the agent that it had the memory from")
    here.agent_again()
    word, said = writer.outcome()
    assert word == "EIO" and "nothing of it runs" in said, (word, said)
    assert not here.work.tasks()
    here.is_sound()
