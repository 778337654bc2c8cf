"""The prefix engine, when prefixes may be shared, and what tokenising and comparing weights once must not lose."""

import pytest
import torch

from errata.errors import RequestError
from errata.host import hooks, tokens
from errata.host.identity import content
from errata.host.kv_cache import FixedCache
from errata.host.prefix import (
    Prefix,
    PrefixRunner,
    agree,
    align,
    can_grow,
    can_reuse,
    keeps_attention_only,
    no_prefix,
)
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


# --- the engine ------------------------------------------------------------------------------

ROWS = [(0, 5, 6, 9, 30, 7), (0, 7, 8, 11)]
FAMILIES = ("gpt2", "llama", "bloom", "gptj", "opt", "falcon", "qwen3")


def wide_host(family):
    host = fresh(family)
    host.model.double()
    return host


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 2])
def test_what_is_left_behind_a_prefix_in_time_and_depth_ends_as_the_whole_does(family, depth):
    host = wide_host(family)
    assert can_reuse(host, 6)
    runner = PrefixRunner(host)
    with hooks.frozen(host.model), torch.no_grad():
        batch, column = align(host, ROWS, [2, 1], [0, 0])
        line = torch.tensor([0, 1])
        last = torch.tensor([column + 3, column + 2])
        whole = runner.run(batch, no_prefix(host, 2), at=(line, last), keep=[1], remember=range(3))
        states = whole.states[1][:, column:] if depth else None
        prefix = no_prefix(host, 2).followed_by(whole.key_values, batch, column).at_depth(depth, states)
        rest = runner.run(batch.columns(column), prefix, at=(line, last - column))
        torch.testing.assert_close(rest.logits, whole.logits, atol=1e-9, rtol=0)
        # and some rows of it alone, in another order, as the plain forward has them
        turned = runner.run(
            batch.columns(column).select(line.flip(0)), prefix.select(line.flip(0)),
            at=(line, last.flip(0) - column),
        )  # fmt: skip
        plain = torch.stack([host.forward(host.batch([row]))[0, -1] for row in ROWS[::-1]])
        torch.testing.assert_close(turned.logits, plain, atol=1e-9, rtol=0)


def test_rows_share_a_prefix_and_one_may_share_nothing():
    host, beginning = wide_host("llama"), ROWS[0][:3]
    runner = PrefixRunner(host)
    with hooks.frozen(host.model), torch.no_grad():
        batch, _ = align(host, [beginning], [3], [0])
        ran = runner.run(batch, no_prefix(host, 1), remember=range(3))
        shared = Prefix(batch.mask, FixedCache(ran.key_values)).with_empty(torch.tensor([0, 1, 0]))
        tails = [(9, 30, 7), (0, 7, 8, 11), (12, 13)]
        rest, _ = align(host, tails, [0, 0, 0], [3, 0, 3])
        at = torch.arange(3), torch.tensor([2, 3, 1])
        logits = runner.run(rest, shared, at=at).logits
        rows = [(*beginning, *tails[0]), tails[1], (*beginning, *tails[2])]
        plain = torch.stack([host.forward(host.batch([row]))[0, -1] for row in rows])
    torch.testing.assert_close(logits, plain, atol=1e-9, rtol=0)


def test_a_copy_of_a_prefix_grows_and_the_prefix_does_not():
    host = wide_host("gpt2")
    assert can_grow(host)
    runner = PrefixRunner(host)
    with torch.no_grad():
        prefix = runner.grow(host.batch([(0, 5, 6), (0, 7)], side="left")).prefix
        batch, _ = align(host, [(9,), (8,)], [0, 0], [3, 2], left=False)
        longer = runner.grow(batch, prefix.copy())
        again = runner.grow(batch, prefix.select(torch.tensor([0, 1])))
        plain = host.forward(host.batch([(0, 7, 8)]))[0, -1]
    assert prefix.length == 3 and longer.prefix.length == 4
    assert torch.equal(longer.logits, again.logits)
    torch.testing.assert_close(longer.logits[1, -1], plain, atol=1e-9, rtol=0)


def test_states_that_no_run_has_kept_are_refused():
    host = fresh("llama")
    batch, _ = align(host, ROWS, [0, 0], [0, 0], left=False)
    with pytest.raises(ValueError, match="an earlier run"):
        PrefixRunner(host).run(batch, no_prefix(host, 2).at_depth(1, torch.zeros(2, 6, 32)))
    assert not any("forward" in module.__dict__ for module in host.model.modules())


def test_a_row_longer_than_the_window_with_what_it_continues_is_refused():
    host = fresh("gpt2")
    with pytest.raises(RequestError, match="129 tokens is longer than the model's window of 128"):
        align(host, [(0, 5, 6)], [0], [126])


def test_rows_are_laid_out_with_positions_of_their_whole_texts():
    batch = tokens.lay_out([(5, 6), (7,)], [1, 2], offsets=[4, 0], fill=9, device="cpu")
    assert batch.ids.tolist() == [[9, 5, 6], [9, 9, 7]] and batch.mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert batch.positions.tolist() == [[0, 4, 5], [0, 0, 0]] and batch.offset.tolist() == [1, 2]
    right = tokens.lay_out([(5, 6), (7,)], [0, 0], offsets=[4, 2], fill=9, device="cpu")
    assert right.positions.tolist() == [[4, 5], [2, 2]], "padding stays inside the window"
    cut = batch.columns(1).select(torch.tensor([1]))
    assert cut.ids.tolist() == [[9, 7]] and cut.offset.tolist() == [1]
