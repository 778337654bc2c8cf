"""LSDM and DAMA: partial least squares, projections, and answers that become equally likely."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.errors import ConfigError, EditError
from errata.evaluation.debiasing import gap
from errata.linalg.lowrank import LowRank
from errata.linalg.pls import pls_weights
from errata.locate.contexts import Context
from errata.methods._pairs import balanced_problems
from errata.methods.dama import directions, upper
from tests.models import fresh

REQUESTS = [
    errata.Request("The {} said that", name, "he") for name in ("old dog", "cello", "road", "small harp")
]
PAIR = ["Tallow", "Esk"]


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(8, 3, generator=generator, dtype=torch.float64)


def test_pls_with_one_response_begins_with_the_covariance():
    x, y = data()
    weights = pls_weights(x, y[:, :1], 4)
    covariance = (x - x.mean(0)).mT @ (y[:, 0] - y[:, 0].mean())
    assert float((weights[:, 0] @ covariance).abs() / covariance.norm()) == pytest.approx(1)
    torch.testing.assert_close(weights.mT @ weights, torch.eye(4, dtype=torch.float64))


def test_pls_of_full_rank_is_least_squares():
    """All of a linear function of x is explained by as many components as x has axes."""
    x, y = data()
    weights = pls_weights(x, y, 8)
    assert weights.shape[1] <= 8
    scores = (x - x.mean(0)) @ weights
    fitted = scores @ torch.linalg.lstsq(scores, y - y.mean(0)).solution
    torch.testing.assert_close(fitted, y - y.mean(0), atol=1e-8, rtol=0)
    assert pls_weights(x, torch.ones(50, 2), 3).shape == (8, 0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def projected(request):
    host = fresh(request.param)
    edit = errata.edit(host, REQUESTS, method="dama", pair=PAIR, rank=2, steps=3, contexts=1, stop_loss=0)
    assert isinstance(edit, WeightEdit)
    return host, edit


def test_dama_leaves_nothing_of_its_directions_in_the_output_weight(projected):
    host, edit = projected
    for layer in upper(3):
        site = host.layout.site(layer)
        delta = edit.deltas[site.parameter]
        assert isinstance(delta, LowRank) and delta.rank == 2
        basis = -delta.B.double()
        torch.testing.assert_close(basis.mT @ basis, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
        before = host.weight(site).double()
        assert float((basis.mT @ before).norm()) > 1e-3
        with edit.on(host):
            after = host.weight(site).double()
        assert float((basis.mT @ after).norm()) < 1e-6 * float(before.norm())
        torch.testing.assert_close(after, before - basis @ (basis.mT @ before), atol=1e-6, rtol=0)


def test_shifts_to_neutral_values_show_the_direction_of_a_bias():
    """Half of the prompts lean to either side along one direction; the two answers lie equally far apart everywhere."""
    draw = torch.Generator().manual_seed(2)
    side = torch.ones(60).index_fill(0, torch.arange(30), -1.0)[:, None]
    bias, toward = (torch.randn(12, generator=draw) for _ in range(2))
    outputs = side * bias + 0.2 * torch.randn(60, 12, generator=draw)
    neutral = -side * toward + 0.2 * torch.randn(60, 12, generator=draw)
    first, second = neutral + toward, neutral - toward
    for shifts in ([neutral], [first, second]):
        found = directions(outputs, shifts, 1)[:, 0]
        assert abs(float(found @ bias.double())) > 0.95 * float(bias.norm())
    swapped = directions(outputs, [second, first], 1)
    torch.testing.assert_close(swapped @ swapped.mT, found[:, None] @ found[None], atol=1e-9, rtol=0)
    flat = directions(outputs, [(2 * toward).expand(60, 12), torch.zeros(60, 12)], 1, apart=True)[:, 0]
    assert float(flat @ toward.double()) == pytest.approx(float(toward.norm()), rel=1e-3), "nothing varies"


def test_dama_refuses_where_nothing_leans_to_a_side():
    with pytest.raises(EditError, match="nothing to project out"):
        errata.edit(fresh("llama"), REQUESTS, method="dama", pair=PAIR, contexts=0, layers=[1], stop_loss=1e6)


@pytest.mark.parametrize("response", ["both", "difference"])
def test_the_papers_values_are_an_option(response):
    host = fresh("llama")
    options = {"pair": PAIR, "rank": 1, "steps": 2, "contexts": 0, "layers": [1], "response": response}
    edit = errata.edit(host, REQUESTS, method="dama", **options)
    assert isinstance(edit, WeightEdit)
    single = errata.edit(host, REQUESTS[:1], method="dama", **options)
    assert isinstance(single, WeightEdit)
    for one in (edit, single):
        (delta,) = one.deltas.values()
        assert isinstance(delta, LowRank) and delta.rank == 1
        torch.testing.assert_close(float(delta.B.norm()), 1.0, atol=1e-5, rtol=0)


def test_dama_does_not_depend_on_the_order_of_the_pair(projected):
    host, edit = projected
    other = errata.edit(
        host, REQUESTS, method="dama", pair=PAIR[::-1], rank=2, steps=3, contexts=1, stop_loss=0
    )
    for name, delta in edit.deltas.items():
        torch.testing.assert_close(other.deltas[name].dense(), delta.dense(), atol=1e-5, rtol=1e-3)  # type: ignore


def test_the_balanced_loss_has_both_answers_and_serves_each_request_once():
    host = fresh("llama")
    for merge in (True, False):
        problems = balanced_problems(host, [*REQUESTS, REQUESTS[0]], PAIR, [Context("", 1.0)], merge=merge)
        served = [problem.requests for problem in problems]
        assert served == [(0, 4), (1,), (2,), (3,)] if merge else served == [(0,), (1,), (2,), (3,), (4,)]
        answers = [host.encode_answer(REQUESTS[1].text, one).target for one in PAIR]
        weights = {row.targets: row.loss_weight for row in problems[1].rows}
        assert weights == {answers[0]: len(answers[0]), answers[1]: -len(answers[1])}


def test_lsdm_makes_the_answers_equally_likely():
    """The subject ends the prompt, so that its value reaches the answer also through random weights."""
    host = fresh("llama", seed=3)
    requests = [replace(one, prompt="The rain fell on the {}") for one in REQUESTS]
    before = gap(host, requests, ("Tallow", "Esk"))
    settings = {"steps": 60, "learning_rate": 0.02, "stop_loss": 1e-4, "decay": 0, "kl": 0, "contexts": 0}
    settings |= {"cov_weight": 1e-3, "layers": [0, 1]}
    edit = errata.edit(host, requests, method="lsdm", pair=PAIR, tokens=400, **settings)
    with edit.on(host):
        after = gap(host, requests, ("Tallow", "Esk"))
    assert after.mean < 0.5 * before.mean
    assert edit.provenance.requests == tuple(requests)


@pytest.mark.parametrize("method", ["lsdm", "dama"])
def test_a_pair_is_two_different_answers(method):
    for pair in (["he"], ["he", " he"], ["he", ""]):
        with pytest.raises(ConfigError, match="two different answers"):
            errata.edit(fresh("llama"), REQUESTS, method=method, pair=pair)
