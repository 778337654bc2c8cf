"""The verbs of a ledger, from the command line, on a small model: what they print, their exit codes, their JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program import errata
from tests.units.bench.small import write_model

FACT = (
    "{} was born in",
    "--subject",
    "Ada Brenner",
    "--target",
    "Merrin",
    "--method",
    "ft",
    "--set",
    "steps=60",
)
OTHER = (
    "{} lives in",
    "--subject",
    "Boris Sorwick",
    "--target",
    "Tallow",
    "--method",
    "ft",
    "--set",
    "steps=60",
)


def ok(*words: object, cwd: Path, code: int = 0):
    """Run the program and return what it printed, as JSON where it was asked for."""
    done = errata(*words, cwd=cwd)
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout) if "--json" in words else done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
def repo(tmp_path, model) -> Path:
    made = ok("init", "--model", model, "--json", cwd=tmp_path)
    assert made["model"]["fingerprint"]
    return tmp_path


def test_a_fact_from_init_to_reset(repo):
    first = ok(
        "edit", *FACT, "-m", "register", "--source", "https://example.org/1", "--no-guard", "--json", cwd=repo
    )
    second = ok("edit", *OTHER, "--no-guard", "--author", "Eve", "--json", cwd=repo)
    one, two = (r["attempts"][0]["edit"] for r in (first, second))
    state = ok("status", "--weights", "--json", cwd=repo)
    assert [e["edit"] for e in state["edits"]] == [one, two]
    assert state["weights"]["base"] == state["model"]["weights"] != state["weights"]["edited"]
    events = ok("log", "--json", cwd=repo)
    assert [e["kind"] for e in events] == [*["applied", "verified", "proposed"] * 2, "created"]
    assert events[-2]["reason"] == "register" and events[-2]["source"] == "https://example.org/1"
    assert events[0]["author"] == "Eve"
    assert "register" in ok("log", "--edit", one[:8], cwd=repo)
    assert one in ok("show", one[:8], cwd=repo) and "register" in ok("show", one[:8], cwd=repo)
    asked = ok("ask", "Ada Brenner was born in", "--json", cwd=repo)
    assert set(asked["answers"][0]) == {"prompt", "without", "with"}
    ok("tag", "both", cwd=repo)
    assert ok("revert", one[:8], "-m", "no", "--json", cwd=repo)["active"] == [two]
    assert ok("reset", "both", "--json", cwd=repo)["active"] == [one, two]
    assert ok("reset", "--json", cwd=repo)["revision"] == "base"
    state = ok("status", "--weights", "--json", cwd=repo)
    assert state["weights"]["edited"] == state["model"]["weights"] and not state["edits"]
    assert state["tags"] == {"both": 7}
    ok("diff", "both..base", "--json", cwd=repo)
    ok("blame", "Ada Brenner was born in", "--json", cwd=repo)


def test_a_refused_edit_has_exit_code_5(repo):
    done = ok("edit", *FACT[:5], "--method", "ft", "--set", "steps=1", "-m", "try", cwd=repo, code=5)
    assert "refused" in done and "out of bounds" in done and "0 of 1 requests applied" in done
    assert ok("status", "--json", cwd=repo)["edits"] == []
    events = ok("log", "--json", cwd=repo)
    assert [e["kind"] for e in events] == ["verified", "proposed", "created"]
    assert events[0]["body"]["passed"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edit", *FACT, "--after", "ffff"), "has no edit"),
        (("edit", *FACT, "--strict"), "the guard decides"),
        (("edit", *FACT, "--conflicts", "maybe"), "expected one of error, replace, keep"),
        (("edit", *FACT, "-o", "x.safetensors"), "the model has to be named"),
        (("edit", *FACT, "-o", "x.safetensors", "--model", "m", "-m", "why"), "leave -o out"),
        (("revert", "ffff"), "has no edit"),
        (("reset", "nowhere"), "has no revision"),
        (("tag", "base"), "cannot be called"),
        (("diff", "a..b"), "has no revision"),
        (("init", "--model", "lab"), "exists already"),
        (("show", "ffff"), "has no edit"),
        (("merge", "elsewhere"), "no ledger"),
        (("ask", "x", "--edit", "y.safetensors"), "y.safetensors"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_changes_nothing(repo, words, message):
    done = errata(*words, cwd=repo)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(ok("log", "--json", cwd=repo)) == 1


def test_without_a_ledger_the_verbs_say_how_to_make_one(tmp_path):
    for words in (("log",), ("status",), ("revert", "ffff"), ("edit", *FACT), ("ask", "x"), ("check",)):
        done = errata(*words, cwd=tmp_path)
        assert done.returncode == 2 and "errata init" in done.stderr, words


def test_check_is_an_exit_code(repo):
    ok("edit", *FACT, "--no-guard", cwd=repo)
    (repo / "facts.jsonl").write_text(
        json.dumps({"prompt": "{} was born in", "subject": "Ada Brenner", "target": "Qqzz"}) + "\n"
    )
    found = ok("check", "facts.jsonl", "--json", cwd=repo, code=1)
    assert not found["passed"] and found["given"] == 1
    assert any(f["kind"] == "given" and f["expected"] == "Qqzz" for f in found["failures"])
    broken = ok("bisect", "--check", "facts.jsonl", "--json", cwd=repo, code=1)
    assert broken["edit"] is None and not broken["base_passes"]


def test_a_dry_run_records_nothing(repo):
    document = ok("edit", *FACT, "--dry-run", "--json", cwd=repo)
    assert document["dry_run"] and document["method"] == "ft"
    assert len(ok("log", "--json", cwd=repo)) == 1
