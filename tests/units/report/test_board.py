"""Boards: what shares a table, how the headline comes about, and how sure it is."""

from __future__ import annotations

import pytest

from errata.report import kinds, page, tables
from errata.report.board import boards
from errata.report.card import card as markdown
from errata.report.read import read_run, read_runs
from errata.report.tables import refused_cases
from tests.units.report.synthetic import case_line, row, write_run, write_small


def case(name: str, efficacy: float, paraphrases: tuple[float, ...], kept: tuple[tuple[float, float], ...]):
    return case_line(
        name,
        row(name, "efficacy", "e", efficacy),
        *(row(name, "paraphrase", f"p{i}", p) for i, p in enumerate(paraphrases)),
        *(row(name, "neighbourhood", f"n{i}", a, before=b, changes=False) for i, (b, a) in enumerate(kept)),
    )


def test_headline_by_hand(tmp_path):
    lines = [
        case(
            "a", 1.0, (1.0, 0.0), ((1.0, 1.0), (0.0, 1.0))
        ),  # the second neighbour was never known: no count
        case("b", 1.0, (1.0, 1.0), ((1.0, 0.0), (1.0, 1.0))),
    ]
    (board,) = boards([read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}]))])
    entry = board.entries[0]
    # efficacy 2/2, paraphrase 3/4, kept 2/3: 3 / (1 + 4/3 + 3/2) = 18/23
    assert board.headline == ("efficacy", "paraphrase", "neighbourhood")
    assert entry.headline.value == pytest.approx(18 / 23)
    # two cases are drawn: both "a" gives 3 / (1 + 2 + 1) = 3/4, both "b" 3 / (1 + 1 + 2) = 3/4, one of each 18/23
    assert entry.headline.low == pytest.approx(3 / 4) and entry.headline.high == pytest.approx(18 / 23)


def test_a_sure_answer_has_a_sure_interval(tmp_path):
    lines = [case(name, 1.0, (1.0,), ((1.0, 1.0),)) for name in "abcd"]
    (board,) = boards([read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}]))])
    headline = board.entries[0].headline
    assert (headline.low, headline.value, headline.high) == (1.0, 1.0, 1.0)


def test_fine_tuning_is_compared_pairwise(tmp_path):
    mixed = [case(str(i), float(i % 2), (1.0,), ((1.0, 1.0),)) for i in range(20)]
    none = [case(str(i), 0.0, (0.0,), ((1.0, 1.0),)) for i in range(20)]
    cells = [
        {"method": "rome", "lines": mixed},
        {"method": "kn", "lines": none},
        {"method": "ft", "lines": mixed},
    ]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    by = {entry.cell.method: entry for entry in board.entries}
    same, worse = by["rome"].over_tuning, by["kn"].over_tuning
    # the same answers in every case: paired draws differ by nothing, though each headline itself is uncertain
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)
    assert by["rome"].headline.low < by["rome"].headline.high
    assert worse.high < 0 and by["ft"].over_tuning is None


def test_a_seed_is_compared_with_its_own_fine_tuning(tmp_path):
    good = [case("a", 1.0, (1.0,), ((1.0, 1.0),))]
    bad = [case("a", 0.0, (0.0,), ((1.0, 1.0),))]
    cells = [
        {"method": method, "lines": lines, "plan": {"seed": seed}}
        for method, seed, lines in (("ft", 0, good), ("ft", 1, bad), ("rome", 0, good), ("rome", 1, good))
    ]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    over = {e.cell.plan["seed"]: e.over_tuning.value for e in board.entries if e.cell.method == "rome"}
    assert over == {0: 0.0, 1: 1.0}


def test_methods_on_other_cases_have_no_paired_interval(tmp_path):
    one = [case("a", 1.0, (1.0,), ((1.0, 1.0),))]
    two = [case("b", 1.0, (1.0,), ((1.0, 1.0),))]
    cells = [{"method": "rome", "lines": one}, {"method": "ft", "lines": two}]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    over = next(e.over_tuning for e in board.entries if e.cell.method == "rome")
    assert over.value == 0.0 and over.low is None


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "bfloat16"}, {"max_new_tokens": 64}, {"convention": "alt"}, {"dataset_sha256": "00"}],
)
def test_different_protocols_never_share_a_board(tmp_path, changed):
    first = write_run(tmp_path / "a", methods=("rome",), cases=3, absent=False)
    lines = [case("a", 1.0, (1.0,), ((1.0, 1.0),))]
    second = write_small(tmp_path / "b", [{"method": "memit", "lines": lines, "tag": changed}])
    third = write_small(tmp_path / "c", [{"method": "emmet", "lines": lines}])
    made = boards(read_runs([first, second, third]))
    found = [{entry.cell.method for entry in board.entries} for board in made]
    assert {"memit"} in found
    assert len(made) == 3  # the first has another dataset, too


