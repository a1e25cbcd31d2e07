"""restart, up to where the engine begins: an image is what its record says, or it is refused."""

from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from agent import names
from agent.backend import MemoryBackend
from agent.images import Images
from agent.jobs import Running
from agent.manifest import Manifest
from agent.ops import restart
from agent.parts import Parts
from agent.state import State
from agent.store import MemoryStore
from krgfs.errors import Damaged
from krgfs.model import App, Caller, Image, Job
from krgfs.verbs import ImageRef, Restart

ROOT = Caller(uid=0, gid=0)
JOB = Job(id=1, verb="restart", object="nodes/n1", node="n1", uid=0, words="blast/v1", started=1e9)
WORDS = Restart(image=ImageRef("blast", "v1"))


async def make(images: Images, job: int, pages: bytes) -> Image:
    """Make blast/v1, whole but for a pstree.img that the engine would not take."""
    async with images.spool("blast", job, 1 << 20) as spool:
        (Path(spool.path) / "pages-1.img").write_bytes(pages * 4096)
        (Path(spool.path) / "pstree.img").write_bytes(b"tree")
        await spool.load("blast/v1")
        await spool.seal(
            Manifest(app="blast", version=1, created=1e9, uid=ROOT.uid, gid=ROOT.gid, root=4242)
        )
        return names.image_of(await spool.publish(1), own=True)


async def test_an_image_that_was_put_in_anothers_place_is_not_restarted(tmp_path: Path) -> None:
    images = await Images.open(str(tmp_path / "store"), MemoryBackend(), "n1")
    state = State(MemoryStore(), "n1")
    known = {"state": state, "images": images, "run_dir": str(tmp_path)}
    parts = Parts._make(known.get(field) for field in Parts._fields)

    async def refusal(image: Image) -> str:
        job = Running(state, JOB, ROOT, frozenset())
        with pytest.raises(Damaged) as caught, trio.fail_after(5):
            await restart.restart(parts, job, App(name="blast", uid=0), image, WORDS)
        return caught.value.message

    committed = await make(images, 1, b"1")
    assert "pstree.img does not begin as CRIU's do" in await refusal(committed)
    assert state.images == {}

    await images.remove("blast", 1)
    other = await make(images, 2, b"2")
    assert await images.verify("blast", 1) == ""
    assert "not the one that was committed; take another version" in await refusal(committed)
    assert "the one that was committed" in state.images["blast"][1].damaged
    assert "pstree.img" in await refusal(other)
    assert "not the one that was committed" in await refusal(replace(other, digest=""))
    images.close()
