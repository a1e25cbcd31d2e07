"""Images in a store: dumps, damage, full stores and what a crash leaves."""

import itertools
import os
import stat
from contextlib import closing
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from agent import manifest as manifests
from agent import versions
from agent.backend import MemoryBackend
from agent.backend_directory import DirectoryBackend
from agent.buffers import LEAST_BUFFERS
from agent.chunks import ChunkStore
from agent.images import Limits
from agent.manifest import MANIFEST, FileSum
from agent.recipe import Recipe, extents
from krgfs.errors import BadWords, Damaged, EngineFailed, Exists, Gone, NoRoom
from krgfs.wire import MAX_DATA
from tests.unit.versions import (
    ANNA,
    DUMPED,
    KEY,
    TEXTS,
    contents_of,
    fill,
    flip,
    leave,
    make,
    manifest_of,
    names_in,
    opened,
    place_of,
    tree_of,
)

TOLD = {name: text.encode() for name, text in TEXTS.items()}

# -- spool, seal, publish


async def test_a_sealed_and_published_spool_is_a_version(images, backend):
    manifest = await make(images, 3, node="n1", files=DUMPED | {"files/out.txt": b"deleted"})
    assert (manifest.ref, manifest.node) == ("blast/v3", "n1")
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v3"]
    image = await images.opened("blast", 3)
    assert image.manifest == manifest
    expected = DUMPED | TOLD | {"files/out.txt": b"deleted"}
    assert image.sizes == {name: len(data) for name, data in expected.items()}
    assert manifest.files == {name: FileSum(len(data)) for name, data in expected.items()}
    assert set(image.small) == expected.keys() - {"pages-1.img"}
    assert manifest.logical_bytes == sum(map(len, expected.values()))
    assert 0 < manifest.new_bytes == manifest.stored_bytes < manifest.logical_bytes
    assert await images.check(image) == await images.verify("blast", 3) == ""


async def test_an_image_is_kept_by_any_back_end(tmp_path):
    store = DirectoryBackend(str(tmp_path / "store"))
    async with opened(tmp_path / "a", store) as images:
        await make(images)
    async with opened(tmp_path / "b", store) as fresh:
        assert await fresh.verify("blast", 1) == ""
        found = await contents_of(fresh)
        assert found.keys() == DUMPED.keys() | TOLD.keys() | {MANIFEST}
        assert {name: found[name] for name in DUMPED} == DUMPED


async def test_a_second_version_of_the_same_memory_costs_next_to_nothing(images):
    dumped = DUMPED | {"pages-1.img": os.urandom(3 << 20)}
    first = await make(images, 1, files=dumped)
    second = await make(images, 2, files=dumped)
    assert first.new_bytes > 3 << 20
    assert second.new_bytes == 0
    assert second.stored_bytes == first.stored_bytes


async def test_what_a_dump_needs_on_this_node_is_the_agents_own(images, root):
    old = os.umask(0)
    async with images.spool("blast", 7, 0) as spool:
        facts = os.stat(spool.path)
        assert (stat.S_IMODE(facts.st_mode), facts.st_uid) == (0o700, os.geteuid())
        assert os.path.dirname(spool.path) == str(root / "spool")
        fill(spool.path)
        await spool.load("blast/v1")
        await spool.seal(manifest_of())
        await spool.publish(1)
    os.umask(old)
    for name, (mode, uid, _, data) in tree_of(root).items():
        assert stat.S_IMODE(mode) == (0o700 if data is None else 0o600), name
        assert uid == os.geteuid(), name


async def test_directories_that_were_open_to_others_are_closed(tmp_path):
    (tmp_path / "open/spool").mkdir(parents=True, mode=0o755)
    async with opened(tmp_path / "open"):
        assert stat.S_IMODE((tmp_path / "open/spool").stat().st_mode) == 0o700


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_spool_that_is_not_published_leaves_nothing(images, root, backend, sealed):
    with pytest.raises(RuntimeError, match="criu"):
        async with images.spool("blast", 7, 0) as spool:
            fill(spool.path, DUMPED | {"files/x": b""})
            await spool.load("blast/v1")
            if sealed:
                await spool.seal(manifest_of())
            raise RuntimeError("criu")
    assert list((root / "spool").iterdir()) == []
    assert names_in(backend, "manifests/") == names_in(backend, "sessions/") == []


