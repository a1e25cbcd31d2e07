"""What the feeder is made of, without CRIU: what is lacking, the journal, and real userfaultfds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import feeder
from agent import feeder_uffd as uffd
from agent.criu_format import LENGTH, VARINT, Field, build
from agent.criu_images import COMMON_MAGIC, PAGEMAP_MAGIC
from agent.feeder_journal import CLOSED, RECORD_BYTES, TASK, Journal
from agent.feeder_pages import Lacking, Run
from agent.feeder_process import clone_sharing_files
from agent.feeder_source import Directory, open_source
from agent.feeder_worker import Worker
from krgfs.errors import BadWords, Damaged, EngineFailed, Unsupported

PAGE = mmap.PAGESIZE
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # fork, remap, remove, unmap
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfds need root")


# -- what is lacking

places = st.integers(0, 40)
lengths = st.integers(1, 12)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("drop"), places, places, lengths),
        st.tuples(st.just("move"), places, places, lengths),
    ),
    max_size=12,
)


@given(st.lists(st.tuples(lengths, lengths), max_size=6), steps)
def test_lacking_is_as_a_table_of_pages_would_have_it(
    laid: list[tuple[int, int]], steps: list[tuple[str, int, int, int]]
) -> None:
    runs, at, offset = [], 0, 0
    for gap, length in laid:
        at += gap
        runs.append(Run(at, at + length, 1, offset))
        at, offset = at + length, offset + length
    lacking = Lacking(runs)
    pages = {run.start + n: run.offset + n for run in runs for n in range(run.end - run.start)}
    for step, start, to, length in steps:
        if step == "drop":
            lacking.drop(start, start + length)
            pages = {at: each for at, each in pages.items() if not start <= at < start + length}
        elif not start - length < to < start + length:
            moved = {at: each for at, each in pages.items() if start <= at < start + length}
            lacking.move(start, to, length)
            pages = {
                at: each
                for at, each in pages.items()
                if not (start <= at < start + length or to <= at < to + length)
            }
            pages |= {at + to - start: each for at, each in moved.items()}
    found = {
        run.start + n: run.offset + n
        for run in lacking.parts(0, 1000)
        for n in range(run.end - run.start)
    }
    assert found == pages
    assert lacking.bytes == len(pages)
    for address in range(60):
        run = lacking.around(address, 8)
        assert (run is not None) == (address in pages)
        following = lacking.next(address, 3)
        assert (following is None) == (not any(at >= address for at in pages))
        assert following is None or 0 < following.end - following.start <= 3


def test_a_child_lacks_nothing_of_what_is_wiped_on_fork() -> None:
    lacking = Lacking([Run(0, 8, 1, 0), Run(8, 16, 1, 8, is_inherited=False)])
    assert lacking.forked().parts(0, 100) == [Run(0, 8, 1, 0)]


def test_a_part_that_moved_is_no_part_any_more() -> None:
    whole = Run(100, 200, 1, 0)
    assert whole.clipped(120, 130).is_part_of(whole)
    assert not Run(120, 130, 1, 0).is_part_of(whole)
    assert not Run(120, 130, 2, 20).is_part_of(whole)


# -- the journal


def test_the_journal_is_read_again_by_who_comes_later() -> None:
    journal = Journal(1 << 16)
    journal.task(7, 1234)
    journal.closed(7)
    told = list(journal.replayed())
    assert [(fd, each.kind, each.a) for fd, each in told] == [(7, TASK, 1234), (7, CLOSED, 0)]
    journal.task(8, 99)
    assert len(list(journal.replayed())) == 3
    assert journal.is_whole


def test_a_journal_without_room_says_so() -> None:
    journal = Journal(64 + 3 * RECORD_BYTES)
    for number in range(3):
        journal.task(number, 1)
    assert journal.is_whole
    journal.task(3, 1)
    assert not journal.is_whole


# -- real userfaultfds, of a child of ours that does as a restored task would


class Child:
    """A process with `pages` registered pages, whose userfaultfd we have; `ask` has it do a step
    and returns what that found."""

    def __init__(self, pages: int) -> None:
        self.ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.ours.close()
                _be_restored(theirs, pages)
            finally:
                os._exit(0)
        theirs.close()
        word, fds, _, _ = socket.recv_fds(self.ours, 8, 1)
        (self.base,), (self.fd,) = struct.unpack("=Q", word), fds

    def ask(self, step: bytes) -> bytes:
        self.ours.send(step)
        return self.ours.recv(1 << 16)

    def end(self) -> None:
        self.ours.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _be_restored(line: socket.socket, pages: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, EVENTS, 0)))
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    asked = bytearray(struct.pack("=QQQQ", base, pages * PAGE, 1, 0))
    fcntl.ioctl(fd, UFFDIO_REGISTER, asked)
    socket.send_fds(line, [struct.pack("=Q", base)], [fd])
    os.close(fd)
    while step := line.recv(100):
        if step == b"wipe":
            memory.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        elif step == b"fork" and os.fork() == 0:
            step = b"look"
        line.send(b"".join(memory[n * PAGE : n * PAGE + 1] for n in range(pages)))


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child(8)
    yield made
    made.end()


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    content = b"".join(bytes([65 + n]) * PAGE for n in range(8))
    (tmp_path / "pages-1.img").write_bytes(content)
    return tmp_path


class Fed:
    """A worker in a thread of ours; `released` is CRIU's call that it is done."""

    def __init__(self, child: Child, place: Path, journal: Journal) -> None:
        self.said: list[tuple[int, int]] = []
        theirs, self.released = socket.socketpair()
        runs = {1: [Run(child.base, child.base + 7 * PAGE, 1, 0)]}
        self.failure: BaseException | None = None
        self._worker = Worker(
            journal, runs, {}, Directory(str(place)), theirs, lambda *said: self.said.append(said)
        )
        self._theirs = theirs
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.run()
        except Damaged as exc:
            self.failure = exc

    def end(self) -> None:
        self.released.close()
        self._thread.join()
        self._theirs.close()


