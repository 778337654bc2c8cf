"""Who may import whom, and what may stand where: read off the code itself."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "errata"

ROWS: dict[str, int] = {
    "types": 0, "errors": 0, "registry": 0, "config": 0, "writing": 0, "checksum": 0,
    "files": 0, "limits": 0, "rasters": 0, "_yaml": 0, "extras": 0, "progress": 0,
    "host": 1, "linalg": 1, "data": 1, "evaluation.metrics": 1,
    "stats": 2, "edits": 2, "evaluation": 2,
    "locate": 3, "training": 3,
    "methods": 4, "inspect": 4,
    "bench": 5, "lab": 5, "job": 5, "loading": 5, "ledger": 5,
    "api": 6, "report": 6,
    "cli": 7, "serve": 7,
}  # fmt: skip

ALONE_IN_ROW_ONE = {"host", "linalg", "data", "evaluation.metrics"}

REPORT_READS = ("types", "errors", "evaluation.metrics", "bench.results")


def files():
    return sorted(p for p in SOURCE.rglob("*.py"))


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and ".".join(parts[:2]) in ROWS:
        return ".".join(parts[:2])
    return parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


@dataclass(frozen=True)
class Source:
    """What the tests look at in a file."""

    imports: tuple[tuple[str, int], ...]
    """Names, each with its line."""
    model_calls: tuple[int, ...]
    """Lines that run a whole model."""
    functions: tuple[tuple[str, int, int], ...]
    """Names, first lines and lengths in lines."""
    uses_global: bool


@cache
def source(path: Path) -> Source:
    """Parse a file, once for all tests."""
    names: list[tuple[str, int]] = []
    calls: list[int] = []
    functions: list[tuple[str, int, int]] = []
    uses_global = False
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _calls_a_model(node):
            calls.append(node.lineno)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions.append((node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1))
        elif isinstance(node, ast.Global):
            uses_global = True
    return Source(tuple(names), tuple(calls), tuple(functions), uses_global)


def imports(path: Path) -> tuple[tuple[str, int], ...]:
    return source(path).imports


def circles(needs: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of files that need one another; empty where imports run one way only."""
    reached: dict[str, set[str]] = {}
    for start in needs:
        found, todo = set(), [start]
        while todo:
            new = needs[todo.pop()] - found
            found |= new
            todo += new
        reached[start] = found
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in needs if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_circle_of_imports():
    """Counts every import, in functions and for types as well."""
    modules = {module_of(p): p for p in files()}
    needs: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name.removeprefix("errata.") for name, _ in imports(path) if name.startswith("errata.")]
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        needs[module] = (found & set(modules)) - {module, ""}
    assert needs["host.open"] >= {"host.host", "host.trial"}, "the search sees no imports"
    assert circles(needs) == []


def test_the_search_sees_a_circle():
    needs = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(needs) == [["b", "c"], ["e"]]


def test_every_room_has_a_row():
    found = {room(module_of(p)) for p in files()} - {""}
    assert found <= set(ROWS), found - set(ROWS)


@pytest.mark.parametrize("path", files(), ids=lambda p: module_of(p) or "errata")
def test_arrows_point_down(path):
    module = module_of(path)
    if not module:
        return  # the package itself only names where things are
    mine = room(module)
    for name, line in imports(path):
        if not name.startswith("errata."):
            continue
        target = name.removeprefix("errata.")
        theirs = room(target)
        if theirs not in ROWS or theirs == mine:
            if mine == "methods" and target.startswith("methods."):
                # what methods share stands in files that begin with an underscore
                assert target.split(".")[1].startswith("_"), f"{path}:{line} one method uses another"
            continue
        if mine == "report":
            assert target.startswith(REPORT_READS), f"{path}:{line} a report reads result files only"
        same_row_one = ROWS[theirs] == 1 == ROWS[mine]
        assert ROWS[theirs] <= ROWS[mine], f"{path}:{line} {mine} imports {theirs}"
        assert not same_row_one, f"{path}:{line} {mine} imports {theirs}, its neighbour"
        if mine in ("methods", "inspect"):
            assert theirs not in ("data", "evaluation", "evaluation.metrics"), f"{path}:{line}"
        if mine == "methods":
            assert theirs != "inspect", f"{path}:{line} a method looks at nothing but what locate gives"
        assert (mine, theirs) != ("inspect", "methods"), f"{path}:{line} looking needs no method"
        if mine in ("bench", "lab") and theirs == "methods" and "TYPE_CHECKING" not in path.read_text():
            assert name == "errata.methods.REGISTRY", f"{path}:{line} methods only through the registry"


def test_transformers_is_the_hosts_business():
    for path in files():
        for name, line in imports(path):
            if name.split(".")[0] == "transformers":
                assert room(module_of(path)) == "host", f"{path}:{line}"
            if name.split(".")[0] == "matplotlib":
                assert room(module_of(path)) == "report", f"{path}:{line}"
            if name.split(".")[0] in ("pickle", "dill", "joblib"):
                raise AssertionError(f"{path}:{line} imports {name}")


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"^\s*print\(", "cli/"),
        (r"register_forward", ("host/hooks.py", "host/layout.py", "host/placed.py")),
        (r"torch\.linalg\.", "linalg/"),
        (r"\.generate\(\s*$|model\.generate\(", "host/passes.py"),
        (r"n_embd", "lab/train.py"),
        # what other programs call an architecture; methods name the models of their published settings
        (r"\"llama\"", ("host/engines.py", "lab/train.py", "methods/")),
    ],
)
def test_each_line_lives_in_its_room(pattern, home):
    homes = (home,) if isinstance(home, str) else home
    for path in files():
        inside = path.relative_to(SOURCE).as_posix()
        if inside.startswith(homes):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(pattern, line), f"{path}:{number} {line.strip()}"


def _calls_a_model(node: ast.Call) -> bool:
    """Whether a call runs a whole model: ``model(...)``, ``host.model(...)``, ``self.model.forward(...)``."""
    called = node.func
    if isinstance(called, ast.Attribute) and called.attr == "forward":
        called = called.value
    if isinstance(called, ast.Name):
        return called.id == "model"
    if not isinstance(called, ast.Attribute) or called.attr != "model":
        return False
    owner = called.value.attr if isinstance(called.value, ast.Attribute) else getattr(called.value, "id", "")
    return owner in ("host", "self", "plain")


def test_only_the_door_runs_a_model():
    for path in files():
        inside = path.relative_to(SOURCE).as_posix()
        calls = list(source(path).model_calls)
        if inside == "host/passes.py":
            assert calls, "the door itself"
        elif inside != "lab/train.py":  # trains a model of its own, before it is a host's
            assert not calls, f"{path}:{calls} runs the model past Host.run"


def test_sizes():
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path
        if path.parent.name == "methods" and not path.name.startswith("_"):
            assert text.count("\n") <= 250, path
        for name, line, length in source(path).functions:
            assert length <= 60, f"{path}:{line} {name} has {length} lines"
        assert not source(path).uses_global, f"{path} uses global"
