"""What every engine of the store protocol does, and what SQLite's does beside it."""

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.store import MAX_BYTES, MAX_OPERATIONS, Conflict, Expect, MemoryStore, Record
from agent.store_sqlite import SqliteStore
from krgfs.errors import Busy, EngineFailed, NoRoom

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def opened(engine, directory):
    store = MemoryStore() if engine == "memory" else await SqliteStore.open(directory / "store.db")
    async with contextlib.aclosing(store):
        yield store


@pytest.fixture(params=["memory", "sqlite"])
def engine(request):
    return request.param


@pytest.fixture
async def store(engine, tmp_path):
    async with opened(engine, tmp_path) as store:
        yield store


# -- the protocol


async def test_a_key_that_was_never_put_is_none(store):
    assert await store.get("apps/blast") is None
    assert await store.list("apps/") == []


async def test_a_put_is_read_back_with_the_revision_of_its_commit(store):
    revision = await store.commit([], {"a": b"1", "b": b""})
    assert await store.get("a") == Record("a", b"1", revision)
    assert await store.get("b") == Record("b", b"", revision)


async def test_the_revision_is_one_counter_for_all_keys(store):
    first = await store.commit([], {"a": b"1"})
    second = await store.commit([], {"b": b"2"})
    third = await store.commit([], {}, ["a"])
    assert first < second < third
    assert (await store.get("b")).revision == second


async def test_a_commit_without_a_change_keeps_the_revision(store):
    revision = await store.commit([], {"a": b"1"})
    assert await store.commit([Expect("a", revision)], {}) == revision
    assert await store.commit([], {}, ["never"]) == revision


async def test_a_list_is_ordered_by_utf8_and_bounded_by_its_prefix(store):
    keys = ["a", "a/b", "a/", "a/\uffff", "a/\U00010000", "a0", "aé", "b", "a/v10", "a/v2"]
    await store.commit([], {key: key.encode() for key in keys})
    found = [record.key for record in await store.list("a/")]
    assert found == ["a/", "a/b", "a/v10", "a/v2", "a/\uffff", "a/\U00010000"]
    assert {record.key for record in await store.list("")} == set(keys)
    assert [record.key for record in await store.list("é")] == []
    assert [record.value for record in await store.list("aé")] == ["aé".encode()]


async def test_an_expected_revision_that_holds_lets_the_commit_through(store):
    revision = await store.commit([Expect("a", 0)], {"a": b"1"})
    later = await store.commit([Expect("a", revision), Expect("b", 0)], {"a": b"2"})
    assert await store.get("a") == Record("a", b"2", later)


@pytest.mark.parametrize("wrong", [Expect("a", 0), Expect("a", 999), Expect("b", 1)])
async def test_one_expectation_that_fails_stops_the_whole_commit(store, wrong):
    revision = await store.commit([], {"a": b"1", "z": b"1"})
    with pytest.raises(Conflict) as caught:
        await store.commit([Expect("z", revision), wrong], {"a": b"2", "c": b"3"}, ["z"])
    assert caught.value.key == wrong.key
    assert await store.list("") == [Record("a", b"1", revision), Record("z", b"1", revision)]
    assert await store.commit([], {}) == revision


async def test_a_key_put_again_after_its_deletion_has_another_revision(store):
    before = await store.commit([], {"a": b"1"})
    await store.commit([Expect("a", before)], {}, ["a"])
    assert await store.get("a") is None
    await store.commit([Expect("a", 0)], {"a": b"1"})
    with pytest.raises(Conflict):
        await store.commit([Expect("a", before)], {"a": b"2"})


async def test_of_many_that_expect_the_same_one_wins(store):
    outcomes = []

    async def take(i):
        try:
            outcomes.append((await store.commit([Expect("owner", 0)], {"owner": b"%d" % i}), i))
        except Conflict:
            outcomes.append(None)

    async with trio.open_nursery() as nursery:
        for i in range(50):
            nursery.start_soon(take, i)
    ((revision, winner),) = [outcome for outcome in outcomes if outcome]
    assert await store.get("owner") == Record("owner", b"%d" % winner, revision)


async def test_commits_at_once_all_happen_and_each_has_its_own_revision(store):
    revisions = {}

    async def put(i):
        revisions[i] = await store.commit([Expect(f"k/{i:03}", 0)], {f"k/{i:03}": b"%d" % i})

    async with trio.open_nursery() as nursery:
        for i in range(200):
            nursery.start_soon(put, i)
    assert len(set(revisions.values())) == 200
    assert [(r.value, r.revision) for r in await store.list("k/")] == [
        (b"%d" % i, revisions[i]) for i in range(200)
    ]


