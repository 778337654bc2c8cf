"""`errata erase`: labelled texts from files and from the lab, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import lab
from errata.cli.main import app
from errata.data.labelled import read_concept, write_texts
from errata.edits import Edit, WeightEdit
from errata.errors import ConfigError, DataError, ErrataError, RequestError
from errata.evaluation import erasure
from errata.lab.labels import labelled_texts
from errata.types import Concept, LabelledText


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["erase", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Sixty texts of the lab about persons and cities."""
    path = tmp_path_factory.mktemp("labels") / "kinds.jsonl"
    chosen = [text for text in labelled_texts("kind", seed=1) if text.label in ("person", "city")]
    assert write_texts(path, chosen[:60]) == 60
    return path


def test_files_are_read_as_they_were_written(tmp_path):
    texts = (LabelledText("Ada sings", "person", "Ada"), LabelledText("«Esk» lies low", "town"))
    path = tmp_path / "two.jsonl"
    write_texts(path, texts)
    assert read_concept(path, "kind") == Concept("kind", texts)
    (tmp_path / "two.csv").write_text("text,label\nAda sings,person\nEsk,town\n")
    assert [text.label for text in read_concept(tmp_path / "two.csv", "kind").texts] == ["person", "town"]


def test_every_faulty_record_is_listed(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        {"text": "a"},
        {"text": "a", "label": 3},
        {"text": "a", "label": "x", "subject": "b"},
        ["a"],
        {"txt": "a"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(RequestError) as caught:
        read_concept(path, "kind")
    said = str(caught.value)
    for part in (
        "missing label",
        "label must be a text",
        "does not occur",
        "expected a record",
        "unknown field 'txt'",
    ):
        assert part in said, part
    with pytest.raises(ErrataError, match="missing"):
        read_concept(tmp_path / "missing.jsonl", "kind")


def test_the_lab_s_labels():
    kinds = labelled_texts("kind")
    world = lab.world()
    assert {text.label for text in kinds} == {entity.type for entity in world.entities.values()} & {
        "person", "city", "country", "company", "work", "landmark"
    }  # fmt: skip
    assert all(text.subject and text.text.startswith(text.subject) for text in kinds)
    for text in labelled_texts("plays", limit=20):
        assert text.subject and world.get(text.subject, "plays") == text.label and text.label not in text.text
    assert labelled_texts("kind", limit=5) == kinds[:5] != labelled_texts("kind", limit=5, seed=1)
    with pytest.raises(ConfigError, match="did you mean 'plays'"):
        labelled_texts("playz")


def test_a_linear_probe_falls_to_chance_on_the_lab(texts, tmp_path):
    path = tmp_path / "erased.safetensors"
    words = (str(texts), "--model", "lab", "--set", "layers=[1]", "--held-out", "0.3", "-o", str(path))
    document = json.loads(run("kind", "--from", *words, "--json"))
    (site,) = document["sites"]
    assert site["linear_before"] == 1.0 and abs(site["linear_after"] - site["majority"]) <= 0.2
    assert (
        0 < document["perplexity_before"] < document["perplexity_after"] < 2 * document["perplexity_before"]
    )
    edit = Edit.load(path)
    assert edit.provenance.method == "leace" and document["edit"]["digest"] == edit.digest
    with pytest.raises(ErrataError, match="exists"):
        run("kind", "--from", *words)
    host = lab.load()
    with edit.on(host):
        assert host.edited
    assert not host.edited


def test_the_table_and_a_dry_run(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "erased.safetensors"
    words = (
        "kind",
        "--from",
        str(texts),
        "--model",
        "lab-gpt2",
        "--method",
        "sal",
        "--set",
        "layers=[2]",
        "-o",
        str(path),
    )
    assert "60 texts (city" in run(*words, "--dry-run") and not path.exists()
    lines = tmp_path / "neutral.txt"
    lines.write_text("The rain fell on the old road.\n\nThe small dog waited.\n")
    shown = run(*words, "--set", "where=norms", "--fuse", "--texts", str(lines))
    assert (
        "transformer.h.2.ln_1" in shown and "linear before" in shown and "perplexity of neutral text" in shown
    )
    assert isinstance(Edit.load(path), WeightEdit)


def test_an_edit_is_on_the_disk_before_it_is_measured(texts, tmp_path, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(erasure, "measure", stopped)
    path = tmp_path / "erased.safetensors"
    words = ["kind", "--from", str(texts), "--model", "lab-gpt2", "--method", "sal", "--set", "layers=[2]"]
    assert CliRunner().invoke(app, ["erase", *words, "-o", str(path)]).exit_code != 0
    assert Edit.load(path).provenance.method == "sal"


def test_what_is_refused(texts, tmp_path):
    out = ("-o", str(tmp_path / "e.safetensors"), "--model", "lab")
    with pytest.raises(ErrataError, match="rome takes requests"):
        run("kind", "--from", str(texts), "--method", "rome", *out)
    with pytest.raises(ErrataError, match="depn takes requests"):
        run("kind", "--from", str(texts), "--method", "depn", "--fuse", *out)
    with pytest.raises(ConfigError, match="shrimk"):
        run("kind", "--from", str(texts), "--set", "shrimk=true", *out)
    with pytest.raises(ConfigError, match="where=norms"):
        run("kind", "--from", str(texts), "--fuse", "--dry-run", *out)
    with pytest.raises(ConfigError, match="concept of the lab"):
        run("colour", "--from", "lab", *out)
    with pytest.raises(DataError, match="cannot read the texts"):
        run("kind", "--from", str(texts), "--texts", str(tmp_path / "none.txt"), *out)
    host = lab.load()
    host.resources = type(host.resources)()
    with pytest.raises(DataError, match="--texts"):
        erasure.neutral_texts(host)
    assert not list(tmp_path.iterdir())