@needs_root
def test_memory_comes_at_the_fault_and_behind_it(child: Child, pages: Path) -> None:
    journal = Journal(1 << 16)
    journal.task(child.fd, 1)
    fed = Fed(child, pages, journal)
    assert child.ask(b"look") == b"ABCDEFG\0"  # the last page is of the mapping, not of the image
    fed.end()
    assert fed.said[-1] == (7 * PAGE, 7 * PAGE)
    os.close(child.fd)
    assert child.ask(b"look") == b"ABCDEFG\0"


@needs_root
def test_a_later_worker_knows_what_was_told_to_an_earlier_one(child: Child, pages: Path) -> None:
    journal = Journal(1 << 16)
    journal.task(child.fd, 1)
    asked = threading.Thread(target=child.ours.send, args=(b"wipe",))
    asked.start()
    deadline = time.monotonic() + 10
    while (told := journal.take(child.fd)) is None or told.kind == uffd.PAGEFAULT:
        assert time.monotonic() < deadline
    asked.join()
    assert told == (uffd.REMOVE, child.base, child.base + PAGE, 0)  # and that worker was killed
    fed = Fed(child, pages, journal)
    assert child.ours.recv(100) == b"\0BCDEFG\0"
    fed.end()
    os.close(child.fd)


@needs_root
def test_damage_is_raised_and_nothing_is_let_go(child: Child, pages: Path) -> None:
    journal = Journal(1 << 16)
    journal.task(child.fd, 1)
    os.truncate(pages / "pages-1.img", PAGE)
    fed = Fed(child, pages, journal)
    child.ours.send(b"look")
    fed.end()
    assert "before its pages do" in str(fed.failure)
    child.ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        child.ours.recv(100)
    os.close(child.fd)


@needs_root
def test_the_kernel_tells_who_is_gone(child: Child) -> None:
    ours = mmap.mmap(-1, PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(ours))
    assert not uffd.is_gone(child.fd)
    assert uffd.copy(child.fd, child.base, at, PAGE) == (PAGE, 0)
    assert uffd.copy(child.fd, child.base, at, PAGE) == (0, errno.EEXIST)
    assert uffd.copy(child.fd, uffd.LOWEST, at, PAGE) == (0, errno.ENOENT)
    assert uffd.zero(child.fd, child.base + PAGE) == 0
    assert child.fd > 2 and uffd.is_one(child.fd)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert uffd.is_gone(child.fd)
    assert uffd.zero(child.fd, child.base) == errno.ESRCH
    os.close(child.fd)


def test_what_one_opens_outlives_it_in_the_other() -> None:
    """In a process of its own: cloning shares our descriptors too."""
    single = os.fork()
    if single == 0:
        code = 1
        try:
            pid = clone_sharing_files()
            if pid == 0:
                os.dup2(os.open("/dev/full", os.O_RDONLY), 99)
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(pid, 0)
            code = 0 if os.readlink("/proc/self/fd/99") == "/dev/full" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(single, 0)[1]) == 0


# -- sources and staging


def test_sources_are_named_by_a_word(pages: Path) -> None:
    source = open_source(f"directory:{pages}")
    buffer = memoryview(bytearray(PAGE + 1))
    source.read_into("pages-1.img", 2 * PAGE - 1, buffer)
    assert bytes(buffer) == b"B" + b"C" * PAGE
    with pytest.raises(Damaged, match=r"pages-7\.img is missing"):
        source.read_into("pages-7.img", 0, buffer)
    assert isinstance(source, Directory)
    source.close()
    with pytest.raises(BadWords, match="magnet"):
        open_source("magnet:x")


def test_pages_of_another_image_cannot_be_lazy(tmp_path: Path) -> None:
    entry = build([Field(1, VARINT, PAGE), Field(2, VARINT, 1), Field(4, VARINT, 1)])
    head = build([Field(1, VARINT, 1)])
    magics = LENGTH.pack(COMMON_MAGIC) + LENGTH.pack(PAGEMAP_MAGIC)
    body = b"".join(LENGTH.pack(len(each)) + each for each in (head, entry))
    (tmp_path / "pagemap-1.img").write_bytes(magics + body)
    with pytest.raises(Unsupported, match="in another image"):
        feeder.stage(tmp_path, tmp_path, Directory("/"))


def test_a_feeder_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="cannot start a feeder"):
        feeder.start(tmp_path / "gone", tmp_path, feeder.Staged(0, {}, {}, 0), "directory:/")
    assert feeder.progress(tmp_path) is None
