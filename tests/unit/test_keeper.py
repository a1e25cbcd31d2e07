"""The keeper without CRIU: a shell script stands in for the `criu restore` that leaves a tree."""

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LONG_S = 20.0  # nothing here takes that long
USER = 12345  # a uid that needs no account

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="uids and pid namespaces need root")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = importlib.util.spec_from_file_location("krgfs_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    path = str(tmp_path_factory.mktemp("keeper") / "krg-keeper")
    setup.compile_keeper(path, "-Werror", root=str(ROOT))
    return path


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def wait_gone(pid: int) -> None:
    """Wait until `pid` has ended; that init has not reaped it yet does not matter."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            assert select.select([pidfd], [], [], LONG_S)[0], f"{pid} goes on"
        finally:
            os.close(pidfd)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def held_by(pid: int) -> set[str]:
    """What its descriptors lead to; one that is closed while we look is left out."""
    held = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(fd))
    return held


@dataclass
class Tree:
    """What one `krg-keeper tree` answered and left in its directory."""

    dir: Path
    answer: str = ""
    returncode: int = 0
    pids: list[int] = field(default_factory=list)

    @property
    def outer(self) -> int:
        return self.pids[0]

    @property
    def inner(self) -> int:
        return self.pids[1]

    @property
    def keeper(self) -> int:
        return self.pids[2]

    def file(self, name: str) -> str:
        return (self.dir / name).read_text()

    def end(self) -> str:
        """Wait until the keeper has gone, and return the root's status."""
        wait_gone(self.keeper)
        return self.file("status")


@dataclass
class Trees:
    """Starts trees; ends what a failing test left of them."""

    program: str
    base: Path
    made: list[Tree] = field(default_factory=list)

    def command(self, *words: object) -> tuple[Tree, list[str]]:
        tree = Tree(self.base / f"tree{len(self.made)}")
        tree.dir.mkdir()
        self.made.append(tree)
        return tree, [self.program, "tree", "--dir", str(tree.dir), *map(str, words)]

    def start(self, *words: object, **popen: Any) -> Tree:
        tree, command = self.command(*words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, **popen)
        assert done.stderr == ""
        tree.answer, tree.returncode = done.stdout, done.returncode
        if done.stdout.startswith("ok "):
            tree.pids = [int(word) for word in done.stdout.split()[1:]]
        return tree

    def restore(self, script: str, *options: object) -> Tree:
        """Start what looks like `criu restore --restore-detached --pidfile $1`."""
        pidfile = self.base / f"pidfile{len(self.made)}"
        shell = ("sh", "-c", script, "criu", pidfile)
        return self.start("--pidfile", pidfile, *options, "--", *shell)

    def clean(self) -> None:
        for tree in self.made:
            for pid in tree.pids[::2]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def trees(program: str, tmp_path: Path) -> Iterator[Trees]:
    trees = Trees(program, tmp_path)
    yield trees
    trees.clean()


@pytest.fixture
def user_dir() -> Iterator[Path]:
    """A directory of USER's that they can really reach, unlike those below pytest's own."""
    with tempfile.TemporaryDirectory(prefix="krg-keeper-", dir="/tmp") as name:
        os.chown(name, USER, USER)
        yield Path(name)


RESTORES = 'sleep 1000 & printf %d $! > "$1"'


# ---- the status of a tree


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", "exit 0\n"), ("exit 7", "exit 7\n"), ("kill -9 $$", "signal 9\n")],
)
def test_the_status_of_a_program_is_kept(trees: Trees, script: str, status: str) -> None:
    tree = trees.start("--", "sh", "-c", script)
    assert tree.returncode == 0
    assert tree.answer == f"ok {tree.outer} {tree.outer} {tree.keeper}\n"
    assert tree.end() == status


def test_the_status_of_a_restored_root_is_kept(trees: Trees) -> None:
    tree = trees.restore(RESTORES)
    assert tree.file("launched") == "exit 0\n"
    assert tree.file("root") == f"{tree.outer} {tree.outer}\n"
    os.kill(tree.outer, signal.SIGUSR1)
    assert tree.end() == f"signal {signal.SIGUSR1:d}\n"


def test_a_root_that_ended_before_its_restore_was_over_keeps_its_status(trees: Trees) -> None:
    gate = trees.base / "gate"
    os.mkfifo(gate)
    orphan = f'( (read line < {gate}; exit 5) & printf %d $! > "$1" )'
    ended = 'until grep -q "State:.Z" /proc/$(cat "$1")/status; do :; done'
    assert trees.restore(f"{orphan}; echo > {gate}; {ended}").end() == "exit 5\n"


