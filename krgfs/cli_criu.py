"""Which CRIU a node uses: the one given, a new enough one on PATH, or the one fetched for us."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import NamedTuple

FETCHED_CRIU = "/usr/local/lib/krgfs/criu/usr/sbin/criu"
LEAST_CRIU = (4, 2)
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE_S = 30.0


class Criu(NamedTuple):
    """A CRIU by its path; `ok` when `criu check` was content with this kernel."""

    path: str
    version: str
    ok: bool = False
    said: str = ""


def find_criu(given: str = "", fetched: str = FETCHED_CRIU) -> Criu:
    """Return the CRIU to use: the given one, one on PATH that is new enough, the one fetched beside
    the system; at last any. The path is empty when there is none."""
    if given:
        return Criu(given, criu_version(given))
    on_path = shutil.which("criu", path=os.environ.get("PATH", "") + ":" + SBIN) or ""
    found = [Criu(path, criu_version(path)) for path in (on_path, fetched) if path]
    for each in found:
        if numbers(each.version) >= LEAST_CRIU:
            return each
    return next((each for each in found if each.version), Criu("", ""))


def criu_version(path: str) -> str:
    """Return the version that a CRIU says it has, empty when it does not start."""
    match = re.search(r"^Version: (\S+)", run([path, "--version"])[1], re.MULTILINE)
    return match[1] if match else ""


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, to compare it by."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def checked(criu: Criu) -> Criu:
    """Return it with what `criu check` says."""
    if not criu.version:
        return criu
    code, said = run([criu.path, "check", *([] if os.geteuid() == 0 else ["--unprivileged"])])
    return criu._replace(ok=code == 0, said=said)


def run(command: list[str], text: str = "") -> tuple[int, str]:
    """Run a command and return its exit status and all that it said; 127 when it does not start."""
    try:
        done = subprocess.run(
            command,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return 127, str(exc)
    return done.returncode, done.stdout
