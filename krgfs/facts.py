"""What /proc says of this machine's processes: read by the mount to render, by the agent to act.

All of proc(5); names and paths stay bytes until somebody shows them. A process may end between any
two reads: then these functions return None or leave it out, they do not raise.
"""

from __future__ import annotations

import ctypes
import os
import stat as stat_modes
import struct
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

PF_KTHREAD = 0x00200000
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGESIZE")


def shown(raw: bytes) -> str:
    """Write kernel bytes so that they stay on one line and can be told apart."""
    text = raw.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read(path: str) -> bytes | None:
    """Return the whole of a file of /proc, None when it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = os.read(fd, 4096)
        if len(raw) < 4096:  # files of /proc give all they have, up to a page
            return raw
        while part := os.read(fd, 65536):
            raw += part
        return raw
    except OSError:
        return None
    finally:
        os.close(fd)


class Recent:
    """Reads /proc/PID/stat, the children of PID's first thread and the owner of /proc/PID through
    descriptors that stay open for the next time, those of the last `size` processes: what is read
    there is made anew at every read at offset 0, and half of its cost is opening it.

    A descriptor is of that very process: once it has ended, all are opened anew by name.
    """

    def __init__(self, size: int = 128) -> None:
        self._size = size
        self._open: OrderedDict[int, tuple[int, int, int]] = OrderedDict()

    def stat(self, pid: int) -> bytes | None:
        """Return /proc/PID/stat as it is now, None when there is no such process."""
        for descriptors_of in (self._open.get, self._opened):
            descriptors = descriptors_of(pid)
            if descriptors is not None:
                try:
                    raw = os.pread(descriptors[0], 4096, 0)
                except OSError:
                    raw = b""
                if raw:
                    self._open.move_to_end(pid)
                    return raw
                self._close(pid)
        return None

    def children(self, pid: int) -> bytes | None:
        """Return the children of the first thread of a process whose `stat` was read just now."""
        descriptors = self._open.get(pid)
        try:
            return os.pread(descriptors[1], 4096, 0) if descriptors else None
        except OSError:
            return None

    def owner(self, pid: int) -> tuple[int, int] | None:
        """Return uid and gid of a process whose `stat` was read just now: see `owner`."""
        descriptors = self._open.get(pid)
        try:
            found = os.stat(descriptors[2]) if descriptors else None
        except OSError:
            return None
        return (found.st_uid, found.st_gid) if found else None

    def _opened(self, pid: int) -> tuple[int, int, int] | None:
        try:
            directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None
        opened = []
        try:
            for name in ("stat", f"task/{pid}/children"):
                opened.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory))
        except OSError:
            for fd in (*opened, directory):
                os.close(fd)
            return None
        found = self._open[pid] = opened[0], opened[1], directory
        if len(self._open) > self._size:
            self._close(next(iter(self._open)))
        return found

    def _close(self, pid: int) -> None:
        for fd in self._open.pop(pid, ()):
            os.close(fd)


def _boot_id() -> str:
    return (read("/proc/sys/kernel/random/boot_id") or b"").decode().strip()


BOOT_ID = _boot_id()


def _boot_time() -> float:
    for line in (read("/proc/stat") or b"").splitlines():
        if line.startswith(b"btime "):
            return float(line.split()[1])
    return 0.0


BOOT_TIME = _boot_time()


class Task(NamedTuple):
    """One process as /proc/PID/stat has it. `start` is in clock ticks since boot."""

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgrp: int
    sid: int
    tty: int
    flags: int
    threads: int
    start: int
    vsize: int
    rss_bytes: int

    @property
    def is_kernel_thread(self) -> bool:
        return bool(self.flags & PF_KTHREAD)

    @property
    def is_zombie(self) -> bool:
        """Tell whether the first thread has ended; others may still run."""
        return self.state in "ZX"

    @property
    def is_live(self) -> bool:
        """Tell whether any thread of it runs code."""
        return not self.is_zombie or self.threads > 1

    @property
    def started(self) -> float:
        """Seconds since the epoch."""
        return BOOT_TIME + self.start / CLOCK_TICKS


class Ids(NamedTuple):
    """Credentials of a process, from /proc/PID/status."""

    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    tgid: int
    ns_pids: tuple[int, ...]

    @property
    def uid(self) -> int:
        """The real uid."""
        return self.uids[0]

    @property
    def gid(self) -> int:
        return self.gids[0]


class OpenFile(NamedTuple):
    """One open file description as the tasks that share its target show it.

    `kind` is one of Kerrighed's words: socket pipe fifo tty char block link dir posix mq file.
    """

    kind: str
    id: str
    name: bytes
    users: tuple[tuple[int, int], ...]


def task(pid: int) -> Task | None:
    """Return what /proc/PID/stat says, None when there is no such process."""
    raw = read(f"/proc/{pid}/stat")
    return _task(pid, raw) if raw else None


def _task(pid: int, raw: bytes) -> Task:
    left, right = raw.find(b"("), raw.rfind(b")")
    field = raw[right + 2 :].split(None, 22)
    return Task(
        pid,
        raw[left + 1 : right],
        chr(field[0][0]),
        int(field[1]),
        int(field[2]),
        int(field[3]),
        int(field[4]),
        int(field[6]),
        int(field[17]),
        int(field[19]),
        int(field[20]),
        int(field[21]) * PAGE,
    )


def is_alive(pid: int, start: int) -> bool:
    """Tell whether that very process exists and has not ended (a zombie has)."""
    found = task(pid)
    return found is not None and found.start == start and found.is_live


def among(openers: Collection[int], pids: Collection[int]) -> set[int]:
    """Return those that are one of `pids` or were forked below one that still lives."""
    known = frozenset(pids)
    found = known.intersection(openers)
    others = set(openers) - found
    if len(others) <= len(known):
        return {*found, *(pid for pid in others if _descends(pid, known))}
    parents = list(known)
    for pid in parents:
        parents += [child for child in children(pid) if child not in known]
    return {*found, *others.intersection(parents)}


def _descends(pid: int, pids: Collection[int]) -> bool:
    while pid not in pids:
        found = task(pid)
        if found is None or found.ppid == 0:
            return False
        pid = found.ppid
    return True


def exists(pid: int, start: int) -> bool:
    """Tell whether that very process still holds its pid, be it as a zombie."""
    found = task(pid)
    return found is not None and found.start == start


def status(pid: int) -> dict[bytes, bytes]:
    """Return /proc/PID/status as a mapping, empty when there is no such process."""
    lines = (read(f"/proc/{pid}/status") or b"").split(b"\n")
    pairs = (line.partition(b":") for line in lines if line)
    return {name: value.strip() for name, _, value in pairs}


def ids(pid: int) -> Ids | None:
    """Return the credentials of a process (or of a thread, by its tid)."""
    facts = status(pid)
    if b"Uid" not in facts:
        return None
    uids = [int(x) for x in facts[b"Uid"].split()]
    gids = [int(x) for x in facts[b"Gid"].split()]
    return Ids(
        uids=(uids[0], uids[1], uids[2], uids[3]),
        gids=(gids[0], gids[1], gids[2], gids[3]),
        groups=tuple(int(x) for x in facts.get(b"Groups", b"").split()),
        tgid=int(facts.get(b"Tgid", b"0")),
        ns_pids=tuple(int(x) for x in facts.get(b"NSpid", b"").split()),
    )


def owner(pid: int) -> tuple[int, int] | None:
    """Return uid and gid of /proc/PID: the effective ones, which ps shows."""
    try:
        found = os.stat(f"/proc/{pid}")
    except OSError:
        return None
    return found.st_uid, found.st_gid


def pids() -> Iterator[int]:
    """Yield the pids of all processes, kernel threads among them."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            yield int(name)


