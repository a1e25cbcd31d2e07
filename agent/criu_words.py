"""What CRIU's logs say, in sentences for a person: what, on what, why, what to do.

A log line is `(seconds) [pid:] [module:] text`. The line of an error seldom names its object: that
is in the lines before it (`4242 fdinfo 7: ...`, `Dumping task (pid: 4242 ...)`), so the log is read
from the top, remembering. The first error is the cause, what follows is its echo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from krgfs.errors import (
    CannotRunHere,
    Damaged,
    EngineFailed,
    Exists,
    KrgError,
    NoRoom,
    OverQuota,
    TryAgain,
    Unsupported,
)


class Complaint(NamedTuple):
    """Why CRIU failed: the error to raise, a sentence without a subject, and the errors' lines."""

    kind: type[KrgError]
    sentence: str
    lines: list[str]


class Rule(NamedTuple):
    """An error of CRIU and what it means. The sentence may name groups of the pattern (`{path}`)
    and what the lines before were about: `{where}` is "fd 7 (/a/file) of task 4242", or less."""

    pattern: re.Pattern[str]
    kind: type[KrgError]
    sentence: str


def _rule(pattern: str, kind: type[KrgError], sentence: str) -> Rule:
    return Rule(re.compile(pattern), kind, sentence)


# A full disk explains everything else, an error more than a warning (CRIU warns of every zombie);
# beyond that the first line counts that any rule knows.
FIRST_RANKS = 2
RULES: tuple[Rule, ...] = (
    # -- the machine
    _rule(
        r"No space left on device",
        NoRoom,
        "there is no room for its files; make room in the image store and try again",
    ),
    _rule(
        r"Disk quota exceeded",
        OverQuota,
        "the quota of the image store is used up; remove images and try again",
    ),
    _rule(
        r"Can't fork for (?P<pid>\d+): File exists",
        Exists,
        "pid {pid} is taken by another process; write pid=new for a private pid namespace",
    ),
    _rule(
        r"Unable to create a thread: -17",
        Exists,
        "the id of one of its threads is taken; write pid=new (or auto) for a private pid "
        "namespace",
    ),
    _rule(
        r"Current [sg]id (?P<pid>\d+) intersects with",
        Exists,
        "pid {pid}, which the image needs, was given to the keeper meanwhile; try again",
    ),
    _rule(
        r"Cannot allocate memory",
        TryAgain,
        "the machine has no memory left for it; make some free and try again",
    ),
    _rule(
        r"Unable to freeze cgroup|Timeout reached|unable to interrupt the current",
        TryAgain,
        "a task did not come to rest (it waits in the kernel, on a disk or network filesystem "
        "most likely); try again",
    ),
    _rule(
        r"Can't get rlimit \d+: Operation not permitted",
        Unsupported,
        "task {pid} runs under another uid than CRIU, which may then not read its limits without "
        "CAP_SYS_RESOURCE; give the agent that capability",
    ),
    _rule(
        r"execvp|failed to execute|No such file or directory: .*criu",
        EngineFailed,
        "CRIU cannot be started where the tree lives; it must be there under the same path",
    ),
    # -- tasks
    _rule(
        r"Unable to interrupt task: (?P<pid>\d+) \(Operation not permitted\)",
        Unsupported,
        "task {pid} cannot be traced: a debugger or strace has it already, or it belongs to "
        "another user namespace; detach that, then try again",
    ),
    _rule(
        r"Unable to interrupt task: (?P<pid>\d+) \(No such process\)",
        TryAgain,
        "task {pid} ended meanwhile; try again if the tree still lives",
    ),
    _rule(
        r"Can't dump nested (?P<what>\w+) namespace for (?P<pid>\d+)",
        Unsupported,
        "task {pid} is in a {what} namespace of its own, unlike the root of the tree; checkpoint "
        "the tree inside that namespace, or start it without",
    ),
    _rule(
        r"Can't dump (?:a )?(?P<what>pid|nested time) namespace",
        Unsupported,
        "the tree is in a {what} namespace that CRIU cannot enter; checkpoint it from inside",
    ),
    _rule(
        r"Zombies with threads|A root task is dead",
        TryAgain,
        "a task was just ending; try again",
    ),
    _rule(
        r"session leader of (?:zombie process )?(?P<pid>\d+)\(\d+\) is outside",
        Unsupported,
        "the session leader of task {pid} is outside its pid namespace; start the program with "
        "setsid",
    ),
    _rule(
        r"Can't infect \(pid: (?P<pid>\d+)\)",
        Unsupported,
        "task {pid} does not let CRIU's code in (a seccomp filter, no executable memory?); "
        "start it without that protection",
    ),
    _rule(
        r"PID (?P<pid>\d+) has uprobes vma",
        Unsupported,
        "task {pid} is being probed (uprobes of perf, bpftrace ...); end that, then try again",
    ),
    # -- memory
    _rule(
        r"Task (?P<pid>\d+) with SysVIPC shmem map",
        Unsupported,
        "task {pid} uses System V shared memory, which CRIU keeps only in an ipc namespace of the "
        "tree's own; start it in one (unshare -i), or use POSIX shared memory",
    ),
    _rule(
        r"Can't handle non-regular mapping on (?P<pid>\d+)'s map",
        Unsupported,
        "task {pid} has mapped a device into its memory (a GPU, InfiniBand ...); let it close "
        "the device first",
    ),
    _rule(
        r"Can't open .*map_files.*: Operation not permitted|Failed to resolve mapping",
        Unsupported,
        "a mapped file of task {pid} cannot be reached by CRIU; the agent needs "
        "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
    ),
    # -- connections
    _rule(
        r"Connected TCP socket, consider",
        Unsupported,
        "{where} is an established TCP connection; write tcp=keep or tcp=close",
    ),
    _rule(
        r"In-flight connection \(l\) for",
        TryAgain,
        "a connection was waiting to be accepted on {where}; try again, or write tcp=close",
    ),
    _rule(
        r"Unsupported proto 262",
        Unsupported,
        "{where} is a Multipath TCP socket; start the program with plain TCP "
        "(Go: GODEBUG=multipathtcp=0)",
    ),
    _rule(
        r"Unsupported proto (?P<what>\d+) for socket|Can't dump (?P<type>\d+) inet socket",
        Unsupported,
        "{where} is a socket of a protocol that CRIU does not know; let the program close it first",
    ),
    _rule(
        r"Unknown socket collected \(family (?P<what>\d+)\)|family (?P<f>\d+) .* are not collected",
        Unsupported,
        "{where} is a socket of family {what} (vsock, crypto, bluetooth ...), which CRIU does not "
        "know; let the program close it first",
    ),
    _rule(
        r"netlink: The socket has data to read",
        TryAgain,
        "{where} is a netlink socket with messages that the program has not read; try again",
    ),
    _rule(
        r"External socket is used|Can't dump half of stream unix|name-less external socket",
        Unsupported,
        "a unix socket of the tree is connected to a process outside it{peer}; checkpoint both "
        "together from the process above them, or let the program close it",
    ),
    _rule(
        r"Unix socket \d+ with(?:out| unreachable) peer|In-flight connection on",
        TryAgain,
        "{where} is a unix socket whose other end is just being connected or closed; try again",
    ),
    # -- files
    _rule(
        r"send_fds failed \(-22\)",
        Unsupported,
        "task {pid} has a descriptor that the kernel hands to nobody, io_uring most likely; start "
        "the program without it (UV_USE_IO_URING=0 for Node.js)",
    ),
    _rule(
        r"Can't create link remap for (?P<path>.+)\. Use",
        Unsupported,
        "{where} was deleted under that name and has others, which no restart could find again; "
        "give it a name there again (ln), or let the program close it",
    ),
    _rule(
        r"Can't dump ghost file (?P<path>.+) of (?P<size>\d+) size",
        Unsupported,
        "{where} is deleted and has {size} bytes, more than may be put into an image; let the "
        "program close it, or give it a name again",
    ),
    _rule(
        r"Unaccessible path opened|Can't stat path",
        Unsupported,
        "{where} was replaced by another file of that name while an old link of it remains; let "
        "the program open it anew",
    ),
    _rule(
        r"Can't lookup mount=.* path=/memfd:",
        Unsupported,
        "{where} is a memfd of huge pages, which CRIU does not save; start the program without",
    ),
    _rule(
        r"Can't lookup mount=\d+ for fd=(?P<fd>-?\d+) path=(?P<path>.*)",
        Unsupported,
        "{where} is on a mount that the tree does not see ({path}); let the program close it, or "
        "start it inside that mount namespace",
    ),
    _rule(
        r"Open files on overmounted mounts",
        Unsupported,
        "{where} is hidden below another mount; let the program close it",
    ),
    _rule(
        r"Can't dump file (?P<fd>\d+) of that type \[\w+\] \((?P<what>.*)\)",
        Unsupported,
        "{where} is of a kind that CRIU cannot save ({what}); let the program close it first",
    ),
    _rule(
        r"pidfd: pidfd pid (?P<other>-?\d+) is not a part",
        Unsupported,
        "{where} is a pidfd of process {other}, which is outside the tree; let the program close "
        "it, or checkpoint the process above both",
    ),
    _rule(
        r"Unresolved lock found pid (?P<pid>\d+)",
        Unsupported,
        "a lock on a file of the tree is held through a process outside it; release it first",
    ),
    _rule(
        r"packetized mode for pipes",
        Unsupported,
        "{where} is a pipe in packet mode (O_DIRECT); let the program close it first",
    ),
    # -- terminals
    _rule(
        r"Only one slave external peer",
        Unsupported,
        "the tree uses several terminals whose other ends are outside it; close all but one "
        "(redirect to files)",
    ),
    _rule(
        r"Found dangling tty|Found slave peer index|ctty inheritance detected"
        r"|No task found with sid",
        Unsupported,
        "the tree uses a terminal in a way that CRIU cannot repeat; start the program with setsid "
        "and its input and output redirected",
    ),
    # -- restore: what is not here, or not as it was
    _rule(
        r"File (?P<path>.+) has bad size (?P<now>\d+) \(expect (?P<then>\d+)\)",
        CannotRunHere,
        "/{path} has {now} bytes and had {then} when the image was made; put back the file as it "
        "was then",
    ),
    _rule(
        r"File (?P<path>.+) has bad build-ID",
        CannotRunHere,
        "/{path} is another build than the one that the program was started from; put that one "
        "back, or start the program anew",
    ),
    _rule(
        r"File (?P<path>.+) has bad mode (?P<now>\d+) \(expect (?P<then>\d+)\)",
        CannotRunHere,
        "/{path} has mode {now} and had {then} when the image was made; chmod it",
    ),
    _rule(
        r"Can't open file (?P<path>.+) on restore: (?P<why>.+)",
        CannotRunHere,
        "/{path} cannot be opened: {why}; the program had it open or as its directory",
    ),
    _rule(
        r"Can't link .+ -> (?P<path>.+): (?P<why>.+)",
        CannotRunHere,
        "/{path} was deleted when the image was made, and what was left of it is gone ({why})",
    ),
    _rule(
        r"Can't bind inet socket.*: Address already in use",
        Exists,
        "an address that it listens on is in use by another process (ss -ltnp shows by which); "
        "end that one first",
    ),
    _rule(
        r"Can't (?:bind|connect) inet socket.*: Cannot assign requested address",
        CannotRunHere,
        "an address of one of its sockets does not belong to this machine; restart it where it "
        "does",
    ),
    _rule(
        r"unix: Can't bind .*: Address already in use",
        Exists,
        "the name of one of its unix sockets is in use by another process; end that one first",
    ),
    _rule(
        r"Can't restore .* queue data",
        TryAgain,
        "one of its TCP connections was reset by a packet that came in between; try again",
    ),
    _rule(
        r"Connected TCP socket in image",
        CannotRunHere,
        "it has TCP connections that were neither kept nor closed; make another image with tcp=",
    ),
    _rule(
        r"Don't have tty to inherit session from",
        CannotRunHere,
        "it needs a terminal and was given none",
    ),
    _rule(
        r"[Cc]pu:? .*(?:not match|required|mismatch)|Core march mismatch|xsave",
        CannotRunHere,
        "this processor lacks what the program uses; restart it on the machine it came from or "
        "one like it",
    ),
    _rule(
        r"Unexpected EOF on|bytes while \d+ expected from|[Ii]mage (?:data )?corrupted"
        r"|Magic doesn't|Unknown image format|Can't read pages data|killed by signal 11",
        Damaged,
        "a file of the image is missing or not whole ({text}); take another version",
    ),
    _rule(
        r"\b(?P<pid>\d+) (?P<how>was killed by|exited with|was stopped by) (?P<number>\d+) unexp",
        TryAgain,
        "task {pid} {how} {number} while the tree was dumped; try again",
    ),
)

