"""What the samples of dump.py say: figures with their goals, as a table and as a picture.

A figure is a ratio of medians. What was not measured, or is not there yet, shows as a dash.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Samples = dict[str, dict[str, list[float | None]]]  # by workload, then by what was measured
Median = Callable[[str], float | None]

MIB = 1 << 20
# goals, from the issue that asked for the image store
FREEZE, DURABLE_FIRST, DURABLE_NEXT, DURABLE_PACKED = 0.6, 1.2, 0.6, 0.35
PACKED_SHARE, LOGICAL_SHARE, NEXT_OF_FIRST, FORKED = 1.2, 0.005, 0.10, 0.25
RESTART, LAZY, COPY, MANY = 1.5, 0.4, 0.7, 1.1
PEAK_MIB, BOUNDED_PEAK_MIB = 1.3 * 1024, 256.0
NONE = "-"
WIDEST = 3.0  # bars of figures further off their goal end there
MET, MISSED, PLAIN = "#3b7d4f", "#b5483a", "#8a8f98"


class MissingMatplotlib(Exception):
    """A picture was asked for and nothing here draws; `pip install krgfs[bench]`."""


class Figure(NamedTuple):
    """One line of the table: `value` is what the goal is about, the rest says it in full."""

    name: str
    goal: float | None
    value: float | None
    unit: str
    measured: str
    peer: str
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def of_goal(self) -> float | None:
        """Return how much of the goal is used up: 1 reaches it, below is better, either way."""
        if not self.goal or not self.value:
            return None
        return self.goal / self.value if self.at_least else self.value / self.goal


def add(samples: Samples, load: str, **values: float | None) -> None:
    for name, value in values.items():
        samples.setdefault(load, {}).setdefault(name, []).append(value)


def figures(samples: Samples) -> list[Figure]:
    """Return all figures for which there is something to say, in the order of the goals."""
    found: list[Figure] = []
    for load in samples:
        find = _medians(samples[load])
        found += _ROWS.get(load, _no_rows)(find)
    return found


def table(facts: Mapping[str, object], rows: Iterable[Figure]) -> str:
    """Return a table in Markdown, below it where it was measured."""
    lines = ["| figure | goal | measured | peer |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.name, _goal(row), row.measured, row.peer)
        lines.append("| " + " | ".join(cells) + " |")
    where = ", ".join(f"{key} {value}" for key, value in facts.items())
    return "\n".join([*lines, "", f"Measured with {where}.", ""])


def need_matplotlib() -> None:
    """Raise MissingMatplotlib unless `draw` can draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingMatplotlib(
            "matplotlib is not installed, which draws the picture: pip install 'krgfs[bench]', "
            "or leave out --plot"
        ) from exc


