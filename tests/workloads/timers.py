"""Timers, a signalfd, and signals that stay pending: `timers.py DIR [SOURCE...]`.

The sources of ticks are itimer, posix-timer and timerfd, default all. A timerfd that goes off while
it is frozen and is not read before the dump is one that CRIU by itself restores disarmed.
"""

import ctypes
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from judge import Judge, judged, wait_until

PERIOD_S = 0.01
FAR_S = 100_000.0  # a timer that must not go off, and must not be forgotten
CLOCK = time.CLOCK_MONOTONIC
QUEUED = (11, 22, 33)
KEPT = signal.SIGRTMIN + 5  # stays pending from beginning to end, with values
HELD = signal.SIGUSR1  # stays pending too
READ = signal.SIGUSR2  # comes through the signalfd
TICK = signal.SIGRTMIN + 3  # of the POSIX timer

libc = ctypes.CDLL(None, use_errno=True)


class SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_long),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_int * 12),
    )


class TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class TimerSpec(ctypes.Structure):
    _fields_ = (("interval", TimeSpec), ("value", TimeSpec))


class Ticks:
    """How often each source has gone off, held against the time that has passed."""

    def __init__(self, sources: list[str]) -> None:
        self.seen = dict.fromkeys(sources, 0)
        self.began = time.monotonic()
        self.last = self.began

    def check(self) -> None:
        """Time goes on, and no timer runs ahead of it."""
        now = time.monotonic()
        assert now >= self.last, f"the monotonic clock went back by {self.last - now:.3f} s"
        self.last = now
        for what, count in self.seen.items():
            most = (now - self.began) / PERIOD_S + 2
            assert count <= most, f"the {what} went off {count} times in {now - self.began:.3f} s"


def work(judge: Judge, sources: list[str]) -> None:
    ticks = Ticks(sources)
    signal.pthread_sigmask(signal.SIG_BLOCK, {KEPT, HELD, READ})
    for value in QUEUED:
        call("sigqueue", os.getpid(), KEPT, ctypes.c_void_p(value))
    os.kill(os.getpid(), HELD)
    signals = signalfd(READ)
    readers = [SOURCES[source](ticks) for source in sources]
    signal.setitimer(signal.ITIMER_PROF, FAR_S, FAR_S)
    judge.ready(f"waits for signals and {', '.join(sources)}")
    while judge.going():
        os.kill(os.getpid(), READ)
        received(signals)
        for read in readers:
            read()
        ticks.check()
        judge.progress()
        time.sleep(PERIOD_S)
    for what, before in tuple(ticks.seen.items()):

        def goes_on(what: str = what, before: int = before) -> bool:
            for read in readers:
                read()
            return ticks.seen[what] > before + 2

        judge.expect(wait_until(goes_on), f"the {what} has stopped")
    period = signal.getitimer(signal.ITIMER_REAL)[1]
    expected = PERIOD_S if "itimer" in sources else 0.0
    judge.expect(period == expected, f"the itimer has a period of {period} s")
    rest, period = signal.getitimer(signal.ITIMER_PROF)
    judge.expect(FAR_S - 3600 < rest <= FAR_S + 1, f"the profiling timer has {rest} s left")
    judge.expect(abs(period - FAR_S) < 1, f"the profiling timer has a period of {period} s")
    check_pending(judge)


def check_pending(judge: Judge) -> None:
    pending = signal.sigpending()
    judge.expect({KEPT, HELD} <= pending, f"of the pending signals only {pending} are left")
    values = []
    while (info := signal.sigtimedwait({KEPT}, 0)) is not None:
        values.append(info.si_status)  # where siginfo has the value of a queued signal
    judge.expect(tuple(values) == QUEUED, f"queued signals came with {values}, not {QUEUED}")
    held = 0
    while signal.sigtimedwait({HELD}, 0) is not None:
        held += 1
    judge.expect(held == 1, f"the pending signal came {held} times")


def received(fd: int) -> None:
    """Take the one signal that was sent."""
    readable = select.poll()
    readable.register(fd, select.POLLIN)
    assert readable.poll(2000), "the signalfd does not give the signal"
    (signum,) = struct.unpack_from("<I", os.read(fd, 1024))
    assert signum == READ, f"the signalfd gave signal {signum}"


def call(name: str, *arguments: object) -> int:
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def signalfd(signum: int) -> int:
    mask = (ctypes.c_ulong * 16)(1 << (signum - 1))
    return call("signalfd", -1, mask, os.O_NONBLOCK | os.O_CLOEXEC)


def itimer(ticks: Ticks) -> Callable[[], None]:
    on_signal(signal.SIGALRM, ticks, "itimer")
    signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
    return lambda: None


def posix_timer(ticks: Ticks) -> Callable[[], None]:
    on_signal(TICK, ticks, "posix-timer")
    timer = ctypes.c_void_p()
    event = SigEvent(value=7, signo=TICK, notify=0)
    call("timer_create", CLOCK, ctypes.byref(event), ctypes.byref(timer))
    call("timer_settime", timer, 0, ctypes.byref(periodic()), None)
    return lambda: None


def timerfd(ticks: Ticks) -> Callable[[], None]:
    fd = call("timerfd_create", CLOCK, os.O_NONBLOCK | os.O_CLOEXEC)
    call("timerfd_settime", fd, 0, ctypes.byref(periodic()), None)

    def read() -> None:
        with suppress(BlockingIOError):
            ticks.seen["timerfd"] += int.from_bytes(os.read(fd, 8), sys.byteorder)

    return read


def on_signal(signum: int, ticks: Ticks, source: str) -> None:
    def count(_signum: int, _frame: object) -> None:
        ticks.seen[source] += 1

    signal.signal(signum, count)


def periodic() -> TimerSpec:
    period = TimeSpec(0, int(PERIOD_S * 1e9))
    return TimerSpec(period, period)


# Each arms its source and returns what takes the ticks that no signal has told of.
SOURCES = {"itimer": itimer, "posix-timer": posix_timer, "timerfd": timerfd}


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, sys.argv[2:] or list(SOURCES))
