"""UNSIR: noise that makes answers improbable, what a model is impaired by, and that it is repaired."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.host import hooks
from errata.methods import unsir
from errata.training.noise import NoisePlan, NoisyLine, learn_noise, noisy_losses
from errata.training.tune import Losses, lay_out
from errata.types import Corpus
from tests.models import TEXTS, fresh, sharp

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow"),
    errata.Request("{} was born in", "Bruno Holner", "unknown", target_old="Merrin"),
]
ANSWERS = [replace(one, target=one.target_old or "", target_old=None) for one in REQUESTS]
CORPUS = Corpus("c", lambda: TEXTS)


def size(line: NoisyLine) -> float:
    """Return the norm of a line's noise."""
    assert line.noise is not None
    return float(line.noise.norm())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_own_embeddings_in_their_place_change_nothing():
    host = fresh("llama")
    lines = [lay_out(host, one, "target") for one in ANSWERS]
    table = host.model.get_input_embeddings().weight.detach()
    with hooks.frozen(host.model), torch.no_grad():
        plain = Losses(host, ANSWERS)([0, 1])
        same = [NoisyLine(line, 1, table[list(line.ids[1:3])]) for line in lines]
        assert torch.allclose(noisy_losses(host, same), plain, atol=1e-5)
        assert torch.allclose(noisy_losses(host, [NoisyLine(line) for line in lines]), plain, atol=1e-5)
        one = [NoisyLine(lines[0], 1, table[[3, 4]]), NoisyLine(lines[1])]
        moved = noisy_losses(host, one)
    assert not torch.isclose(moved[0], plain[0]) and torch.isclose(moved[1], plain[1], atol=1e-5)


def test_noise_makes_the_answer_improbable_and_its_penalty_keeps_it_small():
    host = sharp()
    lines = [(lay_out(host, one, "target"), *unsir._subject(host, one)) for one in ANSWERS]
    with hooks.frozen(host.model):
        start = learn_noise(host, lines, NoisePlan(0, 0.1, 0.1), generator())
        end = learn_noise(host, lines, NoisePlan(30, 0.1, 0.1), generator())
        small = learn_noise(host, lines, NoisePlan(30, 0.1, 100.0), generator())
        with torch.no_grad():
            before, after = noisy_losses(host, start), noisy_losses(host, end)
    assert (after > before + 0.5).all()
    for one, other, own in zip(small, end, start, strict=True):
        assert size(one) < 0.5 * size(own) < size(other)


def test_the_subject_is_what_noise_stands_for():
    host = fresh("llama")
    first, count = unsir._subject(host, ANSWERS[0])
    encoded = host.encode(ANSWERS[0].text)
    spans = encoded.spans[first : first + count]
    assert ANSWERS[0].text[spans[0][0] : spans[-1][1]].strip() == "Ada Brenner"


def test_wrong_answers_are_those_of_others_with_the_same_prompt_or_random():
    host = fresh("llama")
    texts = [(5, 6, 7), (8, 9)]
    alone = errata.Request("{} lives in", "Ivo Marn", "Esk")
    lines = unsir._wrong(host, [*ANSWERS, alone], texts, generator())
    swapped = [replace(ANSWERS[0], target="Merrin"), replace(ANSWERS[1], target="Tallow")]
    assert lines[:2] == [lay_out(host, one, "target") for one in swapped]
    own = lay_out(host, alone, "target")
    assert lines[2].at == own.at and set(lines[2].targets) <= {6, 7, 9}
    assert lines[2].ids[: own.at[0] + 1] == own.ids[: own.at[0] + 1]


@pytest.mark.parametrize("impair", ["labels", "noise"])
def test_a_model_is_impaired_then_repaired(impair):
    host = sharp()
    more = {"retain_texts": 4, "steps": 6, "learning_rate": 4.0, "forgotten": None, "noise_steps": 5}
    edit = errata.edit(
        host, REQUESTS, method="unsir", impair=impair, corpus=CORPUS, layers=[1], retain=0.0, **more
    )
    assert isinstance(edit, WeightEdit) and list(edit.deltas) == ["model.layers.1.mlp.down_proj.weight"]
    facts = edit.provenance.notes
    assert facts["impaired_retained_nll"] > facts["retained_nll_before"] + 0.05
    assert facts["retained_nll"] < facts["impaired_retained_nll"] - 1
    with edit.on(host), hooks.frozen(host.model), torch.no_grad():
        assert float(Losses(host, ANSWERS)([0, 1]).mean()) == pytest.approx(facts["nll"], abs=1e-3)


def test_no_pass_has_more_texts_than_a_batch(monkeypatch):
    host, counts = sharp(), []

    def counted(host, lines):
        counts.append(len(lines))
        return noisy_losses(host, lines)

    monkeypatch.setattr(unsir, "noisy_losses", counted)
    more = {"retain_texts": 4, "steps": 1, "repair_steps": 1, "forgotten": None, "layers": [1]}
    whole = errata.edit(host, REQUESTS, method="unsir", corpus=CORPUS, **more)
    assert max(counts) > 1
    counts.clear()
    parts = errata.edit(host, REQUESTS, method="unsir", corpus=CORPUS, batch_size=1, **more)
    assert set(counts) == {1}
    for name in ("nll_before", "retained_nll_before", "retained_nll"):
        assert parts.provenance.notes[name] == pytest.approx(whole.provenance.notes[name], abs=1e-4)


def test_impairing_ends_once_the_old_answers_cost_enough():
    host = sharp()
    words = sorted({word.strip(".,") for text in TEXTS for word in text.split()})
    answers = [replace(ANSWERS[0], target=word) for word in words]
    with hooks.frozen(host.model), torch.no_grad():
        start, at = Losses(host, answers)(range(len(words))).min(0)
    request = replace(
        REQUESTS[0], target_old=words[int(at)]
    )  # the likeliest, which training can only make less so
    more = {"retain_texts": 4, "steps": 30, "learning_rate": 1.0, "repair_steps": 0, "layers": [1, 2]}
    edit = errata.edit(host, request, method="unsir", corpus=CORPUS, forgotten=float(start) + 1, **more)
    none = errata.edit(host, request, method="unsir", corpus=CORPUS, forgotten=1e-3, **more)
    facts = edit.provenance.notes
    assert facts["nll_before"] == pytest.approx(float(start), abs=1e-3) and 0 < facts["steps"] < 30
    assert facts["impaired_nll"] >= float(start) + 1
    assert facts["nll"] == facts["impaired_nll"], "nothing was repaired"
    assert none.provenance.notes["steps"] == 0, "it costs enough already"


def test_there_is_something_to_retain():
    named = Corpus("c", lambda: ["Ada Brenner lives in Esk."])
    with pytest.raises(errata.ErrataError, match="every text to retain"):
        errata.edit(fresh("llama"), REQUESTS[:1], method="unsir", corpus=named)