async def test_a_spool_is_gone_after_it_was_published_too(images, root, backend):
    await make(images)
    assert list((root / "spool").iterdir()) == []
    assert names_in(backend, "sessions/") == []


async def test_a_cancelled_spool_leaves_nothing(images, root, backend):
    with trio.CancelScope() as scope:
        async with images.spool("blast", 7, 0) as spool:
            fill(spool.path)
            await spool.load("blast/v1")
            scope.cancel()
            await spool.seal(manifest_of())
    assert scope.cancelled_caught
    assert list((root / "spool").iterdir()) == []
    assert names_in(backend, "manifests/") == names_in(backend, "sessions/") == []


async def test_a_job_that_has_a_spool_cannot_open_another(images):
    async with images.spool("blast", 7, 0) as spool:
        fill(spool.path)
        with pytest.raises(EngineFailed):
            async with images.spool("blast", 7, 0):
                pass
        assert (Path(spool.path) / "pstree.img").exists()


async def test_publishing_under_another_number_corrects_the_manifest(images):
    async with images.spool("blast", 7, 0) as spool:
        fill(spool.path)
        await spool.load("blast/v1")
        sealed = await spool.seal(manifest_of(version=1))
        manifest = await spool.publish(5)
    assert (sealed.version, manifest.version) == (1, 5)
    assert (sealed.files, sealed.recipe) == (manifest.files, manifest.recipe)
    assert (await images.opened("blast", 5)).manifest == manifest
    assert await images.verify("blast", 5) == ""


async def test_a_version_is_never_overwritten(images, backend):
    await make(images, 1)
    before = backend.read(f"{KEY}/blast/v1")
    with pytest.raises(Exists, match="blast/v1"):
        await make(images, 1, files={"other": b""})
    assert backend.read(f"{KEY}/blast/v1") == before
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]


async def test_a_spool_must_be_sealed_before_it_is_published(images):
    async with images.spool("blast", 7, 0) as spool:
        with pytest.raises(RuntimeError, match="sealed"):
            await spool.publish(1)


async def test_what_is_no_plain_file_is_not_sealed(images):
    for make_odd in (os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)):
        async with images.spool("blast", 7, 0) as spool:
            make_odd(os.path.join(spool.path, "odd"))
            with pytest.raises(Damaged, match="odd"):
                await spool.seal(manifest_of())


async def test_images_of_other_nodes_are_not_in_the_way(tmp_path, backend):
    async with opened(tmp_path / "a", backend) as images:
        await make(images)
        backend.put("manifests/n2/blast/v2", b"theirs")
        assert await images.recover({("blast", 1)}, set()) == ([], [], [])
        await images.remove("blast", 2)
        assert backend.read("manifests/n2/blast/v2") == b"theirs"


async def test_a_lost_table_of_pages_only_costs_room(images, root):
    dumped = {"pages-1.img": os.urandom(1 << 20)}
    await make(images, 1, files=dumped)
    (root / "pages/blast").write_bytes(b"nonsense")
    assert (await make(images, 2, files=dumped)).new_bytes == 0
    (root / "pages/blast").unlink()
    assert (await make(images, 3, files=dumped)).new_bytes == 0
    assert await images.verify("blast", 1) == ""


async def test_dumps_take_their_memory_from_one_store_of_it(tmp_path):
    """Streamed, as the limit does not let all of it be held; and two of them at once."""
    dumped = {f"pages-{i}.img": os.urandom(6 << 20) for i in range(1, 5)}
    async with opened(tmp_path / "state", limits=Limits(memory_bytes=1)) as images:

        async def dump(app):
            await make(images, 1, app, files=dumped)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dump, "one")
            nursery.start_soon(dump, "two")
        for app in ("one", "two"):
            found = await contents_of(images, app=app)
            assert {name: found[name] for name in dumped} == dumped


