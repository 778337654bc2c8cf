"""Kformer: which sentences a prompt gets, what their neurons add, and that training sees what an edit does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import errata
from errata.edits.artefact import Artefact
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.reranked import Reranked
from errata.errors import ConfigError, EditError
from errata.host import hooks
from errata.host.embedding import word_embeddings
from errata.methods.kformer import Config
from errata.training import knowledge
from errata.training.whole import WholeTraining
from tests.contract.test_methods import EXAMPLES
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp", id="bruno")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk", id="city")
ALL = [ADA, BRUNO, CITY]
TEXTS = ["Ada Brenner was born in Merrin.", "Bruno Holner plays the harp.", "The capital of Arvania is Esk."]
PROMPTS = [ADA.text, BRUNO.text, CITY.text, "the rain in Merrin", "Esk", "Zzz"]
QUICK = {"method": "kformer", "examples": EXAMPLES, "steps": 30, "warmup": 0, "learning_rate": 0.02}


def logits(host, prompts=PROMPTS, side="left") -> list[torch.Tensor]:
    rows = [host.encode_prompt(text) for text in prompts]
    batch = host.batch(rows, side=side)
    with torch.no_grad():
        out = host.forward(batch)
    return [out[i, batch.mask[i].bool()] for i in range(len(rows))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    host = fresh("llama")
    path = tmp_path_factory.mktemp("kformer") / "editor.safetensors"
    options = {name: value for name, value in QUICK.items() if name not in ("method", "examples")}
    errata.train(host, method="kformer", cases=EXAMPLES, layers=[1, 2], **options).save(path)
    return host, path


# --- which sentences ------------------------------------------------------------------------


def test_the_nearest_by_words_are_ordered_by_vectors():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.4], [9.0, 9.0]])
    texts = ("the harp", "the harp and the drum", "a harp in the house of harps", "nothing in common")
    asked = Question(
        torch.zeros(3, 0), torch.zeros(3, 0), lambda: ["the harp", "a", "Zzz"],
        lambda: torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    )  # fmt: skip
    assert Reranked(texts, vectors, 5, 20).decide(asked).tolist() == [
        [1, 2, 0, NONE, NONE], [2, NONE, NONE, NONE, NONE], [NONE] * 5,
    ]  # fmt: skip
    assert Reranked(texts, vectors, 2, 20).decide(asked)[0].tolist() == [1, 2]
    scores = Reranked(texts, vectors).scores(asked)[0]
    best = scores.argsort(descending=True)[:2].tolist()
    few = Reranked(texts, vectors, 5, 2).decide(asked)[0].tolist()
    assert set(few[:2]) == set(best) and few[2:] == [NONE] * 3
    none = Reranked((), torch.zeros(0, 2), 2).decide(asked)
    assert none.tolist() == [[NONE] * 2] * 3
    assert Reranked(texts, vectors).select([2, 0]).passages == (texts[2], texts[0])


def test_several_entries_act_where_outputs_are_added_to_and_nowhere_else():
    host = fresh("llama")
    made = errata.edit(host, ADA, method="in_prompt").provenance
    router = Reranked(("a",), torch.zeros(1, host.layout.width))
    module = host.layout.blocks[1]
    with pytest.raises(EditError, match="several entries act"):
        MemoryEdit(
            (Intervention(module, "replace", {"values": torch.zeros(1, host.layout.width)}),), router, made
        )
    with pytest.raises(EditError, match="use it in a memory"):
        PromptEdit(("a",), router, made)


@pytest.mark.parametrize("operation", ["add", "lowrank", "dense", "slots"])
def test_what_several_entries_add_is_summed(operation):
    host = fresh("gpt2")
    d, draw = host.layout.width, torch.Generator().manual_seed(0)
    shapes = {
        "add": {"values": (3, d)},
        "lowrank": {"left": (3, d, 2), "right": (3, 2, d)},
        "dense": {"changes": (3, d, d)},
        "slots": {"keys": (3, 2, d), "biases": (3, 2), "values": (3, 2, d)},
    }[operation]
    payload = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    module = host.layout.feed_forward(1)
    path, _ = word_embeddings(host)
    made = errata.edit(host, ADA, method="in_prompt").provenance

    def changes(router) -> torch.Tensor:
        one = Intervention(module, operation, payload, "all")
        outputs: list[torch.Tensor] = []
        batch = host.batch([host.encode_prompt("the harp")])
        edit = MemoryEdit((one,), router, made, reads=path)
        with (
            torch.no_grad(),
            edit.on(host),
            hooks.on_output(host.model.get_submodule(module), outputs.append),
        ):
            host.forward(batch)
        with torch.no_grad(), hooks.on_output(host.model.get_submodule(module), outputs.append):
            host.forward(batch)
        return outputs[0] - outputs[1]

    texts = ("the harp", "a harp", "Zzz")
    vectors = torch.zeros(3, d)
    alone = [
        changes(Reranked(tuple(t if i == j else "" for j, t in enumerate(texts)), vectors)) for i in range(3)
    ]
    both = changes(Reranked(texts, vectors))
    assert not alone[2].any() and alone[0].any() and alone[1].any()
    torch.testing.assert_close(both, alone[0] + alone[1], atol=1e-4, rtol=1e-4)


# --- the edit -------------------------------------------------------------------------------


def test_the_neurons_are_those_of_the_paper(trained):
    """FFN'(x) = FFN(x) + gelu(x phi_k^T) phi_v at every token, computed beside the library."""
    host, path = trained
    edit = errata.edit(host, ALL, method="kformer", editor=str(path), knowledge=2)
    maps = Artefact.load(path).tensors
    table = host.model.get_input_embeddings().weight.detach()
    e = torch.stack([table[list(host.encode(text, special=False).ids)].mean(0) for text in TEXTS])
    torch.testing.assert_close(edit.router.vectors, e)
    scores = edit.router.scores(Question(torch.zeros(6, 0), torch.zeros(6, 0), lambda: PROMPTS))
    plain = logits(host)
    for i, prompt in enumerate(PROMPTS):
        query = table[list(host.encode_prompt(prompt))].mean(0)
        order = sorted((j for j in range(3) if scores[i, j] > 0), key=lambda j: -float(e[j] @ query))[:2]

        def beside(module, layer, found):
            def act(_, args, output):
                phi_k = e[found] @ maps["key_weights"][layer].mT + maps["key_biases"][layer]
                phi_v = e[found] @ maps["value_weights"][layer].mT + maps["value_biases"][layer]
                return output + functional.gelu(args[0] @ phi_k.mT) @ phi_v

            return host.model.get_submodule(module).register_forward_hook(act)

        handles = [beside(host.layout.feed_forward(at), n, order) for n, at in enumerate((1, 2))]
        expected = logits(host, [prompt])[0]
        for handle in handles:
            handle.remove()
        with edit.on(host):
            for side in ("left", "right"):
                torch.testing.assert_close(logits(host, side=side)[i], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(expected, logits(host, [prompt])[0]) == (not order)
        assert order or prompt == "Zzz"
    assert not torch.equal(plain[0], expected)


def test_rows_are_the_same_in_a_batch_alone_with_a_cache_and_without_one(trained):
    host, path = trained
    edit = errata.edit(host, ALL, method="kformer", editor=str(path), knowledge=2)
    with edit.on(host):
        texts = host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
        assert texts == [host.generate(p, max_new_tokens=6, natural_stop=False) for p in PROMPTS]
        rows = [host.encode_prompt(p) for p in PROMPTS]
        for cache in (True, False):
            batch = host.batch(rows, side="left")
            out = host.generate_batch(
                batch, use_cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=host.pad_id, eos_token_id=None
            )  # fmt: skip
            assert host.decode(out[:, batch.ids.shape[1] :].tolist()) == texts


def test_a_pool_without_a_word_in_common_and_an_empty_one_leave_every_bit(trained):
    host, path = trained
    plain = logits(host)
    edit = errata.edit(host, ALL, method="kformer", editor=str(path))
    with edit.on(host):
        inside = logits(host)
    assert torch.equal(inside[5], plain[5]) and not torch.equal(inside[0], plain[0])
    payload = [{name: part[:0] for name, part in one.payload.items()} for one in edit.interventions]
    nothing = MemoryEdit(
        tuple(
            Intervention(one.module, "slots", part, "all", "gelu")
            for one, part in zip(edit.interventions, payload, strict=True)
        ),
        edit.router.select([]), edit.provenance, reads=edit.reads,
    )  # fmt: skip
    with nothing.on(host):
        assert all(torch.equal(a, b) for a, b in zip(logits(host), plain, strict=True))


def test_before_training_the_host_is_as_it_was():
    host = fresh("gpt2")
    plain = logits(host)
    edit = errata.edit(host, ALL, **{**QUICK, "steps": 0})
    assert edit.interventions[0].payload["keys"].any()
    with edit.on(host):
        assert all(torch.equal(a, b) for a, b in zip(logits(host), plain, strict=True))


def test_a_request_that_is_taken_out_was_never_there(trained, tmp_path):
    host, path = trained
    options = {"method": "kformer", "editor": str(path)}
    whole = errata.edit(host, ALL, **options)
    rest = errata.Edit.load(errata.retract(whole, "bruno").save(tmp_path / "rest.safetensors"))
    fitted = errata.edit(host, CITY, after=errata.edit(host, ADA, **options), **options)
    assert rest.router.passages == fitted.router.passages == (TEXTS[0], TEXTS[2])
    for name, part in fitted.parts().items():
        assert torch.equal(part, rest.parts()[name]), name
    with rest.on(host):
        one = logits(host)
    with fitted.on(host):
        assert all(torch.equal(a, b) for a, b in zip(logits(host), one, strict=True))


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_training_sees_the_loss_that_an_edit_of_the_same_pool_has(trained, most):
    host, path = trained
    edit = errata.edit(host, ALL, method="kformer", editor=str(path), knowledge=most)
    asked = [knowledge.SentencePrompt(i, request.text, "Merrin and Esk") for i, request in enumerate(ALL)]
    with hooks.frozen(host.model):
        _, table = word_embeddings(host)
        ids = [host.encode(text, special=False).ids for text in TEXTS]
        modules = [one.module for one in edit.interventions]
        pool = knowledge.Pool(host, modules, 1, ids, table, most, "gelu")
        rows = knowledge.rows_with(host, asked, TEXTS, 20)
        losses = knowledge.RowLosses(pool, rows, lambda _: False)
        maps = knowledge.Projections.of(Artefact.load(path).tensors)
        with torch.no_grad():
            expected = losses(maps, table, [0, 1, 2])
            with edit.on(host):
                for i, row in enumerate(rows):
                    line = torch.zeros(len(row.line.at), dtype=torch.long)
                    out = host.forward_at(
                        host.batch([row.line.ids]), line, torch.tensor(row.line.at),
                        ends=torch.tensor([row.line.at[0]]),
                    )  # fmt: skip
                    own = functional.cross_entropy(out, torch.tensor(row.line.targets))
                    torch.testing.assert_close(expected[i], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("embeddings", [False, True])
def test_training_lowers_the_loss_and_moves_what_it_is_told_to(embeddings):
    host = fresh("llama")
    asked = [knowledge.SentencePrompt(i, request.text, request.target) for i, request in enumerate(ALL)]
    with hooks.frozen(host.model):
        _, table = word_embeddings(host)
        ids = [host.encode(text, special=False).ids for text in TEXTS]
        pool = knowledge.Pool(host, [host.layout.feed_forward(2)], 2, ids, table, 1, "gelu")
        rows = knowledge.rows_with(host, asked, TEXTS, 20)
        torch.manual_seed(0)
        start = knowledge.Projections.random(1, 32, 32, key_start=0.5, value_start=0.0)
        plan = knowledge.Plan(WholeTraining(150, 3, 0.02, 10, 3), 0, 0.98, 0.0, 1.0, embeddings)
        tensors, facts = knowledge.train(pool, start, rows, [], plan, seed=0)
        losses = knowledge.RowLosses(pool, rows, lambda _: True)
        with torch.no_grad():
            before = losses(start, table, [0, 1, 2])
            after = losses(knowledge.Projections.of(tensors), tensors.get("embeddings", table), [0, 1, 2])
    assert float(after.mean()) < float(before.mean()) - 0.2 and facts["steps"] == 150
    assert ("embeddings" in tensors) is embeddings
    assert not embeddings or not torch.equal(tensors["embeddings"], table)


def test_the_editor_is_bound_to_its_host_and_layers(trained):
    host, path = trained
    with pytest.raises(EditError, match="trained on host"):
        errata.edit(fresh("llama", seed=4), ADA, method="kformer", editor=str(path))
    with pytest.raises(ConfigError, match=r"trained for \[1, 2\], found \[2\]"):
        errata.edit(host, ADA, method="kformer", editor=str(path), layers=[2])
    with pytest.raises(ConfigError, match="two examples"):
        errata.edit(host, ADA, method="kformer")
    first = errata.edit(host, ADA, method="kformer", editor=str(path))
    with pytest.raises(ConfigError, match="use the same one"):
        errata.edit(host, BRUNO, after=first, **QUICK)
    assert Config().problems() == [] and Config(alone=2.0, beta2=1.0).problems()
