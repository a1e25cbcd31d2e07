"""Imports: directories that come to be images, copies of ours and what plain CRIU wrote."""

import contextlib
import json
import os
from functools import partial

import pytest
import trio
import trio.testing

from agent import manifest as manifests
from agent.backend import MemoryBackend
from agent.images import Limits
from agent.manifest import MANIFEST, Task
from krgfs.errors import BadWords, CannotRunHere, Damaged, Exists, Gone, NoRoom, NotYours
from tests.unit.versions import (
    ANNA,
    DUMPED,
    KEY,
    SMALL,
    contents_of,
    copied,
    finished,
    leave,
    make,
    names_in,
    opened,
    tree_of,
)


async def test_a_copy_of_an_image_is_complete_when_its_last_file_is_there(images):
    manifest = await make(images, 1, files=DUMPED | {"files/out": b"o"})
    source = await contents_of(images)
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    for name, data in sorted(source.items()):
        assert await images.imports.whole("blast", "v2") is None
        await images.imports.write_file("blast", "v2", name, 0, data)
    found = await images.imports.whole("blast", "v2")
    assert found == manifests.decode(source[MANIFEST], "the copy")
    made = await finished(images, "v2", 2, manifest=found)
    assert (made.ref, made.copied_from) == ("blast/v2", "blast/v1")
    assert (await images.opened("blast", 2)).manifest == made
    assert await images.verify("blast", 2) == ""
    for field in ("created", "node", "tree", "files", "logical_bytes", "stored_bytes"):
        assert getattr(made, field) == getattr(manifest, field), field
    assert made.new_bytes < 1000, "the chunks of its pages were there"
    now = await contents_of(images, "v2")
    assert {**now, MANIFEST: b""} == {**source, MANIFEST: b""}


async def test_an_image_that_comes_home_is_what_it_was_to_the_byte(tmp_path):
    dumped = DUMPED | {
        "files/out": b"o",
        "pages-2.img": os.urandom(3 << 20),
        "ghost-file-1.img": b"",
    }
    async with opened(tmp_path / "a") as images:
        await make(images, 1, files=dumped)
        source = await contents_of(images)
    async with opened(tmp_path / "b") as others:
        await copied(others, source, "v1.part")
        after = await finished(others, "v1.part", 1)
        assert after.copied_from == ""
        facts = json.loads((now := await contents_of(others)).pop(MANIFEST))
        then = json.loads(source.pop(MANIFEST))
        assert now == source
        changed = {key for key in then if facts[key] != then[key]}
        assert changed <= {"stored_bytes", "new_bytes", "digest"}


async def test_an_image_belongs_to_whom_its_import_was_begun_for(images):
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    await make(images, 1)
    await images.imports.begin("mine", "v1", 4321, 4322)
    for name, data in (await contents_of(images)).items():
        await images.imports.write_file("mine", "v1", name, 0, data)
    manifest = await finished(images, "v1", 1, app="mine")
    assert (manifest.uid, manifest.gid, manifest.copied_from) == (4321, 4322, "blast/v1")


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("pstree.img", None, "pstree.img is missing"),
        ("pstree.img", b"four", "pstree.img has other contents"),
        ("pstree.img", b"five5", "pstree.img has 5 bytes, not 4"),
        ("note.txt", b"mine", "note.txt is not in its manifest"),
        (MANIFEST, b'{"format": 1}', "the manifest of blast/v2.part is damaged"),
    ],
)
async def test_a_copy_that_does_not_match_is_refused_and_stays(
    images, backend, root, file, data, words
):
    await make(images, 1)
    await copied(images, await contents_of(images), "v2.part", skip=[file])
    if data is not None:
        await images.imports.write_file("blast", "v2.part", file, 0, data)
    before = tree_of(root / "imports"), names_in(backend)
    assert await images.imports.whole("blast", "v2.part") is None
    with pytest.raises(Damaged) as caught:
        await images.finish_import("blast", "v2.part", 2)
    assert words in caught.value.message
    assert (tree_of(root / "imports"), names_in(backend)) == before
    assert await images.files("blast", "v2.part")
    if file == "pstree.img":
        await images.imports.truncate_file("blast", "v2.part", file, 0) if data else None
        await images.imports.write_file("blast", "v2.part", file, 0, b"tree")
        assert (await finished(images, "v2.part", 2)).ref == "blast/v2"


