"""Processes as trees: what belongs to one, whose it is, what hangs beside it, and how it fares.

A tree is a snapshot. Its tasks may fork or end at any time unless it is frozen, so every act on one
checks that pid and start time still mean the same process. Nothing here changes a process but
`send` and `kill`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal as signals
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import trio

from krgfs import facts
from krgfs.errors import Fate, Gone, NotYours, Unsupported
from krgfs.facts import Ids, Task
from krgfs.model import Caller, ProcessId

from . import cgroups, texts

KEEPER = b"krg-keeper"
# In the environment of the processes that keep an emptied cgroup alive; they are nobody's orphans.
PLACEHOLDER = "KRG_PLACEHOLDER"


class ProcessTree(NamedTuple):
    """A root task and all its descendants, parents before children, zombies included.

    A task that ended while the tree was read may lack its credentials and threads.
    """

    id: ProcessId
    tasks: tuple[Task, ...]
    credentials: Mapping[int, Ids]
    threads: Mapping[int, tuple[int, ...]]
    pid_ns: str

    @property
    def pid(self) -> int:
        return self.id.pid

    @property
    def root(self) -> Task:
        return self.tasks[0]

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(task.pid for task in self.tasks)

    @property
    def live(self) -> tuple[Task, ...]:
        """The tasks that have not ended."""
        return tuple(task for task in self.tasks if is_live(task))

    @property
    def ids(self) -> tuple[ProcessId, ...]:
        return tuple(process_id(task) for task in self.tasks)

    @property
    def uids(self) -> frozenset[int]:
        """Every real, effective and saved uid of every task."""
        return frozenset(uid for ids in self.credentials.values() for uid in ids.uids[:3])

    @property
    def rss_bytes(self) -> int:
        return sum(task.rss_bytes for task in self.tasks)

    @property
    def is_session_leader(self) -> bool:
        return self.root.sid == self.root.pid

    @property
    def inner_root(self) -> int:
        """The root's pid in its own pid namespace."""
        return (self.credentials[self.pid].ns_pids or (self.pid,))[-1]

    @property
    def is_in_private_pid_ns(self) -> bool:
        return self.pid_ns != facts.namespace(os.getpid(), "pid")


def process_id(task: Task) -> ProcessId:
    return ProcessId(pid=task.pid, start=task.start, boot=facts.BOOT_ID)


def is_live(task: Task) -> bool:
    """Tell whether a process runs code: one whose first thread ended shows as a zombie and does."""
    return task.is_live


def title(task: Task) -> str:
    """Name a task for a person: `4242 (blast)`."""
    return f"{task.pid} ({task.comm.decode(errors='replace')})"


def look(pid: int, start: int = 0) -> ProcessTree:
    """Return the tree whose root is `pid`, and started at `start` unless that is 0.

    Raises Gone when there is no such process or it has ended, Unsupported for a kernel thread,
    for init, and for a tree that this very process is part of.
    """
    tasks = tuple({task.pid: task for task in facts.tree(pid)}.values())
    if not tasks:
        raise Gone(f"process {pid} is gone: there is none of that pid any more")
    root = tasks[0]
    if start not in (0, root.start):
        raise Gone(f"process {pid} is gone: {title(root)}, which has that pid now, is another one")
    if root.is_kernel_thread:
        raise Unsupported(f"{title(root)} is a kernel thread: only user processes are trees")
    if pid == 1:
        raise Unsupported(f"{title(root)} is init, which all processes hang on: name one of those")
    if not is_live(root):
        raise Gone(
            f"process {title(root)} has ended; its pid is free once its parent {root.ppid} reaps it"
        )
    credentials = {task.pid: ids for task in tasks if (ids := facts.ids(task.pid)) is not None}
    if pid not in credentials:
        raise Gone(f"process {title(root)} has just ended")
    tree = ProcessTree(
        id=process_id(root),
        tasks=tasks,
        credentials=credentials,
        threads={task.pid: facts.threads(task.pid) for task in tasks},
        pid_ns=facts.namespace(pid, "pid"),
    )
    if os.getpid() in tree.pids:
        raise Unsupported(
            f"{title(root)} is an ancestor of the agent ({os.getpid()}), which cannot dump itself: "
            f"name a process further down, or start the agent elsewhere"
        )
    return tree


