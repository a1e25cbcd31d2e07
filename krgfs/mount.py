"""krgfs(8): puts the tree of files on a mountpoint and serves it until it is told to end.

Before mounting, a dead mount of an earlier life is unmounted lazily, and the bare directory is made
immutable where its filesystem can: a write into it after a crash would create a plain file and
return success.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import resource
import signal
import struct
import subprocess
import sys

import click
import pyfuse3
import trio

from . import facts
from .fuse import Mount

log = logging.getLogger("krgfs")
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10
MOUNTED = {"fsname=krg", "subtype=krgfs", "allow_other", "default_permissions"}
NICE = -5
ANSWERING_S = 0.05
ENDING_S = 2.0


def is_dead_mount(path: str) -> bool:
    """Tell whether a FUSE mount is there whose daemon has ended (stat(2) may not ask it)."""
    try:
        os.statvfs(path)
    except OSError as exc:
        return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    return False


def is_mounted(path: str) -> bool:
    """Tell whether a krgfs is mounted at a path (proc_pid_mountinfo(5))."""
    wanted = os.path.realpath(path) if not is_dead_mount(path) else os.path.abspath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if right.startswith("fuse.krgfs ") and left.split()[4] == wanted:
                return True
    return False


def unmount(path: str) -> None:
    """Unmount at once; what is still open there goes on until it is closed."""
    subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)


def prepare(path: str) -> None:
    """Have a bare, unwritable directory at the mountpoint."""
    while is_dead_mount(path):
        log.warning("mount.dead path=%s action=unmount", path)
        unmount(path)
    os.makedirs(path, mode=0o555, exist_ok=True)
    set_immutable(path, True)


def set_immutable(path: str, on: bool) -> None:
    """Set or clear chattr(1)'s i where the filesystem has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        raw = fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("l", 0))
        (flags,) = struct.unpack("l", raw)
        flags = flags | FS_IMMUTABLE_FL if on else flags & ~FS_IMMUTABLE_FL
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))
    except OSError as exc:
        log.info("mountpoint.writable path=%s reason=%r", path, exc.strerror)
    finally:
        os.close(fd)


def hides_pids() -> bool:
    """Tell whether /proc is mounted with hidepid here (proc(5); Linux 5.8 writes it in words). What
    was mounted over it last counts."""
    hidden = "off"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            if left.split()[4] == "/proc" and right.startswith("proc "):
                options = dict(each.partition("=")[::2] for each in right.split()[2].split(","))
                hidden = options.get("hidepid", "off")
    return hidden not in ("off", "0")


async def _serve(mount: Mount, mountpoint: str) -> None:
    async with trio.open_nursery() as nursery:

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    log.info("mount.ending path=%s signal=%d", mountpoint, number)
                    mount.blocked.end()
                    await trio.sleep(ANSWERING_S)
                    pyfuse3.terminate()
                    await trio.sleep(ENDING_S)
                    nursery.cancel_scope.cancel()  # what waits for the agent still
                    return

        nursery.start_soon(end_on_signal)
        await mount.serve()
        nursery.cancel_scope.cancel()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("mountpoint", default="/krg")
@click.option("--socket", default="/run/krgfs/agent.sock", show_default=True, help="the agent's")
@click.option("--verbose", is_flag=True, help="log more")
def main(mountpoint: str, socket: str, verbose: bool) -> None:
    """Mount krgfs at MOUNTPOINT (/krg) and serve it in the foreground. See krgfs(8)."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s krgfs %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("pyfuse3").setLevel(logging.INFO)
    path = os.path.abspath(mountpoint)
    if is_mounted(path) and not is_dead_mount(path):
        raise click.ClickException(f"krgfs is mounted at {path} already; unmount it first")
    prepare(path)
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each blocked writer takes one
    mount = Mount(socket, hides_pids())
    pyfuse3.init(mount, path, MOUNTED)
    log.info("mount.up path=%s pid=%d boot=%s", path, os.getpid(), facts.BOOT_ID)
    gc.freeze()
    unmounted = False
    try:
        trio.run(_serve, mount, path)
        unmounted = True
    finally:
        pyfuse3.close(unmount=True)
        log.info("mount.down path=%s clean=%s", path, unmounted)
