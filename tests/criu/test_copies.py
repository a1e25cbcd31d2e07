"""Images look like directories: they go out by cp, come in by cp, and a damaged one is noticed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.criu import FETCHED
from tests.criu.stage import Stage, as_user
from tests.faults import harm
from tests.sites import until
from tests.workloads.harness import Workload


@pytest.fixture
def criu() -> str:
    """The CRIU that is used here: the fetched one, where the system's own is missing."""
    return os.environ.get("KRG_CRIU") or shutil.which("criu") or FETCHED


def bare_restore(criu: str, workload: Workload, images: Path, work: Path) -> None:
    """Restore a directory as somebody does who has CRIU and nothing of ours."""
    work.mkdir()
    words = [criu, "restore", "-D", images, "-W", work, "-d", "--shell-job", "-o", "log", "-v2"]
    options = ["--manage-cgroups=ignore", "--ext-unix-sk", "--file-locks"]
    done = subprocess.run(["setsid", *words, *options], capture_output=True, check=False)
    assert done.returncode == 0, (work / "log").read_text()[-2000:]
    workload.wait_progress()


def bare_dump(criu: str, workload: Workload, images: Path, work: Path) -> None:
    images.mkdir()
    work.mkdir()
    words = [criu, "dump", "-t", str(workload.pid), "-D", images, "-W", work, "-o", "log", "-v2"]
    tree = workload.tree()
    done = subprocess.run([*words, "--manage-cgroups=ignore"], capture_output=True, check=False)
    assert done.returncode == 0, (work / "log").read_text()[-2000:]
    workload.wait_gone(tree)


@pytest.mark.parametrize("name", ["counter", "proctree", "sharedmem", "threads"])
@pytest.mark.parametrize("command", ["cp -r", "cp -a"])
def test_a_copy_is_what_bare_criu_restores(
    stage: Stage, tmp_path: Path, criu: str, name: str, command: str
) -> None:
    workload = stage.begin(name)
    ref = stage.checkpoint_and_end(workload)
    done = stage.site.sh(f"{command} $K/images/{ref} {tmp_path}/copy")
    assert (done.returncode, done.stderr) == (0, "")
    bare_restore(criu, workload, tmp_path / "copy", tmp_path / "work")
    stage.passes(workload)


def test_a_copy_made_earlier_is_complete_when_its_last_file_is(
    stage: Stage, tmp_path: Path
) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint_and_end(workload)
    app = ref.partition("/")[0]
    script = f"""
        set -e
        cp -a $K/images/{ref} {tmp_path}/copy
        rm -r $K/images/{ref}
        mkdir $K/images/{app}.again
        cp -a {tmp_path}/copy $K/images/{app}.again/v7
    """
    done = stage.site.sh(script)
    assert (done.returncode, done.stderr) == (0, "")
    latest = stage.site.mnt / "images" / f"{app}.again" / "latest"
    until(latest.is_symlink, "the import is complete")
    assert os.readlink(latest) == "v7"
    manifest = json.loads(stage.site.read(f"images/{app}.again/v7/manifest.json"))
    assert (manifest["app"], manifest["copied_from"]) == (f"{app}.again", ref)
    stage.restart(workload, f"{app}.again")
    assert stage.checkpoint(workload) == f"{app}.again/v8"
    stage.passes(workload)


def test_a_copy_with_a_changed_byte_does_not_become_an_image(stage: Stage, tmp_path: Path) -> None:
    workload = stage.begin("counter")
    ref = stage.checkpoint_and_end(workload)
    done = stage.site.sh(f"cp -r $K/images/{ref} {tmp_path}/copy; mkdir $K/images/changed")
    assert done.returncode == 0, done.stderr
    change_a_byte(largest(tmp_path / "copy", "pages-*.img"))
    stage.site.sh(f"cp -r {tmp_path}/copy $K/images/changed/v1.part")
    done = stage.site.sh("mv $K/images/changed/v1.part $K/images/changed/v1")
    assert done.returncode != 0
    assert not (stage.site.mnt / "images" / "changed" / "v1").exists()
    stage.restart(workload, ref)
    stage.passes(workload)


