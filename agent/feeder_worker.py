"""The worker of a feeder: answers page faults, and fills in everything else behind them.

The one thing to know: what a process does to its mappings (fork, mremap, munmap, madvise) is told
as an event, and until that is read the kernel refuses to fill (EAGAIN). So reading events and
filling in exclude each other (`Memory.lock`): what is filled in is always meant for where it goes.
Known gap of the kernel's interface: when two threads mremap and fork at the same time, the events
may come in the other order, and what the child lacks is then looked for at the old address.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from krgfs.errors import Damaged

from . import feeder_uffd as uffd
from .feeder_journal import CLOSED, TASK, Journal
from .feeder_pages import Lacking, Run
from .feeder_source import PageSource
from .feeder_uffd import PAGE, Event

FILLERS = 2
FAULT_BYTES = 128 << 10  # what comes with the page that somebody waits for
FILL_BYTES = 1 << 20
PAUSE_S = 0.0005  # until an event that is under way can be read
PATIENCE_S = 120.0  # with a source that cannot be read
SAID_EVERY_S = 0.2

log = logging.getLogger("feeder")


class Buffer:
    """Memory of ours that the kernel copies from."""

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))


class Memory:
    """One address space, and what it lacks. `lock` is held to read what the kernel tells of it, and
    to fill it."""

    def __init__(self, fd: int, lacking: Lacking, begin: int = 0) -> None:
        self.fd = fd
        self.lacking = lacking
        self.lock = threading.Lock()
        self.faults: deque[int] = deque()
        self.claims = 0  # pieces that fillers have in their hands
        self.cursor = begin  # where the next piece is looked for
        self.is_gone = False

    @property
    def is_done(self) -> bool:
        return self.is_gone or not self.lacking.bytes

    def follow(self, told: Event) -> Memory | None:
        """Take account of an event; returns the child's memory where that was a fork."""
        match told.kind:
            case uffd.FORK:
                return Memory(told.a, self.lacking.forked())
            case uffd.REMAP:
                self.lacking.move(told.a, told.b, told.c)
            case uffd.REMOVE | uffd.UNMAP:
                self.lacking.drop(told.a, told.b)
        return None

    def put(self, run: Run, address: int) -> bool:
        """Fill in what is still lacking of a run, whose content is at `address`. Returns False
        where an event has to be read first; call again then. Holds `lock`."""
        for part in self.lacking.parts(run.start, run.end):
            if part.is_part_of(run) and not self._put(part, address + part.start - run.start):
                return False
        return True

    def _put(self, part: Run, address: int) -> bool:
        at, span, missed = part.start, part.end - part.start, -1
        while at < part.end and not self.is_gone:
            span = min(span, part.end - at)
            copied, error = uffd.copy(self.fd, at, address + at - part.start, span)
            match error:
                case 0:
                    pass
                case errno.EEXIST:  # from an earlier worker, say
                    copied = PAGE
                case errno.ENOENT if span > PAGE:  # mprotect(2) and others split mappings
                    span = max(PAGE, span // 2 // PAGE * PAGE)
                case errno.ENOENT if missed != at:  # the kernel looks for events first: ask again
                    missed = at
                case errno.ENOENT:
                    copied = PAGE
                case errno.ESRCH:
                    self.is_gone = True
                case errno.EAGAIN | errno.ENOMEM:
                    return False
                case _:
                    raise OSError(error, f"cannot fill {span} bytes at {at:#x}")
            if copied:
                self.lacking.drop(at, at + copied)
                at += copied
                span = max(span, FAULT_BYTES)
        return True

    def put_zero(self, address: int) -> bool:
        """Give a page that is not of the image; returns False as `put` does. Holds `lock`."""
        error = uffd.zero(self.fd, address)
        if error in (errno.EAGAIN, errno.ENOMEM):
            return False
        if error == errno.ESRCH:
            self.is_gone = True
        elif error:
            uffd.wake(self.fd, address, address + PAGE)
        return True


class Worker:
    """Feeds all that the journal tells of, beginning anew where an earlier worker was killed."""

    def __init__(
        self,
        journal: Journal,
        runs: Mapping[int, Sequence[Run]],
        begins: Mapping[int, int],
        source: PageSource,
        restorer: socket.socket,
        say: Callable[[int, int], None],
    ) -> None:
        self._journal = journal
        self._source = source
        self._restorer = restorer
        self._say = say
        self._is_restored = threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._memories = self._replayed(runs, begins)
        self._total = total_bytes(runs.values())
        self._buffer = Buffer(FAULT_BYTES)
        self._poll = select.epoll()

    def _replayed(
        self, runs: Mapping[int, Sequence[Run]], begins: Mapping[int, int]
    ) -> dict[int, Memory]:
        found: dict[int, Memory] = {}
        for fd, told in self._journal.replayed():
            match told.kind:
                case kind if kind == TASK:
                    lacking = Lacking(runs.get(told.a, ()))
                    found[fd] = Memory(fd, lacking, begins.get(told.a, 0))
                case kind if kind == CLOSED:
                    found.pop(fd, None)
                case _ if fd in found:
                    child = found[fd].follow(told)
                    if child is not None:
                        found[child.fd] = child
        return found

    def run(self) -> None:
        """Return when every address space has all its memory, or is gone. Raises Damaged where
        that cannot be; whatever else it raises is a defect, and another worker may do better."""
        for memory in self._memories.values():
            self._poll.register(memory.fd, select.EPOLLIN)
            uffd.wake(memory.fd)  # who waits was told of to an earlier worker
        self._poll.register(self._restorer, select.EPOLLIN)
        self._poll.register(self._wake_fd, select.EPOLLIN)
        fillers = [threading.Thread(target=self._fill, daemon=True) for _ in range(FILLERS)]
        for filler in fillers:
            filler.start()
        said = 0.0
        while any(filler.is_alive() for filler in fillers) and self._failure is None:
            for fd, _ in self._poll.poll(SAID_EVERY_S):
                if fd in self._memories:
                    self._answer(self._memories[fd])
                elif fd == self._wake_fd:
                    os.eventfd_read(fd)
                elif fd == self._restorer.fileno():  # CRIU is done, or is no more
                    self._poll.unregister(fd)
                    self._is_restored.set()
            for memory in [each for each in self._memories.values() if each.is_gone]:
                self._leave(memory)
            if time.monotonic() - said > SAID_EVERY_S:
                self._say(self._total - self._lacking_bytes(), self._total)
                said = time.monotonic()
        if self._failure is not None:
            raise self._failure
        self._say(self._total, self._total)

    def _lacking_bytes(self) -> int:
        memories = list(self._memories.values())
        return min(self._total, sum(each.lacking.bytes for each in memories if not each.is_gone))

    # -- faults

    def _answer(self, memory: Memory) -> None:
        """Read what is told of an address space, and give what somebody waits for."""
        self._listen(memory)
        while memory.faults and not memory.is_gone:
            if not self._give(memory, memory.faults[0]):
                time.sleep(PAUSE_S)
            else:
                memory.faults.popleft()
            self._listen(memory)

    def _listen(self, memory: Memory) -> None:
        while not memory.is_gone:
            with memory.lock:
                told = self._journal.take(memory.fd)
                child = memory.follow(told) if told is not None else None
            if told is None:
                return
            if told.kind == uffd.PAGEFAULT:
                memory.faults.append(told.b - told.b % PAGE)
            elif child is not None:
                with self._changed:
                    self._memories[child.fd] = child
                    self._changed.notify_all()
                self._poll.register(child.fd, select.EPOLLIN)

    def _give(self, memory: Memory, address: int) -> bool:
        with memory.lock:
            run = memory.lacking.around(address, FAULT_BYTES)
            if run is None:
                return memory.put_zero(address)
        self._read(run, self._buffer)
        with memory.lock:
            done = memory.put(run, self._buffer.address)
            if done and not memory.is_gone:  # it may have been filled in before it was waited for
                uffd.wake(memory.fd, address, address + PAGE)
        return done

    def _leave(self, memory: Memory) -> None:
        """Close what fills no memory any more."""
        self._poll.unregister(memory.fd)
        with self._changed:
            del self._memories[memory.fd]
            self._changed.notify_all()
        self._journal.closed(memory.fd)
        with memory.lock:
            os.close(memory.fd)

    # -- all the rest

    def _fill(self) -> None:
        try:
            self._is_restored.wait()  # what is not registered yet cannot be filled in
            buffer = Buffer(FILL_BYTES)
            while (claim := self._claim()) is not None:
                memory, run = claim
                try:
                    self._fill_in(memory, run, buffer)
                finally:
                    with self._changed:
                        memory.claims -= 1
                        self._changed.notify_all()
        except BaseException as exc:
            self._failure = self._failure or exc
        os.eventfd_write(self._wake_fd, 1)

    def _claim(self) -> tuple[Memory, Run] | None:
        """Return what to fill in next, None when nothing lacks anything."""
        with self._changed:
            while True:
                waiting = [each for each in self._memories.values() if not each.is_done]
                for memory in waiting:
                    with memory.lock:
                        run = memory.lacking.next(memory.cursor, FILL_BYTES)
                        if run is None and not memory.claims:  # what moved meanwhile
                            run = memory.lacking.next(0, FILL_BYTES)
                    if run is not None:
                        memory.cursor = run.end
                        memory.claims += 1
                        return memory, run
                if not waiting or self._failure is not None:
                    return None
                self._changed.wait()

    def _fill_in(self, memory: Memory, run: Run, buffer: Buffer) -> None:
        self._read(run, buffer)
        while True:
            with memory.lock:
                if memory.is_gone or memory.put(run, buffer.address):
                    return
            time.sleep(PAUSE_S)

    def _read(self, run: Run, buffer: Buffer) -> None:
        """Read what a run says; a source that cannot be read now is asked again and again."""
        deadline = time.monotonic() + PATIENCE_S
        pause_s = 0.05
        while True:
            try:
                file, length = f"pages-{run.file}.img", run.end - run.start
                return self._source.read_into(file, run.offset, buffer.view[:length])
            except OSError as exc:
                if time.monotonic() + pause_s > deadline:
                    raise Damaged(f"the pages of the image cannot be read: {exc}") from exc
                log.warning("unreadable file=%s offset=%d error=%r", file, run.offset, exc)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)


def total_bytes(runs: Iterable[Iterable[Run]]) -> int:
    """Return how much memory there is in all runs."""
    return sum(run.end - run.start for each in runs for run in each)
