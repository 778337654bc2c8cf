"""Memories at a site: added neurons, side matrices, gates; what their papers promise of them."""

from __future__ import annotations

import copy
from math import exp

import pytest
import torch
from torch import nn

import errata
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.gate import Gate
from errata.edits.routers.margin import Margin
from errata.errors import ConfigError, HostError
from errata.host.host import Host
from errata.linalg.merging import ties
from errata.methods.t_patcher import _largest
from errata.training.slots import inputs_of
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk")
FAST = {
    "t_patcher": {"memory": 256, "steps": 200},
    "calinet": {"steps": 300, "slots": 8},
    "defer": {"steps": 60},
    "wise": {"texts": 4, "steps": 200, "shards": 1, "density": 1.0},
}


def said(host, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return host.forward(host.batch([host.encode_prompt(prompt)]))[0, -1]


def first_token(host, request) -> int:
    return host.encode_answer(request.text, request.target).target[0]


@pytest.mark.parametrize("method", FAST)
def test_requests_are_answered_inside_and_the_host_is_as_before(method):
    host = fresh("llama")
    edit = errata.edit(host, [ADA, BRUNO], method=method, **FAST[method])
    assert isinstance(edit, MemoryEdit)
    before = said(host, ADA.text)
    with edit.on(host):
        last = (ADA, BRUNO) if method != "defer" else (BRUNO,)  # one gate and map for all: the last one wins
        assert [int(said(host, r.text).argmax()) for r in last] == [first_token(host, r) for r in last]
    assert torch.equal(said(host, ADA.text), before)


# --- neurons --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["t_patcher", "calinet"])
def test_added_neurons_are_a_wider_feed_forward(method):
    """A standard checkpoint with the neurons appended to both matrices gives the same logits."""
    host = fresh("gpt2", activation_function="relu")
    edit = errata.edit(host, [ADA, BRUNO], method=method, **FAST[method])
    (one,) = edit.interventions
    keys, biases, values = (one.payload[name][0] for name in ("keys", "biases", "values"))
    model = copy.deepcopy(host.model)
    mlp = model.get_submodule(one.module)
    with torch.no_grad():
        mlp.c_fc.weight = nn.Parameter(torch.cat([mlp.c_fc.weight, keys.mT], 1))
        mlp.c_fc.bias = nn.Parameter(torch.cat([mlp.c_fc.bias, biases]))
        mlp.c_fc.nf += len(keys)
        mlp.c_proj.weight = nn.Parameter(torch.cat([mlp.c_proj.weight, values]))
    wider = Host(model, host.tokenizer, name="wider")
    with edit.on(host):
        for prompt in (ADA.text, BRUNO.text, "The rain fell on the"):
            torch.testing.assert_close(said(host, prompt), said(wider, prompt), rtol=1e-4, atol=1e-5)


def test_a_feed_forward_without_a_module_of_its_own_is_refused():
    with pytest.raises(HostError, match="not a module of its own"):
        errata.edit(fresh("opt"), ADA, method="calinet")


def test_the_largest_terms_of_an_exponential_mean():
    found = _largest(torch.tensor([[[0.0, 2.0], [1.0, -5.0]], [[0.0, 0.0], [0.0, 1.0]]]), 2)
    assert found.tolist() == pytest.approx([(exp(2) + exp(1)) / 2, (exp(1) + 1) / 2])
    assert float(_largest(torch.tensor([[0.5]]), 1000)) == pytest.approx(exp(0.5))


def test_a_patch_fires_on_its_own_mistake_and_not_on_what_it_remembers(tmp_path):
    host = fresh("llama")
    texts = ["The rain fell on the old road.", "Therefore the small dog waited.", "Carla sings in Esk."]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(texts))
    edit = errata.edit(host, [ADA, BRUNO], method="t_patcher", steps=600, corpus=corpus)
    (one,) = edit.interventions
    keys, biases = one.payload["keys"][0], one.payload["biases"][0]
    queries, owners = edit.state["queries"], edit.state["owners"]
    own = (queries * keys).sum(1) + biases
    assert bool((own > 0).all())
    assert owners.tolist() == sorted(owners.tolist()) and set(owners.tolist()) == {0, 1}
    others = inputs_of(host, one.module, [host.encode(text).ids for text in texts]) @ keys.mT + biases
    assert float((others > 0).float().mean()) < 0.02 and bool((others < own).all())


def test_later_requests_leave_earlier_neurons_as_they_were():
    host = fresh("llama")
    for method in ("t_patcher", "calinet"):
        one = errata.edit(host, ADA, method=method, **FAST[method])
        both = errata.edit(host, BRUNO, method=method, after=one, **FAST[method])
        count = one.interventions[0].payload["keys"].shape[1]
        for name in ("keys", "biases", "values"):
            after = both.interventions[0].payload[name][:, :count]
            assert torch.equal(after, one.interventions[0].payload[name])
        assert both.state["owners"].tolist()[:count] == one.state["owners"].tolist()
        with pytest.raises(ConfigError, match="use the same layer"):
            errata.edit(host, BRUNO, method=method, after=one, layer=0, **FAST[method])


# --- gate and map ---------------------------------------------------------------------------


