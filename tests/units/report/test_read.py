"""Run folders are read as they lie: half done, torn, refused or failed."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from errata.errors import DataError
from errata.report.board import absent, cells_with_results
from errata.report.read import number, read_run, read_runs
from tests.units.report.synthetic import case_line, row, write_run, write_small


def test_every_cell_is_there_with_its_state(run):
    states = {cell.method: cell.status for cell in run.cells if cell.plan["schedule"] == "single"}
    assert states["rome"] == "done"
    assert (states["mend"], states["broken"], states["late"]) == ("refused", "failed", "unfinished")
    reasons = {cell.method: cell.reason for cell in absent([run])}
    assert "singular" in reasons["broken"] and "trained editor" in reasons["mend"]


def test_protocols_of_one_probe_are_put_together(run):
    cell = next(cell for cell in run.cells if cell.method == "rome")
    first = next(cell.case_answers())
    assert len(first.answers) == 20  # the probes of a case, see synthetic.KINDS
    kinds = [answer.kind for answer in first.answers]
    assert kinds.count("neighbourhood") == 5
    neighbour = first.answers[kinds.index("neighbourhood")]
    assert set(neighbour.scores) == {"generate", "teacher_forced", "probability", "kl"}


def test_the_same_question_asked_twice_stays_two_probes(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "p", 1.0), row("a", "efficacy", "p", 0.0))]
    cell = read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}])).cells[0]
    assert [answer.scores["generate"][1] for answer in next(cell.case_answers()).answers] == [1.0, 0.0]


def test_a_sequence_is_asked_at_its_end(run):
    cell = next(c for c in run.cells if c.method == "rome" and c.sequence)
    found = list(cell.case_answers())
    assert {asked.edits for asked in found} == {30} and len(found) == 30


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    place = write_run(tmp_path / "run", methods=("rome",), cases=3, absent=False)
    path = next(place.glob("cells/*/rows.jsonl"))
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"type": "case", "ca', encoding="utf-8")
    cell = read_run(place).cells[0]
    assert cell.cases == 3
    path.write_text("{]\n" + whole, encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        list(read_run(place).cells[0].case_answers())


def test_all_folders_that_are_none_are_named_at_once(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(DataError) as error:
        read_runs([tmp_path / "none", tmp_path / "other"])
    assert "none is no run folder" in str(error.value) and "schema 99" in str(error.value)


def test_a_cell_of_several_runs_counts_once_and_done_outweighs_failed(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "p", 1.0))]
    cells = [{"method": "rome", "lines": lines}]
    bad = write_small(tmp_path / "bad", [{**cells[0], "status": "failed", "reason": "no"}])
    good = write_small(tmp_path / "good", cells)
    runs = read_runs([bad, good, good])
    assert [cell.folder.parents[1].name for cell in cells_with_results(runs)] == ["good"]
    assert absent(runs) == []


def test_numbers_that_json_cannot_write():
    assert number("inf") == float("inf") and number("-inf") == float("-inf")
    assert number("nan") != number("nan")
    assert number(None) is None and number("many") is None and number(True) == 1.0


def test_a_folder_that_nobody_may_write_to_is_read(tmp_path):
    """An archive, or somebody else's run: its job table keeps a write-ahead log, which cannot be made there."""
    if os.getuid() != 0:
        pytest.skip("another user is needed, and only root may become one")
    with tempfile.TemporaryDirectory() as place:
        folder = write_run(Path(place) / "run", methods=("unedited",), cases=1)
        with closing(sqlite3.connect(folder / "jobs.sqlite")) as base:
            base.execute("PRAGMA journal_mode=WAL")
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.seteuid(65534)
        try:
            found = read_run(folder)
        finally:
            os.seteuid(0)
        assert found.cells[-1].status == "unfinished"
