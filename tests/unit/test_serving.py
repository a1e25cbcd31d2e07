"""Images read back: every byte as it was, in memory that stays and is bounded, and damage told."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import recipe
from agent.buffers import Piece
from agent.recipe import ZERO, Extents, Recipe, Source
from agent.serving import AHEAD_WINDOWS, CHUNK_BYTES, SCATTERED, WINDOW_BYTES, ImageSource, Reader
from krgfs.errors import Damaged
from tests.unit.dumps import Kept, whole

MIB = 1 << 20


class Watched:
    """Chunks of which is known how often they were read, and into how much memory. Those that are
    `damaged` cannot be read; while `gate` is closed, none is."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.reads: list[bytes] = []
        self.memory: dict[int, object] = {}
        self.damaged: set[bytes] = set()
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def read_into(self, id: bytes, buffer: memoryview) -> int:
        self.reads.append(id)
        self.memory[id_of(buffer)] = buffer.obj  # kept, so that no other gets its address
        self.reached.set()
        self.gate.wait(60)
        if id in self.damaged:
            buffer[:] = b"\xee" * len(buffer)
            raise Damaged(f"chunk {id[:8].hex()} is damaged")
        return self.kept.read_into(id, buffer)


def id_of(buffer: memoryview) -> int:
    return id(buffer.obj)


@pytest.fixture
def chunks() -> Watched:
    return Watched()


@pytest.fixture
def reader(chunks: Watched) -> Iterator[Reader]:
    before = set(threading.enumerate())
    made = Reader(chunks, 4 * CHUNK_BYTES)
    yield made
    chunks.gate.set()
    made.close()
    assert set(threading.enumerate()) <= before


