"""What writers and sweeps of a store tell each other: who is at work, and what is going to go.

Terms: a *session* is a writer (or a sweep) at work, of which `sessions/ID` tells for as long as it
is renewed; *condemned* are copies of chunks, each by its pack and its id, that a later sweep
removes when nobody can rely on them any more. Both end in a digest: a damaged one is never half
believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from agent.backend import Backend, Entry
from agent.chunk_index import Keys, sorted_keys
from agent.packs import Ids

MANIFESTS = "manifests/"
SESSIONS = "sessions/"
CONDEMNED = "condemned/"
SLACK = 10  # clocks of two nodes may differ by a grace / SLACK

COPY = np.dtype([("pack", "V16"), ("id", "V32")])
_SESSION = b"krgfs session 1"
_CONDEMNED = b"krgfs condemned 1\n"
_DIGEST_BYTES = 32


class Session(NamedTuple):
    """A session as it is listed; a damaged record stands for anything that one waits for."""

    name: str
    modified: float
    began: float
    sweeps: bool
    whole: bool

    def lives(self, now: float, grace_s: float) -> bool:
        return now - self.modified <= grace_s * (1 + 1 / SLACK)


class Condemned(NamedTuple):
    """A list of copies; None when it is damaged."""

    name: str
    modified: float
    copies: npt.NDArray[np.void] | None


def encode_session(began: float, sweeps: bool) -> bytes:
    text = b"%s %s %r" % (_SESSION, b"sweep" if sweeps else b"write", began)
    return b"%s %s\n" % (text, blake3(text).hexdigest().encode())


def sessions(backend: Backend) -> list[Session]:
    """Return all that are recorded, dead ones too."""
    found = ((entry, _read(backend, entry)) for entry in backend.list(SESSIONS))
    return [_session(entry, data) for entry, data in found if data is not None]


def _session(entry: Entry, data: bytes) -> Session:
    text, _, digest = data.rstrip(b"\n").rpartition(b" ")
    if blake3(text).hexdigest().encode() != digest or not data.endswith(b"\n"):
        return Session(entry.name, entry.modified, -math.inf, True, False)
    *_, kind, began = text.split(b" ")
    return Session(entry.name, entry.modified, float(began), kind == b"sweep", True)


def encode_condemned(copies: npt.NDArray[np.void]) -> bytes:
    body = _CONDEMNED + copies.tobytes()
    return body + blake3(body).digest()


def condemned(backend: Backend) -> list[Condemned]:
    """Return all lists of copies that sweeps are going to remove."""
    found = ((entry, _read(backend, entry)) for entry in backend.list(CONDEMNED))
    return [
        Condemned(entry.name, entry.modified, _copies(data))
        for entry, data in found
        if data is not None
    ]


def _copies(data: bytes) -> npt.NDArray[np.void] | None:
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    whole = body.startswith(_CONDEMNED) and blake3(body).digest() == digest
    if not whole or (len(body) - len(_CONDEMNED)) % COPY.itemsize:
        return None
    return np.frombuffer(body, dtype=COPY, offset=len(_CONDEMNED))


def joined(lists: Iterable[Condemned]) -> Keys:
    """Return the copies of all lists that are whole, as `by_id` makes them."""
    known = [each.copies for each in lists if each.copies is not None]
    copies = np.concatenate([np.empty(0, dtype=COPY), *known])
    return sorted_keys(by_id(copies["pack"], copies["id"]))


def by_id(packs: npt.NDArray[np.void], ids: Ids) -> npt.NDArray[np.void]:
    """Return keys of copies: the id before the pack, as it is what differs most."""
    keys = np.empty(len(ids), dtype=[("id", "V32"), ("pack", "V16")])
    keys["id"], keys["pack"] = ids, packs
    return keys.view("V48")


def manifests(backend: Backend) -> Iterator[tuple[str, bytes]]:
    """Yield all images' objects that are there, by name; those removed meanwhile are not."""
    for entry in backend.list(MANIFESTS):
        if (data := _read(backend, entry)) is not None:
            yield entry.name, data


def _read(backend: Backend, entry: Entry) -> bytes | None:
    try:
        return backend.read(entry.name)
    except FileNotFoundError:
        return None
