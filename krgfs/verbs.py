"""The one table of verbs: what may be written into which file, and what every word means.

`TABLE` drives parsing in the mount and the agent, the CLI's options, shell completion and the test
that the manual names every word. A command is one line of at most `MAX_BYTES` bytes, split as the
shell would (shlex). A word that is not in the table, given twice, or with a bad value, is BadWords,
and nothing has happened.
"""

from __future__ import annotations

import re
import shlex
import signal as signals
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import msgspec

from .errors import BadWords

MAX_BYTES = 4096
NAME_BYTES = 128
QUOTED = 60
MAX_DURATION_S = 10 * 365 * 86400.0


class Command(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of what a written line means."""


class Then(msgspec.Struct, frozen=True):
    """What becomes of the tree after a checkpoint; `signal` only with kill."""

    kind: str = "run"
    signal: int = signals.SIGKILL


class ImageRef(msgspec.Struct, frozen=True):
    """A version by name: `version` is vN, a label, or latest."""

    app: str
    version: str = "latest"

    def __str__(self) -> str:
        return f"{self.app}/{self.version}"


class Checkpoint(Command, frozen=True, kw_only=True):
    name: str = ""
    then: Then = Then()
    desc: str = ""
    tcp: str = "fail"
    orphans: str = "refuse"
    durable: str = "yes"
    run_async: bool = False


class Freeze(Command, frozen=True, kw_only=True):
    on: bool
    for_s: float = 0.0
    while_open: bool = False
    signal: int = 0


class Signal(Command, frozen=True, kw_only=True):
    number: int


class Wait(Command, frozen=True, kw_only=True):
    pass


class Restart(Command, frozen=True, kw_only=True):
    image: ImageRef
    pid: str = "auto"
    cgroup: str = "own"
    lazy: str = "no"
    run_async: bool = False


class Cancel(Command, frozen=True, kw_only=True):
    pass


class Verify(Command, frozen=True, kw_only=True):
    """`image` is None for the whole store, and has no version for all images of an app."""

    image: ImageRef | None = None


class Sweep(Command, frozen=True, kw_only=True):
    pass


class Diff(Command, frozen=True, kw_only=True):
    """`to` is None for the latest image of the same app."""

    image: ImageRef
    to: ImageRef | None = None


# -- values: each kind has a parser (raises ValueError with the rest of a sentence) and a formatter

NAME = re.compile(r"[A-Za-z0-9_%][A-Za-z0-9_.+~@%:,=-]*\Z")
VERSION = re.compile(r"v([1-9][0-9]{0,9})\Z")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")
RESERVED_LABELS = ("latest", "index", "policy")


def quoted(text: str) -> str:
    """Write a word that was wrong into a sentence: quoted, and the beginning of a long one."""
    return repr(text) if len(text) <= QUOTED else f"{text[:QUOTED]!r}... ({len(text)} characters)"


def app_name(text: str) -> str:
    """Return `text` if it can name an app: it becomes a directory and part of a store key."""
    if not NAME.match(text) or len(text) > NAME_BYTES:
        raise ValueError(
            f"{quoted(text)} is not a name: letters, digits and _.+~@%:,=- only, "
            f"beginning with a letter, a digit, _ or %, at most {NAME_BYTES} characters"
        )
    return text


def label_name(text: str) -> str:
    """Return `text` if it can name a label; vN, latest, index and policy mean something already."""
    if VERSION.match(text) or text in RESERVED_LABELS:
        raise ValueError(f"{quoted(text)} cannot be a label: it means something already")
    return app_name(text)


def escaped_name(raw: bytes) -> str:
    """Make a name out of kernel bytes: what NAME does not allow becomes %XX."""
    text = "".join(
        chr(c) if chr(c).isascii() and re.match(r"[A-Za-z0-9_.+~@:,=-]", chr(c)) else f"%{c:02X}"
        for c in raw
    )
    return text if text and NAME.match(text) else "%" + text


def image_ref(text: str) -> ImageRef:
    """Parse APP, APP/vN, APP/latest or APP/LABEL, with or without images/ or a mount's prefix."""
    rest = text.rstrip("/")
    if "/images/" in rest and rest.startswith("/"):
        rest = rest.rsplit("/images/", 1)[1]
    elif rest.startswith("images/"):
        rest = rest[len("images/") :]
    app, slash, version = rest.partition("/")
    if slash and not version:
        raise ValueError(f"{quoted(text)} is not an image: write APP or APP/vN")
    app_name(app)
    if version:
        app_name(version)
    return ImageRef(app, version or "latest")


def _images_or_all(text: str) -> ImageRef | None:
    """Parse 1 (everything), APP (all its images) or what image_ref takes."""
    if text == "1":
        return None
    ref = image_ref(text)
    return ref if text.rstrip("/").endswith(f"/{ref.version}") else ImageRef(ref.app, "")


def _images_or_all_text(ref: ImageRef | None) -> str:
    if ref is None:
        return "1"
    return f"images/{ref}" if ref.version else f"images/{ref.app}"


def signal_number(text: str) -> int:
    """Parse TERM, SIGTERM or 15 into a signal number of this machine."""
    if text.isdecimal():
        number = int(text)
        if not 1 <= number <= signals.SIGRTMAX:
            raise ValueError(f"{text} is not a signal: 1 to {int(signals.SIGRTMAX)}")
        return number
    name = text.upper() if text.upper().startswith("SIG") else "SIG" + text.upper()
    try:
        return int(signals.Signals[name])
    except KeyError:
        raise ValueError(
            f"{quoted(text)} is not a signal: TERM, KILL, USR1, 10 ... (kill -l)"
        ) from None


def signal_name(number: int) -> str:
    """Name a signal without its SIG, or give its number if it has no name."""
    try:
        return signals.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)


