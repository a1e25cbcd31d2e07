"""The manual pages have every file, word, errno, option, exit code and key, and no other.

The pages are read as they are written: a thing is documented where it is the head of an item
(`.It`), below the section or item that it belongs to. Mentioned in passing it does not count.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import click
import pytest

from agent import daemon, figures
from krgfs import cli, errors, fuse, mount, places, policy, render, table, tree, verbs
from krgfs.model import Image, Import, Job, Load, Node, ProcessId, Tree, View

ROOT = Path(__file__).parents[2]
MAN = ROOT / "man"
PAGES = sorted(MAN.glob("*.[1-8]"))
BY_THE_KERNEL = {"EACCES", "ENOENT", "ECONNABORTED", "ENOTCONN"}
MACROS = set("Ar Bc Bo Cm Er Ev Fl Ic Li Ns Op Pa Va".split())  # noqa: SIM905


class Item(NamedTuple):
    """The head of an item: its section, subsection, the item that its list is in, and itself."""

    section: str
    subsection: str
    parent: str
    head: str
    line: int


def plain(words: str) -> str:
    """Return what a line of macros shows: `Cm tcp Ns = Ns Ar HOW` is tcp=HOW."""
    text, glue, dash = "", "", ""
    for word in re.findall(r'"[^"]*"|\S+', words):
        if word == "Ns":
            glue = ""
            text = text.rstrip(" ")
        elif word in MACROS:
            dash = "-" if word == "Fl" else dash
        else:
            spaced = "" if word in (",", ".", ";", ":", ")") else glue
            text += spaced + dash + word.strip('"')
            glue, dash = " ", ""
    return text


def items(page: str) -> list[Item]:
    found: list[Item] = []
    section = subsection = ""
    open_lists: list[str] = []
    for number, line in enumerate((MAN / page).read_text().splitlines()):
        macro, _, rest = line.partition(" ")
        if macro == ".Sh":
            section, subsection = rest, ""
        elif macro == ".Ss":
            subsection = rest.split()[0]
        elif macro == ".Bl":
            open_lists.append("")
        elif macro == ".El":
            open_lists.pop()
        elif macro == ".It":
            head = plain(rest)
            parent = open_lists[-2] if len(open_lists) > 1 else ""
            open_lists[-1] = head
            found.append(Item(section, subsection, parent, head, number))
    assert not open_lists, f"{page}: a list is not closed"
    return found


def body(page: str, item: Item) -> str:
    """Return the text below an item's head, up to the next item or the end of the list."""
    lines = (MAN / page).read_text().splitlines()[item.line + 1 :]
    end = next(i for i, line in enumerate(lines) if re.match(r"\.(It|El)", line))
    return " ".join(plain(line[1:]) if line.startswith(".") else line for line in lines[:end])


def differences(documented: Iterable[str], real: Iterable[str]) -> list[str]:
    there, wanted = set(documented), set(real)
    return sorted(
        [f"{each} is not in the manual" for each in wanted - there]
        + [f"{each} is in the manual alone" for each in there - wanted]
    )


# -- files and their modes


def file_differences(rows: Iterable[places.Row]) -> list[str]:
    heads = [i.head for i in items("krgfs.5") if i.section == "FILES" and not i.parent]
    return differences(heads, (f"{row.path} Pq {row.mode:04o}" for row in rows if row.path))


def test_every_file_and_mode() -> None:
    assert file_differences(table.TABLE) == []


def test_every_variable_part_is_explained() -> None:
    parts = [i.head for i in items("krgfs.5") if i.section == "DESCRIPTION"]
    assert differences(parts, tree.VARIABLES) == []


# -- verbs and words


def word_differences(verb: verbs.Verb) -> list[str]:
    found = [i for i in items("krgfs.5") if (i.section, i.subsection) == ("VERBS", verb.name)]
    real = {w.name: w for w in verb.words}
    wrong = differences((i.head for i in found), (form(w) for w in verb.words))
    for item in found:
        word = real.get(re.split("=| ", item.head)[0])
        if word is not None and word.parse and (default := default_of(verb, word)):
            wrong += [
                f"{item.head}: the default is {default}"
                for text in [body("krgfs.5", item)]
                if f"default is {default}." not in text
            ]
    return wrong


def form(word: verbs.Word) -> str:
    return f"{word.name}={word.values}" if word.parse else word.name


def default_of(verb: verbs.Verb, word: verbs.Word) -> str:
    """Return what a word is taken for when it is not given, as it is written; '' for nothing."""
    value = getattr(verb.command(**required(verb)), word.field)
    return word.show(value) if value else ""


def required(verb: verbs.Verb) -> dict[str, Any]:
    examples = {"image": verbs.ImageRef("a"), "on": True, "number": 15}
    return {verb.bare.field: examples[verb.bare.field]} if verb.bare.field else {}


@pytest.mark.parametrize("name", verbs.TABLE)
def test_every_word(name: str) -> None:
    assert word_differences(verbs.TABLE[name]) == []


