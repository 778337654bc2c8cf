"""Privacy neurons: which are chosen, what clearing them does, and how exposed a secret is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.errors import DataError
from errata.host import hooks
from errata.inspect.exposure import exact_exposure, reciprocal_rank, secret_perplexity
from errata.inspect.extract import exposure
from errata.linalg.lowrank import LowRank
from errata.locate.neurons import Neuron, attribute, questions
from errata.methods._neurons import deltas, erasures
from errata.methods.depn import most_selected
from errata.training.tune import with_weights
from errata.types import Corpus
from tests.models import TEXTS, fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow")
QUICK: dict[str, Any] = {"steps": 4, "contexts": 0, "corpus": Corpus("c", lambda: TEXTS)}


def logits(host) -> torch.Tensor:
    with torch.no_grad():
        return host.forward(host.batch([host.encode_prompt("Ada Brenner was born in")]))


def cleared(host, neurons) -> dict[str, torch.Tensor]:
    """Return the weights with the columns of neurons cleared."""
    by_path, transposed = deltas(host, erasures(host, neurons))
    return {
        name: host.model.get_parameter(name).detach()
        + (one.dense().mT if name in transposed else one.dense())
        for name, one in by_path.items()
    }


def test_so_many_columns_are_zero_and_all_others_are_as_they_were():
    host = fresh("llama")
    edit = errata.edit(host, REQUEST, method="depn", neurons=5, contrast=0, fewest=5, **QUICK)
    assert isinstance(edit, WeightEdit)
    chosen = [Neuron(*one) for one in edit.provenance.notes["neurons"]]
    assert len(set(chosen)) == 5
    with edit.on(host):
        for layer in range(3):
            site = host.layout.site(layer)
            zero = {int(i) for i in (host.weight(site).abs().sum(0) == 0).nonzero()}
            assert zero == {one.index for one in chosen if one.layer == layer}
    assert all(isinstance(delta, LowRank) for delta in edit.deltas.values())


def test_the_neurons_are_those_with_the_largest_scores():
    host = fresh("llama")
    edit = errata.edit(
        host, REQUEST, method="depn", neurons=3, contrast=0, fewest=3, most=3, threshold=0.0, **QUICK
    )
    site = [host.layout.site(layer) for layer in range(3)]
    asked = questions(host, REQUEST.text, "Tallow")
    scores = {
        s.layer: one.sum(0) for s, one in attribute(host, asked, site, steps=4, rule="midpoint").items()
    }
    best = sorted(
        ((float(v), layer, i) for layer, row in scores.items() for i, v in enumerate(row)), reverse=True
    )[:3]
    assert sorted(edit.provenance.notes["neurons"]) == sorted([layer, i] for _, layer, i in best)


def test_what_serves_other_texts_is_spared():
    host = fresh("llama")
    same = Corpus("same", lambda: ["Ada was born in Tallow"])
    plain, contrasted = (
        errata.edit(host, REQUEST, method="depn", neurons=4, contrast=count, **{**QUICK, "corpus": same})
        for count in (0, 1)
    )
    assert plain.provenance.notes["neurons"] != contrasted.provenance.notes["neurons"]


def test_clearing_all_neurons_of_a_layer_is_a_layer_without_feed_forward():
    host = fresh("llama")
    site = host.layout.site(1)
    weights = cleared(host, [Neuron(1, i) for i in range(site.d_in)])
    without = with_weights(host, weights, lambda: logits(host))
    with hooks.on_output(host.model.get_submodule(site.name), torch.zeros_like):
        assert torch.equal(logits(host), without)


def test_neurons_that_a_text_does_not_switch_on_may_be_cleared():
    host = fresh("opt")  # its activation is zero for half of all neurons
    site, seen = host.layout.site(1), []
    with hooks.on_input(host.model.get_submodule(site.name), seen.append):
        start = logits(host)
    silent = (seen[0].reshape(-1, site.d_in) == 0).all(0).nonzero()[:, 0].tolist()
    active = (seen[0].reshape(-1, site.d_in) != 0).any(0).nonzero()[:, 0].tolist()
    assert silent and active
    weights = cleared(host, [Neuron(1, i) for i in silent])
    assert torch.equal(with_weights(host, weights, lambda: logits(host)), start)
    weights = cleared(host, [Neuron(1, active[0])])
    assert not torch.equal(with_weights(host, weights, lambda: logits(host)), start)


def test_votes_decide_then_places():
    a, b, c, d = (Neuron(0, i) for i in range(4))
    assert most_selected([[b, a], [c, a], [d, c]], 3) == [c, a, b]
    assert most_selected([[b, a]], 9) == [b, a]


def test_exposure_is_exact_among_all_fillings():
    host, prompt, alphabet = fresh("llama"), "Ada Brenner lives in", ["a", "b", "c"]
    every = [f"{x} {y}" for x in alphabet for y in alphabet]
    found = {text: exact_exposure(host, prompt, text.split(), alphabet) for text in every}
    assert sorted(one.rank for one in found.values()) == list(range(1, 10)), "no two are equally probable"
    bits = sorted(one.exposure for one in found.values())
    assert bits[0] == 0 and bits[-1] == pytest.approx(math.log2(9))
    for text, one in found.items():
        assert (one.rank, one.of) == (lambda e: (e.rank, e.of))(exposure(host, prompt, text, every))
    with pytest.raises(DataError, match="alphabet"):
        exact_exposure(host, prompt, ["a", "z"], alphabet)
    with pytest.raises(DataError, match="too many"):
        exact_exposure(host, prompt, ["a"] * 20, alphabet)


def test_reciprocal_rank_and_perplexity_by_hand():
    host, prompt = fresh("llama"), "Ada Brenner lives in"
    answer = host.encode_answer(prompt, "Tallow")
    with torch.no_grad():
        scores = host.forward(host.batch([answer.ids[:-1]]))[0, answer.start - 1 :]
    logs = scores.log_softmax(-1)
    ranks = [1 + int((row > row[token]).sum()) for row, token in zip(scores, answer.target, strict=True)]
    own = [float(row[token]) for row, token in zip(logs, answer.target, strict=True)]
    assert reciprocal_rank(host, prompt, "Tallow") == pytest.approx(
        sum(1 / rank for rank in ranks) / len(ranks)
    )
    assert secret_perplexity(host, prompt, "Tallow") == pytest.approx(
        math.exp(-sum(own) / len(own)), rel=1e-4
    )
