"""What policies take and show, which images go by them, and what bounds of a store refuse."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent import criu_network, daemon, names
from agent.backend import MemoryBackend
from agent.backend_bounded import BoundedBackend, Bounds, unbounded
from agent.images import Images
from agent.jobs import Jobs
from agent.retention import Retention, expired
from agent.state import State
from agent.store import MemoryStore
from krgfs import policy
from krgfs.errors import BadWords, Busy
from krgfs.model import App, Image, Node, Policy
from tests.unit.versions import make

NOW = 1e9
DAY_S = 86400


def images(*ages_s: float, size: int = 100) -> list[Image]:
    """Versions from v1 on, of these ages."""
    return [
        Image(app="a", version=n, created=NOW - age, node="n1", uid=0, stored_bytes=size, own=True)
        for n, age in enumerate(ages_s, 1)
    ]


def gone(found: list[Image], wanted: Policy, *stays: int) -> list[int]:
    which = expired(found, wanted, lambda image: image.version in stays, NOW)
    return [each.image.version for each in which]


FIVE = images(50, 40, 30, 20, 10)


@pytest.mark.parametrize(
    ("wanted", "stays", "left"),
    [
        (Policy(), (), [1, 2, 3, 4, 5]),
        (Policy(keep=2), (), [4, 5]),
        (Policy(keep=2), (1, 3), [1, 3, 4, 5]),
        (Policy(keep=2), (5,), [4, 5]),
        (Policy(keep=9), (), [1, 2, 3, 4, 5]),
        (Policy(keep=1), (), [5]),
        (Policy(keep_bytes=250), (), [4, 5]),
        (Policy(keep_bytes=250), (1,), [1, 5]),
        (Policy(keep_bytes=1), (), [5]),
        (Policy(max_age_s=25), (), [4, 5]),
        (Policy(max_age_s=5), (), [5]),
        (Policy(max_age_s=5), (1, 2, 3, 4), [1, 2, 3, 4, 5]),
        (Policy(keep=3, keep_bytes=200), (), [4, 5]),
        (Policy(keep=3, max_age_s=15), (2,), [2, 5]),
    ],
)
def test_which_images_go(wanted: Policy, stays: tuple[int, ...], left: list[int]) -> None:
    assert gone(FIVE, wanted, *stays) == [n for n in range(1, 6) if n not in left]


def test_nothing_goes_where_there_is_nothing_or_one() -> None:
    strict = Policy(keep=1, keep_bytes=1, max_age_s=1)
    assert gone([], strict) == gone(images(1000), strict) == []


def test_an_image_that_was_copied_in_has_no_age() -> None:
    old = [replace(FIVE[0], own=False), *FIVE[1:]]
    assert gone(old, Policy(max_age_s=25)) == [2, 3]
    assert gone(old, Policy(keep=4)) == [1]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 50))),
    st.integers(0, 9),
    st.integers(0, 300),
    st.integers(0, 60),
    st.sets(st.integers(1, 20)),
)
def test_no_more_goes_than_must(
    made: list[tuple[int, int]], keep: int, keep_bytes: int, age: int, stays: set[int]
) -> None:
    found = [
        replace(image, stored_bytes=size)
        for image, (size, _) in zip(images(*(age for _, age in made)), made, strict=True)
    ]
    wanted = Policy(keep=keep, keep_bytes=keep_bytes, max_age_s=age)
    went = gone(found, wanted, *stays)
    left = [image for image in found if image.version not in went]
    assert went == sorted(set(went) - stays) and (not found or left[-1] == found[-1])
    assert gone(left, wanted, *stays) == []
    free = [image for image in left[:-1] if image.version not in stays]
    if keep and free:
        assert free[0].version > len(found) - keep
    if keep_bytes and free:
        assert sum(image.stored_bytes for image in left) <= keep_bytes
    assert not age or all(NOW - image.created <= age for image in free)


# -- connections that an image keeps


class Gate(MemoryStore):
    """A store whose commits wait until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = trio.Event()

    async def commit(self, *what: Any) -> int:
        await self.open.wait()
        return await super().commit(*what)


@pytest.fixture
def table() -> Iterator[str]:
    """The dump that holds connections by a firewall table."""
    run = f"kept{os.getpid()}"
    if os.geteuid() != 0:
        pytest.skip("a firewall table needs root")
    subprocess.run(["nft", "add", "table", "inet", criu_network.table(run)], check=True)
    yield run
    subprocess.run(
        ["nft", "delete", "table", "inet", criu_network.table(run)],
        check=False,
        capture_output=True,
    )


def is_held(run: str) -> bool:
    said = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return criu_network.table(run) in said.stdout


async def test_connections_are_held_until_their_image_is_gone(images: Images, table: str) -> None:
    made = await make(images, 1, network=table)
    image = names.image_of(made, own=True)
    store = Gate()
    state = State(store, "n1")
    app = App(name="blast", uid=0)
    async with trio.open_nursery() as nursery:
        retention = Retention(state, Jobs(state, nursery), images)

        async def refused() -> None:
            with pytest.raises(Busy, match="good"):
                await retention.remove(image)

        state.show(app, image)
        nursery.start_soon(state.commit, replace(app, labels={"good": 1}))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(refused)  # the label is on its way
        await trio.testing.wait_all_tasks_blocked()
        store.open.set()
    assert is_held(table) and await images.verify("blast", 1) == ""
    await state.commit(app)
    await retention.remove(image)
    assert not is_held(table)


# -- the file


