"""The one table of files: path, mode, what reading shows, which verb writing is.

`TABLE` drives lookup, readdir, getattr and open in the mount, the README file and the test that the
manual names every file. A part of a path in capitals stands for many names; `VARIABLES` says which.
All functions here are pure functions of a Sight: the View, the facts of /proc, and who looks.
"""

from __future__ import annotations

import dataclasses
import enum
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from . import facts, render
from .model import NOBODY, Image, ImageFile, Import, Tree, View
from .verbs import VERSION


class Sight(NamedTuple):
    """What a rendering may look at. `files` has the listings of image directories that were asked
    for, `uid` and `pid` are of the caller."""

    view: View
    uid: int = 0
    pid: int = 0
    files: Mapping[tuple[str, str], Mapping[str, ImageFile]] = {}


class Kind(enum.Enum):
    DIR = "dir"
    STATE = "state"
    VERB = "verb"
    LINK = "link"
    GROWING = "growing"
    DATA = "data"


def _root(sight: Sight, place: Place) -> tuple[int, int]:
    return 0, 0


def _always(sight: Sight, place: Place) -> bool:
    return True


class Place(NamedTuple):
    """A row of the table with its variable parts filled in: one file of the mount.

    Two places are the same file exactly when they are equal: a pid stands with its start time, as
    the last two of `args`.
    """

    row: Row
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One file of the table. Rows are told apart by identity, so that places hash quickly."""

    path: str
    kind: Kind
    mode: int
    help: str
    render: Callable[[Sight, Place], bytes] | None = None
    verb: str = ""
    owner: Callable[[Sight, Place], tuple[int, int]] = _root
    when: Callable[[Sight, Place], bool] = _always

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def type(self) -> int:
        return _TYPES.get(self.kind, stat.S_IFREG)


_TYPES = {Kind.DIR: stat.S_IFDIR, Kind.LINK: stat.S_IFLNK}


class Variable(NamedTuple):
    """What a part in capitals may be: `find` gives the argument for a name, or None."""

    names: Callable[[Sight, Place], Iterable[tuple[str, Any]]]
    find: Callable[[Sight, Place, str], Any | None]


# -- owners and conditions


def _process_owner(sight: Sight, place: Place) -> tuple[int, int]:
    found = facts.owner(place.args[-2])
    if found is not None:
        return found
    known = tree_of(sight, place)
    return (known.uid, known.uid) if known else (NOBODY, NOBODY)


def _job_owner(sight: Sight, place: Place) -> tuple[int, int]:
    job = sight.view.jobs.get(place.args[0])
    return (job.uid, 0) if job else (0, 0)


def _app_owner(sight: Sight, place: Place) -> tuple[int, int]:
    app = sight.view.apps.get(place.args[0])
    return (app.uid, app.gid) if app else (0, 0)


def _version_owner(sight: Sight, place: Place) -> tuple[int, int]:
    found = version_of(sight, place.args[0], place.args[1])
    return (found.uid, found.gid) if found else (0, 0)


def _has_version(sight: Sight, place: Place) -> bool:
    return bool(sight.view.images.get(place.args[0]))


def _has_job(sight: Sight, place: Place) -> bool:
    known = tree_of(sight, place)
    return known is not None and known.last_job in sight.view.jobs


def tree_of(sight: Sight, place: Place) -> Tree | None:
    """Return what the agent knows of the process of a place, None when it never dealt with it."""
    known = sight.view.trees.get(place.args[-2])
    return known if known is not None and known.id.start == place.args[-1] else None


def node_of(sight: Sight, place: Place) -> str:
    """Return the node that the process of a place is on."""
    node: str = place.args[0] if place.row.path.startswith("nodes/") else sight.view.node
    return node


def _is_kept(known: Tree) -> bool:
    """Tell whether a process that has ended is still shown: how it ended is kept, or will be."""
    return bool(known.ended) or known.keeper is not None


def version_of(sight: Sight, app: str, name: str) -> Image | Import | None:
    """Return the committed image or the import that a name in images/APP stands for."""
    match = VERSION.match(name)
    if match and (image := sight.view.images.get(app, {}).get(int(match[1]))):
        return image
    return sight.view.imports.get(app, {}).get(name)


# -- variables


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


# -- what reading shows, from the rows' side: pick the objects, let `render` write them


def _status(sight: Sight, place: Place) -> bytes:
    return render.process_status(node_of(sight, place), place.args[-2], tree_of(sight, place))


def _outcome(verb: str) -> Callable[[Sight, Place], bytes]:
    def read(sight: Sight, place: Place) -> bytes:
        known = tree_of(sight, place)
        line = known.outcomes.get(verb, "") if known else ""
        return f"{line}\n".encode() if line else b""

    return read


def _last_restart(sight: Sight, place: Place) -> bytes:
    return render.last_line(
        job
        for job in sight.view.jobs.values()
        if job.verb == "restart" and sight.uid in (0, job.uid)
    )


def _latest(sight: Sight, place: Place) -> bytes:
    return f"v{max(sight.view.images[place.args[0]])}".encode()


def _label(sight: Sight, place: Place) -> bytes:
    return f"v{sight.view.apps[place.args[0]].labels[place.args[1]]}".encode()


def _index(sight: Sight, place: Place) -> bytes:
    app = sight.view.apps[place.args[0]]
    return render.index(app, sight.view.images.get(app.name, {}).values())


def _job_link(sight: Sight, place: Place) -> bytes:
    known = tree_of(sight, place)
    up = "../" * place.row.path.count("/")
    return f"{up}jobs/{known.last_job}".encode() if known else b""


def readme(sight: Sight, place: Place) -> bytes:
    """Return the interface on one page, made of the table itself."""
    return render.readme((row.path, row.help) for row in TABLE if row.help)


_PROC = "nodes/NODE/procs/PID"
TABLE: tuple[Row, ...] = (
    Row("", Kind.DIR, 0o755, ""),
    Row("README", Kind.STATE, 0o444, "this page", readme),
    Row(
        "version",
        Kind.STATE,
        0o444,
        "version of krgfs",
        lambda sight, place: render.version(),
    ),
    Row(
        "restart",
        Kind.VERB,
        0o666,
        "w: APP[/vN|/latest|/LABEL] [words]: restart an image; r: the last outcome",
        _last_restart,
        "restart",
    ),
    Row(
        "log",
        Kind.GROWING,
        0o444,
        "jobs, one line each: time id verb object node outcome message",
        lambda sight, place: render.log(sight.view.log, sight.uid),
    ),
    Row(
        "events",
        Kind.GROWING,
        0o444,
        "everything that happens, JSON lines; poll(2)",
        lambda sight, place: render.events(sight.view.events, sight.uid),
    ),
    Row(
        "metrics",
        Kind.STATE,
        0o444,
        "figures for Prometheus",
        lambda sight, place: render.metrics(sight.view),
    ),
    Row(
        "self",
        Kind.LINK,
        0o777,
        "the caller's own process directory",
        lambda sight, place: f"procs/{sight.pid}".encode(),
    ),
    Row("procs", Kind.DIR, 0o555, "the processes of this node: what is in nodes/THIS/procs"),
    Row("nodes", Kind.DIR, 0o555, "the nodes"),
    Row("nodes/NODE", Kind.DIR, 0o555, ""),
    Row(
        "nodes/NODE/state",
        Kind.STATE,
        0o444,
        "online | failed, and the number of unmanaged processes",
        lambda sight, place: render.node_state(sight.view, place.args[0]),
    ),
    Row(
        "nodes/NODE/info",
        Kind.STATE,
        0o444,
        "address, kernel, arch, cpu flags digest, CRIU, agent",
        lambda sight, place: render.flat(sight.view.nodes[place.args[0]].info),
    ),
    Row(
        "nodes/NODE/load",
        Kind.STATE,
        0o444,
        "cpus, load, memory, pressure, processes, age of the data",
        lambda sight, place: render.node_load(sight.view.nodes[place.args[0]]),
    ),
    Row(
        "nodes/NODE/restart",
        Kind.VERB,
        0o666,
        "w: APP[/vN] [words]: restart an image on this node",
        _last_restart,
        "restart",
    ),
    Row("nodes/NODE/procs", Kind.DIR, 0o555, "the processes, by pid"),
    Row(_PROC, Kind.DIR, 0o555, "", owner=_process_owner),
    Row(
        f"{_PROC}/status",
        Kind.STATE,
        0o444,
        "pid, name, uid, state, app, tree size, rss, last image, last error",
        _status,
        owner=_process_owner,
    ),
    Row(
        f"{_PROC}/tree",
        Kind.STATE,
        0o400,
        "the process and its descendants, indented",
        lambda sight, place: render.process_tree(place.args[-2]),
        owner=_process_owner,
    ),
    Row(
        f"{_PROC}/checkpoint",
        Kind.VERB,
        0o600,
        "w: 1 or words: freeze, dump, thaw; r: APP/vN | restarted APP/vN | error ...",
        _outcome("checkpoint"),
        "checkpoint",
        _process_owner,
    ),
    Row(
        f"{_PROC}/freeze",
        Kind.VERB,
        0o600,
        "w: 1 [for=TIME | while-open], 0 [signal=SIGNAL]; r: the state",
        lambda sight, place: render.freeze_state(tree_of(sight, place)),
        "freeze",
        _process_owner,
    ),
    Row(
        f"{_PROC}/signal",
        Kind.VERB,
        0o600,
        "w: a signal for every task of the tree",
        _outcome("signal"),
        "signal",
        _process_owner,
    ),
    Row(
        f"{_PROC}/wait",
        Kind.VERB,
        0o600,
        "w 1: returns when it has ended; r: running | exit N | signal NAME | ended; poll(2)",
        lambda sight, place: render.wait_state(
            place.args[-2], place.args[-1], tree_of(sight, place)
        ),
        "wait",
        _process_owner,
    ),
    Row(
        f"{_PROC}/files",
        Kind.STATE,
        0o400,
        "open files: type|id|name|pid:fd[,pid:fd]",
        lambda sight, place: facts.files_text(facts.open_files(facts.tree(place.args[-2]))),
        owner=_process_owner,
    ),
    Row(f"{_PROC}/job", Kind.LINK, 0o777, "the last job on this tree", _job_link, when=_has_job),
    Row("images", Kind.DIR, 0o1777, "the images, by app"),
    Row("images/APP", Kind.DIR, 0o700, "", owner=_app_owner),
    Row(
        "images/APP/index",
        Kind.STATE,
        0o400,
        "version, time, node, freeze_ms, logical, stored, copies, labels, desc",
        _index,
        owner=_app_owner,
    ),
    Row(
        "images/APP/latest",
        Kind.LINK,
        0o777,
        "the newest version",
        _latest,
        owner=_app_owner,
        when=_has_version,
    ),
    Row(
        "images/APP/LABEL",
        Kind.LINK,
        0o777,
        "ln -s vN LABEL pins a version; rm unpins",
        _label,
        owner=_app_owner,
    ),
    Row(
        "images/APP/VERSION",
        Kind.DIR,
        0o700,
        "an image: CRIU's files, manifest.json, description, user_info.txt",
        owner=_version_owner,
    ),
    Row("images/APP/VERSION/FILE", Kind.DATA, 0o400, "", owner=_version_owner),
    Row("jobs", Kind.DIR, 0o555, "accepted verbs and their progress"),
    Row("jobs/JOB", Kind.DIR, 0o555, "", owner=_job_owner),
    Row(
        "jobs/JOB/status",
        Kind.STATE,
        0o444,
        "verb, object, phase, bytes, rate, eta, freeze_ms, outcome, message",
        lambda sight, place: render.job_status(sight.view.jobs[place.args[0]]),
        owner=_job_owner,
    ),
    Row(
        "jobs/JOB/log",
        Kind.DATA,
        0o400,
        "what CRIU said, the lines that matter first",
        owner=_job_owner,
    ),
    Row(
        "jobs/JOB/cancel",
        Kind.VERB,
        0o600,
        "w 1: end the job before its commit line",
        lambda sight, place: b"",
        "cancel",
        _job_owner,
    ),
)


# /krg/procs is a directory of its own and no link: the kernel asks for the target of a link at
# every use, which made each stat below it cost twice.
ALIASES = tuple(
    dataclasses.replace(row, path=row.path.removeprefix("nodes/NODE/"), help="")
    for row in TABLE
    if row.path.startswith(_PROC)
)
_ROWS = (*TABLE, *ALIASES)
_BY_PATH = {row.path: row for row in TABLE}


def canonical(sight: Sight, place: Place) -> Place:
    """Return the one place of an object that can be reached by two paths."""
    if not place.row.path.startswith("procs/PID"):
        return place
    return Place(_BY_PATH[f"nodes/NODE/{place.row.path}"], (sight.view.node, *place.args))


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
