"""A store that is full, taken or damaged, and a CRIU that hangs, fails or is no CRIU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.criu import FETCHED
from tests.faults.ground import Ground, ground
from tests.sites import Site

SMALL_MIB = 96
LARGE = ("200", "0.01", "0.9")


@pytest.fixture
def cramped() -> Iterator[Ground]:
    """A ground whose store is on a small filesystem."""
    site = Site()
    site.state.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "krg-test", str(site.state)]
    subprocess.run(tmpfs, check=True)
    try:
        with site, ground(site) as made:
            yield made
    finally:
        subprocess.run(["umount", "-l", str(site.state)], check=False, capture_output=True)
        shutil.rmtree(site.base, ignore_errors=True)


@pytest.mark.parametrize("memory", ["1G", "32M"])
def test_a_full_disk_costs_nothing_but_the_attempt(cramped: Ground, memory: str) -> None:
    """Noticed after the dump, or, where that does not fit into the agent's memory, during it."""
    here = cramped
    here.site.stop_agent()
    here.agent_again("--memory", memory)
    here.begin("counter")
    first = here.checkpoint()
    small, here.workload = here.work, None
    large = here.begin("memory", *LARGE)
    word, said = here.write(here.of("checkpoint"), "then=kill").outcome()
    assert word == "ENOSPC", (word, said)
    large.wait_progress()
    assert here.images() == [first]
    large.close()
    here.workload = small
    here.is_sound()
    here.end()
    here.restart(first)
    here.is_sound()


def test_a_second_agent_on_the_same_state_is_refused(here: Ground) -> None:
    here.begin("counter")
    options = ["--state", str(here.site.state), "--run", str(here.site.base / "other")]
    done = subprocess.run(
        [*here.site.program, *options], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode != 0 and "another krg-agent runs on" in done.stderr, done.stderr
    here.is_sound()


def test_a_damaged_store_is_told_in_words(here: Ground) -> None:
    here.begin("counter")
    ref = here.checkpoint()
    here.kill_agent()
    store = here.site.state / "store.db"
    kept = {path: path.read_bytes() for path in here.site.state.glob("store.db*")}
    for path in kept:
        path.unlink()
    store.write_bytes(b"this is no database at all\n" * 200)
    done = subprocess.run(
        [*here.site.program, "--state", str(here.site.state), "--run", str(here.site.run)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "is damaged" in done.stderr and "Traceback" not in done.stderr, done.stderr
    for path, content in kept.items():
        path.write_bytes(content)
    here.agent_again()
    assert here.images() == [ref]
    here.is_sound()


def test_a_criu_that_hangs_is_waited_for_and_can_be_given_up(here: Ground) -> None:
    here.begin("counter")
    go = here.site.base / "go"
    here.site.stop_agent()
    here.agent_again("--criu", criu(here, f"while [ ! -e {go} ]; do sleep 0.1; done"))
    writer = here.write(here.of("checkpoint"), "1")
    here.wait_phase(1, "dumping")
    here.kill_agent()
    here.agent_again("--criu", criu(here, ""))
    assert here.write(here.of("checkpoint"), "name=other").outcome()[0] == "EBUSY"
    assert here.job(1)["phase"] != "done" and writer.process.poll() is None
    go.touch()
    assert writer.outcome()[0] == "EIO"
    here.is_sound()


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$"])
@pytest.mark.parametrize("then", ["run", "kill"])
def test_a_criu_that_fails_leaves_the_tree_running(here: Ground, end: str, then: str) -> None:
    here.begin("counter")
    here.site.stop_agent()
    here.agent_again("--criu", criu(here, end))
    word, said = here.write(here.of("checkpoint"), f"then={then}").outcome()
    assert word == "EIO" and str(here.work.pid) in said, (word, said)
    assert here.job(1)["fate"] == "running"
    here.site.stop_agent()
    here.agent_again()
    here.is_sound()


def criu(here: Ground, first: str) -> str:
    """Make a CRIU that does something else before it dumps."""
    path = Path(here.site.base, f"criu-{abs(hash(first))}")
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" dump "*) {first or ":"};; esac\nexec {FETCHED} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)
