"""Images as directories: dumps, damage, full disks and what a crash leaves."""

import errno
import os
import shutil
import stat
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from agent.durable import together
from agent.images import Images
from agent.manifest import MANIFEST, FileSum
from krgfs.errors import BadWords, Damaged, EngineFailed, Exists, Gone, KrgError, NoRoom
from krgfs.wire import MAX_DATA
from tests.unit.versions import ANNA, DUMPED, SMALL, fill, leave, make, manifest_of, tree_of

# -- spool, seal, publish


async def test_a_sealed_and_published_spool_is_a_version(images, root):
    manifest = await make(images, 3, node="n1", files=DUMPED | {"files/out.txt": b"deleted"})
    assert manifest.ref == "blast/v3"
    assert {path.name for path in (root / "blast").iterdir()} == {"v3"}
    assert await images.manifest("blast", 3) == manifest
    listed = {file.name: file.size for file in await images.files("blast", "v3")}
    assert listed.pop(MANIFEST) == (root / "blast/v3" / MANIFEST).stat().st_size
    assert listed == {
        **{name: len(data) for name, data in DUMPED.items()},
        "description": 1,
        "user_info.txt": 1,
        "files/out.txt": 7,
    }
    for name, size in listed.items():
        data = (root / "blast/v3" / name).read_bytes()
        assert manifest.files[name] == FileSum(size, blake3(data).hexdigest())
    assert manifest.logical_bytes == sum(listed.values())
    assert manifest.stored_bytes >= manifest.logical_bytes
    assert images.path("blast", 3) == str(root / "blast/v3")
    assert await images.verify("blast", 3) == ""


async def test_everything_belongs_to_the_owner_and_to_nobody_else(images, root):
    old = os.umask(0)
    async with images.spool(7, "blast") as spool:
        assert stat.S_IMODE(os.stat(spool.path).st_mode) == 0o700
        assert os.stat(spool.path).st_uid == os.geteuid()
        fill(spool.path, DUMPED | {"files/x": b"x"})
        await spool.seal(manifest_of())
        await spool.publish(1)
    os.umask(old)
    found = tree_of(root / "blast")
    assert len(found) == 9
    for name, (mode, uid, gid, data) in found.items():
        assert stat.S_IMODE(mode) == (0o700 if data is None else 0o600), name
        assert (uid, gid) == (ANNA, ANNA), name
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


async def test_a_root_that_was_open_to_others_is_closed(tmp_path):
    (tmp_path / "open").mkdir(0o755)
    await Images.open(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_spool_that_is_not_published_leaves_nothing(images, root, sealed):
    with pytest.raises(RuntimeError, match="criu"):
        async with images.spool(7, "blast") as spool:
            fill(spool.path, DUMPED | {"files/x": b""})
            if sealed:
                await spool.seal(manifest_of())
            raise RuntimeError("criu")
    assert tree_of(root / "blast") == {}


async def test_a_cancelled_spool_leaves_nothing(images, root):
    with trio.CancelScope() as scope:
        async with images.spool(7, "blast") as spool:
            fill(spool.path)
            scope.cancel()
            await spool.seal(manifest_of())
    assert scope.cancelled_caught
    assert tree_of(root / "blast") == {}


async def test_hashing_and_syncing_stop_soon_when_cancelled(images):
    async with images.spool(7, "blast") as spool:
        with (Path(spool.path) / "pages-1.img").open("wb") as file:
            file.truncate(64 << 30)  # would take many seconds to read
        started = time.monotonic()
        with trio.move_on_after(0.2):
            await spool.seal(manifest_of())
            pytest.fail("64 GiB were read in 0.2 s?")
    assert time.monotonic() - started < 1


async def test_a_job_that_has_a_spool_cannot_open_another(images, root):
    async with images.spool(7, "blast") as spool:
        fill(spool.path)
        with pytest.raises(EngineFailed):
            async with images.spool(7, "blast"):
                pass
        assert (Path(spool.path) / "pstree.img").exists()


async def test_publishing_under_another_number_corrects_the_manifest(images):
    async with images.spool(7, "blast") as spool:
        fill(spool.path)
        await spool.seal(manifest_of(version=1))
        manifest = await spool.publish(5)
    assert manifest.version == 5
    assert await images.manifest("blast", 5) == manifest
    assert await images.verify("blast", 5) == ""


async def test_a_version_is_never_overwritten(images, root):
    await make(images, 1)
    before = tree_of(root / "blast/v1")
    with pytest.raises(Exists, match="blast/v1"):
        await make(images, 1, files={"other": b""})
    (root / "blast/v2").mkdir()
    with pytest.raises(Exists):
        await make(images, 2)
    assert tree_of(root / "blast/v1") == before
    assert {path.name for path in (root / "blast").iterdir()} == {"v1", "v2"}


async def test_a_spool_must_be_sealed_before_it_is_published(images):
    async with images.spool(7, "blast") as spool:
        with pytest.raises(RuntimeError, match="sealed"):
            await spool.publish(1)


async def test_what_is_no_plain_file_is_not_sealed(images):
    for make_odd in (os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)):
        async with images.spool(7, "blast") as spool:
            make_odd(os.path.join(spool.path, "odd"))
            with pytest.raises(Damaged, match="odd"):
                await spool.seal(manifest_of())


