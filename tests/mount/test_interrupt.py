"""Signals of a blocked writer, who joins a job, and tasks of the tree that wait in the mount."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krgfs import facts
from tests.mount.conftest import typing, wait_blocked
from tests.sites import Site, sleeper, until
from tests.workloads.harness import Workload

SOON_S = 2.0  # the goal is 0.2 s
HOLD = "import sys, time; held = bytearray(b'x') * (int(sys.argv[1]) << 20); print(flush=True)\n"
HOLD += "time.sleep(1000)"


@contextlib.contextmanager
def large(mib: int = 500) -> Iterator[int]:
    """A process with so much memory that its checkpoint takes a while."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(mib)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # its other end has nobody now
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def job_of(site: Site, pid: int) -> dict[str, str]:
    return site.facts(site.proc(pid) / "job" / "status")


def phase_of(site: Site, pid: int) -> str:
    return job_of(site, pid).get("phase", "")


def runs(site: Site, pid: int) -> bool:
    """Tell that a tree is neither frozen nor stopped, nor held by anybody's job."""
    known, task = site.facts(site.proc(pid) / "status"), facts.task(pid)
    return known["state"] == "running" and task is not None and task.state in "SR"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_ends_who_waits_for_the_end(
    shared_site: Site, small: Workload, number: signal.Signals
) -> None:
    with typing(shared_site, f"echo 1 > $K/procs/{small.pid}/wait; echo went on") as writer:
        wait_blocked(writer.pid, "wait")
        begun = time.monotonic()
        writer.send_signal(number)
        out, _ = writer.communicate(timeout=10)
        took = time.monotonic() - begun
    print(f"{number.name} ended a blocked wait in {took:.3f} s")
    assert took < SOON_S and writer.returncode == -number and out == ""
    small.wait_progress()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("then", ["run", "freeze"])
def test_a_signal_ends_a_checkpoint_and_the_tree_runs(
    shared_site: Site, number: signal.Signals, then: str
) -> None:
    with large() as pid:
        name = f"{then}-{number.name}"
        line = f"name={name} then={then}"
        with typing(shared_site, f"echo {line} > $K/procs/{pid}/checkpoint") as writer:
            until(lambda: phase_of(shared_site, pid) == "dumping", "dumping")
            begun = time.monotonic()
            writer.send_signal(number)
            writer.communicate(timeout=10)
            took = time.monotonic() - begun
        print(f"{number.name} ended a checkpoint of 500 MiB in {took:.3f} s")
        assert took < SOON_S and writer.returncode == -number
        until(lambda: phase_of(shared_site, pid) == "cancelled", "the job cancelled")
        assert job_of(shared_site, pid)["errno"] == "EINTR"
        until(lambda: runs(shared_site, pid), "the tree runs")
        assert not (shared_site.mnt / "images" / name).exists()
        assert shared_site.sh("ls -A $D", D=f"{shared_site.state}/images").stdout.count(name) <= 1
        assert shared_site.read(shared_site.proc(pid) / "checkpoint").startswith("error EINTR ")
        shared_site.write(shared_site.proc(pid) / "checkpoint", f"name={name}")
        assert shared_site.read(shared_site.proc(pid) / "checkpoint") == f"{name}/v1\n"


def test_timeout_ends_a_wait(shared_site: Site, small: Workload) -> None:
    begun = time.monotonic()
    done = shared_site.sh(f"timeout 1 sh -c 'echo 1 > $K/procs/{small.pid}/wait'")
    took = time.monotonic() - begun
    print(f"timeout 1 took {took:.3f} s")
    assert done.returncode == 124 and took < 1 + SOON_S
    small.wait_progress()


def test_signals_that_do_not_interrupt_leave_the_writer_alone(
    shared_site: Site, small: Workload
) -> None:
    script = f"trap '' INT TERM; echo 1 > $K/procs/{small.pid}/wait"
    with typing(shared_site, script) as writer:
        wait_blocked(writer.pid, "wait")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCHLD):
            writer.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.5)
        writer.send_signal(signal.SIGKILL)
        writer.wait(SOON_S)


