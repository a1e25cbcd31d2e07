"""Versions of images for tests: made as a checkpoint makes them, looked at, copied into imports."""

import itertools
import os
from contextlib import asynccontextmanager
from pathlib import Path

from agent.backend import MemoryBackend
from agent.images import Images
from agent.manifest import Manifest, Task
from krgfs.wire import MAX_DATA

ANNA = 1234 if os.geteuid() == 0 else os.getuid()
TASK = Task(pid=4242, start=99, ppid=1, sid=4242, pgrp=4242, uid=ANNA, gid=ANNA, comm="blast")
DUMPED = {"pstree.img": b"tree", "pages-1.img": bytes(range(256)) * 4096, "empty.img": b""}
TEXTS = {"description": "d", "user_info.txt": "u"}
SMALL = {"pstree.img": b"tree", "pages-1.img": bytes(20_480)}
KEY = "manifests/n1"

_jobs = itertools.count(1000)


def manifest_of(version=1, app="blast", **facts):
    facts = {"created": 1e9, "uid": ANNA, "gid": ANNA, "root": 4242, "tree": (TASK,)} | facts
    return Manifest(app=app, version=version, **facts)


@asynccontextmanager
async def opened(state_dir, backend=None, limits=None):
    """The images of a node; its threads are gone afterwards."""
    images = await Images.open(str(state_dir), backend or MemoryBackend(), "n1", limits)
    try:
        yield images
    finally:
        images.close()


def fill(directory, files=DUMPED):
    for name, data in files.items():
        path = Path(directory) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


async def make(images, version=1, app="blast", files=DUMPED, **facts):
    """Make a version as a checkpoint does, and return its manifest."""
    async with images.spool(app, next(_jobs), sum(map(len, files.values()))) as spool:
        fill(spool.path, files)
        await spool.load(f"{app}/v{version}")
        await spool.seal(manifest_of(version, app, **facts), texts=TEXTS)
        return await spool.publish(version)


async def contents_of(images, name="v1", app="blast", step=MAX_DATA):
    """All files of a version or import as cp -r through the mount gets them."""
    found = {}
    for file in await images.files(app, name):
        data = b""
        while part := await images.read(app, name, file.name, len(data), step):
            data += part
        found[file.name] = data
    return found


async def copied(images, files, name, app="blast", skip=()):
    """Copy files into an import, as cp -r through the mount does."""
    await images.imports.begin(app, name, ANNA, ANNA)
    for file, data in files.items():
        if file not in skip:
            await images.imports.write_file(app, name, file, 0, b"")
            for at in range(0, len(data), MAX_DATA // 2):
                await images.imports.write_file(app, name, file, at, data[at : at + MAX_DATA // 2])


async def finished(images, name, version, app="blast", manifest=None):
    """Make an import a version, as its owner's `mv` does."""
    made = await images.finish_import(app, name, version, manifest)
    await images.imports.remove(app, name)
    return made


def names_in(backend, prefix=""):
    return [entry.name for entry in backend.list(prefix)]


def flip(backend, name, at):
    """Change one bit of an object."""
    data = bytearray(backend.read(name))
    data[at] ^= 1
    backend.put(name, data, replace=True)


def place_of(images, id):
    """The pack of a chunk, and where it begins in there."""
    place = images.store.index.places(id)[0]
    return place.pack, place.offset


def tree_of(directory):
    """Everything below a directory: names, modes, owners, contents."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        facts = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        name = str(path.relative_to(directory))
        found[name] = (facts.st_mode, facts.st_uid, facts.st_gid, data)
    return found


def leave(where, pages):
    """Fill a filesystem until so many pages are free."""
    room = os.statvfs(where)
    with (where / "filler").open("wb") as file:
        file.write(bytes((room.f_bavail - pages) * room.f_frsize))
