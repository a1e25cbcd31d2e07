"""What an earlier agent left under way, set right before the first request is answered.

What a job had noted in the journal is undone, or finished where its commit line was passed; a CRIU
at work is waited for (never ended), and meanwhile the job goes on to hold what it held. What the
records say has happened, has happened. What a user froze stays frozen.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from functools import partial

import trio

from krgfs import facts, verbs
from krgfs.errors import EngineFailed, Fate, Gone, KrgError
from krgfs.model import Frozen, Job, Tree, TreeState
from krgfs.verbs import Checkpoint, Freeze, Restart

from . import criu, feeding, keepers, procs
from .jobs import Running
from .journal import Fact, Intent, KeeperStarted, SpoolOpened, VersionPending
from .ops import checkpoint, freeze, restart
from .parts import Parts
from .procs import ProcessTree

log = logging.getLogger(__name__)
ENDED = "the agent was ended in the middle of it"
AGAIN = f"{ENDED}; what it had begun was undone: do it again"


async def recover(parts: Parts) -> None:
    """Settle everything that can be settled at once, and start jobs for the rest."""
    state = parts.state
    intents = {intent.job: intent for intent in await parts.journal.left_over()}
    await _tidy_images(parts, intents.values())
    under_way = [job for job in state.jobs.values() if not job.is_over]
    for known in tuple(state.trees.values()):
        if known.frozen_until:
            parts.nursery.start_soon(freeze.thaw_at, parts, known)
        if not any(_pid(job) == known.pid for job in under_way):
            await _let_go(parts, known)
        parts.ends.watch(known)
    for job in under_way:
        intent = intents.pop(job.id, None)
        parts.jobs.resume(job, _holds(job, intent), partial(_resolve, parts, intent))
    for intent in intents.values():
        await parts.journal.settle(intent)
    needed = {known.keeper_dir for known in state.trees.values()}
    needed |= {keepers.directory(parts.run_dir, job.id) for job in under_way}
    keepers.tidy(parts.run_dir, needed)
    await feeding.tidy(parts)


async def _tidy_images(parts: Parts, intents: Iterable[Intent]) -> None:
    """Remove partial data. A number that an app has given out and that has no record was removed,
    and is to be deleted however far that had come."""
    state = parts.state
    images = {(image.app, n) for app in state.images.values() for n, image in app.items()}
    imports = {(each.app, name) for app in state.imports.values() for name, each in app.items()}
    given_out = {(app.name, n) for app in state.apps.values() for n in range(1, app.next_version)}
    noted = [(intent.job, fact) for intent in intents for fact in intent.facts]
    pending = {(fact.app, fact.version) for _, fact in noted if isinstance(fact, VersionPending)}
    spools = [(job, fact.path) for job, fact in noted if isinstance(fact, SpoolOpened)]
    at_work = {job for job, path in spools if procs.told(path)}
    done = await parts.images.recover(images, imports, pending | given_out - images, at_work)
    log.info("recovery.images %r", done)


def _holds(job: Job, intent: Intent | None) -> frozenset[int | str]:
    if intent is not None and intent.boot == facts.BOOT_ID:
        return frozenset(intent.holds)
    return frozenset({_pid(job)} - {0})


def _pid(job: Job) -> int:
    """Return the process that a job works on, 0 where it is none."""
    place, _, last = job.object.rpartition("/")
    return int(last) if last.isdecimal() and place.endswith("procs") else 0


async def _resolve(parts: Parts, intent: Intent | None, running: Running) -> str:
    """Finish the job of an earlier agent; returns its line, or raises what became of it."""
    line = ""
    with trio.CancelScope(shield=True):
        try:
            line = await _came_to(parts, intent.facts if intent is not None else (), running)
        finally:
            if intent is not None:
                await parts.journal.settle(intent)
    return line


async def _came_to(parts: Parts, noted: Sequence[Fact], running: Running) -> str:
    job = running.job
    known = parts.state.trees.get(_pid(job))
    match verbs.parse(job.verb, job.words):
        case Checkpoint() as words:
            return await _checkpoint(parts, running, noted, known, words)
        case Restart():
            return await _restart(parts, running, noted)
        case Freeze() as words if known is not None:
            return await _freeze(parts, running, known, words)
    if known is not None and known.last_job == job.id and job.verb in known.outcomes:
        return known.outcomes[job.verb]
    raise EngineFailed(
        f"{ENDED}: it is not known whether anything was done", fate=_fate(_look(known))
    )


async def _checkpoint(
    parts: Parts, running: Running, noted: Sequence[Fact], known: Tree | None, words: Checkpoint
) -> str:
    job = running.job
    made = _committed(parts, noted)
    tree = _look(known)
    for fact in noted:
        if isinstance(fact, SpoolOpened):
            await criu.outlived(fact.path, tree)
            running.said = await criu.kept_words(fact.path, parts.job_log(job.id))
            await trio.to_thread.run_sync(partial(shutil.rmtree, fact.path, ignore_errors=True))
    if known is not None and known.state is TreeState.FROZEN and known.frozen is not None:
        await _refreeze(parts, known.frozen)
    if known is not None and known.last_job == job.id and _is_image(known):
        if tree is not None:
            await checkpoint.afterwards(parts, running, tree, words.then, known.frozen)
        else:
            await freeze.thaw_record(parts, known, "it has ended")
        return known.outcomes["checkpoint"]
    if known is not None:
        await _let_go(parts, known)
    if made:
        return made
    failed = EngineFailed(AGAIN, fate=_fate(tree))
    if tree is not None:
        await checkpoint.note_failure(parts, tree, failed)
    raise failed


def _committed(parts: Parts, noted: Sequence[Fact]) -> str:
    """Return the image of a job that has a record, also where that of its tree went with a reboot;
    '' when it has none. To be asked before anybody else can take its number."""
    for fact in noted:
        if isinstance(fact, VersionPending):
            image = parts.state.images.get(fact.app, {}).get(fact.version)
            if image is not None:
                return image.ref
    return ""


def _is_image(known: Tree) -> bool:
    """Tell whether the tree's checkpoint file reads as the image that was made last."""
    return bool(known.last_image) and known.outcomes.get("checkpoint") == known.last_image


