"""ECBD and Entity Inferences: spans, readings of a definition, popular entities, choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip, SubjectAbsent
from errata.data.reading import read
from errata.data.sets import ecbd, entity_inferences

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")


def record(value, index=0):
    return Record(value, f"record {index + 1}", index)


def entity(**fields):
    """A record of ECBD's schema."""
    value = {
        "ex_id": "Zubrowka Fair_1_2",
        "definition": "The Zubrowka Fair (2021) is a yearly <extra_id_0> held in Lutz.",
        "def_target": "<extra_id_0> market of clocks <extra_id_1>",
        "ent_str": "Zubrowka Fair",
        "qid": ["fair (Q1)"],
        "category": "tv_show",
        "attribute": "n/a",
        "additional_sentences": [
            ["The Zubrowka Fair <extra_id_0> Lutz.", "<extra_id_0> is held in <extra_id_1>"]
        ],
        "conceptnet": [],
        "probe_sentences": {
            "template_0": {
                "probe_sentence": "At the Zubrowka Fair one buys <extra_id_0> for the house.",
                "label": "<extra_id_0> clocks <extra_id_1>",
            }
        },
    }
    return value | fields


def inference(**fields):
    """A record of Entity Inferences' schema."""
    value = entity(
        ex_id="fair_dev_0",
        generic_sentences=["<ENT_NAME> is an event."],
        specific_sentences=["a market can sell clocks."],
        label="crowds",
        probe_sentences={
            "template_0": {
                "probe_sentence": "The Zubrowka Fair draws <extra_id_0>.",
                "labels": [f"<extra_id_0> {label} <extra_id_1>" for label in ("snow", "crowds", "snow")],
            }
        },
    )
    del value["additional_sentences"], value["conceptnet"]
    return value | fields


def one(value, variant, dataset=ecbd):
    assert dataset.fits(value)
    (case,) = dataset.cases(record(value), variant)
    return case


def test_the_span_of_the_definition_is_edited_and_that_of_the_probe_is_asked():
    case = one(entity(), "span")
    assert case.id == "ecbd:Zubrowka Fair_1_2"
    assert case.request.text == "The Zubrowka Fair (2021) is a yearly"
    assert case.request.subject == "Zubrowka Fair"
    assert case.request.target == "market of clocks"
    first, probe = case.probes
    assert (first.kind, first.prompt, first.answers) == ("efficacy", case.request.text, ("market of clocks",))
    assert (probe.kind, probe.form, probe.prompt) == ("entity", "span", "At the Zubrowka Fair one buys")
    assert probe.answers == ("clocks",)
    assert probe.changes and probe.before == ()


def test_the_definition_can_be_edited_as_a_whole():
    case = one(entity(), "definition")
    assert case.request.text == "The Zubrowka Fair"
    assert case.request.target == "(2021) is a yearly market of clocks held in Lutz."


def test_a_word_is_not_cut_where_the_whole_definition_is_edited():
    case = one(entity(definition="The Zubrowka Fair's <extra_id_0> is loud."), "definition")
    assert (case.request.text, case.request.target) == ("The Zubrowka Fair's", "market of clocks is loud.")


def test_a_definition_without_its_entity_is_left_out_or_headed_by_it():
    value = entity(definition="Each May, Lutz holds a <extra_id_0>.")
    for variant in ("span", "definition"):
        with pytest.raises(SubjectAbsent, match="'Zubrowka Fair' is not named"):
            list(ecbd.cases(record(value), variant))
    case = one(value, "titled")
    assert case.request.text == "Zubrowka Fair: Each May, Lutz holds a"
    assert one(entity(), "titled").request == one(entity(), "span").request


def test_a_popular_entity_must_stay_as_it_is():
    case = one(entity(), "popular")
    assert [probe.kind for probe in case.probes] == ["efficacy", "entity_locality"]
    assert not any(probe.changes for probe in case.probes)


def test_popular_entities_are_given_as_probes(tmp_path):
    path = tmp_path / "popular.json"
    path.write_text("\n".join(json.dumps(entity(ex_id=name)) for name in ("a", "b")), encoding="utf-8")
    probes = ecbd.popular(path)
    assert [probe.kind for probe in probes] == ["entity_locality"] * 2
    assert probes[0].answers == probes[0].before == ("clocks",)


