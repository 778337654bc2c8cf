"""Metrics as records: a file of its own is all that a new one needs, from the rows to the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import errata.evaluation.metrics as package
from errata.bench.results import read_sealed
from errata.cli.main import app
from errata.errors import ConfigError
from errata.evaluation import score
from errata.evaluation.metrics import REGISTRY, Metric, headline_metric, metric_of
from errata.registry import Records
from errata.report.read import read_run
from tests.units.bench.small import document, execute, write_cases, write_model

MADE_UP = '''
"""Brevity: how short the text is."""
from errata.evaluation.metrics import Column, Metric, PaperScore, ProbeResult


def rows(result: ProbeResult):
    before, after = (1 / (1 + len(side.text)) for side in (result.before, result.after))
    return [result.row("brevity", before, after, letters=len(result.after.text))]


def summary(rows, counted):
    return {"letters": sum(row.detail["letters"] for row in rows) / len(rows)}


def briefest(summary, side):
    return summary.get("efficacy.brevity", {}).get(f"macro_{side}")


METRIC = Metric(
    "brevity", "brevity of texts", unit="share", forms=frozenset({"short"}), rows=rows, summary=summary,
    columns=(Column("letters", "letters"),), scores=(PaperScore("Brief", briefest),),
    heading=HEADING, heading_kinds=("efficacy",),
)
'''
BLOCK = {"methods": [{"name": "ft", "settings": {"steps": 2}, "label": "tuned"}], "schedule": "single"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["a column of the first table", "a table of its own"])
def brevity(request, tmp_path, monkeypatch):
    """Put one more file into the package of metrics, for a test's time."""
    place = tmp_path / "metrics"
    place.mkdir()
    first = request.param.startswith("a column")
    text = MADE_UP.replace("HEADING", repr("how brief" if first else ""))
    (place / "brevity.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(place)])
    monkeypatch.delitem(sys.modules, "errata.evaluation.metrics.brevity", raising=False)
    REGISTRY.reload()
    yield first
    monkeypatch.undo()
    sys.modules.pop("errata.evaluation.metrics.brevity", None)
    REGISTRY.reload()


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_new_file_reaches_the_evaluation(brevity, model, tmp_path, monkeypatch):
    cases = write_cases(tmp_path / "cases.jsonl", 2)
    words = ("eval", "--model", model, "--method", "ft", "--set", "steps=2", "--cases", cases)
    report = json.loads(run(*words, "--json"))
    entry = report["summary"]["efficacy.brevity"]
    rows = [row for row in report["rows"] if (row["kind"], row["protocol"]) == ("efficacy", "brevity")]
    assert len(rows) == 2
    assert entry["letters"] == sum(row["detail"]["letters"] for row in rows) / 2
    monkeypatch.setenv("COLUMNS", "300")  # no heading is broken in two
    table = run(*words)
    assert "brevity of texts" in table.replace("\n", " ")
    assert f"{entry['before']:.3f} -> {entry['after']:.3f}" in table


def test_a_new_file_reaches_run_folder_terminal_page_and_card(brevity, model, tmp_path):
    cases = write_cases(tmp_path / "cases.jsonl", 2)
    folder = tmp_path / "run"
    execute(document(model, cases, BLOCK), folder)
    cells = [cell for cell in read_run(folder).cells if cell.name == "tuned"]
    found = read_sealed(cells[0].folder)
    entry = found["summary"]["efficacy.brevity"]
    shown = f"{100 * entry['after']:.1f}"
    assert entry["letters"] > 0 and found["scores"]["Brief"] == entry["macro_after"]
    terminal = run("report", folder, "--markdown", tmp_path / "card.md", "--html", tmp_path / "page.html")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    (mine,) = (one for one in data["boards"][0]["entries"] if one["id"] == cells[0].id)
    assert mine["measures"]["brevity"]["efficacy"][0] == pytest.approx(entry["after"], rel=1e-4)
    assert mine["scores"]["Brief"] == pytest.approx(entry["macro_after"], rel=1e-4)
    assert "Brief" in card, "papers' scores have a table"
    if brevity:
        assert "how brief" in " ".join(terminal.split()) and shown in terminal
        assert "how brief" in card and shown in card and "<th>how brief</th>" in page
        assert [one["title"] for one in data["boards"][0]["extras"]].count("how brief") == 1
        assert mine["brevity"] == pytest.approx(entry["after"], rel=1e-4)
    else:
        table = card.partition("### Brevity of texts")[2].partition("###")[0]
        assert shown in table and "letters" in table, "with its further numbers"
        others = {one["id"]: one["title"] for one in data["boards"][0]["others"]}
        assert others["brevity"] == "brevity of texts"
    assert data["metrics"]["brevity"]["label"] == "brevity of texts"


def test_other_packages_bring_metrics_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "brief_metrics.py").write_text(MADE_UP.replace("HEADING", "''"), encoding="utf-8")
    info = tmp_path / "brief_metrics-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brief-metrics\nVersion: 1\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        "[errata.metrics]\nbrief = brief_metrics:METRIC\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    REGISTRY.reload()
    try:
        assert "brevity" in REGISTRY.names() and metric_of("brevity").label == "brevity of texts"
    finally:
        monkeypatch.undo()
        REGISTRY.reload()
    assert "brevity" not in REGISTRY.names()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("METRIC = 3", "broken defines int 3, expected Metric"),
        (
            "from errata.evaluation.metrics import Metric\nMETRICS = (Metric('a', 'a'), Metric('kl', 'mine'))",
            "takes the name 'kl', which errata.evaluation.metrics.divergence has",
        ),
    ],
)
def test_a_wrong_file_is_named(text, complaint, tmp_path, monkeypatch):
    (tmp_path / "zz_broken.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    records = Records("errata.evaluation.metrics", ("METRIC", "METRICS"), Metric, group="errata.metrics")
    try:
        with pytest.raises(ConfigError, match=complaint):
            records.names()
    finally:
        sys.modules.pop("errata.evaluation.metrics.zz_broken", None)


def test_every_metric_is_told_in_full():
    names = REGISTRY.names()
    assert [name for name in names if metric_of(name).headline] == ["generate"] == [headline_metric().name]
    for metric in REGISTRY.values():
        assert metric.label and metric.title and metric.name == metric.name.strip(), metric
        assert metric.rows or metric.case_rows or metric.by_judge, f"{metric.name} has no way into a run"
    scores = [one.name for metric in REGISTRY.values() for one in metric.scores]
    assert len(scores) == len(set(scores)), "each paper's score has one owner"
    with pytest.raises(ConfigError, match="did you mean 'generate'"):
        REGISTRY.get("generat")


def test_rows_of_an_unknown_protocol_are_plain_numbers():
    from errata.types import Row

    rows = [Row("a", "efficacy", "older", "p", 0, 3.0, {"size_before": 1, "size_after": 2, "changes": False})]
    entry = score.summarise(rows)["efficacy.older"]
    assert (entry["n"], entry["mean"], entry["size_after"]) == (1, 3.0, 2.0)
    assert metric_of("of_old").title == "of old"


def test_records_load_no_torch():
    code = (
        "import sys; from errata.evaluation.metrics import REGISTRY; REGISTRY.values(); "
        "import errata.evaluation.metrics.summary, errata.report.page, errata.report.card; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
