"""Which app a tree belongs to, whose a name is, and whether an app lives (DESIGN: images).

A name belongs to the uid that first took it. At most one incarnation of an app lives, running or
frozen; a process that was checkpointed or restarted continues its app.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import msgspec

from krgfs import facts
from krgfs.errors import Exists, Gone, NotYours
from krgfs.model import App, Image, ProcessId
from krgfs.verbs import VERSION, ImageRef, escaped_name

from .manifest import Manifest
from .procs import ProcessTree
from .state import State


def lives(process: ProcessId) -> bool:
    """Tell whether that very process of this boot has not ended."""
    return process.boot == facts.BOOT_ID and facts.is_alive(process.pid, process.start)


def living(app: App) -> ProcessId | None:
    """Return a process of the app's incarnation that has not ended, its root if that is one."""
    root = (app.incarnation,) if app.incarnation is not None else ()
    return next((each for each in (*root, *app.members) if lives(each)), None)


def app_for(state: State, tree: ProcessTree, name: str) -> App:
    """Return the app that a checkpoint of this tree goes to, new or known; nothing is written.

    NotYours when the name is another uid's, Exists when another process lives under it.
    """
    uid, gid = tree.credentials[tree.pid].uid, tree.credentials[tree.pid].gid
    if name:
        app = state.apps.get(name) or App(name=name, uid=uid, gid=gid)
        if app.uid != uid:
            raise NotYours(f"the name {name} belongs to uid {app.uid}; use another name=")
        other = living(app)
        if other is not None and app.incarnation != tree.id:
            raise Exists(
                f"{name} lives already as process {other.pid}; checkpoint that one, or use "
                "another name="
            )
        return app
    known = state.tree(tree.id.pid, tree.id.start)
    if known is not None and known.app:  # also where all its images were removed meanwhile
        return state.apps.get(known.app) or App(name=known.app, uid=uid, gid=gid)
    return _unnamed(state, tree, uid, gid)


def _unnamed(state: State, tree: ProcessTree, uid: int, gid: int) -> App:
    node = escaped_name(state.node.name.encode())
    base = f"{escaped_name(tree.root.comm)}.{tree.pid}.{node}"
    for number in count(1):
        name = base if number == 1 else f"{base}~{number}"
        app = state.apps.get(name)
        if app is None:
            return App(name=name, uid=uid, gid=gid)
        if app.incarnation == tree.id and app.uid == uid:
            return app
    raise AssertionError("unreachable")


def resolve(state: State, ref: ImageRef) -> tuple[App, Image]:
    """Return the image that APP, APP/vN, APP/latest or APP/LABEL names; Gone says what there is."""
    app = state.apps.get(ref.app)
    if app is None:
        raise Gone(f"there is no app {ref.app}; ls /krg/images shows them")
    versions = state.images.get(ref.app, {})
    if not versions:
        raise Gone(f"{ref.app} has no image; checkpoint it first")
    if ref.version == "latest":
        return app, versions[max(versions)]
    match = VERSION.match(ref.version)
    number = int(match[1]) if match else app.labels.get(ref.version)
    if number not in versions:
        have = _listed(f"v{each}" for each in sorted(versions))
        raise Gone(f"{ref.app} has no {ref.version}; it has {have}")
    return app, versions[number]


def image_of(manifest: Manifest, own: bool) -> Image:
    """Return the record of an image, as its manifest tells it."""
    return Image(
        app=manifest.app,
        version=manifest.version,
        created=manifest.created,
        node=manifest.node,
        uid=manifest.uid,
        gid=manifest.gid,
        freeze_ms=manifest.freeze_ms,
        logical_bytes=manifest.logical_bytes,
        stored_bytes=manifest.stored_bytes,
        new_bytes=manifest.new_bytes,
        desc=manifest.desc,
        digest=manifest.digest,
        own=own,
    )


def with_version(app: App, version: int) -> App:
    """Return the app after a version was committed: its number is not given out again."""
    return msgspec.structs.replace(app, next_version=max(app.next_version, version + 1))


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known) if len(known) < 8 else f"{known[0]} ... {known[-1]}"
