"""A CRIU at work: started so that nothing that befalls us ends it, and always waited for.

A dumper that is ended half-way may leave its code in the application's memory, its sockets mute and
its packets dropped by a firewall table. So nobody here ends one; and where somebody else did, what
it left is put right as far as that can be done from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from krgfs import facts
from krgfs.model import ProcessId

from . import criu_network, durable, procs, texts
from .procs import ProcessTree
from .stream import Capture, Drained

Started = Callable[[int, int], Awaitable[None]]

SAID = "criu.out"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
LEFTOVER = "/memfd:CRIUMFD"
POLL_S = 0.1
MOMENT_S = 0.2


async def run(
    command: Sequence[str],
    tree: ProcessTree,
    work: Path,
    started: Started,
    watch: Callable[[], Awaitable[None]],
    give_up: Callable[[], None],
    last_word: LastWord | None = None,
) -> int:
    """Let a CRIU do its work on a tree, and return its exit code, as subprocess has it.

    It runs in a session of its own with nothing of ours open, so that it outlives us. Waited for
    even when this is cancelled, which calls `give_up`, so that CRIU fails at its next write, and
    keeps `last_word` from saying yes; cancellation is left to be noticed by the caller. An error of
    `started` is raised once CRIU has ended.
    """
    asked = await last_word.listen() if last_word is not None else None
    process = await _start(command, work)
    trouble: list[BaseException] = []

    async def tell() -> None:
        try:
            await started(process.pid, _start_of(process.pid))
            if last_word is not None and asked is not None:
                await last_word.answer(asked, process.pid)
        except Exception as exc:
            trouble.append(exc)
        finally:
            if asked is not None:
                asked.close()

    code = 0
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            nursery.start_soon(watch)
            code = await _wait_out(process, tree, give_up)
            nursery.cancel_scope.cancel()
    except* trio.Cancelled:
        pass  # what CRIU did counts first; the next checkpoint of the caller raises this
    if trouble:
        raise trouble[0]
    return code


async def _start(command: Sequence[str], work: Path) -> trio.Process:
    with open(work / SAID, "ab") as said:
        return await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            cwd="/",
            env=ENVIRONMENT,
        )


def _start_of(pid: int) -> int:
    task = facts.task(pid)
    return task.start if task is not None else 0


async def _wait_out(process: trio.Process, tree: ProcessTree, give_up: Callable[[], None]) -> int:
    """Wait for the end of an engine, cancelled or not, and until no engine traces the tree:
    `nsenter` may have been ended while the CRIU that it started goes on."""
    try:
        code = await process.wait()
    except trio.Cancelled:
        give_up()
    with trio.CancelScope(shield=True):
        code = await process.wait()
        if code != 0:
            for task in tree.tasks:
                while engine := _engine_on(task.pid):
                    await procs.ended(engine)
    return code


def _engine_on(pid: int) -> ProcessId | None:
    tracer = facts.status(pid).get(b"TracerPid", b"0")
    found = facts.task(int(tracer)) if tracer != b"0" else None
    return procs.process_id(found) if found is not None and found.comm == b"criu" else None


async def watch(captured: Capture, progress: Callable[[int], None]) -> None:
    """Tell how many bytes have come, for as long as it is let."""
    while True:
        await trio.sleep(POLL_S)
        progress(captured.drained_bytes)


# -- the gate: a tree does not run before its memory is read


@contextlib.asynccontextmanager
async def gate(tree: ProcessTree, work: Path) -> AsyncIterator[Drained]:
    """Hold a tree at the end of its dump until it is told that all of it has been read.

    Makes the directory `work`. CRIU's action script waits at a FIFO for our word. Told no, or when
    we have ended, it fails, and with it the dump; the tree then runs.
    """
    fd = await durable.run(f"cannot dump tree {tree.pid}", partial(_make_gate, work))
    try:
        yield lambda whole: _write(fd, b"yes\n" if whole else b"no\n")
    finally:
        os.close(fd)


def _make_gate(work: Path) -> int:
    fifo, script = work / "read", work / "gate"
    os.mkdir(work, 0o700)
    os.mkfifo(fifo, 0o600)
    path = shlex.quote(str(fifo))
    script.write_text(
        '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
        f"exec 3<>{path} 4<{path} 3>&-\n"  # opened only to be read, it would wait for a writer
        'read -r word <&4 && [ "$word" = yes ]\n'
    )
    script.chmod(0o700)
    return os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _write(fd: int, word: bytes) -> None:
    os.write(fd, word)


# -- the last word: whether CRIU may end what it has dumped


class LastWord:
    """Answers CRIU's question, asked when all is dumped and nothing runs yet, whether to go on.

    CRIU's action script connects to a socket of ours and fails unless it is told yes; that makes
    the dump fail and lets the tree run, also when there is nobody to ask.
    """

    def __init__(self, work: Path, commit: Callable[[], Awaitable[object]]) -> None:
        self.failure: Exception | None = None
        self.said_yes = False
        self._commit = commit
        self._address = f"krg-last-word-{os.urandom(8).hex()}"
        self.script = work / "last-word"

    async def listen(self) -> trio.socket.SocketType:
        asked = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await asked.bind(f"\0{self._address}")
        asked.listen(1)
        ask = (
            "import socket,sys\n"
            "s=socket.socket(socket.AF_UNIX)\n"
            "s.connect('\\0'+sys.argv[1])\n"
            "sys.exit(s.recv(1)!=b'1')"
        )
        words = shlex.join([sys.executable, "-I", "-S", "-c", ask, self._address])
        self.script.write_text(
            f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\nexec {words}\n'
        )
        self.script.chmod(0o700)
        return asked

    async def answer(self, asked: trio.socket.SocketType, engine: int) -> None:
        """Commit when an engine's script asks, and tell it whether that is done."""
        while True:
            asker, _ = await asked.accept()
            with asker:
                if _peer(asker) in {task.pid for task in facts.tree(engine)}:
                    await self._tell(asker)
                    return

    async def _tell(self, asker: trio.socket.SocketType) -> None:
        try:
            await self._commit()
            self.said_yes = True
        except Exception as exc:
            self.failure = exc
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                await asker.send(b"1" if self.said_yes else b"0")


