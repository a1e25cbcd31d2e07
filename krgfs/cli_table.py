"""How figures and tables look on a terminal. Pure functions.

A table is as wide as it needs, and on a terminal no wider than that: then columns shrink that may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

GAP = "  "
CUT = "…"


class Column(NamedTuple):
    """`least` is the width that it may shrink to; 0 is a column that never shrinks. Names lose
    their middle then, where they differ least, a `prose` its end."""

    title: str
    right: bool = False
    least: int = 0
    prose: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int = 0) -> str:
    """Return the lines of a table, at most `width` characters each where that can be had."""
    cells = [[column.title for column in columns], *([cell or "-" for cell in r] for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    if width:
        _shrink(columns, widths, width - len(GAP) * (len(columns) - 1))
    return "".join(_line(columns, widths, row) for row in cells)


def _shrink(columns: Sequence[Column], widths: list[int], room: int) -> None:
    """Take from the widest column that may shrink, one character at a time, until all fits."""
    while sum(widths) > room:
        loose = [i for i, each in enumerate(columns) if each.least and widths[i] > each.least]
        if not loose:
            return
        widths[max(loose, key=lambda i: widths[i] - columns[i].least)] -= 1


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    parts = []
    for column, width, cell in zip(columns, widths, row, strict=True):
        text = cut(cell, width, column.prose)
        parts.append(text.rjust(width) if column.right else text.ljust(width))
    return GAP.join(parts).rstrip() + "\n"


def cut(text: str, width: int, prose: bool = False) -> str:
    """Shorten a text to a width, in its middle or (prose) at its end."""
    if len(text) <= width:
        return text
    if prose or width < 5:
        return text[: max(0, width - 1)] + CUT
    end = (width - 1) // 2
    return text[: width - 1 - end] + CUT + text[-end:]


def aligned(pairs: Mapping[str, str]) -> str:
    """Return flat keys with their values below each other."""
    width = max(map(len, pairs), default=0)
    return "".join(
        f"{key:<{width}}  {value or '-'}".rstrip() + "\n" for key, value in pairs.items()
    )


def size(text: str | float) -> str:
    """Write bytes as 812, 4.1K, 531M, by powers of 1024; what is no number stays as it is."""
    try:
        amount = float(text)
    except ValueError:
        return str(text)
    for unit in ("", "K", "M", "G", "T", "P"):
        if amount < 999.5 or unit == "P":
            break
        amount /= 1024
    return f"{amount:.1f}{unit}" if unit and amount < 9.95 else f"{amount:.0f}{unit}"


def duration(seconds: float) -> str:
    """Write a time span as 0.2s, 42s, 5m, 3h05m or 4d02h."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes}m{whole % 60:02}s" if minutes < 10 else f"{minutes}m"
    hours = minutes // 60
    if hours < 48:
        return f"{hours}h{minutes % 60:02}m"
    return f"{hours // 24}d{hours % 24:02}h"


def instant(text: str) -> float:
    """Parse 2026-01-31T12:00:00.123Z into seconds since the epoch, 0 when there is none."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def moment(text: str) -> str:
    """Write a time as this machine's clock shows it, to the minute."""
    from datetime import datetime

    seconds = instant(text)
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes") if seconds else "-"


def since(text: str, now: float) -> str:
    """Write how long ago a time was."""
    seconds = instant(text)
    return duration(now - seconds) if seconds else "-"


def bar(title: str, status: Mapping[str, str], columns: int) -> str:
    """Return one line about a running job: phase, how much, rate, and the time that is left."""
    done, total = _number(status, "bytes_done"), _number(status, "bytes_total")
    phase = status.get("phase", "queued")
    if not done or not total:  # nothing is moved yet, or it cannot be told how much
        right = f"{phase} {duration(_number(status, 'seconds'))}"
        return f"{cut(title, columns - 3 - len(right))}: {right}"
    share = min(1.0, done / total)
    right = f"{share:4.0%} {size(done)}/{size(total)}"
    if rate := _number(status, "rate"):
        right += f" {size(rate)}/s"
    if (eta := _number(status, "eta_s", -1.0)) >= 0:
        right += f" {duration(eta)} left"
    left = f"{cut(title, columns - 5 - len(phase) - len(right))}: {phase}"
    room = min(40, columns - 1 - len(left) - len(right) - 4)
    if room < 5:
        return f"{left} {right}"
    full = int(share * room)
    return f"{left} [{'#' * full}{' ' * (room - full)}] {right}"


def _number(pairs: Mapping[str, str], key: str, default: float = 0.0) -> float:
    try:
        return float(pairs.get(key, ""))
    except ValueError:
        return default
