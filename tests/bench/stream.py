"""What streaming costs beside bare CRIU on the same process in the same run.

`python -m tests.bench.stream [MIB]` prints JSON: milliseconds and ratios stream / bare, medians of
rounds in turn. For a dump the time that the process stood still, by CRIU's own statistics: bare to
tmpfs, streamed into touched buffers that are kept, and into few that are used again at once. For a
restore the time until `criu restore -d` has ended: bare from tmpfs, streamed from memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import trio

from agent import criu_images, stream
from agent.buffers import Buffers, Piece
from agent.criu import Engine
from tests.bench.files import in_turn
from tests.workloads import harness

ROUNDS = 5
FEW = 8
SPARE = 64  # for what a process has besides, and for files that are open at the same time
OPTIONS = ("--manage-cgroups=ignore", "--file-locks", "-v1")


class Kept:
    """A sink that keeps all pieces, and a source of what it kept."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Piece]] = {}

    def take(self, piece: Piece) -> None:
        self._pieces.setdefault(piece.file, []).append(piece)

    def drop(self) -> None:
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.give_back()
        self._pieces = {}

    def pieces(self, file: str) -> Iterable[Piece] | None:
        found = self._pieces.get(file)
        return found and [Piece(file, each.offset, each.data) for each in found]


class Bench:
    def __init__(self, criu: str, workload: harness.Workload, directory: Path, mib: int) -> None:
        self._criu = criu
        self._workload = workload
        self._bare, self._streamed = directory / "bare", directory / "streamed"
        self._buffers, self._few = Buffers(mib + SPARE), Buffers(FEW)
        self._buffers.touch()
        self._few.touch()
        self._kept = Kept()

    def bare_frozen_ms(self) -> float:
        self._run_criu("dump", self._emptied(self._bare), "-t", str(self._pid), "-R")
        return criu_images.dump_stats(self._bare).frozen_ms

    def kept_frozen_ms(self) -> float:
        self._kept.drop()
        return trio.run(self._capture, self._buffers, self._kept.take)

    def reused_frozen_ms(self) -> float:
        return trio.run(self._capture, self._few, Piece.give_back)

    def bare_restore_ms(self) -> float:
        self._end()
        return self._run_criu("restore", self._bare, "-d")

    def streamed_restore_ms(self) -> float:
        self._end()
        return trio.run(self._serve)

    @property
    def _pid(self) -> int:
        return self._workload.pid

    async def _capture(self, buffers: Buffers, sink: stream.Sink) -> float:
        directory = self._emptied(self._streamed)
        words = ("-t", str(self._pid), "-R", "--stream")
        async with stream.capture(directory, buffers, sink) as captured:
            await trio.to_thread.run_sync(self._run_criu, "dump", directory, *words)
            await captured.whole(0)
        return criu_images.dump_stats(directory).frozen_ms

    async def _serve(self) -> float:
        async with stream.serve(self._streamed, self._kept) as served:
            words = ("restore", self._streamed, "-d", "--stream")
            taken = await trio.to_thread.run_sync(self._run_criu, *words)
            served.check()
        return taken

    def _run_criu(self, verb: str, directory: Path, *words: str) -> float:
        command = [self._criu, verb, "-D", str(directory), "-o", "log", *OPTIONS, *words]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, start_new_session=True)
        return (time.perf_counter() - begin) * 1000

    def _end(self) -> None:
        tree = self._workload.tree()
        self._workload.kill()
        self._workload.wait_gone(tree)

    @staticmethod
    def _emptied(directory: Path) -> Path:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory


def measure(criu: str, directory: Path, mib: int) -> dict[str, object]:
    with harness.start("memory", directory / "memory", mib, 0) as workload:
        workload.wait_ready()
        bench = Bench(criu, workload, directory, mib)
        bare, kept, reused = in_turn(
            bench.bare_frozen_ms, bench.kept_frozen_ms, bench.reused_frozen_ms, rounds=ROUNDS
        )
        bare_restore, streamed_restore = in_turn(
            bench.bare_restore_ms, bench.streamed_restore_ms, rounds=ROUNDS
        )
        verdict = workload.finish()
    figures = {
        "bare_frozen_ms": bare,
        "kept_frozen_ms": kept,
        "reused_frozen_ms": reused,
        "kept_ratio": kept / bare,
        "reused_ratio": reused / bare,
        "bare_restore_ms": bare_restore,
        "streamed_restore_ms": streamed_restore,
        "restore_ratio": streamed_restore / bare_restore,
    }
    return {name: round(each, 3) for name, each in figures.items()} | {"verdict": verdict}


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    load = os.getloadavg()[0]
    criu = trio.run(Engine.find).path
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="krg-bench-") as directory:
        figures = measure(criu, Path(directory), mib)
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps({f"{mib}_MiB": figures} | loads, indent=1))


if __name__ == "__main__":
    main()