def duration(text: str) -> float:
    """Parse 90, 90s, 10m, 1h30m or 2d into seconds."""
    found = _DURATION.match(text)
    if not text or not found or not any(found.groups()):
        raise ValueError(f"{quoted(text)} is not a time: write 90s, 10m, 1h30m or 2d")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    if not 0 < total <= MAX_DURATION_S:
        raise ValueError(f"{quoted(text)} is not a time between 0 and ten years")
    return total


def _duration_text(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


def then(text: str) -> Then:
    kind, colon, name = text.partition(":")
    if kind not in ("run", "stop", "kill", "freeze") or (colon and kind != "kill"):
        raise ValueError(f"{quoted(text)} is none of run, stop, kill, kill:SIGNAL, freeze")
    return Then(kind, signal_number(name) if colon else signals.SIGKILL)


def _then_text(value: Then) -> str:
    if value.kind == "kill" and value.signal != signals.SIGKILL:
        return f"kill:{signal_name(value.signal)}"
    return value.kind


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{quoted(text)} is none of {', '.join(allowed)}")
        return text

    return parse


def _cgroup(text: str) -> str:
    if text not in ("own", "caller") and (not text.startswith("/") or ".." in text.split("/")):
        raise ValueError(f"{quoted(text)} is none of own, caller, /PATH (below the cgroup mount)")
    return text


def _text(text: str) -> str:
    if any(ord(c) < 32 for c in text):
        raise ValueError("it has a control character in it")
    return text


# -- the table


class Word(NamedTuple):
    """One word: `name` or `name=value`, the field of the command that it fills, and its meaning."""

    name: str
    field: str
    help: str
    parse: Callable[[str], Any] | None = None
    show: Callable[[Any], str] = str
    values: str = ""


class Bare(NamedTuple):
    """What may or must stand first: the field that it fills, parser and formatter."""

    field: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str]
    values: str
    required: bool = True


class Verb(NamedTuple):
    """A row: `who` is owner (the tree's, image's or job's uid, or root), root or anyone."""

    name: str
    command: type[Command]
    bare: Bare
    words: tuple[Word, ...]
    who: str
    help: str

    def word(self, name: str) -> Word | None:
        return next((w for w in self.words if w.name == name), None)


