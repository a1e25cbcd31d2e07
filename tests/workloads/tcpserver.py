"""A TCP server on 127.0.0.1 and its client in the tree: a connection that is always in use."""

import socket
import sys

from blocks import Peer
from judge import Judge, judged


def work(judge: Judge) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    judge.fork("the client", lambda: client(address))
    stream = listener.accept()[0]
    ends = stream.getsockname(), stream.getpeername()
    peer = Peer(stream)
    judge.ready("exchanges blocks over TCP", port=address[1])
    peer.work(judge.going, judge.progress)
    judge.expect(ends == (stream.getsockname(), stream.getpeername()), "the addresses have changed")
    judge.expect(listener.getsockname() == address, "the server listens elsewhere")


def client(address: tuple[str, int]) -> None:
    stream = socket.create_connection(address)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Peer(stream).work(lambda: True)
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "TCP_NODELAY is lost"


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
