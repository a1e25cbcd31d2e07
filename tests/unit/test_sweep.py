"""Sweeps and verification: what an image needs stays whoever writes, sweeps and dies meanwhile, and
what none needs goes."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import chunk_records
from agent.backend import Data, Entry, MemoryBackend, Upload
from agent.chunk_codec import identify
from agent.chunks import ChunkStore, Session
from agent.sweep import sweep, verify
from krgfs.errors import CannotRunHere, Damaged, EngineFailed, KrgError, TryAgain

GRACE_S = 100.0
PACK_BYTES = 1000
CONTENTS = [random.Random(each).randbytes(100 + 40 * (each % 4)) for each in range(12)]
IDS = [identify([raw]) for raw in CONTENTS]
NEVER = 1 << 60


class Clock:
    def __init__(self) -> None:
        self.time = 1e9

    def __call__(self) -> float:
        return self.time


class Wire:
    """One process's way to the back end, which breaks at its `left`th change from now: before that
    change or after it, and for good."""

    def __init__(self, inner: MemoryBackend) -> None:
        self._inner = inner
        self.left = NEVER
        self.late = False
        self.read, self.read_into, self.list = inner.read, inner.read_into, inner.list
        self.now, self.room, self.close = inner.now, inner.room, inner.close

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        self.left -= 1
        broken = OSError(5, "Input/output error")
        if self.left < 0 and not (self.late and self.left == -1):
            raise broken
        yield
        if self.left < 0:
            raise broken

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        with self.change():
            self._inner.put(name, data, replace=replace)

    def delete(self, name: str) -> None:
        with self.change():
            self._inner.delete(name)

    def create(self, name: str) -> Upload:
        return _WireUpload(self, self._inner.create(name))


class _WireUpload:
    def __init__(self, wire: Wire, inner: Upload) -> None:
        self._wire, self._inner = wire, inner
        self.append, self.abort = inner.append, inner.abort

    def commit(self) -> None:
        with self._wire.change():
            self._inner.commit()


def manifest(ids: Iterable[bytes]) -> bytes:
    body = b"".join(ids)
    return body + blake3(body).digest()


def named(data: bytes) -> list[bytes]:
    body = data[:-32]
    if blake3(body).digest() != data[-32:]:
        raise Damaged("the manifest is damaged")
    return [body[at : at + 32] for at in range(0, len(body), 32)]


class Rig:
    """A store in memory, its time, and what a person does with it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.backend = MemoryBackend(clock=self.clock)

    def open(self, wire: Wire | None = None) -> ChunkStore:
        return ChunkStore.open(
            wire or self.backend, pack_bytes=PACK_BYTES, grace_s=GRACE_S, clock=self.clock
        )

    def write(self, name: str, contents: Iterable[int]) -> None:
        with self.open().session() as session:
            ids = [session.add(CONTENTS[each]) for each in contents]
            session.flush()
            session.publish(name, manifest(ids))

    def remove(self, name: str) -> None:
        self.backend.delete(f"manifests/{name}")

    def sweep(self, times: int = 1, wait_s: float = 2 * GRACE_S) -> None:
        for _ in range(times):
            self.clock.time += wait_s
            self.swept = sweep(self.open(), named)

    def names(self, prefix: str) -> list[str]:
        return [entry.name for entry in self.backend.list(prefix)]

    def is_whole(self, *, store: ChunkStore | None = None) -> None:
        """Assert that all images that there are can be read."""
        store = store or self.open()
        for name in self.names("manifests/"):
            for id in named(self.backend.read(name)):
                assert identify([store.read(id)]) == id


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_what_no_image_names_goes_and_what_one_names_stays(rig: Rig) -> None:
    rig.write("app/v1", range(12))
    rig.write("app/v2", range(6))
    before = rig.names("packs/")
    rig.sweep(3)
    assert rig.names("packs/") == before and rig.names("condemned/") == []
    rig.remove("app/v1")
    rig.sweep()
    assert rig.names("packs/") == before and len(rig.names("condemned/")) == 1
    assert rig.swept.condemned_chunks == 6 and not rig.swept.removed_packs
    rig.sweep()
    assert rig.swept.removed_packs >= 1 and rig.names("condemned/") == []
    rig.is_whole()
    assert rig.open().has(IDS[0]) and not rig.open().has(IDS[11])
    rig.remove("app/v2")
    rig.sweep(2)
    assert rig.names("packs/") == rig.names("condemned/") == rig.names("sessions/") == []
    assert rig.swept.freed_bytes > sum(len(raw) for raw in CONTENTS[:6])