def test_the_keeper_is_recorded_by_pid_and_start_time(trees: Trees) -> None:
    tree = trees.restore(RESTORES)
    stat = Path(f"/proc/{tree.keeper}/stat").read_text().rpartition(")")[2].split()
    assert tree.file("keeper") == f"{tree.keeper} {stat[19]}\n"


def test_orphans_are_reaped_and_kept_company(trees: Trees) -> None:
    tree = trees.start("--out", trees.base / "out", "--", "sh", "-c", "sleep 1000 & echo $!")
    wait_gone(tree.outer)
    until((tree.dir / "status").exists)
    assert tree.file("status") == "exit 0\n"
    orphan = int((trees.base / "out").read_text())
    children = Path(f"/proc/{tree.keeper}/task/{tree.keeper}/children")
    assert children.read_text().split() == [str(orphan)]  # and no zombie
    os.kill(orphan, signal.SIGKILL)
    assert tree.end() == "exit 0\n"
    assert not Path(f"/proc/{orphan}").exists()


def test_a_root_that_is_no_descendant_is_watched_all_the_same(trees: Trees) -> None:
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        tree = trees.restore(f'printf %d {stranger.pid} > "$1"')
        assert tree.outer == stranger.pid
        assert runs(tree.keeper)
        stranger.kill()
    assert tree.end() == "unknown\n"


# ---- restores that fail


def test_nothing_of_a_failed_restore_is_left(trees: Trees) -> None:
    left = trees.base / "left"
    tree = trees.restore(f"(trap '' TERM; sleep 1000 & echo $! > {left}; wait) & sleep 0.2; exit 3")
    assert tree.answer == "failed exit 3\n"
    assert tree.returncode == 1
    assert tree.file("launched") == "exit 3\n"
    assert not runs(int(left.read_text()))
    assert {path.name for path in tree.dir.iterdir()} == {"keeper", "launched"}
    wait_gone(int(tree.file("keeper").split()[0]))


def test_a_restore_that_is_killed_has_failed(trees: Trees) -> None:
    tree = trees.restore(RESTORES + "; kill -9 $$")
    assert tree.answer == "failed signal 9\n"
    assert not (tree.dir / "root").exists()


def test_what_cannot_be_run_is_named(trees: Trees) -> None:
    tree = trees.start("--", "/nonexistent/criu")
    sentence = "error cannot run /nonexistent/criu: No such file or directory\n"
    assert (tree.answer, tree.file("launched"), tree.returncode) == (sentence, sentence, 1)


def test_a_cgroup_that_cannot_be_joined_is_named(trees: Trees) -> None:
    tree = trees.start("--cgroup", "/nonexistent/cgroup.procs", "--", "true")
    assert tree.answer == "error cannot join /nonexistent/cgroup.procs: No such file or directory\n"


@pytest.mark.parametrize(
    "words",
    [
        ["tree"],
        ["tree", "--dir", "/nonexistent", "--", "true"],
        ["tree", "--dir", "/", "--inherit", "5=/dev/null:x", "--", "true"],
        ["tree", "--dir", "/", "--owner", "5:x", "--", "true"],
        ["tree", "--dir", "/", "--pty", "--", "true"],
        ["as", "--uid", "1", "--", "true"],
        ["hold"],
        [],
    ],
)
def test_wrong_words_are_refused(program: str, words: list[str]) -> None:
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("krg-keeper: ") and done.stderr.endswith("\n")


# ---- what the keeper outlives


def test_the_keeper_survives_its_starter(trees: Trees) -> None:
    gate, pidfile = trees.base / "gate", trees.base / "pidfile"
    os.mkfifo(gate)
    script = f"read line < {gate}; {RESTORES}"
    tree, command = trees.command("--pidfile", pidfile, "--", "sh", "-c", script, "criu", pidfile)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        until((tree.dir / "keeper").exists)
        starter.kill()
    gate.write_text("go on\n")
    until((tree.dir / "root").exists)
    tree.pids = [*map(int, tree.file("root").split()), int(tree.file("keeper").split()[0])]
    os.kill(tree.outer, signal.SIGTERM)
    assert tree.end() == f"signal {signal.SIGTERM:d}\n"


