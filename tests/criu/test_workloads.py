"""Every workload survives checkpoint, death and restart through /krg, and says so itself."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.criu.stage import OTHER_USER, Stage, as_user, inner_pid, standstill, states
from tests.sites import until
from tests.workloads import harness

TOOLS = {"node_counter": "node", "Counter": "java", "small": "gcc", "redisload": "redis-server"}
TCP = {"tcpserver": "tcp=keep", "redisload": "tcp=keep"}
SLOW = {"Counter", "node_counter", "redisload"}
NO_WORKLOADS = {"harness", "judge", "blocks", "__init__"}
OWN_TESTS = {"selfckpt"}
ALL = sorted(
    path.stem
    for path in harness.HERE.iterdir()
    if path.suffix in (".py", ".js", ".java", ".c") and path.stem not in NO_WORKLOADS | OWN_TESTS
)
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ALL]
GENERATIONS = 3


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the working directory of what is started: output files are made there."""
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o711)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def name(request: pytest.FixtureRequest, need: object) -> str:
    found: str = request.param
    if tool := TOOLS.get(found):
        need(tool)  # type: ignore[operator]
    return found


@pytest.mark.parametrize("name", MARKED, indirect=True)
def test_comes_back_with_its_pids(stage: Stage, name: str) -> None:
    workload = stage.begin(name)
    pid = workload.pid
    ref = stage.checkpoint_and_end(workload, TCP.get(name, ""))
    assert stage.restart(workload, f"{ref} pid=keep") == pid
    assert stage.site.read(f"procs/{pid}/checkpoint") == f"restarted {ref}\n"
    stage.passes(workload)


@pytest.mark.parametrize(
    "name",
    ["counter", "proctree", "threads", "unixserver", "tcpserver", "timers", "ptyjob", "otheruid"],
    indirect=True,
)
def test_lives_on_over_generations_in_a_pid_namespace_of_its_own(stage: Stage, name: str) -> None:
    workload = stage.begin(name)
    pid, words = workload.pid, TCP.get(name, "")
    app = stage.checkpoint_and_end(workload, words).partition("/")[0]
    for generation in range(1, GENERATIONS + 1):
        outer = stage.restart(workload, f"{app} pid=new")
        assert (inner_pid(outer), outer != pid) == (pid, True)
        workload.wait_progress()
        ref = stage.checkpoint_and_end(workload, words)
        assert ref == f"{app}/v{generation + 1}"
    assert stage.restart(workload, f"{app} pid=keep") == pid
    stage.passes(workload)


@pytest.mark.parametrize("name", ["counter", "proctree", "small", "execs"], indirect=True)
def test_any_of_five_checkpoints_of_a_running_tree_can_be_restarted(
    stage: Stage, name: str
) -> None:
    workload = stage.begin(name)
    for number in range(1, 6):
        ref = stage.checkpoint(workload)
        assert ref.endswith(f"/v{number}"), ref
        workload.wait_progress()
    app = ref.partition("/")[0]
    for number in range(5, 0, -1):  # an older image can do with files of later, not the reverse
        stage.end(workload)
        stage.restart(workload, f"{app}/v{number}")
        workload.wait_progress()
    stage.passes(workload)


@pytest.mark.parametrize("name", ["counter", "proctree", "threads"], indirect=True)
def test_then_stop_leaves_every_task_stopped(freezing_stage: Stage, name: str) -> None:
    workload = freezing_stage.begin(name)
    ref = freezing_stage.checkpoint(workload, "then=stop")
    live = workload.tasks()
    until(lambda: states(live) == {"T"}, "all tasks are stopped")
    assert standstill(workload)
    assert freezing_stage.site.facts(f"procs/{workload.pid}/status")["state"] == "stopped"
    for pid in live:
        workload.signal(signal.SIGCONT, pid)
    freezing_stage.passes(workload)
    freezing_stage.restart(workload, ref)
    freezing_stage.passes(workload)


