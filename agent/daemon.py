"""krg-agent(8): one per node, as root; keeps the images and drives CRIU for the mounts of its node.

It listens on a unix socket. A mount, which runs as root, speaks for its callers; any other peer
speaks for itself alone, as the kernel names it (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import platform
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import NamedTuple

import click
import trio
from msgspec.structs import replace

from krgfs import VERSION, facts, wire
from krgfs.errors import KrgError, Unreachable, first_of
from krgfs.model import Caller, Policy
from krgfs.policy import UNLIMITED, size, value

from . import figures, keepers, recovery
from .backend_bounded import BoundedBackend, Bounds
from .backends import is_own, open_backend
from .criu import Engine
from .desk import Desk
from .ends import Ends
from .freezer import Freezer
from .images import Images, Limits
from .jobs import Jobs
from .journal import Journal
from .mounts import Mounts
from .parts import Parts
from .retention import Retention
from .state import Outbox, State
from .store_sqlite import SqliteStore
from .upkeep import Upkeep

log = logging.getLogger("krg-agent")
CLAIM_S = 5.0
_CREDENTIALS = struct.Struct("3i")


class Agent:
    """One running agent: `serve` answers mounts until cancelled."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._desk = Desk(parts)
        self._held = Counter[int]()

    async def serve(self, listener: trio.SocketListener) -> None:
        async with trio.open_nursery() as nursery:
            before = {known.holder for known in self._parts.state.trees.values()}
            nursery.start_soon(self._close_unclaimed, before - {0})
            nursery.start_soon(figures.keep, self._parts)
            nursery.start_soon(self._parts.upkeep.keep)
            await trio.serve_listeners(self._mount, [listener], handler_nursery=nursery)

    async def _mount(self, stream: trio.SocketStream) -> None:
        """Talk to one mount until it goes; no failure of it is the agent's."""
        peer = _peer(stream)
        channel = wire.Channel(stream, wire.ToAgent)
        try:
            await self._talk(channel, peer)
        except* Unreachable as group:
            log.info("mount.gone pid=%d reason=%s", peer.pid, first_of(group))
        except* Exception:
            log.exception("mount.failed pid=%d", peer.pid)
        finally:
            self._parts.mounts.drop(channel)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _talk(self, channel: wire.Channel, peer: Caller) -> None:
        hello = await channel.receive()
        if not isinstance(hello, wire.Hello) or hello.protocol != wire.PROTOCOL:
            raise Unreachable(f"peer {peer.pid} does not speak protocol {wire.PROTOCOL}")
        await channel.send(
            wire.Welcome(protocol=wire.PROTOCOL, node=self._parts.state.node.name, version=VERSION)
        )
        log.info("mount.came pid=%d uid=%d", peer.pid, peer.uid)
        holding = set(hello.holding) if peer.is_root else set()
        self._held.update(holding)
        try:
            async with trio.open_nursery() as nursery:
                with self._parts.state.mounted() as (outbox, messages):
                    if peer.is_root:
                        self._parts.mounts.add(channel)
                    nursery.start_soon(_forward, messages, channel)
                    await self._answer_all(channel, outbox, peer, nursery, holding)
        finally:
            self._held.subtract(holding)
            self._parts.nursery.start_soon(self._close_unclaimed, holding)

    async def _answer_all(
        self,
        channel: wire.Channel,
        outbox: Outbox,
        peer: Caller,
        nursery: trio.Nursery,
        holding: set[int],
    ) -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, wire.Released):
                self._parts.mounts.released(channel, message.ticket)
                continue
            if isinstance(message, wire.Hello):
                raise Unreachable("a second hello")
            if not peer.is_root:
                message = replace(message, caller=peer)
            nursery.start_soon(self._answer, outbox, message, holding)

    async def _answer(self, outbox: Outbox, request: wire.Request, holding: set[int]) -> None:
        answer = await self._desk.answer(request)
        if isinstance(answer, wire.Accepted) and isinstance(request, wire.Submit):
            job = self._parts.jobs.get(answer.job)
            if job is not None and "while-open" in job.job.words:
                holding.add(answer.job)
                self._held[answer.job] += 1
        if isinstance(request, wire.Closed) and request.job in holding:
            holding.remove(request.job)
            self._held[request.job] -= 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            outbox.send_nowait(answer)

    async def _close_unclaimed(self, numbers: Collection[int]) -> None:
        """Thaw what was frozen while-open through handles that no mount has any more: one that
        lives comes back within CLAIM_S and says what it holds."""
        if not numbers:
            return
        await trio.sleep(CLAIM_S)
        for number in numbers:
            if not self._held[number]:
                await self._desk.closed(number)


