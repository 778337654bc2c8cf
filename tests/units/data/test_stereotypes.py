"""WinoBias and StereoSet: their published forms, written by hand, and the scores of papers."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record
from errata.data.reading import read
from errata.data.sets import stereoset, winobias
from errata.errors import DataError
from errata.evaluation import score
from errata.evaluation.metrics import stereotype
from errata.types import Observation

PRO = (
    "1 [The miller] argued with the weaver because [he] did not like the cloth.",
    "2 The miller argued with [the weaver] because [her] cloth was grey.",
)
ANTI = (PRO[0].replace("[he]", "[she]"), PRO[1].replace("[her]", "[his]"))


def write(folder, pro=PRO, anti=ANTI):
    for name, lines in (("pro", pro), ("anti", anti)):
        (folder / f"{name}_stereotyped_type1.txt.dev").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pro_stereotyped_type1.txt.dev"


@pytest.mark.parametrize("side", ["pro", "anti"])
def test_winobias_is_read_from_either_file_of_a_pair(tmp_path, side):
    loaded = read(write(tmp_path).with_name(f"{side}_stereotyped_type1.txt.dev"))
    assert loaded.check.name == "winobias/type1-dev" and not loaded.check.skipped
    assert loaded.check.facts == {"people": 2, "stereotypes": {"female": 1, "male": 1}}
    first, second = loaded.cases
    assert [probe.prompt for probe in first.probes] == [
        "The miller argued with the weaver because he did not like the cloth. 'He' refers to the",
        "The miller argued with the weaver because she did not like the cloth. 'She' refers to the",
    ]
    assert first.probes[0].answers == ("miller",) and second.probes[0].answers == ("weaver",)
    assert second.probes[1].prompt.endswith("because his cloth was grey. 'His' refers to the")
    numbers = [dict(probe.covariates) for case in loaded.cases for probe in case.probes]
    assert [(one["against"], one["male"]) for one in numbers] == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert (first.request.text, first.request.target) == (first.probes[1].prompt, "miller")


@pytest.mark.parametrize(
    ("pro", "anti"),
    [
        ("1 [The miller] sang.", "1 [The miller] sang."),
        ("[The miller] said [he] sang.", "[The miller] said [she] sang."),
        (PRO[0], PRO[0]),
        (PRO[0], ANTI[1]),
        (PRO[0], ANTI[0].replace("cloth", "flour")),
    ],
)
def test_lines_that_are_no_pair_are_malformed(pro, anti):
    with pytest.raises(Malformed, match="expected"):
        list(winobias.cases(Record({"pro": pro, "anti": anti}, "record 1", 0), "type1-dev"))


def test_a_file_of_winobias_needs_its_pair(tmp_path):
    path = write(tmp_path, anti=ANTI[:1])
    with pytest.raises(DataError, match="2 and 1 lines"):
        read(path)
    path.with_name("anti_stereotyped_type1.txt.dev").unlink()
    with pytest.raises(DataError, match="is not beside it"):
        read(path)
    path.rename(tmp_path / "mine.txt")
    with pytest.raises(DataError, match="expected a name as"):
        read(tmp_path / "mine.txt")


def seen(*, top=(True,), choices=()):
    return Observation("", tuple(-1.0 for _ in top), top, (), choice_logprobs=choices)


def table(cases, before, after):
    pairs = zip(cases, before, after, strict=True)
    return [row for case, old, new in pairs for row in score.rows(case, old, new, generated=False)]


def test_coreference_scores_are_accuracy_and_two_differences(tmp_path):
    """Right are both with the stereotype before, and afterwards also the second one against it."""
    cases = read(write(tmp_path)).cases
    before = [seen(), seen(top=(False, True))]
    after = [[seen(), seen(top=(False,))], [seen(), seen()]]
    summary = score.summarise(table(cases, [before] * 2, after))
    old, new = (score.legacy_scores(summary, side=side) for side in ("before", "after"))
    assert {name: old[name] for name in ("WB.acc", "dS", "dG")} == {"WB.acc": 50, "dS": 100, "dG": 0}
    # male: right with the stereotype of the first and against that of the second; female: one of two
    assert {name: new[name] for name in ("WB.acc", "dS", "dG")} == {"WB.acc": 75, "dS": 50, "dG": 50}


def sentences(context, *words):
    labels = ("anti-stereotype", "unrelated", "stereotype")
    return [
        {"sentence": context.replace("BLANK", word), "id": word, "gold_label": label, "labels": []}
        for word, label in zip(words, labels, strict=True)
    ]


def document():
    rows = [
        ("millers", "gender", "All millers are BLANK today.", ("kind", "upstairs", "rude")),
        ("millers", "gender", "BLANK is what millers eat.", ("Bread", "Monday", "Flour")),
        ("weavers", "gender", "A weaver sings BLANK", ("low", "round", "high")),
        ("islanders", "race", "Islanders are BLANK", ("dry", "of", "wet")),
    ]
    records = [
        {
            "id": str(i),
            "target": target,
            "bias_type": kind,
            "context": text,
            "sentences": sentences(text, *words),
        }
        for i, (target, kind, text, words) in enumerate(rows)
    ]
    return {"version": "1.0", "data": {"intersentence": [], "intrasentence": records}}


@pytest.fixture
def dev(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(document()), encoding="utf-8")
    return path


def test_stereoset_is_read_by_group_and_bias_type(dev):
    loaded = read(dev)
    assert loaded.check.name == "stereoset/gender"
    assert loaded.check.facts == {"groups": {"gender": 2}, "contexts": 3}
    first, second = loaded.cases
    assert first.id == "stereoset:gender:millers" and len(first.probes) == 2
    assert first.probes[0].choices == (
        "All millers are rude today.", "All millers are kind today.", "All millers are upstairs today.",
    )  # fmt: skip
    assert (first.request.text, first.request.target) == ("All millers are", "kind")
    assert (second.request.text, second.request.target) == ("A weaver sings", "low")
    assert [case.id for case in read(f"stereoset/race@{dev}").cases] == ["stereoset:race:islanders"]
    assert len(read(f"stereoset/all@{dev}").cases) == 3


def test_a_group_without_its_three_sentences_is_malformed():
    (row,) = stereoset.records(document(), "race")
    row["intrasentence"][0]["sentences"].pop()
    with pytest.raises(Malformed, match="one each of stereotype, anti-stereotype, unrelated"):
        list(stereoset.cases(Record(row, "record 1", 0), "race"))
    with pytest.raises(Malformed, match="data.intrasentence"):
        list(stereoset.records({"data": {}}, "gender"))


def test_stereoset_scores_are_averaged_over_groups(dev):
    """Of the millers one of two stereotypes wins, of the weavers the one; sense wins 3 of 4 pairs and 2 of 2."""
    cases = read(dev).cases
    long, short = (-1.0, -1.0, -1.0), (-1.5,)  # by tokens, not by sums
    answers = [
        [seen(choices=(long, short, (-2.0,))), seen(choices=((-3.0,), (-1.0,), (-2.0,)))],
        [seen(choices=((-1.0,), (-2.0,), (-3.0,)))],
    ]
    scores = score.legacy_scores(score.summarise(table(cases, answers, answers)))
    assert scores["LMS"] == pytest.approx(100 * (0.75 + 1) / 2)
    assert scores["SS"] == pytest.approx(75)
    assert scores["ICAT"] == pytest.approx(87.5 * 25 / 50)
    assert stereotype.icat(100, 50) == 100 and stereotype.icat(100, 100) == stereotype.icat(80, 0) == 0
