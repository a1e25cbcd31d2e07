"""What an earlier agent left under way, set right before the first request is answered.

The journal says what there may be: a CRIU at work is waited for (never ended), what a job froze is
thawed, partial data is removed, a tree that came back to life meanwhile is taken over. What a user
froze stays frozen.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable

import trio
from msgspec.structs import replace

from krgfs import facts
from krgfs.errors import EngineFailed, Fate, KrgError
from krgfs.model import Job, TreeState

from . import criu, keepers
from .jobs import Running
from .journal import EngineRunning, Intent, KeeperStarted, SpoolOpened, VersionPending
from .ops import freeze, restart
from .parts import Parts

log = logging.getLogger(__name__)
ENDED = "the agent was ended in the middle of it"


async def recover(parts: Parts) -> None:
    """Settle everything that can be settled at once, and start jobs for the rest."""
    state = parts.state
    intents = {intent.job: intent for intent in await parts.journal.left_over()}
    images = {(image.app, n) for app in state.images.values() for n, image in app.items()}
    imports = {(each.app, name) for app in state.imports.values() for name, each in app.items()}
    pending = {
        (fact.app, fact.version)
        for intent in intents.values()
        for fact in intent.facts
        if isinstance(fact, VersionPending)
    }
    busy = [intent for intent in intents.values() if _has_engine(intent)]
    if not busy:
        done = await parts.images.recover(images, imports, pending)
        log.info("recovery.images %r", done)
    for job in [job for job in state.jobs.values() if not job.is_over]:
        intent = intents.pop(job.id, None)
        parts.jobs.resume(job, _holds(job), _resolution(parts, job, intent))
    for intent in intents.values():
        await parts.journal.settle(intent)
    for known in tuple(state.trees.values()):
        if known.frozen is not None and known.state is TreeState.RUNNING and not busy:
            await freeze.thaw_record(parts, known, ENDED)
        elif known.frozen_until:
            parts.nursery.start_soon(freeze.thaw_at, parts, known)
        parts.ends.watch(known)
    keepers.tidy(parts.run_dir, {known.keeper_dir for known in state.trees.values()})


def _has_engine(intent: Intent) -> bool:
    return intent.boot == facts.BOOT_ID and any(
        isinstance(fact, EngineRunning) and facts.is_alive(fact.pid, fact.start)
        for fact in intent.facts
    )


def _holds(job: Job) -> frozenset[int | str]:
    last = job.object.rpartition("/")[2]
    tree = facts.tree(int(last)) if last.isdecimal() and "procs" in job.object else ()
    return frozenset(task.pid for task in tree)


def _resolution(
    parts: Parts, job: Job, intent: Intent | None
) -> Callable[[Running], Awaitable[str]]:
    async def resolve(running: Running) -> str:
        if intent is None:
            raise EngineFailed(f"{ENDED}, before anything was done; do it again")
        with trio.CancelScope(shield=True):
            line = await _settle(parts, running, intent)
            await parts.journal.settle(intent)
        if line:
            return line
        raise EngineFailed(f"{ENDED}; what it had begun was undone: do it again", fate=_fate(job))

    return resolve


async def _settle(parts: Parts, running: Running, intent: Intent) -> str:
    """Undo what an intent names, or finish it; returns the job's line where it was finished."""
    line = ""
    for fact in intent.facts:
        match fact:
            case EngineRunning(pid=pid, start=start) if intent.boot == facts.BOOT_ID:
                await criu.wait_for_end(pid, start)
            case KeeperStarted(directory=directory) if intent.boot == facts.BOOT_ID:
                line = await restart.adopt(parts, running, directory)
            case VersionPending(app=app, version=version):
                if version in parts.state.images.get(app, {}):
                    line = f"{app}/v{version}"
                else:
                    await parts.images.remove(app, version)
    await _thaw_object(parts, running.job)
    for fact in intent.facts:
        if isinstance(fact, SpoolOpened):
            await trio.to_thread.run_sync(_remove, fact.path)
    return line


async def _thaw_object(parts: Parts, job: Job) -> None:
    last = job.object.rpartition("/")[2]
    known = parts.state.trees.get(int(last)) if last.isdecimal() else None
    if known is None:
        return
    if known.frozen is not None and known.state is TreeState.RUNNING:
        await freeze.thaw_record(parts, known, ENDED)
    elif job.verb == "checkpoint" and "checkpoint" in known.outcomes and not known.ended:
        try:
            await parts.state.commit(replace(known, last_error=ENDED))
        except KrgError as exc:
            log.error("recovery.unwritten pid=%d reason=%r", known.pid, exc.message)


def _remove(spool: str) -> None:
    for path in (spool, str(criu.work_dir(spool))):
        shutil.rmtree(path, ignore_errors=True)


def _fate(job: Job) -> Fate | None:
    last = job.object.rpartition("/")[2]
    if not last.isdecimal() or "procs" not in job.object:
        return None
    found = facts.task(int(last))
    if found is None or found.is_zombie:
        return Fate.GONE
    return Fate.STOPPED if found.state in "Tt" else Fate.RUNNING
