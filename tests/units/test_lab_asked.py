"""The lab's text for models that answer prompts, and their tokenizers."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from errata.errors import ConfigError
from errata.host.build import BEGIN, END, MASK, new_model, new_tokenizer
from errata.lab.asked import ASKED, Asker, asked_batches
from errata.lab.text import Split, Writer
from errata.lab.world import default_world, sentence
from tests.models import TEXTS

ROWS = 16


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(Writer(default_world()))


def test_examples_keep_out_what_the_lab_keeps_out(asker):
    world = asker.world
    examples = asker.examples(9000, random.Random(0))
    shares = Counter(one.kind for one in examples)
    assert set(shares) == set(ASKED)
    assert all(shares[kind] == pytest.approx(9000 * share, abs=1) for kind, share in ASKED.items())
    ends = {one.prompt.partition(". ")[2] or one.prompt for one in examples} | {e.prompt for e in examples}
    held_out = {sentence(w, f.subject) for f in world.facts for w in world.relations[f.relation].held_out}
    never = {
        f"Question: {sentence(q, f.subject)}\nAnswer:"
        for f in world.facts
        if not Split.has_questions(f)
        for q in world.relations[f.relation].questions
    }
    apart = {
        sentence(w, subject)
        for subject, chain, _ in world.chain_facts()
        if not Split.in_training(subject, chain)
        for w in chain.phrasings
    }
    for kept_out in (held_out, never, apart):
        assert kept_out and not kept_out & ends


def test_every_fact_is_asked_before_one_is_asked_again(asker):
    world, facts = asker.world, asker.world.facts
    answers = {
        (sentence(wording, name), fact.object): fact
        for fact in facts
        for name in world.names(fact.subject)
        for wording in (*world.relations[fact.relation].phrasings, *world.relations[fact.relation].later)
    }
    asked = asker.statement(len(facts), random.Random(1))
    assert {answers[one.prompt, one.answer] for one in asked} == set(facts)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    kinds = ("causal_lm", "encoder_decoder", "masked_lm")
    return {kind: new_tokenizer(TEXTS, 400, kind=kind) for kind in kinds}


def test_tokenizers_of_all_kinds_share_a_vocabulary(tokenizers):
    causal, pairs, masked = (tokenizers[k] for k in ("causal_lm", "encoder_decoder", "masked_lm"))
    assert pairs.get_vocab() == causal.get_vocab()
    assert masked.get_vocab() == {**causal.get_vocab(), MASK: 400}
    inside = causal("The capital of Arvania is Tallow")["input_ids"]
    for made, frame in ((pairs, ("", END)), (masked, (BEGIN, END))):
        ids = made("Tallow")["input_ids"]
        first, last = (made.convert_tokens_to_ids(token) if token else None for token in frame)
        bare = ids[1:-1] if first is not None else ids[:-1]
        assert ids[-1] == last and ids[0] == (bare[0] if first is None else first)
        assert bare == inside[-len(bare) :], "a word has one token wherever it stands"
        assert made.decode(bare).strip() == "Tallow"
    with pytest.raises(ConfigError, match="causal_lm"):
        new_tokenizer(TEXTS, 400, kind="image_classifier")
    with pytest.raises(ConfigError, match="causal_lm"):
        new_model("bert", {}, seed=0, kind="sequence_classifier")


def test_an_encoder_decoder_is_given_prompts_and_writes_answers(asker, tokenizers):
    made = tokenizers["encoder_decoder"]
    batches, again = (
        asked_batches(asker, made, random.Random(2), steps=4, rows=ROWS, masked=False) for _ in range(2)
    )
    wanted = {(one.prompt, one.answer) for one in asker.examples(4 * ROWS, random.Random(2))}
    seen = set()
    for batch, same in zip(batches, again, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
        for ids, mask, labels in zip(
            *(batch[n] for n in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            assert ids[mask == 0].eq(made.pad_token_id).all() and labels[labels >= 0][-1] == made.eos_token_id
            texts = (ids[mask == 1], labels[labels >= 0])
            seen.add(tuple(made.decode(part, skip_special_tokens=True).removeprefix(" ") for part in texts))
    assert seen == wanted


def test_a_masked_model_is_given_answers_filled_from_the_left(asker, tokenizers):
    made = tokenizers["masked_lm"]
    batches = asked_batches(asker, made, random.Random(3), steps=8, rows=ROWS, masked=True)
    examples = {
        f" {one.prompt} {one.answer}{stop}": one
        for one in asker.examples(8 * ROWS, random.Random(3)) for stop in ("", ".")
    }  # fmt: skip
    partly = gaps = 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            hidden = labels >= 0
            assert hidden.any() and torch.equal(hidden, ids == made.mask_token_id)
            text = made.decode(torch.where(hidden, labels, ids), skip_special_tokens=True)
            one = examples[text]
            answer = made(one.answer)["input_ids"][1:-1]
            places = hidden.nonzero()[:, 0].tolist()
            tail = labels[places].tolist()
            if places == list(range(places[0], places[0] + len(tail))) and answer[-len(tail) :] == tail:
                partly += len(tail) < len(answer)
            else:
                gaps += 1
    assert partly and 0.05 < gaps / (8 * ROWS) < 0.25, "gaps anywhere in about 15 %"
