"""The form of CRIU's image files: magic numbers, and then entries.

An entry is its length (4 bytes, little endian) and a protobuf message; field numbers are those of
CRIU's images/*.proto. Messages are taken apart and put together by their wire format, so that
nothing of what we do not know is lost.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from krgfs.errors import Damaged

from . import durable

LENGTH = struct.Struct("<I")
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    number: int
    wire: int
    value: int | bytes


def entries(path: Path, *magics: int, limit_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the messages of an image file; raises Damaged, which begins with the path, where it is
    missing, not whole, no file, or larger than the limit."""
    try:
        with durable.opened(str(path), os.O_RDONLY) as fd, open(fd, "rb", closefd=False) as file:
            if limit_bytes is not None and os.fstat(fd).st_size > limit_bytes:
                raise Damaged(f"{path} is larger than CRIU makes it")
            raw = file.read()
    except FileNotFoundError as exc:
        raise Damaged(f"{path} is missing") from exc
    except OSError as exc:
        raise Damaged(f"{path} cannot be read ({exc.strerror})") from exc
    head = b"".join(map(LENGTH.pack, magics))
    if not raw.startswith(head):
        raise Damaged(f"{path} does not begin as CRIU's do")
    at = len(head)
    while at < len(raw):
        if at + LENGTH.size > len(raw):
            raise Damaged(f"{path} is cut off")
        (size,) = LENGTH.unpack_from(raw, at)
        at += LENGTH.size
        if at + size > len(raw):
            raise Damaged(f"{path} is cut off")
        yield raw[at : at + size]
        at += size


def parse(raw: bytes) -> list[Field]:
    """Take a protobuf message apart, its fields in order; raises Damaged when it is not one."""
    found, at = [], 0
    try:
        while at < len(raw):
            key, at = _varint(raw, at)
            number, wire = key >> 3, key & 7
            value: int | bytes
            if wire == VARINT:
                value, at = _varint(raw, at)
            else:
                size = {FIXED64: 8, FIXED32: 4}.get(wire)
                if wire == BYTES:
                    size, at = _varint(raw, at)
                if size is None or at + size > len(raw):
                    raise Damaged("a message of an image file is damaged")
                value, at = raw[at : at + size], at + size
            found.append(Field(number, wire, value))
    except IndexError as exc:
        raise Damaged("a message of an image file is cut off") from exc
    return found


def fields_of(raw: bytes) -> dict[int, int | bytes]:
    """Return the values of a message by field number, the last where one is repeated."""
    return {field.number: field.value for field in parse(raw)}


def as_bytes(value: int | bytes) -> bytes:
    """Return a value that has to be a message or text; raises Damaged where it is a number."""
    if not isinstance(value, bytes):
        raise Damaged("a message of an image file has a number where a message belongs")
    return value


def as_int(value: int | bytes) -> int:
    """Return a value that has to be a number; raises Damaged where it is none."""
    if not isinstance(value, int):
        raise Damaged("a message of an image file has a message where a number belongs")
    return value


def build(fields: Iterable[Field]) -> bytes:
    """Put a protobuf message together."""
    out = bytearray()
    for number, wire, value in fields:
        out += _as_varint(number << 3 | wire)
        if isinstance(value, int):
            out += _as_varint(value)
        else:
            out += _as_varint(len(value)) * (wire == BYTES) + value
    return bytes(out)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise Damaged("a number of an image file is damaged")


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
