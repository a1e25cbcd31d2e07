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

LOOK_S, FOLLOW_S = 0.2, 0.05
QUIET_S = 0.3
LOOKED_AT = 64
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

    With `follow` a job that goes on after the write is waited for as well, without it the line
    names the job. Ctrl-C ends the process, and by that the job.
    """
    progress = Progress(title)
    known = max(files.numbers("jobs"), default=0)
    with files.opened(path) as fd:
        writer = Writer(fd, line)
        try:
            while not writer.is_over(LOOK_S):
                if progress.is_due and (job := job_of(files, path, line, known)):
                    progress.draw(job)
        except KeyboardInterrupt:
            progress.clear()
            sys.stderr.write(f"krg: {title}: interrupted, the job is being cancelled\n")
            die_of(signal.SIGINT)
        finally:
            progress.clear()
    if writer.error:
        if number := named_job(writer.error):
            return _followed(files, number, progress)
        raise writer.error
    job = job_of(files, path, line, known)
    if not job:
        return writer.line
    return _followed(files, job["id"], progress) if follow else f"running jobs/{job['id']}"


def named_job(error: KrgError) -> str:
    """Return the job that goes on although its write has ended with an error, empty when none does.

    A writer whose own tree is about to be frozen is answered early; the sentence names the job.
    """
    if not isinstance(error, Cancelled):
        return ""
    _, _, rest = error.message.partition("jobs/")
    return rest[: len(rest) - len(rest.lstrip("0123456789"))]


def _followed(files: Files, job: str, progress: Progress) -> str:
    """Return what a job's outcome is when it has ended. Holds no file of the mount open while it
    waits: it may be dumped itself."""
    try:
        while (status := files.pairs("jobs", job, "status")).get("ended", "-") == "-":
            if progress.is_due:
                progress.draw(status)
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        cancel(files, job)
        progress.clear()
        sys.stderr.write(f"krg: {progress.title}: interrupted, the job is being cancelled\n")
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


def job_of(files: Files, path: str, line: str, known: int) -> dict[str, str]:
    """Return the status of the job that a write began or joined, empty when none is to be seen.

    It has our words and our object, and is newer than `known` or has not ended. (The verb file
    reads back what its last job came to, and that may be another's by now.)
    """
    verb, (*_, kind, name) = os.path.basename(path), os.path.dirname(path).split("/")
    try:
        for number in files.numbers("jobs")[: -LOOKED_AT - 1 : -1]:
            job = files.pairs("jobs", str(number), "status")
            is_ours = kind != "procs" or job.get("object", "").endswith(f"procs/{name}")
            is_new = number > known or job.get("ended") == "-"
            if is_new and is_ours and (job.get("verb"), job.get("words")) == (verb, line):
                return job
    except KrgError:
        pass  # a job may be forgotten between two looks
    return {}
