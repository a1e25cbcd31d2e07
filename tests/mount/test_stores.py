"""Where images are kept, and that all of them come back: other back ends, two agents on one
directory, many versions of one process removed in any order, many copies restarted at once."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import weed
from tests.mount.conftest import Start
from tests.sites import Site, until
from tests.workloads.harness import Workload

VERSIONS, KEPT, RESTARTED = 60, 12, 5
CLONES = 8


@contextlib.contextmanager
def on_s3(place: Path) -> Iterator[Site]:
    with weed.running(place) as server:
        options = ("--images", server.location("node"), "--credentials", str(server.credentials))
        with Site(options=options) as site:
            yield site


def end(site: Site, workload: Workload, pid: int) -> None:
    tree = workload.tree()
    site.write(site.proc(pid) / "signal", "KILL")
    workload.wait_gone(tree)


def start_again(site: Site) -> None:
    site.stop_agent()
    state = f"nodes/{site.node}/state"
    until(lambda: not site.read(state).startswith("online"), "the mount has lost its agent")
    site.start_agent()
    until(lambda: site.read(state).startswith("online"), "the mount has its agent again")


def test_images_in_a_bucket(start: Start, tmp_path: Path) -> None:
    place = tmp_path / "weed"
    place.mkdir()
    workload = start("memory", 8, 0.05, 0.5)
    with on_s3(place) as site:
        for number in (1, 2):
            answer = site.write(site.proc(workload.pid) / "checkpoint", "name=far")
            assert answer == f"far/v{number}\n"
        end(site, workload, workload.pid)
        start_again(site)
        assert site.sh("rmdir $K/images/far/v1").returncode == 0
        assert site.write("restart", "far/v2") == f"pid {workload.pid}\n"
        assert workload.wait_progress()
        assert workload.finish() == "PASS"
        assert not list((site.state / "images").glob("packs/*/*"))


def test_a_bucket_that_cannot_be_reached_is_a_sentence(tmp_path: Path) -> None:
    location = "s3://krg/node?endpoint=http://127.0.0.1:9&region=x"
    keys = tmp_path / "keys"
    keys.write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
    keys.chmod(0o600)
    site = Site(options=("--images", location, "--credentials", str(keys)))
    with pytest.raises(AssertionError) as caught, site:
        pass
    said = str(caught.value)
    assert "agent.failed" in said and "Traceback" not in said
    assert "127.0.0.1:9" in said


def test_two_agents_on_one_directory(start: Start, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    trees = [start("memory", 8, 0.05, 0.5) for _ in range(2)]
    options = ("--images", str(shared))
    with Site(node="n1", options=options) as one, Site(node="n2", options=options) as two:
        sites = (one, two)
        for _ in range(3):
            writers = [
                subprocess.Popen(
                    ["sh", "-c", 'echo "name=same" > "$0"', str(site.proc(tree.pid) / "checkpoint")]
                )
                for site, tree in zip(sites, trees, strict=True)
            ]
            assert [writer.wait(60) for writer in writers] == [0, 0]
        for site, tree in zip(sites, trees, strict=True):
            assert site.read(site.proc(tree.pid) / "checkpoint") == "same/v3\n"
            assert site.sh("rmdir $K/images/same/v1").returncode == 0
            end(site, tree, tree.pid)
            start_again(site)
        for site, tree in zip(sites, trees, strict=True):
            assert site.write("restart", "same/v3") == f"pid {tree.pid}\n"
            assert tree.wait_progress()
            assert tree.finish() == "PASS"


def test_any_of_many_versions_comes_back(start: Start) -> None:
    """The process writes pages anew all the time; versions are removed in random order."""
    chance = random.Random(60)
    with Site() as site:
        workload = start("memory", 16, 0.3, 0.7)
        pid = workload.pid
        for number in range(1, VERSIONS + 1):
            answer = site.write(site.proc(pid) / "checkpoint", "name=slow")
            assert answer == f"slow/v{number}\n"
            workload.wait_progress(1)
        gone = chance.sample(range(1, VERSIONS + 1), VERSIONS - KEPT)
        for number in gone:
            assert site.sh(f"rmdir $K/images/slow/v{number}").returncode == 0
        left = sorted({*range(1, VERSIONS + 1)} - {*gone})
        for number in left:
            copy = site.base / "copy"
            done = site.sh(f"rm -rf $C && cp -r $K/images/slow/v{number} $C", C=str(copy))
            assert (done.returncode, done.stderr) == (0, "")
            assert bytes_of(copy) == bytes_of(site.mnt / "images" / "slow" / f"v{number}")
        for number in chance.sample(left, RESTARTED):
            end(site, workload, pid)
            assert site.write("restart", f"slow/v{number} pid=keep") == f"pid {pid}\n"
            assert workload.wait_progress()
        assert workload.finish() == "PASS"


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}


def test_what_was_found_damaged_is_stored_anew(start: Start) -> None:
    """A tree is not ended for an image that shares damaged chunks with an earlier one."""
    with Site() as site:
        workload = start("memory", 32, 0.0, 0.7)
        tree, file = workload.tree(), site.proc(workload.pid) / "checkpoint"
        site.write(file, "name=hurt")
        packs = (site.state / "images" / "packs").glob("*/*")
        pack = max(packs, key=lambda path: path.stat().st_size)
        with open(pack, "r+b") as data:
            data.seek(pack.stat().st_size // 2)
            byte = data.read(1)[0]
            data.seek(-1, os.SEEK_CUR)
            data.write(bytes([byte ^ 1]))
        with pytest.raises(OSError, match="Bad message"):
            site.write(file, "name=hurt then=kill")
        assert "stored anew" in site.read(file)
        assert workload.wait_progress()
        assert site.write(file, "name=hurt then=kill") == "hurt/v2\n"
        workload.wait_gone(tree)
        for number in (2, 1):  # what is stored anew makes the earlier image whole again
            assert site.write("restart", f"hurt/v{number}").startswith("pid ")
            assert workload.wait_progress()
            if number == 2:
                end(site, workload, workload.pid)
        assert workload.finish() == "PASS"


def test_copies_of_one_image_restarted_at_once(start: Start, tmp_path: Path) -> None:
    workload = start("memory", 32, 0.05, 0.5)
    with Site() as site:
        site.write(site.proc(workload.pid) / "checkpoint", "name=one")
        end(site, workload, workload.pid)
        copy = tmp_path / "v1"
        assert site.sh("cp -r $K/images/one/v1 $C", C=str(copy)).returncode == 0
        for number in range(CLONES):
            made = site.sh(
                f"mkdir $K/images/c{number} && cp -r $C $K/images/c{number}/v1", C=str(copy)
            )
            assert (made.returncode, made.stderr) == (0, "")
        for number in range(CLONES):
            latest = site.mnt / "images" / f"c{number}" / "latest"
            until(lambda latest=latest: latest.is_symlink(), "the copy is an image")
        stored = int(site.sh("du -sk $D | cut -f1", D=str(site.state / "images")).stdout)
        assert stored < 3 * 32 * 1024, f"{stored} KiB: copies are not stored once"
        writers = [
            subprocess.Popen(
                ["sh", "-c", f'echo "c{number} pid=new" > "$0"', str(site.mnt / "restart")]
            )
            for number in range(CLONES)
        ]
        assert [writer.wait(120) for writer in writers] == [0] * CLONES
        lives = [line for line in site.read("log").splitlines() if " restart " in line]
        pids = {line.rpartition(" ")[2] for line in lives if " ok " in line}
        assert len(pids) == CLONES
        for pid in pids:
            assert os.path.exists(f"/proc/{pid}")
            site.write(site.proc(int(pid)) / "signal", "KILL")
            until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "a copy has ended")
