"""Where versions and imports lie below the root of the image store.

ROOT/APP/vN is a version; what begins with a dot beside it (spools, imports, trash) is nobody's to
see. Every method raises BadWords for a name that cannot be, so that no path leads elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re

from krgfs import verbs
from krgfs.errors import BadWords

from . import durable

_IMPORT = re.compile(r"v[1-9][0-9]{0,9}(\.part)?\Z")


class Places:
    """Paths below one root; only `make_app` and `either` look at the disk."""

    def __init__(self, root: str) -> None:
        self.root = root

    def app(self, app: str) -> str:
        try:
            return os.path.join(self.root, verbs.app_name(app))
        except ValueError as exc:
            raise BadWords(str(exc)) from exc

    def version(self, app: str, version: int) -> str:
        return os.path.join(self.app(app), f"v{version}")

    def spool(self, app: str, job: int) -> str:
        return os.path.join(self.app(app), f".spool-{job}")

    def imported(self, app: str, name: str) -> str:
        if not _IMPORT.match(name):
            raise BadWords(f"{name!r} cannot be a version: write vN, or vN.part to import")
        return os.path.join(self.app(app), f".import-{name}")

    def either(self, app: str, name: str) -> str:
        """Return the directory of a version, or where an import of this name is or would be."""
        copied = self.imported(app, name)
        published = os.path.join(self.app(app), name)
        return published if os.path.isdir(published) else copied

    def make_app(self, app: str) -> None:
        """Make the directory of an app, durably, if it is not there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.app(app), 0o700)
            durable.sync(self.root)
