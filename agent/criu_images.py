"""What CRIU's image files say, as far as we look: how a dump went, who is in it, what it needs.

Their form is in criu_format; magic and field numbers are those of CRIU's criu/include/magic.h and
images/*.proto.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from krgfs.errors import Damaged

from .criu_format import LENGTH, as_bytes, as_int, build, entries, fields_of, parse
from .manifest import Task

COMMON_MAGIC, SERVICE_MAGIC = 0x54564319, 0x55105940
STATS_MAGIC, PSTREE_MAGIC, FILES_MAGIC = 0x57093306, 0x50273030, 0x56303138
PAGEMAP_MAGIC, TTY_INFO_MAGIC, INVENTORY_MAGIC = 0x56084025, 0x59453036, 0x58313116
CORE_MAGIC = 0x55053847
PAGE_BYTES = 4096
LARGE = ("pages-", "ghost-file-")  # begin the names of files that can have any size
SMALL_BYTES = 16 * 1024 * 1024  # more than CRIU writes of a thread, of the tree or of the dump
MAX_PID = 1 << 22  # CRIU 4.2 leaves session and group of a zombie to chance

# fields of pstree_entry (pid, ppid, pgid, sid; threads), core_entry, and of what is in that one
PSTREE_IDS, PSTREE_TIDS = (1, 2, 3, 4), 5
CORE_ARCH, CORE_TASK, CORE_THREAD = 1, 3, 5
TASK_STATE, TASK_COMM, THREAD_CREDS, CREDS_UID, CREDS_GID = 1, 6, 10, 1, 2
DEAD = 2
ARCHES = dict(
    enumerate(("x86_64", "arm", "aarch64", "ppc64le", "s390x", "mips", "loongarch64", "riscv64"), 1)
)
# fields of inventory_entry, pagemap_entry, tty_info_entry
INVENTORY_TCP_CLOSE, INVENTORY_RUN_ID = 10, 13
RUN_ID = re.compile(r"[0-9A-Za-z-]*")
PAGEMAP_ADDRESS = 1
PAGEMAP_COMPAT_COUNT, PAGEMAP_IN_PARENT, PAGEMAP_FLAGS, PAGEMAP_COUNT = 2, 3, 4, 5
PAGE_IS_PRESENT = 1 << 2
TTY_TYPE, TTY_RDEV, TTY_PTY = 2, 8, 12
IS_PTY, PTMX = 1, 5 << 8 | 2
# fields of file_entry, and of what is in it
FILE_TIMERFD, FILE_PIPE = 12, 18
TIMERFD_TICKS, TIMERFD_VALUE, TIMERFD_INTERVAL = 5, (7, 8), (9, 10)
PIPE_ID, PIPE_FLAGS = 2, 3


class DumpStats(NamedTuple):
    """What CRIU measured: milliseconds, pages of 4 KiB (shared memory among them)."""

    freezing_ms: float = 0.0
    frozen_ms: float = 0.0
    memdump_ms: float = 0.0
    memwrite_ms: float = 0.0
    pages_scanned: int = 0
    pages_written: int = 0


class Listed(NamedTuple):
    """One process as pstree.img has it; -1 where it does not say."""

    pid: int
    ppid: int
    pgrp: int
    sid: int
    tids: tuple[int, ...]


class Shape(NamedTuple):
    """The tree in an image: its root, and every pid, tid, session and group that it takes."""

    root: int
    ids: frozenset[int]
    is_session_leader: bool


class Dumped(NamedTuple):
    """What an image says of how it was dumped, as far as a restore has to repeat it."""

    run_id: str
    closed_tcp: bool
    kept_tcp: bool
    has_locks: bool
    has_outer_terminal: bool


def dump_stats(images: Path) -> DumpStats:
    """Return what CRIU wrote into stats-dump; raises Damaged when it is not there or not whole."""
    raw = next(entries(images / "stats-dump", SERVICE_MAGIC, STATS_MAGIC), b"")
    dump = fields_of(as_bytes(fields_of(raw).get(1, b"")))
    number = {key: value for key, value in dump.items() if isinstance(value, int)}
    return DumpStats(
        freezing_ms=number.get(1, 0) / 1000,
        frozen_ms=number.get(2, 0) / 1000,
        memdump_ms=number.get(3, 0) / 1000,
        memwrite_ms=number.get(4, 0) / 1000,
        pages_scanned=number.get(5, 0) + number.get(12, 0),
        pages_written=number.get(7, 0) + number.get(14, 0),
    )


def shape(images: Path) -> Shape:
    """Return the tree that is in an image; raises Damaged when pstree.img is not whole.

    A session or group whose leader has ended is made again by a helper of that pid, so its number
    must be free as well; but what began outside the tree is replaced by what it is restored in.
    """
    listed = _listed(images)
    root = listed[0]
    ids = {number for each in listed for number in (each.pid, each.pgrp, each.sid, *each.tids)}
    if root.sid != root.pid:
        ids.discard(root.sid)
    if root.pgrp != root.pid:
        ids.discard(root.pgrp)
    taken = frozenset(each for each in ids if 0 < each <= MAX_PID)
    return Shape(root.pid, taken, root.sid == root.pid)


def tasks(images: str | Path) -> tuple[Task, ...]:
    """Return the processes in an image, the root first, as a manifest has them; raises Damaged when
    there are none, or a file that tells of one or of its threads is not whole."""
    return tuple(_task(Path(images), each) for each in _listed(Path(images)))


def arch(images: str | Path, pid: int) -> str:
    """Return the machine that a process in an image needs, as uname(2) names it; '' if unknown."""
    return ARCHES.get(as_int(_core(Path(images), pid).get(CORE_ARCH, 0)), "")


def check_inventory(images: str | Path) -> None:
    """Raise Damaged unless a directory has the file without which it is no image of CRIU's."""
    _inventory(Path(images))