async def test_one_flipped_bit_deep_in_the_pages_of_a_copy_is_found(images):
    await make(images, 1, files=DUMPED | {"pages-2.img": os.urandom(9 << 20)})
    source = await contents_of(images)
    pages = bytearray(source["pages-2.img"])
    pages[(8 << 20) + 5] ^= 1
    await copied(images, source | {"pages-2.img": pages}, "v2")
    with pytest.raises(Damaged, match=r"cannot import blast/v2: pages-2\.img has other contents"):
        await images.finish_import("blast", "v2", 2)
    assert await images.verify("blast", 2) == "it is not in the store"


async def test_a_copy_with_a_newer_manifest_is_refused_in_words(images):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    await images.imports.write_file("blast", "v2", MANIFEST, 0, b'{"format": 99}')
    assert await images.imports.whole("blast", "v2") is None
    with pytest.raises(CannotRunHere, match="format 99"):
        await images.finish_import("blast", "v2", 2)


async def test_names_that_are_taken_are_refused(images, backend):
    await make(images, 1)
    source = await contents_of(images)
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    with pytest.raises(Exists, match="blast/v2"):
        await images.imports.begin("blast", "v2", ANNA, ANNA)
    await copied(images, source, "v3.part")
    before = names_in(backend)
    with pytest.raises(Exists, match="blast/v1 exists; take another"):
        await images.finish_import("blast", "v3.part", 1)
    assert names_in(backend) == before
    assert (await finished(images, "v3.part", 3)).ref == "blast/v3"


async def test_an_import_is_taken_in_by_less_memory_than_it_has(tmp_path):
    """Streamed: of 32 buffers at most 16 are there."""
    async with opened(tmp_path / "state", limits=Limits(memory_bytes=1 << 20)) as images:
        source = PLAIN | {
            "pages-1.img": os.urandom(20 << 20) + bytes(4 << 20),
            "ghost-file-1.img": os.urandom((12 << 20) + 77),
        }
        await copied(images, source, "v2")
        await finished(images, "v2", 2)
        assert await images.verify("blast", 2) == ""
        found = await contents_of(images, "v2")
        assert {name: found[name] for name in source} == source


async def test_writes_of_an_import_land_where_they_were_aimed(images):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    await images.imports.write_file("blast", "v2", "x", 3, b"de")
    await images.imports.write_file("blast", "v2", "x", 0, b"abc")
    assert await images.read("blast", "v2", "x", 0, 9) == b"abcde"
    await images.imports.truncate_file("blast", "v2", "x", 2)
    assert await images.read("blast", "v2", "x", 0, 9) == b"ab"
    await images.imports.write_file("blast", "v2", "x", 4, b"")
    assert await images.read("blast", "v2", "x", 0, 9) == b"ab"
    await images.imports.remove_file("blast", "v2", "x")
    assert await images.files("blast", "v2") == []
    for use in (images.imports.remove_file, lambda *where: images.imports.truncate_file(*where, 1)):
        with pytest.raises(Gone, match="blast/v2/x"):
            await use("blast", "v2", "x")


async def test_a_hole_that_no_disk_could_fill_is_refused(images):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    with pytest.raises(NoRoom):
        await images.imports.write_file("blast", "v2", "x", 1 << 60, b"x")
    await images.imports.write_file("blast", "v2", "x", 0, b"x")
    with pytest.raises(NoRoom):
        await images.imports.truncate_file("blast", "v2", "x", 1 << 60)
    with pytest.raises(BadWords):
        await images.imports.write_file("blast", "v2", "x", -1, b"x")


