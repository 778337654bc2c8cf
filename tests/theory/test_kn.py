"""Knowledge neurons on float64 hosts: integrated gradients add up, and edits of columns are what they say."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

import errata
from errata.errors import ConfigError
from errata.host.prefix import can_reuse
from errata.locate.neurons import Question, attribute, questions
from tests.models import fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin", "Tallow")
OTHER = errata.Request("The capital of {} is", "Arvania", "Esk")
EXACT = ("gpt2", "falcon")


def double(family: str):
    """A float64 host with weights wide enough that probabilities bend along the path."""
    host = fresh(family, initializer_range=0.15)
    host.model.double()
    return host


def slack(host) -> float:
    """Rounding to expect, relative: most families compute norms or attention in float32 whatever the dtype."""
    return 1e-9 if host.family in EXACT else 1e-5


def fit(host, requests, **settings):
    # Gemma 2 in float64 cannot write prefixes: its attention overflows float32 in padded rows
    contexts = 0 if host.family == "gemma2" else 2
    fast = {"steps": 3, "contexts": contexts, "context_tokens": 4}
    return errata.edit(host, requests, method="kn", **{**fast, **settings})


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def host(request):
    return double(request.param)


def scaled(value: torch.Tensor, factor, index=slice(None)) -> torch.Tensor:
    changed = value.clone()
    changed[..., index] = changed[..., index] * factor
    return changed


@contextmanager
def site_input(host, layer: int, change):
    """Let a projection see another input; written apart from the library's hooks."""
    module = host.model.get_submodule(host.layout.site(layer).name)
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def logits(host, ids) -> torch.Tensor:
    return host.forward(host.batch([ids]))[0]


def probability(host, question: Question, layer: int, factor) -> torch.Tensor:
    """p(token) with a layer's neurons scaled by a factor at the last position."""

    def change(value):
        return torch.cat([value[:, :-1], value[:, -1:] * factor], dim=1)

    with site_input(host, layer, change):
        return logits(host, question.ids)[-1].softmax(-1)[question.token]


def slope(host, question: Question, layer: int, at: float) -> float:
    factor = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(probability(host, question, layer, factor), factor)[0])


# --- attribution ----------------------------------------------------------------------------


def error(host, question: Question, layer: int, steps: int, rule) -> float:
    """What attributions of a layer add up to, less what its neurons give."""
    with torch.no_grad():
        gained = probability(host, question, layer, 1.0) - probability(host, question, layer, 0.0)
    site = host.layout.site(layer)
    return float(attribute(host, [question], [site], steps=steps, rule=rule)[site].sum() - gained)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [0, 2])
def test_attributions_of_a_layer_add_up_to_what_it_gives(family, layer):
    """The sum tends to p(w) - p(0); a Riemann sum of f' misses by (f'(1) - f'(0)) / 2T + O(1/T^2)."""
    host = double(family)
    question = questions(host, REQUEST.text, REQUEST.target)[0]
    bend = slope(host, question, layer, 1.0) - slope(host, question, layer, 0.0)
    assert abs(bend) > 1e-5, "the path is straight: this would show nothing"
    assert error(host, question, layer, 200, "right") == pytest.approx(bend / 400, rel=0.02)
    assert error(host, question, layer, 200, "left") == pytest.approx(-bend / 400, rel=0.02)
    assert error(host, question, layer, 20, "right") == pytest.approx(bend / 40, rel=0.2)
    assert abs(error(host, question, layer, 200, "midpoint")) < abs(bend) / 200**2


@pytest.mark.parametrize("layer", [0, 2])
def test_behind_a_norm_attributions_add_up_slowly(layer):
    """A norm undoes the scaling until near zero, where all of the path's change lies."""
    host = double("gemma2")
    question = questions(host, REQUEST.text, REQUEST.target)[0]
    with torch.no_grad():
        gained = probability(host, question, layer, 1.0) - probability(host, question, layer, 0.0)
    assert abs(error(host, question, layer, 20, "right")) > 0.5 * abs(float(gained))
    assert abs(error(host, question, layer, 1600, "midpoint")) < 0.05 * abs(float(gained))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj", "bloom", "falcon"])
