"""Open files: a snapshot of the content for each reader, one command for each write.

Content is made at the first read after open or after a write; reads count from the end of the last
write, because they share the descriptor's offset (`exec 3<>f; echo 1 >&3; cat <&3`). A read at
offset 0, or one that goes back, makes the content anew.
"""

from __future__ import annotations

import errno
import os
import select
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

import trio

from . import facts, render, tree, wire
from .ahead import Reader
from .blocked import Blocked, Why
from .client import Client
from .errors import (
    BadWords,
    Busy,
    Cancelled,
    Gone,
    KrgError,
    PartOfIt,
    Unreachable,
    Unsupported,
    name_of,
)
from .model import Caller, Image, Job, Phase
from .places import Kind, Place, Sight, tree_of, version_of
from .verbs import MAX_BYTES, Checkpoint, Command, Freeze, Restart, Wait, parse

CLOSING_S = 0.1
RESTORING_S = 5.0
STATUS_S = 2.0
READ_ONLY = "it takes no writes"
KEPT_REFUSALS = 1000
OWN_STATE = ("freeze", "wait")
OWN_JOB = ("restart", "verify", "sweep", "diff")  # read back what that very handle asked for
RUNS_AGAIN = (Phase.STORING, Phase.FINISHING)  # what durable=no waits for


class Handle:
    """One open of one place by one caller."""

    def __init__(self, number: int, inode: int, place: Place, caller: Caller, append: bool) -> None:
        self.number = number
        self.inode = inode
        self.place = place
        self.caller = caller
        self.job = 0
        self.last_job = 0
        self.wrote = False
        self.digest = ""  # of the image that the file is in
        self.reader: Reader | None = None
        self.failed: KrgError | None = None
        self.notify: Callable[[], None] | None = None
        self.seen = 0
        self._base: int | None = 0 if append else None
        self._content: bytes | None = None
        self._error = ""

    def written(self, end: int, error: str = "") -> None:
        """A write left the offset here: the next read begins there, with fresh content."""
        self._base = end
        self._content = None
        self._error = error
        self.wrote = True

    def needs_content(self, offset: int) -> bool:
        """Tell whether a read at `offset` wants the content made anew, and count offsets anew."""
        if self._base is None:
            self._base = offset
        if offset < self._base:
            self._base = 0
            self._content = None
        return self._content is None or offset == self._base

    def make(self, content: bytes) -> None:
        self._content = f"{self._error}\n".encode() if self._error else content
        self._error = ""

    def slice(self, offset: int, size: int) -> bytes:
        start = offset - (self._base or 0)
        return (self._content or b"")[start : start + size]


class Refusal(NamedTuple):
    """What a verb file reads back after an error, in the place of what it had read before."""

    line: str
    instead_of: bytes