async def test_a_removed_import_is_gone(images, root):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    await images.imports.write_file("blast", "v2", "files/x", 0, b"x")
    await images.imports.remove("blast", "v2")
    await images.imports.remove("blast", "v2")
    assert tree_of(root / "imports/blast") == {}
    with pytest.raises(Gone):
        await images.imports.write_file("blast", "v2", "x", 0, b"x")


async def test_imports_that_ended_are_forgotten(images):
    await make(images, 1)
    source = await contents_of(images)
    await copied(images, source, "v2")
    await finished(images, "v2", 2)
    await copied(images, source, "v3")
    await images.imports.remove("blast", "v3")
    with pytest.raises(Gone):
        await images.imports.write_file("blast", "v4", "x", 0, b"")
    assert images.imports._known == {}


async def test_of_two_that_finish_at_once_one_does(images):
    await make(images, 1)
    await copied(images, await contents_of(images), "v2")
    outcomes = []

    async def finish():
        try:
            outcomes.append((await finished(images, "v2", 2)).ref)
        except (Gone, Exists) as exc:
            outcomes.append(type(exc))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        nursery.start_soon(finish)
    assert "blast/v2" in outcomes and {Gone, Exists} & {*outcomes}
    assert await images.verify("blast", 2) == ""


async def test_imports_go_on_beside_each_other(images):
    """Of the same bytes and of others, at once, with a dump among them."""
    shared = os.urandom(2 << 20)
    sources = {
        version: PLAIN | {"pages-1.img": shared + os.urandom(1 << 20)} for version in range(2, 6)
    }

    async def take_in(version):
        await copied(images, sources[version], f"v{version}.part")
        await finished(images, f"v{version}.part", version)

    async with trio.open_nursery() as nursery:
        for version in sources:
            nursery.start_soon(take_in, version)
        nursery.start_soon(make, images, 1)
    assert await images.verify("blast", 1) == ""
    for version, source in sources.items():
        assert await images.verify("blast", version) == ""
        found = await contents_of(images, f"v{version}")
        assert {name: found[name] for name in source} == source


async def test_an_import_cannot_change_while_it_becomes_a_version(images):
    await make(images, 1)
    await copied(images, await contents_of(images), "v2")
    change = partial(images.imports.write_file, "blast", "v2", "pstree.img", 0, b"eert")
    with pytest.raises(NoRoom):
        async with images.imports.examined("blast", "v2", 2):
            with trio.move_on_after(0.2) as waiting:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(change)
            assert waiting.cancelled_caught
            assert await images.read("blast", "v2", "pstree.img", 0, 9) == b"tree"
            raise NoRoom("it came to nothing")
    await change()
    assert await images.read("blast", "v2", "pstree.img", 0, 9) == b"eert"


async def test_what_changed_after_it_was_whole_is_looked_at_again(images):
    await make(images, 1)
    await copied(images, await contents_of(images), "v2")
    found = await images.imports.whole("blast", "v2")
    await images.imports.write_file("blast", "v2", "pstree.img", 0, b"torn")
    with pytest.raises(Damaged, match=r"pstree\.img has other contents"):
        await images.finish_import("blast", "v2", 2, found)
    await images.imports.write_file("blast", "v2", "pstree.img", 0, b"tree")
    assert (await finished(images, "v2", 2, manifest=found)).ref == "blast/v2"


async def test_no_change_is_taken_once_a_version_was_made(images):
    await make(images, 1)
    await copied(images, await contents_of(images), "v2")
    await images.finish_import("blast", "v2", 2)
    for change in (
        partial(images.imports.write_file, "blast", "v2", "pstree.img", 0, b"late"),
        partial(images.imports.truncate_file, "blast", "v2", "pstree.img", 0),
        partial(images.imports.remove_file, "blast", "v2", "pstree.img"),
    ):
        with pytest.raises(NotYours, match="blast/v2 is committed"):
            await change()
    await images.remove("blast", 2)
    await images.imports.reopen("blast", "v2")
    await images.imports.write_file("blast", "v2", "pstree.img", 0, b"late")