def may(caller: Caller, tree: ProcessTree) -> None:
    """Raise NotYours unless the caller is root, or owns every task as ptrace(2) would have it.

    What the kernel does not let its own owner trace (a setgid program, one that gave up another
    uid, one that asked for it by prctl(2)) may hold secrets of others: that is for root alone.
    """
    if caller.is_root:
        return
    if len(tree.uids) > 1:
        uids = ", ".join(map(str, sorted(tree.uids)))
        raise NotYours(f"the tasks of tree {tree.pid} run as several uids ({uids}): only root may")
    if tree.uids != {caller.uid}:
        owner = ", ".join(map(_user, tree.uids))
        raise NotYours(f"tree {tree.pid} belongs to {owner}: ask them, or be root")
    for task in tree.live:
        if _memory_owner(task.pid) not in (caller.uid, None):
            raise NotYours(
                f"task {title(task)} of tree {tree.pid} is one that its own user may not look "
                f"into (setgid, another uid before, or by prctl): only root may"
            )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _memory_owner(pid: int) -> int | None:
    """Return who may look into a process: root where it is not dumpable, proc_pid_environ(5)."""
    try:
        return os.stat(f"/proc/{pid}/environ").st_uid
    except OSError:
        return None


def is_member(tree: ProcessTree, pid: int) -> bool:
    """Tell whether a process or thread is of the tree, also if it was forked after the look."""
    starts = {task.pid: task.start for task in tree.tasks}
    ids = facts.ids(pid)
    task = facts.task(ids.tgid) if ids else None
    while task is not None:
        if starts.get(task.pid) == task.start:
            return True
        task = facts.task(task.ppid)
    return False


def fate(tree: ProcessTree) -> Fate:
    """Tell how the tasks of a tree fare now; gone when all have ended.

    Frozen is only what the kernel calls frozen, all of it, and by either freezer.
    """
    now = [facts.task(task.pid) for task in tree.tasks]
    live = [
        found
        for found, task in zip(now, tree.tasks, strict=True)
        if found is not None and found.start == task.start and is_live(found)
    ]
    if not live:
        return Fate.GONE
    freezers = [each for each in cgroups.hierarchies() if each.can_freeze]
    if all(any(freezer.holds(task.pid) for freezer in freezers) for task in live):
        return Fate.FROZEN
    if all(task.state in "Tt" for task in live):
        return Fate.STOPPED
    return Fate.RUNNING


# -- acts


@contextlib.contextmanager
def _handle(process: ProcessId) -> Iterator[int | None]:
    """Open a pidfd of that very process; None when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Looked at after the open: if it still is the one, it was the one then.
        yield fd if holds_pid(process) else None
    finally:
        os.close(fd)


def holds_pid(process: ProcessId) -> bool:
    """Tell whether that very process is still there, be it as a zombie."""
    return process.boot == facts.BOOT_ID and facts.exists(process.pid, process.start)


def signal_process(process: ProcessId, signal: int) -> None:
    """Send a signal to that very process, or to nobody when it is gone."""
    with _handle(process) as fd, contextlib.suppress(ProcessLookupError):
        if fd is not None:
            signals.pidfd_send_signal(fd, signal)


def send(tree: ProcessTree, signal: int) -> None:
    """Send a signal to all live tasks of the tree as it was looked at, parents first."""
    for task in tree.live:
        signal_process(process_id(task), signal)


def kill(tree: ProcessTree) -> None:
    """Kill all live tasks, parents first, so that none starts a killed child again."""
    send(tree, signals.SIGKILL)


def told(word: str) -> list[ProcessId]:
    """Return the processes that have `word` among their arguments."""
    return [
        process_id(task)
        for task in facts.processes()
        if word in texts.read(f"/proc/{task.pid}/cmdline").split("\0")
    ]


async def ended(process: ProcessId) -> None:
    """Wait until that very process has ended, be it not reaped yet."""
    with _handle(process) as fd:
        if fd is not None:
            await trio.lowlevel.wait_readable(fd)


async def gone(processes: Iterable[ProcessId]) -> None:
    """Wait until none of these holds its pid any more, zombies included.

    There is nothing to wait on for a zombie but its parent: some inits take seconds.
    """
    for process in processes:
        await ended(process)
        pause_s = 0.0005
        while holds_pid(process):
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.02)


# -- what belongs to a tree and hangs elsewhere


def orphans(tree: ProcessTree) -> list[tuple[Task, str]]:
    """Return the tasks that a checkpoint of the tree would lose, each with the reason.

    They were forked in the tree and their parent has ended, so that they hang on init or on a
    subreaper now. Told by what they cannot have from elsewhere: a session or process group that
    began inside the tree, its keeper, its pid namespace, or a cgroup that was made for its root.
    A daemon that left all of these behind cannot be told from any other.
    """
    everybody = {task.pid: task for task in facts.processes() if is_live(task)}
    ours = {*tree.pids, *_line(tree.root, everybody), *_line(facts.task(os.getpid()), everybody)}
    others = {
        task.pid: task
        for task in everybody.values()
        if task.pid not in ours
        and task.comm != KEEPER
        and tree.pids.isdisjoint(_line(task, everybody))  # forked after the look
    }
    found: dict[int, str] = {}
    for claim in (_left_to_keeper, _in_session, _in_group, _in_namespace, _in_cgroup):
        for pid, why in claim(tree, everybody):
            if pid in others:
                found.setdefault(pid, why)
    _add_children(found, others)
    return [(others[pid], why) for pid, why in found.items() if not _is_placeholder(pid)]


Claims = Iterator[tuple[int, str]]


def _line(task: Task | None, everybody: Mapping[int, Task]) -> Iterator[int]:
    """Yield a task and its ancestors."""
    while task is not None:
        yield task.pid
        task = everybody.get(task.ppid)


def _keeper(tree: ProcessTree) -> Task | None:
    parent = facts.task(tree.root.ppid)
    return parent if parent is not None and parent.comm == KEEPER else None


def _left_to_keeper(tree: ProcessTree, everybody: Mapping[int, Task]) -> Claims:
    if keeper := _keeper(tree):
        for task in facts.tree(keeper.pid):
            yield task.pid, f"its parent ended and left it to the tree's keeper {keeper.pid}"


def _in_session(tree: ProcessTree, everybody: Mapping[int, Task]) -> Claims:
    """A session is entered by birth alone: one that began in the tree has no strangers in it."""
    sessions = {task.sid for task in tree.tasks if task.sid > 0}
    if tree.root.sid not in tree.pids:
        sessions.discard(tree.root.sid)
    for task in everybody.values():
        if task.sid in sessions:
            yield task.pid, f"it is in session {task.sid}, which began in the tree"


def _in_group(tree: ProcessTree, everybody: Mapping[int, Task]) -> Claims:
    """The rest of a shell's pipeline shares a group too, but its parent is the shell."""
    groups = {task.pgrp for task in tree.tasks if task.pgrp > 0}
    if tree.root.pgrp not in tree.pids:
        groups.discard(tree.root.pgrp)
    for task in everybody.values():
        parent = everybody.get(task.ppid)
        is_adopted = parent is None or parent.pid == 1 or parent.sid != task.sid
        if task.pgrp in groups and is_adopted and task.sid != task.pid:
            yield task.pid, f"it is in process group {task.pgrp}, which began in the tree"