# -- names and reading


BAD_NAMES = ["", ".", "..", "../x", "/x", "a/b", "files/..", "files/", "files/a/b", "files", "a\0b"]
BAD_NAMES += ["x" * 256, "\udcff"]


@pytest.mark.parametrize("file", BAD_NAMES)
async def test_a_name_cannot_lead_out_of_an_image(images, root, file):
    await make(images)
    (root / "imports/blast").mkdir()
    (root / "imports/blast/x").write_text("outside")
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    with pytest.raises(Gone):
        await images.read("blast", "v1", file, 0, 100)
    with pytest.raises(BadWords):
        await images.read("blast", "v2", file, 0, 100)
    with pytest.raises(BadWords):
        await images.imports.write_file("blast", "v2", file, 0, b"x")
    with pytest.raises(BadWords):
        await images.imports.truncate_file("blast", "v2", file, 0)
    with pytest.raises(BadWords):
        await images.imports.remove_file("blast", "v2", file)
    assert (root / "imports/blast/x").read_text() == "outside"


@pytest.mark.parametrize("app", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "x" * 200])
async def test_a_name_cannot_lead_out_of_the_store(images, root, app):
    before = tree_of(root)
    for use in (
        lambda: images.files(app, "v1"),
        lambda: images.read(app, "v1", "x", 0, 1),
        lambda: images.opened(app, 1),
        lambda: images.verify(app, 1),
        lambda: images.remove(app, 1),
        lambda: images.remove_app(app),
        lambda: images.finish_import(app, "v1", 1),
        lambda: images.imports.begin(app, "v1", ANNA, ANNA),
        lambda: images.spool(app, 7, 0).__aenter__(),
    ):
        with pytest.raises(BadWords):
            await use()
    assert tree_of(root) == before


@pytest.mark.parametrize(
    "name", ["", "v0", "v", "vx", "v1.old", "../v1", "v1/..", ".spool-7", "v01"]
)
async def test_only_versions_and_imports_have_files(images, name):
    await make(images)
    for use in (
        lambda: images.files("blast", name),
        lambda: images.read("blast", name, "pstree.img", 0, 1),
        lambda: images.imports.begin("blast", name, ANNA, ANNA),
        lambda: images.finish_import("blast", name, 2),
    ):
        with pytest.raises(BadWords, match="cannot be a version"):
            await use()


async def test_reading_gives_what_is_there_from_any_offset(images):
    await make(images)
    pages = DUMPED["pages-1.img"]
    assert await images.read("blast", "v1", "pages-1.img", 0, 10) == pages[:10]
    assert await images.read("blast", "v1", "pages-1.img", 1000, 300) == pages[1000:1300]
    assert await images.read("blast", "v1", "pages-1.img", len(pages) - 3, 10) == pages[-3:]
    assert await images.read("blast", "v1", "pages-1.img", len(pages), 10) == b""
    assert await images.read("blast", "v1", "pages-1.img", len(pages) + 5, 10) == b""
    assert await images.read("blast", "v1", "empty.img", 0, 10) == b""
    assert await images.read("blast", "v1", "description", 0, 10) == b"d"
    for offset, size in ((-1, 10), (0, -1)):
        with pytest.raises(BadWords):
            await images.read("blast", "v1", "pages-1.img", offset, size)


async def test_one_read_gives_no_more_than_a_frame_holds(images):
    await make(images, files={"ghost-file-1.img": os.urandom(MAX_DATA + 5)})
    assert len(await images.read("blast", "v1", "ghost-file-1.img", 0, 1 << 40)) == MAX_DATA
    assert len(await images.read("blast", "v1", "ghost-file-1.img", MAX_DATA, 1 << 40)) == 5


