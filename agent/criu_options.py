"""Which options CRIU is given, and why: decided from what the tree or the image is.

Each option stands beside its reason; both go into the manifest. Not among them, on purpose:

* --leave-stopped: what becomes of a tree is decided once its image is committed, by its cgroup.
* --link-remap: it makes hard links beside the user's files and removes them again where the tree
  runs on, so that such an image cannot be restored (tried with 4.2.1).
* --force-irmap: inotify watches came back without, on ext4 and on tmpfs; it searches whole disks.
* --skip-in-flight with tcp=keep: who waits to be accepted believes to be connected; better fail.
"""

from __future__ import annotations

import os
import signal as signals
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from krgfs import facts
from krgfs.errors import Fate, Unsupported
from krgfs.facts import Ids
from krgfs.model import Frozen
from krgfs.verbs import Checkpoint

from . import criu_images, procs
from .outside import End
from .procs import ProcessTree

LEVEL = "-v3"
GHOST_LIMIT = "4G"
STDIO = (0, 1, 2)
FIRST_INHERITED_FD = 100
CAP_SYS_RESOURCE = 24


class Option(NamedTuple):
    """One option as CRIU gets it, and why."""

    words: tuple[str, ...]
    reason: str


class Substitute(NamedTuple):
    """A descriptor whose other end was outside: `key` names it to CRIU, `mode` is how a file is
    opened in its place (`a`: the tree's output file, `r`: /dev/null)."""

    fd: int
    key: str
    mode: str


Row = tuple[tuple[str, ...], bool, str]


def _chosen(rows: Iterable[Row]) -> list[Option]:
    return [Option(words, reason) for words, applies, reason in rows if applies]


def for_dump(
    tree: ProcessTree,
    into: Path,
    work: Path,
    words: Checkpoint,
    ends: Sequence[End],
    frozen: Frozen | None,
    *,
    has_tcp: bool,
    as_user: Ids | None,
) -> list[Option]:
    """Return the options of the dump of a tree.

    `has_tcp` tells whether it has TCP connections, also such as do not leave it; `as_user` whom
    CRIU runs as when not as ourselves, see `user_to_be`.
    """
    kinds = {end.kind for end in ends}
    keeps, closes = has_tcp and words.tcp == "keep", words.tcp == "close"
    is_ended = ends_with_dump(words, keeps)
    return _chosen(
        (
            (("--tree", str(tree.inner_root)), True, "the root, as its own pid namespace says"),
            (("--images-dir", str(into)), True, "where the socket is that it streams to"),
            (("--stream",), True, "into memory: no disk is waited for while the tree is frozen"),
            (("--work-dir", str(work)), True, "log and statistics are no part of the image"),
            (("--log-file", "dump.log", LEVEL), True, "names the task and fd that an error is of"),
            (("--no-default-config",), True, "what /etc/criu says is meant for containers"),
            (("--leave-running",), not is_ended, "a tree ends only once its image is committed"),
            (
                ("--action-script", str(work / "last-word")),
                is_ended,
                "commits while the network is locked: killed later, the tree would hang up on "
                "its peers",
            ),
            (
                ("--action-script", str(work / "gate")),
                not is_ended,
                "waits until all is read: the pipes hold its memory itself, and it would change it",
            ),
            (("--manage-cgroups=ignore",), True, "the cgroup is chosen at restart, not ours there"),
            (
                ("--freeze-cgroup", frozen.cgroup if frozen else ""),
                frozen is not None,
                "its freezer holds the tree, and shall afterwards",
            ),
            (
                ("--shell-job",),
                not tree.is_session_leader,
                "the session leader is outside the tree",
            ),
            (
                ("--shell-job",),
                tree.is_session_leader and "tty" in kinds,
                "the other end of its terminal is outside the tree",
            ),
            (("--tcp-established",), keeps, "tcp=keep: it has TCP connections"),
            (("--tcp-close",), closes, "tcp=close: TCP connections are restored as closed"),
            (
                ("--skip-in-flight",),
                closes,
                "tcp=close: who waits to be accepted is hung up on as well",
            ),
            (
                ("--network-lock", "nftables"),
                keeps,
                "no packet may come in between; iptables needs programs of its own",
            ),
            (
                ("--network-lock", "skip"),
                not keeps,
                "no connection is kept, and a firewall table would be left",
            ),
            *_unix_rows(ends),
            (("--file-locks",), True, "locks that the tree holds belong to it"),
            (
                ("--ghost-limit", GHOST_LIMIT),
                True,
                "a deleted open file is saved up to the size that memory has elsewhere",
            ),
            (
                ("--unprivileged",),
                as_user is not None,
                "without CAP_SYS_RESOURCE only its own user may read the tree's limits",
            ),
        )
    )


def _unix_rows(ends: Sequence[End]) -> Iterable[Row]:
    """Unix sockets to the outside: standard ones become files at restart, datagrams reconnect."""
    sockets = [end for end in ends if end.kind == "unix"]
    yield (
        ("--ext-unix-sk",),
        any(end.fd not in STDIO for end in sockets),
        "a datagram socket to a named one outside (/dev/log) is connected again",
    )
    for name in dict.fromkeys(end.id for end in sockets if end.fd in STDIO):
        yield (
            ("--external", name),
            True,
            "standard input or output to a process outside: a file takes its place",
        )


def ends_with_dump(words: Checkpoint, keeps_tcp: bool) -> bool:
    """Tell whether CRIU itself has to end the tree: it locks the network only for as long as it
    works, and a peer that hears the tree die has hung up before the restart."""
    return keeps_tcp and words.then.kind == "kill" and words.then.signal == signals.SIGKILL


