"""The commands of `krg` that show what the files say: ps, images, nodes, log and jobs."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from typing import NamedTuple

import click

from .cli_files import Files
from .cli_options import as_json, at_mount, print_json, typed, width
from .cli_table import Column, aligned, duration, moment, since, size, table
from .errors import Gone, KrgError, NotYours

JOBS = 20
LINES = 20
pass_files = click.make_pass_decorator(Files)


# -- ps

PROCESS_COLUMNS = (
    Column("PID", right=True),
    Column("INNER", right=True),
    Column("APP", least=12),
    Column("STATE"),
    Column("SINCE", right=True),
    Column("RSS", right=True),
    Column("TREE", right=True),
    Column("LAST", least=8),
    Column("NAME", least=8),
)


@click.command(short_help="The trees that krgfs knows.")
@click.option("-a", "--all", "everything", is_flag=True, help="all your processes (root: all)")
@as_json
@at_mount
@pass_files
def ps(files: Files, everything: bool, as_json: bool) -> None:
    """List the trees that were checkpointed, frozen or restarted: yours, or for root all.

    INNER is the pid inside a private pid namespace, SINCE how long the tree runs or is frozen, LAST
    its newest image.
    """
    found = list(_processes(files))
    if not everything:
        found = [each for each in found if is_known(each)]
    if as_json:
        print_json([typed(each) for each in found])
        return
    now = time.time()
    click.echo(
        table(PROCESS_COLUMNS, [process_row(each, now) for each in found], width()), nl=False
    )


def _processes(files: Files) -> list[dict[str, str]]:
    uid = os.geteuid()
    found = []
    for pid in files.numbers("procs"):
        try:
            if uid and os.stat(files.path("procs", str(pid))).st_uid != uid:
                continue
            found.append(files.pairs("procs", str(pid), "status"))
        except (OSError, Gone):
            continue  # it has ended meanwhile
    return [each for each in found if each]


def is_known(process: dict[str, str]) -> bool:
    """Tell from its status whether krgfs ever dealt with a process."""
    inner = process.get("inner_pid", process.get("pid"))
    return (
        any(process.get(key) for key in ("app", "last_image", "last_error"))
        or process.get("state") == "frozen"
        or inner != process.get("pid")
    )


def process_row(process: dict[str, str], now: float) -> tuple[str, ...]:
    app, last = process.get("app", ""), process.get("last_image", "")
    inner = process.get("inner_pid", "")
    is_frozen = process.get("state") == "frozen"
    return (
        process.get("pid", ""),
        inner if inner != process.get("pid") else "",
        app,
        process.get("state", ""),
        since(process.get("frozen_since" if is_frozen else "started", ""), now),
        size(process.get("rss", "")),
        process.get("tree", ""),
        last.removeprefix(f"{app}/"),
        process.get("name", ""),
    )


# -- images


class Version(NamedTuple):
    """One line of images/APP/index."""

    app: str
    version: str
    created: str
    node: str
    freeze_ms: float
    logical_bytes: int
    stored_bytes: int
    copies: int
    labels: tuple[str, ...]
    new_bytes: int
    desc: str

    @property
    def shared_bytes(self) -> int:
        """What was stored already, for other images, when this one was made."""
        return max(0, self.stored_bytes - self.new_bytes)

    def facts(self) -> dict[str, object]:
        shares = {"shared_bytes": self.shared_bytes, "ratio": ratio_of(*self[5:7])}
        return {**self._asdict(), **shares}


def ratio_of(logical_bytes: int, stored_bytes: int) -> float | None:
    """Return how many bytes one that is stored stands for, None where none is."""
    return round(logical_bytes / stored_bytes, 2) if stored_bytes else None


def version_of(app: str, line: str) -> Version:
    """Parse a line of an index; the description is all the rest."""
    words = line.split(" ", 9)
    version, created, node, freeze_ms, logical, stored, copies, labels, new = words[:9]
    names = () if labels == "-" else tuple(labels.split(","))
    desc = words[9] if len(words) > 9 else ""
    sizes = (int(logical), int(stored), int(copies))
    return Version(app, version, created, node, float(freeze_ms), *sizes, names, int(new), desc)


def _complete_app(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from .cli_words import complete_app

    return complete_app(ctx, param, incomplete)


@click.command(short_help="The images.")
@click.argument("app", required=False, shell_complete=_complete_app)
@as_json
@at_mount
@pass_files
def images(files: Files, app: str | None, as_json: bool) -> None:
    """List the images, of all apps whose images you may see or of APP.

    SHARED is what of STORED was there already when the image was made, RATIO how many bytes of SIZE
    one that is stored stands for.
    """
    if app is None:
        found = [each for name in sorted(files.names("images")) for each in _seen(files, name)]
    else:
        name = app.removeprefix(files.path("images")).strip("/").removeprefix("images/")
        found = _versions(files, name)
    if as_json:
        print_json([each.facts() for each in found])
        return
    several = len({each.node for each in found}) > 1
    columns = [
        Column("IMAGE", least=16),
        Column("CREATED"),
        *([Column("NODE", least=6)] if several else []),
        Column("FROZEN", right=True),
        Column("SIZE", right=True),
        Column("STORED", right=True),
        Column("SHARED", right=True),
        Column("RATIO", right=True),
        Column("LABELS", least=6),
        Column("DESC", least=6, prose=True),
    ]
    rows = [
        (
            f"{each.app}/{each.version}",
            moment(each.created),
            *([each.node] if several else []),
            duration(each.freeze_ms / 1000)
            if each.freeze_ms >= 1000
            else f"{each.freeze_ms:.0f}ms",
            size(each.logical_bytes),
            size(each.stored_bytes),
            size(each.shared_bytes),
            _ratio(each.logical_bytes, each.stored_bytes),
            ",".join(each.labels),
            each.desc,
        )
        for each in found
    ]
    totals = f"\n{_totals(files.pairs('store', 'status'))}\n" if app is None else ""
    click.echo(table(columns, rows, width()) + totals, nl=False)


def _ratio(logical_bytes: int, stored_bytes: int) -> str:
    ratio = ratio_of(logical_bytes, stored_bytes)
    return "" if ratio is None else f"{ratio:.1f}"


def _totals(store: dict[str, str]) -> str:
    logical, stored = int(store["logical_bytes"]), int(store["stored_bytes"])
    ratio = _ratio(logical, stored) or "-"
    damaged = "" if store["damaged"] == "0" else f", {store['damaged']} damaged"
    return (
        f"The store has {store['images']} images{damaged}: {size(logical)} in {size(stored)} "
        f"of {store['chunks']} chunks, ratio {ratio}."
    )


def _seen(files: Files, app: str) -> list[Version]:
    try:
        return _versions(files, app)
    except (Gone, NotYours):
        return []


def _versions(files: Files, app: str) -> list[Version]:
    return [version_of(app, line) for line in files.read("images", app, "index").splitlines()]


# -- nodes


@click.command(short_help="The nodes.")
@as_json
@at_mount
@pass_files
def nodes(files: Files, as_json: bool) -> None:
    """List the nodes, with their load and what they run."""
    found = [node_facts(files, name) for name in sorted(files.names("nodes"))]
    if as_json:
        print_json([typed(each) for each in found])
        return
    columns = (
        Column("NODE", least=8),
        Column("STATE"),
        Column("CPUS", right=True),
        Column("LOAD", right=True),
        Column("FREE", right=True),
        Column("MEMORY", right=True),
        Column("PROCS", right=True),
        Column("CRIU"),
        Column("KERNEL", least=8),
        Column("AGE", right=True),
    )
    rows = [
        (
            each["name"],
            each.get("state", ""),
            each.get("cpus", ""),
            each.get("load1", ""),
            size(each.get("memory_available", "")),
            size(each.get("memory_total", "")),
            each.get("processes", ""),
            each.get("criu_version", each.get("criu", "")),
            each.get("kernel", ""),
            f"{each['age_s']}s" if each.get("age_s", "-") != "-" else "",
        )
        for each in found
    ]
    click.echo(table(columns, rows, width()), nl=False)


def node_facts(files: Files, name: str) -> dict[str, str]:
    """Return what the files of a node say as one mapping; a node that does not answer has fewer."""
    facts = {"name": name}
    try:
        state, *rest = files.line("nodes", name, "state").split()
        facts |= {"state": state, **dict(zip(rest[::2], rest[1::2], strict=False))}
        facts |= files.pairs("nodes", name, "info")
        facts |= files.pairs("nodes", name, "load")
    except KrgError as exc:
        facts["error"] = exc.message
    return {**facts, "name": name}


# -- log


@click.command(short_help="What was done, one line a job.")
@click.option("-f", "--follow", is_flag=True, help="go on with new lines as they come")
@click.option(
    "-n", "lines", default=LINES, show_default=True, metavar="N", help="the last N lines; 0: all"
)
@as_json
@at_mount
@pass_files
def log(files: Files, follow: bool, lines: int, as_json: bool) -> None:
    """Show the log: time id verb object node outcome message; your jobs, for root all."""
    seen = files.read("log").splitlines()
    _print_log(seen[-lines:] if lines else seen, as_json)
    if not follow:
        return
    for now in _readings(files):
        _print_log(lines_after(seen, now), as_json)
        seen = now


def _readings(files: Files) -> Iterator[list[str]]:
    """Yield the lines of the log, and again whenever they may have changed."""
    path = files.path("log")
    with files.explained(path), open(path, "rb", buffering=0) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        while True:
            file.seek(0)
            yield file.read().decode("utf-8", "backslashreplace").splitlines()
            poll.poll(1000)


def lines_after(seen: list[str], now: list[str]) -> list[str]:
    """Return the lines that are new; the oldest may have been dropped meanwhile."""
    if not seen:
        return now
    for i in range(len(now) - 1, -1, -1):
        if now[i] == seen[-1]:
            return now[i + 1 :]
    return now


LOG_FIELDS = ("time", "id", "verb", "object", "node", "outcome", "message")


def _print_log(lines: list[str], as_json: bool) -> None:
    import json

    for line in lines:
        facts = dict(zip(LOG_FIELDS, line.split(" ", len(LOG_FIELDS) - 1), strict=False))
        click.echo(json.dumps(typed(facts), ensure_ascii=False) if as_json else line)


# -- jobs


def _complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from .cli_words import complete_job

    return complete_job(ctx, param, incomplete)


@click.command(short_help="Jobs and their progress.")
@click.argument("job", required=False, metavar="[ID]", shell_complete=_complete_job)
@click.option(
    "-n", "count", default=JOBS, show_default=True, metavar="N", help="the last N jobs; 0: all"
)
@as_json
@at_mount
@pass_files
def jobs(files: Files, job: str | None, count: int, as_json: bool) -> None:
    """List the last jobs, or show all about job ID: its status and what CRIU said."""
    if job is not None:
        _show_job(files, job.removeprefix("jobs/"), as_json)
        return
    found = []
    for number in files.numbers("jobs")[-count:]:
        try:
            found.append(files.pairs("jobs", str(number), "status"))
        except Gone:
            continue
    if as_json:
        print_json([typed(each) for each in found])
        return
    columns = (
        Column("ID", right=True),
        Column("VERB"),
        Column("OBJECT", least=8),
        Column("STATE"),
        Column("AGO", right=True),
        Column("TOOK", right=True),
        Column("BYTES", right=True),
        Column("OUTCOME", least=12, prose=True),
    )
    now = time.time()
    click.echo(table(columns, [job_row(each, now) for each in found], width()), nl=False)


def job_row(job: dict[str, str], now: float) -> tuple[str, ...]:
    is_over = job.get("ended", "-") != "-"
    outcome = job.get("outcome", "").removeprefix("error ") if is_over else ""
    if not is_over and job.get("eta_s", "-") != "-":
        outcome = f"{size(job.get('rate', ''))}/s, {duration(float(job['eta_s']))} left"
    moved = job.get("bytes_done", "0")
    about = job.get("object") or job.get("words", "").partition(" ")[0]
    return (
        job.get("id", ""),
        job.get("verb", ""),
        about.removeprefix(f"nodes/{job.get('node')}/").removeprefix("procs/"),
        job.get("phase", ""),
        since(job.get("started", ""), now),
        duration(float(job.get("seconds", "0"))),
        size(moved) if moved != "0" else "",
        outcome,
    )


def _show_job(files: Files, job: str, as_json: bool) -> None:
    status = files.pairs("jobs", job, "status")
    try:
        said = files.read("jobs", job, "log")
    except NotYours:
        said = ""
    if as_json:
        print_json({**typed(status), "log": said})
        return
    click.echo(aligned(status), nl=False)
    if said:
        click.echo(f"\n{said.rstrip()}")
