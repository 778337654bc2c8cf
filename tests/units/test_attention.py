"""An answer's probability, attributed to attention weights."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.errors import ConfigError, HostError
from errata.host.attention import attending
from errata.inspect import attention, facts
from tests.models import fresh

PROMPT, NAME = "The old Ada Brenner was born in", "Ada Brenner"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def host(request):
    return fresh(request.param)


def test_a_layers_edges_add_up_to_the_probability_less_that_without_them(host):
    found = attention.attribution(host, facts.fact(host, PROMPT, NAME), steps=60)
    sums = found.scores.flatten(1).sum(1)
    expected = found.clean - found.without
    assert torch.allclose(sums, expected, atol=0.02 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 1e-5


def test_weights_are_causal_and_add_up_to_one(host):
    found = attention.attribution(host, facts.fact(host, PROMPT, NAME), steps=2)
    length = len(found.fact.ids)
    assert torch.allclose(found.weights.sum(-1), torch.ones(3, 4, length), atol=1e-5)
    later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    assert not bool(found.scores[..., later].any())


def test_an_edge_is_the_weight_times_the_mean_gradient_by_it(host):
    """The gradient by one weight, from differences of the probability as that weight alone is changed."""
    fact = facts.fact(host, PROMPT, NAME)
    layer, head, query, key, step = 1, 2, len(fact.ids) - 1, 1, 0.02
    points = [(i + 0.5) / 4 for i in range(4)]
    found = attention.attribution(host, fact, steps=4)
    slopes = []
    for point in points:
        sides = []
        for side in (-step, step):

            def act(number, attended, point=point, side=side):
                if number != layer:
                    return None
                weights = attended.weights * point
                weights[:, head, query, key] += side
                return (weights @ attended.values).transpose(1, 2)

            with torch.no_grad(), attending(host, act):
                logits = host.forward(host.batch([fact.ids]), keep=1)[0, -1].double()
            sides.append(float(logits.softmax(-1)[fact.answer]))
        slopes.append((sides[1] - sides[0]) / (2 * step))
    expected = float(found.weights[layer, head, query, key]) * sum(slopes) / 4
    assert float(found.scores[layer, head, query, key]) == pytest.approx(expected, rel=0.03, abs=1e-7)


def test_the_model_is_left_as_it_was(host):
    before = host.model.config._attn_implementation
    rows = host.batch([host.encode_base(PROMPT)])
    with torch.no_grad():
        own = host.forward(rows, keep=1)
        with attending(host, lambda layer, attended: None):
            assert host.model.config._attn_implementation != before
            plain = host.forward(rows, keep=1)
        again = host.forward(rows, keep=1)
    assert torch.allclose(own, plain, atol=1e-5) and torch.equal(own, again)
    assert host.model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="stop"), attending(host, lambda layer, attended: None):
        raise RuntimeError("stop")
    assert host.model.config._attn_implementation == before


def test_what_cannot_be_attributed_is_refused(host):
    with pytest.raises(HostError, match="does not show its attention weights"):
        bloom = fresh("bloom")
        attention.attribution(bloom, facts.fact(bloom, PROMPT, NAME))
    with pytest.raises(ConfigError, match="steps"):
        attention.attribution(host, facts.fact(host, PROMPT, NAME), steps=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_is_no_other_attention(dtype):
    """Of an answer that is not certain, whose log probability rounding of the logits moves by more than a hundredth."""
    host = errata.load("lab", dtype=dtype)
    for answer in ("Tallow", "Rowanport"):
        found = attention.attribution(
            host, facts.fact(host, "Ada Brenner was born in", NAME, answer), steps=1
        )
        assert torch.isfinite(found.scores).all() and found.scores.abs().max() > 0


def test_other_attention_is_refused_in_any_precision(monkeypatch):
    plain = attention.attending

    def nothing(host, act):
        return plain(host, lambda layer, attended: (act(layer, attended), 0 * attended.output)[1])

    monkeypatch.setattr(attention, "attending", nothing)
    for dtype in ("float32", "bfloat16"):
        host = errata.load("lab", dtype=dtype)
        with pytest.raises(HostError, match=f"differs from the model's own .*{dtype}"):
            attention.attribution(host, facts.fact(host, "Ada Brenner was born in", NAME), steps=1)


def run(*words: str):
    return CliRunner().invoke(app, ["trace", *words], catch_exceptions=False)


def test_the_verb(tmp_path):
    prompt = "Ada Brenner was born in"
    picture = tmp_path / "reads.png"
    found = json.loads(run(prompt, "--subject", NAME, "--attention", "-o", str(picture), "--json").stdout)
    assert len(found["heads"]) == 6 and len(found["last"][0]) == len(found["tokens"])
    subject = [sum(row[at] for at in found["subject_tokens"]) for row in found["last"]]
    assert max(subject[3:5]) > 0.1 > max(subject[:2])  # where knockout sees the subject read
    assert found["edges"][0]["score"] != 0 and picture.read_bytes().startswith(b"\x89PNG")
    shown = run("lab:2:5", "--attention", "-o", str(tmp_path / "heads.svg"))
    assert "largest edge" in shown.output and "not known" in shown.output
    with pytest.raises(ConfigError, match="one at a time"):
        run(prompt, "--subject", NAME, "--attention", "--edges")
