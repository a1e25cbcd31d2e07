"""Imports go down only, and the tables say where down is: a new room gets its place here first.

All imports count, also those inside functions and those for types alone.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KRGFS = (  # a room may import what stands in the lines above its own
    "errors facts cli_table cli_criu",
    "model pending",
    "verbs",
    "wire policy",
    "render places",
    "table",
    "tree",
    "client inodes blocked attributes",
    "ahead",
    "handles edits",
    "fuse",
    "mount",
    "cli_files archive",
    "cli_options cli_wait cli_words service",
    "cli_show cli_verbs cli_images doctor",
    "cli_node",
    "cli",
)
HEIGHT = {f"krgfs.{name}": at for at, line in enumerate(KRGFS) for name in line.split()}
BOTH = ("errors", "model", "verbs", "policy", "wire", "facts")
FOR_BOTH = {"krgfs", *(f"krgfs.{name}" for name in BOTH)}
ADAPTER = {"krgfs.attributes", "krgfs.edits", "krgfs.fuse", "krgfs.mount"}
PYFUSE3 = ADAPTER | {"krgfs.doctor"}  # doctor tries whether it is there
CRIU = ("agent.criu", "agent.keepers")  # what the names of rooms begin with that know its options
STORE = ("agent.backend", "agent.packs", "agent.chunk", "agent.sweep", "agent.durable")

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("krgfs", "agent")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SOURCES = {name: path.read_text() for name, path in MODULES.items()}


def imports(name: str, source: str) -> set[str]:
    """Return the modules that one imports: ours by their whole names, others as they are named."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (MODULES.get(name, ROOT).name == "__init__.py")
            above = name.rsplit(".", up)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {_module(f"{base}.{alias.name}") or base for alias in node.names}
    return found - {name}


def _module(name: str) -> str:
    return name if name in MODULES else ""


def upward(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {
        (name, each)
        for name, wanted in graph.items()
        for each in wanted & HEIGHT.keys()
        if HEIGHT[each] >= HEIGHT[name]
    }


def command_words(source: str) -> set[str]:
    """Return the literals that look like words of CRIU's command line; click's are declarations."""
    nodes = list(ast.walk(ast.parse(source)))
    ours = {
        literal
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("click.")
        for literal in ast.walk(node)
    }
    words = {str(n.value) for n in nodes if isinstance(n, ast.Constant) and n not in ours}
    return {w for w in words if w in ("criu", "dump", "restore") or w.startswith("--")}


GRAPH = {name: imports(name, source) for name, source in SOURCES.items()}
OURS = {name: wanted for name, wanted in GRAPH.items() if name.startswith("krgfs.")}
AGENT = {name: wanted for name, wanted in GRAPH.items() if name.split(".")[0] == "agent"}


def test_every_room_has_its_place_in_the_table() -> None:
    assert HEIGHT.keys() == OURS.keys()


def test_krgfs_imports_downwards_and_never_the_agent() -> None:
    assert upward(OURS) == set()
    assert [name for name, wanted in OURS.items() if wanted & AGENT.keys()] == []
    assert {name for name, wanted in OURS.items() if "pyfuse3" in wanted} <= PYFUSE3


def test_the_agent_imports_what_both_sides_share_and_has_no_circle() -> None:
    shared = {name: wanted & (OURS.keys() | {"krgfs"}) for name, wanted in AGENT.items()}
    assert {name: wanted - FOR_BOTH for name, wanted in shared.items() if wanted - FOR_BOTH} == {}
    TopologicalSorter(AGENT).prepare()


def test_the_store_of_chunks_knows_nothing_of_images() -> None:
    above = {
        name: others
        for name, wanted in AGENT.items()
        if name.startswith(STORE)
        and (others := {each for each in wanted & AGENT.keys() if not each.startswith(STORE)})
    }
    assert above == {}


def test_nobody_but_criu_and_keepers_builds_command_lines_of_criu() -> None:
    others = {name: SOURCES[name] for name in AGENT if not name.startswith(CRIU)}
    assert {name: words for name in others if (words := command_words(others[name]))} == {}


def test_these_tests_can_fail() -> None:
    lazy = imports("krgfs.verbs", "def f():\n from .fuse import A\n import agent.procs, pyfuse3")
    assert lazy == {"krgfs.fuse", "agent.procs", "pyfuse3"}
    assert upward({"krgfs.verbs": lazy}) == {("krgfs.verbs", "krgfs.fuse")}
    assert imports("agent.ops.freeze", "from .. import criu, jobs") >= {"agent.jobs"}
    assert command_words("run(['criu', 'dump', '--images-dir', d])") > {"dump", "--images-dir"}
    with pytest.raises(CycleError):
        TopologicalSorter({"agent.a": {"agent.b"}, "agent.b": {"agent.a"}}).prepare()
