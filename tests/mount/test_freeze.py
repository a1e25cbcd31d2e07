"""freeze from the keyboard: until 0, for a time, while a descriptor is open; never by a member."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.mount.conftest import typing
from tests.sites import Site, until
from tests.workloads.harness import Workload


@pytest.fixture
def own_site() -> Iterator[Site]:
    with Site() as made:
        yield made


def is_frozen(site: Site, tree: Workload) -> bool:
    return site.read(site.proc(tree.pid) / "freeze").startswith("frozen since ")


def stands_still(tree: Workload) -> bool:
    """Tell that a workload makes no step in ten of its periods."""
    before = tree.progress()
    time.sleep(0.5)
    return tree.progress() == before


def test_frozen_until_it_is_told_otherwise(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    assert shared_site.sh("echo 1 > $P/freeze", P=str(place)).returncode == 0
    assert is_frozen(shared_site, small) and stands_still(small)
    status = shared_site.facts(place / "status")
    assert status["state"] == "frozen" and status["frozen_since"] != "-"
    assert shared_site.write(place / "checkpoint", "1") == f"small.{small.pid}.n1/v1\n"
    assert is_frozen(shared_site, small) and stands_still(small)
    assert shared_site.sh("echo 1 > $P/freeze", P=str(place)).returncode == 0
    assert shared_site.sh("echo 0 > $P/freeze", P=str(place)).returncode == 0
    assert shared_site.read(place / "freeze") == "running\n"
    assert shared_site.sh("echo 0 > $P/freeze", P=str(place)).returncode == 0
    small.wait_progress()


def test_frozen_for_a_time(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    begun = time.monotonic()
    assert shared_site.sh("echo 1 for=1s > $P/freeze", P=str(place)).returncode == 0
    assert is_frozen(shared_site, small) and " until " in shared_site.read(place / "freeze")
    until(lambda: not is_frozen(shared_site, small), "thawed by itself", 5)
    assert 0.9 < time.monotonic() - begun < 4
    small.wait_progress()


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_frozen_while_open(
    shared_site: Site, small: Workload, number: signal.Signals | None
) -> None:
    script = f"exec 3> $K/procs/{small.pid}/freeze; echo 1 while-open >&3; echo ok; read; exec 3>&-"
    with typing(shared_site, f"{script}; sleep 1000", stdin_pipe=True) as shell:
        assert shell.stdout is not None and shell.stdin is not None
        assert shell.stdout.readline() == "ok\n"
        assert is_frozen(shared_site, small) and stands_still(small)
        if number is None:
            shell.stdin.write("\n")
            shell.stdin.flush()
        else:
            shell.send_signal(number)
        until(lambda: not is_frozen(shared_site, small), "thawed by the close", 5)
    small.wait_progress()


def test_frozen_while_open_ends_with_the_mount(own_site: Site, small: Workload) -> None:
    fd = os.open(own_site.proc(small.pid) / "freeze", os.O_WRONLY)
    try:
        os.write(fd, b"1 while-open")
        assert is_frozen(own_site, small) and stands_still(small)
        own_site.stop_mount(signal.SIGKILL)
        small.wait_progress()
    finally:
        os.close(fd)
    own_site.start_mount()
    assert own_site.read(own_site.proc(small.pid) / "freeze") == "running\n"


def test_a_mount_that_was_killed_comes_back_with_everything(
    own_site: Site, small: Workload
) -> None:
    place = own_site.proc(small.pid)
    own_site.write(place / "checkpoint", "name=kept")
    own_site.write(place / "freeze", "1")
    own_site.stop_mount(signal.SIGKILL)
    done = own_site.sh("echo 1 > $P/checkpoint", P=str(place))
    assert done.returncode == 1
    assert "not connected" in done.stderr or "No such file" in done.stderr, done
    own_site.start_mount()
    assert is_frozen(own_site, small)
    own_site.write(place / "freeze", "0")
    assert own_site.write(place / "checkpoint", "1") == "kept/v2\n"
    small.wait_progress()


def test_nothing_can_be_written_below_a_mount_that_is_gone(own_site: Site) -> None:
    own_site.stop_mount()
    done = own_site.sh("mkdir -p $K/procs/1; echo 1 > $K/restart")
    assert done.returncode == 1 and os.listdir(own_site.mnt) == []
    own_site.start_mount()


@pytest.mark.parametrize("words", ["1", "1 while-open", "1 for=1s"])
def test_a_member_cannot_freeze_its_own_tree(shared_site: Site, words: str) -> None:
    script = f"exec 3<>/$K/procs/$$/freeze; echo {words} >&3; echo status $?; cat <&3"
    with typing(shared_site, script) as shell:
        out, err = shell.communicate(timeout=20)
    assert "Resource deadlock avoided" in err and out.startswith("status 1\n")
    assert "error EDEADLK process " in out and "nobody would be left to write 0" in out


def test_a_child_cannot_freeze_the_tree_above_it(shared_site: Site) -> None:
    script = "(echo 1 > $K/procs/$$/freeze; echo status $?); echo goes on"
    with typing(shared_site, script) as shell:
        out, err = shell.communicate(timeout=20)
    assert out == "status 1\ngoes on\n" and "Resource deadlock avoided" in err


def test_a_signal_with_the_thaw(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    shared_site.write(place / "freeze", "1")
    assert shared_site.sh("echo 0 signal=TERM > $P/freeze", P=str(place)).returncode == 0
    until(lambda: (small.directory / "verdict").exists(), "ended by the signal")
    assert (small.directory / "verdict").read_text() == "PASS\n"


def test_a_frozen_tree_can_be_killed(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    shared_site.write(place / "freeze", "1")
    assert shared_site.sh("echo KILL > $P/signal", P=str(place)).returncode == 0
    small.wait_gone([small.pid])
    left = subprocess.run(
        ["find", "/sys/fs/cgroup", "-name", f"*{small.pid}.*"], capture_output=True, text=True
    )
    until(
        lambda: (
            not subprocess.run(
                ["find", "/sys/fs/cgroup", "-name", f"*krg*{small.pid}.*"],
                capture_output=True,
                text=True,
            ).stdout
        ),
        f"no cgroup left of {left.stdout}",
        10,
    )
