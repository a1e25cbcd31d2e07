"""Image directories in the hands of cp, mv, rm, ln, tar and rsync-like tools, and back in again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.sites import Site, until
from tests.workloads.harness import Workload

HIDDEN_S = 8


@pytest.fixture
def image(shared_site: Site, small: Workload, request: pytest.FixtureRequest) -> Path:
    """The first version of an app of its own; the tree runs on."""
    name = f"app{abs(hash(request.node.name)) % 10**8}"
    answer = shared_site.write(shared_site.proc(small.pid) / "checkpoint", f"name={name}")
    assert answer == f"{name}/v1\n"
    return shared_site.mnt / "images" / name / "v1"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(directory)): each.read_bytes()
        for each in sorted(directory.rglob("*"))
        if each.is_file()
    }


@pytest.mark.parametrize("copy", ["cp -r", "cp -a", "cp -a --preserve=xattr", "cp -rp"])
def test_a_copy_has_all_of_it_and_comes_back(
    shared_site: Site, small: Workload, image: Path, tmp_path: Path, copy: str
) -> None:
    out = tmp_path / "v1"
    done = shared_site.sh(f"{copy} $I $O", I=str(image), O=str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(out) == contents(image)
    assert json.loads((out / "manifest.json").read_text())["version"] == 1
    if "xattr" in copy:
        assert os.getxattr(out, "user.krg.app").decode() == image.parent.name
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    app = f"back.{image.parent.name}"
    done = shared_site.sh(f"mkdir $K/images/$A && {copy} $O $K/images/$A/v1", O=str(out), A=app)
    assert (done.returncode, done.stderr) == (0, "")
    back = shared_site.mnt / "images" / app
    until(lambda: (back / "latest").is_symlink(), "the copy is an image")
    assert contents(back / "v1").keys() == contents(out).keys()
    assert shared_site.write("restart", f"{app}/v1").startswith("pid ")
    small.wait_progress()


def test_bare_criu_restores_a_copy(
    shared_site: Site, small: Workload, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v1"
    shutil.copytree(image, out)
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    criu = shared_site.facts("nodes/n1/info")["criu_path"]
    done = subprocess.run(
        [criu, "restore", "-D", str(out), "-d", "-o", "restore.log"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, (out / "restore.log").read_text()[-2000:]
    small.wait_progress()


def test_an_archive_of_all_images_comes_back(
    shared_site: Site, small: Workload, image: Path, tmp_path: Path
) -> None:
    app = image.parent.name
    archive = tmp_path / "images.tar"
    done = shared_site.sh("tar cf $T -C $K/images $A/v1", T=str(archive), A=app)
    assert (done.returncode, done.stderr) == (0, "")
    shared_site.sh("mkdir $D; tar xf $T -C $D", T=str(archive), D=str(tmp_path / "x"))
    assert contents(tmp_path / "x" / app / "v1") == contents(image)


def test_rm_of_an_image(shared_site: Site, image: Path) -> None:
    done = shared_site.sh("rm -r $I", I=str(image))
    assert (done.returncode, done.stderr) == (0, "")
    assert not image.exists()
    done = shared_site.sh("rmdir $A", A=str(image.parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert not image.parent.exists()


def test_rm_of_an_app_with_all_its_images(shared_site: Site, small: Workload, image: Path) -> None:
    shared_site.write(shared_site.proc(small.pid) / "checkpoint", f"name={image.parent.name}")
    done = shared_site.sh("rm -rf $A", A=str(image.parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert not image.parent.exists()
    small.wait_progress()


def test_an_app_that_is_made_again_has_nothing_of_the_one_before(
    shared_site: Site, small: Workload, image: Path
) -> None:
    """Its first version has the number of the old one, whose readers must not go on in it."""
    checkpoint = shared_site.proc(small.pid) / "checkpoint"
    with open(image / "manifest.json", "rb", buffering=0) as file:
        assert shared_site.sh("rm -r $A", A=str(image.parent)).returncode == 0
        assert shared_site.write(checkpoint, f"name={image.parent.name}") == f"{_ref(image)}\n"
        assert sorted(os.listdir(image.parent)) == ["index", "latest", "policy", "v1"]
        with pytest.raises(OSError) as told:
            file.read()
        assert told.value.errno in (errno.ESRCH, errno.ESTALE)
    assert json.loads((image / "manifest.json").read_text())["version"] == 1


def _ref(image: Path) -> str:
    return f"{image.parent.name}/{image.name}"


def test_rmdir_of_an_app_with_images_is_refused(shared_site: Site, image: Path) -> None:
    done = shared_site.sh("rmdir $A", A=str(image.parent))
    assert done.returncode == 1 and "Device or resource busy" in done.stderr
    assert (image / "manifest.json").exists()


def test_rmdir_removes_a_whole_image(shared_site: Site, image: Path) -> None:
    done = shared_site.sh("rmdir $I", I=str(image))
    assert (done.returncode, done.stderr) == (0, "")
    assert not image.exists()


def test_an_interrupted_rm_leaves_the_image_whole(
    shared_site: Site, small: Workload, image: Path
) -> None:
    before = contents(image)
    done = shared_site.sh("cd $I && rm -f core-*.img pages-1.img manifest.json", I=str(image))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (image / "manifest.json").exists()
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    assert shared_site.write("restart", image.parent.name) == f"pid {small.pid}\n"
    small.wait_progress()
    until(lambda: (image / "manifest.json").exists(), "shown again", HIDDEN_S)
    until(lambda: contents(image) == before, "all shown again", HIDDEN_S)


def test_a_committed_image_is_never_changed(shared_site: Site, image: Path) -> None:
    before = contents(image)
    for typed in (
        "echo x > $I/manifest.json",
        "echo x >> $I/pages-1.img",
        "echo x > $I/new",
        "truncate -s 0 $I/pages-1.img",
        "mkdir $I/directory",
        "ln -s x $I/link",
        "mv $I/pages-1.img $I/pages-2.img",
        "mv $I ${I%/v1}/v9",
        "sed -i s/a/b/ $I/manifest.json",
    ):
        done = shared_site.sh(typed, I=str(image))
        assert done.returncode != 0, typed
        assert "cross-device" not in done.stderr
        assert contents(image) == before, typed


def test_a_label_pins_its_version(shared_site: Site, image: Path) -> None:
    app = image.parent
    done = shared_site.sh("ln -s v1 $A/before-lr && readlink $A/before-lr", A=str(app))
    assert (done.returncode, done.stdout, done.stderr) == (0, "v1\n", "")
    before = contents(image)
    assert "before-lr" in (app / "index").read_text()
    done = shared_site.sh("rm -r $I", I=str(image))
    assert done.returncode == 1 and "Device or resource busy" in done.stderr
    assert contents(image) == before
    assert (app / "before-lr" / "manifest.json").exists()
    for wrong in ("v2", "latest", "nothing", "/etc", "/etc/v1", "../other/v1", "../v1"):
        refused = shared_site.sh(f"ln -s {wrong} $A/other", A=str(app))
        assert refused.returncode == 1 and not (app / "other").is_symlink(), wrong
    for taken in ("latest", "v7", "index", "before-lr"):
        refused = shared_site.sh(f"ln -s v1 $A/{taken}", A=str(app))
        assert refused.returncode == 1, taken
    done = shared_site.sh("ln -s ../$N/v1 $A/by-path && rm $A/by-path", A=str(app), N=app.name)
    assert (done.returncode, done.stderr) == (0, "")
    done = shared_site.sh("rm $A/before-lr && rm -r $I", A=str(app), I=str(image))
    assert (done.returncode, done.stderr) == (0, "")


def test_versions_count_up_and_no_number_comes_back(
    shared_site: Site, small: Workload, image: Path
) -> None:
    path, app = shared_site.proc(small.pid) / "checkpoint", image.parent
    assert shared_site.write(path, "1") == f"{app.name}/v2\n"
    assert os.readlink(app / "latest") == "v2"
    shared_site.sh("rm -r $A/v2", A=str(app))
    assert os.readlink(app / "latest") == "v1"
    assert shared_site.write(path, "desc='third of all'") == f"{app.name}/v3\n"
    index = (app / "index").read_text().splitlines()
    assert [line.split()[0] for line in index] == ["v1", "v3"]
    assert re.search(r" n1 .* - \d+ third of all$", index[1])


def test_a_directory_of_plain_criu_is_taken_by_mv(
    shared_site: Site, small: Workload, image: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(image, plain)
    for ours in ("manifest.json", "description", "user_info.txt"):
        (plain / ours).unlink()
    shared_site.write(shared_site.proc(small.pid) / "signal", "KILL")
    small.wait_gone([small.pid])
    app = shared_site.mnt / "images" / f"plain.{image.parent.name}"
    done = shared_site.sh(
        "mkdir $A && cp -r $D $A/v1.part && ls $A && mv $A/v1.part $A/v1", A=str(app), D=str(plain)
    )
    assert (done.returncode, done.stderr) == (0, "") and "v1.part" in done.stdout
    assert (app / "v1" / "manifest.json").exists() and not (app / "v1.part").exists()
    assert shared_site.write("restart", app.name).startswith("pid ")
    small.wait_progress()


def test_an_import_that_is_not_an_image_is_refused(
    shared_site: Site, image: Path, tmp_path: Path
) -> None:
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "pages-1.img").write_bytes(b"nothing of CRIU's")
    app = shared_site.mnt / "images" / f"junk.{image.parent.name}"
    done = shared_site.sh(
        "mkdir $A && cp -r $D $A/v1.part && mv $A/v1.part $A/v1", A=str(app), D=str(junk)
    )
    assert done.returncode == 1 and "Bad message" in done.stderr, done
    assert (app / "v1.part" / "pages-1.img").read_bytes() == b"nothing of CRIU's"
    assert not (app / "v1").exists()
    done = shared_site.sh("rm -r $A", A=str(app))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_keeps_what_is_removed_under_it(shared_site: Site, image: Path) -> None:
    pages = image / "pages-1.img"
    size = pages.stat().st_size
    with open(pages, "rb", buffering=0) as file:
        begin = file.read(100)
        assert shared_site.sh("rm -r $I", I=str(image)).returncode == 0
        try:
            rest = begin + file.read()
        except OSError as exc:
            assert exc.errno in (3, 116), exc  # gone, and never other bytes
        else:
            assert len(rest) == size


def test_names_that_no_app_can_have(shared_site: Site) -> None:
    for name in ("..x", ".hidden", "a b", "-x", "ä", "x" * 200, "v/1"):
        path = shared_site.mnt / "images" / name
        with pytest.raises(OSError):
            path.mkdir()
    assert not [each for each in os.listdir(shared_site.mnt / "images") if " " in each]


def test_a_killed_copy_leaves_an_import_that_can_be_removed(
    shared_site: Site, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v1"
    shutil.copytree(image, out)
    (out / "manifest.json").unlink()  # whatever order cp takes, it is not whole before its end
    with open(out / "zzz", "wb") as hole:
        hole.truncate(1 << 30)
    app = shared_site.mnt / "images" / f"half.{image.parent.name}"
    app.mkdir()
    copy = subprocess.Popen(["cp", "-r", "--sparse=never", str(out), str(app / "v1")])
    try:
        until(lambda: (app / "v1" / "zzz").exists(), "the copy under way")
        copy.send_signal(signal.SIGKILL)
        copy.wait(10)
    finally:
        copy.kill()
    assert not (app / "latest").is_symlink()
    done = shared_site.sh("rm -r $A", A=str(app))
    assert (done.returncode, done.stderr) == (0, "") and not app.exists()
