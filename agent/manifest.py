"""The manifest of an image: its values, its text, and the digest that covers all of it.

The manifest is written last, so an image that has one is whole; every other file of the image is in
it with its size and hash. What is read back is checked before it becomes a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from blake3 import blake3

from krgfs.errors import BadWords, CannotRunHere, Damaged

FORMAT = 1
MANIFEST = "manifest.json"  # its name in the directory of an image


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the tree; its ids are those that CRIU dumped (inner ones, in a pid namespace).

    `start` is 0 and uid and gid are -1 where nobody knows them.
    """

    pid: int
    start: int = 0
    ppid: int
    sid: int
    pgrp: int
    uid: int = -1
    gid: int = -1
    comm: str = ""
    tids: tuple[int, ...] = ()


class End(msgspec.Struct, frozen=True, kw_only=True):
    """A descriptor whose other end is not in the tree; `id` as CRIU's --external names it."""

    kind: str
    id: str
    pid: int
    fd: int
    mode: str = ""


class FileSum(msgspec.Struct, frozen=True):
    """What a file of an image must be. In the store the hash is left out: the recipe tells what a
    file is made of. The manifest of a copy has it."""

    size: int
    blake3: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one image. Times are seconds since the epoch, sizes bytes:
    `stored_bytes` all that its chunks take, `new_bytes` what was stored for it and not shared.

    `files` names every file but the manifest itself. `network` is the dump of CRIU's that keeps its
    TCP connections, if it has any; `recipe` the hash of the recipe, in the store. `digest` covers
    everything else in here, and by it every byte of the image. `copied_from` is set where an import
    was taken under another name than it had been made with. Text from the kernel that is no UTF-8
    has surrogates in it.
    """

    format: int = FORMAT
    app: str
    version: int
    node: str = ""
    created: float
    uid: int
    gid: int
    desc: str = ""
    copied_from: str = ""
    root: int
    tree: tuple[Task, ...] = ()
    then: str = ""
    tcp: str = ""
    criu: str = ""
    options: tuple[tuple[str, str], ...] = ()
    kernel: str = ""
    arch: str = ""
    boot: str = ""
    cwd: str = ""
    cgroups: dict[str, str] = {}
    ends: tuple[End, ...] = ()
    freeze_ms: float = 0.0
    timings: dict[str, float] = {}
    logical_bytes: int = 0
    stored_bytes: int = 0
    new_bytes: int = 0
    network: str = ""
    files: dict[str, FileSum] = {}
    recipe: str = ""
    digest: str = ""

    @property
    def ref(self) -> str:
        return f"{self.app}/v{self.version}"


def encode(manifest: Manifest) -> bytes:
    """Return the text of manifest.json, its digest made anew."""
    # json, not msgspec.json: that one has no surrogates
    facts = msgspec.to_builtins(manifest)
    facts["digest"] = _digest(facts)
    return json.dumps(facts, indent=1).encode() + b"\n"


def decode(data: bytes, where: str) -> Manifest:
    """Return the manifest that `data` is; `where` names it in sentences.

    Raises CannotRunHere for a newer format, and Damaged where it is not whole or not consistent.
    """
    try:
        facts = json.loads(data)
        if facts["format"] > FORMAT:
            raise CannotRunHere(
                f"cannot use {where}: its manifest has format {facts['format']}, this agent knows "
                f"{FORMAT}; use a newer krgfs"
            )
        manifest = msgspec.convert(facts, Manifest)
        for name in manifest.files:
            file_name(name)
    except BadWords as exc:
        raise Damaged(f"the manifest of {where} is damaged: {exc.message}") from exc
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as exc:
        raise Damaged(f"the manifest of {where} is damaged: {exc}; use another copy") from exc
    if manifest.digest != _digest(facts):
        raise Damaged(
            f"the manifest of {where} is damaged: it is not the one that its digest was made of; "
            "use another copy"
        )
    return manifest


def file_name(name: str) -> str:
    """Return `name` if an image may have a file of this name: NAME or files/NAME."""
    *folder, last = name.split("/")
    try:
        fits = len(last.encode()) <= 255
    except UnicodeEncodeError:
        fits = False
    if folder not in ([], ["files"]) or last in ("", ".", "..") or "\0" in last or not fits:
        raise BadWords(f"{name!r} cannot be a file of an image: write NAME or files/NAME")
    if name == "files":
        raise BadWords("'files' is the directory of captured files: write files/NAME")
    return name


def _digest(facts: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return blake3(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
