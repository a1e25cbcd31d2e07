"""krg: tables, options from the verbs' table, exit codes, completion. No mount, no root."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from krgfs import (
    cli,
    cli_files,
    cli_show,
    cli_table,
    cli_verbs,
    cli_wait,
    cli_words,
    errors,
    render,
)
from krgfs.cli_files import Files
from krgfs.cli_table import Column
from krgfs.model import App, Image, Job, Phase, View
from krgfs.verbs import TABLE, Bare, Verb, Word, parse

SAMPLES = {"APP": "blast", "TEXT": "two words", "TIME": "10m", "SIGNAL": "USR1"}
FULL = "krg: standard output: No space left on device\n"
QUICKSTART = Path(__file__).resolve().parents[2] / "contrib/quickstart"
COMMANDS = {
    "checkpoint": ("checkpoint", "1"),
    "restart": ("restart", "blast/v3"),
    "freeze": ("freeze", "1"),
    "thaw": ("freeze", "0"),
}


def exit_of(words, capsys):
    """Run krg in this process; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


@pytest.fixture
def bare(tmp_path):
    """A directory where a mount could be and none is."""
    return tmp_path / "krg"


@pytest.fixture
def tree(tmp_path):
    """Plain directories with the names that a mount has, for what only looks at names."""
    (tmp_path / "version").write_text("0.1.0\n")
    for name in (
        "procs/42",
        "images/blast/v1",
        "images/blast/v2",
        "nodes/n1",
        "nodes/n2",
        "jobs/7",
        "store",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images/blast/latest").symlink_to("v2")
    (tmp_path / "images/blast/before-lr").symlink_to("v1")
    (tmp_path / "images/blast/index").touch()
    (tmp_path / "store/status").write_bytes(render.store_status(View()))
    return tmp_path


# -- tables


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (812, "812"),
        (1023, "1.0K"),
        (4200, "4.1K"),
        (531 << 20, "531M"),
        (1 << 30, "1.0G"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_sizes_are_four_characters(amount, text):
    assert cli_table.size(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"),
        (0.21, "0.2s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (125, "2m05s"),
        (3599, "59m"),
        (3900, "1h05m"),
        (200000, "2d07h"),
    ],
)
def test_durations(seconds, text):
    assert cli_table.duration(seconds) == text


def test_a_table_is_as_wide_as_it_needs():
    text = cli_table.table([Column("PID", right=True), Column("NAME")], [("7", "sh"), ("4242", "")])
    assert text == " PID  NAME\n   7  sh\n4242  -\n"


def test_a_table_fits_a_terminal_by_the_middle_of_its_loose_columns():
    columns = [Column("PID", right=True), Column("APP", least=12), Column("NAME", least=8)]
    app, name = (
        "python3.12345.a-rather-long-hostname",
        "a-command-with-a-long-name-that-goes-on-and-on",
    )
    for line in cli_table.table(columns, [("12345", app, name)], 60).splitlines():
        assert len(line) <= 60
    assert "python3.12" in line and "stname" in line and "…" in line
    assert app in cli_table.table(columns, [("12345", app, name)])


def test_a_process_list_of_long_names_fits_80_columns():
    process = {
        "pid": "4194303",
        "inner_pid": "4194302",
        "app": "python3.4194303.compute-node-0017",
        "state": "running",
        "started": "2026-01-01T00:00:00.000Z",
        "rss": str(123 << 30),
        "tree": "1024",
        "last_image": "python3.4194303.compute-node-0017/v1234",
        "name": "python3-with-15",
    }
    row = cli_show.process_row(process, cli_table.instant("2026-03-01T00:00:00Z"))
    assert row[7] == "v1234"
    columns = cli_show.PROCESS_COLUMNS
    for line in cli_table.table(columns, [row], 80).splitlines():
        assert len(line) <= 80
    assert "4194303" in line and "59d00h" in line and "v1234" in line


def test_only_processes_that_krgfs_dealt_with_are_known():
    assert not cli_show.is_known({"pid": "7", "inner_pid": "7", "app": "", "state": "running"})
    assert cli_show.is_known({"pid": "7", "inner_pid": "7", "app": "blast"})
    assert cli_show.is_known({"pid": "7", "inner_pid": "300"})
    assert cli_show.is_known({"pid": "7", "inner_pid": "7", "state": "frozen"})


def test_an_index_that_the_mount_writes_is_read_back():
    app = App(name="blast", uid=0, labels={"before-lr": 3, "good": 3})
    image = Image(
        app="blast",
        version=3,
        created=1769860800.25,
        node="n1",
        uid=0,
        freeze_ms=210.4,
        logical_bytes=1 << 30,
        stored_bytes=5 << 20,
        new_bytes=1 << 20,
        desc="a text of  several words",
    )
    (line,) = render.index(app, [image]).decode().splitlines()
    found = cli_show.version_of("blast", line)
    assert found.version == "v3" and found.node == "n1" and found.freeze_ms == 210.4
    assert (found.logical_bytes, found.stored_bytes, found.copies) == (1 << 30, 5 << 20, 1)
    assert found.labels == ("before-lr", "good") and found.desc == "a text of  several words"
    assert (found.new_bytes, found.shared_bytes) == (1 << 20, 4 << 20)
    assert (found.facts()["ratio"], found.facts()["shared_bytes"]) == (204.8, 4 << 20)
    bare_line = render.index(
        App(name="blast", uid=0), [Image(app="blast", version=1, created=1.0, node="n1", uid=0)]
    )
    assert cli_show.version_of("blast", bare_line.decode().strip()).labels == ()


def test_a_job_that_the_mount_writes_becomes_a_row_and_a_bar():
    job = Job(
        id=7,
        verb="checkpoint",
        object="nodes/n1/procs/4242",
        node="n1",
        uid=0,
        words="1",
        started=1.0,
        phase=Phase.DUMPING,
        bytes_done=512 << 20,
        bytes_total=1 << 30,
    )
    lines = (line.partition(" ") for line in render.job_status(job).decode().splitlines())
    status = {key: value for key, _, value in lines}
    row = cli_show.job_row(status, 2.0)
    assert row[:4] == ("7", "checkpoint", "4242", "dumping") and row[6] == "512M"
    assert row[7].endswith("left")
    line = cli_table.bar("checkpoint 4242", status, 80)
    assert line.startswith("checkpoint 4242: dumping [###") and "50% 512M/1.0G" in line
    assert len(line) < 80


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_stays_on_its_line(columns):
    status = {
        "phase": "restoring",
        "bytes_done": "531000000",
        "bytes_total": "1100000000",
        "rate": "430000000",
        "eta_s": "1.3",
    }
    title = "restart " + "python3.12345.a-rather-long-hostname/v12" * 2
    for known in (status, {"phase": "freezing", "seconds": "1.25"}, {}):
        assert len(cli_table.bar(title, known, columns)) <= columns or columns == 40


@pytest.mark.parametrize(
    ("seen", "now", "new"),
    [
        ([], ["a"], ["a"]),
        (["a", "b"], ["a", "b", "c"], ["c"]),
        (["a", "b"], ["b", "c", "d"], ["c", "d"]),
        (["a", "b"], ["a", "b"], []),
        (["a"], ["x", "y"], ["x", "y"]),
    ],
)
def test_following_a_log_that_drops_its_oldest_lines(seen, now, new):
    assert cli_show.lines_after(seen, now) == new


# -- words


def words_of(verb):
    return TABLE[verb].words


@pytest.mark.parametrize("name", COMMANDS)
def test_every_word_of_a_verb_is_an_option(name):
    verb, _ = COMMANDS[name]
    own = {"freeze": {"signal", "while-open"}, "thaw": {"for", "while-open"}}.get(name, set())
    (command,) = (cli.program([name]).commands[name],)
    options = {opt for param in command.params for opt in param.opts}
    for word in words_of(verb):
        assert (f"--{word.name}" in options) == (word.name not in own)


@pytest.mark.parametrize(
    ("verb", "first", "word"),
    [(v, f, w) for v, f in COMMANDS.values() for w in words_of(v)],
    ids=lambda value: value.name if isinstance(value, Word) else str(value),
)
def test_an_option_becomes_the_word(verb, first, word):
    value = (cli_words.choices(word) or [SAMPLES.get(word.values, "x")])[-1] if word.parse else True
    given = {cli_words.PREFIX + word.name.replace("-", "_"): value}
    try:
        line = cli_words.line(verb, first, given)
    except errors.BadWords:
        assert verb == "freeze"  # for= goes with 1 only, signal= with 0 only
        return
    said = getattr(parse(verb, line), word.field)
    assert said == (word.parse(value) if word.parse else True)


def test_a_new_word_is_an_option_at_once(monkeypatch):
    brand_new = Word("copies", "name", "how many nodes keep it", str, str, "N")
    row = TABLE["checkpoint"]._replace(words=(*words_of("checkpoint"), brand_new))
    monkeypatch.setitem(TABLE, "checkpoint", row)

    @click.command()
    @cli_words.options("checkpoint")
    def command(**given):
        click.echo(cli_words.line("checkpoint", "1", given))

    assert "--copies" in {opt for param in command.params for opt in param.opts}
    assert cli_words.line("checkpoint", "1", {"word_copies": "2"}) == "1 copies=2"


def test_words_as_in_the_file_may_follow():
    line = cli_words.line("checkpoint", "1", {"word_name": "b"}, ["desc=two words", "async"])
    assert line == "1 name=b 'desc=two words' async"


def test_no_verb_of_the_table_is_forgotten():
    commands = set(cli.ROOMS)
    assert set(TABLE) <= commands
    assert isinstance(TABLE["checkpoint"], Verb) and isinstance(TABLE["checkpoint"].bare, Bare)


# -- errors and exit codes


@pytest.mark.parametrize("cls", errors.ALL)
def test_a_read_back_error_has_its_exit_code(cls):
    name = errno.errorcode[cls.errno]
    found = cli_files.error_of(f"error {name} cannot do it: because")
    assert type(found) is cls and found.message == "cannot do it: because"
    assert found.exit_code == cls.exit_code


def test_what_is_no_error_is_none():
    for line in ("", "blast/v3", "running jobs/7", "pid 7", "errors/v1"):
        assert cli_files.error_of(line) is None


@pytest.mark.parametrize(
    "words",
    [
        ("ps",),
        ("images",),
        ("nodes",),
        ("jobs",),
        ("log",),
        ("checkpoint", "42"),
        ("restart", "blast"),
        ("freeze", "42"),
        ("thaw", "42"),
        ("signal", "42", "TERM"),
        ("wait", "42"),
        ("cancel", "7"),
        ("verify",),
        ("sweep",),
        ("diff", "blast/v1", "blast/v2"),
        ("export", "blast", "-"),
        ("import", "-"),
    ],
)
def test_without_a_mount_each_command_says_so(words, bare, capsys):
    code, out, err = exit_of([*words, "--mount", bare], capsys)
    assert (code, out) == (errors.Unreachable.exit_code, "")
    assert err == f"krg: krgfs is not mounted at {bare}; `krg up` starts it\n"
    assert not bare.exists()
    assert exit_of(["--mount", bare, *words], capsys)[0] == code


def run_to(output, *words, **env):
    """Run krg in a process of its own that writes to `output`; returns exit code and stderr."""
    command = [sys.executable, "-m", "krgfs.cli", *map(str, words)]
    done = subprocess.run(
        command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, env=os.environ | env
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        ("ps",),
        ("ps", "--json"),
        ("images",),
        ("nodes",),
        ("jobs",),
        ("log",),
        ("log", "--follow"),
        ("--help",),
        ("ps", "--help"),
        ("--version",),
    ],
)
def test_an_output_that_takes_nothing_is_one_sentence(words, unbuffered, tree):
    (tree / "log").write_text("a line\n")
    with open("/dev/full", "wb") as full:
        code, err = run_to(full, "--mount", tree, *words, PYTHONUNBUFFERED=unbuffered)
    assert (code, err) == (errors.NoRoom.exit_code, FULL)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_completion_that_cannot_be_written_is_one_sentence(shell):
    with open("/dev/full", "wb") as full:
        code, err = run_to(full, _KRG_COMPLETE=f"{shell}_source", PYTHONUNBUFFERED="")
    assert (code, err) == (errors.NoRoom.exit_code, FULL)


def test_a_pipe_that_nobody_reads_is_no_matter_for_words(tree):
    (tree / "log").write_text("a line\n")
    for words in (("ps",), ("log",)):
        theirs, ours = os.pipe()
        os.close(theirs)
        assert run_to(ours, "--mount", tree, *words)[1] == ""
        os.close(ours)


def test_a_log_is_followed_until_nobody_reads(tree):
    (tree / "log").touch()
    command = [sys.executable, "-m", "krgfs.cli", "--mount", tree, "log", "--follow", "-n", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    (tree / "log").write_text("a line\n")
    with subprocess.Popen(command, **pipes) as krg:
        assert krg.stdout.readline() == b"a line\n"
        krg.stdout.close()
        (tree / "log").write_text("a line\nanother\n")
        assert krg.stderr.read() == b""


def test_a_closed_output_is_nothing_to_complain_about(tree):
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "krgfs.cli"]
    done = subprocess.run([*command, "--mount", tree, "ps"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_refusal_that_nobody_foresaw_is_a_sentence():
    found = cli.explained(OSError(errno.EACCES, "Permission denied", "/run/krgfs"))
    assert (type(found), found.message) == (errors.EngineFailed, "/run/krgfs: Permission denied")
    assert cli.explained(OSError(errno.ENOSPC, "No room")).message == "No room"


def test_what_is_not_there_is_gone(tree, capsys):
    code, _, err = exit_of(["checkpoint", "4711", "--mount", tree], capsys)
    assert (code, err) == (errors.Gone.exit_code, "krg: there is no process 4711\n")
    code, _, err = exit_of(["jobs", "99", "--mount", tree], capsys)
    assert (code, err) == (errors.Gone.exit_code, "krg: there is no job 99\n")


@pytest.mark.parametrize(
    "words",
    [
        ("checkpoint", "42", "--then", "explode"),
        ("checkpoint", "42", "wat=1"),
        ("checkpoint", "42", "name=a", "name=b"),
        ("checkpoint", "42", "--name", "a/b"),
        ("checkpoint",),
        ("restart", "a b"),
        ("restart", "blast", "--pid", "any"),
        ("freeze", "42", "--for", "soon"),
        ("freeze", "42", "--while"),
        ("thaw", "42", "--signal", "NONE"),
        ("signal", "42", "NONE"),
        ("jobs", "-n", "many"),
        ("up", "--node", "a/b"),
        ("up", "--criu", "/no/such/criu"),
        ("frobnicate",),
        ("ps", "--frobnicate"),
    ],
)
def test_wrong_words_exit_with_2_and_touch_nothing(words, bare, capsys):
    code, out, err = exit_of(["--mount", bare, *words], capsys)
    assert (code, out) == (errors.BadWords.exit_code, "")
    assert err.strip() and "Traceback" not in err


def test_an_odd_pid_is_refused_by_name(tree, capsys):
    code, _, err = exit_of(["checkpoint", "../..", "--mount", tree], capsys)
    assert code == errors.Gone.exit_code and "'../..' is not a process" in err


def test_an_interrupted_write_is_not_repeated():
    ours, theirs = os.pipe()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        os.set_blocking(theirs, False)
        with pytest.raises(BlockingIOError):
            while os.write(theirs, b"x" * 65536):
                pass
        os.set_blocking(theirs, True)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(errors.Cancelled):
            cli_files.write(theirs, "1")
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(ours)
        os.close(theirs)


# -- commands


@pytest.mark.parametrize(
    ("said", "code"),
    [("exit 0", 0), ("exit 3", 3), ("signal KILL", 137), ("signal TERM", 143), ("ended", 0)],
)
def test_wait_exits_as_the_process_did(said, code):
    assert cli_verbs.exit_status(said) == code


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("blast/v3", {"image": "blast/v3"}),
        ("restarted blast/v3", {"image": "blast/v3", "restarted": True}),
        ("pid 7 8", {"pids": [7, 8]}),
        ("running jobs/12", {"job": 12}),
    ],
)
def test_an_outcome_as_json(said, found):
    assert cli_verbs.outcome(said) == found


@pytest.mark.parametrize(
    ("words", "apart"),
    [
        (
            ["freeze", "7", "--while", "ls", "--json"],
            ["freeze", "7", "--while", "--", "ls", "--json"],
        ),
        (["freeze", "7", "--while", "--", "ls"], ["freeze", "7", "--while", "--", "ls"]),
        (["freeze", "7", "--for", "1m"], ["freeze", "7", "--for", "1m"]),
        (["checkpoint", "7", "--while"], ["checkpoint", "7", "--while"]),
    ],
)
def test_the_command_after_while_keeps_its_own_options(words, apart):
    assert cli.with_command_apart(words) == apart


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["/no/such"], 127),
    ],
)
def test_freeze_while_holds_the_file_and_exits_as_its_command(command, code, tree, capsys):
    before = signal.getsignal(signal.SIGINT)
    (tree / "procs/42/freeze").touch()
    try:
        assert exit_of(["--mount", tree, "freeze", "42", "--while", *command], capsys)[0] == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tree / "procs/42/freeze").read_text() == "1 while-open"


