"""Real pipes, terminals and sockets: what leads out of a tree is found, what does not is not."""

from __future__ import annotations

import contextlib
import os
import pty
import socket

import pytest

from agent import outside, procs
from krgfs import facts
from tests.unit.test_procs import playground, until


@pytest.fixture
def play(tmp_path):
    with playground(tmp_path) as found:
        yield found


def ends_of(pid: int) -> list[outside.End]:
    return outside.ends(procs.look(pid))


def us() -> str:
    return procs.title(facts.task(os.getpid()))


def identity(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@contextlib.contextmanager
def piped():
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


# -- pipes


def test_a_tree_that_is_closed_in_itself_has_no_ends(play):
    (root,) = play.run("""
kept = os.pipe(), socket.socketpair(), socket.socket(), socket.socket(socket.AF_UNIX)
kept[2].bind(("127.0.0.1", 0)); kept[2].listen()
kept[3].bind("\\0" + sys.argv[1]); kept[3].listen()
child()
say(os.getpid())
rest()
""")
    assert ends_of(root) == []


def test_a_pipe_to_somebody_outside_is_an_end(play):
    with piped() as (_, writer):
        (root,) = play.run("say(os.getpid()); rest()", stdout=writer)
        (end,) = ends_of(root)
        assert end == outside.End("pipe", identity(writer), root, 1, "w", f"read by {us()}")


def test_both_directions_and_a_shared_end_are_told_apart(play):
    with piped() as (to_tree, our_end), piped() as (reader, writer):
        (root,) = play.run("say(os.getpid()); rest()", stdin=to_tree, stderr=writer)
        found = {end.fd: end for end in ends_of(root)}
        assert found[2].id == identity(reader)
        assert found[0].id == identity(our_end)
        assert (found[0].mode, found[0].name) == ("r", f"written by {us()}")
        assert (found[2].mode, found[2].name) == ("w", f"read by {us()}")
        assert set(found) == {0, 2}


def test_an_inner_pipe_that_somebody_shares_is_an_end(play):
    with piped() as (reader, writer):
        (root,) = play.run("os.dup2(0, 7); say(os.getpid()); rest()", stdin=reader, stdout=writer)
        found = {end.fd: end.name for end in ends_of(root)}
    assert found == {
        0: f"written by {us()}",
        7: f"written by {us()}",
        1: f"read by {us()}",
    }


def test_a_pipe_whose_reader_is_inside_can_be_held_by_another_writer(play):
    launcher, root = play.run("""
reader, writer = os.pipe()
root = child()
os.close(reader)
say(os.getpid(), root)
rest()
""")
    title = procs.title(facts.task(launcher))
    found = {end.mode: end.name for end in ends_of(root)}
    assert found == {"r": f"written by {title}", "w": f"also held by {title}"}
    assert ends_of(launcher) == []


def test_a_pipe_that_nobody_else_has_is_an_end(play):
    with piped() as (reader, writer):
        (root,) = play.run("say(os.getpid()); rest()", stdin=reader)
        name = identity(writer)
    (end,) = ends_of(root)
    assert end == outside.End("pipe", name, root, 0, "r", "written by nobody")


def test_a_named_pipe_is_an_end_by_its_path(play, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    (root,) = play.run(
        f"kept = os.open({str(path)!r}, os.O_RDONLY | os.O_NONBLOCK); say(os.getpid()); rest()"
    )
    (end,) = ends_of(root)
    assert (end.kind, end.id, end.mode) == ("fifo", str(path).lstrip("/"), "r")
    assert end.name == f"{path}, written by nobody"
    fd = os.open(path, os.O_WRONLY)
    assert ends_of(root)[0].name == f"{path}, written by {us()}"
    os.close(fd)


# -- terminals


@contextlib.contextmanager
def terminal():
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)
        os.close(master)


def criu_tty(fd: int) -> str:
    """As CRIU's --external wants it: both device numbers in hexadecimal."""
    meta = os.stat(fd)
    return f"tty[{meta.st_rdev:x}:{meta.st_dev:x}]"


def test_an_open_terminal_is_an_end(play):
    with terminal() as (_, slave):
        (root,) = play.run("say(os.getpid()); rest()", stdin=slave)
        assert ends_of(root) == [
            outside.End("tty", criu_tty(slave), root, 0, "rw", os.ttyname(slave))
        ]


def test_a_controlling_terminal_is_an_end_without_a_descriptor(play):
    with terminal() as (_, slave):
        (root,) = play.run(
            """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.close(0)
say(os.getpid())
child()
rest()
""",
            stdin=slave,
        )
        expected = [outside.End("tty", criu_tty(slave), root, -1, "rw", os.ttyname(slave))]
        assert ends_of(root) == expected


def test_slash_dev_slash_tty_is_the_controlling_terminal(play):
    with terminal() as (_, slave):
        (root,) = play.run(
            """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.dup2(os.open("/dev/tty", os.O_RDONLY), 0)
os.closerange(3, 10)
say(os.getpid())
rest()
""",
            stdin=slave,
        )
        (end,) = ends_of(root)
        assert (end.kind, end.fd, end.mode, end.name) == ("tty", 0, "r", "/dev/tty")


@pytest.mark.parametrize("closes", [False, True])
def test_a_terminal_whose_master_is_in_the_tree_is_none(play, closes):
    root, shell = play.run(f"""
import pty
shell, master = pty.fork()
if shell == 0:
    {"os.closerange(0, 3)" if closes else "pass"}
    rest()
say(os.getpid(), shell)
rest()
""")
    until(lambda: facts.task(shell).tty, "it has a terminal")
    assert ends_of(root) == []
    until(lambda: (ends_of(shell)[0].fd == -1) is closes, "has closed, or not")
    assert {end.kind for end in ends_of(shell)} == {"tty"}


# -- unix sockets


def test_a_socket_pair_with_somebody_outside_is_an_end(play):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        (root,) = play.run("say(os.getpid()); rest()", stdin=theirs)
        (end,) = ends_of(root)
        inode = os.stat(theirs.fileno()).st_ino
        name = f"connected to an unnamed socket of {us()}"
        assert end == outside.End("unix", f"unix[{inode}]", root, 0, "rw", name)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_server_is_named_to_its_client_and_a_client_to_its_server(play, tmp_path, abstract):
    path = f"\0{tmp_path}/socket" if abstract else f"{tmp_path}/socket"
    shown = path.replace("\0", "@")
    (server,) = play.run(f"""
listener = socket.socket(socket.AF_UNIX)
listener.bind({path!r})
listener.listen()
say(os.getpid())
kept = listener.accept()
rest()
""")
    (client,) = play.run(f"""
kept = socket.socket(socket.AF_UNIX)
kept.connect({path!r})
say(os.getpid())
rest()
""")
    until(lambda: ends_of(server), "accepted")
    (there,) = ends_of(client)
    assert there.name == f"connected to {shown} of {procs.title(facts.task(server))}"
    (here,) = ends_of(server)
    assert here.name == f"connected to an unnamed socket of {procs.title(facts.task(client))}"


def test_a_connected_datagram_socket_is_an_end(play, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(f"{tmp_path}/log")
        (root,) = play.run(f"""
kept = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
kept.connect({str(tmp_path / "log")!r})
say(os.getpid())
rest()
""")
        (end,) = ends_of(root)
        assert end.kind == "unix"
        assert end.name == f"connected to {tmp_path}/log of {us()}"


# -- TCP


TALK = """
def connected(port=0, host="127.0.0.1", family=socket.AF_INET):
    kept = socket.socket(family)
    kept.connect((host, port))
    return kept
"""


@pytest.mark.parametrize(
    ("family", "host", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "[::1]"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_connection_to_the_outside_is_an_end_and_blocks(play, family, host, shown):
    listening = socket.AF_INET if "127" in host else family
    with socket.socket(listening) as listener:
        listener.bind((host.rpartition("f:")[2], 0))
        listener.listen()
        port = listener.getsockname()[1]
        (root,) = play.run(
            TALK + f"kept = connected({port}, {host!r}, {int(family)}); say(os.getpid()); rest()"
        )
        accepted, (_, their_port, *_) = listener.accept()
        with accepted:
            tree = procs.look(root)
            (each,) = outside.tcp_connections(tree)
            assert (each.pid, each.local, each.remote, each.state, each.is_inner) == (
                root,
                f"{shown}:{their_port}",
                f"{shown}:{port}",
                "established",
                False,
            )
            assert outside.ends(tree) == [
                outside.End("tcp", f"socket:[{each.inode}]", root, each.fd, "rw", f"{shown}:{port}")
            ]
            (blocker,) = outside.unsupported(tree)
            assert (blocker.pid, blocker.fd) == (root, each.fd)
            assert blocker.remedy == "write tcp=keep or tcp=close"
        until(lambda: outside.tcp_connections(tree)[0].state == "closed by the peer", "half closed")


def test_a_connection_within_the_tree_is_inner_and_no_end(play):
    (root,) = play.run(
        TALK
        + """
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
child(lambda: (setattr(sys, "kept", connected(listener.getsockname()[1])), rest()))
kept = listener.accept()
say(os.getpid())
rest()
"""
    )
    tree = procs.look(root)
    connections = outside.tcp_connections(tree)
    assert len(connections) == 2
    assert all(each.is_inner for each in connections)
    assert outside.ends(tree) == []
    assert outside.unsupported(tree) == []
    (son,) = facts.children(root)
    (alone,) = outside.tcp_connections(procs.look(son))
    assert not alone.is_inner


# -- namespaces and size


def test_a_network_namespace_of_its_own_is_looked_into(play, tmp_path):
    before = facts.namespace(os.getpid(), "net")
    play.run(
        TALK
        + """
import subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
one, two = socket.socketpair()
def other():
    two.close()
    sys.kept = connected(listener.getsockname()[1])
    rest()
def outer():
    one.close()
    sys.kept = listener.accept()
    rest()
child(outer)
say(child(other))
one.close(); two.close(); listener.close()
rest()
""",
        "unshare",
        "--net",
    )
    (launcher,) = {process.pid for process in play._started}
    outer, other = facts.children(launcher)
    until(lambda: len(outside.ends(procs.look(other))) == 2, "connected")
    assert {end.kind for end in ends_of(other)} == {"unix", "tcp"}
    assert {each.state for each in outside.tcp_connections(procs.look(outer))} == {"established"}
    assert facts.namespace(os.getpid(), "net") == before


def test_nobody_is_searched_when_nothing_could_lead_out(play, monkeypatch):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)
    monkeypatch.setattr(facts, "pids", lambda: pytest.fail("all processes were looked at"))
    assert outside.ends(tree) == []


def test_ends_come_in_order_and_a_gone_process_has_none(play):
    with piped() as (_, writer), terminal() as (_, slave):
        root, son = play.run(
            "son = child(); say(os.getpid(), son); rest()", stdin=slave, stdout=writer
        )
        tree = procs.look(root)
        found = [(end.pid, end.fd, end.kind) for end in outside.ends(tree)]
        order = [(0, "tty"), (1, "pipe")]
        assert found == [(pid, *each) for pid in (root, son) for each in order]
        procs.kill(tree)
        play._started[0].wait()
        until(lambda: not list(facts.descriptors(son)), "closed")
        assert outside.ends(tree) == []
