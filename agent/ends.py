"""Notices when a tree's root ends: one task waits on a pidfd for each tree that has a record.

What froze it is removed with it. For a tree under a keeper the exit status is kept; of any other
only that it has ended is known (its status is its parent's).
"""

from __future__ import annotations

import logging

import msgspec
import trio

from krgfs.errors import KrgError
from krgfs.model import ProcessId, Tree, TreeState

from . import keepers, procs
from .freezer import Freezer
from .state import State

log = logging.getLogger(__name__)


class Ends:
    """The watch over all trees that the agent has dealt with."""

    def __init__(self, state: State, freezer: Freezer, nursery: trio.Nursery) -> None:
        self._state = state
        self._freezer = freezer
        self._nursery = nursery
        self._watched: dict[ProcessId, trio.Event] = {}

    def watch(self, tree: Tree) -> None:
        """Note in its record when the tree ends. Watching one twice is watching it once."""
        if tree.ended or tree.id in self._watched:
            return
        self._watched[tree.id] = trio.Event()
        self._nursery.start_soon(self._until_ended, tree)

    async def noted(self, process: ProcessId) -> None:
        """Wait until the end of a tree that is watched is in its record."""
        if process in self._watched:
            await self._watched[process].wait()

    async def _until_ended(self, tree: Tree) -> None:
        try:
            await self._watch_out(tree)
        finally:
            self._watched.pop(tree.id).set()
        if tree.keeper_dir:
            await keepers.cleared(tree.keeper_dir)

    async def _watch_out(self, tree: Tree) -> None:
        how = "ended"
        if tree.keeper is not None:
            how = await keepers.ended(tree.keeper_dir, tree.id)
        else:
            await procs.ended(tree.id)
        try:
            await self._note(tree, how)
        except KrgError as exc:
            log.error("tree.end_unwritten pid=%d reason=%r", tree.pid, exc.message)
        app = (self._state.tree(tree.id.pid, tree.id.start) or tree).app
        self._state.event("tree.ended", tree.uid, pid=tree.pid, app=app, how=how)

    async def _note(self, tree: Tree, how: str) -> None:
        known = self._state.tree(tree.id.pid, tree.id.start)
        if known is None or known.ended:
            return
        if known.frozen is not None:
            await self._freezer.thaw(known.frozen)

        def ended() -> list[Tree]:
            now = self._state.tree(tree.id.pid, tree.id.start) or known
            return [msgspec.structs.replace(now, state=TreeState.ENDED, ended=how, frozen=None)]

        await self._state.update(ended)
