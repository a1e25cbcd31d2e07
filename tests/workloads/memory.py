"""Memory: `memory.py DIR [MIB] [FRACTION] [RANDOM]`, default 16 0.05 0.5.

Each page says which one it is, how often it was written, and has a checksum. FRACTION of the pages,
chosen at random, is written again every second; RANDOM of a page's content cannot be compressed.
"""

import ctypes
import mmap
import random
import struct
import sys
import time
from array import array
from zlib import crc32

from judge import Judge, judged

PAGE = mmap.PAGESIZE
HEADER = struct.Struct("<QII")  # page, version, checksum of the rest
ROUND_S = 0.02
CHECKED = 64  # pages that are looked at in a round
TEXT = b"what compresses well comes again and again. " * 100


class Pages:
    """An anonymous private mapping, and a list of how often each page was written."""

    def __init__(self, count: int, random_part: float) -> None:
        self.map = mmap.mmap(-1, count * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.versions = array("I", [0]) * count
        self._random_bytes = int((PAGE - HEADER.size) * random_part)
        self._text = TEXT[: PAGE - HEADER.size - self._random_bytes]
        for page in range(count):
            self.write(page)

    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def write(self, page: int) -> None:
        version = self.versions[page] + 1
        self.versions[page] = version
        rest = random.randbytes(self._random_bytes) + self._text
        self.map[page * PAGE : (page + 1) * PAGE] = HEADER.pack(page, version, crc32(rest)) + rest

    def check(self, page: int) -> None:
        content = self.map[page * PAGE : (page + 1) * PAGE]
        number, version, checksum = HEADER.unpack_from(content)
        assert number == page, f"page {page} has the content of page {number}"
        known = self.versions[page]
        assert version == known, f"page {page} is of version {version}, not {known}"
        assert checksum == crc32(content[HEADER.size :]), f"page {page} is damaged"


def work(judge: Judge, mib: int, fraction: float, random_part: float) -> None:
    count = mib * 1024 * 1024 // PAGE
    pages = Pages(count, random_part)
    judge.ready(f"holds {mib} MiB", address=hex(pages.address()), pages=count)
    due = 0.0
    looked_at = 0
    while judge.going():
        began = time.monotonic()
        for _ in range(CHECKED):
            pages.check(looked_at)
            looked_at = (looked_at + 1) % count
        judge.progress()
        time.sleep(ROUND_S)
        due += count * fraction * min(time.monotonic() - began, 1.0)
        while due >= 1:
            pages.write(random.randrange(count))
            due -= 1
    for page in range(count):
        pages.check(page)


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        given = [float(word) for word in sys.argv[2:]]
        mib, fraction, random_part = given + [16, 0.05, 0.5][len(given) :]
        work(judge, int(mib), fraction, random_part)
