"""What lies in the directory of an image, and whether it is what its manifest says.

Names and sizes are compared first, which costs little; then everything is read and hashed. All of
it is blocking work, for `durable.run`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import trio
from blake3 import blake3

from krgfs.errors import Damaged

from . import durable
from .manifest import MANIFEST, FileSum, Manifest, decode

MANIFEST_BYTES = 16 * 1024 * 1024
BUFFER_BYTES = 4 * 1024 * 1024


class Found(NamedTuple):
    """A file of an image: its name below the directory, its size, and the bytes that it takes."""

    name: str
    size: int
    stored: int


def read_manifest(path: str, ref: str) -> Manifest:
    """Return the manifest of a directory; Damaged or CannotRunHere when it cannot be used."""
    try:
        with (
            durable.opened(os.path.join(path, MANIFEST), os.O_RDONLY) as fd,
            open(fd, "rb", closefd=False) as f,
        ):
            data = f.read(MANIFEST_BYTES + 1)
    except FileNotFoundError as exc:
        raise Damaged(f"{ref} has no {MANIFEST}; use another copy") from exc
    if len(data) > MANIFEST_BYTES:
        raise Damaged(f"the manifest of {ref} is larger than {MANIFEST_BYTES} bytes")
    return decode(data, ref)


def scan(path: str, ref: str) -> list[Found]:
    """Return the files below `path` by name; Damaged where there is anything but files."""
    found = []
    for folder in ("", "files"):
        if folder and not os.path.isdir(os.path.join(path, folder)):
            continue
        with os.scandir(os.path.join(path, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                    found.append(Found(name, facts.st_size, facts.st_blocks * 512))
                elif name != "files" or not entry.is_dir(follow_symlinks=False):
                    raise Damaged(f"{ref} holds {name}, which is no plain file; remove it")
    return sorted(found)


def differences(path: str, manifest: Manifest, ref: str) -> list[str]:
    """Say how names and sizes differ from the manifest, without reading a file."""
    found = {file.name: file.size for file in scan(path, ref) if file.name != MANIFEST}
    wrong = [f"{name} is missing" for name in sorted(manifest.files.keys() - found.keys())]
    wrong += [
        f"{name} is not in its manifest" for name in sorted(found.keys() - manifest.files.keys())
    ]
    for name in sorted(found.keys() & manifest.files.keys()):
        if found[name] != manifest.files[name].size:
            wrong.append(f"{name} has {found[name]} bytes, not {manifest.files[name].size}")
    return wrong


def damage(path: str, manifest: Manifest, ref: str) -> list[str]:
    """Say how a directory differs from the manifest; all is read, unless it differs before that."""
    return differences(path, manifest, ref) or _wrong_contents(path, manifest)


def enumerated(wrong: list[str]) -> str:
    """Return what is wrong in one line, the first of it where it is much; '' when nothing is."""
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def refuse(ref: str, wrong: list[str]) -> None:
    """Raise Damaged where something is wrong with an import."""
    if wrong:
        raise Damaged(
            f"cannot import {ref}: {enumerated(wrong)}; copy it again, or remove its {MANIFEST} "
            "if these are plain files of CRIU"
        )


def _wrong_contents(path: str, manifest: Manifest) -> list[str]:
    """Read everything that the manifest names, and say which files are not what they were."""
    wrong, buffer = [], memoryview(bytearray(BUFFER_BYTES))
    for name, expected in sorted(manifest.files.items()):
        try:
            now = _sum(os.path.join(path, name), buffer)
        except OSError as exc:
            wrong.append(f"{name} cannot be read ({exc.strerror})")
        else:
            wrong += _changed({name: expected}, {name: now})
    return wrong


def _changed(expected: Mapping[str, FileSum], now: Mapping[str, FileSum]) -> list[str]:
    return [
        f"{name} has other contents than it was made with"
        for name in sorted(expected.keys() | now.keys())
        if expected.get(name) != now.get(name)
    ]


def _sum(path: str, buffer: memoryview) -> FileSum:
    # read, not mapped: a page of a mapped file that the disk cannot give is a SIGBUS
    hasher, size = blake3(max_threads=blake3.AUTO), 0
    with durable.opened(path, os.O_RDONLY) as fd:
        while count := os.readv(fd, [buffer]):
            hasher.update(buffer[:count])
            size += count
            trio.from_thread.check_cancelled()
    return FileSum(size, hasher.hexdigest())