@pytest.mark.parametrize(
    ("error", "job"),
    [
        (errors.Cancelled("you are about to be frozen yourself; jobs/7 goes on"), "7"),
        (errors.Cancelled("jobs/31: cancelled: by root"), "31"),
        (errors.Cancelled("a signal came"), ""),
        (errors.Busy("jobs/7 holds it"), ""),
    ],
)
def test_a_job_that_goes_on_is_known(error, job):
    assert cli_wait.named_job(error) == job


def job_file(tree, number, verb, object, words, ended):
    job = Job(
        id=number,
        verb=verb,
        object=object,
        node="n1",
        uid=0,
        words=words,
        started=1.0,
        phase=Phase.DONE if ended else Phase.DUMPING,
        ended=2.0 if ended else 0.0,
    )
    (tree / f"jobs/{number}").mkdir(exist_ok=True)
    (tree / f"jobs/{number}/status").write_bytes(render.job_status(job))


def test_our_job_is_told_from_the_others(tree):
    job_file(tree, 7, "checkpoint", "nodes/n1/procs/42", "1", ended=True)
    job_file(tree, 8, "checkpoint", "nodes/n1/procs/43", "1", ended=False)
    job_file(tree, 9, "restart", "", "blast/v1", ended=True)
    files = Files(str(tree))
    path = files.path("procs", "42", "checkpoint")
    assert cli_wait.job_of(files, path, "1", 7) == {}
    assert cli_wait.job_of(files, path, "1", 6)["id"] == "7"
    assert cli_wait.job_of(files, files.path("procs", "43", "checkpoint"), "1", 9)["id"] == "8"
    assert cli_wait.job_of(files, files.path("procs", "43", "checkpoint"), "1 name=a", 7) == {}
    assert cli_wait.job_of(files, files.path("restart"), "blast/v1", 8)["id"] == "9"
    assert cli_wait.job_of(files, files.path("restart"), "blast/v2", 8) == {}


