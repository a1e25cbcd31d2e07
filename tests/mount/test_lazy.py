"""lazy=yes: a tree that runs before its memory is back, and what may befall it until then."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from agent import feeder
from tests.mount.conftest import Start
from tests.sites import Site, until
from tests.workloads.harness import Workload

MIB = 96


@pytest.fixture
def ended(site: Site, start: Start) -> Workload:
    """A tree that judges its memory, of which there is an image `big/v1` and nothing else."""
    workload = start("memory", MIB, 0.05, 0.7)
    tree = workload.tree()
    site.write(site.proc(workload.pid) / "checkpoint", "name=big then=kill")
    workload.wait_gone(tree)
    return workload


@pytest.fixture
def site() -> object:
    with Site() as made:
        yield made


def lazily(site: Site, workload: Workload) -> Path:
    """Restart big/latest, and return the directory of its feeder."""
    assert site.write("restart", "big lazy=yes") == f"pid {workload.pid}\n"
    (found,) = [
        each
        for each in (site.run / "keepers").iterdir()
        if (each / "feeder.spec").exists() and is_feeding_or_done(each)
    ]
    return found


def is_feeding_or_done(directory: Path) -> bool:
    return feeder.progress(directory) is not None


def is_done(directory: Path) -> bool:
    found = feeder.progress(directory)
    return found is not None and found.state == "done"


def kinds(site: Site) -> list[str]:
    return [msgspec.json.decode(line)["kind"] for line in site.read("events").splitlines() if line]


def test_all_of_the_memory_comes_back(site: Site, ended: Workload) -> None:
    directory = lazily(site, ended)
    assert ended.wait_progress()
    until(lambda: is_done(directory), "all is fed")
    until(lambda: "tree.fed" in kinds(site), "the agent has noticed")
    assert not os.listdir(site.state / "feeding")
    assert ended.finish() == "PASS"


def test_a_checkpoint_waits_for_pages_that_are_missing(site: Site, ended: Workload) -> None:
    directory = lazily(site, ended)
    tree = ended.tree()
    answer = site.write(site.proc(ended.pid) / "checkpoint", "name=big then=kill")
    assert answer == "big/v2\n"
    assert is_done(directory)
    ended.wait_gone(tree)
    assert site.write("restart", "big/v2").startswith("pid ")
    assert ended.wait_progress()
    assert ended.finish() == "PASS"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_that_ends_takes_no_memory_along(
    site: Site, ended: Workload, number: signal.Signals
) -> None:
    directory = lazily(site, ended)
    site.stop_agent(number)
    until(lambda: is_done(directory), "the feeder goes on without an agent")
    site.start_agent()
    until(lambda: not os.listdir(site.state / "feeding"), "the next agent tidies up")
    assert ended.wait_progress()
    assert ended.finish() == "PASS"


def test_an_image_removed_while_it_is_fed(site: Site, ended: Workload) -> None:
    directory = lazily(site, ended)
    assert site.sh("rmdir $K/images/big/v1").returncode == 0
    until(lambda: is_done(directory), "all is fed")
    assert ended.wait_progress()
    assert ended.finish() == "PASS"


def test_a_damaged_image_is_refused_before_any_pid_is_touched(site: Site, ended: Workload) -> None:
    (pack, *_) = sorted(
        (site.state / "images" / "packs").glob("*/*"), key=lambda p: -p.stat().st_size
    )
    with open(pack, "r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(OSError, match="Bad message"):
        site.write("restart", "big lazy=yes")
    assert not os.path.exists(f"/proc/{ended.pid}")
    said = site.read("restart")
    assert "pages-" in said and "damaged" in said


def test_a_feeder_that_is_killed_takes_the_tree_along(site: Site, ended: Workload) -> None:
    directory = lazily(site, ended)
    doomed = feeder.processes(directory)
    for each in doomed:
        os.kill(each.pid, signal.SIGKILL)
    lost = len(doomed) == 2 and not is_done(directory)
    until(lambda: {"tree.fed", "tree.lost"} & {*kinds(site)}, "the agent has noticed")
    assert ("tree.lost" in kinds(site)) == lost
    if lost:
        until(lambda: not os.path.exists(f"/proc/{ended.pid}"), "nothing of it runs")


def test_an_agent_tells_only_once_of_a_tree_that_was_fed(site: Site, ended: Workload) -> None:
    lazily(site, ended)
    until(lambda: "tree.fed" in kinds(site), "the agent has noticed")
    site.stop_agent()
    site.start_agent()
    state = "nodes/n1/state"
    until(lambda: site.read(state).startswith("online"), "the mount has its agent again")
    assert "tree.fed" not in kinds(site)
