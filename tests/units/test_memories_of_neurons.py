"""Feed-forward neurons: sub-updates, triggers, what values say."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ErrataError, HostError, RequestError
from errata.host import hooks
from errata.inspect import neurons
from errata.inspect.lens import Lens
from errata.inspect.neurons import Neuron, Triggers
from tests.models import fresh

PROMPT = "The old Ada Brenner was born in"
ROWS = [(5, 9, 30, 44, 7, 61), (12, 90, 8), (7, 8, 9, 10, 11), (100, 101)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gptj"])
def host(request):
    return fresh(request.param)


def test_the_sub_updates_add_up_to_the_feed_forward(host):
    ids = host.encode_base(PROMPT)
    for site, own in zip(neurons.sites(host), neurons.coefficients(host, ids), strict=True):
        module = host.model.get_submodule(site.name)
        outputs: list[torch.Tensor] = []
        with (
            torch.no_grad(),
            hooks.on_output(module, lambda t, into=outputs: into.append(t.reshape(-1, 32)[-1])),
        ):
            host.forward(host.batch([ids]))
        bias = 0 if getattr(module, "bias", None) is None else module.bias.detach()
        assert torch.allclose(host.weight(site) @ own + bias, outputs[0], atol=1e-5)


def test_the_dominant_ones_are_the_largest_and_their_effect_is_the_slope(host):
    found = neurons.dominant(host, PROMPT, count=1000, layers=[1])
    sizes = [one.size for one in found]
    assert sizes == sorted(sizes, reverse=True) and sum(one.share for one in found) == pytest.approx(
        1, abs=1e-4
    )
    assert (
        all(one.neuron.layer == 1 for one in found)
        and len({one.neuron for one in found}) == len(found) == host.layout.site(1).d_in
    )
    lens = Lens(host)
    state = lens.states([host.encode_base(PROMPT)])[0][-1, -1:]
    largest = max(found, key=lambda one: abs(one.effect))
    value = host.weight(host.layout.site(1))[:, largest.neuron.index]
    step = 0.01 * largest.coefficient * value
    with torch.no_grad():
        logits = [lens.read(lens.depth, state + side * step)[0] for side in (-1, 1)]
    token = int(lens.read(lens.depth, state).argmax())
    assert float(logits[1][token] - logits[0][token]) / 0.02 == pytest.approx(
        largest.effect, rel=0.05, abs=1e-4
    )


def test_streamed_triggers_are_those_of_a_full_sort(monkeypatch, host):
    monkeypatch.setattr(neurons, "tokens_batches", lambda rows: [[0, 2], [1], [3]])
    triggers = Triggers(host, [1], count=3)
    triggers.add(ROWS)
    site = host.layout.site(1)
    every: list[tuple[float, int, int]] = []
    for number, row in enumerate(ROWS):
        inputs: list[torch.Tensor] = []
        module = host.model.get_submodule(site.name)
        with (
            torch.no_grad(),
            hooks.on_input(module, lambda t, into=inputs: into.append(t.reshape(-1, site.d_in)[:, 4])),
        ):
            host.forward(host.batch([row]))
        every += [(float(v), number, at) for at, v in enumerate(inputs[0]) if at]
    for lowest in (False, True):
        expected = sorted(every, reverse=not lowest)[:3]
        found = [(t.value, t.row, t.position) for t in triggers.of(Neuron(1, 4), lowest=lowest)]
        assert [one[1:] for one in found] == [one[1:] for one in expected]
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-5)


def test_agreement_counts_what_follows():
    host = fresh("llama")
    triggers = Triggers(host, [0], count=1)
    triggers.add(ROWS)
    site = host.layout.site(0)
    says = (host.model.get_output_embeddings().weight @ host.weight(site)).argmax(0).tolist()
    pairs = []
    for index, said in enumerate(says):
        first = triggers.of(Neuron(0, index))[0]
        row = ROWS[first.row]
        if first.position + 1 < len(row):
            pairs.append(said == row[first.position + 1])
    assert triggers.agreement(ROWS)[0] == pytest.approx(sum(pairs) / len(pairs))


def test_a_planted_value_is_found():
    host = fresh("llama")
    head = host.model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        host.model.model.layers[2].mlp.down_proj.weight[:, 7] = 3 * head[123]
    assert neurons.promoting(host, 123, count=3)[0]["neuron"] == "2.7"
    described = neurons.describe(host, Neuron(2, 7), ROWS, count=2)
    assert described["promoted"][0] == host.tokenizer.decode([123]) and len(described["highest"]) == 2


def test_what_is_refused():
    host = fresh("llama")
    assert neurons.neuron(host, "2.79") == Neuron(2, 79)
    for text in ("3.0", "0.80", "0", "a.b", "-1.2"):
        with pytest.raises(RequestError, match="no neuron"):
            neurons.neuron(host, text)
    with pytest.raises(HostError, match="norm between"):
        neurons.dominant(fresh("gemma2"), PROMPT)


def run(*words: str):
    return CliRunner().invoke(app, ["neurons", *words], catch_exceptions=False)


def test_the_verb():
    found = json.loads(run("Ada Brenner was born in", "--count", "2", "--json").stdout)["dominant"]
    assert len(found) == 12 and found[-1]["neuron"].startswith("5.")
    assert "on the answer" in run("Ada Brenner was born in", "--layer", "5", "--answer", "Tallow").output
    assert "promotes:" in run("--show", found[-2]["neuron"], "--tokens", "600").output
    assert "values that promote" in run("--token", "violin").output
    assert "layer" in run("--agreement", "--tokens", "600").output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "found none"),
        (("x", "--token", "y"), "one of them"),
        (("--token", "y", "--layer", "1"), "go with a prompt"),
    ],
)
def test_what_the_verb_refuses(words, text):
    with pytest.raises(ErrataError, match=text):
        run(*words)
