"""Stores of images: in memory, and on a disk that is soon full."""

import os
import subprocess
from pathlib import Path

import pytest

from agent.backend import MemoryBackend
from tests.unit.versions import opened


@pytest.fixture
def backend():
    return MemoryBackend()


@pytest.fixture
async def images(tmp_path, backend):
    async with opened(tmp_path / "state", backend) as made:
        yield made


@pytest.fixture
def root(images):
    """What the images of a node keep on that node."""
    return Path(images.places.root)


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", where], check=True
    )
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