def test_frozen_lower_states_give_the_gradients_of_the_whole_model(family):
    """Against autograd through full forward passes, one point at a time, texts unpadded."""
    host = double(family)
    asked = [*questions(host, REQUEST.text, "Marmelundsen"), *questions(host, OTHER.text, OTHER.target)]
    assert len({len(q.ids) for q in asked}) > 1, "needs texts of several lengths"
    sites = [host.layout.site(layer) for layer in range(3)]
    found = attribute(host, asked, sites, steps=3)
    for site in sites:
        for i, question in enumerate(asked):
            seen: list[torch.Tensor] = []

            def look(value, seen=seen):
                seen.append(value.detach()[0, -1].clone())
                return value

            with site_input(host, site.layer, look):
                logits(host, question.ids)
            key = seen[0]
            total = torch.zeros_like(key)
            for k in (1, 2, 3):
                point = (k / 3 * key).requires_grad_(True)

                def put(value, point=point):
                    return torch.cat([value[:, :-1], point[None, None]], dim=1)

                with site_input(host, site.layer, put):
                    p = logits(host, question.ids)[-1].softmax(-1)[question.token]
                total += torch.autograd.grad(p, point)[0]
            assert float(total.abs().max()) > 0
            wanted = key * total / 3
            allowed = slack(host) * float(wanted.abs().max())
            torch.testing.assert_close(found[site][i], wanted, rtol=0, atol=allowed)


def test_only_the_last_token_runs_again_and_only_above_the_site(host):
    asked = questions(host, REQUEST.text, REQUEST.target)
    assert can_reuse(
        host, max(len(question.ids) for question in asked)
    )  # tried out before anything is counted
    ran = dict.fromkeys(range(3), 0)

    def count(layer):
        def look(value):
            ran[layer] += value.numel() // host.layout.site(layer).d_in  # tokens, padding included
            return value

        return look

    steps = 7
    whole = len(asked) * max(len(question.ids) for question in asked)
    with site_input(host, 0, count(0)), site_input(host, 1, count(1)), site_input(host, 2, count(2)):
        attribute(host, asked, [host.layout.site(1)], steps=steps)
    again = steps * len(asked)
    assert ran == {0: whole, 1: whole + again, 2: whole + again}


# --- operations -----------------------------------------------------------------------------


def neurons(edit) -> list[tuple[int, int]]:
    return sorted({tuple(n) for one in edit.provenance.notes["neurons"] for n in one})


def columns(host, layer: int) -> torch.Tensor:
    """The projection's weight as [d_out, d_in]."""
    site = host.layout.site(layer)
    weight = host.model.get_parameter(site.parameter).detach().clone()
    return weight.mT if site.transposed else weight


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"operation": "suppress"}, 0.0),
        ({"operation": "erase"}, 0.0),
        ({"operation": "amplify"}, 2.0),
        ({"operation": "amplify", "factor": 3.5}, 3.5),
    ],
)
def test_edits_of_columns_equal_edits_of_activations(host, settings, factor):
    """Suppress is activation 0 and amplify its multiple, at every position of another text too."""
    edit = fit(host, [REQUEST, OTHER], **settings)
    text = host.encode("The rain fell on the old road. Ada Brenner was born in").ids
    before = logits(host, text)
    with edit.on(host):
        edited = logits(host, text)
    by_layer: dict[int, list[int]] = {}
    for layer, index in neurons(edit):
        by_layer.setdefault(layer, []).append(index)
    stack = [site_input(host, n, lambda v, i=i: scaled(v, factor, i)) for n, i in by_layer.items()]
    for one in stack:
        one.__enter__()
    forced = logits(host, text)
    for one in stack:
        one.__exit__(None, None, None)
    moved = float((edited - before).abs().max().detach())
    assert moved > 1e-3
    torch.testing.assert_close(edited, forced, rtol=0, atol=slack(host) * moved)


