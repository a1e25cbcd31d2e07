"""krg images, verify, sweep, diff, export, import, and the files below them, by a shell."""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.conftest import Start, typing
from tests.sites import BIN, Site, until
from tests.workloads.harness import Workload

KRG = str(BIN / "krg")


def krg(site: Site, words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run what a person types after `krg`."""
    return site.sh(f"{KRG} {words}", KRG_MOUNT=str(site.mnt), **env)


def said(site: Site, words: str, **env: str) -> str:
    done = krg(site, words, **env)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture
def app(shared_site: Site, small: Workload, request: pytest.FixtureRequest) -> str:
    """An app of its own with two versions; the tree runs on."""
    name = f"app{abs(hash(request.node.name)) % 10**8}"
    assert said(shared_site, f"checkpoint {small.pid} --name={name}") == f"{name}/v1\n"
    small.wait_progress()
    assert said(shared_site, f"checkpoint {small.pid} --desc='two words'") == f"{name}/v2\n"
    return name


def packs(site: Site) -> list[Path]:
    return sorted(path for path in (site.state / "images/packs").rglob("*") if path.is_file())


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# -- what is there


def test_images_tell_what_they_share(shared_site: Site, app: str) -> None:
    first, second = json.loads(said(shared_site, f"images {app} --json"))
    assert first["stored_bytes"] == first["new_bytes"] + first["shared_bytes"]
    assert second["shared_bytes"] > second["new_bytes"] > 0
    assert (second["desc"], second["ratio"] > 1) == ("two words", True)
    image = shared_site.mnt / "images" / app / "v2"
    assert int(os.getxattr(image, "user.krg.new_bytes")) == second["new_bytes"]
    head, _, row = said(shared_site, f"images {app}").splitlines()
    assert "SHARED" in head and "RATIO" in head and row.endswith("two words")


def test_blocks_and_status_are_those_that_are_stored(shared_site: Site, app: str) -> None:
    """Each file counts its share; what is rounded is at most a block a file."""
    image = shared_site.mnt / "images" / app / "v1"
    (facts, _) = json.loads(said(shared_site, f"images {app} --json"))
    blocks = [os.stat(each).st_blocks * 512 for each in image.iterdir()]
    manifest = os.stat(image / "manifest.json").st_size
    assert abs(sum(blocks) - manifest - facts["stored_bytes"]) <= 1024 * len(blocks)
    said(shared_site, f"verify {app}")  # after which the figures are those of now
    status = shared_site.facts("store/status")
    assert status["kind"] == "directory" and int(status["packs"]) == len(packs(shared_site))
    on_disk = sum(path.stat().st_size for path in packs(shared_site))
    assert facts["stored_bytes"] <= int(status["stored_bytes"]) <= on_disk
    assert f"The store has {status['images']} images" in said(shared_site, "images")


# -- verify and sweep


def test_verify_of_what_is_good(shared_site: Site, app: str) -> None:
    assert said(shared_site, f"verify {app}") == f"{app}/v1 ok\n{app}/v2 ok\n"
    assert said(shared_site, f"verify {app}/latest") == f"{app}/v2 ok\n"
    assert f"{app}/v1 ok\n" in said(shared_site, "verify")
    found = json.loads(said(shared_site, f"verify {app} --json"))
    assert found == {"sound": True, "images": [f"{app}/v1", f"{app}/v2"], "damage": []}
    assert shared_site.write("store/verify", f"images/{app}/v1").startswith("verified 1 bytes ")
    assert shared_site.facts("store/status")["last_verify"] != "-"
    assert krg(shared_site, f"verify {app}/v9").returncode == 3
    assert krg(shared_site, "verify ../x").returncode == 2


def test_a_flipped_byte_is_named_and_its_image_not_restarted(site: Site, small: Workload) -> None:
    said(site, f"checkpoint {small.pid} --name=hurt")
    (pack,) = packs(site)
    flip(pack, 3000)
    done = krg(site, "verify hurt")
    assert done.returncode == 1 and done.stderr == "", done
    image, _, file, _, chunk, *_ = done.stdout.replace(":", "").split()
    assert image == "hurt/v1" and (site.mnt / "images/hurt/v1" / file).exists()
    mark = os.getxattr(site.mnt / "images/hurt/v1", "user.krg.damaged").decode()
    assert file in mark and chunk[:16] in mark
    assert site.facts("store/status")["damaged"] == "1"
    assert krg(site, "verify").stdout.startswith(f"hurt/v1 damaged {file} chunk {chunk}: ")
    damage = json.loads(krg(site, "verify --json").stdout)["damage"]
    assert [(each["image"], each["file"]) for each in damage] == [("hurt/v1", file)]
    done = site.sh("echo 1 > $K/store/verify || cat $K/store/verify")
    assert done.stdout.startswith("error EBADMSG 1 of 1 images are damaged: hurt/v1; jobs/")
    done = krg(site, "restart hurt --pid=new")
    assert done.returncode == 12 and file in done.stderr
    flip(pack, 3000)
    assert said(site, "verify") == "hurt/v1 ok\n"
    assert site.facts("store/status")["damaged"] == "0"


def test_a_pack_whose_end_is_damaged_costs_its_images(site: Site, small: Workload) -> None:
    """What the agent has in memory of it does not count: it is gone with the agent."""
    said(site, f"checkpoint {small.pid} --name=hurt")
    (pack,) = packs(site)
    flip(pack, pack.stat().st_size - 1)
    done = krg(site, "verify")
    assert done.returncode == 1 and "hurt/v1 damaged" in done.stdout, done
    assert str(pack.relative_to(site.state / "images")) in done.stdout


def test_sweep_frees_what_no_image_needs(site: Site, small: Workload) -> None:
    said(site, f"checkpoint {small.pid} --name=going")
    before = sum(path.stat().st_size for path in packs(site))
    assert before and site.sh("rm -r $K/images/going").returncode == 0

    def is_swept() -> bool:
        assert "freed" in said(site, "sweep --json")
        return not packs(site)

    until(is_swept, "the store is empty")
    assert site.facts("store/status")["chunks"] == "0"
    assert site.facts("store/status")["last_sweep"] != "-"
    assert said(site, "sweep") == "freed 0 of 0 packs\n"
    assert " sweep store n1 ok freed 0 packs 0 " in site.read("log")


def test_the_store_is_roots_and_an_image_its_owners(shared_site: Site, app: str) -> None:
    shared_site.base.chmod(0o755)
    script = (
        "exec 3<>$K/store/verify; echo 1 >&3; cat <&3; echo $A >&3; cat <&3; "
        "exec 3<>$K/store/diff; echo $A/v1 >&3; cat <&3; exec 3<>$K/store/sweep"
    )
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    done = shared_site.sh(f"{nobody} bash -c '{script}'", A=app)
    refusals = done.stdout.splitlines()
    assert len(refusals) == 3 and all(each.startswith("error EPERM ") for each in refusals)
    assert "only root" in refusals[0] and f"{app} belongs to uid 0" in refusals[1]
    assert "sweep: Permission denied" in done.stderr


# -- diff


def test_diff_says_which_mappings_changed(shared_site: Site, small: Workload, app: str) -> None:
    found = json.loads(said(shared_site, f"diff {app}/v1 {app}/v2 --json"))
    (process,) = [each for each in found["processes"] if each["pid"] == small.pid]
    changed = sum(each["changed"] for each in process["mappings"])
    assert 0 < changed == found["total"]["changed"] < found["total"]["pages"]
    text = said(shared_site, f"diff {app}/v1")
    assert f"{changed} of {found['total']['pages']} pages changed" in text
    same = json.loads(said(shared_site, f"diff {app}/v2 --json"))
    assert [each["mappings"] + each["files"] for each in same["processes"]] == [[]]
    line = shared_site.write("store/diff", f"{app}/v1 to={app}/v2")
    assert line.startswith(f"total processes 1 pages {found['total']['pages']} changed {changed} ")


# -- export and import


@pytest.fixture
def exported(shared_site: Site, app: str, tmp_path: Path) -> Path:
    path = tmp_path / "image.krg"
    assert said(shared_site, f"export {app}/v1 {path}") == ""
    assert path.stat().st_mode & 0o777 == 0o600
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(directory.iterdir())}


def is_left(site: Site, app: str) -> list[str]:
    return [each for each in os.listdir(site.mnt / "images" / app) if each.endswith(".part")]


def test_tar_unpacks_an_export_manifest_first(
    shared_site: Site, app: str, exported: Path, need: Callable[..., None]
) -> None:
    need("zstd")
    done = shared_site.sh("tar --zstd -tf $F", F=str(exported))
    names = done.stdout.splitlines()
    assert names[0] == f"{app}/v1/manifest.json" and names[1:] == sorted(names[1:])
    done = shared_site.sh("cd $D && tar --zstd -xf $F", F=str(exported), D=str(exported.parent))
    assert (done.returncode, done.stderr) == (0, "")
    image = shared_site.mnt / "images" / app / "v1"
    assert contents(exported.parent / app / "v1") == contents(image)


def test_an_import_is_the_image_again(
    shared_site: Site, small: Workload, app: str, exported: Path
) -> None:
    assert said(shared_site, f"import {exported}") == f"{app}/v3\n"
    assert said(shared_site, f"import {exported} {app}.b/v7") == f"{app}.b/v7\n"
    assert said(shared_site, f"import - {app}.b < {exported}") == f"{app}.b/v8\n"
    piped = said(shared_site, f"export {app} - | {KRG} import --json - {app}.c")
    assert json.loads(piped) == {"image": f"{app}.c/v1"}
    images = shared_site.mnt / "images"
    before, after = (contents(images / each) for each in (f"{app}/v1", f"{app}.b/v7"))
    del before["manifest.json"], after["manifest.json"]
    assert before == after
    same = json.loads(said(shared_site, f"diff {app}/v1 {app}.b/v7 --json"))["total"]
    assert (same["changed"], same["added"], same["removed"]) == (0, 0, 0)
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    assert said(shared_site, f"restart {app}.b/v7") == f"pid {small.pid}\n"
    small.wait_progress()


def test_an_import_into_a_version_that_is_there(
    shared_site: Site, app: str, exported: Path
) -> None:
    done = krg(shared_site, f"import {exported} {app}/v2")
    assert done.returncode == 9 and f"{app} has a v2 already" in done.stderr
    assert is_left(shared_site, app) == []


def damaged_copies(exported: Path) -> dict[str, bytes]:
    data = exported.read_bytes()
    flips = (1, 4, 5, 6, len(data) // 2, len(data) - 41, len(data) - 40, len(data) - 33, -1)
    cuts = (0, 10, len(data) // 2, len(data) - 41, len(data) - 40, len(data) - 1)
    found = {f"cut at {size}": data[:size] for size in cuts}
    found["longer"] = data + b"\0"
    for at in flips:
        changed = bytearray(data)
        changed[at] ^= 1
        found[f"flipped at {at}"] = bytes(changed)
    return found


def test_a_damaged_export_is_refused_and_leaves_nothing(
    shared_site: Site, app: str, exported: Path
) -> None:
    before = sorted(os.listdir(shared_site.mnt / "images"))
    copy = exported.with_suffix(".copy")
    for what, data in damaged_copies(exported).items():
        copy.write_bytes(data)
        for words in (f"import {copy}", f"import {copy} {app}.new"):
            done = krg(shared_site, words)
            assert done.returncode == 12 and "cut off or changed" in done.stderr, (what, done)
            assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(shared_site.mnt / "images")) == before
    assert is_left(shared_site, app) == []
    assert not (shared_site.mnt / "images" / app / "v3").exists()


def test_an_archive_with_more_than_plain_files_is_refused(
    shared_site: Site, app: str, exported: Path
) -> None:
    copy = exported.with_suffix(".tar.zst")
    script = "cd $D && tar --zstd -xf $F && ln -s /etc/passwd $A/v1/evil && tar --zstd -cf $T"
    for names in ("$A", "$A/v1/manifest.json $A/v1/evil", "$A/v1/inventory.img", "/etc/hostname"):
        done = shared_site.sh(
            f"{script} -P {names}; rm -f $D/$A/v1/*",
            D=str(exported.parent),
            F=str(exported),
            T=str(copy),
            A=app,
        )
        assert done.returncode == 0, done
        done = krg(shared_site, f"import {copy} {app}.new")
        assert done.returncode in (2, 12) and str(copy) in done.stderr, (names, done)
    assert not (shared_site.mnt / "images" / f"{app}.new").exists()


@pytest.fixture
def large(shared_site: Site, start: Start, request: pytest.FixtureRequest) -> str:
    """An app whose image is more than what pipes and buffers take."""
    name = f"large{abs(hash(request.node.name)) % 10**8}"
    workload = start("memory", 16, 0.05, 1.0)
    assert said(shared_site, f"checkpoint {workload.pid} --name={name}") == f"{name}/v1\n"
    return name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_interrupted_leaves_nothing(
    shared_site: Site, large: str, tmp_path: Path, number: int
) -> None:
    """It waits for the pipe that its part is, which nobody reads."""
    target, part = tmp_path / "image.krg", tmp_path / "image.krg.part"
    os.mkfifo(part)
    holder = os.open(part, os.O_RDWR)  # so that opening it does not block, and writing does
    try:
        script = f"export KRG_MOUNT=$K; exec {KRG} export {large}/v1 {target}"
        with typing(shared_site, script) as process:
            until(lambda: is_full(holder), "the export is under way")
            process.send_signal(number)
            _, error = process.communicate(timeout=20)
    finally:
        os.close(holder)
    assert process.returncode == 130 and "Traceback" not in error
    assert list(tmp_path.glob("image.krg*")) == []


def is_full(pipe: int) -> bool:
    """Tell whether whoever writes into a pipe is held up."""
    unread = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, unread)
    return unread[0] > 0 and not select.select([], [pipe], [], 0)[1]


def test_an_import_that_is_interrupted_leaves_nothing(
    shared_site: Site, large: str, tmp_path: Path
) -> None:
    exported = tmp_path / "image.krg"
    said(shared_site, f"export {large} {exported}")
    script = f"exec {KRG} import - {large}.new"
    images = shared_site.mnt / "images"
    with typing(shared_site, f"export KRG_MOUNT=$K; {script}", stdin_pipe=True) as process:
        assert process.stdin is not None
        half = exported.read_bytes()[: exported.stat().st_size // 2]
        process.stdin.buffer.write(half)
        process.stdin.buffer.flush()
        until(lambda: (images / f"{large}.new" / "v1.part").exists(), "the import is under way")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not (images / f"{large}.new").exists()
