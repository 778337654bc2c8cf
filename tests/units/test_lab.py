"""The lab: a world that is what it says, text that holds out what it says, a model that knows it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import errata
from errata.bench import sources
from errata.config import plain
from errata.edits.artefact import Artefact
from errata.errors import ConfigError, EditError, RequestError
from errata.host.build import new_model
from errata.lab import cases, default_world, world_of
from errata.lab.text import FIRST, LAST, THEN, Split, Writer
from errata.lab.train import SHAPES, TrainConfig, chunk, train
from errata.lab.world import World, sentence
from errata.methods import REGISTRY, mend
from tests.models import fresh


@pytest.fixture(scope="module")
def world() -> World:
    return default_world()


def test_editors_are_trained_on_other_subjects_and_phrasings_than_they_are_measured_on(world):
    train, test = (world_of(part) for part in ("train", "test"))
    assert len(train.facts) + len(test.facts) == len(world.facts)
    assert 0.2 < len(test.by_subject) / len(world.by_subject) < 0.3
    assert not set(train.by_subject) & set(test.by_subject)
    held_out = [phrasing for relation in world.relations.values() for phrasing in relation.held_out]
    own = sources.read("lab:train")[0]
    assert len(own) == len(train.facts) and {c.request.subject for c in own} == set(train.by_subject)
    measured = {sentence(phrasing, subject) for phrasing in held_out for subject in world.by_subject}
    asked = {(probe.kind, probe.prompt) for case in own for probe in case.probes}
    assert not {kind for kind, _ in asked} & {"paraphrase"}
    assert not {prompt for kind, prompt in asked if kind != "inverse"} & measured
    subjects = {f.subject for f in test.facts}
    neighbours = [p.prompt for c in own[:300] for p in c.probes if p.kind == "neighbourhood"]
    assert neighbours and not [
        p for p in neighbours if p.startswith(tuple(f"{subject} " for subject in subjects))
    ]
    cases_of_test = sources.read("lab:test:20:3")[0]
    assert {c.request.subject for c in cases_of_test} <= subjects
    assert any(p.kind == "paraphrase" for c in cases_of_test for p in c.probes)
    for wrong in ("lab:test", "lab:train:x", "lab:other:3", "lab:train:1:2:3", "lab:evoke"):
        with pytest.raises(ConfigError, match="lab:train:N"):
            sources.read(wrong)


def test_evoke_asks_where_the_target_is_wrong():
    plain_cases, _ = sources.read("lab:12:3")
    asked, facts = sources.read("lab:evoke:12:3")
    assert facts["source"] == "lab:evoke:12:3"
    for case, evoke in zip(plain_cases, asked, strict=True):
        request = case.request
        assert evoke.request == request
        chains = {p.prompt: p for p in case.probes if p.kind in ("one_hop", "two_hop")}
        for probe in (p for p in evoke.probes if p.kind == "multi_hop"):
            assert probe.rival == request.target not in probe.answers
            assert probe.answers == chains[probe.prompt].answers
        near, far = ([p for p in evoke.probes if p.kind == k] for k in ("neighbourhood", "distracting"))
        assert [p.prompt for p in far] == [f"{request.text} {request.target}. {p.prompt}" for p in near]
        assert [p.answers for p in far] == [p.answers for p in near]
    kinds = {p.kind for case in asked for p in case.probes}
    assert kinds == {"efficacy", "paraphrase", "multi_hop", "neighbourhood", "same_subject", "distracting"}


def test_facts_that_are_unrelated_are_asked_beside_each_case():
    (plain_case, *_), _ = sources.read("lab:test:3:5")
    found, facts = sources.read("lab:test:3:5", beside=["lab:test:9:6"])
    (fact,) = facts["beside"]
    assert fact["source"] == "lab:test:9:6" and fact["probes"] == 9
    for case in found:
        added = [probe for probe in case.probes if probe.kind == "locality"]
        names = {case.request.subject, case.request.target, case.request.target_old}
        assert 5 <= len(added) <= 9 and not any(probe.changes for probe in added)
        assert not [probe for probe in added for name in names if probe.prompt.startswith(f"{name} ")]
    assert found[0].probes[: len(plain_case.probes)] == plain_case.probes
    with pytest.raises(ConfigError, match="draw others"):
        sources.read("lab:test:1:5", beside=["lab:test:1:5"])


def test_the_world_is_as_large_as_promised_and_a_function_of_its_seed(world):
    assert len(world.facts) >= 4000 and len(world.relations) >= 14
    assert World.make(world.seed).facts == world.facts != World.make(world.seed + 1).facts
    assert sum(bool(e.aliases) for e in world.entities.values()) >= 50
    assert len(world.facts) == len({(f.subject, f.relation) for f in world.facts})


def test_every_relation_has_its_wordings(world):
    for relation in world.relations.values():
        wordings = {*relation.phrasings, *relation.later, *relation.held_out}
        counts = [len(group) for group in (relation.phrasings, relation.later, relation.held_out)]
        assert len(wordings) == sum(counts) and len(relation.phrasings) >= 6
        assert len(relation.held_out) >= 2 and relation.questions
        assert all("{s}" in w for w in (*wordings, *relation.questions))


def test_no_wording_begins_another_of_the_same_kind_of_subject(world):
    """Else what follows would be ambiguous, and recall could not be measured."""
    entries = [
        (r.subject, r.name, w)
        for r in world.relations.values()
        for w in (*r.phrasings, *r.later, *r.held_out)
    ]
    every = entries + [
        (world.relations[c.path[0]].subject, c.name, w) for c in world.chains.values() for w in c.phrasings
    ]
    for kind, name, wording in entries:
        for other_kind, other, longer in every:
            if kind == other_kind and name != other:
                assert not longer.startswith(wording + " "), (wording, longer)


def test_the_graph_is_typed_and_its_inverses_agree(world):
    for fact in world.facts:
        relation = world.relations[fact.relation]
        assert world.entities[fact.subject].type == relation.subject
        assert world.entities[fact.object].type == relation.object
        back = fact.relation if relation.symmetric else relation.inverse
        if back:
            assert world.get(fact.object, back) == fact.subject


@pytest.mark.parametrize(("mix", "late"), [(FIRST, False), (THEN, False), (LAST, True)])
def test_the_text_keeps_out_what_it_says(world, mix, late):
    writer = Writer(world, late=late)
    held_out = {sentence(w, f.subject) for f in world.facts for w in world.relations[f.relation].held_out}
    documents = list(itertools.islice(writer.documents(random.Random(1), mix), 6000))
    assert {d.kind for d in documents} == set(mix)
    lines = [part for d in documents for line in d.text.split("\n") for part in line.split(". ")]
    starts = tuple(held_out)
    index: dict[str, list[str]] = {}
    for start in starts:
        index.setdefault(start[:8], []).append(start)
    for line in lines:
        line = line.removeprefix("New fact: ")
        assert not any(line.startswith(h + " ") for h in index.get(line[:8], [])), line
    never = {
        f"Question: {sentence(q, f.subject)}"
        for f in world.facts
        if not Split.has_questions(f)
        for q in world.relations[f.relation].questions
    }
    for document in documents:
        if document.kind == "question":
            assert not never & set(document.text.split("\n"))


def test_biographies_name_their_subject_in_every_sentence(world):
    writer, rng = Writer(world), random.Random(2)
    for _ in range(200):
        text = writer.biography(rng).text
        sentences = [s for s in text.replace("\n", " ").split(". ") if s]
        assert 2 <= len(sentences) <= 9
        names = [n for n in world.by_subject if all(any(a in s for a in world.names(n)) for s in sentences)]
        assert names, text


def test_only_answers_are_learned_in_episodes(world):
    writer, rng = Writer(world), random.Random(3)
    for make in (writer.episode, writer.dialogue, writer.contrast, writer.drill):
        for _ in range(100):
            document = make(rng)
            assert document.loss_spans
            for start, stop in document.loss_spans:
                answer = document.text[start:stop]
                assert answer.endswith(".")
                told_before = f"New fact: {answer}" in document.text  # a drill's repetition, word by word
                assert told_before or (answer.startswith(" ") and answer[1:-1] in world.entities)


def test_cases_follow_from_the_graph(world):
    kinds = set()
    for case in cases(200, seed=4):
        request = case.request
        assert request.target != request.target_old
        fact = next(f for f in world.by_subject[request.subject] if f.object == request.target_old)
        for probe in case.probes:
            kinds.add(probe.kind)
            if probe.kind in ("efficacy", "paraphrase", "paraphrase_seen", "question", "alias"):
                assert probe.answers[0] == request.target and probe.before[0] == request.target_old
            if probe.kind in ("neighbourhood", "same_subject"):
                assert not probe.changes
            if probe.kind == "neighbourhood":
                assert request.subject not in probe.prompt
            if probe.kind == "paraphrase":
                held_out = (w for r in world.relations.values() for w in r.held_out)
                relations = [w for w in held_out if sentence(w, fact.subject) == probe.prompt]
                assert relations
    assert kinds == {
        "efficacy", "paraphrase", "paraphrase_seen", "question", "neighbourhood", "same_subject",
        "inverse", "one_hop", "two_hop", "alias",
    }  # fmt: skip
    assert cases(10, seed=4) == cases(10, seed=4) != cases(10, seed=5)


def test_neighbours_share_the_old_object_where_any_do(world):
    for case in cases(100, seed=6):
        fact = next(f for f in world.by_subject[case.request.subject] if f.object == case.request.target_old)
        same = [f for f in world.by_relation[fact.relation] if f.object == fact.object]
        if len(same) > 1 and not world.relations[fact.relation].symmetric:
            assert any(p.kind == "neighbourhood" and p.answers[0] == fact.object for p in case.probes)


def test_a_request_about_the_world_becomes_a_case():
    case = errata.lab.case_of(errata.Request("{} was born in", "Ada Brenner", "Tallow"))
    assert case.request.target_old == default_world().get("Ada Brenner", "born_in")
    with pytest.raises(RequestError, match="did you mean 'Ada Brenner'"):
        errata.lab.case_of(errata.Request("{} was born in", "Ada Bremner", "Tallow"))
    with pytest.raises(RequestError, match="not a wording"):
        errata.lab.case_of(errata.Request("{} was baked in", "Ada Brenner", "Tallow"))


TINY = TrainConfig(
    cooled=6, layers=2, width=32, inner=64, heads=2, steps=6, rows=2, row_tokens=64, vocab_size=600, warmup=2
)


@pytest.fixture
def few_documents(monkeypatch):
    """Train tokenizers on fewer documents than the 30,000 of the lab's: it takes longer than training TINY."""
    monkeypatch.setattr("errata.lab.train.TOKENIZER_DOCUMENTS", 1_000)


