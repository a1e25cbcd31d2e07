"""Very many waiting writers, a writer in very many groups, and names that cannot be moved."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from krgfs import facts, pending
from tests.mount.conftest import Start, wait_blocked
from tests.sites import Site, sleeper, until
from tests.workloads.harness import Workload

WRITERS = 1100
SOON_S = 3.0
MANY_GROUPS = range(4_000_000_000, 4_000_000_600)  # a line of more than 4096 bytes in /proc
PAGE = 4096
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

# Each thread opens and writes for itself. They open one after the other: a name that is looked up
# anew each time takes the kernel many attempts when a thousand want it at once.
MANY_WRITE = """
import json, os, sys, threading
threading.stack_size(1 << 18)
answers, one_at_a_time = [], threading.Lock()
def write():
    try:
        with one_at_a_time:
            fd = os.open(sys.argv[1], os.O_WRONLY)
        answers.append(os.write(fd, b"1"))
    except OSError as exc:
        answers.append(-exc.errno)
threads = [threading.Thread(target=write) for _ in range(int(sys.argv[2]))]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(json.dumps(answers))
"""

# The plain system call: Python's own would begin again after a signal (PEP 475).
WRITES = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, lambda *_: None)
signal.siginterrupt(signal.SIGINT, True)
fd = os.open(sys.argv[1], os.O_WRONLY)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.write(fd, b"1", 1), ctypes.get_errno(), flush=True)
"""


@contextlib.contextmanager
def writing(
    site: Site, pid: int, script: str, *words: str, **popen: object
) -> Iterator[subprocess.Popen[str]]:
    """A Python script that writes into `wait` of a process, which is ended before the writer is:
    nothing else surely answers the writes."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(site.proc(pid) / "wait"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **popen,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def waiting_threads(pid: int) -> int:
    return sum(pending.is_writing(tid, b"wait") for tid in facts.threads(pid))


def test_more_than_a_thousand_writers_wait_at_once(site: Site, small: Workload) -> None:
    with sleeper() as pid, writing(site, pid, MANY_WRITE, str(WRITERS)) as writer:
        until(lambda: waiting_threads(writer.pid) == WRITERS, f"{WRITERS} writers wait")
        begun = time.monotonic()
        assert site.facts(site.proc(small.pid) / "status")["state"] == "running"
        read = time.monotonic()
        answer = site.write(site.proc(small.pid) / "checkpoint", "name=beside")
        made = time.monotonic()
        assert answer == "beside/v1\n"
        small.wait_progress()
        assert waiting_threads(writer.pid) == WRITERS
        ended = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        out, _ = writer.communicate(timeout=30)
        answered = time.monotonic()
        assert json.loads(out) == [1] * WRITERS
    print(
        f"beside {WRITERS} writers: status in {read - begun:.3f} s, checkpoint in "
        f"{made - read:.3f} s; all answered in {answered - ended:.3f} s"
    )
    assert site.mount is not None and site.mount.poll() is None
    assert "handler.failed" not in site.logs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_a_writer_in_very_many_groups(
    shared_site: Site, number: signal.Signals
) -> None:
    options = {"extra_groups": list(MANY_GROUPS)}
    with sleeper() as pid, writing(shared_site, pid, WRITES, **options) as writer:
        wait_blocked(writer.pid, "wait")
        line = Path(f"/proc/{writer.pid}/status").read_bytes()
        assert line.find(b"SigPnd:") > PAGE, "the signals stand in the first page: nothing proved"
        begun = time.monotonic()
        writer.send_signal(number)
        until(lambda: writer.poll() is not None, f"{number.name} ends the writer", SOON_S)
        took = time.monotonic() - begun
        print(f"{number.name} ended a writer in {len(MANY_GROUPS)} groups in {took:.3f} s")
        assert facts.task(pid) is not None
        out, _ = writer.communicate()
        if number is signal.SIGINT:
            assert (out, writer.returncode) == (f"-1 {errno.EINTR}\n", 0)
        else:
            assert (out, writer.returncode) == ("", -number)


# -- names


def renameat2(source: Path, target: Path, flags: int) -> None:
    """rename(2) with flags; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = ctypes.c_int(-100)  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)):
        raise OSError(ctypes.get_errno(), "renameat2", str(source))


