"""What dump.py measures on: processes that hold memory of known content and judge themselves.

`python -m tests.bench.loads SHAPE DIR ...` is the process itself, and stays small: it reads its
content from files that the bench has made before. Every millisecond its root ticks, and keeps the
longest time between two ticks in the mapped DIR/beat: how long the tree stood still as it felt it,
and after a restart when its first instruction was. SIGUSR1 has it dirty its pages and put what they
hold now into DIR/dirtied; SIGTERM asks for its verdict on all that it holds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.workloads import harness

HERE = Path(__file__).resolve().parent.parent.parent
PAGE = mmap.PAGESIZE
MIB = 1 << 20
TICK_S = 0.001
DIRTY = 0.05
CHILDREN, CHILD_DIRTY = 8, 0.01
SMALL = 64
SMALL_PERIOD_MS = 1000
GAP = struct.Struct("dd")  # when the longest time between two ticks began, and how long it was
TICK = struct.Struct("d")  # behind it: when the last tick was
WORDS, PHRASES, PHRASE_WORDS = 6000, 50000, (2, 4)
DEADLINE_S = 120.0


class Kind(NamedTuple):
    """A workload: its shape, which pages it dirties between checkpoints, and what it is."""

    name: str
    shape: str
    dirties: str
    title: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("idle", "hold", "none", "half random, a quarter text, a quarter zero; idle"),
        Kind("region", "hold", "region", "as idle, 5 % of the pages dirtied in one region"),
        Kind("random", "hold", "random", "as idle, 5 % of the pages dirtied all over what is held"),
        Kind("forked", "fork", "none", "a parent with an eighth of the memory, 8 forked from it"),
        Kind("small", "many", "none", "a tree of 64 small processes"),
    )
}


class Gap(NamedTuple):
    """The longest time between two ticks, in seconds of CLOCK_REALTIME.

    CRIU restores a process with its CLOCK_MONOTONIC going on from where it was dumped.
    """

    begin_s: float
    length_s: float

    @property
    def end_s(self) -> float:
        return self.begin_s + self.length_s


class Load:
    """A started workload, as the bench sees it."""

    def __init__(self, workload: harness.Workload) -> None:
        self._workload = workload
        self._beat = workload.directory / "beat"
        self._dirtied = workload.directory / "dirtied"

    @property
    def pid(self) -> int:
        return self._workload.pid

    def forget_gap(self) -> None:
        """Have the longest gap looked for anew; also while it is not there, before a restart."""
        with open(self._beat, "r+b") as file:
            file.write(bytes(GAP.size))

    def gap(self) -> Gap:
        """Return the longest gap since it was forgotten, once the process ticks again."""
        now = time.time()
        self._until("tick", lambda: self._read_beat(TICK, GAP.size)[0] > now)
        last = None
        while (found := self._read_beat(GAP)) != last:  # two equal reads are a whole one
            last = found
        return Gap(*found)

    def dirty(self) -> Path:
        """Have it dirty its pages; return a file of what they hold now, to be removed."""
        self._dirtied.unlink(missing_ok=True)
        self._workload.signal(signal.SIGUSR1)
        self._until("dirty its pages", self._dirtied.exists)
        return self._dirtied

    def end(self) -> None:
        """Kill it; on return its pids are free."""
        tree = self._workload.tree()
        self._workload.kill()
        self._workload.wait_gone(tree)

    def judge(self) -> None:
        """End it by asking for its verdict; raises AssertionError unless that is PASS."""
        tree = self._workload.tree()
        verdict = self._workload.finish()
        self._workload.wait_gone(tree)
        assert verdict == "PASS", f"{self._workload.name}: {verdict}"

    def _read_beat(self, part: struct.Struct, at: int = 0) -> tuple[float, ...]:
        return part.unpack_from(self._beat.read_bytes(), at)

    def _until(self, what: str, holds: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not holds():
            if time.monotonic() > end or not self._workload.alive():
                raise AssertionError(f"the workload did not {what}: {self._workload.said()}")
            time.sleep(TICK_S)


@contextlib.contextmanager
def running(kind: Kind, directory: Path, content: Path, mib: int) -> Iterator[Load]:
    """A ready workload; when this is left nothing of it runs, restored or not."""
    directory.mkdir()
    arguments = {
        "hold": (content, mib, kind.dirties),
        "fork": (content, mib // CHILDREN),
        "many": (harness.build("small.c"),) if kind.shape == "many" else (),
    }[kind.shape]
    mark = uuid.uuid4().hex
    with open(directory / "stdout", "ab") as out, open(directory / "stderr", "ab") as err:
        launcher = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.bench.loads",
                kind.shape,
                directory,
                *map(str, arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=HERE,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "WORKLOAD_ID": mark},
            start_new_session=True,
        )
    with harness.Workload(kind.name, directory, mark, launcher) as workload:
        _wait_ready(workload, launcher)
        yield Load(workload)


def make_content(directory: Path, mib: int) -> None:
    """Write DIR/random and DIR/text, from which workloads of up to so many MiB are filled."""
    with open(directory / "random", "wb") as file:
        for _ in range(mib // 2):
            file.write(os.urandom(MIB))
    with open(directory / "text", "wb") as file:
        for _ in range(mib // 4):
            file.write(_text(MIB))


def _wait_ready(workload: harness.Workload, launcher: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not (workload.directory / "ready").exists():
        if launcher.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"{workload.name} did not become ready: {workload.said()}")
        time.sleep(0.01)


# -- text: phrases of made-up words, the frequent ones as frequent as in a language (Zipf's law)


@functools.cache
def _phrases() -> tuple[list[str], list[float]]:
    """Return phrases and their cumulative weights, the same ones in every process."""
    chance = random.Random(1)
    syllables = [
        "".join(each) for each in itertools.product("bdfklmnprst", "aeiou", ("", "n", "r"))
    ]
    words = [
        "".join(chance.choices(syllables, k=chance.choice((1, 2, 2, 3)))) for _ in range(WORDS)
    ]
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(WORDS)))
    phrases = [
        " ".join(chance.choices(words, cum_weights=weights, k=chance.randint(*PHRASE_WORDS))) + " "
        for _ in range(PHRASES)
    ]
    return phrases, list(itertools.accumulate(1 / (rank + 100) for rank in range(PHRASES)))


def _text(size_bytes: int) -> bytes:
    phrases, weights = _phrases()
    text = ""
    while len(text) < size_bytes:
        text += "".join(random.choices(phrases, cum_weights=weights, k=size_bytes // 16))
    return text[:size_bytes].encode()


# -- the process itself


class Memory:
    """An anonymous mapping: half random, a quarter text, a quarter zeros that were written."""

    def __init__(self, content: Path, mib: int) -> None:
        self._map = mmap.mmap(-1, mib * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._text_at, self._zero_at = mib // 2 * MIB, (mib // 2 + mib // 4) * MIB
        with memoryview(self._map) as whole:
            _fill(whole[: self._text_at], content / "random")
            _fill(whole[self._text_at : self._zero_at], content / "text")
            for at in range(self._zero_at, len(whole), PAGE):
                whole[at] = 0
        self._sum = self._checksum()

    def region(self) -> list[int]:
        """Return pages that lie side by side, in the random half."""
        count = int(len(self._map) // PAGE * DIRTY)
        first = random.randrange(self._text_at // PAGE - count + 1)
        return list(range(first, first + count))

    def spread(self) -> list[int]:
        """Return pages all over what is held; a zero page would be no zero page afterwards."""
        count = int(len(self._map) // PAGE * DIRTY)
        return sorted(random.sample(range(self._zero_at // PAGE), count))

    def scribble(self, count: int) -> None:
        """Dirty random pages of the random half."""
        for page in random.sample(range(self._text_at // PAGE), count):
            self._write(page)
        self._sum = self._checksum()

    def dirty(self, pages: list[int], copy: Path) -> None:
        """Give pages new content of their kind, and write that into a file."""
        fresh = copy.with_name(f".{copy.name}.new")
        with open(fresh, "wb") as file:
            for page in pages:
                file.write(self._write(page))
        self._sum = self._checksum()
        fresh.rename(copy)

    def intact(self) -> bool:
        return self._checksum() == self._sum

    def _write(self, page: int) -> bytes:
        at = page * PAGE
        new = os.urandom(PAGE) if at < self._text_at else _text(PAGE)
        self._map[at : at + PAGE] = new
        return new

    def _checksum(self) -> int:
        return zlib.crc32(self._map)


def _fill(part: memoryview, path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < len(part):
            got = file.readinto(part[at:])
            assert got, f"{path} has only {at} bytes"
            at += got


def _hold(directory: Path, content: str, mib: str, dirties: str) -> None:
    memory = Memory(Path(content), int(mib))
    choose = {"region": memory.region, "random": memory.spread, "none": list[int]}[dirties]
    _serve(directory, lambda: memory.dirty(choose(), directory / "dirtied"), memory.intact)


def _fork(directory: Path, content: str, mib: str) -> None:
    memory = Memory(Path(content), int(mib))
    ready, telling = os.pipe()
    children = []
    for _ in range(CHILDREN):
        pid = os.fork()
        if not pid:
            memory.scribble(int(int(mib) * MIB // PAGE * CHILD_DIRTY))
            os.write(telling, b".")
            os.close(ready)
            os.close(telling)
            signal.sigwait({signal.SIGTERM})
            os._exit(not memory.intact())
        children.append(pid)
    os.close(telling)
    said = 0
    while said < CHILDREN:
        got = len(os.read(ready, CHILDREN))
        assert got, "a child has died"
        said += got
    os.close(ready)
    _serve(directory, lambda: None, lambda: _passed(children) and memory.intact())


def _many(directory: Path, program: str) -> None:
    places = [directory / str(number) for number in range(SMALL)]
    children = []
    for place in places:
        place.mkdir()
        words = [program, str(place), str(SMALL_PERIOD_MS)]
        children.append(os.posix_spawn(program, words, os.environ, setsigmask=()))
    while not all((place / "ready").exists() for place in places):
        time.sleep(0.01)
    _serve(directory, lambda: None, lambda: _passed(children))


def _passed(children: list[int]) -> bool:
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    ends = [os.waitpid(pid, 0)[1] for pid in children]
    return not any(ends)


def _serve(directory: Path, dirty: Callable[[], None], passes: Callable[[], bool]) -> None:
    """Tick, and obey signals, until SIGTERM asks for the verdict."""
    path = directory / "beat"
    path.write_bytes(bytes(GAP.size + TICK.size))
    with open(path, "r+b") as file:
        beat = mmap.mmap(file.fileno(), GAP.size + TICK.size)
    _say(directory / "ready", f"{os.getpid()}\nholds and ticks\n")
    last = time.time()
    while True:
        told = signal.sigtimedwait(_SIGNALS, TICK_S)
        now = time.time()
        if now - last > GAP.unpack_from(beat)[1]:
            GAP.pack_into(beat, 0, last, now - last)
        TICK.pack_into(beat, GAP.size, now)
        last = now
        if told is None:
            continue
        if told.si_signo == signal.SIGTERM:
            break
        if told.si_signo == signal.SIGUSR1:  # a dump that comes meanwhile makes it return others
            dirty()
    _say(directory / "verdict", "PASS\n" if passes() else "FAIL: what it held is not there\n")


def _say(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


_SIGNALS = {signal.SIGUSR1, signal.SIGTERM}
_SHAPES: dict[str, Callable[..., None]] = {"hold": _hold, "fork": _fork, "many": _many}


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    shape, directory, *arguments = sys.argv[1:]
    _SHAPES[shape](Path(directory), *arguments)


if __name__ == "__main__":
    main()
