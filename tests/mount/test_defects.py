"""A defect in a handler is an EIO to who asked and a line in the log, and never ends the mount."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from tests.mount.conftest import Start
from tests.sites import Site, until

DEFECTIVE = """
import sys
from krgfs import attributes, fuse, handles, mount

def wrong(*args, **kwargs):
    raise RuntimeError("a defect")

whole = {"read": handles.Handles.read, "write": handles.Handles.write}

async def read(self, number, offset, size):
    if self.get(number).place.row.name in ("version", "tree"):
        wrong()
    return await whole["read"](self, number, offset, size)

async def write(self, number, offset, data):
    if self.get(number).place.row.name == "signal":
        wrong()
    return await whole["write"](self, number, offset, data)

handles.Handles.read, handles.Handles.write = read, write
handles.Handles.close = wrong
fuse.xattrs = wrong
attributes.Attributes.forget = wrong
sys.exit(mount.main())
"""


def test_a_defect_in_a_handler_is_an_error_of_its_caller_alone(start: Start) -> None:
    tree = start()
    with Site() as site:
        site.stop_mount()
        site.mount_program = [sys.executable, "-c", DEFECTIVE]
        site.start_mount()
        place = site.proc(tree.pid)
        for _ in range(3):
            for path in (site.mnt / "version", place / "tree"):
                with pytest.raises(OSError) as told:
                    path.read_text()
                assert told.value.errno == errno.EIO
            with pytest.raises(OSError) as told:
                site.write(f"procs/{tree.pid}/signal", "TERM")
            assert told.value.errno == errno.EIO
            with pytest.raises(OSError) as told:
                os.listxattr(place)
            assert told.value.errno == errno.EIO
            assert "state running" in (place / "status").read_text()
        site.write(f"procs/{tree.pid}/checkpoint", "1")
        assert (place / "checkpoint").read_text().endswith("/v1\n")
        log = site.base / "mount.log"
        assert log.read_text().count("handler.failed handler=read") == 6
        for handler in ("write", "release", "listxattr"):
            assert f"handler.failed handler={handler}" in log.read_text()
        until(lambda: "handler=forget" in log.read_text(), "a number that the kernel forgets")
        assert "state running" in (place / "status").read_text()
    assert tree.finish() == "PASS"
