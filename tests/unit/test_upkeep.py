"""What goes on in the background: images go by age and policy, and their bytes with them; whoever
writes meanwhile is not disturbed."""

import os
import random
import threading
from contextlib import asynccontextmanager

import pytest
import trio

from agent import names
from agent.backend import MemoryBackend
from agent.backend_bounded import BoundedBackend, Bounds
from agent.backend_directory import DirectoryBackend
from agent.backends import is_own
from agent.chunks import ChunkStore
from agent.images import Images
from agent.jobs import Jobs
from agent.retention import Retention
from agent.state import State
from agent.store import MemoryStore
from agent.sweep import sweep, verify
from agent.upkeep import Upkeep
from krgfs.errors import Busy, OverQuota, TryAgain
from krgfs.model import App, Caller
from tests.unit.versions import DUMPED, make, names_in

PAGES = 30 * 4096
WRITERS, ROUNDS = 3, 60


class Bench:
    """Upkeep of a store in memory, with a clock to set."""

    def __init__(self, state, jobs, images, backend):
        self.state, self.jobs, self.images, self.backend = state, jobs, images, backend
        self.now = 1e9
        self.retention = Retention(state, jobs, images, lambda: self.now)
        self.upkeep = Upkeep(state, self.retention, images, backend)

    async def checkpoint(self, app="blast"):
        known = self.state.apps.get(app) or App(name=app, uid=0)
        files = DUMPED | {"pages-1.img": os.urandom(PAGES)}
        made = await make(self.images, known.next_version, app, files, created=self.now)
        image = names.image_of(made, own=True)
        await self.state.commit(image, names.with_version(known, image.version))
        return image

    async def policy(self, app="blast", **fields):
        await self.state.commit(App(**{**_fields(self.state.apps[app]), "policy": fields}))

    def versions(self, app="blast"):
        return sorted(self.state.images.get(app, {}))

    def stored(self):
        return sum(entry.size for entry in self.backend.list("packs/"))

    async def until(self, condition):
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - it comes true in threads
                await trio.sleep(0.01)


def _fields(app):
    return {name: getattr(app, name) for name in app.__struct_fields__}


@asynccontextmanager
async def bench_of(tmp_path, alone=True, **bounds):
    backend = BoundedBackend(MemoryBackend(), Bounds(floor_bytes=0, **bounds))
    images = await Images.open(str(tmp_path), backend, "n1", alone=alone)
    try:
        async with trio.open_nursery() as nursery:
            state = State(MemoryStore(), "n1")
            yield Bench(state, Jobs(state, nursery), images, backend)
            nursery.cancel_scope.cancel()
    finally:
        images.close()


async def test_images_go_as_they_grow_old_but_not_the_newest(tmp_path):
    async with bench_of(tmp_path) as bench:
        for _ in range(4):
            await bench.checkpoint()
            bench.now += 3600
        await bench.policy(max_age_s=2 * 3600)
        assert await bench.retention.expire("blast") == 2
        assert bench.versions() == [3, 4]
        bench.now += 1e6
        assert await bench.retention.expire("blast") == 1
        assert await bench.retention.expire("blast") == await bench.retention.expire("no app") == 0
        assert bench.versions() == [4]
        assert [each.facts["image"] for each in bench.state.events] == [
            "blast/v1",
            "blast/v2",
            "blast/v3",
        ]


async def test_what_a_job_holds_stays_until_it_ends(tmp_path):
    async with bench_of(tmp_path) as bench:
        first = await bench.checkpoint()
        await bench.checkpoint()
        await bench.policy(keep=1)
        over = trio.Event()

        async def restart(job):
            await over.wait()
            return "pid 1"

        caller = Caller(uid=0, gid=0)
        held = frozenset({f"image {first.ref}"})
        job = await bench.jobs.start("restart", "images", first.ref, caller, held, restart)
        assert await bench.retention.expire("blast") == 0
        with pytest.raises(Busy):
            await bench.retention.remove(first)
        over.set()
        await job.over.wait()
        assert await bench.retention.expire("blast") == 1


