"""Imports: directories that come to be images, copies of ours and what plain CRIU wrote."""

import os
import shutil

import pytest
import trio

from agent.images import Images
from agent.manifest import MANIFEST, Task
from krgfs.errors import BadWords, CannotRunHere, Damaged, Exists, Gone, NoRoom
from tests.unit.versions import ANNA, DUMPED, SMALL, copied, leave, make, tree_of


async def test_a_copy_of_an_image_is_complete_when_its_last_file_is_there(images, root):
    manifest = await make(images, 1, files=DUMPED | {"files/out": b"o"})
    source = root / "blast/v1"
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file())
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    for name in names:
        assert await images.imports.whole("blast", "v2") is None
        await images.imports.write_file("blast", "v2", name, 0, (source / name).read_bytes())
    assert await images.imports.whole("blast", "v2") == manifest
    finished = await images.imports.finish("blast", "v2", 2, manifest)
    assert finished.ref == "blast/v2"
    assert finished.copied_from == "blast/v1"
    assert await images.verify("blast", 2) == ""
    files = ("created", "node", "tree", "files", "logical_bytes", "stored_bytes")
    for field in files:
        assert getattr(finished, field) == getattr(manifest, field)


async def test_an_image_that_comes_home_is_what_it_was_to_the_byte(images, root, tmp_path):
    await make(images, 1, files=DUMPED | {"files/out": b"o"})
    before = tree_of(root / "blast/v1")
    shutil.copytree(root / "blast/v1", tmp_path / "backup")
    await images.remove("blast", 1)
    await copied(images, tmp_path / "backup", "v1.part")
    await images.imports.finish("blast", "v1.part", 1)
    assert tree_of(root / "blast/v1") == before


async def test_an_import_belongs_to_whom_it_was_begun_for(images, root):
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    await make(images, 1)
    await images.imports.begin("mine", "v1", 4321, 4322)
    for path in (root / "blast/v1").iterdir():
        await images.imports.write_file("mine", "v1", path.name, 0, path.read_bytes())
    manifest = await images.imports.finish("mine", "v1", 1)
    assert (manifest.uid, manifest.gid, manifest.copied_from) == (4321, 4322, "blast/v1")
    for _, uid, gid, _ in tree_of(root / "mine").values():
        assert (uid, gid) == (4321, 4322)


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
async def test_a_copy_that_does_not_match_is_refused_and_stays(images, root, file, data, words):
    await make(images, 1)
    await copied(images, root / "blast/v1", "v2.part", skip=[file])
    if data is not None:
        await images.imports.write_file("blast", "v2.part", file, 0, data)
    assert await images.imports.whole("blast", "v2.part") is None
    with pytest.raises(Damaged) as caught:
        await images.imports.finish("blast", "v2.part", 2)
    assert words in caught.value.message
    assert not (root / "blast/v2").exists()
    assert await images.files("blast", "v2.part")
    if file == "pstree.img":
        await images.imports.truncate_file("blast", "v2.part", file, 0) if data else None
        await images.imports.write_file("blast", "v2.part", file, 0, b"tree")
        assert (await images.imports.finish("blast", "v2.part", 2)).ref == "blast/v2"


async def test_a_file_changed_after_the_check_is_noticed(images, root):
    await make(images, 1)
    await copied(images, root / "blast/v1", "v2")
    manifest = await images.imports.whole("blast", "v2")
    await images.imports.write_file("blast", "v2", "pstree.img", 0, b"TREE")
    with pytest.raises(Damaged, match=r"pstree\.img has other contents"):
        await images.imports.finish("blast", "v2", 2, manifest)


async def test_a_copy_with_a_newer_manifest_is_refused_in_words(images):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    await images.imports.write_file("blast", "v2", MANIFEST, 0, b'{"format": 99}')
    assert await images.imports.whole("blast", "v2") is None
    with pytest.raises(CannotRunHere, match="format 99"):
        await images.imports.finish("blast", "v2", 2)


async def test_names_that_are_taken_are_refused(images, root):
    await make(images, 1)
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    for name in ("v1", "v2"):
        with pytest.raises(Exists, match=f"blast/{name}"):
            await images.imports.begin("blast", name, ANNA, ANNA)
    await copied(images, root / "blast/v1", "v3.part")
    with pytest.raises(Exists, match="blast/v1"):
        await images.imports.finish("blast", "v3.part", 1)


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
    assert tree_of(root / "blast") == {}
    with pytest.raises(Gone):
        await images.imports.write_file("blast", "v2", "x", 0, b"x")


