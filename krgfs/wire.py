"""Frames between agent and mount (and, later, between agents): msgpack behind a 4-byte length.

Everything that comes in is bounded here (`MAX_FRAME`) and typed by msgspec before anybody sees it.
A `Channel` works over any trio stream; it sends whole frames from several tasks at once and is read
by one.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec
import trio

from .errors import Fate, KrgError, Unreachable, from_errno
from .model import App, Caller, Event, Image, ImageFile, Import, Job, LogLine, Node, Store, Tree

PROTOCOL = 1
MAX_FRAME = 8 * 1024 * 1024
MAX_DATA = 1024 * 1024
RECEIVE_BYTES = 64 * 1024
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; not in Python's socket
_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all frames."""


# -- from the mount to the agent. `id` numbers the requests of a connection; each gets one answer.


class Hello(Message, frozen=True, kw_only=True):
    """First frame of a connection. `holding` are the jobs (freeze while-open) whose handles are
    open in this mount."""

    protocol: int
    holding: list[int] = []


class Request(Message, frozen=True, kw_only=True):
    id: int
    caller: Caller


class Submit(Request, frozen=True, kw_only=True):
    """A line written into a verb file. `object` is the path of its directory below /krg
    (procs/PID, jobs/ID, or empty for the root). Answered by Accepted."""

    verb: str
    object: str
    text: str
    start: int = 0


class Interrupt(Request, frozen=True, kw_only=True):
    """The caller of `job` was interrupted. Fatal: cancel it; else cancel it unless the caller
    writes the same again within a second. Answered by Done."""

    job: int
    fatal: bool


class Closed(Request, frozen=True, kw_only=True):
    """The handle that `job` came through was closed (freeze while-open). Answered by Done."""

    job: int


class JobLog(Request, frozen=True, kw_only=True):
    """Answered by Data: what CRIU said in `job`, the lines that matter first."""

    job: int


class ListFiles(Request, frozen=True, kw_only=True):
    """Answered by Files: the files of an image, or of an import (name vN or vN.part)."""

    app: str
    name: str


class ReadFile(Request, frozen=True, kw_only=True):
    """Answered by Data: up to `size` (at most MAX_DATA) bytes at `offset` of a file of an image."""

    app: str
    name: str
    file: str
    offset: int
    size: int


class MakeApp(Request, frozen=True, kw_only=True):
    """mkdir images/APP. Answered by Done."""

    app: str


class RemoveApp(Request, frozen=True, kw_only=True):
    """rmdir images/APP, only when no version is left. Answered by Done."""

    app: str


class BeginImport(Request, frozen=True, kw_only=True):
    """mkdir images/APP/vN[.part]. Answered by Done."""

    app: str
    name: str


class WriteFile(Request, frozen=True, kw_only=True):
    """Create `file` of an import, and write `data` at `offset`. Answered by Done."""

    app: str
    name: str
    file: str
    offset: int
    data: bytes


class TruncateFile(Request, frozen=True, kw_only=True):
    """Set the size of `file` of an import. Answered by Done."""

    app: str
    name: str
    file: str
    size: int


class CloseFile(Request, frozen=True, kw_only=True):
    """A file of an import was closed after writing: the import commits itself when all that its
    manifest names is there and matches. Answered by Done."""

    app: str
    name: str
    file: str


class RemoveFile(Request, frozen=True, kw_only=True):
    """unlink of a file of an import. Answered by Done."""

    app: str
    name: str
    file: str


class CommitImport(Request, frozen=True, kw_only=True):
    """mv vN.part vN. Answered by Done."""

    app: str
    name: str
    to: str


class RemoveVersion(Request, frozen=True, kw_only=True):
    """rmdir of a version or of an import. Answered by Done."""

    app: str
    name: str


class SetLabel(Request, frozen=True, kw_only=True):
    """ln -s VERSION LABEL (`version` is vN). Answered by Done."""

    app: str
    label: str
    version: str


class RemoveLabel(Request, frozen=True, kw_only=True):
    """rm LABEL. Answered by Done."""

    app: str
    label: str


class SetPolicy(Request, frozen=True, kw_only=True):
    """What was written into images/APP/policy. Answered by Done."""

    app: str
    text: str


class Released(Message, frozen=True, kw_only=True):
    """All pending requests of the pids of a Release have been answered."""

    ticket: int


# -- from the agent to the mount


class Welcome(Message, frozen=True, kw_only=True):
    protocol: int
    node: str
    version: str


class Accepted(Message, frozen=True, kw_only=True):
    """The job that a Submit started or joined. `member`: the writer is part of the tree, answer it
    at once."""

    id: int
    job: int
    member: bool = False


class Done(Message, frozen=True, kw_only=True):
    id: int
    text: str = ""


class Data(Message, frozen=True, kw_only=True):
    id: int
    data: bytes


class Files(Message, frozen=True, kw_only=True):
    id: int
    files: list[ImageFile]


class Failed(Message, frozen=True, kw_only=True):
    id: int
    errno: int
    message: str
    fate: Fate | None = None


