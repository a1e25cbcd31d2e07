"""What lazy=yes gains beside bare CRIU on the same image in the same run.

`python -m tests.bench.lazy [MIB]` prints JSON: milliseconds and ratios lazy / bare, medians of
rounds in turn. The image is plain CRIU's, on a tmpfs; times are from the start of the restore to
the first step that the process makes, and for lazy also until all its memory is in. Staging and
starting the feeder are part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from agent import feeder
from agent.criu import Engine
from agent.feeder_source import Directory
from krgfs import facts
from tests.bench.files import in_turn
from tests.workloads import harness

ROUNDS = 5
NAP_S = 0.0005
OPTIONS = ("--manage-cgroups=ignore", "--file-locks", "-v1", "-o", "log")


class Bench:
    def __init__(self, criu: str, workload: harness.Workload, directory: Path) -> None:
        self._criu = criu
        self._workload = workload
        self._images, self._lazy = directory / "images", directory / "lazy"
        self._images.mkdir()
        self.all_in_ms: list[float] = []
        self.staged_ms: list[float] = []
        self.staged_bytes = 0
        self.feeder_mib = 0.0
        tree = workload.tree()
        self._run_criu("dump", "-D", str(self._images), "-t", str(workload.pid))
        workload.wait_gone(tree)

    def bare_ms(self) -> float:
        def restore() -> None:
            self._run_criu("restore", "-D", str(self._images), "-d")

        taken = self._until_first_step(restore)
        self._end()
        return taken

    def lazy_ms(self) -> float:
        taken = self._lazily()
        self._end()
        return taken

    def verdict(self) -> str:
        self._lazily()
        return self._workload.finish()

    def _lazily(self) -> float:
        shutil.rmtree(self._lazy, ignore_errors=True)
        staged, work = self._lazy / "staged", self._lazy / "work"
        staged.mkdir(parents=True)
        work.mkdir()
        begin = time.perf_counter()

        def restore() -> None:
            made = feeder.stage(self._images, staged, Directory(str(self._images)))
            self.staged_ms.append((time.perf_counter() - begin) * 1000)
            self.staged_bytes = made.eager_bytes
            feeder.start(work, work, made, f"directory:{self._images}")
            self._run_criu("restore", "-D", str(staged), "-W", str(work), "--lazy-pages", "-d")

        taken = self._until_first_step(restore)
        while (said := feeder.progress(work)) is None or said.state == "feeding":
            self._weigh(work)
            time.sleep(0.01)
        assert said.state == "done", said.reason
        self.all_in_ms.append((time.perf_counter() - begin) * 1000)
        return taken

    def _weigh(self, work: Path) -> None:
        own_kib = sum(_private_kib(each.pid) for each in feeder.processes(work))
        self.feeder_mib = max(self.feeder_mib, own_kib / 1024)

    def _until_first_step(self, restore: Callable[[], None]) -> float:
        before = self._workload.progress()
        begin = time.perf_counter()
        restore()
        while self._workload.progress() == before:
            time.sleep(NAP_S)
        return (time.perf_counter() - begin) * 1000

    def _run_criu(self, verb: str, *words: str) -> None:
        command = [self._criu, verb, *words, *OPTIONS]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, start_new_session=True)

    def _end(self) -> None:
        tree = self._workload.tree()
        self._workload.kill()
        self._workload.wait_gone(tree)


def _private_kib(pid: int) -> int:
    rollup = facts.read(f"/proc/{pid}/smaps_rollup") or b""
    lines = [line.split() for line in rollup.splitlines()]
    return sum(int(words[1]) for words in lines if words[0] == b"Private_Dirty:")


def measure(criu: str, directory: Path, mib: int) -> dict[str, object]:
    with harness.start("memory", directory / "memory", mib, 0) as workload:
        workload.wait_ready()
        bench = Bench(criu, workload, directory)
        bare, lazy = in_turn(bench.bare_ms, bench.lazy_ms, rounds=ROUNDS)
        verdict = bench.verdict()
    figures = {
        "bare_first_step_ms": bare,
        "lazy_first_step_ms": lazy,
        "first_step_ratio": lazy / bare,
        "lazy_all_in_ms": statistics.median(bench.all_in_ms),
        "staging_ms": statistics.median(bench.staged_ms),
        "staged_mib": bench.staged_bytes / (1 << 20),
        "feeder_mib": bench.feeder_mib,
    }
    return {name: round(each, 3) for name, each in figures.items()} | {"verdict": verdict}


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    load = os.getloadavg()[0]
    criu = trio.run(Engine.find).path
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="krg-bench-") as directory:
        figures = measure(criu, Path(directory), mib)
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps({f"{mib}_MiB": figures} | loads, indent=1))


if __name__ == "__main__":
    main()