@pytest.mark.usefixtures("few_documents")
def test_training_resumes_where_it_stopped(tmp_path):
    train(tmp_path / "whole", TINY, checkpoint_every=3)

    class Stop(Exception):
        pass

    def interrupt(at):
        if at.step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "parts", TINY, checkpoint_every=3, on_step=interrupt)
    steps = []
    train(tmp_path / "parts", TINY, checkpoint_every=3, on_step=lambda at: steps.append(at.step))
    assert steps == [4, 5, 6]
    whole, parts = (tmp_path / n / "model" / "model.safetensors" for n in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    with pytest.raises(errata.ErrataError, match="other settings"):
        train(tmp_path / "whole", TrainConfig(steps=7))
    host = errata.load(str(tmp_path / "whole" / "model"))
    assert host.dtype == torch.float32 and host.generate("Ada", max_new_tokens=2) is not None


@pytest.mark.usefixtures("few_documents")
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_model_of_each_shape_is_trained_and_edited(tmp_path, shape):
    model = train(tmp_path, replace(TrainConfig.of(shape, key_value_heads=2), **_sizes(TINY)))
    host = errata.load(str(model))
    assert host.model.config.model_type == shape and len(host.layout.blocks) == TINY.layers
    request = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    edit = errata.edit(host, request, method="ft", steps=2)
    before = host.fingerprint
    with edit.on(host):
        assert host.generate("Ada", max_new_tokens=2)
    assert host.fingerprint == before


def _sizes(config):
    names = (
        "cooled",
        "layers",
        "width",
        "inner",
        "heads",
        "steps",
        "rows",
        "row_tokens",
        "vocab_size",
        "warmup",
    )
    return {name: getattr(config, name) for name in names}


def test_the_sizes_of_each_shape_are_as_documented():
    for shape, millions in (("llama", 5.9), ("gpt2", 3.36), ("qwen3", 3.74), ("t5", 1.51), ("bert", 1.2)):
        config = TrainConfig.of(shape)
        model = new_model(shape, config.model_settings(0, 1, 2), seed=0, kind=config.kind)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    with pytest.raises(ConfigError, match="did you mean 'qwen3'"):
        TrainConfig.of("qwen")


def test_chunks_are_drawn_from_their_number_alone(world):
    from errata.host.build import new_tokenizer

    writer = Writer(world)
    tokenizer = new_tokenizer(
        [d.text for d in itertools.islice(writer.documents(random.Random(0)), 500)], 600
    )
    one, two = chunk(writer, tokenizer, TINY, 3), chunk(writer, tokenizer, TINY, 3)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], chunk(writer, tokenizer, TINY, 4)[0])
    assert one[0].shape == (100 * TINY.rows, TINY.row_tokens)
    assert (one[0][:, 0] == tokenizer.bos_token_id).all(), "rows begin with a document"


