"""200 verbs at once on 200 trees, with 50 readers beside them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sites import Site
from tests.workloads import harness
from tests.workloads.harness import Workload

TREES, READERS = 200, 50
GOAL_MS = 50


def checkpoint(site: Site, tree: Workload) -> str:
    fd = os.open(site.proc(tree.pid) / "checkpoint", os.O_RDWR)
    try:
        os.write(fd, b"1")
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


# Fifty threads in one process would wait for each other's lock, and not for the mount.
READER = """
import json, os, select, sys, time
times_ms, wrong, paths = [], [], sys.argv[1:]
print("ready", flush=True)
while True:
    for path in paths:
        begun = time.perf_counter()
        try:
            fd = os.open(path, os.O_RDONLY)
            while os.read(fd, 65536):
                pass
            os.close(fd)
        except OSError as exc:
            wrong.append(str(exc))
        times_ms.append((time.perf_counter() - begun) * 1000)
    if select.select([0], [], [], 0.2)[0]:  # a thousand reads a second of all readers
        break
print(json.dumps([times_ms, wrong]))
"""


@contextlib.contextmanager
def readers(site: Site, trees: list[Workload]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that read the status of four trees after each other until their stdin is closed."""
    paths = [str(site.proc(tree.pid) / "status") for tree in trees]
    found = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", READER, *paths[number::READERS]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(READERS)
    ]
    try:
        for each in found:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        yield found
    finally:
        for each in found:
            each.kill()
            each.communicate()


@pytest.mark.slow
def test_two_hundred_verbs_and_fifty_readers(tmp_path: Path) -> None:
    with Site() as site, contextlib.ExitStack() as stack:
        trees = [
            stack.enter_context(harness.start("small", tmp_path / str(i), 1000))
            for i in range(TREES)
        ]
        for tree in trees:
            tree.wait_ready()
        times_ms: list[float] = []
        with readers(site, trees) as each_of, concurrent.futures.ThreadPoolExecutor(TREES) as pool:
            begun = time.monotonic()
            answers = list(pool.map(lambda tree: checkpoint(site, tree), trees))
            took = time.monotonic() - begun
            for reader in each_of:
                seen, wrong = json.loads(reader.communicate()[0])
                times_ms += seen
                assert wrong == []
        assert answers == [f"small.{tree.pid}.n1/v1\n" for tree in trees]
        cuts = statistics.quantiles(times_ms, n=100)
        print(
            f"{TREES} checkpoints in {took:.2f} s; {len(times_ms)} reads of status beside "
            f"them: median {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms (goal {GOAL_MS} ms), "
            f"longest {max(times_ms):.1f} ms"
        )
        assert len(os.listdir(site.mnt / "images")) == TREES
        phases = {
            site.facts(f"jobs/{job}/status")["phase"] for job in os.listdir(site.mnt / "jobs")
        }
        assert phases == {"done"}
        for tree in trees:
            assert site.facts(site.proc(tree.pid) / "status")["state"] == "running"
        assert {tree.finish() for tree in trees[:20]} == {"PASS"}