def for_restore(
    images: Path,
    work: Path,
    pidfile: Path,
    substitutes: Sequence[Substitute],
    lazy: bool = False,
) -> list[Option]:
    """Return the options of a restore, decided from the image itself: a directory that plain CRIU
    wrote has nothing else. With `lazy` a feeder listens in `work`. Raises Damaged where the image
    is not whole."""
    shape, dumped = criu_images.shape(images), criu_images.dumped(images)
    return _chosen(
        (
            (("--images-dir", str(images)), True, "where the socket is that serves the image"),
            (("--stream",), not lazy, "out of memory: nothing is unpacked first"),
            (("--work-dir", str(work)), True, "an image is not written to"),
            (("--log-file", "restore.log", LEVEL), True, "names what an error is of"),
            (("--no-default-config",), True, "what /etc/criu says is meant for containers"),
            (("--restore-detached",), True, "the keeper is its parent, CRIU is gone"),
            (("--pidfile", str(pidfile)), True, "tells the keeper who the root is"),
            (("--manage-cgroups=ignore",), True, "it stays in the cgroup where CRIU is started"),
            (
                ("--shell-job",),
                not shape.is_session_leader,
                "the session leader was outside the tree: the keeper takes its place",
            ),
            (
                ("--shell-job",),
                shape.is_session_leader and dumped.has_outer_terminal,
                "the keeper has the other end of its terminal",
            ),
            (("--tcp-established",), dumped.kept_tcp, "dumped with tcp=keep"),
            (("--tcp-close",), dumped.closed_tcp, "dumped with tcp=close"),
            (("--ext-unix-sk",), True, "permits what the dump found; without it none is tried"),
            (("--file-locks",), dumped.has_locks, "it held file locks"),
            (("--lazy-pages",), lazy, "lazy=yes: it runs, and a feeder brings its memory"),
            *(
                (
                    ("--inherit-fd", f"fd[{each.fd}]:{each.key}"),
                    True,
                    "its other end was outside: a file takes its place",
                )
                for each in substitutes
            ),
        )
    )


def substitutes(images: Path, ends: Iterable[object]) -> list[Substitute]:
    """Return what takes the place of ends that were outside the tree.

    A pipe or standard output that somebody else read: the output file. Standard input from a
    socket: /dev/null. A pipe that somebody else wrote needs nothing, CRIU restores what was in it
    and then its end; nor does a terminal, which CRIU takes from its own standard input.
    """
    keys = [(f"pipe:[{inode}]", "a") for inode in sorted(criu_images.unread_pipes(images))]
    sockets: dict[str, str] = {}
    for end in ends:
        kind, name, fd = (getattr(end, each) for each in ("kind", "id", "fd"))
        if kind == "unix" and fd in STDIO:
            key = f"socket:{name.removeprefix('unix')}"
            sockets[key] = "a" if fd or sockets.get(key) == "a" else "r"
    return [
        Substitute(fd, key, mode)
        for fd, (key, mode) in enumerate([*keys, *sockets.items()], FIRST_INHERITED_FD)
    ]


# -- as whom, and where


def may_read_limits() -> bool:
    """Tell whether we have CAP_SYS_RESOURCE, which many containers withhold; capabilities(7)."""
    held = int(facts.status(os.getpid()).get(b"CapEff", b"0"), 16)
    return bool(held >> CAP_SYS_RESOURCE & 1)


def user_to_be(tree: ProcessTree, may_read_limits: bool) -> Ids | None:
    """Return whom CRIU has to run as to dump a tree, None for ourselves.

    prlimit(2) tells the limits of a process only to its own user, or with `may_read_limits`.
    Raises Unsupported where no single user will do.
    """
    if may_read_limits:
        return None
    live = [tree.credentials[task.pid] for task in tree.live if task.pid in tree.credentials]
    users = {(ids.uids[:3], ids.gids[:3]) for ids in live}
    if not users or users == {(os.getresuid(), os.getresgid())}:
        return None
    first = live[0]
    is_plain = len({*first.uids[:3]}) == 1 and len({*first.gids[:3]}) == 1
    if len(users) > 1 or not is_plain:
        raise Unsupported(
            f"tree {tree.pid} runs under several users or groups, and the agent has no "
            "CAP_SYS_RESOURCE to read the limits of all; give it that capability",
            fate=Fate.RUNNING,
        )
    return first


NAMESPACES = ("net", "ipc", "uts", "user", "cgroup", "mnt")


def namespaces_to_enter(tree: ProcessTree) -> tuple[str, ...]:
    """Return the namespaces that CRIU has to be in for a tree, as options of nsenter(1).

    CRIU saves, and later makes anew, what it does not share with the tree. That would be another
    machine's worth: so a tree either shares everything with the agent, or lives under one of our
    keepers, with pids and mounts of its own. Raises Unsupported for any other.
    """
    differ = [kind for kind in NAMESPACES if _differs(tree.pid, kind)]
    if tree.is_in_private_pid_ns and _has_keeper(tree) and set(differ) <= {"mnt"}:
        return ("--pid", "--mount")
    if tree.is_in_private_pid_ns:
        differ.append("pid")
    if differ:
        raise Unsupported(
            f"tree {tree.pid} is in a {differ[0]} namespace of its own (a container, a service "
            "with private directories, unshare): let the container's own engine checkpoint it, or "
            "start it without",
            fate=Fate.RUNNING,
        )
    return ()


def _differs(pid: int, kind: str) -> bool:
    """A task that has just ended is in none."""
    theirs = facts.namespace(pid, kind)
    return bool(theirs) and theirs != facts.namespace(os.getpid(), kind)


def _has_keeper(tree: ProcessTree) -> bool:
    task = facts.task(tree.root.ppid)
    while task is not None and task.comm != procs.KEEPER:
        task = facts.task(task.ppid)
    return task is not None