@pytest.mark.parametrize("name", ["counter", "proctree"])
def test_what_plain_criu_dumped_is_imported_by_mv_and_restarted_by_root_alone(
    stage: Stage, tmp_path: Path, criu: str, name: str
) -> None:
    workload = stage.begin(name)
    bare_dump(criu, workload, tmp_path / "dump", tmp_path / "work")
    tmp_path.chmod(0o755)
    done = stage.site.sh(
        f"cd $K/images && mkdir plain.{name} && cp -r {tmp_path}/dump plain.{name}/v1.part"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert stage.refused("restart", f"plain.{name}")[0] == errno.ESRCH
    done = stage.site.sh(f"mv $K/images/plain.{name}/v1.part $K/images/plain.{name}/v1")
    assert (done.returncode, done.stderr) == (0, "")
    assert as_user(1000, f"echo plain.{name} > $K/restart", stage.site).returncode != 0
    assert workload.tasks() == []
    stage.restart(workload, f"plain.{name}/v1")
    stage.passes(workload)


def test_an_import_is_restarted_by_root_alone_also_when_it_is_the_callers(
    stage: Stage, tmp_path: Path
) -> None:
    workload = stage.begin("otheruid")
    ref = stage.checkpoint_and_end(workload)
    place = tmp_path / "his"
    place.mkdir()
    os.chown(place, 1000, 1000)
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o711)
    script = f"""
        set -e
        cp -r $K/images/{ref} {place}/copy
        mkdir $K/images/his
        cp -r {place}/copy $K/images/his/v1
        exec echo his > $K/restart
    """
    done = as_user(1000, script, stage.site)
    assert done.returncode != 0 and "not permitted" in done.stderr, done.stderr
    assert workload.tasks() == []
    stage.restart(workload, "his")
    stage.passes(workload)


@pytest.mark.parametrize("file", ["pages-*.img", "pstree.img", "inventory.img"])
def test_a_damaged_byte_is_found_before_any_pid_is_touched(stage: Stage, file: str) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint_and_end(workload)
    harm.chunks(stage.site, ref, file)[-1].flip()
    said = refused_as_damaged(stage, workload, ref)
    wrong = r"[\w.-]+\.img is damaged \(\d+ chunks, among them [0-9a-f]{16}\)"
    assert re.search(wrong, said), said
    assert file != "pages-*.img" or "damaged: pages-" in said, said
    shown = os.getxattr(stage.site.mnt / "images" / ref, "user.krg.damaged").decode()
    assert shown in said


def test_a_damaged_manifest_is_found_before_any_pid_is_touched(stage: Stage) -> None:
    workload = stage.begin("proctree")
    ref = stage.checkpoint_and_end(workload)
    harm.manifest(stage.site, ref).flip()
    refused_as_damaged(stage, workload, ref)


@pytest.mark.parametrize("how", ["removed", "cut off"])
def test_a_pack_that_is_not_whole_is_found_before_any_pid_is_touched(
    stage: Stage, how: str
) -> None:
    workload = stage.begin("counter")
    ref = stage.checkpoint_and_end(workload)
    chunk = harm.chunks(stage.site, ref, "pages-*.img")[-1]
    if how == "removed":
        chunk.path.unlink()
    else:
        os.truncate(chunk.path, chunk.offset + chunk.size // 2)
    refused_as_damaged(stage, workload, ref)


def refused_as_damaged(stage: Stage, workload: Workload, ref: str) -> str:
    code, said = stage.refused("restart", ref)
    assert code == errno.EBADMSG, said
    assert ref in said
    assert workload.tasks() == []
    started = [each / "note" for each in (stage.site.run / "keepers").iterdir()]
    assert not any(note.exists() and note.read_text() == ref for note in started)
    return said


def test_a_whole_version_outlives_a_damaged_one(stage: Stage) -> None:
    workload = stage.begin("counter")
    app = stage.checkpoint(workload).partition("/")[0]
    stage.checkpoint_and_end(workload)
    first = harm.chunks(stage.site, f"{app}/v1", "pages-*.img")
    second = harm.chunks(stage.site, f"{app}/v2", "pages-*.img")
    next(place for place in second if place not in first).flip()
    assert stage.refused("restart", app)[0] == errno.EBADMSG
    stage.restart(workload, f"{app}/v1")
    stage.passes(workload)


def largest(directory: Path, pattern: str) -> Path:
    return max(directory.glob(pattern), key=lambda path: path.stat().st_size)


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x20]))
