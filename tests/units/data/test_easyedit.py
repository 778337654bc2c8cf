"""EasyEdit's sets of EMNLP 2023, on rows of CounterFact and zsRE, and PIQA."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record, Skip, SubjectAbsent
from errata.data.reading import read
from errata.data.sets import counterfact, easyedit_locality, easyedit_portability, zsre
from errata.errors import DataError

COUNTERFACT = {
    "case_id": 21,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "subject": "Vela Orn",
        "target_new": {"str": "Kesh"},
        "target_true": {"str": "Sund"},
    },
    "paraphrase_prompts": ["Rain fell. Vela Orn, from", "Vela Orn is from"],
}
ZSRE = {
    "subject": "Vela Orn",
    "src": "Where was Vela Orn born?",
    "rephrase": "What is the birthplace of Vela Orn?",
    "answers": ["Sund", "Sund City"],
    "alt": "Kesh",
    "pred": "Taland",
}
HOP = {
    "portability": {
        "Recalled Relation": "(Kesh, river, Lum)",
        "New Question": "Which river?",
        "New Answer": "Lum",
    }
}


def case(dataset, record, variant="", index=3):
    (made,) = dataset.DATASET.cases(Record(record, "record 4", index), variant)
    return made


def asked(made, kind):
    return [(p.prompt, p.answers, p.before) for p in made.probes if p.kind == kind]


@pytest.mark.parametrize(
    ("base", "name", "prompt", "paraphrases", "before"),
    [
        (COUNTERFACT, "21", "Vela Orn was born in", COUNTERFACT["paraphrase_prompts"], ("Sund",)),
        (ZSRE, "3", ZSRE["src"], [ZSRE["rephrase"]], ("Sund", "Sund City")),
    ],
)
def test_one_hop_on_either_base(base, name, prompt, paraphrases, before):
    made = case(easyedit_portability, {**base, **HOP}, "one-hop")
    assert made.id == f"easyedit_portability:{name}"
    assert (made.request.text, made.request.target, made.request.target_old) == (prompt, "Kesh", "Sund")
    assert made.probes[0].rival == "Sund"
    assert asked(made, "efficacy") == [(prompt, ("Kesh",), before)]
    assert asked(made, "paraphrase") == [(text, ("Kesh",), before) for text in paraphrases]
    assert asked(made, "one_hop") == [("Which river?", ("Lum",), ())]


def test_the_inverse_asks_for_the_subject():
    made = case(easyedit_portability, {**ZSRE, "inverse question": "Who was born in Kesh?"}, "inverse")
    assert asked(made, "inverse") == [("Who was born in Kesh?", ("Vela Orn",), ())]


def test_another_name_of_the_subject():
    made = case(easyedit_portability, {**COUNTERFACT, "alternative_subject": "V. Orn"}, "subject-replace")
    assert asked(made, "alias") == [("V. Orn was born in", ("Kesh",), ("Sund",))]
    both = {"alternative_subject": "V. Orn", "alter_subject_question": "Where was V. Orn born?"}
    made = case(easyedit_portability, {**ZSRE, **both}, "subject-replace")
    assert asked(made, "alias") == [("Where was V. Orn born?", ("Kesh",), ("Sund", "Sund City"))]


def test_rows_without_a_question_or_a_subject_are_skipped():
    with pytest.raises(Skip, match="no portability question"):
        case(easyedit_portability, {**COUNTERFACT, "portability": {"New Question": ""}})
    with pytest.raises(SubjectAbsent, match="does not occur in prompt"):
        case(easyedit_portability, {**ZSRE, **HOP, "subject": "Bo Orn"})
    with pytest.raises(Malformed, match="New Answer"):
        case(easyedit_portability, {**ZSRE, "portability": {"New Question": "Which river?"}})


NEIGHBOURS = {
    "neighborhood_prompts": ["Bo Orn was born in"],
    "distracting_neighborhood_prompts": ["Vela Orn was born in Kesh. Bo Orn was born in"],
}
OTHER = {"unrelated_relation": {"question": "Vela Orn plays the", "object": "harp", "relation": "P1303"}}


def test_distracted_neighbours_keep_their_answer_against_the_new_one():
    made = case(easyedit_locality, {**COUNTERFACT, **NEIGHBOURS}, "distracting")
    assert made.id == "easyedit_locality:21"
    plain, distracted = made.probes[1:]
    assert (plain.kind, distracted.kind) == ("neighbourhood", "distracting")
    assert plain.prompt == NEIGHBOURS["neighborhood_prompts"][0]
    assert distracted.prompt.endswith(plain.prompt)
    for probe in (plain, distracted):
        assert (probe.answers, probe.before, probe.rival) == (("Sund",), ("Sund",), "Kesh")


def test_another_fact_of_the_subject_is_kept():
    made = case(easyedit_locality, {**COUNTERFACT, **OTHER}, "other-attribution")
    assert asked(made, "same_subject") == [("Vela Orn plays the", ("harp",), ("harp",))]
    assert made.probes[-1].rival == "Kesh"
    assert easyedit_locality.DATASET.facts([made]) == {"same_subject": 1}
    with pytest.raises(Skip, match="no locality question"):
        case(easyedit_locality, COUNTERFACT)


ROWS = [{"goal": f"Open jar {i}.", "sol1": "Twist it.", "sol2": "Sing to it."} for i in range(3)]


def piqa(folder, rows=ROWS, labels="0\n1\n0\n"):
    path, beside = folder / "piqa_valid.jsonl", folder / "piqa_valid-labels.lst"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    beside.write_text(labels, encoding="utf-8")
    return path, beside


def test_piqa_asks_which_solution(tmp_path):
    probes = easyedit_locality.commonsense(*piqa(tmp_path))
    assert [p.answers for p in probes] == [("Twist it.",), ("Sing to it.",), ("Twist it.",)]
    for probe in probes:
        assert (probe.kind, probe.form) == ("other_task", "choice")
        assert probe.choices == ("Twist it.", "Sing to it.") and probe.answers[0] in probe.choices
        assert not probe.changes
    assert probes[1].prompt == "Question: Open jar 1.\nAnswer:"


def test_piqa_rows_may_carry_their_labels(tmp_path):
    path, _ = piqa(tmp_path, [{**row, "label": 1} for row in ROWS])
    assert {p.answers for p in easyedit_locality.commonsense(path)} == {("Sing to it.",)}


def test_piqa_needs_its_labels(tmp_path):
    path, labels = piqa(tmp_path, labels="0\n1\n")
    with pytest.raises(DataError, match="3 rows .* 2 labels"):
        easyedit_locality.commonsense(path, labels)
    with pytest.raises(Malformed, match="line 1: label: expected 0 or 1, found 'None'"):
        easyedit_locality.commonsense(path)
    with pytest.raises(DataError, match="cannot read"):
        easyedit_locality.commonsense(path, tmp_path / "absent")


def test_piqa_goes_to_other_cases_every_question_once(tmp_path):
    cases = [case(easyedit_locality, {**COUNTERFACT, **OTHER, "case_id": i}) for i in range(2)]
    probes = easyedit_locality.commonsense(*piqa(tmp_path))
    first, second = easyedit_locality.with_commonsense(cases, probes)
    assert first.probes == (*cases[0].probes, probes[0], probes[2])
    assert second.probes == (*cases[1].probes, probes[1])
    with pytest.raises(Skip, match="has no request"):
        case(easyedit_locality, ROWS[0], "piqa")


def test_they_are_told_apart():
    portable = [
        {**COUNTERFACT, **HOP},
        {**ZSRE, **HOP},
        {**ZSRE, "inverse question": "Who?"},
        {**COUNTERFACT, "alternative_subject": "V. Orn"},
    ]
    local = [{**COUNTERFACT, **NEIGHBOURS}, {**COUNTERFACT, **OTHER}, ROWS[0]]
    for record in portable:
        assert easyedit_portability.DATASET.fits(record) and not easyedit_locality.DATASET.fits(record)
    for record in local:
        assert easyedit_locality.DATASET.fits(record) and not easyedit_portability.DATASET.fits(record)
    # the published rows keep the other fields of the rows they extend, which alone are a set of their own
    facts = {"neighborhood_prompts": ["Bo Orn was born in"], "attribute_prompts": []}
    asks = {"loc": "nq question: who", "loc_ans": "Bo"}
    for record, base, own in [
        *((record, counterfact.DATASET, facts) for record in (portable[0], portable[3], *local[:2])),
        *((record, zsre.DATASET, asks) for record in portable[1:3]),
    ]:
        assert not base.fits({**own, **record})
    assert counterfact.DATASET.fits({**COUNTERFACT, **facts}) and zsre.DATASET.fits({**ZSRE, **asks})
    # EVOKE goes on from the one-hop rows, with questions of its own
    assert not easyedit_portability.DATASET.fits({**COUNTERFACT, **HOP, "prefix_distraction": []})
    for record in (COUNTERFACT, ZSRE, {}, [], "x"):
        assert not easyedit_portability.DATASET.fits(record) and not easyedit_locality.DATASET.fits(record)


ASKS = {"loc": "nq question: who sings", "loc_ans": "the lark"}


def test_one_file_gives_portability_and_locality():
    made = case(easyedit_portability, {**ZSRE, **HOP, **ASKS})
    assert asked(made, "locality") == [("nq question: who sings?", ("the lark",), ("the lark",))]
    assert asked(made, "one_hop") and asked(made, "paraphrase")
    made = case(easyedit_portability, {**COUNTERFACT, **HOP, "neighborhood_prompts": ["Bo Orn was born in"]})
    assert asked(made, "neighbourhood") == [("Bo Orn was born in", ("Sund",), ("Sund",))]
    assert not asked(case(easyedit_portability, {**ZSRE, **HOP}), "locality")


@pytest.mark.parametrize("alt", ["Sund", "sund", " Sund City ", "SUND CITY"])
def test_a_wrong_answer_that_is_a_gold_one_is_left_out(alt):
    with pytest.raises(Skip, match="changes nothing"):
        case(easyedit_portability, {**ZSRE, **HOP, "alt": alt})


def test_rows_that_hold_all_questions_are_of_the_set_on_locality(tmp_path):
    """As the published files do, whose two names are of the same bytes."""
    record = {**COUNTERFACT, **NEIGHBOURS, **OTHER, **HOP}
    for name in ("copy.json", "counterfact_distracting_neighbor.json", "counterfact_portability_gpt4.json"):
        path = tmp_path / name
        path.write_text(json.dumps([record]), encoding="utf-8")
        found = read(path)
        assert found.check.name == "easyedit_locality/distracting"
        assert found.check.probes == {
            "efficacy": 1, "neighbourhood": 1, "distracting": 1, "same_subject": 1, "one_hop": 1,
        }  # fmt: skip
    path = tmp_path / "counterfact_other_attribution.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    assert read(path).check.name == "easyedit_locality/other-attribution"


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({**COUNTERFACT, **NEIGHBOURS}, "easyedit_locality/distracting"),
        ({**COUNTERFACT, **OTHER}, "easyedit_locality/other-attribution"),
        (ROWS[0], "easyedit_locality/piqa"),
        ({**ZSRE, **HOP}, "easyedit_portability/one-hop"),
        ({**ZSRE, "inverse question": "Who was born in Kesh?"}, "easyedit_portability/inverse"),
        ({**COUNTERFACT, "alternative_subject": "V. Orn"}, "easyedit_portability/subject-replace"),
    ],
)
@pytest.mark.parametrize(
    "file", ["copy.json", "zsre_inverse_relation.json", "counterfact_other_attribution.json"]
)
def test_their_sets_are_told_by_their_records_under_any_name(tmp_path, record, name, file):
    path = tmp_path / file
    path.write_text(json.dumps([record]), encoding="utf-8")
    assert read(path).check.name == name