def processes() -> Iterator[Task]:
    """Yield all processes but kernel threads."""
    for pid in pids():
        found = task(pid)
        if found is not None and not found.is_kernel_thread:
            yield found


class Entry(NamedTuple):
    """What a listing of processes shows of one. `start` is 0 for a kernel thread."""

    start: int
    uid: int
    gid: int


class Listing:
    """The processes for a listing of them: /proc/PID/stat is read once in the life of each.

    That it is still the same process is seen by the inode of /proc/PID, which stat(2) has at a
    sixth of the cost of reading a file there; proc makes a new one for every new process. An entry
    is looked at again when it is older than KEPT_S, for which the kernel keeps attributes too.
    """

    KEPT_S = 1.0

    def __init__(self) -> None:
        self.seen: dict[str, Entry] = {}
        self._known: dict[str, tuple[tuple[int, float], Entry]] = {}
        self._taken = 0.0

    def entries(self) -> dict[str, Entry]:
        """Return all processes but kernel threads by the names that they have in /proc; `seen` is
        what was returned last."""
        now = time.monotonic()
        kept = self._known if now - self._taken < self.KEPT_S else {}
        if not kept:
            self._taken = now
        known: dict[str, tuple[tuple[int, float], Entry]] = {}
        for name in os.listdir("/proc"):
            if name.isdecimal() and (entry := kept.get(name) or self._looked_at(name)):
                known[name] = entry
        self._known = known
        self.seen = {name: entry for name, (_, entry) in known.items() if entry.start}
        return self.seen

    def _looked_at(self, name: str) -> tuple[tuple[int, float], Entry] | None:
        try:
            meta = os.stat(f"/proc/{name}")
        except OSError:
            return None
        mark = meta.st_ino, meta.st_ctime
        before = self._known.get(name)
        same = before is not None and before[0] == mark
        start = before[1].start if before is not None and same else _start(int(name))
        return mark, Entry(start, meta.st_uid, meta.st_gid)


def _start(pid: int) -> int:
    found = task(pid)
    return 0 if found is None or found.is_kernel_thread else found.start


