"""What files are made of: found by offset, stored, and refused when it is not what was stored."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import recipe
from agent.recipe import EXTENT, MAX_LENGTH, ZERO, Recipe, Source
from krgfs.errors import Damaged

CHUNKS = [bytes([n]) * 32 for n in range(5)]
RAW = [bytes(range(7 * n, 7 * n + 100)) for n in range(5)]

sources = st.lists(
    st.one_of(
        st.builds(Source, st.integers(0, 4), st.integers(0, 60), st.integers(1, 40)),
        st.builds(Source, st.just(ZERO), st.just(0), st.integers(1, 200)),
    ),
    max_size=12,
)
recipes = st.dictionaries(st.text(max_size=9), sources, max_size=5).map(
    lambda files: Recipe(
        list(CHUNKS), {name: recipe.of_sources(each) for name, each in files.items()}
    )
)


def content(found: list[Source]) -> bytes:
    return b"".join(
        bytes(length) if chunk == ZERO else RAW[chunk][offset : offset + length]
        for chunk, offset, length in found
    )


def files_of(made: Recipe) -> dict[str, list[tuple[int, ...]]]:
    return {name: extents.tolist() for name, extents in made.files.items()}


@given(sources, st.integers(0, 700), st.integers(0, 700))
def test_any_bytes_of_a_file_are_found(parts: list[Source], offset: int, size: int) -> None:
    made = Recipe(CHUNKS, {"x": recipe.of_sources(parts)})
    data = content(parts)
    assert made.size("x") == len(data)
    found = list(made.sources("x", offset, size))
    assert content(found) == data[offset : offset + size]
    assert all(each.length > 0 for each in found)


@given(recipes)
def test_a_recipe_is_read_as_it_was_stored(made: Recipe) -> None:
    again = recipe.decode(recipe.encode(made), "it")
    assert (again.chunks, files_of(again)) == (made.chunks, files_of(made))
    assert list(again.files) == list(made.files)


@given(recipes)
def test_what_is_used_of_chunks_is_counted(made: Recipe) -> None:
    used = [0] * 5
    for extents in made.files.values():
        for chunk, _, length in extents.tolist():
            if chunk != ZERO:
                used[chunk] += length
    assert made.used_bytes().tolist() == used
    share = np.arange(1.0, 6.0)
    weighed = sum(made.weighed(name, share) for name in made.files)
    assert weighed == pytest.approx(sum(share * used))
    needed = {number for name in made.files for number in made.chunks_of(name)}
    assert needed == {number for number in range(5) if used[number]}


@pytest.mark.parametrize("length", [0, 1, MAX_LENGTH, MAX_LENGTH + 1, 5 * MAX_LENGTH + 4096])
def test_zeros_can_be_as_many_as_memory_has(length: int) -> None:
    made = Recipe([], {"x": recipe.of_sources(recipe.zeros(length))})
    again = recipe.decode(recipe.encode(made), "it")
    assert again.size("x") == length
    found = list(again.sources("x", max(0, length - 10), 100))
    assert sum(each.length for each in found) == min(length, 10)


def test_extents_are_made_of_columns() -> None:
    made = recipe.extents([1, ZERO], np.array([4096, 0]), [8192, 4096])
    assert made.dtype == EXTENT and made.tolist() == [(1, 4096, 8192), (ZERO, 0, 4096)]


# -- damage

SOME = Recipe(
    CHUNKS,
    {
        "pages-1.img": recipe.of_sources([Source(n % 5, n % 60, 40) for n in range(300)]),
        "a": recipe.of_sources([Source(ZERO, 0, 5)]),
        "b": recipe.of_sources([]),
    },
)


def packed(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def test_what_was_cut_off_is_damaged() -> None:
    data = recipe.encode(SOME)
    raw = zstandard.ZstdDecompressor().decompress(data)
    for cut in range(len(data)):
        with pytest.raises(Damaged, match="the recipe of blast/v1"):
            recipe.decode(data[:cut], "blast/v1")
    for cut in range(len(raw)):
        with pytest.raises(Damaged, match="the recipe of blast/v1"):
            recipe.decode(packed(raw[:cut]), "blast/v1")
    with pytest.raises(Damaged, match="its length is wrong"):
        recipe.decode(packed(raw + bytes(12)), "blast/v1")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_never_a_crash(data: bytes) -> None:
    with pytest.raises(Damaged):
        recipe.decode(data, "blast/v1")


def test_a_chunk_that_is_not_listed_is_damage() -> None:
    made = Recipe(CHUNKS[:2], {"x": recipe.of_sources([Source(2, 0, 10)])})
    with pytest.raises(Damaged, match="names a chunk that it does not list"):
        recipe.decode(recipe.encode(made), "blast/v1")
