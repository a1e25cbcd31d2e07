"""What a file of the mount is: a row of the table with its variable parts filled in.

Everything about a place is a pure function of a Sight: the View, the facts of /proc, and who looks.
"""

from __future__ import annotations

import dataclasses
import enum
import stat
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .model import Image, ImageFile, Import, Tree, View
from .verbs import VERSION


class Sight(NamedTuple):
    """What a rendering may look at. `files` has the listings of image directories that were asked
    for, `uid` and `pid` are of the caller."""

    view: View
    uid: int = 0
    pid: int = 0
    files: Mapping[tuple[str, str], Mapping[str, ImageFile]] = {}


class Kind(enum.Enum):
    DIR = "dir"
    STATE = "state"
    KNOB = "knob"
    VERB = "verb"
    LINK = "link"
    GROWING = "growing"
    DATA = "data"


def _root(sight: Sight, place: Place) -> tuple[int, int]:
    return 0, 0


def _always(sight: Sight, place: Place) -> bool:
    return True


class Place(NamedTuple):
    """A row of the table with its variable parts filled in: one file of the mount.

    Two places are the same file exactly when they are equal: a pid stands with its start time, as
    the last two of `args`.
    """

    row: Row
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One file of the table. Rows are told apart by identity, so that places hash quickly."""

    path: str
    kind: Kind
    mode: int
    help: str
    render: Callable[[Sight, Place], bytes] | None = None
    verb: str = ""
    owner: Callable[[Sight, Place], tuple[int, int]] = _root
    when: Callable[[Sight, Place], bool] = _always

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def type(self) -> int:
        return _TYPES.get(self.kind, stat.S_IFREG)


_TYPES = {Kind.DIR: stat.S_IFDIR, Kind.LINK: stat.S_IFLNK}


# -- which object of the view a place stands for


def tree_of(sight: Sight, place: Place) -> Tree | None:
    """Return what the agent knows of the process of a place, None when it never dealt with it."""
    known = sight.view.trees.get(place.args[-2])
    return known if known is not None and known.id.start == place.args[-1] else None


def node_of(sight: Sight, place: Place) -> str:
    """Return the node that the process of a place is on."""
    node: str = place.args[0] if place.row.path.startswith("nodes/") else sight.view.node
    return node


def version_of(sight: Sight, app: str, name: str) -> Image | Import | None:
    """Return the committed image or the import that a name in images/APP stands for."""
    match = VERSION.match(name)
    if match and (image := sight.view.images.get(app, {}).get(int(match[1]))):
        return image
    return sight.view.imports.get(app, {}).get(name)


def is_import(sight: Sight, place: Place) -> bool:
    """Tell whether a place is, or is a file in, a version that is still being made."""
    return place.row.path.startswith("images/APP/VERSION") and isinstance(
        version_of(sight, place.args[0], place.args[1]), Import
    )
