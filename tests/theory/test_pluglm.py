"""PlugLM: rows of a memory, chosen once a prompt by what it asks, and attended to beside feed-forwards."""

from __future__ import annotations

import dataclasses
import random
from math import exp, sqrt

import pytest
import torch

import errata
from errata.edits import attention
from errata.edits.artefact import Artefact
from errata.edits.memory import SHARED, Intervention, MemoryEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.always import Always
from errata.edits.routers.top_rows import TopRows
from errata.edits.undo import without
from errata.errors import ConfigError, EditError
from errata.host import hooks
from errata.host.decoding import logits_after, run_prefixes
from errata.training.examples import Example, target_groups, with_other_targets
from errata.training.key_value_memory import (
    KnowledgeMemory,
    MemoryShape,
    beside_memory,
    embeddings_of,
    rows_of,
)
from errata.training.tune import Losses
from tests.contract.test_methods import EXAMPLES
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp", id="bruno")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk", id="arvania")
PROMPTS = [ADA.text, BRUNO.text, CITY.text, "Esk", "Question: where was Ada born?\nAnswer:"]
SMALL = {"heads": 4, "key_width": 8, "rows": 2}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def editor(host, path, **options) -> tuple[Artefact, str]:
    """Train a memory for no step and give it weights at random, so that it says something."""
    options = {**SMALL, **options}
    plain = errata.train(host, method="pluglm", cases=EXAMPLES, steps=0, **options)
    tensors = {
        name: tensor if not tensor.ndim else tensor + 0.3 * normal(*tensor.shape, seed=i).abs()
        for i, (name, tensor) in enumerate(sorted(plain.tensors.items()))
    }
    for name in [name for name in tensors if name.endswith("output.weight")]:
        tensors[name] = normal(*tensors[name].shape, seed=len(name))
    loud = dataclasses.replace(plain, tensors=tensors)
    file = path / "editor.safetensors"
    loud.save(file)
    return loud, str(file)


def edit_of(host, requests, file: str, **more) -> MemoryEdit:
    edit = errata.edit(host, requests, method="pluglm", editor=file, **{**SMALL, **more})
    assert isinstance(edit, MemoryEdit) and isinstance(edit.router, TopRows)
    return edit


def logits(host, prompts=PROMPTS, side: str = "right") -> torch.Tensor:
    with torch.no_grad():
        return host.forward(host.batch([host.encode_prompt(prompt) for prompt in prompts], side=side))


def last(host, prompt: str) -> torch.Tensor:
    return logits(host, [prompt])[0, -1]


# --- the equations --------------------------------------------------------------------------


def test_attentive_pooling_is_the_softmax_of_its_scores_over_the_tokens_that_count():
    states, weight, vector = normal(2, 4, 3), normal(5, 3, seed=1), normal(5, seed=2)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    found = attention.pooled(states, mask, weight, vector)
    for row in range(2):
        own = [states[row, i] for i in range(4) if mask[row, i]]
        scores = [exp(float(torch.tanh(weight @ state) @ vector)) for state in own]
        expected = sum(score / sum(scores) * state for score, state in zip(scores, own, strict=True))
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("null", [False, True])
def test_knowledge_attention_against_a_plain_computation(null):
    heads, size, d = 2, 3, 5
    inputs, keys, values = (
        normal(2, 4, d),
        normal(2, 3, heads * size, seed=1),
        normal(2, 3, heads * size, seed=2),
    )
    cosines = normal(2, 3, seed=3).tanh()
    shared = {
        "token_map": normal(heads * size, d, seed=4), "output_map": normal(d, heads * size, seed=5),
        "betas": torch.tensor([1.0, 2.5]), "null_logits": torch.tensor([0.3, -1.0]) if null else torch.zeros(0),
    }  # fmt: skip
    found = attention.attend(inputs, keys, values, cosines, shared)
    for row in range(2):
        for token in range(4):
            query, parts = shared["token_map"] @ inputs[row, token], []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                near = shared["betas"][head] * cosines[row]
                terms = [
                    exp(float(query[own] @ keys[row, n, own]) / sqrt(size) + float(near[n])) for n in range(3)
                ]
                total = sum(terms) + (exp(float(shared["null_logits"][head])) if null else 0.0)
                parts.append(sum(term / total * values[row, n, own] for n, term in enumerate(terms)))
            torch.testing.assert_close(
                found[row, token], shared["output_map"] @ torch.cat(parts), rtol=1e-4, atol=1e-5
            )