@pytest.mark.parametrize("scale", ["column", "plain"])
@pytest.mark.parametrize("signed", [True, False])
def test_update_moves_its_columns_by_its_vectors_and_nothing_else(host, scale, signed):
    edit = fit(host, REQUEST, scale=scale, signed=signed, lambda_old=0.5, lambda_new=3.0)
    old, new = (host.encode_answer(REQUEST.text, a) for a in (REQUEST.target_old, REQUEST.target))
    head = host.model.get_output_embeddings().weight.detach()
    minus, plus = head[list(old.target)].sum(0), head[list(new.target)].sum(0)
    if scale == "column":
        minus, plus = minus / minus.norm(), plus / plus.norm()
    keys: dict[int, torch.Tensor] = {}

    def look(layer):
        def keep(value):
            keys[layer] = value[0, -1]
            return value

        return keep

    for layer in range(3):
        with torch.no_grad(), site_input(host, layer, look(layer)):
            logits(host, old.ids[: old.start])
    before = {layer: columns(host, layer) for layer in range(3)}
    with edit.on(host):
        after = {layer: columns(host, layer) for layer in range(3)}
    chosen = neurons(edit)
    assert 2 <= len(chosen) <= 5
    if signed:
        assert any(keys[n][i] < 0 for n, i in all_neurons(host, keys)), "needs negative neurons about"
    for layer in range(3):
        expected = before[layer].clone()
        for index in (i for n, i in chosen if n == layer):
            unit = before[layer][:, index].norm() if scale == "column" else 1.0
            sign = -1.0 if signed and keys[layer][index] < 0 else 1.0
            expected[:, index] += sign * unit * (3.0 * plus - 0.5 * minus)
        torch.testing.assert_close(after[layer], expected, rtol=1e-12, atol=1e-12)
        untouched = [i for i in range(expected.shape[1]) if (layer, i) not in chosen]
        assert torch.equal(after[layer][:, untouched], before[layer][:, untouched])


def all_neurons(host, keys):
    return [(n, i) for n, key in keys.items() for i in range(len(key))]


def test_signed_updates_push_towards_the_new_answer():
    """A neuron's column moves so that what it writes at the prompt turns to the new embedding."""
    host = double("llama")
    edit = fit(host, REQUEST, lambda_old=0.0, fewest=20, most=40)
    answer = host.encode_answer(REQUEST.text, REQUEST.target)
    plus = host.model.get_output_embeddings().weight.detach()[list(answer.target)].sum(0)
    negative = 0
    for name, delta in edit.deltas.items():
        seen = []
        handle = host.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0, -1].detach())
        )
        logits(host, answer.ids[: answer.start])
        handle.remove()
        key = seen[0]
        for index in delta.A.argmax(1).tolist():
            negative += bool(key[index] < 0)
            alone = torch.zeros_like(key)
            alone[index] = key[index]
            assert float(delta.dense() @ alone @ plus) > 0
    assert negative, "no chosen neuron is negative: this would show nothing"


def test_a_tied_host_and_an_untied_one_use_the_output_embedding():
    tied, untied = double("gpt2"), double("llama")
    assert torch.equal(*(e().weight for e in embeddings(tied)))
    assert not torch.equal(*(e().weight for e in embeddings(untied)))
    edit = fit(untied, REQUEST, lambda_old=0.0, scale="plain", signed=False)
    token = untied.encode_answer(REQUEST.text, REQUEST.target).target
    row = untied.model.get_output_embeddings().weight.detach()[list(token)].sum(0)
    for delta in edit.deltas.values():
        for column in delta.B.mT:
            torch.testing.assert_close(column, 8.0 * row, rtol=1e-12, atol=0)


