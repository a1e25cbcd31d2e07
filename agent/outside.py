"""What a tree is connected to that is not of the tree: pipes, terminals, sockets.

A dump saves one end of each of these and the other stays behind, so each has to be kept, closed or
substituted. All is read from /proc and sock_diag(7), nothing is touched. A stat of an open file on
a network filesystem whose server is dead blocks: call these in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat as stat_modes
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from krgfs import facts
from krgfs.errors import Unsupported
from krgfs.facts import Task

from .procs import ProcessTree, title
from .texts import read


class End(NamedTuple):
    """A descriptor of the tree that leads out of it; `fd` is -1 for a controlling terminal only.

    `kind` is tty, pipe, fifo, unix or tcp; `id` is CRIU's name for it; `mode` is r, w or rw; `name`
    tells a person where it leads: "read by 812 (tee)", "/dev/pts/3", "192.0.2.1:80".
    """

    kind: str
    id: str
    pid: int
    fd: int
    mode: str
    name: str


class Connection(NamedTuple):
    """A TCP connection of the tree; `is_inner` when the other end is in the tree as well."""

    pid: int
    fd: int
    inode: int
    local: str
    remote: str
    state: str
    is_inner: bool


class Blocker(NamedTuple):
    """What keeps a tree from being dumped as it is, and what to do about it."""

    pid: int
    fd: int
    resource: str
    reason: str
    remedy: str


class _Open(NamedTuple):
    """A descriptor, with what /proc links it to."""

    pid: int
    fd: int
    target: bytes

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"

    @property
    def mode(self) -> str:
        """r, w or rw, from the octal flags in fdinfo."""
        flags = int(self.info.get("flags", "0"), 8)
        return ("r", "w", "rw", "rw")[flags & os.O_ACCMODE]

    @property
    def info(self) -> dict[str, str]:
        lines = read(f"/proc/{self.pid}/fdinfo/{self.fd}").splitlines()
        return {name: value.strip() for name, _, value in (each.partition(":") for each in lines)}

    @property
    def inode(self) -> int:
        """The number in `socket:[123]`."""
        return int(self.target[8:-1])

    @property
    def is_socket(self) -> bool:
        return self.target.startswith(b"socket:[")


def ends(tree: ProcessTree) -> list[End]:
    """Return all that leads out of the tree, by pid and descriptor.

    A pipe whose other end nobody has is among them. The processes of the machine are searched for
    the other ends once, and only when the tree has anything that could lead out.
    """
    held = _held(tree)
    pipes, terminals = _pipes_and_terminals(held)
    peers = _unix_peers(tree, held)
    wanted = {each.target for each in pipes} | {b"socket:[%d]" % peer.inode for _, peer in peers}
    others = _holders(wanted, tree.pids) if wanted else {}
    found = [
        *_open_pipes(pipes, others),
        *_outer_terminals(tree, held, terminals),
        *(_unix_end(each, peer, others) for each, peer in peers),
        *(_tcp_end(each) for each in _connections(tree, held) if not each.is_inner),
    ]
    return sorted(found, key=lambda end: (end.pid, end.fd))


def tcp_connections(tree: ProcessTree) -> list[Connection]:
    """Return the TCP connections that the tree has open, in whatever state but listening."""
    return _connections(tree, _held(tree))


def unsupported(tree: ProcessTree) -> list[Blocker]:
    """Return what is certain to make a dump fail unless the caller decides about it."""
    found = {each.inode: each for each in tcp_connections(tree) if not each.is_inner}
    return [
        Blocker(
            pid=each.pid,
            fd=each.fd,
            resource=f"tcp {each.local} {each.remote}",
            reason=f"TCP connection to another process ({each.state})",
            remedy="write tcp=keep or tcp=close",
        )
        for each in found.values()
    ]


def _connections(tree: ProcessTree, held: list[_Open]) -> list[Connection]:
    own = [each for each in held if each.is_socket]
    if not own:
        return []
    known: dict[int, tuple[str, str, str]] = {}
    for pid in _one_per_network(tree):
        known |= _tcp_table(pid)
    sockets = [(each, *known[each.inode]) for each in own if each.inode in known]
    pairs = {(local, remote) for _, local, remote, _ in sockets}
    return [
        Connection(
            pid=each.pid,
            fd=each.fd,
            inode=each.inode,
            local=local,
            remote=remote,
            state=state,
            is_inner=(remote, local) in pairs,
        )
        for each, local, remote, state in sockets
    ]


def _held(tree: ProcessTree) -> list[_Open]:
    return [_Open(task.pid, *each) for task in tree.live for each in facts.descriptors(task.pid)]


def _one_per_network(tree: ProcessTree) -> Iterable[int]:
    """Return one pid for each network namespace that the tree is in."""
    return {facts.namespace(task.pid, "net"): task.pid for task in tree.live}.values()


# -- pipes and named pipes


def _pipes_and_terminals(
    held: Iterable[_Open],
) -> tuple[list[_Open], list[tuple[_Open, os.stat_result]]]:
    pipes: list[_Open] = []
    terminals: list[tuple[_Open, os.stat_result]] = []
    for each in held:
        if each.target.startswith(b"pipe:["):
            pipes.append(each)
        elif each.target.startswith(b"/"):
            with contextlib.suppress(OSError):
                meta = os.stat(each.path)
                if stat_modes.S_ISFIFO(meta.st_mode):
                    pipes.append(each)
                elif stat_modes.S_ISCHR(meta.st_mode) and facts.is_tty_device(meta.st_rdev):
                    terminals.append((each, meta))
    return pipes, terminals


def _holders(wanted: set[bytes], but: frozenset[int]) -> dict[bytes, list[_Open]]:
    """Find who else has these open: every descriptor of the machine is looked at."""
    names = {os.fsdecode(target): target for target in wanted}
    found: dict[bytes, list[_Open]] = {}
    for pid in facts.pids():
        if pid in but:
            continue
        try:
            directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            for fd in os.listdir(directory):
                target = names.get(_link(fd, directory))
                if target is not None:
                    found.setdefault(target, []).append(_Open(pid, int(fd), target))
        except OSError:
            continue
        finally:
            os.close(directory)
    return found


def _link(name: str, directory: int) -> str:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError:
        return ""


def _open_pipes(pipes: list[_Open], others: dict[bytes, list[_Open]]) -> Iterator[End]:
    inside: dict[bytes, set[str]] = {}
    for each in pipes:
        inside.setdefault(each.target, set()).update(each.mode)
    for each in pipes:
        outside = others.get(each.target, [])
        if not outside and inside[each.target] == {"r", "w"}:
            continue
        is_pipe = each.target.startswith(b"pipe:[")
        target = each.target.decode(errors="replace")
        far = _far_end(each.mode, inside[each.target], outside)
        yield End(
            kind="pipe" if is_pipe else "fifo",
            id=target if is_pipe else target.lstrip("/"),
            pid=each.pid,
            fd=each.fd,
            mode=each.mode,
            name=far if is_pipe else f"{target}, {far}",
        )


def _far_end(mode: str, inside: set[str], outside: list[_Open]) -> str:
    """Say who is at the other end of a pipe, or shares this one."""
    far, deed = ("w", "written") if mode == "r" else ("r", "read")
    if them := _titles(each for each in outside if far in each.mode):
        return f"{deed} by {them}"
    if far in inside:
        return f"also held by {_titles(outside)}"
    return f"{deed} by nobody"


def _titles(held: Iterable[_Open]) -> str:
    tasks = (facts.task(pid) for pid in sorted({each.pid for each in held}))
    return ", ".join(title(task) for task in tasks if task is not None)


# -- terminals


PTMX = os.makedev(5, 2)
CURRENT = os.makedev(5, 0)


def _outer_terminals(
    tree: ProcessTree, held: list[_Open], terminals: list[tuple[_Open, os.stat_result]]
) -> Iterator[End]:
    """Yield open terminals and controlling ones, but for those whose master is in the tree."""
    masters = (each for each, meta in terminals if meta.st_rdev == PTMX)
    inner = {_pts(int(index)) for each in masters if (index := each.info.get("tty-index"))}
    controlling = {task.pid: _terminal_of(task) for task in tree.live}
    seen = set()
    for each, meta in terminals:
        device = controlling[each.pid] if meta.st_rdev == CURRENT else meta.st_rdev
        seen.add(device)
        if meta.st_rdev != PTMX and device not in inner:
            yield End(
                kind="tty",
                id=f"tty[{meta.st_rdev:x}:{meta.st_dev:x}]",
                pid=each.pid,
                fd=each.fd,
                mode=each.mode,
                name=each.target.decode(errors="replace"),
            )
    for pid, device in controlling.items():
        if device and device not in inner | seen:
            seen.add(device)
            yield _controlling_end(pid, device)


def _terminal_of(task: Task) -> int:
    """Decode tty_nr of proc_pid_stat(5) into a device number, 0 for none."""
    number = task.tty & 0xFFFFFFFF
    minor = (number & 0xFF) | ((number >> 12) & 0xFFF00)
    return os.makedev((number >> 8) & 0xFFF, minor) if number else 0


def _pts(index: int) -> int:
    return os.makedev(136, index)


def _controlling_end(pid: int, device: int) -> End:
    path = f"/dev/pts/{os.minor(device)}" if os.major(device) == 136 else _device_path(device)
    try:
        filesystem = os.stat(path).st_dev
    except OSError:
        filesystem = 0
    return End("tty", f"tty[{device:x}:{filesystem:x}]", pid, -1, "rw", path)


def _device_path(device: int) -> str:
    """Return the path of a device that is no pty, by the kernel's own name for it."""
    uevent = read(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/uevent")
    names = [line[8:] for line in uevent.splitlines() if line.startswith("DEVNAME=")]
    return f"/dev/{names[0]}" if names else f"device {os.major(device)}:{os.minor(device)}"


# -- unix sockets


class _Unix(NamedTuple):
    inode: int
    peer: int
    name: str


def _unix_peers(tree: ProcessTree, held: list[_Open]) -> list[tuple[_Open, _Unix]]:
    """Return the tree's unix sockets that are connected to one outside, with that one."""
    own = [each for each in held if each.is_socket]
    if not own:
        return []
    known: dict[int, _Unix] = {}
    for pid in _one_per_network(tree):
        known |= _unix_table(pid)
    inner = {each.inode for each in own}
    return [
        (each, known.get(peer, _Unix(peer, 0, "")))
        for each in own
        if (peer := known[each.inode].peer if each.inode in known else 0) and peer not in inner
    ]


def _unix_end(each: _Open, peer: _Unix, others: dict[bytes, list[_Open]]) -> End:
    holders = _titles(others.get(b"socket:[%d]" % peer.inode, [])) or "nobody to be seen"
    name = f"connected to {peer.name or 'an unnamed socket'} of {holders}"
    return End("unix", f"unix[{each.inode}]", each.pid, each.fd, "rw", name)


NLM_F_REQUEST_DUMP = 0x301
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
UDIAG_SHOW = 0x1 | 0x4  # name, peer
UNIX_DIAG_NAME, UNIX_DIAG_PEER = 0, 2
HEADER = struct.Struct("=IHHII")
REQUEST = struct.Struct("=BBHIIIII")
MESSAGE = struct.Struct("=BBBBIII")


def _unix_table(pid: int) -> dict[int, _Unix]:
    """Return all unix sockets of a process's network namespace by inode, as ss(8) gets them."""
    request = REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW, 0xFFFFFFFF, 0xFFFFFFFF)
    header = HEADER.pack(HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
    found: dict[int, _Unix] = {}
    with _diagnosis_socket(pid) as diagnosis:
        diagnosis.send(header + request)
        for kind, payload in _messages(diagnosis):
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", payload)[0]
                raise Unsupported(
                    f"the kernel does not list unix sockets ({os.strerror(number)}): it needs "
                    f"CONFIG_UNIX_DIAG, for CRIU as well"
                )
            each = _parse_unix(payload)
            found[each.inode] = each
    return found


def _messages(diagnosis: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield type and payload of the netlink messages up to the end of a dump; netlink(7)."""
    while True:
        data = diagnosis.recv(1 << 18)
        at = 0
        while at < len(data):
            length, kind, *_ = HEADER.unpack_from(data, at)
            if kind == NLMSG_DONE:
                return
            yield kind, data[at + HEADER.size : at + length]
            if kind == NLMSG_ERROR:
                return
            at += (length + 3) & ~3


def _parse_unix(payload: bytes) -> _Unix:
    inode = MESSAGE.unpack_from(payload)[4]
    peer, name = 0, ""
    at = MESSAGE.size
    while at + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, at)
        value = payload[at + 4 : at + length]
        if kind == UNIX_DIAG_PEER:
            (peer,) = struct.unpack("=I", value)
        elif kind == UNIX_DIAG_NAME:
            text = value.decode(errors="replace")
            name = f"@{text[1:]}" if text.startswith("\0") else text.rstrip("\0")
        at += (length + 3) & ~3
    return _Unix(inode, peer, name)


def _diagnosis_socket(pid: int) -> socket.socket:
    """Open a sock_diag socket in the network namespace of a process."""
    if facts.namespace(pid, "net") == facts.namespace(os.getpid(), "net"):
        return _netlink()
    made: list[socket.socket | OSError] = []

    def make() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            made.append(_netlink())
        except OSError as exc:
            made.append(exc)

    # A namespace is a thread's; one that has gone elsewhere must not serve anybody afterwards.
    traveller = threading.Thread(target=make)
    traveller.start()
    traveller.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG


# -- TCP


STATES = {
    "01": "established",
    "02": "connecting",
    "03": "accepting",
    "04": "closing (fin-wait-1)",
    "05": "closing (fin-wait-2)",
    "08": "closed by the peer",
    "09": "closing (last-ack)",
    "0B": "closing",
}


def _tcp_table(pid: int) -> dict[int, tuple[str, str, str]]:
    """Return local and remote address and state by inode; proc_pid_net(5), without listeners."""
    found = {}
    for family, file in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in read(f"/proc/{pid}/net/{file}").splitlines()[1:]:
            field = line.split()
            if field[3] in STATES:
                local, remote = (_address(family, each) for each in field[1:3])
                found[int(field[9])] = (local, remote, STATES[field[3]])
    return found


def _address(family: int, text: str) -> str:
    """Decode `0100007F:1F90`: words of 32 bits as the machine has them, then the port."""
    digits, port = text.split(":")
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
    address = address.removeprefix("::ffff:") if "." in address else f"[{address}]"
    return f"{address}:{int(port, 16)}"


def _tcp_end(each: Connection) -> End:
    return End("tcp", f"socket:[{each.inode}]", each.pid, each.fd, "rw", each.remote)
