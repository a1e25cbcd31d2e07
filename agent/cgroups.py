"""The cgroups of this machine: its hierarchies, who is in a cgroup, and its freezer.

A cgroup is given by its path, and where v2 and v1 have other files for the same, with its version.
See cgroups(7), and for the files cgroup-v2.rst and freezer-subsystem.rst of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import NamedTuple

from krgfs import facts
from krgfs.errors import EngineFailed, Gone

from . import texts

LEAF_PREFIX = "krg-"  # what the cgroups that are ours begin with
FREEZE_LEAF = re.compile(r"krg-\d+\.\d+")


class Hierarchy(NamedTuple):
    """A mounted cgroup hierarchy: v2, or one of v1 with its controllers; cgroups(7)."""

    mount: str
    root: str
    version: int
    controllers: frozenset[str] = frozenset()

    @property
    def can_freeze(self) -> bool:
        return self.version == 2 or "freezer" in self.controllers

    @property
    def groups_processes(self) -> bool:
        """Whether its cgroups say what was started together: others are made for limits."""
        return self.can_freeze or "name=systemd" in self.controllers

    def directory(self, pid: int) -> str | None:
        """Return the cgroup that a task is in, None when it ended or the mount does not show it."""
        for line in texts.read(f"/proc/{pid}/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if frozenset(filter(None, controllers.split(","))) != self.controllers:
                continue
            below = os.path.relpath(path, self.root)
            if below == ".." or below.startswith("../") or path.startswith("/.."):
                return None
            return os.path.normpath(os.path.join(self.mount, below))
        return None

    def holds(self, pid: int) -> bool:
        """Tell whether the kernel has brought a task to rest here, by its cgroup or one above."""
        place = self.directory(pid)
        return place is not None and is_at_rest(place, self.version)


def hierarchies() -> tuple[Hierarchy, ...]:
    """Return the cgroup hierarchies that are mounted here, v2 first; proc_pid_mountinfo(5)."""
    found: dict[frozenset[str], Hierarchy] = {}
    known = _known_controllers()
    for line in texts.read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        root, mount = (_unescape(word) for word in left.split()[3:5])
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            found.setdefault(frozenset(), Hierarchy(mount, root, 2))
        elif kind == "cgroup":
            words = frozenset(options.split(",")) & known
            found.setdefault(words, Hierarchy(mount, root, 1, words))
    return tuple(sorted(found.values(), key=lambda each: -each.version))


def _known_controllers() -> frozenset[str]:
    rows = (line.split(":", 2)[1] for line in texts.read("/proc/self/cgroup").splitlines())
    return frozenset(word for row in rows for word in row.split(",") if word)


def _unescape(word: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, char)
    return word


def members(directory: str) -> frozenset[int]:
    """Return the pids of all processes in a cgroup and in those below it."""
    return frozenset(pid for place, _, _ in os.walk(directory) for pid in processes_in(place))


def is_of_freeze(place: str) -> bool:
    """Tell whether a cgroup was made to freeze a tree in (krg-PID.JOB), below the tree's own."""
    return FREEZE_LEAF.fullmatch(os.path.basename(place)) is not None


def processes_in(directory: str) -> frozenset[int]:
    """Return the pids of a cgroup's processes; of all that have a thread in a threaded one."""
    try:
        with open(f"{directory}/cgroup.procs") as file:
            return frozenset(map(int, file.read().split()))
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            return frozenset()
    threads = (facts.ids(int(tid)) for tid in texts.read(f"{directory}/cgroup.threads").split())
    return frozenset(ids.tgid for ids in threads if ids is not None)


def kind(place: str) -> str:
    """Return cgroup.type: domain, threaded, ...; nothing for v1 and for the root."""
    return texts.read(f"{place}/cgroup.type").strip()


def make(place: str) -> None:
    """Make a cgroup that may be there already; raises EngineFailed when that cannot be."""
    try:
        os.mkdir(place)
    except FileExistsError:
        pass
    except OSError as exc:
        raise EngineFailed(f"cannot make the cgroup {place}: {exc.strerror}") from exc


def move(pid: int, place: str) -> None:
    """Put a process with all its threads into a cgroup; nothing happens to one that ended."""
    try:
        write(f"{place}/cgroup.procs", str(pid))
    except EngineFailed as exc:
        if not isinstance(exc.__cause__, ProcessLookupError):
            raise


def write(path: str, text: str) -> None:
    """Write a cgroup's file: Gone when there is no such cgroup or file, else EngineFailed."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV):
            raise Gone(f"the cgroup {os.path.dirname(path)} is gone") from exc
        raise EngineFailed(f"cannot write '{text}' to {path}: {exc.strerror}") from exc


# -- the freezer of a cgroup


def _knob(place: str, version: int) -> str:
    return f"{place}/cgroup.freeze" if version == 2 else f"{place}/freezer.state"


def freeze(place: str, version: int) -> None:
    """Have all in a cgroup come to rest; raises Gone when there is no such cgroup."""
    write(_knob(place, version), "1" if version == 2 else "FROZEN")


def thaw(place: str, version: int) -> None:
    """Let all in a cgroup run, if it is there."""
    with contextlib.suppress(Gone):
        write(_knob(place, version), "0" if version == 2 else "THAWED")


def is_at_rest(directory: str, version: int) -> bool:
    """Tell whether every task of a cgroup is frozen, as the kernel says."""
    if version == 2:
        return "frozen 1" in texts.read(f"{directory}/cgroup.events").splitlines()
    return texts.read(f"{directory}/freezer.state").strip() == "FROZEN"


def is_set_frozen(place: str, version: int) -> bool:
    """Tell whether somebody set that very cgroup to frozen, be its tasks at rest or not."""
    file = "cgroup.freeze" if version == 2 else "freezer.self_freezing"
    return texts.read(f"{place}/{file}").strip() == "1"


def unusable(hierarchy: Hierarchy) -> str:
    """Say what keeps a hierarchy from freezing, nothing when it can: one in it is made for that."""
    probe = f"{hierarchy.mount}/krg-probe-{os.getpid()}"
    try:
        os.mkdir(probe)
    except OSError as exc:
        return f"{hierarchy.mount}: {exc.strerror}"
    try:
        knob = _knob(probe, hierarchy.version)
        return "" if os.path.exists(knob) else f"{hierarchy.mount} has no {os.path.basename(knob)}"
    finally:
        os.rmdir(probe)
