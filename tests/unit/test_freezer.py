"""Real trees in the cgroup freezers of this machine, v2 and v1: frozen, thawed, and left halfway.

A counting program shows whether it runs: what it has counted stands in a file that grows a byte at
a time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import trio

from agent import cgroups, procs
from agent.criu import Engine
from agent.freezer import Freezer
from krgfs import facts
from krgfs.errors import Busy, EngineFailed, Fate, Gone, PartOfIt, TryAgain, Unsupported
from krgfs.model import Frozen, Moved
from tests.unit.test_procs import playground, until

COUNT = """
def enter(place):
    open(os.path.join(place, "cgroup.procs"), "w").write(str(os.getpid()))
def count(place="", file="/dev/null"):
    if place:
        enter(place)
    with open(file, "ab", buffering=0) as out:
        while True:
            out.write(b".")
            time.sleep(0.001)
"""


@pytest.fixture
def play(tmp_path):
    with playground(tmp_path) as found:
        yield found


@pytest.fixture(params=["v2", "v1"])
def freezer(request):
    try:
        return Freezer.find(request.param)
    except Unsupported as exc:
        return pytest.skip(exc.message)


@pytest.fixture
def make(play, freezer):
    """Make cgroups of this test's own."""

    def cgroup(name: str = "") -> str:
        place = f"{freezer.hierarchy.mount}/{play.mark}{name}"
        os.makedirs(place, exist_ok=True)
        return place

    return cgroup


class Kept:
    """What was recorded, as a journal has it: with what was true on the machine just then."""

    def __init__(self) -> None:
        self.frozen: list[Frozen] = []
        self.leaf_was_there: list[bool] = []

    async def __call__(self, frozen: Frozen) -> None:
        await trio.lowlevel.checkpoint()
        self.frozen.append(frozen)
        self.leaf_was_there.append(os.path.isdir(frozen.cgroup))


def where(freezer: Freezer, *pids: int) -> list[str | None]:
    return [freezer.hierarchy.directory(pid) for pid in pids]


def runs(file: Path) -> bool:
    before = file.stat().st_size
    time.sleep(0.03)
    return file.stat().st_size > before


def waits_for(file: Path) -> None:
    until(lambda: file.exists() and file.stat().st_size, "counting")


async def test_a_tree_rests_in_a_leaf_and_runs_on_where_it_was(play, freezer, make):
    place, file = make(), play.directory / "count"
    play.run(COUNT + f"enter({place!r}); say(1); rest()")  # somebody else in there
    root, son = play.run(
        COUNT + f"enter({place!r}); son = child(lambda: count(file={str(file)!r}))\n"
        "say(os.getpid(), son); rest()"
    )
    waits_for(file)
    tree, kept = procs.look(root), Kept()

    frozen = await freezer.freeze(tree, play.mark, kept)

    assert frozen == kept.frozen[-1]
    assert (frozen.cgroup, frozen.leaf) == (f"{place}/krg-{play.mark}", True)
    assert kept.leaf_was_there[0] is False
    assert {(each.pid, each.origin) for each in frozen.moved} == {(root, place), (son, place)}
    assert where(freezer, root, son) == [frozen.cgroup] * 2
    assert freezer.is_frozen(frozen)
    assert procs.fate(tree) is Fate.FROZEN
    assert not runs(file)

    for _ in range(2):
        await freezer.thaw(frozen)
        assert where(freezer, root, son) == [place] * 2
        assert not os.path.exists(frozen.cgroup)
        assert not freezer.is_frozen(frozen)
        assert procs.fate(tree) is Fate.RUNNING
        assert runs(file)


async def test_a_cgroup_that_the_tree_fills_is_frozen_itself(play, freezer, make):
    place, below, file = make(), make("/below"), play.directory / "count"
    root, son = play.run(
        COUNT + f"enter({place!r}); wait_for_zombie(child(lambda: None))\n"
        f"son = child(lambda: count({below!r}, {str(file)!r})); say(os.getpid(), son); rest()"
    )
    waits_for(file)
    kept = Kept()

    frozen = await freezer.freeze(procs.look(root), play.mark, kept)

    assert frozen == Frozen(cgroup=place, version=freezer.hierarchy.version, leaf=False)
    assert kept.frozen == [frozen]
    assert where(freezer, root, son) == [place, below]
    assert not runs(file)
    assert procs.fate(procs.look(root)) is Fate.FROZEN
    await freezer.thaw(frozen)
    await freezer.thaw(frozen)
    assert runs(file)


