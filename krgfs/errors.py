"""What can go wrong, by whose business it is to mend it.

    KrgError
    |-- BadWords         EINVAL        the words are wrong; nothing has happened
    |-- Gone             ESRCH         the process (or job, or image) is not there any more
    |-- NotYours         EPERM         it belongs to somebody else
    |-- Busy             EBUSY         another job holds the tree
    |-- Unsupported      EOPNOTSUPP    the tree holds something that cannot be dumped
    |-- TryAgain         EAGAIN        held off for now
    |-- CannotRunHere    ENOEXEC       the image does not fit this node
    |-- Exists           EEXIST        the app lives already, or a pid is taken
    |-- Unreachable      EHOSTUNREACH  the agent or node does not answer
    |-- TimedOut         ETIMEDOUT     it did not answer in time
    |-- NoRoom           ENOSPC        no room; nothing of the attempt stays
    |-- OverQuota        EDQUOT        the same, by a quota
    |-- Damaged          EBADMSG       the image is not whole, or not what its manifest says
    |-- Fenced           ESTALE        this agent's right to act has passed to another
    |-- Cancelled        EINTR         a signal ended the job before its commit line
    |   `-- Withdrawn    ECANCELED     a `cancel` did: not EINTR, at which programs write again
    |-- PartOfIt         EDEADLK       the writer is part of what it asks to freeze
    `-- EngineFailed     EIO           CRIU (or something below it) failed; job/log has its words

The message of each is a whole sentence for a person: what, on what, why, what to do. `fate` says
what became of the tree where a tree was concerned.
"""

from __future__ import annotations

import enum
import errno


class Fate(enum.StrEnum):
    """What became of the tree after an error."""

    RUNNING = "running"
    FROZEN = "frozen"
    STOPPED = "stopped"
    GONE = "gone"
    UNKNOWN = "unknown"


class KrgError(Exception):
    """Any refusal or failure that a caller is told about; see the module for the tree."""

    errno = errno.EIO
    exit_code = 1

    def __init__(self, message: str, *, fate: Fate | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fate = fate

    def __str__(self) -> str:
        return self.message if self.fate is None else f"{self.message} (the tree: {self.fate})"


class EngineFailed(KrgError):
    """CRIU failed: the job's log has its words, the lines that matter first."""


class BadWords(KrgError):
    """Say it again with other words; krgfs(5) has them all."""

    errno = errno.EINVAL
    exit_code = 2


class Gone(KrgError):
    """The process, job or image has ended or been removed."""

    errno = errno.ESRCH
    exit_code = 3


class NotYours(KrgError):
    """Ask its owner, or be root."""

    errno = errno.EPERM
    exit_code = 4


class Busy(KrgError):
    """Wait for the other job, or cancel it."""

    errno = errno.EBUSY
    exit_code = 5


class Unsupported(KrgError):
    """The tree holds what cannot be dumped; the message names it and the remedy."""

    errno = errno.EOPNOTSUPP
    exit_code = 6


class TryAgain(KrgError):
    """Held off for now: a fork in flight, a task that does not come to rest. Try again."""

    errno = errno.EAGAIN
    exit_code = 7


class CannotRunHere(KrgError):
    """This image cannot run on this node: processor, kernel, missing or changed files."""

    errno = errno.ENOEXEC
    exit_code = 8


class Exists(KrgError):
    """The app lives already, the name is in use, or a pid is taken."""

    errno = errno.EEXIST
    exit_code = 9


class Unreachable(KrgError):
    """The agent does not answer: is it up?"""

    errno = errno.EHOSTUNREACH
    exit_code = 10


class TimedOut(KrgError):
    """It did not answer in time."""

    errno = errno.ETIMEDOUT
    exit_code = 10


class NoRoom(KrgError):
    """Make room in the store and try again; nothing of the attempt stays."""

    errno = errno.ENOSPC
    exit_code = 11


class OverQuota(NoRoom):
    """The same, by a quota."""

    errno = errno.EDQUOT


class Damaged(KrgError):
    """The image is incomplete, damaged, or was not made by this agent."""

    errno = errno.EBADMSG
    exit_code = 12


class Fenced(KrgError):
    """Another agent has the right to act now."""

    errno = errno.ESTALE
    exit_code = 13


class PartOfIt(KrgError):
    """The writer is part of the tree that it asks to freeze; let somebody outside ask."""

    errno = errno.EDEADLK
    exit_code = 14


class Cancelled(KrgError):
    """A signal to its caller ended the job before its commit line; the tree runs."""

    errno = errno.EINTR
    exit_code = 130


class Withdrawn(Cancelled):
    """Somebody wrote to the job's `cancel`; the tree runs."""

    errno = errno.ECANCELED


ALL: tuple[type[KrgError], ...] = (
    EngineFailed,
    BadWords,
    Gone,
    NotYours,
    Busy,
    Unsupported,
    TryAgain,
    CannotRunHere,
    Exists,
    Unreachable,
    TimedOut,
    NoRoom,
    OverQuota,
    Damaged,
    Fenced,
    PartOfIt,
    Cancelled,
    Withdrawn,
)
_BY_ERRNO = {cls.errno: cls for cls in ALL}


def from_errno(number: int, message: str, fate: Fate | None = None) -> KrgError:
    """Return the error of the tree that has this errno; an unknown one is EngineFailed."""
    return _BY_ERRNO.get(number, EngineFailed)(message, fate=fate)


def name_of(number: int) -> str:
    """Return the symbolic name of an errno, as the read-back of a verb file shows it."""
    return _NAMES.get(number) or errno.errorcode.get(number, str(number))


def first_of(group: BaseException) -> BaseException:
    """Return the first exception that is not a group: nurseries may put groups into groups."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


# Where Linux has two names for a number, the one that the manual pages use.
_NAMES = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK", errno.EAGAIN: "EAGAIN"}
