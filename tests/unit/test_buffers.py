"""Buffers: each is one caller's at a time, and who waits for one gets it or is told to stop."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.buffers import BUFFER_BYTES, Buffers, Piece, Reserve


def test_every_buffer_is_lent_once_and_comes_back() -> None:
    buffers = Buffers(3, 4096)
    lent = [buffers.lend() for _ in range(3)]
    assert sorted(each for each in lent if each is not None) == [0, 1, 2]
    assert buffers.free == 0 and buffers.lend() is None
    for each in lent:
        assert each is not None
        buffers.give_back(each)
    assert buffers.free == buffers.count == 3


def test_buffers_do_not_overlap() -> None:
    buffers = Buffers(3, 4096)
    for index in range(3):
        buffers[index][:] = bytes([index + 1]) * 4096
    assert [bytes(buffers[index]) for index in range(3)] == [bytes([n]) * 4096 for n in (1, 2, 3)]


def test_what_is_given_back_twice_was_not_lent() -> None:
    buffers = Buffers(1, 4096)
    index = buffers.lend()
    assert index is not None
    buffers.give_back(index)
    with pytest.raises(ValueError, match="buffer 0 was given back already"):
        buffers.give_back(index)
    assert buffers.free == 1


def test_touching_spares_what_is_lent() -> None:
    buffers = Buffers(2, 4096)
    index = buffers.lend()
    assert index is not None
    buffers[index][:5] = b"taken"
    buffers.touch()
    assert bytes(buffers[index][:5]) == b"taken"


def test_who_waits_gets_the_next_one() -> None:
    buffers, asked = Buffers(1, 4096), threading.Event()
    index = buffers.lend()
    assert index is not None

    def is_over() -> bool:
        asked.set()  # nothing is free: from here it waits
        return False

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(buffers.lend, is_over)
        assert asked.wait(60)
        buffers.give_back(index)
        assert waiting.result(60) == index


def test_who_waits_can_be_told_to_stop() -> None:
    buffers, asked, over = Buffers(1, 4096), threading.Event(), threading.Event()
    buffers.lend()

    def is_over() -> bool:
        asked.set()
        return over.is_set()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(buffers.lend, is_over)
        assert asked.wait(60)
        over.set()
        buffers.look_again()
        assert waiting.result(60) is None


def test_threads_never_share_one() -> None:
    buffers, owners = Buffers(3, 4096), [threading.Lock() for _ in range(3)]

    def use(_: int) -> None:
        index = buffers.lend(unless=lambda: False)
        assert index is not None
        assert owners[index].acquire(blocking=False)
        owners[index].release()
        buffers.give_back(index)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(500)))
    assert buffers.free == 3


def test_a_piece_is_given_back_where_it_came_from() -> None:
    buffers = Buffers(1, 4096)
    index = buffers.lend()
    assert index is not None
    Piece("x", 0, buffers[index], buffers, index).give_back()
    assert buffers.free == 1
    Piece("x", 0, b"a copy").give_back()


# -- the reserve of all dumps


def test_the_buffers_of_one_dump_are_the_next_ones() -> None:
    reserve = Reserve()
    with reserve.lent(BUFFER_BYTES) as first:
        pass
    with reserve.lent(BUFFER_BYTES) as second:
        assert second is first


def test_buffers_that_did_not_all_come_back_are_not_kept() -> None:
    reserve = Reserve()
    with reserve.lent(BUFFER_BYTES) as first:
        assert first.lend() is not None
    with reserve.lent(BUFFER_BYTES) as second:
        assert second is not first and second.free == second.count


def test_where_there_is_no_memory_it_says_so_and_later_goes_on() -> None:
    reserve = Reserve(1 << 62)
    with pytest.raises(OSError) as caught, reserve.lent(1 << 50):
        pass
    assert caught.value.errno == errno.ENOMEM
    with reserve.lent(BUFFER_BYTES) as buffers:
        assert buffers.free == buffers.count
