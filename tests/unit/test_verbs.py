"""The grammar: what parses comes back from format, and what is wrong is refused in words."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krgfs import verbs
from krgfs.errors import BadWords
from krgfs.verbs import (
    Cancel,
    Checkpoint,
    Diff,
    Freeze,
    ImageRef,
    Restart,
    Signal,
    Sweep,
    Then,
    Verify,
    Wait,
)

NAMES = st.from_regex(r"\A[A-Za-z0-9_%][A-Za-z0-9_.+~@%:,=-]{0,40}\Z")
TEXTS = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\x7f"), max_size=60
)
NUMBERS = st.integers(1, int(signal.SIGRTMAX))
THENS = st.one_of(
    st.sampled_from(["run", "stop", "freeze"]).map(Then), NUMBERS.map(lambda n: Then("kill", n))
)
CHECKPOINTS = st.builds(
    Checkpoint,
    name=st.one_of(st.just(""), NAMES),
    then=THENS,
    desc=TEXTS,
    tcp=st.sampled_from(["fail", "close", "keep"]),
    orphans=st.sampled_from(["refuse", "drop"]),
    run_async=st.booleans(),
)
FREEZES = st.one_of(
    st.builds(Freeze, on=st.just(True), for_s=st.integers(1, 10**6).map(float)),
    st.just(Freeze(on=True, while_open=True)),
    st.builds(Freeze, on=st.just(False), signal=st.one_of(st.just(0), NUMBERS)),
)
RESTARTS = st.builds(
    Restart,
    image=st.builds(ImageRef, NAMES, NAMES),
    pid=st.sampled_from(["auto", "keep", "new"]),
    cgroup=st.sampled_from(["own", "caller", "/a/b"]),
    run_async=st.booleans(),
)
REFS = st.builds(ImageRef, NAMES, NAMES)
VERIFIES = st.one_of(
    st.just(Verify()),
    st.builds(Verify, image=REFS),
    st.builds(Verify, image=st.builds(ImageRef, NAMES, st.just(""))),
)
DIFFS = st.builds(Diff, image=REFS, to=st.one_of(st.none(), REFS))
COMMANDS = st.one_of(
    CHECKPOINTS.map(lambda c: ("checkpoint", c)),
    FREEZES.map(lambda c: ("freeze", c)),
    RESTARTS.map(lambda c: ("restart", c)),
    NUMBERS.map(lambda n: ("signal", Signal(number=n))),
    st.just(("wait", Wait())),
    st.just(("cancel", Cancel())),
    VERIFIES.map(lambda c: ("verify", c)),
    st.just(("sweep", Sweep())),
    DIFFS.map(lambda c: ("diff", c)),
)


@given(COMMANDS)
def test_what_is_formatted_parses_into_the_same(pair: tuple[str, verbs.Command]) -> None:
    verb, command = pair
    assert verbs.parse(verb, verbs.format(verb, command)) == command


@given(st.sampled_from(sorted(verbs.TABLE)), st.text(max_size=80))
def test_any_line_is_understood_or_refused_in_words(verb: str, line: str) -> None:
    try:
        command = verbs.parse(verb, line)
    except BadWords as exc:
        assert verb in exc.message
    else:
        assert isinstance(command, verbs.TABLE[verb].command)


@given(COMMANDS, st.sampled_from(["nonsense", "then", "nam=x", "1 2", "x=y", "''"]))
def test_one_word_too_many_is_refused(pair: tuple[str, verbs.Command], word: str) -> None:
    verb, command = pair
    with pytest.raises(BadWords):
        verbs.parse(verb, f"{verbs.format(verb, command)} {word}")


@pytest.mark.parametrize(
    ("verb", "line", "part"),
    [
        ("checkpoint", "2", "'2' is not 1"),
        ("checkpoint", "", "the line is empty"),
        ("checkpoint", "name=../x", "is not a name"),
        ("checkpoint", "name=a name=b", "given twice"),
        ("checkpoint", "then=sleep", "none of run, stop, kill"),
        ("checkpoint", "then=stop:TERM", "none of run, stop, kill"),
        ("checkpoint", "async=1", "takes no value"),
        ("checkpoint", "tcp", "needs a value"),
        ("checkpoint", "desc='open", "cannot split"),
        ("freeze", "1 signal=TERM", "goes with 0"),
        ("freeze", "0 for=1m", "go with 1"),
        ("freeze", "1 for=1m while-open", "exclude each other"),
        ("freeze", "1 for=-3", "not a time"),
        ("signal", "NOPE", "not a signal"),
        ("signal", "99", "not a signal"),
        ("restart", "pid=new", "it begins with"),
        ("restart", "a/v1 cgroup=x", "none of own"),
        ("restart", "a/v1 cgroup=/../x", "none of own"),
        ("checkpoint", "desc=" + "x" * 5000, "longer than"),
    ],
)
def test_a_bad_line_says_which_word_is_wrong(verb: str, line: str, part: str) -> None:
    with pytest.raises(BadWords, match=part):
        verbs.parse(verb, line)


@pytest.mark.parametrize(
    "text", ["b.1.n1/v3", "images/b.1.n1/v3", "/krg/images/b.1.n1/v3", "/mnt/k/images/b.1.n1/v3/"]
)
def test_an_image_has_several_spellings(text: str) -> None:
    assert verbs.image_ref(text) == ImageRef("b.1.n1", "v3")


@given(st.binary(min_size=1, max_size=15))
def test_any_comm_makes_a_name(raw: bytes) -> None:
    assert verbs.app_name(verbs.escaped_name(raw))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert verbs.duration(text) == seconds


@pytest.mark.parametrize("label", ["latest", "index", "v3", "a/b", ".."])
def test_labels_that_mean_something_already(label: str) -> None:
    with pytest.raises(ValueError, match=r"label|name"):
        verbs.label_name(label)
