"""The chunk store: what is added is there once, durable, verified; what fails leaves nothing."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from agent import chunk_records, packs
from agent.backend import Data, MemoryBackend, Upload
from agent.chunk_codec import identify
from agent.chunk_index import ROW, Index, as_ids
from agent.chunks import FORMAT, ChunkStore, Session
from krgfs.errors import CannotRunHere, Damaged, EngineFailed

TEXT = b"the same words again and again, " * 5000
PACK_BYTES = 1 << 20
NOBODY = bytes(range(32))


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.time = 1e9

    def __call__(self) -> float:
        return self.time


class Flaky(MemoryBackend):
    """Fails in its `fails`th change from now, and in all after it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.fails: float = float("inf")

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        self._change()
        super().put(name, data, replace=replace)

    def delete(self, name: str) -> None:
        self._change()
        super().delete(name)

    def create(self, name: str) -> Upload:
        self._change()
        return super().create(name)

    def _change(self) -> None:
        self.fails -= 1
        if self.fails < 0:
            raise OSError(5, "Input/output error")


def open_store(backend: MemoryBackend, clock: Clock | None = None, **options: int) -> ChunkStore:
    """Open a store with small packs, whose time is the back end's."""
    clock = clock or Clock()
    return ChunkStore.open(backend, **{"pack_bytes": PACK_BYTES, "clock": clock} | options)


def names(backend: MemoryBackend, prefix: str) -> list[str]:
    return [entry.name for entry in backend.list(prefix)]


def test_what_is_added_is_read_back_by_any_other_store() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    raws = [TEXT, b"", *(os.urandom(300_000) for _ in range(7))]
    with store.session() as session:
        ids = [session.add(raw[:1000], memoryview(raw)[1000:]) for raw in raws]
        assert ids == [identify([raw]) for raw in raws]
        assert not store.has(ids[-1])
        session.flush()
        assert all(store.has(id) for id in ids)
        session.publish("app/v1", b"manifest")
    assert names(backend, "sessions/") == [] and names(backend, "manifests/") == [
        "manifests/app/v1"
    ]
    assert len(names(backend, "packs/")) > 1
    other = open_store(backend)
    assert other.id == store.id
    buffer = bytearray(1 << 20)
    for raw, id in zip(raws, ids, strict=True):
        assert store.read(id) == other.read(id) == raw
        assert other.read_into(id, memoryview(buffer)) == len(raw) and buffer.startswith(raw)
    sizes = other.stored(ids)
    assert sizes[0] < len(TEXT) / 10 and sizes[1] == 0 and sizes[2:].tolist() == [300_000] * 7
    assert other.check([*ids, NOBODY, ids[0]]) == [NOBODY]


def test_a_chunk_is_written_once() -> None:
    store = open_store(MemoryBackend())
    with store.session() as session:
        session.add(TEXT)
        written = session.new_bytes
        session.add(TEXT[:5], TEXT[5:])
        session.flush()
        session.add(TEXT)
        assert session.new_bytes == written > 0
    with store.session() as session:
        id = session.add(TEXT)
        assert session.new_bytes == 0
        assert session.reuse([id, NOBODY]).tolist() == [True, False]
        session.flush()
        session.publish("app/v2", b"")


def test_what_was_not_flushed_is_forgotten() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    with store.session() as session:
        id = session.add(TEXT)
        with pytest.raises(ValueError, match="before flush"):
            session.publish("app/v1", b"")
    assert not store.has(id) and names(backend, "packs/") == names(backend, "sessions/") == []
    with pytest.raises(EngineFailed, match="over"):
        session.add(TEXT)


def test_many_threads_add_the_same_and_other_chunks() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    raws = [os.urandom(20_000 + each) for each in range(60)]
    with store.session() as session:

        def work(seed: int) -> None:
            for at in np.random.default_rng(seed).permutation(len(raws)):
                session.add(raws[at])
            session.flush()
            assert all(store.has(identify([raw])) for raw in raws)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert session.new_bytes == sum(map(len, raws))
    other = open_store(backend)
    assert all(other.read(identify([raw])) == raw for raw in raws)


@pytest.mark.parametrize("room", [60, 200, 1_000, 200_000, PACK_BYTES, 2_500_000, 3_000_500])
def test_a_full_store_costs_the_session_and_nothing_else(room: int) -> None:
    backend = MemoryBackend()
    with open_store(backend).session() as session:
        kept = session.add(b"kept")
        session.flush()
    before = backend.list("")
    backend._room_bytes = sum(entry.size for entry in before) + room
    store = open_store(backend)
    with pytest.raises(OSError, match="No space"), store.session() as session:
        try:
            for _ in range(12):
                session.add(os.urandom(250_000))
            session.flush()
        except OSError:
            for call in (lambda: session.add(b"x"), session.flush, lambda: session.reuse([kept])):
                with pytest.raises(OSError, match="No space"):
                    call()
            raise
    whole = set(names(backend, "packs/"))
    assert names(backend, "sessions/") == []
    assert set(before) <= set(backend.list("")) and store.read(kept) == b"kept"
    backend._room_bytes = 1 << 40
    with store.session() as session:
        id = session.add(TEXT)
        session.flush()
    assert store.read(id) == TEXT and whole < set(names(backend, "packs/"))


