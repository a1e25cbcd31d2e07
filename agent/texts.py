"""Small files as text: those of the kernel, and those that a keeper writes."""

from __future__ import annotations

import os


def read(path: str) -> str:
    """Return what a small file says, nothing when it is not there."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""