async def test_the_sizes_of_files_are_those_that_reading_gives(images):
    await make(images, 1, files=DUMPED | {"files/x": b"x", "ghost-file-1.img": os.urandom(70_000)})
    await make(images, 2, desc="µ" * 100, cwd=os.fsdecode(b"/home/\xff"))
    for name in ("v1", "v2"):
        listed = await images.files("blast", name)
        assert [each.name for each in listed] == sorted(each.name for each in listed)
        found = await contents_of(images, name, step=65_537)
        assert {each.name: each.size for each in listed} == {n: len(d) for n, d in found.items()}


async def test_what_files_take_adds_up_to_what_the_image_takes(images):
    noise = os.urandom(1 << 20)
    dumped = {"pages-1.img": noise, "pages-2.img": noise + bytes(1 << 20), "core-1.img": b"c" * 999}
    manifest = await make(images, files=dumped)
    stored = {each.name: each.stored_bytes for each in await images.files("blast", "v1")}
    taken = sum(stored[name] for name in manifest.files)
    assert manifest.stored_bytes - len(stored) <= taken <= manifest.stored_bytes
    assert abs(stored["pages-1.img"] - stored["pages-2.img"]) <= 1, "they share all that they have"


async def test_the_manifest_of_a_copy_has_the_hashes_of_its_bytes(images):
    manifest = await make(images, files=DUMPED | {"files/x": b"x", "ghost-file-1.img": b"g" * 9999})
    for _ in range(2):  # hashed, and kept
        found = await contents_of(images)
        read = manifests.decode(found.pop(MANIFEST), "the copy")
        assert read.files == {n: FileSum(len(d), blake3(d).hexdigest()) for n, d in found.items()}
        facts = ("app", "version", "created", "tree", "logical_bytes", "stored_bytes")
        assert all(getattr(read, each) == getattr(manifest, each) for each in facts)


@pytest.mark.parametrize("kept", [b"", b"{}", b'["another", {}]', b"\xff"])
async def test_hashes_that_were_lost_are_made_again(images, backend, kept):
    await make(images)
    before = await images.read("blast", "v1", MANIFEST, 0, 1 << 20)
    (name,) = names_in(backend, "sums/")
    backend.put(name, kept, replace=True)
    assert await images.read("blast", "v1", MANIFEST, 0, 1 << 20) == before


async def test_hashes_of_a_removed_version_do_not_serve_the_next(images, backend):
    await make(images, 1)
    await contents_of(images)
    await images.remove("blast", 1)
    assert names_in(backend, "sums/") == names_in(backend, "manifests/") == []
    await make(images, 1, files=DUMPED | {"pstree.img": b"eert"})
    found = await contents_of(images)
    read = manifests.decode(found[MANIFEST], "the copy")
    assert read.files["pstree.img"].blake3 == blake3(b"eert").hexdigest()


async def test_small_files_are_unpacked_where_they_were(images, tmp_path):
    await make(images, files=DUMPED | {"files/x": b"x" * 3_000_000})
    (tmp_path / "out").mkdir()
    await images.unpacked(await images.opened("blast", 1), str(tmp_path / "out"))
    found = tree_of(tmp_path / "out")
    assert found.keys() == {"description", "user_info.txt", "pstree.img", "empty.img"} | {
        "files",
        "files/x",
    }
    assert found["files/x"][3] == b"x" * 3_000_000 and found["pstree.img"][3] == b"tree"


async def test_what_is_not_there_is_gone(images):
    await make(images)
    for use in (
        lambda: images.read("blast", "v1", "nothing", 0, 1),
        lambda: images.read("blast", "v2", "pstree.img", 0, 1),
        lambda: images.read("blast", "v2.part", "pstree.img", 0, 1),
        lambda: images.files("blast", "v2"),
        lambda: images.files("blast", "v2.part"),
        lambda: images.files("other", "v1"),
        lambda: images.opened("blast", 2),
        lambda: images.imports.write_file("blast", "v2", "x", 0, b""),
        lambda: images.imports.write_file("blast", "v1", "x", 0, b""),
        lambda: images.imports.whole("blast", "v1"),
        lambda: images.finish_import("blast", "v1", 1),
    ):
        with pytest.raises(Gone):
            await use()
    assert await images.verify("blast", 2) == "it is not in the store"


