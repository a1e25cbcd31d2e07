"""The values that both sides share: frozen structs and enums, and which job phase may follow which.

No I/O here. Sizes are bytes, times are seconds since the epoch (UTC), durations end in _ms or _s.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from .errors import Fate

NOBODY = 65534


@functools.lru_cache(maxsize=4096)
def instant(seconds: float) -> str:
    """Write a time as 2026-01-31T12:00:00.123Z, or - when there is none."""
    if not seconds:
        return "-"
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all values: immutable, compared by content, encoded by msgspec."""


class Caller(Value, frozen=True, kw_only=True):
    """Who asked, as the kernel told the mount at open: credentials, process and its start.

    `pid` is the thread group, `tid` the thread that is blocked in the request.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    pid: int = 0
    tid: int = 0
    start: int = 0
    foreign_pid_ns: bool = False

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def owns(self, uid: int) -> bool:
        return self.uid in (0, uid)


class ProcessId(Value, frozen=True, kw_only=True):
    """A process for ever: pid, start time (clock ticks since boot, proc(5) field 22), boot id."""

    pid: int
    start: int
    boot: str


class Phase(enum.StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    FREEZING = "freezing"
    DUMPING = "dumping"
    STORING = "storing"
    RESTORING = "restoring"
    READING = "reading"
    FINISHING = "finishing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (Phase.DONE, Phase.FAILED, Phase.CANCELLED)


FINAL = (Phase.DONE, Phase.FAILED, Phase.CANCELLED)
FOLLOWS: Mapping[Phase, tuple[Phase, ...]] = {
    Phase.QUEUED: (
        Phase.FREEZING,
        Phase.DUMPING,
        Phase.RESTORING,
        Phase.STORING,
        Phase.READING,
        Phase.FINISHING,
        *FINAL,
    ),
    Phase.FREEZING: (Phase.DUMPING, Phase.FINISHING, *FINAL),
    Phase.DUMPING: (Phase.STORING, *FINAL),
    Phase.STORING: (Phase.FINISHING, *FINAL),
    Phase.RESTORING: (Phase.FINISHING, *FINAL),
    Phase.READING: (Phase.FINISHING, *FINAL),
    Phase.FINISHING: FINAL,
    Phase.DONE: (),
    Phase.FAILED: (),
    Phase.CANCELLED: (),
}


class Job(Value, frozen=True, kw_only=True):
    """One accepted verb and its progress. `line` is what the verb file reads back."""

    id: int
    verb: str
    object: str
    node: str
    uid: int
    words: str
    started: float
    caller: Caller | None = None
    phase: Phase = Phase.QUEUED
    ended: float = 0.0
    errno: int = 0
    line: str = ""
    message: str = ""
    fate: Fate | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    freeze_ms: float = 0.0
    downtime_ms: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.phase.is_final


class Moved(Value, frozen=True, kw_only=True):
    """A task that was put into another cgroup: where from (directory, all of one hierarchy)."""

    pid: int
    start: int
    origin: str


class Frozen(Value, frozen=True, kw_only=True):
    """How a tree is frozen, enough to thaw it after any crash.

    `cgroup` is the directory whose freezer holds it (cgroup v1 or v2 by `version`); `leaf` tells
    that it is ours and goes away with the thaw, when the `moved` tasks are back in their origins.
    `placeholders` are processes of ours that keep emptied cgroups alive meanwhile.
    """

    cgroup: str
    version: int
    leaf: bool
    moved: tuple[Moved, ...] = ()
    placeholders: tuple[ProcessId, ...] = ()


class TreeState(enum.StrEnum):
    RUNNING = "running"
    FROZEN = "frozen"
    ENDED = "ended"


class Tree(Value, frozen=True, kw_only=True):
    """What the agent knows of a tree beyond what /proc says.

    There is one for every tree that was ever checkpointed, frozen, restarted or started on this
    boot and that is remembered; `outcomes` maps a verb to the line that its file reads back.
    `inner_pid` differs from `pid` where the tree lives in a private pid namespace. `holder` is the
    job whose open handle keeps it frozen (freeze while-open).
    """

    id: ProcessId
    uid: int = 0
    app: str = ""
    state: TreeState = TreeState.RUNNING
    frozen: Frozen | None = None
    frozen_since: float = 0.0
    frozen_until: float = 0.0
    last_image: str = ""
    last_error: str = ""
    last_job: int = 0
    ended: str = ""
    keeper: ProcessId | None = None
    keeper_dir: str = ""
    inner_pid: int = 0
    holder: int = 0
    outcomes: dict[str, str] = {}

    @property
    def pid(self) -> int:
        return self.id.pid


class Policy(Value, frozen=True, kw_only=True):
    """Which images of an app stay; 0 is no bound. Bytes are stored ones, as the images say."""

    keep: int = 0
    keep_bytes: int = 0
    max_age_s: int = 0


class App(Value, frozen=True, kw_only=True):
    """A name for images, the uid that it belongs to, and the one life that it may have.

    `next_version` only rises: a removed version's number is not given out again. `policy` has the
    fields of Policy that somebody has written; the others are the node's.
    """

    name: str
    uid: int
    gid: int = 0
    next_version: int = 1
    labels: dict[str, int] = {}
    incarnation: ProcessId | None = None
    members: tuple[ProcessId, ...] = ()
    policy: dict[str, int] = {}


class Image(Value, frozen=True, kw_only=True):
    """One committed version, as listings show it; the manifest has the rest.

    `own` is true when this agent dumped it itself (an import is never own). `new_bytes` of the
    stored ones nobody had stored before. `damaged` names what does not match the manifest, empty
    while nothing is known to be wrong.
    """

    app: str
    version: int
    created: float
    node: str
    uid: int
    gid: int = 0
    freeze_ms: float = 0.0
    logical_bytes: int = 0
    stored_bytes: int = 0
    new_bytes: int = 0
    copies: int = 1
    desc: str = ""
    digest: str = ""
    own: bool = False
    damaged: str = ""

    @property
    def ref(self) -> str:
        return f"{self.app}/v{self.version}"


class Import(Value, frozen=True, kw_only=True):
    """A version that is being copied in and is not an image yet: `vN` or `vN.part`."""

    app: str
    name: str
    uid: int
    gid: int = 0
    created: float = 0.0


class ImageFile(Value, frozen=True, kw_only=True):
    """One file of an image: name relative to the version's directory, size and blocks stored."""

    name: str
    size: int
    stored_bytes: int = 0


