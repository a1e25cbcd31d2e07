"""What is done to the image store in the background: images go by policy, and what no image needs
is swept out.

A store that nobody else writes gives the room of an image back within seconds; of one that others
write too a sweep waits for its grace. A sweep keeps out of the way of dumps for a while, and then
runs beside them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import trio

from krgfs.errors import KrgError, NoRoom

from . import durable
from .backend_bounded import BoundedBackend
from .images import Images
from .retention import Retention
from .state import State

log = logging.getLogger(__name__)

LOOK_S = 60.0  # between two looks at all apps
SETTLE_S = 0.5  # images that go one after the other are swept together
PATIENCE_S = 30.0
GRACES = 3  # after so many of them nothing is left of an image that was removed


class Upkeep:
    """Waits until something is due. `look` and `sweep_soon` return at once."""

    def __init__(
        self, state: State, retention: Retention, images: Images, room: BoundedBackend
    ) -> None:
        self._state, self._retention, self._images, self._room = state, retention, images, room
        self._apps: set[str] = set()
        self._wanted = trio.Event()
        self._sweeping = trio.Lock()
        self._sweep_at = math.inf
        self._until = -math.inf

    def look(self, app: str) -> None:
        """Have the policy of an app done: there is a new image of it, or a new policy."""
        self._apps.add(app)
        self._wanted.set()

    def sweep_soon(self) -> None:
        """Have what no image needs swept out: an image was removed, or a dump failed."""
        now = trio.current_time()
        self._sweep_at = min(self._sweep_at, now + SETTLE_S)
        self._until = now + GRACES * self._images.store.terms.grace_s
        self._wanted.set()

    async def keep(self) -> None:
        """Do what is due, until cancelled; what fails is tried again later."""
        self.sweep_soon()  # what a crash left
        look_at = trio.current_time()
        while True:
            with trio.move_on_at(min(look_at, self._sweep_at)):
                await self._wanted.wait()
            self._wanted = trio.Event()
            apps, self._apps = self._apps, set()
            is_time = trio.current_time() >= look_at
            if is_time:
                look_at = trio.current_time() + LOOK_S
                apps |= self._state.apps.keys()
            try:
                if is_time:
                    await self._count()
                await self._look_after(apps)
            except Exception as exc:
                log.exception("upkeep.failed error=%s", type(exc).__name__)
                self._sweep_at = trio.current_time() + LOOK_S

    async def _look_after(self, apps: Iterable[str]) -> None:
        await self._expire(apps)
        if trio.current_time() >= self._sweep_at:
            await self._quiet()
            await self._sweep()

    async def _quiet(self) -> None:
        """Wait for the dumps under way, for a while."""
        for _ in range(int(PATIENCE_S / SETTLE_S)):
            if not self._images.store.alive():
                return
            await trio.sleep(SETTLE_S)

    async def _expire(self, apps: Iterable[str]) -> None:
        for app in sorted(apps):
            try:
                if await self._retention.expire(app):
                    self.sweep_soon()
            except KrgError as exc:
                log.warning("retention.failed app=%s reason=%r", app, exc.message)

    async def _sweep(self) -> None:
        async with self._sweeping:
            self._sweep_at = math.inf
            again_s = LOOK_S
            try:
                swept = await self._images.sweep()
                await self._count()
                is_left = bool(swept.condemned_chunks or swept.waiting)
                again_s = self._again_s(is_left)
                if swept.freed_bytes:
                    log.info(
                        "store.swept packs=%d freed_bytes=%d",
                        swept.removed_packs,
                        swept.freed_bytes,
                    )
            except KrgError as exc:
                log.warning("sweep.failed reason=%r", exc.message)
            self._sweep_at = min(self._sweep_at, trio.current_time() + again_s)

    async def _count(self) -> None:
        await durable.run("cannot look at the image store", self._room.count)

    def _again_s(self, is_left: bool) -> float:
        if self._images.alone:
            return SETTLE_S if is_left else math.inf
        if is_left or trio.current_time() < self._until:
            return self._images.store.terms.grace_s
        return math.inf

    async def make_room(self, action: str) -> None:
        """Return when a dump may begin. NoRoom or OverQuota, told as `action`, where there is no
        room for one, not even after all that may go has gone."""
        try:
            await durable.run(action, self._room.check)
        except NoRoom:
            await self._expire(tuple(self._state.apps))
            await self._sweep()
            if self._images.alone:
                await self._sweep()
            await durable.run(action, self._room.check)