async def test_what_no_engine_takes_is_a_value_error_and_changes_nothing(store):
    many = {f"k{i}": b"" for i in range(MAX_OPERATIONS)}
    for expect, put, delete in [
        ([Expect("k0", 0)], many, ()),
        ([], many, ["k"]),
        ([], {"k": bytes(MAX_BYTES)}, ()),
        ([], {"k": b""}, ["k"]),
        ([], {}, ["k", "k"]),
        ([Expect("k", 0), Expect("k", 1)], {"k": b""}, ()),
        ([], {"": b""}, ()),
        ([], {"\udcff": b""}, ()),
    ]:
        with pytest.raises(ValueError):
            await store.commit(expect, put, delete)
    assert await store.list("") == []
    await store.commit([], many)
    assert len(await store.list("k")) == MAX_OPERATIONS


async def test_a_commit_cancelled_before_it_began_has_not_happened(store):
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.commit([], {"a": b"1"})
    assert scope.cancelled_caught
    assert await store.get("a") is None
    await store.commit([Expect("a", 0)], {"a": b"2"})


async def test_after_cancellation_a_commit_has_happened_whole_or_not_at_all(store):
    for turn in range(30):
        reported = set()

        async def put(i, turn=turn, reported=reported):
            await store.commit([], {f"{turn}/{i}/a": b"1", f"{turn}/{i}/b": b"1"})
            reported.add(str(i))

        with trio.move_on_after(0.0002 * turn):
            async with trio.open_nursery() as nursery:
                for i in range(5):
                    nursery.start_soon(put, i)
        found = [record.key.split("/")[1] for record in await store.list(f"{turn}/")]
        assert all(found.count(i) == 2 for i in found)
        assert reported <= set(found)


