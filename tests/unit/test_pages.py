"""Which pages are new: tables against dicts, and what is kept of them against what was."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from agent import pages
from agent.pages import LONGEST_RUN, PAGE_BYTES, UNKNOWN, Hashes, Places, Table
from tests.unit.dumps import memory

numbers = st.lists(st.integers(0, 30))


def hashes_of(found: list[int]) -> Hashes:
    """Return hashes of which many share a half, as none would by chance."""
    return np.array([(n % 5, n // 5) for n in found], np.uint64).reshape(-1, 2)


def table(places: dict[int, tuple[int, int]], chunks: int = 8, held: int = 10) -> Table:
    column = np.array(list(places.values()), np.int64).reshape(-1, 2)
    ids = [bytes([n]) * 32 for n in range(chunks)]
    where = Places(column[:, 0], column[:, 1])
    return Table(ids, np.full(chunks, held), hashes_of(list(places)), where)


places = st.dictionaries(st.integers(0, 4), st.tuples(st.integers(0, 7), st.integers(0, 9)))


def told(found: Places) -> list[tuple[int, ...]]:
    return list(zip(found.chunk.tolist(), found.page.tolist(), strict=True))


def expected(known: dict[int, tuple[int, int]], asked: list[int]) -> list[tuple[int, int]]:
    return [known.get(each, (UNKNOWN, UNKNOWN)) for each in asked]


# -- hashes


def test_a_page_is_known_by_its_bytes_and_the_secret() -> None:
    data = memory([5, 0, 5, 9])
    found = pages.hashed(memoryview(data), 7)
    page = [data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES)]
    assert found.tobytes() == b"".join(xxh3_128_digest(each, 7) for each in page)
    assert (found[0] == found[2]).all() and (found[0] != found[3]).any()
    assert (found[1] == pages.zero_hash(7)).all()
    assert (pages.hashed(memoryview(data), 8) != found).any(axis=1).all()
    assert pages.hashed(memoryview(b""), 7).shape == (0, 2)


# -- tables


@given(places, numbers)
def test_a_table_finds_what_is_in_it_and_nothing_else(
    known: dict[int, tuple[int, int]], asked: list[int]
) -> None:
    made = table(known)
    assert len(made) == len(known)
    assert told(made.find(hashes_of(asked))) == expected(known, asked)


def test_half_a_hash_is_no_hash() -> None:
    made = table({3: (1, 2)})
    assert told(made.find(hashes_of([8, 3, 13]))) == expected({3: (1, 2)}, [8, 3, 13])


@given(places, places, numbers)
def test_two_tables_in_one_find_what_either_has(
    one: dict[int, tuple[int, int]], other: dict[int, tuple[int, int]], asked: list[int]
) -> None:
    other = {each: place for each, place in other.items() if each not in one}
    joined = table(one).joined(table(other))
    assert told(joined.find(hashes_of(asked))) == expected(one | other, asked)


def test_an_empty_table_knows_nothing() -> None:
    assert told(pages.empty().find(hashes_of([1, 2]))) == expected({}, [1, 2])
    assert len(pages.empty()) == 0
    assert pages.empty().stale(0.25, 0.05).tolist() == []


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_the_least_used_chunks_are_stale_up_to_a_share(
    used: list[int], share: float, at_once: float
) -> None:
    chunk = np.repeat(np.arange(len(used)), used)
    hashes = np.arange(2 * len(chunk), dtype=np.uint64).reshape(-1, 2)
    ids, held = [bytes(32)] * len(used), np.full(len(used), 300)
    stale = Table(ids, held, hashes, Places(chunk, chunk)).stale(share, at_once)
    assert sum(np.array(used)[stale]) <= at_once * len(chunk)
    assert all(used[at] / 300 < share for at in np.flatnonzero(stale))
    fresh = [each for each, is_stale in zip(used, stale, strict=True) if not is_stale]
    assert all(used[at] <= min(fresh, default=300) for at in np.flatnonzero(stale))


# -- as files


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    chance, path = random.Random(1), tmp_path / "blast"
    known = {n: (chance.randrange(8), chance.randrange(10)) for n in range(5)}
    table(known, held=256).save(str(path))
    again = pages.load(str(path))
    assert told(again.find(hashes_of([*range(9)]))) == expected(known, [*range(9)])
    assert again.chunks == [bytes([n]) * 32 for n in range(8)]
    assert again.held.tolist() == [256] * 8
    assert path.stat().st_mode & 0o777 == 0o600
    pages.empty().save(str(path))
    assert len(pages.load(str(path))) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["blast"]


def test_a_file_that_is_not_whole_is_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "blast"
    table({1: (0, 0)}, chunks=1).save(str(path))
    data = path.read_bytes()
    for at in range(len(data)):
        for harmed in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            path.write_bytes(harmed)
            assert len(pages.load(str(path))) == 0
    path.unlink()
    assert len(pages.load(str(path))) == 0
    path.mkdir()
    assert len(pages.load(str(path))) == 0


# -- runs


@given(numbers)
def test_the_first_of_equal_pages_stands_for_all(found: list[int]) -> None:
    assert pages.firsts(hashes_of(found)).tolist() == [found.index(each) for each in found]


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 3), st.integers(1, 4)), max_size=20))
def test_runs_are_what_they_were_made_of(parts: list[tuple[int, int, int]]) -> None:
    each = [(chunk, first + n) for chunk, first, length in parts for n in range(length)]
    column = np.array(each, np.int64).reshape(-1, 2)
    chunk, page, length = pages.runs(Places(column[:, 0], column[:, 1]))
    again = [
        (c, p + n)
        for c, p, count in zip(chunk.tolist(), page.tolist(), length.tolist(), strict=True)
        for n in range(count)
    ]
    assert [c for c, _ in again] == [c for c, _ in each]
    assert all(one == other for one, other in zip(again, each, strict=True) if one[0] >= 0)
    longer = (chunk[1:] == chunk[:-1]) & (page[1:] == page[:-1] + length[:-1]) & (chunk[1:] >= 0)
    assert not longer.any(), "as few as can be"


@pytest.mark.parametrize("chunk", [-2, 0])
def test_no_run_is_longer_than_a_recipe_can_say(chunk: int) -> None:
    count = 2 * LONGEST_RUN + 5
    _, page, length = pages.runs(Places(np.full(count, chunk), np.arange(count)))
    assert length.tolist() == [LONGEST_RUN, LONGEST_RUN, 5]
    assert page.tolist() == [0, LONGEST_RUN, 2 * LONGEST_RUN]


def test_nothing_has_no_runs() -> None:
    none = np.empty(0, np.int64)
    assert [each.tolist() for each in pages.runs(Places(none, none))] == [[], [], []]
