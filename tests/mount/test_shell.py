"""What people type at verb files and the tree of files: exit status and message of each."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.conftest import Start, typing
from tests.sites import Site, until
from tests.workloads.harness import Workload


def version(site: Site, tree: Workload) -> int:
    """Return how many images the tree's app has."""
    last = site.facts(site.proc(tree.pid) / "status").get("last_image", "")
    return int(last.rpartition("/v")[2] or 0)


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize(
    "typed",
    [
        "echo 1 > $P/checkpoint",
        "echo 1 >> $P/checkpoint",
        "set -C; echo 1 >| $P/checkpoint",
        "printf 1 > $P/checkpoint",
        "printf '%s\\n' 'desc=\"two words\"' > $P/checkpoint",
        "echo 1 | tee $P/checkpoint",
        "echo 1 | tee -a $P/checkpoint > /dev/null",
        "echo 1 | dd of=$P/checkpoint status=none",
        "echo 1 > /tmp/krg-typed.$$; cp /tmp/krg-typed.$$ $P/checkpoint; s=$?;"
        " rm /tmp/krg-typed.$$; exit $s",
    ],
)
def test_a_typed_write_makes_an_image(
    shared_site: Site, small: Workload, shell: str, typed: str
) -> None:
    done = shared_site.sh(typed, shell, P=str(shared_site.proc(small.pid)))
    assert (done.returncode, done.stderr) == (0, "")
    assert version(shared_site, small) == 1
    read = shared_site.sh("cat $P/checkpoint", shell, P=str(shared_site.proc(small.pid)))
    assert read.stdout == f"small.{small.pid}.n1/v1\n"
    small.wait_progress()


@pytest.mark.parametrize(
    ("shell", "said"),
    [("bash", "echo: write error: Invalid argument"), ("dash", "echo: I/O error")],
)
def test_a_refused_write_fails_and_says_why_in_the_file_and_the_log(
    shared_site: Site, small: Workload, shell: str, said: str
) -> None:
    place = shared_site.proc(small.pid)
    done = shared_site.sh("echo thn=stop > $P/checkpoint && echo on", shell, P=str(place))
    assert done.returncode != 0
    assert said in done.stderr and "on" not in done.stdout
    line = shared_site.read(place / "checkpoint")
    assert line.startswith("error EINVAL checkpoint: unknown word 'thn=stop'; write ")
    assert version(shared_site, small) == 0
    last = shared_site.read("log").splitlines()[-1]
    assert f" - checkpoint nodes/n1/procs/{small.pid} n1 EINVAL " in last
    shared_site.write(place / "checkpoint", "1")
    assert shared_site.read(place / "checkpoint") == f"small.{small.pid}.n1/v1\n"


def test_noclobber_refuses_a_plain_redirection(shared_site: Site, small: Workload) -> None:
    done = shared_site.sh("set -C; echo 1 > $P/checkpoint", P=str(shared_site.proc(small.pid)))
    # bash takes what is no regular file, and a verb file is one for everybody's sake
    assert done.returncode == 1 and "cannot overwrite existing file" in done.stderr
    assert version(shared_site, small) == 0


def test_a_failed_line_of_a_script_stops_what_follows_it(
    shared_site: Site, small: Workload
) -> None:
    done = shared_site.sh(
        "set -e; echo 1 > $P/checkpoint; echo nonsense > $P/checkpoint; echo 1 > $P/checkpoint",
        P=str(shared_site.proc(small.pid)),
    )
    assert done.returncode == 1
    assert version(shared_site, small) == 1


EDITORS: dict[str, tuple[str, int, str]] = {
    "sed": ("sed -i s/running/1/ $P/freeze", 4, "couldn't open temporary file"),
    "perl": ("perl -pi -e s/running/1/ $P/freeze", 0, "Operation not permitted"),  # as anywhere
}


@pytest.mark.parametrize("editor", EDITORS)
def test_an_editor_in_place_is_refused_and_nothing_is_lost(
    shared_site: Site, small: Workload, editor: str
) -> None:
    script, status, said = EDITORS[editor]
    place = shared_site.proc(small.pid)
    before = sorted(os.listdir(place))
    done = shared_site.sh(script, P=str(place))
    assert done.returncode == status
    assert said in done.stderr
    assert sorted(os.listdir(place)) == before
    assert shared_site.read(place / "freeze") == "running\n"


@pytest.mark.parametrize("options", ["", "--cmd 'set backup backupcopy=no'", "--cmd 'set nowb'"])
def test_vim_on_a_verb_file_writes_the_verb(
    shared_site: Site, small: Workload, need: object, options: str
) -> None:
    need("vim")  # type: ignore[operator]
    place = shared_site.proc(small.pid)
    before = sorted(os.listdir(place))
    done = shared_site.sh(
        f"vim -es -u NONE -i NONE -n {options} -c '%d' -c 'call setline(1, \"1\")' -c wq"
        " $P/freeze < /dev/null",
        P=str(place),
    )
    assert sorted(os.listdir(place)) == before
    state = shared_site.read(place / "freeze")
    assert state.startswith("frozen since ") == (done.returncode == 0), (done, state)
    shared_site.write(place / "freeze", "0")
    assert shared_site.read(place / "freeze") == "running\n"
    small.wait_progress()


