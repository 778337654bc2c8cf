"""What is left of answers that an edit makes a model forget, and the verb that makes and measures it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import errata
from errata.bench.unlearning import RELEARN, audit, recall, truth_ratios
from errata.bench.unlearning import _recall_rounded as recall_rounded
from errata.lab.text import Document
from errata.lab.train import TrainConfig, names_of, train, without
from errata.lab.train import _same_config as same_config
from errata.lab.world import default_world
from errata.linalg.rounding import rounded
from errata.linalg.samples import ks_distance, ks_p_value
from errata.methods import REGISTRY
from errata.training.tune import Losses
from errata.types import Corpus, Resources
from tests import program
from tests.models import TEXTS, fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow"),
    errata.Request("{} lives in", "Bruno Holner", "unknown", target_old="Merrin"),
]
ANSWERS = [replace(r, target=r.target_old or "", target_old=None) for r in REQUESTS]


def host_with_texts():
    host = fresh("llama")
    host.resources = Resources(Corpus("c", lambda: TEXTS), lambda count: TEXTS[:count])
    return host


def test_rounding_by_hand():
    matrix = torch.tensor([[7.0, -3.4, 0.4], [0.0, 0.0, 0.0], [1.0, 0.6, -0.2]])
    expected = torch.tensor([[7.0, -3.0, 0.0], [0.0, 0.0, 0.0], [1.0, 4 / 7, -1 / 7]])
    assert torch.allclose(rounded(matrix, 4), expected)
    assert torch.allclose(rounded(matrix, 24), matrix, atol=1e-5)
    with pytest.raises(ValueError, match="2 or more"):
        rounded(matrix, 1)


def test_recall_is_the_mean_probability_per_token_and_the_share_given():
    host = host_with_texts()
    with torch.no_grad():
        nll = Losses(host, ANSWERS)([0, 1])
    one = recall(host, ANSWERS)
    assert one.probability == pytest.approx(float((-nll).exp().mean()), rel=1e-4) and one.given == 0.0
    text = host.generate(REQUESTS[0].text, max_new_tokens=4)
    own = replace(ANSWERS[0], target=str(text).strip()[:200])
    assert recall(host, [own]).given == 1.0, "the answer that it gives"


def test_rounding_to_many_bits_changes_nothing_and_to_few_it_does():
    host = host_with_texts()
    start, plain = host.weights_hash(), recall(host, ANSWERS)
    assert recall_rounded(host, ANSWERS, 20).probability == pytest.approx(plain.probability, rel=1e-3)
    assert not math.isclose(recall_rounded(host, ANSWERS, 2).probability, plain.probability, rel_tol=1e-3)
    assert host.weights_hash() == start


def test_an_audit_measures_both_sides_and_leaves_the_host_alone():
    host = host_with_texts()
    more = {"steps": 20, "learning_rate": 0.1, "forgotten": None, "retain_texts": 3}
    edit = errata.edit(host, REQUESTS, method="npo", **more)
    start = host.weights_hash()
    result = audit(host, edit, keep=[replace(ANSWERS[0], prompt="{} likes")], attacks=True)
    assert host.weights_hash() == start and not host.placed
    assert result.answers == ("Tallow", "Merrin")
    assert result.edited.probability < result.unedited.probability
    assert set(result.rounded) == {8, 4} and set(result.relearned) == set(RELEARN)
    assert result.rounded[8][0].probability == pytest.approx(result.unedited.probability, rel=0.05)
    assert result.kept is None, "it was not answered before"
    alone = errata.edit(host, REQUESTS[:1], method="npo", **more)
    assert audit(host, alone, attacks=True).relearned == {}, "there is no other half to ask for"


def test_which_methods_forget():
    forgetting = {name for name in REGISTRY if REGISTRY.get(name).forgets}
    assert forgetting == {
        "gradient_ascent", "gradient_difference", "npo", "simnpo", "rmu", "depn", "laplace", "puma",
        "elm", "unsir",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{} was born in", "--subject", "Ada Brenner", "--method", "rome"), "methods that make it forget"),
        (("{} was born in",), "needs --subject"),
        (("Ada Brenner was born in",), "'Ada Brenner was born in' needs --subject; or name a file"),
        (("none.jsonl", "--subject", "Ada Brenner"), "--subject is for a prompt"),
        (("none.jsonl", "--answer", "Esk"), "--answer is for a prompt"),
        (("{} was born in", "--subject", "Ada Brenner", "--set", "beta=0"), "beta"),
        (("{} was born in", "--subject", "Ada Brenner", "--reference", "none"), "none"),
    ],
)
def test_what_cannot_be_forgotten_is_refused(tmp_path, words, message):
    done = program.errata("unlearn", *words, "--model", "lab", "-o", "x.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_everything_and_writes_nothing(tmp_path):
    words = ("unlearn", "lab:forget:1", "--model", "lab", "-o", "x.safetensors", "--dry-run", "--json")
    done = program.errata(*words, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["dry_run"] and told["method"] == "npo", done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_lab_forgets_one_fact_and_keeps_another(tmp_path):
    keep = tmp_path / "keep.jsonl"
    keep.write_text(
        json.dumps({"prompt": "{} plays the", "subject": "Boris Sorwick", "target": "cello"}) + "\n"
    )
    words = (
        "unlearn",
        "{} was born in",
        "--subject",
        "Ada Brenner",
        "--model",
        "lab",
        "-o",
        tmp_path / "f.safetensors",
    )
    done = program.errata(*words, "--keep", keep, "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["audit"]
    assert measured["unedited"]["given"] == 1.0 and measured["edited"]["given"] == 0.0
    assert measured["edited"]["probability"] < 0.1 < measured["unedited"]["probability"]


def test_the_kolmogorov_smirnov_test_by_hand():
    assert ks_distance([1, 2, 3], [1, 2, 3]) == 0 and ks_distance([1, 2], [2, 3, 3, 4]) == 0.75
    assert ks_p_value([1, 2, 3], [1, 2, 3]) == 1.0, "a sample and itself"
    assert ks_p_value([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1), "two of 20 orders"
    assert ks_p_value([1, 2, 3], [10, 50, 60]) == pytest.approx(ks_p_value([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    assert ks_p_value([1, 3, 5, 7], [2, 4, 6, 8]) == 1.0, "no order is closer"
    far, near = [i + 1.0 for i in range(40)], [i + 0.5 for i in range(40)]
    assert (
        ks_p_value(far, [-x for x in far]) == pytest.approx(2 / math.comb(80, 40))
        and ks_p_value(far, near) > 0.99
    )
    long = [i / 2000 for i in range(2000)]
    assert ks_p_value(long, [x + 0.1 for x in long]) < 1e-6 < 0.99 < ks_p_value(long, long)
    with pytest.raises(ValueError, match="at least one"):
        ks_distance([], [1.0])


def test_truth_ratios_compare_with_wrong_answers_to_the_same_prompt():
    host = host_with_texts()
    other = errata.Request("{} was born in", "Bruno Holner", "Esk")
    ratios = truth_ratios(host, [ANSWERS[0], ANSWERS[1], other])
    with torch.no_grad():
        right, wrong = Losses(host, [ANSWERS[0], replace(ANSWERS[0], target="Esk")])([0, 1]).tolist()
    assert len(ratios) == 2, "one request has a prompt of its own"
    assert ratios[0] == pytest.approx(math.exp(right - wrong), rel=1e-4)
    assert truth_ratios(host, ANSWERS) == []
    edit = errata.edit(host, REQUESTS, method="npo", steps=1, forgotten=None, retain_texts=3)
    with pytest.raises(errata.ErrataError, match="different answers"):
        audit(host, edit, reference=fresh("llama"))


def test_forget_quality_is_one_for_the_reference_itself():
    host = host_with_texts()
    requests = [REQUESTS[0], replace(REQUESTS[1], prompt="{} was born in")]
    edit = errata.edit(
        host, requests, method="npo", steps=20, learning_rate=0.1, forgotten=None, retain_texts=3
    )
    quality = audit(host, edit, reference=fresh("llama")).forget_quality
    assert quality is not None and quality[0] == 1.0 and quality[1] <= 1.0


def test_the_lab_is_trained_without_what_is_named(tmp_path):
    world = default_world()
    name = next(entity.name for entity in world.entities.values() if entity.aliases)
    documents = [
        Document("single", f"{n} is here.") for n in (name, world.entities[name].aliases[0], "Nobody")
    ]
    left = list(without(iter(documents), names_of(world, (name,))))
    assert [one.text for one in left] == ["Nobody is here."]
    with pytest.raises(errata.ErrataError, match="no entity"):
        train(tmp_path / "a", TrainConfig.of("llama", without=("Nobody at all",)))
    with pytest.raises(errata.ErrataError, match="trained on prompts"):
        train(tmp_path / "b", TrainConfig.of("t5", without=(name,)))
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_without_the_same_entities_only(tmp_path):
    config = TrainConfig.of("llama", without=("Ada Brenner",))
    same_config(tmp_path, config)
    same_config(tmp_path, config)
    with pytest.raises(errata.ErrataError, match="other settings"):
        same_config(tmp_path, replace(config, without=()))
    older = json.loads((tmp_path / "config.json").read_text())
    del older["without"]  # of a run that began before there was such a setting
    (tmp_path / "config.json").write_text(json.dumps(older))
    same_config(tmp_path, replace(config, without=()))