def test_every_verb_and_no_other() -> None:
    lines = (MAN / "krgfs.5").read_text().partition("\n.Sh VERBS\n")[2].partition("\n.Sh ")[0]
    assert differences(re.findall(r"^\.Ss (\S+)", lines, re.MULTILINE), verbs.TABLE) == []


# -- errors and exit codes


def errno_differences(classes: Iterable[type[errors.KrgError]]) -> list[str]:
    found = {i.head.split()[1]: i for i in items("krgfs.5") if i.section == "ERROR NUMBERS"}
    there = {getattr(errno, name): name for name in found.keys() - BY_THE_KERNEL}
    shown = {each.errno: errors.name_of(each.errno) for each in classes}
    wrong = differences(map(errors.name_of, there), shown.values())
    texts = {number: f"{name} {body('krgfs.5', found[name])}" for number, name in there.items()}
    return wrong + [
        f"files show {name}"
        for number, name in shown.items()
        if name not in texts.get(number, name)
    ]


def test_every_errno() -> None:
    assert errno_differences(errors.ALL) == []


def code_differences(classes: Iterable[type[errors.KrgError]]) -> list[str]:
    found = [i for i in items("krg.1") if i.section == "EXIT STATUS"]
    wrong = differences((i.head for i in found), ["0", *(str(each.exit_code) for each in classes)])
    texts = {i.head: body("krg.1", i) for i in found}
    return wrong + [
        f"{each.exit_code} is {errors.name_of(each.errno)} as well"
        for each in classes
        if each.errno not in numbers_in(texts.get(str(each.exit_code), ""))
    ]


def numbers_in(text: str) -> set[int]:
    return {getattr(errno, name, 0) for name in re.findall(r"\bE[A-Z0-9]{2,}\b", text)}


def test_every_exit_code_with_its_errno() -> None:
    assert code_differences(errors.ALL) == []


# -- options


def spellings(command: click.Command) -> Iterator[str]:
    for each in command.params:
        if isinstance(each, click.Option) and not each.hidden:
            yield from each.opts


def documented_options(found: Iterable[Item]) -> Iterator[str]:
    for item in found:
        yield from re.findall(r"(?<![^ ])--?[a-z][a-z-]*", item.head)


def option_differences(command: click.Command, page: str, subsection: str = "") -> list[str]:
    general = {"-h", "--help"}
    section = "COMMANDS" if subsection else "DESCRIPTION"
    found = [i for i in items(page) if (i.section, i.subsection) == (section, subsection)]
    return differences(set(documented_options(found)) - general, set(spellings(command)) - general)


KRG = cli.program()


@pytest.mark.parametrize("name", KRG.commands)
def test_every_option_of_a_command(name: str) -> None:
    assert option_differences(KRG.commands[name], "krg.1", name) == []


def test_every_command_and_no_other() -> None:
    lines = (MAN / "krg.1").read_text().partition("\n.Sh COMMANDS\n")[2].partition("\n.Sh ")[0]
    assert differences(re.findall(r"^\.Ss (\S+)", lines, re.MULTILINE), KRG.commands) == []


@pytest.mark.parametrize(
    ("command", "page"), [(KRG, "krg.1"), (daemon.main, "krg-agent.8"), (mount.main, "krgfs.8")]
)
def test_every_option_of_a_program(command: click.Command, page: str) -> None:
    assert option_differences(command, page) == []
    assert {"-h", "--help"} <= set(documented_options(items(page)))


def test_every_variable_of_the_environment() -> None:
    for page, commands in {
        "krg.1": [KRG, *KRG.commands.values()],
        "krg-agent.8": [daemon.main],
        "krgfs.8": [mount.main],
    }.items():
        heads = [i.head for i in items(page) if i.section == "ENVIRONMENT"]
        names = (each.envvar for command in commands for each in command.params if each.envvar)
        assert differences(heads, (str(name) for name in names)) == []


# -- keys of the flat-keyed files, by rendering them


def keys(text: bytes) -> list[str]:
    return [line.split()[0] for line in text.decode().splitlines()]


def node_info() -> dict[str, str]:
    engine = SimpleNamespace(version="4.2", path="/criu", features=("a",))
    freezer = SimpleNamespace(hierarchy=SimpleNamespace(version=2))
    return figures.info(cast(Any, SimpleNamespace(engine=engine, freezer=freezer)))


def metric_names() -> set[str]:
    text = render.metrics(View()).decode()
    shown = {line.split()[0] for line in text.splitlines() if not line.startswith("#")}
    return shown | render._METRIC_HELP.keys() | counters()


def counters() -> set[str]:
    """Return the figures that the agent counts: the first argument of each State.count."""
    return {name.partition("{")[0] for name in first_arguments("count") if name.startswith("krg_")}