async def test_a_stranger_in_the_cgroup_runs_on(play, freezer, make):
    place, file = make(), play.directory / "count"
    play.run(COUNT + f"say(1); count({place!r}, {str(file)!r})")
    waits_for(file)
    (root,) = play.run(COUNT + f"enter({place!r}); say(os.getpid()); rest()")
    frozen = await freezer.freeze(procs.look(root), play.mark, Kept())
    assert frozen.leaf
    assert runs(file)
    await freezer.thaw(frozen)


@pytest.fixture
def inherited():
    """A descriptor as a careless starter leaves it open for all that come after."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    yield
    os.close(reader)
    os.close(writer)


async def test_tasks_of_several_cgroups_share_a_leaf_and_go_back_each_to_its_own(
    play, freezer, make, inherited
):
    above, one, two = make(), make("/one"), make("/two")
    play.run(COUNT + f"enter({two!r}); say(1); rest()")  # two is not emptied
    play.run(COUNT + f"enter({above!r}); say(1); rest()")
    root, son = play.run(
        COUNT
        + f"enter({one!r}); son = child(lambda: count({two!r})); say(os.getpid(), son); rest()"
    )
    until(lambda: where(freezer, son) == [two], "entered")

    kept = Kept()
    frozen = await freezer.freeze(procs.look(root), play.mark, kept)

    assert frozen.cgroup == f"{above}/krg-{play.mark}"
    (placeholder,) = frozen.placeholders
    assert cgroups.members(one) == {placeholder.pid}, "an emptied cgroup is kept alive"
    assert kept.frozen[0].placeholders == frozen.placeholders, "recorded before it mattered"
    until(lambda: facts.task(placeholder.pid).comm == b"sleep", "settled")
    until(
        lambda: [fd for fd, _ in facts.descriptors(placeholder.pid)] == [0, 1, 2],
        "no descriptors of ours",
    )
    assert facts.task(placeholder.pid).sid == placeholder.pid
    await freezer.thaw(frozen)
    assert where(freezer, root, son) == [one, two]
    assert facts.task(placeholder.pid) is None, "ended and reaped"


async def test_a_frozen_trees_orphans_are_those_of_the_cgroup_that_it_came_from(
    play, freezer, make
):
    place = make()
    root, left = play.run(
        COUNT
        + f"""
def service():
    os.setsid()
    enter({place!r})
    os.write(writer, b"%d" % orphan(lambda: (os.setsid(), rest())))
    rest()
reader, writer = os.pipe()
root = child(service)
say(root, int(os.read(reader, 20)))
rest()
"""
    )
    until(lambda: facts.task(left).sid == left, "a daemon")
    frozen = await freezer.freeze(procs.look(root), f"{root}.1", Kept())
    assert where(freezer, root, left) == [f"{place}/krg-{root}.1", place]
    assert [task.pid for task, _ in procs.orphans(procs.look(root))] == [left]
    await freezer.thaw(frozen)


async def test_a_tree_that_forks_all_the_time_is_caught_whole(play, freezer, make):
    place = make()
    play.run(COUNT + f"enter({place!r}); say(1); rest()")
    (root,) = play.run(
        COUNT
        + f"""
enter({place!r})
def breed():
    while True:
        pid = child(lambda: child(lambda: None))
        os.waitpid(pid, 0)
for _ in range(4):
    child(breed)