def test_a_reader_finds_what_others_write_and_move() -> None:
    backend = MemoryBackend()
    store, reader = open_store(backend), open_store(backend)
    with store.session() as session:
        id = session.add(TEXT)
        session.flush()
    assert not reader.has(id) and reader.read(id) == TEXT and reader.has(id)
    [old] = names(backend, "packs/")
    new = os.urandom(16)
    backend.put(packs.name_of(packs.PackId(new)), backend.read(old))
    backend.delete(old)
    assert reader.read(id) == TEXT
    backend.delete(packs.name_of(packs.PackId(new)))
    with pytest.raises(Damaged, match=f"{id[:8].hex()} is in no readable pack"):
        reader.read(id)
    assert reader.check([id]) == [id]


def test_where_one_copy_is_damaged_the_other_is_read() -> None:
    backend = MemoryBackend()
    stores = [open_store(backend), open_store(backend)]
    with stores[0].session() as one, stores[1].session() as two:
        raws = [TEXT, os.urandom(5000)]
        ids = [each.add(raw) for raw in raws for each in (one, two)][::2]
        one.flush()
        two.flush()
    reader = open_store(backend)
    harmed = [reader.index.places(id)[at] for at, id in enumerate(ids)]
    for place in harmed:
        whole = bytearray(backend.read(place.pack))
        whole[place.offset + place.stored // 2] ^= 1
        backend.put(place.pack, whole, replace=True)
    assert [reader.read(id) for id in ids] == raws and reader.check(ids) == []
    backend.delete(next(place.pack for place in reader.index.places(ids[0]) if place != harmed[0]))
    with pytest.raises(Damaged, match=f"chunk {ids[0][:8].hex()} in {harmed[0].pack}"):
        reader.read(ids[0])
    assert reader.check(ids)[:1] == ids[:1]


def test_a_damaged_table_costs_its_own_pack_only() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    ids = []
    for raw in (TEXT, TEXT[1:]):
        with store.session() as session:
            ids.append(session.add(raw))
            session.flush()
    name = store.index.places(ids[0])[0].pack
    backend.put(name, backend.read(name)[:-1], replace=True)
    store = open_store(backend)
    assert store.read(ids[1]) == TEXT[1:]
    with pytest.raises(Damaged, match=name):
        store.read(ids[0])
    with pytest.raises(Damaged, match=ids[0][:8].hex()):
        store.stored(ids)
    with store.session() as session:  # written anew, it is good again
        session.add(TEXT)
        session.flush()
    assert store.read(ids[0]) == TEXT


def test_a_store_of_a_later_version_is_refused() -> None:
    backend = MemoryBackend()
    open_store(backend)
    later = backend.read(FORMAT).replace(b"store 1", b"store 2")
    backend.put(FORMAT, later, replace=True)
    with pytest.raises(CannotRunHere, match="format 2"):
        open_store(backend)


def test_a_store_that_lost_its_format_is_not_made_anew() -> None:
    backend = MemoryBackend()
    with open_store(backend).session() as session:
        session.publish("app/v1", b"")
    whole = backend.read(FORMAT)
    for wrong in (whole[:-1], whole + b"0", whole.replace(b"1\n", b"0\n"), whole[:-1] + b"x"):
        backend.put(FORMAT, wrong, replace=True)
        with pytest.raises(Damaged, match="format"):
            open_store(backend)
    backend.delete(FORMAT)
    with pytest.raises(Damaged, match="format"):
        open_store(backend)


def test_two_who_make_a_store_make_one() -> None:
    backend = MemoryBackend()
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: open_store(backend), range(8)))
    assert len({store.id for store in stores}) == 1


def test_a_session_that_was_not_renewed_publishes_nothing() -> None:
    clock = Clock()
    backend = Flaky(clock)
    store = open_store(backend, clock, grace_s=100)
    with store.session() as session:
        for _ in range(10):  # renewed in time it lives for ever
            clock.time += 45
            session.add(TEXT)
        clock.time += 51
        session.flush()
        with pytest.raises(EngineFailed, match="not renewed for 51 s"):
            session.publish("app/v1", b"")
    assert names(backend, "manifests/") == []
    with store.session() as session:
        backend.fails = 0
        clock.time += 30
        session.life.renew()
        backend.fails = float("inf")
        clock.time += 15
        session.publish("app/v1", b"")  # the renewal before it is young again
    with store.session() as session:
        backend.fails = 0
        clock.time += 30
        session.life.renew()
        clock.time += 21
        with pytest.raises(EngineFailed, match="not renewed") as caught:
            session.publish("app/v2", b"")
        assert isinstance(caught.value.__cause__, OSError)
        backend.fails = float("inf")
        with pytest.raises(EngineFailed, match="not renewed"):  # lost is lost
            session.publish("app/v2", b"")
    assert names(backend, "manifests/") == ["manifests/app/v1"]


