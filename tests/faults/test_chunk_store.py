"""The image store in a real directory: writers that are killed, that meet, and whose disk is full;
packs that are cut short."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from agent import packs
from agent.backend_directory import DirectoryBackend
from agent.chunks import ChunkStore
from agent.sweep import sweep, verify
from krgfs.errors import Damaged

ROOT = Path(__file__).parents[2]
PACK_BYTES = 200_000
ROUNDS = 40
LONGEST_S = 0.25
SMALL_MIB = 4


def open_store(root: Path, **options: float) -> ChunkStore:
    return ChunkStore.open(DirectoryBackend(str(root)), pack_bytes=PACK_BYTES, **options)


def contents(image: str) -> list[bytes]:
    """Return what the image of this name is made of: a part that all have, and parts of its own."""
    common, own = random.Random("common"), random.Random(image)
    raws = [common.randbytes(30_000) for _ in range(4)]
    raws += [own.randbytes(own.randrange(60_000)) for _ in range(6)]
    return [*raws, f"{image} again and again ".encode() * 2000]


def manifest(ids: list[bytes]) -> bytes:
    body = b"".join(ids)
    return body + blake3(body).digest()


def named(data: bytes) -> list[bytes]:
    if blake3(data[:-32]).digest() != data[-32:]:
        raise Damaged("the manifest is damaged")
    return [data[at : at + 32] for at in range(0, len(data) - 32, 32)]


def write(store: ChunkStore, image: str) -> None:
    with store.session() as session:
        ids = [session.add(raw[:100], raw[100:]) for raw in contents(image)]
        session.flush()
        session.publish(image, manifest(ids))


def writer(root: str, name: str, count: str) -> None:
    """Write images, and say before and after each what is promised: the child of these tests."""
    store = open_store(Path(root))
    for number in range(int(count)):
        print(f"begins {name}/v{number}", flush=True)
        write(store, f"{name}/v{number}")
        print(f"published {name}/v{number}", flush=True)


def start(root: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.test_chunk_store", str(root), name, str(count)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def is_sound(root: Path, promised: set[str]) -> None:
    """Assert that the store opens, verifies, and has the images that were promised, all of them
    right to the last byte."""
    store = open_store(root)
    report = verify(store, named)
    assert report.is_sound, report
    there = {entry.name.removeprefix("manifests/") for entry in store.backend.list("manifests/")}
    assert promised <= there
    for image in there:
        ids = named(store.backend.read(f"manifests/{image}"))
        assert [store.read(id) for id in ids] == contents(image)
    store.backend.close()


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_moment_breaks_no_promise(tmp_path: Path) -> None:
    chance = random.Random(1)
    promised: set[str] = set()
    cut_off = after = 0
    for number in range(ROUNDS):
        with start(tmp_path, f"app{number}", 1000) as child:
            assert child.stdout is not None
            said = [child.stdout.readline()]
            time.sleep(chance.uniform(0, LONGEST_S))
            os.killpg(child.pid, signal.SIGKILL)
            said += child.stdout.read().splitlines()
        published = {line.split()[1] for line in said if line.startswith("published ")}
        cut_off += len([line for line in said if line.startswith("begins ")]) > len(published)
        after += bool(published)
        promised |= published
        if number % 8 == 7:
            is_sound(tmp_path, promised)
    assert cut_off > ROUNDS / 2 and after > ROUNDS / 4, (cut_off, after)
    is_sound(tmp_path, promised)
    _goes_when_swept(tmp_path)


def _goes_when_swept(root: Path) -> None:
    """Assert that of what the dead left nothing stays that is not mostly needed."""
    store = open_store(root, grace_s=1)
    assert store.backend.list("sessions/")
    for entry in store.backend.list("manifests/")[::2]:
        store.backend.delete(entry.name)
    for _ in range(3):
        time.sleep(1.2)
        swept = sweep(store, named)
    assert not swept.waiting and not swept.kept
    is_sound(root, set())
    assert store.backend.list("sessions/") == store.backend.list("condemned/") == []
    needed = {
        id
        for entry in store.backend.list("manifests/")
        for id in named(store.backend.read(entry.name))
    }
    assert store.index.rows()["stored"].sum() <= 2 * store.stored(needed).sum()
    store.backend.close()


def test_two_who_write_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with start(tmp_path, "one", 25) as one, start(tmp_path, "two", 25) as two:
        said = "".join(child.communicate(timeout=60)[0] for child in (one, two))
    assert one.returncode == two.returncode == 0
    promised = {line.split()[1] for line in said.splitlines() if line.startswith("published ")}
    assert len(promised) == 50
    is_sound(tmp_path, promised)


def test_a_pack_that_is_cut_costs_its_own_chunks_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ids = []
    for raws in ([b"1" * 5000, os.urandom(5000), b""], [os.urandom(500)]):
        with store.session() as session:
            ids += [session.add(raw) for raw in raws]
            session.flush()
            session.publish(f"app/v{len(raws)}", manifest(ids[-len(raws) :]))
    path = tmp_path / store.index.places(ids[0])[0].pack
    whole = path.read_bytes()
    edges = [0, len(packs.MAGIC), *(store.index.places(id)[0].offset for id in ids[:3])]
    edges += [len(whole) - packs.TRAILER.size, len(whole) - packs.TRAILER.size - 171, len(whole)]
    for size in sorted({edge + by for edge in edges for by in (-1, 0, 1)} & set(range(len(whole)))):
        path.write_bytes(whole[:size])
        with contextlib.suppress(Damaged):  # it knew the pack when it was whole
            assert store.read(ids[0]) == b"1" * 5000
        fresh = open_store(tmp_path)
        report = verify(fresh, named)
        assert [name for name, _ in report.bad_objects] == [str(path.relative_to(tmp_path))]
        assert report.lacking == (("manifests/app/v3", tuple(ids[:3])),)
        assert fresh.check(ids) == ids[:3] and len(fresh.read(ids[3])) == 500
        with pytest.raises(Damaged, match=ids[0][:8].hex()):
            fresh.read(ids[0])
        fresh.backend.close()
    store.backend.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "krg-test", str(tmp_path)]
    subprocess.run(mount, check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False, capture_output=True)


def test_a_full_disk_costs_the_writer_and_nothing_else(small_disk: Path) -> None:
    store = open_store(small_disk)
    write(store, "app/v0")
    promised = {"app/v0"}

    def fill(size: int) -> None:
        with store.session() as session:
            for _ in range(SMALL_MIB * (1 << 20) // size + 1):
                session.add(os.urandom(size))
            session.flush()

    for size in (50_000, 190_000, 700_000):
        with pytest.raises(OSError, match="No space left"):
            fill(size)
        is_sound(small_disk, promised)
        _empty(store)
        write(store, f"app/v{size}")
        promised.add(f"app/v{size}")
    is_sound(small_disk, promised)
    store.backend.close()


def _empty(store: ChunkStore) -> None:
    """Remove what the failed session had committed, as sweeps would in time."""
    needed = {
        store.index.places(id)[0].pack
        for entry in store.backend.list("manifests/")
        for id in named(store.backend.read(entry.name))
    }
    for entry in store.backend.list("packs/"):
        if entry.name not in needed:
            store.backend.delete(entry.name)
    store.refresh()


if __name__ == "__main__":
    writer(*sys.argv[1:])
