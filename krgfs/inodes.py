"""Which inode number stands for which place: counted up, never reused.

A directory or state file keeps its number while the kernel knows it; a verb file gets a fresh one
at every lookup, because the kernel serialises the writes on an inode and a writer that waits for
another one there cannot be killed (Plan 9's clone files do the same).
"""

from __future__ import annotations

from itertools import count

from .places import Kind, Place
from .tree import ROOT

ROOT_INODE = 1


class Inodes:
    """The numbers that the kernel holds, with how often it looked each up."""

    def __init__(self) -> None:
        self._next = count(ROOT_INODE + 1)
        self._places: dict[int, Place] = {ROOT_INODE: ROOT}
        self._numbers: dict[Place, int] = {ROOT: ROOT_INODE}
        self._lookups: dict[int, int] = {ROOT_INODE: 1}
        self._pinned: dict[Place, int] = {}

    def place(self, inode: int) -> Place:
        """Return the place of a number that the kernel holds; KeyError for any other."""
        return self._places[inode]

    def number(self, place: Place) -> int | None:
        """Return the number of a place if the kernel holds one (for a verb file, any one)."""
        return self._numbers.get(place)

    def looked_up(self, place: Place) -> int:
        """Return the number to answer a lookup with, and count it."""
        inode = self._number_for(place)
        self.counted(inode)
        return inode

    def counted(self, inode: int) -> None:
        """The kernel was told this number once more (a listing with attributes is a lookup)."""
        self._lookups[inode] = self._lookups.get(inode, 0) + 1

    def shown(self, place: Place) -> int:
        """Return a number for an entry of a listing that may be dropped again by `forget`."""
        return self._number_for(place)

    def pin(self, place: Place, inode: int) -> None:
        """Have lookups of a verb file answered with this number: while a dump looks for the file
        that a task of the tree has open, name and descriptor must show the same inode."""
        self._pinned[place] = inode

    def unpin(self, place: Place) -> None:
        self._pinned.pop(place, None)

    def forget(self, inode: int, lookups: int) -> bool:
        """The kernel dropped so many lookups; at none, the number is gone for good: True then."""
        left = self._lookups.get(inode, 0) - lookups
        if left > 0 or inode == ROOT_INODE:
            self._lookups[inode] = left
            return False
        self._lookups.pop(inode, None)
        self._drop(inode)
        return True

    def retire(self, directory: Place) -> None:
        """An image or app was removed: what has its name next gets other numbers. The kernel lets
        nobody into a directory that it has removed, for as long as something in it is open."""
        within = len(directory.args)
        for place in [each for each in self._numbers if each.args[:within] == directory.args]:
            if place.row.path.startswith(directory.row.path):
                del self._numbers[place]

    def drop_unused(self, inode: int) -> None:
        """Undo `shown` where the entry did not fit into the answer."""
        if inode not in self._lookups:
            self._drop(inode)

    def _drop(self, inode: int) -> None:
        place = self._places.pop(inode, None)
        if place is not None and self._numbers.get(place) == inode:
            del self._numbers[place]

    def _number_for(self, place: Place) -> int:
        if self._pinned and (pinned := self._pinned.get(place, 0)) in self._places:
            return pinned
        known = self._numbers.get(place)
        if known is not None and place.row.kind is not Kind.VERB:
            return known
        inode = next(self._next)
        self._places[inode] = place
        self._numbers[place] = inode
        return inode
