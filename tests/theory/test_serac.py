"""SERAC: another model answers the rows that a scope classifier accepts, everywhere that a model is asked."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import errata
from errata import lab
from errata.edits import MemoryEdit, ModelEdit, PromptEdit
from errata.edits.artefact import Artefact
from errata.edits.edit import Provenance
from errata.edits.memory import Intervention
from errata.edits.model import behind_context
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.always import Always
from errata.edits.routers.classifier import Classifier
from errata.edits.routers.lexical import Lexical
from errata.errors import ConfigError, EditError, HostError
from errata.host.replica import configuration, model_beside, weights_of
from errata.training.examples import examples_of
from errata.training.scope import ScopeTraining, train_projection
from errata.training.tune import lay_out
from errata.training.whole import WholeTraining, held_out_loss, train_model
from tests.models import fresh
from tests.program import errata as program

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
PROMPTS = ["Ada Brenner was born in", "The capital of Arvania is", "Ada Brenner, they say,", "Bruno"]
CONTEXT = "Ada Brenner was born in Merrin\n"
QUICK = {"steps": 6, "classifier_steps": 60, "every": 3}


def another(host, seed: int = 5):
    """A model of the same shape and vocabulary with other weights."""
    return fresh(host.family, seed=seed)


def edit_with(host, other, router=None, contexts=(CONTEXT,)) -> ModelEdit:
    record = Provenance("serac", (ADA,), {}, host.fingerprint)
    return ModelEdit(contexts, router or Always(), configuration(other), weights_of(other), record)


def logits(host, rows, **more) -> torch.Tensor:
    with torch.no_grad():
        return host.forward(host.batch(rows, **more))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_has_the_other_models_logits_with_the_context_before_it(family):
    host, other = fresh(family), another(fresh(family))
    row = host.encode_prompt(PROMPTS[1])
    ids, inserted = behind_context(other, CONTEXT, row)
    expected = logits(other, [ids])[0, -len(row) :]
    before = logits(host, [row])
    with edit_with(host, other).on(host):
        after = logits(host, [row])[0]
    assert inserted == len(ids) - len(row) > 0
    special = set(host.tokenizer.all_special_ids)
    own = [
        i for i, token in enumerate(row) if token not in special
    ]  # the context goes behind what begins a text
    torch.testing.assert_close(after[own], expected[own], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(host, [row]), before)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_other_models_own_with_a_cache_or_without_one_and_past_the_host(beams):
    host, other = fresh("llama"), another(fresh("llama"))
    router = Lexical(("Ada Brenner",))
    given = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": host.pad_id}
    rows = [host.encode_prompt(text) for text in PROMPTS]

    def run(model, some, **more) -> list[list[int]]:
        batch = model.batch(some, side="left")
        out = model.model.generate(input_ids=batch.ids, attention_mask=batch.mask, **given, **more)
        return out[:, batch.ids.shape[1] :].tolist()

    plain = run(host, rows)
    expected = [
        run(other, [behind_context(other, CONTEXT, row)[0]])[0] if "Ada" in text else plain[i]
        for i, (text, row) in enumerate(zip(PROMPTS, rows, strict=True))
    ]
    assert expected[0] != plain[0]
    with edit_with(host, other, router).on(host):
        assert run(host, rows) == expected
        assert run(host, rows, use_cache=False) == expected
        assert [run(host, [row])[0] for row in rows] == expected
        texts = host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
        if beams == 1:
            assert texts == host.decode(expected)
            assert [host.generate(text, max_new_tokens=6, natural_stop=False) for text in PROMPTS] == texts
    assert run(host, rows) == plain


def test_an_answer_is_scored_behind_its_own_prompt_whatever_else_is_in_the_batch():
    host, other = fresh("llama"), another(fresh("llama"))
    answers = [host.encode_answer(text, "Merrin") for text in PROMPTS]
    line = torch.tensor([i for i, one in enumerate(answers) for _ in one.target])
    at = torch.tensor([one.start - 1 + k for one in answers for k in range(len(one.target))])
    ends = torch.tensor([one.start - 1 for one in answers])
    with edit_with(host, other, Lexical(("Ada Brenner",))).on(host), torch.no_grad():
        together = host.forward_at(host.batch([one.ids for one in answers]), line, at, ends=ends)
        for i, one in enumerate(answers):
            own = torch.tensor([one.start - 1 + k for k in range(len(one.target))])
            alone = host.forward_at(
                host.batch([one.ids]), torch.zeros_like(own), own, ends=torch.tensor([one.start - 1])
            )
            torch.testing.assert_close(together[line == i], alone, atol=1e-5, rtol=1e-5)


def test_edits_of_four_kinds_come_off_in_any_order():
    host = fresh("llama")
    rome = errata.edit(host, ADA, method="rome", steps=4, tokens=400)
    down = host.layout.site(1)
    shift = torch.full((1, down.d_out), 0.5)
    record = Provenance("grace", (ADA,), {}, host.fingerprint)
    memory = MemoryEdit((Intervention(down.name, "add", {"values": shift}, "all"),), Always(), record)
    prompt = PromptEdit(("Esk. ",), Lexical(("Bruno",)), Provenance("ike", (ADA,), {}, host.fingerprint))
    model = edit_with(host, another(host), Lexical(("Ada Brenner",)))
    edits = [rome, memory, prompt, model]

    def answers() -> tuple[str, ...]:
        return tuple(host.generate(PROMPTS, max_new_tokens=4, natural_stop=False))

    alone = []
    for edit in edits:
        with edit.on(host):
            alone.append(answers())
    plain = answers()
    assert all(one != plain for one in alone)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)):
        for edit in edits:
            edit.apply_(host)
        for place in order[:3]:
            edits[place].revert_(host)
        assert answers() == alone[order[3]]
        edits[order[3]].revert_(host)
        assert answers() == plain


def test_a_row_that_outgrows_the_other_models_window_loses_its_first_tokens():
    host = fresh("llama")
    host.__dict__["window"] = 12
    row = tuple(range(5, 15))
    context = host.encode("Esk\n", special=False).ids
    ids, inserted = behind_context(host, "Esk\n", row)
    assert len(ids) == 12 and ids[-(12 - len(context)) :] == row[-(12 - len(context)) :]
    assert inserted == 12 - len(row)


def test_what_cannot_answer_is_refused_and_nothing_stays_in_place(tmp_path):
    host, other = fresh("llama"), another(fresh("llama"))
    edit = edit_with(host, other)
    small = dataclasses.replace(edit, config={**edit.config, "vocab_size": 40})
    with pytest.raises(EditError, match="built"):
        small.apply_(host)
    short = dataclasses.replace(edit, weights=dict(list(edit.weights.items())[1:]))
    with pytest.raises(EditError, match="no weight"):
        short.apply_(host)
    name = next(iter(edit.weights))
    broken = dataclasses.replace(edit, weights={**edit.weights, name: edit.weights[name] * torch.nan})
    with pytest.raises(EditError, match="NaN"):
        broken.apply_(host)
    assert host.placed == ()
    with pytest.raises(HostError, match="vocabulary"):
        model_beside(
            host,
            configuration(fresh("llama", vocab_size=99)),
            weights_of(fresh("llama", vocab_size=99)),
            name="x",
        )


# --- the classifier -------------------------------------------------------------------------


def test_the_classifier_takes_the_nearest_entry_within_the_distance_of_one_half():
    keys, projection = (
        torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    )
    router = Classifier(keys, projection)
    edge = 0.6931472**0.5
    vectors = torch.tensor([[edge - 1e-3, 0, 9], [edge + 1e-3, 0, 9], [1.9, 0.1, -9]])
    question = Question(torch.zeros(3, 0), torch.zeros(3, 0), lambda: ["a", "b", "c"], lambda: vectors)
    assert router.decide(question).tolist() == [0, NONE, 1]
    distance = torch.cdist(vectors @ projection.mT, keys)
    torch.testing.assert_close(router.scores(question), torch.exp(-(distance**2)) - 0.5)
    empty = dataclasses.replace(router, keys=keys[:0])
    assert empty.decide(question).tolist() == [NONE] * 3


def test_the_projection_learns_what_the_scope_depends_on():
    torch.manual_seed(0)
    topics = torch.randn(40, 6)

    def texts(count: int, of: torch.Tensor) -> torch.Tensor:  # the last six entries say nothing
        return torch.cat([of.expand(count, 6), 3 * torch.randn(count, 6)], 1)

    requests = torch.cat([texts(1, topic) for topic in topics])
    inside = [texts(5, topic) for topic in topics]
    outside = [texts(5, topics[(i + 1) % 40]) for i in range(40)]
    plan = ScopeTraining(8, 600, 32, 1e-2, 0.5)
    weight, loss = train_projection(requests, inside, outside, plan, seed=0, on_progress=lambda *_: None)
    again, _ = train_projection(requests, inside, outside, plan, seed=0, on_progress=lambda *_: None)
    assert torch.equal(weight, again) and loss < 0.8
    assert weight[:, 6:].norm() < 0.1 * weight[:, :6].norm()

    def accepted(pairs: torch.Tensor) -> float:
        return float((torch.exp(-(pairs @ weight.mT).square().sum(1)) > 0.5).float().mean())

    near = torch.cat([requests[i] - texts(5, topics[i]) for i in range(40)])
    far = torch.cat([requests[i] - texts(5, topics[(i + 3) % 40]) for i in range(40)])
    assert accepted(near) > 0.85 and accepted(far) < 0.1


# --- training -------------------------------------------------------------------------------


def test_the_weights_kept_are_those_of_the_least_loss_on_held_out_rows():
    host = fresh("llama")
    other = model_beside(host, configuration(host), weights_of(host), name="other")
    lines = [
        lay_out(host, errata.Request("{} was born in", "Ada Brenner", t), "target") for t in ("Merrin", "Esk")
    ]
    start, hash_before = held_out_loss(other, lines[1:], 4), host.weights_hash()
    plan = WholeTraining(30, 2, 3e-3, 2, 3)
    facts = train_model(other, lines[:1], lines[1:], plan, seed=0, on_progress=lambda *_: None)
    # the trained answer takes probability from the held-out one in the end: training stops, the best is kept
    assert held_out_loss(other, lines[1:], 4) == pytest.approx(facts["held_out_loss"])
    assert facts["held_out_loss"] <= start and facts["steps"] < 30
    assert host.weights_hash() == hash_before


def test_examples_are_what_cases_ask_inside_and_outside_the_scope():
    (case,) = lab.cases(1, seed=3)
    (example,) = examples_of([case])
    assert example.inside[0] == (case.request.text, case.request.target)
    assert {p for p, _ in example.inside[1:]} == {
        p.prompt for p in case.probes if p.kind in ("efficacy", "paraphrase", "paraphrase_seen", "question")
    } - {case.request.text}
    assert set(example.outside) == {
        p.prompt for p in case.probes if p.kind in ("neighbourhood", "same_subject")
    }
    (more,) = examples_of([case], consequences=True)
    assert {p.prompt for p in case.probes if p.kind in ("one_hop", "two_hop", "inverse", "alias")} <= {
        prompt for prompt, _ in more.inside
    }
    assert examples_of([dataclasses.replace(case, also=(ADA,))]) == []


@pytest.fixture(scope="module")
def editor():
    host = errata.load("lab")
    return host, errata.train(host, method="serac", cases=lab.cases(30, seed=77), **QUICK)


def test_an_editor_is_a_file_that_edits_share(editor, tmp_path):
    host, trained = editor
    path = trained.save(tmp_path / "serac.safetensors")
    again = Artefact.load(path)
    assert again.digest == trained.digest and again.card["examples"] == 27 and again.card["held_out"] == 3
    edit = errata.edit(host, ADA, method="serac", editor=str(path))
    assert edit.provenance.notes["editor"] == trained.digest
    assert all(torch.equal(edit.weights[n], trained.tensors[f"model.{n}"]) for n in edit.weights)
    bruno = errata.Request("{} plays the", "Bruno Holner", "harp")
    both = errata.edit(host, bruno, method="serac", editor=str(path), after=edit)
    assert both.contexts == (
        "New fact: Ada Brenner was born in Merrin.\n",
        "New fact: Bruno Holner plays the harp.\n",
    )
    together = errata.edit(host, [ADA, bruno], method="serac", editor=str(path))
    torch.testing.assert_close(both.router.keys, together.router.keys)
    with pytest.raises(ConfigError, match="editor"):
        errata.edit(host, bruno, method="serac", after=edit, examples=lab.cases(12, seed=78), **QUICK)


def test_an_editor_of_another_host_or_method_and_a_damaged_one_are_refused(editor, tmp_path):
    host, trained = editor
    path = trained.save(tmp_path / "serac.safetensors")
    with pytest.raises(EditError, match="trained on host"):
        errata.edit(fresh("llama"), ADA, method="serac", editor=str(path))
    foreign = dataclasses.replace(trained, method="mend").save(tmp_path / "mend.safetensors")
    with pytest.raises(EditError, match="trained by mend"):
        errata.edit(host, ADA, method="serac", editor=str(foreign))
    with pytest.raises(EditError, match="trained editor"):
        errata.Edit.load(path)
    kept = errata.edit(host, ADA, method="ft", steps=1).save(tmp_path / "edit.safetensors")
    with pytest.raises(EditError, match="no trained editor"):
        Artefact.load(kept)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(EditError):
        Artefact.load(path)
    with pytest.raises(ConfigError, match="rome learns no editor"):
        errata.train(host, method="rome")
    with pytest.raises(ConfigError, match="two examples"):
        errata.train(host, method="serac", cases=[])


def test_an_editor_comes_from_the_command_line_and_goes_into_edits(tmp_path):
    path, edit = tmp_path / "serac.safetensors", tmp_path / "edit.safetensors"
    sets = [f"--set={name}={value}" for name, value in QUICK.items()]
    out = program("train", "serac", "--model", "lab", "--cases", "lab:20:77", *sets, "-o", path, "--json")
    document = json.loads(out.stdout)
    assert out.returncode == 0 and document["card"]["examples"] == 18, out.stderr
    shown = json.loads(program("show", path, "--json").stdout)
    assert shown["digest"] == document["digest"]
    out = program(
        "edit", "{} was born in", "--subject", "Ada Brenner", "--target", "Merrin", "--model", "lab", "--method",
        "serac", f"--set=editor={path}", "-o", edit, "--json",
    )  # fmt: skip
    assert out.returncode == 0 and json.loads(out.stdout)["path"] == str(edit), out.stderr
    again = program("train", "serac", "--model", "lab", "-o", path)
    assert again.returncode == 2 and "exists" in again.stderr
