"""A tree of processes in a ring of pipes and socket pairs, with messages always in flight.

Every member checks number and seal of each message and passes it on; the root puts new ones in
as old ones come back. Two children that ended at the start stay zombies to the end.
"""

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from judge import FIRST_LINK, Judge, judged, link, wait_until

MEMBERS = 8  # the root is member 1; member n is the child of member n // 2
IN_FLIGHT = 32
PACE_S = 0.002
LAST = 0  # the number of the message that ends the ring
MESSAGE = struct.Struct("<QQ8s40x")


@dataclass
class Ends:
    """One edge of the ring: where messages come out, and where they go in."""

    read: int
    write: int


def work(judge: Judge) -> None:
    edges = {member: edge(member) for member in range(1, MEMBERS + 1)}  # into each member
    zombies = [zombie(lambda: os._exit(42)), zombie(lambda: os.kill(os.getpid(), signal.SIGKILL))]
    ends = take_place(judge, 1, edges)
    judge.ready("passes messages around a ring of processes", into=edges[1].read)
    try:
        circulate(judge, ends)
    finally:
        os.close(ends.write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in zombies]
    judge.expect(codes == [42, -signal.SIGKILL], f"the zombies ended with {codes}")


def edge(member: int) -> Ends:
    if member % 3 == 0:
        return Ends(*os.pipe())
    kind = socket.SOCK_STREAM if member % 3 == 1 else socket.SOCK_SEQPACKET
    ends = socket.socketpair(socket.AF_UNIX, kind)
    return Ends(*(end.detach() for end in ends))


def zombie(end: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        end()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def take_place(judge: Judge, member: int, edges: dict[int, Ends]) -> Ends:
    """Fork the members below this one, then keep no end of the ring but its own two."""
    for below in (2 * member, 2 * member + 1):
        if below <= MEMBERS:
            judge.fork(f"member {below}", partial(serve, judge, below, edges))
    mine = Ends(edges[member].read, edges[member % MEMBERS + 1].write)
    for other in edges.values():
        for fd in {other.read, other.write} - {mine.read, mine.write}:
            os.close(fd)
    return mine


def serve(judge: Judge, member: int, edges: dict[int, Ends]) -> None:
    """Be a member; when the ring breaks elsewhere, whoever broke it says why."""
    try:
        pass_on(judge, member, take_place(judge, member, edges))
    except (EOFError, BrokenPipeError):
        os._exit(3)


def pass_on(judge: Judge, member: int, ends: Ends) -> None:
    expected, chain = 1, FIRST_LINK
    number = None
    while number != LAST:
        number, hops, seal = receive(ends.read)
        if number != LAST:
            assert number == expected, f"message {number} came where {expected} was next"
            assert hops == member - 2, f"message {number} comes after {hops} hops"
            chain = link(chain, number)
            assert seal == chain, f"message {number} has a broken seal"
            expected += 1
        time.sleep(PACE_S)
        os.write(ends.write, MESSAGE.pack(number, hops + 1, seal))
    os.close(ends.write)
    judge.join()


def circulate(judge: Judge, ends: Ends) -> None:
    """Keep messages going round until the end is asked for, then take every one back."""
    readable = select.poll()
    readable.register(ends.read, select.POLLIN)
    sent = came = 0
    sent_chain = came_chain = FIRST_LINK

    def take_back() -> bool:
        nonlocal came, came_chain
        number, hops, seal = receive(ends.read)
        came += 1
        came_chain = link(came_chain, came)
        assert number == came, f"message {number} came back where {came} was next"
        assert hops == MEMBERS - 1, f"message {number} came back after {hops} hops"
        assert seal == came_chain, f"message {number} came back with a broken seal"
        return came == sent

    while judge.going():
        while sent - came < IN_FLIGHT:
            sent += 1
            sent_chain = link(sent_chain, sent)
            os.write(ends.write, MESSAGE.pack(sent, 0, sent_chain))
        if readable.poll(50):
            take_back()
            judge.progress()
    if wait_until(lambda: came == sent or (bool(readable.poll(10)) and take_back())):
        os.write(ends.write, MESSAGE.pack(LAST, 0, FIRST_LINK))
        number, _, _ = receive(ends.read)
        judge.expect(number == LAST, f"message {number} came behind the last")
    judge.expect(came == sent, f"{sent - came} of {sent} messages did not come back")


def receive(fd: int) -> tuple[int, int, bytes]:
    """Return the next message, always a whole one. Raises EOFError when none can come."""
    data = os.read(fd, MESSAGE.size)
    if not data:
        raise EOFError("the ring is broken")
    assert len(data) == MESSAGE.size, f"a message of {len(data)} bytes"
    number, hops, seal = MESSAGE.unpack(data)
    return number, hops, seal


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