async def test_a_closed_store_says_so_and_may_be_closed_again(store):
    await store.aclose()
    await store.aclose()
    for use in (
        lambda: store.get("a"),
        lambda: store.list(""),
        lambda: store.commit([], {"a": b""}),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await use()


_KEYS = st.sampled_from(["a", "a/", "a/1", "a/2", "b", "é", "\U00010000"])
_STEP = st.tuples(
    st.dictionaries(_KEYS, st.sampled_from(["now", "gone", "stale"]), max_size=3),
    st.dictionaries(_KEYS, st.binary(max_size=8), max_size=4),
    st.sets(_KEYS, max_size=3),
)


@pytest.mark.parametrize("which", ["memory", "sqlite"])
@settings(deadline=None, max_examples=60)
@given(steps=st.lists(_STEP, max_size=15))
def test_any_sequence_of_commits_agrees_with_a_dictionary(which, steps, tmp_path_factory):
    async def play():
        async with opened(which, tmp_path_factory.mktemp("store")) as store:
            model, last = {}, 0
            for wishes, put, delete in steps:
                delete -= put.keys()
                now = {key: model[key][1] if key in model else 0 for key in wishes}
                expect = [
                    Expect(key, {"now": now[key], "gone": 0, "stale": now[key] + 1}[wish])
                    for key, wish in wishes.items()
                ]
                try:
                    revision = await store.commit(expect, put, delete)
                except Conflict as conflict:
                    (wanted,) = [e.revision for e in expect if e.key == conflict.key]
                    assert wanted != now[conflict.key]
                else:
                    assert all(e.revision == now[e.key] for e in expect)
                    changed = bool(put or delete & model.keys())
                    assert (revision > last) if changed else (revision == last)
                    last = revision
                    model = {k: v for k, v in model.items() if k not in delete}
                    model |= {key: (value, revision) for key, value in put.items()}
                assert await store.list("") == [
                    Record(key, *model[key]) for key in sorted(model, key=str.encode)
                ]

    trio.run(play)


# -- SQLite's own


async def test_everything_is_there_after_reopening(tmp_path):
    async with opened("sqlite", tmp_path) as store:
        await store.commit([], {"gone": b""})
        revision = await store.commit([], {"a": b"1"}, ["gone"])
    async with opened("sqlite", tmp_path) as store:
        assert await store.list("") == [Record("a", b"1", revision)]
        assert await store.commit([Expect("a", revision)], {"b": b"2"}) > revision


async def test_two_stores_on_one_file_conflict_as_one_would(tmp_path):
    async with opened("sqlite", tmp_path) as one, opened("sqlite", tmp_path) as other:
        first = await one.commit([Expect("a", 0)], {"a": b"1"})
        with pytest.raises(Conflict):
            await other.commit([Expect("a", 0)], {"a": b"2"})
        second = await other.commit([Expect("a", first)], {"a": b"2"})
        assert await one.get("a") == Record("a", b"2", second)

        async def count(store):
            for _ in range(30):
                while True:
                    record = await store.get("n")
                    value, at = (int(record.value), record.revision) if record else (0, 0)
                    try:
                        await store.commit([Expect("n", at)], {"n": b"%d" % (value + 1)})
                        break
                    except Conflict:
                        pass

        async with trio.open_nursery() as nursery:
            for store in (one, other, one, other):
                nursery.start_soon(count, store)
        assert (await one.get("n")).value == b"120"


async def test_a_file_opened_by_many_at_the_same_moment_is_made_once(tmp_path):
    async def use(i):
        async with opened("sqlite", tmp_path) as store:
            await store.commit([], {f"k{i}": b""})

    async with trio.open_nursery() as nursery:
        for i in range(8):
            nursery.start_soon(use, i)
    async with opened("sqlite", tmp_path) as store:
        assert len(await store.list("k")) == 8


async def test_a_commit_that_was_begun_is_not_lost_to_a_cancelled_caller(tmp_path):
    """The second waits behind a writer in another process, is cancelled, and has its outcome."""
    async with opened("sqlite", tmp_path) as store:
        blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        returned = []
        async with trio.open_nursery() as nursery:

            async def put():
                returned.append(await store.commit([], {"a": b"1"}))

            nursery.start_soon(put)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
                assert returned == []
                blocker.execute("ROLLBACK")
        blocker.close()
        assert await store.get("a") == Record("a", b"1", returned[0])


async def test_a_cancelled_task_does_not_take_those_along_whose_commits_it_writes(tmp_path):
    async with opened("sqlite", tmp_path) as store:
        leader = trio.CancelScope()

        async def lead():
            with leader:
                await store.commit([], {"first": b""})

        async with trio.open_nursery() as nursery:
            await store._writing.acquire()
            await store._thread.acquire()  # a read is under way, and takes its time
            nursery.start_soon(lead)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(store.commit, [], {"second": b""})
            await trio.testing.wait_all_tasks_blocked()
            store._writing.release()
            await trio.testing.wait_all_tasks_blocked()
            leader.cancel()
            await trio.testing.wait_all_tasks_blocked()
            store._thread.release()
        assert [record.key for record in await store.list("")] == ["first", "second"]


async def test_a_transaction_that_breaks_in_the_middle_is_rolled_back(tmp_path):
    def no_update(action, *_):
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_UPDATE else sqlite3.SQLITE_OK

    async with opened("sqlite", tmp_path) as store:
        store._connection.set_authorizer(no_update)
        with pytest.raises(EngineFailed, match="not authorized"):
            await store.commit([], {"a": b"1"})
        store._connection.set_authorizer(None)
        assert await store.list("") == []
        assert await store.commit([Expect("a", 0)], {"a": b"2"}) == 1


async def test_the_files_are_for_the_owner_alone(tmp_path):
    (tmp_path / "store.db").touch(0o644)
    async with opened("sqlite", tmp_path) as store:
        await store.commit([], {"a": b"1"})
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


async def test_every_commit_is_synced(tmp_path):
    async with opened("sqlite", tmp_path) as store:
        read = store._connection.execute
        assert read("PRAGMA journal_mode").fetchone() == ("wal",)
        assert read("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("PRAGMA user_version = 99", "a newer agent wrote it (format 99"),
        ("PRAGMA application_id = 7", "a database of something else"),
    ],
)
async def test_a_file_that_is_not_ours_to_use_is_refused_in_words(tmp_path, statement, words):
    async with opened("sqlite", tmp_path) as store:
        await store.commit([], {"a": b"1"})
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as db:
        db.execute(statement)
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(EngineFailed) as caught:
        await SqliteStore.open(tmp_path / "store.db")
    assert words in caught.value.message
    assert (tmp_path / "store.db").read_bytes() == before


async def test_another_program_s_database_is_left_alone(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(EngineFailed, match="something else"):
        await SqliteStore.open(tmp_path / "store.db")


async def test_damage_is_named_when_the_store_is_opened(tmp_path):
    path = tmp_path / "store.db"
    async with opened("sqlite", tmp_path) as store:
        for i in range(20):
            await store.commit([], {f"k{i}/{j}": bytes(500) for j in range(50)})
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * 20000)
    with pytest.raises(EngineFailed, match=r"it is damaged .* put a backup in its place"):
        await SqliteStore.open(path)
    path.write_bytes(b"this was never a database, it is a letter" * 100)
    with pytest.raises(EngineFailed, match="it is damaged"):
        await SqliteStore.open(path)


async def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(EngineFailed, match=r"cannot open the store .*/nowhere/store\.db"):
        await SqliteStore.open(tmp_path / "nowhere" / "store.db")


async def test_a_writer_that_never_ends_makes_others_busy(tmp_path):
    async with opened("sqlite", tmp_path) as store:
        store._connection.execute("PRAGMA busy_timeout = 50")
        with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            with pytest.raises(Busy, match="another process has held it"):
                await store.commit([], {"a": b"1"})
        await store.commit([Expect("a", 0)], {"a": b"1"})


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def leave(where, pages):
    """Fill a filesystem until so many pages are free."""
    room = os.statvfs(where)
    filler = where / "filler"
    filler.write_bytes(bytes((room.f_bavail - pages) * room.f_frsize))
    return filler


async def test_a_store_that_finds_no_room_to_begin_says_so_at_any_byte(small_disk):
    outcomes = set()
    for pages in range(30):
        filler = leave(small_disk, pages)
        try:
            async with opened("sqlite", small_disk) as store:
                await store.commit([], {"a": b"1"})
                outcomes.add("works")
        except NoRoom as exc:
            outcomes.add("no room")
            assert "no room left on its filesystem" in exc.message
        filler.unlink()
        for path in small_disk.iterdir():
            path.unlink()
    assert outcomes == {"works", "no room"}


async def test_a_full_disk_fails_the_commit_and_nothing_else(small_disk):
    async with opened("sqlite", small_disk) as store:
        revision = await store.commit([], {"kept": b"1"})
        filler = leave(small_disk, 0)
        with pytest.raises(NoRoom, match="no room left on its filesystem; make room there"):
            await store.commit([], {"kept": bytes(900_000)})
        assert await store.get("kept") == Record("kept", b"1", revision)
        filler.unlink()
        await store.commit([Expect("kept", revision)], {"kept": bytes(100_000)})


async def test_a_commit_without_room_does_not_fail_those_that_came_with_it(small_disk):
    async with opened("sqlite", small_disk) as store:
        outcomes = {}

        async def put(name, size):
            try:
                outcomes[name] = await store.commit([], {name: bytes(size)})
            except NoRoom:
                outcomes[name] = NoRoom

        async with trio.open_nursery() as nursery:
            await store._writing.acquire()  # they meet in one batch
            for i in range(3):
                nursery.start_soon(put, f"small{i}", 10)
                nursery.start_soon(put, f"large{i}", 900_000)
            await trio.testing.wait_all_tasks_blocked()
            store._writing.release()
        assert NoRoom in [outcomes[f"large{i}"] for i in range(3)]
        kept = {record.key for record in await store.list("")}
        assert {"small0", "small1", "small2"} <= kept
        assert kept == {name for name, outcome in outcomes.items() if outcome is not NoRoom}


@pytest.mark.parametrize("after_s", [0.05, 0.15, 0.4])
def test_what_was_reported_survives_kill_9(tmp_path, after_s):
    program = f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import trio
        from agent.store import Expect
        from agent.store_sqlite import SqliteStore

        async def commit(store, task):
            for i in range(1_000_000):
                await store.commit(
                    [Expect(f"{{task}}/{{i}}", 0)],
                    {{f"{{task}}/{{i}}": b"x" * 300, f"last/{{task}}": b"%d" % i}},
                )
                print(task, i, flush=True)

        async def main():
            store = await SqliteStore.open({str(tmp_path / "store.db")!r})
            async with trio.open_nursery() as nursery:
                for task in range(4):
                    nursery.start_soon(commit, store, task)

        trio.run(main)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    lines = [child.stdout.readline()]  # it works; from now on it may die at any time
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(after_s)
    child.kill()
    rest, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL
    reported = {tuple(line.split()) for line in [*lines, *rest.split("\n")[:-1]]}
    assert len(reported) > 4

    async def check():
        async with opened("sqlite", tmp_path) as store:
            keys = {record.key for record in await store.list("")}
            assert {f"{task}/{i}" for task, i in reported} <= keys
            for task in range(4):
                last = int((await store.get(f"last/{task}")).value)
                assert f"{task}/{last}" in keys
                assert f"{task}/{last + 1}" not in keys

    trio.run(check)
