"""What a checkpoint through /krg costs beside bare CRIU on the same process in the same run.

`python -m tests.bench.verbs [MIB]` prints JSON: milliseconds and ratios krgfs / bare, medians of
rounds in turn. Bare is `criu dump --leave-running` into a directory on the same filesystem; once as
it is (nothing durable afterwards) and once with a sync of the filesystem, which krgfs includes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.files import in_turn
from tests.sites import Site
from tests.workloads import harness

SMALL_ROUNDS = 15
BIG_ROUNDS = 5


class Bare:
    """Bare CRIU, dumping one process again and again."""

    def __init__(self, criu: str, pid: int, directory: Path) -> None:
        self._command = [criu, "dump", "--leave-running", "-t", str(pid), "-D", str(directory)]
        self._command += ["-o", "dump.log", "--manage-cgroups=ignore", "--file-locks"]
        self._command += ["--network-lock", "skip"]
        self._directory = directory

    def dump_ms(self) -> float:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        begin = time.perf_counter()
        subprocess.run(self._command, check=True, capture_output=True, start_new_session=True)
        return (time.perf_counter() - begin) * 1000

    def durable_ms(self) -> float:
        dumped = self.dump_ms()
        begin = time.perf_counter()
        fd = os.open(self._directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        subprocess.run(["sync", "-f", str(self._directory)], check=True)
        return dumped + (time.perf_counter() - begin) * 1000


def through_krg_ms(site: Site, pid: int) -> float:
    """One `echo 1 > checkpoint`; its image is removed again, outside the time measured."""
    path = site.proc(pid) / "checkpoint"
    begin = time.perf_counter()
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"1\n")
    os.close(fd)
    taken = (time.perf_counter() - begin) * 1000
    image = site.read(path).strip()
    os.rmdir(site.mnt / "images" / image)
    return taken


def measure(site: Site, name: str, rounds: int, *arguments: str) -> dict[str, float]:
    with harness.start(name, site.base / name, *arguments) as workload:
        workload.wait_ready()
        pid = workload.pid
        criu = site.facts(f"nodes/{site.node}/info")["criu_path"]
        bare = Bare(criu, pid, site.base / "bare")
        bare.dump_ms()
        through_krg_ms(site, pid)
        krg, dump, durable = in_turn(
            lambda: through_krg_ms(site, pid), bare.dump_ms, bare.durable_ms, rounds=rounds
        )
        return {
            "krg_ms": krg,
            "bare_ms": dump,
            "bare_and_sync_ms": durable,
            "over_bare_ms": krg - dump,
            "ratio_to_bare": krg / dump,
            "ratio_to_bare_and_sync": krg / durable,
        }


def main() -> None:
    mib = sys.argv[1] if len(sys.argv) > 1 else "1024"
    with Site() as site:
        figures = {
            "small": measure(site, "small", SMALL_ROUNDS),
            f"{mib}_MiB": measure(site, "memory", BIG_ROUNDS, mib, "0"),
        }
    rounded: dict[str, object] = {
        name: {key: round(value, 3) for key, value in each.items()}
        for name, each in figures.items()
    }
    rounded["small_over_bare_ms"] = round(figures["small"]["over_bare_ms"], 3)
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
