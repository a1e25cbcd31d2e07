"""CRIU's streamer protocol against a simulator of CRIU's side (see its img-streamer.c)."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import trio

from agent import stream_line
from agent.buffers import Buffers, Piece
from agent.stream import capture, serve
from krgfs.errors import Damaged, EngineFailed, KrgError, NoRoom

KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 7, 4095, 4096, 65535, 65536, 65537, MIB - 1, MIB, MIB + 1, 3 * MIB + 12345)
LAST = ("inventory.img", b"last")


def request(name: str) -> bytes:
    raw = name.encode()
    message = b"\x0a" + (bytes([len(raw)]) if len(raw) < 128 else varint(len(raw))) + raw
    return struct.pack("<I", len(message)) + message


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128, number >> 7])


class Criu:
    """CRIU's side: `open` makes a pipe, sends one end of it, and returns the other."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.line.connect(str(directory / f"streamer-{kind}.sock"))
        self._is_dump = kind == "capture"

    def open(self, name: str) -> int | None:
        self.line.sendall(request(name))
        if not self._is_dump:
            said = self.line.recv(6, socket.MSG_WAITALL)
            if said == struct.pack("<I", 2) + b"\x08\x00":
                return None
            if said != struct.pack("<I", 2) + b"\x08\x01":
                raise ConnectionError("no whole reply")
        reads, writes = os.pipe()
        ours, theirs = (writes, reads) if self._is_dump else (reads, writes)
        try:
            socket.send_fds(self.line, [b"\0"], [theirs])
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def write(self, files: dict[str, bytes]) -> None:
        """Write files one after the other, as a dump writes page files."""
        for name, content in files.items():
            fd = self.open(name)
            assert fd is not None
            with open(fd, "wb", buffering=0) as pipe:
                put(pipe.fileno(), content)

    def read(self, name: str) -> bytes | None:
        fd = self.open(name)
        if fd is None:
            return None
        with open(fd, "rb") as pipe:
            return pipe.read()

    def die(self) -> None:
        self.line.close()

    def __enter__(self) -> Criu:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.die()


def put(fd: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]


