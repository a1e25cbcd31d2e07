"""Real processes, each test's own: looked at, sorted out, signalled and waited for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent import cgroups, procs, texts
from krgfs import facts
from krgfs.errors import Fate, Gone, NotYours, Unsupported
from krgfs.model import Caller, ProcessId

PRELUDE = """
import ctypes, os, signal, socket, sys, threading, time

def say(*words):
    with open(sys.argv[1] + ".part", "w") as file:
        file.write(" ".join(map(str, words)))
    os.rename(sys.argv[1] + ".part", sys.argv[1])

def rest():
    while True:
        signal.pause()

def child(act=rest):
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(0)
    return pid

def orphan(act=rest):
    # A grandchild whose parent has ended; it is sent back through a pipe.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        grandchild = os.fork()
        if grandchild:
            os.write(writer, b"%d" % grandchild)
            os._exit(0)
        os.close(reader)
        os.close(writer)
        act()
    os.waitpid(pid, 0)
    os.close(writer)
    found = int(os.read(reader, 20))
    os.close(reader)
    return found

def wait_for_zombie(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
"""


class Playground:
    """Starts programs in sessions of their own and leaves nothing of them behind."""

    def __init__(self, directory: Path) -> None:
        self.mark = uuid.uuid4().hex[:12]
        self.directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, code: str, *wrapper: str, **options: object) -> list[int]:
        """Run Python code and return the numbers that it said."""
        said = self.directory / f"said.{len(self._started)}"
        self.start(*wrapper, sys.executable, "-ISc", PRELUDE + code, str(said), **options)
        deadline = time.monotonic() + 10
        while not said.exists():
            assert self._started[-1].poll() is None, "the program ended before it said a word"
            assert time.monotonic() < deadline, "the program has nothing to say"
            time.sleep(0.002)
        return [int(word) for word in said.read_text().split()]

    def start(self, *command: str, **options: object) -> subprocess.Popen[bytes]:
        null: dict[str, object] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        settings = {**null, "start_new_session": True, "cwd": "/", **options}
        environment = {"PATH": os.environ["PATH"], "PLAYGROUND": self.mark}
        process = subprocess.Popen(command, env=environment, **settings)  # type: ignore[call-overload]
        self._started.append(process)
        return process

    def close(self) -> None:
        for pid in facts.pids():
            with contextlib.suppress(OSError):
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.kill()  # also without a first thread, when it has no environment to show
        try:
            self._remove_cgroups()
        finally:
            for process in self._started:
                process.wait(10)

    def _remove_cgroups(self) -> None:
        for hierarchy in cgroups.hierarchies():
            if not hierarchy.can_freeze:
                continue
            for place, _, _ in os.walk(hierarchy.mount, topdown=False):
                if self.mark in place:
                    remove_cgroup(place, hierarchy)


def remove_cgroup(place: str, hierarchy: cgroups.Hierarchy) -> None:
    knob, value = ("cgroup.freeze", "0") if hierarchy.version == 2 else ("freezer.state", "THAWED")
    Path(place, knob).write_text(value)
    for pid in cgroups.processes_in(place):
        with contextlib.suppress(OSError):
            Path(hierarchy.mount, "cgroup.procs").write_text(str(pid))
    for _ in range(500):
        try:
            os.rmdir(place)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise AssertionError(f"{place} cannot be removed")


@contextlib.contextmanager
def playground(directory: Path) -> Iterator[Playground]:
    found = Playground(directory)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def play(tmp_path):
    with playground(tmp_path) as found:
        yield found


def until(condition, what: str):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


# -- look


def test_a_tree_has_root_descendants_threads_and_zombies(play):
    root, son, zombie = play.run("""
son = child(lambda: (threading.Thread(target=rest, daemon=True).start(), rest()))
zombie = child(lambda: None)
wait_for_zombie(zombie)
say(os.getpid(), son, zombie)
rest()
""")
    until(lambda: len(facts.threads(son)) == 2, "the son has a thread")
    tree = procs.look(root)
    assert tree.root.pid == root
    assert tree.pids == {root, son, zombie}
    assert {task.pid for task in tree.live} == {root, son}
    assert len(tree.threads[son]) == 2 and son in tree.threads[son]
    assert tree.uids == {os.getuid()}
    assert tree.is_session_leader
    assert not tree.is_in_private_pid_ns and tree.inner_root == root
    assert tree.rss_bytes > 1 << 20
    assert procs.look(root, tree.id.start).id == tree.id
    assert not procs.look(son).is_session_leader


def test_look_says_what_is_not_there(play):
    (root,) = play.run("say(os.getpid()); rest()")
    start = procs.look(root).id.start
    with pytest.raises(Gone, match=r"that pid now, is another one"):
        procs.look(root, start + 1)
    process = play.start("/bin/true")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(Gone, match=rf"has ended.*parent {os.getpid()} reaps it"):
        procs.look(process.pid)
    process.wait()
    with pytest.raises(Gone, match=rf"process {process.pid} is gone"):
        procs.look(process.pid)


def test_look_refuses_what_is_no_tree():
    with pytest.raises(Unsupported, match="kernel thread"):
        procs.look(2)
    with pytest.raises(Unsupported, match="is init"):
        procs.look(1)
    for pid in (os.getpid(), os.getppid()):
        with pytest.raises(Unsupported, match=r"cannot dump itself|is init"):
            procs.look(pid)


def test_a_process_lives_on_without_its_first_thread(play):
    (root,) = play.run("""
def on():
    while facts_state() != "Z":
        time.sleep(0.002)
    say(os.getpid())
    rest_without_signals()
def facts_state():
    return open(f"/proc/{os.getpid()}/stat").read().rpartition(") ")[2][0]
def rest_without_signals():
    while True:
        time.sleep(1)
threading.Thread(target=on).start()
ctypes.CDLL(None).pthread_exit(None)
""")
    assert facts.task(root).is_zombie
    tree = procs.look(root)
    assert [task.pid for task in tree.live] == [root]
    assert procs.fate(tree) is Fate.RUNNING


def test_a_private_pid_namespace_shows(play):
    play.run("say(os.getpid()); rest()", "unshare", "--pid", "--fork", "--kill-child")
    launcher = play._started[0].pid
    (inside,) = facts.children(launcher)
    tree = procs.look(inside)
    assert tree.is_in_private_pid_ns
    assert tree.inner_root == 1


# -- may


def test_root_and_the_owner_may(play):
    root = play.start("sleep", "1000", user=1234, group=1234, extra_groups=[]).pid
    tree = procs.look(root)
    procs.may(Caller(uid=0, gid=0), tree)
    procs.may(Caller(uid=1234, gid=1234), tree)
    with pytest.raises(NotYours, match=rf"tree {root} belongs to uid 1234"):
        procs.may(Caller(uid=1235, gid=1234), tree)


def test_a_tree_of_several_uids_is_for_root(play):
    root, son = play.run("""
son = child(lambda: (os.setresuid(1234, 1234, 1234), rest()))
say(os.getpid(), son)
rest()
""")
    until(lambda: facts.ids(son).uid == 1234, "another uid")
    tree = procs.look(root)
    assert tree.uids == {0, 1234}
    with pytest.raises(NotYours, match=r"several uids \(0, 1234\)"):
        procs.may(Caller(uid=1234, gid=1234), tree)
    procs.may(Caller(uid=0, gid=0), tree)


def test_a_saved_uid_counts(play):
    (root,) = play.run("say(os.getpid()); os.setresuid(1234, 1234, 0); rest()")
    until(lambda: facts.ids(root).uid == 1234, "another uid")
    with pytest.raises(NotYours, match=r"several uids \(0, 1234\)"):
        procs.may(Caller(uid=1234, gid=1234), procs.look(root))


def test_memory_from_another_uid_is_for_root(play):
    (root,) = play.run("say(os.getpid()); os.setresuid(1234, 1234, 1234); rest()")
    until(lambda: facts.ids(root).uids == (1234,) * 4, "another uid")
    tree = procs.look(root)
    assert tree.uids == {1234}
    with pytest.raises(NotYours, match="its own user may not look into"):
        procs.may(Caller(uid=1234, gid=1234), tree)


# -- members, fate, signals


def test_members_are_known_by_descent(play):
    root, *_ = play.run("""
signal.signal(signal.SIGUSR1, lambda *_: child())
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
say(os.getpid())
rest()
""")
    tree = procs.look(root)
    os.kill(root, signal.SIGUSR1)
    until(lambda: facts.children(root), "a child after the look")
    (late,) = facts.children(root)
    assert procs.is_member(tree, late)
    assert all(procs.is_member(tree, tid) for tid in facts.threads(root))
    assert not procs.is_member(tree, os.getpid())
    assert not procs.is_member(tree, 1)
    assert not procs.is_member(tree, 1 << 30)
    before = tree._replace(tasks=(tree.root._replace(start=tree.root.start - 1),))
    assert not procs.is_member(before, root), "another process of that pid"


def test_fate_follows_the_tree(play):
    root, son = play.run("say(os.getpid(), child()); rest()")
    tree = procs.look(root)
    assert procs.fate(tree) is Fate.RUNNING
    procs.send(tree, signal.SIGSTOP)
    until(lambda: procs.fate(tree) is Fate.STOPPED, "stopped")
    os.kill(son, signal.SIGCONT)
    until(lambda: procs.fate(tree) is Fate.RUNNING, "one of two runs")
    procs.kill(tree)
    until(lambda: procs.fate(tree) is Fate.GONE, "gone, zombie or not")


def test_a_signal_reaches_only_the_one_that_is_meant(play):
    (root,) = play.run("say(os.getpid()); rest()")
    right = procs.look(root).id
    wrong = ProcessId(pid=root, start=right.start + 1, boot=right.boot)
    before = ProcessId(pid=root, start=right.start, boot="another")
    for other in (wrong, before):
        procs.signal_process(other, signal.SIGKILL)
    assert not select.select([os.pidfd_open(root)], [], [], 0.05)[0]
    procs.signal_process(right, signal.SIGKILL)
    until(lambda: not facts.is_alive(root, right.start), "killed")
    procs.signal_process(right, signal.SIGKILL)


async def test_gone_waits_for_the_pid_and_not_just_for_the_end(play):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)
    with trio.move_on_after(0.05) as scope:
        await procs.gone(tree.ids)
    assert scope.cancelled_caught, "it lives"
    procs.kill(tree)
    with trio.fail_after(5):
        await procs.ended(tree.id)
    with trio.move_on_after(0.05) as scope:
        await procs.gone(tree.ids)
    assert scope.cancelled_caught, "a zombie of ours"
    play._started[0].wait()
    with trio.fail_after(5):
        await procs.gone(tree.ids)
        await procs.gone([ProcessId(pid=os.getpid(), start=1, boot=tree.id.boot)])


# -- orphans


def names(tree: procs.ProcessTree) -> dict[int, str]:
    return {task.pid: why for task, why in procs.orphans(tree)}


def test_an_orphan_is_known_by_its_session(play):
    root, left, below = play.run("""
reader, writer = os.pipe()
left = orphan(lambda: (os.write(writer, b"%d" % child(lambda: (os.setsid(), rest()))), rest()))
below = int(os.read(reader, 20))
say(os.getpid(), left, below)
rest()
""")
    until(lambda: facts.task(left).ppid != root, "reparented")
    until(lambda: facts.task(below).sid == below, "in a session of its own")
    found = names(procs.look(root))
    assert found[left] == f"it is in session {root}, which began in the tree"
    assert found[below].startswith(f"its parent {left} ")
    assert set(found) == {left, below}


def test_an_orphan_of_an_ended_session_leader_is_known(play):
    root, leader, left = play.run("""
reader, writer = os.pipe()
leader = child(lambda: (os.setsid(), os.write(writer, b"%d" % child())))
wait_for_zombie(leader)
left = int(os.read(reader, 20))
say(os.getpid(), leader, left)
rest()
""")
    tree = procs.look(root)
    assert tree.pids == {root, leader}
    assert names(tree) == {left: f"it is in session {leader}, which began in the tree"}


SHELL_JOBS = """
def job(act=rest):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        act()
    os.setpgid(pid, pid) if os.getpgid(pid) != pid else None
    return pid
"""


def test_other_jobs_of_a_shell_are_no_orphans(play):
    _, one, mate, _, left = play.run(
        SHELL_JOBS
        + """
reader, writer = os.pipe()
one = job(lambda: (os.write(writer, b"%d" % orphan()), rest()))
left = int(os.read(reader, 20))
mate = child(lambda: (os.setpgid(0, one), rest()))
other = job()
say(os.getpid(), one, mate, other, left)
rest()
"""
    )
    until(lambda: facts.task(mate).pgrp == one, "one pipeline")
    found = names(procs.look(one))
    assert found == {left: f"it is in process group {one}, which began in the tree"}


def test_a_task_of_the_launchers_group_is_no_orphan(play):
    """A script starts two programs and ends: both are in its session, neither is the other's."""
    one, other = play.run(
        """
one, other = child(), child()
say(one, other)
time.sleep(1000)
"""
    )
    play._started[0].kill()
    play._started[0].wait()
    until(lambda: facts.task(one).ppid != play._started[0].pid, "reparented")
    assert facts.task(other).sid == facts.task(one).sid
    assert names(procs.look(one)) == {}


KEEPER = """
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # a child subreaper
reader, writer = os.pipe()
def root():
    os.setsid()
    os.write(writer, b"%d" % orphan(lambda: (os.setsid(), rest())))
    rest()
root = child(root)
left = int(os.read(reader, 20))
open("/proc/self/comm", "w").write("krg-keeper")
"""


def test_what_the_keeper_inherited_is_an_orphan_and_the_keeper_is_not(play):
    root, left = play.run(KEEPER + "say(root, left); rest()")
    until(lambda: facts.task(left).ppid == facts.task(root).ppid, "reparented")
    found = names(procs.look(root))
    assert set(found) == {left}
    assert "keeper" in found[left]


def test_all_of_a_trees_own_pid_namespace_belongs_to_it(play):
    play.run("say(os.getpid()); rest()", "unshare", "--pid", "--fork", "--kill-child")
    (inside,) = facts.children(play._started[0].pid)
    guest = play.start("nsenter", "-t", str(inside), "-p", "sleep", "1000")
    until(lambda: facts.children(guest.pid), "the guest is in")
    (sleeper,) = facts.children(guest.pid)
    found = names(procs.look(inside))
    assert found == {sleeper: "it is in the tree's pid namespace and ends with it"}


def test_a_container_with_more_than_the_tree_says_nothing(play):
    play.run(
        "a = child(); child(lambda: (os.setsid(), rest())); say(a); rest()",
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
    )
    (init,) = facts.children(play._started[0].pid)
    until(lambda: len(facts.children(init)) == 2, "two in the container")
    for pid in facts.children(init):
        assert names(procs.look(pid)) == {}


@pytest.fixture(params=["v2", "v1"])
def hierarchy(request):
    for each in cgroups.hierarchies():
        if each.can_freeze and f"v{each.version}" == request.param:
            return each
    return pytest.skip(f"no cgroup {request.param} hierarchy with a freezer is mounted here")


DAEMON = """
def enter():
    open(os.path.join(PLACE, "cgroup.procs"), "w").write(str(os.getpid()))
def service():
    os.setsid()
    enter()
    os.write(writer, b"%d" % orphan(lambda: (os.setsid(), rest())))
    rest()
reader, writer = os.pipe()
root = child(service)
left = int(os.read(reader, 20))
say(root, left)
rest()
"""


@pytest.mark.parametrize(
    ("name", "counts"), [("job.service", True), ("step_0", True), ("session-3.scope", False)]
)
def test_a_cgroup_made_for_the_tree_has_its_daemons(play, hierarchy, name, counts):
    place = f"{hierarchy.mount}/{play.mark}-{name}"
    os.mkdir(place)
    root, left = play.run(f"PLACE = {place!r}\n" + DAEMON)
    until(lambda: facts.task(left).sid == left, "a daemon")
    found = names(procs.look(root))
    assert found == (
        {left: f"it is in {place}, the cgroup that the tree runs in"} if counts else {}
    )


def test_a_cgroup_where_others_were_first_says_nothing(play, hierarchy):
    place = f"{hierarchy.mount}/{play.mark}"
    os.mkdir(place)
    play.run(f"open('{place}/cgroup.procs', 'w').write(str(os.getpid())); say(1); rest()")
    time.sleep(2 / facts.CLOCK_TICKS)
    root, left = play.run(f"PLACE = {place!r}\n" + DAEMON)
    until(lambda: facts.task(left).sid == left, "a daemon")
    assert left in cgroups.members(place)
    assert names(procs.look(root)) == {}


def test_what_else_its_starter_started_in_the_cgroup_is_no_orphan(play, hierarchy):
    place = f"{hierarchy.mount}/{play.mark}"
    os.mkdir(place)
    one, other = play.run(
        f"PLACE = {place!r}\n"
        """
def starter():
    open(os.path.join(PLACE, "cgroup.procs"), "w").write(str(os.getpid()))
    one, other = child(lead), child(lead)
    say(one, other)
    rest()
def lead():
    os.setsid()
    rest()
child(starter)
rest()
"""
    )
    until(lambda: facts.task(one).sid == one, "a session of its own")
    assert other in cgroups.members(place)
    assert names(procs.look(one)) == {}


def test_a_keeper_is_nobodys_orphan(play, hierarchy):
    place = f"{hierarchy.mount}/{play.mark}"
    os.mkdir(place)
    keeper = 'open("/proc/self/comm", "w").write("krg-keeper"); rest()'
    daemon = DAEMON.replace("rest())))", f"exec({keeper!r}))))")
    root, left = play.run(f"PLACE = {place!r}\n" + daemon)
    until(lambda: facts.task(left).comm == procs.KEEPER, "named so")
    assert left in cgroups.members(place)
    assert names(procs.look(root)) == {}


def test_placeholders_are_nobodys_orphans(play, hierarchy):
    place = f"{hierarchy.mount}/{play.mark}"
    os.mkdir(place)
    root, left = play.run(f"PLACE = {place!r}\n" + DAEMON)
    held = subprocess.Popen(
        ["sleep", "1000"],
        env={procs.PLACEHOLDER: place, "PLAYGROUND": play.mark},
        start_new_session=True,
    )
    play._started.append(held)
    Path(place, "cgroup.procs").write_text(str(held.pid))
    until(lambda: procs.PLACEHOLDER in texts.read(f"/proc/{held.pid}/environ"), "it sleeps")
    until(lambda: facts.task(left).sid == left, "a daemon")
    assert held.pid in cgroups.members(place)
    assert set(names(procs.look(root))) == {left}
