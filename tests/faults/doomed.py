"""krg-agent that ends itself by SIGKILL at a commit of its store: `doomed.py FILE [OPTIONS...]`.

FILE says `before N` or `after N`; commits are counted from when it appears.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from agent import daemon
from agent.store_sqlite import SqliteStore

commit = SqliteStore.commit


class Doom:
    """The commit that will be the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    def count(self) -> None:
        self._count += self._path.exists()

    def strike(self, moment: str) -> None:
        if self._path.exists() and self._path.read_text() == f"{moment} {self._count}":
            self._path.rename(f"{self._path}.hit")
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    doom = Doom(Path(sys.argv.pop(1)))

    async def counted(self: SqliteStore, *args: Any) -> int:
        doom.count()
        doom.strike("before")
        revision = await commit(self, *args)
        doom.strike("after")
        return revision

    SqliteStore.commit = counted  # type: ignore[method-assign]
    daemon.main()


if __name__ == "__main__":
    main()