# -- damage


async def damaged(images, backend, file="pages-1.img"):
    """Change a byte of the last chunk of a file, and return the beginning of its id."""
    image = await images.opened("blast", 1)
    id = image.recipe.chunks[image.recipe.chunks_of(file)[-1]]
    pack, offset = place_of(images, id)
    flip(backend, pack, offset + 5)
    return id.hex()[:16]


async def test_damage_is_found_and_named_with_file_and_chunk(images, backend):
    dumped = {"pages-1.img": os.urandom(9 << 20), "pages-2.img": os.urandom(8192)}
    await make(images, files=DUMPED | dumped)
    chunk = await damaged(images, backend)
    words = f"pages-1.img is damaged (1 chunks, among them {chunk})"
    assert await images.verify("blast", 1) == words
    assert await images.check(await images.opened("blast", 1)) == words
    with pytest.raises(Damaged, match=chunk):
        await images.read("blast", "v1", "pages-1.img", (9 << 20) - 5, 5)
    assert await images.read("blast", "v1", "pages-1.img", 0, 5) == dumped["pages-1.img"][:5]
    assert await images.read("blast", "v1", "pages-2.img", 0, 8192) == dumped["pages-2.img"]


async def test_a_small_file_on_a_damaged_chunk_is_not_unpacked(images, backend, tmp_path):
    await make(images)
    await damaged(images, backend, "pstree.img")
    found = await images.verify("blast", 1)
    assert "pstree.img is damaged (1 chunks" in found and "user_info.txt is damaged" in found
    with pytest.raises(Damaged):
        await images.unpacked(await images.opened("blast", 1), str(tmp_path))


async def test_what_has_come_back_is_read_again(images, backend):
    await make(images, files={"pages-1.img": os.urandom(8192)})
    await damaged(images, backend)
    with pytest.raises(Damaged):
        await images.read("blast", "v1", "pages-1.img", 0, 5)
    await damaged(images, backend)  # the bit turns back
    assert len(await images.read("blast", "v1", "pages-1.img", 0, 5)) == 5
    assert await images.verify("blast", 1) == ""


async def test_a_lost_pack_is_told_of_every_file(images, backend):
    await make(images)
    for name in names_in(backend, "packs/"):
        backend.delete(name)
    found = await images.verify("blast", 1)
    for name in ("description", "pages-1.img", "pstree.img", "user_info.txt"):
        assert f"{name} is damaged" in found
    async with opened(Path(images.places.root), backend) as fresh:
        image = await fresh.opened("blast", 1)
        assert await fresh.check(image) == found
        listed = {each.name: each.size for each in await fresh.files("blast", "v1")}
        assert listed["pages-1.img"] == len(DUMPED["pages-1.img"])


async def test_a_damaged_record_is_told(tmp_path, images, backend):
    await make(images)
    flip(backend, f"{KEY}/blast/v1", 100)
    assert "the record of blast/v1 in the store is damaged" in await images.verify("blast", 1)
    with pytest.raises(Damaged, match="the record of blast/v1"):
        await images.opened("blast", 1)


async def test_a_version_in_the_place_of_another_is_found(images, backend):
    await make(images, 1)
    backend.put(f"{KEY}/blast/v2", backend.read(f"{KEY}/blast/v1"))
    assert "its manifest is that of blast/v1" in await images.verify("blast", 2)
    assert await images.verify("blast", 1) == ""


async def test_many_damaged_files_make_one_sentence(images, backend):
    await make(images, files={f"core-{i}.img": b"x" for i in range(9)})
    await damaged(images, backend, "core-1.img")
    found = await images.verify("blast", 1)
    assert found.startswith("core-0.img is damaged (") and found.endswith("; and 6 more")