async def test_imports_that_ended_are_forgotten(images, root):
    await make(images, 1)
    await copied(images, root / "blast/v1", "v2")
    await images.imports.finish("blast", "v2", 2)
    await copied(images, root / "blast/v1", "v3")
    await images.imports.remove("blast", "v3")
    with pytest.raises(Gone):
        await images.imports.write_file("blast", "v4", "x", 0, b"")
    assert images.imports._busy == {}


async def test_of_two_that_finish_at_once_one_does(images, root):
    await make(images, 1)
    await copied(images, root / "blast/v1", "v2")
    outcomes = []

    async def finish():
        try:
            outcomes.append((await images.imports.finish("blast", "v2", 2)).ref)
        except Gone:
            outcomes.append("gone")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        nursery.start_soon(finish)
    assert sorted(outcomes) == ["blast/v2", "gone"]


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


async def imported(images, files, name="v2.part"):
    await images.imports.begin("blast", name, ANNA, ANNA)
    for file, data in files.items():
        await images.imports.write_file("blast", name, file, 0, data)


async def test_a_plain_dump_gets_a_manifest_of_what_it_says_itself(images):
    await imported(images, PLAIN)
    assert await images.imports.whole("blast", "v2.part") is None
    manifest = await images.imports.finish("blast", "v2.part", 2)
    assert await images.manifest("blast", 2) == manifest
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


async def test_what_criu_really_wrote_is_understood(images):
    files = PLAIN | {"pstree.img": REAL_PSTREE}
    await imported(images, files)
    (task,) = (await images.imports.finish("blast", "v2.part", 2)).tree
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
    await imported(images, {**PLAIN, file: data} if data is not None else PLAIN)
    if data is None:
        await images.imports.remove_file("blast", "v2.part", file)
    before = tree_of(root)
    with pytest.raises(Damaged) as caught:
        await images.imports.finish("blast", "v2.part", 2)
    assert "cannot import blast/v2.part: it has no manifest.json" in caught.value.message
    assert words in caught.value.message
    assert tree_of(root) == before


# -- what a crash leaves


async def test_an_import_goes_on_under_the_next_agent(images, root):
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    fresh = await Images.open(root)
    await fresh.imports.write_file("blast", "v2", "x", 0, b"x")
    assert await fresh.read("blast", "v2", "x", 0, 9) == b"x"


async def test_an_import_that_was_published_and_not_recorded_is_one_again(images, root):
    await make(images, 1)
    for name, number in (("v2", 2), ("v3.part", 3)):
        await copied(images, root / "blast/v1", name)
        await images.imports.finish("blast", name, number)
    fresh = await Images.open(root)
    found = await fresh.recover({("blast", 1)}, {("blast", "v2"), ("blast", "v3.part")})
    assert found == ([], [], [])
    assert (await fresh.imports.finish("blast", "v3.part", 3)).ref == "blast/v3"
    assert await fresh.imports.whole("blast", "v2") is not None


# -- a full disk


async def test_an_import_without_room_says_so_and_can_be_removed(small_disk):
    images = await Images.open(small_disk / "store")
    await make(images, 1, files=SMALL)
    before = tree_of(small_disk / "store")
    for pages in range(12):
        leave(small_disk, pages)
        try:
            await copied(images, small_disk / "store/blast/v1", "v2")
            await images.imports.finish("blast", "v2", 2)
        except NoRoom as exc:
            assert "blast/v2" in exc.message
            await images.imports.remove("blast", "v2")
        else:
            await images.remove("blast", 2)
        (small_disk / "filler").unlink()
        assert tree_of(small_disk / "store") == before, pages


async def test_a_file_system_without_inodes_is_no_room_either(small_disk):
    images = await Images.open(small_disk / "store")
    await images.imports.begin("blast", "v1", ANNA, ANNA)
    with pytest.raises(NoRoom):
        for i in range(100):
            await images.imports.write_file("blast", "v1", f"core-{i}.img", 0, b"")
