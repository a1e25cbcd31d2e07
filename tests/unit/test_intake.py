"""What a dump delivers: comes back to the byte, costs nothing twice, and holds on to nothing."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import pages
from agent.backend import MemoryBackend
from agent.buffers import Buffers, Piece
from agent.chunks import ChunkStore
from agent.intake import CHUNK_PAGES, Intake
from agent.pages import PAGE_BYTES, Numbers
from agent.recipe import Recipe
from krgfs.errors import EngineFailed
from tests.unit.dumps import (
    SEED,
    Files,
    Kept,
    changed,
    dumped,
    feed,
    memory,
    read_back,
    unknown,
    values,
)

SHAPES = [(2, 64), (3, 100), (5, 3), (16, 1), (16, 64), (40, 3), (80, 64)]  # count, pages of each
buffers = st.sampled_from(SHAPES).map(lambda shape: Buffers(shape[0], shape[1] * PAGE_BYTES))
page_files = st.dictionaries(st.sampled_from(["pages-1.img", "pages-2.img", "pages-7.img"]), values)
bulk_files = st.dictionaries(
    st.sampled_from(["ghost-file-1.img", "ghost-file-2.img"]),
    st.builds(
        lambda parts: b"".join(parts),
        st.lists(st.sampled_from([b"", b"x", b"abc" * 7777, bytes(5000), bytes(1 << 20)])),
    ).filter(lambda data: len(data) < 4 << 20),
)
small_files = st.dictionaries(st.sampled_from(["a.img", "b.img", "files/c"]), st.binary())


def table_of(tmp: Path, stored: pages.Table) -> pages.Table:
    """Return a table as the next dump finds it."""
    stored.save(str(tmp / "table"))
    return pages.load(str(tmp / "table"))


def in_chunks(kept: Kept, made: Recipe) -> int:
    """Return the bytes that an image keeps alive."""
    return sum(len(kept.raw[id]) for id in set(made.chunks))


@settings(deadline=None, max_examples=40)
@given(page_files, bulk_files, small_files, buffers, st.booleans())
def test_what_was_taken_in_comes_back(
    paged: dict[str, list[int]], bulk: Files, small: Files, into: Buffers, is_told: bool
) -> None:
    def addresses(file: str) -> Numbers:
        count = len(paged[file])
        return np.arange(count) + 1000 * int(file[6]) if is_told else np.empty(0, np.int64)

    kept = Kept()
    large = {name: memory(each) for name, each in paged.items()} | bulk
    stored = dumped(kept, large, addresses=addresses, buffers=into, small=small)
    # a file of which nothing came is told by `unload`
    expected = {name: data for name, data in large.items() if data} | small
    assert read_back(kept, stored.recipe) == expected
    assert stored.logical_bytes == sum(map(len, expected.values()))
    assert {name: stored.recipe.size(name) for name in expected} == {
        name: len(data) for name, data in expected.items()
    }


@settings(deadline=None, max_examples=15)
@given(values, st.randoms(use_true_random=False), buffers, st.booleans())
def test_every_version_of_memory_that_changes_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[int],
    chance: random.Random,
    into: Buffers,
    is_told: bool,
) -> None:
    tmp = tmp_path_factory.mktemp("tables")
    kept, known, now, made = Kept(), pages.empty(), first, []
    for _ in range(6):
        files = {"pages-1.img": memory(now), "pages-2.img": memory(now[::-2])}
        told = np.arange(len(now) if is_told else 0) * 3
        stored = dumped(kept, files, known, lambda file, told=told: told, into)
        made.append((stored.recipe, {name: data for name, data in files.items() if data}))
        known, now = table_of(tmp, stored.table), changed(now, chance)
    for recipe, files in made:
        assert read_back(kept, recipe) == files


def test_the_chunks_of_these_tests_are_as_the_stores() -> None:
    """One dump after another into a real session; and what a session says of chunks."""
    store = ChunkStore.open(MemoryBackend())
    kept, known, kept_known = Kept(), pages.empty(), pages.empty()
    for turn in range(3):
        now = memory([*range(1, 700), 0, 0, 5 + turn * 1000])
        with store.session() as session:
            theirs = dumped(session, {"pages-1.img": now}, known)
            session.flush()
        ours = dumped(kept, {"pages-1.img": now}, kept_known)
        assert theirs.recipe.chunks == ours.recipe.chunks
        assert [store.read(id) for id in theirs.recipe.chunks] == [
            *map(kept.raw.get, ours.recipe.chunks)
        ]
        known, kept_known = theirs.table, ours.table
        with store.session() as session:
            asked = [*ours.recipe.chunks, bytes(32)]
            assert session.reuse(asked).tolist() == kept.reuse(asked).tolist()


# -- what it costs


@pytest.mark.parametrize("has_table", [True, False])
def test_memory_that_did_not_change_costs_nothing_new(has_table: bool) -> None:
    kept, now = Kept(), memory([*range(1, 3000), *range(1, 300), 0, 0, 7, 7])
    first = dumped(kept, {"pages-1.img": now, "ghost-file-1.img": b"g" * 5000})
    assert kept.new_bytes == 2999 * PAGE_BYTES + 5000, "each page once, zeros not at all"
    known = first.table if has_table else None
    second = dumped(kept, {"pages-1.img": now, "ghost-file-1.img": b"g" * 5000}, known)
    assert kept.new_bytes == 2999 * PAGE_BYTES + 5000
    assert in_chunks(kept, second.recipe) == kept.new_bytes


def test_zeros_cost_nothing() -> None:
    kept = Kept()
    stored = dumped(kept, {"pages-1.img": bytes(5 << 20), "ghost-file-1.img": bytes(5 << 20)})
    assert kept.raw == {} and stored.logical_bytes == 10 << 20
    assert len(stored.table) == 0
    assert read_back(kept, stored.recipe) == {
        "pages-1.img": bytes(5 << 20),
        "ghost-file-1.img": bytes(5 << 20),
    }


def test_a_page_is_stored_once_for_all_files() -> None:
    kept, same = Kept(), [*range(1, 600)]
    dumped(kept, {f"pages-{n}.img": memory(same) for n in range(1, 5)})
    assert kept.new_bytes == 599 * PAGE_BYTES


def test_with_a_table_only_pages_that_changed_are_stored() -> None:
    kept, now = Kept(), [*range(1, 4001)]
    known = dumped(kept, {"pages-1.img": memory(now)}).table
    before = kept.new_bytes
    now[100:3000:29] = range(10_000, 10_100)
    moved = memory([*range(20_000, 20_050), *now])
    stored = dumped(kept, {"pages-1.img": moved}, known)
    assert kept.new_bytes - before == 150 * PAGE_BYTES
    assert read_back(kept, stored.recipe) == {"pages-1.img": moved}


@pytest.mark.parametrize("shift", [1, 37, 255, 256, 1000])
def test_the_same_memory_elsewhere_in_the_file_gives_the_same_chunks(shift: int) -> None:
    """Without a table: chunks are cut by the addresses that the page maps tell."""
    heap = np.arange(16 * CHUNK_PAGES)
    lower = np.arange(-5000, shift - 5000)
    addresses = [heap, np.concatenate([lower, heap])]
    contents = [heap + 1, np.concatenate([lower, heap + 1])]
    kept = Kept()
    first, second = (
        dumped(kept, {"pages-1.img": memory(each)}, None, lambda file, at=at: at, Buffers(40))
        for each, at in zip(contents, addresses, strict=True)
    )
    assert len(first.recipe.chunks) == 16
    assert set(first.recipe.chunks) <= set(second.recipe.chunks)
    assert kept.new_bytes == (len(heap) + shift) * PAGE_BYTES


def test_a_change_makes_one_chunk_new_without_a_table() -> None:
    kept, now = Kept(), np.arange(1, 8 * CHUNK_PAGES + 1)
    first = dumped(kept, {"pages-1.img": memory(now)}, addresses=lambda file: now - 1)
    now[700] = 1 << 40
    second = dumped(kept, {"pages-1.img": memory(now)}, addresses=lambda file: np.arange(len(now)))
    assert len(set(second.recipe.chunks) - set(first.recipe.chunks)) == 1


@pytest.mark.parametrize("each", [1, 20, 200])
def test_slow_changes_do_not_pile_up(tmp_path: Path, each: int) -> None:
    """Sixty versions of two thousand pages: old chunks are written anew, a few at a time."""
    chance, kept, known = random.Random(each), Kept(), pages.empty()
    now = np.arange(1, 2049)
    worst = 0.0
    for turn in range(60):
        before = kept.new_bytes
        stored = dumped(kept, {"pages-1.img": memory(now)}, known, lambda file: np.arange(2048))
        fresh = (kept.new_bytes - before) // PAGE_BYTES
        assert fresh <= (each + 2048 // 10 if turn else 2048)
        worst = max(worst, in_chunks(kept, stored.recipe) / stored.logical_bytes)
        known = table_of(tmp_path, stored.table)
        for at in chance.sample(range(2048), each):
            now[at] = chance.randrange(1 << 20, 1 << 60)
    assert read_back(kept, stored.recipe).keys() == {"pages-1.img"}
    assert worst <= 5


def test_a_table_whose_chunks_are_gone_is_no_help_and_no_harm() -> None:
    kept, now = Kept(), memory(range(1, 1000))
    known = dumped(kept, {"pages-1.img": now}).table
    for id in [*kept.raw][::2]:
        del kept.raw[id]
    stored = dumped(kept, {"pages-1.img": now}, known)
    assert read_back(kept, stored.recipe) == {"pages-1.img": now}


# -- what goes wrong


@pytest.mark.parametrize("count", [2, 8, 40])
@pytest.mark.parametrize("fails", [1, 2, 5, 11, 12])
def test_a_store_that_fails_in_the_middle_ends_the_dump(fails: int, count: int) -> None:
    """At any chunk, while the dump comes or when it is over. `dumped` looks what is left."""
    files = {"pages-1.img": memory(range(1, 11 * 256)), "ghost-file-1.img": b"g" * 9}
    with pytest.raises(OSError) as caught:
        dumped(Kept(fails), files, buffers=Buffers(count))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("count", [2, 4, 40])
@pytest.mark.parametrize("fails", [1, 2, 9])
def test_a_store_that_fails_while_a_file_is_loaded(tmp_path: Path, fails: int, count: int) -> None:
    (tmp_path / "pages").write_bytes(memory(range(1, 10 * 256)))
    into, threads = Buffers(count), set(threading.enumerate())
    intake = Intake(into, Kept(fails), pages.empty(), SEED)
    with pytest.raises(OSError) as caught:
        for turn in itertools.count(1):
            intake.load(str(tmp_path / "pages"), f"pages-{turn}.img")
            if turn == 2:
                intake.finish({}, unknown, lambda: None)
    intake.close()
    assert caught.value.errno == errno.ENOSPC
    assert into.free == into.count and set(threading.enumerate()) <= threads


def test_memory_that_is_being_stored_is_not_given_back_because_of_a_failure() -> None:
    """One chunk of a buffer fails while the other is still read, and the dump goes on."""
    given_back, is_read = threading.Event(), threading.Event()
    seen: list[bytes] = []

    class Home:
        def give_back(self, index: int, /) -> None:
            into[index][:] = b"\xee" * into.size_bytes
            given_back.set()
            into.give_back(index)

    class Chunks(Kept):
        def add(self, *parts: bytes | bytearray | memoryview) -> bytes:
            if parts[0][0] == 1:
                is_read.wait(5)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            is_read.set()
            given_back.wait(0.2)  # which must not come
            seen.append(b"".join(parts))
            return super().add(*parts)

    into = Buffers(2, 2 * CHUNK_PAGES * PAGE_BYTES)
    intake = Intake(into, Chunks(), pages.empty(), SEED)
    index = into.lend()
    assert index is not None
    first = np.arange(CHUNK_PAGES) * 256 + 1
    data = memory(np.concatenate([first, first + 1]))
    into[index][:] = data
    intake.take(Piece("pages-1.img", 0, into[index], Home(), index))
    assert given_back.wait(60)
    intake.close()
    assert seen in ([], [data[len(data) // 2 :]]) and into.free == 2


def test_a_store_that_fails_at_the_small_files() -> None:
    with pytest.raises(OSError):
        dumped(Kept(fails=1), {}, small={"a.img": b"a"})


def test_who_calls_it_off_gets_his_error_and_all_buffers_back() -> None:
    class CalledOff(Exception):
        pass

    def check() -> None:
        raise CalledOff

    into = Buffers(16)
    intake = Intake(into, Kept(), pages.empty(), SEED)
    feed(intake, {"pages-1.img": memory(range(1, 2000))})
    assert into.free < into.count
    with pytest.raises(CalledOff):
        intake.finish({}, unknown, check)
    intake.close()
    intake.close()
    assert into.free == into.count


def test_a_dump_that_was_never_finished_gives_all_back() -> None:
    for count in (2, 16):
        into, threads = Buffers(count), set(threading.enumerate())
        intake = Intake(into, Kept(), pages.empty(), SEED)
        feed(intake, {"pages-1.img": memory(range(1, 2000))})
        intake.close()
        assert into.free == into.count and set(threading.enumerate()) <= threads


def test_part_of_a_page_is_refused_and_not_kept() -> None:
    into = Buffers(2)
    intake = Intake(into, Kept(), pages.empty(), SEED)
    index = into.lend()
    assert index is not None
    piece = Piece("pages-1.img", 0, into[index][:5000], into, index)
    with pytest.raises(EngineFailed, match=r"part of a page in pages-1\.img"):
        intake.take(piece)
    piece.give_back()
    intake.close()
    assert into.free == 2


def test_a_piece_that_no_thread_can_be_had_for_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    into = Buffers(2)
    intake = Intake(into, Kept(), pages.empty(), SEED)
    index = into.lend()
    assert index is not None
    piece = Piece("pages-1.img", 0, into[index][:PAGE_BYTES], into, index)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            intake.take(piece)
    piece.give_back()
    assert intake.sizes == {}
    intake.close()
    assert into.free == 2


# -- small files, and those that lie somewhere


def test_small_files_come_to_lie_in_the_directory(tmp_path: Path) -> None:
    intake = Intake(Buffers(4), Kept(), pages.empty(), SEED)
    feed(intake, {"core-1.img": b"c" * 3_000_000, "pstree.img": b"p", "pages-1.img": memory([1])})
    sizes = dict.fromkeys(["core-1.img", "pstree.img", "pages-1.img", "e.img", "pages-2.img"], 0)
    intake.unload(tmp_path, sizes)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"core-1.img": b"c" * 3_000_000, "pstree.img": b"p", "e.img": b""}
    assert intake.sizes == {"pages-1.img": PAGE_BYTES, "pages-2.img": 0}
    stored = intake.finish({}, unknown, lambda: None)
    intake.close()
    assert {name: stored.recipe.size(name) for name in stored.recipe.files} == intake.sizes


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 7])
@pytest.mark.parametrize("count", [2, 40])
def test_a_file_that_lies_somewhere_is_taken_whole(tmp_path: Path, size: int, count: int) -> None:
    data, kept, into = os.urandom(size), Kept(), Buffers(count)
    (tmp_path / "ghost").write_bytes(data)
    intake = Intake(into, kept, pages.empty(), SEED)
    intake.load(str(tmp_path / "ghost"), "ghost-file-1.img")
    stored = intake.finish({}, unknown, lambda: None)
    intake.close()
    assert read_back(kept, stored.recipe) == {"ghost-file-1.img": data}
    assert into.free == into.count


def test_small_files_share_chunks_and_are_found_in_them() -> None:
    kept = Kept()
    small = {f"core-{i}.img": bytes([i + 1]) * (i * 40_000) for i in range(20)}
    stored = dumped(kept, {}, small=small)
    assert read_back(kept, stored.recipe) == small
    assert len(kept.raw) == 8, "7.6 MB"
