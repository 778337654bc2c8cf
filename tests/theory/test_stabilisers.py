"""Stabilisers against their papers' formulas, on matrices and through a method."""

from __future__ import annotations

import math

import pytest
import torch

import errata
from errata.errors import ConfigError
from errata.linalg import shape
from errata.linalg.lowrank import LowRank
from errata.locate.keys import all_keys
from errata.methods import _stabilise
from tests.models import fresh

FAST = {"steps": 4, "tokens": 2000, "layers": [1]}
REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("{} lives in", "Bruno Holner", "Tallow"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def host(request):
    made = fresh(request.param)
    made.model.double()
    return made


def dense(edit):
    (delta,) = edit.deltas.values()
    return (delta.dense() if isinstance(delta, LowRank) else delta).double()


def weight_of(host):
    site = host.layout.site(1)
    stored = host.model.get_parameter(site.parameter).detach().double()
    return stored.mT if site.transposed else stored


def random_pair(seed=0):
    torch.manual_seed(seed)
    return LowRank(torch.randn(6, 3).double(), torch.randn(3, 10).double()), torch.randn(6, 10).double()


def test_rect_keeps_the_entries_that_change_most(host):
    plain = dense(errata.edit(host, REQUESTS, method="memit", **FAST))
    kept = dense(errata.edit(host, REQUESTS, method="memit", stabilise=["rect:0.25"], **FAST))
    ratio = (plain / (weight_of(host) + 1e-8)).abs()
    count = round(0.25 * ratio.numel())
    top = torch.zeros_like(ratio, dtype=torch.bool)
    top.view(-1)[ratio.flatten().argsort(descending=True)[:count]] = True
    torch.testing.assert_close(kept, torch.where(top, plain, torch.zeros_like(plain)))


def test_prune_restrains_only_what_exceeds_the_bound():
    delta, weight = random_pair()
    bound = 4.0
    found = (delta.dense() + shape.excess(delta, bound, 1.2).dense()).double()
    u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
    log = [math.log(v, 1.2) - math.log(bound, 1.2) + bound if v > bound else v for v in s.tolist()]
    wanted = torch.tensor([min(a, b) for a, b in zip(log, s.tolist(), strict=True)]).double()
    assert any(v > bound for v in s.tolist()) and any(0 < v < bound for v in s.tolist())
    torch.testing.assert_close(found, u * wanted @ vh)
    assert abs(shape.largest_singular(weight) - float(torch.linalg.svdvals(weight)[0])) < 1e-10


def test_prune_acts_on_the_change_so_far(host):
    """A step small in itself is restrained when it adds up to more than the weight has."""
    edit = None
    for request in REQUESTS:
        edit = errata.edit(
            host, request, method="memit", stabilise=["prune:1.2"], clamp=200.0, learning_rate=50.0, after=edit,
            cov_weight=1e-9, **FAST,
        )  # fmt: skip
    plain = None
    for request in REQUESTS:
        plain = errata.edit(
            host,
            request,
            method="memit",
            clamp=200.0,
            learning_rate=50.0,
            after=plain,
            cov_weight=1e-9,
            **FAST,
        )
    most = float(torch.linalg.svdvals(weight_of(host))[0])
    reached = float(torch.linalg.svdvals(dense(plain))[0])
    assert reached > most, "the unrestrained sequence must exceed the bound for this to mean anything"
    assert float(torch.linalg.svdvals(dense(edit))[0]) < 0.9 * reached


def test_sphere_damps_the_weights_main_input_directions(host):
    plain = dense(errata.edit(host, REQUESTS, method="alphaedit", energy=0.9, **FAST))
    damped = dense(
        errata.edit(host, REQUESTS, method="alphaedit", energy=0.9, stabilise=["sphere:0.5:0.5"], **FAST)
    )
    rows = weight_of(host)
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.mT @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    count = int((values.cumsum(0) / values.sum() <= 0.5).sum()) + 1
    v = vectors[:, :count]
    torch.testing.assert_close(damped, plain - 0.5 * plain @ v @ v.mT, rtol=1e-6, atol=1e-9)
    assert float((damped @ v).norm()) < 0.51 * float((plain @ v).norm()) + 1e-12


def test_simie_rewrites_by_ridge_regression_on_all_tokens_so_far(host):
    site = host.layout.site(1)
    first = errata.edit(host, REQUESTS[:1], method="memit", stabilise=["simie:0.5"], **FAST)
    both = errata.edit(host, REQUESTS[1:2], method="memit", stabilise=["simie:0.5"], after=first, **FAST)
    base = errata.edit(host, REQUESTS[:1], method="memit", **FAST)
    old, new = (all_keys(host, [r], site).mT.double() for r in REQUESTS[:2])
    ridge = 0.5 * float(old.square().sum(0).mean())
    eye = torch.eye(site.d_in).double()
    p1 = ridge * eye + old @ old.mT
    torch.testing.assert_close(
        dense(first), dense(base) @ old @ old.mT @ torch.linalg.inv(p1), rtol=1e-6, atol=1e-9
    )
    with first.on(host):
        from errata.job import workspace
        from errata.methods import REGISTRY

        work = workspace(host, seed=0)
        work.after = first
        config = REGISTRY.get("memit").config(
            **{k: tuple(v) if k == "layers" else v for k, v in FAST.items()}
        )
        step = dense(REGISTRY.get("memit").fit(host, REQUESTS[1:2], config, work))
    p2 = p1 + new @ new.mT
    expected = dense(first) + step @ new @ new.mT @ torch.linalg.inv(p2)
    torch.testing.assert_close(dense(both), expected, rtol=1e-5, atol=1e-8)


def test_simie_of_one_key_shrinks_by_the_ridge():
    """delta k k^T / (lambda + k^T k)."""
    delta, _ = random_pair()
    key = torch.randn(10, 1).double()
    expected = delta @ key @ key.mT / (2.0 + float(key.square().sum()))
    from errata.linalg.solve import CostMatrix, from_solved

    cost = CostMatrix.identity(2.0)
    made = from_solved(key, cost.solve(key), delta @ key, gamma=1.0)
    torch.testing.assert_close(made.dense(), expected)


def test_many_columns_condense_to_as_many_as_there_are_entries():
    columns = torch.randn(5, 40).double()
    small = shape.condense(columns)
    assert small.shape == (5, 5)
    torch.testing.assert_close(small @ small.mT, columns @ columns.mT)
    assert shape.condense(columns[:, :3]) is not None and shape.condense(columns[:, :3]).shape == (5, 3)


def test_nas_gives_every_value_the_norm_of_the_unedited_model(host):
    edit = errata.edit(host, REQUESTS[:2], method="memit", stabilise=["nas"], cov_weight=1e-9, **FAST)
    norm = float(edit.state["nas.norm"])
    later = errata.edit(
        host, REQUESTS[2:], method="memit", stabilise=["nas"], cov_weight=1e-9, after=edit, **FAST
    )
    assert float(later.state["nas.norm"]) == norm, "measured once, in the unedited model"
    from errata.locate.contexts import Context
    from errata.locate.problems import value_problems
    from errata.locate.sweep import LayerSweep

    problems = value_problems(host, REQUESTS[:2], [Context("", 1.0)])
    before = LayerSweep(host, problems, 0).block_outputs(1)
    assert abs(float(before.norm(dim=1).mean()) - norm) < 1e-6 * norm
    record = edit.records[host.layout.site(1).parameter]
    values = before + record.target_changes.mT
    torch.testing.assert_close(values.norm(dim=1), torch.full((2,), norm).double(), rtol=1e-6, atol=0)


def test_steps_compose_in_the_order_given(host):
    one = errata.edit(host, REQUESTS, method="memit", stabilise=["rect", "sphere"], **FAST)
    other = errata.edit(host, REQUESTS, method="memit", stabilise=["sphere", "rect"], **FAST)
    assert float((dense(one) - dense(other)).norm()) > 1e-6 * float(dense(one).norm())
    assert (dense(other) == 0).double().mean() > 0.5 > (dense(one) == 0).double().mean()
    rome = errata.edit(host, REQUESTS[:1], method="rome", stabilise=["rect"], **FAST)
    assert (dense(rome) == 0).double().mean() > 0.5


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("rekt", "did you mean 'rect'"),
        ("rect:x", "numbers"),
        ("rect:1:2", "1 numbers"),
        ("prune:-1", "above"),
    ],
)
def test_wrong_steps_are_refused(host, item, match):
    with pytest.raises(ConfigError, match=match):
        errata.edit(host, REQUESTS, method="memit", stabilise=[item], **FAST)


def test_every_step_is_described():
    assert set(_stabilise.STEPS) == {"nas", "rect", "sphere", "prune", "simie"}
    for name in _stabilise.STEPS:
        assert f"\n{name} " in _stabilise.__doc__


@pytest.mark.parametrize("rank", [3, 9])
def test_the_excess_of_factors_is_that_of_their_product_also_beyond_full_rank(rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).double() for size in ((5, rank), (rank, 12)))
    delta, bound = LowRank(left, right), 0.5 * float(torch.linalg.svdvals(left @ right)[0])
    thin, dense_ = (shape.excess(one, bound, 1.2).dense() for one in (delta, delta.dense()))
    assert thin.any(), "some singular values are above the bound"
    torch.testing.assert_close(thin, dense_)