def many(chunks: Watched, count: int, size: int = MIB) -> tuple[list[bytes], Extents]:
    """Return ids of so many chunks, and a file of all of them."""
    ids = [chunks.kept.add(os.urandom(32) * (size // 32)) for _ in range(count)]
    return ids, recipe.of_sources([Source(n, 0, size) for n in range(count)])


def content(chunks: Watched, made: Recipe, name: str) -> bytes:
    return b"".join(
        bytes(length)
        if chunk == ZERO
        else chunks.kept.raw[made.chunks[chunk]][offset : offset + length]
        for chunk, offset, length in made.files[name].tolist()
    )


# -- bytes

SIZES = (5, 4096, 300_000, MIB)
parts = st.lists(
    st.one_of(
        st.integers(0, 3).flatmap(
            lambda n: st.integers(0, SIZES[n] - 1).flatmap(
                lambda at: st.builds(Source, st.just(n), st.just(at), st.integers(1, SIZES[n] - at))
            )
        ),
        st.builds(Source, st.just(ZERO), st.just(0), st.sampled_from([1, 4096, MIB, 3 * MIB + 1])),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(parts, st.data())
def test_files_come_back_in_pieces_and_from_any_offset(
    found: list[Source], data: st.DataObject
) -> None:
    chunks = Watched()
    ids = [chunks.kept.add(os.urandom(size)) for size in SIZES]
    made = Recipe(ids, {"x": recipe.of_sources(found)})
    expected = content(chunks, made, "x")
    reader = Reader(chunks, 4 * CHUNK_BYTES)
    try:
        source = ImageSource(reader, made)
        assert whole(source, "x") == expected
        for _ in range(3):
            at = data.draw(st.integers(0, len(expected) + 10))
            size = data.draw(st.integers(0, 2 * MIB))
            buffer = bytearray(size)
            count = source.read_into("x", at, memoryview(buffer))
            assert buffer[:count] == expected[at : at + size]
            assert buffer[count:] == bytes(size - count)
    finally:
        reader.close()


def test_what_is_not_in_the_image_is_told_apart_from_what_is_empty(reader: Reader) -> None:
    source = ImageSource(reader, Recipe([], {"empty": recipe.of_sources([])}))
    assert source.pieces("nothing") is None
    assert list(source.pieces("empty") or "x") == []
    assert source.read_into("empty", 0, memoryview(bytearray(5))) == 0


@pytest.mark.parametrize("count", [1, SCATTERED, SCATTERED + 1, 200])
def test_a_window_of_many_runs_comes_in_few_pieces(
    chunks: Watched, reader: Reader, count: int
) -> None:
    ids, _ = many(chunks, 2)
    runs = [Source(n % 2, 4096 * n, 4096) for n in range(count)]
    made = Recipe(ids, {"x": recipe.of_sources(runs)})
    pieces = list(ImageSource(reader, made).pieces("x") or ())
    assert len(pieces) == (count if count <= SCATTERED else 1)
    assert b"".join(piece.data for piece in pieces) == content(chunks, made, "x")
    for piece in pieces:
        piece.give_back()


# -- memory


def test_lent_memory_is_never_used_again_before_it_is_given_back(
    chunks: Watched, reader: Reader
) -> None:
    """Pieces of all kinds are held, late and in no order, while many other chunks are read."""
    ids, extents = many(chunks, 30)
    scattered = [Source(n % 30, 4096 * (n % 256), 4096) for n in range(2000)]
    made = Recipe(ids, {"x": extents, "y": recipe.of_sources(scattered)})
    source = ImageSource(reader, made)
    expected = {name: content(chunks, made, name) for name in made.files}
    held: deque[Piece] = deque()
    for turn in range(3):
        for name in made.files:
            for piece in source.pieces(name) or ():
                held.append(piece)
                if len(held) > 20:
                    held.rotate(turn + 7)
                    old = held.popleft()
                    assert old.data == expected[old.file][old.offset :][: len(old.data)]
                    old.give_back()
    for old in held:
        assert old.data == expected[old.file][old.offset :][: len(old.data)]
        old.give_back()


def test_these_tests_see_memory_that_is_used_again(chunks: Watched, reader: Reader) -> None:
    ids, _ = many(chunks, 30)
    lent = reader.lend(ids[0])
    before = bytes(lent.data)
    lent.give_back()
    for id in ids[1:]:
        reader.lend(id).give_back()
    assert lent.data != before


@pytest.mark.parametrize("warm", [1, 4, 16])
def test_memory_is_bounded(chunks: Watched, warm: int) -> None:
    ids, extents = many(chunks, 100)
    source = ImageSource(reader := Reader(chunks, warm * CHUNK_BYTES), Recipe(ids, {"x": extents}))
    try:
        assert len(whole(source, "x")) == 100 * MIB
    finally:
        reader.close()
    assert len(chunks.memory) <= warm + AHEAD_WINDOWS + 2


def test_what_is_warm_is_not_read_again(chunks: Watched, reader: Reader) -> None:
    ids, _ = many(chunks, 6)
    for id in [*ids[:4], *ids[:4]]:
        reader.lend(id).give_back()
    assert chunks.reads == ids[:4]
    for id in [ids[4], ids[3], ids[2], ids[0]]:
        reader.lend(id).give_back()
    assert chunks.reads == [*ids[:5], ids[0]], "the one that was used longest ago had gone"


def test_a_chunk_is_read_before_anybody_waits_for_it(chunks: Watched, reader: Reader) -> None:
    ids, extents = many(chunks, 3)
    ImageSource(reader, Recipe(ids, {"x": extents})).ahead("x", MIB + 5, 10)
    assert chunks.reached.wait(60)
    assert bytes(reader.lend(ids[1]).data) == chunks.kept.raw[ids[1]]
    assert chunks.reads == [ids[1]]


@pytest.mark.parametrize("each", [4096, 65_536, MIB])
@pytest.mark.parametrize("is_asked_for", [False, True])
def test_who_reads_on_reads_nothing_twice_and_not_far_ahead(
    chunks: Watched, reader: Reader, each: int, is_asked_for: bool
) -> None:
    """Of few bytes of each of many chunks too: as many as come are not all in memory."""
    ids = [chunks.kept.add(os.urandom(each)) for _ in range(300)]
    made = Recipe(ids, {"x": recipe.of_sources([Source(n, 0, each) for n in range(300)])})
    source, at = ImageSource(reader, made), 0
    if is_asked_for:
        while at < made.size("x"):
            source.ahead("x", at, 16 * MIB)
            at += len(source.read("x", at, each))
    else:
        assert whole(source, "x") == content(chunks, made, "x")
    assert sorted(chunks.reads) == sorted(ids)
    assert len(chunks.memory) <= 4 + AHEAD_WINDOWS + 2


def test_no_more_than_half_is_read_ahead_and_what_was_lent_goes_first(
    chunks: Watched, reader: Reader
) -> None:
    ids, _ = many(chunks, 8)
    assert reader.ahead(ids[:4]) == 2
    for id in ids[4:]:
        reader.lend(id).give_back()
    for id in ids[:2]:
        reader.lend(id).give_back()
    assert sorted(chunks.reads) == sorted(ids[:2] + ids[4:])
    assert reader.ahead(ids[1:4]) == 3


def test_what_was_read_ahead_for_somebody_who_left_does_not_stay(
    chunks: Watched, reader: Reader
) -> None:
    ids, _ = many(chunks, 40)
    assert reader.ahead(ids[:2]) == 2
    for id in ids[4:]:
        reader.lend(id).give_back()
    assert reader.ahead(ids[2:4]) == 2
    reader.lend(ids[0]).give_back()
    assert chunks.reads.count(ids[0]) == 2


def test_what_nobody_reads_is_let_go_of_and_what_is_lent_is_not(
    chunks: Watched, reader: Reader
) -> None:
    ids, _ = many(chunks, 2)
    held = reader.lend(ids[0])
    reader.lend(ids[1]).give_back()
    reader.trim(3600)
    reader.lend(ids[1]).give_back()
    assert chunks.reads == ids
    reader.trim(0)
    reader.lend(ids[0]).give_back()
    reader.lend(ids[1]).give_back()
    assert chunks.reads == [*ids, ids[1]]
    assert bytes(held.data) == chunks.kept.raw[ids[0]]
    held.give_back()


def test_many_who_ask_at_once_get_what_they_asked_for(chunks: Watched, reader: Reader) -> None:
    ids, _ = many(chunks, 12, 65_536)

    def ask(turn: int) -> None:
        id = ids[turn * 7 % 12]
        lent = reader.lend(id)
        assert lent.data == chunks.kept.raw[id]
        lent.give_back()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(600)))


# -- damage


def test_everybody_who_waits_is_told_of_damage_and_later_it_is_read_anew(
    chunks: Watched, reader: Reader
) -> None:
    ids, _ = many(chunks, 1)
    chunks.damaged.add(ids[0])
    chunks.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(reader.lend, ids[0]) for _ in range(3)]
        assert chunks.reached.wait(60)
        chunks.gate.set()
        for each in waiting:
            with pytest.raises(Damaged, match=ids[0][:8].hex()):
                each.result(60)
    with pytest.raises(Damaged):
        reader.lend(ids[0])
    chunks.damaged.clear()
    lent = reader.lend(ids[0])
    assert lent.data == chunks.kept.raw[ids[0]]
    lent.give_back()


def test_what_failed_ahead_is_told_to_who_asks_and_read_anew_then(
    chunks: Watched, reader: Reader
) -> None:
    ids, _ = many(chunks, 1)
    chunks.damaged.add(ids[0])
    reader.ahead(ids)
    with pytest.raises(Damaged):
        reader.lend(ids[0])
    chunks.damaged.clear()
    reader.lend(ids[0]).give_back()


def test_what_had_failed_before_anybody_asked_is_read_anew(chunks: Watched, reader: Reader) -> None:
    ids, _ = many(chunks, 1)
    chunks.damaged.add(ids[0])
    reader.ahead(ids)
    assert isinstance(reader._ahead[ids[0]].size.exception(60), Damaged)
    chunks.damaged.clear()
    lent = reader.lend(ids[0])
    assert lent.data == chunks.kept.raw[ids[0]]
    lent.give_back()


@pytest.mark.parametrize("is_scattered", [False, True])
def test_a_file_ends_where_it_is_damaged_and_nothing_stays_lent(
    chunks: Watched, reader: Reader, is_scattered: bool
) -> None:
    ids, extents = many(chunks, 20)
    if is_scattered:
        runs = [(n, at) for n in range(20) for at in range(0, MIB, WINDOW_BYTES // 16)]
        extents = recipe.of_sources([Source(n, at, WINDOW_BYTES // 16) for n, at in runs])
    chunks.damaged.add(ids[10])
    source = ImageSource(reader, Recipe(ids, {"x": extents}))
    got = bytearray()
    with pytest.raises(Damaged, match=ids[10][:8].hex()):
        for piece in source.pieces("x") or ():
            got += piece.data
            piece.give_back()
    assert got == b"".join(chunks.kept.raw[id] for id in ids[:10])
    with pytest.raises(Damaged):
        source.read_into("x", 10 * MIB, memoryview(bytearray(5)))
    assert source.read_into("x", 11 * MIB, memoryview(bytearray(5))) == 5
    reader.forget(ids)
    for id in set(ids) - chunks.damaged:
        reader.lend(id).give_back()
    reader.trim(0)
    chunks.damaged.clear()
    assert whole(source, "x") == b"".join(chunks.kept.raw[id] for id in ids)
