"""The commands of `krg` about this machine: up, down and doctor."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import click

from . import doctor as doctors
from . import service
from .cli_criu import find_criu
from .cli_files import Files
from .cli_options import MOUNT, as_json, print_json
from .service import Places
from .verbs import app_name

Command = TypeVar("Command", bound=Callable[..., Any])
FAILED = 1
COLUMNS = 80


def _places(command: Command) -> Command:
    """Add the options that say where a node keeps things."""
    directory = click.Path(file_okay=False, readable=False, resolve_path=True)
    for name, default, text in (
        ("mount", None, f"the mountpoint  [default: {MOUNT}]"),
        ("run", service.RUN, "socket and pidfiles"),
        ("state", service.STATE, "images, records and logs"),
    ):
        command = click.option(
            f"--{name}",
            default=default,
            show_default=default is not None,
            envvar=f"KRG_{name.upper()}",
            type=directory,
            help=text,
        )(command)
    return command


def _criu(text: str) -> Callable[[Command], Command]:
    return click.option(
        "--criu",
        envvar="KRG_CRIU",
        type=click.Path(exists=True, dir_okay=False, executable=True, resolve_path=True),
        help=text,
    )


def _at(ctx: click.Context, state: str, run: str, mount: str | None) -> Places:
    files = ctx.find_object(Files)
    return Places(state, run, mount or (files.mount if files else MOUNT))


def _node_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A node's name becomes a directory and part of the names of images."""
    try:
        return app_name(value) if value else ""
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


@click.command(short_help="Start the agent and mount /krg.")
@_criu("the CRIU to use  [default: the one on PATH if it is 4.2 or newer, else one fetched]")
@click.option(
    "--node",
    default="",
    metavar="NAME",
    callback=_node_name,
    help="this node's name  [default: the host's]",
)
@_places
@as_json
@click.pass_context
def up(
    ctx: click.Context,
    criu: str | None,
    node: str,
    state: str,
    run: str,
    mount: str | None,
    as_json: bool,
) -> None:
    """Start the agent and mount krgfs, and wait until both answer; what runs already is left alone.

    Both are started again when they die. Trees that live under keepers are found again. Their logs
    are in STATE/log.
    """
    places = _at(ctx, state, run, mount)
    found = service.up(places, node, criu or find_criu().path)
    if criu and found.criu and found.criu != criu:
        text = f"krg: the agent uses {found.criu}; `krg down`, then `krg up --criu {criu}`"
        click.echo(text, err=True)
    if as_json:
        print_json({**found._asdict(), "mount": places.mount})
        return
    how = "is up" if found.started else "was up already"
    click.echo(f"krgfs {how}: {places.mount}, node {found.node}, agent {found.agent or '-'}")


@click.command(short_help="Unmount /krg and end the agent.")
@_places
@as_json
@click.pass_context
def down(ctx: click.Context, state: str, run: str, mount: str | None, as_json: bool) -> None:
    """Unmount krgfs and end the agent, and wait until they are gone. Ends no other process.

    Trees under keepers run on, and what is frozen stays frozen; the next `krg up` finds them.
    """
    found = service.down(_at(ctx, state, run, mount))
    if as_json:
        print_json(found._asdict())
        return
    click.echo(down_line(found))


def down_line(found: service.Down) -> str:
    """Return what `down` says: what it ended, and what goes on."""
    text = "krgfs is down" if found.ended else "krgfs was not up"
    if found.kept == 1:
        text += "; 1 restarted tree lives on under its keeper"
    elif found.kept:
        text += f"; {found.kept} restarted trees live on under their keepers"
    if found.frozen:
        stay = "tree stays" if found.frozen == 1 else "trees stay"
        text += f"; {found.frozen} {stay} frozen until `krg up` and `krg thaw`"
    return text


@click.command(short_help="What works on this machine, and what to do about the rest.")
@_criu("the CRIU to look at where no agent runs")
@_places
@as_json
@click.pass_context
def doctor(
    ctx: click.Context, criu: str | None, state: str, run: str, mount: str | None, as_json: bool
) -> int:
    """Try what krgfs needs of this machine, and say what to do about what does not work.

    Exits with 0 unless a check failed. Root sees more: some things only root can try.
    """
    report = doctors.examine(_at(ctx, state, run, mount), criu or "")
    if as_json:
        facts = {key: getattr(report.criu, key) for key in ("path", "version", "ok")}
        print_json({"criu": facts, "checks": [each._asdict() for each in report.checks]})
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else COLUMNS
        click.echo("".join(check_lines(each, columns) for each in report.checks), nl=False)
    return FAILED if report.has_failed else 0


def check_lines(check: doctors.Check, columns: int) -> str:
    """Return a check as the table shows it: state, name, what was found, and below what to do."""
    room = max(columns - 30, 20)
    found = textwrap.wrap(check.found, room, break_on_hyphens=False) or [""]
    what_to_do = textwrap.wrap(f"-> {check.remedy}", room, break_on_hyphens=False)
    lines = [*found, *(what_to_do if check.remedy and check.state != doctors.OK else [])]
    heads = [f"{check.state:<4}  {check.name:<22}  ", *[" " * 30] * (len(lines) - 1)]
    return "".join(f"{head}{line}\n" for head, line in zip(heads, lines, strict=True))
