"""Arithmetic of edits and what merges them: by hand on small matrices, and the properties that define each."""

from __future__ import annotations

import pytest
import torch

from errata.edits import Edit, WeightEdit
from errata.edits.combining import Shares, combine, interference, interpolate
from errata.edits.edit import Provenance
from errata.errors import ConfigError, EditError
from errata.linalg import merging
from errata.linalg.lowrank import LowRank
from errata.types import Request
from tests.models import fresh

ONE, TWO = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
SHAPE = (32, 80)


def edit(
    seed: int, names=(ONE,), *, dense: bool = False, host: str = "h", request: str = "", **more
) -> WeightEdit:
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        thin = LowRank(torch.randn(SHAPE[0], 2, generator=draw), torch.randn(2, SHAPE[1], generator=draw))
        deltas[name] = thin.dense() if dense else thin
    requests = (Request("{} lives in", request, "Esk"),) if request else ()
    return WeightEdit(deltas, frozenset(), Provenance("rome", requests, {"seed": seed}, host, **more))


def total(one: WeightEdit, name: str = ONE) -> torch.Tensor:
    delta = one.deltas[name]
    return delta.dense() if isinstance(delta, LowRank) else delta


def factors(one: WeightEdit) -> LowRank:
    delta = one.deltas[ONE]
    assert isinstance(delta, LowRank)
    return delta


def same(one: WeightEdit, other: WeightEdit) -> bool:
    a, b = factors(one), factors(other)
    return torch.equal(a.B, b.B) and torch.equal(a.A, b.A)


def test_ties_by_hand():
    changes = torch.tensor([[4.0, -3.0, 1.0, 0.0], [2.0, 5.0, -3.0, 0.5]])
    # of each the two largest: [4 -3 0 0] and [0 5 -3 0]; sums 4, 2, -3, 0; means of those with the sum's sign
    expected = torch.tensor([4.0, 5.0, -3.0, 0.0])
    assert torch.equal(merging.ties(changes, density=0.5), expected)
    assert torch.equal(merging.ties(changes, density=1.0), torch.tensor([3.0, 5.0, -3.0, 0.5]))


def test_ties_gives_an_entry_without_a_sign_that_of_the_majority():
    changes = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 1.0]])
    assert torch.equal(merging.ties(changes), torch.tensor([0.0, 2.0, 2.0]))
    assert torch.equal(merging.ties(changes, majority=True), torch.tensor([1.0, 2.0, 2.0]))


def test_dare_is_unbiased_and_keeps_what_it_keeps():
    change = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    masks = torch.stack([merging.dare(change, drop=0.8, generator=draw) for _ in range(4000)])
    error = masks.std(0) / 4000**0.5
    assert ((masks.mean(0) - change).abs() < 4 * error).all()
    assert ((masks == 0) | ((masks - change * 5).abs() < 1e-12)).all()
    assert abs(float((masks != 0).double().mean()) - 0.2) < 0.02
    assert torch.equal(merging.dare(change, drop=0.0, generator=draw), change)


