"""checkpoint: an image of a tree, and what becomes of the tree afterwards.

With then=run CRIU itself brings the tasks to rest and lets them go as soon as it has their memory.
For every other `then`, and for a tree that its user has frozen, the tree is held by its cgroup
until the image is committed, so that it does nothing that the image does not know of.
"""

from __future__ import annotations

import os
import platform
import signal as signals
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from msgspec.structs import replace

from krgfs import facts
from krgfs.errors import Cancelled, Exists, Fate, KrgError, Unsupported, name_of
from krgfs.model import App, Frozen, Image, Phase, Tree, TreeState
from krgfs.verbs import Checkpoint, Then

from .. import criu, criu_images, feeding, names, outside, procs
from ..criu_options import Option
from ..jobs import Running
from ..journal import OpenIntent, SpoolOpened, VersionPending
from ..manifest import End, Manifest, Task
from ..parts import Parts
from ..procs import ProcessTree
from ..spool import Spool
from . import freeze


async def checkpoint(parts: Parts, job: Running, tree: ProcessTree, words: Checkpoint) -> str:
    """Make an image of the tree; returns APP/vN. Any failure leaves the tree as it was."""
    known = freeze.record_of(parts, tree)
    parts.ends.watch(known)
    try:
        app = names.app_for(parts.state, tree, words.name)
        _refuse_orphans(tree, words)
        await feeding.settled(known)  # CRIU takes pages that are not back for such that never were
        await parts.upkeep.make_room(f"cannot checkpoint process {tree.pid}")
        ends = await trio.to_thread.run_sync(outside.ends, tree)
        partial = SpoolOpened(parts.images.places.spool(job.id))
        async with (
            parts.engines,
            parts.journal.intent(job.id, job.job.verb, job.holds) as intent,
            intent.noted(partial),
            parts.images.spool(app.name, job.id, procs.own_bytes(tree)) as spool,
        ):
            tree = procs.look(tree.id.pid, tree.id.start)
            async with _held(parts, job, tree, words.then, known) as frozen:
                image = await _make_image(parts, job, tree, words, app, ends, frozen, intent, spool)
                await afterwards(parts, job, tree, words.then, frozen)
            await spool.remember()
    except BaseException as exc:
        parts.upkeep.sweep_soon()
        job.note(fate=procs.fate(tree))
        if isinstance(exc, KrgError):
            exc.fate = procs.fate(tree)  # what it was while we held it is past
            if job.job.line:
                exc.message += f"; the image {job.job.line} is made all the same"
        if isinstance(exc, KrgError) or not job.job.line:
            with trio.CancelScope(shield=True):
                await note_failure(parts, tree, exc)
        raise
    return image.ref


@asynccontextmanager
async def _held(
    parts: Parts, job: Running, tree: ProcessTree, then: Then, known: Tree
) -> AsyncIterator[Frozen | None]:
    """Hold the tree while its image is made, unless it only has to run on; left by an error, it is
    as it was before."""
    if known.state is TreeState.FROZEN and known.frozen is not None:
        job.frozen = True
        try:
            yield known.frozen
        except BaseException:
            with trio.move_on_after(freeze.REST_S, shield=True):
                await parts.freezer.refreeze(known.frozen)  # a CRIU that was killed had thawed it
            raise
        return
    if then.kind == "run":
        yield None
        return
    frozen = await freeze.hold(parts, job, tree)
    try:
        yield frozen
    except BaseException:
        await freeze.let_go(parts, tree, frozen)
        raise


async def _make_image(
    parts: Parts,
    job: Running,
    tree: ProcessTree,
    words: Checkpoint,
    app: App,
    ends: list[outside.End],
    frozen: Frozen | None,
    intent: OpenIntent,
    spool: Spool,
) -> Image:
    kept: list[Image] = []

    async def keep(report: criu.DumpReport) -> None:
        kept.append(await _keep(parts, job, tree, words, app, ends, spool, report, intent))

    options = criu.dump_options(parts.engine, tree, spool.path, words, ends, frozen)
    async with parts.mounts.release(tree.pids):
        if criu.is_ended_by(options):
            await _dump(parts, job, tree, options, spool, keep)
            return kept[0]
        report = await _dump(parts, job, tree, options, spool)
    await keep(report)
    return kept[0]


