"""An image is of one instant, however late we read what CRIU has in its pipes."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import trio

from agent import criu, procs
from agent.buffers import Buffers, Piece
from krgfs.verbs import Checkpoint
from tests.criu.rig import LONG_S, Files, Rig, until
from tests.criu.stage import stat

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")

FILLED_BYTES = 768 << 10
FILLS = f"""
import ctypes
size, fixed = {FILLED_BYTES}, 0x100000 | 0x20 | 0x02  # MAP_FIXED_NOREPLACE, anonymous, private
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
top = 0x7ffffffff000 - size  # dumped last
assert libc.mmap(top, size, 3, fixed, -1, 0) == top
n = 0
while True:
    n = n % 255 + 1
    ctypes.memset(top, n, size)
    if n == 255 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
"""


class Late(Files):
    """Keeps every buffer that it gets until the dump is over, so that the rest stays in pipes."""

    def __init__(self, directory: Path, buffers: Buffers) -> None:
        super().__init__(directory, buffers)
        self._held: list[Piece] = []
        self._is_late = True
        self._lock = threading.Lock()

    def take(self, piece: Piece) -> None:
        with self._lock:
            if piece.file.startswith("pages-") and self._is_late:
                self._held.append(piece)
            else:
                super().take(piece)

    def let_go(self) -> None:
        with self._lock:
            self._is_late = False
            while self._held:
                super().take(self._held.pop(0))

    def unload(self, directory: Path, sizes: Mapping[str, int]) -> None:
        self.let_go()
        super().unload(directory, sizes)


def fills(pages: bytes) -> list[int]:
    """Return with which numbers the pages at the end were filled, one page that is between left
    out."""
    ends = range(len(pages) - FILLED_BYTES, len(pages), 4096)
    whole = (pages[at : at + 4096] for at in ends)
    return [page[0] for page in whole if page == page[:1] * 4096]


def user_ticks(pid: int) -> int:
    return int(stat(pid)[11])


async def test_memory_that_is_read_late_is_of_the_instant_of_the_dump(
    rig: Rig, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    child = process(FILLS)
    _, images, _ = await rig.dump(child.pid)
    size = (images / "pages-1.img").stat().st_size
    for share in (0.99, 0.9, 0.5):
        images = rig.spool()
        tree = procs.look(child.pid)
        options = criu.dump_options(rig.engine, tree, images, Checkpoint(), [], None)
        in_buffers = size - int(share * FILLED_BYTES)
        late = Late(images, Buffers(in_buffers // 65536, 65536))

        log = criu.work_dir(images) / "dump.log"

        async def let_go(late: Late = late, log: Path = log) -> None:
            await until(lambda: not late.buffers.free)
            await until(lambda: "Writing image inventory" in log.read_text())
            ran = user_ticks(child.pid)
            with trio.move_on_after(0.3):  # where nothing holds it, it fills its memory meanwhile
                await until(lambda: user_ticks(child.pid) > ran + 5)
            late.let_go()

        with trio.fail_after(LONG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                await criu.dump(
                    rig.engine, tree, images, late, options, rig.started, rig.done.append
                )
        found = fills((images / "pages-1.img").read_bytes())
        assert len(found) >= FILLED_BYTES // 4096 - 1
        turns = [at for at in range(1, len(found)) if found[at] != found[at - 1]]
        assert len(turns) <= 1, f"filled with {sorted(set(found))}"