def test_young_packs_and_young_lists_are_left_alone(rig: Rig) -> None:
    rig.write("app/v1", [1])
    rig.remove("app/v1")
    rig.sweep(1, wait_s=GRACE_S - 1)
    assert rig.names("condemned/") == []
    rig.sweep(1, wait_s=2)
    rig.sweep(1, wait_s=GRACE_S - 1)
    assert rig.swept.waiting == tuple(rig.names("condemned/")) != ()
    rig.sweep(1, wait_s=2)
    assert rig.names("packs/") == []


def test_a_pack_that_is_mostly_dead_is_written_anew(rig: Rig) -> None:
    rig.write("app/v1", range(4))
    rig.write("app/v2", [0])
    reader = rig.open()
    old = reader.index.places(IDS[0])[0].pack
    rig.remove("app/v1")
    rig.sweep(2)
    assert rig.swept.rewritten_packs == 1 and old not in rig.names("packs/")
    assert rig.open().index.places(IDS[0])[0].pack != old and not rig.open().has(IDS[1])
    assert reader.read(IDS[0]) == CONTENTS[0]
    assert verify(reader, named).is_sound


def test_a_pack_that_is_less_than_half_dead_stays_and_is_of_use(rig: Rig) -> None:
    rig.write("app/v1", range(3))
    rig.write("app/v2", [0, 1])
    rig.remove("app/v1")
    rig.sweep(3)
    assert rig.names("condemned/") == [] and rig.open().has(IDS[2])
    with rig.open().session() as session:
        assert session.reuse(IDS[:3]).all()


def test_second_copies_go(rig: Rig) -> None:
    stores = [rig.open(), rig.open()]
    with stores[0].session() as one, stores[1].session() as two:
        for session in (one, two):
            session.add(CONTENTS[0])
        for session, name in ((one, "app/v1"), (two, "app/v2")):
            session.flush()
            session.publish(name, manifest([IDS[0]]))
    assert len(rig.names("packs/")) == 2
    rig.sweep(2)
    assert len(rig.names("packs/")) == 1
    rig.is_whole()


def test_a_second_copy_stays_when_the_first_is_damaged(rig: Rig) -> None:
    stores = [rig.open(), rig.open()]
    with stores[0].session() as one, stores[1].session() as two:
        for session in (one, two):
            session.add(CONTENTS[0])
        for session in (one, two):
            session.flush()
        one.publish("app/v1", manifest([IDS[0]]))
    rig.sweep()
    [listed] = chunk_records.condemned(rig.backend)
    spare = listed.copies["pack"][0].tobytes().hex()
    [stays] = [name for name in rig.names("packs/") if spare not in name]
    data = bytearray(rig.backend.read(stays))
    data[10] ^= 1
    rig.backend.put(stays, data, replace=True)
    rig.sweep(3)
    rig.is_whole()


def test_of_two_copies_that_are_condemned_both_one_stays(rig: Rig) -> None:
    stores = [rig.open(), rig.open()]
    with stores[0].session() as one, stores[1].session() as two:
        for session, contents in ((one, (0, 1, 2)), (two, (0, 5, 6))):
            for each in contents:
                session.add(CONTENTS[each])
        one.flush()
        two.flush()
    rig.clock.time += 2 * GRACE_S
    with rig.open().session() as session:
        rig.sweep(1, wait_s=1)
        assert rig.swept.condemned_chunks == 6
        assert session.reuse([IDS[0], IDS[1], IDS[5]]).all()
        session.flush()
        session.publish("app/v1", manifest([IDS[0], IDS[1], IDS[5]]))
    for _ in range(4):
        rig.sweep()
        rig.is_whole()


