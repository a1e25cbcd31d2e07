"""Keepers: starting a tree under one, finding them again, and how their trees ended.

A keeper (agent/keeper.c) is the parent of one tree. It has a directory RUN/keepers/NAME in which
it writes who it is, who the root is, and how that ended; so an agent that starts anew learns
everything from there, and none of it needs an agent to run.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import shutil
import signal as signals
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import trio

from krgfs import facts
from krgfs.errors import BadWords, EngineFailed, Gone, KrgError
from krgfs.model import ProcessId
from krgfs.verbs import signal_name

from . import procs, texts
from .cgroups import LEAF_PREFIX, Hierarchy

CGROUP_PARENT = "krgfs"
CLEARING_S = 10.0
STALE_S = 60.0  # from making a cgroup to joining it takes milliseconds
MODES = ("r", "w", "a")
POLL_S = 0.002


class LaunchFailed(EngineFailed):
    """The keeper's COMMAND did not come to run; `end` is how it ended ("exit 1", "signal KILL"),
    empty when it was never started. Nothing of it runs any more."""

    def __init__(self, message: str, end: str = "") -> None:
        super().__init__(message)
        self.end = end


class Owner(NamedTuple):
    """Whose files the tree's output goes to: they are opened as that user."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Inherit(NamedTuple):
    """A file that COMMAND gets as descriptor `number`; mode r, w (new) or a (append)."""

    number: int
    path: str
    mode: str


class Plan(NamedTuple):
    """What a keeper is to start: a program, or with `pidfile` the engine that restores a tree.

    `cgroups` are cgroup.procs files that it joins first. With `pty` it gets a new terminal whose
    output goes to `out`. `log` takes what the command itself says. `note` is kept in the keeper's
    directory, and so are `files`, texts by name that the command reads. `explain` makes an error of
    a LaunchFailed once the command has ended; `undo` is awaited when it was ended half-way.
    """

    command: tuple[str, ...]
    pidfile: str = ""
    new_pid: bool = False
    cgroups: tuple[str, ...] = ()
    out: str = ""
    pty: bool = False
    inherit: tuple[Inherit, ...] = ()
    owner: Owner | None = None
    log: str = ""
    note: str = ""
    files: Mapping[str, str] = MappingProxyType({})
    explain: Callable[[LaunchFailed], KrgError] | None = None
    undo: Callable[[], Awaitable[None]] | None = None


class Launched(NamedTuple):
    """A tree that was started: its root as the node and as its own pid namespace number it. The
    root has a start time of 0 when it has ended already."""

    root: ProcessId
    inner_pid: int
    keeper: ProcessId


def binary() -> str:
    """Return the path of krg-keeper, which is built with the package."""
    return str(Path(__file__).with_name("krg-keeper"))


def directory(run_dir: str, name: int | str) -> str:
    """Return the path of a keeper's directory."""
    return os.path.join(run_dir, "keepers", str(name))


async def launch(binary: str, directory: str, plan: Plan) -> Launched:
    """Start what `plan` says under a keeper of its own, and return when its tree runs.

    The keeper is in `directory` from its first act on. Raises LaunchFailed, or what `plan.explain`
    makes of it, when nothing runs. Cancelled, the attempt is ended, and so is what came of it.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    Path(directory, "note").write_text(plan.note)
    for name, text in plan.files.items():
        Path(directory, name).write_text(text)
    Path(directory, "cgroups").write_text("".join(f"{path}\n" for path in plan.cgroups))
    with open(os.path.join(directory, "answer"), "w+b") as answer:
        starter = await trio.lowlevel.open_process(
            [binary, "tree", *_words(directory, plan)],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=answer,
            start_new_session=True,
            cwd="/",
        )
        try:
            await starter.wait()
        except BaseException:
            with trio.CancelScope(shield=True):
                await _abort(directory, starter)
                if plan.undo is not None:
                    await plan.undo()
            _remove_cgroups(directory)
            raise
        answer.seek(0)
        line = answer.read().decode(errors="replace").strip()
    if not line.startswith("ok "):
        _remove_cgroups(directory)
    return _outcome(plan, line)


def _outcome(plan: Plan, line: str) -> Launched:
    verdict, _, rest = line.partition(" ")
    if verdict == "ok":
        outer, inner, keeper = (int(word) for word in rest.split())
        return Launched(_identified(outer), inner, _identified(keeper))
    failed = LaunchFailed(
        f"cannot start {os.path.basename(plan.command[0])} under a keeper: {line or 'no answer'}",
        end=_spoken(rest) if verdict == "failed" else "",
    )
    if plan.explain is None:
        raise failed
    raise plan.explain(failed) from failed


def _words(directory: str, plan: Plan) -> Iterator[str]:
    yield f"--dir={directory}"
    if plan.pidfile:
        yield f"--pidfile={plan.pidfile}"
    if plan.new_pid:
        yield "--new-pid"
    for path in plan.cgroups:
        yield f"--cgroup={path}"
    if plan.owner is not None:
        yield f"--owner={plan.owner.uid}:{plan.owner.gid}"
        if plan.owner.groups:
            yield "--groups=" + ",".join(map(str, plan.owner.groups))
    if plan.out:
        yield f"--out={plan.out}"
    if plan.pty:
        yield "--pty"
    if plan.log:
        yield f"--log={plan.log}"
    for each in plan.inherit:
        yield f"--inherit={each.number}={each.path}:{each.mode}"
    yield "--"
    yield from plan.command


async def _abort(directory: str, starter: trio.Process) -> None:
    """End a launch that nobody wants any more, whatever has come of it; the image is as it was."""
    while starter.poll() is None:
        keeper = status(directory).keeper
        if keeper is not None:
            _kill_below(keeper)
        await trio.sleep(POLL_S)
    found = status(directory)
    if found.keeper is not None:
        _kill_below(found.keeper)
        await procs.ended(found.keeper)


def _kill_below(keeper: ProcessId) -> None:
    if facts.is_alive(keeper.pid, keeper.start):
        for task in facts.tree(keeper.pid)[1:]:
            procs.signal_process(procs.process_id(task), signals.SIGKILL)


# -- what a keeper's directory says


class Status(NamedTuple):
    """A keeper's directory: who keeps it, who the root was, how it ended (empty while it runs)."""

    directory: str
    keeper: ProcessId | None
    root: ProcessId | None
    inner_pid: int
    ended: str
    note: str


