"""Questions, sets and votes of neuron attribution."""

from __future__ import annotations

import pytest
import torch

from errata.errors import HostError, RequestError
from errata.host.layout import Site
from errata.locate.neurons import (
    Neuron,
    Question,
    attribute,
    coarse,
    coarse_sets,
    greedy_tokens,
    questions,
    refine,
    unshared,
)
from tests.models import fresh

PROMPT = "Ada Brenner was born in"
LONG = "Marmelundsen"


@pytest.fixture(scope="module")
def host():
    return fresh("llama")


def site(layer: int, width: int) -> Site:
    return Site(layer, "mlp_out", f"layers.{layer}", width, 4, False)


def test_every_token_of_an_answer_is_asked_for_at_its_own_position(host):
    answer = host.encode_answer(PROMPT, LONG)
    asked = questions(host, PROMPT, LONG)
    assert len(asked) == len(answer.target) > 1
    for j, question in enumerate(asked):
        assert question == Question(answer.ids[: answer.start + j], answer.target[j])


def test_token_ids_are_asked_for_as_they_are(host):
    head = host.encode(PROMPT).ids
    assert questions(host, PROMPT, [7, 9]) == [Question(head, 7), Question((*head, 7), 9)]
    with pytest.raises(RequestError, match="token of its own"):
        questions(host, PROMPT, [])


def test_greedy_tokens_are_the_greedy_continuation(host):
    ids = list(host.encode(PROMPT).ids)
    with torch.no_grad():
        out = host.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert greedy_tokens(host, PROMPT, 3) == tuple(out[0, len(ids) :].tolist())


def test_rules_differ_by_the_gradients_at_the_ends(host):
    """T (right - left) = w (dp/dw at w - dp/dw at 0), whatever T."""
    made = fresh("gpt2")
    made.model.double()
    asked = questions(made, PROMPT, "Merrin")
    place = made.layout.site(1)

    def by(rule, steps):
        return attribute(made, asked, [place], steps=steps, rule=rule)[place]

    ends = by("right", 1) - by("left", 1)
    for steps in (3, 8):
        torch.testing.assert_close(
            steps * (by("right", steps) - by("left", steps)), ends, rtol=1e-7, atol=1e-14
        )
    # the midpoints of T parts are what 2T left ends have and T left ends have not
    torch.testing.assert_close(by("midpoint", 4), 2 * by("left", 8) - by("left", 4), rtol=1e-9, atol=1e-14)


def test_batches_of_texts_do_not_matter(host, monkeypatch):
    asked = [*questions(host, PROMPT, LONG), *questions(host, "The capital of Arvania is", "Esk")]
    sites = [host.layout.site(0), host.layout.site(2)]
    together = attribute(host, asked, sites, steps=5)
    monkeypatch.setattr("errata.locate.neurons.BATCH_TOKENS", 20)
    monkeypatch.setattr("errata.locate.keys.BATCH_TOKENS", 20)
    apart = attribute(host, asked, sites, steps=5)
    for one in sites:
        scale = float(together[one].abs().max())
        torch.testing.assert_close(apart[one], together[one], rtol=1e-3, atol=1e-5 * scale)