def test_no_signal_that_stops_a_unit_ends_the_keeper(trees: Trees) -> None:
    tree = trees.restore(RESTORES)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
        os.kill(tree.keeper, number)
    os.kill(tree.outer, signal.SIGKILL)
    assert tree.end() == "signal 9\n"


def test_the_keeper_is_a_daemon(trees: Trees) -> None:
    tree = trees.restore(RESTORES, "--out", trees.base / "out")
    assert os.getsid(tree.keeper) == tree.keeper
    assert os.readlink(f"/proc/{tree.keeper}/cwd") == "/"
    assert Path(f"/proc/{tree.keeper}/comm").read_text() == "krg-keeper\n"
    until(lambda: held_by(tree.keeper) == {"/dev/null", str(tree.dir), "anon_inode:[signalfd]"})


@pytest.mark.parametrize("options", [(), ("--new-pid",), ("--pty",)])
def test_the_keeper_is_small(trees: Trees, options: tuple[str, ...]) -> None:
    script = "head -c 200000 /dev/zero; sleep 1000"
    tree = trees.start(*options, "--out", trees.base / "out", "--", "sh", "-c", script)
    until(lambda: (trees.base / "out").stat().st_size == 200000)
    rollup = Path(f"/proc/{tree.keeper}/smaps_rollup").read_text()
    rss_kib = next(int(row.split()[1]) for row in rollup.splitlines() if row.startswith("Rss:"))
    assert rss_kib < 1024


# ---- what a child gets

DESCRIPTORS = """
import os
for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
    try: print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError: pass
"""


def test_a_child_has_no_descriptor_but_its_own(trees: Trees) -> None:
    out, kept = trees.base / "out", trees.base / "kept"
    with open("/dev/zero") as leaked:
        tree = trees.start(
            *("--out", out, "--inherit", f"3={kept}:a", "--inherit", "9=/dev/null:r"),
            *("--", sys.executable, "-c", DESCRIPTORS),
            pass_fds=[leaked.fileno()],
        )
    assert tree.end() == "exit 0\n"
    assert [line.split() for line in out.read_text().splitlines()] == [
        ["0", "/dev/null"],
        ["1", str(out)],
        ["2", str(out)],
        ["3", str(kept)],
        ["9", "/dev/null"],
    ]


def test_a_child_inherits_no_ignored_or_blocked_signal(trees: Trees) -> None:
    tree, command = trees.command("--out", trees.base / "out", "--", "cat", "/proc/self/status")
    subprocess.run(
        ["sh", "-c", 'trap "" USR1 PIPE CHLD; exec "$@"', "sh", *command],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=LONG_S,
    )
    until((tree.dir / "status").exists)
    status = dict(line.split(":\t") for line in (trees.base / "out").read_text().splitlines())
    assert int(status["SigIgn"], 16) == int(status["SigBlk"], 16) == 0


def test_a_child_joins_its_cgroups_and_the_keeper_does_not(trees: Trees) -> None:
    files = [trees.base / name for name in ("one", "two")]
    for file in files:
        file.touch()
    options = [word for file in files for word in ("--cgroup", file)]
    assert trees.start(*options, "--", "true").end() == "exit 0\n"
    assert [file.read_text() for file in files] == ["0", "0"]


def test_a_program_leads_its_own_session_where_it_was_started(trees: Trees) -> None:
    out = trees.base / "out"
    script = "cut -d' ' -f6 /proc/self/stat; pwd"
    tree = trees.start("--out", out, "--", "sh", "-c", script, cwd=trees.base)
    assert tree.end() == "exit 0\n"
    assert out.read_text() == f"{tree.outer}\n{trees.base}\n"


def test_output_belongs_to_the_owner(trees: Trees, user_dir: Path) -> None:
    out = user_dir / "krg-app.out"
    tree = trees.start("--owner", f"{USER}:{USER}", "--out", out, "--", "echo", "hello")
    assert tree.end() == "exit 0\n"
    assert out.read_text() == "hello\n"
    found = out.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (USER, USER, 0o600)


def test_an_owner_cannot_make_root_write_elsewhere(trees: Trees, user_dir: Path) -> None:
    secret = trees.base / "secret"
    secret.write_text("as it was")
    secret.chmod(0o600)
    (user_dir / "out").symlink_to(secret)
    words = ("--owner", f"{USER}:{USER}", "--out", user_dir / "out", "--", "echo", "hello")
    assert trees.start(*words).answer == f"error cannot open {user_dir}/out: Permission denied\n"
    assert secret.read_text() == "as it was"


