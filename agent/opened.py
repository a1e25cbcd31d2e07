"""An image that is read: its manifest, its recipe, its files; and its manifest as a copy has it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from blake3 import blake3
from msgspec.structs import replace

from .backend import Backend
from .buffers import BUFFER_BYTES
from .manifest import FileSum, Manifest, encode
from .recipe import Recipe
from .serving import ImageSource
from .spool import is_large

READ_AHEAD_BYTES = 8 << 20
NO_SUM = "0" * 64
CHECK_BYTES = 32


class Opened(NamedTuple):
    """An image whose manifest and recipe are in memory."""

    manifest: Manifest
    recipe: Recipe
    source: ImageSource

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all files but the manifest."""
        return {name: file.size for name, file in self.manifest.files.items()}

    @property
    def small(self) -> list[str]:
        """The names of the files that CRIU and we read whole."""
        return [name for name, size in self.sizes.items() if not is_large(name, size)]


def whole(image: Opened, name: str) -> bytes:
    """Return all of a file. Blocks; raises Damaged."""
    data = bytearray(image.recipe.size(name))
    image.source.read_into(name, 0, memoryview(data))
    return bytes(data)


def manifest_text(image: Opened, backend: Backend, place: str) -> bytes:
    """Return the manifest as a copy of the image has it: with the hash of every file. They are made
    once, and kept at `place` where there is room. Blocks; raises Damaged."""
    sums = _kept(image, backend, place)
    if sums is None:
        sums = {name: _sum(image, name) for name in image.recipe.files}
        body = msgspec.msgpack.encode((image.manifest.digest, sums))
        with contextlib.suppress(OSError):
            backend.put(place, blake3(body).digest() + body, replace=True)
    return encode(_with_sums(image.manifest, sums))


def blank_manifest_text(image: Opened) -> bytes:
    """Return a text of the same length, which takes no reading."""
    return encode(_with_sums(image.manifest, dict.fromkeys(image.recipe.files, NO_SUM)))


def _kept(image: Opened, backend: Backend, place: str) -> dict[str, str] | None:
    try:
        data = backend.read(place)
        check, body = data[:CHECK_BYTES], data[CHECK_BYTES:]
        if blake3(body).digest() != check:
            return None
        digest, sums = msgspec.msgpack.decode(body, type=tuple[str, dict[str, str]])
    except (OSError, msgspec.MsgspecError):
        return None
    fits = digest == image.manifest.digest and sums.keys() == image.recipe.files.keys()
    return sums if fits else None


def _sum(image: Opened, name: str) -> str:
    hasher, buffer, at = blake3(max_threads=blake3.AUTO), memoryview(bytearray(BUFFER_BYTES)), 0
    image.source.ahead(name, 0, READ_AHEAD_BYTES)
    while count := image.source.read_into(name, at, buffer):
        at += count
        image.source.ahead(name, at, READ_AHEAD_BYTES)
        hasher.update(buffer[:count])
    return hasher.hexdigest()


def _with_sums(manifest: Manifest, sums: Mapping[str, str]) -> Manifest:
    files = {name: FileSum(file.size, sums[name]) for name, file in manifest.files.items()}
    return replace(manifest, files=files, recipe="")