def status(directory: str) -> Status:
    """Read a keeper's directory, at whatever point keeper or node died; '' is nobody's."""
    if not directory:
        return Status("", None, None, 0, "", "")
    keeper = _process(_numbers(directory, "keeper"))
    outer, inner = _numbers(directory, "root") or (0, 0)
    task = facts.task(outer) if outer else None
    is_root = keeper is not None and task is not None and task.start >= keeper.start
    return Status(
        directory=directory,
        keeper=keeper,
        root=procs.process_id(task) if is_root and task is not None else None,
        inner_pid=inner,
        ended=_spoken(texts.read(os.path.join(directory, "status")).strip()),
        note=texts.read(os.path.join(directory, "note")),
    )


async def launched(directory: str) -> Launched | None:
    """Return the tree of a keeper's directory, None when it never ran or has ended.

    Waits while a restore is still under way.
    """
    while True:
        found = status(directory)
        if found.keeper is None and not procs.told(f"--dir={directory}"):
            return None
        if found.keeper is not None:
            if found.root is not None and not found.ended:
                return Launched(found.root, found.inner_pid, found.keeper)
            if found.ended or not facts.is_alive(found.keeper.pid, found.keeper.start):
                return None
        await trio.sleep(POLL_S)


async def ended(directory: str, root: ProcessId) -> str:
    """Wait until the root of a tree has ended; returns `exit N`, `signal NAME` or `unknown`.

    Its keeper wrote that down, also while no agent ran. Without a keeper's word the kernel is
    asked, which knows it from Linux 6.15 on of who was alive when the wait began.
    """
    how = ""
    with _pidfd(root) as pidfd:
        if pidfd is not None:
            await trio.lowlevel.wait_readable(pidfd)
        how = await _said_by_keeper(directory)
        if not how and pidfd is not None:
            how = await _said_by_kernel(pidfd, root)
    return how or "unknown"


async def cleared(directory: str) -> None:
    """Remove the cgroups that were made for a tree as soon as nothing is in them any more: what was
    forked in the tree may outlive its root."""
    places = _own_places(directory)
    pause_s = POLL_S
    while places := [place for place in places if not _removed(place)]:
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, CLEARING_S)


@contextlib.contextmanager
def _pidfd(process: ProcessId) -> Iterator[int | None]:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd if facts.exists(process.pid, process.start) else None
    finally:
        os.close(pidfd)


async def _said_by_keeper(directory: str) -> str:
    """Wait for the keeper's word; empty when it died without, and where there is none."""
    while True:
        keeper = status(directory).keeper
        alive = keeper is not None and facts.is_alive(keeper.pid, keeper.start)
        if (word := status(directory).ended) or not alive:
            return word
        await trio.sleep(POLL_S)


PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, 64 bytes): linux/pidfd.h
PIDFD_INFO_EXIT = 1 << 3


async def _said_by_kernel(pidfd: int, root: ProcessId) -> str:
    """Ask the pidfd of a process for its exit status, which is there once it is reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while facts.exists(root.pid, root.start):
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            break
        await trio.sleep(POLL_S)
    info = bytearray(64)
    struct.pack_into("=Q", info, 0, PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        return ""
    if not struct.unpack_from("=Q", info)[0] & PIDFD_INFO_EXIT:
        return ""
    code = struct.unpack_from("=i", info, 60)[0]
    return f"exit {code >> 8}" if not code & 0x7F else f"signal {signal_name(code & 0x7F)}"


def find(run_dir: str) -> list[Status]:
    """Return what every keeper's directory says, by name."""
    parent = os.path.join(run_dir, "keepers")
    try:
        names = sorted(os.listdir(parent))
    except FileNotFoundError:
        return []
    return [status(os.path.join(parent, name)) for name in names]


