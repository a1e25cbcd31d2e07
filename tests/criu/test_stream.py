"""The streamer against the real CRIU: into memory, out of memory, and ended in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio

from agent.buffers import Buffers, Piece
from agent.criu import Engine
from agent.stream import capture, serve
from krgfs.errors import EngineFailed, NoRoom
from tests.criu.rig import LONG_S, until
from tests.workloads import harness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")

Start = Callable[..., harness.Workload]
OPTIONS = ("--manage-cgroups=ignore", "--file-locks", "-v3", "-o", "log")


class Image:
    """What was captured, in memory; it can be served again."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}

    def take(self, piece: Piece) -> None:
        self.files.setdefault(piece.file, bytearray()).extend(piece.data)
        piece.give_back()

    def pieces(self, file: str) -> Iterable[Piece] | None:
        whole = self.files.get(file)
        if whole is None:
            return None
        size = 1 << 20
        parts = (memoryview(whole)[at : at + size] for at in range(0, len(whole), size))
        return (Piece(file, at * size, part) for at, part in enumerate(parts))


@pytest.fixture
def images(place: Path) -> Path:
    made = place / "images"
    made.mkdir()
    return made


@pytest.fixture
def buffers() -> Buffers:
    made = Buffers(8)
    made.touch()
    return made


async def begin(engine: Engine, verb: str, images: Path, *words: str) -> trio.Process:
    command = [engine.path, verb, "-D", str(images), *OPTIONS, *words]
    return await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, start_new_session=True
    )


async def run(engine: Engine, verb: str, images: Path, *words: str) -> int:
    with trio.fail_after(LONG_S):
        process = await begin(engine, verb, images, *words)
        return await process.wait()


def dump_words(workload: harness.Workload) -> tuple[str, ...]:
    return ("-t", str(workload.pid), "--leave-running")


async def dumped(
    engine: Engine, workload: harness.Workload, images: Path, buffers: Buffers, *words: str
) -> tuple[Image, dict[str, int]]:
    image = Image()
    async with capture(images, buffers, image.take) as captured:
        code = await run(engine, "dump", images, *dump_words(workload), "--stream", *words)
        sizes = await captured.whole(code)
    assert sizes == {name: len(image.files.get(name, b"")) for name in sizes}
    assert buffers.free == buffers.count
    for name in sizes:
        image.files.setdefault(name, bytearray())
    return image, sizes


def end(workload: harness.Workload) -> None:
    tree = workload.tree()
    workload.kill()
    workload.wait_gone(tree)


@pytest.mark.parametrize(
    ("name", "words"), [("memory", ("64",)), ("proctree", ()), ("threads", ())]
)
async def test_a_tree_through_memory(
    name: str,
    words: tuple[str, ...],
    engine: Engine,
    start: Start,
    images: Path,
    buffers: Buffers,
) -> None:
    workload = start(name, *words)
    image, _ = await dumped(engine, workload, images, buffers)
    assert workload.wait_progress()
    assert {each.name for each in images.iterdir()} <= {"log", "stats-dump"}
    for _ in range(2):
        end(workload)
        async with serve(images, image) as served:
            code = await run(engine, "restore", images, "-d", "--stream")
            served.check()
        assert code == 0, (images / "log").read_text()
        assert workload.wait_progress()
    assert workload.finish() == "PASS"


