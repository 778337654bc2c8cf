"""Every promised family: layout by structure, one ROME edit through its whole life, padding, batching."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.evaluation.observe import observe
from errata.host import hooks
from errata.locate.keys import capture, subject_place
from errata.types import AskOptions, Case, Probe
from tests.models import FAMILIES, fresh, tokenizer

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")

EXPECTED = {
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "gptj": ("mlp.fc_out", "attn.out_proj"),
    "gpt_neox": ("mlp.dense_4h_to_h", "attention.dense"),
    "opt": ("fc2", "self_attn.out_proj"),
    "bloom": ("mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon": ("mlp.dense_4h_to_h", "self_attention.dense"),
}
LLAMA_LIKE = ("mlp.down_proj", "self_attn.o_proj")
SHORT = AskOptions(max_new_tokens=4)
"""Where an answer's text is not the point: random models do not end theirs."""


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    return fresh(request.param)


def test_layout_finds_the_projections(host):
    mlp, attn = EXPECTED.get(host.family, LLAMA_LIKE)
    assert len(host.layout.blocks) == 3
    for layer in range(3):
        assert host.layout.site(layer).name == f"{host.layout.blocks[layer]}.{mlp}"
        assert host.layout.site(layer, "attn_out").name == f"{host.layout.blocks[layer]}.{attn}"
    assert host.layout.width == host.layout.site(0).d_out == 32
    assert host.layout.site(0).transposed == (host.family == "gpt2")
    assert host.layout.adds_directly == (host.family not in ("gemma2", "gemma3_text", "olmo2"))


def test_a_weight_change_acts_as_the_layout_says(host):
    """Adding delta to the weight adds delta @ key to the site's output, and nothing before it."""
    site = host.layout.site(1)
    place = subject_place(host, REQUEST)
    before = capture(host, [place], [site])
    delta = torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(1)) * 0.1
    weight = host.model.get_parameter(site.parameter)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += delta.mT if site.transposed else delta
        after = capture(host, [place], [site])
        weight.copy_(kept)
    expected = before.values[site] + before.keys[site] @ delta.mT
    torch.testing.assert_close(after.values[site], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.keys[site], before.keys[site])


def test_rome_edit_through_its_life(host, tmp_path):
    start = host.weights_hash()
    edit = errata.edit(host, REQUEST, method="rome", steps=3, contexts=[2], context_tokens=[4], tokens=400)
    assert host.weights_hash() == start
    site = host.layout.site(edit.provenance.config["layers"][0])
    assert list(edit.deltas) == [site.parameter]
    before = observe(host, [_probe()], SHORT)[0]
    edit.apply_(host)
    assert host.weights_hash() != start
    inside = observe(host, [_probe()], SHORT)[0]
    edit.revert_(host)
    assert host.weights_hash() == start
    loaded = errata.Edit.load(edit.save(tmp_path / "one.safetensors"))
    with loaded.on(host):
        again = observe(host, [_probe()], SHORT)[0]
    assert again == inside
    assert observe(host, [_probe()], SHORT)[0] == before
    assert inside.answer_logprobs != before.answer_logprobs
    assert host.weights_hash() == start
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def _probe():
    return errata.Probe("efficacy", REQUEST.text, ("Merrin",), ("Esk",), "Esk")


def test_padding_side_does_not_change_scores(host):
    rows = [host.encode(t).ids for t in ("Ada Brenner was born in Tallow", "Bruno", "The old road was")]
    ends = []
    for side in ("left", "right"):
        batch = host.batch(rows, side=side)
        logits = host.forward(batch).detach()
        ends.append([logits[i, int(batch.offset[i]) + len(row) - 1] for i, row in enumerate(rows)])
    for left, right in zip(*ends, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=0)


def test_batch_of_one_and_sixteen_give_the_same_scores(host):
    names = ["Ada Brenner", "Bruno Holner", "Ada", "Éric"]
    probes = [
        errata.Probe("neighbourhood", f"{name} {verb}", ("Tallow",), ("Tallow",), "the cello")
        for name in names
        for verb in ("was born in", "lives in", "said that the old road of the small dog was", "is")
    ]
    together = observe(host, probes, SHORT)
    for probe, seen in zip(probes, together, strict=True):
        alone = observe(host, [probe], SHORT)[0]
        torch.testing.assert_close(
            torch.tensor(alone.answer_logprobs), torch.tensor(seen.answer_logprobs), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor(alone.rival_logprobs), torch.tensor(seen.rival_logprobs), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(alone.next_logprobs, seen.next_logprobs, atol=1e-4, rtol=0)


def test_frozen_blocks_give_the_same_forward(host):
    """Answering for the lower blocks from memory changes nothing above them."""
    batch = host.batch([host.encode("Ada Brenner was born in Tallow").ids])
    blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
    outputs = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in blocks[:2]]
    with torch.no_grad():
        plain = host.forward(batch)
        for handle in handles:
            handle.remove()
        with hooks.answer_with(dict(zip(blocks[:2], outputs, strict=True))):
            again = host.forward(batch)
        after = host.forward(batch)
    torch.testing.assert_close(plain, again, atol=0, rtol=0)
    torch.testing.assert_close(plain, after, atol=0, rtol=0)


def test_a_language_model_inside_a_larger_one_is_read_and_edited():
    """Its configuration stands one level down; window, vocabulary and layers are those of the language model."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tok = tokenizer()
    text = Gemma3TextConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64, max_position_embeddings=128,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    both = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    host = errata.load(Gemma3ForConditionalGeneration(both).eval(), tok)
    assert host.window == 128 and host.vocab_size == len(tok) and len(host.layout.blocks) == 4
    request = errata.Request("{} was born in", "Ada", "Esk", "Merrin")
    case = Case("c", request, (Probe("efficacy", request.text, ("Esk",), ("Merrin",), "Merrin"),))
    report = errata.evaluate(host, [case], method="ft", steps=60, epsilon=None)
    assert report.summary["efficacy.teacher_forced"]["after"] == 1.0 and report.meta["weights_restored"]