async def test_work_that_fails_ends_what_is_done_beside_it():
    """Syncing and hashing go on at once: the disk fails one of them."""

    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def hash_for_ever():
        while True:
            time.sleep(0.01)
            trio.from_thread.check_cancelled()

    with pytest.raises(EngineFailed, match="cannot store blast/v1: Input/output error; see"):
        await together("cannot store blast/v1", trio.CapacityLimiter(2), hash_for_ever, fail)


async def test_everything_is_synced_before_the_name_is_durable(images, root, tmp_path, need):
    """Watched by strace: the order of fsync and rename."""
    need("strace")
    trace = tmp_path / "trace"
    async with images.spool(7, "blast") as spool:
        fill(spool.path)
        command = ["strace", "-f", "-y", "-o", trace, "-e", "trace=fsync,rename,write", "-p"]
        strace = await trio.lowlevel.open_process(
            [*command, str(os.getpid())], stderr=subprocess.PIPE
        )
        assert b"attached" in await strace.stderr.receive_some()
        await spool.seal(manifest_of())
        await spool.publish(1)
        strace.terminate()
        await strace.wait()
        await strace.stderr.aclose()
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    spooled = f"{root}/blast/.spool-7"
    renamed = next(i for i, call in enumerate(calls) if call.startswith(f'rename("{spooled}"'))
    written = next(i for i, call in enumerate(calls) if f"{spooled}/{MANIFEST}>" in call)

    def synced(path):
        """The last fsync of a path before the rename."""
        found = [
            i for i, call in enumerate(calls) if call.startswith("fsync(") and f"<{path}>" in call
        ]
        return max((i for i in found if i < renamed), default=None)

    for name in (*DUMPED, "description", "user_info.txt"):
        assert synced(f"{spooled}/{name}") < written, f"{name} before the manifest"
    assert written < synced(f"{spooled}/{MANIFEST}") < synced(spooled)
    assert calls[renamed + 1].startswith("fsync(")
    assert f"<{root}/blast>" in calls[renamed + 1]


# -- names and reading


BAD_NAMES = ["", ".", "..", "../x", "/x", "a/b", "files/..", "files/", "files/a/b", "files", "a\0b"]
BAD_NAMES += ["x" * 256, "\udcff"]


@pytest.mark.parametrize("file", BAD_NAMES)
async def test_a_name_cannot_lead_out_of_an_image(images, root, file):
    await make(images)
    (root / "blast/x").write_text("outside")
    await images.imports.begin("blast", "v2", ANNA, ANNA)
    with pytest.raises(BadWords):
        await images.read("blast", "v1", file, 0, 100)
    with pytest.raises(BadWords):
        await images.imports.write_file("blast", "v2", file, 0, b"x")
    with pytest.raises(BadWords):
        await images.imports.truncate_file("blast", "v2", file, 0)
    with pytest.raises(BadWords):
        await images.imports.remove_file("blast", "v2", file)
    assert (root / "blast/x").read_text() == "outside"


