"""Which back end a location means, and what it is let in with.

/var/lib/krgfs, file:///var/lib/krgfs       a directory, of this machine or shared by nodes
s3://bucket/prefix?endpoint=URL&region=WORD  a bucket
"""

from __future__ import annotations

import configparser
import os
import re
import stat
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

import psutil

from agent import durable
from agent.backend import Backend
from agent.backend_directory import DirectoryBackend
from agent.backend_s3 import Bucket, Keys, S3Backend
from krgfs.errors import BadWords

LOCAL = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs")
_FORMS = (
    "write a directory (/var/lib/krgfs or file:///var/lib/krgfs) "
    "or s3://BUCKET/PREFIX?endpoint=http://HOST:PORT&region=WORD"
)
_WORD = re.compile(r"\s*(?:export\s+)?([A-Za-z_]+)\s*=\s*(.*?)\s*")


def open_backend(location: str, credentials: str | None = None) -> Backend:
    """Open the back end at a location; `credentials` names the file that has the keys of S3, which
    are taken from the environment otherwise.

    BadWords for what no back end is meant by, EngineFailed where it cannot be used.
    """
    if location.startswith("/"):
        return _directory(location)
    try:
        url = urlsplit(location)
    except ValueError as exc:
        raise BadWords(f"no image store: the location is not a URL ({exc}); {_FORMS}") from exc
    if "@" in url.netloc or "@" in dict(parse_qsl(url.query)).get("endpoint", ""):
        raise BadWords(
            "no image store: its location holds a user or a password, which everybody can read "
            "there; put the keys into a file of root's (mode 0600) or into the environment"
        )
    if url.scheme == "file" and url.netloc in ("", "localhost") and not url.query:
        return _directory(unquote(url.path))
    if url.scheme == "s3" and url.netloc and not url.fragment:
        return S3Backend.open(_bucket(url.netloc, url.path, url.query), _keys(credentials))
    raise BadWords(f"no image store: {location!r} is no place for one; {_FORMS}")


def is_own(location: str, state_dir: str) -> bool:
    """Tell whether nobody writes to a location but the agent of this state directory, which is
    locked: it is a directory below that, and on no filesystem that other machines may mount."""
    path = location if location.startswith("/") else unquote(urlsplit(location).path)
    if not location.startswith(("/", "file:")):
        return False
    path, above = os.path.realpath(path), os.path.realpath(state_dir)
    if os.path.commonpath([path, above]) != above:
        return False
    return os.stat(path).st_dev == os.stat(above).st_dev or _filesystem(path) in LOCAL


def _filesystem(path: str) -> str:
    """Return the type of the filesystem that a path is on."""
    found = psutil.disk_partitions(all=True)
    above = [
        each for each in found if os.path.commonpath([path, each.mountpoint]) == each.mountpoint
    ]
    return max(above, key=lambda each: len(each.mountpoint)).fstype if above else ""


def _directory(path: str) -> DirectoryBackend:
    if not os.path.isabs(path):
        raise BadWords(f"no image store: {path!r} is not an absolute path; {_FORMS}")
    with durable.explained(f"cannot keep images in {path}"):
        return DirectoryBackend(path)


def _bucket(name: str, path: str, query: str) -> Bucket:
    options = dict(parse_qsl(query, keep_blank_values=True))
    endpoint = options.pop("endpoint", None)
    region = options.pop("region", "us-east-1")
    if options:
        raise BadWords(f"no image store: unknown option {', '.join(options)} of s3; {_FORMS}")
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise BadWords(f"no image store: endpoint {endpoint!r} is not a URL of http; {_FORMS}")
    return Bucket(name, unquote(path).strip("/"), endpoint, region)


# -- keys


def _keys(path: str | None) -> Keys:
    words = os.environ if path is None else _read_words(path)
    where = "the environment" if path is None else path
    try:
        return Keys(
            words["AWS_ACCESS_KEY_ID"],
            words["AWS_SECRET_ACCESS_KEY"],
            words.get("AWS_SESSION_TOKEN") or None,
        )
    except KeyError as exc:
        raise BadWords(f"no keys for S3: {where} has no {exc.args[0]}") from exc


def _read_words(path: str) -> Mapping[str, str]:
    """Read lines NAME=VALUE, or a file like ~/.aws/credentials; names come out in capitals."""
    text = _read_private(path)
    if not any(line.lstrip().startswith("[") for line in text.splitlines()):
        found = (_WORD.fullmatch(line) for line in text.splitlines())
        return {each[1].upper(): each[2].strip("\"'") for each in found if each}
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
        section = "default" if parser.has_section("default") else parser.sections()[0]
        return {key.upper(): value for key, value in parser.items(section)}
    except (configparser.Error, IndexError) as exc:
        # Without its words: they may hold a line of the file.
        raise BadWords(f"no keys for S3: {path} is not a file of credentials") from exc


def _read_private(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid not in (0, os.geteuid()) or stat.S_IMODE(facts.st_mode) & 0o177:
                raise BadWords(
                    f"no keys for S3: others than root and us may read or change {path}; "
                    f"chown it to root and chmod 600 it"
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise BadWords(f"no keys for S3: cannot read {path}: {reason}") from exc
