"""Versions of images for tests: made as a checkpoint makes them, looked at, copied into imports."""

import os
from pathlib import Path

from agent.manifest import Manifest, Task
from krgfs.wire import MAX_DATA

ANNA = 1234 if os.geteuid() == 0 else os.getuid()
TASK = Task(pid=4242, start=99, ppid=1, sid=4242, pgrp=4242, uid=ANNA, gid=ANNA, comm="blast")
DUMPED = {"pstree.img": b"tree", "pages-1.img": bytes(range(256)) * 4096, "empty.img": b""}
SMALL = {"pstree.img": b"tree", "pages-1.img": bytes(20_000)}


def manifest_of(version=1, app="blast", **facts):
    facts = {"created": 1e9, "uid": ANNA, "gid": ANNA, "root": 4242, "tree": (TASK,)} | facts
    return Manifest(app=app, version=version, **facts)


def fill(directory, files=DUMPED):
    for name, data in files.items():
        path = Path(directory) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


async def make(images, version=1, app="blast", files=DUMPED, **facts):
    """Make a version as a checkpoint does, and return its manifest."""
    async with images.spool(version, app) as spool:
        fill(spool.path, files)
        await spool.seal(manifest_of(version, app, **facts), description="d", user_info="u")
        return await spool.publish(version)


def tree_of(directory):
    """Everything below a directory: names, modes, owners, contents."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        facts = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        name = str(path.relative_to(directory))
        found[name] = (facts.st_mode, facts.st_uid, facts.st_gid, data)
    return found


async def copied(images, source, name, app="blast", skip=()):
    """Copy a directory into an import, as cp -r through the mount does."""
    await images.imports.begin(app, name, ANNA, ANNA)
    for path in sorted(Path(source).rglob("*")):
        file = str(path.relative_to(source))
        if path.is_file() and file not in skip:
            data = path.read_bytes()
            await images.imports.write_file(app, name, file, 0, b"")
            for at in range(0, len(data), MAX_DATA // 2):
                await images.imports.write_file(app, name, file, at, data[at : at + MAX_DATA // 2])


def leave(where, pages):
    """Fill a filesystem until so many pages are free."""
    room = os.statvfs(where)
    with (where / "filler").open("wb") as file:
        file.write(bytes((room.f_bavail - pages) * room.f_frsize))
