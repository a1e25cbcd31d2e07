"""Freeze a tree and thaw it again, by the cgroup freezer of v2 or of v1.

Where a tree fills a cgroup, that one is frozen. Else its tasks are put into a leaf of ours inside
the cgroup that they are in, so that no tree leaves its scope, job step or container. What is about
to be done is recorded first, and `thaw` can be called after a crash at any point, any number of
times: it moves every task from the frozen leaf straight into the cgroup where it came from, and
there it runs on; no task ever runs in the wrong one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal as signals
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

import trio
from msgspec.structs import replace

from krgfs import facts
from krgfs.errors import Busy, EngineFailed, Fate, Gone, KrgError, PartOfIt, TryAgain, Unsupported
from krgfs.model import Frozen, Moved, ProcessId

from . import cgroups, procs, unrest
from .cgroups import Hierarchy
from .procs import ProcessTree, title

Record = Callable[[Frozen], Awaitable[None]]

UNDO_S = 2.0  # for dying tasks to leave a leaf; one that stays has nothing in it that runs


class Freezer:
    """Freezes in one hierarchy; what was frozen in either is thawed by any."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.hierarchy = hierarchy

    @classmethod
    def find(cls, prefer: str = "auto") -> Freezer:
        """Return the freezer to use here: `v2`, `v1`, or `auto` for v2 where its kernel has one.

        Makes an empty cgroup, and removes it, to see that it works. Raises Unsupported with the
        reason for each hierarchy that is mounted.
        """
        reasons = []
        for each in cgroups.hierarchies():
            if each.can_freeze and prefer in ("auto", f"v{each.version}"):
                reason = cgroups.unusable(each)
                if not reason:
                    return cls(each)
                reasons.append(reason)
        wanted = "cgroup freezer" if prefer == "auto" else f"cgroup {prefer} freezer"
        raise Unsupported(
            f"no {wanted} can be used here: {'; '.join(reasons) or 'none is mounted'}; "
            f"mount cgroup2 read-write at /sys/fs/cgroup"
        )

    async def freeze(self, tree: ProcessTree, name: str, record: Record) -> Frozen:
        """Bring every task of the tree to rest, and return how to thaw it.

        `name` names the leaf, where one is needed. `record` is awaited with all that is about to
        be done before any of it is done, and again whenever new tasks were found; what it was
        given last is what is returned. Any failure undoes everything: the tree runs on.

        A task that does not come to rest is waited for: when cancelled in that wait, raises
        TryAgain, which says what the task waits in. Raises Busy for a tree that is frozen already,
        PartOfIt when this process is in it, Unsupported where its cgroups do not allow it.
        """
        plan = await trio.to_thread.run_sync(_plan, self.hierarchy, tree, name)
        attempt = _Attempt(self.hierarchy, tree, plan, record)
        try:
            await attempt.run()
        except BaseException as exc:
            awake = attempt.unrest()
            with trio.move_on_after(UNDO_S, shield=True):
                await _thaw(attempt.frozen)
                if awake:
                    await trio.sleep(0.01)  # the thaw woke them all: those that wait, wait again
            if isinstance(exc, trio.Cancelled) and attempt.is_waiting:
                raise TryAgain(unrest.why(tree, awake), fate=procs.fate(tree)) from None
            if isinstance(exc, KrgError) and exc.fate is None:
                exc.fate = procs.fate(tree)
            raise
        return attempt.frozen

    async def refreeze(self, frozen: Frozen) -> None:
        """Wait until a frozen tree is at rest, also where a CRIU that was killed had thawed it."""
        cgroups.freeze(frozen.cgroup, frozen.version)
        await _rest(frozen)

    def is_frozen(self, frozen: Frozen) -> bool:
        """Tell whether the kernel has all of its tasks at rest (while CRIU dumps, CRIU has)."""
        return cgroups.is_at_rest(frozen.cgroup, frozen.version)

    async def thaw(self, frozen: Frozen) -> None:
        """Let the tasks run where they came from, and remove what was made to freeze them.

        Any part may be done already. A task that was forked meanwhile goes where its parent came
        from; where an origin is gone, to what is left above it. Waits for dying tasks to leave the
        leaf. Raises EngineFailed, the tree running in the leaf, when a task cannot go back.
        """
        await _thaw(frozen)

    async def kill(self, frozen: Frozen, tree: ProcessTree) -> None:
        """End all tasks of a frozen tree before any of them runs, and remove what froze it.

        In the v2 freezer a killed task ends; in that of v1 it ends when it is thawed, before it
        is back in user code. Returns when no task lives; zombies may still hold their pids.
        """
        members = cgroups.members(frozen.cgroup)
        later = [facts.task(pid) for pid in members - tree.pids if procs.is_member(tree, pid)]
        victims = [*tree.ids, *(procs.process_id(task) for task in later if task is not None)]
        if frozen.version == 2 and members and members <= {each.pid for each in victims}:
            with contextlib.suppress(Gone):  # there is no such file before Linux 5.14
                cgroups.write(f"{frozen.cgroup}/cgroup.kill", "1")
        for each in victims:
            procs.signal_process(each, signals.SIGKILL)
        if frozen.version == 1:
            cgroups.thaw(frozen.cgroup, frozen.version)
        for each in victims:
            await procs.ended(each)
        await _thaw(frozen)


