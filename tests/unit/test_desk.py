"""What the desk does about images itself, while others change the same records."""

import os
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing
import zstandard
from msgspec.structs import replace

from agent import desk, names
from agent.backend_bounded import BoundedBackend, Bounds
from agent.desk import CUT_OFF, Desk
from agent.jobs import Jobs
from agent.retention import Retention
from agent.state import State
from agent.store import MemoryStore
from agent.upkeep import Upkeep
from krgfs import wire
from krgfs.errors import Busy, Damaged, Exists, Gone, NoRoom, NotYours, TryAgain
from krgfs.model import App, Caller
from krgfs.verbs import ImageRef
from tests.unit.versions import ANNA, KEY, contents_of, make, names_in

ME = Caller(uid=ANNA, gid=ANNA)


class Gate(MemoryStore):
    """A store whose next commit waits behind `shut`, and fails with `failing`."""

    shut: trio.Event | None = None
    failing: Exception | None = None

    async def commit(self, *what):
        if self.shut is not None:
            await self.shut.wait()
        if self.failing is not None:
            raise self.failing
        return await super().commit(*what)


class Office:
    def __init__(self, state, store, images, nursery, backend):
        self.state, self.store, self.images = state, store, images
        jobs = Jobs(state, nursery)
        retention = Retention(state, jobs, images)
        upkeep = Upkeep(state, retention, images, BoundedBackend(backend, Bounds(floor_bytes=0)))
        self.desk = Desk(
            SimpleNamespace(
                state=state, images=images, jobs=jobs, retention=retention, upkeep=upkeep
            )
        )

    async def ask(self, kind, **words):
        return await self.desk.answer(kind(id=1, caller=ME, **words))

    async def done(self, kind, **words):
        assert await self.ask(kind, **words) == wire.Done(id=1)

    async def refused(self, error, kind, **words):
        answer = await self.ask(kind, **words)
        assert isinstance(answer, wire.Failed) and answer.errno == error.errno, answer

    async def committed(self, version):
        made = await make(self.images, version)
        app = names.with_version(self.state.apps["blast"], version)
        await self.state.commit(names.image_of(made, own=True), app)

    async def copied(self, name, files):
        """Copy in as cp does: the last file is not closed yet."""
        await self.done(wire.BeginImport, app="blast", name=name)
        for file, data in files.items():
            words = {"app": "blast", "name": name, "file": file, "offset": 0, "data": data}
            await self.done(wire.WriteFile, **words)

    @asynccontextmanager
    async def meanwhile(self, make_records):
        """Let a commit that has begun hold up those that come while this is entered."""
        self.store.shut = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.state.update, make_records)
            await trio.testing.wait_all_tasks_blocked()
            yield nursery
            await trio.testing.wait_all_tasks_blocked()
            self.store.shut.set()


@pytest.fixture
async def office(images, backend):
    async with trio.open_nursery() as nursery:
        store = Gate()
        state = State(store, "n1")
        await state.commit(App(name="blast", uid=ANNA, gid=ANNA))
        yield Office(state, store, images, nursery, backend)
        nursery.cancel_scope.cancel()


async def test_labels_come_and_go_beside_a_checkpoint(office):
    await office.committed(1)
    await office.done(wire.SetLabel, app="blast", label="old", version="v1")

    def checkpoint():
        return [replace(office.state.apps["blast"], next_version=6)]

    async with office.meanwhile(checkpoint) as nursery:
        for kind, words in (
            (wire.SetLabel, {"label": "good", "version": "v1"}),
            (wire.RemoveLabel, {"label": "old"}),
        ):
            nursery.start_soon(
                lambda kind, words: office.done(kind, app="blast", **words), kind, words
            )
    app = office.state.apps["blast"]
    assert (app.next_version, app.labels) == (6, {"good": 1})
    await office.refused(Exists, wire.SetLabel, app="blast", label="good", version="v1")
    await office.refused(Gone, wire.SetLabel, app="blast", label="none", version="v2")


async def test_a_label_is_not_put_on_what_goes(office):
    await office.committed(1)
    image = office.state.images["blast"][1]
    office.store.shut = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: office.state.commit(delete=[image]))
        await trio.testing.wait_all_tasks_blocked()
        words = {"app": "blast", "label": "good", "version": "v1"}
        nursery.start_soon(lambda: office.refused(Gone, wire.SetLabel, **words))
        await trio.testing.wait_all_tasks_blocked()
        office.store.shut.set()
    assert office.state.apps["blast"].labels == {}


