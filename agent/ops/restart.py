"""restart: an image comes back to life, with its pids or in a private pid namespace.

The tree is restored under a keeper, which is its parent from the first instruction on and keeps its
exit status. At most one incarnation of an app lives.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from msgspec.structs import replace

from krgfs import facts
from krgfs.errors import Damaged, Exists, Gone
from krgfs.model import App, Image, Phase, ProcessId, Tree
from krgfs.verbs import Restart

from .. import criu, durable, feeding, keepers, names, procs, stream
from ..jobs import Running
from ..journal import KeeperStarted
from ..keepers import Launched, Plan
from ..manifest import Manifest
from ..opened import Opened
from ..parts import Parts

ZOMBIE_S = 10.0


async def restart(parts: Parts, job: Running, app: App, image: Image, words: Restart) -> str:
    """Bring an image back to life; returns `pid N`. A failure leaves no task of it."""
    _refuse_second_life(app)
    job.phase(Phase.RESTORING, bytes_total=image.logical_bytes)
    opened = await _whole(parts, image)
    try:
        return await _restored(parts, job, app, image, words, opened)
    except Exists:
        if words.pid != "auto":
            raise
    # a pid may be taken as that of a session or a group whose leader has ended
    return await _restored(parts, job, app, image, replace(words, pid="new"), opened)


async def _restored(
    parts: Parts, job: Running, app: App, image: Image, words: Restart, opened: Opened
) -> str:
    manifest, directory = opened.manifest, keepers.directory(parts.run_dir, job.id)
    async with _unpacked(parts, opened, job.id) as path:
        private = await _private(manifest, path, words)
        async with parts.engines, parts.journal.intent(job.id, job.job.verb, job.holds) as intent:
            plan = await trio.to_thread.run_sync(
                criu.restore_plan,
                parts.engine,
                manifest,
                path,
                words,
                job.caller,
                private,
                directory,
                opened.sizes,
            )
            async with intent.noted(KeeperStarted(directory)):
                async with _memory(parts, opened, path, directory, words) as check:
                    launched = await _launched(parts, job, directory, plan, check)
                # ---- commit: the tree runs; from here it is the app's incarnation
                with trio.CancelScope(shield=True):
                    line = await _commit(parts, job, app, image, launched, directory)
    return line


@asynccontextmanager
async def _unpacked(parts: Parts, opened: Opened, job: int) -> AsyncIterator[str]:
    """Yield a directory with the small files of an image, where CRIU asks for all of them."""
    path = parts.images.places.spool(job)
    await durable.run(f"cannot unpack {opened.manifest.ref}", partial(os.mkdir, path, 0o700))
    try:
        await parts.images.unpacked(opened, path)
        yield path
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(durable.delete, path)


@asynccontextmanager
async def _memory(
    parts: Parts, opened: Opened, path: str, directory: str, words: Restart
) -> AsyncIterator[Callable[[], None]]:
    """See to it that what is restored gets its memory, from us or from a feeder; yields what raises
    why it did not come."""
    if words.lazy == "no":
        async with stream.serve(Path(path), opened.source) as served:
            yield served.check
        return
    try:
        await feeding.begin(parts, opened, path, directory)
        yield partial(feeding.check, directory)
    except BaseException:
        with trio.CancelScope(shield=True):
            await feeding.drop(parts, directory)
            await trio.to_thread.run_sync(partial(shutil.rmtree, directory, ignore_errors=True))
        raise


async def _launched(
    parts: Parts, job: Running, directory: str, plan: Plan, check: Callable[[], None]
) -> Launched:
    """Start the tree and keep what CRIU said; nothing of a launch that failed stays."""
    try:
        launched = await keepers.launch(parts.keeper, directory, plan)
    except BaseException:
        with trio.CancelScope(shield=True):
            job.said = await criu.kept_words(directory, parts.job_log(job.id))
            try:
                check()
            finally:
                await trio.to_thread.run_sync(partial(shutil.rmtree, directory, ignore_errors=True))
        raise
    with trio.CancelScope(shield=True):
        job.said = await criu.kept_words(directory, parts.job_log(job.id))
    try:
        check()
    except BaseException:
        procs.kill(procs.look(launched.root.pid, launched.root.start))
        raise
    return launched


async def adopt(parts: Parts, running: Running, directory: str) -> str:
    """Take over a tree whose restore an earlier agent had begun; '' when it never came to life."""
    launched = await keepers.launched(directory)
    if launched is None or not facts.is_alive(launched.root.pid, launched.root.start):
        return ""
    image_ref = criu.image_of_keeper(directory)
    app, image = names.resolve(parts.state, image_ref)
    return await _commit(parts, running, app, image, launched, directory)


def _refuse_second_life(app: App) -> None:
    other = names.living(app)
    if other is not None:
        raise Exists(
            f"{app.name} lives already as process {other.pid}; end that one first "
            f"(echo KILL > /krg/procs/{other.pid}/signal), or checkpoint it with then=kill"
        )


async def _whole(parts: Parts, image: Image) -> Opened:
    """Return an image, every byte of which is as it was committed, or raise Damaged."""
    try:
        opened = await parts.images.opened(image.app, image.version)
        wrong = await parts.images.check(opened)
        if not wrong and opened.manifest.digest == image.digest:
            return opened
        wrong = wrong or "its manifest is not the one that was committed"
    except Damaged as exc:
        wrong = exc.message
    parts.state.show(replace(image, damaged=wrong))
    raise Damaged(f"{image.ref} is damaged: {wrong}; take another version")


async def _private(manifest: Manifest, path: str, words: Restart) -> bool:
    """Tell whether the tree needs a pid namespace of its own. A zombie that still holds a pid is
    waited for; a foreign process that does decides by pid=."""
    if words.pid == "new":
        return True
    wanted = criu.ids_in(path)
    with trio.move_on_after(ZOMBIE_S):
        while zombies := [task for _, task in criu.clashes(wanted) if task.is_zombie]:
            await procs.gone([procs.process_id(task) for task in zombies])
    foreign = criu.clashes(wanted)
    if not foreign:
        return False
    if words.pid == "keep":
        pid, holder = foreign[0]
        raise Exists(
            f"pid {pid} of {manifest.ref} is held by {procs.title(holder)} of uid "
            f"{(facts.owner(holder.pid) or ('?',))[0]}; write pid=new (or auto) for a private "
            "pid namespace, or end that process"
        )
    return True


async def _commit(
    parts: Parts, job: Running, app: App, image: Image, launched: Launched, directory: str
) -> str:
    root = launched.root
    tasks = facts.tree(root.pid)
    if not tasks:
        raise Gone(f"{image.ref} was restored as process {root.pid} and has ended at once")
    known = Tree(
        id=root,
        uid=image.uid,
        app=app.name,
        last_image=image.ref,
        last_job=job.id,
        keeper=launched.keeper,
        keeper_dir=directory,
        inner_pid=launched.inner_pid,
        outcomes={"checkpoint": f"restarted {image.ref}"},
    )
    members = tuple(_id(task) for task in tasks[1:])

    def records() -> list[Tree | App]:
        current = parts.state.apps.get(app.name, app)
        return [known, replace(current, incarnation=root, members=members)]

    try:
        await parts.state.update(records)
    except BaseException:
        procs.kill(procs.look(root.pid, root.start))
        raise
    parts.ends.watch(known)
    parts.nursery.start_soon(feeding.watch, parts, known)
    parts.state.event("tree.restarted", image.uid, image=image.ref, pid=root.pid)
    return f"pid {root.pid}"


def _id(task: facts.Task) -> ProcessId:
    return ProcessId(pid=task.pid, start=task.start, boot=facts.BOOT_ID)
