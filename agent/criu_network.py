"""What CRIU does to the network for tcp=keep, and what has to be done in its stead.

While connections are dumped or restored, a firewall table of the dump's name drops their packets:
one that came through to half a connection would be answered with a reset. CRIU makes the table when
it dumps and removes it when it has restored, but also when the tree runs on after its dump; so an
image of such a tree would be restored without. Here the table is made again.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat as stat_modes
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from krgfs import facts

from . import texts
from .criu_format import as_bytes, as_int, entries, fields_of, parse
from .criu_images import COMMON_MAGIC, FILES_MAGIC

# fields of file_entry and of inet_sk_entry
FILE_INET = 4
SOCKET_INODE, SOCKET_PORTS, SOCKET_ADDRESSES = 2, (7, 8), (11, 12)
CRIU_MARK = 0xC114  # on the packets of CRIU itself, soccr/soccr.h
TABLE_NAME_BYTES = 31 - len("inet CRIU-")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class End(NamedTuple):
    address: Address
    port: int


class Connection(NamedTuple):
    """A TCP connection as the socket at `own` sees it."""

    own: End
    peer: End

    def __str__(self) -> str:
        return f"{_shown(self.own)} to {_shown(self.peer)}"


def _shown(end: End) -> str:
    address = f"[{end.address}]" if end.address.version == 6 else f"{end.address}"
    return f"{address}:{end.port}"


def connections(images: Path) -> list[Connection]:
    """Return the TCP connections whose streams are in an image."""
    if not any(images.glob("tcp-stream-*.img")):
        return []
    found = []
    for entry in entries(images / "files.img", COMMON_MAGIC, FILES_MAGIC):
        for field in parse(entry):
            if field.number == FILE_INET:
                raw = as_bytes(field.value)
                inode = as_int(fields_of(raw).get(SOCKET_INODE, 0))
                if (images / f"tcp-stream-{inode:x}.img").exists():
                    found.append(_connection(raw))
    return found


def _connection(raw: bytes) -> Connection:
    fields = parse(raw)
    numbers = fields_of(raw)
    ends = []
    for port, address in zip(SOCKET_PORTS, SOCKET_ADDRESSES, strict=True):
        words = [as_int(field.value) for field in fields if field.number == address]
        ends.append(End(_address(words), as_int(numbers.get(port, 0))))
    return Connection(*ends)


def _address(words: Sequence[int]) -> Address:
    """Make an address of the 32-bit words that the kernel keeps it in."""
    raw = b"".join(struct.pack("=I", word) for word in words)
    if len(raw) == 4:
        return ipaddress.IPv4Address(raw)
    found = ipaddress.IPv6Address(raw)
    return found.ipv4_mapped or found


def held(wanted: Iterable[Connection]) -> Connection | None:
    """Return one of these connections that a process has open now, None when there is none."""
    live = {
        Connection(_hex_end(own), _hex_end(peer))
        for name in ("tcp", "tcp6")
        for _, own, peer, *rest in map(str.split, texts.read(f"/proc/net/{name}").splitlines()[1:])
        if rest[6] != "0"  # the inode: who is not closed for good has one
    }
    return next((each for each in wanted if each in live), None)


def _hex_end(text: str) -> End:
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return End(_address(words), int(port, 16))


# -- the table


def table(run_id: str) -> str:
    """Return the name that CRIU gives the table of a dump, cut off as it cuts it off."""
    return f"CRIU-{run_id[:TABLE_NAME_BYTES]}"


def rules(run_id: str, wanted: Iterable[Connection]) -> str:
    """Return the table as CRIU would make it, in the words of nft(8)."""
    sets: dict[int, list[str]] = {4: [], 6: []}
    for own, peer in wanted:
        for one, other in ((own, peer), (peer, own)):
            sets[one.address.version].append(
                f"{one.address} . {one.port} . {other.address} . {other.port}"
            )
    lines = [f"table inet {table(run_id)} {{"]
    for version in sets:
        kind = f"ipv{version}_addr . inet_service . ipv{version}_addr . inet_service"
        elements = ", ".join(dict.fromkeys(sets[version]))
        filled = f"elements = {{ {elements} }}; " if elements else ""
        lines.append(f"  set conns{version} {{ type {kind}; {filled}}}")
    for hook in ("output", "input"):
        lines.append(f"  chain {hook} {{ type filter hook {hook} priority 0;")
        lines.append(f"    meta mark {CRIU_MARK:#x} accept")
        for version, family in ((4, "ip"), (6, "ip6")):
            packet = f"{family} saddr . tcp sport . {family} daddr . tcp dport"
            lines.append(f"    {packet} @conns{version} drop")
        lines.append("  }")
    return "\n".join((*lines, "}", ""))


# Restore with the table in place: $1 is its name, $2 the file with its rules. What was made here is
# removed here when the restore fails; a table that the dump left stays for another try. Without nft
# it is tried without.
LOCKED = """
table=$1 made=$2.made
nft list table inet "$table" >/dev/null 2>&1 || { nft -f "$2" && : >"$made"; }
shift 2
"$@"
code=$?
[ $code = 0 ] || [ ! -e "$made" ] || nft delete table inet "$table"
rm -f "$made"
exit $code
"""


def under_lock(run_id: str, rules_file: Path, command: Iterable[str]) -> tuple[str, ...]:
    """Return the command that restores with the packets of its connections held."""
    return ("/bin/sh", "-c", LOCKED, "sh", table(run_id), str(rules_file), *command)


async def undo_lock(run_id: str, rules_file: Path) -> None:
    """Remove the table that an `under_lock` made which was ended half-way."""
    made = Path(f"{rules_file}.made")
    if made.exists():
        await unlock(run_id)
        made.unlink(missing_ok=True)


async def unlock(run_id: str) -> bool:
    """Remove the firewall table by which the dump `run_id` holds its connections, if there is one.

    An image made with tcp=keep that ended its tree keeps it until it is restored, which removes it.
    """
    try:
        done = await trio.run_process(
            ["nft", "delete", "table", "inet", table(run_id)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


# -- mute sockets


PIDFD_GETFD = 438  # syscall number, the same on all but alpha
TCP_REPAIR, REPAIR_OFF = 19, 0


def end_repair(pid: int) -> None:
    """Let the TCP sockets of a task talk again that CRIU had made mute (TCP_REPAIR)."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        for fd, target in facts.descriptors(pid):
            if not target.startswith(b"socket:"):
                continue
            copy = libc.syscall(PIDFD_GETFD, handle, fd, 0)
            if copy < 0 or not stat_modes.S_ISSOCK(os.fstat(copy).st_mode):
                continue
            with socket.socket(fileno=copy) as found, contextlib.suppress(OSError):
                if found.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                    found.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
                    # the kernel clears it here; without, its port stays taken when it is closed
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    finally:
        os.close(handle)