def _listed(images: Path) -> list[Listed]:
    path, found = images / "pstree.img", []
    for raw in entries(path, COMMON_MAGIC, PSTREE_MAGIC, limit_bytes=SMALL_BYTES):
        number = fields_of(raw)
        pid, ppid, pgrp, sid = (as_int(number.get(each, -1)) for each in PSTREE_IDS)
        if pid < 1:
            raise Damaged(f"{path} has an entry without a pid")
        tids = tuple(as_int(field.value) for field in parse(raw) if field.number == PSTREE_TIDS)
        found.append(Listed(pid, ppid, pgrp, sid, tids or (pid,)))
    if not found:
        raise Damaged(f"{path} names no process")
    return found


def _task(images: Path, listed: Listed) -> Task:
    core = _core(images, listed.pid)
    common = fields_of(as_bytes(core.get(CORE_TASK, b"")))
    tids = listed.tids
    if common.get(TASK_STATE) == DEAD:
        tids = (listed.pid,)  # CRIU 4.2 leaves that of a zombie to chance
    for tid in {*tids} - {listed.pid}:
        _core(images, tid)
    thread = fields_of(as_bytes(core.get(CORE_THREAD, b"")))
    creds = fields_of(as_bytes(thread.get(THREAD_CREDS, b"")))  # a zombie has none
    return Task(
        pid=listed.pid,
        ppid=listed.ppid,
        pgrp=listed.pgrp,
        sid=listed.sid,
        uid=as_int(creds.get(CREDS_UID, -1)),
        gid=as_int(creds.get(CREDS_GID, -1)),
        comm=os.fsdecode(as_bytes(common.get(TASK_COMM, b""))),
        tids=tids,
    )


def _core(images: Path, tid: int) -> dict[int, int | bytes]:
    path = images / f"core-{tid}.img"
    found = list(entries(path, COMMON_MAGIC, CORE_MAGIC, limit_bytes=SMALL_BYTES))
    if not found:
        raise Damaged(f"{path} is empty")
    return fields_of(found[0])


def dumped(images: Path) -> Dumped:
    """Return how an image was dumped; raises Damaged where a file that tells is not whole."""
    inventory = _inventory(images)
    run_id = as_bytes(inventory.get(INVENTORY_RUN_ID, b"")).decode(errors="replace")
    if not RUN_ID.fullmatch(run_id):  # it becomes a word of nft(8)
        raise Damaged(f"{images / 'inventory.img'} has {run_id!r} where CRIU writes a UUID")
    return Dumped(
        run_id=run_id,
        closed_tcp=bool(inventory.get(INVENTORY_TCP_CLOSE)),
        kept_tcp=any(images.glob("tcp-stream-*.img")),
        has_locks=(images / "filelocks.img").exists(),
        has_outer_terminal=_has_outer_terminal(images / "tty-info.img"),
    )


def _inventory(images: Path) -> dict[int, int | bytes]:
    path = images / "inventory.img"
    found = list(entries(path, INVENTORY_MAGIC, limit_bytes=SMALL_BYTES))
    if not found:
        raise Damaged(f"{path} is empty")
    return fields_of(found[0])


def _has_outer_terminal(path: Path) -> bool:
    """Tell whether a pseudo terminal is open in the tree but its master is not."""
    if not path.exists():
        return False
    masters: set[int | bytes | None] = set()
    slaves: set[int | bytes | None] = set()
    for raw in entries(path, COMMON_MAGIC, TTY_INFO_MAGIC):
        number = fields_of(raw)
        if number.get(TTY_TYPE) == IS_PTY:
            ends = masters if number.get(TTY_RDEV) == PTMX else slaves
            ends.add(number.get(TTY_PTY))
    return bool(slaves - masters)


def is_large(file: str) -> bool:
    """Tell whether an image file can have any size: memory, and open files without a name."""
    return file.startswith(LARGE)


def check_pages(images: Path, sizes: Mapping[str, int]) -> None:
    """Raise Damaged unless every page that the page maps tell of is in a page file, `sizes` those.

    CRIU 4.2 does not look: at the end of a page file that was cut off it reads for ever.
    """
    wanted: dict[int, int] = {}
    for path in images.glob("pagemap-*.img"):
        file, ranges = pagemap(path)
        wanted[file] = wanted.get(file, 0) + sum(count for _, count in ranges)
    for file, pages in wanted.items():
        name = f"pages-{file}.img"
        if (size := sizes.get(name, 0)) < pages * PAGE_BYTES:
            raise Damaged(f"{name} has {size} bytes of {pages * PAGE_BYTES}")


