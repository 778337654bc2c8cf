"""Scores from forced answers, distributions and running text, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from errata.evaluation.metrics import divergence, perplexity, probability

LN = math.log


def test_per_token_and_summed_can_disagree():
    long, short = [LN(0.5)] * 4, [LN(0.25)]
    # per token 0.5 against 0.25; as a whole 0.5 ** 4 = 0.0625 against 0.25
    assert probability.prefers(long, short) and not probability.prefers(long, short, summed=True)
    assert probability.magnitude(long, short) == pytest.approx(0.25)
    assert probability.magnitude(long, short, summed=True) == pytest.approx(0.0625 - 0.25)
    assert probability.per_token([LN(0.5), LN(0.125)]) == pytest.approx(0.25), "geometric mean"
    assert probability.most_probable([short, long]) == 1
    assert probability.most_probable([short, long], summed=True) == 0
    assert probability.most_probable([[math.nan], short]) == 1
    assert probability.most_probable([[math.nan]]) is None and probability.most_probable([]) is None
    assert not probability.prefers([math.nan], short) and not probability.prefers(short, [math.nan])


def test_s_is_made_of_rounded_per_cents():
    # 66.67, 66.67, 33.33: 3 / (2 / 66.67 + 1 / 33.33) = 49.9987..., printed 50.0
    assert probability.legacy_score([2 / 3, 2 / 3, 1 / 3]) == 50.0
    # published: GPT-2 XL after ROME, 100 / 96.4 / 75.4 gives S 89.2 (marked secondary in our notes)
    assert round(probability.legacy_score([1.0, 0.964, 0.754]), 1) == 89.2
    # 0.00004 is rounded to 0.00 per cent, so S is 0 though the harmonic mean is not
    assert probability.legacy_score([1.0, 1.0, 0.00004]) == 0.0 < probability.harmonic([1.0, 1.0, 0.00004])


def test_divergence_in_both_directions_and_the_published_unit():
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    # KL(p || q) = 0.5 ln 2 + 0.5 ln 1; KL(q || p) is infinite: p excludes what q has
    assert divergence.kl(p, q) == pytest.approx(0.5 * LN(2))
    assert divergence.both(p, q) == (pytest.approx(0.5 * LN(2)), math.inf)
    assert math.isnan(divergence.kl(torch.tensor([math.nan, 0.0]), torch.tensor([0.5, 0.5]).log()))
    a, b = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    other_way = 0.5 * LN(0.5 / 0.9) + 0.5 * LN(0.5 / 0.1)  # KL(b || a)
    # what the code computes: the mean over the first dimension of a vector divides by |V| = 2
    code = torch.nn.functional.kl_div(a, b, log_target=True, reduction="batchmean")
    assert divergence.nkl_legacy(a, b) == pytest.approx(other_way / 2) == pytest.approx(float(code), rel=1e-6)
    assert divergence.kl(a, b) != pytest.approx(other_way, rel=0.1), "the direction matters here"


def test_bits_per_byte_and_perplexity_by_hand():
    texts = [torch.tensor([0.5, 0.25]).log(), torch.tensor([0.125]).log()]
    # 1 + 2 + 3 bits over 12 bytes
    assert perplexity.bits_per_byte(texts, 12) == pytest.approx(0.5)
    assert perplexity.bits_per_byte([torch.tensor([-math.inf])], 1) == math.inf
    with pytest.raises(ValueError, match="0 bytes"):
        perplexity.bits_per_byte(texts, 0)
    assert probability.perplexity([LN(0.5), LN(0.125)]) == pytest.approx(4.0)
    assert probability.perplexity(torch.tensor([0.25, 0.25]).log()) == pytest.approx(4.0)
    assert probability.perplexity([-1e6]) == math.inf == probability.perplexity([math.nan])
