"""Open files without a name: `deleted.py DIR [file] [directory] [linked]`, default file directory.

`linked` is a file that was opened under a name that is gone, and that still has another one.
"""

import os
import random
import stat
import sys
import time
from collections.abc import Callable

from judge import Judge, judged

SIZE = 96 * 1024
RECORD = 48


class NamelessFile:
    """A deleted file, written round and round. Only an image keeps its content."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._content = bytearray(os.urandom(SIZE))
        os.write(self._fd, self._content)
        self._at = os.lseek(self._fd, SIZE // 2, os.SEEK_SET)
        os.unlink(path)

    def step(self) -> None:
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        assert at == self._at, f"the position in the deleted file is {at}, not {self._at}"
        record = random.randbytes(RECORD)
        os.write(self._fd, record)
        self._content[at : at + RECORD] = record
        self._at += RECORD
        if self._at == SIZE:
            self._at = os.lseek(self._fd, 0, os.SEEK_SET)

    def check(self) -> None:
        found = os.pread(self._fd, 2 * SIZE, 0)
        assert len(found) == SIZE, f"the deleted file has {len(found)} bytes, not {SIZE}"
        wrong = next((i for i in range(SIZE) if found[i] != self._content[i]), None)
        assert wrong is None, f"the deleted file is changed at byte {wrong}"
        assert os.fstat(self._fd).st_nlink == 0, "the deleted file has a name again"


class NamelessDirectory:
    """A directory that was removed while it was open: it is one still, and it is empty."""

    def __init__(self, path: str) -> None:
        os.mkdir(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.rmdir(path)

    def step(self) -> None:
        pass

    def check(self) -> None:
        status = os.fstat(self._fd)
        assert stat.S_ISDIR(status.st_mode), "the deleted directory is none any more"
        assert os.listdir(self._fd) == [], "the deleted directory is not empty"
        try:
            os.close(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=self._fd))
        except FileNotFoundError:
            return
        raise AssertionError("the deleted directory is no deleted one any more")


class OtherName:
    """A file with two names, opened under the one that was then unlinked: it is the same file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(f"{path}.gone", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._content = os.urandom(RECORD)
        os.write(self._fd, self._content)
        os.link(f"{path}.gone", path)
        os.unlink(f"{path}.gone")

    def step(self) -> None:
        ours, named = os.fstat(self._fd), os.stat(self._path)
        same = (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)
        assert same, "the file with another name is a different one now"

    def check(self) -> None:
        self.step()
        found = os.pread(self._fd, 2 * RECORD, 0)
        assert found == self._content, "the file with another name is changed"
        assert os.lseek(self._fd, 0, os.SEEK_CUR) == RECORD, "its position is lost"
        assert not os.path.exists(f"{self._path}.gone"), "the name that was unlinked is back"


Part = NamelessFile | NamelessDirectory | OtherName
PARTS: dict[str, Callable[[str], Part]] = {
    "file": NamelessFile,
    "directory": NamelessDirectory,
    "linked": OtherName,
}


def work(judge: Judge, words: list[str]) -> None:
    parts = [PARTS[word](judge.path(word)) for word in words]
    judge.ready(f"holds deleted: {' '.join(words)}")
    while judge.going():
        for part in parts:
            part.step()
        judge.progress()
        time.sleep(0.005)
    for part in parts:
        part.check()


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, sys.argv[2:] or ["file", "directory"])
