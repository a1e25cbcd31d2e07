"""CRIU's image files, as far as we look into them: how a dump went, which ids a restore needs.

An image file is two magic numbers and then entries, each its length (4 bytes, little endian) and a
protobuf message; field numbers are those of CRIU's images/*.proto. The messages are taken apart
and put together here by their wire format, so that nothing of what we do not know is lost.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from krgfs.errors import Damaged

COMMON_MAGIC, SERVICE_MAGIC = 0x54564319, 0x55105940
STATS_MAGIC, PSTREE_MAGIC, FILES_MAGIC = 0x57093306, 0x50273030, 0x56303138
PAGEMAP_MAGIC, TTY_INFO_MAGIC, INVENTORY_MAGIC = 0x56084025, 0x59453036, 0x58313116
PAGE_BYTES = 4096
MAX_PID = 1 << 22  # CRIU 4.2 leaves session and group of a zombie to chance
LENGTH = struct.Struct("<I")

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# fields of inventory_entry, pagemap_entry, tty_info_entry
INVENTORY_TCP_CLOSE, INVENTORY_RUN_ID = 10, 13
PAGEMAP_COMPAT_COUNT, PAGEMAP_IN_PARENT, PAGEMAP_FLAGS, PAGEMAP_COUNT = 2, 3, 4, 5
PAGE_IS_PRESENT = 1 << 2
TTY_TYPE, TTY_RDEV, TTY_PTY = 2, 8, 12
IS_PTY, PTMX = 1, 5 << 8 | 2
# fields of file_entry, and of what is in it
FILE_TIMERFD, FILE_PIPE = 12, 18
TIMERFD_TICKS, TIMERFD_VALUE, TIMERFD_INTERVAL = 5, (7, 8), (9, 10)
PIPE_ID, PIPE_FLAGS = 2, 3


class Field(NamedTuple):
    number: int
    wire: int
    value: int | bytes


class DumpStats(NamedTuple):
    """What CRIU measured: milliseconds, pages of 4 KiB (shared memory among them)."""

    freezing_ms: float = 0.0
    frozen_ms: float = 0.0
    memdump_ms: float = 0.0
    memwrite_ms: float = 0.0
    pages_scanned: int = 0
    pages_written: int = 0


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
    raw = next(_entries(images / "stats-dump", SERVICE_MAGIC, STATS_MAGIC), b"")
    dump = _numbers(parse(_bytes(_numbers(parse(raw)).get(1, b""))))
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
    tasks = []
    for raw in _entries(images / "pstree.img", COMMON_MAGIC, PSTREE_MAGIC):
        fields = parse(raw)
        number = _numbers(fields)
        pid, ppid, pgid, sid = (_int(number.get(each, 0)) for each in (1, 2, 3, 4))
        tids = [_int(field.value) for field in fields if field.number == 5]
        tasks.append((pid, ppid, pgid, sid, tids))
    if not tasks:
        raise Damaged(f"{images / 'pstree.img'} has no process in it")
    root, _, root_group, root_session, _ = tasks[0]
    ids = {each for pid, _, pgid, sid, tids in tasks for each in (pid, pgid, sid, *tids)}
    if root_session != root:
        ids.discard(root_session)
    if root_group != root:
        ids.discard(root_group)
    return Shape(root, frozenset(each for each in ids if 0 < each <= MAX_PID), root_session == root)


def dumped(images: Path) -> Dumped:
    """Return how an image was dumped; raises Damaged where a file that tells is not whole."""
    head = next(_entries(images / "inventory.img", INVENTORY_MAGIC), None)
    if head is None:
        raise Damaged(f"{images / 'inventory.img'} is empty")
    inventory = _numbers(parse(head))
    return Dumped(
        run_id=_bytes(inventory.get(INVENTORY_RUN_ID, b"")).decode(errors="replace"),
        closed_tcp=bool(inventory.get(INVENTORY_TCP_CLOSE)),
        kept_tcp=any(images.glob("tcp-stream-*.img")),
        has_locks=(images / "filelocks.img").exists(),
        has_outer_terminal=_has_outer_terminal(images / "tty-info.img"),
    )


def _has_outer_terminal(path: Path) -> bool:
    """Tell whether a pseudo terminal is open in the tree but its master is not."""
    if not path.exists():
        return False
    masters: set[int | bytes | None] = set()
    slaves: set[int | bytes | None] = set()
    for raw in _entries(path, COMMON_MAGIC, TTY_INFO_MAGIC):
        number = _numbers(parse(raw))
        if number.get(TTY_TYPE) == IS_PTY:
            ends = masters if number.get(TTY_RDEV) == PTMX else slaves
            ends.add(number.get(TTY_PTY))
    return bool(slaves - masters)


def check_pages(images: Path) -> None:
    """Raise Damaged unless every page that the page maps tell of is there.

    CRIU 4.2 does not look: at the end of a page file that was cut off it reads for ever.
    """
    wanted: dict[int, int] = {}
    for path in images.glob("pagemap-*.img"):
        entries = _entries(path, COMMON_MAGIC, PAGEMAP_MAGIC)
        file = _int(_numbers(parse(next(entries, b""))).get(1, 0))
        wanted[file] = wanted.get(file, 0) + sum(map(_pages_of, entries))
    for file, pages in wanted.items():
        path = images / f"pages-{file}.img"
        found = path.stat().st_size if path.exists() else 0
        if found < pages * PAGE_BYTES:
            raise Damaged(f"{path} has {found} bytes of {pages * PAGE_BYTES}")


def _pages_of(entry: bytes) -> int:
    number = _numbers(parse(entry))
    flags = _int(number.get(PAGEMAP_FLAGS, 0 if number.get(PAGEMAP_IN_PARENT) else PAGE_IS_PRESENT))
    count = number.get(PAGEMAP_COUNT, number.get(PAGEMAP_COMPAT_COUNT, 0))
    return _int(count) if flags & PAGE_IS_PRESENT else 0


def unread_pipes(images: Path) -> frozenset[int]:
    """Return the inode numbers of the pipes that the tree writes and does not read."""
    written: set[int] = set()
    read: set[int] = set()
    for entry in _entries(images / "files.img", COMMON_MAGIC, FILES_MAGIC):
        for field in parse(entry):
            if field.number == FILE_PIPE:
                number = _numbers(parse(_bytes(field.value)))
                is_writer = _int(number.get(PIPE_FLAGS, 0)) & os.O_ACCMODE == os.O_WRONLY
                (written if is_writer else read).add(_int(number.get(PIPE_ID, 0)))
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
    old = list(_entries(path, COMMON_MAGIC, FILES_MAGIC))
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
        field._replace(value=_mended_timer(_bytes(field.value)))
        if field.number == FILE_TIMERFD
        else field._replace(value=_mended_pipe(_bytes(field.value), pipes))
        if field.number == FILE_PIPE
        else field
        for field in fields
    )


def _mended_timer(raw: bytes) -> bytes:
    fields = parse(raw)
    number = _numbers(fields)
    is_stopped = not any(number.get(each) for each in TIMERFD_VALUE)
    if not (is_stopped and number.get(TIMERFD_TICKS) and any(map(number.get, TIMERFD_INTERVAL))):
        return raw
    period = dict(zip(TIMERFD_VALUE, map(number.get, TIMERFD_INTERVAL), strict=True))
    return build(field._replace(value=period.get(field.number) or field.value) for field in fields)


def _mended_pipe(raw: bytes, pipes: frozenset[int]) -> bytes:
    fields = parse(raw)
    if _numbers(fields).get(PIPE_ID) not in pipes:
        return raw
    return build(
        field._replace(value=_int(field.value) | os.O_APPEND)
        if field.number == PIPE_FLAGS
        else field
        for field in fields
    )


# -- the format


def _entries(path: Path, *magics: int) -> Iterator[bytes]:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise Damaged(f"cannot read {path}: {exc.strerror}") from exc
    head = b"".join(map(LENGTH.pack, magics))
    if not raw.startswith(head):
        raise Damaged(f"{path} is not the image file that its name says")
    at = len(head)
    while at < len(raw):
        if at + LENGTH.size > len(raw):
            raise Damaged(f"{path} is cut off")
        (size,) = LENGTH.unpack_from(raw, at)
        at += LENGTH.size
        if at + size > len(raw):
            raise Damaged(f"{path} is cut off")
        yield raw[at : at + size]
        at += size


def parse(raw: bytes) -> list[Field]:
    """Take a protobuf message apart, its fields in order; raises Damaged when it is not one."""
    found, at = [], 0
    try:
        while at < len(raw):
            key, at = _varint(raw, at)
            number, wire = key >> 3, key & 7
            value: int | bytes
            if wire == VARINT:
                value, at = _varint(raw, at)
            else:
                size = {FIXED64: 8, FIXED32: 4}.get(wire)
                if wire == BYTES:
                    size, at = _varint(raw, at)
                if size is None or at + size > len(raw):
                    raise Damaged("a message of an image file is damaged")
                value, at = raw[at : at + size], at + size
            found.append(Field(number, wire, value))
    except IndexError as exc:
        raise Damaged("a message of an image file is cut off") from exc
    return found


def build(fields: Iterable[Field]) -> bytes:
    """Put a protobuf message together."""
    out = bytearray()
    for number, wire, value in fields:
        out += _as_varint(number << 3 | wire)
        if isinstance(value, int):
            out += _as_varint(value)
        else:
            out += _as_varint(len(value)) * (wire == BYTES) + value
    return bytes(out)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise Damaged("a number of an image file is damaged")


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _numbers(fields: Iterable[Field]) -> dict[int, int | bytes]:
    return {field.number: field.value for field in fields}


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise Damaged("a message of an image file has a number where a message belongs")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise Damaged("a message of an image file has a message where a number belongs")
    return value
