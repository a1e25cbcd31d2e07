"""The task that is blocked in a request of ours: is it in there, and what signals wait for it?

All of proc(5) and signal(7); a task may end between any two looks.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import facts

INTERRUPTING = sum(1 << (n - 1) for n in (1, 2, 3, 14, 15))  # HUP INT QUIT ALRM TERM
DEFAULT_IGNORED = sum(1 << (n - 1) for n in (17, 18, 23, 28))  # CHLD CONT URG WINCH
STOPPING = sum(1 << (n - 1) for n in (19, 20, 21, 22))  # STOP TSTP TTIN TTOU
KILL = 1 << 8


class Pending(NamedTuple):
    """`fatal`: a signal waits that will end the task. `caught`: one of HUP INT QUIT ALRM TERM
    waits that the task has a handler for. `gone`: there is no such task any more."""

    fatal: bool
    caught: bool
    gone: bool = False


GONE = Pending(fatal=False, caught=False, gone=True)


class Signals:
    """The signals that wait for a task, looked at as often as wanted through one descriptor."""

    def __init__(self, tid: int) -> None:
        """Raises OSError; ENOENT or ESRCH when there is no such task."""
        self._fd = os.open(f"/proc/{tid}/status", os.O_RDONLY | os.O_CLOEXEC)

    def pending(self) -> Pending:
        """Tell what waits now: signal(7), /proc/TID/status SigPnd ShdPnd SigBlk ... in proc(5)."""
        try:
            raw = os.pread(self._fd, 4096, 0)
            if len(raw) == 4096:  # very many groups stand before the signals
                raw = os.pread(self._fd, 1 << 20, 0)
        except ProcessLookupError:
            return GONE
        return Pending(fatal=False, caught=False) if NONE_PENDING in raw else _pending(raw)

    def close(self) -> None:
        os.close(self._fd)


NONE_PENDING = b"\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n"


def _pending(status: bytes) -> Pending:
    mask = {}
    for line in status[status.find(b"SigPnd") :].split(b"\n")[:6]:
        name, _, value = line.partition(b":")
        if value:
            mask[name] = int(value, 16)
    waiting = mask.get(b"SigPnd", 0) | mask.get(b"ShdPnd", 0)
    open_ones = waiting & ~mask.get(b"SigBlk", 0) & ~mask.get(b"SigIgn", 0)
    caught = mask.get(b"SigCgt", 0)
    fatal = (open_ones & ~caught & ~DEFAULT_IGNORED & ~STOPPING) | (waiting & KILL)
    return Pending(fatal=bool(fatal), caught=bool(open_ones & caught & INTERRUPTING))


SYS_WRITE = ("1", "18", "20")  # write, pwrite64, writev on x86_64


def is_writing(tid: int, ending: bytes) -> bool:
    """Tell whether a task is inside write(2) on a descriptor whose path ends in `ending`.

    A name that was looked up again since is shown as deleted by /proc; it still counts.
    """
    raw = facts.read(f"/proc/{tid}/syscall")
    words = (raw or b"").decode().split()
    if len(words) < 2 or words[0] not in SYS_WRITE:
        return False
    path = facts.link(tid, f"fd/{int(words[1], 16)}")
    return path.removesuffix(b" (deleted)").endswith(ending)
