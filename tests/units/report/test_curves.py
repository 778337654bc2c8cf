"""Curves: the age of an edit is how many came after it; a look counts all edits so far."""

from __future__ import annotations

from errata.report.board import boards
from errata.report.read import read_run
from tests.units.report.synthetic import case_line, row, write_small


def sequence(tmp_path, found: dict[int, list[float]], **look: object):
    lines = [
        case_line(f"c{i}", row(f"c{i}", "efficacy", "e", score), edits=edits)
        for edits, scores in found.items()
        for i, score in enumerate(scores)
    ]
    looks = [{"edits": edits, "perplexity_before": 10.0, "perplexity_after": 12.0, **look} for edits in found]
    plan = {"schedule": "sequential:1", "look": list(found)}
    given = {"method": "rome", "lines": lines, "looks": looks, "plan": plan}
    return boards([read_run(write_small(tmp_path / "run", [given]))])[0].entries[0]


def test_retention_by_hand(tmp_path):
    # after 2 edits: ages 1, 0; after 4: ages 3, 2, 1, 0. Age 0: 1 and 0; ages 1 to 9: 1 and 0, 0, 1
    worn = sequence(tmp_path, {2: [1.0, 1.0], 4: [0.0, 0.0, 1.0, 0.0]}).curves
    young, old = worn.retention
    assert (young.first, young.last, young.success.value, young.success.n) == (0, 0, 0.5, 2)
    assert (old.first, old.last, old.success.value, old.success.n) == (1, 3, 0.5, 4)
    assert [(look.edits, look.efficacy.value) for look in worn.checkpoints] == [(2, 1.0), (4, 0.25)]


def test_looks_carry_what_was_found(tmp_path):
    worn = sequence(
        tmp_path, {1: [1.0]}, perplexity_after="inf", norm_ratio={"a": 0.1, "b": 0.3}, last_batch_efficacy=1.0,
        collapse={"before": {}, "after": {}, "alarm": ["perplexity is not finite"]},
    ).curves  # fmt: skip
    (look,) = worn.checkpoints
    assert look.perplexity == float("inf") and look.norm_ratio == 0.3 and look.newest == 1.0
    assert look.alarms == ("perplexity is not finite",)


def test_single_cases_and_batches_have_no_curves(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "e", 1.0))]
    look = {"edits": 1, "perplexity_before": 10.0, "perplexity_after": 12.0}
    cells = [
        {"method": "rome", "lines": lines},
        {"method": "memit", "lines": lines, "looks": [look], "plan": {"schedule": "batch:1"}},
    ]
    made = boards([read_run(write_small(tmp_path / "run", cells))])
    assert [e.curves for board in made for e in board.entries] == [None, None]
    assert len(made[1].entries[0].measures["generate"]) == 1
