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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    for method, more in METHODS.items():
        words = ["edit", *WORDS, "--method", method, *more, "-o", str(folder / f"{method}.safetensors")]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return folder


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("method", METHODS)
def test_show_says_what_each_kind_changes(files, method):
    path = str(files / f"{method}.safetensors")
    text, facts = run("show", path), json.loads(run("show", path, "--json"))
    assert method in text and "Ada Brenner" in text and facts["kind"] == REGISTRY.get(method).gives.kind
    assert ("weights" in text) == (facts["kind"] == "weight")
    assert ("entries, selected by the" in text) == (facts["kind"] != "weight")
    assert ("interventions" in text) == (facts["kind"] == "memory")


@pytest.mark.parametrize("method", METHODS)
def test_each_kind_is_asked_and_measured_from_its_file(files, method):
    path = str(files / f"{method}.safetensors")
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("words", [("refit",), ("retract", "--request", "1")])
def test_what_cannot_be_solved_again_is_refused(files, tmp_path, method, words):
    target = tmp_path / "again.safetensors"
    verb, *more = words
    result = CliRunner().invoke(app, [verb, str(files / f"{method}.safetensors"), *more, "-o", str(target)])
    assert isinstance(result.exception, ErrataError) and not target.exists()