def _in_namespace(tree: ProcessTree, everybody: Mapping[int, Task]) -> Claims:
    if not tree.is_in_private_pid_ns:
        return
    keeper = _keeper(tree)
    is_kept = keeper is not None and facts.namespace(keeper.pid, "pid") == tree.pid_ns
    if not is_kept and tree.inner_root != 1:
        return  # a container with more in it than this tree
    for pid in everybody:
        if facts.namespace(pid, "pid") == tree.pid_ns:
            yield pid, "it is in the tree's pid namespace and ends with it"


def _in_cgroup(tree: ProcessTree, everybody: Mapping[int, Task]) -> Claims:
    """A service or a batch step: its first process is the root, what hangs elsewhere was left.

    A login's or terminal's scope is shared by all that was started there, and says nothing.
    """
    for hierarchy in cgroups.hierarchies():
        place = hierarchy.directory(tree.pid) if hierarchy.groups_processes else None
        if place is not None and cgroups.is_of_freeze(place):
            place = os.path.dirname(place)
        if place in (None, hierarchy.mount) or not tree.is_session_leader:
            continue
        inside = [task for pid in cgroups.members(place) if (task := everybody.get(pid))]
        pids = {task.pid for task in inside}
        is_made_for_root = (
            not place.endswith((".scope", ".slice"))
            and not pids & {tree.root.ppid, os.getpid()}
            and all(task.start >= tree.root.start for task in inside)
        )
        if is_made_for_root:
            for task in inside:
                if task.ppid not in pids:
                    yield task.pid, f"it is in {place}, the cgroup that the tree runs in"


def _add_children(found: dict[int, str], others: Mapping[int, Task]) -> None:
    todo = list(found)
    for parent in todo:
        for task in others.values():
            if task.ppid == parent and task.pid not in found:
                found[task.pid] = f"its parent {title(others[parent])} is an orphan of the tree"
                todo.append(task.pid)


def _is_placeholder(pid: int) -> bool:
    return f"{PLACEHOLDER}=" in texts.read(f"/proc/{pid}/environ")


def own_bytes(tree: ProcessTree) -> int:
    """Return how much memory a dump of the tree has, about: what does not lie in files."""
    return sum(_own_bytes(task.pid) for task in tree.tasks)


def _own_bytes(pid: int) -> int:
    found = facts.status(pid)
    parts = (b"RssAnon", b"RssShmem", b"VmSwap")
    return sum(int(found.get(part, b"0 kB").split()[0]) for part in parts) * 1024
