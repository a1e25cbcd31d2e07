"""The commands of `krg` about images and their store: verify, sweep, diff, export, import."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import click

from . import archive, cli_wait, cli_words
from .cli_files import Files
from .cli_options import as_json, at_mount, print_json, width
from .cli_table import Column, size, table
from .errors import BadWords, Damaged, Exists, Gone
from .verbs import VERSION, image_ref

pass_files = click.make_pass_decorator(Files)
PAGE_BYTES = 4096
OUTPUT = "standard output"
DRAW_S = 0.1
MANIFEST_BYTES = 16 << 20
_V = re.compile(r"v([1-9][0-9]{0,9})(?:\.part)?\Z")
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


# -- diff

_PROCESS = re.compile(r"process (?P<pid>\d+) (?P<state>\w+) (?P<name>.*)")
_COUNTS = r"pages (?P<pages>\d+) changed (?P<changed>\d+) added (?P<added>\d+)"
_COUNTS += r" removed (?P<removed>\d+)"
_MAPPING = re.compile(
    rf"mapping (?P<range>\S+) (?P<state>\w+) (?P<kind>\w+) {_COUNTS} ?(?P<name>.*)"
)
_FILE = re.compile(r"file (?P<fd>\d+) (?P<state>\w+) (?P<what>.*)")
_TOTAL = re.compile(rf"total processes (?P<processes>\d+) {_COUNTS}")
MAPPING_COLUMNS = (
    Column("MAPPING"),
    Column("STATE"),
    Column("KIND"),
    Column("PAGES", right=True),
    Column("CHANGED", right=True),
    Column("ADDED", right=True),
    Column("REMOVED", right=True),
    Column("NAME", least=8),
)


@click.command(short_help="What changed from one image to another.")
@click.argument("image", shell_complete=cli_words.complete_image)
@click.argument("later", required=False, metavar="[IMAGE]", shell_complete=cli_words.complete_image)
@as_json
@at_mount
@pass_files
def diff(files: Files, image: str, later: str | None, as_json: bool) -> None:
    """Show what changed from IMAGE to another one, or to the latest of its app.

    Of each process: the mappings in which pages of 4 KiB changed, and the open files.
    """
    line = cli_words.line("diff", image, {cli_words.PREFIX + "to": later})
    said = cli_wait.submit(files, files.path("store", "diff"), line, f"diff {image}")
    found = difference_of(_log(files, said))
    if as_json:
        print_json(found)
    else:
        click.echo(difference_text(found, width()), nl=False)


def difference_of(lines: Iterable[str]) -> dict[str, Any]:
    """Return the lines of a diff as an object."""
    found: dict[str, Any] = {"total": {}, "processes": []}
    for line in lines:
        if match := _PROCESS.fullmatch(line):
            found["processes"].append({**_numbers(match), "mappings": [], "files": []})
        elif match := _MAPPING.fullmatch(line):
            found["processes"][-1]["mappings"].append(_numbers(match))
        elif match := _FILE.fullmatch(line):
            found["processes"][-1]["files"].append(_numbers(match))
        elif match := _TOTAL.fullmatch(line):
            found["total"] = _numbers(match)
    return found


def _numbers(match: re.Match[str]) -> dict[str, object]:
    texts = ("range", "name", "what", "kind", "state")
    return {key: text if key in texts else int(text) for key, text in match.groupdict().items()}


def difference_text(found: dict[str, Any], columns: int) -> str:
    """Return a diff as a person reads it; processes in which nothing changed are left out."""
    parts = []
    for process in found["processes"]:
        if not (process["mappings"] or process["files"] or process["state"] != "same"):
            continue
        word = "" if process["state"] == "same" else f" {process['state']}"
        parts.append(f"{process['pid']} {process['name']}{word}\n")
        if process["mappings"]:
            keys = ("range", "state", "kind", "pages", "changed", "added", "removed", "name")
            rows = [[str(each[key]) for key in keys] for each in process["mappings"]]
            parts.append(table(MAPPING_COLUMNS, rows, columns))
        parts += [f"fd {f['fd']} {f['state']}: {f['what']}\n" for f in process["files"]]
        parts.append("\n")
    total = found["total"]
    moved = size((total["changed"] + total["added"]) * PAGE_BYTES)
    return "".join(parts) + (
        f"{total['changed']} of {total['pages']} pages changed, {total['added']} added ({moved}), "
        f"{total['removed']} removed\n"
    )


# -- export and import


class Moving:
    """Bytes that are moved, with a bar on a terminal."""

    def __init__(self, title: str, phase: str, total: int = 0) -> None:
        self.total = total
        self._phase, self._done = phase, 0
        self._progress = cli_wait.Progress(title)
        self._since = self._drawn = time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if self._progress.is_due and now - self._drawn >= DRAW_S:
            self._drawn = now
            rate = self._done / max(now - self._since, 1e-6)
            facts = {"phase": self._phase, "bytes_done": self._done, "rate": int(rate)}
            if self.total:
                left = max(0, self.total - self._done)
                facts |= {"bytes_total": self.total, "eta_s": f"{left / rate:.1f}"}
            self._progress.draw({key: str(value) for key, value in facts.items()})

    def end(self) -> None:
        self._progress.clear()


class Counted:
    """A file of an image that is read, and counted."""

    def __init__(self, files: Files, path: str, moving: Moving) -> None:
        self._files, self._path, self._moving = files, path, moving
        with files.explained(path):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, size: int) -> bytes:
        with self._files.explained(self._path):
            data = self._file.read(size)
        self._moving.add(len(data))
        return data

    def close(self) -> None:
        self._file.close()


class Sink(NamedTuple):
    """What is written at once and whole; errors say its name."""

    fd: int
    name: str

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        except OSError as exc:
            exc.filename = self.name
            raise


@click.command(short_help="Write an image into one file.")
@click.argument("image", shell_complete=cli_words.complete_image)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@at_mount
@pass_files
def export(files: Files, image: str, file: str) -> None:
    """Write IMAGE into FILE (- is the standard output), compressed, with a digest of all of it.

    `krg import` takes it in again, on any node; `tar --zstd -xf FILE` unpacks it into CRIU's files.
    FILE is there when it is whole, and not before.
    """
    ref = _resolved(files, image)
    with _ended_in_order(), _written(file) as sink:
        moving = Moving(f"export {ref}", "writing")
        try:
            _export(files, ref, sink, moving)
        finally:
            moving.end()


def _resolved(files: Files, image: str) -> str:
    """Return APP/vN of any name of an image."""
    try:
        ref = image_ref(image)
    except ValueError as exc:
        raise BadWords(str(exc)) from exc
    files.names("images", ref.app)
    path = files.path("images", ref.app, ref.version)
    try:
        version = ref.version if VERSION.match(ref.version) else os.readlink(path)
    except OSError as exc:
        raise Gone(f"{ref.app} has no {ref.version}") from exc
    if not os.path.isdir(files.path("images", ref.app, version)):
        raise Gone(f"{ref.app} has no {version}")
    return f"{ref.app}/{version}"


def _export(files: Files, ref: str, sink: archive.Sink, moving: Moving) -> None:
    directory = files.path("images", ref)
    names = sorted(files.names("images", ref), key=lambda name: (name != archive.FIRST, name))
    if names[:1] != [archive.FIRST]:
        raise Damaged(f"{ref} is an import, and no image yet: mv it to its version first")
    with files.explained(directory):
        stats = {name: os.stat(os.path.join(directory, name)) for name in names}
    moving.total = sum(each.st_size for each in stats.values())
    with archive.written(sink, ref) as add:
        for name, stat in stats.items():
            facts = (stat.st_size, stat.st_mode & 0o777, stat.st_uid, stat.st_gid, stat.st_mtime)
            with contextlib.closing(Counted(files, os.path.join(directory, name), moving)) as file:
                add(archive.File(name, *facts), file)


@contextlib.contextmanager
def _written(path: str) -> Iterator[archive.Sink]:
    """Enter the block with what becomes a file, durably, at its end; after an error nothing has."""
    if path == "-":
        if sys.stdout.isatty():
            raise BadWords("an export is not for a terminal: name a file, or a pipe after it")
        sys.stdout.flush()
        yield Sink(sys.stdout.fileno(), OUTPUT)
        return
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadWords(f"{path} is no plain file; write - for the standard output")
    part = f"{path}.part"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield Sink(fd, part)
        os.fsync(fd)
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    finally:
        os.close(fd)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Enter the block so that SIGTERM and SIGHUP end it as Ctrl-C does: what is half done goes."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@click.command("import", short_help="Take an image in from one file.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument(
    "image", required=False, metavar="[APP[/vN]]", shell_complete=cli_words.complete_app
)
@as_json
@at_mount
@pass_files
def import_(files: Files, file: str, image: str | None, as_json: bool) -> None:
    """Take in the image that `krg export` wrote into FILE (- is the standard input).

    It becomes the next version of its own app or of APP, or version vN, and its name is printed.
    What is cut off or changed is refused, and nothing of it stays.
    """
    files.require()
    called = "the standard input" if file == "-" else file
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_in_order())
        number = sys.stdin.fileno() if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        source = stack.enter_context(open(number, "rb", buffering=0, closefd=file != "-"))
        ref = _import(files, archive.entries(source, called), image, Moving("import", "reading"))
    if as_json:
        print_json({"image": ref})
    else:
        click.echo(ref)


def _import(
    files: Files, entries: Iterator[archive.Entry], image: str | None, moving: Moving
) -> str:
    first = next(entries)
    manifest = b"".join(first.pieces) if first.size <= MANIFEST_BYTES else b""
    moving.total = _total(manifest)
    app, version = _wanted(image) if image else (first.app, "")
    try:
        with _imported(files, app, version) as ref:
            part = files.path("images", f"{ref}.part")
            _put(files, os.path.join(part, first.name), iter((manifest,)), moving)
            for entry in entries:
                _put(files, os.path.join(part, entry.name), entry.pieces, moving)
            moving.end()
            _commit(files, part, ref)
    finally:
        moving.end()
    return ref


def _total(manifest: bytes) -> int:
    """Return the size of all files, for the bar alone: the agent is who believes a manifest."""
    try:
        return sum(int(each["size"]) for each in json.loads(manifest)["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _wanted(image: str) -> tuple[str, str]:
    """Return app and version ('' for the next) that an import is to have."""
    try:
        ref = image_ref(image)
    except ValueError as exc:
        raise BadWords(str(exc)) from exc
    if not image.rstrip("/").endswith(f"/{ref.version}"):
        return ref.app, ""
    if not VERSION.match(ref.version):
        raise BadWords(f"{image!r} is no version to import into: write APP or APP/vN")
    return ref.app, ref.version


@contextlib.contextmanager
def _imported(files: Files, app: str, version: str) -> Iterator[str]:
    """Enter the block with the name of an image whose .part is there, empty. After an error neither
    that nor an app that was made for it is there."""
    directory = files.path("images", app)
    made = _make(files, directory)
    try:
        ref = _begun(files, app, version)
        try:
            yield ref
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(files.path("images", f"{ref}.part"))
            raise
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise


def _make(files: Files, path: str) -> bool:
    """Make a directory; tells whether it was not there."""
    with files.explained(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
    return True


def _begun(files: Files, app: str, version: str) -> str:
    """Make the .part of a version, of the next free one when none is given."""
    while True:
        taken = [int(match[1]) for name in files.names("images", app) if (match := _V.match(name))]
        name = version or f"v{max(taken, default=0) + 1}"
        if _make(files, files.path("images", app, f"{name}.part")):
            return f"{app}/{name}"
        if version:
            raise Exists(f"{app} has a {version} already; take another version")


def _put(files: Files, path: str, pieces: Iterator[bytes], moving: Moving) -> None:
    with files.explained(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                moving.add(len(piece))
        finally:
            os.close(fd)


def _commit(files: Files, part: str, ref: str) -> None:
    try:
        os.rename(part, files.path("images", ref))
    except OSError as exc:
        if exc.errno == errno.EBADMSG:
            raise Damaged(
                f"cannot import {ref}: its files are not those of its manifest.json; "
                "take another copy of the export"
            ) from exc
        raise
