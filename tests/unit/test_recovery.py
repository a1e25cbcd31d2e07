"""What the next agent makes of a job that was under way."""

from types import SimpleNamespace

import pytest

from agent import names, recovery
from agent.journal import VersionPending
from agent.state import State
from agent.store import MemoryStore
from krgfs.errors import EngineFailed
from krgfs.model import App, Job, ProcessId, Tree
from tests.unit.versions import ANNA, KEY, make, names_in

PID = ProcessId(pid=4242, start=99, boot="boot-1")
JOB = Job(
    id=7,
    verb="checkpoint",
    object="procs/4242",
    node="n1",
    uid=ANNA,
    words="1 then=kill",
    started=1,
)


async def rebooted(images, *committed):
    """The parts that a checkpoint comes back to after a reboot: no tree has a record any more."""
    store = MemoryStore()
    state = State(store, "n1")
    await state.load("boot-1")
    tree = Tree(id=PID, uid=ANNA, app="blast", last_image="blast/v1", last_job=JOB.id)
    app = App(name="blast", uid=ANNA, next_version=2, incarnation=PID)
    await state.commit(JOB, tree, app, *committed)
    after = State(store, "n1")
    await after.load("boot-2")
    assert PID.pid not in after.trees
    return SimpleNamespace(state=after, images=images)


async def came_to(parts):
    noted = (VersionPending("blast", 1),)
    return await recovery._came_to(parts, noted, SimpleNamespace(job=JOB, id=JOB.id))


async def test_an_image_that_has_its_record_outlives_a_reboot(images, backend):
    made = await make(images, 1)
    parts = await rebooted(images, names.image_of(made, own=True))
    assert await came_to(parts) == "blast/v1"
    assert names_in(backend, "manifests/") == [f"{KEY}/blast/v1"]
    assert await images.verify("blast", 1) == ""


async def test_without_a_record_nothing_was_made(images):
    with pytest.raises(EngineFailed, match="do it again"):
        await came_to(await rebooted(images))
