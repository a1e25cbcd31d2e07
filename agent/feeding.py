"""Trees that run before their memory is back (lazy=yes): what the agent sees to.

The feeder (see feeder) needs no agent. An agent begins it, tidies up after it, keeps anybody from
dumping a tree of which pages are still missing, and kills one whose feeder was killed: the kernel
would give it zeros for its memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import trio

from krgfs.errors import Damaged, KrgError
from krgfs.model import Tree

from . import criu, durable, feeder, feeder_plan, procs
from .opened import Opened
from .parts import Parts

log = logging.getLogger(__name__)
POLL_S = 0.1


class _Pages:
    """The page files of an image, for what CRIU reads itself."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if self._opened.source.read_into(file, offset, buffer) < len(buffer):
            raise Damaged(f"{self._opened.manifest.ref}: {file} ends before its pages do")


async def begin(parts: Parts, opened: Opened, images: str, directory: str) -> None:
    """Make of a directory with the small files of an image what CRIU restores from lazily, and
    start the feeder, in the directory of the keeper to be."""
    place = _place(parts, directory)

    def work() -> None:
        os.makedirs(directory, 0o700)
        staged = feeder.stage(Path(images), Path(images), _Pages(opened))
        os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
        word = feeder_plan.make(parts.images.store, opened.recipe, place, parts.images.root)
        feeder.start(Path(directory), Path(directory), staged, word)

    await durable.run(f"cannot feed {opened.manifest.ref}", work)


def check(directory: str) -> None:
    """Raise why a feeder has failed, if it has; its tree is killed then."""
    found = feeder.progress(Path(directory))
    if found is not None and found.state == "failed":
        raise Damaged(f"its memory cannot be brought back: {found.reason}")


def is_under_way(known: Tree) -> bool:
    """Tell whether pages of a tree are still missing."""
    found = feeder.progress(Path(known.keeper_dir)) if known.keeper_dir else None
    return found is not None and found.state == "feeding"


async def settled(known: Tree) -> None:
    """Return when no page of a tree is missing any more; raises where they will never come."""
    while is_under_way(known):  # noqa: ASYNC110 - it is another process that tells
        await trio.sleep(POLL_S)
    if known.keeper_dir:
        check(known.keeper_dir)


async def watch(parts: Parts, known: Tree) -> None:
    """See a feeder to its end. Returns at once for a tree that has none."""
    directory = Path(known.keeper_dir)
    if not known.keeper_dir or not os.path.isdir(_place(parts, known.keeper_dir)):
        return
    while is_under_way(known) and feeder.processes(directory):  # noqa: ASYNC110 - as above
        await trio.sleep(POLL_S)
    found = feeder.progress(directory)
    if found is not None and found.state == "done":
        facts = {"pid": known.pid, "image": criu.image_of_keeper(known.keeper_dir)}
        parts.state.event("tree.fed", known.uid, **facts)
    else:
        why = found.reason if found is not None else ""
        _lost(parts, known, why or "its feeder was killed while memory was missing")
    await drop(parts, known.keeper_dir)


def _lost(parts: Parts, known: Tree, why: str) -> None:
    """End what runs of a tree whose memory will not come: it would read zeros."""
    with contextlib.suppress(KrgError):
        procs.kill(procs.look(known.id.pid, known.id.start))
    log.error("tree.lost pid=%d keeper=%s reason=%s", known.pid, known.keeper_dir, why)
    parts.state.event("tree.lost", known.uid, pid=known.pid, message=f"{why}: it was killed")


async def drop(parts: Parts, directory: str) -> None:
    """Remove what the feeder of a keeper's directory was given."""
    place = _place(parts, directory)
    await trio.to_thread.run_sync(feeder_plan.drop, place)


async def tidy(parts: Parts) -> None:
    """Watch the feeders of trees that an earlier agent restarted, and drop what is nobody's."""
    needed = set()
    for known in parts.state.trees.values():
        if known.keeper_dir:
            needed.add(_place(parts, known.keeper_dir))
            parts.nursery.start_soon(watch, parts, known)
    needed |= {
        parts.images.places.feeding(job.id) for job in parts.state.jobs.values() if not job.is_over
    }
    root = parts.images.places.feedings
    for name in os.listdir(root) if os.path.isdir(root) else ():
        if (place := os.path.join(root, name)) not in needed:
            await trio.to_thread.run_sync(feeder_plan.drop, place)


def _place(parts: Parts, keeper_dir: str) -> str:
    return parts.images.places.feeding(int(os.path.basename(keeper_dir)))
