"""Objects in a bucket of S3, or of what speaks like it.

What `put` promises to those who do not replace rests on the server: it must enforce If-None-Match.
Some take the header and ignore it, so `open` tries before anything relies on it. Names that begin
with a dot are ours: the clock's and the trial's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import obstore
from obstore import exceptions
from obstore.store import S3Store

from agent.backend import DAY_S, Data, Entry, Upload, checked, refusal
from krgfs import model
from krgfs.errors import EngineFailed

if TYPE_CHECKING:
    from obstore import OffsetRange, SuffixRange
    from obstore.store import S3Config, S3Credential

PART_BYTES = 8 * 1024 * 1024  # S3 takes no less than 5 MiB, and 10000 of them
PARTS_WAITING = 2
PARTS_ON_THE_WAY = 4
PATIENCE_S = 15.0

_UNLIMITED = 1 << 60
_MARK = "krgfs-put"  # metadata of an object: which put it is of
_RACES = 4


Part: TypeAlias = "tuple[int, int] | OffsetRange | SuffixRange | None"


class Keys(NamedTuple):
    """What requests are signed with."""

    access_key: str
    secret_key: str
    session_token: str | None = None


class Bucket(NamedTuple):
    """Where the objects are; without an endpoint it is Amazon's for the region."""

    name: str
    prefix: str = ""
    endpoint: str | None = None
    region: str = "us-east-1"

    def __str__(self) -> str:
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"bucket {self.name}{at}"