# What CRIU reports as an error and goes on: prlimit(2) of itself without CAP_SYS_RESOURCE.
HARMLESS = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE for self|\$XDG_RUNTIME_DIR not set")
ERROR = re.compile(r"\bError \((?P<source>[\w./-]+:\d+)\): (?P<text>.*)")
WARNING = re.compile(r"\bWarn +\(")
TASK = re.compile(r"(?:Dumping (?:task|core)|Collecting fds|Dumping opened files) \(pid: (\d+)")
OPEN_FD = re.compile(r"\b(\d+) fdinfo (\d+): ")
OPEN_PATH = re.compile(r"Dumping path for (-?\d+) fd via self \d+ \[(.*)\]")
RUNAWAY = re.compile(r"(?:Runaway socket|Ext \w+ .*): ino \d+ .* name (\S+)")
ECHO = re.compile(
    r"failed with -?\d+|FAILED|exited, status=|killed by signal 9|Unable to detach from"
    r"|Unable to open fd=|Message reply from daemon"
)


class _Scene:
    """What the lines read so far were about."""

    def __init__(self) -> None:
        self.pid = self.fd = self.path = self.peer = ""

    def read(self, line: str) -> None:
        if found := OPEN_FD.search(line):
            self.pid, self.fd, self.path = found[1], found[2], ""
        elif found := OPEN_PATH.search(line):
            self.path = found[2].removesuffix(" (deleted)")
        elif found := TASK.search(line):
            self.pid, self.fd, self.path = found[1], "", ""
        elif found := RUNAWAY.search(line):
            self.peer = found[1]

    def where(self, names: Mapping[int, int]) -> str:
        task = f"task {_outer(self.pid, names)}" if self.pid else "a task"
        path = f" ({self.path})" if self.path else ""
        if self.fd:
            return f"fd {self.fd}{path} of {task}"
        return f"a file{path} of {task}" if self.path else f"something of {task}"


