"""kill -9 of the agent while a job is under way, and what the next agent makes of it."""

from __future__ import annotations

import pytest

from tests.faults.ground import Ground

LARGE = ("300", "0.01", "0.5")


@pytest.mark.parametrize("phase", ["dumping", "storing"])
@pytest.mark.parametrize("then", ["run", "kill", "freeze", "stop"])
def test_an_agent_killed_during_a_checkpoint_leaves_the_tree_as_it_was(
    here: Ground, phase: str, then: str
) -> None:
    here.begin("memory", *LARGE)
    first = here.checkpoint("desc=first")
    writer = here.write(here.of("checkpoint"), f"then={then}")
    here.wait_phase(2, phase)
    here.kill_agent()
    here.agent_again()
    word, said = writer.outcome()
    job = here.wait_over(2)
    assert word == "EIO" and "the agent was ended" in said, (word, said)
    assert job["fate"] == "running" and job["message"] in said
    assert here.work.alive()
    assert here.images() == [first]
    here.is_sound()
    assert here.images() == [first, first.replace("v1", "v2")]
