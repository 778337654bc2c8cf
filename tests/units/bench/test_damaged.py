"""Runs whose files were damaged: named by a report, made anew on resuming, with the same rows."""

from __future__ import annotations

import json
import shutil

import pytest

from errata.bench.results import read_document
from errata.errors import DataError
from errata.report.read import read_run
from tests.units.bench import small


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    block = {"methods": [{"name": "ft", "settings": {"steps": 1}, "label": "tuned"}], "schedule": "single"}
    model, cases = small.write_model(place / "model"), small.write_cases(place / "c.jsonl", 3)
    return small.document(model, cases, block, max_new_tokens=2)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    small.execute(words, folder)
    return folder


def cell_of(folder, label):
    return next(folder.glob(f"cells/*{label}*"))


def test_a_finished_cell_speaks_for_its_rows(whole):
    found = read_document(cell_of(whole, "tuned") / "cell.json", sealed=True)
    assert found["files"]["rows.jsonl"]["lines"] == 3
    assert read_run(whole).verified and not read_run(whole).damaged


def damage(cell, kind):
    rows, summary = cell / "rows.jsonl", cell / "cell.json"
    lines = rows.read_text().splitlines(keepends=True)
    if kind == "rows deleted":
        rows.unlink()
    elif kind == "second row deleted":
        rows.write_text(lines[0] + lines[2])
    elif kind == "cut in the last row":
        rows.write_text("".join(lines)[:-30])
    elif kind == "answer changed":
        document = json.loads(lines[1])
        document["rows"][0]["after"] = 1.0 - document["rows"][0]["after"]
        rows.write_text(lines[0] + json.dumps(document) + "\n" + lines[2])
    elif kind == "result changed":
        document = json.loads(summary.read_text())
        document["summary"]["efficacy.generate"]["after"] = 0.123
        summary.write_text(json.dumps(document))
    elif kind == "result cut":
        summary.write_bytes(summary.read_bytes()[:-100])
    else:
        summary.unlink()


KINDS = ("rows deleted", "second row deleted", "cut in the last row", "answer changed", "result changed",
         "result cut", "result deleted")  # fmt: skip


def test_all_that_is_damaged_is_named_and_made_anew(words, whole, tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind.replace(" ", "-")
        shutil.copytree(whole, folder)
        cell = cell_of(folder, "tuned")
        damage(cell, kind)
        with pytest.raises(DataError, match=f"cell {cell.name} of .* is damaged"):
            read_run(folder)
        ended = small.execute(words, folder, resume=True)
        assert list(ended.damaged) == [cell.name], kind
        assert small.table(folder) == small.table(whole), kind
        assert read_run(folder).damaged == []


def test_rows_of_an_unfinished_cell_are_not_believed_when_damaged(words, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    cell = cell_of(folder, "tuned")
    damage(cell, "answer changed")
    damage(cell, "result deleted")
    with pytest.raises(DataError, match="line 2 is damaged"):
        list(read_run(folder, skip_damaged=True).cells[-1].records())
    small.execute(words, folder, resume=True)
    assert small.table(folder) == small.table(whole)


def test_damaged_answers_of_the_unedited_model_are_asked_again(words, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.glob("unedited/*.json"):
        path.write_bytes(path.read_bytes().replace(b'"text": "', b'"text": "x', 1))
    for path in folder.glob("unedited/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    damage(cell_of(folder, "tuned"), "rows deleted")
    small.execute(words, folder, resume=True)
    assert small.table(folder) == small.table(whole)
