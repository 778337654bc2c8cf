"""ROME and MEMIT against a plain implementation that shares nothing with errata but the host.

``benchmarks/naive.py`` runs every row whole, at every step, one request at a time, and solves m x m
systems; statistics are taken again by it as well. Values are read back from the edits themselves.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks import floors, naive

import errata
from errata.edits.weight import WeightEdit
from errata.job import workspace
from errata.linalg.solve import RIDGE
from errata.stats.collect import Corpus
from tests.models import fresh

TEXT = (
    "Ada Brenner was born in Tallow, and the rain fell on the old road. Bruno Holner lives in Merrin and "
    "plays the cello (or the harp). Therefore the small dog waited. Because I saw you, you came."
)
REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("The old dog of {} lives in", "Bruno Holner", "Tallow road"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]
FAMILIES = ["llama", "gpt2", "gemma2"]
STEPS = 7


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    made = fresh(request.param)
    # Gemma 2's attention takes its softmax in float32, where a float64 mask overflows: it stays as it is
    return made if request.param == "gemma2" else in_double(made)


def in_double(host):
    host.model.double()
    return host


def bound(host) -> float:
    return 1e-6 if host.dtype == torch.float64 else 1e-4


def corpus() -> Corpus:
    return Corpus("one text", lambda: [TEXT])


def made(host, requests, method, **options):
    return errata.edit(host, requests, method=method, steps=STEPS, corpus=corpus(), tokens=10_000, **options)


def prefixes(host, config):
    """The contexts of an edit: the same host and seed write the same ones."""
    flat = isinstance(config["contexts"], (tuple, list))
    groups = [(config["contexts"], config["context_tokens"])]
    if flat:
        groups = list(zip(config["contexts"], config["context_tokens"], strict=True))
    found = workspace(host, seed=0).contexts(host, groups, "flat" if flat else "half_bare")
    return [(context.prefix, context.weight) for context in found]


def search(config) -> naive.Search:
    return naive.Search(
        config["steps"], config["learning_rate"], config["clamp"], config["decay"], config["kl"],
        unit=config["scale"],
    )  # fmt: skip


def second(host, layer):
    row = host.encode(TEXT).ids
    assert len(row) < host.window, "the text must be one row, or the library will cut it"
    return naive.second_moment(host, [row], host.layout.site(layer), jitter=RIDGE)


def apart(one, other) -> float:
    """Distance relative to the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def delta_of(host, edit, layer):
    assert isinstance(edit, WeightEdit)
    delta = edit.deltas[host.layout.site(layer).parameter]
    return (delta if isinstance(delta, torch.Tensor) else delta.dense()).double()


@pytest.mark.parametrize("keys", ["mean", "mixed"])
def test_rome_equals_the_plain_way(host, keys):
    edit = made(host, REQUESTS[1], "rome", layers=[1], keys=keys)
    config = edit.provenance.config
    contexts, moment = prefixes(host, config), second(host, 1)
    expected, value = naive.rome(
        host, REQUESTS[1], contexts, moment, layer=1, search=search(config), keys=keys
    )
    delta = delta_of(host, edit, 1)
    assert apart(delta, expected) < bound(host)
    # the formula gives its value exactly at the key it was solved for: read the shift off there
    site = host.layout.site(1)
    at = contexts if keys == "mean" else [("", 1.0)]
    key, output = naive.keys_at(host, REQUESTS[1], at, site)
    assert apart(output + delta @ key - value.start, value.shift) < bound(host)
    assert float(value.shift.norm()) > 0.1 * float(value.start.norm())


def layers_of(host) -> list[int]:
    return [0, 1] if host.layout.adds_directly else [1]


@pytest.mark.parametrize("relative", [1e-2, 1.0])
def test_memit_equals_the_plain_way(host, relative):
    layers = layers_of(host)
    edit = made(host, REQUESTS, "memit", layers=layers, cov_weight=80 * relative)
    config = edit.provenance.config
    expected, _ = naive.memit(
        host, REQUESTS, prefixes(host, config), {layer: second(host, layer) for layer in layers},
        search=search(config), cov_weight=80 * relative,
        where="block_out" if host.layout.adds_directly else "mlp_out",
    )  # fmt: skip
    assert isinstance(edit, WeightEdit)
    assert set(edit.deltas) == {host.layout.site(layer).parameter for layer in layers}
    for layer in layers:
        assert apart(delta_of(host, edit, layer), expected[layer]) < bound(host), layer


