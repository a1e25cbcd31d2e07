"""Sweeps of a store that nobody else writes: what is removed is gone at once, and whoever is at
work keeps what it named."""

from __future__ import annotations

import random

import pytest

from agent.backend import MemoryBackend
from agent.chunk_records import SESSIONS, encode_session
from agent.chunks import ChunkStore, Session
from agent.sweep import Swept, sweep, verify
from krgfs.errors import TryAgain

CONTENTS = [random.Random(each).randbytes(1000) for each in range(8)]


def named(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(clock=lambda: 1e9)


@pytest.fixture
def store(backend: MemoryBackend) -> ChunkStore:
    return ChunkStore.open(backend)


def publish(session: Session, name: str, contents: list[int]) -> None:
    ids = [session.add(CONTENTS[each]) for each in contents]
    session.flush()
    session.publish(name, b"".join(ids))


def write(store: ChunkStore, name: str, *contents: int) -> None:
    with store.session() as session:
        publish(session, name, [*contents])


def swept(store: ChunkStore) -> Swept:
    return sweep(store, named, alone=True)


def holds(backend: MemoryBackend, prefix: str) -> list[str]:
    return [each.name for each in backend.list(prefix)]


def test_what_no_image_needs_is_gone_after_two_sweeps(
    store: ChunkStore, backend: MemoryBackend
) -> None:
    write(store, "a/v1", 0, 1)
    write(store, "a/v2", 1, 2)
    backend.delete("manifests/a/v2")
    assert swept(store).condemned_chunks == 1
    assert swept(store).removed_packs == 1
    assert holds(backend, "condemned/") == holds(backend, "sessions/") == []
    assert len(holds(backend, "packs/")) == 1 and verify(store, named).is_sound


def test_a_writer_that_began_before_keeps_what_it_reused(
    store: ChunkStore, backend: MemoryBackend
) -> None:
    write(store, "a/v1", 0, 1)
    with store.session() as session:
        backend.delete("manifests/a/v1")
        assert swept(store).condemned_chunks == 2
        assert len(swept(store).waiting) == 1
        publish(session, "a/v2", [0, 1])
    assert swept(store).removed_packs == 0
    assert verify(store, named).is_sound


def test_a_writer_that_began_after_writes_anew_and_holds_nothing_up(
    store: ChunkStore, backend: MemoryBackend
) -> None:
    write(store, "a/v1", 0, 1)
    backend.delete("manifests/a/v1")
    swept(store)
    with store.session() as session:
        id = session.add(CONTENTS[0])
        assert session.new_bytes and swept(store).removed_packs == 1
        session.flush()
        session.publish("a/v2", id)
    swept(store)
    assert verify(store, named).is_sound and store.read(id) == CONTENTS[0]


def test_what_a_dead_agent_left_holds_nothing_up(store: ChunkStore, backend: MemoryBackend) -> None:
    backend.put(f"{SESSIONS}dead", encode_session(1e9, sweeps=True))
    with store.session() as session:
        session.add(CONTENTS[0])
        session.flush()
    assert swept(store).condemned_chunks == 1
    swept(store)
    assert holds(backend, "packs/") == holds(backend, "sessions/") == []


def test_one_sweep_at_a_time(store: ChunkStore) -> None:
    with store.sweeping, pytest.raises(TryAgain):
        swept(store)


def test_a_sweep_that_is_told_to_stop_leaves_the_store_sound(
    store: ChunkStore, backend: MemoryBackend
) -> None:
    write(store, "a/v1", 0, 1)
    write(store, "a/v2", 2)
    backend.delete("manifests/a/v1")
    swept(store)

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        sweep(store, named, alone=True, check=stop)
    assert holds(backend, "sessions/") == [] and not store.alive()
    assert swept(store).removed_packs == 1 and verify(store, named).is_sound
