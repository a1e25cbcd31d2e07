"""What CRIU's image files say of the mappings and open files of a process.

Field numbers are those of CRIU's images/{mm,vma,fdinfo,fown,regfile}.proto, the bits of a mapping's
status those of criu/include/image.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from krgfs.facts import shown

from .criu_format import as_bytes, as_int, entries, fields_of, parse
from .criu_images import COMMON_MAGIC, FILES_MAGIC

MM_MAGIC, FDINFO_MAGIC, IDS_MAGIC = 0x57492820, 0x56213732, 0x54432030
MEMFD_MAGIC = 0x48453499
MM_START_STACK, MM_VMAS = 5, 14
VMA_START, VMA_END, VMA_SHMID, VMA_STATUS = 1, 2, 4, 7
VMA_VDSO, VMA_VVAR, VMA_HEAP, VMA_FILE_PRIVATE = 1 << 3, 1 << 12, 1 << 5, 1 << 6
VMA_FILE_SHARED, VMA_ANON_SHARED = 1 << 7, 1 << 8
IDS_FILES = 2
FDINFO_ID, FDINFO_TYPE, FDINFO_FD = 1, 3, 4
FILE_ID, FILE_REG, FILE_MEMFD = 2, 3, 20
MEMFD_INODE, MEMFD_NAME, MEMFD_SHMID, MEMFD_ID = 5, 1, 5, 7
REG_POS, REG_NAME, REG_SIZE = 3, 6, 8
NUMBERED = {4: "inet", 16: "unix", 17: "fifo", 18: "pipe"}  # fields with the inode as their 2nd
TYPES = (  # fd_types, by number
    *("none", "reg", "pipe", "fifo", "inet", "unix", "eventfd", "epoll", "inotify", "signalfd"),
    *("packet", "tty", "fanotify", "netlink", "ns", "tun", "ext", "timerfd", "memfd", "bpf"),
    "pidfd",
)


class Mapped(NamedTuple):
    """A mapping: addresses, kind, and what it maps. `shmid` names the memory that is shared."""

    start: int
    end: int
    kind: str
    name: str
    shmid: int = 0

    def overlaps(self, other: Mapped) -> bool:
        return self.start < other.end and other.start < self.end


class OpenFile(NamedTuple):
    """An open file; position and size are those of plain files, else 0."""

    type: str
    name: str
    position: int = 0
    size: int = 0


class Files(NamedTuple):
    """What files.img has, by CRIU's numbers, which are other ones in each image; `memory` are the
    ids of what lies in memory alone (memfd_create(2), and what processes share without a name)."""

    by_number: dict[int, OpenFile]
    memory: dict[int, int]


def known_files(images: Path) -> Files:
    """Return what files.img and memfd.img have."""
    found = Files({}, {})
    memory = dict(_memory(images / "memfd.img"))
    for entry in entries(images / "files.img", COMMON_MAGIC, FILES_MAGIC):
        number = fields_of(entry)
        id = as_int(number.get(FILE_ID, 0))
        found.by_number[id] = _file(number)
        if FILE_MEMFD in number:
            inode = as_int(fields_of(as_bytes(number[FILE_MEMFD])).get(MEMFD_INODE, 0))
            name, found.memory[id] = memory.get(inode, ("", 0))
            found.by_number[id] = OpenFile("memfd", name)
    return found


def _memory(path: Path) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield the inodes of files that lie in memory, with name and shmid of each."""
    if path.exists():
        for entry in entries(path, COMMON_MAGIC, MEMFD_MAGIC):
            number = fields_of(entry)
            name = shown(as_bytes(number.get(MEMFD_NAME, b"")))
            yield as_int(number.get(MEMFD_ID, 0)), (name, as_int(number.get(MEMFD_SHMID, 0)))


def _file(number: dict[int, int | bytes]) -> OpenFile:
    if FILE_REG in number:
        reg = fields_of(as_bytes(number[FILE_REG]))
        name = shown(as_bytes(reg.get(REG_NAME, b"")))
        return OpenFile("reg", name, as_int(reg.get(REG_POS, 0)), as_int(reg.get(REG_SIZE, 0)))
    for field, kind in NUMBERED.items():
        if field in number:
            return OpenFile(kind, f"[{fields_of(as_bytes(number[field])).get(2, 0)!r}]")
    return OpenFile(_type(as_int(number.get(1, 0))), "")


def _type(number: int) -> str:
    return TYPES[number] if number < len(TYPES) else str(number)


def open_files(images: Path, pid: int, known: Files) -> dict[int, OpenFile]:
    """Return the open files of a process by descriptor."""
    ids = fields_of(next(entries(images / f"ids-{pid}.img", COMMON_MAGIC, IDS_MAGIC), b""))
    path = images / f"fdinfo-{as_int(ids.get(IDS_FILES, 0))}.img"
    if not path.exists():  # a zombie has none
        return {}
    found = {}
    for entry in entries(path, COMMON_MAGIC, FDINFO_MAGIC):
        number = fields_of(entry)
        kind = OpenFile(_type(as_int(number.get(FDINFO_TYPE, 0))), "")
        fd = as_int(number.get(FDINFO_FD, 0))
        found[fd] = known.by_number.get(as_int(number.get(FDINFO_ID, 0)), kind)
    return found


def mappings(images: Path, pid: int, known: Files) -> list[Mapped]:
    """Return the mappings of a process, by address."""
    path = images / f"mm-{pid}.img"
    if not path.exists():
        return []
    memory = next(entries(path, COMMON_MAGIC, MM_MAGIC), b"")
    stack = as_int(fields_of(memory).get(MM_START_STACK, 0))
    return sorted(_mappings(memory, stack, known))


def _mappings(memory: bytes, stack: int, known: Files) -> Iterator[Mapped]:
    for field in parse(memory):
        if field.number == MM_VMAS:
            number = {key: as_int(each) for key, each in fields_of(as_bytes(field.value)).items()}
            start, end = number.get(VMA_START, 0), number.get(VMA_END, 0)
            status, shmid = number.get(VMA_STATUS, 0), number.get(VMA_SHMID, 0)
            if status & VMA_ANON_SHARED:
                yield Mapped(start, end, "shared", "", shmid)
            elif status & (VMA_FILE_SHARED | VMA_FILE_PRIVATE):
                name = known.by_number.get(shmid, OpenFile("reg", "")).name
                if status & VMA_FILE_SHARED:
                    yield Mapped(start, end, "shared", name, known.memory.get(shmid, 0))
                else:
                    yield Mapped(start, end, "file", name)
            elif status & VMA_HEAP:
                yield Mapped(start, end, "heap", "")
            elif start <= stack < end:
                yield Mapped(start, end, "stack", "")
            else:
                is_kernels = status & (VMA_VDSO | VMA_VVAR)
                yield Mapped(start, end, "anon", "[vdso]" if is_kernels else "")