class S3Backend:
    """Objects below a prefix of a bucket.

    `Entry.modified` is of whole seconds; what came by `create` has, at Amazon, the time at which
    its upload began. An upload that was never finished is not listed, but the server keeps its
    parts, and of an aborted one those that came late: give the bucket a lifecycle rule that aborts
    incomplete multipart uploads.
    """

    def __init__(self, bucket: Bucket, keys: Keys, patience_s: float = PATIENCE_S) -> None:
        self._bucket = bucket
        self._clock = f".clock/{uuid.uuid4().hex}"
        self._store = S3Store(
            bucket.name,
            prefix=bucket.prefix or None,
            config=_config(bucket),
            credential_provider=lambda: _credential(keys),
            client_options={
                "allow_http": True,  # the endpoint says which it is
                "connect_timeout": timedelta(seconds=patience_s / 3),
                "timeout": timedelta(seconds=patience_s),
            },
            retry_config={
                "max_retries": 5,
                "retry_timeout": timedelta(seconds=patience_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=patience_s / 150),
                    "max_backoff": timedelta(seconds=patience_s / 8),
                },
            },
        )

    @classmethod
    def open(cls, bucket: Bucket, keys: Keys, patience_s: float = PATIENCE_S) -> S3Backend:
        """Reach the bucket and make sure that it keeps the promise of `put`; EngineFailed if not,
        about `patience_s` later at most where nobody answers."""
        backend = cls(bucket, keys, patience_s)
        try:
            winners = backend._try_puts()
        except OSError as exc:
            raise EngineFailed(_why_not(bucket, exc)) from exc
        if winners != {1}:
            raise EngineFailed(
                f"cannot keep images in {bucket}: it lets two writers put one object, so that one "
                "image could replace another (it does not enforce If-None-Match); use a server "
                "that does, such as Amazon S3, Ceph, MinIO, or SeaweedFS from 4.18 on"
            )
        return backend

    def list(self, prefix: str) -> list[Entry]:
        if prefix:
            checked(prefix.removesuffix("/"))
        return sorted(each for each in self._listed(prefix) if not each.name.startswith("."))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if offset >= 0 and size is not None:
            return bytes(self._get(checked(name), (offset, offset + size)))
        part: Part = {"suffix": -offset} if offset < 0 else {"offset": offset} if offset else None
        return bytes(self._get(checked(name), part)[:size])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        data = self._get(checked(name), (offset, offset + buffer.nbytes))
        buffer.cast("B")[: len(data)] = data
        return len(data)

    def put(self, name: str, data: Data, *, replace: bool = False) -> None:
        self._put(checked(name), data, replace)

    def create(self, name: str) -> Upload:
        return _S3Upload(self, self._store, checked(name))

    def delete(self, name: str) -> None:
        self._delete(checked(name))

    def now(self) -> float:
        # Listed, as objects are: a HEAD would tell the same time to another fraction of a second.
        self._put(f"{self._clock}/now", b"", True)
        for entry in self._listed(self._clock):
            return entry.modified
        raise refusal(errno.EIO, self._clock)

    def room(self) -> model.Store:
        """Return that there is no end to it, as S3 does not tell."""
        return model.Store(
            total=_UNLIMITED,
            free=_UNLIMITED,
            available=_UNLIMITED,
            files=_UNLIMITED,
            files_free=_UNLIMITED,
        )

    def tidy(self, older_s: float = DAY_S) -> None:
        before = self.now() - older_s
        for folder in (".clock", ".trial"):
            for each in self._listed(folder):
                if each.modified < before:
                    self._delete(each.name)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # else `tidy` has it in a day
            self._delete(f"{self._clock}/now")

    def _listed(self, prefix: str) -> tuple[Entry, ...]:
        with _about(prefix):
            found = obstore.list(self._store, prefix.removesuffix("/") or None).collect()
        return tuple(
            Entry(each["path"], each["size"], each["last_modified"].timestamp()) for each in found
        )

    def _get(self, name: str, part: Part) -> memoryview:
        """Read a range; one that lies beyond the end is empty here, and an error in HTTP."""
        with _about(name):
            if isinstance(part, tuple) and part[0] == part[1]:
                obstore.head(self._store, name)
                return memoryview(b"")
            try:
                found = obstore.get(self._store, name, options={"range": part} if part else None)
                return memoryview(found.bytes())
            except exceptions.GenericError as exc:
                if "416 Range Not Satisfiable" not in str(exc):
                    raise
                return memoryview(b"")

    def _put(self, name: str, data: Data, replace: bool) -> None:
        mark = uuid.uuid4().hex
        try:
            obstore.put(
                self._store,
                name,
                memoryview(data).cast("B"),
                attributes={_MARK: mark},
                mode="overwrite" if replace else "create",
                use_multipart=False,
            )
        except Exception as exc:
            # The answer may have been lost, and a repeated request have met our own object.
            if replace or not self._is_of(name, mark):
                raise _error(name, exc) from exc

    def _is_of(self, name: str, mark: str) -> bool:
        try:
            return obstore.get(self._store, name, options={"head": True}).attributes[_MARK] == mark
        except Exception:
            return False

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _about(name):
            obstore.delete(self._store, name)

    def _try_puts(self) -> set[int]:
        """Return how many of several puts of one object have won, at once and one by one."""
        folder = f".trial/{uuid.uuid4().hex}"
        names = [f"{folder}/{i}" for i in range(_RACES)]
        together = threading.Barrier(2)

        def put(name: str) -> bool:
            together.wait()
            return self._wins(name)

        won = dict.fromkeys(names, 0)
        try:
            with ThreadPoolExecutor(2) as pool:
                for name in names:
                    won[name] += sum(pool.map(put, (name, name)))
            for name in names:
                won[name] += self._wins(name)
        finally:
            with contextlib.suppress(OSError):
                for name in names:
                    self._delete(name)
        return set(won.values())

    def _wins(self, name: str) -> bool:
        try:
            self._put(name, b"", False)
        except FileExistsError:
            return False
        return True