# -- what to freeze


def _plan(hierarchy: Hierarchy, tree: ProcessTree, name: str) -> Frozen:
    """Choose the cgroup to freeze, touching nothing."""
    if os.getpid() in tree.pids:
        raise PartOfIt(f"the agent ({os.getpid()}) is part of tree {tree.pid}, and would freeze")
    if holder := _holder(tree):
        raise Busy(f"tree {tree.pid} is frozen already, in {holder}: thaw it first")
    places = {
        tid: place
        for task in tree.live
        for tid in tree.threads[task.pid]
        if (place := _place(hierarchy, tid))
    }
    if not places:
        raise Gone(f"process {tree.pid} has just ended")
    _refuse_stopped(hierarchy, tree)
    ancestor = os.path.commonpath([*places.values()])
    while cgroups.kind(ancestor) == "threaded":
        ancestor = os.path.dirname(ancestor)
    live = {task.pid for task in tree.live}
    if ancestor != hierarchy.mount and cgroups.members(ancestor) == live:
        return Frozen(cgroup=ancestor, version=hierarchy.version, leaf=False)
    _refuse_threaded(tree, places, ancestor)
    leaf = f"{ancestor}/{cgroups.LEAF_PREFIX}{name}"
    if cgroups.members(leaf):
        raise Busy(f"{leaf}, for tree {tree.pid}, has other tasks in it: thaw those first")
    return Frozen(cgroup=leaf, version=hierarchy.version, leaf=True)


def _place(hierarchy: Hierarchy, tid: int) -> str | None:
    place = hierarchy.directory(tid)
    if place is None and facts.task(tid) is not None:
        raise Unsupported(
            f"task {tid} is in a cgroup that is not to be seen under {hierarchy.mount}: "
            f"the agent has to run in the host's cgroup namespace"
        )
    return place


def _holder(tree: ProcessTree) -> str | None:
    """Return a cgroup, of either freezer, that somebody set to frozen with a task in it."""
    for hierarchy in cgroups.hierarchies():
        if not hierarchy.can_freeze:
            continue
        for place in {hierarchy.directory(task.pid) for task in tree.live} - {None}:
            while place and place != hierarchy.mount:
                if cgroups.is_set_frozen(place, hierarchy.version):
                    return place
                place = os.path.dirname(place)
    return None


def _refuse_stopped(hierarchy: Hierarchy, tree: ProcessTree) -> None:
    """In the v1 freezer the kernel never lets a tracer attach to a stopped task (Linux 6.18)."""
    for task in tree.live:
        if hierarchy.version == 1 and task.state == "T":
            raise Unsupported(
                f"task {title(task)} of tree {tree.pid} is stopped, and stopped tasks in the v1 "
                f"freezer cannot be dumped: continue it (signal CONT), or use the v2 freezer"
            )


def _refuse_threaded(tree: ProcessTree, places: dict[int, str], ancestor: str) -> None:
    """A leaf takes whole processes, and there can be none among threaded cgroups; cgroups(7)."""
    for task in tree.live:
        spread = {places[tid] for tid in tree.threads[task.pid] if tid in places}
        if len(spread) > 1 or any(cgroups.kind(place) == "threaded" for place in spread):
            raise Unsupported(
                f"the threads of task {title(task)} are in cgroups for threads "
                f"({', '.join(sorted(spread))}) that have others in them too: "
                f"put tree {tree.pid} alone into a cgroup of its own"
            )
    if cgroups.kind(ancestor) not in ("domain", ""):
        raise Unsupported(
            f"tree {tree.pid} shares {ancestor} with others, and a cgroup of kind "
            f"'{cgroups.kind(ancestor)}' can have no leaf: put the tree into a cgroup of its own"
        )