say(os.getpid())
rest()
"""
    )
    for _ in range(5):
        kept = Kept()
        frozen = await freezer.freeze(procs.look(root), play.mark, kept)
        tree = procs.look(root)
        live = {task.pid for task in tree.live}
        assert live <= cgroups.members(frozen.cgroup)
        assert live <= {each.pid for each in frozen.moved}
        assert procs.look(root).pids == tree.pids, "nobody is born or dies any more"
        await freezer.thaw(frozen)
        assert not os.path.exists(frozen.cgroup)
        assert live & cgroups.members(place), "they go on where they were"


async def test_new_tasks_are_recorded_before_they_are_moved(play, freezer, make):
    place, also = make(), make("/also")
    play.run(COUNT + f"enter({place!r}); say(1); rest()")
    (root,) = play.run(
        COUNT + f"enter({place!r})\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: child(lambda: (enter({also!r}), rest())))\n"
        "say(os.getpid()); rest()"
    )
    records: list[Frozen] = []

    async def record(frozen: Frozen) -> None:
        await trio.lowlevel.checkpoint()
        records.append(frozen)
        if len(records) == 1:
            os.kill(root, signal.SIGUSR1)
            until(lambda: cgroups.members(also) - {root}, "a child in another cgroup")
        else:
            (late,) = facts.children(root)
            assert where(freezer, late) == [also], "recorded, not moved yet"

    frozen = await freezer.freeze(procs.look(root), play.mark, record)
    (late,) = facts.children(root)
    assert len(records) == 2
    assert {each.pid: each.origin for each in frozen.moved} == {root: place, late: also}
    assert len(frozen.placeholders) == 1
    await freezer.thaw(frozen)
    assert where(freezer, root, late) == [place, also]


@pytest.mark.parametrize("failing", [1, 2])
async def test_a_failed_record_undoes_all(play, freezer, failing):
    home = freezer.hierarchy.mount
    (root,) = play.run(
        "signal.signal(signal.SIGUSR1, lambda *_: child()); say(os.getpid()); rest()"
    )
    calls = 0

    async def record(frozen: Frozen) -> None:
        nonlocal calls
        await trio.lowlevel.checkpoint()
        calls += 1
        if calls == failing:
            raise EngineFailed("the journal is full")
        os.kill(root, signal.SIGUSR1)
        until(lambda: facts.children(root), "a child that has to be recorded")

    with pytest.raises(EngineFailed, match="the journal is full") as caught:
        await freezer.freeze(procs.look(root), play.mark, record)
    assert caught.value.fate is Fate.RUNNING
    assert calls == failing
    assert where(freezer, root) == [home]
    assert not os.path.exists(f"{home}/krg-{play.mark}")


# -- thaw after whatever had been done


async def test_thaw_mends_what_a_crash_left_at_any_point(play, freezer, make):
    place, file = make(), play.directory / "count"
    play.run(COUNT + f"enter({place!r}); say(1); rest()")
    root, son = play.run(
        COUNT + f"enter({place!r}); son = child(lambda: count(file={str(file)!r}))\n"
        "say(os.getpid(), son); rest()"
    )
    waits_for(file)
    whole = await freezer.freeze(procs.look(root), play.mark, Kept())
    await freezer.thaw(whole)
    knob = "cgroup.freeze" if whole.version == 2 else "freezer.state"
    value = "1" if whole.version == 2 else "FROZEN"
    steps = (
        lambda: os.mkdir(whole.cgroup),
        lambda: Path(whole.cgroup, knob).write_text(value),
        lambda: Path(whole.cgroup, "cgroup.procs").write_text(str(son)),
        lambda: Path(whole.cgroup, "cgroup.procs").write_text(str(root)),
        lambda: Path(place, "cgroup.procs").write_text(str(root)),  # a thaw that was cut short
    )
    for count in range(len(steps) + 1):
        for step in steps[:count]:
            step()
        await freezer.thaw(whole)
        assert where(freezer, root, son) == [place] * 2
        assert not os.path.exists(whole.cgroup)
        assert runs(file)


async def test_what_was_forked_in_the_leaf_goes_where_its_parent_came_from(play, freezer, make):
    """While CRIU dumps, and after it died, the leaf is thawed."""
    make()
    one, two = make("/one"), make("/two")
    play.run(COUNT + f"enter({two!r}); say(1); rest()")
    root, son = play.run(
        COUNT
        + f"""
def go():
    signal.signal(signal.SIGUSR1, lambda *_: child(lambda: child() and rest()))
    enter({two!r})
    rest()