class Kept:
    """A sink that keeps everything, and gives the buffers back at once."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.pieces: list[tuple[str, int, int]] = []

    def __call__(self, piece: Piece) -> None:
        file = self.files.setdefault(piece.file, bytearray())
        assert piece.offset == len(file), "a gap, or out of order"
        file += piece.data
        self.pieces.append((piece.file, piece.offset, len(piece.data)))
        piece.give_back()


class Files:
    """A source of files in pieces of a given size, which counts those that are out."""

    def __init__(self, files: dict[str, bytes], size: int = 256 * KIB) -> None:
        self.files, self.size = files, size
        self.buffers = Buffers(32, size)

    def pieces(self, file: str) -> Iterable[Piece] | None:
        return self._cut(file) if file in self.files else None

    def _cut(self, file: str) -> Iterator[Piece]:
        whole = self.files[file]
        for at in range(0, len(whole), self.size):
            part = whole[at : at + self.size]
            index = self.buffers.lend(unless=lambda: False)
            assert index is not None
            self.buffers[index][: len(part)] = part
            yield Piece(file, at, self.buffers[index][: len(part)], self.buffers, index)

    @property
    def are_back(self) -> bool:
        return self.buffers.free == self.buffers.count


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No descriptor, no thread of ours."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert [each for each in threading.enumerate() if each.name.startswith("stream")] == []
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def buffers() -> Buffers:
    return Buffers(4, 64 * KIB)


async def in_thread(work: Callable[..., object], *args: object) -> None:
    with trio.fail_after(30):
        await trio.to_thread.run_sync(work, *args)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def odd_files() -> dict[str, bytes]:
    return {f"pages-{size}.img": content(size) for size in SIZES} | dict([LAST])


async def failed(dump: Callable[[Criu], None], tmp_path: Path, code: int = 0) -> str:
    """Return what is raised where CRIU does this and ends, well by its code unless told."""
    kept, buffers = Kept(), Buffers(4, 64 * KIB)

    def work() -> None:
        with Criu(tmp_path, "capture") as criu, contextlib.suppress(OSError):
            dump(criu)

    with pytest.raises(KrgError) as caught:
        async with capture(tmp_path, buffers, kept) as captured:
            await in_thread(work)
            with trio.fail_after(30):
                await captured.whole(code)
    assert buffers.free == buffers.count
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


# -- capture


async def test_files_of_all_sizes_arrive(tmp_path: Path, buffers: Buffers) -> None:
    kept, files = Kept(), odd_files()

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            criu.write(files)

    async with capture(tmp_path, buffers, kept) as captured:
        await in_thread(dump)
        assert await captured.whole(0) == {name: len(each) for name, each in files.items()}
    assert {name: kept.files.get(name, b"") for name in files} == files
    assert captured.drained_bytes == sum(map(len, files.values()))
    assert buffers.free == buffers.count
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3, 64])
async def test_many_files_at_once(tmp_path: Path, count: int) -> None:
    """More are open, and half full, than there are buffers."""
    kept, buffers = Kept(), Buffers(count, 4096)
    files = {f"core-{at}.img": content(at * 101) for at in range(100)} | dict([LAST])

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            pipes = {name: criu.open(name) for name in files}
            chance = random.Random(1)
            left = {name: memoryview(each) for name, each in files.items()}
            while left:
                name = chance.choice(list(left))
                fd = pipes[name]
                assert fd is not None
                put(fd, bytes(left[name][:1000]))
                left[name] = left[name][1000:]
                if not left[name]:
                    os.close(fd)
                    del left[name]

    async with capture(tmp_path, buffers, kept) as captured:
        await in_thread(dump)
        await captured.whole(0)
    assert {name: kept.files.get(name, b"") for name in files} == files
    assert buffers.free == count


async def test_files_arrive_while_others_are_open(tmp_path: Path, buffers: Buffers) -> None:
    """CRIU asks its post-dump script with all pipes closed and the socket open."""
    kept, came = Kept(), trio.Event()
    go_on = threading.Event()

    def dump(token: trio.lowlevel.TrioToken) -> None:
        with Criu(tmp_path, "capture") as criu:
            first = criu.open("files.img")
            criu.write({"pages-1.img": content(MIB)} | dict([LAST]))
            assert first is not None
            put(first, b"late")
            os.close(first)
            token.run_sync_soon(came.set)
            assert go_on.wait(30)

    async with capture(tmp_path, buffers, kept) as captured, trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, dump, trio.lowlevel.current_trio_token())
        await came.wait()
        sizes = await captured.whole(0)
        go_on.set()
    assert sizes == {"files.img": 4, "pages-1.img": MIB, "inventory.img": 4}
    assert kept.files["files.img"] == b"late"


async def test_criu_waits_while_no_buffer_is_free(tmp_path: Path) -> None:
    buffers, pieces = Buffers(2, 64 * KIB), []
    is_full, said = threading.Event(), threading.Event()

    def sink(piece: Piece) -> None:
        if isinstance(piece.data, bytes):
            return
        pieces.append(piece)
        if len(pieces) == buffers.count:
            is_full.set()

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            criu.write({"pages-1.img": content(4 * MIB)} | dict([LAST]))
            said.set()

    async with capture(tmp_path, buffers, sink) as captured, trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, dump)
        await in_thread(is_full.wait, 30)
        assert buffers.free == 0 and len(pieces) == 2
        assert captured.drained_bytes == 2 * 64 * KIB and not said.is_set()
        taken = 0
        while taken < 4 * MIB:
            if pieces:
                taken += len(pieces[0].data)
                pieces.pop(0).give_back()
            await trio.lowlevel.checkpoint()
        assert (await captured.whole(0))["pages-1.img"] == 4 * MIB
    assert buffers.free == buffers.count


async def test_small_files_cost_no_buffer(tmp_path: Path) -> None:
    buffers, pieces = Buffers(1, 64 * KIB), []
    files = {f"ids-{at}.img": content(at) for at in range(1, 40)} | dict([LAST])

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            criu.write(files)

    async with capture(tmp_path, buffers, pieces.append) as captured:
        await in_thread(dump)
        await captured.whole(0)
    assert {each.file: each.data for each in pieces} == files
    assert buffers.free == 1


def in_length(criu: Criu) -> None:
    criu.line.sendall(b"\x05\0")


def in_name(criu: Criu) -> None:
    criu.line.sendall(request("core-1.img")[:-3])


def before_name(criu: Criu) -> None:
    criu.line.sendall(request("core-1.img")[:4])


def before_pipe(criu: Criu) -> None:
    criu.line.sendall(request("core-1.img"))


def in_file(criu: Criu) -> None:
    fd = criu.open("pages-1.img")
    assert fd is not None
    os.write(fd, b"half of it")
    os.close(fd)


def no_pipe(criu: Criu) -> None:
    criu.line.sendall(request("core-1.img"))
    with open("/dev/null") as null:
        socket.send_fds(criu.line, [b"\0"], [null.fileno()])


def wrong_end(criu: Criu) -> None:
    criu.line.sendall(request("core-1.img"))
    ends = os.pipe()
    socket.send_fds(criu.line, [b"\0"], [ends[1]])
    for end in ends:
        os.close(end)


def twice(criu: Criu) -> None:
    criu.write({"core-1.img": b"a"})
    criu.write({"core-1.img": b"b"})


def too_long(criu: Criu) -> None:
    criu.line.sendall(struct.pack("<I", 1 << 30))


def no_message(criu: Criu) -> None:
    criu.line.sendall(struct.pack("<I", 3) + b"\x0a\x7f\x41")


def names(name: str) -> Callable[[Criu], None]:
    return lambda criu: criu.line.sendall(request(name))


@pytest.mark.parametrize(
    ("dump", "says"),
    [
        (Criu.die, "no inventory.img"),
        (in_length, "in the middle of a request"),
        (in_name, "in the middle of a request"),
        (before_name, "file named ''"),
        (before_pipe, "gave no pipe"),
        (in_file, "no inventory.img"),
        (no_pipe, "not the end of a pipe"),
        (wrong_end, "not the end of a pipe"),
        (twice, "twice"),
        (too_long, "has 1073741824 bytes"),
        (no_message, "cut off|damaged"),
        (names("../evil"), "named '../evil'"),
        (names(".."), "named '..'"),
        (names("a" * 200 + "\0"), "named"),
    ],
)
async def test_what_is_no_dump(dump: Callable[[Criu], None], says: str, tmp_path: Path) -> None:
    assert re.search(says, await failed(dump, tmp_path))


@pytest.mark.parametrize("dump", [in_length, before_pipe, in_file, Criu.die])
async def test_a_criu_that_was_killed(dump: Callable[[Criu], None], tmp_path: Path) -> None:
    assert await failed(dump, tmp_path, code=-9)


async def test_all_came_but_criu_does_not_say_so(tmp_path: Path) -> None:
    said = await failed(lambda criu: criu.write(odd_files()), tmp_path, code=1)
    assert "ended with code 1" in said


async def test_criu_that_never_comes(tmp_path: Path, buffers: Buffers) -> None:
    async with capture(tmp_path, buffers, Kept()) as captured:
        with pytest.raises(EngineFailed):
            await captured.whole(0)
    with pytest.raises(EngineFailed, match="cannot listen"):
        async with capture(tmp_path / "none", buffers, Kept()):
            pass
    with pytest.raises(EngineFailed, match="too long"):
        async with capture(tmp_path / ("a" * 100), buffers, Kept()):
            pass


@pytest.mark.parametrize("at", [0, 100 * KIB])
async def test_a_sink_that_fails_fails_criu(at: int, tmp_path: Path, buffers: Buffers) -> None:
    broken: list[str] = []
    kept = Kept()

    def sink(piece: Piece) -> None:
        if piece.offset >= at:
            raise NoRoom("the disk is full")
        kept(piece)

    def dump() -> None:
        """Ask for all, then write more than a pipe takes: it must not wait for a reader."""
        with Criu(tmp_path, "capture") as criu:
            try:
                fds = [criu.open(f"pages-{at}.img") for at in range(3)]
            except OSError:
                broken.append("open")
                return
            for fd in fds:
                assert fd is not None
                try:
                    put(fd, content(2 * MIB))
                except BrokenPipeError:
                    broken.append("write")
                os.close(fd)

    async with capture(tmp_path, buffers, sink) as captured:
        await in_thread(dump)
        assert broken == ["write"] * 3
        for code in (0, 1):
            with pytest.raises(NoRoom, match="the disk is full"):
                await captured.whole(code)
    assert buffers.free == buffers.count


async def test_an_error_of_another_kind_keeps_its_cause(tmp_path: Path, buffers: Buffers) -> None:
    def sink(_: Piece) -> None:
        raise LookupError("where")

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            criu.write(dict([LAST]))

    async with capture(tmp_path, buffers, sink) as captured:
        await in_thread(dump)
        with pytest.raises(EngineFailed, match="where") as caught:
            await captured.whole(0)
    assert isinstance(caught.value.__cause__, LookupError)


async def test_leaving_ends_a_dump(tmp_path: Path) -> None:
    """Also while the capture waits for a buffer, in a task that was cancelled."""
    buffers, pieces = Buffers(1, 64 * KIB), []
    broken, came = threading.Event(), threading.Event()

    def sink(piece: Piece) -> None:
        pieces.append(piece)
        came.set()

    def dump() -> None:
        with Criu(tmp_path, "capture") as criu:
            fd = criu.open("pages-1.img")
            assert fd is not None
            try:
                put(fd, content(4 * MIB))
            except BrokenPipeError:
                broken.set()
            os.close(fd)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with capture(tmp_path, buffers, sink):
                nursery.start_soon(in_thread, dump)
                await in_thread(came.wait, 30)
                scope.cancel()
                await trio.sleep_forever()
    assert broken.is_set()
    assert len(pieces) == 1
    pieces[0].give_back()
    assert buffers.free == 1


# -- serve


async def test_files_of_all_sizes_are_served(tmp_path: Path) -> None:
    files = odd_files() | {f"files-{size}.img": content(size) for size in SIZES}
    source, read = Files(files), {}

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            for name in [*files, "none.img", "inventory.img"]:
                read[name] = criu.read(name)

    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        served.check()
    assert read == files | {"none.img": None}
    assert source.are_back
    assert list(tmp_path.iterdir()) == []


async def test_many_read_at_once(tmp_path: Path) -> None:
    files = {f"pages-{at}.img": content(2 * MIB + at) for at in range(6)}
    source, read = Files(files, 64 * KIB), {}

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            fds = {name: criu.open(name) for name in files}
            parts: dict[str, list[bytes]] = {name: [] for name in files}
            while fds:
                for name, fd in list(fds.items()):
                    assert fd is not None
                    parts[name].append(os.read(fd, 100_000))
                    if not parts[name][-1]:
                        os.close(fd)
                        del fds[name]
            read.update({name: b"".join(each) for name, each in parts.items()})

    source.buffers = Buffers(200, 64 * KIB)
    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        served.check()
    assert read == files
    assert source.are_back


async def test_few_buffers_are_used_again_only_when_read(tmp_path: Path) -> None:
    """CRIU reads from the memory of the source: overwritten early, it would get the wrong bytes."""
    files = {"pages-1.img": content(8 * MIB)}
    source, read = Files(files, 64 * KIB), []
    source.buffers = Buffers(stream_line.PIPE_BYTES // (64 * KIB) + 2, 64 * KIB)

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            fd = criu.open("pages-1.img")
            assert fd is not None
            while part := os.read(fd, 5000):
                read.append(part)
            os.close(fd)

    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        served.check()
    assert b"".join(read) == files["pages-1.img"]
    assert source.are_back


class Broken(Files):
    """Fails at a given piece."""

    def __init__(self, name: str, at: int) -> None:
        super().__init__({name: content(4 * MIB)})
        self.at = at

    def _cut(self, file: str) -> Iterator[Piece]:
        for at, piece in enumerate(super()._cut(file)):
            if at == self.at:
                piece.give_back()
                raise Damaged(f"{file} is not what its digest says")
            yield piece


@pytest.mark.parametrize("at", [0, 10])
async def test_a_damaged_page_file_ends_early(at: int, tmp_path: Path) -> None:
    source, read = Broken("pages-1.img", at), []

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            read.append(criu.read("pages-1.img"))
            with pytest.raises(OSError):
                criu.open("pages-1.img")

    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        with pytest.raises(Damaged, match="digest"):
            served.check()
    assert len(read[0]) < 4 * MIB


@pytest.mark.parametrize("at", [0, 10])
async def test_of_any_other_damaged_file_nothing_is_sent(at: int, tmp_path: Path) -> None:
    source = Broken("files.img", at)

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu, pytest.raises(OSError):
            criu.open("files.img")

    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        with pytest.raises(Damaged, match="digest"):
            served.check()


@pytest.mark.parametrize("name", ["pages-1.img", "files.img"])
async def test_a_file_that_no_thread_can_be_had_for_ends(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = Files({name: content(4 * MIB)}), []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "stream writer":
            raise RuntimeError("can't start new thread")
        start(thread)

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            read.append(criu.read(name))
            with pytest.raises(OSError):
                criu.open(name)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    async with serve(tmp_path, source) as served:
        await in_thread(restore)
        with pytest.raises(EngineFailed, match="can't start new thread"):
            served.check()
    assert read == [b""] and source.are_back


def after_reply(criu: Criu) -> None:
    criu.line.sendall(request("pages-1.img"))
    criu.line.recv(6)


def in_reading(criu: Criu) -> None:
    for name in ("pages-1.img", "files.img"):
        fd = criu.open(name)
        assert fd is not None
        os.read(fd, 100)
        os.close(fd)


@pytest.mark.parametrize(
    "restore", [Criu.die, in_length, in_name, before_pipe, after_reply, in_reading, no_pipe]
)
async def test_a_restore_that_dies(restore: Callable[[Criu], None], tmp_path: Path) -> None:
    source = Files({"pages-1.img": content(4 * MIB), "files.img": content(4 * MIB)})

    def work() -> None:
        with Criu(tmp_path, "serve") as criu, contextlib.suppress(OSError):
            restore(criu)

    async with serve(tmp_path, source):
        await in_thread(work)
    assert source.are_back


async def test_leaving_ends_a_restore(tmp_path: Path) -> None:
    source = Files({"pages-1.img": content(4 * MIB), "files.img": content(4 * MIB)})
    fds: list[int | None] = []
    opened = threading.Event()

    def restore() -> None:
        with Criu(tmp_path, "serve") as criu:
            fds.extend(criu.open(name) for name in source.files)
            opened.set()
            assert criu.line.recv(1) == b""

    async with trio.open_nursery() as nursery:
        async with serve(tmp_path, source):
            nursery.start_soon(in_thread, restore)
            await in_thread(opened.wait, 30)
        nursery.cancel_scope.deadline = trio.current_time() + 30
    for fd in fds:
        assert fd is not None
        os.close(fd)
    assert source.are_back


# -- buffers


def test_buffers_are_lent_once() -> None:
    buffers = Buffers(2, 8192)
    buffers.touch()
    first, second = buffers.lend(), buffers.lend()
    assert {first, second} == {0, 1}
    assert buffers.lend() is None
    assert buffers.lend(unless=lambda: True) is None
    assert first is not None and second is not None
    buffers[first][:] = b"a" * 8192
    buffers.give_back(second)
    with pytest.raises(ValueError, match="already"):
        buffers.give_back(second)
    buffers.touch()
    assert bytes(buffers[first]) == b"a" * 8192, "touched while it was lent"
