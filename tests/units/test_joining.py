"""Rows that join others under way: each says what it says alone, with its own edits, in every kind of cache."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import errata
from errata.host import decoding, passes, placed
from errata.host.generation_settings import end_tokens
from tests.models import fresh
from tests.units.test_edits import make as weights
from tests.units.test_memory import make as memory

PROMPTS = [
    "Ada Brenner was born in",
    "Bruno",
    "Esk was born in",
    "The capital of Arvania is Tallow. Merrin is",
]
FAMILIES = {
    "llama": {}, "gpt2": {}, "gpt_neox": {}, "gemma2": {"sliding_window": 8, "max_position_embeddings": 128},
}  # fmt: skip
TOKENS = 7


class Batch:
    """Rows as a server continues them."""

    def __init__(self, host):
        self.host, self.parts = host, []
        self.new: dict[int, list[int]] = {}
        self.ends = end_tokens(host)

    def join(self, names, prompts, sets):
        framed = []
        for prompt, own in zip(prompts, sets, strict=True):
            with passes.belonging(own):
                framed.append(self.host.frame(prompt, number=own))
        rows = [self.host.encode_framed(one) for one in framed]
        prefixes = decoding.run_prefixes(self.host, rows, placed.number_rows(sets))
        part = [list(names), decoding.DecodingRows(self.host, prefixes, range(len(rows)))]
        self.new |= {
            name: [int(token)] for name, token in zip(names, prefixes.logits.argmax(-1), strict=True)
        }
        for other in self.parts:
            if other[1].can_join(part[1]):
                other[0] += part[0]
                other[1].join(part[1])
                return
        self.parts.append(part)

    def step(self):
        for part in self.parts:
            going = [
                k for k, name in enumerate(part[0])
                if len(self.new[name]) < TOKENS and self.new[name][-1] not in self.ends
            ]  # fmt: skip
            part[0] = [part[0][k] for k in going]
            if going:
                logits = part[1].step(going, [self.new[name][-1] for name in part[0]])
                for name, token in zip(part[0], logits.argmax(-1), strict=True):
                    self.new[name].append(int(token))
        self.parts = [part for part in self.parts if part[0]]

    def texts(self):
        return {name: self.host.decode([ids])[0] for name, ids in self.new.items()}


def edits_of(host):
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    return {
        "weight": weights(host, 1, scale=3.0), "memory": memory(host, prompts=PROMPTS, seed=1),
        "prompt": errata.edit(host, request, method="in_prompt"),
    }  # fmt: skip


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_rows_that_join_later_are_as_alone(family, cached):
    host = fresh(family, **FAMILIES[family])
    if not cached:
        host.__dict__["continues"] = False
    edits = edits_of(host)
    sets = [(), ("weight",), ("memory",), ("prompt",), ("weight", "memory"), ("weight", "prompt", "memory")]
    asked = [(names, prompt) for names in sets for prompt in PROMPTS]
    alone = {}
    for names, prompt in asked:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(edits[name].on(host, merge=False if name == "weight" else None))
            alone[names, prompt] = host.generate(prompt, max_new_tokens=TOKENS, natural_stop=False)
    with ExitStack() as stack:
        number = {}
        for name, edit in edits.items():
            stack.enter_context(edit.on(host, rows=name))
            number[name] = placed.on(host.model).sets[name]
        batch = Batch(host)
        for first in range(0, len(asked), 5):  # a few more between any two steps
            some = asked[first : first + 5]
            batch.join(
                some, [prompt for _, prompt in some], [[number[n] for n in names] for names, _ in some]
            )
            batch.step()
        while batch.parts:
            batch.step()
    assert batch.texts() == alone
    assert len({alone[names, PROMPTS[0]] for names in sets}) >= 4 and not host.placed


def test_windows_of_attention_are_not_joined_and_padding_of_all_rows_is_left_out():
    sliding = fresh("gemma2", **FAMILIES["gemma2"])
    rows = [sliding.encode_prompt(prompt) for prompt in PROMPTS]
    first, second = (
        decoding.DecodingRows(sliding, decoding.run_prefixes(sliding, part), range(len(part)))
        for part in (rows[:1], rows[1:])
    )
    assert not first.can_join(second)
    host = fresh("llama")
    long, short, more = (
        decoding.DecodingRows(host, decoding.run_prefixes(host, [row]), [0])
        for row in (rows[3], rows[1], rows[1])
    )
    long.join(short)
    assert long.prefix.length == len(rows[3]) and long.prefix.mask.sum(1).tolist() == [
        len(rows[3]),
        len(rows[1]),
    ]
    with torch.no_grad():
        long.step([1], [5])  # the long row leaves
    long.join(more)
    assert long.prefix.length == len(rows[1]) + 1


def test_a_row_may_belong_to_several_sets():
    host = fresh("llama")
    edits = edits_of(host)

    def say(**more):
        return host.generate(PROMPTS[:1], max_new_tokens=TOKENS, natural_stop=False, **more)

    with edits["weight"].on(host, merge=False), edits["memory"].on(host):
        both = say()
    with edits["weight"].on(host, rows="a"), edits["memory"].on(host, rows="b"):
        one = [say(sets=[names])[0] for names in ("a", ("b",), ("a", "b"), None)]
    assert one[2] == both[0] and len(set(one)) == 4
