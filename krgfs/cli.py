"""krg(1): the command line, thin, over the mounted files.

It starts fast: only the room that has the wanted command is imported. Every failure ends with one
sentence on stderr and the exit code that `errors` has for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from . import VERSION
from .cli_files import Files
from .cli_options import MOUNT
from .errors import KrgError

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
    "jobs": "cli_show:jobs",
    "nodes": "cli_show:nodes",
    "log": "cli_show:log",
    "up": "cli_node:up",
    "down": "cli_node:down",
    "doctor": "cli_node:doctor",
}
INTERRUPTED = 130
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
    try:
        code = program(given).main(given, prog_name="krg", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except click.Abort:
        code = INTERRUPTED
    except KrgError as exc:
        click.echo(f"krg: {exc.message}", err=True)
        code = exc.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
