"""What a mount may ask for: each request checked against the caller and answered.

Verbs become jobs; everything about images that is not a verb (apps, labels, imports, removal,
reading) is done here at once.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import BinaryIO

import trio
import zstandard
from msgspec.structs import replace

from krgfs import policy, verbs, wire
from krgfs.errors import (
    BadWords,
    Busy,
    Damaged,
    Exists,
    Gone,
    KrgError,
    NotYours,
    Withdrawn,
)
from krgfs.model import App, Caller, Image, Import, Tree
from krgfs.verbs import (
    VERSION,
    Cancel,
    Checkpoint,
    Command,
    Diff,
    Freeze,
    Restart,
    Signal,
    Sweep,
    Verify,
)

from . import names, procs
from .jobs import Running
from .manifest import Manifest
from .ops import checkpoint, freeze, restart, store
from .parts import Parts
from .procs import ProcessTree
from .state import refusal_line

log = logging.getLogger(__name__)
CUT_OFF = b"(the rest of this log cannot be read: its file is cut off or damaged)\n"


class Desk:
    """Answers requests of one kind of caller or another; knows no connection."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._state = parts.state
        self._closing: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    async def answer(self, request: wire.Request) -> wire.Message:
        """Return the one answer to a request; refusals and failures are answers too."""
        try:
            return await self._do(request)
        except KrgError as exc:
            if isinstance(request, wire.Submit):
                self._state.add_log(refusal_line(request, self._state.node.name, exc))
            return wire.failure(request.id, exc)
        except Exception as exc:
            log.exception("request.crashed kind=%s", type(request).__name__)
            text = f"{type(exc).__name__}: {exc}; the agent's log has more"
            return wire.Failed(id=request.id, errno=KrgError.errno, message=text)

    async def _do(self, request: wire.Request) -> wire.Message:
        match request:
            case wire.Submit():
                return await self._submit(request)
            case wire.Interrupt(job=number, caller=caller, fatal=fatal):
                await self._parts.jobs.interrupted(number, caller, fatal)
            case wire.Closed(job=number):
                await self.closed(number)
            case wire.JobLog(job=number, caller=caller):
                return wire.Data(id=request.id, data=await self._job_log(number, caller))
            case wire.ListFiles(app=app, name=name):
                self._version(request.caller, app, name)
                return wire.Files(id=request.id, files=await self._parts.images.files(app, name))
            case wire.ReadFile():
                self._version(request.caller, request.app, request.name)
                data = await self._parts.images.read(
                    request.app, request.name, request.file, request.offset, request.size
                )
                return wire.Data(id=request.id, data=data)
            case _:
                await self._change(request)
        return wire.Done(id=request.id)

    # -- verbs

    async def _submit(self, request: wire.Submit) -> wire.Accepted:
        command = verbs.parse(request.verb, request.text)
        caller = request.caller
        if isinstance(command, Cancel):
            number = _number(request.object)
            job = self._parts.jobs.mine(number, caller)
            job.cancel(f"uid {caller.uid} wrote to its cancel", Withdrawn)
            return wire.Accepted(id=request.id, job=number, member=True)
        if isinstance(command, Restart):
            job = await self._restart(request, command)
            return wire.Accepted(id=request.id, job=job.id)
        if isinstance(command, Verify | Sweep | Diff):
            job = await self._on_store(request, command)
            return wire.Accepted(id=request.id, job=job.id)
        tree = procs.look(_number(request.object), request.start)
        procs.may(caller, tree)
        is_member = procs.is_member(tree, caller.pid)
        joined = await self._joined(request, request.object)
        job = joined or await self._on_tree(request, command, tree)
        return wire.Accepted(id=request.id, job=job.id, member=is_member)

    async def _joined(self, request: wire.Submit, object: str) -> Running | None:
        return await self._parts.jobs.joined(request.caller, request.verb, object, request.text)

    async def _restart(self, request: wire.Submit, command: Restart) -> Running:
        await self._close_copies(request.caller, command.image)
        self._refuse_import(command.image)
        app, image = names.resolve(self._state, command.image)
        _may_use(request.caller, app, image)
        object = f"images/{image.ref}"
        if joined := await self._joined(request, object):
            return joined
        holds: frozenset[int | str] = frozenset({f"app {app.name}", f"image {image.ref}"})
        return await self._parts.jobs.start(
            request.verb,
            object,
            request.text,
            request.caller,
            holds,
            lambda job: restart.restart(self._parts, job, app, image, command),
            uid=image.uid,
        )

    async def _close_copies(self, caller: Caller, ref: verbs.ImageRef) -> None:
        """Finish what was copied in and may be meant; the kernel tells of the last close only after
        cp has ended. What another version lacks is no business of who asks for the latest."""
        if ref.version != "latest":
            await self._close_file(caller, ref.app, ref.version)
            return
        for name in tuple(self._state.imports.get(ref.app, ())):
            try:
                await self._close_file(caller, ref.app, name)
            except KrgError as exc:
                log.warning("import.unfinished image=%s/%s reason=%r", ref.app, name, exc.message)

    async def _on_store(self, request: wire.Submit, command: Command) -> Running:
        operation = self._store_operation(request.caller, command)
        joined = await self._joined(request, request.object)
        if joined and request.caller.owns(joined.job.uid):  # who joins reads its log
            return joined
        return await self._parts.jobs.start(
            request.verb, request.object, request.text, request.caller, frozenset(), operation
        )

    def _store_operation(
        self, caller: Caller, command: Command
    ) -> Callable[[Running], Awaitable[str]]:
        match command:
            case Verify(image=None) | Sweep() if not caller.is_root:
                raise NotYours("only root may do this to the whole store; name images of yours")
            case Verify(image=None):
                return lambda job: store.verify_all(self._parts, job)
            case Verify(image=verbs.ImageRef() as ref):
                wanted = self._images(caller, ref)
                return lambda job: store.verify(self._parts, job, wanted)
            case Sweep():
                return lambda job: store.sweep(self._parts, job)
            case Diff(image=ref, to=to):
                (before,) = self._images(caller, ref)
                (after,) = self._images(caller, to or verbs.ImageRef(ref.app))
                return lambda job: store.diff(self._parts, job, before, after)
            case _:
                raise BadWords(f"{type(command).__name__} is no verb of the store")

    def _images(self, caller: Caller, ref: verbs.ImageRef) -> list[Image]:
        """Return the images of the caller's that a name without or with a version means."""
        if ref.version:
            app, image = names.resolve(self._state, ref)
            self._app(caller, app.name)
            return [image]
        self._app(caller, ref.app)
        versions = self._state.images.get(ref.app, {})
        return [image for _, image in sorted(versions.items())]

    def _refuse_import(self, ref: verbs.ImageRef) -> None:
        imports = self._state.imports.get(ref.app, {})
        if ref.version in imports:
            raise Damaged(
                f"{ref} was copied in and is not whole: a file that its manifest names is missing "
                "or differs; copy it again"
            )
        if f"{ref.version}.part" in imports:
            raise Damaged(
                f"{ref} is still {ref.version}.part; mv it to {ref.version} when it is whole"
            )

    async def _on_tree(self, request: wire.Submit, command: Command, tree: ProcessTree) -> Running:
        holds: frozenset[int | str] = frozenset(tree.pids)
        operation: Callable[[Running], Awaitable[str]]
        beside: Callable[[int], list[Tree]] = _nothing
        match command:
            case Checkpoint():
                # whoever is answered at once may read next: there has to be a line to read
                beside = partial(freeze.begun, self._parts, tree, request.verb)
                app = names.app_for(self._state, tree, command.name)
                holds |= {f"app {app.name}"}
                operation = partial(self._checkpoint, tree=tree, words=command)
            case Freeze(on=True):
                freeze.refuse_member(tree, request.caller.pid)
                operation = partial(self._freeze, tree=tree, words=command)
            case Freeze():
                operation = partial(self._thaw, tree=tree, words=command)
            case Signal():
                holds = frozenset()
                operation = partial(self._signal, tree=tree, words=command)
            case _:
                raise BadWords(f"{request.verb} is no verb of a process")
        return await self._parts.jobs.start(
            request.verb,
            request.object,
            request.text,
            request.caller,
            holds,
            operation,
            uid=tree.credentials[tree.pid].uid,
            beside=beside,
        )

    async def _checkpoint(self, job: Running, tree: ProcessTree, words: Checkpoint) -> str:
        return await checkpoint.checkpoint(self._parts, job, tree, words)

    async def _freeze(self, job: Running, tree: ProcessTree, words: Freeze) -> str:
        return await freeze.freeze(self._parts, job, tree, words)

    async def _thaw(self, job: Running, tree: ProcessTree, words: Freeze) -> str:
        return await freeze.thaw(self._parts, job, tree, words)

    async def _signal(self, job: Running, tree: ProcessTree, words: Signal) -> str:
        return await freeze.signal(self._parts, job, tree, words)

    async def closed(self, number: int) -> None:
        """The handle of a `freeze while-open` was closed: thaw, once the job is through."""
        running = self._parts.jobs.get(number)
        if running is not None:
            await running.over.wait()
        for known in tuple(self._state.trees.values()):
            if known.holder == number:
                await freeze.thaw_record(self._parts, known, "its file was closed")

    async def _job_log(self, number: int, caller: Caller) -> bytes:
        job = self._state.jobs.get(number)
        if job is None:
            raise Gone(f"there is no jobs/{number}")
        if not caller.owns(job.uid):
            raise NotYours(f"jobs/{number} belongs to uid {job.uid}")
        running = self._parts.jobs.get(number)
        said = running.said.encode() if running else await _kept_words(self._parts.job_log(number))
        return f"{job.message}\n".encode() * bool(job.message) + said

    # -- images

    async def _change(self, request: wire.Request) -> None:
        caller = request.caller
        match request:
            case wire.MakeApp(app=name):
                await self._make_app(caller, name)
            case wire.RemoveApp(app=name):
                await self._remove_app(self._app(caller, name))
            case wire.BeginImport(app=app, name=name):
                await self._begin_import(caller, app, name)
            case wire.WriteFile(app=app, name=name, file=file, offset=offset, data=data):
                self._import(caller, app, name)
                await self._parts.images.imports.write_file(app, name, file, offset, data)
            case wire.TruncateFile(app=app, name=name, file=file, size=size):
                self._import(caller, app, name)
                await self._parts.images.imports.truncate_file(app, name, file, size)
            case wire.RemoveFile(app=app, name=name, file=file):
                self._import(caller, app, name)
                await self._parts.images.imports.remove_file(app, name, file)
            case wire.CloseFile(app=app, name=name):
                await self._close_file(caller, app, name)
            case wire.CommitImport(app=app, name=name, to=to):
                found = self._import(caller, app, name)
                await self._finish_import(found, to)
            case wire.RemoveVersion(app=app, name=name):
                await self._remove_version(caller, app, name)
            case wire.SetLabel(app=app, label=label, version=version):
                await self._set_label(self._app(caller, app), label, version)
            case wire.SetPolicy(app=app, text=text):
                await self._set_policy(self._app(caller, app), policy.parse(text))
            case wire.RemoveLabel(app=app, label=label):
                await self._remove_label(self._app(caller, app), label)
            case _:
                raise BadWords(f"{type(request).__name__} is no request")

    def _known(self, name: str) -> App:
        app = self._state.apps.get(name)
        if app is None:
            raise Gone(f"there is no app {name}")
        return app

    def _app(self, caller: Caller, name: str) -> App:
        app = self._known(name)
        if not caller.owns(app.uid):
            raise NotYours(f"{name} belongs to uid {app.uid}")
        return app

    def _version(self, caller: Caller, app: str, name: str) -> Image | Import:
        self._app(caller, app)
        match = VERSION.match(name)
        image = self._state.images.get(app, {}).get(int(match[1])) if match else None
        found = image or self._state.imports.get(app, {}).get(name)
        if found is None:
            raise Gone(f"there is no {app}/{name}")
        return found

    def _import(self, caller: Caller, app: str, name: str) -> Import:
        found = self._version(caller, app, name)
        if isinstance(found, Image):
            raise NotYours(f"{app}/{name} is committed: an image is never changed")
        return found

    async def _make_app(self, caller: Caller, name: str) -> None:
        _checked(verbs.app_name, name)
        if name in self._state.apps:
            raise Exists(f"there is an app {name} already")
        await self._state.commit(App(name=name, uid=caller.uid, gid=caller.gid))

    async def _remove_app(self, app: App) -> None:
        def unless_used() -> tuple[()]:
            self._known(app.name)
            self._parts.jobs.refuse_if_held(frozenset({f"app {app.name}"}))
            if self._state.images.get(app.name) or self._state.imports.get(app.name):
                raise Busy(f"{app.name} has images; remove them first (rm -r)")
            return ()

        await self._state.update(unless_used, delete=[app])
        await self._parts.images.remove_app(app.name)

    async def _begin_import(self, caller: Caller, app: str, name: str) -> None:
        known = self._app(caller, app)
        number = name.removesuffix(".part")
        if not VERSION.match(number):
            raise BadWords(f"{name!r} is not a version: copy into v1, v2 ... or v1.part")
        begun = Import(app=app, name=name, uid=known.uid, gid=known.gid, created=time.time())

        def unless_taken() -> tuple[Import]:
            self._known(app)
            for taken in (name, number, f"{number}.part"):
                if taken in self._state.imports.get(app, {}) or self._committed(app, taken):
                    raise Exists(f"{app} has a {taken} already; copy to another version")
            return (begun,)

        unless_taken()
        await self._parts.images.imports.begin(app, name, known.uid, known.gid)
        try:
            await self._state.update(unless_taken)
        except BaseException:
            await self._discard(begun)
            raise

    async def _discard(self, found: Import) -> None:
        """Delete what was copied into an import that has no record; if that fails, the next start
        does it."""
        try:
            with trio.CancelScope(shield=True):
                await self._parts.images.imports.remove(found.app, found.name)
        except KrgError as exc:
            log.warning(
                "import.not_removed image=%s/%s reason=%r", found.app, found.name, exc.message
            )

    def _committed(self, app: str, name: str) -> bool:
        match = VERSION.match(name)
        return bool(match) and int(match[1]) in self._state.images.get(app, {})  # type: ignore[index]

    async def _close_file(self, caller: Caller, app: str, name: str) -> None:
        """A copy made earlier is complete when all that its manifest names is there and matches."""
        async with self._closing[app]:
            found = self._state.imports.get(app, {}).get(name)
            if found is None or name.endswith(".part"):
                return
            self._import(caller, app, name)
            if (manifest := await self._parts.images.imports.whole(app, name)) is not None:
                await self._finish_import(found, name, manifest)

    async def _finish_import(
        self, found: Import, to: str, manifest: Manifest | None = None
    ) -> None:
        number = int(to[1:])
        if number in self._state.images.get(found.app, {}):
            raise Exists(f"{found.app} has a v{number} already")
        images = self._parts.images
        await self._parts.upkeep.make_room(f"cannot import {found.app}/{found.name}")
        image = names.image_of(
            await images.finish_import(found.app, found.name, number, manifest), own=False
        )
        with trio.CancelScope(shield=True):
            await self._commit_import(found, image)
            await self._discard(found)
        self._parts.upkeep.look(image.app)
        self._state.event("image.imported", image.uid, image=image.ref)

    async def _commit_import(self, found: Import, image: Image) -> None:
        """Write the record of an image that was made of an import, or remove that image."""

        def records() -> tuple[Image, App]:
            app = self._known(found.app)
            return (*self._unless_ended(found), image, names.with_version(app, image.version))

        try:
            await self._state.update(records, delete=[found])
        except BaseException:
            await self._parts.images.imports.reopen(found.app, found.name)
            await self._parts.images.remove(image.app, image.version)
            raise

    def _unless_ended(self, found: Import) -> tuple[()]:
        if self._state.imports.get(found.app, {}).get(found.name) != found:
            raise Gone(f"there is no import {found.app}/{found.name} any more: it has ended")
        return ()

    async def _remove_version(self, caller: Caller, app: str, name: str) -> None:
        found = self._version(caller, app, name)
        if isinstance(found, Import):
            await self._state.update(partial(self._unless_ended, found), delete=[found])
            await self._discard(found)
            return
        await self._parts.retention.remove(found)
        self._parts.upkeep.sweep_soon()
        self._state.event("image.removed", found.uid, image=found.ref)

    async def _set_label(self, app: App, label: str, version: str) -> None:
        _checked(verbs.label_name, label)

        def changed() -> tuple[App]:
            known = self._known(app.name)
            if not self._committed(app.name, version):
                raise Gone(
                    f"{app.name} has no {version!r}; a label points at a version: ln -s v3 NAME"
                )
            if label in known.labels:
                raise Exists(f"{app.name} has a label {label} already; rm it first")
            return (replace(known, labels={**known.labels, label: int(version[1:])}),)

        await self._state.update(changed)

    async def _remove_label(self, app: App, label: str) -> None:
        def changed() -> tuple[App]:
            known = self._known(app.name)
            labels = {name: number for name, number in known.labels.items() if name != label}
            return (replace(known, labels=labels),)

        await self._state.update(changed)

    async def _set_policy(self, app: App, fields: dict[str, int]) -> None:
        def changed() -> tuple[App]:
            known = self._known(app.name)
            return (replace(known, policy={**known.policy, **fields}),)

        await self._state.update(changed)
        self._parts.upkeep.look(app.name)