def threads(pid: int) -> tuple[int, ...]:
    """Return the thread ids of a process, its own pid among them."""
    try:
        return tuple(sorted(int(tid) for tid in os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return ()


def children(pid: int) -> tuple[int, ...]:
    """Return the children of all threads of a process, zombies among them."""
    found: list[int] = []
    for tid in threads(pid):
        found += _children_of(pid, tid)
    return tuple(sorted(found))


def _children_of(pid: int, tid: int) -> list[int]:
    return [int(x) for x in (read(f"/proc/{pid}/task/{tid}/children") or b"").split()]


def tree(root: int, recent: Recent | None = None) -> tuple[Task, ...]:
    """Return a process and all its descendants, parents before children; empty when it is gone."""
    if recent is not None and (raw := recent.stat(root)):
        alone = _task(root, raw)
        if alone.threads == 1 and recent.children(root) == b"":
            return (alone,)
    first = task(root)
    if first is None:
        return ()
    found = [first]
    for parent in found:
        one = parent.threads == 1
        heirs = _children_of(parent.pid, parent.pid) if one else children(parent.pid)
        found += [child for pid in heirs if (child := task(pid)) is not None]
    return tuple(found)


def depth_first(tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
    """Yield the tasks of a tree with their depth, each parent directly before its children."""
    by_parent: dict[int, list[Task]] = {}
    tasks = tuple(tasks)
    for each in tasks[1:]:
        by_parent.setdefault(each.ppid, []).append(each)
    todo = [(0, tasks[0])] if tasks else []
    while todo:
        depth, each = todo.pop()
        yield depth, each
        todo += [(depth + 1, child) for child in reversed(by_parent.get(each.pid, ()))]


def command_line(pid: int) -> bytes:
    """Return the arguments of a process with blanks between, empty for a zombie."""
    return (read(f"/proc/{pid}/cmdline") or b"").rstrip(b"\0").replace(b"\0", b" ")


def namespace(pid: int, kind: str) -> str:
    """Return the identity of a namespace (`pid:[4026531836]`), empty when it cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def link(pid: int, name: str) -> bytes:
    """Return the target of /proc/PID/NAME (cwd, exe, root, fd/N), empty when it cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/{name}".encode())
    except OSError:
        return b""


def descriptors(pid: int) -> Iterator[tuple[int, bytes]]:
    """Yield the open descriptors of a process with what /proc links them to."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in sorted(names, key=int):
        if target := link(pid, f"fd/{name}"):
            yield int(name), target


def open_files(tasks: Iterable[Task]) -> tuple[OpenFile, ...]:
    """Return the open files of a tree, one each however many descriptors have it.

    The id is the device and inode number (hexadecimal) of what is open: two opens of one file by
    name show as one here, as /proc cannot tell them apart without ptrace.
    """
    found: dict[tuple[str, bytes], OpenFile] = {}
    for each in tasks:
        for fd, target in descriptors(each.pid):
            kind, ident = _kind_and_id(each.pid, fd, target)
            known = found.get((ident, target))
            users = (*(known.users if known else ()), (each.pid, fd))
            found[ident, target] = OpenFile(kind, ident, target, users)
    return tuple(found.values())


def files_text(found: Iterable[OpenFile]) -> bytes:
    """Write open files in Kerrighed's form, a line each: type|id|name|pid:fd[,pid:fd]."""
    lines = []
    for each in found:
        users = ",".join(f"{pid}:{fd}" for pid, fd in each.users)
        lines.append(f"{each.kind:<8}|{each.id}|{shown(each.name)}|{users}\n")
    return "".join(lines).encode()


def _kind_and_id(pid: int, fd: int, target: bytes) -> tuple[str, str]:
    found = _known(f"/proc/{pid}/fd/{fd}")
    if found is None:
        return "file", "0" * 24
    mode, device, inode, rdev = found
    ident = f"{device:08X}{inode:016X}"
    if stat_modes.S_ISSOCK(mode):
        return "socket", ident
    if stat_modes.S_ISFIFO(mode):
        return ("pipe" if target.startswith(b"pipe:") else "fifo"), ident
    if stat_modes.S_ISCHR(mode):
        return ("tty" if is_tty_device(rdev) else "char"), ident
    if stat_modes.S_ISBLK(mode):
        return "block", ident
    if stat_modes.S_ISDIR(mode):
        return "dir", ident
    if stat_modes.S_ISLNK(mode):
        return "link", ident
    return "file", ident


def _known(path: str) -> tuple[int, int, int, int] | None:
    """Return mode, device, inode and device number of what is open, without asking its filesystem.

    statx(2) with AT_STATX_DONT_SYNC: stat(2) of a file of our own mount would wait for this very
    process, and one of a dead server for ever. None when it is gone.
    """
    raw = ctypes.create_string_buffer(256)
    if _libc.statx(_AT_FDCWD, path.encode(), _AT_STATX_DONT_SYNC, _STATX_BASIC_STATS, raw):
        return None
    mode, inode = struct.unpack_from("=H2xQ", raw, 28)
    rdev_major, rdev_minor, major, minor = struct.unpack_from("=4I", raw, 128)
    return mode, os.makedev(major, minor), inode, os.makedev(rdev_major, rdev_minor)


_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF


def is_tty_device(rdev: int) -> bool:
    """Tell terminals (ttys, serial lines, consoles, ptys) by their device number."""
    major = os.major(rdev)
    return major in (4, 5, 166, 188, 204) or 136 <= major <= 143
