"""The commands of `krg` that write into a verb file."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from . import cli_wait, cli_words
from .cli_files import Files, answer, write
from .cli_options import as_json, at_mount, print_json
from .errors import Cancelled
from .verbs import signal_number

Command = TypeVar("Command", bound=Callable[..., Any])
pass_files = click.make_pass_decorator(Files)
pid_argument = click.argument("pid", shell_complete=cli_words.complete_process)


def _words_of(verb: str) -> Callable[[Command], Command]:
    return click.argument(
        "words",
        nargs=-1,
        metavar="[WORD ...]",
        shell_complete=cli_words.complete_words(verb),
    )


@click.command(short_help="Make an image of a running tree.")
@pid_argument
@_words_of("checkpoint")
@cli_words.options("checkpoint")
@as_json
@at_mount
@pass_files
def checkpoint(
    files: Files, /, pid: str, words: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Make an image of process PID and all its descendants, and print its name, APP/vN.

    The tree runs on, unless --then says otherwise. The command returns when the image is durable.
    Words may stand as in the file: krg checkpoint 4242 then=stop desc="before the upgrade".
    """
    line = cli_words.line("checkpoint", "1", given, words)
    path = f"{files.process(pid)}/checkpoint"
    follow = not ({"async", "durable=no"} & set(words) or given.get("word_async"))
    follow &= given.get("word_durable") != "no"
    said = cli_wait.submit(files, path, line, f"checkpoint {pid}", follow)
    _print_outcome(said, as_json)