def test_a_writer_that_began_before_keeps_what_it_reuses(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.clock.time += 2 * GRACE_S
    with rig.open().session() as session:
        rig.remove("app/v1")
        rig.sweep(1, wait_s=1)
        assert len(rig.names("condemned/")) == 1
        assert session.reuse(IDS[1:3]).all()  # it does not know of the list
        for _ in range(8):
            session.life.renew()
            rig.sweep(1, wait_s=GRACE_S * 0.4)
            assert len(rig.swept.waiting) == 1
        session.flush()
        session.publish("app/v2", manifest(IDS[1:3]))
    rig.sweep(3)
    assert rig.names("manifests/") == ["manifests/app/v2"]
    rig.is_whole()


def test_a_writer_that_begins_after_writes_anew(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.remove("app/v1")
    rig.sweep(1)
    rig.clock.time += GRACE_S
    with rig.open().session() as session:
        assert not session.reuse(IDS[1:3]).any()
        rig.sweep(1, wait_s=GRACE_S * 0.4)
        assert rig.swept.removed_packs == 1  # it waits for nobody
        ids = [session.add(CONTENTS[each]) for each in (1, 2)]
        assert session.new_bytes > 0
        session.flush()
        session.publish("app/v2", manifest(ids))
    rig.sweep(3)
    rig.is_whole()


def test_a_writer_learns_what_has_gone_before_it_begins(rig: Rig) -> None:
    store = rig.open()
    with store.session() as session:
        session.add(CONTENTS[1])
        session.flush()
    rig.sweep(2)
    assert rig.names("packs/") == rig.names("condemned/") == [] and store.has(IDS[1])
    with store.session() as session:
        assert not session.reuse([IDS[1]]).any()


def test_a_writer_that_is_not_renewed_holds_nothing_and_publishes_nothing(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.clock.time += 2 * GRACE_S
    with rig.open().session() as session:
        rig.remove("app/v1")
        rig.sweep(1, wait_s=1)
        assert session.reuse(IDS[1:3]).all()
        rig.sweep(1, wait_s=2 * GRACE_S)
        assert rig.swept.removed_packs == 1
        session.flush()
        with pytest.raises(EngineFailed, match="not renewed"):
            session.publish("app/v2", manifest(IDS[1:3]))
    assert rig.names("manifests/") == []


def test_what_was_condemned_and_came_to_be_named_stays(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    data = rig.backend.read("manifests/app/v1")
    rig.remove("app/v1")
    rig.sweep(1)
    rig.backend.put("manifests/app/v3", data)
    rig.sweep(3)
    rig.is_whole()


def test_of_two_sweeps_at_once_one_goes_on(rig: Rig) -> None:
    with rig.open().session(sweeps=True), pytest.raises(TryAgain, match="another sweep"):
        rig.sweep(1, wait_s=0)
    rig.sweep(1)


def test_a_sweep_that_stalled_removes_nothing(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.write("app/v2", [3])
    rig.remove("app/v1")
    rig.sweep()

    def stall(data: bytes) -> list[bytes]:
        rig.clock.time += GRACE_S
        return named(data)

    rig.clock.time += 2 * GRACE_S
    before = rig.names("packs/")
    with pytest.raises(EngineFailed, match="not renewed"):
        sweep(rig.open(), stall)
    assert rig.names("packs/") == before


def test_nothing_goes_while_a_manifest_cannot_be_read(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.write("app/v2", [3])
    rig.remove("app/v1")
    rig.sweep()
    whole = rig.backend.read("manifests/app/v2")
    rig.backend.put("manifests/app/v2", whole[:-1], replace=True)
    before = rig.backend.list("")
    for _ in range(3):
        with pytest.raises(Damaged, match="manifests/app/v2"):
            rig.sweep()
    assert rig.backend.list("") == before
    rig.backend.put("manifests/app/v2", whole, replace=True)
    rig.sweep(2)
    assert not rig.open().has(IDS[1])


def test_a_pack_that_cannot_be_read_is_kept_and_named(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.remove("app/v1")
    [name] = rig.names("packs/")
    rig.backend.put(name, rig.backend.read(name)[:-1], replace=True)
    rig.sweep(3)
    assert rig.names("packs/") == [name] and name in rig.swept.kept[0]


def test_a_pack_with_a_damaged_chunk_is_not_written_anew(rig: Rig) -> None:
    rig.write("app/v1", range(4))
    rig.write("app/v2", [0])
    place = rig.open().index.places(IDS[0])[0]
    rig.remove("app/v1")
    data = bytearray(rig.backend.read(place.pack))
    data[place.offset] ^= 1
    rig.backend.put(place.pack, data, replace=True)
    rig.sweep(2)
    assert place.pack in rig.names("packs/") and IDS[0][:8].hex() in rig.swept.kept[0]


def test_damaged_records_hold_nothing_up_for_ever(rig: Rig) -> None:
    rig.write("app/v1", [1, 2])
    rig.remove("app/v1")
    rig.sweep(1)
    rig.backend.put("condemned/x", b"what is this", replace=True)
    rig.backend.put("sessions/x", b"and this", replace=True)
    assert [name for name, _ in verify(rig.open(), named).bad_objects] == [
        "condemned/x",
        "sessions/x",
    ]
    with pytest.raises(TryAgain):
        rig.sweep(1, wait_s=0)
    rig.sweep(1)
    assert rig.names("packs/") == rig.names("condemned/") == rig.names("sessions/") == []


@pytest.mark.slow
def test_verify_finds_every_changed_byte_and_nobody_reads_it(rig: Rig) -> None:
    """Each byte of each object in turn: `verify` reports it, reads are right or Damaged."""
    rig.write("app/v1", [0, 1])
    rig.write("app/v2", [1, 2])
    with rig.open().session() as session:
        text = session.add(b"again and again " * 9)
        session.flush()
        session.publish("app/v3", manifest([text]))
    raws = {**{IDS[each]: CONTENTS[each] for each in range(3)}, text: b"again and again " * 9}
    rig.backend.put("condemned/x", chunk_records.encode_condemned(np.zeros(1, chunk_records.COPY)))
    rig.backend.put("sessions/x", chunk_records.encode_session(rig.clock(), False))
    assert verify(rig.open(), named).is_sound
    for entry in rig.backend.list(""):
        whole = rig.backend.read(entry.name)
        for at in range(entry.size):
            changed = bytearray(whole)
            changed[at] ^= 1 << random.Random(at).randrange(8)
            rig.backend.put(entry.name, changed, replace=True)
            _is_found(rig, entry, at, raws)
        rig.backend.put(entry.name, whole, replace=True)
    assert verify(rig.open(), named).is_sound


def _is_found(rig: Rig, entry: Entry, at: int, raws: dict[bytes, bytes]) -> None:
    try:
        store = rig.open()
    except (Damaged, CannotRunHere):
        assert entry.name == "format"
        return
    report = verify(store, named)
    said = [name for name, _ in report.bad_objects] + [bad.pack for bad in report.bad_chunks]
    assert said == [entry.name], at
    lost = {id for _, ids in report.lacking for id in ids}
    for id, raw in raws.items():
        if id in lost:
            with pytest.raises(Damaged, match=id[:8].hex()):
                store.read(id)
        else:
            assert store.read(id) == raw
    if report.bad_chunks:
        [bad] = report.bad_chunks
        place = next(each for each in store.index.places(bad.id) if each.pack == bad.pack)
        assert bad.offset == place.offset <= at < place.offset + place.stored
        assert lost == {bad.id} == set(store.check(raws))


def test_verify_names_the_images_that_lack_a_chunk(rig: Rig) -> None:
    rig.write("app/v1", [0, 1])
    rig.backend.put("manifests/app/v2", manifest([IDS[1], IDS[5]]))
    report = verify(rig.open(), named)
    assert report.lacking == (("manifests/app/v2", (IDS[5],)),) and not report.is_sound
    assert report.images == 2 and report.chunks == 2 and report.packs == 1


# -- any order of events against a model

SEEN: Counter[str] = Counter()


class Writer:
    """A process that writes images, and is born again when it has died."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name
        self.number = 0
        self.reborn()

    def reborn(self) -> None:
        self.wire = Wire(self._world.rig.backend)
        self.store = self._world.rig.open(self.wire)
        self._leave = contextlib.ExitStack()
        self._session: Session | None = None
        self._contents: list[int] = []

    def write(self, contents: Iterable[int], reuse: bool) -> None:
        if self._session is None:
            self._session = self._leave.enter_context(self.store.session())
        for each in contents:
            if reuse and self._session.reuse([IDS[each]])[0]:
                SEEN["reused"] += 1
            else:
                self._session.add(CONTENTS[each])
            self._contents.append(each)

    def publish(self) -> None:
        if self._session is None:
            return
        self.number += 1
        name = f"{self._name}/v{self.number}"
        try:
            self._session.flush()
            self._session.publish(name, manifest(IDS[each] for each in self._contents))
        except EngineFailed:
            SEEN["too late to publish"] += 1
            assert f"manifests/{name}" not in self._world.rig.names("manifests/")
            self.end()
        else:
            self._world.images.add(name)

    def end(self) -> None:
        self._leave.close()
        self._session, self._contents = None, []

    def died(self) -> None:
        self._leave.close()
        published = f"{self._name}/v{self.number}"
        if f"manifests/{published}" in self._world.rig.names("manifests/"):
            self._world.images.add(published)  # it died after that, or was never told
        self.reborn()


class World:
    """Two writers, sweeps, and what of theirs has to be there."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.images: set[str] = set()
        self.writers = [Writer(self, "one"), Writer(self, "two")]

    def act(self, word: str, who: int, number: int, contents: list[int]) -> None:
        writer = self.writers[who]
        try:
            match word:
                case "write":
                    writer.write(contents, bool(number % 2))
                case "publish":
                    writer.publish()
                case "end":
                    writer.end()
                case "die":
                    writer.wire.left, writer.wire.late = number % 5, number % 2 == 0
                case "sweep":
                    self._sweep(NEVER)
                case "dying sweep":
                    self._sweep(number % 9)
                case "delete" if self.images:
                    name = sorted(self.images)[number % len(self.images)]
                    self.images.remove(name)
                    self.rig.remove(name)
                case "clean":
                    self._clean()
                case "wait":
                    self.rig.clock.time += (1, 15, 30, 45, 60, 105, 130)[number % 7]
        except OSError:
            SEEN["writer died"] += 1
            writer.died()

    def _clean(self) -> None:
        """Let go by what it takes that whatever is of no use has gone."""
        for _ in range(2):
            self.rig.clock.time += 130
            self._sweep(NEVER)

    def _sweep(self, dies: int) -> None:
        wire = Wire(self.rig.backend)
        try:
            store = self.rig.open(wire)
            wire.left, wire.late = dies, dies % 2 == 0
            swept = sweep(store, named)
            SEEN["removed"] += swept.removed_packs
            SEEN["rewritten"] += swept.rewritten_packs
            SEEN["waited"] += len(swept.waiting)
        except TryAgain:
            SEEN["another sweep"] += 1
        except OSError:
            SEEN["sweep died"] += 1
        self.is_whole()

    def is_whole(self) -> None:
        assert {f"manifests/{name}" for name in self.images} <= set(self.rig.names("manifests/"))
        self.rig.is_whole()
        for writer in self.writers:
            self.rig.is_whole(store=writer.store)

    def come_to_rest(self) -> None:
        """Assert that after enough sweeps nothing is left but what is named, and its like again."""
        for writer in self.writers:
            writer.wire.left = NEVER
            writer.end()
        self.rig.sweep(5)
        self.is_whole()
        assert self.rig.names("sessions/") == self.rig.names("condemned/") == []
        store = self.rig.open()
        assert verify(store, named).is_sound
        needed = {
            id for name in self.rig.names("manifests/") for id in named(self.rig.backend.read(name))
        }
        assert store.index.rows()["stored"].sum() <= 2 * store.stored(needed).sum()
        assert needed or self.rig.names("packs/") == []


WORDS = ["write"] * 4 + ["publish"] * 4 + ["end", "die", "delete", "delete"]
WORDS += ["sweep"] * 4 + ["dying sweep", "clean", "clean"] + ["wait"] * 4
EVENT = st.tuples(
    st.sampled_from(WORDS),
    st.integers(0, 1),
    st.integers(0, 1 << 16),
    st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=5),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(EVENT, min_size=15, max_size=35))
def _any_order(events: list[tuple[str, int, int, list[int]]]) -> None:
    world = World()
    try:
        for event in events:
            world.act(*event)
        world.is_whole()
    finally:
        for writer in world.writers:
            with contextlib.suppress(OSError, KrgError):
                writer.end()
    world.come_to_rest()


@pytest.mark.slow
def test_whatever_the_order_of_events_images_stay_whole_and_the_rest_goes() -> None:
    SEEN.clear()
    _any_order()
    seldom = {"reused", "too late to publish", "writer died", "removed", "rewritten", "waited"}
    seldom |= {"another sweep", "sweep died"}
    assert {what for what in seldom if SEEN[what] < 5} == set(), SEEN
