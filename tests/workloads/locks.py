"""File locks: a flock, an exclusive and a shared record lock, held from beginning to end."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable
from functools import partial

from judge import Judge, judged

RANGE = (10, 20)  # length and start of the exclusive record lock
SHARED = (5, 100)


def work(judge: Judge) -> None:
    whole = os.open(judge.path("flocked"), os.O_RDWR | os.O_CREAT, 0o600)
    parts = os.open(judge.path("locked"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(whole, fcntl.LOCK_EX)
    fcntl.lockf(parts, fcntl.LOCK_EX, *RANGE)
    fcntl.lockf(parts, fcntl.LOCK_SH, *SHARED)
    judge.ready("holds file locks")
    while judge.going():
        judge.progress()
        time.sleep(0.01)
    judge.fork("the rival for the locks", lambda: rival(judge))


def rival(judge: Judge) -> None:
    """Try for every lock as another process would: only what is free or shared may be had."""
    whole = os.open(judge.path("flocked"), os.O_RDWR)
    parts = os.open(judge.path("locked"), os.O_RDWR)
    flocked = refused(partial(fcntl.flock, whole, fcntl.LOCK_SH | fcntl.LOCK_NB))
    assert flocked, "the flock is lost"
    for kind, (length, begin), held in (
        (fcntl.LOCK_SH, RANGE, True),
        (fcntl.LOCK_EX, (10, 0), False),
        (fcntl.LOCK_EX, (10, 30), False),
        (fcntl.LOCK_SH, SHARED, False),
        (fcntl.LOCK_EX, SHARED, True),
    ):
        word = "lost" if held else "more than it was"
        was_refused = refused(partial(fcntl.lockf, parts, kind | fcntl.LOCK_NB, length, begin))
        assert was_refused == held, f"the lock on {length} bytes from {begin} is {word}"


def refused(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError as exc:
        assert exc.errno in (errno.EAGAIN, errno.EACCES), exc
        return True
    return False


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