@pytest.mark.parametrize("app", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "x" * 200])
async def test_a_name_cannot_lead_out_of_the_store(images, app):
    for use in (
        lambda: images.files(app, "v1"),
        lambda: images.read(app, "v1", "x", 0, 1),
        lambda: images.manifest(app, 1),
        lambda: images.verify(app, 1),
        lambda: images.remove(app, 1),
        lambda: images.remove_app(app),
        lambda: images.imports.begin(app, "v1", ANNA, ANNA),
        lambda: images.spool(7, app).__aenter__(),
    ):
        with pytest.raises(BadWords):
            await use()


@pytest.mark.parametrize(
    "name", ["", "v0", "v", "vx", "v1.old", "../v1", "v1/..", ".spool-7", "v01"]
)
async def test_only_versions_and_imports_have_files(images, name):
    await make(images)
    with pytest.raises(BadWords, match="cannot be a version"):
        await images.files("blast", name)
    with pytest.raises(BadWords):
        await images.imports.begin("blast", name, ANNA, ANNA)


async def test_reading_gives_what_is_there_from_any_offset(images):
    await make(images)
    pages = DUMPED["pages-1.img"]
    assert await images.read("blast", "v1", "pages-1.img", 0, 10) == pages[:10]
    assert await images.read("blast", "v1", "pages-1.img", 1000, 300) == pages[1000:1300]
    assert await images.read("blast", "v1", "pages-1.img", len(pages) - 3, 10) == pages[-3:]
    assert await images.read("blast", "v1", "pages-1.img", len(pages), 10) == b""
    assert await images.read("blast", "v1", "empty.img", 0, 10) == b""
    with pytest.raises(BadWords):
        await images.read("blast", "v1", "pages-1.img", -1, 10)


async def test_one_read_gives_no_more_than_a_frame_holds(images):
    await make(images, files={"pages-1.img": bytes(MAX_DATA + 5)})
    assert len(await images.read("blast", "v1", "pages-1.img", 0, 1 << 40)) == MAX_DATA
    assert len(await images.read("blast", "v1", "pages-1.img", MAX_DATA, 1 << 40)) == 5


async def test_only_regular_files_are_read(images, root):
    await make(images)
    os.mkfifo(root / "blast/v1/fifo")
    os.symlink("/etc/passwd", root / "blast/v1/link")
    with pytest.raises(Gone, match="blast/v1/fifo"):
        await images.read("blast", "v1", "fifo", 0, 10)
    with pytest.raises(EngineFailed, match="blast/v1/link"):
        await images.read("blast", "v1", "link", 0, 10)


async def test_what_is_not_there_is_gone(images):
    await make(images)
    for use in (
        lambda: images.read("blast", "v1", "nothing", 0, 1),
        lambda: images.read("blast", "v2", "pstree.img", 0, 1),
        lambda: images.files("blast", "v2"),
        lambda: images.files("other", "v1"),
        lambda: images.manifest("blast", 2),
        lambda: images.imports.write_file("blast", "v2", "x", 0, b""),
        lambda: images.imports.write_file("blast", "v1", "x", 0, b""),
        lambda: images.imports.whole("blast", "v1"),
        lambda: images.imports.finish("blast", "v1", 1),
    ):
        with pytest.raises(Gone):
            await use()
    with pytest.raises(Gone):
        images.path("blast", 2)


# -- damage


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda v: (v / "pstree.img").unlink(), "pstree.img is missing"),
        (lambda v: (v / "pstree.img").write_bytes(b"trxe"), "pstree.img has other contents"),
        (lambda v: (v / "pstree.img").write_bytes(b"trees"), "pstree.img has 5 bytes, not 4"),
        (lambda v: (v / "extra.img").touch(), "extra.img is not in its manifest"),
        (lambda v: (v / "description").write_bytes(b"e"), "description has other contents"),
        (lambda v: (v / MANIFEST).unlink(), "blast/v1 has no manifest.json"),
        (lambda v: (v / MANIFEST).write_bytes(b"{}"), "the manifest of blast/v1 is damaged"),
        (lambda v: os.mkfifo(v / "odd"), "odd, which is no plain file"),
        (lambda v: shutil.rmtree(v), "is missing"),
    ],
)
async def test_damage_is_found_and_named(images, root, harm, words):
    await make(images)
    harm(root / "blast/v1")
    assert words in await images.verify("blast", 1)