async def test_an_app_is_not_removed_under_an_import_that_is_begun(office, root):
    def checkpoint():
        return [office.state.apps["blast"]]

    async with office.meanwhile(checkpoint) as nursery:
        nursery.start_soon(lambda: office.done(wire.BeginImport, app="blast", name="v1"))
        with trio.fail_after(5):
            while not (root / "imports/blast/v1").exists():  # noqa: ASYNC110 - a thread makes it
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: office.refused(Busy, wire.RemoveApp, app="blast"))
    assert "blast" in office.state.apps


async def test_an_import_leaves_what_others_wrote_into_the_app(office):
    await office.committed(1)
    await office.copied("v2.part", await contents_of(office.images))
    real = office.images.finish_import

    async def finish_import(*what):
        made = await real(*what)
        await office.state.update(
            lambda: [replace(office.state.apps["blast"], next_version=9, labels={"gold": 1})]
        )
        return made

    office.images.finish_import = finish_import
    await office.done(wire.CommitImport, app="blast", name="v2.part", to="v2")
    app = office.state.apps["blast"]
    assert (app.next_version, app.labels) == (9, {"gold": 1})
    assert [*office.state.images["blast"]] == [1, 2] and "blast" not in office.state.imports


async def test_an_import_that_cannot_be_recorded_was_never_begun(office, root):
    office.store.failing = NoRoom("no room for records")
    await office.refused(NoRoom, wire.BeginImport, app="blast", name="v1")
    office.store.failing = None
    assert not (root / "imports/blast/v1").exists()
    await office.done(wire.BeginImport, app="blast", name="v1")


async def test_a_version_that_cannot_be_recorded_is_an_import_still(office, backend):
    await office.committed(1)
    source = await contents_of(office.images)
    await office.copied("v2", source)
    office.store.failing = NoRoom("no room for records")
    last = {"app": "blast", "name": "v2", "file": "pstree.img"}
    await office.refused(NoRoom, wire.CloseFile, **last)
    office.store.failing = None
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
    await office.done(wire.WriteFile, **last, offset=0, data=source["pstree.img"])
    await office.done(wire.CloseFile, **last)
    assert [*office.state.images["blast"]] == [1, 2]
    await office.refused(NotYours, wire.WriteFile, **last, offset=0, data=b"late")


async def test_an_import_that_is_removed_meanwhile_becomes_nothing(office, backend):
    await office.committed(1)
    await office.copied("v2", await contents_of(office.images))
    real = office.images.finish_import

    async def finish_import(*what):
        made = await real(*what)
        await office.done(wire.RemoveVersion, app="blast", name="v2")
        return made

    office.images.finish_import = finish_import
    await office.refused(Gone, wire.CloseFile, app="blast", name="v2", file="pstree.img")
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
    assert [*office.state.images["blast"]] == [1]


async def test_a_copy_that_fails_keeps_no_other_version_from_a_restart(office):
    await office.committed(1)
    source = await contents_of(office.images)
    await office.copied("v9", source)
    await office.copied("v2", source)
    real = office.images.imports.whole

    async def whole(app, name):
        if name == "v9":
            raise TryAgain("its disk has gone")
        return await real(app, name)

    office.images.imports.whole = whole
    await office.desk._close_copies(ME, ImageRef("blast", "v1"))
    assert [*office.state.imports["blast"]] == ["v9", "v2"]
    await office.desk._close_copies(ME, ImageRef("blast"))
    assert [*office.state.imports["blast"]] == ["v9"]
    with pytest.raises(TryAgain):
        await office.desk._close_copies(ME, ImageRef("blast", "v9"))
    with pytest.raises(Damaged):
        office.desk._refuse_import(ImageRef("blast", "v9"))


async def test_of_a_log_that_is_cut_off_what_is_there_is_shown(tmp_path):
    said = os.urandom(200_000).hex().encode()
    kept = zstandard.compress(said)
    path = tmp_path / "1.log.zst"
    assert await desk._kept_words(str(path)) == b""
    for size in (len(kept), len(kept) - 1, len(kept) // 2, 3, 0):
        path.write_bytes(kept[:size])
        words = await desk._kept_words(str(path))
        assert said.startswith(words.removesuffix(CUT_OFF))
        assert words.endswith(CUT_OFF) == (size != len(kept)) and words
    path.write_bytes(kept[: len(kept) // 2])
    assert len(await desk._kept_words(str(path))) > 100_000
    path.write_bytes(b"no such thing")
    assert await desk._kept_words(str(path)) == CUT_OFF
