"""When beginnings may be shared, and what tokenising and comparing weights once must not lose."""

import pytest
import torch

from errata.host import tokens
from errata.host.identity import content
from errata.host.prefixes import agree, keeps_attention_only
from tests.models import fresh


def test_kinds_of_layers_decide(monkeypatch):
    host = fresh("llama")
    assert keeps_attention_only(host)
    monkeypatch.setattr(
        host.model.config, "layer_types", ["full_attention", "linear_attention"], raising=False
    )
    assert not keeps_attention_only(host)
    monkeypatch.setattr(
        host.model.config, "layer_types", ["full_attention", "sliding_attention"], raising=False
    )
    assert keeps_attention_only(host)
    monkeypatch.setattr(host.model, "_is_stateful", True, raising=False)
    assert not keeps_attention_only(host)


def test_agreement_is_relative_and_as_fine_as_the_dtype():
    whole = torch.tensor([100.0, 1.0])
    assert agree(whole, whole + 0.09, torch.float32)
    assert not agree(whole, whole + 0.11, torch.float32)
    assert agree(whole, whole + 4.9, torch.bfloat16)
    assert not agree(whole, whole + 5.1, torch.float16)


@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is ", ""])
@pytest.mark.parametrize("join", ["auto", "space", "none"])
def test_a_host_tokenises_answers_as_the_plain_function_does(lab_host, prompt, join):
    host = lab_host.with_prompt_format(type(lab_host.prompt_format)(join=join))
    plain = tokens.encode_answer(lab_host.tokenizer, prompt, "Rome", join=join)
    assert host.encode_answer(prompt, "Rome") == plain


def test_a_prompt_with_several_answers_is_tokenised_once(monkeypatch):
    host, texts = fresh("gpt2"), []
    encode = tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda t, text, **o: (texts.append(text), encode(t, text, **o))[1])
    prompt = "The capital of France is"
    host.encode_prompt(prompt)
    for answer in ("Rome", "Paris", "Oslo"):
        host.encode_answer(prompt, answer)
    assert texts.count(prompt) == 1


@pytest.mark.parametrize("size", [1, 1024, 2**11 + 1, 2**12, 40_001, 2**17, 2**20 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contents_differ_after_any_small_change(size, dtype):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = content(tensor)
    assert content(tensor.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed.data[place] = 17
        assert content(changed) != before
    if size > 2:
        turned = tensor.flip(0)
        assert content(turned) != before
        swapped = tensor.clone()
        swapped[0], swapped[-1] = tensor[-1], tensor[0]
        assert content(swapped) != before