def test_same_protocol_in_several_runs_is_one_board(tmp_path):
    lines = [case("a", 1.0, (1.0,), ((1.0, 1.0),))]
    folders = [write_small(tmp_path / m, [{"method": m, "lines": lines}]) for m in ("rome", "memit")]
    (board,) = boards(read_runs(folders))
    assert {entry.cell.method for entry in board.entries} == {"rome", "memit"}


def test_schedules_have_boards_of_their_own(run):
    assert [board.schedule for board in boards([run])] == ["single", "sequential:10"]


def test_baselines_first_then_by_headline(run):
    board = boards([run])[0]
    assert [e.cell.method for e in board.entries[:3]] == ["unedited", "in_prompt", "ft"]
    scores = [e.headline.value for e in board.entries[3:]]
    assert scores == sorted(scores, reverse=True)
    assert [bool(e.role) for e in board.entries] == [True] * 3 + [False] * 2


def test_what_is_kept_is_read_off_the_rows(tmp_path):
    lines = [
        case_line("a", row("a", "efficacy", "e", 1.0), row("a", "odd", "o", 1.0, before=1.0, changes=False))
    ]
    (board,) = boards([read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}]))])
    assert board.preserved == {"odd"} and board.group("odd") == "kept"
    assert board.headline == ("efficacy",) and "efficacy under free generation" in board.headline_text


def test_order_of_kinds():
    found = kinds.order(["one_hop", "neighbourhood", "paraphrase", "efficacy", "multi_hop.any", "alias"])
    assert found == ["efficacy", "paraphrase", "neighbourhood", "alias", "multi_hop.any", "one_hop"]
    assert kinds.label("multi_hop.any") == "multi hop, any"


def test_without_rows_there_is_a_headline_and_no_interval(tmp_path):
    place = write_run(tmp_path / "run", methods=("rome",), cases=3, absent=False)
    next(place.glob("cells/*/rows.jsonl")).unlink()
    entry = boards([read_run(place)])[0].entries[0]
    assert entry.headline.value > 0 and entry.headline.low is None


def test_cases_that_could_not_be_edited_are_told(tmp_path):
    lines = [case(name, 1.0, (1.0,), ((1.0, 1.0),)) for name in "ab"]
    refused = [{"case": "b", "reason": "no token of its own"}]
    cells = [
        {"method": "rome", "lines": lines, "refused_cases": refused},
        {"method": "kn", "lines": lines},
    ]
    run = read_run(write_small(tmp_path / "run", cells))
    (told,) = refused_cases(boards([run])[0])
    assert told.startswith("rome could not edit 1 case,") and "no token of its own" in told
    assert told in markdown([run]) and told in page.document([run])["boards"][0]["unedited_cases"]


def test_other_facts_of_the_subject_count_and_the_earlier_headline_is_shown_beside(tmp_path):
    line = case_line(
        "a",
        row("a", "efficacy", "e", 1.0),
        row("a", "paraphrase", "p", 1.0),
        row("a", "neighbourhood", "n", 1.0, before=1.0, changes=False),
        row("a", "same_subject", "s0", 1.0, before=1.0, changes=False),
        row("a", "same_subject", "s1", 0.0, before=1.0, changes=False),
    )
    run = read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": [line]}]))
    (board,) = boards([run])
    assert board.headline == ("efficacy", "paraphrase", "neighbourhood", "same_subject")
    assert board.earlier_headline == ("efficacy", "paraphrase", "neighbourhood")
    entry = board.entries[0]
    assert entry.headline.value == pytest.approx(4 / (3 + 2))
    assert entry.earlier_headline.value == 1.0
    main = next(
        t for section in tables.sections([board]) for t in section.tables if t.title == "free generation"
    )
    assert main.columns[:3] == ("method", "headline", "earlier headline")
    assert any("without same subject" in note for note in main.notes)


def test_without_other_facts_of_the_subject_there_is_one_headline(tmp_path):
    lines = [case("a", 1.0, (1.0,), ((1.0, 1.0),))]
    (board,) = boards([read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}]))])
    assert board.earlier_headline == () and board.earlier_text == ""