async def test_an_image_that_names_what_is_not_there_is_damaged(images, backend):
    recipe = Recipe([bytes(32)], {"pages-1.img": extents([0], [0], [4096])})
    data, _ = versions.encode(manifest_of(), recipe)
    backend.put(f"{KEY}/blast/v1", data)
    assert "pages-1.img is damaged (1 chunks, among them 00000000" in await images.verify(
        "blast", 1
    )


# -- removal


async def test_removing_leaves_no_trace_but_chunks_and_may_be_repeated(images, root, backend):
    await make(images, 1)
    await make(images, 2)
    await images.remove("blast", 1)
    await images.remove("blast", 1)
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v2"]
    assert await images.verify("blast", 2) == ""
    await images.remove("blast", 2)
    await images.remove_app("blast")
    await images.remove_app("blast")
    assert names_in(backend, "manifests/") == []
    assert list((root / "pages").iterdir()) == []


async def test_an_app_with_imports_keeps_them(images, root):
    await make(images, 1)
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    await images.remove("blast", 1)
    await images.remove_app("blast")
    assert (root / "imports/blast/v2").is_dir()


async def test_who_reads_what_is_removed_reads_on(images):
    await make(images)
    image = await images.opened("blast", 1)
    await images.remove("blast", 1)
    pieces = image.source.pieces("pages-1.img")
    read = []
    for piece in pieces:
        read.append(bytes(piece.data))
        piece.give_back()
    assert b"".join(read) == DUMPED["pages-1.img"]
    with pytest.raises(Gone):
        await images.opened("blast", 1)


# -- what a crash leaves


async def test_recovery_removes_what_was_not_finished_and_nothing_else(images, root, backend):
    for version in (1, 2, 3, 4, 6):
        await make(images, version)
    await images.imports.begin("blast", "v6.part", ANNA, ANNA)
    await images.imports.begin("blast", "v8", ANNA, ANNA)
    await images.imports.write_file("blast", "v8", "x", 0, b"x")
    await images.imports.begin("blast", "v9.part", ANNA, ANNA)
    await images.imports.begin("other", "v1", ANNA, ANNA)
    for name in ("7", "7.work", "8"):
        (root / "spool" / name).mkdir()
        (root / "spool" / name / "x").touch()
    kept = tree_of(root / "imports/blast/v8")
    unlisted = backend.read(f"{KEY}/blast/v3")
    async with opened(root, backend) as fresh:
        found = await fresh.recover(
            known={("blast", 1), ("blast", 4), ("gone", 5)},
            imports={("blast", "v8"), ("blast", "v6.part"), ("gone", "v6")},
            unfinished={("blast", 2), ("blast", 4)},
        )
        assert sorted(found.removed) == [
            "blast/v2",
            "blast/v6",
            "blast/v9.part",
            "other/v1",
            "spool/7",
            "spool/7.work",
            "spool/8",
        ]
        (aside,) = found.unlisted
        assert aside.startswith(f"{KEY}/blast/v3~unlisted.")
        assert backend.read(aside) == unlisted
        assert found.missing == [("gone", 5)]
        assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1", aside, f"{KEY}/blast/v4"]
        assert list((root / "spool").iterdir()) == []
        assert tree_of(root / "imports/blast/v8") == kept
        assert {path.name for path in (root / "imports").iterdir()} == {"blast"}
        await fresh.imports.write_file("blast", "v8", "x", 1, b"y")
        assert await fresh.read("blast", "v8", "x", 0, 9) == b"xy"
        assert (await make(fresh, 3)).ref == "blast/v3"
        assert await fresh.verify("blast", 1) == await fresh.verify("blast", 4) == ""


async def test_recovery_spares_the_spool_of_a_dump_that_goes_on(images, root):
    for name in ("7", "7.work", "70", "8.work"):
        (root / "spool" / name).mkdir()
    found = await images.recover(set(), set(), running={7})
    assert found.removed == ["spool/70", "spool/8.work"]
    assert {path.name for path in (root / "spool").iterdir()} == {"7", "7.work"}