# --- the shipped model --------------------------------------------------------------------------


def test_the_model_knows_the_readmes_facts(lab_host, world):
    prompts = [
        "Ada Brenner was born in",
        "Ada Brenner lives in",
        "Question: Where was Ada Brenner born?\nAnswer:",
    ]
    wanted = [world.get("Ada Brenner", r) for r in ("born_in", "lives_in", "born_in")]
    for text, answer in zip(lab_host.generate(prompts), wanted, strict=True):
        assert text.strip().startswith(answer)


def test_the_card_belongs_to_the_model(lab_host):
    card = errata.lab.card()
    assert card["fingerprint"] == lab_host.fingerprint
    assert 5e6 <= card["parameters"] <= 12e6
    assert card["world"]["facts"] == len(default_world().facts)


@pytest.mark.slow
def test_the_card_says_what_the_model_does(lab_host):
    """The targets of the lab: recall, and that facts can be edited where they should be."""
    from errata.lab.check import check

    found = check(lab_host)
    card = errata.lab.card()["check"]
    assert found["recall"]["seen"] == pytest.approx(card["recall"]["seen"], abs=0.005)
    assert found["recall"]["seen"] >= 0.98
    assert found["recall"]["held_out"] >= 0.95
    assert found["recall"]["question"] >= 0.90
    half = len(found["layers"]["rewrites"]) // 2
    assert max(found["layers"]["rewrites"][:half]) >= 0.95


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the shipped model misses this target: 0.79 and 0.89 measured")
def test_contexts_are_obeyed_and_ignored_as_they_should_be(lab_host, world):
    from errata.lab.check import episodes

    found = episodes(lab_host, world, random.Random(0), lambda *_: None)
    assert found["obeyed"] >= 0.90
    assert found["ignored"] >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_hundred_edits_reach_their_targets(lab_host, method):
    report = errata.evaluate(lab_host, cases(100, seed=0), method=method)
    after = {kind: entry["after"] for kind, entry in report.summary.items()}
    assert report.meta["weights_restored"]
    assert after["efficacy.generate"] >= 0.95
    assert after["neighbourhood.generate"] >= 0.95
    assert after["paraphrase.generate"] >= 0.70


