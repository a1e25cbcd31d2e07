"""What works on this machine: `TABLE` has the checks, each tries the thing itself where it may.

Runs without the agent, and as far as possible without root. A check that stumbles is a failed
check, never an exception. Nothing stays behind: no process, cgroup or firewall table.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from . import service
from .cli_criu import FETCHED_CRIU, LEAST_CRIU, SBIN, Criu, checked, find_criu, numbers, run
from .cli_files import Files
from .cli_table import size
from .errors import KrgError
from .service import Places

OK, WARN, FAIL = "ok", "warn", "fail"
LEAST_KERNEL = (5, 9)
FREEZE_S = 2.0
MIB = 1 << 20
PIPE_BYTES = 1 << 30
PR_SET_MM, PR_SET_MM_MAP_SIZE = 35, 15
PTRACE_SEIZE = 0x4206


class Check(NamedTuple):
    """One line of the table: `state` is ok, warn or fail; `remedy` is what to do about it."""

    name: str
    state: str
    found: str
    remedy: str = ""


class Machine(NamedTuple):
    """What the checks are about."""

    places: Places
    criu: Criu
    is_root: bool


class Report(NamedTuple):
    criu: Criu
    checks: tuple[Check, ...]

    @property
    def has_failed(self) -> bool:
        return any(each.state == FAIL for each in self.checks)


def examine(places: Places, criu: str = "") -> Report:
    """Try everything. The CRIU is the agent's where one runs, else what `up` would choose."""
    is_root = os.geteuid() == 0
    machine = Machine(places, checked(find_criu(_agents_criu(places) or criu)), is_root)
    return Report(machine.criu, tuple(each for try_it in TABLE for each in _tried(try_it, machine)))


def _tried(try_it: Callable[[Machine], Iterator[Check]], machine: Machine) -> Iterator[Check]:
    name = try_it.__name__
    try:
        yield from try_it(machine)
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        yield Check(name, FAIL, f"could not be tried: {exc}", "see krg(1), doctor")


def _agents_criu(places: Places) -> str:
    node = service.node_online(places)
    try:
        return Files(places.mount).pairs("nodes", node, "info").get("criu_path", "") if node else ""
    except KrgError:
        return ""


# -- the checks


def kernel(machine: Machine) -> Iterator[Check]:
    release = os.uname().release
    found = f"Linux {release}, {os.uname().machine}"
    if numbers(release) >= LEAST_KERNEL:
        yield Check("kernel", OK, found)
    else:
        yield Check("kernel", WARN, found, "5.9 is the oldest that krgfs is meant for")


def checkpoint_restore(machine: Machine) -> Iterator[Check]:
    """Ask for the size of struct prctl_mm_map, which only such a kernel knows (prctl(2))."""
    answer = ctypes.c_uint()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_MM, PR_SET_MM_MAP_SIZE, ctypes.byref(answer), 0, 0) == 0:
        yield Check("checkpoint-restore", OK, "the kernel has CONFIG_CHECKPOINT_RESTORE")
    else:
        yield Check(
            "checkpoint-restore",
            FAIL,
            f"prctl(PR_SET_MM_MAP_SIZE): {os.strerror(ctypes.get_errno())}",
            "boot a kernel with CONFIG_CHECKPOINT_RESTORE=y, as the distributions' are",
        )


def criu(machine: Machine) -> Iterator[Check]:
    found = machine.criu
    if not found.version:
        sought = found.path or "criu on PATH, " + FETCHED_CRIU
        yield Check("criu", FAIL, f"no CRIU that starts ({sought})", "run contrib/quickstart")
        return
    text = f"{found.path}, version {found.version}"
    if not found.ok and machine.is_root:
        yield Check(
            "criu",
            FAIL,
            f"{text}; `criu check` says: {_last_line(found.said)}",
            "try `criu check --all`; contrib/fetch-criu fetches one that fits new kernels",
        )
    elif numbers(found.version) < LEAST_CRIU:
        yield Check("criu", WARN, text, "kernels from 6.16 on need 4.2: contrib/fetch-criu has it")
    elif not found.ok:
        yield Check("criu", OK, f"{text}; root can ask `criu check` for more")
    else:
        yield Check("criu", OK, f"{text}; `criu check`: {_last_line(found.said)}")


