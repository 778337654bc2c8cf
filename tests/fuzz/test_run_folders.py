"""Run folders damaged in every file: a report is that of the whole folder, or names what is damaged."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from errata.bench import results
from errata.bench.results import Journal, hashes, job_seal, write_sealed
from errata.cli.main import app
from errata.errors import DataError
from errata.report.card import card
from errata.report.page import document
from errata.report.read import read_run, read_runs
from tests.fuzz import mutations
from tests.units.report.synthetic import write_run


def seal(folder):
    """Give a folder of made-up numbers the hashes that a run's has."""
    for path in folder.glob("cells/*/rows.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        Journal(path).append(*lines)
    for path in folder.glob("cells/*/cell.json"):
        found = json.loads(path.read_text())
        write_sealed(
            path, {**found, "id": path.parent.name, results.FILES: hashes(path.parent, [results.ROWS])}
        )
    write_sealed(folder / "run.json", json.loads((folder / "run.json").read_text()))
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as base, base:
        base.execute("ALTER TABLE jobs ADD COLUMN seal TEXT")
        for cell, state, reason in base.execute("SELECT cell, state, reason FROM jobs").fetchall():
            if state not in ("open", "leased"):
                base.execute("UPDATE jobs SET seal = ? WHERE cell = ?", (job_seal(cell, state, reason), cell))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "run"
    folder = seal(write_run(place, methods=("unedited", "rome"), cases=2, looks=(2,)))
    cell = next(folder.glob("cells/rome-single*"))
    summary = {"efficacy.judge": {"before": 0.0, "after": 0.5, "n": 2, "ci": [0.0, 1.0]}}
    write_sealed(
        cell / "judged.json", {"judge": {"model": "toy", "prompt": "ab"}, "agreement": {}, "summary": summary}
    )
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Draw few resamples: intervals are tested elsewhere, and a report is made many times here."""
    monkeypatch.setattr("errata.report.board.RESAMPLES", 10)


def report(folder):
    runs = read_runs([folder])
    return json.loads(json.dumps(document(runs, cases=3), default=str)), card(runs)


def damaged(whole, tmp_path, variants, name):
    """Report on copies of a folder with one file replaced by damaged ones."""
    copy = tmp_path / "copy" / whole.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(whole, copy)
    right, path = report(copy), copy / name

    def read(data):
        path.write_bytes(data)
        return report(copy)

    return mutations.judge(variants, read, lambda value: value == right)


def files_of(whole):
    return sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())


def as_bytes(variants):
    return ((what, json.dumps(value).encode()) for what, value in variants)


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 14))])
def test_damage_is_named_or_changes_nothing(seed, whole, tmp_path):
    rng = random.Random(seed)
    for name in files_of(whole):
        data = (whole / name).read_bytes()
        found = damaged(
            whole, tmp_path, mutations.byte_variants(data, 12 if seed == 1 else 30, seed=rng.random()), name
        )
        if name.endswith(".json"):
            plain = mutations.document_variants(json.loads(data), 8 if seed == 1 else 20, seed=rng.random())
            found.faults += damaged(whole, tmp_path, as_bytes(plain), name).faults
        assert not found.faults, f"{name}: {found}\n" + "\n".join(found.faults[:20])


def change_rows(kind, path):
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "gone": None,
        "first": lines[1:],
        "second": [lines[0], *lines[2:]],
        "last": lines[:-1],
        "doubled": [lines[0], *lines],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "cut": [*lines[:-1], lines[-1][:-500]],
        "empty": [],
        "after": [line.replace('"after": 1.0', '"after": 0.0') for line in lines],
    }[kind]
    path.unlink() if changed is None else path.write_text("".join(changed))


ROWS_DAMAGED = ("gone", "first", "second", "last", "doubled", "swapped", "cut", "empty", "after")


@pytest.mark.parametrize("kind", ROWS_DAMAGED)
def test_rows_that_are_not_those_written_are_named(kind, whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    rows = next(copy.glob("cells/rome-single*")) / "rows.jsonl"
    change_rows(kind, rows)
    with pytest.raises(
        DataError,
        match=f"cell {rows.parent.name} of .* is damaged: its rows.jsonl (does not match its hash|is gone)",
    ):
        read_run(copy)
    run = read_run(copy, skip_damaged=True)
    assert [cell.id for cell in run.damaged] == [rows.parent.name]
    told = CliRunner().invoke(app, ["report", str(copy), "--skip-damaged"])
    assert told.exit_code == 1 and f"damaged: cell {rows.parent.name}" in told.stderr


def test_cells_that_were_moved_or_lost_are_named(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    one, other = sorted(copy.glob("cells/*single*"))[:2]
    for name in ("cell.json", "rows.jsonl"):
        shutil.copy(one / name, other / name)
    with pytest.raises(DataError, match="belongs to cell"):
        read_run(copy)
    shutil.rmtree(other)
    with pytest.raises(DataError, match=r"cell\.json is gone"):
        read_run(copy)


@pytest.mark.parametrize(
    "value",
    [None, 7, "x", [], [7], {"a": 7}, {"efficacy.generate": {"after": "many"}}, {"efficacy.generate": {"n": "x"}}],
)  # fmt: skip
@pytest.mark.parametrize(
    "field", ["summary", "looks", "cost", "tag", "scores", "host", "refused_cases", "status"]
)
def test_older_folders_are_read_unverified_whatever_is_in_them(field, value, tmp_path):
    folder = write_run(tmp_path / "run", methods=("unedited", "rome"), cases=2)
    path = next(folder.glob("cells/rome*/cell.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    try:
        runs = read_runs([folder])
        made = document(runs), card(runs)
    except DataError as error:
        assert field in str(error) or "number" in str(error)
    else:
        assert "not verified" in made[1]
