"""CRIU: which one is used, how a tree is dumped, and how its restore is planned.

This room and its neighbours are all that knows CRIU: criu_options (what it is told, and why),
criu_run (a dumper at work is never ended), criu_images (its files), criu_words (its complaints).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import trio
import zstandard

from krgfs import facts
from krgfs.errors import EngineFailed, Exists, Fate, Gone, KrgError
from krgfs.facts import Ids, Task
from krgfs.model import Caller, Frozen
from krgfs.verbs import Checkpoint, ImageRef, Restart, image_ref, signal_name

from . import (
    cgroups,
    criu_images,
    criu_network,
    criu_options,
    criu_run,
    criu_words,
    keepers,
    outside,
    procs,
)
from .buffers import Buffers, Piece
from .criu_options import Option, Substitute
from .criu_run import LastWord, Started
from .keepers import Inherit, LaunchFailed, Owner, Plan
from .manifest import Manifest
from .outside import End
from .procs import ProcessTree
from .stream import capture

OLDEST = (4, 2)
FETCHED = "/usr/local/lib/krgfs/criu/usr/sbin/criu"  # by contrib/fetch-criu
FEATURES = ("mem_dirty_track", "network_lock_nftables", "pagemap_scan", "timens", "uffd-noncoop")
SAID_BYTES = 4 << 20

unlock_network = criu_network.unlock


# -- the engine


class Engine(NamedTuple):
    """A CRIU that can be used: its path, its version ("4.2.1"), what this kernel lets it do."""

    path: str
    version: str
    features: tuple[str, ...] = ()

    @classmethod
    async def find(cls, path: str | None = None, fetched: str = FETCHED) -> Engine:
        """Return the CRIU at `path`, else the one that KRG_CRIU names, else the one on PATH if it
        is recent enough, else the one that contrib/fetch-criu put at `fetched`.

        Raises EngineFailed that says what was found instead and what to do.
        """
        named = path or os.environ.get("KRG_CRIU")
        found = []
        for candidate in (named,) if named else (shutil.which("criu"), fetched):
            version = await _version(candidate) if candidate else None
            if candidate and version and _is_recent(version):
                return cls(candidate, version, await _features(candidate))
            if candidate:
                found.append(f"{candidate} is {version or 'no CRIU that starts here'}")
        raise EngineFailed(
            f"there is no CRIU {'.'.join(map(str, OLDEST))} or newer to use: "
            f"{'; '.join(found) or 'none is installed'}; run contrib/fetch-criu, or name one by "
            "KRG_CRIU"
        )


async def _version(path: str) -> str | None:
    said = await _ask(path, "--version")
    found = re.search(r"^Version: (\d[\w.]*)", said or "", re.MULTILINE)
    return found[1] if found else None


def _is_recent(version: str) -> bool:
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:2])
    return numbers >= OLDEST


async def _features(path: str) -> tuple[str, ...]:
    there = []

    async def check(feature: str) -> None:
        if await _ask(path, "check", "--feature", feature) is not None:
            there.append(feature)

    async with trio.open_nursery() as nursery:
        for feature in FEATURES:
            nursery.start_soon(check, feature)
    return tuple(sorted(there))


async def _ask(path: str, *words: str) -> str | None:
    """Return what a CRIU says, None when it does not start or says no."""
    try:
        done = await trio.run_process(
            [path, *words], capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# -- dump


class DumpReport(NamedTuple):
    """A dump that succeeded. `timings` are milliseconds as CRIU measured them, by name; `seconds`
    is all of it as the caller felt it; `bytes` is the memory that was written."""

    frozen_ms: float
    options: tuple[Option, ...]
    pages: int
    bytes: int
    timings: dict[str, float]
    seconds: float


Commit = Callable[[DumpReport], Awaitable[None]]


def dump_options(
    engine: Engine,
    tree: ProcessTree,
    into: str | Path,
    words: Checkpoint,
    ends: Sequence[End],
    frozen: Frozen | None,
) -> list[Option]:
    """Return what CRIU is told to dump a tree into a directory; see criu_options.

    Raises Unsupported for a tree that it could not dump as any user.
    """
    return criu_options.for_dump(
        tree,
        Path(into),
        work_dir(into),
        words,
        ends,
        frozen,
        has_tcp=words.tcp != "fail" and bool(outside.tcp_connections(tree)),
        as_user=_user_to_be(tree),
    )


def _user_to_be(tree: ProcessTree) -> Ids | None:
    return criu_options.user_to_be(tree, criu_options.may_read_limits())


def work_dir(into: str | Path) -> Path:
    """Return where log and statistics of a dump are, until `kept_words` takes them away."""
    return Path(f"{into}.work")


class Intake(Protocol):
    """What a dump goes into: large files by the sink `take` through `buffers` (see stream), small
    ones come to lie in the directory of the images at `unload`."""

    @property
    def buffers(self) -> Buffers: ...

    def take(self, piece: Piece) -> None: ...

    def unload(self, directory: Path, sizes: Mapping[str, int]) -> None: ...


async def dump(
    engine: Engine,
    tree: ProcessTree,
    into: str | Path,
    intake: Intake,
    options: Sequence[Option],
    started: Started,
    progress: Callable[[int], None],
    commit: Commit | None = None,
) -> DumpReport:
    """Dump a tree into an intake, by way of an empty directory that gets the small files; the tree
    runs on (or stays frozen) unless `options` say that it ends with the dump, see `is_ended_by`.

    `started` is told pid and start time of what works; `progress` how many bytes have come.
    `commit` is awaited when all has come, with the tree still as the dump left it; where the
    dump ends the tree, before that: it then has to be given, and if it raises the tree runs on.

    Nothing ends CRIU: cancelled, it finds nobody to write to, gives up, is waited for, and then
    this is cancelled, the tree running.
    Raises what CRIU's complaint means, as a sentence about the tree, with the tree's fate.
    """
    if is_ended_by(options) and commit is None:
        raise ValueError("a dump that ends its tree needs a commit")
    into, work, begun = Path(into), work_dir(into), time.monotonic()
    command = (*_way_to(tree), engine.path, "dump", *_words(options))
    async with (
        _telling_fate(tree),
        criu_run.gate(tree, work) as drained,
        capture(into, intake.buffers, intake.take, drained) as captured,
    ):

        async def finish() -> DumpReport:
            sizes = await captured.whole(0)
            await trio.to_thread.run_sync(_put_small, intake, into, sizes)
            report = _report(work, options, begun)
            if commit is not None:
                await commit(report)
            return report

        last_word = LastWord(work, finish) if is_ended_by(options) else None
        watch = partial(criu_run.watch, captured, progress)
        code = await criu_run.run(command, tree, work, started, watch, captured.stop, last_word)
        if last_word is not None and last_word.said_yes:
            procs.kill(tree)  # it is committed: if CRIU has not ended the tree, that is ours to do
            return _report(work, options, begun)
        await trio.lowlevel.checkpoint_if_cancelled()
        if last_word is not None and last_word.failure is not None:
            raise last_word.failure
        if code != 0:
            captured.check()
            raise await _complaint(tree, work, code)
        return await finish()


@contextlib.asynccontextmanager
async def _telling_fate(tree: ProcessTree) -> AsyncIterator[None]:
    try:
        yield
    except KrgError as exc:
        exc.fate = exc.fate or procs.fate(tree)
        raise


def _put_small(intake: Intake, into: Path, sizes: Mapping[str, int]) -> None:
    intake.unload(into, sizes)
    criu_images.mend(into)


async def outlived(into: str | Path, tree: ProcessTree | None) -> None:
    """Wait for a dump that an agent before us left at work; what CRIU did not put right itself,
    because it was ended half-way, is put right then. It is not known what came of the dump."""
    await criu_run.out_of(str(into))
    log = await trio.to_thread.run_sync(_log, work_dir(into))
    if tree is not None and not criu_run.came_to_end(log):
        await criu_run.heal(tree, log)


def is_ended_by(options: Iterable[Option]) -> bool:
    """Tell whether a dump with these options ends its tree."""
    return not any("--leave-running" in option.words for option in options)


def _words(options: Iterable[Option]) -> list[str]:
    return [word for option in options for word in option.words]


def _way_to(tree: ProcessTree) -> list[str]:
    """Return the words before CRIU's own: into the tree's namespaces, as its user where needed."""
    words: list[str] = []
    if namespaces := criu_options.namespaces_to_enter(tree):
        words += ["nsenter", f"--target={tree.pid}", *namespaces, "--"]
    if (user := _user_to_be(tree)) is not None:
        words += [keepers.binary(), "as", f"--uid={user.uid}", f"--gid={user.gid}"]
        if user.groups:
            words.append("--groups=" + ",".join(map(str, user.groups)))
        words.append("--")
    return words


def _report(work: Path, options: Sequence[Option], begun: float) -> DumpReport:
    """Return what CRIU measured; before its end there is only its log to go by."""
    if (work / "stats-dump").exists():
        stats = criu_images.dump_stats(work)
    else:
        frozen_ms = criu_words.frozen_ms_so_far(_read(work / "dump.log"))
        stats = criu_images.DumpStats(frozen_ms=frozen_ms)
    return DumpReport(
        frozen_ms=stats.frozen_ms,
        options=tuple(options),
        pages=stats.pages_written,
        bytes=stats.pages_written * criu_images.PAGE_BYTES,
        timings={
            "freezing_ms": stats.freezing_ms,
            "frozen_ms": stats.frozen_ms,
            "memdump_ms": stats.memdump_ms,
            "memwrite_ms": stats.memwrite_ms,
        },
        seconds=time.monotonic() - begun,
    )


async def _complaint(tree: ProcessTree, work: Path, code: int) -> KrgError:
    """Put right what CRIU left where it did not end by itself, and say what became of the tree."""
    log = await trio.to_thread.run_sync(_log, work)
    kind: type[KrgError] = EngineFailed
    left: list[str] = []
    if code < 0:
        with trio.CancelScope(shield=True):
            left = await criu_run.heal(tree, log)
        sentence = f"CRIU was ended by signal {signal_name(-code)} in the middle; try again"
    else:
        inner = {ids.ns_pids[-1]: pid for pid, ids in tree.credentials.items() if ids.ns_pids}
        kind, sentence, _ = criu_words.explain(log, inner)
    fate = procs.fate(tree)
    if fate is Fate.GONE:
        kind, why = Gone, sentence.partition(";")[0]
        sentence = f"it has ended in the middle, and there is no image of it ({why})"
    message = "; ".join((f"cannot dump tree {tree.pid}: {sentence}", *left))
    return kind(message, fate=fate)


# -- restore


def restore_plan(
    engine: Engine,
    manifest: Manifest,
    images: str | Path,
    words: Restart,
    caller: Caller,
    private: bool,
    directory: str,
    sizes: Mapping[str, int],
) -> Plan:
    """Return what a keeper with this directory is to start, so that an image lives again.

    `images` has its small files, and is where CRIU asks for all of them (stream.serve); `sizes`
    are those of all. With `private` the tree gets pids and mounts of its own. What the image needs
    and is not whole raises Damaged; a cgroup that is not there BadWords or Gone; a TCP connection
    that somebody has Exists.
    """
    images, keeper_dir = Path(images), Path(directory)
    criu_images.check_pages(images, sizes)
    shape, dumped = criu_images.shape(images), criu_images.dumped(images)
    terminal = dumped.has_outer_terminal
    replaced = criu_options.substitutes(images, manifest.ends)
    owner = _owner(manifest, shape.root)
    out = ""
    if terminal or any(each.mode == "a" for each in replaced):
        out, owner = _output(manifest, owner, keeper_dir)
    pidfile = keeper_dir / "pid"
    lazy = words.lazy == "yes"
    options = criu_options.for_restore(images, keeper_dir, pidfile, replaced, lazy=lazy)
    command: tuple[str, ...] = (engine.path, "restore", *_words(options))
    files: dict[str, str] = {}
    undo: Callable[[], Awaitable[None]] | None = None
    if connections := criu_network.connections(images):
        if busy := criu_network.held(connections):
            raise Exists(
                f"cannot restart {manifest.ref}: its TCP connection from {busy} is open in another "
                "process (ss -tnp shows by which); end that one first"
            )
        rules = keeper_dir / "rules"
        files[rules.name] = criu_network.rules(dumped.run_id, connections)
        command = criu_network.under_lock(dumped.run_id, rules, command)
        undo = partial(criu_network.undo_lock, dumped.run_id, rules)
    return Plan(
        command=command,
        files=files,
        pidfile=str(pidfile),
        new_pid=private,
        cgroups=_cgroups(words, manifest, caller, keeper_dir.name),
        out=out if terminal else "",
        pty=terminal,
        inherit=tuple(_inherit(each, out) for each in replaced),
        owner=owner,
        log=str(keeper_dir / criu_run.SAID),
        note=manifest.ref,
        explain=partial(_restore_complaint, manifest.ref, keeper_dir),
        undo=undo,
    )


def _inherit(each: Substitute, out: str) -> Inherit:
    return Inherit(each.fd, out if each.mode == "a" else os.devnull, each.mode)


def _cgroups(words: Restart, manifest: Manifest, caller: Caller, name: str) -> tuple[str, ...]:
    hierarchies = cgroups.hierarchies()
    match words.cgroup:
        case "own":
            return keepers.own_cgroups(manifest.app, name, hierarchies)
        case "caller":
            return keepers.cgroups_of(caller.pid, hierarchies)
        case path:
            return keepers.cgroups_at(path, hierarchies)


def _owner(manifest: Manifest, root: int) -> Owner:
    """Return whose the tree is: files are opened in its stead as that user."""
    for task in manifest.tree:
        if task.pid == root and task.uid >= 0:
            return Owner(task.uid, task.gid)
    return Owner(manifest.uid, manifest.gid)


def _output(manifest: Manifest, owner: Owner, fallback: Path) -> tuple[str, Owner]:
    """Return the file for the output of a tree that had its reader elsewhere, and who opens it.

    krg-APP.out in its working directory; where its user may not write there, in their home; else in
    a directory of ours.
    """
    name = f"krg-{manifest.app}.out"
    try:
        home = pwd.getpwuid(owner.uid).pw_dir
    except KeyError:
        home = ""
    for place in (manifest.cwd, home):
        if place.startswith("/") and _can_append(owner, os.path.join(place, name)):
            return os.path.join(place, name), owner
    return str(fallback / name), Owner(os.geteuid(), os.getegid())


def _can_append(owner: Owner, path: str) -> bool:
    """Tell whether a user can append to a file, by doing so: it exists afterwards.

    As that user and without blocking, so that neither a link nor a FIFO of that name fools us.
    """
    user = (f"--uid={owner.uid}", f"--gid={owner.gid}", "--drop-caps")
    append = ("dd", "if=/dev/null", f"of={path}", "oflag=append,nonblock", "conv=notrunc")
    done = subprocess.run([keepers.binary(), "as", *user, "--", *append], capture_output=True)
    return done.returncode == 0


def _restore_complaint(ref: str, directory: Path, failed: LaunchFailed) -> KrgError:
    """Say why a restore failed; nothing of it runs."""
    if not failed.end:
        return EngineFailed(f"cannot restart {ref}: {failed.message}")
    if failed.end.startswith("signal") and not failed.end.endswith("SEGV"):
        return EngineFailed(f"cannot restart {ref}: CRIU was ended by {failed.end}; try again")
    kind, sentence, _ = criu_words.explain(_log(directory))
    return kind(f"cannot restart {ref}: {sentence}")


def image_of_keeper(directory: str) -> ImageRef:
    """Return the image that the tree of a keeper's directory was restored from."""
    return image_ref(keepers.status(directory).note)


