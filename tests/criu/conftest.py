"""Stages for the tests of this directory: one site for many tests, and one with each freezer.

For the engine alone there is a rig, and workloads and processes to put on it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from agent import procs
from agent.criu import Engine
from krgfs import facts
from tests.criu.rig import LONG_S, Rig
from tests.criu.stage import Stage, staged
from tests.sites import Site
from tests.workloads import harness


@pytest.fixture
def stage(shared_site: Site) -> Iterator[Stage]:
    with staged(shared_site) as made:
        yield made


@pytest.fixture(scope="module", params=["v2", "v1"])
def freezing_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(freezer=request.param) as made:
        yield made


@pytest.fixture
def freezing_stage(freezing_site: Site) -> Iterator[Stage]:
    with staged(freezing_site) as made:
        yield made


# -- the engine alone


@pytest.fixture(scope="session")
def engine() -> Engine:
    found: Engine = trio.run(Engine.find)
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="krg-engine-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def rig(engine: Engine, place: Path) -> AsyncIterator[Rig]:
    made = Rig(engine, place / "rig")
    yield made
    await made.close()


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., harness.Workload]]:
    """Start workloads; they and what was restored of them are ended afterwards."""
    made: list[harness.Workload] = []

    def begin(name: str, *args: object) -> harness.Workload:
        workload = harness.start(name, place / f"{name}{len(made)}", *args)
        made.append(workload)
        return workload.wait_ready()

    yield begin
    for workload in made:
        workload.close()


@pytest.fixture
def process(place: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start Python code that writes `ready` when it is, with given standard files."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(code: str, **kwargs: object) -> subprocess.Popen[bytes]:
        sign = place / f"sign{len(made)}"
        text = f"import os, socket, sys, time\n{code}"
        options: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
            "cwd": place,
            **kwargs,
        }
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", text, str(sign)],
            **options,  # type: ignore[call-overload]
        )
        made.append(child)
        deadline = time.monotonic() + LONG_S
        while not sign.exists():
            assert child.poll() is None and time.monotonic() < deadline, "it did not get ready"
            time.sleep(0.01)
        return child

    yield begin
    for child in made:
        for task in facts.tree(child.pid):
            procs.signal_process(procs.process_id(task), signal.SIGKILL)
        child.wait()
