"""CRIU's image streamer, in our own process: what CRIU dumps arrives in memory, what it restores
comes from there.

CRIU connects to a socket in its images directory and names its files one after the other; each
comes or goes through a pipe of its own, several at once and in any order (criu/img-streamer.c and
images/img-streamer.proto of CRIU 4.2). The one thing to know: a CRIU that is done and one that was
killed look the same from here, pipes and socket reach their end. Whether what came is whole is
known only from CRIU's exit code or its post-dump script.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import termios
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from krgfs.errors import EngineFailed

from .buffers import Buffers, Piece
from .stream_line import Line, Thread

CAPTURE_SOCKET, SERVE_SOCKET = "streamer-capture.sock", "streamer-serve.sock"
LAST_FILE = "inventory.img"  # is opened when all else is dumped (cr_dump_tasks)
COUNTED = "pages-"  # begins the names of those whose length CRIU knows from others
SMALL_BYTES = 1 << 16
TAIL_MS = 1
SPLICE_F_NONBLOCK = 2

Drained = Callable[[bool], None]
"""Is told once, in a thread of the capture, that all which CRIU sent has been read, or that nothing
will be any more. Until then the tree must not run: CRIU puts its memory itself into the pipes, not
a copy (vmsplice(2), splice(2)), and what a tree that runs on changes there would be torn."""

Sink = Callable[[Piece], None]
"""Takes pieces, in a thread of the capture, which waits for it. One that raises has not kept the
piece; the capture has then failed, and CRIU fails at its next write and lets the tree run."""


class Source(Protocol):
    """What is served; called from several threads."""

    def pieces(self, file: str) -> Iterable[Piece] | None:
        """Return the content of a file, or None where there is none of that name.

        The pieces of a page file (`pages-*`) are asked for as CRIU reads on, and given back when it
        has them; until then their memory must not change, CRIU reads from it. PIPE_BYTES and two
        pieces of each file that is being read are out at a time, so wait for no buffer unless there
        are as many. Of any other file all are taken before the first is sent: cut off, such a file
        could pass as whole. Raises what is wrong with the image; the restore then fails. The same
        file may be asked for again.
        """
        ...


# -- dump: from CRIU into a sink


class Capture:
    """A dump on its way into memory."""

    def __init__(self, drain: _Drain) -> None:
        self._drain = drain

    @property
    def drained_bytes(self) -> int:
        """How much has come so far."""
        return self._drain.drained_bytes

    def stop(self) -> None:
        """Take nothing any more: CRIU fails at its next write, and lets the tree go in order."""
        self._drain.line.stop()
        self._drain.buffers.look_again()

    def check(self) -> None:
        """Raise what the sink or the stream has failed with, if they have; see `whole`."""
        self._drain.line.check()

    async def whole(self, code: int) -> dict[str, int]:
        """Return the names and sizes in bytes of all that CRIU dumped; the sink has it all by then.

        `code` is CRIU's exit code, or 0 where its post-dump script asks: nothing else tells a dump
        that is done from one that was cut off. Raises what the sink raised, if that is a KrgError,
        and else EngineFailed.
        """
        if code == 0:
            self._drain.ask()
            await self._drain.thread.ended.wait()
        self._drain.line.check()
        if code != 0:
            raise EngineFailed(f"CRIU ended with code {code}: what it had dumped is no image")
        return self._drain.sizes


@contextlib.asynccontextmanager
async def capture(
    directory: Path, buffers: Buffers, sink: Sink, drained: Drained = lambda whole: None
) -> AsyncIterator[Capture]:
    """Take what one CRIU, told to stream into `directory`, dumps, for as long as the body runs.

    The body lets CRIU run, waits for it, and asks `whole`. A file of up to SMALL_BYTES comes as a
    copy and costs no buffer; the rest in buffers, and where none is free CRIU waits. Leaving, by
    whatever way, makes a CRIU that is still at work fail and let the tree run on (pipes and socket
    close), gives back what the sink did not get, and leaves no thread, descriptor or socket.
    Raises EngineFailed where there can be no socket in `directory`.
    """
    with contextlib.closing(Line(directory / CAPTURE_SOCKET)) as line:
        drain = _Drain(line, buffers, sink, drained)
        drain.thread.start()
        try:
            yield Capture(drain)
        finally:
            line.stop()
            buffers.look_again()
            await drain.thread.join()


@dataclass(slots=True)
class _Incoming:
    name: str
    index: int | None = None  # of the buffer that is being filled
    used: int = 0
    offset: int = 0  # of that buffer in the file

    @property
    def size(self) -> int:
        return self.offset + self.used


class _Drain:
    """The thread that reads whatever pipe has something: CRIU writes them from one thread too."""

    def __init__(self, line: Line, buffers: Buffers, sink: Sink, drained: Drained) -> None:
        self.line = line
        self.sizes: dict[str, int] = {}
        self.drained_bytes = 0
        self.thread = Thread("capture", self._run)
        self.buffers = buffers
        self._sink = sink
        self._drained: Drained | None = drained
        self._open: dict[int, _Incoming] = {}
        self._is_asked = False

    def ask(self) -> None:
        """Have the thread end once all is read that CRIU has sent."""
        self._is_asked = True
        self.line.wake()

    def _run(self) -> None:
        try:
            with self.line.failing():
                if self.line.accept():
                    self._drain()
                if self._is_asked and LAST_FILE not in self.sizes:
                    raise EngineFailed(f"CRIU dumped no {LAST_FILE}: what came is no image")
        finally:
            self._tell(False)
            self.line.drop()
            for fd, file in self._open.items():
                os.close(fd)
                if file.index is not None:
                    self.buffers.give_back(file.index)

    def _drain(self) -> None:
        with select.epoll() as poll:
            poll.register(self.line.connection, select.EPOLLIN)
            poll.register(self.line.wake_fd, select.EPOLLIN)
            while not self.line.is_stopped:
                is_last_look = self._is_asked and not self._open
                events = poll.poll(0 if is_last_look else None)
                if is_last_look and not events:
                    return
                for fd, event in events:
                    if fd in self._open:
                        self._read(poll, fd, event)
                    elif fd == self.line.wake_fd:
                        os.eventfd_read(fd)
                    else:
                        self._accept_file(poll)
                if LAST_FILE in self.sizes and not self._open:
                    self._tell(True)

    def _tell(self, whole: bool) -> None:
        if self._drained is not None:
            self._drained(whole)
        self._drained = None

    def _accept_file(self, poll: select.epoll) -> None:
        name = self.line.request()
        if name is None:
            poll.unregister(self.line.connection)
            return
        fd = self.line.pipe(name, os.O_RDONLY)
        self._open[fd] = _Incoming(name)
        if name in self.sizes:
            raise EngineFailed(f"CRIU dumped {name} twice")
        self.sizes[name] = 0
        poll.register(fd, select.EPOLLIN)

    def _read(self, poll: select.epoll, fd: int, event: int) -> None:
        file = self._open[fd]
        if not event & select.EPOLLIN:  # empty, and nobody writes any more: pipe(7)
            poll.unregister(fd)
            self._end(file)
            del self._open[fd]
            os.close(fd)
            return
        if file.index is None:
            file.index = self._lend()
        if file.index is None:
            return
        buffer = self.buffers[file.index]
        count = os.readv(fd, [buffer[file.used :]])
        file.used += count
        self.drained_bytes += count
        if file.used == len(buffer):
            self._hand_over(file)

    def _lend(self) -> int | None:
        """Where no buffer is free, hand over the half full ones: all may be in our own hands."""
        found = self.buffers.lend()
        if found is None:
            for file in self._open.values():
                self._hand_over(file)
            found = self.buffers.lend(unless=lambda: self.line.is_stopped)
        return found

    def _end(self, file: _Incoming) -> None:
        self.sizes[file.name] = file.size
        if file.index is not None and file.used <= SMALL_BYTES:
            copy = bytes(self.buffers[file.index][: file.used])
            self.buffers.give_back(file.index)
            file.index = None
            self._sink(Piece(file.name, file.offset, copy))
        self._hand_over(file)

    def _hand_over(self, file: _Incoming) -> None:
        if file.index is not None and file.used:
            data = self.buffers[file.index][: file.used]
            self._sink(Piece(file.name, file.offset, data, self.buffers, file.index))
            file.index, file.offset, file.used = None, file.size, 0


# -- restore: from a source into CRIU


class Served:
    """A restore on its way out of memory."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def check(self) -> None:
        """Raise what went wrong on our side, if anything did: KrgErrors of the source as they are,
        EngineFailed for all else. CRIU fails then too, and cannot say why."""
        self._line.check()


