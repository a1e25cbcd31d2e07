"""What this agent knows: the records of the store, mirrored in memory and told to the mounts.

`commit` writes records by compare-and-swap and then publishes them, so that nobody is shown what is
not durable; `show` publishes without writing (progress, load). The log is made of the ended jobs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import trio

from krgfs import wire
from krgfs.errors import Fenced, KrgError, name_of
from krgfs.model import App, Event, Image, Import, Job, LogLine, Node, Store, Tree, Value, instant

from .store import Conflict, Expect
from .store import Store as RecordStore

KEPT_JOBS = 1000
KEPT_LINES = 10_000
KEPT_EVENTS = 1000
KEPT_ENDED = 256
BACKLOG = 20_000
CHUNK = 500
V = TypeVar("V", bound=Value)
Outbox = trio.MemorySendChannel[wire.Message]


def key_of(value: Value) -> str:
    """Return the store's key for a record."""
    match value:
        case Job():
            return f"jobs/{value.id:012d}"
        case Tree():
            return f"trees/{value.id.boot}/{value.id.pid}.{value.id.start}"
        case App():
            return f"apps/{value.name}"
        case Image():
            return f"images/{value.app}/{value.version:010d}"
        case Import():
            return f"imports/{value.app}/{value.name}"
    raise TypeError(type(value))


class State:
    """The records by what they are; read them freely, change them by `commit` alone."""

    def __init__(self, store: RecordStore, node: str) -> None:
        self.node = Node(name=node)
        self.jobs: dict[int, Job] = {}
        self.trees: dict[int, Tree] = {}
        self.apps: dict[str, App] = {}
        self.images: dict[str, dict[int, Image]] = {}
        self.imports: dict[str, dict[str, Import]] = {}
        self.log: list[LogLine] = []
        self.events: list[Event] = []
        self.metrics: dict[str, float] = {}
        self.room = Store()
        self._store = store
        self._revisions: dict[str, int] = {}
        self._mounts: set[Outbox] = set()
        self._serial = 0
        self._changing = trio.Lock()

    async def load(self, boot: str) -> None:
        """Read all records; trees of another boot are forgotten."""
        for record in await self._records("jobs/"):
            self._keep(msgspec.json.decode(record.value, type=Job), record.revision)
        for record in await self._records("apps/"):
            self._keep(msgspec.json.decode(record.value, type=App), record.revision)
        for record in await self._records("images/"):
            self._keep(msgspec.json.decode(record.value, type=Image), record.revision)
        for record in await self._records("imports/"):
            self._keep(msgspec.json.decode(record.value, type=Import), record.revision)
        old = []
        for record in await self._records("trees/"):
            tree = msgspec.json.decode(record.value, type=Tree)
            self._keep(tree, record.revision)
            if tree.id.boot != boot:
                old.append(tree)
        for start in range(0, len(old), 50):
            await self.commit(delete=old[start : start + 50])
        for job in sorted(self.jobs.values(), key=lambda job: job.ended):
            if job.is_over:
                self.log.append(log_line(job))

    async def commit(self, *put: Value, delete: Sequence[Value] = ()) -> None:
        """Write and delete records in one transaction, then publish. Durable on return.

        Each must still be as this agent last wrote it, else Fenced: somebody else has written the
        store. Cancelled or failed, it has happened whole or not at all. What is put must not rest
        on a record that another task may change meanwhile: `update` is for that.
        """
        await self.update(lambda: put, delete)

    async def update(
        self, make: Callable[[], Iterable[Value]], delete: Sequence[Value] = ()
    ) -> None:
        """The same with records that `make` derives from those of now; no other commit of this
        agent comes between its looking and the writing."""
        with trio.CancelScope(shield=True):
            async with self._changing:
                await self._commit(tuple(make()), delete)

    async def _commit(self, put: Sequence[Value], delete: Sequence[Value]) -> None:
        involved = {key_of(value) for value in (*put, *delete)}
        expectations = [Expect(key, self._revisions.get(key, 0)) for key in sorted(involved)]
        encoded = {key_of(value): msgspec.json.encode(value) for value in put}
        gone = [key_of(value) for value in delete if key_of(value) in self._revisions]
        try:
            revision = await self._store.commit(expectations, encoded, gone)
        except Conflict as exc:
            raise Fenced(
                f"{exc.key} was changed by another agent on this node's store; "
                "only one agent may run on a state directory"
            ) from exc
        for value in put:
            self._keep(value, revision)
        for value in delete:
            self._drop(value)
        self._publish(change_of(put, delete))

    def show(self, *values: Value) -> None:
        """Publish values that are not written down: progress of jobs, load of the node."""
        for value in values:
            self._keep(value, None)
        self._publish(change_of(values, ()))

    def next_job(self) -> int:
        return max(self.jobs, default=0) + 1

    def tree(self, pid: int, start: int) -> Tree | None:
        """Return the record of that very process, None when there is none."""
        known = self.trees.get(pid)
        return known if known is not None and known.id.start == start else None

    def add_log(self, line: LogLine) -> None:
        trim = 0
        self.log.append(line)
        if len(self.log) > KEPT_LINES:
            trim = KEPT_LINES // 2
            del self.log[:trim]
        self._publish(wire.Change(log=[line], trim_log=trim))

    def event(self, kind: str, uid: int, **facts: Any) -> None:
        """Publish a line of /krg/events."""
        self._serial += 1
        told = {"time": round(time.time(), 3), "serial": self._serial, "kind": kind, **facts}
        event = Event(serial=self._serial, uid=uid, facts=told)
        self.events.append(event)
        trim = max(0, len(self.events) - KEPT_EVENTS)
        del self.events[:trim]
        self._publish(wire.Change(events=[event], trim_events=trim))

    def count(self, metric: str, by: float = 1) -> None:
        self.metrics[metric] = self.metrics.get(metric, 0) + by

    def show_figures(self, node: Node, room: Store) -> None:
        self.node = node
        self.room = room
        self._publish(wire.Change(nodes=[node], metrics=dict(self.metrics), store=room))

    @contextmanager
    def mounted(self) -> Iterator[tuple[Outbox, trio.MemoryReceiveChannel[wire.Message]]]:
        """Enter as a mount: what comes out of the box is everything first, then each change, in
        order with what else is put into it (an answer never overtakes the change that it is about).

        A mount that falls behind by BACKLOG messages is dropped: the box ends.
        """
        send, receive = trio.open_memory_channel[wire.Message](math.inf)
        for change in self._whole():
            send.send_nowait(change)
        self._mounts.add(send)
        try:
            yield send, receive
        finally:
            self._mounts.discard(send)
            send.close()

    def _whole(self) -> Iterator[wire.Change]:
        yield wire.Change(
            whole=True, nodes=[self.node], metrics=dict(self.metrics), store=self.room
        )
        yield from (wire.Change(apps=part) for part in _parts(self.apps.values()))
        yield from (wire.Change(trees=part) for part in _parts(self.trees.values()))
        images = (image for named in self.images.values() for image in named.values())
        yield from (wire.Change(images=part) for part in _parts(images))
        imports = (each for named in self.imports.values() for each in named.values())
        yield from (wire.Change(imports=part) for part in _parts(imports))
        yield from (wire.Change(log=part) for part in _parts(self.log))
        yield from (wire.Change(events=part) for part in _parts(self.events))
        yield from (wire.Change(jobs=part) for part in _parts(self.jobs.values()))
        yield wire.Change(complete=True)

    def _publish(self, change: wire.Change) -> None:
        for mount in tuple(self._mounts):
            if mount.statistics().current_buffer_used > BACKLOG:
                self._mounts.discard(mount)
                mount.close()
                continue
            mount.send_nowait(change)

    async def _records(self, prefix: str) -> list[Any]:
        return await self._store.list(prefix)

    def _keep(self, value: Value, revision: int | None) -> None:
        if revision is not None:
            self._revisions[key_of(value)] = revision
        match value:
            case Job():
                self.jobs[value.id] = value
            case Tree():
                self.trees[value.pid] = value
            case App():
                self.apps[value.name] = value
            case Image():
                self.images.setdefault(value.app, {})[value.version] = value
            case Import():
                self.imports.setdefault(value.app, {})[value.name] = value

    def _drop(self, value: Value) -> None:
        self._revisions.pop(key_of(value), None)
        match value:
            case Job():
                self.jobs.pop(value.id, None)
            case Tree() if self.trees.get(value.pid) == value:
                del self.trees[value.pid]
            case App():
                self.apps.pop(value.name, None)
            case Image():
                _drop_named(self.images, value.app, value.version)
            case Import():
                _drop_named(self.imports, value.app, value.name)

    def outlived(self) -> list[Value]:
        """Return records that nobody needs any more: old jobs, and trees that ended long ago."""
        over = [job for job in self.jobs.values() if job.is_over]
        over.sort(key=lambda job: job.id)
        ended = [tree for tree in self.trees.values() if tree.ended]
        ended.sort(key=lambda tree: tree.last_job)
        return [*over[: max(0, len(over) - KEPT_JOBS)], *ended[: max(0, len(ended) - KEPT_ENDED)]]