class Capability(NamedTuple):
    bit: int
    name: str
    state: str
    without: str


CAPABILITIES = (
    Capability(21, "cap_sys_admin", FAIL, "nothing can be mounted, dumped or restored"),
    Capability(19, "cap_sys_ptrace", FAIL, "processes of other users cannot be dumped"),
    Capability(40, "cap_checkpoint_restore", WARN, "pids are kept through CAP_SYS_ADMIN instead"),
    Capability(
        24,
        "cap_sys_resource",
        WARN,
        "another user's process is dumped under that user's uid; raised limits are lost",
    ),
)


def capabilities(machine: Machine) -> Iterator[Check]:
    """Look at what we have; without root at what root could have here (capabilities(7))."""
    kind = "CapEff" if machine.is_root else "CapBnd"
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith(f"{kind}:"))
    for each in CAPABILITIES:
        if mask >> each.bit & 1:
            yield Check(each.name, OK, "there" if machine.is_root else "root may have it")
        else:
            remedy = f"give the container or service {each.name.upper()}"
            yield Check(each.name, each.state, f"missing: {each.without}", remedy)


def ptrace(machine: Machine) -> Iterator[Check]:
    """Seize a child, as CRIU seizes what it dumps (ptrace(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with _sleeper() as pid:
        done = libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0
        number = ctypes.get_errno()
    if done:
        yield Check("ptrace", OK, "a process can be seized")
    else:
        yield Check(
            "ptrace",
            FAIL if machine.is_root else WARN,
            f"a child cannot be seized: {os.strerror(number)}",
            "see /proc/sys/kernel/yama/ptrace_scope and the container's seccomp profile",
        )


def pidfd(machine: Machine) -> Iterator[Check]:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as exc:
        yield Check("pidfd", FAIL, f"pidfd_open: {exc.strerror}", "Linux 5.3 or newer has it")
    else:
        yield Check("pidfd", OK, "processes can be watched by descriptor")


def fuse(machine: Machine) -> Iterator[Check]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM) and not machine.is_root:
            yield Check("fuse", OK, "/dev/fuse is there, for root")
        else:
            remedy = "`modprobe fuse`; in a container, give it the device /dev/fuse"
            yield Check("fuse", FAIL, f"/dev/fuse: {exc.strerror}", remedy)
            return
    else:
        yield Check("fuse", OK, "/dev/fuse opens")
    try:
        import pyfuse3  # noqa: F401
    except ImportError as exc:
        remedy = "install libfuse3 and krgfs again (contrib/quickstart does)"
        yield Check("pyfuse3", FAIL, str(exc), remedy)
    if found := shutil.which("fusermount3"):
        yield Check("fusermount3", OK, found)
    else:
        remedy = "install the package fuse3; root can mount without it"
        yield Check("fusermount3", WARN, "not on PATH", remedy)


def freezer(machine: Machine) -> Iterator[Check]:
    """Freeze and thaw a child in a leaf below our own cgroup, as a checkpoint does (cgroups(7))."""
    if not machine.is_root:
        there = [name for name, leaf in _leaves() if leaf]
        if there:
            yield Check("freezer", OK, f"{' and '.join(there)}; root can try it")
        else:
            yield _no_freezer("no cgroup with a freezer is mounted")
        return
    works, fails = [], []
    for name, leaf in _leaves():
        why = _freezes(leaf) if leaf else "not mounted"
        if why:
            fails.append(f"{name}: {why}")
        else:
            works.append(name)
    if works:
        yield Check("freezer", OK, f"{' and '.join(works)} froze and thawed a process")
    else:
        yield _no_freezer("; ".join(fails))


def _no_freezer(found: str) -> Check:
    remedy = "mount -t cgroup2 none /sys/fs/cgroup; in a container, make its cgroup writable"
    return Check("freezer", FAIL, found, remedy)


def nftables(machine: Machine) -> Iterator[Check]:
    """Add and remove a table in one transaction: nobody else ever sees it (nft(8))."""
    without = "connections cannot be kept (tcp=keep)"
    nft = shutil.which("nft", path=os.environ.get("PATH", "") + ":" + SBIN)
    if not nft:
        yield Check("nftables", WARN, f"no nft: {without}", "install the package nftables")
        return
    if not machine.is_root:
        yield Check("nftables", OK, f"{nft}; root can try it")
        return
    table = f"inet krg_doctor_{os.getpid()}"
    code, said = run([nft, "-f", "-"], f"add table {table}\ndelete table {table}\n")
    if code == 0:
        yield Check("nftables", OK, "a table can be added and removed")
    else:
        remedy = "`modprobe nf_tables`, or a kernel with CONFIG_NF_TABLES"
        yield Check("nftables", WARN, f"{_last_line(said)}: {without}", remedy)


def pipes(machine: Machine) -> Iterator[Check]:
    with open("/proc/sys/fs/pipe-max-size", encoding="ascii") as file:
        most = int(file.read())
    ours, theirs = os.pipe()
    try:
        got = fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, min(most, MIB))
    finally:
        os.close(ours)
        os.close(theirs)
    found = f"a pipe may have {size(most)}, {size(got)} was granted"
    if got < MIB:
        yield Check("pipe-max-size", WARN, f"{found}: images are read slowly", _more_pipe(MIB))
    elif most < PIPE_BYTES and not _has_capability(24):
        found = f"{size(most)}, and no CAP_SYS_RESOURCE to exceed it: big pages-pipes fail"
        yield Check("pipe-max-size", WARN, found, _more_pipe(PIPE_BYTES))
    else:
        yield Check("pipe-max-size", OK, found)


def _more_pipe(amount: int) -> str:
    return f"sysctl fs.pipe-max-size={amount}, and the same line in /etc/sysctl.d/krgfs.conf"


def _has_capability(bit: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return bool(mask >> bit & 1)


def run_directory(machine: Machine) -> Iterator[Check]:
    kind = _type_of("/run")
    if kind == "tmpfs":
        yield Check("/run", OK, "a tmpfs: CRIU keeps what it learned of the kernel there")
    else:
        found = f"on {kind}, no tmpfs: CRIU asks the kernel anew each time, 35 ms a dump"
        yield Check("/run", WARN, found, "mount a tmpfs on /run at boot")


def store(machine: Machine) -> Iterator[Check]:
    path = os.path.join(machine.places.state, "images")
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    room = os.statvfs(path)
    free = room.f_bavail * room.f_frsize
    found = f"{size(free)} of {size(room.f_blocks * room.f_frsize)} free below {path}"
    remedy = "make room (krg images shows what takes it), or choose a place by krg up --state"
    if free < 64 * MIB:
        yield Check("store", FAIL, found, remedy)
    elif free < 2048 * MIB or (room.f_files and not room.f_favail):
        yield Check("store", WARN, found, remedy)
    else:
        yield Check("store", OK, found)


def keeper(machine: Machine) -> Iterator[Check]:
    try:
        path = service.keeper()
    except KrgError as exc:
        yield Check("keeper", FAIL, "krg-keeper is not there", exc.message)
        return
    code, said = run([path])
    if code == 2:
        yield Check("keeper", OK, path)
    else:
        yield Check(
            "keeper", FAIL, f"{path} ended with {code}: {_last_line(said)}", "build it anew"
        )


def _supervision(machine: Machine, daemon: str) -> Iterator[Check]:
    """Warn of a daemon that nobody would start again; only root can tell."""
    with service.orphan(machine.places, daemon) as found:
        if found is not None:
            ended = f"the process that starts pid {found[0]} again was ended"
            yield Check(daemon, WARN, ended, "`krg up` as root starts both anew")


def agent(machine: Machine) -> Iterator[Check]:
    yield from _supervision(machine, service.AGENT)
    node = service.node_online(machine.places)
    pid = service.agent_pid(machine.places)
    if pid:
        yield Check("agent", OK, f"pid {pid} answers at {machine.places.socket}")
    elif node:
        yield Check("agent", OK, f"node {node} is online")
    elif os.path.exists(machine.places.socket) and not machine.is_root:
        yield Check("agent", WARN, f"only root may ask at {machine.places.socket}", "run as root")
    else:
        found = f"nothing answers at {machine.places.socket}"
        yield Check("agent", WARN, found, "`krg up` as root starts it")


def mount(machine: Machine) -> Iterator[Check]:
    yield from _supervision(machine, service.MOUNT)
    where = machine.places.mount
    try:
        version = Files(where).line("version")
    except KrgError as exc:
        yield Check("mount", WARN, exc.message.partition(";")[0], "`krg up` as root mounts it")
        return
    if service.node_online(machine.places):
        yield Check("mount", OK, f"{where}, version {version}")
    else:
        yield Check("mount", WARN, f"{where} has lost its agent", "`krg up` as root starts it")


TABLE: tuple[Callable[[Machine], Iterator[Check]], ...] = (
    kernel,
    checkpoint_restore,
    criu,
    capabilities,
    ptrace,
    pidfd,
    fuse,
    freezer,
    nftables,
    pipes,
    run_directory,
    store,
    keeper,
    agent,
    mount,
)


# -- what the checks need


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "nothing"


@contextmanager
def _sleeper() -> Iterator[int]:
    """Enter the block with a child that does nothing, and that is gone afterwards."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.kill()


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Yield mountpoint, type and options of every mount (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            kind, _, options = right.split()[:3]
            yield left.split()[4].encode().decode("unicode_escape"), kind, options


def _type_of(path: str) -> str:
    found = [(where, kind) for where, kind, _ in _mounts() if _is_below(path, where)]
    return max(found, key=lambda each: len(each[0]))[1] if found else "an unknown filesystem"


def _is_below(path: str, where: str) -> bool:
    return path == where or path.startswith(where.rstrip("/") + "/")


def _leaves() -> Iterator[tuple[str, str]]:
    """Yield each kind of freezer with a directory to try it in, empty where it is not mounted."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        ours = {kind: path for _, kind, path in (line.strip().split(":", 2) for line in file)}
    leaf = f"krg-doctor.{os.getpid()}"
    for name, kind, option, key in (
        ("cgroup v2", "cgroup2", "", ""),
        ("cgroup v1", "cgroup", "freezer", "freezer"),
    ):
        where = [m for m, k, o in _mounts() if k == kind and (not option or option in o.split(","))]
        below = ours.get(key)
        is_there = bool(where) and below is not None
        yield name, f"{where[0]}/{below}/{leaf}".replace("//", "/") if is_there else ""


def _freezes(leaf: str) -> str:
    """Freeze and thaw a child there. Returns why it cannot be done, empty when it can."""
    is_v2 = not os.path.exists(os.path.join(os.path.dirname(leaf), "tasks"))
    switch, on, off = (
        ("cgroup.freeze", "1", "0") if is_v2 else ("freezer.state", "FROZEN", "THAWED")
    )
    shows, sign = ("cgroup.events", "frozen 1") if is_v2 else ("freezer.state", "FROZEN\n")
    try:
        os.mkdir(leaf)
    except OSError as exc:
        return f"cannot make {leaf}: {exc.strerror}"
    try:
        with _sleeper() as pid:
            _put(f"{leaf}/cgroup.procs", str(pid))
            try:
                _put(f"{leaf}/{switch}", on)
                return "" if _until(f"{leaf}/{shows}", sign) else "the process does not freeze"
            finally:
                _put(f"{leaf}/{switch}", off)
    except OSError as exc:
        return f"{exc.filename or leaf}: {exc.strerror}"
    finally:
        _remove(leaf)


def _put(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _until(path: str, sign: str) -> bool:
    end = time.monotonic() + FREEZE_S
    while time.monotonic() < end:
        with open(path, encoding="ascii") as file:
            if sign in file.read():
                return True
        time.sleep(0.005)
    return False


def _remove(leaf: str) -> None:
    """Remove a cgroup; a process that has just ended still counts for a moment."""
    end = time.monotonic() + FREEZE_S
    while time.monotonic() < end:
        try:
            os.rmdir(leaf)
        except OSError:
            time.sleep(0.005)
        else:
            return