def test_it_takes_what_it_shows() -> None:
    set_ = Policy(keep=3, keep_bytes=10 << 30, max_age_s=30 * DAY_S + 3661)
    shown = "".join(f"{key} {text}\n" for key, text in policy.lines(set_).items())
    assert shown == "keep 3\nkeep_bytes 10737418240\nmax_age 30d1h1m1s\n"
    assert Policy(**policy.parse(shown)) == set_
    assert set(policy.lines(Policy()).values()) == {"max"}
    assert policy.parse("keep max\n\nmax_age 90s") == {"keep": 0, "max_age_s": 90}


@given(st.integers(1, 10**8), st.integers(1, 2**62), st.integers(1, 9 * 365 * DAY_S))
def test_any_policy_comes_back(keep: int, keep_bytes: int, age: int) -> None:
    wanted = Policy(keep=keep, keep_bytes=keep_bytes, max_age_s=age)
    text = "\n".join(f"{key} {shown}" for key, shown in policy.lines(wanted).items())
    assert Policy(**policy.parse(text)) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        *("", " ", "keep", "keep 0", "keep -1", "keep 1.5", "keep two", "keep 2 3", "2"),
        *("keep 2\nkeep 3", "keep 2\nmax_age never", "keep 2\nwhat 1", "keep=2", "KEEP 2"),
        *("keep_bytes 0", "keep_bytes 1X", "keep_bytes -1", "keep_bytes 99999999P"),
        *("max_age 0", "max_age 1.5s", "max_age 11y", "max_age 10000d"),
    ],
)
def test_what_it_does_not_take(wrong: str) -> None:
    with pytest.raises(BadWords, match="policy: "):
        policy.parse(wrong)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("812", 812), ("64k", 65536), ("1.5G", None), ("2GiB", 2 << 30), ("1TB", 1 << 40)],
)
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="is not a size"):
            policy.size(text)
    else:
        assert policy.size(text) == size


def test_what_nobody_wrote_is_the_nodes() -> None:
    node = Node(name="n1", policy=Policy(keep=5, max_age_s=60))
    assert node.policy_of(App(name="a", uid=0)) == node.policy
    own = App(name="a", uid=0, policy={"keep": 0, "keep_bytes": 7})
    assert node.policy_of(own) == Policy(keep_bytes=7, max_age_s=60)


@pytest.mark.parametrize("wrong", ["--keep=0", "--max-age=x", "--quota=1X", "--floor=-1"])
def test_an_agent_refuses_bad_options(wrong: str) -> None:
    with pytest.raises(SystemExit) as told:
        daemon.main.main([wrong], standalone_mode=True)
    assert told.value.code == 2


# -- bounds


def store(room: int = 1 << 30, **bounds: int) -> BoundedBackend:
    return BoundedBackend(MemoryBackend(room), Bounds(**bounds))


def refused(number: int, backend: BoundedBackend, name: str, size: int) -> str:
    with pytest.raises(OSError) as told:
        backend.put(name, bytes(size))
    assert told.value.errno == number
    return str(told.value.strerror)


def test_a_quota_is_for_packs() -> None:
    backend = store(quota_bytes=1000, floor_bytes=0)
    backend.put("packs/aa/1", bytes(600))
    backend.put("manifests/a/v1", bytes(5000))
    assert "600 bytes of the 1.0 KiB" in refused(errno.EDQUOT, backend, "packs/aa/2", 401)
    backend.put("packs/aa/2", bytes(400))
    assert backend.room().available == 0
    with pytest.raises(OSError, match="quota"):
        backend.check()
    backend.delete("packs/aa/1")
    backend.check()
    backend.put("packs/aa/3", bytes(600))


def test_what_is_on_its_way_counts_until_it_is_given_up() -> None:
    backend = store(quota_bytes=1000, floor_bytes=0)
    upload = backend.create("packs/aa/1")
    upload.append(bytes(500), bytes(400))
    with pytest.raises(OSError) as told:
        upload.append(bytes(101))
    assert told.value.errno == errno.EDQUOT
    refused(errno.EDQUOT, backend, "packs/aa/2", 101)
    upload.abort()
    upload.abort()
    backend.put("packs/aa/2", bytes(1000))
    assert [each.name for each in backend.list("")] == ["packs/aa/2"]


def test_what_others_removed_is_learnt_before_refusing() -> None:
    inner = MemoryBackend()
    backend = BoundedBackend(inner, Bounds(quota_bytes=1000))
    backend.put("packs/aa/1", bytes(1000))
    inner.delete("packs/aa/1")
    backend.check()
    backend.put("packs/aa/2", bytes(1000))


def test_a_floor_stays_free() -> None:
    backend = store(10_000, floor_bytes=4000)
    upload = backend.create("packs/aa/1")
    for _ in range(6):
        upload.append(bytes(900))
    upload.commit()
    assert "stay free" in refused(errno.ENOSPC, backend, "packs/aa/2", 700)
    assert "--floor" in refused(errno.ENOSPC, backend, "manifests/a/v1", 700)
    backend.put("sessions/1", bytes(1000))
    with pytest.raises(OSError, match="floor"):
        backend.check()
    with unbounded(backend):
        backend.put("packs/aa/2", bytes(700))
    refused(errno.ENOSPC, backend, "packs/aa/3", 1)
    backend.delete("packs/aa/1")
    backend.check()


def test_the_default_floor_is_small() -> None:
    room = MemoryBackend(10_000).room()
    assert Bounds().floor(room) == 100
    assert Bounds().floor(replace(room, total=1 << 50)) == 256 << 20
    assert Bounds(floor_bytes=0).floor(room) == 0
