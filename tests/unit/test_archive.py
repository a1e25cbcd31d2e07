"""Exports: what was written is read back, and nothing else is."""

from __future__ import annotations

import io
import tarfile

import pytest
import zstandard
from blake3 import blake3

from krgfs import archive
from krgfs.archive import File
from krgfs.errors import BadWords, Damaged, KrgError

FILES = {"manifest.json": b"{}", "core-1.img": b"core", "pages-1.img": bytes(3 << 20)}


def exported() -> bytes:
    sink = io.BytesIO()
    with archive.written(sink, "blast/v3") as add:
        for name, data in FILES.items():
            add(File(name, len(data), 0o400, 0, 0, 1.5), io.BytesIO(data))
    return sink.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    found = {}
    for entry in archive.entries(io.BytesIO(data), "x.krg"):
        assert (entry.app, entry.version) == ("blast", "v3")
        found[entry.name] = b"".join(entry.pieces)
        assert len(found[entry.name]) == entry.size
    return found


def sealed(members: list[tarfile.TarInfo]) -> bytes:
    """Return what somebody may forge: a whole archive of empty members."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    body = zstandard.ZstdCompressor().compress(plain.getvalue())
    return body + archive._SEAL.pack(archive._SEAL_MAGIC, 32, blake3(body).digest())


def member(name: str, kind: bytes = tarfile.REGTYPE, **headers: str) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.pax_headers = kind, headers
    made.linkname = "x" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return made


def test_what_was_written_is_read_back_in_order() -> None:
    assert list(read(exported()).items()) == list(FILES.items())


def test_every_byte_that_is_flipped_or_missing_is_noticed() -> None:
    data = exported()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x10
        for wrong in (bytes(changed), data[:at]):
            with pytest.raises(KrgError, match=r"x\.krg"):
                read(wrong)
    with pytest.raises(Damaged):
        read(data + b"\0")


@pytest.mark.parametrize(
    "members",
    [
        [member("blast/v3/core-1.img")],
        [member("blast/v3/manifest.json"), member("other/v3/core-1.img")],
        [member("blast/v3/manifest.json"), member("blast/v3/manifest.json")],
        [member("blast/v3/manifest.json", tarfile.SYMTYPE)],
        [member("blast/v3/manifest.json"), member("blast/v3/x", tarfile.LNKTYPE)],
        [member("blast/v3/manifest.json"), member("blast/v3/x", tarfile.CHRTYPE)],
        [member("blast/v3/manifest.json"), member("blast/v3/..")],
        [member("blast/v3/manifest.json"), member("blast/v3/a/b")],
        [member("/blast/v3/manifest.json")],
        [member("../v3/manifest.json")],
        [member("blast/3/manifest.json")],
        [member("manifest.json")],
    ],
)
def test_what_no_export_has_is_refused(members: list[tarfile.TarInfo]) -> None:
    with pytest.raises(BadWords, match=r"x\.krg holds"):
        read(sealed(members))


def test_a_header_that_would_take_all_memory_is_refused() -> None:
    long = member("blast/v3/manifest.json", comment="x" * (archive.HEADER_BYTES + 1))
    with pytest.raises(Damaged):
        read(sealed([long]))


@pytest.mark.parametrize("data", [b"", b"x", bytes(100), b"\x28\xb5\x2f\xfd" * 30])
def test_what_is_none_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged, match="no export of krg"):
        read(data)
