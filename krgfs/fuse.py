"""The pyfuse3 adapter: turns requests of the kernel into look-ups of the table and agent calls.

Nothing is decided here. Any unexpected exception of a handler becomes EIO and a line in the log,
never the end of the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import FileHandleT, InodeT

from . import facts, tree, wire
from .attributes import XATTR, Attributes, xattrs
from .blocked import Blocked
from .client import Client
from .edits import Edits
from .errors import Gone, KrgError, NotYours
from .handles import Handles, ended
from .inodes import Inodes
from .model import Caller, View
from .places import Kind, Place, Sight, is_import

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def guarded(handler: F) -> F:
    """Answer the kernel with the errno of what went wrong."""

    @functools.wraps(handler)
    async def answer(*args: Any) -> Any:
        try:
            return await handler(*args)
        except pyfuse3.FUSEError:
            raise
        except KrgError as exc:
            raise pyfuse3.FUSEError(exc.errno) from exc
        except Exception:
            log.exception("handler.failed handler=%s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer  # type: ignore[return-value]


def unanswered(handler: F) -> F:
    """Keep what goes wrong where nobody waits for an answer: it is logged, and the mount lives."""

    @functools.wraps(handler)
    async def run(*args: Any) -> None:
        try:
            await handler(*args)
        except Exception:
            log.exception("handler.failed handler=%s", handler.__name__)

    return run  # type: ignore[return-value]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class Mount(pyfuse3.Operations):
    """One mount: `serve` runs it until it is unmounted or cancelled."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, socket: str, hide_pids: bool) -> None:
        super().__init__()
        self.inodes = Inodes()
        self.blocked = Blocked()
        self.client = Client(
            socket,
            on_change=self._changed,
            release=self._release,
            resume=self._resume,
            holding=lambda: [handle.job for handle in self.handles if handle.job],
        )
        self.handles = Handles(self.client, self.blocked, self._sight)
        self.attributes = Attributes(hide_pids)
        self.edits = Edits(self.client)
        self._listings: dict[int, tuple[list[tuple[str, Place]], Caller]] = {}
        self._next_listing = 0
        self._dumps: dict[int, tuple[list[int], list[Place]]] = {}
        self._polls: dict[int, pyfuse3.PollHandle] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(self) -> None:
        """Talk to the agent and answer the kernel."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.client.run)
            nursery.start_soon(self.blocked.watch)
            await pyfuse3.main(min_tasks=4, max_tasks=4000)
            nursery.cancel_scope.cancel()

    # -- who asks, and what it sees

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        found = facts.ids(ctx.pid) if ctx.pid else None
        if found is None:
            return Caller(uid=ctx.uid, gid=ctx.gid, pid=ctx.pid, tid=ctx.pid)
        task = facts.task(found.tgid)
        return Caller(
            uid=ctx.uid,
            gid=ctx.gid,
            groups=found.groups,
            pid=found.tgid,
            tid=ctx.pid,
            start=task.start if task else 0,
            foreign_pid_ns=len(found.ns_pids) > 1,
        )

    def _reader(self, ctx: pyfuse3.RequestContext) -> Caller:
        """Return as much of the caller as reading needs, which is what the request itself says."""
        return Caller(uid=ctx.uid, gid=ctx.gid, pid=ctx.pid, tid=ctx.pid)

    def _sight(self, caller: Caller) -> Sight:
        return Sight(self.client.view, caller.uid, caller.pid, self.client.listings)

    def _look(self, ctx: pyfuse3.RequestContext) -> Sight:
        return Sight(self.client.view, ctx.uid, ctx.pid, self.client.listings)

    async def _know(self, place: Place, ctx: pyfuse3.RequestContext) -> None:
        """Have the listing of a version at hand before its names are looked up."""
        if place.row.path == "images/APP/VERSION" and place.args not in self.client.listings:
            with suppress(Gone, NotYours):  # an empty directory would be taken for an empty image
                await self.client.files(self._caller(ctx), *place.args)

    # -- names

    @guarded
    async def lookup(
        self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        place = await self._find(parent, name, ctx)
        return self.attributes.of(place, self.inodes.looked_up(place), self._look(ctx))

    def _current(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Place:
        """Return the place of an inode. ESTALE has the kernel look the path up again, where it
        remembers a process whose pid another one has by now."""
        place = self.inodes.place(inode)
        if tree.is_replaced(self._look(ctx), place):
            raise pyfuse3.FUSEError(errno.ESTALE)
        return place

    async def _find(self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> Place:
        directory = self._current(parent, ctx)
        await self._know(directory, ctx)
        place = tree.find(self._look(ctx), directory, name.decode("utf-8", "surrogateescape"))
        if place is None or self.edits.is_hidden(place):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return place

    @unanswered
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            if self.inodes.forget(inode, lookups):
                self.attributes.forget(inode)

    @guarded
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        place = self._current(inode, ctx)
        sight = self._look(ctx)
        if not tree.is_there(sight, place):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes.of(place, inode, sight)

    @guarded
    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> bytes:
        place = self._current(inode, ctx)
        assert place.row.render is not None
        if place.row.path == "self":
            return place.row.render(self._sight(self._caller(ctx)), place)
        return place.row.render(self._look(ctx), place)

    # -- directories

    @guarded
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> int:
        place = self._current(inode, ctx)
        await self._know(place, ctx)
        sight = self._look(ctx)
        if not tree.is_there(sight, place):
            raise pyfuse3.FUSEError(errno.ENOENT)
        is_hidden = self.edits.is_hidden
        found = [item for item in tree.entries(sight, place) if not is_hidden(item[1])]
        self._next_listing += 1
        self._listings[self._next_listing] = found, self._reader(ctx)
        return self._next_listing

    @guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        found, caller = self._listings[fh]
        sight = self._sight(caller)
        listed, attributes_of = self.attributes.listed, self.attributes.of
        for position in range(start_id, len(found)):  # this loop is what ls -l waits for
            name, place = found[position]
            inode = self.inodes.shown(place)
            entry = listed(name, inode) or attributes_of(place, inode, sight)
            raw = name.encode("utf-8", "surrogateescape")
            if not pyfuse3.readdir_reply(token, raw, entry, position + 1):
                self.inodes.drop_unused(inode)
                return
            self.inodes.counted(inode)

    @guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)

    # -- files

    @guarded
    async def open(
        self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        place = self._current(inode, ctx)
        asks_agent = place.row.kind in (Kind.VERB, Kind.KNOB, Kind.DATA)
        caller = self._caller(ctx) if asks_agent else self._reader(ctx)
        number = self.handles.open(inode, place, caller, flags)
        if place.row.kind is Kind.VERB:
            self._pin_for_dumps(inode, place, caller.pid)
        return pyfuse3.FileInfo(fh=number, direct_io=True, keep_cache=False)

    @guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self.handles.read(fh, off, size)

    @guarded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self.handles.write(fh, off, buf)

    async def flush(self, fh: FileHandleT) -> None:
        """Say once that there is no flush: the kernel does not ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    @guarded
    async def release(self, fh: FileHandleT) -> None:
        self._polls.pop(fh, None)
        with suppress(KrgError):
            await self.handles.close(fh)

    @guarded
    async def poll(
        self,
        inode: InodeT,
        fh: FileHandleT,
        handle: pyfuse3.PollHandle | None,
        ctx: pyfuse3.RequestContext,
    ) -> int:
        if handle is not None:
            self._polls[fh] = handle
            place = self.inodes.place(inode)
            if place.row.verb == "wait" and self._nursery is not None:
                self._nursery.start_soon(self._notify_when_ended, place)
        return self.handles.ready(fh)

    @unanswered
    async def _notify_when_ended(self, place: Place) -> None:
        with suppress(KrgError):
            await ended(place.args[-2], place.args[-1])
        self._notify_polls()

    def _notify_polls(self) -> None:
        """Wake the pollers; each asks again with a handle of its own."""
        polls, self._polls = self._polls, {}
        for handle in polls.values():
            with suppress(OSError):
                handle.notify()

    @guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        place = self.inodes.place(inode)
        if fields.update_size and is_import(self._look(ctx), place):
            await self.edits.truncate(place, attr.st_size, self._caller(ctx))
        elif fields.update_size and place.row.kind is Kind.DATA:
            raise pyfuse3.FUSEError(errno.EPERM)
        changes_owner = fields.update_uid or fields.update_gid or fields.update_mode
        if changes_owner and not place.row.path.startswith("images/APP/VERSION"):
            raise pyfuse3.FUSEError(errno.EPERM)
        return self.attributes.of(place, inode, self._look(ctx))

    # -- what may be made and removed

    @guarded
    async def mkdir(
        self, parent: InodeT, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self.inodes.place(parent)
        await self.edits.make_directory(directory, _text(name), self._caller(ctx))
        return await self.lookup(parent, name, ctx)

    @guarded
    async def rmdir(self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        place = await self._find(parent, name, ctx)
        await self.edits.remove_directory(place, self._caller(ctx))
        self.inodes.retire(place)

    @guarded
    async def create(
        self, parent: InodeT, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        directory = self.inodes.place(parent)
        await self.edits.make_file(directory, _text(name), self._caller(ctx))
        attributes = await self.lookup(parent, name, ctx)
        return await self.open(attributes.st_ino, flags, ctx), attributes

    @guarded
    async def unlink(self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        place = await self._find(parent, name, ctx)
        await self.edits.remove_file(place, self._caller(ctx))

    @guarded
    async def symlink(
        self, parent: InodeT, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self.inodes.place(parent)
        await self.edits.make_label(directory, _text(name), _text(target), self._caller(ctx))
        return await self.lookup(parent, name, ctx)

    @guarded
    async def rename(
        self,
        parent_old: InodeT,
        name_old: bytes,
        parent_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old = await self._find(parent_old, name_old, ctx)
        if parent_old != parent_new or flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EPERM)
        await self.edits.commit(old, _text(name_new), self._caller(ctx))

    @guarded
    async def link(self, *args: Any) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    @guarded
    async def mknod(self, *args: Any) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    # -- figures and attributes

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        store = self.client.view.store
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = store.total // 4096
        data.f_bfree = store.free // 4096
        data.f_bavail = store.available // 4096
        data.f_files, data.f_ffree, data.f_favail = store.files, store.files_free, store.files_free
        data.f_namemax = 255
        return data

    @guarded
    async def getxattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if not name.startswith(XATTR):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        found = xattrs(self._look(ctx), self.inodes.place(inode)).get(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return found

    @guarded
    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return list(xattrs(self._look(ctx), self.inodes.place(inode)))

    @guarded
    async def setxattr(
        self, inode: InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        within = is_import(self._look(ctx), self.inodes.place(inode))
        if not within or not name.startswith(XATTR):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    @guarded
    async def removexattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    # -- what the agent tells

    def _changed(self, before: View, after: View, change: wire.Change) -> None:
        if not after.connected:
            self.blocked.resume_all()
        if change.log or change.events or change.trees:
            self._notify_polls()
        for app, version in change.gone_images:
            self._invalidate(("images", app), f"v{version}")
        for app, name in change.gone_imports:
            self._invalidate(("images", app), name)
        for app in change.gone_apps:
            self._invalidate(("images",), app)
        for job in change.gone_jobs:
            self._invalidate(("jobs",), str(job))

    def _invalidate(self, directory: tuple[str, ...], name: str) -> None:
        place = tree.ROOT
        for part in directory:
            found = tree.find(Sight(self.client.view), place, part)
            if found is None:
                return
            place = found
        inode = self.inodes.number(place)
        if inode is not None:
            pyfuse3.invalidate_entry_async(inode, name.encode(), ignore_enoent=True)

    async def _release(self, ticket: int, pids: list[int]) -> None:
        await self.blocked.release(ticket, pids)
        left = await self.handles.settled(pids)
        places = [handle.place for handle in left]
        self._dumps[ticket] = pids, places
        for handle in left:
            self.inodes.pin(handle.place, handle.inode)

    def _pin_for_dumps(self, inode: int, place: Place, pid: int) -> None:
        """A task of a tree that is about to be dumped opens this; it may run on until then."""
        for pids, places in self._dumps.values():
            if facts.among({pid}, pids):
                self.inodes.pin(place, inode)
                places.append(place)

    def _resume(self, ticket: int) -> None:
        self.blocked.resume(ticket)
        _, places = self._dumps.pop(ticket, ((), ()))
        for place in places:
            self.inodes.unpin(place)
