"""What mkdir, rm, mv and ln do below images/, as requests to the agent.

Apps and labels come and go, an import is filled and renamed to be an image; an image is removed as
a whole or not at all. Whatever else is tried is EPERM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

from . import wire
from .client import Client
from .errors import Gone
from .model import Caller
from .places import Place, Sight, is_import
from .verbs import VERSION

HIDDEN_S = 5.0
WITH_THEIR_DIRECTORY = (
    "images/APP/VERSION/FILE",
    "images/APP/index",
    "images/APP/latest",
    "images/APP/policy",
)


class Edits:
    """Sends the requests, and hides for a while what cannot be removed by itself.

    What changes a file of an import returns with the listing of the import read anew.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._hidden: dict[Place, float] = {}

    # -- apps, versions, labels

    async def make_directory(self, directory: Place, name: str, caller: Caller) -> None:
        """Make an app, or begin an import in one."""
        if directory.row.path == "images":
            await self._ask(wire.MakeApp, caller, app=name)
            self._hidden.clear()
        elif directory.row.path == "images/APP":
            (app,) = directory.args
            await self._ask(wire.BeginImport, caller, app=app, name=name)
        else:
            raise pyfuse3.FUSEError(errno.EPERM)

    async def remove_directory(self, place: Place, caller: Caller) -> None:
        """Remove an app, or a version with all that is in it."""
        if place.row.path == "images/APP":
            await self._ask(wire.RemoveApp, caller, app=place.args[0])
            self._show(place)
        elif place.row.path == "images/APP/VERSION":
            app, version = place.args
            try:
                await self._ask(wire.RemoveVersion, caller, app=app, name=version)
            finally:
                self._show(place)
        else:
            raise pyfuse3.FUSEError(errno.EPERM)

    async def commit(self, place: Place, to: str, caller: Caller) -> None:
        """Make an image of an import: what its renaming to vN means."""
        is_whole = place.row.path == "images/APP/VERSION"
        if not is_whole or not self._is_import(place) or not VERSION.match(to):
            raise pyfuse3.FUSEError(errno.EPERM)
        app, name = place.args
        await self._ask(wire.CommitImport, caller, app=app, name=name, to=to)

    async def make_label(self, directory: Place, label: str, target: str, caller: Caller) -> None:
        """Pin the version that a link names, by whatever path that leads into the same app."""
        if directory.row.path != "images/APP":
            raise pyfuse3.FUSEError(errno.EPERM)
        (app,) = directory.args
        *above, version = [part for part in target.split("/") if part not in ("", ".")] or [""]
        if above[-1:] not in ([], [app]):
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self._ask(wire.SetLabel, caller, app=app, label=label, version=version)

    # -- files

    async def make_file(self, directory: Place, file: str, caller: Caller) -> None:
        """Make an empty file in an import."""
        if directory.row.path != "images/APP/VERSION" or not self._is_import(directory):
            raise pyfuse3.FUSEError(errno.EPERM)
        app, name = directory.args
        await self._ask(wire.WriteFile, caller, app=app, name=name, file=file, offset=0, data=b"")
        await self._relist(app, name, caller)

    async def truncate(self, place: Place, size: int, caller: Caller) -> None:
        """Set the size of a file of an import."""
        app, name, file = place.args
        await self._ask(wire.TruncateFile, caller, app=app, name=name, file=file, size=size)
        await self._relist(app, name, caller)

    async def remove_file(self, place: Place, caller: Caller) -> None:
        """Remove a label or a file of an import; hide what goes with its app or image only."""
        if place.row.path == "images/APP/LABEL":
            app, label = place.args
            await self._ask(wire.RemoveLabel, caller, app=app, label=label)
        elif place.row.path == "images/APP/VERSION/FILE" and self._is_import(place):
            app, name, file = place.args
            await self._ask(wire.RemoveFile, caller, app=app, name=name, file=file)
            await self._relist(app, name, caller)
        elif place.row.path in WITH_THEIR_DIRECTORY:
            self._hide(place)
        else:
            raise pyfuse3.FUSEError(errno.EPERM)

    async def _ask(self, make: Callable[..., wire.Request], caller: Caller, **fields: Any) -> None:
        """Send a request; what is not there is ENOENT to mkdir, mv, ln and rm, not ESRCH."""
        try:
            await self._client.call(make, caller, **fields)
        except Gone as exc:
            raise pyfuse3.FUSEError(errno.ENOENT) from exc

    def _is_import(self, place: Place) -> bool:
        return is_import(Sight(self._client.view), place)

    async def _relist(self, app: str, name: str, caller: Caller) -> None:
        self._client.listings.pop((app, name), None)
        await self._client.files(caller, app, name)

    # -- what is hidden

    def _hide(self, place: Place) -> None:
        """An unlink inside a committed image hides the name for a while: `rm -r` gets on to the
        rmdir, which removes; one that was interrupted leaves the image whole."""
        self._hidden[place] = trio.current_time() + HIDDEN_S

    def _show(self, directory: Place) -> None:
        """Removed or refused: what was hidden in a version or app is hidden no longer."""
        within = len(directory.args)
        for place in [each for each in self._hidden if each.args[:within] == directory.args]:
            del self._hidden[place]

    def is_hidden(self, place: Place) -> bool:
        """Tell whether a name is to be left out of look-ups and listings for now."""
        if not self._hidden:
            return False
        until = self._hidden.get(place)
        if until is None:
            return False
        if until > trio.current_time():
            return True
        del self._hidden[place]
        return False
