"""The pages of published systems name only what is registered, and all of it; they are as their table gives them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SHEETS = DOCS.parents[1] / "shared" / "reference"
NAMES = ("methods-weights", "methods-memory", "methods-inside", "frontier", "beyond-text", "benchmarks")
ID = re.compile(r"\b[12]\d(?:0[1-9]|1[0-2])\.\d{5}\b")
"""An arXiv id of five digits, which no other number of these texts is."""


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_coverage", DOCS / "coverage_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def section(coverage: ModuleType, *systems: Mapping[str, object]) -> list:
    """Return a table of one section."""
    return coverage.read([{"section": "Some", "systems": list(systems)}])


def test_every_name_exists_and_everything_registered_is_in_a_row(coverage):
    assert coverage.problems(coverage.read()) == []


def test_the_pages_are_what_the_table_gives(coverage):
    for name, text in coverage.pages(coverage.read()).items():
        written = (DOCS / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name} is older than its table: python docs/coverage_pages.py"
        assert text.count("\n") <= 250


def test_every_system_is_on_one_page(coverage):
    text = "".join(coverage.pages(coverage.read()).values())
    for part in coverage.read():
        for system in part.systems:
            assert f"| {system.name} |" in text if system.places else system.name in text


@pytest.mark.skipif(not SHEETS.is_dir(), reason="the sheets of the field are not beside the repository")
def test_every_paper_of_the_sheets_is_in_a_row(coverage):
    listed = {number for part in coverage.read() for system in part.systems for number in system.arxiv}
    for name in NAMES:
        found = set(ID.findall((SHEETS / f"{name}.md").read_text(encoding="utf-8")))
        assert found and found <= listed, f"{name}: {sorted(found - listed)} in no row of docs/coverage.yaml"


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ({"method": "rhome"}, "did you mean 'rome'?"),
        ({"method": "rome keys=none"}, "keys"),
        ({"method": "rome kees=bare"}, "kees"),
        ({"verb": "trance"}, "there is no command errata trance"),
        ({"verb": "trace --slow"}, "errata trace has no option --slow"),
        ({"data": "zsre/maybe"}, "there is no dataset zsre/maybe"),
        ({"data": ["zsre", "zsree"]}, "there is no dataset zsree"),
        ({"metric": "luck"}, "there is no metric luck"),
        ({"recipe": "rome"}, "there is no recipe rome"),
        ({"table": "rome"}, "there is no published table rome"),
    ],
)
def test_a_name_that_does_not_exist_is_found(coverage, place, complaint):
    found = coverage.problems(section(coverage, {"name": "Some system", **place}))
    assert any(line.startswith("Some system: ") and complaint in line for line in found), found[:3]


def test_a_method_a_dataset_and_a_paper_without_a_row_are_found(coverage):
    found = coverage.problems(section(coverage, {"name": "ROME", "method": "rome"}))
    assert "the method memit is in no row" in found and "the method rome is in no row" not in found
    assert "arXiv 2202.05262, the paper of rome, is in no row" in found
    assert "the dataset zsre is in no row" in found


def test_a_row_says_either_where_or_why(coverage):
    for entry in ({"name": "X"}, {"name": "X", "method": "rome", "why": "not built yet"}):
        with pytest.raises(ValueError, match="X: expected either"):
            section(coverage, entry)
    with pytest.raises(ValueError, match="unknown field"):
        section(coverage, {"name": "X", "metod": "rome"})
    twice = section(coverage, {"name": "X", "why": "a"}, {"name": "X", "why": "b"})
    assert "X: listed twice" in coverage.problems(twice)
