"""LTE: what the aligned model is trained on, and that it answers behind the nearest facts, as a change of the host."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import errata
from errata.edits.edit import Provenance
from errata.edits.model import ModelEdit, behind_context
from errata.edits.routers.always import Always
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError, EditError
from errata.host.beside import start_factors
from errata.host.embedding import embed
from errata.host.replica import configuration, model_beside, weights_of
from errata.methods import _other_model as other_model
from errata.methods.lte import Config, _lines, _rows
from errata.training.examples import Example
from errata.training.tune import lay_out
from errata.training.whole import WholeTraining, held_out_loss, train_model
from tests.contract.test_methods import EXAMPLES
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", "Esk")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
CARA = errata.Request("{} lives in", "Cara Ost", "Esk")
FACTS = ["Ada Brenner was born in Merrin.", "Bruno Holner plays the harp.", "Cara Ost lives in Esk."]
SOME = [
    Example(
        ADA,
        ((ADA.text, "Merrin"), ("Ada Brenner is from", "Merrin")),
        ("Ivo was born in", "Ada Brenner plays"),
    ),
    Example(BRUNO, ((BRUNO.text, "harp"),), ()),
    Example(CARA, ((CARA.text, "Esk"),), ("Ivo lives in",)),
]
PROMPTS = ["Ada Brenner was born in", "The capital of Arvania is", "Bruno Holner"]


def parallel(texts=(), **settings):
    host, config = fresh("llama"), Config(**settings)
    return config, _rows(host, SOME, texts, config, random.Random(1))


def test_every_prompt_is_behind_facts_and_without_and_only_in_scope_has_the_new_answer():
    _, rows = parallel(alone=1.0)
    behind = {(row.context, row.prompt): row.answer for row in rows if row.context}
    for example, fact in zip(SOME, FACTS, strict=True):
        context = f"[Updated Information]:\n{fact}\n\n[Query]:\n"
        assert {p: a for (c, p), a in behind.items() if c == context} == {
            **dict(example.inside), **dict.fromkeys(example.outside)
        }  # fmt: skip
    bare = [row for row in rows if not row.context]
    assert [row.answer for row in bare] == [None] * len(bare)
    assert sorted(row.prompt for row in bare) == sorted(prompt for _, prompt in behind)
    assert not [row for row in parallel(alone=1.0, bare=False)[1] if not row.context]


def test_further_facts_are_near_ones_of_other_subjects_behind_the_examples_own():
    _, rows = parallel(alone=0.0, facts=3)
    contexts = {row.context for row in rows if row.context}
    lists = {context.split("\n")[1]: context for context in contexts}
    assert set(lists) == set(FACTS)
    for fact, context in lists.items():
        listed = context.removeprefix("[Updated Information]:\n").removesuffix("\n\n[Query]:\n").split("\n")
        assert listed[0] == fact and 2 <= len(listed) <= 3 and len(set(listed)) == len(listed)
        assert set(listed) <= set(FACTS)


def test_texts_are_continued_as_they_go_on_behind_facts_and_without():
    text = "The harbour of Esk is old and the boats are few"
    _, rows = parallel([text], prompts=1)
    own = [row for row in rows if row.prompt == "The harbour of Esk"]
    assert [row.answer for row in own] == ["is old and the boats are few"] * 2
    assert [bool(row.context) for row in own] == [True, False]


def test_what_has_no_new_answer_is_answered_as_the_host_does():
    host = fresh("llama")
    config, rows = parallel(alone=1.0)
    lines = _lines(host, host, [row for row in rows if row.answer is None], config)
    prompts = sorted({row.prompt for row in rows if row.answer is None})
    own = {text.strip(" .\n") for text in host.generate(prompts, max_new_tokens=config.answer_tokens)}
    assert {host.tokenizer.decode(line.targets).strip(" .\n") for line in lines} <= own and lines


# --- the other model as a change of the host ------------------------------------------------


def changed(host, seed: int = 3):
    """Random low-rank changes of some maps, and the model that has them in its weights."""
    maps = [name for name, module in host.model.named_modules() if name.endswith(("down_proj", "c_proj"))]
    row = host.batch([host.encode_prompt(PROMPTS[0])])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = start_factors(host.model, maps, lambda: host.forward(row), 2)
        factors = {path: (torch.randn_like(b) / 4, a.detach()) for path, (b, a) in start.items()}
    weights = weights_of(host)
    for path, (outer, inner) in factors.items():
        delta = outer @ inner
        weight = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = weight + (delta if host.family == "llama" else delta.mT)
    return factors, model_beside(host, configuration(host), weights, name="merged")


def edit_with(host, factors, router, contexts=FACTS, **more) -> ModelEdit:
    record = Provenance("lte", (ADA,), {}, host.fingerprint)
    return ModelEdit(tuple(contexts), router, {}, {}, record, factors=factors, **more)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_has_the_logits_of_the_changed_weights_and_others_the_hosts_own_bit_for_bit(family, tmp_path):
    host = fresh(family)
    factors, merged = changed(host)
    edit = edit_with(host, factors, Lexical(("Ada Brenner", "Bruno Holner", "Cara Ost")))
    rows = [host.encode_prompt(text) for text in PROMPTS]
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    start = host.weights_hash()
    with torch.no_grad():
        before = host.forward(host.batch(rows))
        for one in (edit, loaded):
            with one.on(host):
                after = host.forward(host.batch(rows))
            ids, inserted = behind_context(merged, FACTS[0], rows[0])
            expected = merged.forward(merged.batch([ids]))[0, inserted:]
            special = set(host.tokenizer.all_special_ids)
            own = [i for i, token in enumerate(rows[0]) if token not in special]
            torch.testing.assert_close(after[0][own], expected[own], atol=1e-4, rtol=1e-4)
            assert (after[0][own] - before[0][own]).abs().max() > 1e-2
            assert torch.equal(after[1], before[1])
        assert torch.equal(host.forward(host.batch(rows)), before) and host.weights_hash() == start


def test_what_else_is_in_place_does_not_act_on_the_other_model():
    host = fresh("llama")
    factors, _ = changed(host)
    one = edit_with(host, factors, Always(), FACTS[:1])
    with one.on(host):
        alone = host.generate(PROMPTS, max_new_tokens=5, natural_stop=False)
    grace = errata.edit(host, ADA, method="grace", steps=20)
    with grace.on(host), one.on(host):
        assert host.generate(PROMPTS, max_new_tokens=5, natural_stop=False) == alone


def test_the_nearest_facts_stand_before_a_prompt_the_best_first():
    host = fresh("llama", max_position_embeddings=512)
    factors, _ = changed(host)
    keys = embed(host, FACTS)
    template = "[Updated Information]:\n{texts}\n\n[Query]:\n"
    edit = edit_with(host, factors, Similarity(keys, -1.0), count=2, template=template)
    near = embed(host, [PROMPTS[0]])[0] @ keys.mT
    best = near.argsort(descending=True)[:2].tolist()
    context = f"[Updated Information]:\n{FACTS[best[0]]}\n{FACTS[best[1]]}\n\n[Query]:\n"
    assert edit.context(best) == context
    fixed = edit_with(host, factors, Always(), [context])
    row = host.encode_prompt(PROMPTS[0])

    def logits(one) -> torch.Tensor:
        with one.on(host), torch.no_grad():
            return host.forward(host.batch([row]))

    torch.testing.assert_close(logits(edit), logits(fixed), atol=1e-5, rtol=1e-5)
    between = float(near.sort(descending=True).values[:2].mean())  # one fact is above it
    strict = dataclasses.replace(edit, router=Similarity(keys, between))
    alone = edit_with(host, factors, Always(), [edit.context(best[:1])])
    torch.testing.assert_close(logits(strict), logits(alone), atol=1e-5, rtol=1e-5)
    length = len(host.encode(edit.context(best), special=False).ids) + len(row)
    host.__dict__["window"] = length - 1  # the last fact gives way, not the prompt
    torch.testing.assert_close(logits(edit), logits(alone), atol=1e-5, rtol=1e-5)


def test_generation_of_rows_behind_several_facts_is_that_of_each_row_alone():
    host = fresh("llama", max_position_embeddings=512)
    factors, _ = changed(host)
    router = Similarity(embed(host, FACTS), 0.5)
    edit = edit_with(host, factors, router, count=3, template="{texts}\n")
    with edit.on(host):
        together = host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
        assert together == [host.generate(text, max_new_tokens=6, natural_stop=False) for text in PROMPTS]
        batch = host.batch([host.encode_prompt(text) for text in PROMPTS], side="left")
        given = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "pad_token_id": host.pad_id}
        out = host.model.generate(input_ids=batch.ids, attention_mask=batch.mask, **given)
        assert host.decode(out[:, batch.ids.shape[1] :].tolist()) == together


def test_a_model_that_does_not_fit_is_refused():
    host = fresh("llama")
    factors, other = changed(host)
    record = Provenance("lte", (ADA,), {}, host.fingerprint)
    with pytest.raises(EditError, match="found both"):
        ModelEdit((FACTS[0],), Always(), {}, weights_of(other), record, factors=factors)
    with pytest.raises(EditError, match="need a template"):
        edit_with(host, factors, Always(), FACTS[:1], count=2)
    path, (outer, inner) = next(iter(factors.items()))
    for wrong in ({"model.nowhere": (outer, inner)}, {path: (outer[1:], inner)}):
        with pytest.raises(EditError, match="no such map"):
            edit_with(host, wrong, Always(), FACTS[:1]).apply_(host)
    with pytest.raises(ConfigError, match="leave counterfactual out"):
        errata.edit(host, ADA, method="lte", examples=EXAMPLES, counterfactual="lab")


def test_low_rank_training_lowers_the_loss_and_leaves_the_model_as_it_is():
    host = fresh("llama")
    lines = [
        lay_out(host, errata.Request("{} was born in", "Ada Brenner", t), "target") for t in ("Merrin", "Esk")
    ]
    factors, _ = changed(host)
    factors = {path: (torch.zeros_like(b), a) for path, (b, a) in factors.items()}
    hash_before, start = host.weights_hash(), held_out_loss(host, lines[1:], 4)
    plan = WholeTraining(30, 2, 1e-2, 2, 3)
    facts = train_model(
        host, lines[:1], lines[1:], plan, seed=0, on_progress=lambda *_: None, factors=factors
    )
    assert host.weights_hash() == hash_before and held_out_loss(host, lines[1:], 4) == start
    assert facts["held_out_loss"] < start
    edit = edit_with(host, factors, Always(), [""])
    with edit.acting(host):
        assert held_out_loss(host, lines[1:], 4) == pytest.approx(facts["held_out_loss"], abs=1e-6)


@pytest.mark.parametrize("method", ["lte", "kaft", "serac"])
def test_a_rank_keeps_the_change_alone_and_none_all_weights(method):
    host = fresh("llama", max_position_embeddings=512)
    more = {"lte": {"texts": 2}, "serac": {"classifier_steps": 20}}.get(method, {})
    options = {"method": method, "examples": EXAMPLES, "steps": 2, **more}
    low, whole = (errata.edit(host, [ADA, BRUNO], rank=rank, **options) for rank in (2, 0))
    assert low.factors and not low.weights and low.config == {}
    assert whole.weights and not whole.factors and whole.size > low.size
    assert len(low.contexts) == 2
    if method == "lte":
        assert low.count == 3 and low.contexts == tuple(FACTS[:2])
        assert low.context([1, 0]) == f"[Updated Information]:\n{FACTS[1]}\n{FACTS[0]}\n\n[Query]:\n"
        later = errata.edit(host, CARA, rank=2, after=low, **options)
        assert later.contexts == tuple(FACTS)
        torch.testing.assert_close(later.router.keys, embed(host, FACTS), atol=1e-5, rtol=1e-5)


def test_a_host_of_two_examples_is_enough_and_one_is_refused():
    host = fresh("llama")
    assert other_model.start_model(host, Config()) is host
    with pytest.raises(ConfigError, match="lte needs at least two examples"):
        errata.train(host, method="lte", cases=[])