async def test_a_flipped_bit_deep_in_the_pages_is_found(images, root):
    await make(images, files=DUMPED | {"pages-2.img": bytes(9 << 20)})
    with (root / "blast/v1/pages-2.img").open("r+b") as file:
        file.seek((8 << 20) + 5)
        file.write(b"\x01")
    found = await images.verify("blast", 1)
    assert found == "pages-2.img has other contents than it was made with"


async def test_a_version_in_the_place_of_another_is_found(images, root):
    await make(images, 1)
    (root / "blast/v1").rename(root / "blast/v2")
    assert "its manifest is that of blast/v1" in await images.verify("blast", 2)


async def test_many_damaged_files_make_one_sentence(images, root):
    await make(images, files={f"core-{i}.img": b"x" for i in range(9)})
    for i in range(9):
        (root / f"blast/v1/core-{i}.img").unlink()
    assert (await images.verify("blast", 1)).endswith("core-4.img is missing; and 4 more")


# -- removal


async def test_removing_leaves_nothing_and_may_be_repeated(images, root):
    await make(images, 1)
    await make(images, 2)
    await images.remove("blast", 1)
    await images.remove("blast", 1)
    assert {path.name for path in (root / "blast").iterdir()} == {"v2"}
    await images.remove_app("blast")
    assert (root / "blast/v2").is_dir()
    await images.remove("blast", 2)
    await images.remove_app("blast")
    await images.remove_app("blast")
    assert list(root.iterdir()) == []


async def test_a_version_is_out_of_sight_before_any_of_it_is_deleted(images, root, tmp_path):
    """While it is deleted, somebody looks all the time: either whole, or not there."""
    await make(images, files={f"core-{i}.img": b"x" for i in range(2000)})
    seen, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            with suppress(FileNotFoundError):
                found = len(os.listdir(root / "blast/v1"))
                os.stat(root / "blast/v1")  # else it went while it was being listed
                seen.add(found)

    watcher = threading.Thread(target=look)
    watcher.start()
    await images.remove("blast", 1)
    stop.set()
    watcher.join()
    assert seen <= {2003}


async def test_what_is_held_is_removed_when_the_last_lets_go(images, root):
    await make(images)
    async with images.held("blast", 1):
        async with images.held("blast", 1) as path:
            await images.remove("blast", 1)
            assert (Path(path) / "pstree.img").read_bytes() == b"tree"
            with pytest.raises(Gone):
                images.path("blast", 1)
        assert (Path(path) / "pstree.img").exists()
    assert tree_of(root / "blast") == {}


async def test_holding_alone_removes_nothing(images):
    await make(images)
    async with images.held("blast", 1):
        pass
    assert await images.verify("blast", 1) == ""


async def test_a_cancelled_holder_still_removes(images, root):
    await make(images)
    with trio.CancelScope() as scope:
        async with images.held("blast", 1):
            await images.remove("blast", 1)
            scope.cancel()
            await trio.sleep_forever()
    assert tree_of(root / "blast") == {}


# -- what a crash leaves


async def test_recovery_removes_what_was_not_finished_and_nothing_else(images, root):
    for version in (1, 2, 3, 4):
        await make(images, version)
    await images.imports.begin("blast", "v8", ANNA, ANNA)
    await images.imports.write_file("blast", "v8", "x", 0, b"x")
    await images.imports.begin("blast", "v9.part", ANNA, ANNA)
    kept = {name: tree_of(root / "blast" / name) for name in ("v1", "v4", ".import-v8")}
    for name in ("blast/.spool-7", "blast/.trash-v6-1", "other/.spool-8", "empty"):
        (root / name).mkdir(parents=True)
        (root / name / "x").touch()
    (root / "empty/x").unlink()
    fresh = await Images.open(root)
    found = await fresh.recover(
        known={("blast", 1), ("blast", 4), ("gone", 5)},
        imports={("blast", "v8"), ("gone", "v6")},
        unfinished={("blast", 2), ("blast", 4)},
    )
    assert sorted(found.removed) == [
        "blast/.import-v9.part",
        "blast/.spool-7",
        "blast/.trash-v6-1",
        "blast/v2",
        "other/.spool-8",
    ]
    assert found.unlisted == ["blast/.unlisted-v3"]
    assert found.missing == [("gone", 5)]
    assert {name: tree_of(root / "blast" / name) for name in kept} == kept
    assert {path.name for path in (root / "blast").iterdir()} == {*kept, ".unlisted-v3"}
    assert {path.name for path in root.iterdir()} == {"blast"}
    await fresh.imports.write_file("blast", "v8", "x", 1, b"y")
    assert await fresh.read("blast", "v8", "x", 0, 9) == b"xy"
    await fresh.imports.remove("gone", "v6")


