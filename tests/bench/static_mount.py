"""The peer: the smallest pyfuse3 mount that serves the same listing from memory.

`python -m tests.bench.static_mount MOUNTPOINT ENTRIES`: a directory `procs` with ENTRIES ones,
and a file `status`. Attributes and entries stay valid for 1 s, xattrs are answered with EOPNOTSUPP,
as krgfs does.
"""

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio

CONTENT = b"key value\n" * 14
FILE = 2
PROCS = 3
FIRST = 10


class Static(pyfuse3.Operations):
    def __init__(self, entries: int) -> None:
        super().__init__()
        self.names = [str(1000 + n).encode() for n in range(entries)]
        self.numbers = {name: FIRST + n for n, name in enumerate(self.names)}

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444 if inode == FILE else stat.S_IFDIR | 0o555
        entry.entry_timeout = entry.attr_timeout = 1.0
        return entry

    async def lookup(self, parent, name, ctx):
        number = {b"status": FILE, b"procs": PROCS}.get(name) or self.numbers.get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(number)

    async def getattr(self, inode, ctx):
        return self.attributes(inode)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        if fh != PROCS:
            return
        for position in range(start_id, len(self.names)):
            name = self.names[position]
            entry = self.attributes(self.numbers[name])
            if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                return

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=True, keep_cache=False)

    async def read(self, fh, off, size):
        return CONTENT[off : off + size]

    async def release(self, fh):
        pass

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def listxattr(self, inode, ctx):
        return []


def main() -> None:
    options = {"fsname=static", "allow_other", "default_permissions"}
    pyfuse3.init(Static(int(sys.argv[2])), sys.argv[1], options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