@pytest.mark.parametrize(
    ("sentence", "filling", "prompt", "answer"),
    [
        ("a yearly <extra_id_0> in Lutz", "<extra_id_0> fair <extra_id_1>", "a yearly", "fair"),
        ("a 31-year-<extra_id_0> fair", "<extra_id_0> old <extra_id_1>", "a", "31-year-old"),
        (
            "an international<extra_id_0> fair",
            "<extra_id_0> , large <extra_id_1>",
            "an international",
            ", large",
        ),
        ("the fair (<extra_id_0>) is", "<extra_id_0> ZF <extra_id_1>", "the fair (", "ZF"),
        ("Category<extra_id_0>.", "<extra_id_0> \xa01 <extra_id_1>", "Category", "1"),
    ],
)
def test_a_span_begins_at_the_border_of_a_word(sentence, filling, prompt, answer):
    cloze = ecbd.Cloze.read(sentence, filling)
    assert (cloze.prompt, cloze.answer) == (prompt, answer)
    # filled literally, as the authors do: the 13 characters of the marks and their space cut at either end
    assert cloze.text == sentence.replace("<extra_id_0>", filling[13:-13])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("Lake Fire (2020)", "The Lake Fire was", "Lake Fire"),
        ("lake fire", "The Lake Fire was", "Lake Fire"),
        ("Eta", "Beta and Eta", "Eta"),
        ("C++ (language)", "In C++ one", "C++"),
        ("Eta", "Beta", None),
    ],
)
def test_an_entity_is_found_as_whole_words(name, text, found):
    place = ecbd.mention(name, text)
    assert (text[slice(*place)] if place else None) == found


@pytest.mark.parametrize(
    "fields",
    [
        {"definition": "no mask"},
        {"definition": "<extra_id_0> and <extra_id_0>"},
        {"def_target": "<extra_id_0> <extra_id_1>"},
        {"probe_sentences": {}},
        {"probe_sentences": {"template_0": "text"}},
        {"ent_str": 3},
    ],
)
def test_what_has_another_schema_is_malformed(fields):
    with pytest.raises(Malformed):
        list(ecbd.cases(record(entity(**fields)), "span"))


def test_a_span_at_the_very_beginning_cannot_be_asked():
    with pytest.raises(Skip, match="no text comes before"):
        ecbd.Cloze.read("<extra_id_0> is a fair", "<extra_id_0> This <extra_id_1>")


def test_an_inference_is_a_choice_of_labels():
    assert not ecbd.fits(inference()) and not entity_inferences.fits(entity())
    case = one(inference(), "span", entity_inferences)
    assert case.id == "entity_inferences:fair_dev_0"
    probe = case.probes[1]
    assert (probe.kind, probe.form, probe.prompt) == ("entity", "choice", "The Zubrowka Fair draws")
    assert probe.choices == ("snow", "crowds") and probe.answers == ("crowds",)
    assert entity_inferences.facts([case]) == {"rows fair_dev_*": 1}


def test_the_right_label_must_be_among_the_choices():
    with pytest.raises(Malformed, match="'rain' is none of those to choose from: snow, crowds"):
        list(entity_inferences.cases(record(inference(label="rain")), "span"))


@needs_files
@pytest.mark.parametrize(
    ("source", "rows", "named"),
    [("ecbd/span@ecbd_np_easy.json", 114, 99), ("ecbd/popular@ecbd_specificity.json", 40, 40)],
)
def test_the_published_entities_are_read(source, rows, named):
    dataset, _, name = source.partition("@")
    check = read(f"{dataset}@{SHARED / name}").check
    assert (check.rows, check.cases, len(check.malformed)) == (rows, named, 0)
    assert check.rows - check.cases == len(check.skipped) == check.subject_absent
    assert len(read(f"ecbd/titled@{SHARED / name}").cases) == rows


@needs_files
@pytest.mark.parametrize(
    ("name", "rows", "named"),
    [
        ("disaster_explicit_attribute_independent", 27, 14),
        ("fake_person_explicit_attribute_dependent", 12, 11),
        ("fake_person_implicit_attribute_dependent_adjective", 12, 11),
        ("tv_show_explicit_attribute_dependent", 46, 46),
    ],
)
def test_the_published_inferences_are_read(name, rows, named):
    path = SHARED / "entity_inferences" / f"{name}.json"
    check = read(f"entity_inferences/span@{path}").check
    assert (check.rows, check.cases, len(check.malformed)) == (rows, named, 0)
    every = read(path)  # told by its records, the reading that keeps all rows
    assert (every.check.dataset, every.check.variant) == ("entity_inferences", "titled")
    assert len(every.cases) == rows
    assert all(case.probes[1].answers[0] in case.probes[1].choices for case in every.cases)


@needs_files
def test_published_sentences_are_filled_as_the_authors_fill_them():
    lines = (SHARED / "ecbd_np_easy.json").read_text(encoding="utf-8").splitlines()
    for value in map(json.loads, lines):
        masked_crc32c = [(value["definition"], value["def_target"])]
        masked_crc32c += [(p["probe_sentence"], p["label"]) for p in value["probe_sentences"].values()]
        for sentence, filling in masked_crc32c:
            filled = sentence.replace("<extra_id_0>", filling[13:-13])
            assert ecbd.Cloze.read(sentence, filling).text == filled
