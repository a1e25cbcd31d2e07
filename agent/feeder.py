"""Restarting a tree that runs before its memory is back: what the agent does for that.

`stage` makes what CRIU restores from, `start` begins the feeder (agent/feeder_process.py, which
needs no agent from then on), and then CRIU restores with the directory of the feeder as its work
directory. Until `progress` says done, the tree must not be dumped: CRIU takes pages that are not
back yet for pages that never were, and the image would lack them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from krgfs import facts
from krgfs.errors import EngineFailed, Unsupported
from krgfs.model import ProcessId

from . import texts
from .criu_format import as_bytes, as_int, entries, fields_of, parse
from .criu_images import COMMON_MAGIC, PAGE_BYTES, PAGEMAP_MAGIC, PSTREE_MAGIC
from .feeder_pages import Run
from .feeder_process import HOLDER, PROGRESS, SPEC, WORKER, Spec
from .feeder_source import PageSource

PROGRAM = (sys.executable, "-m", "agent.feeder_process")
SOCKET, LOG = "lazy-pages.socket", "feeder.log"
PIECE_BYTES = 1 << 20

# fields of pagemap_entry, mm_entry and vma_entry; PE_LAZY and PE_PRESENT
VADDR, COMPAT_COUNT, FLAGS, COUNT = 1, 2, 4, 5
IS_LAZY, IS_PRESENT = 2, 4
MM_MAGIC, MM_ARG_START, MM_VMAS = 0x57492820, 8, 14
VMA_START, VMA_END, VMA_MADVICE = 1, 2, 9
WIPE_ON_FORK = 1 << 18


class Staged(NamedTuple):
    """What `stage` made: what is left to the feeder, and how many bytes CRIU reads itself."""

    processes: int
    runs: dict[int, list[Run]]
    begins: dict[int, int]
    eager_bytes: int

    @property
    def lazy_bytes(self) -> int:
        return sum(run.end - run.start for runs in self.runs.values() for run in runs)


class Progress(msgspec.Struct, frozen=True):
    """How far a feeder is, in bytes; `reason` says why where it failed, and its tree was killed."""

    state: Literal["feeding", "done", "failed"] = "feeding"
    done: int = 0
    total: int = 0
    reason: str = ""


def stage(images: Path, into: Path, source: PageSource) -> Staged:
    """Make in `into` what CRIU restores from while a feeder has the rest. Blocking.

    The small files of `images` are linked, or copied to another filesystem; page files are sparse
    ones that hold what CRIU reads itself (shared memory, changed pages of mapped files, stacks).
    With `into` the same as `images`, which then has no page files, only those are made. Raises
    Damaged where a page map is not whole or as the source does, OSError of the disk.
    """
    if into != images:
        for each in os.scandir(images):
            if each.is_file() and not _is_pages(each.name):
                _link(each.path, into / each.name)
    runs: dict[int, list[Run]] = {}
    begins: dict[int, int] = {}
    eager = 0
    for path in sorted(into.glob("pagemap-*.img")):
        owner = path.stem.removeprefix("pagemap-")
        found = _PageMap(path)
        eager += found.write_eager(into, source)
        if owner.isdecimal():
            mm = next(entries(into / f"mm-{owner}.img", COMMON_MAGIC, MM_MAGIC), b"")
            runs[int(owner)] = list(_inherited(_wiped_on_fork(mm), found.lazy))
            arguments = as_int(fields_of(mm).get(MM_ARG_START, 0))
            begins[int(owner)] = arguments - arguments % PAGE_BYTES
    processes = sum(1 for _ in entries(into / "pstree.img", COMMON_MAGIC, PSTREE_MAGIC))
    return Staged(processes, runs, begins, eager)


def start(
    directory: Path, keeper: Path, staged: Staged, source: str, program: Sequence[str] = PROGRAM
) -> None:
    """Start the feeder of one restore; CRIU may be started when this returns.

    Its files and CRIU's socket are in `directory`, CRIU's work directory; `source` is a word that
    `feeder_source` knows. `keeper` is the directory of the tree's keeper, which need not be there
    yet: the feeder kills what is below that one, should the memory be lost. Raises EngineFailed
    where no feeder can be started. One that CRIU does not call within CALL_S ends by itself.
    """
    spec = Spec(source, str(keeper), staged.processes, staged.runs, staged.begins)
    try:
        (directory / SPEC).write_bytes(msgspec.msgpack.encode(spec))
        with _listener(directory) as listener, open(directory / LOG, "ab") as log:
            words = (*program, str(directory), str(listener.fileno()))
            subprocess.run(
                ["setsid", "-f", *words],  # forks: it is nobody's child
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                cwd="/",
            )
    except (OSError, subprocess.CalledProcessError) as exc:
        raise EngineFailed(f"cannot start a feeder in {directory}: {exc}") from exc


def progress(directory: Path) -> Progress | None:
    """Return how far the feeder in a directory is, None where there was none."""
    said = texts.read(str(directory / PROGRESS))
    if not said:
        return None if not (directory / SPEC).exists() else Progress()
    return msgspec.json.decode(said, type=Progress)


def processes(directory: Path) -> list[ProcessId]:
    """Return the holder and the worker of a feeder, those that live."""
    found = []
    for name in (HOLDER, WORKER):
        words = texts.read(str(directory / name)).split()
        if len(words) == 2 and facts.is_alive(int(words[0]), int(words[1])):
            found.append(ProcessId(pid=int(words[0]), start=int(words[1]), boot=facts.BOOT_ID))
    return found


def _listener(directory: Path) -> socket.socket:
    """Listen where CRIU will call; a path may be longer than the address of a socket."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        made.bind(f"/proc/self/fd/{fd}/{SOCKET}")
        made.listen(1)
    except OSError:
        made.close()
        raise
    finally:
        os.close(fd)
    return made