class _S3Upload:
    """Parts on their way in a thread of their own, which waits until it is told the end."""

    def __init__(self, backend: S3Backend, store: S3Store, name: str) -> None:
        self._backend, self._store, self._name = backend, store, name
        self._changed = threading.Condition()
        self._size = 0
        self._rest = bytearray()
        self._parts: deque[bytes] = deque()
        self._ended = self._dropped = False
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def append(self, *parts: Data) -> int:
        with self._changed:
            self._check()
            offset = self._size
            for part in parts:
                self._rest += part
                self._size += memoryview(part).nbytes
            while len(self._rest) >= PART_BYTES:
                self._parts.append(bytes(memoryview(self._rest)[:PART_BYTES]))
                del self._rest[:PART_BYTES]
            self._start()
            self._changed.notify_all()
            self._changed.wait_for(self._has_room)
            self._check()
        return offset

    def commit(self) -> None:
        with self._changed:
            self._check()
            self._ended = True
            if self._thread is None:
                self._backend.put(self._name, self._rest)
                return
            self._parts.append(bytes(self._rest))
            self._changed.notify_all()
        self._thread.join()
        if self._failed:
            raise _error(self._name, self._failed) from self._failed

    def abort(self) -> None:
        with self._changed:
            self._dropped = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def _check(self) -> None:
        if self._failed:
            raise _error(self._name, self._failed) from self._failed
        if self._ended or self._dropped:
            raise OSError(errno.EBADF, "committed or aborted already", self._name)

    def _has_room(self) -> bool:
        return len(self._parts) <= PARTS_WAITING or self._dropped or self._failed is not None

    def _start(self) -> None:
        if self._parts and self._thread is None:
            self._thread = threading.Thread(target=self._send, name="s3 upload", daemon=True)
            self._thread.start()

    def _send(self) -> None:
        try:
            obstore.put(
                self._store,
                self._name,
                self._next_parts(),
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_ON_THE_WAY,
            )
        except BaseException as exc:  # a panic in obstore, too, must not pass for the end
            with self._changed:
                self._failed = exc
                self._parts.clear()
                self._changed.notify_all()

    def _next_parts(self) -> Iterator[bytes]:
        """Hand out parts until the end; to raise is how an upload is aborted."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._ended or self._dropped)
                if self._dropped:
                    raise refusal(errno.ECANCELED, self._name)
                if not self._parts:
                    return
                part = self._parts.popleft()
                self._changed.notify_all()
            yield part


def _config(bucket: Bucket) -> S3Config:
    config: S3Config = {"region": bucket.region, "disable_bulk_delete": True}  # some have no bulk
    if bucket.endpoint:
        config["endpoint"] = bucket.endpoint
    return config


def _credential(keys: Keys) -> S3Credential:
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.session_token,
        "expires_at": None,
    }


# -- what goes wrong, in the kernel's words

_BY_TYPE: tuple[tuple[type[Exception], int], ...] = (
    (exceptions.AlreadyExistsError, errno.EEXIST),
    (exceptions.PreconditionError, errno.EEXIST),
    (exceptions.PermissionDeniedError, errno.EACCES),
    (exceptions.UnauthenticatedError, errno.EACCES),
    (FileNotFoundError, errno.ENOENT),
)
_BY_TEXT = (  # the codes of S3, and of what HTTP and the system say below it
    (re.compile("NoSuchBucket"), errno.EIO),  # not ENOENT: no object has gone
    (re.compile("QuotaExceeded|QuotaFull"), errno.EDQUOT),
    (re.compile("507 Insufficient|InsufficientStorage|StorageFull"), errno.ENOSPC),
    (re.compile("ConnectionRefused"), errno.ECONNREFUSED),
    (re.compile("dns error|HostUnreachable|NetworkUnreachable"), errno.EHOSTUNREACH),
    (re.compile("TimedOut|kind: Timeout|RequestTimeout"), errno.ETIMEDOUT),
)


def _error(name: str, exc: BaseException) -> OSError:
    text = str(exc)
    numbers = [number for sign, number in _BY_TEXT if sign.search(text)]
    numbers += [number for kind, number in _BY_TYPE if isinstance(exc, kind)]
    number = numbers[0] if numbers else errno.EIO
    return OSError(number, f"{os.strerror(number)} ({_summary(text)})", name)


def _summary(text: str) -> str:
    """Return what happened without the body of the answer, which may repeat what was signed."""
    code = re.search("<Code>([A-Za-z]+)</Code>", text)
    first = re.split(r"<\?xml|<Error|\n", text, maxsplit=1)[0].strip(" :")
    return f"{first}: {code[1]}" if code else first


def _why_not(bucket: Bucket, exc: OSError) -> str:
    told = f"cannot keep images in {bucket}"
    if "NoSuchBucket" in str(exc):
        return f"{told}: there is no such bucket; make it, or name another"
    if exc.errno == errno.EACCES:
        return f"{told}: it does not let us write ({exc.strerror}); see to the credentials"
    return f"{told}: {exc.strerror}; see that its server runs and that the location is right"


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Turn what obstore raises into errors of the protocol."""
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as exc:
        raise _error(name, exc) from exc
