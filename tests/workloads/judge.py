"""What the workloads share: how one says that it is ready, that it goes on, and how it was.

A workload is started as `NAME.py DIR`. It writes DIR/ready when it is set up, counts in
DIR/progress while it works, and on SIGTERM judges what it went through and leaves `PASS` or
`FAIL: sentence` in DIR/verdict. Between those it may be dumped, killed and restored any number of
times, also from an older image: what is in memory is of the image, what is in files may be later.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import NoReturn

FIRST_LINK = b"\0" * 8


def link(previous: bytes, number: int) -> bytes:
    """Return the link after `previous`: a wrong number anywhere before shows in all that follow."""
    return blake2b(previous + number.to_bytes(8, "little"), digest_size=8).digest()


def link_of(numbers: int, start: bytes = FIRST_LINK) -> bytes:
    """Return the last link of a chain over 0, 1, ... `numbers` - 1."""
    for number in range(numbers):
        start = link(start, number)
    return start


def identity() -> str:
    """Return a word for names outside DIR, by which the harness finds and removes what is left."""
    return os.environ.get("WORKLOAD_ID", f"workload-{os.getpid()}")


class Judge:
    """The workload's side of the protocol. Members of its tree are forked through it."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self._asked = False
        self._failures: list[tuple[int, str]] = []  # when, and what
        self._members: dict[int, str] = {}
        self._board: Board | None = None
        self._count = 0
        self._progress = os.open(self.path("progress"), os.O_RDWR | os.O_CREAT, 0o644)
        self.progress(0)
        signal.signal(signal.SIGTERM, self._ask)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def ready(self, what: str, **facts: object) -> None:
        """Say that all is set up: the pid, what it does, then a line `key=value` for each fact."""
        lines = [str(os.getpid()), what, *(f"{key}={value}" for key, value in facts.items())]
        self.write("ready", "\n".join(lines))

    def progress(self, steps: int = 1) -> None:
        """Count on, in place and in fixed width: the file never changes its size."""
        self._count += steps
        os.pwrite(self._progress, b"%020d\n" % self._count, 0)

    def going(self) -> bool:
        """Return whether to work on: not asked to end, nothing failed, every member lives."""
        for pid, what in self._members.items():
            if has_ended(pid):
                self.fail(f"{what} is gone")
        return not (self._asked or self._failures)

    def fail(self, sentence: str) -> None:
        """Take note of a failure; the first one becomes the verdict."""
        self._failures.append((time.time_ns(), sentence))

    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.fail(sentence)

    def fork(self, what: str, work: Callable[[], None]) -> int:
        """Run `work` in a member, which never returns here and only ends when `work` does.

        SIGTERM is for the root: a tree that is signalled as a whole is ended by its root.
        An exception in `work` is a failure of the workload.
        """
        board = self._board = self._board or Board()
        pid = os.fork()
        if pid:
            self._members[pid] = what
            return pid
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._members.clear()
            work()
            assert not self._failures, self._failures[0][1]
            code = 0
        except Exception as exc:
            traceback.print_exc()
            sys.stderr.flush()
            board.put(f"{what}: {spoken(exc)}")
        finally:
            os._exit(code)

    def join(self, patience_s: float = 5.0) -> None:
        """Wait for every member to end by itself; one that does not is a failure, and killed."""
        members, self._members = self._members, {}
        for pid, what in members.items():
            if not wait_until(partial(has_ended, pid), patience_s):
                self.fail(f"{what} does not end")
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self.expect(status == 0, f"{what} ended with {status}")

    def verdict(self) -> NoReturn:
        """Write the verdict, which is the first failure of the root or a member, and exit."""
        failures = self._failures + (self._board.failures() if self._board else [])
        self.write("verdict", f"FAIL: {min(failures)[1]}" if failures else "PASS")
        sys.exit(1 if failures else 0)

    def write(self, name: str, text: str) -> None:
        """Make DIR/name appear whole."""
        fresh = self.path(f".{name}.new")
        with open(fresh, "w") as file:
            file.write(text + "\n")
        os.replace(fresh, self.path(name))

    def _ask(self, _signum: int, _frame: object) -> None:
        self._asked = True


