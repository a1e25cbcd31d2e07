"""The commands of `krg` that look into images and their store: verify and sweep."""

from __future__ import annotations

import re

import click

from . import cli_wait, cli_words
from .cli_files import Files
from .cli_options import as_json, at_mount, print_json
from .cli_table import size
from .errors import Damaged

pass_files = click.make_pass_decorator(Files)
_JOB = re.compile(r"jobs/(\d+)/log")
_DAMAGE = re.compile(r"(\S+(?: at \d+)?) damaged(?: (\S+) chunk ([0-9a-f]+))?: (.*)")


@click.command(short_help="Read images and say what is damaged.")
@click.argument(
    "images", nargs=-1, metavar="[APP[/vN] ...]", shell_complete=cli_words.complete_image
)
@as_json
@at_mount
@pass_files
def verify(files: Files, images: tuple[str, ...], as_json: bool) -> int:
    """Read every byte of the store (root), or of images of yours, and print a line for each.

    APP is all images of it. Exits with 1 where something is damaged, and says of which file of
    which image, and which chunk.
    """
    lines: list[str] = []
    sound = True
    for image in images or ("1",):
        line = cli_words.line("verify", image if image == "1" else _of_app(image), {})
        title = "verify" if image == "1" else f"verify {image}"
        try:
            said = cli_wait.submit(files, files.path("store", "verify"), line, title)
        except Damaged as exc:
            if not _JOB.search(exc.message):
                raise
            said, sound = exc.message, False
        found = [each for each in _log(files, said) if each != said]
        lines += found
        if not as_json:
            click.echo("".join(f"{each}\n" for each in found), nl=False)
    if as_json:
        damage = [match.groups() for each in lines if (match := _DAMAGE.fullmatch(each))]
        named = ("image", "file", "chunk", "why")
        print_json(
            {
                "sound": sound,
                "images": [each.removesuffix(" ok") for each in lines if each.endswith(" ok")],
                "damage": [dict(zip(named, each, strict=True)) for each in damage],
            }
        )
    return 0 if sound else 1


def _of_app(image: str) -> str:
    """Return a name as the file takes it: the app 1 is images/1 there."""
    return f"images/{image}" if image.isdecimal() else image


def _log(files: Files, said: str) -> list[str]:
    """Return the lines of the log of the job that a line names."""
    match = _JOB.search(said)
    return files.read("jobs", match[1], "log").splitlines() if match else []


@click.command(short_help="Remove from the store what no image needs.")
@as_json
@at_mount
@pass_files
def sweep(files: Files, as_json: bool) -> None:
    """Remove from the store what no image needs, as root, and print what was freed.

    What nobody needs is condemned first, and removed when nobody can have come to need it again:
    soon where one node alone writes the store, else by a sweep after an hour.
    """
    said = cli_wait.submit(files, files.path("store", "sweep"), "1", "sweep")
    words = said.split()
    facts = {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}
    if as_json:
        print_json(facts)
        return
    click.echo(f"freed {size(facts['freed'])} of {facts['packs']} packs", nl=False)
    if facts["waiting"]:
        click.echo("; more is condemned, for a later sweep", nl=False)
    click.echo()
