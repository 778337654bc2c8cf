"""Methods on a float64 host against the equations of their papers."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.job import workspace
from errata.linalg.solve import update_primal
from errata.locate import values
from errata.locate.contexts import Context
from errata.locate.keys import subject_keys
from tests.models import fresh

FAST = {"steps": 4, "tokens": 400}
REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
OTHERS = [
    REQUEST,
    errata.Request("{} lives in", "Bruno Holner", "Tallow"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]


@pytest.fixture(scope="module")
def host():
    made = fresh("llama")
    made.model.double()
    return made


def test_r_rome_gives_its_value_at_its_key(host):
    """W' k = v* at the averaged key."""
    edit = errata.edit(host, REQUEST, method="rome", **FAST)
    config = edit.provenance.config
    site = host.layout.site(config["layers"][0])
    work = workspace(host, seed=0)
    contexts = work.contexts(
        host, tuple(zip(config["contexts"], config["context_tokens"], strict=True)), "flat"
    )
    value = values.optimise(
        host, [REQUEST], contexts, layer=site.layer, where="mlp_out",
        config=values.ValueConfig(config["steps"], 0.5, config["clamp"], config["decay"], config["kl"]),
    )[0]  # fmt: skip
    found = subject_keys(host, [REQUEST], [site], contexts)
    with edit.on(host):
        weight = host.model.get_parameter(site.parameter).detach()
        written = weight @ found.keys[site][0].double()
    torch.testing.assert_close(written.float(), value.target.float(), atol=1e-4, rtol=1e-4)


def test_published_rome_gives_its_value_at_the_bare_key(host):
    edit = errata.edit(host, REQUEST, method="rome", keys="mixed", **FAST)
    plain = errata.edit(host, REQUEST, method="rome", keys="mean", **FAST)
    site = host.layout.site(edit.provenance.config["layers"][0])
    bare = subject_keys(host, [REQUEST], [site], [Context("", 1.0)])
    key = bare.keys[site][0]
    moved = edit.deltas[site.parameter] @ key[:, None]
    target = moved[:, 0] + bare.values[site][0]
    other = plain.deltas[site.parameter] @ key[:, None]
    # the published form is exact at the bare key, where r-ROME is not
    with edit.on(host):
        now = subject_keys(host, [REQUEST], [site], [Context("", 1.0)]).values[site][0]
    torch.testing.assert_close(now, target, atol=1e-4, rtol=1e-3)
    assert float((other[:, 0] - moved[:, 0]).norm()) > 1e-3 * float(moved.norm())


def test_memit_single_layer_equals_brute_force_ridge(host):
    """delta = R K^T (lambda C + K K^T)^-1 with everything captured again independently."""
    edit = errata.edit(host, OTHERS, method="memit", layers=[1], cov_weight=5.0, **FAST)
    config = edit.provenance.config
    site = host.layout.site(1)
    work = workspace(host, seed=0)
    contexts = work.contexts(host, [(config["contexts"], config["context_tokens"])], "half_bare")
    found = values.optimise(
        host, OTHERS, contexts, layer=1, where="block_out",
        config=values.ValueConfig(config["steps"], 0.5, config["clamp"], config["decay"], config["kl"]),
    )  # fmt: skip
    keys = subject_keys(host, OTHERS, [site], contexts).keys[site].mT
    now = subject_keys(host, OTHERS, [site], contexts[:1]).hidden[1]
    residual = (torch.stack([v.target for v in found]) - now).mT
    cost = work.costs(host, [site], config["tokens"])[site]
    moment = cost.factor @ cost.factor.mT
    expected = update_primal(keys, residual, 5.0 * moment, gamma=1.0)
    made = edit.deltas[site.parameter].dense().double()
    assert float((made - expected).norm() / expected.norm()) < 1e-5


