"""A disk that is full at any byte of a checkpoint: ENOSPC, the tree runs on, what was there before
is good, and of the attempt nothing stays."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.backend import Data, MemoryBackend, Upload
from agent.images import Images
from agent.manifest import Manifest
from krgfs.errors import NoRoom
from tests.sites import Site, until
from tests.workloads import harness
from tests.workloads.harness import Workload

PLENTY = 1 << 40
SAMPLES = 300
DISK_MIB = 6
PAGE = 4096
LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 96, 128, 160, 192, 224, 240, 248, 252, 256, 260)
QUICK_S = 15.0


class Filling:
    """A back end with room for so many bytes more, of whatever is written."""

    def __init__(self, inner: MemoryBackend) -> None:
        self.inner = inner
        self.left = PLENTY
        self.sizes: list[int] = []  # of all that was written
        self.list, self.read, self.read_into = inner.list, inner.read, inner.read_into
        self.delete, self.now, self.room = inner.delete, inner.now, inner.room
        self.tidy, self.close = inner.tidy, inner.close

    def take(self, size: int) -> None:
        self.sizes.append(size)
        if size > self.left:
            self.left = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= size

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        self.take(len(data))
        self.inner.put(name, data, replace=replace)

    def create(self, name: str) -> Upload:
        return _FillingUpload(self, self.inner.create(name))


class _FillingUpload:
    def __init__(self, backend: Filling, inner: Upload) -> None:
        self._backend, self._inner = backend, inner
        self.abort = inner.abort

    def append(self, *parts: Data) -> int:
        self._backend.take(sum(memoryview(part).nbytes for part in parts))
        return self._inner.append(*parts)

    def commit(self) -> None:
        self._backend.take(1)
        self._inner.commit()


@contextlib.asynccontextmanager
async def opened(state: Path, backend: Filling) -> AsyncIterator[Images]:
    images = await Images.open(str(state), backend, "n1", alone=True)
    try:
        yield images
    finally:
        images.close()


async def make(images: Images, version: int, job: int) -> Manifest:
    """Make a version whose memory no other has."""
    memory = random.Random(job).randbytes(30 * PAGE)
    files = {"pstree.img": b"tree", "pages-1.img": memory, "core-1.img": bytes(300)}
    async with images.spool("blast", job, len(memory)) as spool:
        for name, data in files.items():
            (Path(spool.path) / name).write_bytes(data)
        await spool.load("blast")
        facts = {"created": 1e9, "uid": 0, "gid": 0, "root": 1, "tree": ()}
        await spool.seal(Manifest(app="blast", version=version, **facts))  # type: ignore[arg-type]
        return await spool.publish(version)


def left_over(backend: Filling) -> set[str]:
    return {entry.name for entry in backend.list("")}


async def test_no_byte_of_a_checkpoint_is_one_too_many(tmp_path: Path) -> None:
    backend = Filling(MemoryBackend())
    async with opened(tmp_path, backend) as images:
        await make(images, 1, 1)
        await images.read("blast", "v1", "manifest.json", 0, 1)
        before, backend.sizes = left_over(backend), []
        await make(images, 2, 2)
        ends = [sum(backend.sizes[:count]) for count in range(len(backend.sizes) + 1)]
        levels = {end + more for end in ends for more in (-1, 0, 1)}
        levels |= {random.Random(each).randrange(ends[-1]) for each in range(SAMPLES)}
        await images.remove("blast", 2)
        refused = 0
        for job, level in enumerate(sorted(levels), 3):
            backend.left = max(0, level)
            made = False
            with contextlib.suppress(NoRoom):
                await make(images, 2, job)
                made = True
            refused += not made
            assert made == ("manifests/n1/blast/v2" in left_over(backend)), level
            assert await images.verify("blast", 1) == ""
            assert await images.read("blast", "v1", "pstree.img", 0, 99) == b"tree"
            backend.left = PLENTY
            if made:
                assert await images.verify("blast", 2) == ""
                await images.remove("blast", 2)
            for _ in range(2):
                await images.sweep()
            assert left_over(backend) == before, level
            assert not os.listdir(tmp_path / "spool")
        assert refused > len(ends)
        await make(images, 2, 2)
        assert await images.verify("blast", 2) == ""


async def test_a_full_disk_is_read_and_swept(tmp_path: Path) -> None:
    """What tells the hashes of files to a copy is only a short cut, and rmdir makes room itself."""
    backend = Filling(MemoryBackend())
    async with opened(tmp_path, backend) as images:
        for version in range(1, 7):
            await make(images, version, version)
        backend.left = 0
        text = await images.read("blast", "v1", "manifest.json", 0, PAGE)
        assert b"pstree.img" in text
        for version in range(2, 7):
            await images.remove("blast", version)
        backend.left = 400  # too little for one list of all
        for _ in range(12):
            await images.sweep()
            backend.left = 400
        assert len(backend.list("packs/")) == 1
        assert await images.verify("blast", 1) == ""


# -- a real disk, and real trees


@pytest.fixture
def full_site() -> Iterator[Site]:
    """A site whose images are on a filesystem of DISK_MIB of their own."""
    site = Site()
    disk = site.state / "images"
    disk.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)], check=True
    )
    try:
        site.start_agent("--floor=0")
        site.start_mount()
        yield site
    finally:
        try:
            site.stop_mount()
            site.stop_agent()
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
            site.__exit__(None, None, None)


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[list[Workload]]:
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(harness.start("small", tmp_path / "small"))
        big = stack.enter_context(harness.start("memory", tmp_path / "big", 2))
        yield [small.wait_ready(), big.wait_ready()]


def attempt(site: Site, tree: Workload) -> int:
    """Return the errno of a checkpoint, 0 when it was made."""
    try:
        site.write(site.proc(tree.pid) / "checkpoint", "name=big")
    except OSError as exc:
        return exc.errno or -1
    return 0


def packs(site: Site) -> set[str]:
    return {each.name for each in (site.state / "images" / "packs").glob("*/*")}


def leave(disk: Path, pages: int) -> Path:
    """Fill a disk until so many pages are free."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes((room.f_bavail - pages) * room.f_frsize))
    return filler


def test_checkpoints_on_a_disk_that_is_full_sooner_or_later(
    full_site: Site, trees: list[Workload]
) -> None:
    site, (small, big) = full_site, trees
    disk = site.state / "images"
    assert site.write(site.proc(small.pid) / "checkpoint", "name=little") == "little/v1\n"
    kept = packs(site)
    refused = 0
    for pages in LEVELS:
        filler = leave(disk, pages)
        number = attempt(site, big)
        big.wait_progress()
        if number:
            assert number == errno.ENOSPC, pages
            refused += 1
            text = site.read(site.proc(big.pid) / "checkpoint")
            assert text.startswith("error ENOSPC cannot ") and "rmdir" in text, text
            assert not (site.mnt / "images" / "big" / "latest").exists()
        filler.unlink()
        if not number:
            assert site.sh("rm -r $K/images/big").returncode == 0
        until(lambda: packs(site) == kept, f"nothing of it stays ({pages} pages)", QUICK_S)
        assert not [each for each in (disk / ".tmp").iterdir() if "clock" not in each.name]
    assert refused > len(LEVELS) // 2
    assert attempt(site, big) == 0
    assert site.write("store/verify", "1").startswith("verified "), site.read("store/verify")
    small.signal(9)
    small.wait_gone([small.pid])
    assert site.write("restart", "little") == f"pid {small.pid}\n"
    small.wait_progress()
    assert big.finish() == small.finish() == "PASS"
