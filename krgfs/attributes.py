"""What stat(2) and getfattr(1) show of a place.

A listing asks for those of thousands of process directories: what was made once is kept as long as
the kernel holds the number it was made for.
"""

from __future__ import annotations

import pyfuse3

from . import facts, wire
from .model import Image, ImageFile
from .places import Kind, Place, Sight, is_import, node_of, tree_of, version_of
from .tree import listed_owner

STAYS_S = 1.0
CHANGING = (Kind.VERB, Kind.LINK)
STABLE = (Kind.DIR, Kind.STATE)
XATTR = b"user.krg."


class Attributes:
    """Makes attributes, and keeps those of process directories."""

    def __init__(self, hide_pids: bool) -> None:
        self._hide_pids = hide_pids
        self._processes: dict[int, pyfuse3.EntryAttributes] = {}

    def of(self, place: Place, inode: int, sight: Sight) -> pyfuse3.EntryAttributes:
        """Return the attributes of a place that the kernel knows by this number."""
        row = place.row
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = row.type | self._mode(place, sight)
        entry.st_uid, entry.st_gid = row.owner(sight, place)
        entry.st_nlink = 2 if row.kind is Kind.DIR else 1
        entry.entry_timeout = 0.0 if row.kind in CHANGING else STAYS_S
        entry.attr_timeout = STAYS_S if row.kind in STABLE else 0.0
        entry.st_blksize = wire.MAX_DATA if row.kind is Kind.DATA else 4096
        _size(place, entry, sight)
        created = _created(place, sight)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = created
        if row.name == "PID":
            self._processes[inode] = entry
        return entry

    def _mode(self, place: Place, sight: Sight) -> int:
        if place.row.path == "images/APP/VERSION/FILE" and is_import(sight, place):
            return 0o600
        if self._hide_pids and place.row.path.endswith("PID/status"):
            return 0o400
        return place.row.mode

    def listed(self, name: str, inode: int) -> pyfuse3.EntryAttributes | None:
        """Return the attributes of a process directory that was looked up before: only its owner
        can have changed, and that was seen when the directory was opened."""
        known = self._processes.get(inode)
        if known is not None:
            owner = listed_owner(name)
            if owner is None:
                return None
            known.st_uid, known.st_gid = owner
        return known

    def forget(self, inode: int) -> None:
        """The number is gone for good, and what was kept for it goes too."""
        self._processes.pop(inode, None)


def _size(place: Place, entry: pyfuse3.EntryAttributes, sight: Sight) -> None:
    if place.row.kind is Kind.GROWING:
        assert place.row.render is not None
        entry.st_size = len(place.row.render(sight, place))
    elif place.row.path == "images/APP/VERSION/FILE":
        file = sight.files.get(place.args[:2], {}).get(place.args[2], ImageFile(name="", size=0))
        entry.st_size = file.size
        entry.st_blocks = -(-file.stored_bytes // 512)


def _created(place: Place, sight: Sight) -> int:
    row = place.row
    if row.path.startswith("images/APP/VERSION"):
        found = version_of(sight, place.args[0], place.args[1])
        return int(found.created * 1e9) if found else 0
    if row.path.startswith("images/APP"):
        images = sight.view.images.get(place.args[0], {})
        newest = max((image.created for image in images.values()), default=0)
        return int((newest or facts.BOOT_TIME) * 1e9)
    if row.path.startswith("jobs/JOB"):
        job = sight.view.jobs.get(place.args[0])
        return int((job.ended or job.started) * 1e9) if job else 0
    if "/PID" in row.path:
        return int((facts.BOOT_TIME + place.args[-1] / facts.CLOCK_TICKS) * 1e9)
    return int(facts.BOOT_TIME * 1e9)


def xattrs(sight: Sight, place: Place) -> dict[bytes, bytes]:
    """Return the extended attributes of a place, by their whole names."""
    pairs: dict[str, object] = {}
    if place.row.path == "images/APP/VERSION":
        found = version_of(sight, *place.args)
        pairs = _image_facts(found) if isinstance(found, Image) else {"complete": "no"}
    elif place.row.path.endswith("procs/PID"):
        known = tree_of(sight, place)
        pairs = {"node": node_of(sight, place)}
        if known is not None:
            pairs |= {"app": known.app, "last_image": known.last_image}
    return {XATTR + key.encode(): str(value).encode() for key, value in pairs.items()}


def _image_facts(image: Image) -> dict[str, object]:
    return {
        "app": image.app,
        "node": image.node,
        "created": f"{image.created:.3f}",
        "freeze_ms": f"{image.freeze_ms:.1f}",
        "logical_bytes": image.logical_bytes,
        "stored_bytes": image.stored_bytes,
        "new_bytes": image.new_bytes,
        "digest": image.digest,
        "complete": "yes",
        "owner": image.uid,
        **({"damaged": image.damaged} if image.damaged else {}),
    }
