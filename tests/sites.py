"""A krgfs of its own for a test: agent and mount as child processes, with their own directories.

Nothing here touches a running /krg, and two sites at once do not meet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEADLINE_S = 30.0


class Stuck(AssertionError):
    """A condition did not come true in time."""


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_S) -> object:
    """Return the condition's first true value; Stuck names `what` when it does not come."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Stuck(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)


class Site:
    """One agent and one mount. A context manager that leaves nothing behind."""

    def __init__(
        self, freezer: str = "auto", node: str = "n1", options: tuple[str, ...] = ()
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="krg-site-"))
        self.mnt = self.base / "krg"
        self.state = self.base / "state"
        self.run = self.base / "run"
        self.node = node
        self.program = [str(BIN / "krg-agent")]
        self.mount_program = [str(BIN / "krgfs")]
        self.environment: dict[str, str] = {}
        self._freezer = freezer
        self._options = options
        self.agent: subprocess.Popen[bytes] | None = None
        self.mount: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Site:
        try:
            self.start_agent()
            self.start_mount()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop_mount()
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        self.stop_agent()
        for keeper in self.keepers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGKILL)
        subprocess.run(["umount", "-l", str(self.mnt)], capture_output=True, check=False)
        subprocess.run(["chattr", "-i", str(self.mnt)], capture_output=True, check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    # -- the two daemons

    def start_agent(self, *options: str) -> None:
        command = [*self.program, "--state", str(self.state), "--run", str(self.run)]
        command += ["--node", self.node, "--freezer", self._freezer, *self._options, *options]
        self.agent = self._daemon(command, "agent.log")
        until(lambda: self._is_up(self.agent, (self.run / "agent.sock").exists()), "agent up")

    def start_mount(self) -> None:
        command = [*self.mount_program, str(self.mnt), "--socket", str(self.run / "agent.sock")]
        self.mount = self._daemon(command, "mount.log")
        state = self.mnt / "nodes" / self.node / "state"
        until(lambda: self._is_up(self.mount, _read(state).startswith("online")), "mount connected")

    def stop_agent(self, number: int = signal.SIGTERM) -> None:
        self._stop(self.agent, number)
        with contextlib.suppress(FileNotFoundError):
            (self.run / "agent.sock").unlink()

    def stop_mount(self, number: int = signal.SIGTERM) -> None:
        self._stop(self.mount, number)

    def _daemon(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with open(self.base / log, "ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd="/",
                env={**os.environ, **self.environment},
            )

    def _is_up(self, process: subprocess.Popen[bytes] | None, ready: bool) -> bool:
        assert process is not None
        if process.poll() is not None:
            raise AssertionError(f"a daemon ended:\n{self.logs()}")
        return ready

    @staticmethod
    def _stop(process: subprocess.Popen[bytes] | None, number: int) -> None:
        if process is not None and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    def logs(self) -> str:
        return "".join(
            f"--- {name}\n{_read(self.base / name)[-6000:]}\n"
            for name in ("agent.log", "mount.log")
        )

    def keepers(self) -> list[int]:
        """Return the keepers that belong to this site's run directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes()
                    if b"krg-keeper" in line and os.fsencode(self.run) in line:
                        found.append(int(entry.name))
        return found

    # -- the tree of files

    def proc(self, pid: int) -> Path:
        return self.mnt / "procs" / str(pid)

    def write(self, path: str | Path, text: str) -> str:
        """Write one line in a child process, as `echo` does, and read the file back."""
        target = self.mnt / path
        fd = os.open(target, os.O_WRONLY)
        try:
            os.write(fd, f"{text}\n".encode())
        finally:
            os.close(fd)
        return self.read(path)

    def read(self, path: str | Path) -> str:
        return _read(self.mnt / path)

    def facts(self, path: str | Path) -> dict[str, str]:
        """Return a flat-keyed file as a mapping."""
        pairs = (line.partition(" ") for line in self.read(path).splitlines())
        return {key: value for key, _, value in pairs}

    def sh(self, script: str, shell: str = "bash", **env: str) -> subprocess.CompletedProcess[str]:
        """Run what a person types, with $K as the mountpoint."""
        return subprocess.run(
            [shell, "-c", script],
            env={**os.environ, "K": str(self.mnt), "LC_ALL": "C", **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def gone(pid: int) -> bool:
    """Tell whether nothing holds a pid any more."""
    return not Path(f"/proc/{pid}").exists()


@contextlib.contextmanager
def sleeper(**popen: object) -> Iterator[int]:
    """A small process in its own session, with its descriptors on /dev/null."""
    process = subprocess.Popen(
        ["sleep", "1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **popen,  # type: ignore[call-overload]
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