@pytest.mark.parametrize("name", ["counter", "proctree", "threads"], indirect=True)
def test_then_freeze_holds_the_tree_until_it_is_thawed(freezing_stage: Stage, name: str) -> None:
    workload = freezing_stage.begin(name)
    freeze = f"procs/{workload.pid}/freeze"
    freezing_stage.checkpoint(workload, "then=freeze")
    assert freezing_stage.site.read(freeze).startswith("frozen")
    assert standstill(workload)
    again = freezing_stage.checkpoint(workload)
    assert again.endswith("/v2")
    assert standstill(workload), "a checkpoint of a frozen tree has let it go"
    freezing_stage.tell(freeze, "0")
    workload.wait_progress()
    freezing_stage.end(workload)
    freezing_stage.restart(workload, again)
    freezing_stage.passes(workload)


@pytest.mark.parametrize("name", ["counter", "proctree", "threads", "tcpserver"], indirect=True)
def test_then_kill_ends_it_by_either_freezer(freezing_stage: Stage, name: str) -> None:
    workload = freezing_stage.begin(name)
    ref = freezing_stage.checkpoint_and_end(workload, TCP.get(name, ""))
    assert workload.tasks() == []
    freezing_stage.restart(workload, ref)
    freezing_stage.passes(workload)


def test_then_kill_with_a_signal_lets_it_end_itself(stage: Stage) -> None:
    workload = stage.begin("counter")
    tree = workload.tree()
    ref = stage.checkpoint(workload, "then=kill:TERM")
    workload.wait_gone(tree)
    assert (workload.directory / "verdict").read_text() == "PASS\n"
    (workload.directory / "verdict").unlink()
    stage.restart(workload, ref)
    stage.passes(workload)


# -- TCP


def test_a_connection_is_refused_until_somebody_decides_about_it(stage: Stage) -> None:
    workload = stage.begin("tcpserver")
    code, said = stage.refused(f"procs/{workload.pid}/checkpoint", "1")
    assert code == errno.EOPNOTSUPP
    assert "tcp=keep" in said and "tcp=close" in said
    stage.passes(workload)


def test_tcp_close_restores_a_connection_as_closed(stage: Stage) -> None:
    workload = stage.begin("tcpserver")
    ref = stage.checkpoint_and_end(workload, "tcp=close")
    stage.restart(workload, ref)
    verdict = workload.finish()
    assert verdict.startswith("FAIL") and "chain" not in verdict, verdict


@pytest.mark.parametrize("word", ["tcp=close", "tcp=keep", "tcp=fail"])
def test_a_listening_socket_needs_no_decision(stage: Stage, word: str) -> None:
    workload = stage.begin("tcplisten")
    ref = stage.checkpoint_and_end(workload, word)
    stage.restart(workload, ref)
    stage.passes(workload)


# -- other users


def test_another_users_tree_and_its_images_are_that_users(stage: Stage) -> None:
    uid = int(OTHER_USER[0])
    workload = stage.begin("otheruid")
    assert stage.site.facts(f"procs/{workload.pid}/status")["uid"] == OTHER_USER[0]
    ref = stage.checkpoint_and_end(workload)
    image = stage.site.mnt / "images" / ref
    for path in (image, *image.iterdir()):
        found = path.stat()
        assert (found.st_uid, found.st_mode & 0o077) == (uid, 0), path
    assert as_user(uid, f"cat $K/images/{ref}/pstree.img >/dev/null", stage.site).returncode == 0
    assert (
        as_user(uid + 1, f"cat $K/images/{ref}/pstree.img >/dev/null", stage.site).returncode != 0
    )
    stage.restart(workload, ref)
    stage.passes(workload)


def test_a_user_checkpoints_and_restarts_what_is_his_and_nobody_else_may(stage: Stage) -> None:
    uid = int(OTHER_USER[0])
    workload = stage.begin("otheruid")
    checkpoint = f"echo then=kill > $K/procs/{workload.pid}/checkpoint"
    assert as_user(uid + 1, checkpoint, stage.site).returncode != 0
    assert workload.alive()
    tree = workload.tree()
    done = as_user(uid, checkpoint, stage.site)
    assert done.returncode == 0, done.stderr
    workload.wait_gone(tree)
    app = _app_of(stage, workload.pid)
    assert as_user(uid + 1, f"echo {app} > $K/restart", stage.site).returncode != 0
    done = as_user(uid, f"echo {app} > $K/restart", stage.site)
    assert done.returncode == 0, done.stderr
    stage.passes(workload)


def _app_of(stage: Stage, pid: int) -> str:
    names = [name for name in os.listdir(stage.site.mnt / "images") if f".{pid}." in name]
    assert len(names) == 1, names
    return names[0]
