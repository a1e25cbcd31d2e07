"""Where a tree comes back: its pids, its cgroup, its output, its name, and who is in the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agent.cgroups import hierarchies, processes_in
from tests.criu.stage import Stage, as_user, inner_pid, number_in, program, stat
from tests.sites import gone, until

COUNTER = """
count = 0
def step(*_):
    global count
    count += 1
    with open('number.new', 'w') as file:
        file.write(f'{count}\\n')
    os.rename('number.new', 'number')
signal.signal(signal.SIGUSR1, step)
open('ready', 'w').close()
while True:
    signal.pause()
"""


@contextmanager
def held(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process of this very pid, which has to be free."""
    for _ in range(50):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(
            ["sleep", "600"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if process.pid == pid:
            break
        process.kill()
        process.wait()
    else:
        raise AssertionError(f"nobody could be given pid {pid}")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def count_to(number: int, pid: int, directory: Path) -> None:
    """Have the program make one step, which has to bring it to this number."""
    os.kill(pid, signal.SIGUSR1)
    until(lambda: number_in(directory / "number") == number, f"the program counts to {number}")


def test_a_version_is_what_it_was_when_it_was_made(stage: Stage, tmp_path: Path) -> None:
    with program(COUNTER, tmp_path) as process:
        for number in range(1, 6):
            count_to(number, process.pid, tmp_path)
            ref = stage.tell(f"procs/{process.pid}/checkpoint", f"1 desc='step {number}'")
        stage.end_pid(process.pid)
        app = ref.partition("/")[0]
        for number in (2, 5, 1, 3, 3):
            assert stage.tell("restart", f"{app}/v{number}") == f"pid {process.pid}"
            count_to(number + 1, process.pid, tmp_path)
            stage.end_pid(process.pid)


def test_an_image_is_restarted_twice_but_never_beside_itself(stage: Stage) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint(workload)
    code, said = stage.refused("restart", ref)
    assert code == errno.EEXIST
    assert str(workload.pid) in said
    for _ in range(2):
        stage.end(workload)
        stage.restart(workload, ref)
        workload.wait_progress()
        assert stage.refused("restart", f"{ref} pid=new")[0] == errno.EEXIST
    stage.passes(workload)


def test_a_restarted_trees_end_is_known(stage: Stage) -> None:
    workload = stage.begin("counter")
    ref = stage.checkpoint_and_end(workload)
    pid = stage.restart(workload, ref)
    stage.passes(workload)
    until(
        lambda: stage.site.facts(f"procs/{pid}/status").get("state") == "exit 0", "its exit status"
    )


# -- pids


def test_a_foreign_process_on_its_pid_is_named_or_evaded(stage: Stage) -> None:
    workload = stage.begin("counter")
    pid = workload.pid
    ref = stage.checkpoint_and_end(workload)
    with held(pid) as holder:
        code, said = stage.refused("restart", f"{ref} pid=keep")
        assert code == errno.EEXIST
        assert f"{pid} (sleep)" in said and "pid=new" in said, said
        assert holder.poll() is None
        outer = stage.restart(workload, ref)
        assert (inner_pid(outer), outer != pid) == (pid, True)
        workload.wait_progress()
        again = stage.checkpoint_and_end(workload)
        stage.restart(workload, again)
        stage.passes(workload)


def test_a_foreign_process_on_the_tid_of_a_thread_is_in_the_way_too(stage: Stage) -> None:
    workload = stage.begin("threads")
    tid = max(int(name) for name in os.listdir(f"/proc/{workload.pid}/task"))
    ref = stage.checkpoint_and_end(workload)
    with held(tid):
        code, said = stage.refused("restart", f"{ref} pid=keep")
        assert (code, f"{tid} (sleep)" in said) == (errno.EEXIST, True), said
        assert inner_pid(stage.restart(workload, ref)) != workload.pid
        stage.passes(workload)


def test_a_zombie_on_its_pid_is_waited_for(stage: Stage, tmp_path: Path) -> None:
    with program(COUNTER, tmp_path) as process:
        ref = stage.tell(f"procs/{process.pid}/checkpoint", "then=kill")
        assert stat(process.pid)[0] == "Z"  # a child of ours, which we have not waited for
        restart = subprocess.Popen(["sh", "-c", f"echo {ref} pid=keep > {stage.site.mnt}/restart"])
        until(lambda: "restoring" in _last_job(stage), "the restart waits")
        process.wait()
        assert restart.wait(30) == 0
        count_to(1, process.pid, tmp_path)


def _last_job(stage: Stage) -> str:
    jobs = sorted(int(name) for name in os.listdir(stage.site.mnt / "jobs"))
    return stage.site.read(f"jobs/{jobs[-1]}/status")


# -- cgroups


@pytest.fixture
def cgroups() -> Iterator[str]:
    """A cgroup of ours in every hierarchy where one can be made; its path below their roots."""
    name = f"krgtest-{os.getpid()}"  # `krg-` is what the agent calls its own
    made = []
    for hierarchy in hierarchies():
        if hierarchy.groups_processes:
            place = os.path.join(hierarchy.mount, name)
            os.mkdir(place)
            made.append(place)
    yield name
    for place in made:
        for pid in processes_in(place):
            os.kill(pid, signal.SIGKILL)
        until(lambda place=place: not processes_in(place), f"{place} is empty")
        os.rmdir(place)


def places(pid: int | str) -> set[str]:
    """Return the cgroups of a process in the hierarchies that group processes."""
    known = [h for h in hierarchies() if h.groups_processes]
    number = os.getpid() if pid == "self" else int(pid)
    return {place for h in known if (place := h.directory(number)) is not None}


def test_by_default_a_tree_gets_a_cgroup_of_its_own(stage: Stage) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint_and_end(workload)
    stage.restart(workload, ref)
    found = places(workload.pid)
    assert all("/krgfs/krg-" in place for place in found), found
    assert all(places(pid) == found for pid in workload.tasks())
    stage.passes(workload)


def test_a_tree_that_was_restarted_later_is_no_part_of_another(stage: Stage) -> None:
    first, second = stage.begin("counter"), stage.begin("small")
    for workload in (first, second):
        stage.restart(workload, stage.checkpoint_and_end(workload, f"name=of-{workload.name}"))
    for workload in (first, second):
        stage.checkpoint(workload)
        stage.passes(workload)


def test_the_cgroups_of_a_tree_go_when_the_last_of_it_has_ended(stage: Stage) -> None:
    workload = stage.begin("proctree")
    stage.restart(workload, stage.checkpoint_and_end(workload))
    found, tasks = places(workload.pid), [task for task in workload.tree() if task != workload.pid]
    for task in tasks:
        os.kill(task, signal.SIGSTOP)  # so that none of them ends with the root
    stage.end_pid(workload.pid)
    assert all(map(os.path.exists, found))
    for task in tasks:
        with suppress(ProcessLookupError):
            os.kill(task, signal.SIGKILL)
    until(lambda: not any(map(os.path.exists, found)), "the cgroups to go")


def test_cgroup_path_puts_a_tree_there(stage: Stage, cgroups: str) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint_and_end(workload)
    stage.restart(workload, f"{ref} cgroup=/{cgroups}")
    for pid in workload.tasks():
        assert {os.path.basename(place) for place in places(pid)} == {cgroups}
    again = stage.checkpoint_and_end(workload)
    code, said = stage.refused("restart", f"{again} cgroup=/nowhere/at/all")
    assert (code, "/nowhere/at/all" in said) == (errno.EINVAL, True)
    stage.restart(workload, again)
    stage.passes(workload)


def test_cgroup_caller_puts_a_tree_where_the_caller_is(stage: Stage, cgroups: str) -> None:
    workload = stage.begin("counter")
    ref = stage.checkpoint_and_end(workload)
    joins = "".join(
        f"echo $$ > {os.path.join(hierarchy.mount, cgroups)}/cgroup.procs; "
        for hierarchy in hierarchies()
        if hierarchy.groups_processes
    )
    done = stage.site.sh(f"{joins} echo {ref} cgroup=caller > $K/restart")
    assert done.returncode == 0, done.stderr
    assert {os.path.basename(place) for place in places(workload.pid)} == {cgroups}
    stage.passes(workload)


# -- what was connected to the outside


def test_the_output_of_a_terminal_job_goes_on_in_a_file(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workload = stage.begin("ptyjob")
    ref = stage.checkpoint_and_end(workload)
    app = ref.partition("/")[0]
    out = tmp_path / f"krg-{app}.out"
    stage.restart(workload, ref)
    until(lambda: out.exists() and out.read_text().count("step") > 5, "output in the file")
    ref = stage.checkpoint_and_end(workload)
    kept = out.read_bytes()
    stage.restart(workload, ref)
    until(lambda: out.stat().st_size > len(kept) + 20, "more output in the file")
    stage.passes(workload)
    assert out.read_bytes().startswith(kept), "the file was begun anew"
    steps = [int(line.split()[1]) for line in out.read_text().split("\n") if line.strip()]
    assert steps == sorted(steps)


PIPED = """
open('ready', 'w').close()
count = 0
while True:
    count += 1
    os.write(1, b'line %d\\n' % count)
    time.sleep(0.005)
"""


def test_what_goes_into_a_pipe_to_the_outside_goes_on_in_a_file(
    stage: Stage, tmp_path: Path
) -> None:
    with program(PIPED, tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ref = stage.tell(f"procs/{process.pid}/checkpoint", "then=kill")
        rest = process.stdout.read()  # up to its end: nobody holds the pipe any more
        process.wait()
        last = int(rest.split()[-1])
        out = tmp_path / f"krg-{ref.partition('/')[0]}.out"
        assert stage.tell("restart", ref) == f"pid {process.pid}"
        until(lambda: out.exists() and out.read_text().count("\n") > 5, "output in the file")
        first = out.read_text().split("\n")[0]
        assert last - 100 <= int(first.split()[1]) <= last + 1, (last, first)
        process.stdout.close()


# -- redis-server alone, with somebody from outside


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    """A redis-server of its own on a free port; yields the port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    options = f"--port {port} --bind 127.0.0.1 --save '' --appendonly no"
    source = f"os.execvp('sh', ['sh', '-c', ': > ready; exec redis-server {options}'])"
    with program(source.replace("''", "\\'\\'"), directory):
        until(lambda: _answers(port), "redis-server answers")
        try:
            yield port
        finally:  # it writes over its environment, by which others are found
            for pid in _servers(port):
                os.kill(pid, signal.SIGKILL)
            until(lambda: not _servers(port), "redis-server is gone")


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as stream:
        return ask(stream, "PING") == "+PONG"
    return False


def ask(stream: socket.socket, line: str) -> str:
    stream.sendall(f"{line}\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n"):
        data = stream.recv(4096)
        if not data:
            raise ConnectionResetError("the server hung up")
        answer += data
    return answer.decode().strip().replace("\r\n", " ")


def _server(port: int) -> int:
    (found,) = _servers(port)
    return found


def _servers(port: int) -> list[int]:
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and f"redis-server 127.0.0.1:{port}".encode() in _title(entry)
    ]


def _title(entry: Path) -> bytes:
    with suppress(OSError):
        return (entry / "cmdline").read_bytes()
    return b""


def test_redis_keeps_its_data_when_its_connections_are_closed(
    stage: Stage, tmp_path: Path, need: object
) -> None:
    need("redis-server")  # type: ignore[operator]
    with redis(tmp_path) as port, socket.create_connection(("127.0.0.1", port), 10) as client:
        for number in range(200):
            assert ask(client, f"SET key:{number} value:{number}") == "+OK"
        pid = _server(port)
        ref = stage.tell(f"procs/{pid}/checkpoint", "then=kill tcp=close")
        os.waitpid(pid, 0)
        with pytest.raises(ConnectionError):
            ask(client, "PING")
        assert stage.tell("restart", ref) == f"pid {pid}"
        with socket.create_connection(("127.0.0.1", port), 10) as again:
            assert ask(again, "DBSIZE") == ":200"
            assert ask(again, "GET key:123") == "$9 value:123"


def test_redis_keeps_a_connection_from_outside(stage: Stage, tmp_path: Path, need: object) -> None:
    need("redis-server")  # type: ignore[operator]
    with redis(tmp_path) as port, socket.create_connection(("127.0.0.1", port), 30) as client:
        assert ask(client, "SET key before") == "+OK"
        pid = _server(port)
        for _ in range(2):
            ref = stage.tell(f"procs/{pid}/checkpoint", "tcp=keep")
            assert ask(client, "GET key") == "$6 before"
        ref = stage.tell(f"procs/{pid}/checkpoint", "then=kill tcp=keep")
        os.waitpid(pid, 0)
        client.sendall(b"GET key\r\n")  # nobody is there to answer, and nobody says so
        assert stage.tell("restart", ref) == f"pid {pid}"
        assert client.recv(100) == b"$6\r\nbefore\r\n"
        assert ask(client, "INCR counter") == ":1"


def _tables() -> set[str]:
    return set(subprocess.check_output(["nft", "list", "tables"], text=True).splitlines())


def test_an_image_that_is_removed_lets_its_connections_go(
    stage: Stage, tmp_path: Path, need: object
) -> None:
    """Nobody will restore them: the peer has to hear that they are gone."""
    need("redis-server")  # type: ignore[operator]
    with redis(tmp_path) as port, socket.create_connection(("127.0.0.1", port), 30) as client:
        assert ask(client, "SET key before") == "+OK"
        pid, before = _server(port), _tables()
        ref = stage.tell(f"procs/{pid}/checkpoint", "then=kill tcp=keep")
        os.waitpid(pid, 0)
        held = _tables() - before
        assert len(held) == 1
        images = stage.site.mnt / "images"
        shutil.copytree(images / ref, tmp_path / "out")
        (images / "copied").mkdir()
        shutil.copytree(tmp_path / "out", images / "copied" / "v1", copy_function=shutil.copyfile)
        os.rmdir(images / "copied" / "v1")
        assert held <= _tables()  # a copy goes, the image itself may still be restored
        os.rmdir(stage.site.mnt / "images" / ref)
        assert not held & _tables()
        with pytest.raises(ConnectionError):
            ask(client, "GET key")


# -- orphans

LEAVES_AN_ORPHAN = """
if os.fork() == 0:
    if os.fork() == 0:
        with open('orphan.new', 'w') as file:
            file.write(f'{os.getpid()}\\n')
        os.rename('orphan.new', 'orphan')
        while True:
            signal.pause()
    os._exit(0)
os.wait()
open('ready', 'w').close()
while True:
    signal.pause()
"""


def test_orphans_are_named_and_refused_or_dropped(stage: Stage, tmp_path: Path) -> None:
    with program(LEAVES_AN_ORPHAN, tmp_path) as process:
        until(lambda: number_in(tmp_path / "orphan"), "there is an orphan")
        orphan = number_in(tmp_path / "orphan")
        code, said = stage.refused(f"procs/{process.pid}/checkpoint", "1")
        assert code == errno.EOPNOTSUPP
        assert str(orphan) in said and "orphans=drop" in said, said
        assert process.poll() is None
        ref = stage.tell(f"procs/{process.pid}/checkpoint", "then=kill orphans=drop")
        process.wait()
        assert not gone(orphan)
        os.kill(orphan, signal.SIGKILL)
        until(lambda: gone(orphan), "the orphan is gone")
        assert stage.tell("restart", ref) == f"pid {process.pid}"


def test_a_child_that_ended_is_still_there_to_be_waited_for(stage: Stage, tmp_path: Path) -> None:
    source = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os._exit(42)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        "open('ready', 'w').close()\n"
        "signal.sigwait([signal.SIGUSR1])\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "with open('number.new', 'w') as file:\n    file.write(f'{code}\\n')\n"
        "os.rename('number.new', 'number')\n"
    )
    with program(source, tmp_path) as process:
        ref = stage.tell(f"procs/{process.pid}/checkpoint", "then=kill")
        process.wait()
        assert stage.tell("restart", ref) == f"pid {process.pid}"
        os.kill(process.pid, signal.SIGUSR1)
        until(lambda: number_in(tmp_path / "number") == 42, "the exit code of the child")


# -- a tree that checkpoints itself


def test_a_program_checkpoints_itself_and_knows_which_life_it_is(stage: Stage) -> None:
    path = stage.site.mnt / "self" / "checkpoint"
    workload = stage.begin("selfckpt", path)
    outcomes = workload.directory / "outcomes"
    (first,) = outcomes.read_text().split("\n")[:-1]
    for life in (2, 3):
        stage.end(workload)
        stage.restart(workload, first)
        until(lambda life=life: outcomes.read_text().count("\n") == life, f"life {life}")
        workload.wait_progress()
    assert outcomes.read_text().split("\n")[1:-1] == [f"restarted {first}"] * 2
    stage.passes(workload)


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_shell_script_checkpoints_itself(
    stage: Stage, tmp_path: Path, shell: str, need: object
) -> None:
    need(shell)  # type: ignore[operator]
    script = (
        "echo 1 > $K/self/checkpoint\n"
        'while line=$(cat $K/procs/$$/checkpoint) && [ "${line#running}" != "$line" ]\n'
        "do :; done\n"
        'echo "$line" >> outcomes\n'
        "while :; do sleep 0.05; done\n"
    )
    process = subprocess.Popen(
        [shell, "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "K": str(stage.site.mnt)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    outcomes = tmp_path / "outcomes"
    try:
        until(lambda: outcomes.exists() and outcomes.read_text(), "the first outcome")
        ref = outcomes.read_text().strip()
        assert ref.endswith("/v1"), ref
        end_group(process)
        stage.tell("restart", ref)
        until(lambda: outcomes.read_text().count("\n") == 2, "the second outcome")
        assert outcomes.read_text() == f"{ref}\nrestarted {ref}\n"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all of its group, and wait until their pids are free."""

    def is_empty() -> bool:
        process.poll()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return True
        return False

    until(is_empty, f"process group {process.pid} is gone")


# -- names


def test_a_name_belongs_to_the_uid_that_took_it_first(stage: Stage) -> None:
    mine = stage.begin("counter")
    other = stage.begin("otheruid")
    ref = stage.checkpoint(mine, "1 name=taken")
    assert ref == "taken/v1"
    code, said = stage.refused(f"procs/{other.pid}/checkpoint", "name=taken")
    assert (code, "name=" in said) == (errno.EPERM, True)
    done = as_user(1000, f"echo name=taken > $K/procs/{other.pid}/checkpoint", stage.site)
    assert done.returncode != 0 and "not permitted" in done.stderr, done.stderr
    third = stage.begin("counter")
    assert stage.refused(f"procs/{third.pid}/checkpoint", "name=taken")[0] == errno.EEXIST
    assert stage.checkpoint(mine) == "taken/v2"
    for workload in (mine, other, third):
        stage.passes(workload)


def test_a_restarted_tree_continues_its_app(stage: Stage) -> None:
    workload = stage.begin("counter")
    app = stage.checkpoint_and_end(workload).partition("/")[0]
    for version in (2, 3):
        stage.restart(workload, app)
        assert stage.checkpoint_and_end(workload) == f"{app}/v{version}"
    stage.restart(workload, f"/krg/images/{app}/latest")
    assert stage.site.facts(f"procs/{workload.pid}/status")["app"] == app
    stage.passes(workload)


def test_another_process_with_the_same_pid_and_name_gets_another_app(
    stage: Stage, tmp_path: Path
) -> None:
    refs = []
    with held_name() as pid:
        refs.append(stage.tell(f"procs/{pid}/checkpoint", "1"))
    with held(pid):
        refs.append(stage.tell(f"procs/{pid}/checkpoint", "1"))
    app = refs[0].partition("/")[0]
    assert refs == [f"{app}/v1", f"{app}~2/v1"]


@contextmanager
def held_name() -> Iterator[int]:
    process = subprocess.Popen(
        ["sleep", "600"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "it sleeps")
        yield process.pid
    finally:
        process.kill()
        process.wait()