def test_a_progress_line_is_for_terminals(capsys):
    assert not cli_wait.Progress("checkpoint 42").is_seen


def test_a_command_imports_little():
    code = (
        "import sys; from krgfs import cli; cli.program(['ps'])\n"
        "print({'trio', 'pyfuse3', 'msgspec', 'asyncio', 'subprocess'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- completion


def completed(tree, *words):
    """Return what is offered for the last word."""
    shell = ShellComplete(cli.program(), {"obj": Files(str(tree))}, "krg", "_KRG_COMPLETE")
    given = ["--mount", str(tree), *words[:-1]]
    return [item.value for item in shell.get_completions(given, words[-1])]


def test_commands_complete(tree):
    assert completed(tree, "che") == ["checkpoint"]


def test_words_complete_from_the_table(tree):
    assert completed(tree, "checkpoint", "42", "th") == ["then="]
    assert completed(tree, "checkpoint", "42", "then=") == [
        "then=run",
        "then=stop",
        "then=kill",
        "then=freeze",
    ]
    assert completed(tree, "checkpoint", "42", "then=s") == ["then=stop"]
    assert completed(tree, "checkpoint", "42", "--tcp", "k") == ["keep"]
    assert completed(tree, "restart", "blast", "pid=") == ["pid=auto", "pid=keep", "pid=new"]


def test_words_complete_where_the_shell_breaks_them_at_the_equals_sign(tree):
    assert completed(tree, "checkpoint", "42", "then", "=", "ki") == ["kill"]
    assert completed(tree, "checkpoint", "42", "tcp", "=") == ["fail", "close", "keep"]


def test_names_complete(tree):
    assert completed(tree, "restart", "bl") == ["blast/latest"]
    found = completed(tree, "restart", "blast/")
    assert sorted(found) == ["blast/before-lr", "blast/latest", "blast/v1", "blast/v2"]
    assert completed(tree, "restart", "blast", "--node", "n") in (["n1", "n2"], ["n2", "n1"])
    assert completed(tree, "jobs", "") == ["7"]
    assert completed(tree, "images", "b") == ["blast"]
    assert "USR1" in completed(tree, "signal", "42", "us")


def test_pids_complete_with_what_they_are(tree):
    assert str(os.getpid()) not in completed(tree, "checkpoint", "")  # krg itself
    assert str(os.getppid()) in completed(tree, "checkpoint", str(os.getppid()))


def test_completion_without_a_mount_offers_nothing(bare):
    assert completed(bare, "restart", "") == []
    assert completed(bare, "jobs", "") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_help_names_a_line_for_each_shell(shell, capsys):
    _, out, _ = exit_of(["--help"], capsys)
    assert f"_KRG_COMPLETE={shell}_source krg" in out


# -- what the quickstart says of krg


def what_next(top, path):
    """Return the hints that the quickstart ends with, for a tree at `top`."""
    script = 'eval "$(sed "/^need_root$/,\\$d" "$0")"; top=$TREE work=/tmp/w; what_next sh.7.n1/v1'
    done = subprocess.run(
        ["bash", "-c", script, QUICKSTART],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{path}:{os.environ['PATH']}", "TREE": str(top)},
    )
    return done.stdout.splitlines()


@pytest.fixture
def ours(tmp_path):
    krg = tmp_path / "tree/.venv/bin/krg"
    krg.parent.mkdir(parents=True)
    krg.touch(0o755)
    (tmp_path / "bin").mkdir()
    return krg


def test_the_quickstart_says_krg_where_that_is_ours(ours, tmp_path):
    (tmp_path / "bin/krg").symlink_to(ours)
    lines = what_next(tmp_path / "tree", tmp_path / "bin")
    assert "    krg down" + " " * 38 + "unmount /krg and stop the agent" in lines
    assert all(line[49] == " " and line[50] != " " for line in lines)


def test_the_quickstart_says_where_ours_is_when_krg_is_something_else(ours, tmp_path):
    (tmp_path / "bin/krg").touch(0o755)
    said = what_next(tmp_path / "tree", tmp_path / "bin")[-2:]
    assert [line.split()[:2] for line in said] == [[str(ours), "ps"], [str(ours), "down"]]