async def _dump(
    parts: Parts,
    job: Running,
    tree: ProcessTree,
    options: Sequence[Option],
    spool: Spool,
    commit: criu.Commit | None = None,
) -> criu.DumpReport:
    async def started(pid: int, start: int) -> None:
        job.frozen = True

    job.phase(Phase.DUMPING, bytes_total=tree.rss_bytes)
    try:
        return await criu.dump(
            parts.engine, tree, spool.path, spool.intake, options, started, job.progress, commit
        )
    finally:
        with trio.CancelScope(shield=True):
            job.said = await criu.kept_words(spool.path, parts.job_log(job.id))


async def _keep(
    parts: Parts,
    job: Running,
    tree: ProcessTree,
    words: Checkpoint,
    app: App,
    ends: list[outside.End],
    spool: Spool,
    report: criu.DumpReport,
    intent: OpenIntent,
) -> Image:
    """Make an image of what CRIU has written; durable on return."""
    version = parts.state.apps.get(app.name, app).next_version
    manifest = _manifest(parts, tree, words, app, version, ends, report, spool)
    job.phase(Phase.STORING, freeze_ms=report.frozen_ms, downtime_ms=report.frozen_ms)
    user_info = facts.files_text(facts.open_files(tree.tasks)).decode()
    texts = {"description": _description(manifest), "user_info.txt": user_info}
    await spool.seal(manifest, texts=texts, sure=words.then.kind != "run")
    # ---- commit: the record makes the image; before it everything is undone
    with trio.CancelScope(shield=True):
        async with intent.noted(VersionPending(app.name, version)):
            published = await _published(parts, spool, app, version)
            image = await _commit(parts, job, tree, app, published)
    parts.state.count("krg_freeze_seconds_sum", report.frozen_ms / 1000)
    parts.state.count("krg_freeze_seconds_count")
    return image


async def _published(parts: Parts, spool: Spool, app: App, version: int) -> Manifest:
    """Publish a version; what has its name but no record is left of a failure, and is removed."""
    try:
        return await spool.publish(version)
    except Exists:
        if version in parts.state.images.get(app.name, {}):
            raise
    except KrgError:
        await parts.images.remove(app.name, version)  # it may be there: an answer was lost
        raise
    await parts.images.remove(app.name, version)
    return await spool.publish(version)


async def _commit(
    parts: Parts, job: Running, tree: ProcessTree, app: App, sealed: Manifest
) -> Image:
    image = names.image_of(sealed, own=True)

    def records() -> list[Image | App | Tree]:
        current = parts.state.apps.get(app.name, app)
        lives = replace(
            names.with_version(current, image.version),
            incarnation=tree.id,
            members=tuple(each for each in tree.ids if each != tree.id),
        )
        known = replace(
            freeze.record_of(parts, tree), app=app.name, last_image=image.ref, last_error=""
        )
        return [
            image,
            lives,
            freeze.with_outcome(known, "checkpoint", image.ref, last_job=job.id),
        ]

    try:
        await parts.state.update(records)
    except BaseException:
        await parts.images.remove(image.app, image.version)
        raise
    job.note(line=image.ref)
    parts.ends.watch(freeze.record_of(parts, tree))
    parts.state.event("image.committed", image.uid, image=image.ref, pid=tree.pid)
    parts.upkeep.look(image.app)
    return image


async def afterwards(
    parts: Parts, job: Running, tree: ProcessTree, then: Then, frozen: Frozen | None
) -> None:
    """Do with the tree what `then` says. The image is committed: nothing of it is undone."""
    if then.kind == "run" or frozen is None:
        return
    with trio.CancelScope(shield=True):
        job.phase(Phase.FINISHING)
        if then.kind == "freeze":
            await freeze.update(
                parts, tree, state=TreeState.FROZEN, frozen=frozen, frozen_since=time.time()
            )
            return
        if then.kind == "kill" and then.signal == signals.SIGKILL:
            await parts.freezer.kill(frozen, tree)
            await parts.ends.noted(tree.id)
            return
        procs.send(tree, signals.SIGSTOP if then.kind == "stop" else then.signal)
        await freeze.let_go(parts, tree, frozen)


