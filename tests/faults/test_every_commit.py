"""The agent dies at every commit of every verb in turn, before it and after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import doomed
from tests.faults.ground import Ground
from tests.sites import HERE, until

MOST = 40


class Doomed:
    """A ground whose agent can be told at which commit to die."""

    def __init__(self, here: Ground) -> None:
        self.here = here
        self._file = here.site.base / "doom"
        self._hit = Path(f"{self._file}.hit")
        here.site.program = [sys.executable, str(Path(doomed.__file__)), str(self._file)]
        here.site.environment["PYTHONPATH"] = str(HERE)
        here.site.stop_agent()
        here.agent_again()

    def dies_at(self, moment: str, number: int, path: str, line: str) -> tuple[bool, str]:
        """Write a line and have the agent die; returns whether it did before the write was through,
        and what the writer was answered: `ok` or an errno. An agent runs then that is not doomed.
        """
        self._hit.unlink(missing_ok=True)
        self._file.write_text(f"{moment} {number}")
        writer = self.here.write(path, line)
        agent = self.here.site.agent
        assert agent is not None
        until(lambda: agent.poll() is not None or writer.process.poll() is not None, "an end")
        hit = agent.poll() is not None
        self._file.unlink(missing_ok=True)
        if self._hit.exists():
            agent.wait()
            self.here.site.stop_agent()
            self.here.agent_again()
        return hit, writer.outcome()[0]


@pytest.fixture
def doom(here: Ground) -> Doomed:
    return Doomed(here)


def every(moment: str, once: Callable[[int], bool]) -> None:
    """Do `once` for one commit after the other until it is through without being hit."""
    for number in range(1, MOST):
        if not once(number):
            assert number > 3, f"only {number - 1} commits were hit"
            return
    raise AssertionError(f"hit {MOST} times {moment} a commit")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("then", ["run", "kill", "freeze"])
def test_a_checkpoint(doom: Doomed, moment: str, then: str) -> None:
    here = doom.here
    here.begin("counter")
    here.checkpoint()

    def once(number: int) -> bool:
        before = here.images()
        hit, word = doom.dies_at(moment, number, here.of("checkpoint"), f"then={then}")
        here.wait_over(here.last_job())
        assert word == "EHOSTUNREACH" or (word == "ok") == (len(here.images()) > len(before))
        is_frozen = here.site.facts(here.of("status")).get("state") == "frozen"
        assert not is_frozen or then == "freeze"
        here.is_sound(frozen=is_frozen)
        if is_frozen:
            here.tell(here.of("freeze"), "0")
            here.is_sound()
        return hit

    every(moment, once)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_restart(doom: Doomed, moment: str) -> None:
    here = doom.here
    here.begin("counter")

    def once(number: int) -> bool:
        ref = here.checkpoint("then=kill")
        here.gone()
        hit, word = doom.dies_at(moment, number, "restart", ref)
        here.wait_over(here.last_job())
        assert word == "EHOSTUNREACH" or (word == "ok") == bool(here.work.tasks())
        here.is_sound()
        return hit

    every(moment, once)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_freeze_and_thaw(doom: Doomed, moment: str) -> None:
    here = doom.here
    here.begin("counter")
    here.checkpoint()

    def state(word: str, wanted: bool) -> bool:
        here.wait_over(here.last_job())
        frozen = here.site.read(here.of("freeze")).startswith("frozen")
        assert word == "EHOSTUNREACH" or (word == "ok") == (frozen == wanted), (word, frozen)
        here.is_sound(frozen=frozen)
        return frozen

    def once(number: int) -> bool:
        hit, word = doom.dies_at(moment, number, here.of("freeze"), "1")
        if not state(word, True):
            here.tell(here.of("freeze"), "1")
        hit_again, word = doom.dies_at(moment, number, here.of("freeze"), "0")
        if state(word, False):
            here.tell(here.of("freeze"), "0")
        here.is_sound()
        return hit or hit_again

    every(moment, once)