@pytest.mark.parametrize("name", ["memory", "proctree", "deleted"])
async def test_it_is_what_plain_criu_writes(
    name: str, engine: Engine, start: Start, images: Path, buffers: Buffers, place: Path
) -> None:
    workload = start(name)
    image, sizes = await dumped(engine, workload, images, buffers)
    plain, written = place / "plain", place / "written"
    plain.mkdir()
    assert await run(engine, "dump", plain, *dump_words(workload)) == 0
    others = {"log", "stats-dump"}
    assert {each.name for each in plain.iterdir()} - others == set(sizes)
    written.mkdir()
    for file, content in image.files.items():
        (written / file).write_bytes(content)
    end(workload)
    assert await run(engine, "restore", written, "-d") == 0
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_all_is_there_when_the_post_dump_script_asks(
    engine: Engine, start: Start, images: Path, buffers: Buffers, place: Path
) -> None:
    workload = start("proctree")
    image, script, asks = Image(), place / "script", place / "asks"
    os.mkfifo(asks)
    script.write_text(
        f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\ncat {asks}\n'
    )
    script.chmod(0o700)
    async with capture(images, buffers, image.take) as captured, trio.open_nursery() as nursery:
        words = (*dump_words(workload), "--stream", "--action-script", str(script))
        process = await begin(engine, "dump", images, *words)
        nursery.cancel_scope.deadline = trio.current_time() + LONG_S
        answer = await trio.to_thread.run_sync(os.open, asks, os.O_WRONLY)
        try:
            sizes = await captured.whole(0)
            assert process.poll() is None
        finally:
            os.close(answer)
            code = await process.wait()
    assert code == 0
    assert sizes["inventory.img"] == len(image.files["inventory.img"])
    assert workload.wait_progress()
    end(workload)
    async with serve(images, image) as served:
        assert await run(engine, "restore", images, "-d", "--stream") == 0
        served.check()
    assert workload.finish() == "PASS"


async def test_a_criu_that_is_killed_in_the_middle(
    engine: Engine, start: Start, images: Path
) -> None:
    """Held in the middle by a sink that keeps all buffers."""
    workload = start("memory", 64)
    buffers, pieces = Buffers(4), []
    with pytest.raises(EngineFailed, match="code -9"):
        async with capture(images, buffers, pieces.append) as captured:
            process = await begin(engine, "dump", images, *dump_words(workload), "--stream")
            await until(lambda: not buffers.free)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            with trio.fail_after(LONG_S):
                await captured.whole(await process.wait())
    assert "inventory.img" not in {each.file for each in pieces}
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_a_sink_that_fails_lets_the_tree_run(
    engine: Engine, start: Start, images: Path, buffers: Buffers
) -> None:
    workload = start("memory", 64)

    def sink(piece: Piece) -> None:
        if piece.offset >= 8 << 20:
            raise NoRoom("the disk is full")
        piece.give_back()

    async with capture(images, buffers, sink) as captured:
        code = await run(engine, "dump", images, *dump_words(workload), "--stream")
        assert code == 1
        with pytest.raises(NoRoom, match="the disk is full"):
            await captured.whole(code)
    assert "Dumping FAILED" in (images / "log").read_text()
    assert buffers.free == buffers.count
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_leaving_lets_the_tree_run(engine: Engine, start: Start, images: Path) -> None:
    workload = start("memory", 64)
    buffers, pieces = Buffers(4), []
    with trio.fail_after(LONG_S):
        async with capture(images, buffers, pieces.append):
            process = await begin(engine, "dump", images, *dump_words(workload), "--stream")
            await until(lambda: not buffers.free)
        assert await process.wait() == 1
    assert workload.wait_progress()
    assert workload.finish() == "PASS"


async def test_a_source_that_fails_fails_the_restore(
    engine: Engine, start: Start, images: Path, buffers: Buffers
) -> None:
    workload = start("memory", 64)
    image, _ = await dumped(engine, workload, images, buffers)
    tree = workload.tree()
    end(workload)

    class Broken(Image):
        def pieces(self, file: str) -> Iterable[Piece] | None:
            found = super().pieces(file)
            return found and self._half(found) if file == "pages-1.img" else found

        def _half(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
            for piece in pieces:
                if piece.offset >= 32 << 20:
                    raise NoRoom("no more")
                yield piece

    broken = Broken()
    broken.files = image.files
    async with serve(images, broken) as served:
        assert await run(engine, "restore", images, "-d", "--stream") == 1
        with pytest.raises(NoRoom):
            served.check()
    assert not workload.tasks()
    workload.wait_gone(tree)
    async with serve(images, image):
        assert await run(engine, "restore", images, "-d", "--stream") == 0
    assert workload.finish() == "PASS"