def draw(samples: Samples, rows: Iterable[Figure], facts: Mapping[str, object], path: str) -> None:
    """Draw the figures against their goals, and below them the times behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.of_goal is not None][::-1]
    bars = _times(samples)[::-1]
    heights = [max(len(shown), 1), max(len(bars), 1)]
    drawing, (goals, times) = pyplot.subplots(
        2, 1, figsize=(12, 1.8 + 0.32 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    colours = [MET if row.met else MISSED for row in shown]
    widths = [min(row.of_goal or 0.0, WIDEST) for row in shown]
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    places = goals.barh([row.name for row in shown], widths, color=colours)
    goals.bar_label(
        places, [f"{row.measured}  (goal {_goal(row)})" for row in shown], padding=4, bbox=clear
    )
    goals.axvline(1, color="black", linewidth=1)
    goals.set_title("of the goal (the line); shorter is better")
    goals.set_xlim(0, WIDEST * 1.7)
    goals.set_xticks([0, 1, 2, 3])
    places = times.barh([name for name, _ in bars], [value for _, value in bars], color=PLAIN)
    times.bar_label(places, [f"{value:.0f} ms" for _, value in bars], padding=4)
    times.set_title(f"milliseconds, {facts['mib']} MiB")
    times.margins(x=0.15)
    for axes in (goals, times):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


# -- the figures of each workload


def _idle(find: Median) -> list[Figure]:
    packed = ratio(find, "first_ms", "bare_archive_ms", "criu + tar + zstd -1", DURABLE_PACKED)
    return [
        *_frozen("idle", find, FREEZE),
        packed("time to durable / (criu + tar + zstd)"),
        ratio(find, "first_ms", "bare_disk_ms", "criu to disk + sync", DURABLE_FIRST)(
            "time to durable / (criu to disk + sync), first time"
        ),
        ratio(find, "next_ms", "next_bare_disk_ms", "criu to disk + sync", None)(
            "time to durable / (criu to disk + sync), nothing changed"
        ),
        _bytes(find, "next_stored_bytes", "first_stored_bytes", "the first", None)(
            "bytes stored / the first, nothing changed"
        ),
        _bytes(find, "first_stored_bytes", "bare_archive_bytes", "tar + zstd -1", None)(
            "bytes stored / (tar + zstd)"
        ),
        *_restarts("idle", find, RESTART, LAZY),
        _rate(find),
        _peak(find, "agent_peak_mib", "default", PEAK_MIB),
        _peak(find, "bounded_peak_mib", "told 200 MiB", BOUNDED_PEAK_MIB),
    ]


def _dirtied(load: str, find: Median) -> list[Figure]:
    return [
        ratio(find, "next_freeze_ms", "next_bare_frozen_ms", "criu to tmpfs", None)(
            f"{load}: freeze time / criu to tmpfs, next one"
        ),
        ratio(find, "next_ms", "next_bare_disk_ms", "criu to disk + sync", DURABLE_NEXT)(
            f"{load}: time to durable / (criu to disk + sync), next one"
        ),
        _increment(load, find),
        _bytes(find, "next_stored_bytes", "first_stored_bytes", "the first", NEXT_OF_FIRST)(
            f"{load}: bytes stored / the first, next one"
        ),
    ]


def _forked(find: Median) -> list[Figure]:
    return [
        _bytes(find, "first_stored_bytes", "logical_bytes", "logical", FORKED)(
            "forked: stored / logical"
        ),
        *_tree("forked", find),
    ]


def _tree(load: str, find: Median) -> list[Figure]:
    return [
        *_frozen(load, find, None),
        ratio(find, "first_ms", "bare_disk_ms", "criu to disk + sync", None)(
            f"{load}: time to durable / (criu to disk + sync)"
        ),
        *_restarts(load, find, None, None),
    ]


def _many(find: Median) -> list[Figure]:
    count = find("images") or 0
    return [
        ratio(find, "many_ms", "one_ms", "with 1 image", MANY)(
            f"a checkpoint with {count:,.0f} images in the store / with 1"
        )
    ]


def _no_rows(_find: Median) -> list[Figure]:
    return []


_ROWS: dict[str, Callable[[Median], list[Figure]]] = {
    "idle": _idle,
    "region": lambda find: _dirtied("region", find),
    "random": lambda find: _dirtied("random", find),
    "forked": _forked,
    "small": lambda find: _tree("small", find),
    "many": _many,
}


def _frozen(load: str, find: Median, goal: float | None) -> list[Figure]:
    return [
        ratio(find, "first_freeze_ms", "bare_frozen_ms", "criu to tmpfs", goal)(
            f"{load}: freeze time / criu to tmpfs, as CRIU counts"
        ),
        ratio(find, "first_felt_ms", "bare_felt_ms", "criu to tmpfs", goal)(
            f"{load}: freeze time / criu to tmpfs, as the tree felt it"
        ),
    ]


def _restarts(load: str, find: Median, goal: float | None, lazy_goal: float | None) -> list[Figure]:
    bare = ("bare_restore_ms", "criu restore from page cache")
    return [
        ratio(find, "restart_ms", *bare, goal)(f"{load}: restart / criu restore"),
        ratio(find, "lazy_first_instruction_ms", *bare, lazy_goal)(
            f"{load}: lazy=yes, first instruction / criu restore"
        ),
    ]


def _rate(find: Median) -> Figure:
    ours, theirs = find("copy_mb_per_s"), find("unzstd_mb_per_s")
    value = _divided(ours, theirs)
    return Figure(
        "cp -r out of /krg / zstd -d, rates",
        COPY,
        value,
        "",
        _with(value, ours, "MB/s"),
        _of(theirs, "MB/s", "zstd -d"),
        at_least=True,
    )


def _peak(find: Median, key: str, how: str, goal: float) -> Figure:
    value = find(key)
    measured = NONE if value is None else f"{value:.0f} MiB"
    return Figure(f"agent memory over idle, {how}", goal, value, "MiB", measured, NONE)


def _increment(load: str, find: Median) -> Figure:
    """What a next image takes, against what its dirtied pages allow it."""
    packed, logical = find("dirtied_packed_bytes"), find("logical_bytes")
    stored = find("next_stored_bytes")
    allowed = None
    if packed is not None and logical is not None:
        allowed = PACKED_SHARE * packed + LOGICAL_SHARE * logical
    value = _divided(stored, allowed)
    peer = _of(_mib(packed), "MiB", "dirtied pages by zstd -1")
    return Figure(
        f"{load}: bytes stored / allowed for what was dirtied, next one",
        1.0,
        value,
        "",
        _with(value, _mib(stored), "MiB"),
        peer,
    )


Named = Callable[[str], Figure]


def ratio(find: Median, ours: str, theirs: str, peer: str, goal: float | None) -> Named:
    """Return what makes the figure of two times in milliseconds, once it is given a name."""
    value = _divided(find(ours), find(theirs))
    measured, beside = _with(value, find(ours), "ms"), _of(find(theirs), "ms", peer)
    return lambda name: Figure(name, goal, value, "", measured, beside)


def _bytes(find: Median, ours: str, theirs: str, peer: str, goal: float | None) -> Named:
    value = _divided(find(ours), find(theirs))
    measured = _with(value, _mib(find(ours)), "MiB")
    beside = _of(_mib(find(theirs)), "MiB", peer)
    return lambda name: Figure(name, goal, value, "", measured, beside)


def _medians(taken: Mapping[str, list[float | None]]) -> Median:
    def find(name: str) -> float | None:
        known = [value for value in taken.get(name, []) if value is not None]
        return statistics.median(known) if known else None

    return find


def _times(samples: Samples) -> list[tuple[str, float]]:
    """Return the bars of the lower picture: frozen, durable, back again."""
    wanted = (
        ("idle", "bare_felt_ms", "frozen: criu to tmpfs"),
        ("idle", "first_felt_ms", "frozen: krgfs"),
        ("idle", "bare_disk_ms", "durable: criu to disk + sync"),
        ("idle", "bare_archive_ms", "durable: criu + tar + zstd -1"),
        ("idle", "first_ms", "durable: krgfs, first"),
        ("region", "next_ms", "durable: krgfs, next, a region of 5 % dirtied"),
        ("random", "next_ms", "durable: krgfs, next, 5 % dirtied at random"),
        ("idle", "bare_restore_ms", "back: criu restore"),
        ("idle", "restart_ms", "back: krgfs"),
        ("idle", "lazy_first_instruction_ms", "back: krgfs, lazy=yes"),
    )
    found = ((name, _medians(samples.get(load, {}))(key)) for load, key, name in wanted)
    return [(name, value) for name, value in found if value is not None]


def _divided(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def _mib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / MIB


def _goal(row: Figure) -> str:
    if row.goal is None:
        return NONE
    number = f"{row.goal:.0f} {row.unit}" if row.unit else f"{row.goal:.2f}".rstrip("0").rstrip(".")
    return f"{'>=' if row.at_least else '<='} {number}"


def _with(value: float | None, ours: float | None, unit: str) -> str:
    return NONE if value is None else f"{value:.3f} ({_number(ours)} {unit})"


def _of(theirs: float | None, unit: str, peer: str) -> str:
    return NONE if theirs is None else f"{_number(theirs)} {unit}, {peer}"


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