async def test_bytes_are_gone_soon_after_the_image(tmp_path, nursery):
    async with bench_of(tmp_path) as bench:
        nursery.start_soon(bench.upkeep.keep)
        await bench.checkpoint()
        before = bench.stored()
        for _ in range(3):
            await bench.checkpoint()
        await bench.policy(keep=1)
        bench.upkeep.look("blast")
        await bench.until(lambda: bench.stored() < 1.1 * before)
        assert bench.versions() == [4] and await bench.images.verify("blast", 4) == ""
        await bench.until(lambda: not names_in(bench.backend, "condemned/"))


async def test_a_shared_store_keeps_what_others_may_be_about_to_name(tmp_path):
    async with bench_of(tmp_path, alone=False) as bench:
        await bench.checkpoint()
        await bench.checkpoint()
        packs = names_in(bench.backend, "packs/")
        await bench.retention.remove(bench.state.images["blast"][1])
        await bench.images.sweep()
        await bench.images.sweep()
        assert names_in(bench.backend, "packs/") == packs


async def test_a_quota_is_met_by_what_may_go(tmp_path):
    async with bench_of(tmp_path, quota_bytes=3 * PAGES) as bench:
        for _ in range(2):
            await bench.checkpoint()
        await bench.upkeep.make_room("cannot checkpoint process 1")
        with pytest.raises(OverQuota, match="quota"):
            await bench.checkpoint()
        bench.backend.bounds = Bounds(2 * PAGES, 0)
        with pytest.raises(OverQuota, match=r"cannot checkpoint process 1: .*--quota.*rmdir"):
            await bench.upkeep.make_room("cannot checkpoint process 1")
        await bench.policy(keep=1)
        await bench.upkeep.make_room("cannot checkpoint process 1")
        assert bench.versions() == [2] and bench.stored() < 1.1 * PAGES


async def test_upkeep_outlives_what_fails_and_ends_when_told(tmp_path, caplog):
    async with bench_of(tmp_path) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(bench.upkeep.keep)
        await bench.checkpoint()
        await bench.checkpoint()
        with bench.images.store.sweeping:
            with pytest.raises(TryAgain):
                await bench.images.sweep()
            bench.upkeep.sweep_soon()
            await bench.until(lambda: "sweep.failed" in caplog.text)
        await bench.policy(keep=1)
        bench.upkeep.look("blast")
        await bench.until(lambda: bench.stored() < 1.1 * PAGES)
        nursery.cancel_scope.cancel()


# -- beside writers


def named(data):
    return [data[at : at + 32] for at in range(0, len(data), 32)]


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_writers_and_sweeps_at_once_lose_nothing(tmp_path, kind):
    backend = MemoryBackend() if kind == "memory" else DirectoryBackend(str(tmp_path / "store"))
    store = ChunkStore.open(backend, pack_bytes=20_000)
    contents = [random.Random(each).randbytes(2000) for each in range(40)]
    failures, at_work, left = [], threading.Semaphore(0), set()

    def write(number):
        rng = random.Random(number)
        try:
            for each in range(ROUNDS):
                with store.session() as session:
                    picked = rng.sample(contents, 12)
                    known = [session.add(raw) for raw in picked[:6]]
                    session.reuse(known)
                    known += [session.add(raw) for raw in picked[6:]]
                    session.flush()
                    name = f"{number}/v{each}"
                    session.publish(name, b"".join(known))
                left.add(name)
                gone = {other for other in left if other.startswith(f"{number}/")}
                for other in sorted(gone)[: rng.randrange(3)]:
                    backend.delete(f"manifests/{other}")
                    left.discard(other)
        except BaseException as exc:
            failures.append(exc)
        finally:
            at_work.release()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    removed = ended = 0
    while ended < WRITERS:
        removed += sweep(store, named, alone=True).removed_packs
        ended += at_work.acquire(blocking=False)
    for thread in threads:
        thread.join()
    assert failures == [] and removed
    assert verify(store, named).is_sound
    for name in left:
        for id in named(backend.read(f"manifests/{name}")):
            store.read(id)
    backend.close()


# -- whose a store is


def test_whose_a_store_is(tmp_path):
    state = tmp_path / "state"
    (state / "images").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (state / "link").symlink_to(tmp_path / "else")
    assert is_own(str(state / "images"), str(state))
    assert is_own(f"file://{state}/images", str(state))
    assert not is_own(str(tmp_path / "else"), str(state))
    assert not is_own(str(state / "link"), str(state))
    assert not is_own("s3://bucket/state", str(state))
