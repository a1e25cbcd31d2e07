"""A server on a Unix socket: one client in the tree exchanges blocks, others may come from outside.

Whoever connects to DIR/socket is told how many came before, and let go.
"""

import os
import socket
import sys

from blocks import Peer
from judge import Judge, judged


class Door:
    """The listening socket. What comes in gets a number and a farewell."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.served = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(16)

    def accept(self) -> socket.socket:
        return self._listener.accept()[0]

    def serve_all(self) -> None:
        """Serve those who wait at the door."""
        self._listener.setblocking(False)
        while True:
            try:
                visitor = self.accept()
            except BlockingIOError:
                return
            with visitor:
                visitor.sendall(b"%d\n" % self.served)
            self.served += 1


def work(judge: Judge) -> None:
    door = Door(judge.path("socket"))
    judge.fork("the client", lambda: client(door.path))
    peer = Peer(door.accept())
    judge.ready("serves on a Unix socket", path=door.path)

    def step() -> None:
        door.serve_all()
        judge.progress()

    peer.work(judge.going, step)
    judge.join()
    check_door(judge, door)
    os.unlink(door.path)


def client(path: str) -> None:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.connect(path)
    Peer(stream).work(lambda: True)


def check_door(judge: Judge, door: Door) -> None:
    """Come in by the path as somebody from outside would."""
    door.serve_all()
    visitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    visitor.connect(door.path)
    before = door.served
    door.serve_all()
    told = visitor.makefile().read()
    judge.expect(told == f"{before}\n", f"a visitor was told {told!r}, not {before}")


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