class Load(Value, frozen=True, kw_only=True):
    cpus: int = 0
    load1: float = 0.0
    running: int = 0
    memory_total: int = 0
    memory_available: int = 0
    pressure: float = 0.0
    processes: int = 0
    measured: float = 0.0


class Node(Value, frozen=True, kw_only=True):
    """A machine with an agent: its state word with what belongs to it, facts, and last load;
    `policy` is that of apps for which nobody has written one."""

    name: str
    state: str = "online"
    unmanaged: int = 0
    info: dict[str, str] = {}
    load: Load = Load()
    policy: Policy = Policy()

    def policy_of(self, app: App) -> Policy:
        """Return what holds for an app."""
        return msgspec.structs.replace(self.policy, **app.policy)


class Store(Value, frozen=True, kw_only=True):
    """Room in the image store: bytes, as statfs(2) of the store says; and what it holds, `kind` the
    kind of its back end, `last_sweep` and `last_verify` of this node."""

    total: int = 0
    free: int = 0
    available: int = 0
    files: int = 0
    files_free: int = 0
    kind: str = ""
    packs: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    last_sweep: float = 0.0
    last_verify: float = 0.0


class LogLine(Value, frozen=True, kw_only=True):
    """One line of /krg/log."""

    time: float
    job: int
    uid: int
    text: str


class Event(Value, frozen=True, kw_only=True):
    """One line of /krg/events: `facts` is a flat JSON object that has time and kind in it."""

    serial: int
    uid: int
    facts: dict[str, Any]


class View(Value, frozen=True, kw_only=True):
    """All that a mount renders, as the agent last told it. Replaced as a whole, never changed."""

    node: str = ""
    nodes: Mapping[str, Node] = {}
    trees: Mapping[int, Tree] = {}
    apps: Mapping[str, App] = {}
    images: Mapping[str, Mapping[int, Image]] = {}
    imports: Mapping[str, Mapping[str, Import]] = {}
    jobs: Mapping[int, Job] = {}
    log: tuple[LogLine, ...] = ()
    events: tuple[Event, ...] = ()
    metrics: Mapping[str, float] = {}
    store: Store = Store()
    connected: bool = False