def test_an_image_that_took_too_long_to_put_is_taken_back() -> None:
    clock = Clock()

    class Slow(MemoryBackend):
        def put(self, name: str, data: Data, *, replace: bool = False) -> None:
            clock.time += 60 if name.startswith("manifests/") else 0
            super().put(name, data, replace=replace)

    backend = Slow(clock=clock)
    with open_store(backend, clock, grace_s=100).session() as session:
        session.life.renew = lambda: None  # type: ignore[method-assign]
        with pytest.raises(EngineFailed, match="not renewed"):
            session.publish("app/v1", b"")
    assert names(backend, "manifests/") == []


def test_a_name_is_published_once() -> None:
    backend = MemoryBackend()
    with open_store(backend).session() as session:
        session.publish("app/v1", b"one")
        with pytest.raises(FileExistsError):
            session.publish("app/v1", b"two")
    assert backend.read("manifests/app/v1") == b"one"


def test_what_is_condemned_is_written_anew() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    with store.session() as session:
        ids = [session.add(raw) for raw in (TEXT, TEXT[1:])]
        session.flush()
    pack = packs.id_of(names(backend, "packs/")[0])
    copies = np.array([(pack, ids[0])], dtype=chunk_records.COPY)
    backend.put("condemned/a", chunk_records.encode_condemned(copies))
    with store.session() as session:
        assert session.reuse(ids).tolist() == [False, True]
        session.add(TEXT)
        assert session.new_bytes > 0 and session.reuse(ids).all()
        session.flush()
        assert len(store.index.places(ids[0])) == 2
    with store.session() as session:  # the second copy is not condemned
        assert session.reuse(ids).all()
    backend.put("condemned/a", backend.read("condemned/a")[:-1], replace=True)
    with store.session() as session:  # whatever it says
        assert not session.reuse(ids).any()


def test_the_index_takes_small_packs_without_moving_what_it_has() -> None:
    index = Index(MemoryBackend())
    rng = np.random.default_rng(1)

    def rows(count: int) -> packs.Rows:
        made = np.zeros(count, dtype=packs.CHUNK)
        made["id"] = np.frombuffer(rng.bytes(32 * count), dtype="V32")
        return made

    large = rows(100_000)
    index.learn(packs.PackId(bytes(16)), large)
    first = index._segments[0]
    small = [rows(10) for _ in range(300)]
    for at, each in enumerate(small):
        index.learn(packs.PackId((at + 1).to_bytes(16, "big")), each)
    assert index._segments[0] is first and len(index._segments) < 12
    wanted = np.concatenate([large["id"][::7], *(each["id"] for each in small)])
    which, found = index.find(wanted)
    assert sorted(which) == list(range(len(wanted))) and (found["id"] == wanted[which]).all()
    index.forget(packs.PackId(bytes(16)))
    assert len(index.rows()) == 3000 and ROW.itemsize <= 64
    assert len(index.find(as_ids([large["id"][0].tobytes()]))[0]) == 0


def test_ids_with_the_same_beginning_are_told_apart() -> None:
    index = Index(MemoryBackend())
    ids = [bytes(8) + each.to_bytes(24, "big") for each in range(50)]
    rows = np.zeros(len(ids), dtype=packs.CHUNK)
    rows["id"], rows["raw"] = as_ids(ids), range(50)
    index.learn(packs.PackId(bytes(16)), rows)
    which, found = index.find(as_ids([*ids[::-1], bytes(8) + b"x" * 24]))
    assert found["raw"][np.argsort(which)].tolist() == list(range(49, -1, -1))
    assert as_ids([]).tobytes() == b"" and len(index.find(as_ids([]))[0]) == 0


def test_a_thread_that_fails_lets_no_other_wait() -> None:
    clock = Clock()
    backend = Flaky(clock)
    store = open_store(backend, clock)
    backend.fails = 1  # the record of the session is made, the first pack is not
    raised: list[type[BaseException]] = []

    def work(session: Session) -> None:
        try:
            session.add(os.urandom(100_000))
            session.flush()
        except Exception as exc:
            raised.append(type(exc))

    with store.session() as session:
        threads = [threading.Thread(target=work, args=[session]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert raised == [OSError] * 6 and names(backend, "packs/") == []
