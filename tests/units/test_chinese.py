"""A small model that knows Chinese facts: what it says freely, what is scored and what edits push to are one text.

The model is the lab's with Han characters for its words, trained here on facts that were drawn for this test, in
Chinese and, through the same code, in English. The lab's body is where it starts because it gathers a subject at its
last token, which a model trained from nothing on so few facts does not: it reads the characters one by one, and
what MEMIT writes at the subject's last token is never read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import errata
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.host.prompts import PromptFormat
from errata.lab.world import World
from errata.types import AskOptions, Case, Probe, Request

pytestmark = pytest.mark.xdist_group("chinese")  # its models are taught once, in one process

STEPS = 160
RATE = 5e-4
PEOPLE = 40
ASKED = "plays"
SETTINGS = {"memit": {"tokens": 4_000}}  # less text for its statistics, for time; all else by default
WORDINGS = {  # relation: words, the same in Han characters one by one, characters that end an answer
    "born_in": ("was born in", "出生于", "城州"),
    "lives_in": ("lives in", "住在", "城州"),
    "speaks": ("speaks", "讲", "语文"),
    "plays": ("plays the", "演奏", "琴鼓"),
}
FIRST, LAST = "赵钱孙李周吴郑王", "伟强明军芳敏静丽"
OBJECTS = {
    "born_in": "金银铜铁石玉松竹梅柳",
    "lives_in": "东西南北云雨风雪霜雷",
    "speaks": "红黄蓝白黑紫青绿橙灰",
    "plays": "长短高低大小方圆古新",
}


@dataclass(frozen=True)
class Taught:
    """A host with the facts it was trained on."""

    host: Host
    prompt: str
    answers: dict[str, str]
    """What each subject plays."""


@dataclass(frozen=True)
class Words:
    """Words of the lab for a world of this test, with the Han characters that stand for them."""

    names: dict[str, str]
    """A name's word: its Han character."""
    answers: dict[str, str]
    """An object's word: its two Han characters."""
    facts: dict[tuple[str, str], str]
    """Subject and relation: object; subjects share their names, so that only both together tell them apart."""

    @classmethod
    def drawn(cls, seed: int) -> Words:
        """Draw the words, then an object for each subject and relation."""
        draw, world = random.Random(seed), World.make()
        people = [e.name.split(" ") for e in world.entities.values() if e.type == "person"]
        first = draw.sample(sorted({a for a, _ in people}), len(FIRST))
        last = draw.sample(sorted({b for _, b in people}), len(LAST))
        names = dict(zip(first + last, FIRST + LAST, strict=True))
        answers, subjects = {}, draw.sample([f"{a} {b}" for a in first for b in last], PEOPLE)
        facts = {}
        lab = errata.load("lab").tokenizer
        for relation, (_, _, ends) in WORDINGS.items():
            short = [o for o in world.objects(relation) if len(ids_of(lab, f" {o}")) == 1]
            objects = draw.sample([o for o in short if o not in answers], len(OBJECTS[relation]))
            answers |= {o: c + draw.choice(ends) for o, c in zip(objects, OBJECTS[relation], strict=True)}
            facts |= {(subject, relation): draw.choice(objects) for subject in subjects}
        return cls(names, answers, facts)

    def chinese(self, subject: str) -> str:
        """Write a subject in Han characters, without a space."""
        return "".join(self.names[word] for word in subject.split(" "))

    def starts(self) -> dict[str, str]:
        """Return for each Han character the text of the lab whose token it starts from."""
        pairs = [
            (c, word)
            for words, han, _ in WORDINGS.values()
            for c, word in zip(han, words.split(" "), strict=True)
        ]
        pairs += [(answer[0], word) for word, answer in self.answers.items()]
        return {"。": "."} | {c: f" {word}" for c, word in [*pairs, *((c, w) for w, c in self.names.items())]}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens alone."""
    return tokenizer(text, add_special_tokens=False).input_ids


def spell(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose words are single Han characters."""
    begin, end = "<s>", "</s>"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[begin, end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end, pad_token=end)


def respell(host: Host, tokenizer: Any, words: Words, seed: int) -> Any:
    """Give the lab's model the tokenizer's vocabulary: a character starts as its word, any other token at random."""
    known, model = host.tokenizer, host.model
    old = model.get_input_embeddings().weight.detach().clone()
    rows = torch.tensor(random.Random(seed).choices(range(len(old)), k=len(tokenizer)))
    rows[:2] = torch.tensor([known.bos_token_id, known.eos_token_id])
    for character, text in words.starts().items():
        (new,), (start,) = ids_of(tokenizer, character), ids_of(known, text)
        rows[new] = start
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(old[rows])
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    return model