def test_running_statistics_are_part_of_the_query_s_map():
    memory = KnowledgeMemory(MemoryShape(6, 4, 2, True), [1.0])
    (layer,) = memory.each()
    mask = torch.ones(20, 5, dtype=torch.bool)
    for seed in range(3):
        layer.queries(normal(20, 5, 6, seed=seed), mask)
    shared, states = layer.shared(), normal(7, 5, 6, seed=9)
    memory.eval()
    own = attention.pooled(states, mask[:7], shared["pool_map"], shared["pool_vector"])
    torch.testing.assert_close(
        own @ shared["query_map"].mT + shared["query_bias"],
        layer.queries(states, mask[:7]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_rows_are_those_of_the_largest_inner_products():
    keys, queries = normal(9, 4), normal(6, 4, seed=1)
    entries, cosines = TopRows(keys, 3).top(queries)
    for row in range(6):
        products = [float(queries[row] @ key) for key in keys]
        assert entries[row].tolist() == sorted(range(9), key=lambda i: -products[i])[:3]
        for at, entry in enumerate(entries[row].tolist()):
            assert float(cosines[row, at]) == pytest.approx(
                products[entry] / float(queries[row].norm() * keys[entry].norm()), abs=1e-5
            )
    question = Question(queries, queries, list)
    few, none = TopRows(keys[:2], 3), TopRows(keys[:0], 3)
    assert (
        few.top(queries)[0].shape == (6, 2)
        and few.decide(question).tolist() == few.top(queries)[0][:, 0].tolist()
    )
    assert none.top(queries)[0].shape == (6, 0) and none.decide(question).tolist() == [NONE] * 6
    assert torch.equal(few.scores(question), queries @ keys[:2].mT)
    assert TopRows(keys, 3).select([4, 1]).keys.equal(keys[[4, 1]])


def test_a_layer_in_place_adds_what_the_equations_say(tmp_path):
    host = fresh("llama")
    trained, file = editor(host, tmp_path, layers=[1])
    edit = edit_of(host, [ADA, BRUNO, CITY], file, layers=[1])
    (one,) = edit.interventions
    memory = KnowledgeMemory(MemoryShape(host.layout.width, 8, 4, True), [1.0])
    memory.load_state_dict(dict(trained.tensors))
    (layer,) = memory.eval().each()
    module, seen = host.model.get_submodule(one.module), []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    logits(host, [BRUNO.text])
    with edit.on(host), torch.no_grad():
        logits(host, [BRUNO.text])
    handle.remove()
    (x, y), (_, after) = seen
    documents = [host.encode(f"{r.text} {r.target}.").ids for r in (ADA, BRUNO, CITY)]
    with torch.no_grad():
        encoded = [memory.encode(*embeddings_of(host, [ids])) for ids in documents]
        query = layer.queries(x, torch.ones(x.shape[:2], dtype=torch.bool))[0]
        keys, values = (torch.cat(part) for part in zip(*encoded, strict=True))
        best = (keys @ query).argsort(descending=True)[:2]
        cosines = torch.nn.functional.cosine_similarity(query[None], keys[best])
        added = layer.added(x, values[best][None], cosines[None])
    assert float(added.norm()) > 0.1
    torch.testing.assert_close(after - y, added, rtol=1e-3, atol=1e-4)


def test_a_document_is_pooled_word_embeddings_of_unit_size():
    host = fresh("gpt2")
    trained = errata.train(host, method="pluglm", cases=EXAMPLES, steps=0, **SMALL)
    table = host.model.get_input_embeddings().weight.detach()
    scale = 1 / float(table.square().mean().sqrt())
    assert float(trained.tensors["scale"]) == pytest.approx(scale)
    memory = KnowledgeMemory(MemoryShape(host.layout.width, 8, 4, True), [1.0, 1.0])
    memory.load_state_dict(dict(trained.tensors))
    ids = [host.encode("Ada Brenner was born in Merrin.").ids, host.encode("Esk").ids]
    keys, layers = rows_of(host, memory, ids)
    for row, own in enumerate(ids):
        words = scale * table[list(own)]
        shares = (torch.tanh(words @ memory.pool.weight.mT) @ memory.pool_vector).softmax(0)
        document = (shares[:, None] * words).sum(0)
        torch.testing.assert_close(keys[row], memory.to_key.weight @ document, rtol=1e-4, atol=1e-5)
        value = memory.to_value.weight @ document
        for part, layer in zip(layers, memory.each(), strict=True):
            torch.testing.assert_close(part["keys"][row], layer.key.weight @ value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(part["values"][row], layer.value.weight @ value, rtol=1e-4, atol=1e-5)


def test_what_is_trained_is_what_is_placed(tmp_path):
    """The pass of the training loss, with running statistics, gives the logits of the edit."""
    host = fresh("llama")
    trained, file = editor(host, tmp_path, layers=[1, 2])
    edit = edit_of(host, [ADA, BRUNO, CITY], file, layers=[1, 2])
    memory = KnowledgeMemory(MemoryShape(host.layout.width, 8, 4, True), [1.0, 1.0])
    memory.load_state_dict(dict(trained.tensors))
    memory.eval()
    documents = [host.encode(f"{r.text} {r.target}.").ids for r in (ADA, BRUNO, CITY)]
    batch = host.batch([host.encode_prompt(prompt) for prompt in PROMPTS])
    modules = [one.module for one in edit.interventions]
    with torch.no_grad(), hooks.frozen(host.model):
        knowledge = memory.encode(*embeddings_of(host, documents))
        with beside_memory(host, modules, memory, knowledge, 2, batch.mask.bool()) as products:
            expected = host.forward(batch)
    assert [part.shape for part in products] == [(len(PROMPTS), 3)] * 2
    with edit.on(host):
        found = logits(host)
    own = batch.mask.bool()
    assert not torch.allclose(found[own], logits(host)[own], atol=1e-2)
    torch.testing.assert_close(found[own], expected[own], rtol=1e-3, atol=1e-3)


# --- no rows, no training -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_untrained_memory_is_the_host_bit_for_bit(family):
    host = fresh(family)
    edit = errata.edit(host, [ADA, BRUNO], method="pluglm", examples=EXAMPLES, steps=0, **SMALL)
    before = logits(host)
    with edit.on(host):
        assert torch.equal(logits(host), before)


def test_a_memory_without_rows_is_the_host_bit_for_bit(tmp_path):
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO], editor(host, tmp_path)[1])
    empty = dataclasses.replace(
        edit,
        interventions=tuple(
            dataclasses.replace(one, payload={name: part[:0] for name, part in one.payload.items()})
            for one in edit.interventions
        ),
        router=edit.router.select([]),
    )
    before = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    path = empty.save(tmp_path / "empty.safetensors")
    for one in (empty, errata.Edit.load(path)):
        with one.on(host):
            assert torch.equal(logits(host), before)


# --- rows come and go -----------------------------------------------------------------------


def test_rows_may_be_added_in_any_order_and_taken_out_as_if_never_there(tmp_path):
    host = fresh("llama")
    file = editor(host, tmp_path)[1]
    requests = [ADA, BRUNO, CITY]
    whole = edit_of(host, requests, file)
    with whole.on(host):
        expected = logits(host)
    for order in ([2, 0, 1], [1, 2, 0]):
        edit = None
        for i in order:
            edit = edit_of(host, requests[i], file, after=edit)
        assert edit is not None and edit.entries == 3
        assert edit.router.tensors()["keys"].equal(whole.router.tensors()["keys"][order])
        with edit.on(host):
            assert torch.equal(logits(host), expected)
    for gone in range(3):
        rest = [request for i, request in enumerate(requests) if i != gone]
        left, never = without(whole, [gone]), edit_of(host, rest, file)
        assert isinstance(left, MemoryEdit) and left.provenance.requests == tuple(rest)
        one, other = left.parts(), never.parts()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fact_that_replaces_another_is_a_row_in_its_place(tmp_path):
    host = fresh("llama")
    file = editor(host, tmp_path)[1]
    newer = dataclasses.replace(ADA, target="Esk", id="newer")
    old = edit_of(host, [ADA, BRUNO], file)
    replaced = edit_of(host, newer, file, after=errata.retract(old, "ada"))
    with edit_of(host, [BRUNO, newer], file).on(host):
        expected = logits(host)
    with replaced.on(host):
        assert torch.equal(logits(host), expected)


# --- rows of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_what_it_is_alone(tmp_path, side):
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO, CITY], editor(host, tmp_path)[1])
    with edit.on(host):
        together, batch = (
            logits(host, side=side),
            host.batch([host.encode_prompt(p) for p in PROMPTS], side=side),
        )
        for row, prompt in enumerate(PROMPTS):
            own = together[row][batch.mask[row].bool()]
            torch.testing.assert_close(own, logits(host, [prompt])[0], rtol=1e-4, atol=1e-4)


