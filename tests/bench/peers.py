"""What people have without krgfs, on the same process: bare CRIU, and tar and zstd behind it.

All times are milliseconds of wall time, but for what CRIU itself says of a dump. What a peer wrote
is on the disk when `to_disk` and `to_archive` return: its files are synced one by one, so that what
others write on the same filesystem does not count.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agent import criu_images
from tests.bench.loads import Load

PROGRAMS = {"zstd": "apt-get install zstd", "tar": "apt-get install tar"}
OPTIONS = ("--manage-cgroups=ignore", "--file-locks", "-v1")
NULL = subprocess.DEVNULL


class MissingProgram(Exception):
    """A program that the bench measures against is not there; install what the message names."""


class Dumped(NamedTuple):
    """One dump: how long the tree stood still, by CRIU's word and as it felt it, and all of it."""

    frozen_ms: float
    felt_ms: float
    taken_ms: float


class Restored(NamedTuple):
    """One restore: when the tree ran its first instruction, and when the writer was answered."""

    first_ms: float
    taken_ms: float


class Copied(NamedTuple):
    """So many bytes in so many seconds."""

    size_bytes: int
    seconds: float

    @property
    def mb_per_s(self) -> float:
        return self.size_bytes / 1e6 / self.seconds


class Bare:
    """Bare CRIU on one load, with directories of its own in memory and on the disk."""

    def __init__(self, criu: str, load: Load, memory: Path, disk: Path) -> None:
        self._criu = criu
        self._load = load
        self._memory, self._disk, self._archive = memory / "bare", disk / "bare", disk / "tar.zst"

    def to_memory(self) -> Dumped:
        """Dump to tmpfs; the images stay there for `restore`."""
        self._load.forget_gap()
        taken = self._dump(self._memory)
        felt = self._load.gap().length_s * 1000
        return Dumped(criu_images.dump_stats(self._memory).frozen_ms, felt, taken)

    def to_disk(self) -> float:
        settle(self._disk.parent)
        taken = self._dump(self._disk)
        begin = time.perf_counter()
        _sync(self._disk)
        taken += _since_ms(begin)
        shutil.rmtree(self._disk)
        return taken

    def to_archive(self) -> tuple[float, int]:
        """Dump to the disk, pack that by tar and zstd; return the time and the archive's size."""
        settle(self._disk.parent)
        taken = self._dump(self._disk)
        begin = time.perf_counter()
        pack(self._disk, self._archive)
        _fsync(self._archive)
        _fsync(self._archive.parent)
        taken += _since_ms(begin)
        size = self._archive.stat().st_size
        shutil.rmtree(self._disk)
        self._archive.unlink()
        return taken, size

    def restore(self) -> Restored:
        """Restore what `to_memory` wrote last; the load has ended before."""
        self._load.forget_gap()
        begin_s, begin = time.time(), time.perf_counter()
        self._run("restore", self._memory, "-d")
        taken = _since_ms(begin)
        return Restored((self._load.gap().end_s - begin_s) * 1000, taken)

    def _dump(self, directory: Path) -> float:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        begin = time.perf_counter()
        self._run("dump", directory, "-t", str(self._load.pid), "-R", "--network-lock", "skip")
        return _since_ms(begin)

    def _run(self, verb: str, directory: Path, *words: str) -> None:
        """Run CRIU to its end, also when we are told to stop: what it has half restored carries no
        mark by which it could be found and ended."""
        command = [self._criu, verb, "-D", str(directory), "-o", "log", *OPTIONS, *words]
        process = subprocess.Popen(
            command, stdin=NULL, stdout=NULL, stderr=NULL, start_new_session=True
        )
        try:
            process.wait()
        except BaseException:
            process.wait()
            raise
        if process.returncode:
            log = (directory / "log").read_text(errors="replace")
            raise AssertionError(f"bare criu {verb} failed:\n{log[-2000:]}")


def need_programs() -> None:
    """Raise MissingProgram unless all are there that the bench measures against."""
    for program, remedy in PROGRAMS.items():
        if not shutil.which(program):
            raise MissingProgram(
                f"{program} is not installed, and krgfs is measured against it: {remedy}"
            )


@contextlib.contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    """A tmpfs of our own, so that nobody else's is filled."""
    directory.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=90%,mode=700", "none", directory], check=True
    )
    try:
        yield directory
    finally:
        lazily = subprocess.run(["umount", directory], capture_output=True).returncode
        if lazily:
            subprocess.run(["umount", "-l", directory], check=True)
        directory.rmdir()


def settle(directory: Path) -> None:
    """Have what was written before on the disk, so that the next measure does not pay for it."""
    subprocess.run(["sync", "-f", directory], check=True)


def pack(directory: Path, archive: Path) -> None:
    """`tar -c DIRECTORY | zstd -1 -T0 > ARCHIVE`."""
    with contextlib.ExitStack() as stack:
        tar = stack.enter_context(
            _running(["tar", "-c", "-C", str(directory), "."], stdout=subprocess.PIPE)
        )
        zstd = stack.enter_context(
            _running(["zstd", "-1", "-T0", "-q", "-f", "-o", str(archive)], stdin=tar.stdout)
        )
        assert tar.stdout is not None
        tar.stdout.close()
        if zstd.wait() or tar.wait():
            raise AssertionError(f"tar and zstd ended with {tar.returncode} and {zstd.returncode}")


def compressed_bytes(path: Path) -> int:
    """Return what zstd -1 makes of a file."""
    with tempfile.TemporaryFile(dir=path.parent) as out:
        subprocess.run(["zstd", "-1", "-q", "-c", path], stdout=out, check=True)
        return out.seek(0, os.SEEK_END)


def copy_out(image: Path, memory: Path) -> Copied:
    """`cp -r` an image out of the mount, to tmpfs."""
    out = memory / "copy"
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", image, out], check=True)
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return Copied(size, seconds)


def unpack(image: Path, memory: Path) -> Copied:
    """`zstd -d` the same data, its files one behind the other, from tmpfs to tmpfs.

    Zeros are written as cp writes them, not left out.
    """
    packed, out = memory / "whole.zst", memory / "whole"
    with (
        open(packed, "wb") as file,
        _running(["zstd", "-1", "-T0", "-q", "-c"], stdin=subprocess.PIPE, stdout=file) as zstd,
    ):
        assert zstd.stdin is not None
        for path in sorted(image.iterdir()):
            with open(path, "rb") as part:
                shutil.copyfileobj(part, zstd.stdin, 1 << 20)
        zstd.stdin.close()
        assert zstd.wait() == 0, "zstd has failed"
    begin = time.perf_counter()
    subprocess.run(["zstd", "-d", "-q", "--no-sparse", packed, "-o", out], check=True)
    seconds = time.perf_counter() - begin
    copied = Copied(out.stat().st_size, seconds)
    packed.unlink()
    out.unlink()
    return copied


@contextlib.contextmanager
def _running(command: list[str], **popen: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive this."""
    process = subprocess.Popen(command, **popen)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        _fsync(path)
    _fsync(directory)
    _fsync(directory.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _since_ms(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000
