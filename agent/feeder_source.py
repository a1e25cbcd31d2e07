"""Where a feeder has the pages of an image from, chosen by a word: KIND:PLACE."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from krgfs.errors import BadWords, Damaged

from .feeder_packs import Packs


class PageSource(Protocol):
    """The page files of one image; called from several threads."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with what is in a page file (`pages-N.img`) from an offset on.

        Raises Damaged where the content is not there or not what it was: the tree that waits for
        it is then killed. OSError where it cannot be had now; it is asked for again.
        """
        ...


class Directory:
    """The page files that plain CRIU wrote. They are not verified: CRIU keeps no sums of them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        fd = self._fd(file)
        while buffer:
            count = os.preadv(fd, [buffer], offset)
            if count == 0:
                raise Damaged(f"{self._path}/{file} ends at {offset}, before its pages do")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Once nobody reads any more."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                path = os.path.join(self._path, file)
                try:
                    self._fds[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as exc:
                    raise Damaged(f"{path} is missing") from exc
            return self._fds[file]


KINDS: Mapping[str, Callable[[str], PageSource]] = {
    "directory": Directory,
    "packs": Packs,
}
"""What makes a source of a place. It reads nothing yet: only a `read_into` is tried again."""


def open_source(word: str) -> PageSource:
    """Return the source that a word names, as `directory:/path`; BadWords where there is none."""
    kind, _, place = word.partition(":")
    if kind not in KINDS:
        raise BadWords(f"{word} names no source of pages; there is {', '.join(KINDS)}")
    return KINDS[kind](place)
