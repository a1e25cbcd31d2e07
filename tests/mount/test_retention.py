"""Images that go by the policy of their app, and stores that are full, by what a person types."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.mount.conftest import Start
from tests.sites import Site, until
from tests.workloads.harness import Workload

MAX = "keep max\nkeep_bytes max\nmax_age max\n"
QUICK_S = 15.0


@pytest.fixture
def app(small: Workload, request: pytest.FixtureRequest) -> str:
    return f"app{abs(hash(request.node.name)) % 10**8}"


def checkpoint(site: Site, tree: Workload, app: str, times: int = 1) -> None:
    for _ in range(times):
        answer = site.write(site.proc(tree.pid) / "checkpoint", f"name={app}")
        assert answer.startswith(f"{app}/v"), answer


def versions(site: Site, app: str) -> list[str]:
    found = os.listdir(site.mnt / "images" / app)
    return sorted(name for name in found if name[0] == "v" and name[1:].isdecimal())


def has(site: Site, app: str, *wanted: str) -> None:
    until(lambda: versions(site, app) == [*wanted], f"{app} has {wanted}", QUICK_S)


def expired(site: Site, app: str) -> list[str]:
    lines = site.read("events").splitlines()
    return [line for line in lines if "image.expired" in line and f'"{app}/' in line]


def refusal(site: Site, script: str, app: str) -> tuple[str, str]:
    """What the shell says of a write that fails, and what the file reads back on the same
    descriptor."""
    done = site.sh(f"exec 3<>$K/images/$A/policy; {script} >&3; echo $?; cat <&3", A=app)
    code, _, text = done.stdout.partition("\n")
    assert code == "1", done
    return done.stderr, text


def is_back(site: Site) -> None:
    """Wait for the mount to have found its new agent."""
    state = f"nodes/{site.node}/state"
    until(lambda: site.read(state).startswith("online"), "the mount has its agent")


def text_file(site: Site, text: str) -> str:
    """Return the path of a file of several lines: bash's own printf writes each by itself."""
    path = site.base / "lines"
    path.write_text(text)
    return str(path)


def stored(site: Site) -> int:
    """The bytes that the packs really take."""
    done = site.sh("du -s --block-size=1 $D/packs", D=str(site.state / "images"))
    return int(done.stdout.split()[0]) if done.returncode == 0 else 0


# -- the file