def test_memit_spreads_over_its_layers(host):
    """Each layer takes an equal share of what is left; together they come nearer than the first alone."""
    edit = errata.edit(host, REQUEST, method="memit", layers=[0, 1], cov_weight=1e-6, **FAST)
    site = host.layout.site(1)
    bare = [Context("", 1.0)]
    start = subject_keys(host, [REQUEST], [site], bare).hidden[1]
    with edit.on(host):
        end = subject_keys(host, [REQUEST], [site], bare).hidden[1]
    assert set(edit.deltas) == {host.layout.site(i).parameter for i in (0, 1)}
    assert all(delta.rank == 1 for delta in edit.deltas.values())
    assert float((end - start).norm()) > 0


def test_batched_values_equal_single_values(host):
    config = values.ValueConfig(6, 0.5, 0.75, 0.5, 0.0625)
    contexts = [Context("", 0.5), Context("The old road. ", 0.5)]
    together = values.optimise(host, OTHERS, contexts, layer=1, where="block_out", config=config)
    for request, batched in zip(OTHERS, together, strict=True):
        alone = values.optimise(host, [request], contexts, layer=1, where="block_out", config=config)[0]
        assert batched.steps == alone.steps
        torch.testing.assert_close(batched.shift, alone.shift, atol=1e-4, rtol=1e-4)


def test_value_search_stays_inside_its_clamp(host):
    config = values.ValueConfig(10, 5.0, 0.25, 0.0, 0.0)
    value = values.optimise(host, [REQUEST], [Context("", 1.0)], layer=1, where="block_out", config=config)[0]
    assert float(value.shift.norm()) <= 0.25 * float(value.start.norm()) * (1 + 1e-5)
    assert float(value.shift.norm()) > 0.2 * float(value.start.norm())


def test_value_search_follows_the_gradient_of_the_full_model(host):
    """One step from zero is minus the rate times the sign of the gradient, taken without any cache."""
    config = values.ValueConfig(2, 0.01, 1e9, 0.0, 0.0, scale="published")
    value = values.optimise(host, [REQUEST], [Context("", 1.0)], layer=1, where="block_out", config=config)[0]
    answer = host.encode_answer(REQUEST.text, REQUEST.target)
    place = host.encode(REQUEST.text).last_of(*REQUEST.span)
    shift = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    block = host.model.get_submodule(host.layout.blocks[1])

    def push(module, args, output):
        full = torch.zeros_like(output)
        full[0, place] = 1.0
        return output + full * shift

    handle = block.register_forward_hook(push)
    logits = host.forward(host.batch([answer.ids]))[0]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[answer.start - 1 : -1], torch.tensor(answer.target))
    gradient = torch.autograd.grad(loss, shift)[0]
    solid = gradient.abs() > 1e-6
    assert solid.sum() > 20
    torch.testing.assert_close(value.shift[solid].double(), -0.01 * gradient[solid].sign(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_ft_stays_inside_its_box(host, norm):
    edit = errata.edit(host, REQUEST, method="ft", norm=norm, epsilon=0.01, learning_rate=0.1)
    ((name, delta),) = edit.deltas.items()
    weight = host.model.get_parameter(name).detach().float()
    if norm == "inf":
        bound = 0.01 * float(weight.square().mean().sqrt())
        assert float(delta.abs().max()) <= bound * (1 + 1e-6)
        assert float(delta.abs().max()) > 0.99 * bound
    else:
        assert float(delta.norm()) == pytest.approx(0.01 * float(weight.norm()), rel=1e-4)


def test_ft_objectives_differ_on_long_targets_only(host):
    short = errata.Request("{} was born in", "Ada Brenner", "Marmelundsen")
    assert len(host.encode_answer(short.text, short.target).target) > 1, "needs a target of several tokens"
    a = errata.edit(host, short, method="ft", objective="target")
    b = errata.edit(host, short, method="ft", objective="prompt_last")
    (one,), (two,) = a.deltas.values(), b.deltas.values()
    assert not torch.equal(one, two)