def _refuse_orphans(tree: ProcessTree, words: Checkpoint) -> None:
    if words.orphans == "drop":
        return
    found = procs.orphans(tree)
    if found:
        told = "; ".join(f"{procs.title(task)}: {why}" for task, why in found[:5])
        raise Unsupported(
            f"tasks belong to the tree {tree.pid} but hang elsewhere ({len(found)}: {told}) and "
            "would be lost: checkpoint the process above them, or write orphans=drop",
            fate=Fate.RUNNING,
        )


def _manifest(
    parts: Parts,
    tree: ProcessTree,
    words: Checkpoint,
    app: App,
    version: int,
    ends: list[outside.End],
    report: criu.DumpReport,
    spool: Spool,
) -> Manifest:
    uname = platform.uname()
    return Manifest(
        app=app.name,
        version=version,
        node=parts.state.node.name,
        created=time.time(),
        uid=app.uid,
        gid=app.gid,
        desc=words.desc,
        root=tree.inner_root,
        tree=_tasks(tree, spool),
        then=words.then.kind,
        tcp=words.tcp,
        criu=parts.engine.version,
        options=tuple((" ".join(option.words), option.reason) for option in report.options),
        kernel=uname.release,
        arch=uname.machine,
        boot=facts.BOOT_ID,
        cwd=os.fsdecode(facts.link(tree.pid, "cwd")),
        network=_network(spool),
        ends=tuple(
            End(kind=end.kind, id=end.id, pid=end.pid, fd=end.fd, mode=end.mode) for end in ends
        ),
        freeze_ms=report.frozen_ms,
        timings=report.timings,
    )


def _network(spool: Spool) -> str:
    dumped = criu_images.dumped(Path(spool.path))
    return dumped.run_id if dumped.kept_tcp else ""


def _inner(tree: ProcessTree, pid: int) -> int:
    found = tree.credentials.get(pid)
    return found.ns_pids[-1] if found and found.ns_pids else pid


def _tasks(tree: ProcessTree, spool: Spool) -> tuple[Task, ...]:
    """Return what is in the image: a tree that ran on until CRIU came may have forked meanwhile."""
    inner = {task.pid: _inner(tree, task.pid) for task in tree.tasks}
    known = {inner[task.pid]: _task(tree, task, inner) for task in tree.tasks}
    return tuple(known.get(each.pid, each) for each in criu_images.tasks(spool.path))


def _task(tree: ProcessTree, task: facts.Task, inner: dict[int, int]) -> Task:
    found = tree.credentials.get(task.pid)
    return Task(
        pid=inner[task.pid],
        start=task.start,
        ppid=inner.get(task.ppid, 0),
        sid=inner.get(task.sid, task.sid),
        pgrp=inner.get(task.pgrp, task.pgrp),
        uid=found.uid if found else -1,
        gid=found.gid if found else -1,
        comm=os.fsdecode(task.comm),
        tids=tuple(tree.threads.get(task.pid, ())),
    )


def _description(manifest: Manifest) -> str:
    lines = {
        "Identifier": manifest.app,
        "Version": manifest.version,
        "Description": manifest.desc or "No description",
        "Date": int(manifest.created),
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


async def note_failure(parts: Parts, tree: ProcessTree, exc: BaseException) -> None:
    error, line = "cancelled", f"error {name_of(Cancelled.errno)} cancelled"
    if isinstance(exc, KrgError):
        error, line = str(exc), f"error {name_of(exc.errno)} {exc.message}"
    await parts.state.update(
        lambda: [
            freeze.with_outcome(freeze.record_of(parts, tree), "checkpoint", line, last_error=error)
        ]
    )
