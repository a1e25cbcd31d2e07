"""How a verb file behaves for whoever holds a descriptor: offsets, snapshots, polls, errors."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from krgfs import table
from krgfs.verbs import MAX_BYTES
from tests.mount.conftest import typing, wait_blocked
from tests.sites import Site, sleeper, until
from tests.workloads.harness import Workload


@contextlib.contextmanager
def opened(path: Path, flags: int):  # type: ignore[no-untyped-def]
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def errno_of(path: Path, data: bytes) -> int:
    """Return the errno that a write gets, 0 when it succeeds."""
    with opened(path, os.O_WRONLY) as fd:
        try:
            os.write(fd, data)
        except OSError as exc:
            return exc.errno or 0
    return 0


def test_a_write_and_its_answer_on_one_descriptor(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    done = shared_site.sh(
        "exec 3<>$P/checkpoint; echo 1 >&3; cat <&3; echo 1 >&3; cat <&3; echo no=1 >&3; cat <&3",
        P=str(place),
    )
    first, second, third = done.stdout.splitlines()
    assert (first, second) == (f"small.{small.pid}.n1/v1", f"small.{small.pid}.n1/v2")
    assert third.startswith("error EINVAL checkpoint: unknown word 'no=1'; write ")
    assert "Invalid argument" in done.stderr


def test_python_opens_reads_writes_and_seeks(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    with open(place / "checkpoint", "r+b", buffering=0) as file:
        assert file.read() == b""
        assert file.write(b"1\n") == 2
        assert file.read() == f"small.{small.pid}.n1/v1\n".encode()
        file.seek(0)
        file.write(b"1")
        file.seek(0)
        assert file.read(5) == b"small"
        assert file.read() == f".{small.pid}.n1/v2\n".encode()
    with open(place / "checkpoint", "w") as text:
        print("desc=buffered", file=text)
    assert (place / "checkpoint").read_text() == f"small.{small.pid}.n1/v3\n"
    with open(place / "freeze", "r+") as text:
        text.write("1")
        text.flush()
        text.seek(0)
        assert text.read().startswith("frozen since")
        text.seek(0)
        text.write("0")


def test_a_reader_has_one_state_from_open_to_end(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    with opened(place / "status", os.O_RDONLY) as fd:
        begin = os.read(fd, 10)
        shared_site.write(place / "freeze", "1")
        rest = begin + os.read(fd, 4096)
        os.lseek(fd, 0, os.SEEK_SET)
        anew = os.read(fd, 4096)
    shared_site.write(place / "freeze", "0")
    assert b"\nstate running\n" in rest and b"\nstate frozen\n" in anew


@pytest.mark.parametrize(
    "data",
    [
        b"1",
        b"1\n",
        b" 1 ",
        b"1 ",
        b"desc='a b'",
        b'"1"',
        b"1 desc=" + b"x" * (MAX_BYTES - 8) + b"\n",
    ],
    ids=lambda data: str(data[:12]),
)
def test_one_write_is_one_command(shared_site: Site, small: Workload, data: bytes) -> None:
    if len(data) > MAX_BYTES:
        data = data[:-2] + b"\n"
    assert errno_of(shared_site.proc(small.pid) / "checkpoint", data) == 0


@pytest.mark.parametrize(
    "data",
    [
        b"x" * (MAX_BYTES + 1),
        b"1 desc=" + b"x" * 100_000,
        b"",
        b"\n",
        b"1\n1\n",
        b"1\0",
        b"\xff\xfe",
        b"'1",
        b"then=fly",
        b"then=run then=run",
        b"name=../x",
        b"name=",
        b"1 1",
        b'desc="a\nb"',
    ],
    ids=lambda data: str(data[:12]),
)
def test_bad_words_change_nothing(shared_site: Site, small: Workload, data: bytes) -> None:
    path = shared_site.proc(small.pid) / "checkpoint"
    jobs = len(os.listdir(shared_site.mnt / "jobs"))
    if data:
        assert errno_of(path, data) == errno.EINVAL
        assert path.read_text().startswith("error EINVAL checkpoint: ")
        assert path.read_text().count("\n") == 1
    else:
        assert errno_of(path, data) == 0  # no write(2) of nothing reaches a filesystem
    assert len(os.listdir(shared_site.mnt / "jobs")) == jobs
    assert not (shared_site.mnt / "images" / f"small.{small.pid}.n1").exists()


def test_the_offset_of_a_write_means_nothing(shared_site: Site, small: Workload) -> None:
    path = shared_site.proc(small.pid) / "checkpoint"
    with opened(path, os.O_RDWR) as fd:
        assert os.pwrite(fd, b"1\n", 12345) == 2
        assert os.pread(fd, 100, 12347) == f"small.{small.pid}.n1/v1\n".encode()
    with opened(path, os.O_WRONLY | os.O_TRUNC | os.O_APPEND) as fd:
        assert os.write(fd, b"1\n") == 2
    assert path.read_text() == f"small.{small.pid}.n1/v2\n"


def test_an_error_comes_from_write_and_never_from_close(shared_site: Site, small: Workload) -> None:
    fd = os.open(shared_site.proc(small.pid) / "checkpoint", os.O_WRONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.write(fd, b"what\n")
    os.fsync(fd)
    os.close(fd)


def test_sizes_modes_and_kinds_are_those_of_the_table(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    for row in table.TABLE:
        if not row.path.startswith("nodes/NODE/procs/PID/") or row.name == "job":
            continue
        meta = os.stat(place / row.name)
        assert stat.S_IMODE(meta.st_mode) == row.mode, row.path
        assert meta.st_size == 0 and stat.S_ISREG(meta.st_mode)
        assert (meta.st_uid, meta.st_gid) == (0, 0)


def test_the_states_take_no_writes(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    for name in ("status", "tree", "files"):
        assert errno_of(place / name, b"1") == errno.EOPNOTSUPP
    for name in ("README", "version", "log", "events", "metrics", "nodes/n1/info"):
        assert errno_of(shared_site.mnt / name, b"1") == errno.EOPNOTSUPP


def test_a_lookup_of_a_verb_file_gives_a_fresh_inode(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    verbs = {os.stat(place / "wait").st_ino for _ in range(5)}
    states = {os.stat(place / "status").st_ino for _ in range(5)}
    assert (len(verbs), len(states)) == (5, 1)


def test_writers_of_one_verb_file_do_not_queue(shared_site: Site) -> None:
    with sleeper() as pid, contextlib.ExitStack() as stack:
        script = f"echo 1 > $K/procs/{pid}/wait"
        writers = [stack.enter_context(typing(shared_site, script)) for _ in range(8)]
        for writer in writers:
            wait_blocked(writer.pid, "wait")
        third = writers[3]
        begun = time.monotonic()
        third.kill()
        third.wait(5)
        print(f"killed one of eight in {time.monotonic() - begun:.3f} s")
        assert all(each.poll() is None for each in writers if each is not third)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        assert [each.wait(10) for each in writers if each is not third] == [0] * 7


def test_poll_of_wait_tells_the_end(shared_site: Site) -> None:
    with sleeper() as pid, opened(shared_site.proc(pid) / "wait", os.O_RDONLY) as fd:
        assert os.read(fd, 100) == b"running\n"
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(100) == []
        assert select.select([fd], [], [], 0.05)[0] == []
        begun = time.monotonic()
        os.kill(pid, 9)
        assert poll.poll(5000) == [(fd, select.POLLIN)]
        print(f"poll told the end in {time.monotonic() - begun:.3f} s")


def test_poll_of_wait_tells_the_end_of_a_restarted_tree(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    shared_site.write(place / "checkpoint", "then=kill name=polled")
    small.wait_gone([small.pid])
    shared_site.write("restart", "polled")
    small.wait_progress()
    with opened(place / "wait", os.O_RDONLY) as fd:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(100) == []
        shared_site.write(place / "signal", "KILL")
        assert poll.poll(5000) == [(fd, select.POLLIN)]
        until(lambda: os.pread(fd, 100, 0) == b"signal KILL\n", "the status")


@pytest.mark.parametrize("name", ["events", "log"])
def test_poll_of_what_grows_tells_a_new_line(shared_site: Site, small: Workload, name: str) -> None:
    with opened(shared_site.mnt / name, os.O_RDONLY) as fd:
        while os.read(fd, 65536):
            pass
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(100) == []
        with typing(shared_site, f"sleep 0.2; echo name={name} > $K/procs/{small.pid}/checkpoint"):
            assert poll.poll(10_000) == [(fd, select.POLLIN)]
            text = b""

            def told() -> bool:
                nonlocal text
                text += os.read(fd, 65536)
                return f"{name}/v1".encode() in text

            until(told, "the line")


def test_select_watches_several_waits_at_once(shared_site: Site) -> None:
    with sleeper() as one, sleeper() as two:
        first = os.open(shared_site.proc(one) / "wait", os.O_RDONLY)
        second = os.open(shared_site.proc(two) / "wait", os.O_RDONLY)
        try:
            os.kill(two, 9)
            assert select.select([first, second], [], [], 5)[0] == [second]
            os.kill(one, 9)
            ready = until(
                lambda: select.select([first, second], [], [], 5)[0] == [first, second], "both"
            )
            assert ready
        finally:
            os.close(first)
            os.close(second)


def test_epoll_of_wait_tells_the_end(shared_site: Site) -> None:
    with (
        sleeper() as pid,
        opened(shared_site.proc(pid) / "wait", os.O_RDONLY) as fd,
        select.epoll() as epoll,
    ):
        epoll.register(fd, select.EPOLLIN)
        assert epoll.poll(0.1) == []
        os.kill(pid, 9)
        assert epoll.poll(5) == [(fd, select.EPOLLIN)]


def test_no_read_ever_blocks(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    begun = time.monotonic()
    for name in os.listdir(place):
        if name != "job":
            (place / name).read_bytes()
    for name in ("events", "log", "restart", "metrics"):
        (shared_site.mnt / name).read_bytes()
    assert time.monotonic() - begun < 5
    assert (place / "wait").read_text() == "running\n"


def test_what_vanished_is_no_such_process(shared_site: Site) -> None:
    with sleeper() as pid:
        place = shared_site.proc(pid)
        with contextlib.ExitStack() as stack:
            names = ("status", "tree", "files", "checkpoint", "freeze", "signal", "wait")
            fds = {n: stack.enter_context(opened(place / n, os.O_RDONLY)) for n in names}
            verbs = ("checkpoint", "freeze", "signal")
            writers = {n: stack.enter_context(opened(place / n, os.O_WRONLY)) for n in verbs}
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            for fd in fds.values():
                with pytest.raises(ProcessLookupError):
                    os.read(fd, 100)
            for name, fd in writers.items():
                with pytest.raises(ProcessLookupError):
                    os.write(fd, b"0" if name == "freeze" else b"9" if name == "signal" else b"1")
        until(lambda: not place.exists(), "its directory gone", 3)
        with pytest.raises(FileNotFoundError):
            (place / "status").read_text()
        assert shared_site.sh(f"echo 1 > {place}/checkpoint").returncode == 1


def test_a_process_that_has_just_come_is_there_at_once(shared_site: Site) -> None:
    for _ in range(5):
        with sleeper() as pid:
            assert shared_site.facts(shared_site.proc(pid) / "status")["pid"] == str(pid)
            assert str(pid) in os.listdir(shared_site.mnt / "procs")
        assert str(pid) not in os.listdir(shared_site.mnt / "procs")


def test_kernel_threads_and_keepers_are_not_shown(shared_site: Site) -> None:
    shown = set(os.listdir(shared_site.mnt / "procs"))
    assert "2" not in shown and not shown & {str(pid) for pid in shared_site.keepers()}
    assert {"1", str(os.getpid())} <= shown


FOREIGN = """
mount -t proc proc /proc
cd "$K" && cat version && echo 1 > procs/{pid}/checkpoint
echo "status $?"; cat procs/{pid}/checkpoint; readlink self; cat self/status | head -1
echo name=foreign.{pid} > self/checkpoint; echo "self $?"
"""


def test_a_number_from_another_pid_namespace_is_refused(shared_site: Site, small: Workload) -> None:
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "bash", "-c", FOREIGN.format(pid=small.pid)],
        env={**os.environ, "K": str(shared_site.mnt)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        start_new_session=True,
    )
    lines = done.stdout.splitlines()
    assert lines[1] == "status 1" and "Invalid argument" in done.stderr, done
    assert lines[2].startswith(f"error EINVAL pid {small.pid} means another process")
    assert "/krg/self" in lines[2]
    assert not (shared_site.mnt / "images" / f"small.{small.pid}.n1").exists()
    assert lines[3].startswith("procs/") and lines[3] != "procs/1"
    small.wait_progress()


ODD_NAMES = """
import os, sys
def moved(path): os.rename(path, path + b"x")
def read(path): os.getxattr(path, "user.x")
def linked(path): os.symlink("v1", path)
acts = os.stat, os.listdir, os.readlink, os.unlink, os.rmdir, os.mkdir, os.mknod
for name in (b"\\xff\\xfe", b"x" * 255, b"-1", b"9" * 20, b"a\\nb", "\u0661".encode()):
    for top in ("procs", "images", "jobs", "nodes", ""):
        path = os.path.join(os.fsencode(sys.argv[1]), top.encode(), name)
        for act in (*acts, moved, read, linked):
            try:
                act(path)
            except OSError as exc:
                if exc.errno == 5:
                    print(act, path)
"""


def test_odd_names_and_lost_data_do_not_end_the_mount() -> None:
    with Site() as site, sleeper() as pid:
        done = subprocess.run(
            [sys.executable, "-c", ODD_NAMES, str(site.mnt)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), site.logs()
        site.write(site.proc(pid) / "checkpoint", "1")
        for place in ("packs", "manifests"):
            shutil.rmtree(site.state / "images" / place)
        image = site.mnt / "images" / f"sleep.{pid}.n1" / "v1"
        with pytest.raises(OSError):
            (image / "manifest.json").read_bytes()
        assert site.mount is not None and site.mount.poll() is None
        assert site.read(site.proc(pid) / "freeze") == "running\n"


def test_a_long_line_that_a_shell_writes_in_two_parts_tells_its_own_error(
    shared_site: Site, small: Workload
) -> None:
    place = shared_site.proc(small.pid) / "checkpoint"
    done = shared_site.sh("echo name=$(printf %05000d 0) > $F", F=str(place))
    assert done.returncode == 1
    assert "is not a name" in place.read_text()
