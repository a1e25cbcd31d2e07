"""Which images go by the policy of their app, and how one is removed by whomsoever.

What stays whatever the policy says: the newest version, one that a label pins, one that a job
holds. Imports under way are no images yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import trio

from krgfs.errors import Busy, Gone, KrgError
from krgfs.model import Image, Policy, Value
from krgfs.policy import duration_text, size_text

from . import criu
from .images import Images
from .jobs import Jobs
from .state import State

log = logging.getLogger(__name__)


class Expired(NamedTuple):
    """An image that is to go, and why."""

    image: Image
    why: str


def expired(
    images: Iterable[Image], policy: Policy, stays: Callable[[Image], bool], now: float
) -> list[Expired]:
    """Return what a policy has no room for, the oldest first; `stays` tells what is needed all the
    same. An image that was copied in has no age: somebody wants it now."""
    order = sorted(images, key=lambda image: image.version)
    left, found = sum(image.stored_bytes for image in order), []
    for newer, image in zip(range(len(order) - 1, 0, -1), order, strict=False):
        why = ""
        if policy.keep and newer >= policy.keep:
            why = f"there are {newer} newer ones (keep {policy.keep})"
        elif policy.max_age_s and image.own and now - image.created > policy.max_age_s:
            why = f"it is older than {duration_text(policy.max_age_s)} (max_age)"
        elif policy.keep_bytes and left > policy.keep_bytes:
            why = f"all take {size_text(left)} of {size_text(policy.keep_bytes)} (keep_bytes)"
        if why and not stays(image):
            left -= image.stored_bytes
            found.append(Expired(image, why))
    return found


class Retention:
    """Removes images."""

    def __init__(
        self, state: State, jobs: Jobs, images: Images, clock: Callable[[], float] = time.time
    ) -> None:
        self._state, self._jobs, self._images = state, jobs, images
        self._clock = clock

    def refuse_needed(self, image: Image) -> None:
        """Busy when a label pins an image or a job holds it."""
        labels = self._state.apps[image.app].labels
        if pins := [label for label, number in labels.items() if number == image.version]:
            raise Busy(f"{image.ref} is pinned by the label {pins[0]}; rm the label first")
        self._jobs.refuse_if_held(frozenset({f"image {image.ref}"}))

    async def remove(self, image: Image) -> None:
        """Remove an image, durably; its chunks are for a sweep. Busy where it is needed."""
        self.refuse_needed(image)
        network = await self._network_held_by(image)

        def unless_needed() -> tuple[Value, ...]:
            if image.version not in self._state.images.get(image.app, {}):
                raise Gone(f"{image.ref} was removed meanwhile")
            self.refuse_needed(image)  # somebody may have begun with it meanwhile
            return ()

        # ---- commit: the image is gone; its data is removed now, or at the next start
        await self._state.update(unless_needed, delete=[image])
        with trio.CancelScope(shield=True):
            if network:
                await criu.unlock_network(network)
            await self._images.remove(image.app, image.version)

    async def _network_held_by(self, image: Image) -> str:
        """Return the dump of which an image keeps TCP connections, '' when it keeps none, as a copy
        of another image does: that one may still be restored."""
        if not image.own:
            return ""
        try:
            return (await self._images.opened(image.app, image.version)).manifest.network
        except KrgError:
            return ""  # it is gone or damaged, which must not keep it from being removed

    async def expire(self, app: str) -> int:
        """Remove what the policy of an app has no room for, and return how many that were."""
        count = 0
        for image, why in self._due(app):
            try:
                await self.remove(image)
            except (Busy, Gone):
                continue
            count += 1
            log.info("image.expired image=%s uid=%d reason=%r", image.ref, image.uid, why)
            self._state.event("image.expired", image.uid, image=image.ref, reason=why)
        return count

    def _due(self, name: str) -> list[Expired]:
        app = self._state.apps.get(name)
        if app is None:
            return []
        images = self._state.images.get(name, {}).values()
        policy = self._state.node.policy_of(app)
        return expired(images, policy, self._stays, self._clock())

    def _stays(self, image: Image) -> bool:
        try:
            self.refuse_needed(image)
        except Busy:
            return True
        return False