async def test_recovery_spares_the_spool_of_a_dump_that_goes_on(images, root):
    for name in ("blast/.spool-7", "blast/.spool-70", "other/.spool-8"):
        (root / name).mkdir(parents=True)
    found = await images.recover(set(), set(), running={7})
    assert found.removed == ["blast/.spool-70", "other/.spool-8"]
    assert (root / "blast/.spool-7").is_dir()


async def test_a_lost_store_costs_no_image(images, root):
    await make(images, 1)
    before = tree_of(root / "blast/v1")
    for turn in ("", "~2", "~3"):
        found = await (await Images.open(root)).recover(set(), set())
        assert found.unlisted == [f"blast/.unlisted-v1{turn}"]
        assert tree_of(root / f"blast/.unlisted-v1{turn}") == before
        await make(images, 1)


async def test_recovery_of_an_empty_store_does_nothing(images):
    assert await images.recover(set(), set()) == ([], [], [])


# -- a full disk


async def test_a_checkpoint_without_room_leaves_nothing_at_any_byte(small_disk):
    images = await Images.open(small_disk / "store")
    await make(images, 1, files=SMALL)
    before = tree_of(small_disk / "store")
    refused = 0
    for pages in range(20):
        leave(small_disk, pages)
        try:
            await make(images, 2, files=SMALL)
        except NoRoom as exc:
            refused += 1
            assert "blast" in exc.message
            assert "rmdir /krg/images/APP/vN" in exc.message
        except OSError as exc:  # the dump itself, which is not ours here
            refused += 1
            assert exc.errno == errno.ENOSPC
        else:
            assert await images.verify("blast", 2) == ""
            await images.remove("blast", 2)
        (small_disk / "filler").unlink()
        assert tree_of(small_disk / "store") == before, pages
        assert await images.verify("blast", 1) == ""
    assert 3 < refused < 20


async def test_sealing_and_publishing_without_room_say_so(small_disk):
    images = await Images.open(small_disk / "store")
    async with images.spool(7, "blast") as spool:
        fill(spool.path, SMALL)
        leave(small_disk, 0)
        with pytest.raises(NoRoom, match="cannot store blast/v1: no room left"):
            await spool.seal(manifest_of())
        (small_disk / "filler").unlink()
        leave(small_disk, 2)
        with pytest.raises(NoRoom, match="cannot store blast/v1: no room left"):
            await spool.seal(manifest_of(desc="x" * 10_000))
        (small_disk / "filler").unlink()
        await spool.seal(manifest_of())
        await spool.publish(1)
    assert await images.verify("blast", 1) == ""


async def test_a_read_only_store_says_so(small_disk):
    images = await Images.open(small_disk / "store")
    await make(images, 1, files=SMALL)
    await trio.run_process(["mount", "-o", "remount,ro", small_disk])
    for use in (
        lambda: make(images, 2),
        lambda: images.remove("blast", 1),
        lambda: images.imports.begin("blast", "v3", ANNA, ANNA),
    ):
        with pytest.raises(EngineFailed, match=r"read-only; see dmesg") as caught:
            await use()
        assert isinstance(caught.value, KrgError)
    assert await images.verify("blast", 1) == ""


async def test_usage_is_what_the_filesystem_says(small_disk):
    images = await Images.open(small_disk / "store")
    before = await images.usage()
    assert (before.total, before.files) == (1 << 20, 64)
    (small_disk / "filler").write_bytes(bytes(100 * 4096))
    after = await images.usage()
    assert before.free - after.free == before.available - after.available == 100 * 4096
    assert before.files_free - after.files_free == 1
