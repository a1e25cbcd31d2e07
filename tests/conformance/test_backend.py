"""What every back end of the image store does, and what directories and S3 do beside it."""

import array
import errno
import functools
import http.server
import itertools
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.backend import DAY_S, MemoryBackend
from agent.backend_directory import DirectoryBackend
from agent.backend_s3 import PART_BYTES, Bucket, Keys, S3Backend
from agent.backends import open_backend
from krgfs.errors import BadWords, EngineFailed
from tests import weed

ROOT = Path(__file__).parents[2]


class Two:
    """Two back ends on one root: each call goes to the other one, as if nodes took turns."""

    def __init__(self, *backends):
        self._turns = itertools.cycle(backends)
        self._backends = backends

    def __getattr__(self, name):
        return getattr(next(self._turns), name)

    def close(self):
        for each in self._backends:
            each.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with weed.running(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture(params=["memory", "directory", "shared", "s3"])
def store(request, tmp_path):
    root = str(tmp_path / "root")
    if request.param == "memory":
        store = MemoryBackend()
    elif request.param == "directory":
        store = DirectoryBackend(root)
    elif request.param == "shared":
        store = Two(DirectoryBackend(root), DirectoryBackend(root))
    else:
        server = request.getfixturevalue("server")
        store = open_backend(server.location(uuid.uuid4().hex), server.credentials)
    yield store
    store.close()


@pytest.fixture
def directory(tmp_path):
    store = DirectoryBackend(str(tmp_path / "root"))
    yield store
    store.close()


def names(store, prefix=""):
    return [entry.name for entry in store.list(prefix)]


def filled(store, name, offset, size):
    buffer = bytearray(b"?" * size)
    return bytes(buffer[: store.read_into(name, offset, memoryview(buffer))])


# -- the protocol


def test_an_object_is_read_back_and_listed_with_its_size(store):
    store.put("packs/ab/abcd", b"hello")
    store.put("format", b"")
    assert store.read("packs/ab/abcd") == b"hello"
    assert store.read("format") == b""
    assert [(entry.name, entry.size) for entry in store.list("")] == [
        ("format", 0),
        ("packs/ab/abcd", 5),
    ]


def test_what_is_not_there_is_enoent_and_is_named(store):
    for read in (
        store.read,
        lambda name: store.read(name, 0, 0),
        lambda name: store.read(name, -9),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            read("packs/none")
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == "packs/none"
    with pytest.raises(FileNotFoundError):
        store.read_into("packs/none", 0, memoryview(bytearray(1)))
    assert store.list("packs/") == []


def test_a_put_replaces_only_when_told(store):
    store.put("sessions/a", b"first")
    with pytest.raises(FileExistsError) as caught:
        store.put("sessions/a", b"second")
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, "sessions/a")
    assert filled(store, "sessions/a", 0, 9) == b"first"
    assert store.read("sessions/a") == b"first"
    store.put("sessions/a", b"3", replace=True)
    store.put("sessions/b", memoryview(bytearray(b"new")), replace=True)
    for _ in range(2):
        assert store.read("sessions/a") == filled(store, "sessions/a", 0, 9) == b"3"
        assert store.read("sessions/b") == b"new"


def test_a_list_is_by_name_and_bounded_by_its_prefix(store):
    put = ["a/b/c", "a/b%2F@x:y,z=1/v1~+", "a/v10", "a/v2", "a.b/c", "ab/c", "b", "a/b-c/d"]
    for name in put:
        store.put(name, b"")
    assert names(store) == sorted(put)
    assert names(store, "a/") == sorted(name for name in put if name.startswith("a/"))
    assert names(store, "a/b/") == ["a/b/c"]
    assert names(store, "c/") == names(store, "b/") == []


def test_no_name_leads_out_of_the_store(store):
    bad = ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/./b", ".a", "a/.b", "a b", "ä", "a\0"]
    for name in bad:
        for call in (
            lambda name: store.put(name, b""),
            lambda name: store.put(name, b"", replace=True),
            lambda name: store.read_into(name, 0, memoryview(bytearray(1))),
            *(store.read, store.create, store.delete),
        ):
            with pytest.raises(OSError) as caught:
                call(name)
            assert caught.value.errno == errno.EINVAL
    assert store.list("") == []


RANGES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RANGES
@given(data=st.binary(max_size=40), offset=st.integers(-50, 50), size=st.integers(0, 50))
def test_ranges_are_cut_as_python_cuts(store, data, offset, size):
    store.put("object", data, replace=True)
    start = max(0, len(data) + offset) if offset < 0 else offset
    assert store.read("object", offset) == data[start:]
    assert store.read("object", offset, size) == data[start : start + size]
    assert filled(store, "object", abs(offset), size) == data[abs(offset) :][:size]


def test_of_many_that_put_one_object_at_once_one_has_it(store):
    for name in ("race/1", "race/2"):
        together = threading.Barrier(4)

        def put(i, name=name, together=together):
            together.wait()
            try:
                store.put(name, b"%d" % i * 1000)
            except FileExistsError:
                return None
            return i

        with ThreadPoolExecutor(4) as pool:
            (winner,) = [i for i in pool.map(put, range(4)) if i is not None]
        assert store.read(name) == b"%d" % winner * 1000


def test_an_upload_is_seen_by_nobody_before_its_commit(store):
    upload = store.create("packs/ab/1")
    assert upload.append(b"KRGPACK1") == 0
    assert upload.append(b"x" * PART_BYTES, b"y" * 5) == 8
    assert store.list("") == []
    with pytest.raises(FileNotFoundError):
        store.read("packs/ab/1")
    assert upload.append() == upload.append(b"") == PART_BYTES + 13
    upload.commit()
    assert store.list("")[0][:2] == ("packs/ab/1", PART_BYTES + 13)
    assert filled(store, "packs/ab/1", 6, 4) == b"K1xx"
    assert store.read("packs/ab/1", -6) == b"xyyyyy"


def test_the_parts_of_an_append_follow_each_other_and_are_the_callers_again(store):
    upload = store.create("packs/ab/1")
    parts = [bytearray(b"%07d," % i) for i in range(3000)]
    assert upload.append(*parts) == 0
    expected = b"".join(parts)
    for part in parts:
        part[:] = b"overlaid"
    words = array.array("I", range(100))
    assert upload.append(memoryview(words), b"", bytearray()) == len(expected)
    upload.commit()
    assert store.read("packs/ab/1") == expected + words.tobytes()


def test_threads_append_at_once_each_to_a_place_of_its_own(store):
    upload = store.create("packs/ab/1")

    def append(i):
        parts = [bytes([i]) * random.Random(i).randrange(1, 200_000) for _ in range(3)]
        return upload.append(*parts), b"".join(parts)

    with ThreadPoolExecutor(8) as pool:
        placed = sorted(pool.map(append, range(100)))
    upload.commit()
    assert store.read("packs/ab/1") == b"".join(data for _, data in placed)
    assert [offset for offset, _ in placed] == [
        0,
        *itertools.accumulate(len(data) for _, data in placed[:-1]),
    ]


def test_an_upload_that_is_aborted_leaves_nothing(store):
    for size in (0, 100, 3 * PART_BYTES):
        upload = store.create("packs/ab/1")
        upload.append(bytes(size))
        upload.abort()
        upload.abort()
    assert store.list("") == []
    store.put("packs/ab/1", b"")


def test_what_is_deleted_is_gone_and_need_not_have_been(store):
    for _ in range(2):
        store.put("packs/ab/1", b"1")
        assert filled(store, "packs/ab/1", 0, 1) == b"1"
        store.delete("packs/ab/1")
        assert store.list("") == []
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                store.read_into("packs/ab/1", 0, memoryview(bytearray(1)))
    store.delete("packs/ab/1")
    store.delete("never/was")


def test_objects_are_dated_by_the_clock_that_now_reads(store):
    before = store.now()
    store.put("a", b"")
    upload = store.create("b")
    upload.append(b"1")
    upload.commit()
    after = store.now()
    assert before <= after
    assert all(before <= entry.modified <= after for entry in store.list(""))
    assert names(store) == ["a", "b"]


def test_there_is_room_and_tidying_takes_no_object(store):
    room = store.room()
    assert room.total >= room.free >= room.available > 0
    assert room.files >= room.files_free >= 0
    store.put("a", b"")
    upload = store.create("b")
    store.tidy()
    upload.commit()
    assert names(store) == ["a", "b"]


# -- directories


def run(script, *words):
    """Run a script in a process of its own, which has this source tree."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, words)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_files_are_for_the_owner_alone(directory, tmp_path):
    directory.put("packs/ab/1", b"1")
    for path in (tmp_path / "root").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700


RACER = """
    import sys
    from agent.backend_directory import DirectoryBackend

    store = DirectoryBackend(sys.argv[1])
    print("ready", flush=True)
    for name in sys.stdin:
        try:
            store.put(name.strip(), sys.argv[2].encode() * 5000)
            print("won", flush=True)
        except FileExistsError:
            print("lost", flush=True)
"""


def test_of_two_processes_that_put_one_object_one_has_it(directory, tmp_path):
    racers = [run(RACER, tmp_path / "root", i) for i in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for i in range(200):
        for racer in racers:
            racer.stdin.write(f"manifests/{i // 10}/v{i}\n")
            racer.stdin.flush()
        outcomes = [racer.stdout.readline() for racer in racers]
        assert sorted(outcomes) == ["lost\n", "won\n"]
        assert directory.read(f"manifests/{i // 10}/v{i}") == b"%d" % outcomes.index("won\n") * 5000
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0


WRITER = """
    import itertools, sys
    from agent.backend_directory import DirectoryBackend

    store = DirectoryBackend(sys.argv[1])
    for i in itertools.count(int(sys.argv[2])):
        store.put(f"manifests/{i}/v1", b"%08d" % i * 100_000)
        upload = store.create(f"packs/{i}")
        for _ in range(10):
            upload.append(b"%08d" % i * 10_000)
        upload.commit()
        print(i, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_objects_or_none(directory, tmp_path):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    promised, cut_short = [], 0
    for life in range(8):
        writer = run(WRITER, tmp_path / "root", life * 1000)
        promised.append(int(writer.stdout.readline()))
        time.sleep(dice.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        promised += map(int, writer.communicate()[0].split())
        cut_short += len(list((tmp_path / "root/.tmp").glob("????????????????????????????????")))
    found = names(directory)
    assert {f"manifests/{i}/v1" for i in promised} | {f"packs/{i}" for i in promised} <= set(found)
    for name in found:
        (i,) = re.findall(r"/(\d+)", name)[:1]
        assert directory.read(name) == b"%08d" % int(i) * 100_000
    assert cut_short  # else nobody was killed at work


def test_what_the_dead_left_is_tidied_away_a_day_later(directory):
    old, young = directory.create("packs/1"), directory.create("packs/2")
    day_ago = directory.now() - DAY_S
    os.utime(old._path, (day_ago - 60, day_ago - 60))
    directory.tidy()
    assert not os.path.exists(old._path)
    young.commit()
    with pytest.raises(FileNotFoundError):
        old.commit()
    old.abort()
    assert names(directory) == ["packs/2"]


def test_the_age_of_an_object_counts_from_its_commit(directory):
    upload = directory.create("packs/1")
    upload.append(b"1")
    os.utime(upload._path, (1, 1))
    before = directory.now()
    upload.commit()
    assert directory.list("")[0].modified >= before


def test_what_is_no_object_is_not_listed(directory, tmp_path):
    directory.put("packs/1", b"")
    root = tmp_path / "root"
    (root / "packs/.nfs0000001").touch()
    (root / "packs/link").symlink_to(root / "packs/1")
    (root / "lost+found").mkdir()
    os.mkfifo(root / "fifo")
    assert names(directory) == ["packs/1"]


def test_a_directory_that_somebody_removed_is_made_again(directory, tmp_path):
    directory.put("packs/ab/1", b"")
    directory.delete("packs/ab/1")
    (tmp_path / "root/packs/ab").rmdir()
    (tmp_path / "root/packs").rmdir()
    directory.put("packs/ab/2", b"")
    assert names(directory) == ["packs/ab/2"]


@pytest.fixture
def small(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_on_a_full_disk_nothing_becomes_visible(small):
    store = DirectoryBackend(str(small))
    store.put("fits", bytes(1 << 20))
    with pytest.raises(OSError) as caught:
        store.put("packs/1", bytes(4 << 20))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "packs/1")
    upload = store.create("packs/2")
    upload.append(bytes(1 << 20))
    for step in (lambda: upload.append(bytes(4 << 20)), upload.commit):
        with pytest.raises(OSError) as caught:
            step()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "packs/2")
    upload.abort()
    store.put("packs/3", bytes(2 << 20))
    assert [entry[:2] for entry in store.list("")] == [("fits", 1 << 20), ("packs/3", 2 << 20)]
    assert list((small / ".tmp").iterdir()) == []
    store.close()


def test_readers_share_few_open_files_and_never_read_another(tmp_path):
    store = DirectoryBackend(str(tmp_path / "root"), open_files=2)
    for i in range(20):
        store.put(f"packs/{i}", b"%05d" % i * 1000)

    def read(seed):
        dice = random.Random(seed)
        for _ in range(500):
            i = dice.randrange(20)
            if dice.random() < 0.1:
                store.put(f"packs/{i}", b"%05d" % i * 1000, replace=True)
            assert filled(store, f"packs/{i}", 10, 50) == b"%05d" % i * 10

    before = len(os.listdir("/proc/self/fd"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads change between any two steps
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- S3


def test_an_upload_that_is_aborted_leaves_no_parts_at_the_server(server):
    store = open_backend(server.location("aborted"), server.credentials)
    upload = store.create("packs/1")
    for _ in range(6):
        upload.append(bytes(PART_BYTES))
    deadline = time.monotonic() + 10
    while len(server.parts()) < 6:  # one on its way may come after the abort, to Amazon too
        assert time.monotonic() < deadline
        time.sleep(0.01)
    upload.abort()
    assert server.uploads() == store.list("") == []
    store.close()


def test_a_list_has_more_than_one_page(server):
    store = open_backend(server.location("pages"), server.credentials)
    put = [f"packs/{i:04}" for i in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(functools.partial(store.put, data=b""), put))
    assert names(store) == names(store, "packs/") == put
    store.close()


def test_a_bucket_that_is_not_there_or_not_ours_is_refused(server, tmp_path):
    with pytest.raises(EngineFailed, match="no such bucket"):
        open_backend(server.location("").replace("krg", "other"), server.credentials)
    wrong = tmp_path / "wrong"
    wrong.touch(0o600)
    wrong.write_text(f"AWS_ACCESS_KEY_ID={weed.ACCESS_KEY}\nAWS_SECRET_ACCESS_KEY=wrong\n")
    with pytest.raises(EngineFailed, match="credentials"):
        open_backend(server.location("x"), str(wrong))


@pytest.fixture
def fake():
    """Return a function that runs an HTTP server for S3Backend, given what it answers: a status,
    and headers or None for no answer at all."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers = answer(self.command, self.path.split("?")[0], self.headers)
                if status:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()

            def log_message(self, *words):
                pass

            do_PUT = do_POST = do_GET = do_HEAD = do_DELETE = do

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return Bucket("krg", endpoint=f"http://127.0.0.1:{server.server_port}")

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


KEYS = Keys("key", "secret")
STORED = {"ETag": '"1"', "Content-Length": "0"}
LOST = (412, {"Content-Length": "0"})


def test_a_server_that_takes_every_put_is_refused(fake):
    bucket = fake(lambda method, path, headers: (200, STORED))
    with pytest.raises(EngineFailed, match="does not enforce If-None-Match"):
        S3Backend.open(bucket, KEYS, 1.0)


@pytest.mark.parametrize("takes", [(0, 1), (0, 2)], ids=["two-at-once", "one-later"])
def test_a_server_that_looks_before_it_takes_a_put_or_forgets_is_refused(fake, takes):
    puts, both_looked = {}, threading.Barrier(2)

    def answer(method, path, headers):
        if method != "PUT":
            return 200, STORED
        turn = puts[path] = puts.get(path, -1) + 1
        if turn < 2:
            turn = both_looked.wait()
        return (200, STORED) if turn in takes else LOST

    with pytest.raises(EngineFailed, match="does not enforce If-None-Match"):
        S3Backend.open(fake(answer), KEYS, 5.0)


def test_a_put_whose_answer_is_lost_has_happened_if_the_object_is_its_own(fake):
    stored = {}

    def answer(method, path, headers):
        if method == "PUT" and path not in stored:
            stored[path] = headers["x-amz-meta-krgfs-put"]
            return None, {}
        if method == "PUT":
            return LOST
        mark = {"x-amz-meta-krgfs-put": stored[path]}
        return 200, {"Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT", **STORED, **mark}

    store = S3Backend(fake(answer), KEYS, 1.0)
    store.put("manifests/a/v1", b"1")
    with pytest.raises(FileExistsError):
        store.put("manifests/a/v1", b"1")
    assert len(stored) == 1


@pytest.mark.parametrize(
    ("status", "number"), [(403, errno.EACCES), (500, errno.EIO), (507, errno.ENOSPC)]
)
def test_what_the_server_refuses_has_an_errno_and_the_name(fake, status, number):
    bucket = fake(lambda method, path, headers: (status, {"Content-Length": "0"}))
    store = S3Backend(bucket, KEYS, 0.2)
    upload = store.create("packs/1")
    for step in (
        lambda: store.put("packs/1", b""),
        lambda: store.read("packs/1"),
        lambda: upload.append(bytes(PART_BYTES)) or upload.commit(),
        upload.commit,
    ):
        with pytest.raises(OSError, match="packs/1") as caught:
            step()
        assert caught.value.errno == number
    upload.abort()


def test_a_server_that_is_down_or_silent_is_an_error_soon(fake):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        bucket = Bucket("krg", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(EngineFailed, match="Connection refused"):
            S3Backend.open(bucket, KEYS, 1.0)
        silent.listen()
        store = S3Backend(bucket, KEYS, 1.0)
        for call in (lambda: store.put("a", b""), lambda: store.list(""), store.now):
            with pytest.raises(TimeoutError):
                call()
        assert time.monotonic() - started < 20


# -- locations


def test_a_path_and_a_file_url_are_a_directory(tmp_path):
    for location in (f"{tmp_path}/a", f"file://{tmp_path}/a", f"file://localhost{tmp_path}/%61"):
        store = open_backend(location)
        store.put("n", location.encode(), replace=True)
        assert (tmp_path / "a/n").read_bytes() == location.encode()
        store.close()


@pytest.mark.parametrize(
    "location",
    [
        *(
            "",
            "here",
            "./here",
            "file:here",
            "file://host/path",
            "http://host/",
            "s3://",
            "s3:///a",
        ),
        *("s3://b/p?endpoint=ftp://h", "s3://b/p?secret=1", "s3://b/p#f", "s3://[", "file:///a?b"),
    ],
)
def test_other_locations_are_refused_with_what_can_be_written(location):
    with pytest.raises(BadWords, match=re.escape("s3://BUCKET/PREFIX?endpoint=")):
        open_backend(location)


@pytest.mark.parametrize("location", ["s3://me:hush@b/p", "s3://b/p?endpoint=http://me:hush@h:1"])
def test_keys_in_a_location_are_refused_and_not_repeated(location):
    with pytest.raises(BadWords, match="password") as caught:
        open_backend(location)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY={}\n",
        "# keys\nexport AWS_ACCESS_KEY_ID = '{}'\nexport AWS_SECRET_ACCESS_KEY = \"{}\"\n",
        "[default]\naws_access_key_id={}\naws_secret_access_key = {}\n[other]\naws_x = 1\n",
        "[only]\nAWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY={}\n",
    ],
)
def test_keys_come_from_a_file_of_ours(server, tmp_path, monkeypatch, text):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of somebody else")
    path = tmp_path / "keys"
    path.touch(0o400)
    path.write_text(text.format(weed.ACCESS_KEY, weed.SECRET_KEY))
    open_backend(server.location("keys"), str(path)).close()


def test_keys_come_from_the_environment_where_no_file_is_named(server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadWords, match="the environment has no AWS_ACCESS_KEY_ID"):
        open_backend(server.location("keys"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.SECRET_KEY)
    open_backend(server.location("keys")).close()


def test_a_file_of_keys_that_others_may_read_or_that_makes_no_sense_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("AWS_ACCESS_KEY_ID=hush\n")
    path.chmod(0o640)
    for change, words in [
        (lambda: None, "chmod 600"),
        (lambda: path.chmod(0o600), "has no AWS_SECRET_ACCESS_KEY"),
        (lambda: os.chown(path, 12345, 0), "chown it to root"),
        (lambda: os.chown(path, 0, 0) or path.write_text("[a\nhush"), "not a file of credentials"),
        (lambda: path.write_bytes(b"\xff"), "not text"),
        (path.unlink, "No such file"),
    ]:
        change()
        with pytest.raises(BadWords, match=words) as caught:
            open_backend("s3://b/p", str(path))
        assert "hush" not in str(caught.value)
