"""Writing a verb and waiting for it: a progress bar meanwhile, and Ctrl-C cancels.

The write stands in a thread of its own and blocks there as the `echo` of a shell would, and Ctrl-C
ends this process as it ends an echo: so whatever ends us, the mount sees it and cancels the job,
or leaves it to the others who wait for it. With `async` and polling a `kill -9` would leave the job
running, and a `cancel` of ours could end one that somebody else has joined.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn

from .cli_files import Files, answer, error_of, write
from .cli_table import bar
from .errors import Cancelled, KrgError

LOOK_S = 0.1
QUIET_S = 0.3
CLEAR = "\r\x1b[K"


class Progress:
    """One line on a terminal's stderr, drawn anew; nothing where stderr is not a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._since = time.monotonic()
        self._drawn = False
        self.is_seen = sys.stderr.isatty()

    @property
    def is_due(self) -> bool:
        return self.is_seen and time.monotonic() - self._since >= QUIET_S

    def draw(self, status: Mapping[str, str]) -> None:
        sys.stderr.write(CLEAR + bar(self.title, status, shutil.get_terminal_size().columns))
        sys.stderr.flush()
        self._drawn = True

    def clear(self) -> None:
        if self._drawn:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()
            self._drawn = False


class Writer:
    """A command that is being written into an open verb file by a thread of its own."""

    def __init__(self, fd: int, line: str) -> None:
        self.line = ""
        self.error: KrgError | None = None
        self._thread = threading.Thread(target=self._write, args=(fd, line), daemon=True)
        self._thread.start()

    def _write(self, fd: int, line: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            write(fd, line)
            self.line = answer(fd)
        except KrgError as exc:
            self.error = exc

    def is_over(self, wait_s: float) -> bool:
        self._thread.join(wait_s)
        return not self._thread.is_alive()


def submit(files: Files, path: str, line: str, title: str, follow: bool = True) -> str:
    """Have a verb done and return the line that its file reads back.

    With `follow` a job that goes on after the write is waited for as well. Ctrl-C ends the process,
    and by that the job.
    """
    progress = Progress(title)
    known = max(files.numbers("jobs"), default=0) if progress.is_seen else 0
    with files.opened(path) as fd:
        writer = Writer(fd, line)
        try:
            while not writer.is_over(LOOK_S):
                if progress.is_due and (status := _job_of(files, path, line, known)):
                    progress.draw(status)
        except KeyboardInterrupt:
            progress.clear()
            sys.stderr.write(f"krg: {title}: cancelled\n")
            die_of(signal.SIGINT)
        finally:
            progress.clear()
    job = running_job(writer.line, writer.error)
    if job and (follow or writer.error):
        return _followed(files, job, progress)
    if writer.error:
        raise writer.error
    return writer.line


def running_job(line: str, error: KrgError | None) -> str:
    """Return the job that goes on after a write, empty when none does.

    One that we were part of is told by the line read back; one whose writer was answered early,
    because its own tree was about to be frozen, by the sentence that came with EINTR.
    """
    if isinstance(error, Cancelled):
        said = error.message
    elif line.startswith("running "):
        said = line
    else:
        return ""
    _, _, rest = said.partition("jobs/")
    return rest[: len(rest) - len(rest.lstrip("0123456789"))]


def _followed(files: Files, job: str, progress: Progress) -> str:
    """Return what a job's outcome is when it has ended. Holds no file of the mount open while it
    waits: it may be dumped itself."""
    try:
        while (status := files.pairs("jobs", job, "status")).get("ended", "-") == "-":
            if progress.is_due:
                progress.draw(status)
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        cancel(files, job)
        progress.clear()
        sys.stderr.write(f"krg: {progress.title}: cancelled\n")
        die_of(signal.SIGINT)
    finally:
        progress.clear()
    line = status.get("outcome", "")
    if error := error_of(line):
        raise error
    return line


def cancel(files: Files, job: str) -> None:
    """Ask a job to end before its commit line."""
    with files.opened(files.path("jobs", job, "cancel")) as fd:
        write(fd, "1")


def die_of(number: int) -> NoReturn:
    """End as a signal's default action ends a process: the mount then cancels what we wait for."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def _job_of(files: Files, path: str, line: str, known: int) -> dict[str, str]:
    """Return the status of the running job that a write began or joined, empty while there is none
    to be seen.

    A tree has one job at a time, and a link to it. A restart is known by its words among the jobs
    that are newer than `known`.
    """
    try:
        link = files.link(os.path.dirname(path), "job")
        numbers = [int(link)] if link else reversed(files.numbers("jobs"))
        for number in numbers:
            status = files.pairs("jobs", str(number), "status")
            is_ours = bool(link) or (number > known and status.get("words") == line)
            if is_ours and status.get("ended") == "-":
                return status
    except KrgError:
        pass  # a job may be forgotten between two looks
    return {}