def test_the_host_is_left_alone_and_gradients_need_no_asking(host):
    asked = questions(host, PROMPT, "Merrin")
    start = host.weights_hash()
    flags = [p.requires_grad for p in host.model.parameters()]
    place = host.layout.site(1)
    with torch.no_grad():
        one = attribute(host, asked, [place], steps=2)[place]
    assert torch.equal(attribute(host, asked, [place], steps=2)[place], one)
    assert host.weights_hash() == start
    assert [p.requires_grad for p in host.model.parameters()] == flags
    assert all(p.grad is None for p in host.model.parameters())
    assert not any("forward" in m.__dict__ for m in host.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_a_pass_that_fails_leaves_nothing_behind(host):
    with pytest.raises(IndexError):
        attribute(host, [Question((0, 10_000), 3)], [host.layout.site(2)], steps=2)
    assert not any("forward" in m.__dict__ for m in host.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_improbable_answers_keep_their_gradients_in_sixteen_bits(dtype):
    """p of 1e-9 has no gradient in half precision; log p has."""
    exact, made = fresh("llama"), fresh("llama")
    ids = exact.encode(PROMPT).ids
    with torch.no_grad():
        for model in (exact.model, made.model):
            model.lm_head.weight *= 40.0
        token = int(exact.forward(exact.batch([ids]))[0, -1].argmin())
        p = float(exact.forward(exact.batch([ids]))[0, -1].softmax(-1)[token])
    assert p < 1e-7
    made.model.to(dtype)
    place = exact.layout.site(1)
    wanted = attribute(exact, [Question(ids, token)], [place], steps=4)[place][0]
    found = attribute(made, [Question(ids, token)], [place], steps=4)[place][0]
    assert float(found @ wanted / found.norm() / wanted.norm()) > 0.9


def test_coarse_sets_hold_what_exceeds_a_share_of_the_best_over_all_layers():
    scores = {
        site(0, 3): torch.tensor([1.0, 0.2, 0.21]),
        site(1, 3): torch.tensor([-5.0, 0.19, 0.5]),
    }
    kept = coarse(scores, threshold=0.2)
    assert kept == {Neuron(0, 0): 1.0, Neuron(0, 2): pytest.approx(0.21), Neuron(1, 2): 0.5}
    assert set(coarse(scores, threshold=0.0)) == {*kept, Neuron(0, 1), Neuron(1, 1)}


def test_the_best_neuron_stands_alone_where_none_helps():
    scores = {site(0, 2): torch.tensor([-3.0, -2.0]), site(1, 2): torch.tensor([-1.0, -4.0])}
    assert coarse(scores, threshold=0.2) == {Neuron(1, 0): -1.0}
    assert coarse({site(0, 3): torch.tensor([-1.0, 0.0, 0.0])}, threshold=0.2) == {Neuron(0, 1): 0.0}


@pytest.mark.parametrize(
    ("scores", "words"), [([0.0, 0.0], "all attributions are 0"), ([1.0, float("nan")], "NaN")]
)
def test_attributions_that_say_nothing_are_refused(scores, words):
    with pytest.raises(HostError, match=words):
        coarse({site(0, 2): torch.tensor(scores)}, threshold=0.2)


def test_an_answers_tokens_add_up(host):
    sites = [host.layout.site(layer) for layer in range(3)]
    asked = questions(host, PROMPT, LONG)
    scores = attribute(host, asked, sites, steps=3)
    alone = coarse({s: scores[s].sum(0) for s in sites}, threshold=0.3)
    sets = coarse_sets(
        host, [PROMPT, "The rain fell. " + PROMPT], LONG, sites, steps=3, rule="right", threshold=0.3
    )
    assert len(sets) == 2 and set(sets[0]) == set(alone)
    for neuron, score in alone.items():
        assert sets[0][neuron] == pytest.approx(score, rel=1e-3)


A, B, C, D = (Neuron(0, i) for i in range(4))
SETS = [{A: 1.0, B: 2.0}, {A: 1.0, B: 2.0, C: 9.0}, {A: 1.0, C: 9.0}, {A: 1.0, D: 0.5}]  # votes 4, 2, 2, 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"share": 0.7}, [A]),  # more than 2.8 of 4
        ({"share": 0.5}, [A]),  # more than 2: two votes do not do
        ({"share": 0.49}, [A, C, B]),  # ties by mean score
        ({"share": 0.0}, [A, C, B, D]),
        ({"share": 0.7, "fewest": 2, "most": 5}, [A, C, B]),  # gives way once, not further
        ({"share": 0.0, "fewest": 2, "most": 3}, [A, C, B]),  # tightens once
        ({"share": 0.0, "fewest": 2, "most": 2}, [A, C]),  # no share gives two: cut
        ({"share": 0.7, "fewest": 9}, [A, C, B, D]),  # all there are
        ({"share": 0.99, "most": 1}, [A]),
    ],
)
def test_refinement_counts_votes(settings, expected):
    assert refine(SETS, **settings) == expected


def test_refinement_keeps_at_least_one():
    apart = [{A: 1.0}, {B: 3.0}, {C: 2.0}]
    assert refine(apart, share=0.9) == [B, C, A]  # nothing is shared: one vote must do
    assert refine(apart, share=0.9, most=1) == [B]
    assert refine([{A: 1.0}], share=0.7, fewest=2, most=5) == [A]


def test_shared_neurons_are_left_out_but_no_fact_goes_bare():
    chosen = [[A, B], [A, C], [A]]
    assert unshared(chosen, share=0.5) == [[B], [C], [A]]
    assert unshared(chosen, share=1.0) == chosen
    assert unshared([[A, B]], share=0.1) == [[A, B]]