enter({one!r})
son = child(go)
say(os.getpid(), son)
rest()
"""
    )
    until(lambda: where(freezer, son) == [two], "entered")
    frozen = await freezer.freeze(procs.look(root), play.mark, Kept())
    knob, value = ("cgroup.freeze", "0") if frozen.version == 2 else ("freezer.state", "THAWED")
    Path(frozen.cgroup, knob).write_text(value)
    os.kill(son, signal.SIGUSR1)
    until(lambda: len(procs.look(root).live) == 4, "two more")
    await freezer.refreeze(frozen)
    assert procs.fate(procs.look(root)) is Fate.FROZEN
    late = procs.look(root).pids - {root, son}
    await freezer.thaw(frozen)
    assert where(freezer, root, son, *late) == [one, two, two, two]


async def test_a_lost_origin_is_made_up_for_by_what_is_above_it(play, freezer, make):
    above, gone = make(), make("/above/gone")
    (root,) = play.run(COUNT + f"enter({above!r}); say(os.getpid()); rest()")
    leaf = f"{above}/krg-{play.mark}"
    task = facts.task(root)
    os.mkdir(leaf)
    Path(leaf, "cgroup.procs").write_text(str(root))
    os.rmdir(gone)
    moved = (Moved(pid=root, start=task.start, origin=gone),)
    version = freezer.hierarchy.version
    await freezer.thaw(Frozen(cgroup=leaf, version=version, leaf=True, moved=moved))
    assert where(freezer, root) == [os.path.dirname(gone)]


async def test_thaw_of_what_is_no_more_is_nothing(freezer, play):
    for leaf in (True, False):
        place = f"{freezer.hierarchy.mount}/{play.mark}-none"
        await freezer.thaw(Frozen(cgroup=place, version=freezer.hierarchy.version, leaf=leaf))


# -- what cannot be frozen


def deaf_mount(place: Path) -> int:
    """Mount a filesystem whose server greets the kernel and then never answers again."""
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"deaf", os.fsencode(place), b"fuse", 0, options) == 0
    *_, unique = struct.unpack_from("=IIQ", os.read(fd, 1 << 20))
    body = struct.pack("=IIIIHHIIHHI7I", 7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, 0, *[0] * 7)
    os.write(fd, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
    return fd


@pytest.fixture
def deaf(tmp_path):
    place = tmp_path / "deaf"
    fd = deaf_mount(place)
    yield place
    os.close(fd)
    subprocess.run(["umount", "-l", place], check=True)


async def test_a_task_that_does_not_come_to_rest_is_named(play, freezer, make, deaf):
    place, file = make(), play.directory / "count"
    play.run(COUNT + f"enter({place!r}); say(1); rest()")
    root, son = play.run(
        COUNT + f"enter({place!r})\n"
        f"son = child(lambda: os.stat({str(deaf / 'x')!r}))\n"
        f"child(lambda: count(file={str(file)!r})); say(os.getpid(), son); rest()"
    )
    until(lambda: b"wait" in Path(f"/proc/{son}/wchan").read_bytes(), "it waits")
    waits_for(file)
    with pytest.raises(TryAgain) as caught, trio.move_on_after(0.2):
        await freezer.freeze(procs.look(root), play.mark, Kept())
    assert f"task {son} (python" in caught.value.message
    assert "request_wait_answer" in caught.value.message
    assert caught.value.fate is Fate.RUNNING
    assert where(freezer, root, son) == [place] * 2
    assert not os.path.exists(f"{place}/krg-{play.mark}")
    assert runs(file)


@pytest.fixture
def starting(play, tmp_path):
    """A process whose vfork(2) waits for a child that does not come to its exec."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (root,) = play.run(f"""
