"""The one table of files: path, mode, what reading shows, which verb writing is.

`TABLE` drives lookup, readdir, getattr and open in the mount, the README file and the test that the
manual names every file. A part of a path in capitals stands for many names; `tree.VARIABLES` says
which.
"""

from __future__ import annotations

from collections.abc import Callable

from . import facts, policy, render
from .model import NOBODY
from .places import Kind, Place, Row, Sight, node_of, tree_of, version_of

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


# -- what reading shows, from the rows' side: pick the objects, let `render` write them


def _status(sight: Sight, place: Place) -> bytes:
    return render.process_status(node_of(sight, place), place.args[-2], tree_of(sight, place))


def _outcome(verb: str) -> Callable[[Sight, Place], bytes]:
    def read(sight: Sight, place: Place) -> bytes:
        known = tree_of(sight, place)
        line = known.outcomes.get(verb, "") if known else ""
        return f"{line}\n".encode() if line else b""

    return read


def _last(verb: str) -> Callable[[Sight, Place], bytes]:
    def read(sight: Sight, place: Place) -> bytes:
        jobs = sight.view.jobs.values()
        return render.last_line(
            job for job in jobs if job.verb == verb and sight.uid in (0, job.uid)
        )

    return read


def _latest(sight: Sight, place: Place) -> bytes:
    return f"v{max(sight.view.images[place.args[0]])}".encode()


def _label(sight: Sight, place: Place) -> bytes:
    return f"v{sight.view.apps[place.args[0]].labels[place.args[1]]}".encode()


def _index(sight: Sight, place: Place) -> bytes:
    app = sight.view.apps[place.args[0]]
    return render.index(app, sight.view.images.get(app.name, {}).values())


def _policy(sight: Sight, place: Place) -> bytes:
    node = sight.view.nodes[sight.view.node]
    return render.flat(policy.lines(node.policy_of(sight.view.apps[place.args[0]])))


def _job_link(sight: Sight, place: Place) -> bytes:
    known = tree_of(sight, place)
    up = "../" * place.row.path.count("/")
    return f"{up}jobs/{known.last_job}".encode() if known else b""


def readme(sight: Sight, place: Place) -> bytes:
    """Return the interface on one page, made of the table itself."""
    return render.readme((row.path, row.help) for row in TABLE if row.help)


PROC = "nodes/NODE/procs/PID"
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
        _last("restart"),
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
        _last("restart"),
        "restart",
    ),
    Row("nodes/NODE/procs", Kind.DIR, 0o555, "the processes, by pid"),
    Row(PROC, Kind.DIR, 0o555, "", owner=_process_owner),
    Row(
        f"{PROC}/status",
        Kind.STATE,
        0o444,
        "pid, name, uid, state, app, tree size, rss, last image, last error",
        _status,
        owner=_process_owner,
    ),
    Row(
        f"{PROC}/tree",
        Kind.STATE,
        0o400,
        "the process and its descendants, indented",
        lambda sight, place: render.process_tree(place.args[-2]),
        owner=_process_owner,
    ),
    Row(
        f"{PROC}/checkpoint",
        Kind.VERB,
        0o600,
        "w: 1 or words: freeze, dump, thaw; r: APP/vN | restarted APP/vN | error ...",
        _outcome("checkpoint"),
        "checkpoint",
        _process_owner,
    ),
    Row(
        f"{PROC}/freeze",
        Kind.VERB,
        0o600,
        "w: 1 [for=TIME | while-open], 0 [signal=SIGNAL]; r: the state",
        lambda sight, place: render.freeze_state(tree_of(sight, place)),
        "freeze",
        _process_owner,
    ),
    Row(
        f"{PROC}/signal",
        Kind.VERB,
        0o600,
        "w: a signal for every task of the tree",
        _outcome("signal"),
        "signal",
        _process_owner,
    ),
    Row(
        f"{PROC}/wait",
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
        f"{PROC}/files",
        Kind.STATE,
        0o400,
        "open files: type|id|name|pid:fd[,pid:fd]",
        lambda sight, place: facts.files_text(facts.open_files(facts.tree(place.args[-2]))),
        owner=_process_owner,
    ),
    Row(f"{PROC}/job", Kind.LINK, 0o777, "the last job on this tree", _job_link, when=_has_job),
    Row("images", Kind.DIR, 0o1777, "the images, by app"),
    Row("images/APP", Kind.DIR, 0o700, "", owner=_app_owner),
    Row(
        "images/APP/index",
        Kind.STATE,
        0o400,
        "version, time, node, freeze_ms, logical, stored, copies, labels, new, desc",
        _index,
        owner=_app_owner,
    ),
    Row(
        "images/APP/policy",
        Kind.KNOB,
        0o600,
        "rw: keep, keep_bytes, max_age: which images stay",
        _policy,
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
    Row("store", Kind.DIR, 0o555, "what the images are kept in"),
    Row(
        "store/status",
        Kind.STATE,
        0o444,
        "packs, chunks, stored_bytes, images, logical_bytes, damaged, last_sweep, last_verify",
        lambda sight, place: render.store_status(sight.view),
    ),
    Row(
        "store/verify",
        Kind.VERB,
        0o666,
        "w: 1 or APP[/vN]: read all of it; r: the last outcome; jobs/JOB/log names the damage",
        _last("verify"),
        "verify",
    ),
    Row(
        "store/sweep",
        Kind.VERB,
        0o600,
        "w 1: remove what no image needs; r: what was freed",
        _last("sweep"),
        "sweep",
    ),
    Row(
        "store/diff",
        Kind.VERB,
        0o666,
        "w: APP/vN [to=APP/vM]: what changed; r: how much; jobs/JOB/log has all of it",
        _last("diff"),
        "diff",
    ),
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