def exchange(source: Path, target: Path) -> None:
    renameat2(source, target, RENAME_EXCHANGE)


def keep_target(source: Path, target: Path) -> None:
    renameat2(source, target, RENAME_NOREPLACE)


Change = Callable[[Path, Path], None]


def seen(directory: Path) -> dict[str, bytes | str]:
    """Return what is below a directory: the content of files, the target of links."""
    found: dict[str, bytes | str] = {}
    for each in sorted(directory.rglob("*")):
        name = str(each.relative_to(directory))
        if each.is_symlink():
            found[name] = f"-> {os.readlink(each)}"
        else:
            found[name] = each.read_bytes() if each.is_file() else "directory"
    return found


@pytest.fixture(scope="module")
def named(shared_site: Site) -> Iterator[Path]:
    """The directory of images: apps `one` (two versions, the first labelled, and an import) and
    `two`; the trees have ended."""
    images = shared_site.mnt / "images"
    with sleeper() as pid:
        path = shared_site.proc(pid) / "checkpoint"
        assert shared_site.write(path, "name=one") == "one/v1\n"
        assert shared_site.write(path, "name=one") == "one/v2\n"
    with sleeper() as pid:
        path = shared_site.proc(pid) / "checkpoint"
        assert shared_site.write(path, "name=two") == "two/v1\n"
    os.symlink("v1", images / "one" / "label")
    (images / "one" / "v9.part").mkdir()
    (images / "one" / "v9.part" / "pages-1.img").write_bytes(b"some bytes")
    yield images


WITHIN = [
    (os.rename, "one/v1", "two/v5"),
    (os.rename, "one/v1", "two/v1"),
    (os.rename, "one/v1", "one/v5"),
    (os.rename, "one/v1", "one/v2"),
    (os.rename, "one/v1", "v1"),
    (os.rename, "one", "three"),
    (os.rename, "one", "two"),
    (os.rename, "one/v1/pages-1.img", "one/v1/other"),
    (os.rename, "one/v1/pages-1.img", "one/v2/pages-1.img"),
    (os.rename, "one/v1/pages-1.img", "one/v9.part/core.img"),
    (os.rename, "one/v9.part/pages-1.img", "one/v9.part/core.img"),
    (os.rename, "one/v9.part/pages-1.img", "one/v1/core.img"),
    (os.rename, "one/v9.part", "two/v9"),
    (os.rename, "one/v9.part", "one/v10.part"),
    (os.rename, "one/v9.part", "one/name"),
    (os.rename, "one/label", "one/another"),
    (os.rename, "one/label", "two/label"),
    (os.rename, "one/latest", "one/newest"),
    (os.rename, "one/index", "one/list"),
    (os.rename, "one/v1", "../v1"),
    (keep_target, "one/v1", "one/v5"),
    (keep_target, "one/v1", "two/v5"),
    (exchange, "one/v1", "one/v2"),
    (exchange, "one/v1", "two/v1"),
    (exchange, "one/v9.part", "one/v1"),
    (exchange, "one", "two"),
    (os.link, "one/v1/pages-1.img", "one/v1/other"),
    (os.link, "one/v1/pages-1.img", "one/v9.part/core.img"),
    (os.link, "one/v1/pages-1.img", "two/pages"),
    (os.link, "one/v9.part/pages-1.img", "one/v9.part/core.img"),
    (os.link, "one/index", "one/list"),
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("change", "source", "target"), WITHIN, ids=name_of)
def test_names_are_not_moved_or_linked(
    named: Path, change: Change, source: str, target: str
) -> None:
    before = seen(named)
    with pytest.raises(OSError) as told:
        change(named / source, named / target)
    assert told.value.errno == errno.EPERM
    assert seen(named) == before


