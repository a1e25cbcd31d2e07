"""An image as one object of the back end: its manifest and its recipe, and a digest of both.

That object is what makes an image be: it is put when all chunks that the recipe names are durable,
and whoever sweeps keeps what some such object names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from blake3 import blake3
from msgspec.structs import replace

from krgfs.errors import Damaged

from . import manifest as manifests
from . import recipe as recipes
from .manifest import FileSum, Manifest
from .recipe import Recipe

MAGIC = b"KRGIMG1\n"
_HEAD = struct.Struct("<8sI")
DIGEST_BYTES = 32


def encode(manifest: Manifest, recipe: Recipe) -> tuple[bytes, Manifest]:
    """Return the object of an image, and the manifest as it is in there: with the files and sizes
    of the recipe, and digests that cover it."""
    body = recipes.encode(recipe)
    files = {name: FileSum(recipe.size(name)) for name in sorted(recipe.files)}
    text = manifests.encode(replace(manifest, files=files, recipe=blake3(body).hexdigest()))
    data = _HEAD.pack(MAGIC, len(text)) + text + body
    return data + blake3(data).digest(), manifests.decode(text, manifest.ref)


def decode(data: bytes, where: str) -> tuple[Manifest, Recipe]:
    """Return what an object holds; raises Damaged or CannotRunHere, which name `where`."""
    body = data[:-DIGEST_BYTES]
    if len(body) < _HEAD.size or blake3(body).digest() != data[-DIGEST_BYTES:]:
        raise Damaged(f"the record of {where} in the store is damaged; use another copy")
    magic, length = _HEAD.unpack_from(body)
    if magic != MAGIC:
        raise Damaged(f"the record of {where} in the store has another format")
    text, rest = body[_HEAD.size : _HEAD.size + length], body[_HEAD.size + length :]
    manifest = manifests.decode(text, where)
    if manifest.recipe != blake3(rest).hexdigest():
        raise Damaged(f"the recipe of {where} is not the one that its manifest was made with")
    return manifest, recipes.decode(rest, where)


def named(data: bytes) -> Iterable[bytes]:
    """Return the ids of the chunks that the image of an object needs; raises as decode does."""
    return decode(data, "an image")[1].chunks