def _exactly_one(text: str) -> None:
    if text != "1":
        raise ValueError(f"{quoted(text)} is not 1")


def _on_off(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{quoted(text)} is neither 1 nor 0")
    return text == "1"


_ONE = Bare("", _exactly_one, lambda _: "1", "1")
_ASYNC = Word("async", "run_async", "return as soon as the job is accepted")

TABLE: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            "checkpoint",
            Checkpoint,
            _ONE._replace(required=False),
            (
                Word("name", "name", "the app that the image belongs to", app_name, str, "APP"),
                Word(
                    "then",
                    "then",
                    "what becomes of the tree afterwards",
                    then,
                    _then_text,
                    "run|stop|kill[:SIGNAL]|freeze",
                ),
                Word("desc", "desc", "a text kept with the image", _text, str, "TEXT"),
                Word(
                    "tcp",
                    "tcp",
                    "established TCP connections: refuse, drop at restart, or keep",
                    one_of("fail", "close", "keep"),
                    str,
                    "fail|close|keep",
                ),
                Word(
                    "orphans",
                    "orphans",
                    "go on although tasks that belong to the tree in spirit are outside it",
                    one_of("refuse", "drop"),
                    str,
                    "refuse|drop",
                ),
                Word(
                    "durable",
                    "durable",
                    "no returns when the tree runs again; the image is stored meanwhile",
                    one_of("yes", "no"),
                    str,
                    "yes|no",
                ),
                _ASYNC,
            ),
            "owner",
            "freeze the tree, dump it, let it go on; returns when the image is durable",
        ),
        Verb(
            "freeze",
            Freeze,
            Bare("on", _on_off, lambda on: "1" if on else "0", "1|0"),
            (
                Word(
                    "for",
                    "for_s",
                    "thaw by itself after this time",
                    duration,
                    _duration_text,
                    "TIME",
                ),
                Word(
                    "while-open",
                    "while_open",
                    "thaw when the writer closes the file or ends; not with for=",
                ),
                Word(
                    "signal",
                    "signal",
                    "signal to send to every task just before it is thawed",
                    signal_number,
                    signal_name,
                    "SIGNAL",
                ),
            ),
            "owner",
            "1 freezes the tree by its cgroup until 0",
        ),
        Verb(
            "signal",
            Signal,
            Bare("number", signal_number, signal_name, "SIGNAL"),
            (),
            "owner",
            "send a signal to every task of the tree",
        ),
        Verb("wait", Wait, _ONE, (), "owner", "return when the tree's root has ended"),
        Verb(
            "restart",
            Restart,
            Bare("image", image_ref, str, "APP[/vN|/latest|/LABEL]"),
            (
                Word(
                    "pid",
                    "pid",
                    "pids as they were, new ones in a private namespace, or whichever works",
                    one_of("auto", "keep", "new"),
                    str,
                    "auto|keep|new",
                ),
                Word(
                    "cgroup",
                    "cgroup",
                    "where the tree runs: a cgroup of its own, the caller's, or a path",
                    _cgroup,
                    str,
                    "own|caller|/PATH",
                ),
                Word(
                    "lazy",
                    "lazy",
                    "let the tree run before its memory is back",
                    one_of("yes", "no"),
                    str,
                    "yes|no",
                ),
                _ASYNC,
            ),
            "owner",
            "bring an image back to life; returns when it runs",
        ),
        Verb("cancel", Cancel, _ONE, (), "owner", "end the job before its commit line"),
        Verb(
            "verify",
            Verify,
            Bare("image", _images_or_all, _images_or_all_text, "1|APP[/vN|/latest|/LABEL]"),
            (),
            "owner",
            "read every byte of the store, or of images, and compare it with what it is to be",
        ),
        Verb("sweep", Sweep, _ONE, (), "root", "remove from the store what no image needs"),
        Verb(
            "diff",
            Diff,
            Bare("image", image_ref, str, "APP[/vN|/latest|/LABEL]"),
            (
                Word(
                    "to",
                    "to",
                    "the later image; the latest of the same app without",
                    image_ref,
                    str,
                    "IMAGE",
                ),
            ),
            "owner",
            "compare two images: processes, mappings page by page, open files",
        ),
    )
}


