"""An image as one file: a tar of its directory, compressed, with a digest of all of it at the end.

    zstd frame       APP/vN/manifest.json, then APP/vN/... by name; pax tar (POSIX.1-2001), checksum
    skippable frame  BLAKE3 of everything before it (RFC 8878, 3.1.2: decoders pass over it)

`tar --zstd -xf` unpacks it. Written and read as a stream, in little memory.
"""

from __future__ import annotations

import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import zstandard
from blake3 import blake3

from .errors import BadWords, Damaged
from .verbs import NAME, quoted

FIRST = "manifest.json"
LEVEL = 3
PIECE_BYTES = 1 << 20
HEADER_BYTES = 1 << 20  # no header of a tar that we make is larger
_SEAL = struct.Struct("<II32s")
_SEAL_MAGIC = 0x184D2A5B
_NAME = re.compile(r"(?P<app>[^/]+)/(?P<version>v[1-9][0-9]{0,9})/(?P<name>[^/\0]+)")


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class File(NamedTuple):
    """What is known of a file of an image; `modified` in seconds since the epoch."""

    name: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: float


# -- writing


@contextmanager
def written(sink: Sink, ref: str) -> Iterator[Callable[[File, Source], None]]:
    """Enter the block with a function that adds a file of image `ref`, manifest.json first; leaving
    makes it whole. What is left after an error is refused by `entries`."""
    hashed = _Hashed(sink)
    compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True, threads=-1)
    # none of these is closed after an error: that would write on, to who may not read any more
    packed = compressor.stream_writer(hashed, closefd=False, write_size=PIECE_BYTES)  # type: ignore[arg-type]
    tar = tarfile.TarFile(
        fileobj=packed, mode="w", format=tarfile.PAX_FORMAT, copybufsize=PIECE_BYTES
    )

    def add(file: File, data: Source) -> None:
        entry = tarfile.TarInfo(f"{ref}/{file.name}")
        entry.size, entry.mode, entry.mtime = file.size, file.mode, int(file.modified)
        entry.uid, entry.gid = file.uid, file.gid
        tar.addfile(entry, data)  # type: ignore[arg-type]

    yield add
    tar.close()
    packed.close()  # type: ignore[no-untyped-call]
    sink.write(_SEAL.pack(_SEAL_MAGIC, 32, hashed.digest()))


class _Hashed:
    def __init__(self, sink: Sink) -> None:
        self._sink, self._hasher = sink, blake3()

    def write(self, data: bytes) -> int:
        self._hasher.update(data)
        self._sink.write(data)
        return len(data)

    def digest(self) -> bytes:
        return self._hasher.digest()


# -- reading


class Entry(NamedTuple):
    """A file of an image; its `pieces` are read before the next entry is asked for."""

    app: str
    version: str
    name: str
    size: int
    pieces: Iterator[bytes]


def entries(source: Source, called: str) -> Iterator[Entry]:
    """Yield the files in an export, manifest.json first.

    Damaged, which says `called`, where it is not one, is cut off or changed: at its end at the
    latest, so that nothing of it is to be believed before. BadWords where it has anything in it but
    plain files of one image.
    """
    sealed = _Unsealed(source)
    plain = _Forward(sealed, called)
    seen: set[str] = set()
    try:
        with tarfile.TarFile(fileobj=plain, mode="r") as tar:  # type: ignore[arg-type]
            image: tuple[str, str] | None = None
            for member in tar:
                app, version, name = _checked(member, called)
                image = image or (app, version)
                if name in seen or (app, version) != image or (not seen and name != FIRST):
                    raise BadWords(f"{called} holds {member.name!r} where no export of krg has it")
                seen.add(name)
                yield Entry(app, version, name, member.size, plain.pieces(member.size))
    except tarfile.TarError as exc:
        raise _refusal(called) from exc
    if not seen or not sealed.is_whole():
        raise _refusal(called)


def _refusal(called: str) -> Damaged:
    return Damaged(
        f"{called} is no export of krg, or it was cut off or changed; take another copy of it"
    )


def _checked(member: tarfile.TarInfo, called: str) -> tuple[str, str, str]:
    match = _NAME.fullmatch(member.name)
    is_plain = member.type == tarfile.REGTYPE and member.sparse is None
    is_named = match and NAME.match(match["app"]) and match["name"] not in (".", "..")
    if not match or not is_named or not is_plain:
        raise BadWords(
            f"{called} holds {quoted(member.name)}, which is no plain file APP/vN/FILE; only what "
            "`krg export` made can be imported"
        )
    return match["app"], match["version"], match["name"]


class _Unsealed:
    """Bytes up to the seal, which is held back; the end of the source is its only place."""

    def __init__(self, source: Source) -> None:
        self._source, self._hasher = source, blake3()
        self._held = b""

    def read(self, size: int) -> bytes:
        while len(self._held) <= _SEAL.size and (more := self._source.read(PIECE_BYTES)):
            self._held += more
        count = min(size, max(0, len(self._held) - _SEAL.size))
        data, self._held = self._held[:count], self._held[count:]
        self._hasher.update(data)
        return data

    def is_whole(self) -> bool:
        """Read the rest and tell whether the seal is that of all that came before it."""
        while self.read(PIECE_BYTES):
            pass
        return self._held == _SEAL.pack(_SEAL_MAGIC, 32, self._hasher.digest())


class _Forward:
    """The tar in it, for tarfile: read onwards only, and never much at once."""

    def __init__(self, sealed: _Unsealed, called: str) -> None:
        unpacker = zstandard.ZstdDecompressor()
        self._plain = unpacker.stream_reader(sealed, read_size=PIECE_BYTES)  # type: ignore[arg-type]
        self._called = called
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        while self._at < offset and self.read(min(HEADER_BYTES, offset - self._at)):
            pass

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES:
            raise _refusal(self._called)
        try:
            data = self._plain.read(size)
            while 0 < len(data) < size and (more := self._plain.read(size - len(data))):
                data += more
        except zstandard.ZstdError as exc:
            raise _refusal(self._called) from exc
        self._at += len(data)
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield so many bytes; Damaged where there are fewer."""
        while size:
            data = self.read(min(size, PIECE_BYTES))
            if not data:
                raise _refusal(self._called)
            size -= len(data)
            yield data
