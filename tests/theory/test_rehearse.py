"""Rehearsal: what is compared, how far a step goes, and that a change ends nearer to the unedited model."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.errors import ConfigError
from errata.linalg.solve import CostMatrix
from errata.methods._method import Workspace
from errata.methods._rehearse import _texts
from errata.methods.keel import Config
from errata.stats.collect import Corpus
from errata.training import rehearse
from errata.training.rehearse import divergence, draw
from tests.models import TEXTS, fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", "Tallow")
BRUNO = errata.Request("{} lives in the town of", "Bruno Holner", "Tallow")
CORPUS = Corpus("texts", lambda: TEXTS)
OPTIONS: dict[str, Any] = {"method": "keel", "tokens": 400, "steps": 6, "corpus": CORPUS, "rehearsal_pool": 8}


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.fixture()
def host():
    made = fresh("llama")
    made.model.double()
    return made


def test_the_divergence_is_that_of_the_distributions_with_rare_tokens_as_one():
    before = random_logits(5, 12, seed=1).log_softmax(1)
    now = random_logits(5, 12, seed=2).log_softmax(1)
    whole = (before.exp() * (before - now)).sum(1)
    for k in (1, 4, 11):
        best = before.topk(k, dim=1)
        found = divergence(now, best.indices, best.values)
        assert (found > 0).all() and (found <= whole + 1e-12).all()
        torch.testing.assert_close(divergence(before, best.indices, best.values), torch.zeros(5).double())
    torch.testing.assert_close(
        found, whole
    )  # of twelve tokens, eleven told apart: nothing is lumped together


def test_the_gradient_of_the_divergence_is_finite_where_nothing_is_left_over():
    before = torch.tensor([[0.0, -200.0, -300.0]]).log_softmax(1)
    now = torch.tensor([[0.0, -200.0, -250.0]], requires_grad=True)
    best = before.topk(2, dim=1)
    divergence(now.log_softmax(1), best.indices, best.values).sum().backward()
    assert now.grad is not None and torch.isfinite(now.grad).all()


def test_a_step_lowers_a_linear_loss_to_zero_along_the_steepest_way_under_the_cost(host):
    site = host.layout.site(1)
    samples = random_logits(site.d_in, 200, seed=1)
    cost = CostMatrix.of(samples @ samples.mT / 200, ridge=0.1)
    gradient = random_logits(site.d_out, site.d_in, seed=2)
    change = torch.zeros_like(gradient)
    rate = rehearse._step_({site: change}, [gradient], {site: cost}, 3.0, rate=float("inf"), limit=None)
    assert float((gradient * change).sum()) == pytest.approx(-3.0)
    other = -3.0 * gradient / float((gradient * gradient).sum())  # the plain gradient's way to the same loss
    matrix = samples @ samples.mT / 200
    matrix += 0.1 * matrix.diagonal().mean() * torch.eye(site.d_in, dtype=torch.float64)
    length, longer = (float(torch.trace(d @ matrix @ d.mT)) for d in (change, other))
    assert length < longer
    short = torch.zeros_like(gradient)
    rehearse._step_({site: short}, [gradient], {site: cost}, 3.0, rate=float("inf"), limit=0.01)
    assert float(torch.trace(short @ matrix @ short.mT)) == pytest.approx(0.01**2)
    slow = torch.zeros_like(gradient)
    rehearse._step_({site: slow}, [gradient], {site: cost}, 3.0, rate=rate / 2, limit=None)
    torch.testing.assert_close(slow, change / 2)


def test_each_new_request_is_rehearsed_as_often_as_asked_beside_earlier_ones():
    rounds = draw(random.Random(1), new=10, earlier=90, texts=50, passes=3, size=40, beside=8)
    new = Counter(i for one in rounds for i in one.lines if i >= 90)
    assert new == dict.fromkeys(range(90, 100), 3)
    assert all(len(set(one.lines)) == 40 and len(set(one.texts)) == 8 for one in rounds)
    alone = draw(random.Random(1), new=50, earlier=0, texts=5, passes=2, size=20, beside=8)
    assert [len(one.lines) for one in alone] == [20] * 5 and len(alone[0].texts) == 5
    assert len(draw(random.Random(1), new=3, earlier=2, texts=0, passes=1, size=1, beside=0)) == 3


def test_on_the_lab_rehearsed_text_is_left_as_it_was_and_the_fact_stays_changed():
    lab = errata.load("lab")
    request = errata.lab.cases(1, seed=3)[0].request
    options: dict[str, Any] = {"tokens": 20_000, "rehearsal": 5, "rehearsal_pool": 12, "rehearsal_texts": 12}
    alone, beside = (
        errata.edit(lab, request, method="keel", rehearsal_weight=weight, **options).provenance.notes
        for weight in (0.0, 100.0)
    )
    assert beside["divergence"] < alone["divergence"] / 2
    assert beside["rehearsed_loss"] < 0.1


def test_a_text_that_states_what_a_request_changes_is_not_kept(host):
    work = Workspace(corpus=CORPUS)
    config = Config(rehearsal_pool=4, rehearsal_tokens=30, rehearsal_source="corpus")
    texts = [host.tokenizer.decode(ids) for ids in _texts(host, [BRUNO], config, work)]
    kept = [host.tokenizer.decode(ids) for ids in _texts(host, [ADA], config, work)]
    assert any("Ada Brenner was born in Tallow" in text for text in texts)
    assert kept and not any("Ada Brenner" in text and "Tallow" in text for text in kept)


def test_a_sequence_with_rehearsal_goes_on_from_a_file_to_the_same_bits(host, tmp_path):
    host = fresh("llama")
    options = {**OPTIONS, "rehearsal": 2, "rehearsal_requests": 2, "rehearsal_texts": 3}
    first = errata.edit(host, ADA, **options)
    assert "divergence" in first.provenance.notes
    first.save(tmp_path / "first")
    one = errata.edit(host, BRUNO, after=first, **options)
    other = errata.edit(fresh("llama"), BRUNO, after=errata.Edit.load(tmp_path / "first"), **options)
    assert isinstance(one, WeightEdit) and isinstance(other, WeightEdit)
    for name, delta in one.deltas.items():
        found = other.deltas[name]
        assert (
            isinstance(delta, torch.Tensor) and isinstance(found, torch.Tensor) and torch.equal(delta, found)
        )
    plain = errata.edit(host, ADA, **OPTIONS)
    assert plain.digest != first.digest and host.weights_hash() == fresh("llama").weights_hash()


def test_without_a_corpus_the_host_writes_the_texts(host):
    rows = Workspace().texts(host, 3, 12)
    assert len(rows) == 3 and all(1 < len(ids) <= 12 for _, ids in rows)
    work = Workspace(corpus=CORPUS)
    assert work.texts(host, 3, 12, own=True) == rows != work.texts(host, 3, 12)


def test_settings_are_checked(host):
    with pytest.raises(ConfigError, match="rehearsal_pool"):
        errata.edit(host, ADA, **{**OPTIONS, "rehearsal_pool": 0})


def test_old_answers_are_as_long_as_asked_for_and_in_the_prompt_s_format():
    host, work = fresh("llama"), Workspace()
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    short, long, again = (work.old_answers(host, [request], tokens)[0] for tokens in (2, 12, 2))
    assert short == again != long and long.startswith(short)
    assert len(host.encode(long).ids) > len(host.encode(short).ids)
