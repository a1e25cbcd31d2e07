"""Keepers' directories and cgroups, without a keeper: what is read back from what one left."""

import os
import subprocess
from pathlib import Path

import pytest

from agent import cgroups, keepers, procs
from agent.cgroups import Hierarchy
from agent.keepers import Inherit, Owner, Plan, Status
from krgfs import facts
from krgfs.errors import BadWords, Gone
from krgfs.model import ProcessId


def left(run: Path, name: str, **files: str) -> str:
    place = run / "keepers" / name
    place.mkdir(parents=True)
    for file, text in files.items():
        (place / file).write_text(text)
    return str(place)


def own() -> ProcessId:
    return procs.process_id(facts.task(os.getpid()))  # type: ignore[arg-type]


def ended_pid() -> int:
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    return child.pid


def test_what_a_running_keeper_left(tmp_path: Path) -> None:
    me = own()
    place = left(
        tmp_path,
        "7",
        keeper=f"{me.pid} {me.start}\n",
        root=f"{me.pid} 12\n",
        note="blast/v3",
    )
    assert keepers.directory(str(tmp_path), 7) == place
    assert keepers.status(place) == Status(place, me, me, 12, "", "blast/v3")
    assert keepers.find(str(tmp_path)) == [keepers.status(place)]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("exit 3\n", "exit 3"),
        ("signal 9\n", "signal KILL"),
        ("signal 6 core\n", "signal ABRT"),
        ("signal 64\n", "signal SIGRTMAX".replace("SIG", "")),
        ("unknown\n", "unknown"),
        ("", ""),
    ],
)
def test_how_it_ended(said: str, told: str, tmp_path: Path) -> None:
    assert keepers.status(left(tmp_path, "1", status=said)).ended == told


@pytest.mark.parametrize("text", ["", "12", "12 x", "a b c", "-1 5"])
def test_half_a_file_is_none(text: str, tmp_path: Path) -> None:
    found = keepers.status(left(tmp_path, "1", keeper=text, root=text))
    assert (found.keeper, found.root) == (None, None)


def test_a_root_from_before_its_keeper_is_another_process(tmp_path: Path) -> None:
    me = own()
    place = left(tmp_path, "1", keeper=f"{me.pid} {me.start + 10**6}", root=f"{me.pid} 5")
    assert keepers.status(place).root is None


def test_no_directory_at_all(tmp_path: Path) -> None:
    assert keepers.find(str(tmp_path)) == []
    assert keepers.status("") == Status("", None, None, 0, "", "")


async def test_launched(tmp_path: Path) -> None:
    me = own()
    lives = left(tmp_path, "1", keeper=f"{me.pid} {me.start}", root=f"{me.pid} 5")
    assert await keepers.launched(lives) == keepers.Launched(me, 5, me)
    ended = left(tmp_path, "2", keeper=f"{me.pid} {me.start}", root="1 5", status="exit 0")
    assert await keepers.launched(ended) is None
    gone = left(tmp_path, "3", keeper=f"{ended_pid()} 5")
    assert await keepers.launched(gone) is None
    assert await keepers.launched(left(tmp_path, "4")) is None


async def test_ended_while_nobody_looked(tmp_path: Path) -> None:
    root = ProcessId(pid=ended_pid(), start=5, boot=facts.BOOT_ID)
    place = left(tmp_path, "1", keeper=f"{ended_pid()} 5", status="signal 15")
    assert await keepers.ended(place, root) == "signal TERM"
    assert await keepers.ended(left(tmp_path, "2"), root) == "unknown"


def test_tidy(tmp_path: Path) -> None:
    me = own()
    lives = left(tmp_path, "1", keeper=f"{me.pid} {me.start}")
    known = left(tmp_path, "2", status="exit 0")
    done = left(tmp_path, "3", status="exit 0")
    assert keepers.tidy(str(tmp_path), {known}) == [done]
    assert sorted(os.listdir(tmp_path / "keepers")) == ["1", "2"]
    assert os.path.isdir(lives)