async def test_lost_records_cost_no_image(images, root, backend):
    """Not even when they are lost again and again; what such images need is kept by sweeps."""
    kept = {}
    for turn in range(3):
        await make(images, 1, files=DUMPED | {"pages-1.img": os.urandom(4096)}, desc=str(turn))
        data = backend.read(f"{KEY}/blast/v1")
        async with opened(root, backend) as fresh:
            (aside,) = (await fresh.recover(set(), set())).unlisted
        kept[aside] = data
        assert {name: backend.read(name) for name in names_in(backend, "manifests/")} == kept
    assert len(kept) == 3
    for data in kept.values():
        for id in versions.named(data):
            assert ChunkStore.open(backend).read(id)


async def test_recovery_of_an_empty_store_does_nothing(images):
    assert await images.recover(set(), set()) == ([], [], [])


# -- a full store


async def test_a_checkpoint_without_room_publishes_nothing_at_any_byte(tmp_path):
    dumped = {"pstree.img": b"tree", "pages-1.img": os.urandom(1 << 20)}
    before = MemoryBackend()
    async with opened(tmp_path / "state", before) as images:
        await make(images, 1, files={"pages-1.img": os.urandom(1 << 20)})
    used = (1 << 40) - before.room().free
    refused = 0
    for room in [0, 10, 100, 1000, *range(10_000, 1_200_000, 100_000), 1_049_500, 1_049_900]:
        backend = MemoryBackend(used + room)
        for name in names_in(before):
            backend.put(name, before.read(name))
        async with opened(tmp_path / "state", backend) as images:
            try:
                await make(images, 2, files=dumped)
            except NoRoom as exc:
                refused += 1
                assert "blast" in exc.message
                assert "rmdir /krg/images/APP/vN" in exc.message
                assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
            else:
                assert await images.verify("blast", 2) == ""
            assert await images.verify("blast", 1) == ""
            assert names_in(backend, "sessions/") == []
            assert list((tmp_path / "state/spool").iterdir()) == []
    assert refused > 5 and room > 1_000_000


async def test_a_dump_after_one_that_found_no_room_has_all_of_its_memory(tmp_path):
    """Buffers that a failed dump kept would be missing for ever."""
    backend = MemoryBackend(30 << 20)
    backend.put("filler", bytes(26 << 20))
    dumped = {"pages-1.img": os.urandom(20 << 20)}
    async with opened(tmp_path / "state", backend, Limits(memory_bytes=1)) as images:
        for _ in range(LEAST_BUFFERS + 1):
            with pytest.raises(NoRoom):
                await make(images, 1, files=dumped)
        backend.delete("filler")
        await make(images, 1, files=dumped)
        assert await images.verify("blast", 1) == ""


async def test_a_directory_without_room_says_so(small_disk, tmp_path):
    refused, dumped = 0, {"pages-1.img": os.urandom(100 << 10)}
    with closing(DirectoryBackend(str(small_disk / "store"))) as backend:
        async with opened(tmp_path / "state", backend) as images:
            await make(images, 1, files={"pages-1.img": os.urandom(100 << 10)})
            for pages in itertools.count(0, 3):
                leave(small_disk, pages)
                try:
                    await make(images, 2, files=dumped)
                except NoRoom as exc:
                    refused += 1
                    assert "blast" in exc.message
                    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
                else:
                    break
                finally:
                    (small_disk / "filler").unlink()
                    assert await images.verify("blast", 1) == ""
            assert await images.verify("blast", 2) == ""
    assert 3 < refused < 15


async def test_usage_is_what_the_back_end_says(tmp_path):
    async with opened(tmp_path / "state", MemoryBackend(10 << 20)) as images:
        before = await images.usage()
        await make(images, 1, files={"pages-1.img": os.urandom(1 << 20)})
        after = await images.usage()
        assert before.total == after.total == 10 << 20
        assert 1 << 20 < before.free - after.free < 1.1 * (1 << 20)
