"""The socket that one CRIU streams over, what it says there, and the thread that listens to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import trio

from krgfs.errors import EngineFailed, KrgError

from . import durable
from .criu_format import LENGTH, VARINT, Field, as_bytes, build, fields_of

NAME, EXISTS = 1, 1  # fields of img_streamer_request_entry and img_streamer_reply_entry
MAX_REQUEST_BYTES = 8192
PIPE_BYTES = 1 << 20


class Thread:
    """A thread whose end a task can wait for. `work` must not raise."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.ended = trio.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, name=f"stream {name}")

    def start(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            del self._work  # it holds us, and with us all the memory that was captured into
            self._token.run_sync_soon(self.ended.set)

    async def join(self) -> None:
        with trio.CancelScope(shield=True):
            await self.ended.wait()
        self._thread.join()


class Line:
    """A socket for one CRIU, and what it says there.

    Its thread blocks only where `stop` reaches it. The first failure of any thread is kept, and
    ends the conversation: CRIU fails at the next file that it wants.
    """

    def __init__(self, path: Path) -> None:
        self.is_stopped = False
        self._failure: Exception | None = None
        self._path = path
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid)  # CRIU may run as the tree's own user
            self._listener.listen(1)
        except OSError as exc:
            self._listener.close()
            os.close(self.wake_fd)
            raise EngineFailed(f"cannot listen for CRIU at {path}: {exc}") from exc

    # of any thread

    def stop(self) -> None:
        """Have all threads end; what they do not get done any more is no failure."""
        self.is_stopped = True
        self.wake()
        self._hang_up()

    def wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Keep what is raised, for `check`, and hang up."""
        try:
            yield
        except Exception as exc:
            if not self.is_stopped:
                self._failure = self._failure or exc
                self._hang_up()

    def check(self) -> None:
        """Raise what was kept: a KrgError as it is, all else as one that says so."""
        if self._failure is None or isinstance(self._failure, KrgError):
            failure = self._failure
        elif isinstance(self._failure, OSError):
            with durable.explained("CRIU's images could not be streamed"):
                raise self._failure
        else:
            failure = EngineFailed(f"CRIU's images could not be streamed: {self._failure!r}")
            failure.__cause__ = self._failure
        if failure is not None:
            raise failure

    def _hang_up(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)

    # of the thread that listens

    def close(self) -> None:
        """Once its threads have ended."""
        self.drop()
        os.close(self.wake_fd)

    def drop(self) -> None:
        """Hang up for good. What CRIU sent and nobody received would otherwise keep its pipes
        open, and itself writing into them for ever."""
        with self._lock:
            for each in (self._connection, self._listener):
                if each is not None:
                    each.close()
        self._path.unlink(missing_ok=True)

    def accept(self) -> bool:
        """Wait for CRIU; False when woken and it has not come."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self.wake_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._listener.fileno() not in ready:
            return False
        self._connection, _ = self._listener.accept()
        self._listener.close()
        return not self.is_stopped

    @property
    def connection(self) -> socket.socket:
        assert self._connection is not None
        return self._connection

    def request(self) -> str | None:
        """Return the name of the next file; None when there will be none."""
        head = self._receive(LENGTH.size)
        if not head:
            return None
        (size,) = LENGTH.unpack(head)
        if size > MAX_REQUEST_BYTES:
            raise EngineFailed(f"CRIU's request for a file has {size} bytes")
        body = self._receive(size)
        name = os.fsdecode(as_bytes(fields_of(body).get(NAME, b"")))
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise EngineFailed(f"CRIU asks for a file named {name!r}")
        return name

    def reply(self, exists: bool) -> None:
        said = build([Field(EXISTS, VARINT, int(exists))])
        self.connection.sendall(LENGTH.pack(len(said)) + said)

    def pipe(self, name: str, mode: int) -> int:
        """Return our end of the pipe for a file, as wide as may be, non-blocking."""
        _, fds, _, _ = socket.recv_fds(self.connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise EngineFailed(f"CRIU asked for {name} and gave no pipe for it")
        fd = fds[0]
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        if not is_pipe or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != mode:
            os.close(fd)
            raise EngineFailed(f"what CRIU gave for {name} is not the end of a pipe")
        with contextlib.suppress(OSError):  # beyond what a user may have in pipes: pipe(7)
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _pipe_bytes())
        os.set_blocking(fd, False)
        return fd

    def _receive(self, size: int) -> bytes:
        """Receive so many bytes and no more: a pipe may come with the next. Empty at the end."""
        said = self.connection.recv(size, socket.MSG_WAITALL)
        if said and len(said) < size:
            raise EngineFailed("CRIU ended in the middle of a request")
        return said


@cache
def _pipe_bytes() -> int:
    return min(PIPE_BYTES, int(Path("/proc/sys/fs/pipe-max-size").read_text()))
