"""Accepted verbs: each runs as a job that belongs to its object, not to the request.

A job holds the processes that it works on; a second one on any of them is EBUSY, unless it is the
same line and may join: from the same caller always, from anybody else as long as nothing is frozen
(they would miss their data). What a job came to is written down before anybody is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import trio

from krgfs.errors import (
    Busy,
    Cancelled,
    EngineFailed,
    Gone,
    KrgError,
    NotYours,
)
from krgfs.model import FOLLOWS, Caller, Job, Phase, Value

from .state import State, log_line

log = logging.getLogger(__name__)
GRACE_S = 1.0
SHOW_S = 0.2


class Running:
    """A job under way, as its operation sees it.

    `said` collects the engine's words for jobs/ID/log. `frozen` is set when somebody who joined now
    would miss data.
    """

    def __init__(self, state: State, job: Job, caller: Caller, holds: frozenset[int | str]) -> None:
        self.job = job
        self.caller = caller
        self.holds = holds
        self.frozen = False
        self.said = ""
        self.scope = trio.CancelScope()
        self.cancelled_by = ""
        self.cancelled_as: type[Cancelled] = Cancelled
        self.accepted = trio.Event()
        self.over = trio.Event()
        self._state = state
        self._shown = 0.0
        self._wanted_until: float | None = None

    @property
    def id(self) -> int:
        return self.job.id

    def phase(self, phase: Phase, **fields: Any) -> None:
        """Enter a phase, and tell the mounts."""
        if phase is not self.job.phase and phase not in FOLLOWS[self.job.phase]:
            raise AssertionError(f"job {self.id}: {phase} after {self.job.phase}")
        self.job = msgspec.structs.replace(self.job, phase=phase, **fields)
        self._state.show(self.job)

    def progress(self, done: int) -> None:
        """Tell how many bytes are done, not more often than anybody looks."""
        now = time.monotonic()
        if now - self._shown >= SHOW_S:
            self._shown = now
            self.job = msgspec.structs.replace(self.job, bytes_done=done)
            self._state.show(self.job)

    def note(self, **fields: Any) -> None:
        """Set facts of the job that its status shows; with a `line` it has passed its commit line,
        and a cancel comes too late."""
        self.job = msgspec.structs.replace(self.job, **fields)

    def cancel(self, why: str, kind: type[Cancelled] = Cancelled) -> None:
        """Have the operation undone, if it has not passed its commit line."""
        if not self.cancelled_by:
            self.cancelled_by, self.cancelled_as = why, kind
        self.scope.cancel()

    def is_same(self, verb: str, object: str, words: str) -> bool:
        return (self.job.verb, self.job.object, self.job.words) == (verb, object, words)

    def wanted_again(self) -> None:
        """The caller who was interrupted has come back."""
        self._wanted_until = None

    def unwanted(self) -> float:
        """The caller was interrupted; returns when to cancel if it does not come back."""
        self._wanted_until = trio.current_time() + GRACE_S
        return self._wanted_until

    async def cancel_unless_wanted(self, until: float) -> None:
        with trio.move_on_at(until):
            await self.over.wait()
        if self._wanted_until == until:
            self.cancel("its caller was interrupted")


class Jobs:
    """All jobs that run. Operations are started in `nursery`, which outlives every connection."""

    def __init__(self, state: State, nursery: trio.Nursery) -> None:
        self._state = state
        self._nursery = nursery
        self._running: dict[int, Running] = {}

    def __iter__(self) -> Any:
        return iter(tuple(self._running.values()))

    def get(self, number: int) -> Running | None:
        return self._running.get(number)

    async def joined(self, caller: Caller, verb: str, object: str, words: str) -> Running | None:
        """Return the job that the same line has joined, once it is written down and the mounts
        know of it; None when there is none to join."""
        while job := self.joinable(caller, verb, object, words):
            await job.accepted.wait()
            if job.id in self._state.jobs:
                return job
        return None

    def joinable(self, caller: Caller, verb: str, object: str, words: str) -> Running | None:
        """Return the running job that the same line may join, None when it starts a new one."""
        for job in self:
            if not job.is_same(verb, object, words) or job.scope.cancel_called:
                continue
            same = (job.caller.pid, job.caller.start) == (caller.pid, caller.start)
            if same and job.caller.uid == caller.uid:
                job.wanted_again()
                return job  # type: ignore[no-any-return]
            if not job.frozen:
                return job  # type: ignore[no-any-return]
        return None

    def refuse_if_held(self, holds: frozenset[int | str]) -> None:
        """Raise Busy when another job holds one of these: pids, and apps as `app NAME`."""
        for job in self:
            if shared := holds & job.holds:
                what = min(str(each) for each in shared)
                held = f"process {what}" if what.isdecimal() else what
                by = f"jobs/{job.id} ({job.job.verb}, {job.job.phase})"
                if job.cancelled_by and not job.job.line:
                    raise Busy(f"{held} is held by {by}, which is being cancelled; wait a moment")
                raise Busy(
                    f"{held} is held by {by}; wait for it, or write 1 to /krg/jobs/{job.id}/cancel"
                )

    async def start(
        self,
        verb: str,
        object: str,
        words: str,
        caller: Caller,
        holds: frozenset[int | str],
        operation: Callable[[Running], Awaitable[str]],
        uid: int | None = None,
        beside: Callable[[int], Iterable[Value]] = lambda number: (),
    ) -> Running:
        """Accept a verb: durable on return, together with the records that `beside` makes of the
        job's number. `operation` returns the line that is read back."""
        self.refuse_if_held(holds)
        job = Job(
            id=self._state.next_job(),
            verb=verb,
            object=object,
            node=self._state.node.name,
            uid=caller.uid if uid is None else uid,
            words=words,
            started=time.time(),
            caller=caller,
        )
        running = Running(self._state, job, caller, holds)
        self._running[job.id] = running
        self._state.jobs[job.id] = job
        try:
            await self._state.update(lambda: [job, *beside(job.id)])
        except BaseException:
            del self._running[job.id]
            del self._state.jobs[job.id]
            raise
        finally:
            running.accepted.set()
        self._state.event("job.accepted", job.uid, job=job.id, verb=verb, object=object)
        self._nursery.start_soon(self._life, running, operation)
        return running

    def resume(
        self,
        job: Job,
        holds: frozenset[int | str],
        operation: Callable[[Running], Awaitable[str]],
    ) -> None:
        """Go on with a job that an earlier agent left under way."""
        running = Running(self._state, job, job.caller or Caller(uid=job.uid, gid=0), holds)
        running.frozen = True
        running.accepted.set()
        self._running[job.id] = running
        self._nursery.start_soon(self._life, running, operation)

    async def _life(self, running: Running, operation: Callable[[Running], Awaitable[str]]) -> None:
        line = ""
        error: KrgError | None = None
        try:
            with running.scope:
                line = await operation(running)
            line = line or running.job.line
            if not line and running.scope.cancelled_caught:
                text = f"jobs/{running.id} was cancelled: {running.cancelled_by}"
                error = running.cancelled_as(text)
        except KrgError as exc:
            error = exc
        except Exception as exc:
            log.exception("job.crashed job=%d verb=%s", running.id, running.job.verb)
            error = EngineFailed(f"jobs/{running.id}: {type(exc).__name__}: {exc}; see the log")
        with trio.CancelScope(shield=True):
            await self.finish(running.job, line, error)
        del self._running[running.id]
        running.over.set()

    async def finish(self, job: Job, line: str, error: KrgError | None) -> None:
        """Write down what a job came to, and tell everybody."""
        fields: dict[str, Any] = {"ended": time.time(), "line": line}
        if error is not None:
            phase = Phase.CANCELLED if isinstance(error, Cancelled) else Phase.FAILED
            fields |= {
                "phase": phase,
                "errno": error.errno,
                "message": error.message,
                "fate": error.fate or job.fate,
            }
        else:
            fields |= {"phase": Phase.DONE, "bytes_done": max(job.bytes_total, job.bytes_done)}
        job = msgspec.structs.replace(job, **fields)
        self._state.jobs[job.id] = job
        try:
            await self._state.commit(job)
        except KrgError as exc:
            log.error("job.unwritten job=%d reason=%s", job.id, exc.message)
            self._state.show(job)
        outcome = "ok" if error is None else job.phase.value
        self._state.count(f'krg_jobs_total{{verb="{job.verb}",outcome="{outcome}"}}')
        self._state.add_log(log_line(job))
        self._state.event(
            "job.ended", job.uid, job=job.id, verb=job.verb, object=job.object, outcome=outcome
        )
        log.info(
            "job.ended job=%d verb=%s object=%s uid=%d caller_uid=%d caller_pid=%d outcome=%s %s",
            job.id,
            job.verb,
            job.object or "/",
            job.uid,
            job.caller.uid if job.caller else -1,
            job.caller.pid if job.caller else -1,
            outcome,
            f"message={job.message!r}" if error else f"line={line!r}",
        )

    def mine(self, number: int, caller: Caller) -> Running:
        """Return a running job that the caller may cancel."""
        running = self.get(number)
        if running is None:
            if number in self._state.jobs:
                raise Gone(f"jobs/{number} has ended already; there is nothing to cancel")
            raise Gone(f"there is no jobs/{number}")
        if not caller.owns(running.job.uid):
            raise NotYours(f"jobs/{number} belongs to uid {running.job.uid}")
        return running

    async def interrupted(self, number: int, caller: Caller, fatal: bool) -> None:
        """The caller got a signal: a fatal one cancels its job, any other one unless it asks for
        the same again within GRACE_S. Somebody who only joined cancels nothing."""
        running = self.get(number)
        if running is None or running.caller.pid != caller.pid:
            return
        if fatal:
            running.cancel("a signal ended its caller")
        else:
            self._nursery.start_soon(running.cancel_unless_wanted, running.unwanted())
