"""The words of a verb as options and arguments of a command, and what completes them.

All of it comes from `verbs.TABLE`: a word that is added there is an option here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from .cli_files import Files
from .errors import KrgError
from .verbs import TABLE, Word, parse

Command = TypeVar("Command", bound=Callable[..., Any])
PREFIX = "word_"


def options(verb: str, leave_out: Iterable[str] = ()) -> Callable[[Command], Command]:
    """Add an option for every word of a verb, but for those that the command says otherwise."""

    def add(command: Command) -> Command:
        for word in reversed(TABLE[verb].words):
            if word.name not in leave_out:
                command = _option(word)(command)
        return command

    return add


def _option(word: Word) -> Callable[[Command], Command]:
    name = PREFIX + word.name.replace("-", "_")
    if word.parse is None:
        return click.option(f"--{word.name}", name, is_flag=True, help=word.help)

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [value for value in choices(word) if value.startswith(incomplete)]

    return click.option(
        f"--{word.name}", name, metavar=word.values, help=word.help, shell_complete=complete
    )


def line(verb: str, first: str, given: Mapping[str, Any], trailing: Iterable[str] = ()) -> str:
    """Return the line to write: what stands first, the options given, and words as they came.

    Raises BadWords, as the mount would, before anything is touched.
    """
    words = [first]
    for word in TABLE[verb].words:
        value = given.get(PREFIX + word.name.replace("-", "_"))
        if value is not None and value is not False:
            words.append(word.name if word.parse is None else f"{word.name}={value}")
    text = shlex.join([*words, *trailing])
    parse(verb, text)
    return text


def choices(word: Word) -> list[str]:
    """Return the values that a word can have, where they can be listed."""
    found = [value.partition("[")[0] for value in word.values.split("|")]
    return [value for value in found if value and not value.isupper() and value != "/PATH"]


# -- completion: each gives what begins with the incomplete word


def complete_words(verb: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Complete trailing words of a verb, and their values after `=`.

    A shell that breaks words at `=` (bash) hands over the value alone, after `name` and `=`, of
    which click drops the `=` where nothing follows it.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        before = list(ctx.params.get("words") or ())
        name, equals, value = incomplete.partition("=")
        lead = f"{name}="
        if before[-1:] == ["="] or (not incomplete and before):
            name, lead, value = (
                (["", *before])[-2] if before[-1] == "=" else before[-1],
                "",
                incomplete,
            )
        word = TABLE[verb].word(name)
        if word is not None and word.parse and (equals or not lead):
            return [lead + each for each in choices(word) if each.startswith(value)]
        ways = [w.name + ("=" if w.parse else "") for w in TABLE[verb].words]
        return [way for way in ways if way.startswith(incomplete)]

    return complete


def complete_process(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the processes that are the caller's (root: all), with their names."""
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
            is_ours = os.geteuid() in (0, os.stat(f"/proc/{pid}").st_uid)
        except OSError:
            continue
        if words and is_ours and pid != os.getpid() and str(pid).startswith(incomplete):
            found.append(CompletionItem(str(pid), help=words[:40]))
    return found


def complete_app(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [app for app in _apps(_files(ctx)) if app.startswith(incomplete)]


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Offer apps; after `APP/` its versions, labels and latest."""
    files = _files(ctx)
    app, slash, version = incomplete.partition("/")
    if not slash:
        return [f"{each}/latest" for each in _apps(files) if each.startswith(app)]
    try:
        names = files.names("images", app)
    except KrgError:
        return []
    hidden = ("index",)
    return [f"{app}/{n}" for n in names if n.startswith(version) and n not in hidden]


def complete_node(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _names(_files(ctx), "nodes") if name.startswith(incomplete)]


def complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _names(_files(ctx), "jobs") if name.startswith(incomplete)]


def complete_signal(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    import signal

    names = [each.name.removeprefix("SIG") for each in signal.Signals]
    wanted = incomplete.upper().removeprefix("SIG")
    return [name for name in names if name.startswith(wanted)]


def _files(ctx: click.Context) -> Files:
    found = ctx.find_object(Files)
    return found or Files(os.environ.get("KRG_MOUNT", "/krg"))


def _apps(files: Files) -> list[str]:
    return sorted(_names(files, "images"))


def _names(files: Files, directory: str) -> list[str]:
    try:
        return files.names(directory)
    except KrgError:
        return []
