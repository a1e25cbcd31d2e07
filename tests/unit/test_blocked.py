"""Writers that wait: signals and freezes end their waiting, nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from krgfs import pending
from krgfs.blocked import Blocked, Why
from krgfs.model import Caller


def caller(pid: int) -> Caller:
    return Caller(uid=0, gid=0, pid=pid, tid=pid)


async def test_a_release_answers_the_tasks_that_are_to_be_frozen_and_no_other() -> None:
    blocked = Blocked()
    seen: list[tuple[int, Why | None]] = []

    async def wait(pid: int) -> None:
        with blocked.waiting(caller(pid), b"nothing") as waiting:
            await trio.sleep_forever()
        seen.append((pid, waiting.why))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, os.getpid())
        nursery.start_soon(wait, 1)
        await trio.testing.wait_all_tasks_blocked()
        await blocked.release(7, [os.getpid()])
        assert seen == [(os.getpid(), Why.FREEZE)]
        await wait(os.getpid())  # held: answered at once
        blocked.resume(7)
        with blocked.waiting(caller(os.getpid()), b"nothing") as waiting:
            await trio.lowlevel.checkpoint()
        assert waiting.why is None
        nursery.cancel_scope.cancel()


async def test_a_release_waits_for_requests_that_end_by_themselves() -> None:
    blocked = Blocked()
    order: list[str] = []

    async def submit(task_status: trio.TaskStatus[None]) -> None:
        with blocked.brief(caller(42)):
            task_status.started()
            await trio.testing.wait_all_tasks_blocked()
            order.append("answered")

    async with trio.open_nursery() as nursery:
        await nursery.start(submit)
        await blocked.release(1, [42])
        order.append("released")
    assert order == ["answered", "released"]


def child(code: str) -> subprocess.Popen[str]:
    """A child that has set its signals up when its line has been read."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys, time\n{code}\nprint('up', flush=True)\n"
         "signal.sigtimedwait([], 30)"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def frozen_pending(code: str, number: int) -> pending.Pending:
    """What is pending for a child that is stopped (and so cannot take the signal) when it comes."""
    process = child(code)
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        process.send_signal(number)
        signals = pending.Signals(process.pid)
        try:
            return signals.pending()
        finally:
            signals.close()
    finally:
        process.kill()
        process.communicate()


def test_a_signal_with_its_default_action_is_fatal() -> None:
    assert frozen_pending("", signal.SIGTERM) == pending.Pending(fatal=True, caught=False)


def test_a_signal_that_has_a_handler_is_caught() -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: None)"
    assert frozen_pending(code, signal.SIGTERM) == pending.Pending(fatal=False, caught=True)


def test_blocked_ignored_and_harmless_signals_end_nothing() -> None:
    nothing = pending.Pending(fatal=False, caught=False)
    assert frozen_pending("", signal.SIGCHLD) == nothing
    assert frozen_pending("signal.signal(15, signal.SIG_IGN)", signal.SIGTERM) == nothing
    assert frozen_pending("signal.pthread_sigmask(0, [15])", signal.SIGTERM) == nothing
    handler = "signal.signal(signal.SIGUSR1, lambda *_: None)"
    assert frozen_pending(handler, signal.SIGUSR1) == nothing


def test_a_task_that_has_ended_is_gone() -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    signals = pending.Signals(process.pid)
    assert not signals.pending().gone
    process.communicate()
    assert signals.pending().gone
    signals.close()
    with pytest.raises(FileNotFoundError):
        pending.Signals(process.pid)