def _peer(connection: trio.socket.SocketType) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[0])


# -- what an engine that was ended half-way leaves behind


LAST_LINE = re.compile(r"Dumping (finished successfully|FAILED)")
RUN_ID = re.compile(r"^\([\d.]+\) CRIU run id = ([0-9a-f-]{36})", re.MULTILINE)


async def heal(tree: ProcessTree, log: str) -> list[str]:
    """Put right what a CRIU that was ended half-way left; returns what could not be, in words.

    Takes a moment longer, for the tree to show whether it survives: until its firewall table is
    gone the tasks run already, and what they send fails with EPERM.
    """
    left = []
    run = RUN_ID.search(log)
    if run and await criu_network.unlock(run[1]):
        left.append("what it sent over TCP meanwhile failed")
    for task in tree.live:
        criu_network.end_repair(task.pid)
    if marked := [str(task.pid) for task in tree.live if _has_leftover(task.pid)]:
        left.append(f"about 1 MB of CRIU's own is left in the memory of {', '.join(marked)}")
    await trio.sleep(MOMENT_S)
    return left


def _has_leftover(pid: int) -> bool:
    return LEFTOVER in texts.read(f"/proc/{pid}/maps")


async def out_of(images: str) -> None:
    """Wait until no CRIU, which an agent before us left at work, writes into a directory."""
    while engines := procs.told(images):
        for engine in engines:
            await procs.ended(engine)


def came_to_end(log: str) -> bool:
    """Tell whether a CRIU that dumped has ended by itself, and so left nothing behind."""
    return not log or LAST_LINE.search(log) is not None