def _drop_named(where: dict[str, dict[Any, Any]], app: str, name: Any) -> None:
    named = where.get(app, {})
    named.pop(name, None)
    if not named:
        where.pop(app, None)


def _parts(items: Iterable[V]) -> Iterator[list[V]]:
    whole = list(items)
    return (whole[start : start + CHUNK] for start in range(0, len(whole), CHUNK))


def change_of(put: Iterable[Value], delete: Iterable[Value]) -> wire.Change:
    """Return the frame that tells mounts of records put and deleted."""
    fields: dict[str, list[Any]] = {}
    for value in put:
        fields.setdefault(type(value).__name__.lower() + "s", []).append(value)
    for value in delete:
        match value:
            case Job():
                fields.setdefault("gone_jobs", []).append(value.id)
            case Tree():
                fields.setdefault("gone_trees", []).append(value.pid)
            case App():
                fields.setdefault("gone_apps", []).append(value.name)
            case Image():
                fields.setdefault("gone_images", []).append((value.app, value.version))
            case Import():
                fields.setdefault("gone_imports", []).append((value.app, value.name))
    return wire.Change(**fields)  # type: ignore[arg-type]


def log_line(job: Job) -> LogLine:
    """Write the line of /krg/log for a job that ended: time id verb object node outcome message."""
    outcome = name_of(job.errno) if job.errno else "ok"
    message = job.message if job.errno else job.line
    place = job.object or "/"
    text = f"{instant(job.ended)} {job.id} {job.verb} {place} {job.node} {outcome} {message}"
    return LogLine(time=job.ended, job=job.id, uid=job.uid, text=text.rstrip())


def refusal_line(request: wire.Submit, node: str, error: KrgError) -> LogLine:
    """Write the line of /krg/log for a command that never became a job, with - for its id."""
    now, place = time.time(), request.object or "/"
    outcome = f"{name_of(error.errno)} {error.message}"
    text = f"{instant(now)} - {request.verb} {place} {node} {outcome}"
    return LogLine(time=now, job=0, uid=request.caller.uid, text=text)