class Board:
    """Where members put a failure for the root, in shared memory: an older image has none of later.

    A file would stay when the tree is killed, and be there still when it is restored.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)

    def put(self, sentence: str) -> None:
        if not self.failures():  # what follows is its consequence
            text = sentence.encode()[: mmap.PAGESIZE - 8]
            self._map[8 : 8 + len(text)] = text
            self._map[:8] = time.time_ns().to_bytes(8, "little")

    def failures(self) -> list[tuple[int, str]]:
        when = int.from_bytes(self._map[:8], "little")
        return [(when, self._map[8:].rstrip(b"\0").decode(errors="replace"))] if when else []


@contextmanager
def judged(directory: str) -> Iterator[Judge]:
    """Give a Judge and end the process with its verdict; an exception is a failure.

    Members are ended by the body, by whatever tells them to, and joined here.
    """
    judge = Judge(directory)
    try:
        yield judge
    except Exception as exc:
        traceback.print_exc()
        judge.fail(spoken(exc))
    judge.join()
    judge.verdict()


def spoken(exc: Exception) -> str:
    """Return an exception as one sentence that says where."""
    where = traceback.extract_tb(exc.__traceback__)[-1]
    text = " ".join(str(exc).split())
    if isinstance(exc, AssertionError):
        return text or f"{where.line} does not hold"
    return f"{type(exc).__name__} at {os.path.basename(where.filename)}:{where.lineno}: {text}"


def has_ended(pid: int) -> bool:
    """Return whether this child of ours has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(holds: Callable[[], bool], patience_s: float = 2.0, nap_s: float = 0.005) -> bool:
    """Return whether the condition came true within so much time of our own running.

    Naps are counted, not the clock: time spent frozen or as an image does not count.
    """
    for _ in range(int(patience_s / nap_s)):
        if holds():
            return True
        time.sleep(nap_s)
    return holds()


class AppendLog:
    """Numbered lines in a file opened for append, held against what memory knows of them.

    After a restart the file may hold lines that were written after the image was made. They must
    be the very lines that would come next; then they are cut off through our descriptor and
    written again. Behind them our last line may be once more: the image was made just before it was
    written. A file shorter than memory knows has lost something.

    Without `access` the file is one that CRIU lets grow between a dump and a restore.
    """

    def __init__(self, path: str, access: int = os.O_WRONLY) -> None:
        self.lines = 0
        self._path = path
        self._first = os.urandom(8)
        self._last = self._first
        self._line = b""
        self._fd = os.open(path, access | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)

    def append(self) -> None:
        """Write the next line; raises AssertionError when the file is not as it was left."""
        self._cut_back()
        self._line, self._last = _line(self.lines, self._last)
        os.write(self._fd, self._line)
        self.lines += 1
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        assert at >= self._known, f"the log's position is {at}, not its end {self._known}"

    def check(self) -> None:
        """Read the whole file back; raises AssertionError when it is not what memory knows."""
        self._cut_back()
        content, last = self._read(0), self._first
        for number in range(self.lines):
            line, last = _line(number, last)
            found = content[number * len(line) : (number + 1) * len(line)]
            assert found == line, f"line {number} of the log is {found!r}, not {line!r}"
        assert last == self._last, "the log's chain in memory is broken"

    @property
    def _known(self) -> int:
        return self.lines * len(_line(0, FIRST_LINK)[0])

    def _cut_back(self) -> None:
        surplus = os.fstat(self._fd).st_size - self._known
        assert surplus >= 0, f"the log has lost its last {-surplus} bytes"
        if surplus == 0:
            return
        found = self._read(self._known)
        while self._line and found.endswith(self._line):
            found = found[: -len(self._line)]
        number, last, coming = self.lines, self._last, b""
        while len(coming) < len(found):
            line, last = _line(number, last)
            coming += line
            number += 1
        assert coming.startswith(found), f"after line {self.lines} the log has a wrong {found!r}"
        os.ftruncate(self._fd, self._known)

    def _read(self, begin: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(begin)
            return file.read()


def _line(number: int, last: bytes) -> tuple[bytes, bytes]:
    last = link(last, number)
    return b"%012d %s\n" % (number, last.hex().encode()), last
