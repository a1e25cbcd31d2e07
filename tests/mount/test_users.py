"""Other users: what they see, may, and may not; and what they learn of each other."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.sites import Site, sleeper
from tests.workloads.harness import Workload

ANNA, BEN = 61001, 61002


@pytest.fixture(scope="module")
def open_site() -> Iterator[Site]:
    """A site whose mount others can reach."""
    with Site() as made:
        made.base.chmod(0o755)
        yield made


def as_user(site: Site, uid: int, script: str) -> subprocess.CompletedProcess[str]:
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
    return subprocess.run(
        [*drop, "bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "K": str(site.mnt), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        start_new_session=True,
    )


@contextlib.contextmanager
def sleeper_of(uid: int) -> Iterator[int]:
    with sleeper(user=uid, group=uid, extra_groups=[], cwd="/") as pid:
        yield pid


def test_owners_checkpoint_kill_and_restart_their_own(open_site: Site) -> None:
    with sleeper_of(ANNA) as pid:
        place = f"$K/procs/{pid}"
        done = as_user(
            open_site,
            ANNA,
            f"echo name=anna.own > {place}/checkpoint && cat {place}/checkpoint {place}/wait &&"
            f" cat {place}/tree {place}/files && ls $K/images/anna.own/v1 && cat {place}/job/log",
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("anna.own/v1\nrunning\n")
        meta = os.stat(open_site.mnt / "images" / "anna.own" / "v1")
        assert (meta.st_uid, meta.st_mode & 0o777) == (ANNA, 0o700)
    done = as_user(open_site, ANNA, "echo anna.own > $K/restart; cat $K/restart")
    assert done.stdout == f"pid {pid}\n", done
    facts = open_site.facts(open_site.proc(pid) / "status")
    assert (facts["uid"], facts["app"]) == (str(ANNA), "anna.own")
    done = as_user(open_site, ANNA, f"echo TERM > $K/procs/{pid}/signal; echo $?")
    assert done.stdout == "0\n"


def test_what_belongs_to_others_stays_closed(open_site: Site, small: Workload) -> None:
    open_site.write(open_site.proc(small.pid) / "checkpoint", "name=roots.own")
    with sleeper_of(BEN) as bens:
        for pid in (small.pid, bens):
            place = f"$K/procs/{pid}"
            for typed in (
                f"echo 1 > {place}/checkpoint",
                f"echo 1 > {place}/freeze",
                f"echo KILL > {place}/signal",
                f"echo 1 > {place}/wait",
                f"cat {place}/tree",
                f"cat {place}/files",
            ):
                done = as_user(open_site, ANNA, typed)
                assert done.returncode == 1 and "Permission denied" in done.stderr, typed
            done = as_user(open_site, ANNA, f"cat {place}/status")
            assert f"pid {pid}\n" in done.stdout
        for typed in (
            "ls $K/images/roots.own",
            "cat $K/images/roots.own/index",
            "cat $K/images/roots.own/v1/manifest.json",
            f"cat $K/procs/{small.pid}/job/log",
            f"echo 1 > $K/procs/{small.pid}/job/cancel",
            "rmdir $K/images/roots.own/v1",
            "ln -s v1 $K/images/roots.own/mine",
        ):
            done = as_user(open_site, ANNA, typed)
            assert done.returncode != 0 and "Permission denied" in done.stderr, (typed, done)
        done = as_user(open_site, ANNA, "rmdir $K/images/roots.own")
        assert done.returncode == 1 and "not permitted" in done.stderr
    small.wait_progress()


def test_restart_of_anothers_image_is_refused(open_site: Site, small: Workload) -> None:
    open_site.write(open_site.proc(small.pid) / "checkpoint", "name=roots.second")
    done = as_user(open_site, ANNA, "echo roots.second > $K/restart; cat $K/restart")
    assert "Operation not permitted" in done.stderr
    assert done.stdout == "error EPERM roots.second/v1 belongs to uid 0\n"


def test_a_name_belongs_to_who_first_took_it(open_site: Site) -> None:
    with sleeper_of(ANNA) as annas, sleeper_of(BEN) as bens:
        open_site.write(open_site.proc(annas) / "checkpoint", "name=blast")
        place = f"$K/procs/{bens}/checkpoint"
        done = as_user(open_site, BEN, f"echo name=blast > {place}; cat {place}")
        assert "Operation not permitted" in done.stderr
        assert done.stdout.startswith(f"error EPERM the name blast belongs to uid {ANNA}; use ano")
        shown = sorted(os.listdir(open_site.mnt / "images" / "blast"))
        assert shown == ["index", "latest", "policy", "v1"]


def test_log_events_and_refusals_show_a_user_their_own(open_site: Site) -> None:
    with sleeper_of(ANNA) as annas, sleeper_of(BEN) as bens:
        for uid, pid in ((ANNA, annas), (BEN, bens)):
            place = f"$K/procs/{pid}/checkpoint"
            as_user(open_site, uid, f"echo name=seen.{uid} > {place}; echo no > {place}")
        for name in ("log", "events"):
            seen = as_user(open_site, ANNA, f"cat $K/{name}").stdout
            assert f"seen.{ANNA}" in seen and f"seen.{BEN}" not in seen
            size = as_user(open_site, ANNA, f"stat -c %s $K/{name}").stdout
            assert int(size) == len(seen.encode())
        mine = as_user(open_site, BEN, "cat $K/log").stdout
        assert "EINVAL checkpoint: 'no' is not 1" in mine and f"procs/{annas}" not in mine
        assert f"seen.{BEN}" in open_site.read("log") and f"seen.{ANNA}" in open_site.read("log")


def test_an_import_is_restarted_for_root_only(open_site: Site) -> None:
    with sleeper_of(ANNA) as pid:
        copy = "d=$(mktemp -d) && cp -r $K/images/anna.out/v1 $d/v1 && mkdir $K/images/anna.in &&"
        done = as_user(
            open_site,
            ANNA,
            f"echo name=anna.out > $K/procs/{pid}/checkpoint && {copy}"
            " cp -r $d/v1 $K/images/anna.in/v1; s=$?; rm -rf $d; exit $s",
        )
        assert (done.returncode, done.stderr) == (0, "")
    done = as_user(open_site, ANNA, "echo anna.in > $K/restart; cat $K/restart")
    assert "Operation not permitted" in done.stderr
    assert "was not made by this agent: only root may restart it" in done.stdout


def test_a_user_makes_and_removes_apps_of_their_own(open_site: Site) -> None:
    done = as_user(open_site, ANNA, "mkdir $K/images/annas && rmdir $K/images/annas")
    assert (done.returncode, done.stderr) == (0, "")
    as_user(open_site, ANNA, "mkdir $K/images/annas")
    done = as_user(open_site, BEN, "rmdir $K/images/annas; mkdir $K/images/annas/v1")
    assert done.returncode == 1 and "cannot remove" not in done.stdout
    assert (open_site.mnt / "images" / "annas").stat().st_uid == ANNA