class Release(Message, frozen=True, kw_only=True):
    """Answer what the tasks of `pids` wait for, and keep answering EINTR until Resume."""

    ticket: int
    pids: list[int]


class Resume(Message, frozen=True, kw_only=True):
    ticket: int


class Change(Message, frozen=True, kw_only=True):
    """What changed in the View. `whole` empties it first, and `complete` ends what follows that;
    the dropped keys go, the others are put in; log and events are appended after dropping `trim_*`
    lines from the front."""

    whole: bool = False
    complete: bool = False
    nodes: list[Node] = []
    trees: list[Tree] = []
    apps: list[App] = []
    images: list[Image] = []
    imports: list[Import] = []
    jobs: list[Job] = []
    log: list[LogLine] = []
    events: list[Event] = []
    metrics: dict[str, float] | None = None
    store: Store | None = None
    gone_trees: list[int] = []
    gone_apps: list[str] = []
    gone_images: list[tuple[str, int]] = []
    gone_imports: list[tuple[str, str]] = []
    gone_jobs: list[int] = []
    trim_log: int = 0
    trim_events: int = 0


type_of_request = (
    Submit
    | Interrupt
    | Closed
    | JobLog
    | ListFiles
    | ReadFile
    | MakeApp
    | RemoveApp
    | BeginImport
    | WriteFile
    | TruncateFile
    | CloseFile
    | RemoveFile
    | CommitImport
    | RemoveVersion
    | SetLabel
    | RemoveLabel
    | SetPolicy
)
ToAgent = Hello | Released | type_of_request
ToMount = Welcome | Accepted | Done | Data | Files | Failed | Release | Resume | Change


class Channel:
    """Whole frames over a stream. `receive` is for one task, `send` for any number.

    What is received goes into memory that is kept for the next frames: fresh memory costs more than
    a copy. Raises Unreachable when the other side has gone or speaks something else.
    """

    def __init__(self, stream: trio.abc.Stream, incoming: Any) -> None:
        self._stream = stream
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._memory = memoryview(bytearray(RECEIVE_BYTES))
        self._begin = self._end = 0  # of what was received and not yet returned
        self._sending = trio.Lock()
        if isinstance(stream, trio.SocketStream):
            _enlarge(stream)

    async def send(self, message: Message) -> None:
        """Send one frame whole; cancelled half-way, the channel is closed."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise ValueError(f"frame of {len(body)} bytes, at most {MAX_FRAME}")
        async with self._sending:
            try:
                await self._stream.send_all(_LENGTH.pack(len(body)) + body[:RECEIVE_BYTES])
                if len(body) > RECEIVE_BYTES:
                    await self._stream.send_all(memoryview(body)[RECEIVE_BYTES:])
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise Unreachable("the other side has closed the connection") from exc
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(self._stream)
                raise

    async def receive(self) -> Any:
        """Return the next message."""
        await self._fill(_LENGTH.size)
        (length,) = _LENGTH.unpack_from(self._memory, self._begin)
        if length > MAX_FRAME:
            raise Unreachable(f"the other side announced a frame of {length} bytes")
        await self._fill(_LENGTH.size + length)
        begin = self._begin + _LENGTH.size
        self._begin = begin + length
        try:
            return self._decoder.decode(self._memory[begin : self._begin])
        except msgspec.MsgspecError as exc:
            raise Unreachable(f"the other side does not speak protocol {PROTOCOL}: {exc}") from exc

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _fill(self, size: int) -> None:
        """Have so many bytes from `_begin` on in memory."""
        if self._end - self._begin >= size:
            return
        self._make_room(size)
        while self._end - self._begin < size:
            try:
                count = await self._receive_into(self._memory[self._end :])
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise Unreachable("the other side has closed the connection") from exc
            if not count:
                raise Unreachable("the other side has closed the connection")
            self._end += count

    def _make_room(self, size: int) -> None:
        """Move what was received to the front of memory that is large enough."""
        rest = self._memory[self._begin : self._end]
        if size > len(self._memory):
            self._memory = memoryview(bytearray(size))
        self._memory[: len(rest)] = rest
        self._begin, self._end = 0, len(rest)

    async def _receive_into(self, memory: memoryview) -> int:
        if isinstance(self._stream, trio.SocketStream):
            try:
                return await self._stream.socket.recv_into(memory)
            except OSError as exc:
                raise trio.BrokenResourceError from exc
        data = await self._stream.receive_some(len(memory))
        memory[: len(data)] = data
        return len(data)


def _enlarge(stream: trio.SocketStream) -> None:
    """Have the kernel take a large frame at once; a process without privileges gets less."""
    try:
        stream.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, MAX_DATA)
    except PermissionError:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_DATA)


def failure(request_id: int, error: KrgError) -> Failed:
    """Turn an error into the frame that carries it."""
    return Failed(id=request_id, errno=error.errno, message=error.message, fate=error.fate)


def error_of(frame: Failed) -> KrgError:
    """Turn the frame back into the error."""
    return from_errno(frame.errno, frame.message, frame.fate)
