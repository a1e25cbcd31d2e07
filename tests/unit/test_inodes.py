"""Inode numbers: stable for what is read, fresh for what is written, never used twice."""

from __future__ import annotations

from krgfs import table
from krgfs.inodes import Inodes
from krgfs.places import Place

ROWS = {row.path: row for row in table.TABLE}
STATUS = Place(ROWS["nodes/NODE/procs/PID/status"], ("n1", 42, 1000))
VERB = Place(ROWS["nodes/NODE/procs/PID/checkpoint"], ("n1", 42, 1000))


def test_a_state_file_keeps_its_number_while_the_kernel_knows_it() -> None:
    inodes = Inodes()
    first = inodes.looked_up(STATUS)
    assert inodes.looked_up(STATUS) == first
    assert inodes.place(first) == STATUS
    inodes.forget(first, 1)
    assert inodes.looked_up(STATUS) == first
    inodes.forget(first, 2)
    assert inodes.looked_up(STATUS) > first


def test_a_verb_file_is_fresh_at_every_lookup() -> None:
    inodes = Inodes()
    first, second = inodes.looked_up(VERB), inodes.looked_up(VERB)
    assert first != second
    assert inodes.place(first) == inodes.place(second) == VERB


def test_a_pinned_verb_file_shows_the_number_that_is_open() -> None:
    inodes = Inodes()
    opened = inodes.looked_up(VERB)
    inodes.pin(VERB, opened)
    assert inodes.looked_up(VERB) == opened
    inodes.unpin(VERB)
    assert inodes.looked_up(VERB) != opened


def test_another_process_with_the_pid_is_another_file() -> None:
    inodes = Inodes()
    other = Place(STATUS.row, ("n1", 42, 2000))
    assert inodes.looked_up(STATUS) != inodes.looked_up(other)


def test_an_entry_that_did_not_fit_leaves_nothing() -> None:
    inodes = Inodes()
    shown = inodes.shown(STATUS)
    inodes.drop_unused(shown)
    assert inodes.number(STATUS) is None


def test_what_has_the_name_of_a_removed_image_has_other_numbers() -> None:
    inodes = Inodes()
    app, version = ROWS["images/APP"], ROWS["images/APP/VERSION"]
    places = [Place(app, ("a",)), Place(version, ("a", "v1")), Place(version, ("a", "v2"))]
    before = [inodes.looked_up(place) for place in places]
    inodes.retire(places[1])
    after = [inodes.looked_up(place) for place in places]
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] not in before
    assert inodes.place(before[1]) == places[1]  # the kernel may still ask, until it forgets
    inodes.forget(before[1], 1)
    assert inodes.number(places[1]) == after[1]
    inodes.retire(places[0])
    assert not {inodes.looked_up(place) for place in places} & {*before, *after}