def explain(log: str, names: Mapping[int, int] | None = None) -> Complaint:
    """Return why CRIU failed, by its log.

    `names` translates pids of the log into those that the reader knows, where CRIU ran in another
    pid namespace. An error that no rule knows is told in CRIU's own words.
    """
    names = names or {}
    scene = _Scene()
    candidates: list[tuple[tuple[bool, int], Complaint]] = []
    errors = []
    for line in log.splitlines():
        found = ERROR.search(line)
        if HARMLESS.search(line) or not (found or WARNING.search(line)):
            scene.read(line)
            continue
        text = found["text"] if found else line
        if found:
            errors.append(line)
        for rank, rule in enumerate(RULES):
            if match := rule.pattern.search(text):
                sentence = _sentence(rule, match, scene, names, text)
                weight = (found is None, min(rank, FIRST_RANKS))
                candidates.append((weight, Complaint(rule.kind, sentence, [])))
                break
    if candidates:
        _, best = min(candidates, key=lambda each: each[0])
        return best._replace(lines=errors)
    causes = [found["text"] for line in errors if (found := ERROR.search(line))]
    last = [text for text in causes if not ECHO.search(text)] or causes
    words = "; ".join(last[:3]) or "its log has no error; was it ended from outside?"
    return Complaint(EngineFailed, words, errors)


