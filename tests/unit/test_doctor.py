"""krg doctor, and what up and down look at: each probe against the real thing, no root needed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from krgfs import cli, cli_criu, cli_node, doctor, errors, service
from krgfs.doctor import Check, Machine
from krgfs.service import Places

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def places(tmp_path):
    return Places(str(tmp_path / "state"), str(tmp_path / "run"), str(tmp_path / "krg"))


@pytest.fixture
def criu(tmp_path):
    """Make programs that answer as a CRIU would: its version, and what `check` says."""

    def make(version, checks=True, where="bin"):
        path = tmp_path / where / "criu"
        path.parent.mkdir(exist_ok=True)
        verdict = "echo Looks good." if checks else "echo 'Error: no vDSO'; exit 1"
        path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "Version: {version}" && exit\n{verdict}\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


def checks_of(probe, places, path=""):
    found = cli_criu.checked(cli_criu.find_criu(path, "")) if path else cli_criu.Criu("", "")
    return list(probe(Machine(places, found, IS_ROOT)))


# -- CRIU


@pytest.mark.parametrize(
    ("on_path", "fetched", "chosen"),
    [
        ("4.2.1", "4.3", "bin"),
        ("4.1.1", "4.2", "fetched"),
        ("3.17", "", "bin"),
        ("", "4.2.1", "fetched"),
        ("", "4.1", "fetched"),
        ("", "", ""),
    ],
)
def test_the_newest_enough_criu_is_chosen(on_path, fetched, chosen, criu, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_criu, "SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if on_path:
        criu(on_path)
    if fetched:
        criu(fetched, where="fetched")
    found = cli_criu.find_criu("", str(tmp_path / "fetched" / "criu"))
    assert found.path == (str(tmp_path / chosen / "criu") if chosen else "")


def test_a_given_criu_is_taken_as_it_is(criu):
    path = criu("3.17")
    assert cli_criu.find_criu(path) == cli_criu.Criu(path, "3.17")
    assert cli_criu.find_criu("/no/such/criu") == cli_criu.Criu("/no/such/criu", "")


@pytest.mark.parametrize(
    ("text", "found"),
    [("4.2.1", (4, 2, 1)), ("4.2", (4, 2)), ("6.18.44-fc-v595", (6, 18, 44)), ("", ()), ("v1", ())],
)
def test_versions_compare_by_their_numbers(text, found):
    assert cli_criu.numbers(text) == found


def test_a_criu_that_is_content_is_ok(criu, places):
    (check,) = checks_of(doctor.criu, places, criu("4.2.1"))
    assert check.state == doctor.OK and "4.2.1" in check.found


def test_a_criu_that_is_old_is_a_warning(criu, places):
    (check,) = checks_of(doctor.criu, places, criu("4.1.1"))
    assert check.state == doctor.WARN and "fetch-criu" in check.remedy


def test_no_criu_is_a_failure(places):
    (check,) = checks_of(doctor.criu, places)
    assert check.state == doctor.FAIL and "quickstart" in check.remedy


@pytest.mark.skipif(not IS_ROOT, reason="only root takes `criu check` at its word")
def test_a_criu_that_complains_is_a_failure_with_its_words(criu, places):
    (check,) = checks_of(doctor.criu, places, criu("4.2.1", checks=False))
    assert check.state == doctor.FAIL and "no vDSO" in check.found


# -- the probes


@pytest.mark.parametrize("probe", doctor.TABLE, ids=lambda probe: probe.__name__)
def test_every_probe_answers_with_what_to_do(probe, places):
    found = checks_of(probe, places)
    assert found
    for check in found:
        assert check.state in (doctor.OK, doctor.WARN, doctor.FAIL)
        assert check.name and check.found and "\n" not in check.found
        assert check.remedy or check.state == doctor.OK


def test_the_names_of_checks_differ(places):
    names = [check.name for probe in doctor.TABLE for check in checks_of(probe, places)]
    assert len(names) == len(set(names))


def test_a_probe_that_stumbles_is_a_failed_check(places):
    def broken(machine):
        yield Check("first", doctor.OK, "")
        raise PermissionError(13, "Permission denied", "/dev/fuse")

    first, second = doctor._tried(broken, Machine(places, cli_criu.Criu("", ""), IS_ROOT))
    assert first.state == doctor.OK
    assert second.state == doctor.FAIL and "/dev/fuse" in second.found


def test_this_kernel_says_whether_it_can_checkpoint(places):
    (check,) = checks_of(doctor.checkpoint_restore, places)
    assert (check.state == doctor.OK) == os.path.exists("/proc/sys/kernel/ns_last_pid")


def test_capabilities_are_those_that_the_kernel_shows(places):
    kind = "CapEff:" if IS_ROOT else "CapBnd:"
    with open("/proc/self/status", encoding="ascii") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith(kind))
    found = {check.name: check.state for check in checks_of(doctor.capabilities, places)}
    for each in doctor.CAPABILITIES:
        assert (found[each.name] == doctor.OK) == bool(mask >> each.bit & 1)


@pytest.mark.skipif(not IS_ROOT, reason="only root may make cgroups")
def test_the_freezer_is_tried_and_leaves_nothing(places):
    (check,) = checks_of(doctor.freezer, places)
    leaves = [leaf for _, leaf in doctor._leaves() if leaf]
    assert check.state == (doctor.OK if leaves else doctor.FAIL)
    assert not any(os.path.exists(leaf) for leaf in leaves)
    assert "cannot make" in doctor._freezes("/proc/krg-doctor")


def test_the_filesystem_of_a_path_is_that_of_the_mount_it_is_on():
    assert doctor._type_of("/proc") == "proc"
    assert doctor._type_of("/proc/sys/kernel") == "proc"
    assert doctor._type_of("/process") == doctor._type_of("/")


def test_room_is_looked_for_where_the_store_will_be(places, tmp_path):
    (check,) = checks_of(doctor.store, places)
    assert check.found.endswith(f"below {tmp_path}")
    (tmp_path / "state" / "images").mkdir(parents=True)
    (check,) = checks_of(doctor.store, places)
    assert check.found.endswith(f"below {tmp_path}/state/images")


def test_nothing_mounted_is_a_warning(places):
    for probe in (doctor.mount, doctor.agent):
        (check,) = checks_of(probe, places)
        assert check.state == doctor.WARN and "krg up" in check.remedy


def test_a_check_fits_80_columns():
    check = Check(
        "cap_checkpoint_restore", doctor.WARN, "missing: " + "words " * 40, "do this " * 30
    )
    lines = cli_node.check_lines(check, 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("warn  cap_checkpoint_restore  missing:")
    assert any(line.startswith(" " * 30 + "-> do this") for line in lines)
    assert "->" not in cli_node.check_lines(check._replace(state=doctor.OK), 80)


def test_doctor_exits_with_0_unless_a_check_failed(criu, places, capsys):
    words = [
        "doctor",
        "--json",
        "--state",
        places.state,
        "--run",
        places.run,
        "--mount",
        places.mount,
    ]
    for version in ("4.2.1", ""):
        path = criu(version)
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, "--criu", path])
        report = json.loads(capsys.readouterr().out)
        failed = [check["name"] for check in report["checks"] if check["state"] == doctor.FAIL]
        assert caught.value.code == bool(failed)
        assert report["criu"] == {"path": path, "version": version, "ok": bool(version)}
        assert ("criu" in failed) == (not version)
    assert {"name", "state", "found", "remedy"} == set(report["checks"][0])


# -- whose daemons these are


def test_a_pidfile_is_believed_only_when_its_process_is_ours(places):
    os.makedirs(places.run)
    for text in ("", "nonsense", "4194304", str(os.getpid())):
        with open(places.pidfile(service.AGENT), "w", encoding="ascii") as file:
            file.write(text)
        with service.respawner(places, service.AGENT) as found:
            assert found is None


def test_a_respawner_is_known_by_its_arguments(places):
    pidfile = places.pidfile(service.AGENT)
    words = [
        "/x/krg-keeper",
        "respawn",
        "--name",
        "krg-agent",
        "--pidfile",
        pidfile,
        "--",
        "krg-agent",
    ]
    assert service.is_respawner(words, pidfile)
    assert not service.is_respawner(words, places.pidfile(service.MOUNT))
    assert not service.is_respawner(["/x/krg-keeper", "tree", pidfile], pidfile)
    assert not service.is_respawner([], pidfile)


def test_the_end_of_a_process_is_waited_for():
    code = "print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        child.stdout.readline()
        pidfd = os.pidfd_open(child.pid)
        assert not service.has_ended(pidfd, 0)
        assert service.arguments(child.pid)[1:] == ["-c", code]
        child.stdin.write(b"\n")
        child.stdin.close()
        assert service.has_ended(pidfd, 60)
        os.close(pidfd)


def test_the_agent_is_who_listens_at_the_socket(places):
    assert service.agent_pid(places) == 0
    os.makedirs(places.run)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(places.socket)
        assert service.agent_pid(places) == 0
        listener.listen()
        assert service.agent_pid(places) == os.getpid()
        assert not service.is_service(os.getpid())


def test_our_programs_are_found_beside_python():
    assert service.program("pytest") == os.path.join(os.path.dirname(sys.executable), "pytest")
    with pytest.raises(errors.EngineFailed, match="install krgfs"):
        service.program("krg-no-such-program")


@pytest.mark.parametrize("act", [service.up, service.down])
def test_only_root_starts_and_ends(act, places):
    child = os.fork()  # the Python of this environment may be out of another uid's reach
    if not child:
        try:
            if IS_ROOT:
                os.setuid(65534)
            act(places)
        except errors.NotYours as exc:
            os._exit(3 if "as root" in exc.message else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert not os.path.exists(places.run)


@pytest.mark.skipif(not IS_ROOT, reason="only root may ask")
def test_down_is_harmless_where_nothing_is_up(places):
    assert service.down(places) == service.Down((), 0, 0)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (service.Down((), 0, 0), "krgfs was not up"),
        (service.Down(("mount", "agent"), 0, 0), "krgfs is down"),
        (
            service.Down(("mount", "agent"), 1, 1),
            "krgfs is down; 1 restarted tree lives on under its keeper; "
            "1 tree stays frozen until `krg up` and `krg thaw`",
        ),
        (
            service.Down(("mount", "agent"), 2, 3),
            "krgfs is down; 2 restarted trees live on under their keepers; "
            "3 trees stay frozen until `krg up` and `krg thaw`",
        ),
    ],
)
def test_down_says_what_goes_on(found, line):
    assert cli_node.down_line(found) == line