def test_the_groups_of_the_owner_open_doors(trees: Trees, user_dir: Path) -> None:
    os.chown(user_dir, 0, USER + 1)
    user_dir.chmod(0o770)
    words = ("--owner", f"{USER}:{USER}", "--out", user_dir / "out", "--", "true")
    assert trees.start(*words).answer.startswith("error cannot open ")
    assert trees.start("--groups", f"{USER},{USER + 1}", *words).end() == "exit 0\n"


# ---- a pid namespace


def test_a_private_pid_namespace_has_its_own_proc(trees: Trees) -> None:
    out = trees.base / "out"
    script = "echo $$ $PPID; echo /proc/[0-9]*; cd /proc/self/ns; readlink net ipc; exit 4"
    tree = trees.start("--new-pid", "--out", out, "--", "sh", "-c", script)
    assert tree.inner == 300
    assert tree.outer != tree.inner
    assert tree.end() == "exit 4\n"
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "ipc")]
    assert out.read_text().splitlines() == ["300 1", "/proc/1 /proc/300", *namespaces]


def test_pids_of_a_private_namespace_begin_where_told(trees: Trees) -> None:
    tree = trees.restore(RESTORES, "--new-pid", "--first-pid", "5000")
    assert tree.inner > 5000
    status = Path(f"/proc/{tree.outer}/status").read_text()
    assert f"NSpid:\t{tree.outer}\t{tree.inner}\n" in status


def test_after_a_restore_low_pids_are_left_to_the_next_one(trees: Trees) -> None:
    tree = trees.restore(RESTORES, "--new-pid")
    assert 2 < tree.inner < 300
    enter = ["nsenter", "-t", str(tree.keeper), "-p", "-m", "sh", "-c", "echo $$"]
    assert int(subprocess.check_output(enter, timeout=LONG_S)) >= 300


def test_who_entered_the_namespace_is_not_killed_with_it(trees: Trees) -> None:
    tree = trees.start("--new-pid", "--", "sleep", "1000")
    enter = ["nsenter", "-t", str(tree.keeper), "-p", "-m", "sh", "-c", "echo in; read line"]
    with subprocess.Popen(enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as visitor:
        assert visitor.stdin is not None and visitor.stdout is not None
        assert visitor.stdout.readline() == b"in\n"
        os.kill(tree.outer, signal.SIGKILL)
        until((tree.dir / "status").exists)
        assert runs(tree.keeper)
        visitor.stdin.write(b"\n")
        visitor.stdin.close()
        assert visitor.wait(LONG_S) == 0
    assert tree.end() == "signal 9\n"


# ---- a terminal


def on_pty(trees: Trees, out: Path, script: str) -> Tree:
    return trees.start("--pty", "--out", out, "--", "sh", "-c", script)


def test_a_terminal_is_relayed_to_a_file(trees: Trees) -> None:
    out = trees.base / "out"
    out.write_text("before\n")
    tree = on_pty(trees, out, "test -t 0 && stty size && echo hello > /dev/tty; printf 'a\\rb\\n'")
    assert tree.end() == "exit 0\n"
    assert out.read_bytes() == b"before\n24 80\nhello\na\rb\n"


def test_all_of_a_long_output_arrives(trees: Trees) -> None:
    out = trees.base / "out"
    assert on_pty(trees, out, "seq 100000").end() == "exit 0\n"
    assert out.read_text() == "".join(f"{i}\n" for i in range(1, 100001))


def test_a_full_disk_does_not_hold_the_tree_up(trees: Trees) -> None:
    assert on_pty(trees, Path("/dev/full"), "seq 100000; exit 6").end() == "exit 6\n"


def test_a_pipe_that_nobody_reads_does_not_hold_the_tree_up(trees: Trees) -> None:
    fifo = trees.base / "fifo"
    os.mkfifo(fifo)
    with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)):
        assert on_pty(trees, fifo, "seq 100000; exit 6").end() == "exit 6\n"


def test_a_restored_job_outlives_the_restore_on_its_terminal(trees: Trees) -> None:
    """The kernel hangs up the foreground job when a session's leader ends, so that is not CRIU."""
    out = trees.base / "out"
    script = RESTORES + "; test -t 0 && echo criu speaks"
    tree = trees.restore(script, "--pty", "--out", out, "--log", trees.base / "log")
    assert os.getsid(tree.outer) == tree.keeper
    assert (trees.base / "log").read_text() == "criu speaks\n"
    assert runs(tree.outer)
    os.kill(tree.outer, signal.SIGKILL)
    assert tree.end() == "signal 9\n"
    assert out.read_text() == ""