def ids_in(images: str) -> frozenset[int]:
    """Return every pid, tid, session and group that an image takes; see criu_images.shape."""
    return criu_images.shape(Path(images)).ids


def clashes(wanted: Collection[int]) -> list[tuple[int, Task]]:
    """Return which of these pids and tids are taken, and by what: zombies, which go away once
    their parent reaps them, and others."""
    found = ((pid, facts.task(pid)) for pid in sorted(wanted))
    return [(pid, task) for pid, task in found if task is not None]


# -- what CRIU said


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _log(directory: Path) -> str:
    """Return all that CRIU said: its log, and before it what it said while it had none."""
    names = (criu_run.SAID, "dump.log", "restore.log")
    return "".join(_read(directory / name) for name in names)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


async def kept_words(directory: str | Path, path: str) -> str:
    """Take what CRIU said in a dump or restore out of its directories, and keep it at `path`.

    Compressed by zstd, what matters first, at most 4 MiB of it. Returns the same text.
    """

    def keep() -> str:
        work = work_dir(directory)
        log = _log(work if work.exists() else Path(directory))
        text = "\n".join((*criu_words.lines_that_matter(log), ""))[:SAID_BYTES]
        # a full disk is a reason why these words are asked for, and shall not hide them
        with contextlib.suppress(OSError), open(path, "wb", opener=_private) as file:
            file.write(zstandard.compress(text.encode(errors="replace")))
        shutil.rmtree(work, ignore_errors=True)
        return text

    return await trio.to_thread.run_sync(keep)