def _sentence(
    rule: Rule, match: re.Match[str], scene: _Scene, names: Mapping[int, int], text: str
) -> str:
    groups = {key: value or "" for key, value in match.groupdict().items()}
    pid = groups.pop("pid", "") or scene.pid
    known = {
        "pid": _outer(pid, names) if pid else "?",
        "where": scene.where(names),
        "peer": f" ({scene.peer})" if scene.peer else "",
        "text": text,
    }
    return rule.sentence.format(**{**known, **groups})


def _outer(pid: str, names: Mapping[int, int]) -> str:
    return str(names.get(int(pid), pid))


TIME = re.compile(r"^\(([\d.]+)\)", re.MULTILINE)


def frozen_ms_so_far(log: str) -> float:
    """Return for how long a dump has held its tree when it wrote the last line of its log."""
    seized = re.search(r"^\(([\d.]+)\) Seized task ", log, re.MULTILINE)
    times = TIME.findall(log[seized.start() :]) if seized else []
    return (float(times[-1]) - float(times[0])) * 1000 if times else 0.0


def lines_that_matter(log: str) -> list[str]:
    """Return all lines of a log: errors first, then warnings, then everything in its order."""
    lines = log.splitlines()
    errors = [line for line in lines if ERROR.search(line) and not HARMLESS.search(line)]
    warnings = [line for line in lines if WARNING.search(line) and not HARMLESS.search(line)]
    return [*errors, *warnings, *lines]