def tidy(run_dir: str, known: Collection[str]) -> list[str]:
    """Remove the directories of keepers that are gone but those in `known`; returns them.

    The cgroups that were made for their trees go with them.
    """
    removed = []
    for found in find(run_dir):
        alive = found.keeper is not None and facts.is_alive(found.keeper.pid, found.keeper.start)
        if not alive and found.directory not in known:
            _remove_cgroups(found.directory)
            shutil.rmtree(found.directory, ignore_errors=True)
            removed.append(found.directory)
    return removed


def _numbers(directory: str, name: str) -> tuple[int, int] | None:
    words = texts.read(os.path.join(directory, name)).split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]), int(words[1])


def _process(numbers: tuple[int, int] | None) -> ProcessId | None:
    if numbers is None:
        return None
    return ProcessId(pid=numbers[0], start=numbers[1], boot=facts.BOOT_ID)


def _identified(pid: int) -> ProcessId:
    """Return who has a pid; with a start time of 0 when it has ended already."""
    task = facts.task(pid)
    return ProcessId(pid=pid, start=task.start if task else 0, boot=facts.BOOT_ID)


def _spoken(word: str) -> str:
    """`signal 9 core` as `signal KILL`; what is no keeper's word as it stands."""
    kind, _, rest = word.partition(" ")
    number = rest.partition(" ")[0]
    return f"signal {signal_name(int(number))}" if kind == "signal" and number.isdecimal() else word


# -- cgroups for a tree


def own_cgroups(
    app: str, number: int | str, hierarchies: Sequence[Hierarchy], parent: str = CGROUP_PARENT
) -> tuple[str, ...]:
    """Make PARENT/krg-APP-NUMBER in every hierarchy that freezes or that systemd tells services by;
    returns their cgroup.procs. Where cgroups cannot be made the tree stays in the agent's.

    None is shared: one that is there (of another agent on this machine) is passed over. Those that
    trees have left behind meanwhile are removed.
    """
    mounts = [each.mount for each in hierarchies if each.groups_processes]
    for mount in mounts:
        _sweep(os.path.join(mount, parent))
    for turn in itertools.count(1):
        name = f"{LEAF_PREFIX}{app}-{number}" + (f"~{turn}" if turn > 1 else "")
        places = [os.path.join(mount, parent, name) for mount in mounts]
        if not any(map(os.path.exists, places)):
            return tuple(f"{place}/cgroup.procs" for place in places if _made(place))
    raise AssertionError("unreachable")


def _sweep(parent: str) -> None:
    """Remove our cgroups that are empty, but none that somebody may be about to join."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for each in entries:
            if each.name.startswith(LEAF_PREFIX):
                with contextlib.suppress(OSError):
                    if time.time() - each.stat().st_mtime > STALE_S:
                        os.rmdir(each.path)


def _made(place: str) -> bool:
    try:
        os.makedirs(place)
    except OSError:
        return False
    return True


def cgroups_of(pid: int, hierarchies: Sequence[Hierarchy]) -> tuple[str, ...]:
    """Return cgroup.procs of every cgroup that a process is in; Gone when it has ended."""
    places = [hierarchy.directory(pid) for hierarchy in hierarchies]
    if facts.task(pid) is None:
        raise Gone(f"process {pid}, whose cgroup the tree is to run in, has ended")
    return tuple(f"{place}/cgroup.procs" for place in places if place is not None)


def cgroups_at(path: str, hierarchies: Sequence[Hierarchy]) -> tuple[str, ...]:
    """Return cgroup.procs of /PATH in every hierarchy that has it; BadWords when none does."""
    places = [os.path.join(each.mount, path.lstrip("/")) for each in hierarchies]
    found = tuple(f"{place}/cgroup.procs" for place in places if os.path.isdir(place))
    if not found:
        raise BadWords(f"cgroup={path}: there is no such cgroup in any hierarchy; mkdir it first")
    return found


def _remove_cgroups(directory: str) -> None:
    """Remove the cgroups that were made for a tree, unless something of it is still in them."""
    for place in _own_places(directory):
        _removed(place)


def _own_places(directory: str) -> list[str]:
    paths = texts.read(os.path.join(directory, "cgroups")).splitlines()
    places = map(os.path.dirname, paths)
    return [place for place in places if os.path.basename(place).startswith(LEAF_PREFIX)]


def _removed(place: str) -> bool:
    """Remove a cgroup; tells whether it is gone, which it is not while tasks are in it."""
    with contextlib.suppress(OSError):
        os.rmdir(place)
    return not os.path.exists(place)
