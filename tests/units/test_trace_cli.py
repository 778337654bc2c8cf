"""errata trace, its pictures, and the comparison with edits."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata import lab
from errata.bench import layers
from errata.cli.main import app
from errata.errors import ConfigError
from errata.inspect import facts, localisation, tracing
from errata.inspect.tracing import Settings, Trace
from errata.job import prepare
from errata.report.heatmap import write_heatmap
from errata.report.layers import write_localisation
from errata.types import Request

PROMPT, NAME = "Ada Brenner was born in", "Ada Brenner"
QUICK = ["--draws", "2", "--kinds", "hidden"]


def run(*words: str):
    return CliRunner().invoke(app, ["trace", *words], catch_exceptions=False)


def document(*words: str):
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_one_prompt_as_table_json_and_picture(tmp_path):
    picture = tmp_path / "map.png"
    shown = run(PROMPT, "--subject", NAME, *QUICK, "-o", str(picture))
    assert shown.exit_code == 0 and "' Brenner'*" in shown.output and "Rowanport" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 150_000
    found = document(PROMPT, "--subject", NAME, *QUICK)
    assert found["known"] and found["clean"] > 0.9 > found["corrupted"]
    effect = found["maps"]["hidden"]["effect"]
    assert len(effect) == 6 and all(len(row) == len(found["positions"]) + 1 for row in effect)
    assert effect[5][-2] == pytest.approx(found["total_effect"], abs=1e-4)
    again = write_heatmap(tmp_path / "again.png", found)
    assert again.read_bytes() == picture.read_bytes()
    assert (
        errata.trace(lab.load(), PROMPT, NAME, settings=Settings(draws=2, kinds=("hidden",))).to_dict()
        == found
    )


def test_cases_are_averaged(tmp_path):
    found = document("lab:3:5", *QUICK, "-o", str(tmp_path / "mean.svg"))
    assert found["facts"] + found["skipped"] == 3 and len(found["maps"]["hidden"]["effect"]) == len(
        found["roles"]
    )
    assert (tmp_path / "mean.svg").read_text().startswith("<?xml")
    shown = run("lab:3:5", *QUICK, "--limit", "2")
    assert "all subject tokens" in shown.output and "2 facts, 0 not known" in shown.output


def test_swaps_and_edges():
    found = document(PROMPT, "--subject", NAME, "--swap", "Boris Sorwick", "--kinds", "hidden", "--fast")
    run_exactly = [v for row in found["exact"]["hidden"]["effect"] for v in row if v is not None]
    assert len(run_exactly) == round(0.05 * 6 * len(found["positions"]))
    assert (
        "difference of logits"
        in run(PROMPT, "--subject", NAME, "--swap", "Boris Sorwick", "--kinds", "hidden").output
    )
    edges = document(PROMPT, "--subject", NAME, "--edges", "--window", "6")
    assert edges["change"]["subject"][3] < -0.5
    assert "cut from" in run("lab:2:5", "--edges").output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((PROMPT, "--subject", "Boris"), "does not occur"),
        ((PROMPT, "--subject", NAME, "--swap", "Boris Sorwick", "--edges"), "one at a time"),
        ((PROMPT, "--subject", NAME, "--fast"), "--swap OTHER"),
        (("lab:2", "--swap", "Boris Sorwick"), "--fast pairs"),
        (("lab:2", "--edges", "-o", "x.png"), "draws causal tracing"),
        ((PROMPT, "--subject", NAME, "-o", "x.pdf"), ".png or .svg"),
        ((PROMPT, "--subject", NAME, "--kinds", "heads"), "unknown kind of state"),
        ((PROMPT, "--subject", NAME, "--noise", "loud"), "noise"),
        (("lab:2", "--set", "steps=2"), "--against-editing METHOD"),
        (("lab:2", "--answer", "x"), "--subject"),
        ((PROMPT, "--subject", NAME, "--kinds", ","), "kinds: expected one or more"),
        (
            (PROMPT, "--subject", NAME, "--kinds", "", "--swap", "Boris Sorwick"),
            "kinds: expected one or more",
        ),
        ((PROMPT, "--subject", NAME, "--edges", "--severed", "mlp"), "--severed: not for --edges"),
        ((PROMPT, "--subject", NAME, "--attention", "--kinds", "mlp"), "--kinds: not for --attention"),
        (("lab:2", "--fast", "--draws", "3", "--noise", "0.1"), "--noise and --draws: not for --fast"),
        ((PROMPT, "--subject", NAME, "--swap", "Boris Sorwick", "--window", "2"), "--window: not for --swap"),
        (("lab:3", "--against-editing", "ft", "--kinds", "mlp,attn"), "one kind of states, found mlp, attn"),
        ((PROMPT, "--subject", NAME, "-o", "nowhere/map.png"), "the folder nowhere does not exist"),
    ],
)
def test_what_is_refused(words, text, monkeypatch, tmp_path):
    from errata.cli.main import run as program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["errata", "trace", *words])
    if text != "does not occur":  # the tokens say that; all else is refused before the model is read
        monkeypatch.setattr(
            "errata.cli.common.open_text_host", lambda *_: pytest.fail("the model was opened")
        )
    said: list[str] = []
    monkeypatch.setattr("sys.stderr.write", said.append)
    with pytest.raises(SystemExit) as left:
        program()
    assert left.value.code == 2 and text in " ".join("".join(said).split())


# --- does tracing say where to edit? --------------------------------------------------------


def traces(scores: torch.Tensor) -> list[Trace]:
    """Return traces of one token each whose scores are given ``[facts, layers]``."""
    found = []
    for row in scores:
        maps = torch.zeros(len(row), 2, 1, 3)
        maps[..., 0] = row[:, None, None]
        clean = torch.tensor([1.0, 0.0, 1.0])
        found.append(Trace(None, Settings(draws=1), 1, 1.0, clean, torch.zeros(1, 3), (0,), {"hidden": maps}))  # type: ignore[arg-type]
    return found


@pytest.fixture
def random_scores():
    return torch.rand(20, 6, generator=torch.Generator().manual_seed(0))


def test_a_success_that_the_layer_decides_leaves_nothing_to_tracing(random_scores):
    noise = 0.05 * torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    table = localisation.compare(
        traces(random_scores), range(6), lambda fact, layer: 1 - layer / 8 + float(noise[fact, layer])
    ).to_dict()
    assert table["r2_layer"]["value"] > 0.9 and 0 <= table["increment"]["value"] < 0.01
    assert table["increment"]["low"] < 0.01 and abs(table["correlation_within"]["value"]) < 0.3


def test_a_success_that_tracing_decides_is_explained_by_it(random_scores):
    same = localisation.compare(
        traces(random_scores), range(6), lambda fact, layer: float(random_scores[fact, layer])
    )
    table = same.to_dict()
    assert table["r2_score"]["value"] == pytest.approx(1, abs=1e-3)
    assert table["increment"]["low"] > 0.5 and table["correlation_within"]["value"] == pytest.approx(
        1, abs=1e-3
    )
    shifted = localisation.compare(
        traces(random_scores), range(6), lambda fact, layer: float(random_scores[fact, layer])
    )
    constant = torch.arange(6.0)
    moved = localisation.Localisation(
        "hidden", shifted.scores, shifted.success + constant, shifted.layers
    ).to_dict()
    gain = [one["r2_both"]["value"] for one in (table, moved)]
    assert gain == pytest.approx([1, 1], abs=1e-3)  # a constant for each layer is the layer's alone


def test_the_comparison_as_table_and_picture(random_scores, tmp_path):
    found = localisation.compare(
        traces(random_scores), range(6), lambda fact, layer: 1 - float(random_scores[fact, layer]) / 2
    ).to_dict()
    layer = found["by_layer"][4]
    assert layer["score"] == pytest.approx(float(random_scores[:, 4].mean()), abs=1e-4)
    assert layer["score_low"] < layer["score"] < layer["score_high"] and layer[
        "correlation"
    ] == pytest.approx(-1)
    assert found["points"]["success"][3][4] == pytest.approx(1 - float(random_scores[3, 4]) / 2, abs=1e-4)
    picture = write_localisation(tmp_path / "layers.svg", {"method": "rome", **found})
    text = picture.read_text()
    assert (
        text.startswith("<?xml")
        and text == write_localisation(picture, {"method": "rome", **found}).read_text()
    )
    with pytest.raises(ConfigError, match=".png"):
        write_localisation(tmp_path / "layers.pdf", {"method": "rome", **found})


def test_too_little_to_compare_is_refused(random_scores):
    with pytest.raises(ConfigError, match="3 facts"):
        localisation.compare(traces(random_scores[:2]), range(6), lambda fact, layer: 0.0)
    with pytest.raises(ConfigError, match="no setting layers"):
        layers.against_editing(lab.load(), lab.cases(3), method="in_prompt")


def test_edits_at_every_layer_of_the_lab():
    host = lab.load()
    before = host.weights_hash()
    cases = list(lab.cases(6, seed=5))
    known = facts.facts(host, [c.request for c in cases], answers=[c.request.target_old for c in cases])
    cases = [case for case, fact in zip(cases, known, strict=True) if fact.known][:3]
    found = layers.against_editing(
        host,
        cases,
        method="ft",
        settings={"steps": 8},
        layers=(1, 5),
        trace=Settings(draws=2, kinds=("hidden",)),
    )
    assert found.scores.shape == found.success.shape == (3, 2)
    assert (
        bool((found.success >= 0).all())
        and bool((found.success <= 1).all())
        and float(found.success.max()) > 0.2
    )
    assert host.weights_hash() == before
    assert layers._rewriting(0.2, 0.6) == pytest.approx(0.5) and layers._rewriting(0.6, 0.2) == 0
    assert tracing.BLOCKS.kinds == ("hidden",)


# --- a layer chosen by tracing ----------------------------------------------------------------


def test_layers_trace_edits_where_tracing_points():
    host = lab.load()
    request = Request("{} was born in", "Ada Brenner", "Tallow")
    layer = localisation.traced_layer(host, [request], Settings(draws=2, width=1, kinds=("mlp",)))
    effects = tracing.trace(
        host, facts.fact(host, PROMPT, NAME), Settings(draws=2, width=1, kinds=("mlp",))
    ).effects("mlp")
    assert (
        layer == int(effects[:, -1].argmax()) == 0
    )  # docs/trace.md: that of layer 0 alone restores everything
    jobs = [prepare(host, request, method=name, options={key: "trace", "steps": 1})
            for name, key in (("ft", "layers"), ("grace", "layer"))]  # fmt: skip
    assert jobs[0].config.layers == (0,) and jobs[1].config.layer == 0
    assert jobs[0].run().provenance.config["layers"] == [0]
    with pytest.raises(ConfigError, match="no setting|unknown|layers"):
        prepare(host, request, method="in_prompt", options={"layers": "trace"})
    with pytest.raises(ConfigError, match="answers none"):
        prepare(host, Request("{} was born in", "Ada Brenner", "Tallow", "Gosport"), method="ft",
                options={"layers": "trace"})  # fmt: skip