async def _refreeze(parts: Parts, frozen: Frozen) -> None:
    with trio.move_on_after(freeze.REST_S):
        try:
            await parts.freezer.refreeze(frozen)
        except Gone:
            log.info("recovery.gone cgroup=%s", frozen.cgroup)


async def _restart(parts: Parts, running: Running, noted: Sequence[Fact]) -> str:
    directory = keepers.directory(parts.run_dir, running.id)
    for known in parts.state.trees.values():
        if known.keeper_dir == directory:
            return f"pid {known.pid}"
    if KeeperStarted(directory) in noted:
        if line := await restart.adopt(parts, running, directory):
            return line
        running.said = await criu.kept_words(directory, parts.job_log(running.id))
        if how := keepers.status(directory).ended:
            raise Gone(f"{ENDED}; the tree came to life, and has ended since ({how})")
    with trio.move_on_after(keepers.CLEARING_S):
        await keepers.cleared(directory)
    raise EngineFailed(f"{ENDED}, and nothing of it runs: do it again")


async def _freeze(parts: Parts, running: Running, known: Tree, words: Freeze) -> str:
    if words.on and known.last_job == running.id and known.state is TreeState.FROZEN:
        return "frozen"
    if words.on:
        await _let_go(parts, known)
        raise EngineFailed(AGAIN, fate=_fate(_look(known)))
    tree = _look(known)
    if tree is not None and known.frozen is not None:
        return await freeze.thaw(parts, running, tree, words)
    return "running"


async def _let_go(parts: Parts, known: Tree) -> None:
    """Thaw what a job of the earlier agent froze for itself."""
    if known.frozen is not None and known.state is TreeState.RUNNING:
        await freeze.thaw_record(parts, known, ENDED)


def _look(known: Tree | None) -> ProcessTree | None:
    try:
        return procs.look(known.id.pid, known.id.start) if known is not None else None
    except KrgError:
        return None


def _fate(tree: ProcessTree | None) -> Fate:
    return procs.fate(tree) if tree is not None else Fate.GONE