def test_memit_values_equal_the_plain_ones(host):
    """Read back from one layer: delta K = R G (G + I)^-1 with G = K^T (lambda C)^-1 K gives R, and so z."""
    weight = 1.0
    edit = made(host, REQUESTS, "memit", layers=[1], cov_weight=weight)
    config = edit.provenance.config
    contexts, site = prefixes(host, config), host.layout.site(1)
    where = "block_out" if host.layout.adds_directly else "mlp_out"
    keys = torch.stack([naive.keys_at(host, r, contexts, site)[0] for r in REQUESTS], 1)
    gram = keys.mT @ torch.linalg.solve(weight * second(host, 1), keys)
    whole = torch.linalg.solve(gram, gram + torch.eye(3, dtype=torch.float64))
    shifts = delta_of(host, edit, 1) @ keys @ whole  # the residual is the shift: nothing else has moved
    for i, request in enumerate(REQUESTS):
        value = naive.find_value(host, request, contexts, layer=1, where=where, search=search(config))
        assert apart(shifts[:, i], value.shift) < bound(host), request.prompt


def test_the_plain_way_leaves_the_host_as_it_was(host):
    before, moment = host.weights_hash(), second(host, 1)
    plain = naive.Search(2, 0.1, 1.0, 0.5, 0.0625)
    naive.memit(host, REQUESTS[:1], [("", 1.0)], {1: moment}, search=plain, cov_weight=1.0, where="mlp_out")
    assert host.weights_hash() == before
    assert all(p.requires_grad and p.grad is None for p in host.model.parameters())
    assert not any(module._forward_hooks for module in host.model.modules())


# --- the floors ------------------------------------------------------------------------------


def test_texts_that_begin_alike_share_their_beginning():
    assert floors.distinct([(1, 2, 3), (1, 2, 4), (1, 5)]) == 5
    assert floors.distinct([]) == 0


def test_floors_count_what_the_formulas_say():
    size = floors.Size(blocks=(10, 20, 30), head=7)
    rows = [
        naive.Row(ids=(0, 1, 2, 3), place=2, targets=(8,), weight=0.5),
        naive.Row(ids=(0, 1, 9, 3), place=2, targets=(8,), weight=0.5),
        naive.Row(ids=(0, 1, 2), place=1, targets=(), weight=1.0),
    ]
    once = 2 * 60 * 2 + 2 * 30 * 5  # tokens 0 1 before the places; two tails of two, one of one
    step = 2 * (30 * 5 + 7 * 3)
    assert floors.values(size, rows, layer=1, steps=4) == once + 7 * step
    assert floors.keys(size, rows, layer=1) == 2 * 30 * 4  # 0, 0 1, 0 1 2, 0 1 9


def test_operations_are_counted_to_the_last_one():
    """What the plain way executes is known in closed form, and lies above the floor."""
    from benchmarks.measure import counting

    host = in_double(fresh("llama"))
    assert host.layout  # found once, by running the model
    contexts = [("", 0.5), ("The old road. ", 0.5)]
    plain = naive.Search(3, 1e-3, 1.0, 0.5, 0.0625)
    with counting() as count:
        naive.find_value(host, REQUESTS[0], contexts, layer=1, where="mlp_out", search=plain)
        done = count()
    rows = naive.lay_out(host, REQUESTS[0], contexts)
    size, length = floors.Size.of(host), max(len(row.ids) for row in rows)
    tokens = length * len(rows)
    forward = 2 * (sum(size.blocks) + size.head) * tokens
    backward = 2 * (size.above(1) + size.head) * tokens
    # two products a block forwards, five backwards (one is made again), each 2 d operations a pair of tokens
    pair = 2 * host.layout.width * length * tokens
    attention = 3 * 3 * 2 * pair + 2 * 1 * 5 * pair
    assert done == 3 * forward + 2 * backward + attention
    assert floors.values(size, rows, layer=1, steps=3) < 3 * forward + 2 * backward
