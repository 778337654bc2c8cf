"""The lab's second language: its words, what its text keeps out, cases in two languages, and the model's training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
import torch

import errata
from errata.bench import sources
from errata.errors import ConfigError
from errata.evaluation import score
from errata.evaluation.metrics.languages import matrices, transfer
from errata.lab import bilingual, load
from errata.lab.bilingual import FIRST, MIX, SECOND, BilingualWriter, is_taught, languages
from errata.lab.cases import world_of
from errata.lab.train import TrainConfig, train
from errata.lab.world import default_world, sentence
from errata.types import Case, Observation, Probe, plain_case


@pytest.fixture(scope="module")
def both():
    return languages()


def wordings(relation):
    return (*relation.phrasings, *relation.later, *relation.held_out)


def test_half_of_the_relations_have_words_of_their_own(both):
    first, second = both
    assert len(second.relations) * 2 == len(first.relations) and first.facts == second.facts
    assert {f.relation for f in first.facts} == set(second.relations)
    kinds = {relation.subject for relation in second.relations.values()}
    assert kinds == {relation.subject for relation in first.relations.values()}
    words = {w for r in second.relations.values() for one in wordings(r) for w in one.split() if w != "{s}"}
    others = {w.lower() for r in first.relations.values() for one in wordings(r) for w in one.split()}
    names = {w for name in first.entities for w in name.split()}  # most are capitalised, no invented word is
    assert not words & (others | names)
    assert languages(default_world())[1].relations == second.relations  # a function of the world's seed
    for relation in second.relations.values():
        assert relation.inverse is None or relation.inverse in second.relations


def test_no_wording_of_the_second_language_begins_another(both):
    every = [(r.subject, r.name, w) for r in both[1].relations.values() for w in wordings(r)]
    for (kind, name, wording), (other_kind, other, longer) in itertools.product(every, every):
        if kind == other_kind and name != other:
            assert wording != longer and not longer.startswith(wording + " ")


def test_the_text_keeps_a_fifth_of_the_subjects_and_the_held_out_wordings_out_of_the_second_language(both):
    _, second = both
    subjects = set(second.by_subject)
    assert 0.15 < sum(not is_taught(name) for name in subjects) / len(subjects) < 0.25
    documents = list(itertools.islice(BilingualWriter(default_world()).documents(random.Random(1)), 3000))
    text = "\n".join(document.text for document in documents)
    marks = {name: [w for w in wording.split() if w != "{s}"] for name, r in second.relations.items()
             for wording in r.phrasings[:1]}  # fmt: skip
    assert all(mark[0] in text for mark in marks.values())
    kept_out = {
        sentence(wording, subject) + " "
        for subject, facts in second.by_subject.items()
        for fact in facts
        for wording in (
            second.relations[fact.relation].held_out
            if is_taught(subject) else wordings(second.relations[fact.relation])
        )
    }  # fmt: skip
    starts = {line for d in documents for part in d.text.split("\n") for line in part.split(". ")}
    ends = tuple(kept_out)
    index = {}
    for one in ends:
        index.setdefault(one[:9], []).append(one)
    assert not [line for line in starts for one in index.get(line[:9], ()) if line.startswith(one)]
    assert {kind for kind in MIX if kind != "first"} <= {document.kind for document in documents}


def test_a_case_asks_for_the_same_answers_in_both_languages(both):
    _, second = both
    (case, *_), facts = sources.read("lab:bilingual:4:7")
    assert facts["cases"] == 4 and case.request.language == FIRST
    crossed = [probe for probe in case.probes if probe.kind.startswith("cross_")]
    assert {p.language for p in crossed} == {SECOND} and {p.language for p in case.probes} == {FIRST, SECOND}
    own = next(probe for probe in case.probes if probe.kind == "efficacy")
    other = next(probe for probe in crossed if probe.kind == "cross_efficacy")
    assert (own.answers, own.before, own.rival) == (other.answers, other.before, other.rival)
    relation = next(f.relation for f in default_world().by_subject[case.request.subject]
                    if f.object == case.request.target_old and f.relation in second.relations)  # fmt: skip
    assert other.prompt in {sentence(w, case.request.subject) for w in second.relations[relation].phrasings}
    kept = [p for p in crossed if p.kind == "cross_neighbourhood"]
    assert kept and not any(p.changes for p in kept)
    reverse = sources.read("lab:bilingual-tavi:4:7")[0][0]
    assert reverse.request.language == SECOND and reverse.request.subject == case.request.subject
    assert {p.language for p in reverse.probes if p.kind.startswith("cross_")} == {FIRST}
    by_turns = sources.read("lab:bilingual-both:4:7")[0]
    assert [c.request.language for c in by_turns] == [FIRST, SECOND, FIRST, SECOND]


def test_what_editors_are_trained_on_shares_nothing_with_what_measures():
    trained = sources.read("lab:bilingual-both:train:60")[0]
    subjects = set(world_of("test").by_subject)
    kinds = {probe.kind for case in trained for probe in case.probes}
    assert {"cross_efficacy", "cross_question"} <= kinds and not kinds & {"paraphrase", "cross_paraphrase"}
    assert not {case.request.subject for case in trained} & subjects
    measured = sources.read("lab:bilingual:test:20")[0]
    assert {case.request.subject for case in measured} <= subjects
    together = bilingual.cases(30, together=True)
    assert len({case.request.text for case in together}) == 30
    with pytest.raises(ConfigError, match="for single edits"):
        bilingual.cases(3, together=True, edited="both")
    for wrong in ("lab:bilingual", "lab:bilingual:test", "lab:bilingual:x"):
        with pytest.raises(ConfigError, match="bilingual-tavi"):
            sources.read(wrong)


def test_languages_are_part_of_an_identity_only_where_they_are_told(tmp_path):
    probe = Probe("efficacy", "A is in", ("C",), ("B",), "B")
    case = Case("1", errata.Request("{} is in", "A", "C", "B", "1"), (probe,))
    assert "language" not in json.dumps(plain_case(case))
    told = Case(
        "1", dataclasses.replace(case.request, language="x"), (dataclasses.replace(probe, language="y"),)
    )
    assert plain_case(told)["request"]["language"] == "x" and plain_case(told)["probes"][0]["language"] == "y"
    from errata.data.requests import read_cases, write_cases

    write_cases(tmp_path / "cases.jsonl", [told])
    assert read_cases(tmp_path / "cases.jsonl") == [told]


def observed(text):
    return Observation(text, (-0.1,), (True,), (-1.0,))


def test_rows_by_the_language_of_the_edit_and_of_the_question():
    def case(name, edited, asked):
        probes = (
            Probe("efficacy", "A is in", ("C",), ("B",), language=edited),
            Probe("cross_efficacy", "in A", ("C",), ("B",), language=asked),
            Probe("cross_locality", "in D", ("E",), ("E",), language=asked),
        )
        return Case(name, errata.Request("{} is in", "A", "C", language=edited), probes)

    before = [observed("B"), observed("B"), observed("E")]
    rows = [
        *score.rows(case("1", "x", "y"), before, [observed("C"), observed("B"), observed("E")]),
        *score.rows(case("2", "x", "y"), before, [observed("C"), observed("C"), observed("B")]),
        *score.rows(case("3", "y", "x"), before, [observed("C"), observed("B"), observed("E")]),
    ]
    found = matrices(rows)
    efficacy = {e: {a: (c["after"], c["n"]) for a, c in row.items()} for e, row in found["efficacy"].items()}
    assert efficacy == {"x": {"x": (1.0, 2), "y": (0.5, 2)}, "y": {"y": (1.0, 1), "x": (0.0, 1)}}
    assert transfer(found["efficacy"]) == pytest.approx(0.25)
    assert found["locality"]["x"]["y"]["after"] == 0.5 and transfer(found["locality"]) is None
    assert matrices([dataclasses.replace(row, detail={}) for row in rows]) == {}


VARIANT = TrainConfig.of_variant("bilingual", steps=2, rows=1, row_tokens=32, precision="float32", warmup=1)


def test_the_variant_goes_on_from_the_shipped_model_and_resumes(tmp_path):
    train(tmp_path / "whole", VARIANT, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", VARIANT, checkpoint_every=1, on_step=_interrupt)
    train(tmp_path / "parts", VARIANT, checkpoint_every=1)
    whole, parts = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    host, shipped = errata.load(str(tmp_path / "whole" / "model")), load()
    assert host.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    moves = [(host.model.get_parameter(name) - weight).detach().abs().max()
             for name, weight in shipped.model.named_parameters()]  # fmt: skip
    assert 1e-4 < float(torch.stack(moves).max()) < 0.02  # two small steps away
    with pytest.raises(ConfigError, match="other settings"):
        train(tmp_path / "whole", dataclasses.replace(VARIANT, variant=None))


def _interrupt(at):
    if at.step == 2:
        raise KeyboardInterrupt


def test_variants_are_refused_where_they_mean_nothing(tmp_path):
    with pytest.raises(ConfigError, match="variant of the lab"):
        TrainConfig.of_variant("trilingual")
    with pytest.raises(ConfigError, match="knows every entity"):
        train(tmp_path, dataclasses.replace(VARIANT, without=("Ada Brenner",)))


def test_recall_in_the_second_language_is_of_subjects_taught_and_not(lab_host):
    from errata.lab.check import second_language

    found = second_language(lab_host, default_world(), random.Random(0), lambda *_: None, 24)
    assert set(found) == {"taught", "never_taught"}
    for shares in found.values():
        assert set(shares) == {"seen", "held_out", "question"} and max(shares.values()) < 0.6


def test_statistics_are_taken_over_both_languages(both):
    corpus = bilingual.corpus(40)
    texts = list(corpus.texts())
    assert len(texts) == 40 and texts == list(corpus.texts())
    verbs = {w.split()[0] for r in both[1].relations.values() for w in r.phrasings[:1]}
    assert any(verb in text for verb in verbs for text in texts) and any(" is " in text for text in texts)
