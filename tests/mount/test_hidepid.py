"""Who may read `status` where /proc is mounted with hidepid: a mount in a namespace of its own."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sites import Site, sleeper, until

ANNA = 61003
MOUNTINFO = Path("/proc/self/mountinfo")

REPLACED = 'umount -l /proc && mount -t proc -o "$0" proc /proc && exec "$@"'
COVERED = 'mount -t proc -o "$0" proc /proc && exec "$@"'


class Apart(Site):
    """A site whose mount has a /proc of its own, in a mount namespace that it leaves to nobody."""

    def __init__(self, options: str, script: str) -> None:
        super().__init__()
        self.base.chmod(0o755)
        apart = ["unshare", "--mount", "--propagation", "private"]
        self.mount_program = [*apart, "sh", "-c", script, options, *self.mount_program]
        self.target = self.mnt

    def start_mount(self) -> None:
        command = [*self.mount_program, str(self.target), "--socket", str(self.run / "agent.sock")]
        self.mount = self._daemon(command, "mount.log")
        within = Path(f"/proc/{self.mount.pid}/root{self.target}")
        state = within / "nodes" / self.node / "state"
        until(lambda: self._is_up(self.mount, _is_online(state)), "mount connected")
        self.mnt = within

    def inside(self, *command: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace of the mount, as a user."""
        assert self.mount is not None
        enter = ["nsenter", "--mount", "--target", str(self.mount.pid)]
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        return subprocess.run(
            [*enter, *(drop if uid else ()), *command],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            cwd="/",
            start_new_session=True,
        )

    def _clean_up(self) -> None:
        self.mnt = self.target
        super()._clean_up()


def _is_online(state: Path) -> bool:
    with contextlib.suppress(OSError):
        return state.read_text().startswith("online")
    return False


@pytest.fixture
def annas() -> Iterator[int]:
    with sleeper(user=ANNA, group=ANNA, extra_groups=[], cwd="/") as pid:
        yield pid


def apart(options: str, script: str) -> Apart:
    """Return such a site, and fail if the machine's own /proc is not as open as it has to be."""
    assert "hidepid" not in MOUNTINFO.read_text()
    return Apart(options, script)


def is_apart(site: Apart) -> bool:
    """Tell that neither the mount nor its /proc can be seen from here."""
    seen = MOUNTINFO.read_text()
    return str(site.base) not in seen and "hidepid" not in seen


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


HIDING = [
    pytest.param("hidepid=2", REPLACED, id="invisible"),
    pytest.param("hidepid=1", REPLACED, id="noaccess"),
    pytest.param("hidepid=ptraceable", REPLACED, id="ptraceable"),
    pytest.param("hidepid=2", COVERED, id="covered"),
]


@pytest.mark.parametrize(("options", "script"), HIDING)
def test_status_is_its_owners_where_pids_are_hidden(annas: int, options: str, script: str) -> None:
    with apart(options, script) as site, sleeper() as pid:
        assert ",hidepid=" in site.inside("cat", str(MOUNTINFO)).stdout
        assert not any(site.target.iterdir()) and is_apart(site)
        for ours in (f"procs/{pid}", f"nodes/{site.node}/procs/{pid}"):
            assert mode(site.mnt / ours / "status") == 0o400
            path = str(site.target / ours / "status")
            done = site.inside("cat", path, uid=ANNA)
            assert (done.returncode, done.stdout) == (1, "") and "Permission denied" in done.stderr
            done = site.inside("cat", path)
            assert done.returncode == 0 and f"pid {pid}\n" in done.stdout
        hers = site.target / "procs" / str(annas) / "status"
        assert site.inside("stat", "-c", "%a %u", str(hers)).stdout == f"400 {ANNA}\n"
        for uid in (0, ANNA):
            done = site.inside("cat", str(hers), uid=uid)
            assert done.returncode == 0 and f"pid {annas}\n" in done.stdout
        site.stop_mount()
        assert is_apart(site)


@pytest.mark.parametrize("script", [REPLACED, COVERED], ids=["replaced", "covered"])
@pytest.mark.parametrize("options", ["rw", "hidepid=0"])
def test_status_is_everybodys_where_pids_are_not_hidden(options: str, script: str) -> None:
    with apart(options, script) as site, sleeper() as pid:
        assert mode(site.proc(pid) / "status") == 0o444
        done = site.inside("cat", str(site.target / "procs" / str(pid) / "status"), uid=ANNA)
        assert done.returncode == 0 and f"pid {pid}\n" in done.stdout


def test_status_is_everybodys_on_a_mount_beside_it(shared_site: Site) -> None:
    with apart("hidepid=2", REPLACED), sleeper() as pid:
        assert mode(shared_site.proc(pid) / "status") == 0o444
