"""Files: appended to, written in place, read in sequence; offsets, working directory, umask.

`counter.py DIR [read-write]`: the log that it appends to is also open for reading; CRIU by itself
restores such a file only while it has the size that it had.
"""

import fcntl
import os
import sys
import time

from judge import FIRST_LINK, AppendLog, Judge, judged, link, link_of

SLOTS = 64
LINES = 500
UMASK = 0o027


class Table:
    """Slots of a file of fixed size, written one after the other through the descriptor's offset.

    After a restart a slot may hold a later number than memory knows, never an earlier one.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._known = [0] * SLOTS
        for slot in range(SLOTS):
            os.write(self._fd, _record(slot))
            self._known[slot] = slot
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._next = 0

    def write(self) -> None:
        slot = self._next % SLOTS
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        assert at == slot * len(_record(0)), f"the table's offset is {at}, not that of slot {slot}"
        self._known[slot] += SLOTS
        os.write(self._fd, _record(self._known[slot]))
        if slot == SLOTS - 1:
            os.lseek(self._fd, 0, os.SEEK_SET)
        self._next += 1

    def check(self) -> None:
        size = len(_record(0))
        for slot, known in enumerate(self._known):
            found = os.pread(self._fd, size, slot * size)
            number = int(found[:12]) if found[:12].isdigit() else -1
            assert found == _record(number), f"slot {slot} of the table is torn: {found!r}"
            assert number >= known, f"slot {slot} of the table holds {number}, older than {known}"
            assert number % SLOTS == slot, f"slot {slot} of the table holds {number}"


class Sequence:
    """A file that never changes: read by one descriptor and its duplicate; another one rests."""

    def __init__(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"".join(map(_record, range(LINES))))
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._twin = os.dup(self._fd)
        os.set_inheritable(self._twin, True)
        self._other = os.open(path, os.O_RDONLY)
        self._rest = 7 * len(_record(0)) + 3
        os.lseek(self._other, self._rest, os.SEEK_SET)
        self._next = 0

    def read(self) -> None:
        fd = (self._fd, self._twin)[self._next % 2]  # one offset for both
        found = os.read(fd, len(_record(0)))
        expected = _record(self._next % LINES)
        assert found == expected, f"read {found!r} where {expected!r} was next"
        self._next += 1
        if self._next % LINES == 0:
            os.lseek(self._fd, 0, os.SEEK_SET)

    def check(self) -> None:
        at = os.lseek(self._other, 0, os.SEEK_CUR)
        assert at == self._rest, f"a descriptor that rested at {self._rest} is at {at}"
        assert not os.get_inheritable(self._fd), "close-on-exec is lost"
        assert os.get_inheritable(self._twin), "close-on-exec has come from nowhere"


def work(judge: Judge, log_access: int) -> None:
    log = AppendLog(judge.path("log"), log_access)
    table = Table(judge.path("table"))
    sequence = Sequence(judge.path("sequence"))
    appender = os.open(judge.path("log"), os.O_WRONLY | os.O_APPEND)
    home = judge.path("home")
    os.makedirs(home, exist_ok=True)
    os.chdir(home)
    os.umask(UMASK)
    steps, chain = 0, FIRST_LINK
    judge.ready("writes and reads files")
    while judge.going():
        log.append()
        table.write()
        sequence.read()
        assert os.getcwd() == home, f"the working directory is {os.getcwd()}"
        umask = os.umask(UMASK)
        assert umask == UMASK, f"the umask is {umask:03o}"
        chain = link(chain, steps)
        steps += 1
        judge.progress()
        time.sleep(0.005)
    log.check()
    table.check()
    sequence.check()
    assert fcntl.fcntl(appender, fcntl.F_GETFL) & os.O_APPEND, "O_APPEND is lost"
    judge.expect(chain == link_of(steps), "the counter's chain in memory is broken")


def _record(number: int) -> bytes:
    return b"%012d %s\n" % (number, link(FIRST_LINK, max(number, 0)).hex().encode())


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, os.O_RDWR if "read-write" in sys.argv[2:] else os.O_WRONLY)