# -- freezing


class _Attempt:
    """One freeze. `frozen` is what there is to undo: recorded, or just about to be."""

    def __init__(
        self, hierarchy: Hierarchy, tree: ProcessTree, plan: Frozen, record: Record
    ) -> None:
        self.frozen = plan
        self._is_resting = False
        self._is_starting = False
        self._plan = plan
        self._hierarchy = hierarchy
        self._tree = tree
        self._record = record
        self._kept: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        """Whether it is up to a task of the tree that there is no end to this yet."""
        return self._is_resting or self._is_starting

    def unrest(self) -> dict[int, str]:
        """Return the threads that keep us waiting, with their states."""
        found = unrest.starting(self._tree) if self._is_starting else {}
        return found or (unrest.restless(self.frozen, self._tree) if self._is_resting else {})

    async def run(self) -> None:
        """Freeze, and again while a task is between vfork(2) and exec: CRIU cannot stop that."""
        pause_s = 0.001
        await self._freeze_once()
        while await self._starts_programs():
            await _thaw(self.frozen)
            self.frozen = self._plan
            self._kept.clear()
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)
            await self._freeze_once()

    async def _starts_programs(self) -> bool:
        while True:
            found = await trio.to_thread.run_sync(unrest.starting, self._look())
            if found is not None:
                self._is_starting = bool(found)
                return self._is_starting
            await trio.sleep(0.0005)

    async def _freeze_once(self) -> None:
        if not self.frozen.leaf:
            await self._freeze_whole()
            return
        while await self._gather():
            await self._come_to_rest()

    async def _freeze_whole(self) -> None:
        await self._record(self.frozen)
        cgroups.freeze(self.frozen.cgroup, self.frozen.version)
        await self._come_to_rest()
        if cgroups.members(self.frozen.cgroup) != {task.pid for task in self._look().live}:
            raise TryAgain(
                f"{self.frozen.cgroup} was all of tree {self._tree.pid} and nothing else, but "
                f"while it was frozen a process was moved: try again"
            )

    def _look(self) -> ProcessTree:
        return procs.look(self._tree.pid, self._tree.id.start)

    async def _come_to_rest(self) -> None:
        self._is_resting = True
        await _rest(self.frozen)
        self._is_resting = False

    async def _gather(self) -> bool:
        """Put into the leaf what is not in it yet; tell whether there was any.

        A moved task rests at once, so the forks come to an end; and when all that are known rest,
        a look that finds no other proves that there is none.
        """
        found = await trio.to_thread.run_sync(self._survey)
        if not found.outside and not found.new:
            return False
        with contextlib.ExitStack() as stack:
            placeholders = [stack.enter_context(_placeholder(each)) for each in found.emptied]
            self.frozen = replace(
                self.frozen,
                moved=(*self.frozen.moved, *found.new),
                placeholders=(*self.frozen.placeholders, *(each.id for each in placeholders)),
            )
            await self._record(self.frozen)
            cgroups.make(self.frozen.cgroup)
            cgroups.freeze(self.frozen.cgroup, self.frozen.version)
            await trio.to_thread.run_sync(_put, self.frozen.cgroup, found.outside, placeholders)
        return True

    def _survey(self) -> _Found:
        live = self._look().live
        places = {task.pid: self._hierarchy.directory(task.pid) for task in live}
        outside = [pid for pid, place in places.items() if place not in (self.frozen.cgroup, None)]
        known = {(moved.pid, moved.start) for moved in self.frozen.moved}
        new = [
            Moved(pid=task.pid, start=task.start, origin=self._origin(task.pid, place))
            for task in live
            if (place := places[task.pid]) is not None and (task.pid, task.start) not in known
        ]
        parent = os.path.dirname(self.frozen.cgroup)  # stays: it has the leaf in it
        origins = {places[pid] for pid in outside} - {parent, None} - self._kept
        emptied = [each for each in origins if each and cgroups.members(each) <= {*outside}]
        self._kept.update(emptied)
        return _Found(new, outside, emptied)

    def _origin(self, pid: int, place: str) -> str:
        """Return where a task comes from; one that was born in the leaf from where its parent."""
        return _origin(pid, self.frozen) if place == self.frozen.cgroup else place


