"""Frames come out as they went in, however the stream cuts them."""

import socket
import struct

import pytest
import trio
import trio.testing

from krgfs import wire
from krgfs.errors import Unreachable

SIZES = (0, 1, 70_000, wire.MAX_DATA, 5, wire.RECEIVE_BYTES, 3 * wire.MAX_DATA, 2, 2)


def frames() -> list[wire.Data]:
    return [wire.Data(id=n, data=bytes([n]) * size) for n, size in enumerate(SIZES)]


async def exchanged(one: trio.abc.Stream, other: trio.abc.Stream) -> list[wire.Data]:
    sender, receiver = wire.Channel(one, wire.ToAgent), wire.Channel(other, wire.ToMount)

    async def send() -> None:
        for frame in frames():
            await sender.send(frame)

    async with one, other, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        return [await receiver.receive() for _ in SIZES]


def test_frames_of_all_sizes_over_a_socket() -> None:
    async def main() -> list[wire.Data]:
        one, other = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return await exchanged(trio.SocketStream(one), trio.SocketStream(other))

    assert trio.run(main) == frames()


def test_frames_of_all_sizes_over_another_stream() -> None:
    async def main() -> list[wire.Data]:
        one, other = trio.testing.memory_stream_pair()
        return await exchanged(one, other)

    assert trio.run(main) == frames()


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", struct.pack(">I", 9) + b"12345", struct.pack(">I", wire.MAX_FRAME + 1)]
)
def test_what_is_no_frame_is_unreachable(sent: bytes) -> None:
    async def main() -> None:
        one, other = trio.testing.memory_stream_pair()
        await one.send_all(sent)
        await one.aclose()
        with pytest.raises(Unreachable):
            await wire.Channel(other, wire.ToMount).receive()

    trio.run(main)
