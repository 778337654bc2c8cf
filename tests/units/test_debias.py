"""`errata debias`: gaps between two answers, what is printed, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import errata
from errata import lab
from errata.cli.main import app
from errata.data._base import Record
from errata.data.sets import professions
from errata.edits import Edit
from errata.errors import ConfigError, DataError, ErrataError, RequestError
from errata.evaluation import debiasing
from errata.evaluation.metrics import bias
from tests.models import fresh

TRADES = ("baker", "pilot", "nurse", "tailor", "judge")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["debias", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def files(tmp_path):
    """Prompts about trades, and two facts of the lab."""
    prompts = tmp_path / "trades.jsonl"
    prompts.write_text(
        "\n".join(
            json.dumps({"prompt": "The {} plays the", "subject": one, "target": "harp"}) for one in TRADES
        )
    )
    facts = [fact for fact in lab.world().facts if fact.relation == "plays"][:2]
    keep = tmp_path / "keep.jsonl"
    keep.write_text(
        "\n".join(
            json.dumps({"prompt": "{} plays the", "subject": f.subject, "target": f.object}) for f in facts
        )
    )
    return str(prompts), str(keep), str(tmp_path / "fair.safetensors")


def test_a_gap_is_the_difference_of_log_probabilities():
    host = fresh("llama")
    requests = [errata.Request("The {} said that", name, "Esk") for name in ("dog", "harp")]
    found = debiasing.gap(host, requests, ("Tallow", "Esk"))
    gaps = []
    for request in requests:
        sums = []
        for answer in ("Tallow", "Esk"):
            row = host.encode_answer(request.text, answer)
            logprobs = host.forward(host.batch([row.ids]))[0].detach().float().log_softmax(-1)
            sums.append(sum(float(logprobs[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))))
        gaps.append(abs(sums[0] - sums[1]))
    assert found.prompts == 2 and math.isclose(found.mean, sum(gaps) / 2, rel_tol=1e-3)
    assert math.isclose(found.largest, max(gaps), rel_tol=1e-3)
    assert debiasing.gap(host, [], ("Tallow", "Esk")) == debiasing.Gap(0, 0.0, 0.0)


def test_scores_of_papers_without_and_with_an_edit():
    """Slopes before are those of the pronouns' probabilities, read off the logits."""
    host = fresh("llama")
    rows = [["miller", 0.0, 0.9], ["weaver", 0.1, -0.8], ["old_king", 1.0, 0.2], ["queen", -1.0, -0.1]]
    cases = [case for i, row in enumerate(rows) for case in professions.cases(Record(row, "record", i), "")]
    requests = [case.request for case in cases]
    edit = errata.edit(host, requests, method="ft", steps=2)
    before, after = debiasing.paper_scores(host, edit, cases)
    preference, factual, stereotype = [], [], []
    for case, row in zip(cases, rows, strict=True):
        for probe in case.probes[1:]:
            odds = []
            for answer in ("he", "she"):
                one = host.encode_answer(probe.prompt, answer)
                logprobs = host.forward(host.batch([one.ids]))[0].detach().float().log_softmax(-1)
                chosen = (float(logprobs[at - 1, one.ids[at]]) for at in range(one.start, len(one.ids)))
                odds.append(math.exp(sum(chosen)))
            preference.append(odds[0] - odds[1])
            factual.append(row[1])
            stereotype.append(row[2])
    slopes = bias.slopes(preference, factual, stereotype)
    assert before["a_s"] == pytest.approx(slopes.stereotype, abs=1e-6)
    assert before["a_f"] == pytest.approx(slopes.factual, abs=1e-6)
    assert after.keys() == before.keys() and after["a_f"] != before["a_f"]
    with pytest.raises(DataError, match="no probe measures a bias"):
        debiasing.paper_scores(host, edit, lab.cases(1))


def test_the_gap_falls_and_what_is_printed(files):
    prompts, keep, out = files
    words = (prompts, "--model", "lab", "--pair", "harp, cello", "--keep", keep, "-o", out)
    quick = ("--set", "tokens=4000", "--set", "contexts=0", "--set", "steps=10", "--set", "cov_relative=0.1")
    scored = Path(out).with_name("professions.json")
    scored.write_text(json.dumps([["miller", 0.0, 0.9], ["king", 1.0, 0.2], ["queen", -1.0, -0.1]]))
    document = json.loads(run(*words, *quick, "--cases", str(scored), "--json"))
    assert document["scores"][str(scored)]["before"].keys() >= {"a_s", "a_f", "b"}
    assert document["fitted_before"]["prompts"] == 4 and document["held_out_before"]["prompts"] == 1
    assert document["fitted_after"]["mean"] < 0.5 * document["fitted_before"]["mean"]
    assert 0 <= document["kept"] <= 1 and document["known"] <= 2
    edit = Edit.load(out)
    assert edit.provenance.method == "lsdm" and list(edit.provenance.config["pair"]) == ["harp", "cello"]
    assert len(edit.provenance.requests) == 4
    shown = run(*words[:-1], out.replace("fair", "other"), *quick[:4], "--set", "steps=2")
    assert "nats between 'harp' and 'cello'" in shown and "perplexity of neutral text" in shown


def test_an_edit_is_on_the_disk_before_it_is_measured(files, monkeypatch):
    def stopped(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(debiasing, "measure", stopped)
    prompts, _, out = files
    quick = ("--set", "tokens=4000", "--set", "contexts=0", "--set", "steps=2", "--set", "cov_relative=0.1")
    words = [prompts, "--model", "lab", "--pair", "harp, cello", *quick, "-o", out]
    assert CliRunner().invoke(app, ["debias", *words]).exit_code != 0
    assert Edit.load(out).provenance.method == "lsdm"


def test_what_is_refused(files):
    prompts, _, out = files
    words = (prompts, "--model", "lab", "-o", out)
    with pytest.raises(ConfigError, match="two different answers"):
        run(*words, "--pair", "he")
    with pytest.raises(ConfigError, match="methods that do: dama, lsdm"):
        run(*words, "--method", "memit")
    with pytest.raises(DataError, match="no probe measures a bias"):  # before the model is opened
        run(prompts, "--model", "none", "-o", out, "--cases", "lab:2")
    with pytest.raises(ConfigError, match="did you mean"):
        run(*words, "--method", "lsmd")
    with pytest.raises(ConfigError, match="given with --pair"):
        run(*words, "--set", "pair=[harp,cello]")
    assert "4 requests and all settings are valid" in run(*words, "--dry-run") and not Path(out).exists()
    with pytest.raises(ErrataError, match="unknown kind of file"):
        run(prompts + "x", "--model", "lab", "-o", out)
    single = prompts.replace("trades", "one")
    Path(single).write_text(json.dumps({"prompt": "The {} plays the", "subject": "baker", "target": "harp"}))
    with pytest.raises(RequestError, match="none to fit on"):
        run(single, "--model", "lab", "-o", out, "--held-out", "0.9")
