"""200 verbs at once on 200 trees, with 50 readers beside them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from tests.sites import Site
from tests.workloads import harness
from tests.workloads.harness import Workload

TREES, READERS = 200, 50
GOAL_MS = 50


def read_whole(path: Path) -> float:
    """Open, read and close a file as cat does; returns how many milliseconds it took."""
    begun = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.read(fd, 65536):
            pass
    finally:
        os.close(fd)
    return (time.perf_counter() - begun) * 1000


def checkpoint(site: Site, tree: Workload) -> str:
    fd = os.open(site.proc(tree.pid) / "checkpoint", os.O_RDWR)
    try:
        os.write(fd, b"1")
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


class Readers:
    """Threads that read the status of one tree after another until told to end."""

    def __init__(self, site: Site, trees: list[Workload]) -> None:
        self.times_ms: list[float] = []
        self.wrong: list[str] = []
        self._paths = [site.proc(tree.pid) / "status" for tree in trees]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(READERS)
        ]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _read(self, number: int) -> None:
        own = self._paths[number::READERS]
        while not self._over.wait(0.05):  # a person with watch(1) is slower still
            for path in own:
                try:
                    self.times_ms.append(read_whole(path))
                except OSError as exc:
                    self.wrong.append(f"{path}: {exc}")


@pytest.mark.slow
def test_two_hundred_verbs_and_fifty_readers(tmp_path: Path) -> None:
    with Site() as site, contextlib.ExitStack() as stack:
        trees = [
            stack.enter_context(harness.start("small", tmp_path / str(i), 1000))
            for i in range(TREES)
        ]
        for tree in trees:
            tree.wait_ready()
        with Readers(site, trees) as readers, concurrent.futures.ThreadPoolExecutor(TREES) as pool:
            begun = time.monotonic()
            answers = list(pool.map(lambda tree: checkpoint(site, tree), trees))
            took = time.monotonic() - begun
        assert answers == [f"small.{tree.pid}.n1/v1\n" for tree in trees]
        assert readers.wrong == []
        cuts = statistics.quantiles(readers.times_ms, n=100)
        print(
            f"{TREES} checkpoints in {took:.2f} s; {len(readers.times_ms)} reads of status beside "
            f"them: median {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms (goal {GOAL_MS} ms), "
            f"longest {max(readers.times_ms):.1f} ms"
        )
        assert len(os.listdir(site.mnt / "images")) == TREES
        phases = {
            site.facts(f"jobs/{job}/status")["phase"] for job in os.listdir(site.mnt / "jobs")
        }
        assert phases == {"done"}
        for tree in trees:
            assert site.facts(site.proc(tree.pid) / "status")["state"] == "running"
        assert {tree.finish() for tree in trees[:20]} == {"PASS"}