async def test_those_who_wait_keep_each_other_out_when_an_import_is_made_anew(images):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    inside = 0

    async def work():
        nonlocal inside
        with contextlib.suppress(Gone):
            async with images.imports._importing("blast", "v2"):
                inside += 1
                assert inside == 1
                await trio.sleep(0.01)
                inside -= 1

    async with trio.open_nursery() as nursery:
        async with images.imports._importing("blast", "v2") as (path, _):
            for _ in range(2):
                nursery.start_soon(work)
            await trio.testing.wait_all_tasks_blocked()
            os.rmdir(path)
        os.mkdir(path, 0o700)  # before any of those who wait gets to look
        for _ in range(2):
            nursery.start_soon(work)
    await images.imports.remove("blast", "v2")
    assert images.imports._known == {}


# -- directories that plain CRIU wrote


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields):
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def image_file(magics, *entries):
    head = b"".join(magic.to_bytes(4, "little") for magic in magics)
    return head + b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries)


def core(comm, uid=None):
    creds = message((1, uid), (2, uid + 1), (3, 0)) if uid is not None else b""
    thread = [(5, message((1, 0), (10, creds)))] if uid is not None else []
    return image_file(
        [0x54564319, 0x55053847], message((1, 1), (3, message((1, 1), (6, comm))), *thread)
    )


# pstree.img as CRIU 4.2 wrote it of one process with pid, group and session 5721
REAL_PSTREE = bytes.fromhex("19435654303027500e00000008d92c100018d92c20d92c28d92c")
PLAIN = {
    "inventory.img": image_file([0x58313116], message((1, 2))),
    "pstree.img": image_file(
        [0x54564319, 0x50273030],
        message((1, 5721), (2, 0), (3, 5721), (4, 5700), (5, 5721), (5, 5800)),
        message((1, 5722), (2, 5721), (3, 5721), (4, 5700), (5, 5722)),
    ),
    "core-5721.img": core(b"bl\xffast", 1000),
    "core-5800.img": core(b"thread", 1000),
    "core-5722.img": core(b"zombie"),
    "pages-1.img": bytes(8192),
}


async def test_a_plain_dump_gets_a_manifest_of_what_it_says_itself(images):
    await copied(images, PLAIN, "v2.part")
    assert await images.imports.whole("blast", "v2.part") is None
    manifest = await finished(images, "v2.part", 2)
    assert (await images.opened("blast", 2)).manifest == manifest
    assert (manifest.ref, manifest.uid, manifest.copied_from) == ("blast/v2", ANNA, "")
    assert (manifest.root, manifest.arch) == (5721, "x86_64")
    assert manifest.tree == (
        Task(
            pid=5721,
            ppid=0,
            pgrp=5721,
            sid=5700,
            uid=1000,
            gid=1001,
            comm=os.fsdecode(b"bl\xffast"),
            tids=(5721, 5800),
        ),
        Task(pid=5722, ppid=5721, pgrp=5721, sid=5700, comm="zombie", tids=(5722,)),
    )
    assert manifest.files.keys() == PLAIN.keys()
    assert manifest.logical_bytes == sum(map(len, PLAIN.values()))
    assert await images.verify("blast", 2) == ""
    found = await contents_of(images, "v2")
    assert {name: found[name] for name in PLAIN} == PLAIN