def test_the_command_line() -> None:
    plan = Plan(
        command=("/usr/sbin/criu", "restore"),
        pidfile="/d/pid",
        new_pid=True,
        cgroups=("/a/cgroup.procs", "/b/cgroup.procs"),
        out="/home/anna/krg-x.out",
        pty=True,
        inherit=(Inherit(100, "/dev/null", "r"), Inherit(101, "/home/anna/o:x", "a")),
        owner=Owner(7, 8, (8, 9)),
        log="/d/log",
    )
    assert list(keepers._words("/d", plan)) == [
        "--dir=/d",
        "--pidfile=/d/pid",
        "--new-pid",
        "--cgroup=/a/cgroup.procs",
        "--cgroup=/b/cgroup.procs",
        "--owner=7:8",
        "--groups=8,9",
        "--out=/home/anna/krg-x.out",
        "--pty",
        "--log=/d/log",
        "--inherit=100=/dev/null:r",
        "--inherit=101=/home/anna/o:x:a",
        "--",
        "/usr/sbin/criu",
        "restore",
    ]
    assert list(keepers._words("/d", Plan(command=("true",)))) == ["--dir=/d", "--", "true"]


# -- cgroups, in plain directories


@pytest.fixture
def mounts(tmp_path: Path) -> tuple[Hierarchy, ...]:
    """Three hierarchies: v2, the freezer of v1, and one of v1 that only limits."""
    found = tuple(
        Hierarchy(str(tmp_path / name), "/", version, frozenset(controllers))
        for name, version, controllers in (
            ("unified", 2, ()),
            ("freezer", 1, ("freezer",)),
            ("memory", 1, ("memory",)),
        )
    )
    for each in found:
        os.mkdir(each.mount)
    return found


def test_a_cgroup_of_its_own(mounts: tuple[Hierarchy, ...], tmp_path: Path) -> None:
    first = keepers.own_cgroups("blast", 7, mounts)
    assert first == (
        f"{tmp_path}/unified/krgfs/krg-blast-7/cgroup.procs",
        f"{tmp_path}/freezer/krgfs/krg-blast-7/cgroup.procs",
    )
    second = keepers.own_cgroups("blast", 7, mounts)
    assert second[0] == f"{tmp_path}/unified/krgfs/krg-blast-7~2/cgroup.procs"
    place = left(tmp_path, "7", cgroups="".join(f"{path}\n" for path in first), status="exit 0")
    assert keepers.tidy(str(tmp_path), ()) == [place]
    assert os.listdir(tmp_path / "unified" / "krgfs") == ["krg-blast-7~2"]


def test_cgroups_left_behind(mounts: tuple[Hierarchy, ...], tmp_path: Path) -> None:
    parent = tmp_path / "unified" / "krgfs"
    for name in ("krg-old-1", "krg-new-2", "krg-used-3/in-use", "other-4"):
        os.makedirs(parent / name)
    for name in ("krg-old-1", "krg-used-3", "other-4"):
        os.utime(parent / name, (0, 0))
    keepers.own_cgroups("blast", 7, mounts)
    assert sorted(os.listdir(parent)) == ["krg-blast-7", "krg-new-2", "krg-used-3", "other-4"]


def test_where_no_cgroup_can_be_made(mounts: tuple[Hierarchy, ...], tmp_path: Path) -> None:
    (tmp_path / "unified" / "krgfs").write_text("in the way")
    assert keepers.own_cgroups("blast", 7, mounts) == (
        f"{tmp_path}/freezer/krgfs/krg-blast-7/cgroup.procs",
    )


def test_a_cgroup_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "unified" / "batch" / "job7")
    left(tmp_path, "7", cgroups=f"{tmp_path}/unified/batch/job7/cgroup.procs\n", status="exit 0")
    keepers.tidy(str(tmp_path), ())
    assert (tmp_path / "unified" / "batch" / "job7").is_dir()


def test_a_cgroup_by_path(mounts: tuple[Hierarchy, ...], tmp_path: Path) -> None:
    os.makedirs(tmp_path / "memory" / "batch" / "job7")
    assert keepers.cgroups_at("/batch/job7", mounts) == (
        f"{tmp_path}/memory/batch/job7/cgroup.procs",
    )
    with pytest.raises(BadWords, match="no such cgroup"):
        keepers.cgroups_at("/batch/job8", mounts)


def test_the_caller_s_cgroups() -> None:
    found = keepers.cgroups_of(os.getpid(), cgroups.hierarchies())
    assert all(path.endswith("/cgroup.procs") and os.path.exists(path) for path in found)
    with pytest.raises(Gone, match="has ended"):
        keepers.cgroups_of(ended_pid(), cgroups.hierarchies())
