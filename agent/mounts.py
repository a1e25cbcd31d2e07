"""The mounts that are connected, and the agreement with them before tasks are frozen.

A task inside a FUSE request cannot be frozen or dumped, so every mount first answers what the tasks
of the tree wait for, and goes on doing so until the freeze holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import count

import trio

from krgfs import wire
from krgfs.errors import TryAgain, Unreachable

ANSWER_S = 3.0


class Mounts:
    """All connected mounts."""

    def __init__(self) -> None:
        self._channels: set[wire.Channel] = set()
        self._tickets = count(1)
        self._waiting: dict[int, set[wire.Channel]] = {}
        self._answered = trio.Event()

    def add(self, channel: wire.Channel) -> None:
        self._channels.add(channel)

    def drop(self, channel: wire.Channel) -> None:
        """A mount is gone: the kernel has ended all requests that it had."""
        self._channels.discard(channel)
        for waiting in self._waiting.values():
            waiting.discard(channel)
        self._wake()

    def released(self, channel: wire.Channel, ticket: int) -> None:
        """A mount says that nothing of the tree waits in it any more."""
        self._waiting.get(ticket, set()).discard(channel)
        self._wake()

    @asynccontextmanager
    async def release(self, pids: Iterable[int]) -> AsyncIterator[None]:
        """Enter with no task of `pids` waiting in a mount; left, they may wait again.

        TryAgain when a mount does not answer within ANSWER_S.
        """
        ticket = next(self._tickets)
        asked = set(self._channels)
        self._waiting[ticket] = set(asked)
        try:
            for channel in asked:
                with suppress(Unreachable):
                    await channel.send(wire.Release(ticket=ticket, pids=sorted(pids)))
            await self._all_answered(ticket)
            yield
        finally:
            del self._waiting[ticket]
            with trio.CancelScope(shield=True):
                for channel in asked & self._channels:
                    with suppress(Unreachable):
                        await channel.send(wire.Resume(ticket=ticket))

    async def _all_answered(self, ticket: int) -> None:
        with trio.move_on_after(ANSWER_S) as patience:
            while self._waiting[ticket]:
                await self._answered.wait()
        if patience.cancelled_caught:
            raise TryAgain(
                "a task of the tree waits in /krg and the mount did not let it go; try again"
            )

    def _wake(self) -> None:
        self._answered.set()
        self._answered = trio.Event()