say(os.getpid())
actions = [(os.POSIX_SPAWN_OPEN, 0, {str(fifo)!r}, os.O_RDONLY, 0)]
os.posix_spawn("/bin/sleep", ["sleep", "1000"], dict(os.environ), file_actions=actions)
rest()
""")
    until(lambda: facts.children(root), "vfork")
    return root, fifo


async def test_a_program_that_is_just_starting_is_waited_for(play, freezer, starting):
    root, fifo = starting
    frozen: list[Frozen] = []

    async def freeze() -> None:
        frozen.append(await freezer.freeze(procs.look(root), play.mark, Kept()))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(freeze)
            await trio.sleep(0.05)
            assert not frozen
            writer = os.open(fifo, os.O_RDWR)  # does not wait for the reader, which may be frozen
    os.close(writer)
    assert [task.comm for task in procs.look(root).live][1:] == [b"sleep"]
    assert procs.fate(procs.look(root)) is Fate.FROZEN
    await freezer.thaw(frozen[0])


async def test_a_program_that_never_starts_is_named(play, freezer, starting):
    root, _ = starting
    with (
        pytest.raises(TryAgain, match=rf"task {root} .*vfork, for a program"),
        trio.move_on_after(0.2),
    ):
        await freezer.freeze(procs.look(root), play.mark, Kept())
    assert where(freezer, root) == [freezer.hierarchy.mount]
    assert not os.path.exists(f"{freezer.hierarchy.mount}/krg-{play.mark}")


async def test_a_stopped_tree_is_frozen_only_where_it_can_be_dumped_then(play, freezer):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)
    procs.send(tree, signal.SIGSTOP)
    until(lambda: procs.fate(tree) is Fate.STOPPED, "stopped")
    tree = procs.look(root)
    if freezer.hierarchy.version == 1:
        with pytest.raises(Unsupported, match=r"is stopped, .*signal CONT"):
            await freezer.freeze(tree, play.mark, Kept())
    else:
        frozen = await freezer.freeze(tree, play.mark, Kept())
        assert procs.fate(tree) is Fate.FROZEN
        await freezer.thaw(frozen)
    assert procs.fate(tree) is Fate.STOPPED


async def test_a_cancelled_record_is_no_matter_of_rest(play, freezer):
    (root,) = play.run("say(os.getpid()); rest()")

    async def record(frozen: Frozen) -> None:
        await trio.sleep_forever()

    with trio.move_on_after(0.05) as scope:
        await freezer.freeze(procs.look(root), play.mark, record)
    assert scope.cancelled_caught
    assert where(freezer, root) == [freezer.hierarchy.mount]


async def test_what_is_frozen_already_is_not_frozen_again(play, freezer):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)
    frozen = await freezer.freeze(tree, play.mark, Kept())
    with pytest.raises(Busy, match=rf"frozen already, in {frozen.cgroup}: thaw it first"):
        await freezer.freeze(tree, play.mark + "-2", Kept())
    assert freezer.is_frozen(frozen)
    await freezer.thaw(frozen)


async def test_a_leaf_in_use_is_not_taken(play, freezer, make):
    (other,) = play.run("say(os.getpid()); rest()")
    leaf = make("-leaf").replace(f"/{play.mark}", f"/krg-{play.mark}")
    os.mkdir(leaf)
    Path(leaf, "cgroup.procs").write_text(str(other))
    (another,) = play.run("say(os.getpid()); rest()")
    with pytest.raises(Busy, match="has other tasks in it"):
        await freezer.freeze(procs.look(another), f"{play.mark}-leaf", Kept())


async def test_the_agent_is_never_frozen(play, freezer):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)
    tree = tree._replace(tasks=(*tree.tasks, facts.task(os.getpid())))
    with pytest.raises(PartOfIt):
        await freezer.freeze(tree, play.mark, Kept())


async def test_a_tree_that_ends_meanwhile_is_gone_and_leaves_nothing(play, freezer):
    (root,) = play.run("say(os.getpid()); rest()")
    tree = procs.look(root)

    async def record(frozen: Frozen) -> None:
        procs.kill(tree)
        await procs.ended(tree.id)

    with pytest.raises(Gone) as caught:
        await freezer.freeze(tree, play.mark, record)
    assert caught.value.fate is Fate.GONE
    assert not os.path.exists(f"{freezer.hierarchy.mount}/krg-{play.mark}")


async def test_threaded_cgroups_take_no_leaf(play, tmp_path):
    freezer = Freezer.find("v2")
    domain = f"{freezer.hierarchy.mount}/{play.mark}"
    os.makedirs(f"{domain}/threads")
    Path(domain, "threads", "cgroup.type").write_text("threaded")
    (other,) = play.run(COUNT + f"enter({domain!r}); say(os.getpid()); rest()")
    (root,) = play.run(COUNT + f"enter({domain!r}); say(os.getpid()); rest()")
    with pytest.raises(Unsupported, match="can have no leaf"):
        await freezer.freeze(procs.look(root), play.mark, Kept())
    Path(domain, "threads", "cgroup.threads").write_text(str(root))
    with pytest.raises(Unsupported, match="cgroups for threads"):
        await freezer.freeze(procs.look(root), play.mark, Kept())
    os.kill(other, signal.SIGKILL)
    until(lambda: other not in cgroups.members(domain), "alone")
    frozen = await freezer.freeze(procs.look(root), play.mark, Kept())
    assert frozen.cgroup == domain, "alone, the whole domain is frozen"
    await freezer.thaw(frozen)


# -- kill


async def test_a_killed_tree_runs_no_more_and_leaves_nothing(play, freezer, make):
    place, file = make(), play.directory / "count"
    play.run(COUNT + f"enter({place!r}); say(1); rest()")
    (root,) = play.run(
        COUNT + f"enter({place!r}); child(lambda: count(file={str(file)!r}))\n"
        "say(os.getpid()); rest()"
    )
    waits_for(file)
    tree = procs.look(root)
    frozen = await freezer.freeze(tree, play.mark, Kept())
    size = file.stat().st_size
    with trio.fail_after(5):
        await freezer.kill(frozen, tree)
    assert procs.fate(tree) is Fate.GONE
    assert file.stat().st_size == size
    assert not os.path.exists(frozen.cgroup)
    await freezer.kill(frozen, tree)


async def test_kill_takes_late_children_and_spares_strangers(play, freezer, make):
    (stranger,) = play.run(COUNT + "say(os.getpid()); rest()")
    (root,) = play.run(
        "signal.signal(signal.SIGUSR1, lambda *_: child()); say(os.getpid()); rest()"
    )
    tree = procs.look(root)
    frozen = await freezer.freeze(tree, play.mark, Kept())
    Path(frozen.cgroup, "cgroup.procs").write_text(str(stranger))
    knob, value = ("cgroup.freeze", "0") if frozen.version == 2 else ("freezer.state", "THAWED")
    Path(frozen.cgroup, knob).write_text(value)
    os.kill(root, signal.SIGUSR1)
    until(lambda: facts.children(root), "a child after the freeze")
    late = procs.look(root)
    await freezer.refreeze(frozen)
    with trio.fail_after(5):
        await freezer.kill(frozen, tree)
    assert procs.fate(late) is Fate.GONE
    assert procs.fate(procs.look(stranger)) is Fate.RUNNING
    assert where(freezer, stranger) == [freezer.hierarchy.mount]


async def test_a_whole_cgroup_is_killed_too(play, freezer, make):
    place = make()
    (root,) = play.run(COUNT + f"enter({place!r}); child(); say(os.getpid()); rest()")
    tree = procs.look(root)
    frozen = await freezer.freeze(tree, play.mark, Kept())
    assert not frozen.leaf
    with trio.fail_after(5):
        await freezer.kill(frozen, tree)
    assert procs.fate(tree) is Fate.GONE
    assert not cgroups.members(place)


# -- the hierarchies


def test_find_takes_what_is_asked_for():
    for version in (1, 2):
        try:
            assert Freezer.find(f"v{version}").hierarchy.version == version
        except Unsupported as exc:
            assert "can be used here" in exc.message
    assert Freezer.find().hierarchy.version == Freezer.find("auto").hierarchy.version
    with pytest.raises(
        Unsupported, match=r"no cgroup v3 freezer can be used here: none is mounted"
    ):
        Freezer.find("v3")


@pytest.fixture
async def criu(request):
    try:
        return (await Engine.find()).path
    except EngineFailed as exc:
        if request.config.getoption("--allow-missing"):
            pytest.skip(exc.message)
        raise


async def test_criu_dumps_a_frozen_tree_again_and_again(play, freezer, criu):
    file = play.directory / "count"
    root, son = play.run(
        COUNT + f"son = child(lambda: count(file={str(file)!r})); say(os.getpid(), son); rest()"
    )
    waits_for(file)
    tree = procs.look(root)
    frozen = await freezer.freeze(tree, play.mark, Kept())
    size = file.stat().st_size
    options = ("--freeze-cgroup", frozen.cgroup, "--manage-cgroups=ignore")
    for more in (["-R"], ["-R"], []):
        images = play.directory / f"images{os.urandom(4).hex()}"
        images.mkdir()
        await trio.run_process(
            [criu, "dump", "-t", str(root), "-D", str(images), "-o", "log", *options, *more],
            capture_stdout=True,
            capture_stderr=True,
        )
        assert (images / f"core-{son}.img").exists()
        assert file.stat().st_size == size
        assert procs.fate(tree) is (Fate.FROZEN if more else Fate.GONE)
    await freezer.thaw(frozen)
    assert not os.path.exists(frozen.cgroup)