def parse(verb_name: str, text: str) -> Command:
    """Return what a line written into `verb_name` means; BadWords says which word is wrong."""
    verb = TABLE[verb_name]
    if len(text.encode(errors="surrogateescape")) > MAX_BYTES:
        raise BadWords(f"{verb_name}: the line is longer than {MAX_BYTES} bytes")
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise BadWords(f"{verb_name}: cannot split the line into words: {exc}") from exc
    if not words:
        raise BadWords(f"{verb_name}: the line is empty; write {usage(verb)}")
    fields: dict[str, Any] = {}
    if _is_bare(verb, words[0]):
        fields |= _bare_field(verb, words.pop(0))
    elif verb.bare.required:
        raise BadWords(f"{verb_name}: it begins with {quoted(words[0])}; write {usage(verb)}")
    for text_of_word in words:
        word, value = _parse_word(verb, text_of_word)
        if word.field in fields:
            raise BadWords(f"{verb_name}: {word.name} is given twice")
        fields[word.field] = value
    return _checked(verb_name, verb.command(**fields))


def format(verb_name: str, command: Command) -> str:
    """Return the shortest line that parses into `command`."""
    verb = TABLE[verb_name]
    words = []
    if verb.bare.field:
        words.append(verb.bare.show(getattr(command, verb.bare.field)))
    for word in verb.words:
        value = getattr(command, word.field)
        if value == _default(verb.command, word.field):
            continue
        words.append(word.name if word.parse is None else f"{word.name}={word.show(value)}")
    return shlex.join(words or [verb.bare.show(None)])


def usage(verb: Verb) -> str:
    """Return the form of a verb's line on one line, as error sentences and help show it."""
    words = " ".join(f"[{w.name}={w.values}]" if w.parse else f"[{w.name}]" for w in verb.words)
    first = verb.bare.values if verb.bare.required else f"[{verb.bare.values}]"
    return f"{first} {words}".strip()


def _is_bare(verb: Verb, text: str) -> bool:
    name, equals, _ = text.partition("=")
    return verb.word(name) is None and (verb.bare.required or not equals)


def _bare_field(verb: Verb, text: str) -> dict[str, Any]:
    try:
        value = verb.bare.parse(text)
    except ValueError as exc:
        raise BadWords(f"{verb.name}: {exc}; write {usage(verb)}") from exc
    return {verb.bare.field: value} if verb.bare.field else {}


def _parse_word(verb: Verb, text: str) -> tuple[Word, Any]:
    name, equals, value = text.partition("=")
    word = verb.word(name)
    if word is None:
        raise BadWords(f"{verb.name}: unknown word {quoted(text)}; write {usage(verb)}")
    if word.parse is None:
        if equals:
            raise BadWords(f"{verb.name}: {name} takes no value")
        return word, True
    if not equals:
        raise BadWords(f"{verb.name}: {name} needs a value: {name}={word.values}")
    try:
        return word, word.parse(value)
    except ValueError as exc:
        raise BadWords(f"{verb.name}: {name}: {exc}") from exc


def _checked(verb_name: str, command: Command) -> Command:
    if isinstance(command, Freeze):
        if command.on and command.signal:
            raise BadWords(f"{verb_name}: signal= goes with 0: it is sent when the tree is thawed")
        if not command.on and (command.for_s or command.while_open):
            raise BadWords(f"{verb_name}: for= and while-open go with 1")
        if command.for_s and command.while_open:
            raise BadWords(f"{verb_name}: for= and while-open exclude each other")
    if isinstance(command, Checkpoint) and command.durable == "no" and command.then.kind != "run":
        raise BadWords(
            f"{verb_name}: durable=no goes with then=run alone: the tree is held until the image "
            "is durable"
        )
    return command


def _default(command: type[Command], field: str) -> Any:
    for info in msgspec.structs.fields(command):
        if info.name == field:
            return cast(Any, info.default)
    raise KeyError(field)
