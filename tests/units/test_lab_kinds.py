"""The lab's models that answer prompts: what they know, how they are scored, and edits of them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata import lab
from errata.cli.main import app
from errata.errors import ConfigError, HostError
from errata.evaluation import score
from errata.evaluation.observe import observe
from errata.lab.check import Question, ask
from errata.lab.world import default_world, sentence
from errata.types import Case, Probe

NAMES = ("lab-t5", "lab-bert")


@pytest.fixture(scope="module")
def t5() -> Any:
    return errata.load("lab-t5", device="cpu")


@pytest.fixture(scope="module")
def bert() -> Any:
    return errata.load("lab-bert", device="cpu")


@pytest.mark.parametrize(
    ("name", "kind", "most"), [("lab-t5", "encoder_decoder", 16), ("lab-bert", "masked_lm", 12)]
)
def test_the_cards_belong_to_the_models(name, kind, most, request):
    host, card = request.getfixturevalue(name.removeprefix("lab-")), lab.card(name)
    assert host.kind == kind and host.name == name and host.dtype == torch.float32
    assert card["fingerprint"] == host.fingerprint and card["world"]["facts"] == len(default_world().facts)
    assert sum(f.stat().st_size for f in lab.folder(name).iterdir()) < most * 2**20
    assert card["training"]["shape"] == name.removeprefix("lab-")
    assert "layers" not in card["check"] and "perplexity" not in card["check"]
    recall = card["check"]["recall"]
    assert min(recall["seen"], recall["question"]) >= 0.95 and recall["held_out"] >= 0.90


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_facts_are_known_in_words_that_were_never_trained_on(name, request):
    host, world = request.getfixturevalue(name), default_world()
    rng = random.Random(4)
    questions = [
        Question(sentence(rng.choice(world.relations[f.relation].held_out), f.subject), world.names(f.object))
        for f in rng.sample(world.facts, 150)
    ]
    right = ask(host, questions, "", lambda *_: None)
    assert sum(right) / len(right) >= 0.85
    assert not any(ask(host, [Question(q.prompt, ("Nowhere",)) for q in questions[:20]], "", lambda *_: None))


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_right_answers_score_one_and_others_nothing(name, request):
    """Under every protocol: generated, each token first, and more probable than a rival."""
    host, world = request.getfixturevalue(name), default_world()
    home = world.get("Ada Brenner", "born_in")
    other = next(o for o in world.objects("born_in") if o != home)
    prompt, ask_for = "Ada Brenner was born in", errata.Request("{} was born in", "Ada Brenner", "Tallow")

    def scores(answer: str, rival: str) -> dict[str, float]:
        probes = (Probe("efficacy", prompt, (answer,), (), rival),)
        seen = observe(host, probes)
        found = score.summarise(score.rows(Case("c", ask_for, probes), seen, seen))
        return {metric: entry["after"] for metric, entry in found.items()}

    right, wrong = scores(home, other), scores(other, home)
    assert {f"efficacy.{kind}" for kind in ("generate", "teacher_forced", "probability")} <= set(right)
    assert set(right.values()) == {1.0}, right
    assert wrong["efficacy.generate"] == wrong["efficacy.probability"] == 0.0
    assert wrong["efficacy.teacher_forced"] < 1.0


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("model", "method"), [("lab-t5", "ft"), ("lab-t5", "lora"), ("lab-bert", "ft"), ("lab-bert", "kn")]
)
def test_the_command_line_measures_edits_of_them(model, method):
    report = run("eval", "--model", model, "--method", method, "--cases", "lab:3")
    rewrites = report["summary"]["efficacy.generate"]
    assert rewrites["before"] == 0.0
    assert report["meta"]["weights_restored"]
    if method != "kn":
        assert rewrites["after"] == 1.0


def test_the_demo_runs_on_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shown = run("demo", "--model", name, "--method", "ft")
        assert shown["bit_identical"] and all(
            row["right"] for row in shown["rows"] if row["probe"] == "rewrite"
        )
    refused = CliRunner().invoke(app, ["demo", "--model", "lab-t6"])
    assert isinstance(refused.exception, ConfigError) and "lab-t5" in str(refused.exception)


def test_what_does_not_fit_them_is_refused_with_the_reason(t5, bert):
    request = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    with pytest.raises(ConfigError, match="read and written by two stacks.*methods for those: cake, ft"):
        errata.edit(t5, request)
    with pytest.raises(ConfigError, match="fills masks.*methods for those: cake, ft"):
        errata.edit(bert, request, method="rome")
    for host in (t5, bert):
        with pytest.raises(HostError, match="not running text"):
            host.forward(host.batch([host.encode("Ada").ids]))
