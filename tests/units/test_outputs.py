"""What verbs write and say: nothing is replaced unasked, misses are named, tables fit, warnings are a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import errata
from errata.cli import checks, common, outputs
from errata.cli.main import app
from errata.data.requests import read_cases
from errata.errors import EditError, ErrataError
from errata.evaluation.metrics.matching import first_answer
from errata.evaluation.observe import observe
from tests.units.bench.small import write_cases, write_model

PROMPT = ("{} was born in", "--subject", "Ada", "--method", "ft", "--set", "steps=2")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, ErrataError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def edits(model, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("edits")
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    run("edit", *PROMPT, "--target", "Esk", "--model", model, "-o", paths[0])
    run("edit", *PROMPT, "--target", "Merrin", "--model", model, "-o", paths[1], "--set", "layers=[2]")
    return paths


# --- what is there is not replaced unasked ----------------------------------------------------


def test_an_edit_is_replaced_by_its_repetition_or_with_force_only(model, tmp_path):
    out = tmp_path / "e.safetensors"
    words = ("edit", *PROMPT, "--model", model, "-o", out)
    run(*words, "--target", "Esk")
    first = out.read_bytes()
    run(*words, "--target", "Esk")  # the same again loses nothing
    assert out.read_bytes() == first
    for more, what in (
        (("--target", "Merrin"), "requests"),
        (("--target", "Esk", "--seed", "1"), "seed"),
        (("--target", "Esk", "--set", "steps=3"), "settings"),
        (("--target", "Esk", "--set", "layers=[2]"), "settings"),
        (("--target", "Esk", "--method", "rome", "--set", "steps=2"), "method"),
        (("--target", "Esk", "--after", out), "exists; name another file"),
    ):
        text = refused(*words, *more)
        assert "--force" in text and what in text, more
        assert out.read_bytes() == first
    assert "--force" in refused(*words, "--target", "Merrin", "--dry-run")
    run(*words, "--target", "Merrin", "--force")
    assert errata.Edit.load(out).provenance.requests[0].target == "Merrin"


def test_a_file_that_is_no_edit_is_not_replaced_before_any_work(tmp_path):
    out = tmp_path / "mine.safetensors"
    out.write_text("my notes")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for path in (out, tmp_path / "link.safetensors"):
        # the model does not exist, and it is not even looked for
        text = refused("edit", *PROMPT, "--target", "Esk", "--model", tmp_path / "none", "-o", path)
        assert " exists" in text and "name another file, or replace it with --force" in text
    assert out.read_text() == "my notes"


def test_an_earlier_edit_of_unlike_settings_is_left(model, tmp_path):
    out = tmp_path / "e.safetensors"
    run("edit", *PROMPT, "--target", "Esk", "--model", model, "-o", out, "--set", "layers=[2]")
    before = out.read_bytes()
    run(
        "edit", *PROMPT, "--target", "Esk", "--model", model, "-o", out
    )  # layers left open: told apart by the fit
    assert out.read_bytes() == before
    assert errata.Edit.load(tmp_path / "e-2.safetensors").provenance.config["layers"] != [2]


@pytest.mark.parametrize("name", ["e.pt", "e", "e.safetensors.bak", "e.bin"])
def test_edits_are_named_safetensors(name, model, edits, tmp_path):
    for words in (
        ("edit", *PROMPT, "--target", "Esk", "--model", tmp_path / "none"),
        ("refit", edits[0]), ("retract", edits[0], "-r", "0"), ("demo",),
    ):  # fmt: skip
        assert ".safetensors" in refused(*words, "-o", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_other_outputs_ask_too(model, edits, tmp_path):
    out, cases = tmp_path / "there.safetensors", tmp_path / "cases.jsonl"
    out.write_bytes(edits[0].read_bytes())
    for words in (("refit", edits[0]), ("retract", edits[0], "-r", "0"), ("demo",)):
        assert "--force" in refused(*words, "-o", out)
    assert out.read_bytes() == edits[0].read_bytes()
    run("data", "export", "lab:2", cases)
    first = cases.read_bytes()
    assert "--force" in refused("data", "export", "lab:3", cases)
    assert cases.read_bytes() == first
    assert json.loads(run("data", "export", "lab:3", cases, "--force", "--json"))["cases"] == 3
    text = refused("eval", "--model", tmp_path / "none", "--method", "ft", "--cases", cases, "-o", out)
    assert "name for an edit" in text
    kept = (
        "eval",
        "--model",
        tmp_path / "none",
        "--method",
        "ft",
        "--cases",
        cases,
        "--schedule",
        "sequential:2",
    )
    assert "--force" in refused(*kept, "--keep-edit", out)


# --- did it work? -----------------------------------------------------------------------------


def test_misses_are_said_in_words_in_json_and_by_the_exit_code(model, tmp_path):
    words = ("edit", *PROMPT, "--target", "Esk", "--model", model, "-o", tmp_path / "e.safetensors")
    shown = run(*words)
    assert "0 of 1 requests" in shown and "not as wanted" in shown and "errata ask" not in shown
    document = json.loads(run(*words, "--json"))
    assert (document["answered"], document["total"]) == (0, 1) and document["missed"] == document["answers"]
    assert document["answers"][0]["answered"] is False and document["answers"][0]["number"] == 1
    assert "0 of 1" in run(*words, "--strict", code=1)
    assert json.loads(run(*words, "--strict", "--json", code=1))["answered"] == 0


def test_an_edit_that_took_is_said_to(model, tmp_path):
    words = ("edit", "{} was born in", "--subject", "Ada", "--target", "Esk", "--model", model, "--method", "ft",
             "--set", "steps=200", "--set", "epsilon=20", "-o", tmp_path / "e.safetensors", "--strict")  # fmt: skip
    shown = run(*words)
    assert "1 of 1 requests" in shown and "not as wanted" not in shown and "try it:  errata ask" in shown
    document = json.loads(run(*words, "--json"))
    assert (
        document["answered"] == 1 and document["missed"] == [] and document["answers"][0]["answered"] is True
    )


def test_the_table_is_bounded_and_begins_with_the_misses(capsys):
    answers = tuple(
        {"number": i, "prompt": f"prompt {i} " + "x" * 500, "target": "t", "before": "b", "after": f"answer {i}",
         "answered": i % 10 != 0}
        for i in range(1, 1001)
    )  # fmt: skip
    outcome = checks.Outcome(answers, "requests", texts=True)
    assert len(outcome.missed) == 100
    outcome.show(Path(__file__), "lab")
    text = capsys.readouterr().out
    assert "900 of 1000 requests" in text and "and 80 more" in text and "980 more requests not shown" in text
    assert "answer 10 " in text and "answer 11 " not in text and len(text) < 30_000
    assert "try it:  errata ask --model lab" in text and "prompt 1 " in text


# --- several edits ----------------------------------------------------------------------------


def test_several_edits_are_measured_together(model, edits, tmp_path):
    cases = write_cases(tmp_path / "cases.jsonl", 3)
    host = errata.load(str(model), device="cpu")
    loaded = [errata.Edit.load(path) for path in edits]
    words = ("eval", "--model", model, "--cases", cases, "--json", "--device", "cpu")
    both = json.loads(run(*words, "--edit", edits[0], "--edit", edits[1]))
    assert both["meta"]["method"] == "ft + ft" and both["meta"]["schedule"] == "2 given edits"
    assert both["meta"]["weights_restored"]
    one = json.loads(run(*words, "--edit", edits[0]))
    assert one["meta"]["schedule"] == "given edit" and one["summary"] != both["summary"]
    probe = read_cases(cases)[0].probes[0]
    with loaded[0].on(host), loaded[1].on(host):
        (seen,) = observe(host, [probe])
    row = next(r for r in both["rows"] if r["kind"] == "efficacy" and r["protocol"] == "generate")
    assert row["prompt"] == probe.prompt and row["detail"]["text_after"] == first_answer(seen.text)
    meant = errata.evaluate(host, read_cases(cases), edit=loaded, probes=["efficacy"]).summary
    mine, theirs = meant["efficacy.probability"], both["summary"]["efficacy.probability"]
    assert mine["answer_after"] == pytest.approx(theirs["answer_after"], rel=1e-4)
    assert mine["answer_after"] != pytest.approx(mine["answer_before"], rel=1e-3)


def test_ability_takes_several_edits(model, edits, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Ada was born in Esk.\n\nBruno lives in Merrin.\n")
    words = ("ability", text, "--model", model, "--json", "--device", "cpu")
    found = {
        name: json.loads(run(*words, *given))["text"]["perplexity"]
        for name, given in {
            "none": (), "first": ("-e", edits[0]), "second": ("-e", edits[1]),
            "both": ("-e", edits[0], "-e", edits[1]),
        }.items()
    }  # fmt: skip
    assert found["none"]["after"] is None
    assert len({round(found[name]["after"], 9) for name in ("first", "second", "both")}) == 3
    assert len({entry["before"] for entry in found.values()}) == 1


# --- small things -----------------------------------------------------------------------------


def test_data_show_knows_the_lab(tmp_path):
    case = errata.lab.cases(3, seed=0)[1]
    document = json.loads(run("data", "show", "lab:3", "--case", "2", "--json"))
    assert document["id"] == case.id and document["request"]["subject"] == case.request.subject
    assert case.request.text[:20] in run("data", "show", "lab:3", "--case", case.id)
    assert "from 1 to 3" in refused("data", "show", "lab:3", "--case", "9")
    assert "lab:N" in refused("data", "show", "lab:many")
    assert "data show lab:3" in refused("data", "check", "lab:3")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ada brenner", "Ada Brenner"),
        ("Ada Brener", "Ada Brenner"),
        ("MERRIN", "Merrin"),
        ("Talow", "Tallow"),
    ],
)
def test_an_unknown_entity_is_answered_with_a_few_close_names(name, near):
    text = refused("lab", "world", name)
    assert repr(near) in text and len(text) < 200


@pytest.mark.parametrize("name", ["NOBODY", "", "zzzzqqqq", "???"])
def test_an_entity_like_no_other_gives_no_list(name):
    assert len(refused("lab", "world", name)) < 200


@pytest.mark.parametrize(
    ("columns", "width"), [("60", 60), ("200", 200), (None, 120), ("wide", 120), ("0", 120), ("3", 20)]
)
def test_piped_tables_honour_columns(columns, width, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    common.table(None, ("a", "b"), [("word " * 100, "word " * 100)])
    longest = max(len(line) for line in capsys.readouterr().out.splitlines())
    assert width - 8 <= longest <= width


def test_warnings_are_one_line(tmp_path):
    code = (
        "import warnings\nfrom errata.cli import show\n"
        "def load(*_):\n    warnings.warn('most of it\\n was lost', stacklevel=2)\n    raise SystemExit(0)\n"
        "import errata.edits\nerrata.edits.Edit.load = load\nfrom errata.cli.main import run\nrun()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "show", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ},
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "warning: most of it was lost\n", "")


def test_help_says_decades_and_the_cache():
    assert "decades" in run("eval", "--help").replace("\n", " ")
    assert "ERRATA_CACHE" in run("stats", "--help")


def test_checks_of_outputs_name_the_right_kind():
    with pytest.raises(EditError, match="does not exist"):
        outputs.check_edit_name(Path("nowhere/at/all.safetensors"))


def test_no_word_of_a_table_is_broken_where_all_words_have_room(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    columns = ("method", "earlier headline", "paraphrase", "neighbours kept", "time per edit")
    rows = [("in_prompt *", "28.5 22-34", "77.0 70-84", "12.6 9-17", "2 min 10 s")] * 2
    common.table("a title", columns, rows, right=range(1, 5))
    shown = capsys.readouterr().out
    words = shown.split()
    assert all(words.count(word) >= 2 for row in rows for cell in row for word in cell.split())
    assert all(word in words for column in columns for word in column.split())
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 60
    common.table(None, ("prompt", "answer"), [("Ada Brenner was born in " * 3, "Tallow")])
    assert "Tallow" in capsys.readouterr().out.split()
