"""Every kind of edit through the verbs that take an edit file."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ErrataError
from errata.methods import REGISTRY

WORDS = ("{} was born in", "--subject", "Ada Brenner", "--target", "Tallow", "--model", "lab")
METHODS = {
    "grace": (), "in_prompt": (), "none": (), "ike": ("--set", "demonstrations=2"), "ft": (), "calinet": (),
    "t_patcher": ("--set", "memory=1000"), "wise": ("--set", "shards=1"), "rag": (), "scr": (),
    "melo": ("--set", "steps=20"), "nkb": ("--set", "slots=64"), "cuqa": ("--set", "steps=2", "--set", "rank=4"),
    "kaft": ("--set", "steps=2", "--set", "most=20"), "defer": ("--set", "steps=10"),
    "lte": ("--set", "steps=2", "--set", "most=20", "--set", "texts=4"),
    "remedi": ("--set", "epochs=1", "--set", "most=20"), "pluglm": ("--set", "steps=2", "--set", "most=20"),
    "serac": ("--set", "steps=5", "--set", "most=40", "--set", "classifier_steps=1500"),
    "ice": (), "memprompt": (), "reliable": ("--set", "demonstrations=2"), "patches": ("--set", "gate=subject"),
    "mello": ("--set", 'worked_examples="Question: Who?\\nFinal answer: Ann\\n\\n"'),
}  # fmt: skip


SLOW = ("scr", "nkb", "cuqa", "defer", "lte", "pluglm", "ice", "memprompt", "reliable", "mello", "kaft")
"""Kinds of edit that another method here has as well."""
PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS]


@pytest.fixture(scope="module", params=PARAMS)
def edit_file(request, tmp_path_factory):
    """A method, and an edit by it."""
    method = request.param
    path = tmp_path_factory.mktemp("edits") / f"{method}.safetensors"
    words = ["edit", *WORDS, "--method", method, *METHODS[method], "-o", str(path)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return method, str(path)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_says_what_each_kind_changes(edit_file):
    method, path = edit_file
    text, facts = run("show", path), json.loads(run("show", path, "--json"))
    assert method in text and "Ada Brenner" in text and facts["kind"] == REGISTRY.get(method).gives.kind
    assert ("weights" in text) == (facts["kind"] == "weight")
    assert ("entries, selected by the" in text) == (facts["kind"] != "weight")
    assert ("interventions" in text) == (facts["kind"] == "memory")


def test_each_kind_is_asked_and_measured_from_its_file(edit_file):
    method, path = edit_file
    (answer,) = json.loads(run("ask", "--model", "lab", "--edit", path, "Ada Brenner was born in", "--json"))[
        "answers"
    ]
    assert answer["without"].strip().startswith("Rowanport")
    if method in ("ft", "grace", "in_prompt", "calinet", "t_patcher", "rag", "serac"):
        assert answer["with"].strip().startswith("Tallow")
    if method == "none":
        assert answer["with"] == answer["without"]
    report = json.loads(run("eval", "--model", "lab", "--edit", path, "--cases", "lab:1", "--json"))
    assert "efficacy.generate" in report["summary"]


@pytest.mark.parametrize("words", [("refit",), ("retract", "--request", "1")])
def test_what_cannot_be_solved_again_is_refused(edit_file, tmp_path, words):
    target = tmp_path / "again.safetensors"
    verb, *more = words
    result = CliRunner().invoke(app, [verb, edit_file[1], *more, "-o", str(target)])
    assert isinstance(result.exception, ErrataError) and not target.exists()
