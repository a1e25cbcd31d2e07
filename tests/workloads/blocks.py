"""Numbered blocks over a stream, both ways at once, with some in flight all the time.

Each side checks of every block the number, the length and the content: nothing is missing, nothing
comes twice, nothing is torn.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from collections.abc import Callable
from hashlib import blake2b

HEADER = struct.Struct("<QI8s")  # number, length, digest
AHEAD = 16  # blocks that a side may send before it has received one
BIGGEST = 6000
PACE_S = 0.001
QUIET_S = 2.0  # of our own running without a byte: then nothing comes any more


class Peer:
    """One side of the stream. `sent` and `received` count whole blocks."""

    def __init__(self, stream: socket.socket) -> None:
        self.sent = self.received = 0
        self._stream = stream
        self._stream.setblocking(False)
        self._out = b""
        self._in = b""
        self._other_has = -1  # blocks that the other side sent, once it has said that it ends

    def work(self, going: Callable[[], bool], step: Callable[[], None] = lambda: None) -> None:
        """Exchange blocks until `going` says no or the other side ends, then take what is left.

        The last block of each side is empty and says how many there were. Raises AssertionError
        when a block is wrong or does not come, and OSError when the stream breaks.
        """
        while self._other_has < 0 and going():
            while self.sent < self.received + AHEAD:
                self._send(block(self.sent))
            self._turn()
            step()
        self._send(b"")
        quiet_s = 0.0
        while self._other_has < 0 or self._out:
            began = self.received, len(self._out)
            self._turn()
            quiet_s = quiet_s + 0.02 if began == (self.received, len(self._out)) else 0.0
            assert quiet_s < QUIET_S, f"block {self.received} does not come"
        assert self.received == self._other_has, (
            f"{self.received} blocks came of the {self._other_has} that were sent"
        )

    def _send(self, content: bytes) -> None:
        self._out += HEADER.pack(self.sent, len(content), digest(self.sent, content)) + content
        if content:
            self.sent += 1

    def _turn(self) -> None:
        """Move what can be moved within 20 ms; read little, so that some of it stays in flight."""
        time.sleep(PACE_S)
        wanted = [self._stream] if self._out else []
        readable, writable, _ = select.select([self._stream], wanted, [], 0.02)
        if writable:
            self._out = self._out[self._stream.send(self._out) :]
        if readable and self._other_has < 0:
            data = self._stream.recv(2000)
            assert data, f"the stream ended after block {self.received}"
            self._in += data
            while self._take():
                pass

    def _take(self) -> bool:
        """Take the next whole block out of what came; returns False when there is none."""
        if len(self._in) < HEADER.size:
            return False
        number, length, seal = HEADER.unpack_from(self._in)
        assert number == self.received, f"block {number} came where {self.received} was next"
        assert length <= BIGGEST, f"block {number} says that it has {length} bytes"
        if len(self._in) < HEADER.size + length:
            return False
        content = self._in[HEADER.size : HEADER.size + length]
        assert seal == digest(number, content), f"block {number} is torn"
        self._in = self._in[HEADER.size + length :]
        if length:
            self.received += 1
        else:
            self._other_has = number
        return True


def block(number: int) -> bytes:
    """Return the content of a block: every one is different, in length too."""
    return random.Random(number).randbytes(1 + number * 997 % BIGGEST)


def digest(number: int, content: bytes) -> bytes:
    return blake2b(content, digest_size=8, salt=number.to_bytes(8, "little")).digest()