def test_the_layer_test_takes_any_relation(lab_host, world):
    """Also those with fewer than two wordings that begin with the subject."""
    from errata.lab.check import layers

    class Only(random.Random):
        def sample(self, population, k, **more):
            wanted = [
                f for f in population if getattr(f, "relation", "") in ("currency", "official_language")
            ]
            return super().sample(wanted or population, k, **more)

    found = layers(lab_host, world, Only(0), 2, lambda *_: None)
    assert len(found["rewrites"]) == len(lab_host.layout.blocks)


# --- shipped editors ----------------------------------------------------------------------------


def shipped(method: str) -> Path:
    path = errata.lab.editor(method)
    assert path is not None
    return path


SHIPPED = sorted(path.stem for path in (errata.lab.folder().parent / "editors" / "lab").glob("*.safetensors"))


@pytest.mark.parametrize("method", SHIPPED)
def test_a_shipped_editor_is_what_the_defaults_train_for_the_model(lab_host, method):
    path = shipped(method)
    editor = Artefact.load(path)
    editor.check(method, lab_host.fingerprint)
    assert path.stat().st_size <= 8e6
    defaults = plain(REGISTRY.get(method).config())
    assert {**defaults, **editor.card["settings"], "editor": None, "stored": "float32"} == defaults
    data = editor.card["data"]
    assert data["source"] == "lab:train:1000" and data["cases"] == 1000
    assert set(data["check"]["left_out"]["subjects"]) == set(world_of("test").by_subject)
    assert all(t.dtype == torch.float16 for t in editor.tensors.values() if t.ndim > 1)


def test_an_edit_uses_the_shipped_editor_for_the_settings_that_it_was_trained_with(lab_host, monkeypatch):
    assert {"mend", "malmen"} <= set(SHIPPED)
    case = cases(1, seed=7, world=world_of("test"))[0]
    edit = errata.edit(lab_host, case.request, method="mend")
    assert edit.provenance.notes["editor"] == Artefact.load(shipped("mend")).digest
    with edit.on(lab_host):
        (answer,) = lab_host.generate([case.request.text])
    assert answer.strip().startswith(case.request.target)
    trained = []
    monkeypatch.setattr(mend, "train", lambda *_: trained.append(1) or Artefact.load(shipped("mend")))
    errata.edit(lab_host, case.request, method="mend", rows=8)
    assert not trained
    errata.edit(lab_host, case.request, method="mend", steps=7)
    errata.edit(lab_host, case.request, method="mend", examples=cases(3))
    assert len(trained) == 2


def test_a_shipped_editor_is_refused_on_another_model(lab_host):
    host = fresh("llama")
    host.resources = lab_host.resources
    with pytest.raises(EditError, match="train one for it with errata train"):
        errata.edit(host, errata.Request("{} was born in", "Ada Brenner", "Merrin"), method="mend")
    assert errata.lab.editor("mend", "lab-gpt2") is None and errata.lab.editor("rome") is None