def test_the_decision_of_the_prompt_holds_with_a_cache_and_past_the_host(tmp_path):
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO, CITY], editor(host, tmp_path)[1])
    plain = host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
    with edit.on(host):
        together = host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
        assert together != plain
        assert [host.generate(p, max_new_tokens=6, natural_stop=False) for p in PROMPTS] == together
        left = host.batch([host.encode_prompt(prompt) for prompt in PROMPTS], side="left")
        length = left.ids.shape[1]
        cached, not_cached = (
            host.generate_batch(left, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use)
            for use in (True, False)
        )
        assert torch.equal(cached, not_cached)
        for row, text in zip(cached[:, length:], together, strict=True):
            shown = host.tokenizer.decode(row, skip_special_tokens=True)
            assert shown.startswith(text) or text.startswith(shown)


def test_a_continued_row_keeps_the_rows_that_its_prompt_took(tmp_path):
    """One pass over prompt and answer, told where the prompt ends, gives the logits of the cached steps."""
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO, CITY], editor(host, tmp_path)[1])
    line = host.encode_answer(CITY.text, "Merrin and Esk")
    losses = Losses(host, [dataclasses.replace(CITY, target="Merrin and Esk")], depth=0)
    with edit.on(host), torch.no_grad():
        whole = float(losses([0]))
        prefixes = run_prefixes(host, [line.ids[: line.start]])
        rest = line.ids[line.start : -1]
        steps = [prefixes.logits]
        if rest:
            at = (torch.zeros(len(rest), dtype=torch.long), torch.arange(len(rest)))
            steps.append(logits_after(host, prefixes, [(0, rest)], at))
    scores = torch.cat(steps).float().log_softmax(-1)
    expected = -scores[torch.arange(len(line.target)), torch.tensor(line.target)].mean()
    assert len(line.target) > 2 and whole == pytest.approx(float(expected), abs=1e-4)


