"""Memory shared by two processes: anonymous, /dev/shm linked and unlinked, and a mapped file.

A number is passed to and fro through each region. That shows that it is still shared, and the page
that goes with the number shows that it is still whole.
"""

import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial

from judge import FIRST_LINK, Judge, identity, judged, link, wait_until

PAGE = mmap.PAGESIZE
PAGES = 16  # of a region: one for the numbers, one that goes with them, the rest at rest
ASKED, ANSWERED, STOP = 0, 1, 2  # words of the first page


class Region:
    """A mapping, and the name under which its content can be seen in a file, if there is one.

    The content of a file may be of a later time than our memory; the content of a region without a
    name is always of the same image.
    """

    def __init__(self, what: str, fd: int, path: str | None = None) -> None:
        self.what = what
        self.path = path
        if fd >= 0:
            os.ftruncate(fd, PAGES * PAGE)
        self._map = mmap.mmap(fd, PAGES * PAGE, mmap.MAP_SHARED)
        if fd >= 0:
            os.close(fd)
        self.words = memoryview(self._map).cast("Q")
        for page in range(2, PAGES):
            self.fill(page, page)

    def fill(self, page: int, number: int) -> None:
        self._map[page * PAGE : (page + 1) * PAGE] = pattern(number)

    def check(self, page: int, number: int) -> None:
        found = self._map[page * PAGE : (page + 1) * PAGE]
        assert found == pattern(number), f"page {page} of the {self.what} is damaged"

    def check_rest(self) -> None:
        for page in range(2, PAGES):
            self.check(page, page)

    def check_name(self) -> None:
        """Compare what the mapping holds with what somebody else sees who opens the file."""
        if self.path is None:
            return
        with open(self.path, "rb") as file:
            assert file.read() == self._map[:], f"the {self.what} is no longer that of {self.path}"


def regions(judge: Judge) -> list[Region]:
    shm = f"/dev/shm/{identity()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    unlinked = os.open(f"{shm}.unlinked", flags, 0o600)
    os.unlink(f"{shm}.unlinked")
    return [
        Region("anonymous memory", -1),
        Region("linked shm", os.open(f"{shm}.linked", flags, 0o600), f"{shm}.linked"),
        Region("unlinked shm", unlinked),
        Region("mapped file", os.open(judge.path("shared"), flags, 0o600), judge.path("shared")),
    ]


def work(judge: Judge) -> None:
    shared = regions(judge)
    judge.fork("the member that answers", lambda: answer(shared))
    judge.ready("passes numbers through shared memory", linked=shared[1].path)
    try:
        exchange(judge, shared)
    finally:
        shared[0].words[STOP] = 1
    judge.join()
    if "WORKLOAD_ID" not in os.environ:  # else the harness does it, when no image needs it
        os.unlink(shared[1].path or "")


def exchange(judge: Judge, shared: list[Region]) -> None:
    """Pass numbers on until the end is asked for, then one more through every region."""
    number = 0
    while judge.going():
        number += 1
        for region in shared:
            if not ask(region, number, judge.going):
                break
        judge.progress()
        time.sleep(0.002)
    for last in (number, number + 1):
        for region in shared:
            answered = wait_until(partial(ask, region, last, lambda: False))
            judge.going()  # a member that is gone is the first failure then
            assert answered, f"the {region.what} is not shared any more"
    for region in shared:
        region.check_rest()
        region.check_name()


def ask(region: Region, number: int, going: Callable[[], bool]) -> bool:
    """Put the number there until it comes back; returns False when `going` says not to wait."""
    region.fill(1, number)
    while True:
        region.words[ASKED] = number  # again and again: a file may have been put back to later
        if region.words[ANSWERED] == number:
            return True
        if not going():
            return False
        time.sleep(0.0005)


def answer(shared: list[Region]) -> None:
    """Give every number back; without a name a region's numbers come one after the other."""
    last = [0] * len(shared)
    while not shared[0].words[STOP]:
        for index, region in enumerate(shared):
            number = region.words[ASKED]
            if number == last[index]:
                region.words[ANSWERED] = number
                continue
            if region.path is None:
                after = last[index]
                assert number == after + 1, f"{number} came after {after} through the {region.what}"
                region.check(1, number)
            last[index] = number
            region.words[ANSWERED] = number
        time.sleep(0.0005)
    for region in shared:
        region.check_rest()


def pattern(number: int) -> bytes:
    return link(FIRST_LINK, number) * (PAGE // 8)


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
