"""What an image costs through /krg, beside what people have without it, on the same processes.

`python -m tests.bench.dump [--mib 1024] [--rounds 5] [--only NAME] [--json FILE] [--plot FILE.png]
[--table FILE.md]` prints a table, ratios first; man/bench.md says what each figure means. Every
round has an agent and a store of its own and a workload that was started anew, so that no round
finds what an earlier one has stored; within it krgfs and its peers take turns at going first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import trio

from agent.criu import Engine
from krgfs.cli_show import version_of
from krgfs.errors import KrgError
from tests.bench import loads, peers, plot
from tests.bench.loads import KINDS, Kind, Load
from tests.bench.peers import Bare, Restored
from tests.bench.plot import Samples
from tests.sites import Site
from tests.workloads import harness

BOUND = ("--memory", "200M")
MANY = "many"
MANY_ROUNDS = 15
USAGE = 2  # how click exits when it does not know an option
NO_CONTENT = ("store.db", "jobs", "lock")  # what the agent keeps besides images
RESTARTED = ("idle", "forked", "small")
IN_MEMORY = ("tmpfs", "ramfs")


class Unfit(Exception):
    """The machine cannot give a fair figure; the message says why and what to do."""


class Checkpointed(NamedTuple):
    """One `echo 1 > checkpoint`: what it made, how long it took and the tree stood still."""

    image: str
    freeze_ms: float
    felt_ms: float
    taken_ms: float
    logical_bytes: int
    stored_bytes: int


class Store(Site):
    """A site with options for its agent, and what it stores and needs."""

    def __init__(self, *options: str) -> None:
        super().__init__()
        self._options = options

    def __enter__(self) -> Store:
        super().__enter__()
        return self

    def start_agent(self, *options: str) -> None:
        super().start_agent(*self._options, *options)

    @property
    def refuses_options(self) -> bool:
        return self.agent is not None and self.agent.returncode == USAGE

    @property
    def agent_pid(self) -> int:
        return int(self.facts(f"nodes/{self.node}/info")["agent_pid"])

    def image(self, image: str) -> Path:
        return self.mnt / "images" / image

    def checkpoint(self, load: Load) -> Checkpointed:
        peers.settle(self.state)
        before = self.stored_bytes()
        load.forget_gap()
        begin = time.perf_counter()
        image = self.make_image(load.pid)
        taken = (time.perf_counter() - begin) * 1000
        felt = load.gap().length_s * 1000
        app, version = image.split("/")
        lines = (version_of(app, line) for line in self.read(f"images/{app}/index").splitlines())
        found = next(line for line in lines if line.version == version)
        stored = self.stored_bytes() - before
        return Checkpointed(image, found.freeze_ms, felt, taken, found.logical_bytes, stored)

    def make_image(self, pid: int) -> str:
        """Checkpoint a tree; return its image, or raise OSError with the sentence about it."""
        path = self.proc(pid) / "checkpoint"
        self._order(path, "1")
        return self.read(path).strip()

    def restart(self, load: Load, image: str, *words: str) -> Restored:
        load.forget_gap()
        begin_s, begin = time.time(), time.perf_counter()
        self._order(self.mnt / "restart", " ".join((image, "pid=keep", *words)))
        taken = (time.perf_counter() - begin) * 1000
        return Restored((load.gap().end_s - begin_s) * 1000, taken)

    def stored_bytes(self) -> int:
        """Return the room on the disk that images take, wherever the agent puts them."""
        total = 0
        for directory, below, files in os.walk(self.state):
            if Path(directory) == self.state:
                below[:] = [name for name in below if not name.startswith(NO_CONTENT)]
                files = [name for name in files if not name.startswith(NO_CONTENT)]
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
        return total

    def _order(self, path: Path, line: str) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            os.write(fd, f"{line}\n".encode())
        except OSError as exc:
            said = os.read(fd, 4096).decode().strip()
            raise OSError(exc.errno, f"{said or exc.strerror}: {line!r} into {path}") from exc
        finally:
            os.close(fd)


class Round:
    """One round of one workload: its samples go into `samples`."""

    def __init__(
        self, bench: Bench, kind: Kind, samples: Samples, store: Store, load: Load
    ) -> None:
        self._kind = kind
        self._samples = samples
        self._store = store
        self._load = load
        self._memory = bench.memory
        self._bare = Bare(bench.criu, load, bench.memory, bench.disk)
        self._image = ""

    def run(self, krg_begins: bool) -> None:
        self._take_turns(krg_begins, self._first, self._peers)
        if self._kind.dirties != "none":
            self._dirty()
        self._take_turns(krg_begins, self._next, self._peer_of_next)
        if self._kind.name == "idle":
            self._take_turns(krg_begins, self._copy_out, self._unpack)
        if self._kind.name in RESTARTED:
            self._take_turns(krg_begins, self._restart, self._bare_restore)
            self._restart_lazily()
        else:
            self._load.judge()

    @staticmethod
    def _take_turns(krg_begins: bool, *steps: Callable[[], None]) -> None:
        for step in steps if krg_begins else reversed(steps):
            step()

    def _add(self, **values: float | None) -> None:
        plot.add(self._samples, self._kind.name, **values)

    def _first(self) -> None:
        with _peak_mib(self._store.agent_pid) as peak:
            made = self._store.checkpoint(self._load)
        self._add(
            first_freeze_ms=made.freeze_ms,
            first_felt_ms=made.felt_ms,
            first_ms=made.taken_ms,
            first_stored_bytes=made.stored_bytes,
            logical_bytes=made.logical_bytes,
            agent_peak_mib=peak[0],
        )
        self._image = made.image

    def _peers(self) -> None:
        dumped = self._bare.to_memory()
        packed_ms, packed_bytes = self._bare.to_archive()
        self._add(
            bare_frozen_ms=dumped.frozen_ms,
            bare_felt_ms=dumped.felt_ms,
            bare_memory_ms=dumped.taken_ms,
            bare_disk_ms=self._bare.to_disk(),
            bare_archive_ms=packed_ms,
            bare_archive_bytes=packed_bytes,
        )

    def _dirty(self) -> None:
        dirtied = self._load.dirty()
        self._add(
            dirtied_bytes=dirtied.stat().st_size,
            dirtied_packed_bytes=peers.compressed_bytes(dirtied),
        )
        dirtied.unlink()

    def _next(self) -> None:
        made = self._store.checkpoint(self._load)
        self._add(
            next_freeze_ms=made.freeze_ms,
            next_felt_ms=made.felt_ms,
            next_ms=made.taken_ms,
            next_stored_bytes=made.stored_bytes,
        )
        self._image = made.image

    def _peer_of_next(self) -> None:
        dumped = self._bare.to_memory()
        self._add(
            next_bare_frozen_ms=dumped.frozen_ms,
            next_bare_felt_ms=dumped.felt_ms,
            next_bare_disk_ms=self._bare.to_disk(),
        )

    def _copy_out(self) -> None:
        copied = peers.copy_out(self._store.image(self._image), self._memory)
        self._add(copy_mb_per_s=copied.mb_per_s)

    def _unpack(self) -> None:
        unpacked = peers.unpack(self._memory / "bare", self._memory)
        self._add(unzstd_mb_per_s=unpacked.mb_per_s)

    def _bare_restore(self) -> None:
        self._load.end()
        restored = self._bare.restore()
        self._add(bare_restore_ms=restored.taken_ms, bare_first_instruction_ms=restored.first_ms)

    def _restart(self) -> None:
        self._load.end()
        restored = self._store.restart(self._load, self._image)
        self._add(restart_ms=restored.taken_ms, restart_first_instruction_ms=restored.first_ms)

    def _restart_lazily(self) -> None:
        """Restart with lazy=yes, where the agent knows that word; the last tree is asked whether it
        has what it had, and it came from an image of krgfs."""
        self._load.end()
        try:
            lazy: Restored | None = self._store.restart(self._load, self._image, "lazy=yes")
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            lazy = None
            self._store.restart(self._load, self._image)
        self._add(
            lazy_ms=lazy and lazy.taken_ms,
            lazy_first_instruction_ms=lazy and lazy.first_ms,
        )
        self._load.judge()


class Bench(NamedTuple):
    """Where and on what is measured: a directory on the disk, and one on a tmpfs of our own."""

    criu: str
    disk: Path
    memory: Path
    mib: int
    images: int

    @property
    def content(self) -> Path:
        return self.memory / "content"

    def round(self, kind: Kind, number: int, samples: Samples) -> None:
        with Store() as store, self._running(kind) as load:
            Round(self, kind, samples, store, load).run(krg_begins=number % 2 == 0)
        shutil.rmtree(self.memory / "bare", ignore_errors=True)
        if kind.name == "idle":
            self._bounded(kind, samples)

    def many(self, samples: Samples) -> None:
        """Checkpoint a small process in a store of one image and in one of many, in turn."""
        with contextlib.ExitStack() as stack:
            costs = []
            for name, count in (("one_ms", 1), ("many_ms", self.images)):
                store = stack.enter_context(Store())
                small = stack.enter_context(harness.start("small", store.base / "small", 1000))
                pid = small.wait_ready().pid
                for _ in range(count):
                    store.make_image(pid)
                costs.append((name, store, pid))
            for _ in range(MANY_ROUNDS):
                for name, store, pid in costs:
                    begin = time.perf_counter()
                    image = store.make_image(pid)
                    taken = (time.perf_counter() - begin) * 1000
                    os.rmdir(store.image(image))
                    plot.add(samples, MANY, **{name: taken})
            plot.add(samples, MANY, images=self.images)

    def _bounded(self, kind: Kind, samples: Samples) -> None:
        """Measure an agent that was told how much memory it may take, where it can be told."""
        store = Store(*BOUND)
        values: dict[str, float | None]
        try:
            with store, self._running(kind) as load:
                with _peak_mib(store.agent_pid) as peak:
                    made = store.checkpoint(load)
                values = {"bounded_peak_mib": peak[0], "bounded_ms": made.taken_ms}
        except AssertionError:
            if not store.refuses_options:
                raise
            values = {"bounded_peak_mib": None, "bounded_ms": None}
        plot.add(samples, kind.name, **values)

    @contextlib.contextmanager
    def _running(self, kind: Kind) -> Iterator[Load]:
        directory = self.disk / "load"
        try:
            with loads.running(kind, directory, self.content, self.mib) as load:
                yield load
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _peak_mib(pid: int) -> Iterator[list[float]]:
    """Find by how much a process grows at most over what it has now; its children do not count."""
    before = _status_kib(pid, "VmRSS")
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")  # proc(5): resets VmHWM
    found: list[float] = []
    yield found
    found.append((_status_kib(pid, "VmHWM") - before) / 1024)


def _status_kib(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def machine(engine: Engine, disk: Path) -> dict[str, object]:
    """Say where this ran; raises Unfit where what is called durable would not be."""
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", disk], check=True, capture_output=True, text=True
    ).stdout.strip()
    if kind in IN_MEMORY:
        raise Unfit(f"{disk} is in memory ({kind}), where nothing is durable; set TMPDIR to a disk")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "criu": engine.version,
        "filesystem": kind,
        "load_before": round(os.getloadavg()[0], 2),
    }


def measure(bench: Bench, names: list[str], rounds: int) -> tuple[Samples, dict[str, str]]:
    """Return all samples, and what went wrong by workload: the others are measured all the same."""
    samples: Samples = {}
    failures: dict[str, str] = {}
    if any(name in KINDS and KINDS[name].shape != "many" for name in names):
        bench.content.mkdir()
        loads.make_content(bench.content, bench.mib)
    steps = [(name, number) for number in range(rounds) for name in names if name != MANY]
    for name, number in steps + [(MANY, 0)] * (MANY in names):
        if name in failures:
            continue
        click.echo(f"round {number + 1} of {rounds if name != MANY else 1}: {name}", err=True)
        try:
            if name == MANY:
                bench.many(samples)
            else:
                bench.round(KINDS[name], number, samples)
        except (OSError, subprocess.SubprocessError, AssertionError, harness.Stuck) as exc:
            failures[name] = f"round {number + 1}: {exc}"
            click.echo(f"{name}: {exc}", err=True)
    return samples, failures


def _end(signum: int, _frame: object) -> None:
    sys.exit(128 + signum)  # through every `finally`


@click.command()
@click.option("--mib", default=1024, show_default=True, type=click.IntRange(min=64))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--only", multiple=True, type=click.Choice([*KINDS, MANY]), help="may be repeated")
@click.option("--images", default=1000, show_default=True, help=f"how many are many for {MANY}")
@click.option("--json", "samples_file", type=click.Path(dir_okay=False))
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False))
@click.option("--table", "table_file", type=click.Path(dir_okay=False))
def main(
    mib: int,
    rounds: int,
    only: tuple[str, ...],
    images: int,
    samples_file: str | None,
    plot_file: str | None,
    table_file: str | None,
) -> None:
    """Measure krgfs against bare CRIU, tar and zstd."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        if os.geteuid():
            raise Unfit("only root can checkpoint and mount a tmpfs; run this as root")
        peers.need_programs()
        if plot_file:
            plot.need_matplotlib()
        engine = trio.run(Engine.find)
        with tempfile.TemporaryDirectory(prefix="krg-dump-") as place:
            disk = Path(place) / "disk"
            disk.mkdir()
            facts = machine(engine, disk)
            with peers.tmpfs(Path(place) / "memory") as memory:
                bench = Bench(engine.path, disk, memory, mib, images)
                samples, failures = measure(bench, list(only) or [*KINDS, MANY], rounds)
    except (peers.MissingProgram, plot.MissingMatplotlib, Unfit, KrgError) as exc:
        raise click.ClickException(str(exc)) from exc
    facts |= {"load_after": round(os.getloadavg()[0], 2), "mib": mib, "rounds": rounds}
    figures = plot.figures(samples)
    table = plot.table(facts, figures)
    click.echo(table)
    if table_file:
        Path(table_file).write_text(table)
    if samples_file:
        whole = {
            "machine": facts,
            "figures": [figure._asdict() for figure in figures],
            "samples": samples,
            "failures": failures,
        }
        Path(samples_file).write_text(json.dumps(whole, indent=1) + "\n")
    if plot_file:
        plot.draw(samples, figures, facts, plot_file)
    if failures:
        raise click.ClickException("not measured: " + ", ".join(failures))


if __name__ == "__main__":
    main()