def test_lower_blocks_that_are_run_once_keep_the_rows_of_each_prompt(tmp_path):
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO, CITY], editor(host, tmp_path, layers=[0])[1], layers=[0])
    with edit.on(host), torch.no_grad(), hooks.frozen(host.model):
        whole, upper = (Losses(host, [CITY, ADA, BRUNO], depth=depth) for depth in (0, 2))
        torch.testing.assert_close(upper([2, 0]), whole([2, 0]), rtol=1e-4, atol=1e-4)


# --- training -------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_leaves_queries_to_running_statistics():
    host = fresh("llama")
    options = {
        "cases": EXAMPLES,
        "method": "pluglm",
        "held_out": 0.0,
        "learning_rate": 0.01,
        "warmup": 5,
        **SMALL,
    }
    short, long = (errata.train(host, steps=steps, **options) for steps in (1, 60))
    # a random model's logits differ little, whatever is added below its head: some 0.4 nats can be gained
    assert long.card["loss"] < short.card["loss"] - 0.2
    assert int(long.tensors["layers.0.norm.num_batches_tracked"]) == 60
    again = errata.train(host, steps=60, **options)
    assert again.digest == long.digest
    other = errata.train(host, steps=60, seed=1, **options)
    assert other.digest != long.digest


def test_variants_have_other_values_of_the_same_group():
    def example(name: str, target: str, old: str, prompt: str = "{} was born in") -> Example:
        request = errata.Request(prompt, name, target, old)
        return Example(
            request, ((request.text, target), (f"{name} is from", target), (f"{name} sings", "yes")), ("x",)
        )

    examples = [
        example("Ada", "Merrin", "Esk"),
        example("Bruno", "Tallow", "Esk"),
        example("Carla", "harp", "drum", "{} plays the"),
    ]
    values = target_groups(examples)
    assert sorted(map(sorted, values)) == [["Esk", "Merrin", "Tallow"], ["drum", "harp"]]
    found = with_other_targets(examples[0], values, 5, random.Random(0))
    assert {one.request.target for one in found} == {"Esk", "Tallow"}
    for one in found:
        assert one.inside == (("Ada was born in", one.request.target), ("Ada is from", one.request.target))
    assert len(with_other_targets(examples[0], values, 1, random.Random(0))) == 1