def embeddings(host):
    return host.model.get_input_embeddings, host.model.get_output_embeddings


def test_erasing_with_the_unknown_token_puts_its_embedding_there(host):
    with pytest.raises(ConfigError, match="unknown token"):
        fit(host, REQUEST, operation="erase", erase="unknown")
    named = errata.host.host.Host(host.model, copy.deepcopy(host.tokenizer), name=host.name)
    named.tokenizer.unk_token = "<|end|>"
    row = host.model.get_output_embeddings().weight.detach()[1]
    for scale in ("plain", "column"):
        edit = fit(named, REQUEST, operation="erase", erase="unknown", scale=scale)
        old = {layer: columns(host, layer) for layer in range(3)}
        with edit.on(named):
            for layer, index in neurons(edit):
                size = old[layer][:, index].norm() / row.norm() if scale == "column" else 1.0
                torch.testing.assert_close(columns(named, layer)[:, index], size * row)


def test_several_requests_are_the_sum_of_their_updates(host):
    """Also where they share neurons: two targets for one prompt have the same old answer."""
    rival = errata.Request(REQUEST.prompt, REQUEST.subject, "Esk", REQUEST.target_old)
    requests = [REQUEST, rival, OTHER]
    together = fit(host, requests)
    alone = [fit(host, r) for r in requests]
    assert neurons(alone[0]) == neurons(alone[1])
    for name, delta in together.deltas.items():
        parts = sum(e.deltas[name].dense() for e in alone if name in e.deltas)
        torch.testing.assert_close(delta.dense(), parts, rtol=1e-12, atol=1e-14)
        assert delta.rank == len({int(i) for i in delta.A.argmax(1)})
    assert set(together.deltas) == {name for e in alone for name in e.deltas}


def test_what_is_said_now_stands_in_for_an_unknown_old_answer(host):
    """With no new answer written, what goes is the embedding of the host's own next tokens."""
    plain = errata.Request(REQUEST.prompt, REQUEST.subject, REQUEST.target)
    silent = fit(host, plain, lambda_new=0.0, scale="plain", signed=False)
    ids = list(host.encode(REQUEST.text).ids)
    row = torch.zeros(host.layout.width, dtype=torch.float64)
    for _ in host.encode_answer(REQUEST.text, REQUEST.target).target:
        ids.append(int(logits(host, ids)[-1].argmax()))
        row -= host.model.get_output_embeddings().weight.detach()[ids[-1]]
    for delta in silent.deltas.values():
        for column in delta.B.mT:
            torch.testing.assert_close(column, row, rtol=1e-10, atol=1e-12)


def test_one_update_after_another_does_not_compound(host):
    """The unit is the unedited column, also where an update already made it long."""
    bare = {layer: columns(host, layer) for layer in range(3)}
    first = fit(host, REQUEST, lambda_old=0.0)
    with first.on(host):
        second = fit(host, REQUEST, lambda_old=0.0)
        for layer, index in neurons(second):
            delta = second.deltas[host.layout.site(layer).parameter].dense()
            size = float(bare[layer][:, index].norm())
            assert float(delta[:, index].norm()) == pytest.approx(8 * size, rel=1e-10)
        assert any(
            float(columns(host, n)[:, i].norm()) > 5 * float(bare[n][:, i].norm()) for n, i in neurons(first)
        )


def test_layers_confine_the_search(host):
    edit = fit(host, REQUEST, layers=[1], most=None, fewest=None)
    assert {layer for layer, _ in neurons(edit)} == {1}


def test_settings_out_of_range_are_named_together(host):
    with pytest.raises(ConfigError) as caught:
        errata.edit(host, REQUEST, method="kn", steps=0, threshold=1.0, lambda_new=-1.0, fewest=6, factor=1.0)
    for word in ("steps", "threshold", "lambda_new", "fewest", "factor"):
        assert word in str(caught.value)