@contextlib.asynccontextmanager
async def serve(directory: Path, source: Source) -> AsyncIterator[Served]:
    """Give one CRIU, told to stream from `directory`, what it restores, while the body runs.

    The body lets CRIU run and may be left only when that has ended: CRIU takes the end of a pipe
    for the end of the file, and has memory of the source in its pipes. Leaving waits for calls of
    the source that still run, and leaves no thread, descriptor or socket. Raises EngineFailed where
    there can be no socket in `directory`.
    """
    with contextlib.closing(Line(directory / SERVE_SOCKET)) as line:
        server = _Server(line, source)
        server.thread.start()
        try:
            yield Served(line)
        finally:
            line.stop()
            await server.thread.join()


class _Server:
    """The thread that answers requests. What fits into its pipe is written at once; all else has a
    thread of its own, as several tasks read at the same time."""

    def __init__(self, line: Line, source: Source) -> None:
        self.thread = Thread("serve", self._run)
        self._line = line
        self._source = source
        self._writers: list[threading.Thread] = []

    def _run(self) -> None:
        with self._line.failing():
            if self._line.accept():
                while (name := self._line.request()) is not None:
                    self._serve(name)
        self._line.drop()
        for writer in self._writers:
            writer.join()

    def _serve(self, name: str) -> None:
        pieces = self._source.pieces(name)
        if pieces is None:
            self._line.reply(False)
            return
        if name.startswith(COUNTED):
            self._line.reply(True)
            pipe = _Outgoing(name, self._line)
            self._begin(pipe, pipe.lend, pieces)
            return
        pieces = list(pieces)
        try:
            self._line.reply(True)
            pipe = _Outgoing(name, self._line)
            if sum(len(each.data) for each in pieces) > pipe.room:
                self._begin(pipe, pipe.copy, pieces)
                return
        except BaseException:
            for piece in pieces:
                piece.give_back()
            raise
        pipe.copy(pieces)

    def _begin(
        self, pipe: _Outgoing, work: Callable[[Iterable[Piece]], None], pieces: Iterable[Piece]
    ) -> None:
        writer = threading.Thread(target=work, args=(pieces,), name="stream writer")
        try:
            writer.start()
        except BaseException:
            pipe.close()  # CRIU would read for ever
            raise
        self._writers = [each for each in self._writers if each.is_alive()] + [writer]