async def _forward(
    messages: trio.MemoryReceiveChannel[wire.Message], channel: wire.Channel
) -> None:
    async for message in messages:
        await channel.send(message)
    raise Unreachable("the mount fell behind")


def _peer(stream: trio.SocketStream) -> Caller:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    found = facts.ids(pid)
    return Caller(uid=uid, gid=gid, groups=found.groups if found else (), pid=pid, tid=pid)


@contextmanager
def only_one(state_dir: str) -> Iterator[None]:
    """Hold the state directory: two agents on one would undo each other's work."""
    os.makedirs(state_dir, mode=0o755, exist_ok=True)
    fd = os.open(os.path.join(state_dir, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        if exc.errno != errno.EWOULDBLOCK:
            raise
        raise click.ClickException(
            f"another krg-agent runs on {state_dir}; end that one first (krg down)"
        ) from exc
    try:
        yield
    finally:
        os.close(fd)


async def listen(path: str) -> trio.SocketListener:
    """Listen on a unix socket that anybody may connect to; who it is is asked of the kernel."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.bind(path)
    os.chmod(path, 0o666)
    sock.listen(128)
    return trio.SocketListener(sock)


class Settings(NamedTuple):
    """What krg-agent(8) is told."""

    state_dir: str
    run_dir: str
    node: str
    criu: str | None = None
    freezer: str = "auto"
    images: str = ""
    credentials: str | None = None
    limits: Limits = Limits()
    bounds: Bounds = Bounds()
    policy: Policy = Policy()

    @property
    def image_store(self) -> str:
        return self.images or os.path.join(self.state_dir, "images")


@asynccontextmanager
async def assembled(settings: Settings, nursery: trio.Nursery) -> AsyncIterator[Parts]:
    """Put the parts of an agent together."""
    state_dir, run_dir = settings.state_dir, settings.run_dir
    for path, mode in (
        (run_dir, 0o755),
        (os.path.join(run_dir, "keepers"), 0o700),
        (os.path.join(state_dir, "jobs"), 0o700),
    ):
        os.makedirs(path, mode=mode, exist_ok=True)
    engine = await Engine.find(settings.criu)
    async with AsyncExitStack() as stack:
        store = await SqliteStore.open(os.path.join(state_dir, "store.db"))
        stack.push_async_callback(_close, store)
        backend = await trio.to_thread.run_sync(
            open_backend, settings.image_store, settings.credentials
        )
        stack.callback(backend.close)
        bounded = await trio.to_thread.run_sync(BoundedBackend, backend, settings.bounds)
        alone = is_own(settings.image_store, state_dir)
        root = settings.image_store if settings.image_store.startswith("/") else ""
        images = await Images.open(
            state_dir, bounded, settings.node, settings.limits, alone=alone, root=root
        )
        stack.callback(images.close)
        state = State(store, settings.node)
        state.node = replace(state.node, policy=settings.policy)
        await state.load(facts.BOOT_ID)
        jobs = Jobs(state, nursery)
        retention = Retention(state, jobs, images)
        thawing = Freezer.find(settings.freezer)
        yield Parts(
            state=state,
            journal=Journal(store, facts.BOOT_ID),
            images=images,
            engine=engine,
            freezer=thawing,
            mounts=Mounts(),
            jobs=jobs,
            ends=Ends(state, thawing, nursery),
            retention=retention,
            upkeep=Upkeep(state, retention, images, bounded),
            nursery=nursery,
            engines=trio.CapacityLimiter(max(2, os.cpu_count() or 2)),
            run_dir=run_dir,
            state_dir=state_dir,
            keeper=keepers.binary(),
        )


async def _close(store: SqliteStore) -> None:
    with trio.CancelScope(shield=True):
        await store.aclose()


async def run(settings: Settings) -> None:
    """Be the agent until SIGTERM. Jobs that run then let go what they froze, which waits for a CRIU
    at work; the next agent says what became of them. Nothing of a user is ended."""
    async with trio.open_nursery() as nursery:

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    log.info("agent.ending signal=%d", number)
                    nursery.cancel_scope.cancel()
                    return

        nursery.start_soon(end_on_signal)
        async with assembled(settings, nursery) as parts:
            await recovery.recover(parts)
            await figures.show(parts)
            listener = await listen(os.path.join(settings.run_dir, "agent.sock"))
            log.info(
                "agent.up node=%s pid=%d criu=%s version=%s freezer=v%d",
                settings.node,
                os.getpid(),
                parts.engine.path,
                parts.engine.version,
                parts.freezer.hierarchy.version,
            )
            gc.freeze()
            await Agent(parts).serve(listener)


def _bytes(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Return a number of bytes: 300000, 64K, 256M, 2G; 0 for max."""
    try:
        return text and (0 if text == UNLIMITED else size(text))  # type: ignore[return-value]
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def _kept(ctx: click.Context, param: click.Parameter, text: str) -> int:
    """Return a value that a policy may have."""
    try:
        return value(str(param.name), text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--state", "state_dir", default="/var/lib/krgfs", show_default=True)
@click.option("--run", "run_dir", default="/run/krgfs", show_default=True)
@click.option("--node", default=lambda: platform.node().partition(".")[0], help="[the hostname]")
@click.option("--criu", envvar="KRG_CRIU", help="the CRIU to use  [searched for]")
@click.option("--freezer", type=click.Choice(["auto", "v1", "v2"]), default="auto")
@click.option("--images", default="", help="where images are kept  [STATE/images]")
@click.option("--credentials", type=click.Path(), help="the file with the keys of an s3:// store")
@click.option(
    "--memory", default="0", callback=_bytes, help="most memory for dumps  [a quarter of the free]"
)
@click.option("--level", type=click.IntRange(1, 19), default=1, show_default=True, help="of zstd")
@click.option("--quota", default="max", callback=_bytes, help="most that all images may take")
@click.option("--floor", callback=_bytes, help="what stays free  [256M, or 1 % where that is less]")
@click.option("--keep", default="max", callback=_kept, help="how many images of an app stay")
@click.option("--keep-bytes", default="max", callback=_kept, help="how much of an app stays")
@click.option("--max-age", default="max", callback=_kept, help="how long images stay")
@click.option("--verbose", is_flag=True, help="log more")
def main(
    state_dir: str,
    run_dir: str,
    node: str,
    criu: str | None,
    freezer: str,
    images: str,
    credentials: str | None,
    memory: int,
    level: int,
    quota: int,
    floor: int | None,
    keep: int,
    keep_bytes: int,
    max_age: int,
    verbose: bool,
) -> None:
    """Be this node's agent, in the foreground. See krg-agent(8)."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s krg-agent %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if os.geteuid() != 0:
        raise click.ClickException("krg-agent has to be root: it freezes and dumps processes")
    settings = Settings(
        os.path.abspath(state_dir),
        os.path.abspath(run_dir),
        node,
        criu,
        freezer,
        images,
        credentials,
        Limits(memory, level),
        Bounds(quota, floor),
        Policy(keep=keep, keep_bytes=keep_bytes, max_age_s=max_age),
    )
    failure: BaseException | None = None
    with only_one(settings.state_dir):
        try:
            trio.run(run, settings)
        except* KrgError as group:
            failure = first_of(group)
    if failure:  # raised out here: what an `except*` raises may come out in a group again
        log.error("agent.failed %s", failure)
        raise SystemExit(1)
    log.info("agent.down")
