"""Which images of an app stay: the flat-keyed file `policy`, line by line, and sizes as written.

`KEYS` drives what the file shows, what it takes, and the test that the manual names every key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from .errors import BadWords
from .model import Policy
from .verbs import duration, quoted

MOST = 2**63 - 1
UNLIMITED = "max"
_SIZE = re.compile(r"(\d{1,19})([KMGTP]?)(?:i?B)?\Z", re.IGNORECASE)


class Key(NamedTuple):
    """A line: its key, the field of Policy that it is, parser (raises ValueError with the rest of a
    sentence) and formatter of what is not unlimited."""

    name: str
    field: str
    parse: Callable[[str], int]
    show: Callable[[int], str] = str


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ValueError(f"{quoted(text)} is not a number of images; write 1, 2 ... or max")
    return int(text)


def size(text: str) -> int:
    """Parse 300000, 64K, 256M or 2G, by powers of 1024, into bytes."""
    found = _SIZE.match(text)
    number = int(found[1]) << 10 * " KMGTP".index(found[2].upper() or " ") if found else MOST + 1
    if number > MOST:
        raise ValueError(f"{quoted(text)} is not a size; write 300000, 256M or 2G")
    return number


def size_text(number: int) -> str:
    """Write bytes for a sentence: 812 bytes, 4.1 KiB, 531 MiB."""
    amount = float(number)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 999.5 or unit == "PiB":
            break
        amount /= 1024
    return f"{amount:.1f} {unit}" if unit != "bytes" and amount < 9.95 else f"{amount:.0f} {unit}"


def _some_bytes(text: str) -> int:
    number = size(text)
    if not number:
        raise ValueError("0 is less than any image; write a size, or max")
    return number


def _whole_seconds(text: str) -> int:
    seconds = duration(text)
    if seconds != int(seconds):
        raise ValueError(f"{quoted(text)} is not a whole number of seconds")
    return int(seconds)


def duration_text(seconds: int) -> str:
    """Write whole seconds as `duration` takes them: 30d, 1h30m."""
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, seconds = divmod(seconds, length)
        if number:
            parts.append(f"{number}{unit}")
    return "".join(parts)


KEYS = {
    key.name: key
    for key in (
        Key("keep", "keep", count),
        Key("keep_bytes", "keep_bytes", _some_bytes),
        Key("max_age", "max_age_s", _whole_seconds, duration_text),
    )
}


def value(name: str, text: str) -> int:
    """Return what a key is set to, 0 for max; ValueError with the rest of a sentence."""
    return 0 if text == UNLIMITED else KEYS[name].parse(text)


def parse(text: str) -> dict[str, int]:
    """Return the fields of Policy that lines set; BadWords, of which line, when one is wrong."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] not in KEYS or len(words) != 2:
            raise BadWords(
                f"policy: {quoted(line)} is no line of it; write {UNLIMITED} or a value after one "
                f"of {', '.join(KEYS)}"
            )
        key = KEYS[words[0]]
        if key.field in fields:
            raise BadWords(f"policy: {key.name} is given twice")
        try:
            fields[key.field] = value(key.name, words[1])
        except ValueError as exc:
            raise BadWords(f"policy: {key.name}: {exc}") from exc
    if not fields:
        raise BadWords(f"policy: there is no line; write one of {', '.join(KEYS)} and its value")
    return fields


def lines(policy: Policy) -> dict[str, str]:
    """Return the lines that the file shows, by their keys."""
    fields = ((key, getattr(policy, key.field)) for key in KEYS.values())
    return {key.name: key.show(number) if number else UNLIMITED for key, number in fields}