def _nothing(number: int) -> list[Tree]:
    return []


def _may_use(caller: Caller, app: App, image: Image) -> None:
    if not caller.owns(image.uid):
        raise NotYours(f"{image.ref} belongs to uid {image.uid}")
    if not image.own and not caller.is_root:
        raise NotYours(
            f"{image.ref} was not made by this agent: only root may restart it, because restoring "
            "gives back the uids and capabilities that it names"
        )
    if image.damaged:
        raise Damaged(f"{image.ref} is damaged: {image.damaged}; take another version")


def _checked(check: Callable[[str], str], text: str) -> None:
    try:
        check(text)
    except ValueError as exc:
        raise BadWords(str(exc)) from exc


def _number(object: str) -> int:
    """Return the pid or job number that an object's path ends in."""
    last = object.rpartition("/")[2]
    if not last.isdecimal():
        raise BadWords(f"{object!r} is neither a process nor a job")
    return int(last)


async def _kept_words(path: str) -> bytes:
    def read() -> bytes:
        try:
            with open(path, "rb") as file:
                return _unpacked(file)
        except FileNotFoundError:
            return b""

    return await trio.to_thread.run_sync(read)


def _unpacked(file: BinaryIO) -> bytes:
    """Return what can be read of compressed words, and say so when that is not all of them."""
    stream, words = zstandard.ZstdDecompressor().decompressobj(), b""
    with contextlib.suppress(zstandard.ZstdError):
        while not stream.eof and (data := file.read(4096)):
            words += stream.decompress(data)
    return words if stream.eof else words + CUT_OFF