@click.command(short_help="Bring an image back to life.")
@click.argument("image", shell_complete=cli_words.complete_image)
@_words_of("restart")
@click.option(
    "--node",
    metavar="NODE",
    shell_complete=cli_words.complete_node,
    help="the node to restart it on",
)
@cli_words.options("restart")
@as_json
@at_mount
@pass_files
def restart(
    files: Files,
    /,
    image: str,
    words: tuple[str, ...],
    node: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Bring IMAGE back to life and print `pid N`.

    IMAGE is APP (its latest), APP/vN, APP/LABEL, or the path of an image below the mountpoint.
    """
    line = cli_words.line("restart", image, given, words)
    path = files.path("nodes", node, "restart") if node else files.path("restart")
    follow = not ({"async"} & set(words) or given.get("word_async"))
    said = cli_wait.submit(files, path, line, f"restart {image}", follow)
    _print_outcome(said, as_json)


@click.command(short_help="Stop a tree by its cgroup until it is thawed.")
@pid_argument
@click.argument("words", nargs=-1, metavar="[WORD ... | COMMAND ...]", type=click.UNPROCESSED)
@click.option(
    "--while",
    "is_while",
    is_flag=True,
    help="run the COMMAND that follows, and keep the tree frozen as long as it runs",
)
@cli_words.options("freeze", leave_out=("signal", "while-open"))
@as_json
@at_mount
@pass_files
def freeze(
    files: Files, /, pid: str, words: tuple[str, ...], is_while: bool, as_json: bool, **given: Any
) -> int:
    """Freeze process PID and all its descendants, until `krg thaw`, and print the state.

    With --while COMMAND ... the tree is frozen as long as COMMAND runs, and thawed whatever
    becomes of it or of us; the exit status is then that of COMMAND:

      krg freeze 4242 --while rsync -a data/ backup/
    """
    path = f"{files.process(pid)}/freeze"
    if is_while:
        if not words:
            raise click.UsageError("--while needs the command to run: --while COMMAND ...")
        return _frozen_while(
            files, path, cli_words.line("freeze", "1", given, ["while-open"]), words
        )
    cli_wait.submit(files, path, cli_words.line("freeze", "1", given, words), f"freeze {pid}")
    _print_state(files, path, pid, as_json)
    return 0


def _frozen_while(files: Files, path: str, line: str, command: tuple[str, ...]) -> int:
    """Run a command while the tree is frozen: it thaws when the descriptor is closed."""
    with files.opened(path) as fd:
        write(fd, line)
        try:
            child = subprocess.Popen(command)
        except OSError as exc:
            click.echo(f"krg: cannot run {command[0]}: {exc.strerror}", err=True)
            return 127 if isinstance(exc, FileNotFoundError) else 126
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has it too, and decides
        code = child.wait()
    return code if code >= 0 else 128 - code


@click.command(short_help="Let a frozen tree run again.")
@pid_argument
@_words_of("freeze")
@cli_words.options("freeze", leave_out=("for", "while-open"))
@as_json
@at_mount
@pass_files
def thaw(files: Files, /, pid: str, words: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Let process PID and all its descendants run again, and print the state."""
    path = f"{files.process(pid)}/freeze"
    cli_wait.submit(files, path, cli_words.line("freeze", "0", given, words), f"thaw {pid}")
    _print_state(files, path, pid, as_json)


@click.command("signal", short_help="Send a signal to a whole tree.")
@pid_argument
@click.argument("sig", metavar="SIGNAL", shell_complete=cli_words.complete_signal)
@at_mount
@pass_files
def send(files: Files, /, pid: str, sig: str) -> None:
    """Send SIGNAL (TERM, USR1, 10 ...) to process PID and all its descendants."""
    line = cli_words.line("signal", sig, {})
    cli_wait.submit(files, f"{files.process(pid)}/signal", line, f"signal {pid}")


@click.command(short_help="Wait until a process has ended.")
@pid_argument
@as_json
@at_mount
@pass_files
def wait(files: Files, /, pid: str, as_json: bool) -> int:
    """Wait until process PID has ended, print how (`exit N`, `signal NAME`), and exit like it.

    How it ended is known of restarted processes, which have a keeper; of others the word is `ended`
    and the exit status 0.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with files.opened(f"{files.process(pid)}/wait") as fd:
        while True:
            try:
                write(fd, "1")
                break
            except Cancelled:  # no signal of ours: our own tree was frozen meanwhile
                time.sleep(0.02)
        said = answer(fd)
    if as_json:
        print_json({"pid": int(pid.rpartition(":")[2]), "ended": said})
    else:
        click.echo(said)
    return exit_status(said)


def exit_status(said: str) -> int:
    """Return the exit status of a process that ended as its `wait` file says, as a shell has it."""
    word, _, value = said.partition(" ")
    if word == "exit" and value.isdecimal():
        return int(value)
    if word == "signal":
        try:
            return 128 + signal_number(value)
        except ValueError:
            return 128
    return 0


@click.command(short_help="End a job before its commit line.")
@click.argument("job", metavar="ID", shell_complete=cli_words.complete_job)
@at_mount
@pass_files
def cancel(files: Files, /, job: str) -> None:
    """End job ID before its commit line: its tree runs on, and nothing is left of the attempt."""
    cli_wait.cancel(files, job.removeprefix("jobs/"))


def _print_outcome(said: str, as_json: bool) -> None:
    if as_json:
        print_json(outcome(said))
    else:
        click.echo(said)


def outcome(said: str) -> dict[str, object]:
    """Return a read-back line as an object: what it names, by its kind."""
    word, _, rest = said.partition(" ")
    if word == "running":
        return {"job": int(rest.removeprefix("jobs/"))}
    if word == "pid":
        return {"pids": [int(pid) for pid in rest.split()]}
    if word == "restarted":
        return {"image": rest, "restarted": True}
    return {"image": said}


def _print_state(files: Files, path: str, pid: str, as_json: bool) -> None:
    """Print what the freeze file says now."""
    with files.opened(path) as fd:
        said = answer(fd)
    if not as_json:
        click.echo(said)
        return
    facts = dict(zip(said.split()[1::2], said.split()[2::2], strict=False))
    print_json({"pid": int(pid.rpartition(":")[2]), "state": said.partition(" ")[0], **facts})