class Handles:
    """All open files of the mount, and what reading and writing them does."""

    def __init__(self, client: Client, blocked: Blocked, sight: Callable[[Caller], Sight]) -> None:
        self._client = client
        self._blocked = blocked
        self._sight = sight
        self._open: dict[int, Handle] = {}
        self._next = 0
        self._readers: OrderedDict[Reader, None] = OrderedDict()
        self._closed = trio.Event()
        self._refusals: OrderedDict[tuple[Place, int], Refusal] = OrderedDict()

    def __iter__(self) -> Iterator[Handle]:
        return iter(tuple(self._open.values()))

    def open(self, inode: int, place: Place, caller: Caller, flags: int) -> int:
        self._next += 1
        append = bool(flags & os.O_APPEND)
        handle = self._open[self._next] = Handle(self._next, inode, place, caller, append)
        if place.row.name == "FILE":
            handle.digest = self._digest(handle)
            if handle.digest:
                handle.reader = Reader(self._client, self._readers, caller, place.args)
        return self._next

    def _digest(self, handle: Handle) -> str:
        app, name, _ = handle.place.args
        found = version_of(self._sight(handle.caller), app, name)
        return found.digest if isinstance(found, Image) else ""

    def get(self, number: int) -> Handle:
        return self._open[number]

    async def close(self, number: int) -> None:
        """The last descriptor is gone: what was to last while it was open ends."""
        handle = self._open.pop(number)
        if handle.reader:
            handle.reader.drop()
        if handle.place.row.kind is Kind.STATE:
            return
        self._closed.set()
        self._closed = trio.Event()
        if handle.job:
            await self._client.call(wire.Closed, handle.caller, job=handle.job)
        if handle.place.row.kind is Kind.DATA and handle.wrote:
            app, name, file = handle.place.args
            await self._client.call(wire.CloseFile, handle.caller, app=app, name=name, file=file)

    async def settled(self, pids: list[int]) -> list[Handle]:
        """Wait a moment for these processes, and descendants of them, to close the verb files that
        they opened; returns those that stay open."""
        left = self._opened_by(pids)
        with trio.move_on_after(CLOSING_S):
            while left:
                await self._closed.wait()
                left = [each for each in left if each.number in self._open]
        return self._opened_by(pids)

    def _opened_by(self, pids: list[int]) -> list[Handle]:
        verbs = [each for each in self._open.values() if each.place.row.kind is Kind.VERB]
        openers = facts.among({each.caller.pid for each in verbs}, pids)
        return [each for each in verbs if each.caller.pid in openers]

    # -- reading

    async def read(self, number: int, offset: int, size: int) -> bytes:
        handle = self._open[number]
        kind = handle.place.row.kind
        if kind is Kind.GROWING:
            return self._growing(handle)[offset : offset + size]
        if kind is Kind.DATA:
            return await self._data(handle, offset, size)
        if handle.needs_content(offset):
            handle.make(await self._content(handle))
        return handle.slice(offset, size)

    def _growing(self, handle: Handle) -> bytes:
        content = self._rendered(handle)
        handle.seen = len(content)
        return content

    def _rendered(self, handle: Handle) -> bytes:
        assert handle.place.row.render is not None
        return handle.place.row.render(self._sight(handle.caller), handle.place)

    async def _content(self, handle: Handle) -> bytes:
        job = self._client.view.jobs.get(handle.last_job)
        if job is not None and handle.place.row.verb in OWN_JOB:
            return f"{render.read_back(job)}\n".encode()
        content = self._rendered(handle)
        is_verb = handle.place.row.kind is Kind.VERB
        if content and not is_verb:
            return content
        if refused := self._refused(handle, content):
            return refused
        if not tree.is_there(self._sight(handle.caller), handle.place):
            raise Gone(f"{tree.path_of(handle.place)}: it has ended")
        if content or not is_verb:
            return content
        await self._while_restoring()
        return self._rendered(handle)

    def _refused(self, handle: Handle, content: bytes) -> bytes:
        """Return the error that this user was last answered here, unless there is newer news."""
        refusal = self._refusals.get((handle.place, handle.caller.uid))
        if refusal is None or refusal.instead_of != content:
            return b""
        return f"{refusal.line}\n".encode()

    def _note(self, handle: Handle, line: str = "") -> None:
        """Remember how a write ended, for whoever of the same user opens the file after it."""
        if handle.place.row.kind is Kind.KNOB or handle.place.row.verb in OWN_STATE:
            return
        key = handle.place, handle.caller.uid
        self._refusals.pop(key, None)
        if line:
            self._refusals[key] = Refusal(line, self._rendered(handle))
        if len(self._refusals) > KEPT_REFUSALS:
            self._refusals.popitem(last=False)

    async def _while_restoring(self) -> None:
        """A process may read before the agent has noted that it was restarted: wait for that."""
        with trio.move_on_after(RESTORING_S):
            for job in tuple(self._client.view.jobs.values()):
                if job.phase in (Phase.RESTORING, Phase.FINISHING) and job.verb == "restart":
                    await self._client.job_over(job.id)

    async def _data(self, handle: Handle, offset: int, size: int) -> bytes:
        if handle.place.row.path == "jobs/JOB/log":
            if handle.needs_content(offset):
                (job,) = handle.place.args
                answer = await self._client.call(wire.JobLog, handle.caller, job=job)
                handle.make(answer.data)
            return handle.slice(offset, size)
        app, name, file = handle.place.args
        if handle.reader:
            self._refuse_removed(handle)
            data = await handle.reader.read(offset, size)
            self._refuse_removed(handle)
            return data
        answer = await self._client.call(
            wire.ReadFile,
            handle.caller,
            app=app,
            name=name,
            file=file,
            offset=offset,
            size=min(size, wire.MAX_DATA),
        )
        found: bytes = answer.data
        return found

    def _refuse_removed(self, handle: Handle) -> None:
        if handle.digest != self._digest(handle):
            app, name, file = handle.place.args
            raise Gone(f"{app}/{name} was removed while you had {file} open")

    # -- poll

    def ready(self, number: int) -> int:
        """Return the poll(2) mask of an open file: `wait` is readable when the process has ended,
        log and events when there is more than was read."""
        handle = self._open[number]
        sight = self._sight(handle.caller)
        if handle.place.row.verb == "wait":
            over = not tree.is_there(sight, handle.place) or (
                self._rendered(handle) != b"running\n"
            )
        elif handle.place.row.kind is Kind.GROWING:
            over = len(self._rendered(handle)) > handle.seen
        else:
            over = True
        writable = select.POLLOUT if handle.place.row.kind in (Kind.VERB, Kind.KNOB) else 0
        return (select.POLLIN if over else 0) | writable

    # -- writing

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Do what was written; returns its length, raises what went wrong."""
        handle = self._open[number]
        row = handle.place.row
        if row.kind is Kind.DATA and row.name == "FILE":
            return await self._import(handle, offset, data)
        if row.kind not in (Kind.VERB, Kind.KNOB):
            raise Unsupported(f"{tree.path_of(handle.place)}: {READ_ONLY}")
        end = offset + len(data)
        if handle.failed and not data.strip():
            raise handle.failed  # a shell writes a long line in two parts, the newline last
        handle.failed = None
        try:
            if row.kind is Kind.KNOB:
                await self._set(handle, data)
            else:
                await self._command(handle, data)
        except KrgError as exc:
            handle.failed = exc
            line = f"error {name_of(exc.errno)} {exc.message}"
            handle.written(offset, line)  # one that failed moves no offset
            self._note(handle, line)
            raise
        handle.written(end)
        self._note(handle)
        return len(data)

    async def _import(self, handle: Handle, offset: int, data: bytes) -> int:
        app, name, file = handle.place.args
        handle.wrote = True
        for start in range(0, len(data), wire.MAX_DATA):
            await self._client.call(
                wire.WriteFile,
                handle.caller,
                app=app,
                name=name,
                file=file,
                offset=offset + start,
                data=data[start : start + wire.MAX_DATA],
            )
        return len(data)

    async def _set(self, handle: Handle, data: bytes) -> None:
        (app,) = handle.place.args
        text = _text(handle.place.row.name, data)
        await self._client.call(wire.SetPolicy, handle.caller, app=app, text=text)

    async def _command(self, handle: Handle, data: bytes) -> None:
        place, caller = handle.place, handle.caller
        text = _text(place.row.verb, data)
        try:
            command = parse(place.row.verb, text)
        except BadWords:
            await self._tell(handle, text)
            raise
        pid, start = self._object_pid(place)
        if caller.foreign_pid_ns and pid and pid != caller.pid:
            raise BadWords(
                f"pid {pid} means another process in your pid namespace; write to /krg/self"
            )
        if isinstance(command, Wait):
            await self._wait(handle, pid, start)
            return
        with self._blocked.brief(caller):
            accepted = await self._client.submit(
                caller, place.row.verb, self._object(handle), text, start
            )
        handle.last_job = accepted.job
        if isinstance(command, Freeze) and command.while_open:
            handle.job = accepted.job
        if accepted.member or _returns_at_once(command):
            return
        is_brief = isinstance(command, Checkpoint) and command.durable == "no"
        early = RUNS_AGAIN if is_brief else ()
        await self._until_over(handle, accepted.job, early)

    async def _tell(self, handle: Handle, text: str) -> None:
        """Have the agent refuse the words too: it writes the log."""
        with suppress(KrgError), self._blocked.brief(handle.caller):
            verb = handle.place.row.verb
            await self._client.submit(handle.caller, verb, self._object(handle), text)

    def _object(self, handle: Handle) -> str:
        """Return the directory that the verb file is in, as everybody names it."""
        place = tree.canonical(self._sight(handle.caller), handle.place)
        return tree.path_of(place).rpartition("/")[0]

    def _object_pid(self, place: Place) -> tuple[int, int]:
        if "/PID/" in place.row.path:
            return place.args[-2], place.args[-1]
        return 0, 0

    async def _until_over(self, handle: Handle, number: int, early: Collection[Phase]) -> None:
        job: Job | None = None
        ending = tree.path_of(handle.place).encode()
        with self._blocked.waiting(handle.caller, ending) as waiting:
            job = await self._client.job_over(number, or_in=early)
        if job is not None:
            if job.errno:
                raise _error_of(job)
            return
        if waiting.why is Why.END:
            raise Unreachable(f"the mount ends; jobs/{number} goes on")
        if waiting.why is Why.FREEZE:
            raise Cancelled(f"you are about to be frozen yourself; jobs/{number} goes on")
        await self._client.call(
            wire.Interrupt, handle.caller, job=number, fatal=waiting.why is Why.FATAL
        )
        raise Cancelled(f"{waiting.why and waiting.why.value}: jobs/{number} is being cancelled")

    async def _wait(self, handle: Handle, pid: int, start: int) -> None:
        if handle.caller.pid == pid:
            raise PartOfIt(f"process {pid} cannot wait for its own end")
        over = False
        ending = tree.path_of(handle.place).encode()
        with self._blocked.waiting(handle.caller, ending) as waiting:
            await ended(pid, start)
            with trio.move_on_after(STATUS_S):
                while self._status_is_due(handle):
                    await self._client.changed()
            over = True
        if waiting.why is Why.END:
            raise Unreachable(f"the mount ends; process {pid} goes on")
        if not over:
            raise Cancelled(f"{waiting.why and waiting.why.value}; process {pid} goes on")

    def _status_is_due(self, handle: Handle) -> bool:
        known = tree_of(self._sight(handle.caller), handle.place)
        return known is not None and known.keeper is not None and not known.ended


def _text(what: str, data: bytes) -> str:
    """Return what was written as text; BadWords where it is too long or none."""
    if len(data) > MAX_BYTES:
        raise BadWords(f"{what}: one command a write, at most {MAX_BYTES} bytes")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise BadWords(
            f"{what}: byte {exc.start + 1} is not UTF-8; write the line in UTF-8"
        ) from exc


def _returns_at_once(command: Command) -> bool:
    return isinstance(command, Checkpoint | Restart) and command.run_async


def _error_of(job: Job) -> KrgError:
    frame = wire.Failed(id=0, errno=job.errno, message=job.message, fate=job.fate)
    return wire.error_of(frame)


async def ended(pid: int, start: int) -> None:
    """Return when that very process has ended (pidfd_open(2))."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in (errno.ESRCH, errno.EINVAL):
            return
        raise Busy(f"cannot watch process {pid}: {os.strerror(exc.errno or 0)}") from exc
    try:
        while facts.is_alive(pid, start):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        trio.lowlevel.notify_closing(pidfd)
        os.close(pidfd)
