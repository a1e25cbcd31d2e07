"""What the node files and metrics show: facts of this machine, its load, and room in the store."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import socket
import time

import psutil
import trio
from msgspec.structs import replace

from krgfs import VERSION, facts
from krgfs.errors import KrgError
from krgfs.model import Load

from .parts import Parts

log = logging.getLogger(__name__)
LOOK_S = 5.0


def info(parts: Parts) -> dict[str, str]:
    """Return what nodes/NAME/info shows."""
    uname = platform.uname()
    return {
        "address": socket.gethostname(),
        "kernel": uname.release,
        "arch": uname.machine,
        "cpu_flags": _cpu_flags_digest(),
        "criu_version": parts.engine.version,
        "criu_path": parts.engine.path,
        "criu_features": " ".join(parts.engine.features),
        "freezer": f"cgroup-v{parts.freezer.hierarchy.version}",
        "agent_version": VERSION,
        "agent_pid": str(os.getpid()),
        "boot_id": facts.BOOT_ID,
    }


def load() -> Load:
    """Measure what nodes/NAME/load shows; takes about a millisecond."""
    memory = psutil.virtual_memory()
    load1 = os.getloadavg()[0]
    running, processes = _tasks()
    return Load(
        cpus=psutil.cpu_count() or 1,
        load1=load1,
        running=running,
        memory_total=memory.total,
        memory_available=memory.available,
        pressure=_pressure(),
        processes=processes,
        measured=time.time(),
    )


async def show(parts: Parts) -> None:
    """Measure, and tell the mounts."""
    measured = load()
    kept = sum(not known.ended for known in parts.state.trees.values())
    node = replace(
        parts.state.node,
        info=parts.state.node.info or info(parts),
        load=measured,
        unmanaged=max(0, measured.processes - kept),
    )
    parts.state.show_figures(node, await parts.images.usage())


async def keep(parts: Parts) -> None:
    """Do that every few seconds, and drop records that have outlived their use."""
    while True:
        await trio.sleep(LOOK_S)
        try:
            await show(parts)
        except KrgError as exc:  # a back end that is out of reach now; the old figures stay
            log.warning("figures.failed reason=%s", exc.message)
        await trio.to_thread.run_sync(parts.images.idle)
        old = parts.state.outlived()
        for start in range(0, len(old), 50):
            await parts.state.commit(delete=old[start : start + 50])


def _tasks() -> tuple[int, int]:
    with open("/proc/loadavg", encoding="ascii") as file:
        running = int(file.read().split()[3].partition("/")[0])
    return running, sum(1 for _ in facts.processes())


def _pressure() -> float:
    """Return the share of the last 10 s in which some task waited for memory, in percent."""
    try:
        with open("/proc/pressure/memory", encoding="ascii") as file:
            return float(file.readline().split()[1].partition("=")[2])
    except OSError:
        return 0.0


def _cpu_flags_digest() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    words = " ".join(sorted(flags.partition(":")[2].split()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]