def test_another_thread_of_the_caller_may_be_the_one_that_is_killed(
    shared_site: Site, small: Workload
) -> None:
    script = (
        "import sys, threading, time\n"
        "def write(): open(sys.argv[1], 'w').write('1')\n"
        "threads = [threading.Thread(target=write) for _ in range(4)]\n"
        "[each.start() for each in threads]\n"
    )
    path = shared_site.proc(small.pid) / "wait"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], start_new_session=True)
    try:
        wait_blocked(writer.pid, "wait")
        begun = time.monotonic()
        writer.kill()
        writer.wait(10)
        print(f"a process with four blocked threads was killed in {time.monotonic() - begun:.3f} s")
        assert time.monotonic() - begun < SOON_S
    finally:
        writer.kill()


INHERITS = """
exec 3> $K/procs/{pid}/wait
(echo 1 >&3; echo never) &
child=$!
echo $child
wait $child
echo "status $?"
"""


def test_a_writer_that_inherited_its_descriptor_is_interrupted_too(
    shared_site: Site, small: Workload
) -> None:
    with typing(shared_site, INHERITS.format(pid=small.pid)) as shell:
        assert shell.stdout is not None
        child = int(shell.stdout.readline())
        wait_blocked(child, "wait")
        begun = time.monotonic()
        os.kill(child, signal.SIGTERM)
        out, _ = shell.communicate(timeout=10)
        print(f"the heir was ended in {time.monotonic() - begun:.3f} s")
    assert out == "status 143\n" and time.monotonic() - begun < SOON_S


RETRIES = """
import os, signal, sys
caught = []
signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
fd = os.open(sys.argv[1], os.O_RDWR)
os.write(fd, sys.argv[2].encode())  # begun again by Python after each signal (PEP 475)
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(caught), os.read(fd, 200).decode().strip())
"""


def test_a_write_begun_again_after_a_caught_signal_joins_its_job(shared_site: Site) -> None:
    with large() as pid:
        before = len(os.listdir(shared_site.mnt / "jobs"))
        line = "name=again then=freeze desc='takes a while'"
        done = subprocess.run(
            [sys.executable, "-c", RETRIES, str(shared_site.proc(pid) / "checkpoint"), line],
            capture_output=True,
            text=True,
            timeout=60,
        )
        caught, answer = done.stdout.split()
        print(f"{caught} signals while the checkpoint ran")
        assert answer == "again/v1" and done.stderr == ""
        assert int(caught) >= 1, "no signal came while the write was blocked: nothing was proved"
        assert len(os.listdir(shared_site.mnt / "jobs")) == before + 1
        shared_site.write(shared_site.proc(pid) / "freeze", "0")


def test_a_caught_signal_without_another_try_cancels(shared_site: Site) -> None:
    with large(2000) as pid, sleeper() as other:  # not over within the second of grace
        script = (
            "import ctypes, os, signal, sys\n"
            "signal.signal(signal.SIGALRM, lambda *_: None)\n"
            "signal.siginterrupt(signal.SIGALRM, True)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
            "fd = os.open(sys.argv[1], os.O_WRONLY)\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "print(libc.write(fd, b'name=once', 9), ctypes.get_errno(), flush=True)\n"
            "signal.pause()\n"
        )
        path = shared_site.proc(pid) / "checkpoint"
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "-1 4\n"
            until(lambda: phase_of(shared_site, pid) in ("cancelled", "done"), "the job's end")
            assert phase_of(shared_site, pid) == "cancelled"
            assert runs(shared_site, pid) and runs(shared_site, other)
        finally:
            writer.kill()
            writer.communicate()


def test_joining_before_and_after_the_freeze(shared_site: Site, small: Workload) -> None:
    """Two large dumps take both places at the engine, so the third job waits before its freeze."""
    with large() as one, large() as two, contextlib.ExitStack() as stack:
        enter = stack.enter_context
        dumps = [
            enter(typing(shared_site, f"echo 1 > $K/procs/{pid}/checkpoint")) for pid in (one, two)
        ]
        for pid in (one, two):
            until(lambda pid=pid: phase_of(shared_site, pid) == "dumping", "dumping")
        place = f"$K/procs/{small.pid}/checkpoint"
        joined = [
            enter(typing(shared_site, f"echo name=joined > {place}; cat {place}")) for _ in range(3)
        ]
        large_place = f"$K/procs/{one}/checkpoint"
        late = shared_site.sh(f"echo 1 > {large_place} || {{ cat {large_place}; exit 1; }}")
        other = shared_site.sh(f"echo name=other > {place} || {{ cat {place}; exit 1; }}")
        phases = [phase_of(shared_site, pid) for pid in (one, two)]
        assert phases == ["dumping", "dumping"] or "storing" in phases, "they were over too soon"
        job = job_of(shared_site, one)["id"]
        assert late.returncode == 1 and "Device or resource busy" in late.stderr
        assert late.stdout.startswith(f"error EBUSY process {one} is held by jobs/{job} (checkp")
        assert f"/krg/jobs/{job}/cancel" in late.stdout
        if other.returncode:
            assert "error EBUSY" in other.stdout
        for writer in joined:
            out, err = writer.communicate(timeout=30)
            assert (out, err) == ("joined/v1\n", "")
        for writer in dumps:
            assert writer.wait(30) == 0
    assert len(list((shared_site.mnt / "images" / "joined").glob("v*"))) == 1


