"""The manifest as bytes: what was written is read, and nothing else is."""

import json
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.manifest import End, FileSum, Manifest, decode, encode
from krgfs.errors import CannotRunHere, Damaged
from tests.unit.versions import manifest_of

FULL = manifest_of(
    version=7,
    node="n1",
    desc='before "lr" µ',
    then="run",
    tcp="keep",
    criu="4.2.1",
    options=(("--shell-job", "the session leader is outside the tree"),),
    kernel="6.18",
    arch="x86_64",
    boot="b-1",
    cwd=os.fsdecode(b"/home/\xff\xe9"),
    cgroups={"": "/user/anna"},
    ends=(End(kind="tty", id="tty[8801:2]", pid=4242, fd=1, mode="rw"),),
    freeze_ms=41.5,
    timings={"dump_ms": 30.25},
    logical_bytes=10,
    stored_bytes=4096,
    new_bytes=512,
    network="3104d1cb-d0d5-4faa-aef4-1f4cee5c7a3d",
    recipe="11",
    files={"a.img": FileSum(10, "00"), "b.img": FileSum(5)},
)


def test_a_manifest_is_read_as_it_was_written_odd_bytes_and_all():
    read = decode(encode(FULL), "blast/v7")
    assert msgspec.structs.replace(read, digest="") == FULL
    assert encode(read) == encode(FULL)
    assert json.loads(encode(FULL))["format"] == 1
    assert b'\n "app": "blast",\n' in encode(FULL)


def test_the_order_of_the_fields_does_not_matter():
    facts = json.loads(encode(FULL))
    turned = json.dumps(dict(reversed(facts.items())))
    assert decode(turned.encode(), "blast/v7") == decode(encode(FULL), "blast/v7")


@pytest.mark.parametrize("field", sorted(set(Manifest.__struct_fields__) - {"format"}))
def test_the_digest_covers_every_field(field):
    facts = json.loads(encode(FULL))
    value = facts[field]
    if isinstance(value, int | float):
        facts[field] = value + 1
    else:
        facts[field] = {} if isinstance(value, dict) else (value or "x") * 2
    with pytest.raises(Damaged, match="the manifest of blast/v7 is damaged"):
        decode(json.dumps(facts).encode(), "blast/v7")


def test_a_newer_format_is_refused_before_anything_else_is_looked_at():
    with pytest.raises(CannotRunHere, match="format 2, this agent knows 1; use a newer krgfs"):
        decode(b'{"format": 2, "nothing": "known"}', "blast/v7")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"format": "1"}',
        b'{"format": null}',
        b'{"format": 1, "app": 5}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_damaged(data):
    with pytest.raises(Damaged, match="the manifest of blast/v7 is damaged"):
        decode(data, "blast/v7")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "files/../../x", "a/b", "", ".", "files"])
def test_a_manifest_cannot_name_files_elsewhere(name):
    with pytest.raises(Damaged):
        decode(encode(manifest_of(files={name: FileSum(0, "")})), "blast/v7")


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_crash(data):
    with pytest.raises(Damaged):
        decode(data, "blast/v7")
