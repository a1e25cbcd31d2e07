"""krg(1): the command line, thin, over the mounted files.

It starts fast: only the room that has the wanted command is imported. Every failure ends with one
sentence on stderr and the exit code that `errors` has for it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn, TextIO, cast

import click

from . import VERSION
from .cli_files import Files
from .cli_options import MOUNT
from .errors import KrgError, from_errno

ROOMS = {
    "checkpoint": "cli_verbs:checkpoint",
    "restart": "cli_verbs:restart",
    "freeze": "cli_verbs:freeze",
    "thaw": "cli_verbs:thaw",
    "signal": "cli_verbs:send",
    "wait": "cli_verbs:wait",
    "cancel": "cli_verbs:cancel",
    "ps": "cli_show:ps",
    "images": "cli_show:images",
    "verify": "cli_images:verify",
    "sweep": "cli_images:sweep",
    "diff": "cli_images:diff",
    "export": "cli_images:export",
    "import": "cli_images:import_",
    "jobs": "cli_show:jobs",
    "nodes": "cli_show:nodes",
    "log": "cli_show:log",
    "up": "cli_node:up",
    "down": "cli_node:down",
    "doctor": "cli_node:doctor",
}
INTERRUPTED = 130
OUTPUT = "standard output"
HELP = """Checkpoint, restart and freeze processes: the files of krgfs as commands.

\b
  krg checkpoint 4242          an image of process 4242; it runs on
  krg restart blast.4242.n1    bring it back
  krg ps                       the trees that krgfs knows

Exit codes are those of krg(1): 0 done, 2 wrong words, 3 not there, 4 not yours, 5 busy ...

Completion of commands, words, pids, images and nodes; for good, put the line into the shell's
own start file:

\b
  bash   eval "$(_KRG_COMPLETE=bash_source krg)"      in ~/.bashrc
  zsh    eval "$(_KRG_COMPLETE=zsh_source krg)"       in ~/.zshrc
  fish   _KRG_COMPLETE=fish_source krg | source       in ~/.config/fish/completions/krg.fish
"""


def program(words: Sequence[str] = ()) -> click.Group:
    """Return the command line, with the commands that `words` may mean, or all of them."""

    @click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option(
        "--mount",
        default=MOUNT,
        show_default=True,
        envvar="KRG_MOUNT",
        show_envvar=True,
        type=click.Path(file_okay=False, readable=False),
        help="where krgfs is mounted; may stand after the command too",
    )
    @click.version_option(VERSION, "--version", prog_name="krg")
    @click.pass_context
    def krg(ctx: click.Context, mount: str) -> None:
        ctx.obj = Files(mount)

    wanted = words[:1] if words and words[0] in ROOMS else ROOMS
    for name in wanted:
        room, _, command = ROOMS[name].partition(":")
        krg.add_command(getattr(import_module(f".{room}", __package__), command), name)
    return krg


def with_command_apart(words: Sequence[str]) -> list[str]:
    """Return the words so that what follows `freeze ... --while` is not taken for our options."""
    found = list(words)
    if "freeze" in found and "--while" in found[found.index("freeze") :]:
        after = found.index("--while", found.index("freeze")) + 1
        if found[after : after + 1] != ["--"]:
            found.insert(after, "--")
    return found


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit as it says."""
    given = with_command_apart(sys.argv[1:] if words is None else words)
    code: object = 0
    if sys.stdout is None:  # it was closed
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    output = Output(sys.stdout)
    try:
        with redirect_stdout(cast(TextIO, output)):
            code = program(given).main(given, prog_name="krg", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except click.Abort:
        code = INTERRUPTED
    except KrgError as exc:
        click.echo(f"krg: {exc.message}", err=True)
        code = exc.exit_code
    except OSError as exc:
        error = explained(exc)
        if exc.filename == OUTPUT:
            output.drop()
        click.echo(f"krg: {error.message}", err=True)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)


class Output:
    """The standard output, with its name in the errors of writing to it, as an opened file has."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def buffer(self) -> Output:
        return Output(self._stream.buffer)

    def write(self, text: Any) -> Any:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def drop(self) -> None:
        """Let go of what could not be written: Python would try again at its exit."""
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self._stream.fileno())

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            exc.filename = OUTPUT
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def explained(exc: OSError) -> KrgError:
    """Return what a refusal of the system means that no command foresaw."""
    why = exc.strerror or str(exc)
    return from_errno(exc.errno or errno.EIO, f"{exc.filename}: {why}" if exc.filename else why)


if __name__ == "__main__":
    main()
