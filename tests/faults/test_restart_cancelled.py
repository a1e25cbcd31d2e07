"""A restart that is given up while CRIU is at it: nothing of it lives, and the next one works."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ground import Ground
from tests.sites import until

SLOW = """#!/bin/sh
# stands in front of the real CRIU, and is slow to restore
for word in "$@"; do [ "$word" != restore ] || { : > {mark}; sleep 30; }; done
exec {criu} "$@"
"""


@pytest.fixture
def slow(here: Ground, tmp_path: Path) -> Path:
    """Have the agent use a CRIU that waits before it restores; returns what it makes then."""
    criu = here.site.facts(f"nodes/{here.site.node}/info")["criu_path"]
    script, mark = tmp_path / "criu", tmp_path / "restoring"
    script.write_text(SLOW.replace("{mark}", str(mark)).replace("{criu}", criu))
    script.chmod(0o755)
    here.site.stop_agent()
    here.agent_again("--criu", str(script))
    return mark


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_a_restart_is_given_up(here: Ground, slow: Path, how: str) -> None:
    here.begin("small")
    ref = here.checkpoint("then=kill name=given-up")
    here.gone()
    write = here.write("restart", ref)
    until(slow.exists, "CRIU at the restore")
    number = here.last_job()
    assert here.job(number)["phase"] == "restoring"
    if how == "cancel":
        here.tell(f"jobs/{number}/cancel", "1")
        assert write.outcome()[0] == "ECANCELED"
    else:
        write.kill()
    assert here.wait_over(number)["phase"] == "cancelled"
    assert not list((here.site.run / "keepers").iterdir())
    here.site.stop_agent()
    here.agent_again()
    here.restart(ref)
    here.work.wait_progress()
    here.is_sound()