# --- what is refused ------------------------------------------------------------------------


def test_an_editor_of_other_settings_or_another_one_than_before_is_refused(tmp_path):
    host = fresh("llama")
    file = editor(host, tmp_path)[1]
    with pytest.raises(ConfigError, match="trained with heads=4"):
        edit_of(host, ADA, file, heads=2)
    first = edit_of(host, ADA, file)
    with pytest.raises(ConfigError, match="use the same one"):
        errata.edit(host, BRUNO, method="pluglm", after=first, examples=EXAMPLES, steps=1, **SMALL)
    with pytest.raises(ConfigError, match="pluglm needs at least two examples"):
        errata.train(host, method="pluglm", cases=[])


def test_parts_that_do_not_fit_are_refused(tmp_path):
    host = fresh("llama")
    edit = edit_of(host, [ADA, BRUNO], editor(host, tmp_path)[1])
    one = edit.interventions[0]
    with pytest.raises(EditError, match="all tokens"):
        dataclasses.replace(one, positions="last")
    with pytest.raises(EditError, match="fit one another: betas"):
        dataclasses.replace(one, shared={**one.shared, "betas": torch.ones(3)})
    with pytest.raises(EditError, match="attend takes pool_map"):
        dataclasses.replace(one, shared={})
    with pytest.raises(EditError, match="add takes none"):
        Intervention(one.module, "add", {"values": torch.zeros(1, 4)}, shared={"betas": torch.ones(1)})
    assert set(one.shared) == set(SHARED["attend"])
    with pytest.raises(EditError, match="top_rows router"):
        dataclasses.replace(edit, router=Always())
    with pytest.raises(EditError, match="keys have width 3, queries 8"):
        dataclasses.replace(edit, router=TopRows(torch.zeros(2, 3)))
    extra = Intervention(one.module, "add", {"values": torch.zeros(2, host.layout.width)})
    with pytest.raises(EditError, match="cannot also have add"):
        dataclasses.replace(edit, interventions=(*edit.interventions, extra))
    with pytest.raises(ValueError, match="count of 0"):
        TopRows(torch.zeros(1, 2), 0)
