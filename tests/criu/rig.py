"""A rig for the engine: directories to dump into, and an end for all that it restored.

Also what the rigged processes run, and how to wait for them and end them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import trio

from agent import criu, criu_run, keepers, outside, procs, stream
from agent.buffers import Buffers, Piece
from agent.criu import DumpReport, Engine
from agent.keepers import Launched, Plan
from agent.manifest import End, Manifest, Task
from agent.procs import ProcessTree
from krgfs import facts
from krgfs.errors import NoRoom
from krgfs.model import Caller, Frozen
from krgfs.verbs import Checkpoint, ImageRef, Restart
from tests.workloads import harness

LONG_S = 60.0
USER = 12345  # a uid that needs no account
ROOT = Caller(uid=0, gid=0, pid=os.getpid())

READY = "open(sys.argv[1], 'w').close()\n"
COUNT = (
    READY + "n = 0\nwhile True:\n    n += 1\n    os.write(1, b'%d\\n' % n)\n    time.sleep(0.01)\n"
)
SLEEP = READY + "while True:\n    time.sleep(0.05)\n"


class Files:
    """An intake that keeps every file of a dump as CRIU itself would have written it."""

    def __init__(self, directory: Path, buffers: Buffers) -> None:
        self.buffers = buffers
        self._directory = directory

    def take(self, piece: Piece) -> None:
        try:
            with open(self._directory / piece.file, "ab") as file:
                file.write(piece.data)
        except OSError as exc:
            raise NoRoom(f"{piece.file}: {exc.strerror}") from exc
        piece.give_back()

    def unload(self, directory: Path, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            (directory / name).touch()
            assert (directory / name).stat().st_size == size, name


class Directory:
    """A source that serves the files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def pieces(self, file: str) -> Iterator[Piece] | None:
        path = self._directory / file
        return self._read(path) if path.exists() else None

    def _read(self, path: Path) -> Iterator[Piece]:
        offset = 0
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                yield Piece(path.name, offset, data)
                offset += len(data)

    @property
    def sizes(self) -> dict[str, int]:
        return {each.name: each.stat().st_size for each in self._directory.iterdir()}


class Rig:
    """An engine with directories to work in; what it brought to life ends with it."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine = engine
        self.path = path
        self.log = f"{path}.log.zst"
        self.began: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.all_said: list[str] = []
        self._launched: list[Launched] = []
        self._count = 0
        self._buffers = Buffers(16)
        (path / "keepers").mkdir(parents=True)

    def spool(self) -> Path:
        self._count += 1
        images = self.path / f"v{self._count}"
        images.mkdir(mode=0o700)
        return images

    def intake(self, images: Path) -> Files:
        return Files(images, self._buffers)

    async def started(self, pid: int, start: int) -> None:
        self.began.append((pid, start))

    async def dump(
        self,
        pid: int,
        words: Checkpoint | None = None,
        frozen: Frozen | None = None,
        commit: Callable[[DumpReport], Awaitable[None]] | None = None,
    ) -> tuple[Manifest, Path, DumpReport]:
        words = words or Checkpoint()
        tree = procs.look(pid)
        ends = outside.ends(tree)
        images = self.spool()
        options = criu.dump_options(self.engine, tree, images, words, ends, frozen)
        try:
            with trio.fail_after(LONG_S):
                report = await criu.dump(
                    self.engine,
                    tree,
                    images,
                    self.intake(images),
                    options,
                    self.started,
                    self.done.append,
                    commit,
                )
        finally:
            assert self._buffers.free == self._buffers.count
            self.said = await criu.kept_words(images, self.log)
            self.all_said.append(self.said)
        return self.manifest(tree, ends), images, report

    def manifest(self, tree: ProcessTree, ends: list[outside.End]) -> Manifest:
        ids = tree.credentials[tree.pid]
        task = Task(
            pid=tree.inner_root, ppid=0, sid=tree.root.sid, pgrp=0, uid=ids.uid, gid=ids.gid
        )
        return Manifest(
            app="t",
            version=self._count,
            created=time.time(),
            uid=ids.uid,
            gid=ids.gid,
            root=tree.inner_root,
            tree=(task,),
            cwd=os.fsdecode(facts.link(tree.pid, "cwd")),
            ends=tuple(
                End(kind=end.kind, id=end.id, pid=end.pid, fd=end.fd, mode=end.mode) for end in ends
            ),
        )

    async def kill(self, pid: int, workload: harness.Workload | None = None) -> None:
        """End a tree, its root reaped by its keeper or by the launcher of its workload."""
        tree = procs.look(pid)
        procs.kill(tree)
        if workload is not None:
            await trio.to_thread.run_sync(workload.wait_gone, tree.pids)
        with trio.fail_after(LONG_S):
            await procs.gone(tree.ids)

    def plan(
        self, manifest: Manifest, images: Path, directory: str, private: bool, words: str
    ) -> Plan:
        return criu.restore_plan(
            self.engine,
            manifest,
            images,
            Restart(image=ImageRef("t"), cgroup=words),
            ROOT,
            private,
            directory,
            Directory(images).sizes,
        )

    async def launch(self, directory: str, plan: Plan, images: Path) -> Launched:
        """Start what is planned, with the files of a directory for CRIU to ask for."""
        async with stream.serve(images, Directory(images)) as served:
            launched = await keepers.launch(keepers.binary(), directory, plan)
            served.check()
        return launched

    async def restore(
        self, manifest: Manifest, images: Path, private: bool = False, words: str = "own"
    ) -> Launched:
        self._count += 1
        directory = keepers.directory(str(self.path), self._count)
        plan = self.plan(manifest, images, directory, private, words)
        try:
            with trio.fail_after(LONG_S):
                launched = await self.launch(directory, plan, images)
        finally:
            self.said = await criu.kept_words(directory, self.log)
        self.keeper_dir = directory
        self._launched.append(launched)
        return launched

    def tables(self) -> list[str]:
        """Return the firewall tables that are left of the dumps made here."""
        command = ["nft", "list", "tables"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ours = [found[:21] for found in criu_run.RUN_ID.findall("\n".join(self.all_said))]
        return [line for line in done.stdout.splitlines() if any(each in line for each in ours)]

    async def close(self) -> None:
        for launched in self._launched:
            if facts.is_alive(launched.root.pid, launched.root.start):
                procs.kill(procs.look(launched.root.pid))
            with trio.fail_after(LONG_S):
                await procs.ended(launched.keeper)
        keepers.tidy(str(self.path), ())


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(LONG_S):
        while True:
            try:
                if holds():
                    return
            except FileNotFoundError:
                pass
            await trio.sleep(0.001)


async def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with trio.fail_after(LONG_S):
        await trio.to_thread.run_sync(child.wait)