@pytest.mark.parametrize("to", ["v1", "v2"])
def test_an_import_takes_no_number_that_is_in_use(named: Path, to: str) -> None:
    before = seen(named)
    with pytest.raises(OSError) as told:
        os.rename(named / "one" / "v9.part", named / "one" / to)
    assert told.value.errno == errno.EEXIST
    assert seen(named) == before


@pytest.mark.parametrize("change", [os.rename, os.link])
@pytest.mark.parametrize("name", ["one/v1/pages-1.img", "one/index", "one/v9.part/pages-1.img"])
def test_nothing_is_moved_or_linked_over_the_border(
    named: Path, tmp_path: Path, change: Change, name: str
) -> None:
    outside = tmp_path / "plain"
    outside.write_bytes(b"plain")
    before = seen(named)
    into = named / "one" / "v9.part" / "plain"
    for source, target in ((named / name, tmp_path / "out"), (outside, into)):
        with pytest.raises(OSError) as told:
            change(source, target)
        assert told.value.errno == errno.EXDEV
        assert seen(named) == before
        assert os.listdir(tmp_path) == ["plain"] and outside.read_bytes() == b"plain"


@pytest.mark.parametrize("name", ["one", "one/v1", "one/v9.part"])
def test_no_directory_is_moved_over_the_border(named: Path, tmp_path: Path, name: str) -> None:
    before = seen(named)
    with pytest.raises(OSError) as told:
        os.rename(named / name, tmp_path / "out")
    assert told.value.errno == errno.EXDEV
    assert seen(named) == before and os.listdir(tmp_path) == []


def test_names_of_processes_stay(shared_site: Site) -> None:
    with sleeper() as pid, sleeper() as other:
        place = shared_site.proc(pid)
        names = sorted(os.listdir(place))
        for change, source, target in (
            (os.rename, place / "status", place / "state"),
            (os.rename, place / "status", shared_site.proc(other) / "state"),
            (os.rename, place, shared_site.mnt / "procs" / "1000000000"),
            (exchange, place, shared_site.proc(other)),
            (os.rename, place, shared_site.mnt / "images" / "mine"),
            (os.rename, shared_site.mnt / "log", shared_site.mnt / "old"),
            (os.link, place / "status", place / "state"),
            (os.link, shared_site.mnt / "log", shared_site.mnt / "old"),
        ):
            with pytest.raises(OSError) as told:
                change(source, target)
            assert told.value.errno == errno.EPERM, (change, source, target)
            assert sorted(os.listdir(place)) == names
            assert f"pid {pid}\n" in (place / "status").read_text()
            assert f"pid {other}\n" in (shared_site.proc(other) / "status").read_text()


def test_mv_between_apps_copies_nothing(shared_site: Site, named: Path) -> None:
    before = seen(named)
    for typed in (
        "mv $I/one/v1 $I/two/",
        "mv $I/one/v1 $I/two/v7",
        "mv $I/one $I/two/",
        "mv -T $I/one $I/two",
        "ln $I/one/v1/pages-1.img $I/two/pages",
        "cp -rl $I/one/v1 $I/two/",
    ):
        done = shared_site.sh(typed, I=str(named))
        assert done.returncode == 1 and "Operation not permitted" in done.stderr, (typed, done)
        assert seen(named) == before, typed


def test_mv_out_takes_the_image_along_whole(
    shared_site: Site, start: Start, tmp_path: Path
) -> None:
    tree = start()
    assert shared_site.write(shared_site.proc(tree.pid) / "checkpoint", "name=leaves")
    image = shared_site.mnt / "images" / "leaves" / "v1"
    before = seen(image)
    os.symlink("v1", image.parent / "pinned")
    done = shared_site.sh("mv $I $D/pinned", I=str(image), D=str(tmp_path))
    assert done.returncode == 1 and "Device or resource busy" in done.stderr
    assert seen(image) == seen(tmp_path / "pinned") == before
    (image.parent / "pinned").unlink()
    done = shared_site.sh("mv $I $D/v1", I=str(image), D=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert seen(tmp_path / "v1") == before and not image.exists()