def test_a_policy_shows_what_holds_and_takes_what_it_shows(
    shared_site: Site, small: Workload, app: str
) -> None:
    checkpoint(shared_site, small, app)
    path = f"images/{app}/policy"
    assert shared_site.read(path) == MAX
    assert oct((shared_site.mnt / path).stat().st_mode)[-4:] == "0600"
    done = shared_site.sh(
        "echo keep 3 > $P && echo max_age 12h >> $P && cat $L > $P && cat $P",
        P=str(shared_site.mnt / path),
        L=text_file(shared_site, "keep_bytes 10G\nkeep 4\n"),
    )
    assert (done.stderr, done.stdout) == ("", "keep 4\nkeep_bytes 10737418240\nmax_age 12h\n")
    done = shared_site.sh(
        "cp $P $S && echo 'keep max' > $P && cp $S $P && cmp $S $P",
        P=str(shared_site.mnt / path),
        S=str(shared_site.base / "saved"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    shared_site.stop_agent()
    shared_site.start_agent()
    is_back(shared_site)
    assert shared_site.read(path).startswith("keep 4\n")


@pytest.mark.parametrize(
    "wrong",
    ["keep 0", "keep 2\nkeep_bytes x", "max_age never", "kep 2", "keep", "keep 1\nkeep 2"],
)
def test_a_wrong_line_changes_nothing(
    shared_site: Site, small: Workload, app: str, wrong: str
) -> None:
    checkpoint(shared_site, small, app, 2)
    said, text = refusal(shared_site, f"cat {text_file(shared_site, wrong)}", app)
    assert "Invalid argument" in said and text.startswith("error EINVAL policy: ")
    assert shared_site.read(f"images/{app}/policy") == MAX
    assert versions(shared_site, app) == ["v1", "v2"]


def test_nobody_makes_or_removes_a_policy(shared_site: Site, small: Workload, app: str) -> None:
    checkpoint(shared_site, small, app)
    for typed in ("ln -s v1 policy", "mv policy other", "touch policies", "ln policy other"):
        assert shared_site.sh(f"cd $K/images/$A && {typed}", A=app).returncode != 0, typed
    done = shared_site.sh("rm -rf $K/images/$A && ls $K/images", A=app)
    assert (done.returncode, done.stderr) == (0, "") and app not in done.stdout.split()


def test_another_user_may_not(shared_site: Site, small: Workload, app: str) -> None:
    checkpoint(shared_site, small, app)
    done = shared_site.sh(
        "setpriv --reuid=65534 --clear-groups sh -c 'echo keep 1 > $K/images/$A/policy'", A=app
    )
    assert done.returncode != 0 and "Permission denied" in done.stderr
    assert shared_site.read(f"images/{app}/policy") == MAX


# -- what goes


def test_the_newest_stay_and_what_a_label_pins(
    shared_site: Site, small: Workload, app: str
) -> None:
    checkpoint(shared_site, small, app)
    done = shared_site.sh("cd $K/images/$A && echo keep 2 > policy && ln -s v1 first", A=app)
    assert (done.returncode, done.stderr) == (0, "")
    checkpoint(shared_site, small, app, 4)
    has(shared_site, app, "v1", "v4", "v5")
    until(lambda: len(expired(shared_site, app)) == 2, "both were told of")
    assert "(keep 2)" in expired(shared_site, app)[0]
    assert f"image.expired image={app}/v2 uid=0" in shared_site.logs()
    shared_site.sh("rm $K/images/$A/first && echo keep 1 > $K/images/$A/policy", A=app)
    has(shared_site, app, "v5")
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    assert shared_site.write("restart", app) == f"pid {small.pid}\n"
    small.wait_progress()


def test_a_policy_that_is_written_holds_at_once(
    shared_site: Site, small: Workload, app: str
) -> None:
    checkpoint(shared_site, small, app, 4)
    size = int(shared_site.read(f"images/{app}/index").splitlines()[-1].split()[5])
    shared_site.sh(f"echo keep_bytes {size * 5 // 2} > $K/images/$A/policy", A=app)
    has(shared_site, app, "v3", "v4")

    def is_old() -> bool:
        shared_site.sh("echo max_age 1s > $K/images/$A/policy", A=app)
        return versions(shared_site, app) == ["v4"]

    until(is_old, "v3 is too old", QUICK_S)


def test_an_import_under_way_stays(shared_site: Site, small: Workload, app: str) -> None:
    checkpoint(shared_site, small, app)
    done = shared_site.sh("mkdir $K/images/$A/v7.part && echo keep 1 > $K/images/$A/policy", A=app)
    assert (done.returncode, done.stderr) == (0, "")
    checkpoint(shared_site, small, app)
    has(shared_site, app, "v2")
    assert (shared_site.mnt / "images" / app / "v7.part").is_dir()


# -- what it frees, and where it ends


@pytest.fixture
def bounded() -> Iterator[Site]:
    """A site whose agent is yet to be told its bounds."""
    made = Site()
    try:
        yield made
    finally:
        made.__exit__(None, None, None)


def up(site: Site, *options: str) -> Site:
    site.start_agent(*options)
    site.start_mount()
    return site


def test_what_was_removed_is_gone_from_the_disk_within_seconds(bounded: Site, start: Start) -> None:
    site = up(bounded)
    memory = start("memory", 24)
    before = stored(site)
    checkpoint(site, memory, "blast")
    full = stored(site)
    assert full - before > 1 << 20
    assert site.sh("rm -r $K/images/blast/v1").returncode == 0
    until(lambda: stored(site) - before < (full - before) / 10, "freed", QUICK_S)
    until(lambda: "store.swept" in site.logs(), "and the log says so")
    checkpoint(site, memory, "blast")
    memory.wait_progress()


def test_a_restart_of_the_agent_frees_what_a_dead_one_left(bounded: Site, start: Start) -> None:
    site = up(bounded)
    packs = site.state / "images" / "packs"
    checkpoint(site, start("small"), "blast")
    site.stop_agent()
    left = site.state / "images" / ".tmp" / "left"
    left.write_bytes(bytes(1000))
    (manifest,) = (site.state / "images" / "manifests" / "n1" / "blast").iterdir()
    manifest.unlink()
    site.start_agent()
    assert not left.exists()
    until(lambda: not [*packs.glob("*/*")], "what no image names is gone", QUICK_S)


def test_the_defaults_of_an_agent_hold_for_apps_without_a_policy(
    bounded: Site, small: Workload
) -> None:
    site = up(bounded, "--keep=2", "--max-age=30d")
    checkpoint(site, small, "blast", 4)
    assert site.read("images/blast/policy") == "keep 2\nkeep_bytes max\nmax_age 30d\n"
    has(site, "blast", "v3", "v4")
    site.sh("echo keep max > $K/images/blast/policy")
    checkpoint(site, small, "blast", 2)
    assert site.read("images/blast/policy") == "keep max\nkeep_bytes max\nmax_age 30d\n"
    assert versions(site, "blast") == ["v3", "v4", "v5", "v6"]


def test_a_quota_refuses_and_an_image_that_goes_makes_room(bounded: Site, start: Start) -> None:
    site = up(bounded, "--quota=3M")
    memory, small = start("memory", 24), start("small")
    checkpoint(site, small, "little")
    told = site.sh("echo name=big > $K/procs/$P/checkpoint", P=str(memory.pid))
    assert told.returncode == 1 and "Disk quota exceeded" in told.stderr, told
    text = site.read(site.proc(memory.pid) / "checkpoint")
    assert text.startswith("error EDQUOT cannot ") and "--quota" in text and "rmdir" in text
    memory.wait_progress()
    assert not (site.mnt / "images" / "big").exists()
    checkpoint(site, small, "little")


def test_a_floor_refuses_before_anything_is_frozen(bounded: Site, small: Workload) -> None:
    site = up(bounded, "--floor=1000T")
    told = site.sh("echo 1 > $K/procs/$P/checkpoint", P=str(small.pid))
    assert told.returncode == 1 and "No space left on device" in told.stderr
    text = site.read(site.proc(small.pid) / "checkpoint")
    assert "stay free for others (--floor)" in text and "rmdir" in text
    assert site.facts("jobs/1/status")["freeze_ms"] == "0.0"
    small.wait_progress()


def test_images_that_may_go_go_before_a_checkpoint_is_refused(bounded: Site, start: Start) -> None:
    site = up(bounded)
    first, second = start("memory", 24), start("memory", 24)
    checkpoint(site, first, "blast")
    first.finish()
    first.wait_gone([first.pid])
    checkpoint(site, second, "blast")
    quota = stored(site) * 3 // 4
    site.stop_agent()
    site.start_agent(f"--quota={quota}", "--keep=1")
    is_back(site)
    checkpoint(site, second, "blast")
    has(site, "blast", "v3")
    second.wait_progress()
    assert stored(site) <= quota
