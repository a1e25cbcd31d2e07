"""Writers that wait in a verb file, and what may end their waiting early.

The kernel does not let a task leave a FUSE request that the mount has taken until it is answered,
so a pending signal is looked for here (signal(7), proc(5)) and answered with EINTR: within LOOK_S,
and with very many blocked so much later that looking does not slow the readers. Tasks that are
about to be frozen have to be answered too, because no freezer holds a task inside a request.
"""

from __future__ import annotations

import enum
import errno
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from . import facts, pending
from .model import Caller

LOOK_S = 0.05
LOOKS = 40  # at a time


class Why(enum.Enum):
    """Why a waiting writer is answered before what it waits for has happened."""

    FATAL = "a signal ends the caller"
    CAUGHT = "a signal waits for the caller"
    FREEZE = "the caller is about to be frozen"
    END = "the mount ends"


class Waiting:
    """One blocked request: `scope` is cancelled, with `why` set, when it is to be answered."""

    def __init__(self, caller: Caller, ending: bytes) -> None:
        self.caller = caller
        self.scope = trio.CancelScope()
        self.why: Why | None = None
        self._ending = ending
        self._writer = 0
        self._process = 0
        self._signals: pending.Signals | None = None

    def answer(self, why: Why) -> None:
        if self.why is None:
            self.why = why
            self.scope.cancel()

    def look(self) -> None:
        """Answer if a signal waits for the task that is blocked."""
        try:
            if self._signals is None:
                self._signals = pending.Signals(self.writer())
            found = self._signals.pending()
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ESRCH):
                return  # no descriptor is free: the next look may have one
            found = pending.GONE
        if found.fatal or found.gone:
            self.answer(Why.FATAL)
        elif found.caught:
            self.answer(Why.CAUGHT)

    def close(self) -> None:
        if self._signals is not None:
            self._signals.close()

    def process(self) -> int:
        """Return the process of the task that is blocked, 0 when it is gone."""
        if not self._process:
            found = facts.ids(self.writer())
            self._process = found.tgid if found is not None else 0
        return self._process

    def writer(self) -> int:
        """Return the task that is inside the write: nearly always the one that opened the file,
        else one that inherited the descriptor."""
        if not self._writer:
            self._writer = self._find_writer() or self.caller.tid
        return self._writer

    def _find_writer(self) -> int:
        if pending.is_writing(self.caller.tid, self._ending):
            return self.caller.tid
        heirs = [task.pid for task in facts.tree(self.caller.pid)]
        for pid in (*heirs, *(task.pid for task in facts.processes())):
            for tid in facts.threads(pid):
                if pending.is_writing(tid, self._ending):
                    return tid
        return 0


class Blocked:
    """All of them. `watch` runs as long as the mount."""

    def __init__(self) -> None:
        self._waiting: set[Waiting] = set()
        self._brief: Counter[int] = Counter()
        self._held: dict[int, frozenset[int]] = {}
        self._is_ending = False
        self._left = trio.Event()
        self._came = trio.Event()

    @contextmanager
    def waiting(self, caller: Caller, ending: bytes) -> Iterator[Waiting]:
        """Enter the block as a request that signals and freezes may end."""
        entry = Waiting(caller, ending)
        if self.is_held(caller.pid):
            entry.answer(Why.FREEZE)
        if self._is_ending:
            entry.answer(Why.END)
        self._waiting.add(entry)
        self._came.set()
        try:
            with entry.scope:
                yield entry
        finally:
            self._waiting.discard(entry)
            entry.close()
            self._left.set()
            self._left = trio.Event()

    @contextmanager
    def brief(self, caller: Caller) -> Iterator[None]:
        """Enter the block as a request that is answered soon by itself: `release` waits for it."""
        self._brief[caller.pid] += 1
        try:
            yield
        finally:
            self._brief[caller.pid] -= 1
            if not self._brief[caller.pid]:
                del self._brief[caller.pid]
            self._left.set()
            self._left = trio.Event()

    def is_held(self, pid: int) -> bool:
        """Tell whether a process is about to be frozen: its requests must not wait."""
        return any(pid in pids for pids in self._held.values())

    async def release(self, ticket: int, pids: list[int]) -> None:
        """Answer all that these processes wait for, and do so until `resume`."""
        self._held[ticket] = frozenset(pids)
        held = self._held[ticket]
        while True:
            mine = [each for each in self._waiting if self._is_of(each, held)]
            if not mine and held.isdisjoint(self._brief):
                break
            for each in mine:
                each.answer(Why.FREEZE)
            await self._left.wait()
        await trio.lowlevel.checkpoint()  # the handlers' answers reach the kernel in this step

    def resume(self, ticket: int) -> None:
        self._held.pop(ticket, None)

    def resume_all(self) -> None:
        """The agent is gone: nobody is about to be frozen any more."""
        self._held.clear()

    def end(self) -> None:
        """Answer all that wait, and from now on everybody at once: the mount ends."""
        self._is_ending = True
        for each in tuple(self._waiting):
            each.answer(Why.END)

    async def watch(self) -> None:
        """Look at the signals of all blocked writers until cancelled; idle when there is none."""
        while True:
            if not self._waiting:
                self._came = trio.Event()
                await self._came.wait()
            due = deque(self._waiting)
            while due:
                await trio.sleep(LOOK_S)
                for each in [due.popleft() for _ in range(min(LOOKS, len(due)))]:
                    if each in self._waiting:
                        each.look()

    @staticmethod
    def _is_of(entry: Waiting, pids: frozenset[int]) -> bool:
        if entry.caller.pid in pids:
            return True
        return entry.why is None and entry.process() in pids
