"""Stores of images: on the disk of this machine, and on one that is soon full."""

import os
import subprocess
from pathlib import Path

import pytest

from agent.images import Images


@pytest.fixture
async def images(tmp_path):
    return await Images.open(tmp_path / "store")


@pytest.fixture
def root(images):
    return Path(images.root)


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