def test_cancel_ends_a_job(shared_site: Site) -> None:
    with large() as pid:
        path = shared_site.proc(pid) / "checkpoint"
        with typing(shared_site, f"echo name=ended > {path}; echo $?") as writer:
            until(lambda: phase_of(shared_site, pid) == "dumping", "dumping")
            done = shared_site.sh(f"echo 1 > $K/procs/{pid}/job/cancel")
            assert (done.returncode, done.stderr) == (0, "")
            out, err = writer.communicate(timeout=20)
        assert out == "1\n" and "Operation canceled" in err
        assert job_of(shared_site, pid)["phase"] == "cancelled"
        assert "uid 0 wrote to its cancel" in path.read_text()
        assert runs(shared_site, pid)


def test_async_returns_at_once_and_the_job_goes_on(shared_site: Site) -> None:
    with large(200) as pid:
        path = shared_site.proc(pid) / "checkpoint"
        done = shared_site.sh(f"exec 3<>{path}; echo name=later async >&3; cat <&3")
        assert done.returncode == 0
        assert done.stdout in (f"running jobs/{job_of(shared_site, pid)['id']}\n", "later/v1\n")
        until(lambda: path.read_text() == "later/v1\n", "the image")


MEMBER = "$0 -c 'echo 1 > '$1 2> $2; echo status $? >> $2; sleep 1000"


@contextlib.contextmanager
def waiting_member(shell: str, file: Path, said: Path) -> Iterator[int]:
    """A tree with a child that waits in a verb file, by a shell that writes again (dash) or not."""
    process = subprocess.Popen(
        ["bash", "-c", MEMBER, shell, str(file), str(said)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_blocked(process.pid, file.name)
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("then", ["run", "freeze", "stop", "kill"])
def test_a_member_that_waits_in_the_mount_is_answered_before_a_dump(
    shared_site: Site, small: Workload, tmp_path: Path, then: str, shell: str
) -> None:
    said = tmp_path / "said"
    with waiting_member(shell, shared_site.proc(small.pid) / "wait", said) as pid:
        path = shared_site.proc(pid) / "checkpoint"
        name = f"{then}-{shell}"
        begun = time.monotonic()
        done = shared_site.sh(f"exec 3<>{path}; echo then={then} name={name} >&3; cat <&3")
        print(f"then={then} with a member of {shell} took {time.monotonic() - begun:.3f} s")
        assert (done.stdout, done.stderr) == (f"{name}/v1\n", "")
        assert time.monotonic() - begun < 3
        if then == "freeze":
            shared_site.write(shared_site.proc(pid) / "freeze", "0")
        if then == "stop":
            os.killpg(pid, signal.SIGCONT)
        if then != "kill":
            goes_on_after(shell, pid, said)
    small.wait_progress()


def goes_on_after(shell: str, pid: int, said: Path) -> None:
    """Assert that bash has told of its EINTR, and that dash waits again."""
    if shell == "dash":
        wait_blocked(pid, "wait")
        assert said.read_text() == ""
        return
    until(lambda: "status 1\n" in said.read_text(), "the member was answered")
    assert "Interrupted system call" in said.read_text()


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_freeze_of_a_tree_with_a_waiting_member(
    shared_site: Site, small: Workload, tmp_path: Path, shell: str
) -> None:
    said = tmp_path / "said"
    with waiting_member(shell, shared_site.proc(small.pid) / "wait", said) as pid:
        place = shared_site.proc(pid)
        assert shared_site.write(place / "freeze", "1").startswith("frozen since ")
        assert shared_site.write(place / "freeze", "0") == "running\n"
        goes_on_after(shell, pid, said)


def test_a_member_cannot_wait_for_its_own_end(shared_site: Site) -> None:
    done = shared_site.sh("exec 3<>$K/self/wait; echo 1 >&3; cat <&3")
    assert "Resource deadlock avoided" in done.stderr
