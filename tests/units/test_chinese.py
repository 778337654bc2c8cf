"""A small model that knows Chinese facts: what it says freely, what is scored and what edits push to are one text."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import errata
from errata.host.load import Host
from errata.host.prompts import PromptFormat
from errata.types import Case, Probe, Request

STEPS = 300
PROMPT = "{}的首都是"


@dataclass(frozen=True)
class Taught:
    """A host with the facts it was trained on."""

    host: Host
    capitals: dict[str, str]


def spell(tokens: list[str], texts: list[str]):
    """A byte-level tokenizer whose words are single Han characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=tokens[0], eos_token=tokens[1], pad_token=tokens[1]
    )


@pytest.fixture(scope="module")
def taught() -> Taught:
    draw = random.Random(5)
    lands = [a + b for a in "东西南北中" for b in "海山林河原桥"]
    towns = [a + b for a in "金银铜铁" for b in "安宁康平"]
    capitals = {land: draw.choice(towns) for land in lands}
    wordings = ("{0}的首都是{1}。", "{0}首都叫{1}。", "{0}的都城，{1}。")
    texts = [wording.format(*fact) for fact in capitals.items() for wording in wordings]
    tokenizer = spell(["<s>", "</s>"], texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    rows = [tokenizer(text).input_ids for text in texts]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(STEPS):
        some = [
            [0, *(i for row in draw.sample(rows, draw.choice((1, 2, 3))) for i in row), 1] for _ in range(24)
        ]
        width = max(map(len, some))
        ids = torch.tensor([row + [1] * (width - len(row)) for row in some])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
    return Taught(errata.load(model.eval(), tokenizer=tokenizer), capitals)


def cases(taught: Taught, count: int) -> list[Case]:
    """Edits of some lands' capitals, each with the questions about its own and another land's."""
    lands = list(taught.capitals)
    made = []
    for land, other in zip(lands[:count], lands[count : 2 * count], strict=True):
        old, kept = taught.capitals[land], (taught.capitals[other],)
        new = next(town for town in sorted(set(taught.capitals.values())) if town not in (old, *kept))
        request = Request(PROMPT, land, new, old)
        probes = (
            Probe("efficacy", request.text, (new,), (old,), old),
            Probe("neighbourhood", PROMPT.replace("{}", other), kept, kept, new),
        )
        made.append(Case(land, request, probes))
    return made


def test_what_is_known_is_scored_as_known(taught):
    """Free generation and forced answers agree on every fact of the unedited model."""
    prompts = [PROMPT.replace("{}", land) for land in taught.capitals]
    texts = taught.host.generate(prompts, max_new_tokens=8)
    known = [text.startswith(town) for text, town in zip(texts, taught.capitals.values(), strict=True)]
    assert sum(known) >= 0.9 * len(known)
    probes = [
        Probe("efficacy", p, (town,), (town,))
        for p, town in zip(prompts, taught.capitals.values(), strict=True)
    ]
    from errata.evaluation.observe import observe

    forced = [all(seen.answer_top) for seen in observe(taught.host, probes, generate=False)]
    assert forced == known


@pytest.mark.parametrize("method", ["memit", "ft", "ultraedit"])
def test_edits_of_chinese_facts_are_said_and_scored_alike(taught, method):
    table = cases(taught, 6)
    report = errata.evaluate(taught.host, table, method=method, seed=1)
    score = {name: (entry["before"], entry["after"]) for name, entry in report.summary.items()}
    assert score["neighbourhood.generate"][0] == score["neighbourhood.teacher_forced"][0] == 1.0
    assert score["efficacy.generate"] == score["efficacy.teacher_forced"]
    assert score["neighbourhood.generate"] == score["neighbourhood.teacher_forced"]
    rows = {(row.protocol, row.kind, row.prompt): row for row in report.rows}
    for (protocol, kind, prompt), row in rows.items():
        if protocol == "generate":
            forced = rows["teacher_forced", kind, prompt]
            assert (row.before, row.after) == (forced.before, forced.after), (kind, prompt)
    if method == "ft":
        assert score["efficacy.generate"] == (0.0, 1.0)


def test_an_edit_pushes_to_the_text_that_is_said(taught):
    (case, *_) = cases(taught, 1)
    edit = errata.edit(taught.host, case.request, method="ft", seed=1)
    with edit.on(taught.host):
        text = taught.host.generate(case.request.text, max_new_tokens=8)
    new = case.request.target
    assert text.startswith(new) and not text.startswith(" ")
    spaced = errata.edit(taught.host, case.request, method="ft", seed=1, join="space")
    assert spaced.provenance.prompt_format["join"] == "space"
    view = taught.host.with_prompt_format(PromptFormat(join="space"))
    for host, between in ((taught.host, ""), (view, " ")):
        made = host.encode_answer(case.request.text, new)
        assert host.tokenizer.decode(made.ids, skip_special_tokens=True) == case.request.text + between + new
