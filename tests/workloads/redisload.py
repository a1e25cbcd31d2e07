"""redis-server under load: a child serves on a Unix and a TCP port, another one never stops asking.

The client has one connection to each for the whole time. It counts keys up and holds every answer
against what it knows, so a lost write, a lost answer or a new connection would show.
"""

import os
import signal
import socket
import sys
import time

from judge import Judge, judged, wait_until

KEYS = 500
SERVER = "redis-server"


class Client:
    """One connection, and what the server must know by it: its keys are its own."""

    def __init__(self, name: str, stream: socket.socket) -> None:
        self._name = name
        self._stream = stream
        self._answers = stream.makefile("rb")
        self._counts = [0] * KEYS
        self._next = 0

    def work(self, requests: int = 20) -> None:
        """Have keys counted up, with all requests in flight at once."""
        asked = [(self._next + step) % KEYS for step in range(requests)]
        self._next = (self._next + requests) % KEYS
        self._stream.sendall(b"".join(_request("INCR", self._key(key)) for key in asked))
        for key in asked:
            self._counts[key] += 1
            self._expect(f":{self._counts[key]}", f"INCR {self._key(key)}")

    def check(self) -> None:
        for key, count in enumerate(self._counts):
            if count:
                self._stream.sendall(_request("GET", self._key(key)))
                self._expect(f"${len(str(count))}", f"GET {self._key(key)}")
                self._expect(str(count), f"GET {self._key(key)}")

    def _key(self, number: int) -> str:
        return f"{self._name}:{number}"

    def _expect(self, answer: str, what: str) -> None:
        found = self._answers.readline().decode(errors="replace").rstrip("\r\n")
        assert found == answer, f"the server's answer to {what} is {found!r}, not {answer!r}"


def _request(*words: str) -> bytes:
    parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    return f"*{len(words)}\r\n{parts}".encode()


def work(judge: Judge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = judge.path("redis.sock")
    options = ("--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path, "--save", "")
    server = os.fork()
    if server == 0:
        os.chdir(judge.directory)
        os.execvp(SERVER, [SERVER, *options])
    assert wait_until(lambda: os.path.exists(path), 10), "the server does not come up"
    unix = socket.socket(socket.AF_UNIX)
    unix.connect(path)
    clients = [Client("tcp", socket.create_connection(("127.0.0.1", port))), Client("unix", unix)]
    judge.ready("loads a redis-server", port=port)
    while judge.going():
        for client in clients:
            client.work()
        judge.progress()
        time.sleep(0.002)
    for client in clients:
        client.check()
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
