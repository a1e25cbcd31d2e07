"""What all commands of `krg` have in common: where the mount is, and JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .cli_files import Files

MOUNT = "/krg"
Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="print JSON")


def at_mount(command: Command) -> Command:
    """Let --mount stand after the command too."""

    def set_mount(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.obj = Files(value)

    return click.option(
        "--mount",
        hidden=True,
        expose_value=False,
        callback=set_mount,
        type=click.Path(file_okay=False, readable=False),
    )(command)


def print_json(value: object) -> None:
    import json

    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def width() -> int:
    """Return how wide a table may be: the terminal's width, 0 (no limit) for a file or pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def typed(pairs: dict[str, str]) -> dict[str, object]:
    """Return flat-keyed text as values for JSON: numbers as numbers, - as null."""
    return {key: _typed(key, text) for key, text in pairs.items()}


TEXTS = ("words", "object", "message", "outcome", "name", "app", "desc")


def _typed(key: str, text: str) -> object:
    if key in TEXTS:
        return text
    if text == "-":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