class Addresses:
    """The virtual addresses of the pages in the page files of a directory."""

    def __init__(self, images: str | Path) -> None:
        self._images = Path(images)
        self._ranges: dict[str, list[tuple[int, int]]] | None = None

    def pages_of(self, file: str) -> npt.NDArray[np.int64]:
        """Return the page number (address / 4096) of each page in a page file; none where the page
        maps do not tell."""
        if self._ranges is None:
            self._ranges = {}
            for path in sorted(self._images.glob("pagemap-*.img")):
                number, ranges = pagemap(path)
                self._ranges.setdefault(f"pages-{number}.img", []).extend(ranges)
        ranges = self._ranges.get(file, [])
        found = [np.arange(at, at + count) for at, count in ranges]
        return np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int64)


def pagemap(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of a page map's page file, and (page number, count) of what is in that."""
    found = entries(path, COMMON_MAGIC, PAGEMAP_MAGIC)
    file = as_int(fields_of(next(found, b"")).get(1, 0))
    return file, [range for entry in found if (range := _range(entry))[1]]


def _range(entry: bytes) -> tuple[int, int]:
    number = fields_of(entry)
    return as_int(number.get(PAGEMAP_ADDRESS, 0)) // PAGE_BYTES, _pages_of(entry)


def _pages_of(entry: bytes) -> int:
    number = fields_of(entry)
    absent = number.get(PAGEMAP_IN_PARENT)
    flags = as_int(number.get(PAGEMAP_FLAGS, 0 if absent else PAGE_IS_PRESENT))
    count = number.get(PAGEMAP_COUNT, number.get(PAGEMAP_COMPAT_COUNT, 0))
    return as_int(count) if flags & PAGE_IS_PRESENT else 0


def unread_pipes(images: Path) -> frozenset[int]:
    """Return the inode numbers of the pipes that the tree writes and does not read."""
    written: set[int] = set()
    read: set[int] = set()
    for entry in entries(images / "files.img", COMMON_MAGIC, FILES_MAGIC):
        for field in parse(entry):
            if field.number == FILE_PIPE:
                number = fields_of(as_bytes(field.value))
                is_writer = as_int(number.get(PIPE_FLAGS, 0)) & os.O_ACCMODE == os.O_WRONLY
                (written if is_writer else read).add(as_int(number.get(PIPE_ID, 0)))
    return frozenset(written - read)


def mend(images: Path) -> None:
    """Put right in files.img what CRIU 4.2 writes so that a restore would lose it.

    * A periodic timerfd that expired and was not read yet shows no time to its next expiry
      (the kernel starts it again at the read), and CRIU restores that as a stopped timer: it gets
      one whole period.
    * A pipe whose reader is outside is restored as a file (--inherit-fd), and opened again with the
      flags that the pipe had: it gets O_APPEND, or two writers would overwrite each other.
    """
    path = images / "files.img"
    pipes = unread_pipes(images)
    old = list(entries(path, COMMON_MAGIC, FILES_MAGIC))
    new = [_mended(entry, pipes) for entry in old]
    if new == old:
        return
    part = path.with_suffix(".part")
    body = b"".join(LENGTH.pack(len(entry)) + entry for entry in new)
    part.write_bytes(LENGTH.pack(COMMON_MAGIC) + LENGTH.pack(FILES_MAGIC) + body)
    kept = path.stat()
    os.chown(part, kept.st_uid, kept.st_gid)
    part.chmod(kept.st_mode & 0o7777)
    part.replace(path)


def _mended(entry: bytes, pipes: frozenset[int]) -> bytes:
    fields = parse(entry)
    if not any(field.number in (FILE_TIMERFD, FILE_PIPE) for field in fields):
        return entry
    return build(
        field._replace(value=_mended_timer(as_bytes(field.value)))
        if field.number == FILE_TIMERFD
        else field._replace(value=_mended_pipe(as_bytes(field.value), pipes))
        if field.number == FILE_PIPE
        else field
        for field in fields
    )


def _mended_timer(raw: bytes) -> bytes:
    fields, number = parse(raw), fields_of(raw)
    is_stopped = not any(number.get(each) for each in TIMERFD_VALUE)
    if not (is_stopped and number.get(TIMERFD_TICKS) and any(map(number.get, TIMERFD_INTERVAL))):
        return raw
    period = dict(zip(TIMERFD_VALUE, map(number.get, TIMERFD_INTERVAL), strict=True))
    return build(field._replace(value=period.get(field.number) or field.value) for field in fields)


def _mended_pipe(raw: bytes, pipes: frozenset[int]) -> bytes:
    if fields_of(raw).get(PIPE_ID) not in pipes:
        return raw
    return build(
        field._replace(value=as_int(field.value) | os.O_APPEND)
        if field.number == PIPE_FLAGS
        else field
        for field in parse(raw)
    )
