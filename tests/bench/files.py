"""What reading /krg costs beside a static pyfuse3 mount in the same run.

`python -m tests.bench.files [PROCESSES]` prints JSON: rates, and ratios krgfs / static. Ratios over
1 are in krgfs' favour for rates, below 1 for times. Each figure is the median of rounds in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.sites import Site, sleeper, until
from tests.workloads import harness

ROUNDS = 9
OPENS = 1000
NULL = subprocess.DEVNULL


def opens_per_s(path: str) -> float:
    """Rate of open+read+close of one file, one after the other."""
    begin = time.perf_counter()
    for _ in range(OPENS):
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)
    return OPENS / (time.perf_counter() - begin)


def listing_s(path: str) -> float:
    begin = time.perf_counter()
    subprocess.run(["ls", "-l", path], stdout=NULL, stderr=NULL, check=False)  # some end meanwhile
    return time.perf_counter() - begin


def in_turn(*measures: Callable[[], float], rounds: int = ROUNDS) -> list[float]:
    """Medians of several measures taken in turn, so that drift of the machine hits all alike."""
    taken = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


@contextlib.contextmanager
def static_mount(entries: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="krg-static-") as directory:
        command = [sys.executable, "-m", "tests.bench.static_mount", directory, str(entries)]
        process = subprocess.Popen(command)
        try:
            until(lambda: os.path.exists(f"{directory}/status"), "static mount up")
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=False, capture_output=True)
            process.wait()


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(sleeper()) for _ in range(count)]


@contextlib.contextmanager
def blocked_verbs(site: Site, pids: list[int]) -> Iterator[None]:
    """As many writers blocked in `wait` as there are pids."""

    def wait(pid: int) -> None:
        with contextlib.suppress(OSError):
            site.write(f"procs/{pid}/wait", "1")

    threads = [threading.Thread(target=wait, args=(pid,), daemon=True) for pid in pids]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    yield


def resident_mb(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total / 1024


def keeper_mb(site: Site) -> float:
    """Resident memory of the one keeper of a small tree that was restarted."""
    with harness.start("small", site.base / "kept") as workload:
        workload.wait_ready()
        site.write(site.proc(workload.pid) / "checkpoint", "name=kept then=kill")
        workload.wait_gone([workload.pid])
        answer = site.write("restart", "kept")
        assert answer == f"pid {workload.pid}\n", answer
        (keeper,) = site.keepers()
        return resident_mb([keeper])


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        field = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(field[11]) + int(field[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with Site() as site, sleepers(processes) as pids:
        assert site.agent and site.mount
        daemons = [site.agent.pid, site.mount.pid]
        time.sleep(1)
        before, begin = cpu_s(daemons), time.monotonic()
        time.sleep(10)
        idle = (cpu_s(daemons) - before) / (time.monotonic() - begin)
        figures: dict[str, float] = {
            "idle_core_percent": idle * 100,
            "resident_mb": resident_mb(daemons),
        }
        shown = len(os.listdir(site.mnt / "procs"))
        with static_mount(shown) as static:
            status = f"{site.mnt}/nodes/{site.node}/procs/{pids[0]}/status"
            short = f"{site.mnt}/procs/{pids[0]}/status"
            ours, peer = in_turn(
                lambda: opens_per_s(status), lambda: opens_per_s(f"{static}/status")
            )
            figures |= {"opens_per_s": ours, "opens_static_per_s": peer, "opens_ratio": ours / peer}
            ours, peer = in_turn(
                lambda: opens_per_s(short), lambda: opens_per_s(f"{static}/status")
            )
            figures |= {"opens_by_procs_link_ratio": ours / peer}
            with blocked_verbs(site, pids[1:101]):
                loaded, peer = in_turn(
                    lambda: opens_per_s(status), lambda: opens_per_s(f"{static}/status")
                )
            figures |= {"opens_with_100_blocked_ratio": loaded / peer}
            ours, peer = in_turn(
                lambda: listing_s(f"{site.mnt}/procs/"), lambda: listing_s(f"{static}/procs/")
            )
            figures |= {"ls_s": ours, "ls_static_s": peer, "ls_ratio": ours / peer}
            figures["entries"] = shown
        figures["keeper_mb"] = keeper_mb(site)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
