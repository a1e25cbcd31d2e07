"""The texts that reading a file gives: one value, or flat-keyed lines `key value`.

Keys are only ever added. Sizes are bytes, times are RFC 3339 in UTC.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping

from . import VERSION, facts
from .errors import name_of
from .facts import shown
from .model import App, Event, Image, Job, LogLine, Node, Phase, Tree, View, instant


def flat(pairs: Mapping[str, object]) -> bytes:
    return "".join(f"{key} {value}".rstrip() + "\n" for key, value in pairs.items()).encode()


def version() -> bytes:
    return f"{VERSION}\n".encode()


def readme(rows: Iterable[tuple[str, str]]) -> bytes:
    """Write the interface on one page: each file, and below it what it is for."""
    lines = []
    for path, text in rows:
        short = path.replace("nodes/NODE/procs/PID", "procs/PID")
        lines.append(f"  {short}\n      {text}\n" if len(text) > 50 else f"  {short:<26}{text}\n")
    return (
        "krgfs: checkpoint and restart of processes, as files.\n\n"
        + "".join(lines)
        + "\n  echo 1 > /krg/procs/PID/checkpoint     freeze, dump, thaw; returns when durable\n"
        "  cat /krg/procs/PID/checkpoint          APP/vN\n"
        "  echo APP/vN > /krg/restart             bring it back\n\n"
        "See krgfs(5) for every file and word, krgfs(7) for the ideas.\n"
    ).encode()


def process_status(node: str, pid: int, known: Tree | None) -> bytes:
    """Write what `status` of a process shows; of an ended one, what the agent remembers."""
    tasks = facts.tree(pid, _recent)
    if not tasks:
        if known is None:
            return b""
        return flat({"pid": pid, "node": node, "state": known.ended, "app": known.app})
    root = tasks[0]
    state, app, image, error, since, until, inner = _RUNNING
    if known is not None:
        app, image, error = known.app, known.last_image, known.last_error
        since, until = instant(known.frozen_since), instant(known.frozen_until)
        state, inner = known.state.value, known.inner_pid
    if state != "frozen":
        state = "zombie" if root.is_zombie else "stopped" if root.state in "Tt" else "running"
    uid, _ = _recent.owner(pid) or facts.owner(pid) or ("-", "-")
    rss = sum(each.rss_bytes for each in tasks) if len(tasks) > 1 else root.rss_bytes
    # one string and no table: this is the file that is read most
    return (
        f"pid {pid}\nname {shown(root.comm)}\nuid {uid}\nstate {state}\napp{_or_not(app)}\n"
        f"node {node}\ntree {len(tasks)}\nrss {rss}\nstarted {instant(root.started)}\n"
        f"last_image{_or_not(image)}\nlast_error{_or_not(error)}\nfrozen_since {since}\n"
        f"frozen_until {until}\ninner_pid {inner or pid}\n"
    ).encode()


def _or_not(value: str) -> str:
    return f" {value}" if value else ""


_recent = facts.Recent()
_RUNNING = ("running", "", "", "", "-", "-", 0)


def process_tree(pid: int) -> bytes:
    lines = []
    for depth, each in facts.depth_first(facts.tree(pid)):
        what = facts.command_line(each.pid) or b"[" + each.comm + b"]"
        lines.append(f"{'  ' * depth}{each.pid} {each.state} {each.threads} {shown(what)}\n")
    return "".join(lines).encode()


def freeze_state(known: Tree | None) -> bytes:
    if known is not None and known.ended:
        return b"ended\n"
    if known is None or known.state != "frozen":
        return b"running\n"
    until = f" until {instant(known.frozen_until)}" if known.frozen_until else ""
    return f"frozen since {instant(known.frozen_since)}{until}\n".encode()


def wait_state(pid: int, start: int, known: Tree | None) -> bytes:
    if known is not None and known.ended:
        return f"{known.ended}\n".encode()
    return b"running\n" if facts.is_alive(pid, start) else b"ended\n"


def last_line(jobs: Iterable[Job]) -> bytes:
    newest = max(jobs, key=lambda job: job.id, default=None)
    return f"{read_back(newest)}\n".encode() if newest else b""


def read_back(job: Job) -> str:
    """Write the line that a verb file reads back for a job."""
    if not job.is_over:
        return f"running jobs/{job.id}"
    if job.errno:
        return f"error {name_of(job.errno)} {job.message}"
    return job.line


def log(lines: Iterable[LogLine], uid: int) -> bytes:
    return "".join(f"{line.text}\n" for line in lines if uid in (0, line.uid)).encode()


def events(lines: Iterable[Event], uid: int) -> bytes:
    seen = (event for event in lines if uid in (0, event.uid))
    return "".join(f"{json.dumps(event.facts, ensure_ascii=False)}\n" for event in seen).encode()


def node_state(view: View, name: str) -> bytes:
    node = view.nodes[name]
    state = node.state if view.connected or name != view.node else "failed"
    return f"{state} unmanaged {node.unmanaged}\n".encode()


def node_load(node: Node) -> bytes:
    load = node.load
    return flat(
        {
            "cpus": load.cpus,
            "load1": f"{load.load1:.2f}",
            "running": load.running,
            "memory_total": load.memory_total,
            "memory_available": load.memory_available,
            "pressure": f"{load.pressure:.2f}",
            "processes": load.processes,
            "age_s": f"{max(0.0, time.time() - load.measured):.1f}" if load.measured else "-",
        }
    )


def store_status(view: View) -> bytes:
    """Write what the image store holds; of the images, those of this cluster."""
    store = view.store
    images = [image for versions in view.images.values() for image in versions.values()]
    return flat(
        {
            "kind": store.kind,
            "packs": store.packs,
            "chunks": store.chunks,
            "stored_bytes": store.stored_bytes,
            "images": len(images),
            "logical_bytes": sum(image.logical_bytes for image in images),
            "damaged": sum(bool(image.damaged) for image in images),
            "free_bytes": store.available,
            "last_sweep": instant(store.last_sweep),
            "last_verify": instant(store.last_verify),
        }
    )


def index(app: App, images: Iterable[Image]) -> bytes:
    """Write one line an image, newest last, blanks between; the description is the rest."""
    labels: dict[int, list[str]] = {}
    for label, number in sorted(app.labels.items()):
        labels.setdefault(number, []).append(label)
    lines = []
    for image in sorted(images, key=lambda image: image.version):
        names = ",".join(labels.get(image.version, ())) or "-"
        line = (
            f"v{image.version} {instant(image.created)} {image.node or '-'} {image.freeze_ms:.1f} "
            f"{image.logical_bytes} {image.stored_bytes} {image.copies} {names} "
            f"{image.new_bytes} {image.desc}"
        )
        lines.append(line.rstrip() + "\n")
    return "".join(lines).encode()


MOVING = (Phase.DUMPING, Phase.STORING, Phase.RESTORING, Phase.READING)


def job_status(job: Job) -> bytes:
    """Write the state of a job; rate and eta only while it moves bytes."""
    end = job.ended or time.time()
    seconds = max(end - job.started, 1e-6)
    rate = job.bytes_done / seconds
    left = max(0, job.bytes_total - job.bytes_done)
    moving = job.phase in MOVING and rate > 0
    pairs: dict[str, object] = {
        "id": job.id,
        "verb": job.verb,
        "object": job.object,
        "node": job.node,
        "words": job.words,
        "uid": job.uid,
        "phase": job.phase,
        "started": instant(job.started),
        "ended": instant(job.ended),
        "seconds": f"{seconds:.3f}",
        "bytes_done": job.bytes_done,
        "bytes_total": job.bytes_total,
        "rate": int(rate) if moving else "-",
        "eta_s": f"{left / rate:.1f}" if moving else "-",
        "freeze_ms": f"{job.freeze_ms:.1f}",
        "downtime_ms": f"{job.downtime_ms:.1f}",
        "errno": name_of(job.errno) if job.errno else "-",
        "fate": job.fate or "-",
        "outcome": read_back(job),
        "message": job.message,
    }
    return flat(pairs)


_METRIC_HELP = {
    "krg_agent_connected": ("gauge", "1 while the mount has its agent"),
    "krg_jobs_total": ("counter", "jobs that ended, by verb and outcome"),
    "krg_jobs_running": ("gauge", "jobs that have not ended"),
    "krg_freeze_seconds_sum": ("counter", "time that trees stood still for checkpoints"),
    "krg_freeze_seconds_count": ("counter", "checkpoints that froze a tree"),
    "krg_trees_frozen": ("gauge", "trees that are frozen now"),
    "krg_trees_kept": ("gauge", "trees that live under a keeper"),
    "krg_apps": ("gauge", "apps"),
    "krg_images": ("gauge", "committed images"),
    "krg_image_bytes": ("gauge", "logical size of all images"),
    "krg_store_bytes": ("gauge", "size of the store's filesystem"),
    "krg_store_free_bytes": ("gauge", "free room in it"),
}


def metrics(view: View) -> bytes:
    """Write Prometheus' text format (exposition format 0.0.4)."""
    images = [image for versions in view.images.values() for image in versions.values()]
    values: dict[str, float] = {
        "krg_agent_connected": float(view.connected),
        "krg_jobs_running": sum(not job.is_over for job in view.jobs.values()),
        "krg_trees_frozen": sum(tree.state == "frozen" for tree in view.trees.values()),
        "krg_trees_kept": sum(
            tree.keeper is not None and not tree.ended for tree in view.trees.values()
        ),
        "krg_apps": len(view.apps),
        "krg_images": len(images),
        "krg_image_bytes": sum(image.logical_bytes for image in images),
        "krg_store_bytes": view.store.total,
        "krg_store_free_bytes": view.store.available,
        **view.metrics,
    }
    lines, named = [], set()
    for key, value in sorted(values.items()):
        name = key.partition("{")[0]
        if name not in named:
            kind, text = _METRIC_HELP.get(name, ("gauge", name))
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            named.add(name)
        lines.append(f"{key} {value:.10g}")
    return ("\n".join(lines) + "\n").encode()
