"""freeze, thaw and signal: what holds a tree still between jobs, until it is told to go on.

What a user froze stays frozen until `0`, also over a restart of the agent; `for=` and `while-open`
thaw by themselves.
"""

from __future__ import annotations

import logging
import signal as signals
import time

import msgspec
import trio

from krgfs.errors import KrgError, PartOfIt
from krgfs.model import Frozen, Phase, Tree, TreeState
from krgfs.verbs import Freeze, Signal, signal_name

from .. import procs
from ..jobs import Running
from ..parts import Parts
from ..procs import ProcessTree

log = logging.getLogger(__name__)
REST_S = 5.0


def record_of(parts: Parts, tree: ProcessTree) -> Tree:
    """Return what is known of a tree, a fresh record for one that nobody dealt with yet."""
    known = parts.state.tree(tree.id.pid, tree.id.start)
    uid = tree.credentials[tree.pid].uid
    return known or Tree(id=tree.id, uid=uid, inner_pid=tree.inner_root)


async def update(parts: Parts, tree: ProcessTree, **fields: object) -> None:
    """Write facts into a tree's record; durable on return."""
    await parts.state.update(lambda: [msgspec.structs.replace(record_of(parts, tree), **fields)])
    parts.ends.watch(record_of(parts, tree))


async def told(parts: Parts, tree: ProcessTree, job: int, verb: str, line: str) -> None:
    """Note the job as the tree's last one, and the line that the verb's file reads back."""
    await parts.state.update(
        lambda: [with_outcome(record_of(parts, tree), verb, line, last_job=job)]
    )
    parts.ends.watch(record_of(parts, tree))


def begun(parts: Parts, tree: ProcessTree, verb: str, job: int) -> list[Tree]:
    """Return the tree's record as it is while a job works on it."""
    return [with_outcome(record_of(parts, tree), verb, f"running jobs/{job}", last_job=job)]


def with_outcome(known: Tree, verb: str, line: str, **fields: object) -> Tree:
    """Return a tree's record with the line that the verb's file reads back."""
    outcomes = {**known.outcomes, verb: line}
    return msgspec.structs.replace(known, outcomes=outcomes, **fields)


async def hold(parts: Parts, job: Running, tree: ProcessTree) -> Frozen:
    """Freeze a tree by its cgroup: how is in its record before anything is done.

    The tasks that wait in /krg are answered first. Any failure leaves the tree running.
    """

    async def record(frozen: Frozen) -> None:
        await update(parts, tree, frozen=frozen)

    job.phase(Phase.FREEZING)
    try:
        async with parts.mounts.release(tree.pids):
            with trio.fail_after(REST_S):
                frozen = await parts.freezer.freeze(tree, f"{tree.pid}.{job.id}", record)
    except BaseException:
        with trio.CancelScope(shield=True):
            await update(parts, tree, frozen=None, state=TreeState.RUNNING)
        raise
    job.frozen = True
    return frozen


async def let_go(parts: Parts, tree: ProcessTree, frozen: Frozen) -> None:
    """Thaw a tree and write that down; not cut short by cancellation."""
    with trio.CancelScope(shield=True):
        await parts.freezer.thaw(frozen)
        await update(
            parts,
            tree,
            frozen=None,
            frozen_since=0.0,
            frozen_until=0.0,
            holder=0,
            state=TreeState.RUNNING,
        )
    parts.state.event("tree.thawed", record_of(parts, tree).uid, pid=tree.pid)


def refuse_member(tree: ProcessTree, pid: int) -> None:
    """Raise PartOfIt when the process is one of the tree."""
    if procs.is_member(tree, pid):
        raise PartOfIt(
            f"process {pid} is part of the tree {tree.pid} that it asks to freeze: nobody would be "
            "left to write 0; write it from outside the tree"
        )


async def freeze(parts: Parts, job: Running, tree: ProcessTree, words: Freeze) -> str:
    """Freeze the tree until it is told otherwise."""
    known = record_of(parts, tree)
    frozen = known.frozen if known.state is TreeState.FROZEN else None
    if frozen is None:
        frozen = await hold(parts, job, tree)
    now = time.time()
    # ---- commit: from here the tree is frozen by its user, until 0
    with trio.CancelScope(shield=True):
        await update(
            parts,
            tree,
            frozen=frozen,
            state=TreeState.FROZEN,
            frozen_since=known.frozen_since or now,
            frozen_until=now + words.for_s if words.for_s else 0.0,
            holder=job.id if words.while_open else 0,
            last_job=job.id,
        )
    parts.state.event("tree.frozen", known.uid, pid=tree.pid)
    if words.for_s:
        parts.nursery.start_soon(thaw_at, parts, record_of(parts, tree))
    return "frozen"


async def thaw(parts: Parts, job: Running, tree: ProcessTree, words: Freeze) -> str:
    """Let a frozen tree go on; one that runs already stays as it is."""
    known = record_of(parts, tree)
    if words.signal:
        procs.send(tree, words.signal)
    if known.frozen is not None:
        job.phase(Phase.FINISHING)
        await let_go(parts, tree, known.frozen)
    return "running"


async def thaw_at(parts: Parts, known: Tree) -> None:
    """Thaw a tree at its time, unless somebody has given it another one meanwhile."""
    await trio.sleep(max(0.0, known.frozen_until - time.time()))
    now = parts.state.tree(known.id.pid, known.id.start)
    if now is not None and now.frozen_until == known.frozen_until:
        await thaw_record(parts, now, "its time is over")


async def thaw_record(parts: Parts, known: Tree, why: str) -> None:
    """Thaw what a record says is frozen, whoever asked for it."""
    if known.frozen is None:
        return
    log.info("tree.thawing pid=%d reason=%r", known.pid, why)
    try:
        await let_go(parts, procs.look(known.id.pid, known.id.start), known.frozen)
    except KrgError as exc:
        log.warning("tree.not_thawed pid=%d reason=%r", known.pid, exc.message)
        await parts.freezer.thaw(known.frozen)
        await parts.state.update(
            lambda: [
                msgspec.structs.replace(
                    parts.state.tree(known.id.pid, known.id.start) or known,
                    frozen=None,
                    state=TreeState.ENDED,
                    ended="ended",
                )
            ]
        )


async def signal(parts: Parts, job: Running, tree: ProcessTree, words: Signal) -> str:
    """Send a signal to every task; KILL also ends a tree that is frozen."""
    known = parts.state.tree(tree.id.pid, tree.id.start)
    if known is not None and known.frozen is not None and words.number == signals.SIGKILL:
        await parts.freezer.kill(known.frozen, tree)
    else:
        procs.send(tree, words.number)
    count = len(tree.live)
    line = f"sent {signal_name(words.number)} to {count} task{'s' if count != 1 else ''}"
    await told(parts, tree, job.id, "signal", line)
    return line
