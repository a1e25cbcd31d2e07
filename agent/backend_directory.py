"""Objects as files below a directory, on a disk of this machine or on one that many nodes mount.

Nothing here needs more of the filesystem than NFS, Lustre and CephFS have: link(2) makes an object
that must be new, rename(2) one that replaces, and both take a file of `.tmp/` that is whole and
durable already. There are no locks, and all times are the filesystem's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator

from agent.backend import DAY_S, Data, Entry, Upload, checked, refusal
from krgfs import model

OPEN_FILES = 64
WINDOW_BYTES = 16 * 1024 * 1024

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class DirectoryBackend:
    """Objects below `root`, which is made (0700) where it is missing.

    What another node removed may be read for a moment more, while this one's NFS client has not
    heard of it.
    """

    def __init__(self, root: str, open_files: int = OPEN_FILES) -> None:
        self._root = os.path.abspath(root)
        self._temporary = os.path.join(self._root, ".tmp")
        self._clock = os.path.join(self._temporary, f"clock-{uuid.uuid4().hex}")
        self._entered: set[str] = set()  # directories whose entries we know to be durable
        self._files = _Files(open_files)
        os.makedirs(self._root, 0o700, exist_ok=True)
        _sync(os.path.dirname(self._root))
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._temporary, 0o700)

    def list(self, prefix: str) -> list[Entry]:
        if prefix:
            checked(prefix.removesuffix("/"))
        with _about(prefix):
            return sorted(_walk(self._root, prefix))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        with _about(name):
            file = _File(os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC))
            end = os.fstat(file.fd).st_size
            start = max(0, end + offset) if offset < 0 else offset
            data = bytearray(max(0, end - start if size is None else min(size, end - start)))
            del data[_fill(file, start, memoryview(data)) :]
            return bytes(data)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        with _about(name):
            path = self._path(name)
            try:
                return _fill(self._files.open(path), offset, buffer)
            except OSError as exc:
                self._files.forget(path)
                if exc.errno != errno.ESTALE:  # NFS: removed behind an open descriptor
                    raise
                return _fill(self._files.open(path), offset, buffer)

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        upload = _FileUpload(self, checked(name), replace)
        try:
            upload.append(data)
            upload.commit()
        finally:
            upload.abort()

    def create(self, name: str) -> Upload:
        return _FileUpload(self, checked(name), False)

    def delete(self, name: str) -> None:
        with _about(name):
            path = self._path(name)
            self._files.forget(path)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
                _sync(os.path.dirname(path))

    def now(self) -> float:
        fd = os.open(self._clock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.utime(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)

    def room(self) -> model.Store:
        facts = os.statvfs(self._root)
        return model.Store(
            total=facts.f_blocks * facts.f_frsize,
            free=facts.f_bfree * facts.f_frsize,
            available=facts.f_bavail * facts.f_frsize,
            files=facts.f_files,
            files_free=facts.f_ffree,
        )

    def tidy(self, older_s: float = DAY_S) -> None:
        before = self.now() - older_s
        with os.scandir(self._temporary) as found:
            for each in found:
                with contextlib.suppress(FileNotFoundError):
                    if each.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(each.path)

    def close(self) -> None:
        self._files.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._clock)

    def _path(self, name: str) -> str:
        return os.path.join(self._root, checked(name))

    def _new(self) -> tuple[str, int]:
        """Make a file that no listing shows."""
        path = os.path.join(self._temporary, uuid.uuid4().hex)
        return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _publish(self, temporary: str, name: str, replace: bool) -> None:
        """Give a durable file its name, durably; what is new does not stay if that fails."""
        path = self._path(name)
        try:
            self._enter(os.path.dirname(path))
            _give(temporary, path, replace)
        except FileNotFoundError:  # somebody removed the directory, empty as it was
            self._entered.clear()
            self._enter(os.path.dirname(path))
            _give(temporary, path, replace)
        try:
            _sync(os.path.dirname(path))
        except OSError:
            if not replace:
                os.unlink(path)
            raise

    def _enter(self, directory: str) -> None:
        """Make a directory, and sure that it outlives a crash, whoever made it."""
        if directory == self._root or directory in self._entered:
            return
        parent = os.path.dirname(directory)
        self._enter(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        _sync(parent)
        self._entered.add(directory)


class _FileUpload:
    """A file of `.tmp/` that grows: places are given out under the lock, and written to without."""

    def __init__(self, backend: DirectoryBackend, name: str, replace: bool) -> None:
        self._backend, self._name, self._replace = backend, name, replace
        self._changed = threading.Condition()
        self._writers = 0
        self._size = 0
        self._sent_off = 0
        self._failed: OSError | None = None
        self._fd: int | None
        with _about(name):
            self._path, self._fd = backend._new()

    def append(self, *parts: Data) -> int:
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        with self._writing(sum(map(len, views))) as (fd, offset):
            _write(fd, offset, views)
        return offset

    def commit(self) -> None:
        with _about(self._name), self._changed:
            self._changed.wait_for(lambda: not self._writers)
            if self._failed:
                raise self._failed
            fd = self._open_fd()
            os.utime(fd)  # the age of an object counts from here, not from its last byte
            os.fsync(fd)
            self._backend._publish(self._path, self._name, self._replace)
            self._close()

    def abort(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._writers)
            self._close()

    @contextlib.contextmanager
    def _writing(self, size: int) -> Iterator[tuple[int, int]]:
        with self._changed:
            fd, offset = self._open_fd(), self._size
            self._size += size
            self._writers += 1
        try:
            with _about(self._name):
                yield fd, offset
                self._send_off(fd)
        except BaseException as exc:  # whatever it was, there is a hole now
            self._failed = exc if isinstance(exc, OSError) else refusal(errno.EIO, self._name)
            raise
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def _send_off(self, fd: int) -> None:
        """Have the kernel begin to write what fsync will wait for. It only hastens that, so it does
        not matter how it ends, nor that others may still write into the window."""
        with self._changed:
            start, self._sent_off = self._sent_off, self._size // WINDOW_BYTES * WINDOW_BYTES
            end = self._sent_off
        if _sync_file_range and start < end:
            _sync_file_range(fd, start, end - start, _WRITE)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "committed or aborted already", self._name)
        return self._fd

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):  # renamed; else `tidy` has it in a day
                os.unlink(self._path)


class _File:
    """An open file. Its last user closes it by letting go, so hold it, not its number: threads read
    without a lock, and must never find another file under that number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _Files:
    """Files that were read last, open, so that a restore does not open a pack for each chunk."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> _File:
        """Open a file, or take it where it is open and has its name still."""
        with self._lock:
            file = self._open.get(path)
        if file is None or os.fstat(file.fd).st_nlink == 0:
            file = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        with self._lock:
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return file

    def forget(self, path: str) -> None:
        with self._lock:
            self._open.pop(path, None)

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


def _walk(root: str, prefix: str) -> Iterator[Entry]:
    """Find the objects of a directory. What goes while we look was never seen; what begins with a
    dot is ours, or the remains of a file that an NFS client has open."""
    try:
        with os.scandir(os.path.join(root, prefix)) as found:
            entries = [each for each in found if not each.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return
    for each in entries:
        name = prefix + each.name
        if each.is_dir(follow_symlinks=False):
            yield from _walk(root, name + "/")
        elif each.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                facts = each.stat(follow_symlinks=False)
                yield Entry(name, facts.st_size, facts.st_mtime)


def _give(temporary: str, path: str, replace: bool) -> None:
    if replace:
        os.rename(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a call whose answer was lost, and meet its own link: link(2), BUGS.
        if not os.path.samestat(os.stat(temporary), os.lstat(path)):
            raise


def _write(fd: int, offset: int, views: list[memoryview]) -> None:
    """Write all parts at an offset: the kernel takes so many at a time, and not always whole."""
    while views:
        done = os.pwritev(fd, views[:_IOV_MAX], offset)
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]


def _fill(file: _File, offset: int, buffer: memoryview) -> int:
    at, rest = 0, buffer.cast("B")
    while at < len(rest) and (got := os.preadv(file.fd, [rest[at:]], offset + at)):
        at += got
    return at


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Have errors name the object instead of a path, or of nothing."""
    try:
        yield
    except OSError as exc:
        if isinstance(exc, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from exc
        raise OSError(exc.errno, exc.strerror, name) from exc
