"""The tree of places below the mountpoint: from names to places and back.

The table says which files there are, `VARIABLES` which names a part in capitals stands for at the
time. A place outlives what it was found for: `is_there` and `is_replaced` tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from . import facts
from .model import Tree
from .places import Kind, Place, Row, Sight, tree_of, version_of
from .table import PROC, TABLE

# -- variables


class Variable(NamedTuple):
    """What a part in capitals may be: `find` gives the argument for a name, or None."""

    names: Callable[[Sight, Place], Iterable[tuple[str, Any]]]
    find: Callable[[Sight, Place, str], Any | None]


def _node_names(sight: Sight, place: Place) -> Iterator[tuple[str, str]]:
    return ((name, name) for name in sight.view.nodes)


def _keepers(sight: Sight) -> set[int]:
    return {tree.keeper.pid for tree in sight.view.trees.values() if tree.keeper is not None}


_processes = facts.Listing()


def _pid_names(sight: Sight, place: Place) -> Iterator[tuple[str, tuple[int, int]]]:
    keepers = _keepers(sight)
    for name, entry in _processes.entries().items():
        pid = int(name)
        if pid not in keepers:
            yield name, (pid, entry.start)


def listed_owner(pid: str) -> tuple[int, int] | None:
    """Return the owner of a process directory as the last listing saw it."""
    entry = _processes.seen.get(pid)
    return (entry.uid, entry.gid) if entry is not None else None


def _find_pid(sight: Sight, place: Place, name: str) -> tuple[int, int] | None:
    if not name.isdecimal() or len(name) > 9 or name.startswith("0"):
        return None
    found = facts.task(int(name))
    if found is None:
        known = sight.view.trees.get(int(name))
        return (known.id.pid, known.id.start) if known and _is_kept(known) else None
    if found.is_kernel_thread or found.pid in _keepers(sight):
        return None
    return found.pid, found.start


def _app_names(sight: Sight, place: Place) -> Iterator[tuple[str, str]]:
    return ((name, name) for name in sight.view.apps)


def _version_names(sight: Sight, place: Place) -> Iterator[tuple[str, str]]:
    app = place.args[0]
    yield from ((f"v{n}", f"v{n}") for n in sight.view.images.get(app, {}))
    yield from ((name, name) for name in sight.view.imports.get(app, {}))


def _label_names(sight: Sight, place: Place) -> Iterator[tuple[str, str]]:
    app = sight.view.apps.get(place.args[0])
    return ((label, label) for label in (app.labels if app else ()))


def _job_names(sight: Sight, place: Place) -> Iterator[tuple[str, int]]:
    return ((str(number), number) for number in sight.view.jobs)


def _find_job(sight: Sight, place: Place, name: str) -> int | None:
    return int(name) if name.isdecimal() and int(name) in sight.view.jobs else None


def _file_names(sight: Sight, place: Place) -> Iterator[tuple[str, str]]:
    return ((name, name) for name in sight.files.get(place.args, {}))


def _find_in(
    names: Callable[[Sight, Place], Iterable[tuple[str, Any]]],
) -> Callable[[Sight, Place, str], Any | None]:
    def find(sight: Sight, place: Place, name: str) -> Any | None:
        return next((arg for known, arg in names(sight, place) if known == name), None)

    return find


VARIABLES = {
    "NODE": Variable(_node_names, _find_in(_node_names)),
    "PID": Variable(_pid_names, _find_pid),
    "APP": Variable(
        _app_names, lambda sight, place, name: name if name in sight.view.apps else None
    ),
    "VERSION": Variable(
        _version_names,
        lambda sight, place, name: name if version_of(sight, place.args[0], name) else None,
    ),
    "LABEL": Variable(_label_names, _find_in(_label_names)),
    "FILE": Variable(
        _file_names,
        lambda sight, place, name: name if name in sight.files.get(place.args, {}) else None,
    ),
    "JOB": Variable(_job_names, _find_job),
}


# -- walking

# /krg/procs is a directory of its own and no link: the kernel asks for the target of a link at
# every use, which made each stat below it cost twice.
ALIASES = tuple(
    dataclasses.replace(row, path=row.path.removeprefix("nodes/NODE/"), help="")
    for row in TABLE
    if row.path.startswith(PROC)
)
_ROWS = (*TABLE, *ALIASES)
_BY_PATH = {row.path: row for row in TABLE}


def _children() -> dict[str, tuple[Row, ...]]:
    found: dict[str, list[Row]] = {row.path: [] for row in _ROWS if row.kind is Kind.DIR}
    for row in _ROWS[1:]:
        found[row.path.rpartition("/")[0]].append(row)
    return {path: tuple(rows) for path, rows in found.items()}


_CHILDREN = _children()
_FIXED = {path: {r.name: r for r in rows} for path, rows in _CHILDREN.items()}
ROOT = Place(TABLE[0])


def _extended(place: Place, row: Row, name: str, arg: Any) -> Place:
    return Place(row, (*place.args, *(arg if isinstance(arg, tuple) else (arg,))))


def find(sight: Sight, parent: Place, name: str) -> Place | None:
    """Return the place that a name in a directory stands for, None when there is none."""
    row = _FIXED[parent.row.path].get(name)
    if row is not None and row.name not in VARIABLES:
        place = Place(row, parent.args)
        return place if row.when(sight, place) else None
    for row in _CHILDREN[parent.row.path]:
        if row.name in VARIABLES:
            arg = VARIABLES[row.name].find(sight, parent, name)
            if arg is not None:
                return _extended(parent, row, name, arg)
    return None


def entries(sight: Sight, parent: Place) -> Iterator[tuple[str, Place]]:
    """Yield what a directory has in it, fixed names first."""
    for row in _CHILDREN[parent.row.path]:
        if row.name in VARIABLES:
            for name, arg in VARIABLES[row.name].names(sight, parent):
                yield name, _extended(parent, row, name, arg)
        else:
            place = Place(row, parent.args)
            if row.when(sight, place):
                yield row.name, place


def canonical(sight: Sight, place: Place) -> Place:
    """Return the one place of an object that can be reached by two paths."""
    if not place.row.path.startswith("procs/PID"):
        return place
    return Place(_BY_PATH[f"nodes/NODE/{place.row.path}"], (sight.view.node, *place.args))


def path_of(place: Place) -> str:
    """Return the path of a place below the mountpoint."""
    args = list(place.args)
    parts = []
    for part in place.row.path.split("/"):
        if part == "PID":
            parts.append(str(args.pop(0)))
            args.pop(0)
        elif part in VARIABLES:
            parts.append(str(args.pop(0)))
        else:
            parts.append(part)
    return "/".join(parts)


# -- what became of a place since it was found


def is_replaced(sight: Sight, place: Place) -> bool:
    """Tell whether the name of a place may mean something else by now: another process has its pid
    after a restart, or an import was moved to be an image."""
    if place.row.path.startswith("images/APP/VERSION"):
        return version_of(sight, place.args[0], place.args[1]) is None
    if "procs/PID" not in place.row.path:
        return False
    pid, start = place.args[-2:]
    known = sight.view.trees.get(pid)
    if known is not None and known.id.start != start and facts.exists(pid, known.id.start):
        return True
    return place.row.kind is not Kind.STATE and (
        not facts.exists(pid, start) and facts.task(pid) is not None
    )


def is_there(sight: Sight, place: Place) -> bool:
    """Tell whether the object of a place still exists."""
    row, args = place
    if "procs/PID" in row.path:
        if facts.exists(args[-2], args[-1]):
            return True
        known = tree_of(sight, place)
        return known is not None and _is_kept(known)
    if row.path.startswith("nodes/NODE"):
        return args[0] in sight.view.nodes
    if row.path.startswith("jobs/JOB"):
        return args[0] in sight.view.jobs
    if row.path.startswith("images/APP/VERSION"):
        return version_of(sight, args[0], args[1]) is not None
    if row.path.startswith("images/APP"):
        app = sight.view.apps.get(args[0])
        if app is None:
            return False
        return row.when(sight, place) and (row.name != "LABEL" or args[1] in app.labels)
    return True


def _is_kept(known: Tree) -> bool:
    """Tell whether a process that has ended is still shown: how it ended is kept, or will be."""
    return bool(known.ended) or known.keeper is not None