def test_breadcrumbs_by_hand():
    change = torch.tensor([[5.0, -1.0, 2.0, -4.0, 3.0], [0.0, 1.0, 1.0, 1.0, 9.0]])
    expected = torch.tensor([[0.0, 0.0, 2.0, -4.0, 3.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(merging.breadcrumbs(change, smallest=0.2, largest=0.2), expected)
    assert torch.equal(merging.breadcrumbs(change, smallest=0.0, largest=0.0), change)


def test_a_sum_is_the_sum_and_stays_thin_in_any_order():
    a, b = edit(1, (ONE, TWO)), edit(2)
    both = combine([a, b], weights=[1, -0.5])
    assert torch.allclose(total(both), total(a) - 0.5 * total(b), atol=1e-5)
    assert factors(both).rank == 4
    assert both.deltas.keys() == {ONE, TWO}
    other = combine([b, a], weights=[-0.5, 1])
    assert other.digest == both.digest
    assert set(both.provenance.parents) == {a.digest, b.digest} and both.provenance.method == "combine"


def test_weights_of_one_and_zero_give_the_first_edit_bit_by_bit():
    a, b = edit(1), edit(2)
    only = combine([a, b], weights=[1, 0])
    assert same(only, a)


def test_an_analogy_of_two_equal_edits_is_the_third():
    a, c = edit(1), edit(3)
    result = combine([a, a, c], "analogy")
    assert same(result, c)
    b = edit(2)
    assert torch.allclose(total(combine([a, b, c], "analogy")), total(c) + total(b) - total(a), atol=1e-5)


def test_ties_trims_over_all_weights_of_an_edit_and_copies_change_nothing():
    big, small = edit(1, dense=True), edit(2, (TWO,), dense=True)
    one = WeightEdit(
        {ONE: total(big) * 1000, TWO: total(small, TWO)}, frozenset(), Provenance("x", (), {}, "h")
    )
    merged = combine([one], "ties", shares=Shares(density=0.4))
    assert TWO not in merged.deltas, "the largest of all entries are in the other weight"
    kept = merging.trim(total(one).reshape(1, -1), 0.8).reshape(SHAPE)
    assert torch.equal(total(merged), kept)


def test_dare_and_breadcrumbs_of_edits_are_those_of_their_matrices():
    a, b = edit(1), edit(2)
    twice = [combine([a, b], "dare", shares=Shares(drop=0.5), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(total(twice[0]), total(twice[1])) and not torch.equal(total(twice[0]), total(twice[2]))
    c, d = edit(3, (ONE, TWO)), edit(4, (TWO,))  # weight by weight, and of each the edits in turn
    merged, draw = combine([c, d], "dare", shares=Shares(drop=0.5), seed=5), torch.Generator().manual_seed(5)
    for name in (ONE, TWO):
        whole = [
            total(e, name) if name in e.deltas else torch.zeros(SHAPE)
            for e in sorted((c, d), key=lambda e: e.digest)
        ]
        expected = torch.stack([merging.dare(w, drop=0.5, generator=draw) for w in whole]).sum(0)
        assert torch.equal(total(merged, name), expected)
    crumbs = combine([a, b], "breadcrumbs", scale=0.4)
    expected = (
        torch.stack([merging.breadcrumbs(total(e), smallest=0.2, largest=0.1) for e in (a, b)]).sum(0) * 0.4
    )
    assert torch.allclose(total(crumbs), expected, atol=1e-6)
    assert crumbs.provenance.config["smallest"] == 0.2


def test_interpolation_meets_both_ends_bit_by_bit():
    host = fresh("llama")
    one = edit(1, host=host.fingerprint)
    start = host.weights_hash()
    with one.on(host):
        edited = host.weights_hash()
    with interpolate(one, 1.0).on(host):
        assert host.weights_hash() == edited != start
    with interpolate(one, 0.0).on(host):
        assert host.weights_hash() == start
    half = interpolate(one, 0.5)
    assert torch.allclose(total(half), total(one) / 2)
    assert host.weights_hash() == start


def test_negation_of_an_edit_in_place_beside_it_is_the_base():
    host = fresh("gpt2")
    name = "transformer.h.0.mlp.c_proj.weight"
    record = Provenance("rome", (), {}, host.fingerprint)
    one = WeightEdit({name: factors(edit(1))}, frozenset({name}), record)
    minus = combine([one], weights=[-1])
    assert minus.transposed == {name}
    before = host.model.get_parameter(name).detach().clone()
    with one.on(host), minus.on(host):
        assert torch.allclose(host.model.get_parameter(name), before, atol=1e-6)


def test_a_combined_edit_has_the_requests_that_it_adds(tmp_path):
    a, b = edit(1, request="Ada Brenner"), edit(2, request="Ivo Marn")
    result = combine([a, b], weights=[1, -1])
    assert result.provenance.requests == a.provenance.requests
    loaded = Edit.load(result.save(tmp_path / "both.safetensors"))
    assert loaded.digest == result.digest


def test_interference_is_the_cosine_of_changes():
    a, b, c = edit(1), edit(2, dense=True), edit(3, (TWO,))
    table = interference([a, b, c])
    flat = [total(a).flatten().double(), total(b).flatten().double()]
    assert table[0][1] == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()), abs=1e-6)
    assert table[0][1] == pytest.approx(table[1][0]) and table[0][0] == pytest.approx(1.0, abs=1e-6)
    assert table[0][2] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: combine([edit(1), edit(2, host="other")]), "different hosts"),
        (lambda: combine([edit(1), edit(1)], weights=[1, -1]), "nothing is left"),
        (lambda: combine([edit(1), edit(2)], "analogy"), "takes 3 edits"),
        (lambda: combine([edit(1), edit(2)], weights=[1]), "one for each edit"),
        (lambda: combine([edit(1)], "mean"), "expected one of"),
        (lambda: combine([edit(1)], scale=0), "other than 0"),
        (lambda: Shares(smallest=0.6, largest=0.5), "less than 1 together"),
        (lambda: Shares(drop=1.0), "from 0 to below 1"),
    ],
)
def test_what_cannot_be_combined_is_refused(call, message):
    with pytest.raises((EditError, ConfigError), match=message):
        call()


def test_edits_made_in_different_formats_are_not_one():
    a = edit(1, request="Ada Brenner", prompt_format={"template": "chat"})
    with pytest.raises(EditError, match="prompt formats"):
        combine([a, edit(2, request="Ivo Marn")])


def test_an_edit_that_is_subtracted_brings_neither_requests_nor_their_format():
    a = edit(1, request="Ada Brenner", prompt_format={"template": "chat"})
    b = edit(2, request="Ivo Marn")
    left = combine([a, b], weights=[1, -1])
    assert left.provenance.requests == a.provenance.requests
    assert left.provenance.prompt_format == {"template": "chat"}
    assert combine([a, b], weights=[1, -1], scale=-1).provenance.requests == b.provenance.requests