REFUSED = {
    "touch $P/new": "Operation not permitted",
    "echo 1 > $P/new": "Operation not permitted",
    "chmod 666 $P/checkpoint": "Operation not permitted",
    "chown 1000 $P/status": "Operation not permitted",
    "rm -f $P/status": "Operation not permitted",
    "rmdir $P": "Operation not permitted",
    "rm -rf $P": "Operation not permitted",
    "rm -rf $K/nodes": "Operation not permitted",
    "ln $P/status $P/other": "Operation not permitted",
    "ln -s status $P/other": "Operation not permitted",
    "mkfifo $P/fifo": "Operation not permitted",
    "mkdir $P/directory": "Operation not permitted",
    "mkdir $K/procs/1000000": "Operation not permitted",
    "mv $P/status $P/other": "Operation not permitted",
    "mv $P $K/procs/1": "",
    "mv $P/status $K/images/": "Operation not permitted",
    "mv $K/images $K/other": "Operation not permitted",
    "truncate -s 100 $P/tree": "",
    "echo x > $P/status": "Operation not supported",
    "echo x >> $K/log": "Operation not supported",
    "setfattr -n user.other -v x $P": "Operation not supported",
    "setfattr -n user.krg.app -v x $P": "Operation not",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_would_change_the_tree_of_files_is_refused(
    shared_site: Site, small: Workload, typed: str
) -> None:
    place = shared_site.proc(small.pid)
    before = sorted(os.listdir(place)), sorted(os.listdir(shared_site.mnt))
    done = shared_site.sh(typed, P=str(place))
    if not typed.startswith("truncate"):  # as good as O_TRUNC
        assert done.returncode != 0
    assert REFUSED[typed] in done.stderr
    assert "cross-device" not in done.stderr
    assert (sorted(os.listdir(place)), sorted(os.listdir(shared_site.mnt))) == before
    assert shared_site.facts(place / "status")["state"] == "running"


def test_touch_of_a_verb_file_does_nothing(shared_site: Site, small: Workload) -> None:
    done = shared_site.sh("touch $P/checkpoint", P=str(shared_site.proc(small.pid)))
    assert (done.returncode, done.stderr) == (0, "")
    assert version(shared_site, small) == 0


def test_truncating_a_verb_file_does_nothing(shared_site: Site, small: Workload) -> None:
    done = shared_site.sh(
        ": > $P/checkpoint && truncate -s 0 $P/checkpoint", P=str(shared_site.proc(small.pid))
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert version(shared_site, small) == 0


def test_a_move_out_of_the_mount_leaves_everything(
    shared_site: Site, small: Workload, tmp_path: Path
) -> None:
    place = shared_site.proc(small.pid)
    done = shared_site.sh("mv $P/status $T/status", P=str(place), T=str(tmp_path))
    assert done.returncode == 1
    assert "cannot remove" in done.stderr and "Operation not permitted" in done.stderr
    assert shared_site.facts(place / "status")["pid"] == str(small.pid)


def test_grep_over_all_of_it_comes_to_an_end(shared_site: Site, small: Workload) -> None:
    shared_site.sh("echo 1 > $P/checkpoint", P=str(shared_site.proc(small.pid)))
    done = shared_site.sh(f"timeout 30 grep -r -l 'small.{small.pid}.n1/v1' $K")
    assert done.returncode != 124
    found = done.stdout.splitlines()
    assert f"{shared_site.mnt}/log" in found and f"{shared_site.proc(small.pid)}/status" in found
    wrong = [
        line
        for line in done.stderr.splitlines()
        if "No such process" not in line and "No such file" not in line and "binary" not in line
    ]
    assert wrong == []


def test_find_names_every_kind_of_file(shared_site: Site, small: Workload) -> None:
    shared_site.sh("echo 1 > $P/checkpoint", P=str(shared_site.proc(small.pid)))
    found = set(shared_site.sh("find $K -printf '%P\\n'").stdout.splitlines())
    at = f"procs/{small.pid}"
    image = f"images/small.{small.pid}.n1"
    assert {
        *("README", "version", "log", "events", "metrics", "self", "restart", "procs"),
        *("nodes/n1/state", "nodes/n1/info", "nodes/n1/load", "nodes/n1/restart"),
        *(f"{at}/status", f"{at}/tree", f"{at}/checkpoint", f"{at}/freeze", f"{at}/signal"),
        *(f"{at}/wait", f"{at}/files", f"{at}/job", f"nodes/n1/{at}/status"),
        *(f"{image}/index", f"{image}/latest", f"{image}/v1/manifest.json"),
        *("jobs/1/status", "jobs/1/log", "jobs/1/cancel"),
    } <= found
    assert shared_site.sh("find $K -type f -name manifest.json -size +1k").stdout


def test_listings_and_figures(shared_site: Site, small: Workload, tmp_path: Path) -> None:
    place = shared_site.proc(small.pid)
    shared_site.sh("echo 1 > $P/checkpoint", P=str(place))
    image = shared_site.mnt / "images" / f"small.{small.pid}.n1" / "v1"
    listed = shared_site.sh("ls -lR $K/images $P", P=str(place)).stdout
    assert "manifest.json" in listed and "-rw-------" in listed and "latest -> v1" in listed
    assert shared_site.sh("ls -l $K/self/").returncode == 0
    assert shared_site.sh("stat -c %s $P/status", P=str(place)).stdout == "0\n"
    assert int(shared_site.sh("stat -c %s $K/log").stdout) == len(shared_site.read("log"))
    logical = int(os.getxattr(image, "user.krg.logical_bytes"))
    assert int(shared_site.sh("du -sb --apparent-size $I/", I=str(image)).stdout.split()[0]) >= (
        logical
    )
    assert int(shared_site.sh("du -sk $I", I=str(image)).stdout.split()[0]) > 0
    assert shared_site.sh("df --output=fstype $K").stdout.split()[-1].startswith("fuse")
    room, store = os.statvfs(shared_site.mnt), os.statvfs(shared_site.state)
    assert room.f_blocks * room.f_frsize == store.f_blocks * store.f_frsize
    shown = shared_site.sh("getfattr -d --absolute-names $I", I=str(image)).stdout
    for name in ("app", "node", "created", "freeze_ms", "logical_bytes", "stored_bytes", "digest"):
        assert f"user.krg.{name}=" in shown
    assert 'user.krg.complete="yes"' in shown and 'user.krg.owner="0"' in shown
    assert (
        f'user.krg.app="small.{small.pid}.n1"'
        in shared_site.sh("getfattr -d --absolute-names $P", P=str(place)).stdout
    )
    other = shared_site.sh("getfattr -n user.other $I", I=str(image))
    assert other.returncode == 1 and "not supported" in other.stderr
    archive = tmp_path / "image.tar"
    assert shared_site.sh("tar cf $A -C $I .", A=str(archive), I=str(image)).returncode == 0
    assert shared_site.sh("tar df $A -C $I", A=str(archive), I=str(image)).returncode == 0


def test_tail_follows_the_log(shared_site: Site, small: Workload) -> None:
    with typing(shared_site, "exec tail -n 1 -f $K/log") as tail:
        assert tail.stdout is not None
        fd, text = tail.stdout.fileno(), b""
        os.set_blocking(fd, False)
        shared_site.sh(f"echo name=tail.{small.pid} > $K/procs/{small.pid}/checkpoint")

        def told() -> bool:
            nonlocal text
            with contextlib.suppress(BlockingIOError):
                text += os.read(fd, 4096)
            return f"ok tail.{small.pid}/v1".encode() in text

        until(told, "tail showed the job")


def test_the_last_job_is_behind_the_link(shared_site: Site, small: Workload) -> None:
    place = shared_site.proc(small.pid)
    shared_site.write(place / "checkpoint", "desc='of the job'")
    status = shared_site.facts(place / "job" / "status")
    assert (status["verb"], status["phase"], status["outcome"]) == (
        "checkpoint",
        "done",
        f"small.{small.pid}.n1/v1",
    )
    assert "Dumping finished successfully" in shared_site.read(place / "job" / "log")
    over = shared_site.sh("echo 1 > $P/job/cancel", P=str(place))
    assert over.returncode == 1 and "No such process" in over.stderr
    assert "has ended already" in shared_site.read(place / "job" / "cancel")


def test_self_is_the_caller(shared_site: Site) -> None:
    done = shared_site.sh("cat $K/self/status; echo $$; readlink $K/self", "bash")
    assert "name cat" in done.stdout
    pid = subprocess.run(
        ["readlink", str(shared_site.mnt / "self")], capture_output=True, text=True, check=True
    ).stdout
    assert pid.startswith("procs/")


def test_wait_gives_the_exit_status_of_a_restarted_tree(shared_site: Site, start: Start) -> None:
    tree = start("small")
    pid = tree.pid
    place = shared_site.proc(pid)
    assert shared_site.write(place / "checkpoint", "1 then=kill name=waited") == "waited/v1\n"
    tree.wait_gone([pid])
    assert shared_site.write("restart", "waited") == f"pid {pid}\n"
    tree.wait_progress()
    with typing(shared_site, f"echo 1 > $K/procs/{pid}/wait; echo $?") as waiter:
        shared_site.write(place / "signal", "TERM")
        out, err = waiter.communicate(timeout=20)
    assert (out, err) == ("0\n", "")
    assert shared_site.read(place / "wait") == "exit 0\n"
    assert shared_site.facts(place / "status")["state"] == "exit 0"
    assert (tree.directory / "verdict").read_text() == "PASS\n"