class _Outgoing:
    """Our end of a pipe that CRIU reads; that it reads to the end is CRIU's affair."""

    def __init__(self, name: str, line: Line) -> None:
        self._fd = line.pipe(name, os.O_WRONLY)
        self._line = line
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._poll.register(line.wake_fd, select.POLLIN)

    def close(self) -> None:
        os.close(self._fd)

    @property
    def room(self) -> int:
        """How much an empty pipe takes."""
        return fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ)

    def copy(self, pieces: Iterable[Piece]) -> None:
        """Write pieces and close. All are given back, also those that CRIU does not want."""
        with self._closing():
            for piece in pieces:
                self._put(piece.data, os.write)
                piece.give_back()

    def lend(self, pieces: Iterable[Piece]) -> None:
        """Let CRIU read from the memory of pieces, then close. Such as were taken are given back
        when they are read: 2.5 times as fast as copying, and steady (512 MiB in a VM)."""
        unread: deque[tuple[int, Piece]] = deque()  # with the offsets where they end
        offset = 0
        try:
            with self._closing():
                for piece in pieces:
                    unread.append((offset + len(piece.data), piece))
                    if not self._put(piece.data, _splice):
                        return
                    offset += len(piece.data)
                    read = offset - self._unread_bytes()
                    while unread and unread[0][0] <= read:
                        unread.popleft()[1].give_back()
                self._poll.modify(self._fd, 0)  # the reader's end is still told
                while self._unread_bytes() and not self._poll.poll(TAIL_MS):
                    pass
        finally:
            for _, piece in unread:
                piece.give_back()

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            with self._line.failing():
                yield
        finally:
            self.close()

    def _put(self, data: memoryview | bytes, write: Callable[[int, memoryview], int]) -> bool:
        """Write all of it; False where nobody reads any more, or ever will."""
        left = memoryview(data)
        try:
            while left:
                self._poll.poll()
                if self._line.is_stopped:
                    return False
                left = left[write(self._fd, left) :]
        except BrokenPipeError:
            return False
        return True

    def _unread_bytes(self) -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)))
        return int(count)


def _splice(fd: int, data: memoryview) -> int:
    """Put memory itself into a pipe, as much as it takes: vmsplice(2), which Python lacks."""
    if data.readonly:
        return os.write(fd, data)
    start = ctypes.addressof(ctypes.c_char.from_buffer(data))
    count = int(_libc.vmsplice(fd, ctypes.byref(_IoVec(start, len(data))), 1, SPLICE_F_NONBLOCK))
    if count < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return count


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.vmsplice.restype = ctypes.c_ssize_t
_libc.vmsplice.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint)