# ---- as


def status_as(program: str, *options: str) -> dict[str, str]:
    command = [program, "as", "--uid", str(USER), "--gid", str(USER), *options, "--"]
    text = subprocess.check_output([*command, "cat", "/proc/self/status"], text=True)
    return dict(line.split(":\t") for line in text.splitlines())


def test_as_keeps_every_capability(program: str) -> None:
    own = Path("/proc/self/status").read_text().partition("CapPrm:\t")[2].split()[0]
    status = status_as(program, "--groups", "5,6")
    assert status["Uid"] == status["Gid"] == "\t".join([str(USER)] * 4)
    assert status["Groups"].split() == ["5", "6"]
    assert {status[f"Cap{kind}"] for kind in ("Prm", "Eff", "Inh", "Amb")} == {own}


def test_as_can_drop_them(program: str) -> None:
    status = status_as(program, "--drop-caps")
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Inh", "Amb")} == {0}
    assert status["Groups"].split() == []


def test_as_leaves_a_process_that_owns_its_proc(program: str) -> None:
    command = [program, "as", "--uid", str(USER), "--gid", str(USER), "--"]
    owner = subprocess.check_output([*command, "stat", "-c", "%u", "/proc/self/maps"], text=True)
    assert owner == f"{USER}\n"


# ---- respawn

Respawn = Callable[..., tuple[int, int]]


@pytest.fixture
def respawn(program: str, tmp_path: Path) -> Iterator[Respawn]:
    """Start a supervisor with its pid and log in tmp_path; returns its pid and its child's."""
    supervisors = []

    def start(*command: str) -> tuple[int, int]:
        options = ("--name", "agent", "--pidfile", tmp_path / "pid", "--log", tmp_path / "log")
        words = [program, "respawn", *map(str, options), "--", *command]
        answer = subprocess.check_output(words, text=True, timeout=LONG_S).split()
        assert answer[0] == "ok"
        supervisors.append(int(answer[1]))
        return int(answer[1]), int(answer[2])

    yield start
    for pid in supervisors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def test_respawn_starts_again_until_it_ends_well(respawn: Respawn, tmp_path: Path) -> None:
    script = """n=$(wc -l < "$1"); echo run >> "$1"
        case $n in 0) kill -9 $$;; 1) exit 3;; esac"""
    count = tmp_path / "count"
    count.touch()
    supervisor, _ = respawn("sh", "-c", script, "sh", str(count))
    wait_gone(supervisor)
    assert count.read_text() == "run\n" * 3
    assert (tmp_path / "log").read_text().splitlines() == [
        "krg-keeper: agent ended: signal 9; it starts again in 100 ms",
        "krg-keeper: agent ended: exit 3; it starts again in 200 ms",
    ]
    assert not (tmp_path / "pid").exists()


def test_respawn_passes_sigterm_on_and_waits(respawn: Respawn, tmp_path: Path) -> None:
    script = "trap 'echo bye; exit 1' TERM; echo up; while :; do sleep 0.01; done"
    supervisor, child = respawn("sh", "-c", script)
    assert (tmp_path / "pid").read_text() == f"{supervisor}\n"
    until(lambda: (tmp_path / "log").read_text() == "up\n")
    os.kill(supervisor, signal.SIGTERM)
    wait_gone(supervisor)
    assert not runs(child)
    assert (tmp_path / "log").read_text() == "up\nbye\n"


def test_respawn_stops_while_it_waits_to_start_again(respawn: Respawn, tmp_path: Path) -> None:
    supervisor, _ = respawn("false")
    until(lambda: "800 ms" in (tmp_path / "log").read_text())
    os.kill(supervisor, signal.SIGTERM)
    wait_gone(supervisor)
    assert "1600 ms" not in (tmp_path / "log").read_text()


def test_respawn_says_at_once_what_it_cannot_start(program: str, tmp_path: Path) -> None:
    words = [program, "respawn", "--pidfile", f"{tmp_path}/pid", "--", "/nonexistent/agent"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONG_S)
    assert done.stdout == "error cannot run /nonexistent/agent: No such file or directory\n"
    assert done.returncode == 1
    assert not (tmp_path / "pid").exists()
