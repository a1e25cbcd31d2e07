"""The mount's line to its agent: keeps the current View, submits verbs, waits for jobs.

The connection is made again whenever it breaks. Meanwhile the last View stays (with `connected`
false) and everything that needs the agent raises Unreachable; who waits for a job goes on waiting
for `GRACE_S`, because an agent that was started again knows what became of it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from itertools import count
from typing import Any, NamedTuple, TypeVar

import msgspec
import trio

from . import wire
from .errors import BadWords, KrgError, Unreachable, first_of
from .model import Caller, ImageFile, Job, Phase, View

log = logging.getLogger(__name__)
GRACE_S = 15.0
ANSWER_S = 60.0
KEPT_LISTINGS = 256
T = TypeVar("T")


def applied(view: View, change: wire.Change) -> View:
    """Return the view after a change; the given one stays as it is."""
    if change.whole:
        view = View(node=view.node)
    fields: dict[str, Any] = {"connected": True} if change.complete else {}
    flat: tuple[tuple[str, Any, str, Any], ...] = (
        ("nodes", change.nodes, "name", ()),
        ("trees", change.trees, "pid", change.gone_trees),
        ("apps", change.apps, "name", change.gone_apps),
        ("jobs", change.jobs, "id", change.gone_jobs),
    )
    for name, items, key, gone in flat:
        if items or gone:
            merged = {**getattr(view, name), **{getattr(item, key): item for item in items}}
            for each in gone:
                merged.pop(each, None)
            fields[name] = merged
    by_app: tuple[tuple[str, Any, str, Any], ...] = (
        ("images", change.images, "version", change.gone_images),
        ("imports", change.imports, "name", change.gone_imports),
    )
    for name, items, key, gone in by_app:
        if items or gone:
            fields[name] = _merged_by_app(getattr(view, name), items, key, gone)
    if change.log or change.trim_log:
        fields["log"] = (*view.log[change.trim_log :], *change.log)
    if change.events or change.trim_events:
        fields["events"] = (*view.events[change.trim_events :], *change.events)
    if change.metrics is not None:
        fields["metrics"] = change.metrics
    if change.store is not None:
        fields["store"] = change.store
    return msgspec.structs.replace(view, **fields)


def _merged_by_app(
    old: Mapping[str, Mapping[Any, Any]], items: Any, key: str, gone: Any
) -> dict[str, dict[Any, Any]]:
    merged: dict[str, dict[Any, Any]] = {app: dict(named) for app, named in old.items()}
    for item in items:
        merged.setdefault(item.app, {})[getattr(item, key)] = item
    for app, name in gone:
        merged.get(app, {}).pop(name, None)
    return {app: named for app, named in merged.items() if named}


class Asked(NamedTuple):
    """A request that was sent and has no answer yet."""

    number: int
    received: trio.MemoryReceiveChannel[Any]


class Client:
    """`run` keeps the connection; the other methods are for any task meanwhile.

    `on_change(before, after, change)` is called after each View; `release(pids)` has to answer what
    those tasks wait for and to keep answering EINTR until `resume`.
    """

    def __init__(
        self,
        socket: str,
        *,
        on_change: Callable[[View, View, wire.Change], None] = lambda *_: None,
        release: Callable[[int, list[int]], Awaitable[None]] | None = None,
        resume: Callable[[int], None] = lambda _: None,
        holding: Callable[[], list[int]] = list,
    ) -> None:
        self.view = View()
        self.listings: OrderedDict[tuple[str, str], dict[str, ImageFile]] = OrderedDict()
        self._socket = socket
        self._on_change = on_change
        self._release = release
        self._resume = resume
        self._holding = holding
        self._channel: wire.Channel | None = None
        self._connected = trio.Event()
        self._ids = count(1)
        self._answers: dict[int, trio.MemorySendChannel[Any]] = {}
        self._over: dict[int, trio.Event] = {}
        self._change = trio.Event()

    async def run(self) -> None:
        """Keep connected until cancelled."""
        pause_s = 0.02
        while True:
            try:
                stream = await trio.open_unix_socket(self._socket)
            except OSError:
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
                continue
            pause_s = 0.02
            try:
                await self._talk(wire.Channel(stream, wire.ToMount))
            except* Unreachable as group:
                log.warning("agent.lost reason=%s", first_of(group))
            except* Exception:
                log.exception("agent.talk_failed")
            finally:
                self._lost()
                await trio.aclose_forcefully(stream)

    async def connected(self) -> None:
        """Return when the agent has been heard and the View is whole."""
        while not self.view.connected:
            await self._connected.wait()

    async def changed(self) -> None:
        """Return at the next change of the View."""
        await self._change.wait()

    async def call(self, make: Callable[..., wire.Request], caller: Caller, **fields: Any) -> Any:
        """Send a request and return its answer; raises what the agent answered with."""
        return await self.answer(await self.ask(make, caller, **fields))

    async def ask(self, make: Callable[..., wire.Request], caller: Caller, **fields: Any) -> Asked:
        """Send a request, whose answer is to be had by `answer`, or is dropped."""
        channel = self._channel
        if channel is None:
            raise Unreachable(
                f"the agent of this node does not answer at {self._socket}: is it running? "
                "(krg up starts it)"
            )
        number = next(self._ids)
        self._answers[number], received = trio.open_memory_channel[Any](1)
        asked = Asked(number, received)
        try:
            await channel.send(make(id=number, caller=caller, **fields))
        except BaseException as exc:
            self.drop(asked)
            if isinstance(exc, UnicodeEncodeError):
                raise BadWords("a name of krgfs is UTF-8 text; choose another one") from None
            raise
        return asked

    def drop(self, asked: Asked) -> None:
        """Nobody wants this answer any more."""
        self._answers.pop(asked.number, None)

    async def answer(self, asked: Asked) -> Any:
        """Return the answer, once; raises what the agent answered with."""
        try:
            with trio.fail_after(ANSWER_S):
                answer = await asked.received.receive()
        except trio.TooSlowError:
            raise Unreachable(
                f"the agent of this node did not answer in {ANSWER_S:.0f} s"
            ) from None
        except trio.EndOfChannel:
            raise Unreachable(
                "the agent of this node ended before it answered; whether it had taken the command "
                "is in /krg/log when it is back"
            ) from None
        finally:
            self.drop(asked)
        if isinstance(answer, wire.Failed):
            raise wire.error_of(answer)
        return answer

    async def submit(
        self, caller: Caller, verb: str, object: str, text: str, start: int = 0
    ) -> wire.Accepted:
        """Have a written line accepted as a job."""
        answer: wire.Accepted = await self.call(
            wire.Submit, caller, verb=verb, object=object, text=text, start=start
        )
        return answer

    async def job_over(self, number: int, *, or_in: Collection[Phase] = ()) -> Job:
        """Return a job when it has ended, or is in one of these phases, however often the agent was
        started meanwhile."""
        while True:
            job = self.view.jobs.get(number)
            if job is not None and (job.is_over or job.phase in or_in):
                return job
            if job is None and self.view.connected:
                raise Unreachable(f"the agent does not know jobs/{number} any more")
            event = self._over.setdefault(number, trio.Event())
            if not self.view.connected:
                await self._connected_again()
            elif or_in:
                await self.changed()
            else:
                await event.wait()

    async def files(self, caller: Caller, app: str, name: str) -> dict[str, ImageFile]:
        """Return the files of a version; those of a committed one are asked for once."""
        known = self.listings.get((app, name))
        if known is not None:
            self.listings.move_to_end((app, name))
            return known
        answer: wire.Files = await self.call(wire.ListFiles, caller, app=app, name=name)
        return self.keep_listing(app, name, {each.name: each for each in answer.files})

    def keep_listing(
        self, app: str, name: str, listing: dict[str, ImageFile]
    ) -> dict[str, ImageFile]:
        """Remember a listing; the least used ones are forgotten."""
        self.listings[app, name] = listing
        while len(self.listings) > KEPT_LISTINGS:
            self.listings.popitem(last=False)
        return listing

    async def _connected_again(self) -> None:
        with trio.move_on_after(GRACE_S):
            await self.connected()
            return
        raise Unreachable(
            f"the agent of this node ended and was not back within {GRACE_S:.0f} s; "
            "what became of the job is in /krg/log when it is back"
        )

    async def _talk(self, channel: wire.Channel) -> None:
        await channel.send(wire.Hello(protocol=wire.PROTOCOL, holding=self._holding()))
        welcome = await channel.receive()
        if not isinstance(welcome, wire.Welcome) or welcome.protocol != wire.PROTOCOL:
            raise Unreachable(f"the agent at {self._socket} speaks another protocol")
        self.view = msgspec.structs.replace(self.view, node=welcome.node)
        self._channel = channel
        async with trio.open_nursery() as nursery:
            while True:
                message = await channel.receive()
                match message:
                    case wire.Change():
                        self._changed(message)
                    case wire.Release():
                        nursery.start_soon(self._released, channel, message)
                    case wire.Resume():
                        self._resume(message.ticket)
                    case _:
                        self._answered(message)

    async def _released(self, channel: wire.Channel, message: wire.Release) -> None:
        if self._release is not None:
            await self._release(message.ticket, message.pids)
        try:
            await channel.send(wire.Released(ticket=message.ticket))
        except KrgError:
            self._resume(message.ticket)

    def _changed(self, change: wire.Change) -> None:
        before = self.view
        self.view = applied(before, change)
        for app, version in change.gone_images:
            self.listings.pop((app, f"v{version}"), None)
        for item in change.imports:
            self.listings.pop((item.app, item.name), None)
        for app, name in change.gone_imports:
            self.listings.pop((app, name), None)
        if change.complete:
            self.listings.clear()
            self._connected.set()
            self._wake_all()
        for job in change.jobs:
            event = self._over.pop(job.id, None) if job.is_over else None
            if event is not None:
                event.set()
        self._tell(before, change)

    def _tell(self, before: View, change: wire.Change) -> None:
        self._change.set()
        self._change = trio.Event()
        self._on_change(before, self.view, change)

    def _answered(self, message: Any) -> None:
        waiting = self._answers.get(getattr(message, "id", 0))
        if waiting is not None:
            waiting.send_nowait(message)

    def _lost(self) -> None:
        self._channel = None
        if self._connected.is_set():
            self._connected = trio.Event()
        before = self.view
        self.view = msgspec.structs.replace(before, connected=False)
        for waiting in self._answers.values():
            waiting.close()
        self._wake_all()
        self._tell(before, wire.Change())

    def _wake_all(self) -> None:
        for event in self._over.values():
            event.set()
        self._over.clear()