def first_arguments(method: str) -> Iterator[str]:
    """Yield the literal that each call of a method in the agent begins with."""
    for path in (ROOT / "agent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == method:
                first = next(iter(node.args), None)
                if isinstance(first, ast.JoinedStr):
                    first = first.values[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value


PROC = "nodes/NODE/procs/PID"
FLAT = {
    f"{PROC}/status Pq 0444": lambda: keys(render.process_status("n1", os.getpid(), None)),
    "nodes/NODE/info Pq 0444": node_info,
    "nodes/NODE/load Pq 0444": lambda: keys(render.node_load(Node(name="n1", load=Load()))),
    "store/status Pq 0444": lambda: keys(render.store_status(View())),
    "jobs/JOB/status Pq 0444": lambda: keys(render.job_status(JOB)),
    "images/APP/policy Pq 0600": lambda: policy.KEYS,
    "metrics Pq 0444": metric_names,
    "events Pq 0444": lambda: set(first_arguments("event")),
}
JOB = Job(id=1, verb="checkpoint", object="", node="n1", uid=0, words="1", started=1.0)


def key_differences(file: str, real: Iterable[str]) -> list[str]:
    heads = [i.head for i in items("krgfs.5") if i.section == "FILES" and i.parent == file]
    return differences(heads, real)


@pytest.mark.parametrize("file", FLAT)
def test_every_key(file: str) -> None:
    assert key_differences(file, FLAT[file]()) == []


def test_an_ended_process_has_no_key_of_its_own() -> None:
    known = Tree(id=ProcessId(pid=2**22, start=1, boot="b"), ended="exit 0")
    ended = keys(render.process_status("n1", 2**22, known))
    assert set(ended) <= set(FLAT[f"{PROC}/status Pq 0444"]())


# -- extended attributes, by asking a mount that serves nobody


async def attributes() -> set[str]:
    pid, node = os.getpid(), "n1"
    image = Image(app="a", version=1, created=1.0, node=node, uid=0, damaged="yes")
    mounted = fuse.Mount("/nowhere", hide_pids=False)
    start = tree.find(places.Sight(View(nodes={node: Node(name=node)})), tree.ROOT, "nodes")
    assert start is not None
    look = places.Sight(View(nodes={node: Node(name=node)}))
    process = place(look, "nodes", node, "procs", str(pid))
    known = Tree(id=ProcessId(pid=pid, start=process.args[2], boot="b"), app="a")
    view = View(
        node=node,
        nodes={node: Node(name=node)},
        trees={pid: known},
        apps={"a": cast(Any, None)},
        images={"a": {1: image}},
        imports={"a": {"v2": Import(app="a", name="v2", uid=0)}},
    )
    mounted.client.view = view
    ctx = SimpleNamespace(uid=0, gid=0, pid=pid)
    names: set[str] = set()
    for path in ("images/a/v1", "images/a/v2", f"nodes/{node}/procs/{pid}"):
        inode = mounted.inodes.looked_up(place(places.Sight(view), *path.split("/")))
        names |= {name.decode() for name in await mounted.listxattr(cast(Any, inode), ctx)}
    return names


def place(sight: places.Sight, *path: str) -> places.Place:
    found: places.Place | None = tree.ROOT
    for name in path:
        assert found is not None
        found = tree.find(sight, found, name)
    assert found is not None
    return found


async def test_every_extended_attribute() -> None:
    heads = [i.head for i in items("krgfs.5") if i.section == "EXTENDED ATTRIBUTES"]
    assert differences(heads, await attributes()) == []


# -- the pages themselves


def test_pages_refer_to_each_other_by_their_names() -> None:
    ours = {page.name for page in PAGES}
    for page in PAGES:
        for name, section in re.findall(r"^\.Xr (krg\S*) (\d)", page.read_text(), re.MULTILINE):
            assert f"{name}.{section}" in ours, f"{page.name} refers to {name}({section})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_well_formed(page: Path, need: Callable[..., None]) -> None:
    need("mandoc")
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(page)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


def test_these_tests_can_fail() -> None:
    row = places.Row("nodes/NODE/made-up", places.Kind.STATE, 0o444, "")
    assert file_differences([*table.TABLE, row]) == [
        "nodes/NODE/made-up Pq 0444 is not in the manual"
    ]
    closed = [replace(r, mode=0o400) if r.path == "version" else r for r in table.TABLE]
    assert len(file_differences(closed)) == 2
    assert file_differences(table.TABLE[:-1]) == ["jobs/JOB/cancel Pq 0600 is in the manual alone"]

    verb = verbs.TABLE["checkpoint"]
    made_up = verbs.Word("made-up", "desc", "", str, str, "TEXT")
    assert word_differences(verb._replace(words=(*verb.words, made_up))) == [
        "made-up=TEXT is not in the manual"
    ]

    class MadeUp(errors.KrgError):
        errno = 71  # EPROTO
        exit_code = 99

    assert errno_differences([*errors.ALL, MadeUp]) == ["EPROTO is not in the manual"]
    assert code_differences([*errors.ALL, MadeUp]) == [
        "99 is not in the manual",
        "99 is EPROTO as well",
    ]
    option = click.Option(["--made-up"])
    command = click.Command("x", params=[*mount.main.params, option])
    assert option_differences(command, "krgfs.8") == ["--made-up is not in the manual"]
    real = FLAT["jobs/JOB/status Pq 0444"]()
    assert key_differences("jobs/JOB/status Pq 0444", [*real, "made_up"]) == [
        "made_up is not in the manual"
    ]