# -- what is lazy in an image


def _is_pages(name: str) -> bool:
    return name.startswith("pages-")


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


class _PageMap:
    """One page map: what CRIU leaves to a feeder, and what it reads itself."""

    def __init__(self, path: Path) -> None:
        self.lazy: list[Run] = []
        self._eager: list[tuple[int, int]] = []  # offset, bytes
        self._size = 0
        found = entries(path, COMMON_MAGIC, PAGEMAP_MAGIC)
        self._file = as_int(fields_of(next(found, b"")).get(1, 0))
        for entry in found:
            self._add(path, entry)

    def _add(self, path: Path, entry: bytes) -> None:
        number = {key: as_int(value) for key, value in fields_of(entry).items()}
        start, flags = number.get(VADDR, 0), number.get(FLAGS, IS_PRESENT)
        length = number.get(COUNT, number.get(COMPAT_COUNT, 0)) * PAGE_BYTES
        if not flags & IS_PRESENT:
            raise Unsupported(f"{path} has pages that are in another image; lazy=yes takes none")
        if flags & IS_LAZY:
            self.lazy.append(Run(start, start + length, self._file, self._size))
        else:
            self._eager.append((self._size, length))
        self._size += length

    def write_eager(self, into: Path, source: PageSource) -> int:
        """Make the page file, with the pages that CRIU reads itself; returns their bytes."""
        name = f"pages-{self._file}.img"
        buffer = memoryview(bytearray(PIECE_BYTES)) if self._eager else memoryview(b"")
        with open(into / name, "xb") as file:
            for offset, length in self._eager:
                for at in range(offset, offset + length, PIECE_BYTES):
                    part = buffer[: min(PIECE_BYTES, offset + length - at)]
                    source.read_into(name, at, part)
                    os.pwrite(file.fileno(), part, at)
            os.ftruncate(file.fileno(), self._size)
        return sum(length for _, length in self._eager)


def _inherited(wiped: list[tuple[int, int]], runs: list[Run]) -> Iterator[Run]:
    """Yield the runs, cut where memory begins or ends that a child does not get."""
    for run in runs:
        at = run.start
        for start, end in wiped:
            if start < run.end and at < end:
                yield from filter(_has_pages, [run.clipped(at, start)])
                part = run.clipped(max(at, start), end)
                yield part._replace(is_inherited=False)
                at = part.end
        yield from filter(_has_pages, [run.clipped(at, run.end)])


def _has_pages(run: Run) -> bool:
    return run.start < run.end


def _wiped_on_fork(mm: bytes) -> list[tuple[int, int]]:
    found = []
    for field in parse(mm):
        if field.number == MM_VMAS:
            vma = fields_of(as_bytes(field.value))
            if as_int(vma.get(VMA_MADVICE, 0)) & WIPE_ON_FORK:
                found.append((as_int(vma[VMA_START]), as_int(vma[VMA_END])))
    return sorted(found)