async def test_what_criu_really_wrote_is_understood(images):
    await copied(images, PLAIN | {"pstree.img": REAL_PSTREE}, "v2.part")
    (task,) = (await finished(images, "v2.part", 2)).tree
    assert (task.pid, task.ppid, task.pgrp, task.sid, task.tids) == (5721, 0, 5721, 5721, (5721,))


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("inventory.img", None, "inventory.img is missing"),
        ("inventory.img", b"hello", "inventory.img does not begin as CRIU's do"),
        ("pstree.img", None, "pstree.img is missing"),
        ("pstree.img", PLAIN["pstree.img"][:8], "pstree.img names no process"),
        ("pstree.img", PLAIN["pstree.img"][:-1], "pstree.img is cut off"),
        ("pstree.img", PLAIN["pstree.img"] + b"\x01", "pstree.img is cut off"),
        ("pstree.img", image_file([0x54564319, 0x50273030], b"\xff" * 20), "damaged"),
        ("pstree.img", image_file([0x54564319, 0x50273030], message((2, 1))), "without a pid"),
        ("core-5721.img", None, "core-5721.img is missing"),
        ("core-5800.img", None, "core-5800.img is missing"),
        ("core-5721.img", PLAIN["core-5721.img"][:8], "core-5721.img is empty"),
    ],
)
async def test_what_is_no_dump_of_criu_is_refused_and_stays(images, root, file, data, words):
    await copied(images, {**PLAIN, file: data} if data is not None else PLAIN, "v2.part")
    if data is None:
        await images.imports.remove_file("blast", "v2.part", file)
    before = tree_of(root)
    with pytest.raises(Damaged) as caught:
        await images.finish_import("blast", "v2.part", 2)
    assert "cannot import blast/v2.part: it has no manifest.json" in caught.value.message
    assert words in caught.value.message
    assert tree_of(root) == before


# -- what a crash leaves


async def test_an_import_goes_on_under_the_next_agent(images, root, backend):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    async with opened(root, backend) as fresh:
        await fresh.imports.write_file("blast", "v2", "x", 0, b"x")
        assert await fresh.read("blast", "v2", "x", 0, 9) == b"x"


async def test_an_import_that_was_published_and_not_recorded_is_one_again(images, root, backend):
    await make(images, 1)
    source = await contents_of(images)
    for name, number in (("v2", 2), ("v3.part", 3)):
        await copied(images, source, name)
        await images.finish_import("blast", name, number)
    async with opened(root, backend) as fresh:
        found = await fresh.recover({("blast", 1)}, {("blast", "v2"), ("blast", "v3.part")})
        assert found == (["blast/v2", "blast/v3"], [], [])
        assert (await finished(fresh, "v3.part", 3)).ref == "blast/v3"
        assert await fresh.imports.whole("blast", "v2") is not None


# -- no room


async def test_an_import_without_room_says_so_and_stays(tmp_path):
    """First no room for the copy, on the node; then none in the store."""
    backend = MemoryBackend(1 << 20)
    async with opened(tmp_path / "state", backend) as images:
        await make(images, 1, files=SMALL)
        source = PLAIN | {"pages-1.img": os.urandom(2 << 20)}
        await copied(images, source, "v2")
        before = tree_of(tmp_path / "state/imports")
        with pytest.raises(NoRoom, match="blast/v2"):
            await images.finish_import("blast", "v2", 2)
        assert tree_of(tmp_path / "state/imports") == before
        assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
        assert await images.verify("blast", 1) == ""
        await images.imports.truncate_file("blast", "v2", "pages-1.img", 8192)
        assert (await finished(images, "v2", 2)).ref == "blast/v2"


async def test_a_copy_for_which_there_is_no_room_can_be_removed(small_disk):
    async with opened(small_disk / "state") as images:
        await make(images, 1, files=SMALL)
        source, before = await contents_of(images), tree_of(small_disk / "state")
        for pages in range(12):
            leave(small_disk, pages)
            try:
                await copied(images, source, "v2")
            except NoRoom as exc:
                assert "blast/v2" in exc.message
            await images.imports.remove("blast", "v2")
            await images.remove_app("other")
            (small_disk / "filler").unlink()
            now = tree_of(small_disk / "state")
            now.pop("imports/blast", None)
            assert now == before, pages


async def test_a_file_system_without_inodes_is_no_room_either(small_disk):
    async with opened(small_disk / "state") as images:
        await images.imports.begin("blast", "v1", ANNA, ANNA)
        with pytest.raises(NoRoom):
            for i in range(100):
                await images.imports.write_file("blast", "v1", f"core-{i}.img", 0, b"")
