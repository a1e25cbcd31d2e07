"""Image files read in every order, by several at once, and while the image goes away."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sites import Site

MIB = 1 << 20
HOLDS = """
import random, sys, time
held = random.Random(5).randbytes(9 << 20)
print(flush=True)
time.sleep(1000)
"""


@pytest.fixture
def image(shared_site: Site, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An image of a process with some MiB of memory, which has ended."""
    name = f"app{abs(hash(request.node.name)) % 10**8}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            shared_site.write(shared_site.proc(process.pid) / "checkpoint", f"name={name}")
        finally:
            process.kill()
    yield shared_site.mnt / "images" / name / "v1"


@pytest.fixture
def pages(image: Path) -> Path:
    return max(image.glob("pages-*.img"), key=lambda path: path.stat().st_size)


def piecewise(path: Path, size: int) -> bytes:
    """Read a file from its start to its end, so many bytes at a time."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return b"".join(iter(lambda: os.read(fd, size), b""))
    finally:
        os.close(fd)


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Return what is there, in as many reads as it takes."""
    found = b""
    while part := os.pread(fd, size - len(found), offset + len(found)):
        found += part
        if len(found) == size:
            break
    return found


@pytest.mark.parametrize("size", [4096, 100_001, 128 << 10, MIB, 3 * MIB])
def test_a_file_is_the_same_by_reads_of_any_size(pages: Path, size: int) -> None:
    whole = piecewise(pages, MIB + 1)
    assert len(whole) == pages.stat().st_size > 9 * MIB
    assert piecewise(pages, size) == whole


def test_readers_go_their_own_ways(pages: Path) -> None:
    whole = piecewise(pages, MIB)
    sizes = (1, 4095, 4096, 128 << 10, MIB - 1, MIB, 3 * MIB)

    def wander(seed: int) -> None:
        chance, at = random.Random(seed), 0
        fd = os.open(pages, os.O_RDONLY)
        try:
            for _ in range(60):
                size = chance.choice(sizes)
                at = chance.choice(  # on, back, or anywhere, beyond the end too
                    (at, at, at, max(0, at - size), chance.randrange(len(whole) + MIB))
                )
                assert read_at(fd, at, size) == whole[at : at + size]
                at += size
        finally:
            os.close(fd)

    with ThreadPoolExecutor(6) as readers:
        list(readers.map(wander, range(6)))


def test_threads_share_a_descriptor(pages: Path) -> None:
    whole = piecewise(pages, MIB)
    fd = os.open(pages, os.O_RDONLY)

    def along(start: int) -> None:
        for at in range(start, len(whole), 4 * 131072):
            assert read_at(fd, at, 131072) == whole[at : at + 131072]

    try:
        with ThreadPoolExecutor(4) as readers:
            list(readers.map(along, range(0, 4 * 131072, 131072)))
    finally:
        os.close(fd)


@pytest.mark.parametrize("offset", [-1, 0, 1, MIB])
def test_nothing_is_beyond_the_end(pages: Path, offset: int) -> None:
    end = pages.stat().st_size
    with open(pages, "rb", buffering=0) as file:
        file.seek(end + offset)
        assert len(file.read(MIB)) == max(0, -offset)
        file.seek(0)
        assert len(b"".join(iter(lambda: file.read(MIB), b""))) == end


def test_a_removed_image_gives_its_bytes_or_says_that_it_is_gone(
    shared_site: Site, image: Path, pages: Path
) -> None:
    whole = piecewise(pages, MIB)
    with open(pages, "rb", buffering=0) as file:
        found = file.read(65536) + file.read(65536)
        assert shared_site.sh("rm -r $I", I=str(image)).returncode == 0
        with pytest.raises(OSError) as caught:
            while part := file.read(65536):
                found += part
        assert caught.value.errno in (errno.ESRCH, errno.ESTALE)
    assert whole.startswith(found)


def test_a_killed_reader_leaves_nothing(shared_site: Site, pages: Path) -> None:
    whole = piecewise(pages, MIB)
    for _ in range(8):
        with subprocess.Popen(["cat", pages], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert reader.stdout.read(2 * MIB) == whole[: 2 * MIB]
            reader.kill()
    assert piecewise(pages, MIB) == whole