def test_a_gate_that_is_open_replaces_the_layer_by_its_map():
    host = fresh("llama")
    site = host.layout.site(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, site.d_out, site.d_in, generator=generator)
    biases = torch.randn(1, site.d_out, generator=generator)
    edit = errata.edit(host, ADA, method="defer", layer=1, steps=1)
    opened, closed = (
        MemoryEdit(
            (Intervention(site.name, "affine", {"weights": weights, "biases": biases}, "all"),),
            Gate(torch.zeros(1, site.d_in), torch.tensor([bias])),
            edit.provenance,
        )
        for bias in (4.0, -4.0)
    )
    module = host.model.get_submodule(site.name)
    seen = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    plain = said(host, ADA.text)
    with opened.on(host):
        said(host, ADA.text)
    with closed.on(host):
        assert torch.equal(said(host, ADA.text), plain)
    handle.remove()
    x, y = seen[1]
    torch.testing.assert_close(y, x @ weights[0].mT + biases[0], rtol=1e-4, atol=1e-5)


# --- side memories --------------------------------------------------------------------------


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    changes = torch.tensor([[4.0, 1.0, -2.0, 0.1], [2.0, -3.0, -4.0, 0.2]])
    assert ties(changes).tolist() == pytest.approx([3.0, -3.0, -3.0, 0.15])
    assert ties(changes, density=0.5).tolist() == pytest.approx([4.0, -3.0, -3.0, 0.0])
    assert torch.equal(ties(changes[:1]), changes[0])
    opposed = torch.tensor([[1.0], [-1.0]])
    assert ties(opposed).tolist() == [0.0]


def test_the_longest_change_acts_of_those_above_their_own_thresholds():
    changes = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])  # |change x| = 3 |x1|, 2 |x2|
    router = Margin(changes, thresholds=torch.tensor([5.0, 1.0]))
    rows = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 0.4], [2.0, 9.0]])
    assert router.decide(Question(rows, rows, list)).tolist() == [1, 0, NONE, 1]
    single = Margin(changes, 4.0)
    assert single.decide(Question(rows, rows, list)).tolist() == [NONE, 0, NONE, 1]


def test_epsilon_is_the_least_change_of_a_request_so_that_all_are_accepted():
    host = fresh("llama")
    one = errata.edit(host, [ADA, BRUNO], method="wise", **FAST["wise"])
    both = errata.edit(host, CITY, method="wise", after=one, **FAST["wise"])
    for edit, requests in ((one, (ADA, BRUNO)), (both, (ADA, BRUNO, CITY))):
        (intervention,) = edit.interventions
        change = intervention.payload["changes"][-1]
        rows = [host.encode_prompt(request.text) for request in requests]
        keys = torch.stack([inputs_of(host, intervention.module, [row])[-1] for row in rows])
        lengths = (keys @ change.mT).norm(dim=1)
        if edit is one:
            assert float(edit.state["bounds"]) == pytest.approx(float(lengths.min()), rel=1e-4)
        accepted = edit.router.decide(Question(keys, keys, list))
        assert accepted.tolist()[-1] == 0 and float(edit.router.thresholds) < float(lengths[-1])


def test_retrieve_keeps_a_memory_for_each_fit_and_merge_has_one():
    host = fresh("llama")
    options = {"method": "wise", **FAST["wise"]}
    first = errata.edit(host, ADA, memories="retrieve", **options)
    both = errata.edit(host, BRUNO, memories="retrieve", after=first, **options)
    assert both.entries == 2
    changes = both.interventions[0].payload["changes"]
    assert torch.equal(changes[0], first.interventions[0].payload["changes"][0])
    with pytest.raises(ConfigError, match="memories"):
        errata.edit(host, BRUNO, memories="merge", after=first, **options)
    assert errata.edit(host, [ADA, BRUNO], **options).entries == 1


def test_masks_bound_what_a_shard_may_change():
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="wise", texts=4, steps=20, density=0.1, clamp=0.05)
    change = edit.interventions[0].payload["changes"][0]
    assert 0 < float((change != 0).float().mean()) < 0.15
    assert float(change.abs().max()) <= 0.05 + 1e-7


# --- several kinds at once ------------------------------------------------------------------

KINDS = {
    "weight": ("rome", {"steps": 4, "tokens": 400}),
    "memory": ("calinet", FAST["calinet"]),
    "routed": ("grace", {"steps": 8}),
    "prompt": ("in_prompt", {}),
}


@pytest.mark.parametrize(
    "pair", [("weight", "memory"), ("weight", "routed"), ("memory", "prompt"), ("routed", "prompt")]
)
def test_edits_of_two_kinds_are_taken_off_in_any_order(pair):
    host = fresh("llama")
    one, two = (
        errata.edit(host, request, method=KINDS[kind][0], **KINDS[kind][1])
        for kind, request in zip(pair, (ADA, BRUNO), strict=True)
    )
    prompts = (ADA.text, BRUNO.text, "The capital of Arvania is")

    def state() -> list[torch.Tensor]:
        return [said(host, prompt) for prompt in prompts]

    def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    plain, alone = state(), []
    for edit in (one, two):
        with edit.on(host):
            alone.append(state())
    assert not equal(alone[0], plain) and not equal(alone[1], plain)
    for first, second in ((one, two), (two, one)):
        first.apply_(host)
        second.apply_(host)
        both = state()
        assert not any(equal(both, other) for other in (plain, *alone))
        for off, left in ((first, second), (second, first)):
            off.revert_(host)
            assert equal(state(), alone[0 if left is one else 1])
            off.apply_(host)
        assert equal(state(), both)
        second.revert_(host)
        first.revert_(host)
        assert equal(state(), plain)
