"""A TCP socket that only listens: nobody is connected when an image is made, visitors come later.

Whoever connects to the port is told how many came before, and let go.
"""

import socket
import sys

from judge import Judge, judged


def work(judge: Judge) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=7)
    address = listener.getsockname()
    served = 0
    judge.ready("listens on TCP", port=address[1])
    while judge.going():
        served += serve(listener, served)
        judge.progress()
    judge.expect(listener.getsockname() == address, f"it listens on {listener.getsockname()}")
    reuse = listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    judge.expect(reuse == 1, "SO_REUSEADDR is lost")
    served += serve(listener, served)  # nobody else is waiting now
    with socket.create_connection(address) as visitor:
        judge.expect(serve(listener, served, 2.0) == 1, "nobody came in")
        told = visitor.makefile().read()
    judge.expect(told == f"{served}\n", f"a visitor was told {told!r}, not {served}")


def serve(listener: socket.socket, served: int, patience_s: float = 0.02) -> int:
    """Serve one visitor and return 1, or 0 when none comes in time."""
    listener.settimeout(patience_s)
    try:
        visitor, _ = listener.accept()
    except TimeoutError:
        return 0
    with visitor:
        visitor.sendall(b"%d\n" % served)
    return 1


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
