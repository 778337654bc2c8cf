"""Scores of texts against trainings without some of them: what benchmarks/retraining.py counts."""

from __future__ import annotations

import pytest
import torch
from benchmarks import retraining

from errata import lab
from tests.models import fresh


def test_scores_that_add_up_to_what_is_trained_correlate_whole():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 10, generator=generator)
    halves = torch.rand(30, 10, generator=generator) < 0.5
    truth = halves.double() @ values.double().mT
    truth[:, 2] *= -1
    found = retraining.datamodelling(values, halves, truth.exp())  # ranks alone count
    assert found.tolist() == pytest.approx([1, 1, -1])
    constant = retraining.datamodelling(values, halves, torch.ones(30, 3))
    assert constant.tolist() == [0, 0, 0]


def test_sentences_state_facts_that_the_lab_has_not_read():
    texts, queries, stating = retraining.sentences(6, 4, seed=1)
    assert [len(own) for own in stating] == [1, 2, 3, 1, 2, 3] and len(texts) == 16 == len(set(texts))
    for query, own in zip(queries, stating, strict=True):
        assert all(texts[i].endswith(f" {query.answer}.") for i in own)
        assert all(query.prompt not in texts[i] for i in own)
    assert not any(name in text for text in texts for name in lab.world().by_subject if text.startswith(name))


def test_effects_are_counted_by_how_many_sentences_were_there():
    halves = torch.tensor([[True, False, True], [False, False, True]])
    truth = torch.tensor([[2.0, 5.0], [1.0, 7.0]])
    found = retraining.effect([[0, 1], [2]], halves, truth)
    assert found == {0: {"runs": 1, "margin": 1.0}, 1: {"runs": 3, "margin": round((2 + 5 + 7) / 3, 3)}}


def test_training_raises_the_margin_of_what_it_reads():
    host = fresh("llama", seed=2)
    query = retraining.Query("Ada Brenner was born in", "Tallow.")
    before = retraining.margins(host, [query])
    retraining.train_(
        host, ["Ada Brenner was born in Tallow.", "The rain fell."], epochs=8, rate=3e-3, seed=0
    )
    assert float(retraining.margins(host, [query]) - before) > 1
    assert not any(parameter.requires_grad for parameter in host.model.parameters())