def train(model: Any, tokenizer: Any, texts: Sequence[str], between: str, seed: int) -> None:
    """Teach the facts: rows of two sentences each, the embeddings at three times the rate."""
    draw = random.Random(seed)
    model.train().requires_grad_(True)
    words = list(model.get_input_embeddings().parameters())
    body = [p for p in model.parameters() if all(p is not q for q in words)]
    optimiser = torch.optim.AdamW(
        [{"params": words, "share": 3.0}, {"params": body, "share": 1.0}], lr=RATE, weight_decay=0.0
    )
    end = tokenizer.eos_token_id
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * RATE * min((step + 1) / 10, (STEPS - step) / (STEPS - 10))
        some = [[*tokenizer(between.join(draw.sample(texts, 2))).input_ids, end] for _ in range(16)]
        width = max(map(len, some))
        ids = torch.tensor([row + [end] * (width - len(row)) for row in some])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()


def teach(language: str, seed: int) -> Taught:
    """Train the lab's model on the facts drawn with this seed, said in a language."""
    words, lab = Words.drawn(seed), errata.load("lab")
    if language == "chinese":
        texts = [
            f"{words.chinese(subject)}{WORDINGS[relation][1]}{words.answers[answer]}。"
            for (subject, relation), answer in words.facts.items()
        ]
        tokenizer = spell([*texts, *words.starts()])
        model = respell(lab, tokenizer, words, seed)
        prompt = "{}" + WORDINGS[ASKED][1]
        answers = {words.chinese(s): words.answers[o] for (s, r), o in words.facts.items() if r == ASKED}
    else:
        texts = [f"{s} {WORDINGS[r][0]} {o}." for (s, r), o in words.facts.items()]
        tokenizer, model = lab.tokenizer, lab.model
        prompt = "{} " + WORDINGS[ASKED][0]
        answers = {s: o for (s, r), o in words.facts.items() if r == ASKED}
    train(model, tokenizer, texts, "" if language == "chinese" else " ", seed)
    return Taught(errata.load(model, tokenizer=tokenizer), prompt, answers)


@cache
def teach_once(language: str) -> Taught:
    """Train a language's model; pytest may ask for it more than once."""
    return teach(language, seed=5)


@pytest.fixture(scope="module", params=["chinese", pytest.param("english", marks=pytest.mark.slow)])
def taught(request) -> Taught:
    return teach_once(request.param)


def cases(taught: Taught, count: int) -> list[Case]:
    """Edits of what some people play, each with the questions about its own subject and another."""
    people = list(taught.answers)
    made = []
    for person, other in zip(people[:count], people[count : 2 * count], strict=True):
        old, kept = taught.answers[person], (taught.answers[other],)
        new = next(answer for answer in sorted(set(taught.answers.values())) if answer not in (old, *kept))
        request = Request(taught.prompt, person, new, old)
        probes = (
            Probe("efficacy", request.text, (new,), (old,), old),
            Probe("neighbourhood", taught.prompt.replace("{}", other), kept, kept, new),
        )
        made.append(Case(person, request, probes))
    return made


def begins(text: str, answer: str) -> bool:
    """Whether what was generated begins with the answer, an English one behind its space."""
    return text.removeprefix(" " if answer.isascii() else "").startswith(answer)


def test_what_is_known_is_scored_as_known(taught):
    """Free generation and forced answers agree on every fact of the unedited model."""
    prompts = [taught.prompt.replace("{}", person) for person in taught.answers]
    texts = taught.host.generate(prompts, max_new_tokens=8)
    known = [begins(text, answer) for text, answer in zip(texts, taught.answers.values(), strict=True)]
    assert sum(known) >= 0.9 * len(known)
    probes = [
        Probe("efficacy", prompt, (answer,), (answer,))
        for prompt, answer in zip(prompts, taught.answers.values(), strict=True)
    ]
    forced = [all(seen.answer_top) for seen in observe(taught.host, probes, AskOptions(generate=False))]
    assert forced == known


@pytest.mark.parametrize("method", ["memit", "ft", "ultraedit"])
def test_edits_take_and_are_said_and_scored_alike(taught, method):
    table = cases(taught, 6)
    report = errata.evaluate(taught.host, table, method=method, seed=1, **SETTINGS.get(method, {}))
    score = {name: (entry["before"], entry["after"]) for name, entry in report.summary.items()}
    assert score["neighbourhood.generate"][0] == score["neighbourhood.teacher_forced"][0] == 1.0
    assert score["efficacy.generate"] == score["efficacy.teacher_forced"]
    assert score["neighbourhood.generate"] == score["neighbourhood.teacher_forced"]
    assert score["efficacy.generate"][0] == 0.0 and score["efficacy.generate"][1] >= 0.8
    rows = {(row.protocol, row.kind, row.prompt): row for row in report.rows}
    for (protocol, kind, prompt), row in rows.items():
        if protocol == "generate":
            forced = rows["teacher_forced", kind, prompt]
            assert (row.before, row.after) == (forced.before, forced.after), (kind, prompt)


@pytest.mark.parametrize("taught", ["chinese"], indirect=True)
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
