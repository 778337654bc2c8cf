"""Numbers, tables, published figures, the card, figures and the command."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import typer
from typer.testing import CliRunner

from errata.cli import report as cli
from errata.errors import ConfigError, DataError
from errata.report import numbers, tables
from errata.report.board import boards
from errata.report.card import card, escape
from errata.report.files import write
from errata.report.measure import Measure
from errata.report.page import document
from errata.report.published import comparable, comparisons
from errata.report.read import read_run
from tests.units.report.synthetic import case_line, row, write_run, write_small


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (numbers.percent(0.9900000001), "99.0"), (numbers.percent(1.0), "100.0"), (numbers.percent(-0.0001), "0.0"),
        (numbers.percent(None), "–"), (numbers.percent(float("nan")), "–"), (numbers.plain(0.12345), "0.123"),
        (numbers.plain(12.5), "12.5"), (numbers.plain(1234.5), "1,234"), (numbers.plain(float("inf")), "∞"),
        (numbers.plain(2e7), "2.00e+07"), (numbers.plain(0), "0"), (numbers.seconds(0.0412), "41 ms"),
        (numbers.seconds(0.5), "0.50 s"), (numbers.seconds(119.6), "2 min 00 s"), (numbers.seconds(7500), "2 h 05 min"),
        (numbers.size(138_800), "138.8 kB"), (numbers.size(12), "12 B"),
        (numbers.share(Measure(0.964, 0.931, 0.988)), "96.4 [93.1, 98.8]"),
        (numbers.share(Measure(0.964, 0.931, 0.988), brief=True), "96.4 93-99"),
        (numbers.share(Measure(-0.1, -0.2, 0.05), signed=True), "-10.0 [-20.0, 5.0]"),
    ],
)  # fmt: skip
def test_numbers(shown, wanted):
    assert shown == wanted


def test_every_table_is_rectangular_and_every_board_has_its_tag(run):
    made = boards([run])
    for brief in (True, False):
        for section in tables.sections(made, brief=brief):
            assert "lab:6@abababababab" in section.tag and "dtype=float32" in section.tag
            for table in section.tables:
                assert {len(r) for r in table.rows} == {len(table.columns)}, table.title


def test_protocols_have_tables_of_their_own(run):
    titles = [table.title for table in tables.sections(boards([run]))[0].tables]
    assert sum("teacher-forced" in title for title in titles) == 1
    assert sum("probability" in title for title in titles) == 1
    main = tables.sections(boards([run]))[0].tables[0]
    assert main.columns[:2] == ("method", "headline") and "neighbourhood kept" in main.columns
    assert {"legacy S", "KL, nats", "time per edit"} <= set(main.columns)


def test_results_by_language_have_a_table(tmp_path):
    def line(name, edited, asked, own, other):
        rows = [row(name, "efficacy", "p", own), row(name, "cross_efficacy", "q", other)]
        rows.append(row(name, "cross_locality", "r", 1.0 - other, before=1.0, changes=False))
        for one, language in zip(rows, (edited, asked, asked), strict=True):
            one["detail"] |= {"edited_in": edited, "asked_in": language}
        return case_line(name, *rows)

    lines = [line("1", "x", "y", 1.0, 0.0), line("2", "x", "y", 1.0, 1.0), line("3", "y", "x", 0.0, 1.0)]
    plain = [case_line("1", row("1", "efficacy", "p", 1.0))]
    run = read_run(write_small(tmp_path / "a", [{"method": "keel", "lines": lines}]))
    (section,) = tables.sections(boards([run]), brief=True)
    (table,) = [one for one in section.tables if "by language" in one.title]
    assert table.columns == ("method", "edited in", "asked in", "efficacy", "locality")
    assert table.rows == (
        ("keel", "x", "x", "100.0", "–"), ("keel", "x", "y", "50.0", "50.0"),
        ("keel", "y", "y", "0.0", "–"), ("keel", "y", "x", "100.0", "0.0"),
    )  # fmt: skip
    alone = read_run(write_small(tmp_path / "b", [{"method": "ft", "lines": plain}]))
    assert not [t for s in tables.sections(boards([alone])) for t in s.tables if "by language" in t.title]


def test_mean_perplexity_of_batches(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "e", 1.0))]
    looks = [{"edits": 1, "perplexity_before": 10.0, "perplexity_after": after} for after in (12.0, 14.0)]
    given = {"method": "memit", "lines": lines, "looks": looks, "plan": {"schedule": "batch:1"}}
    (board,) = boards([read_run(write_small(tmp_path / "run", [given]))])
    assert tables.perplexities(board.entries[0]) == (10.0, 13.0)


def test_published_beside_measured(run):
    (one,) = comparisons([run], boards([run]))
    rome, memit = one.lines
    assert (rome.method, rome.published, rome.within) == ("ROME", 12.34, False)
    assert rome.difference == pytest.approx(rome.measured - 12.34)
    # a figure from memory is not passed on at all
    assert memit.published is None and memit.provenance == "memory" and memit.within is None


def test_a_figure_from_memory_is_printed_nowhere(run):
    from errata.report.page import page

    for text in (card([run]), page([run]), json.dumps([t.rows for t in tables.published_tables(
        comparisons([run], boards([run])))])):  # fmt: skip
        assert "12.34" in text and "77.75" not in text
        assert "secondary" in text


@pytest.mark.parametrize(
    ("changed", "fits"),
    [({}, True), ({"model": "other"}, False), ({"dataset": "zsre"}, False), ({"schedule": "batch:10"}, False),
     ({"dataset": "lab"}, True), ({"model": "LAB"}, True)],
)  # fmt: skip
def test_only_the_same_setting_is_comparable(run, changed, fits):
    table = {"model": "hub/lab", "dataset": "lab:7500", "schedule": "single", **changed}
    assert comparable(table, boards([run])[0]) is fits


@pytest.mark.parametrize(
    ("dataset", "schedule", "fits"),
    [("lab:20", "sequential:10", True), ("lab", "sequential:10", True), ("lab:10000", "sequential:10", False),
     ("lab:1", "sequential:10", False)],
)  # fmt: skip
def test_as_many_edits_must_stand_together(tmp_path, dataset, schedule, fits):
    (board,) = boards([read_run(write_run(tmp_path / "run", cases=20, looks=(10, 20), single=False))])
    assert comparable({"model": "lab", "dataset": dataset, "schedule": schedule}, board) is fits


def test_a_batch_is_compared_by_what_it_held(tmp_path):
    cell = {"method": "memit", "lines": [case_line("a", row("a", "efficacy", "e", 1.0))],
            "plan": {"schedule": "batch:1000"}}  # fmt: skip
    for edits, fits in ((1000, True), (20, False)):
        run = read_run(write_small(tmp_path / str(edits), [{**cell, "tag": {"edits": edits}}]))
        table = {"model": "lab", "dataset": "lab", "schedule": "batch:1000"}
        assert comparable(table, boards([run])[0]) is fits


def test_judges_have_tables_of_their_own(tmp_path):
    """Two judges, or two prompts of one, never share a column, and no judge ranks a method."""
    lines = [case_line("a", row("a", "efficacy", "e", 1.0))]
    place = write_small(tmp_path / "run", [{"method": name, "lines": lines} for name in ("rome", "memit")])
    for cell, model, value in (("rome-0", "toy", 0.25), ("memit-1", "big", 0.75)):
        summary = {"efficacy.judge": {"before": 0.0, "after": value, "n": 4, "ci": [0.0, 1.0]},
                   "efficacy.generate": {"before": 0.0, "after": 0.5, "n": 4, "ci": [0.0, 1.0]}}  # fmt: skip
        made = {"judge": {"model": model, "prompt_sha256": "ab" * 32}, "summary": summary, "agreement": {}}
        (place / "cells" / cell / "judged.json").write_text(json.dumps(made), encoding="utf-8")
    run = read_run(place)
    (board,) = boards([run])
    assert all(entry.headline and entry.headline.value == 1.0 for entry in board.entries)
    found = {t.title: t.rows for t in tables.sections([board])[0].tables if t.title.startswith("judge")}
    assert len(found) == 2
    for title, rows in found.items():
        toy = "by toy, prompt abababab" in title
        wanted = (
            {"rome": "25.0 [0.0, 100.0]", "memit": "–"}
            if toy
            else {"rome": "–", "memit": "75.0 [0.0, 100.0]"}
        )
        assert sorted(rows) == sorted(wanted.items())
    shown = {one["id"]: one["share"] for one in document([run])["boards"][0]["others"]}
    assert [shown[f"judge by {model}, prompt abababab"] for model in ("toy", "big")] == [True, True]


def test_published_tables_match_by_label_before_method(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "e", 1.0))]
    cells = [
        {"method": "ft", "lines": lines, "scores": {"ES": 1.0}},
        {"method": "ft", "lines": lines, "scores": {"ES": 2.0}, "plan": {"label": "FT", "baseline": False}},
    ]
    table = {"name": "t", "model": "lab", "dataset": "lab", "schedule": "single", "provenance": "confirmed",
             "rows": [{"method": "FT", "errata_method": None, "scores": {"ES": 2.0}},
                      {"method": "FT-M", "errata_method": None, "scores": {"ES": 3.0}}]}  # fmt: skip
    run = read_run(write_small(tmp_path / "run", cells, published=[table]))
    first, second = comparisons([run], boards([run]))[0].lines
    assert first.measured == 2.0 and second.measured is None


@pytest.mark.parametrize(
    ("others", "wanted"),
    [
        ([{"seed": 1, "value": 80.0}], 60.0),  # the mean over seeds
        ([{"seed": 0, "value": 90.0, "settings": {"steps": 9}, "label": "rome steps=9"}], 40.0),
    ],
)
def test_the_best_of_several_is_never_taken(tmp_path, others, wanted):
    lines = [case_line("a", row("a", "efficacy", "e", 0.0))]
    best = [case_line("a", row("a", "efficacy", "e", 1.0))]
    cells = [{"method": "rome", "lines": lines, "scores": {"ES": 40.0}}]
    for plan in others:
        value = plan.pop("value")
        cells.append({"method": "rome", "lines": best, "scores": {"ES": value}, "plan": plan})
    table = {"name": "t", "model": "lab", "dataset": "lab", "schedule": "single", "provenance": "confirmed",
             "rows": [{"method": "ROME", "errata_method": "rome", "scores": {"ES": 50.0}}]}  # fmt: skip
    run = read_run(write_small(tmp_path / "run", cells, published=[table]))
    assert comparisons([run], boards([run]))[0].lines[0].measured == wanted


def test_card(run):
    text = card([run])
    assert "# Report: synthetic" in text and "Protocol: lab:6@abababababab" in text
    assert "ValueError: &lt;b&gt;matrix&lt;/b&gt; is singular" in text and "trained editor" in text
    assert "hardware A CPU, 2 cores" in text and "torch 2.13.0" in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.replace("\\|", "").count("|"), 0)
    assert min(widths) > 2
    assert escape("a|b <i> *x* _y_ in_prompt\n`z`") == "a\\|b &lt;i&gt; \\*x\\* \\_y\\_ in_prompt \\`z\\`"


def test_files_are_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "none" / "file", "text")
    assert write(tmp_path / "file", "text").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_figures(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from errata.report import figures
    from errata.report.figures import render, write_figures

    made = write_figures(tmp_path / "figures", [run])
    names = {path.name for path in made}
    assert {"board-lab-lab-6-single.png", "board-lab-lab-6-single-dark.svg",
            "retention-lab-lab-6-sequential-10.svg", "collapse-lab-lab-6-sequential-10-dark.png"} <= names  # fmt: skip
    assert {"tradeoff-lab-lab-6-single.png", "tradeoff-lab-lab-6-sequential-10.png"} <= names
    assert len(names) == 4 * (
        2 + 2 + 2
    )  # two boards, their trade-offs, two curves of the sequence; four variants
    first = {path.name: path.read_bytes() for path in made}
    assert all(data[:4] == b"\x89PNG" for name, data in first.items() if name.endswith("png"))
    only_svg = lambda figure, form: render(figure, form) if form == "svg" else b""  # noqa: E731
    monkeypatch.setattr(figures, "render", only_svg)
    again = write_figures(tmp_path / "figures", [run])
    assert all(path.read_bytes() == first[path.name] for path in again if path.suffix == ".svg")


def test_figures_tell_seeds_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from errata.report import figures

    lines = [case_line("a", row("a", "efficacy", "e", 1.0))]
    cells = [{"method": "rome", "lines": lines, "plan": {"seed": seed}} for seed in (0, 1)]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    (first, *_) = figures._board(board, figures.LIGHT).axes
    assert {label.get_text() for label in first.get_yticklabels()} == {"rome (seed 0)", "rome (seed 1)"}


def test_titles_of_a_board_with_long_names_do_not_overlap(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from errata.report import figures

    kinds = {"efficacy": True, "paraphrase": True, "neighbourhood": False, "same_subject": False}
    rows = [
        row("a", kind, f"p{i}", 1.0, before=1.0 - new, changes=new)
        for i, (kind, new) in enumerate(kinds.items())
    ]
    plan = {"label": "malmen editor=out/malmen-vl.safetensors"}
    cells = [{"method": "malmen", "lines": [case_line("a", *rows)], "plan": plan}]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    figure = figures._board(board, figures.LIGHT)
    figure.draw_without_rendering()
    titles = [axes._left_title for axes in figure.axes]
    assert [title.get_text() for title in titles][-2:] == ["neighbourhood\nkept", "same subject\nkept"]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def sequence_cell(method: str, scores: list[float], **plan: object) -> dict:
    """Make a cell with two looks at a sequence."""
    looks = (len(scores), 2 * len(scores))
    lines = [
        case_line(f"c{i}", row(f"c{i}", "efficacy", "e", score), edits=edits)
        for edits in looks
        for i, score in enumerate(scores * (edits // len(scores)))
    ]
    found = [{"edits": edits, "perplexity_before": 10.0, "perplexity_after": 12.0} for edits in looks]
    return {
        "method": method, "lines": lines, "looks": found,
        "plan": {"schedule": "sequential:1", "look": list(looks), **plan},
    }  # fmt: skip


def test_a_method_has_one_colour_in_all_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from errata.report import figures
    from errata.report.style import COLOURS, style_of

    assert len(figures.LIGHT.series) == len(figures.DARK.series) == COLOURS
    assert len(set(figures.LIGHT.series)) == len(set(figures.DARK.series)) == COLOURS
    seen: dict[str, set[str]] = {}
    sets = (
        ["ft", "memit", "rome"],
        ["memit", "alphaedit"],
        ["rome", "lora", "nse", "ft"],
        ["a new one", "memit"],
    )
    for i, methods in enumerate(sets):
        cells = [sequence_cell(method, [1.0, 0.5]) for method in methods]
        (board,) = boards([read_run(write_small(tmp_path / f"run{i}", cells))])
        for draw in (figures._retention, figures._collapse):
            for axes in draw(board, figures.LIGHT).axes:
                for line in axes.get_lines():
                    if not line.get_label().startswith("_"):  # matplotlib's own names begin so
                        seen.setdefault(line.get_label().partition(" (")[0], set()).add(line.get_color())
    assert set(seen) == {method for methods in sets for method in methods}
    assert all(len(colours) == 1 for colours in seen.values()), seen
    assert seen["memit"] == {figures.LIGHT.series[style_of("memit").colour]}
    assert len({style_of(name) for methods in sets for name in methods}) == len(seen)


def test_lines_of_one_colour_differ_in_their_dashes(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from errata.report import figures

    cells = [sequence_cell("rome", [1.0, 0.5], seed=seed) for seed in (0, 1, 2)]
    (board,) = boards([read_run(write_small(tmp_path / "run", cells))])
    (axes,) = figures._retention(board, figures.LIGHT).axes
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len(lines) == 3 and len({line.get_color() for line in lines}) == 1
    assert len({line.get_linestyle() for line in lines}) == 3


def test_figures_without_matplotlib_say_what_to_install(run, tmp_path, monkeypatch):
    from errata.report.figures import write_figures

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"errata\[report\]"):
        write_figures(tmp_path, [run])


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(cli.command)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_command(command, folder, tmp_path):
    page, text = tmp_path / "page.html", tmp_path / "card.md"
    done = command(folder, "--html", page, "--markdown", text)
    assert done.exit_code == 0, done.output
    assert "protocol: lab:6@" in done.output and "harmonic mean" in done.output and "singular" in done.output
    assert page.stat().st_size > 10_000 and text.read_text(encoding="utf-8").startswith("# Report")


def test_command_as_json(command, folder):
    found = json.loads(command(folder, "--json").stdout)
    assert [board["schedule"] for board in found["boards"]] == ["single", "sequential:10"]
    assert found["absent"][0]["reason"] and found["written"] == []


def test_command_on_no_run_folder(command, tmp_path):
    done = command(tmp_path)
    assert isinstance(done.exception, DataError)