class _Found(NamedTuple):
    """What is to be frozen yet: tasks to record, pids to move, and the cgroups that this empties.

    systemd ends a unit whose cgroup is empty, so those get a placeholder.
    """

    new: list[Moved]
    outside: list[int]
    emptied: list[str]


def _put(leaf: str, pids: Iterable[int], placeholders: Iterable[_Placeholder]) -> None:
    """Move tasks into the frozen leaf. In a thread: a large process that forks holds this up."""
    for each in placeholders:
        each.settle()
    for pid in pids:
        cgroups.move(pid, leaf)


async def _rest(frozen: Frozen) -> None:
    pause_s = 0.0002
    while not cgroups.is_at_rest(frozen.cgroup, frozen.version):
        if not os.path.isdir(frozen.cgroup):
            raise Gone(f"{frozen.cgroup} is gone: its tasks have ended")
        await trio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.01)
        if frozen.version == 1:
            # v1 asks each task once, and one in the wrong moment does not hear it
            cgroups.freeze(frozen.cgroup, frozen.version)


# -- thawing


async def _thaw(frozen: Frozen) -> None:
    if frozen.leaf:
        await _empty(frozen)
    else:
        cgroups.thaw(frozen.cgroup, frozen.version)
    for placeholder in frozen.placeholders:
        await _end_placeholder(placeholder)


async def _empty(leaf: Frozen) -> None:
    pause_s = 0.0005
    while not await trio.to_thread.run_sync(_sweep, leaf):
        # What is left of tasks that end: nothing in it is to be held.
        cgroups.thaw(leaf.cgroup, leaf.version)
        await trio.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.02)


def _sweep(leaf: Frozen) -> bool:
    """Send everybody home and remove the leaf; tell whether that was possible yet."""
    for pid in cgroups.processes_in(leaf.cgroup):
        _send_home(pid, leaf)
    try:
        os.rmdir(leaf.cgroup)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        if exc.errno != errno.ENOENT:
            raise EngineFailed(f"cannot remove {leaf.cgroup}: {exc.strerror}") from exc
    return True


def _send_home(pid: int, leaf: Frozen) -> None:
    home = _origin(pid, leaf)
    while True:
        try:
            return cgroups.move(pid, home)
        except Gone:
            home = os.path.dirname(home)
        except EngineFailed as exc:
            # Running in the leaf, it is in its scope, and nothing is lost.
            cgroups.thaw(leaf.cgroup, leaf.version)
            exc.fate = Fate.RUNNING
            raise


def _origin(pid: int, frozen: Frozen) -> str:
    """Return where a task of the leaf belongs: as recorded for it or its next ancestor."""
    moved = {(each.pid, each.start): each.origin for each in frozen.moved}
    task = facts.task(pid)
    while task is not None:
        if origin := moved.get((task.pid, task.start)):
            return origin
        task = facts.task(task.ppid)
    return frozen.moved[0].origin if frozen.moved else os.path.dirname(frozen.cgroup)


# -- processes that keep an emptied cgroup alive


class _Placeholder(NamedTuple):
    id: ProcessId
    place: str
    go: int

    def settle(self) -> None:
        cgroups.move(self.id.pid, self.place)
        os.write(self.go, b"\n")


@contextlib.contextmanager
def _placeholder(place: str) -> Iterator[_Placeholder]:
    """Start one that will sleep in `place` once told to settle, and ends when that never comes.

    It outlives us, so it is in a session of its own and holds none of our descriptors.
    """
    reader, writer = os.pipe()
    inherited = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) > 2]
    try:
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", "read -r go && cd / && exec sleep infinity </dev/null"],
            {"PATH": "/usr/bin:/bin", procs.PLACEHOLDER: place},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reader, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                *((os.POSIX_SPAWN_CLOSE, fd) for fd in inherited),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signals.SIGPIPE, signals.SIGINT),
        )
        task = facts.task(pid)
        assert task is not None, "a child of ours that nobody has reaped"
        yield _Placeholder(procs.process_id(task), place, writer)
    finally:
        os.close(reader)
        os.close(writer)


async def _end_placeholder(process: ProcessId) -> None:
    procs.signal_process(process, signals.SIGKILL)
    await procs.ended(process)
    _reap(process.pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # started by the agent before this one
        os.waitpid(pid, os.WNOHANG)
