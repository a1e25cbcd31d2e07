"""Where things of the image store lie on this node, below the state directory.

spool/JOB has the small files of a dump or restore under way, feeding/JOB what a feeder reads,
imports/APP/vN what is being copied in, pages/APP which pages the last version of an app had. Every
method raises BadWords for a name that cannot be, so that no path leads elsewhere.
"""

from __future__ import annotations

import os
import re

from krgfs import verbs
from krgfs.errors import BadWords

_IMPORT = re.compile(r"v[1-9][0-9]{0,9}(\.part)?\Z")


class Places:
    """Paths below one directory."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.spools = os.path.join(root, "spool")
        self.imports = os.path.join(root, "imports")
        self.feedings = os.path.join(root, "feeding")
        self.tables = os.path.join(root, "pages")

    def spool(self, job: int) -> str:
        return os.path.join(self.spools, str(job))

    def app_imports(self, app: str) -> str:
        return os.path.join(self.imports, _app(app))

    def imported(self, app: str, name: str) -> str:
        return os.path.join(self.app_imports(app), import_name(name))

    def feeding(self, job: int) -> str:
        return os.path.join(self.feedings, str(job))

    def table(self, app: str) -> str:
        return os.path.join(self.tables, _app(app))

    def mark(self, what: str) -> str:
        """Return the file whose modification time is when that was last done."""
        return os.path.join(self.root, f"last-{what}")


def import_name(name: str) -> str:
    """Return a name that an import can have."""
    if not _IMPORT.match(name):
        raise BadWords(f"{name!r} cannot be a version: write vN, or vN.part to import")
    return name


def _app(app: str) -> str:
    try:
        return verbs.app_name(app)
    except ValueError as exc:
        raise BadWords(str(exc)) from exc
