"""From observations to rows to averages: an unchanged host, an oracle, groups, and numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from errata.errors import DataError
from errata.evaluation import score
from errata.evaluation.metrics import REGISTRY, consistency
from errata.types import Case, Observation, Probe, Request, Row

REQUEST = Request("{} is in", "Ada", "Tallow", "Esk")
LONG = "Ada was born in Tallow, where she kept bees. She moved to Oa in the year of the flood."

PROBES = (
    Probe("efficacy", "Ada is in", ("Tallow",), ("Esk",), "Esk"),
    Probe("paraphrase", "Ada lives in", ("Tallow",), ("Esk",), "Esk"),
    Probe("neighbourhood", "Bo is in", ("Esk",), ("Esk",), "Tallow"),
    Probe("multi_hop", "Which river?", ("Merrin",), ("Oa",), group="m"),
    Probe("multi_hop", "What river is it?", ("Merrin",), ("Oa",), group="m"),
    Probe("multi_hop", "Which river? Think.", ("Merrin",), ("Oa",), form="thought", group="m"),
    Probe("hop", "Where?", ("Tallow",), ("Esk",), group="h", need="all"),
    Probe("hop", "River?", ("Merrin",), ("Merrin",), group="h", need="all"),
    Probe("long", "Tell me of Ada.", (LONG,), (), form="long"),
    Probe("entity", "It was a", ("flood",), (), form="choice", choices=("fire", "flood")),
    Probe("entity_locality", "The sea is", ("blue",), ("blue",), form="span"),
    Probe("generation", "Ada is a", (), (), form="open"),
)
CASE = Case("c", REQUEST, PROBES)


def oracle(probe: Probe) -> Observation:
    """Answer a probe right, as sure as can be."""
    answer = probe.answers[0] if probe.answers else "keeper of bees who lives by the old harbour"
    text = {"thought": f"Ada is in Tallow.\nAnswer: {answer}.", "long": answer}.get(probe.form, f" {answer}.")
    return Observation(
        text,
        answer_logprobs=(0.0, 0.0),
        answer_top=(True, True),
        rival_logprobs=() if probe.rival is None else (-9.0,),
        next_logprobs=torch.tensor([0.5, 0.5]).log() if probe.kind == "neighbourhood" else None,
        choice_logprobs=tuple((0.0,) if choice in probe.answers else (-5.0,) for choice in probe.choices),
    )


def wrong(probe: Probe) -> Observation:
    """Give the old answer."""
    old = probe.before[0] if probe.before else "nothing of that kind"
    return Observation(
        f" {old}.",
        answer_logprobs=(-3.0, -1.0),
        answer_top=(False, True),
        rival_logprobs=() if probe.rival is None else (-0.5,),
        next_logprobs=torch.tensor([0.9, 0.1]).log() if probe.kind == "neighbourhood" else None,
        choice_logprobs=tuple((-5.0,) if choice in probe.answers else (0.0,) for choice in probe.choices),
    )


def answer(text: str) -> Observation:
    return Observation(text, (-1.0,), (True,), ())


def test_a_host_that_did_not_change_scores_as_the_unedited_one():
    for host in (oracle, wrong):
        seen = [host(probe) for probe in PROBES]
        rows = score.rows(CASE, seen, seen)
        made_by_runs = {metric.name for metric in REGISTRY.values() if not metric.by_judge}
        assert {row.protocol for row in rows} == made_by_runs - {
            "article",
            "named",
            "stereotyped",
            "pronoun_preference",
            "reference",
            "routing",
            *(("trace",) if host is wrong else ()),  # it gives its answers at once
        }
        assert all(row.before == row.after for row in rows)
        summary = score.summarise(rows)
        for entry in summary.values():
            assert entry["macro_before"] == entry["macro_after"]
            for name in ("exact", "old"):
                if name in entry and entry["n"]:
                    assert entry[name] == entry[f"{name}_before"]
        before, after = (score.legacy_scores(summary, side=side) for side in ("before", "after"))
        assert {k: v for k, v in after.items() if not k.startswith("NKL")} == before
        assert summary["neighbourhood.kl"]["p95"] == 0.0
        assert score.paired(rows, rows)["efficacy.generate"].mean == 0.0


def test_an_oracle_scores_one_under_every_protocol():
    rows = score.rows(CASE, [wrong(p) for p in PROBES], [oracle(p) for p in PROBES])
    values = {f"{row.kind}.{row.protocol}": row.after for row in rows}
    shares = {k: v for k, v in values.items() if not k.endswith((".kl", ".fluency"))}
    assert shares == dict.fromkeys(shares, 1.0), "perplexity too: 1 is the least there is"
    assert {"hop.all.generate", "multi_hop.any.generate", "multi_hop.thought.any.generate"} <= set(shares)
    before = {f"{row.kind}.{row.protocol}": row.before for row in rows}
    kept = ("neighbourhood.generate", "hop.generate")
    changed = {k: before[k] for k in shares if k.endswith(".generate") and k not in kept}
    assert changed == dict.fromkeys(changed, 0.0)
    scores = score.legacy_scores(score.summarise(rows))
    full = (
        "ES",
        "PS",
        "NS",
        "S",
        "Rel",
        "Gen",
        "MH.any",
        "MH.mean",
        "MH.any.thought",
        "Instance",
        "ROUGE-L",
        "EI.acc",
    )
    assert {name: scores[name] for name in full} == dict.fromkeys(full, 100.0)


def test_rows_of_free_generation_say_more_than_right_or_wrong():
    before = [answer(" Esk."), answer(" Esk."), answer(" Esk, yes."), *map(wrong, PROBES[3:])]
    after = [
        answer(" Tallow."),
        answer(" in Tallow, once Esk."),
        answer(" Esk, yes. "),
        *map(wrong, PROBES[3:]),
    ]
    bare = [replace(p, rival=None) for p in PROBES[:3]]
    rows = score.rows(Case("c", REQUEST, (*bare, *PROBES[3:])), before, after)
    efficacy, paraphrase, kept = (
        r for r in rows[:9] if r.protocol == "generate" and r.kind not in ("multi_hop", "hop")
    )
    assert efficacy.detail["old_before"] and not efficacy.detail["old_after"]
    assert efficacy.detail["exact_after"] and not efficacy.detail["exact_before"]
    assert paraphrase.after == 0.0 and paraphrase.detail["old_after"], "both answers are none"
    assert kept.detail["unchanged"] and "old_after" not in kept.detail
    assert "unchanged" not in efficacy.detail


def test_without_texts_nothing_is_said_about_texts():
    seen = [replace(oracle(p), text="") for p in PROBES]
    protocols = {row.protocol for row in score.rows(CASE, seen, seen, generated=False)}
    assert protocols == {"teacher_forced", "probability", "kl", "choice", "perplexity"}
    silent = score.rows(CASE, [oracle(p) for p in PROBES], seen)
    assert {r.after for r in silent if r.protocol in ("generate", "long_form")} == {0.0}, (
        "silence is an answer"
    )


def test_groups_and_their_conditions():
    request = Request("{} is in", "Ada", "Tallow")
    kind = "logical_generalization"
    probes = (
        Probe("efficacy", "Ada is in", ("Tallow",), ("Esk",)),
        Probe("condition", "q1", ("Oa",), ("Oa",), group="t1"),
        Probe(kind, "p1", ("A1",), (), group="t1", need="all"),
        Probe(kind, "p2", ("A2",), (), group="t1", need="all"),
        Probe("condition", "q2", ("Oa",), ("Oa",), group="t2"),
        Probe(kind, "p3", ("A3",), (), group="t2", need="all"),
        Probe(kind, "p4", ("A4",), (), group="t3", need="any"),
        Probe(kind, "p5", ("A5",), (), group="t3", need="any"),
    )
    before = [answer(t) for t in ("Esk", "Oa", "x", "A2", "no idea", "x", "x", "x")]
    after = [answer(t) for t in ("Tallow", "x", "A1", "x", "Oa", "A3", "A4", "x")]
    rows = score.rows(Case("c", request, probes), before, after)
    groups = {row.detail["group"]: row for row in rows if "group" in row.detail}
    # t2's condition was not met by the unedited host; t1's was, and what became of it does not matter
    assert set(groups) == {"t1", "t3"}
    assert (groups["t1"].kind, groups["t1"].before, groups["t1"].after) == (f"{kind}.all", 0.0, 0.0)
    assert groups["t1"].detail["mean_after"] == 0.5 == groups["t1"].detail["mean_before"]
    assert (groups["t3"].kind, groups["t3"].after) == (f"{kind}.any", 1.0)
    # one of the two tests that count is passed, and the edit succeeded
    assert score.ripple_scores(rows) == {kind: 50.0, "mean": 50.0}
    summary = score.summarise(rows)
    assert (
        summary[f"{kind}.any.generate"]["edited"] == 1.0 and summary[f"{kind}.any.generate"]["n_edited"] == 1
    )
    failed = score.rows(Case("c", request, probes), before, [answer("Esk"), *after[1:]])
    assert score.ripple_scores(failed) == {}
    assert score.summarise(failed)[f"{kind}.any.generate"]["edited"] is None


def row(case: str, kind: str, protocol: str, before: float, after: float, **detail) -> Row:
    return Row(case, kind, protocol, "p", before, after, detail)


def test_averages_by_hand():
    table = [
        *(row("a", "paraphrase", "probability", 0, 1, magnitude_after=0.5, magnitude_before=0.0) for _ in range(3)),
        row("b", "paraphrase", "probability", 1, 0, magnitude_after=-0.1, magnitude_before=0.0),
        row("a", "neighbourhood", "probability", 0, 0, changes=False, magnitude_after=-0.2),
        row("a", "neighbourhood", "probability", 1, 1, changes=False, magnitude_after=0.4),
        row("b", "neighbourhood", "probability", 1, 0, changes=False, magnitude_after=-0.2),
        row("a", "efficacy", "probability", 0, 1), row("b", "efficacy", "probability", 0, 1),
    ]  # fmt: skip
    summary = score.summarise(table)
    entry = summary["paraphrase.probability"]
    # over rows 3/4; inside a case first (1 + 0) / 2
    assert (entry["after"], entry["macro_after"], entry["macro_before"]) == (0.75, 0.5, 0.5)
    kept = summary["neighbourhood.probability"]
    # right before: two rows, one of them still; papers count all three: a 1/2, b 0
    assert (kept["after"], kept["n"], kept["macro_after"]) == (0.5, 2, 0.25)
    scores = score.legacy_scores(summary)
    assert (scores["ES"], scores["PS"], scores["NS"]) == (100.0, 50.0, 25.0)
    # 3 / (1/100 + 1/50 + 1/25) = 3 / 0.07
    assert scores["S"] == round(3 / 0.07, 2)
    # PM: a 0.5, b -0.1; NM: a (-0.2 + 0.4) / 2 = 0.1, b -0.2
    assert scores["PM"] == pytest.approx(20.0) and scores["NM"] == pytest.approx(-5.0) and "EM" not in scores
    assert score.rome_scores(summary) == {name: scores[name] for name in ("ES", "PS", "NS", "S")}


def test_shares_beside_right_and_wrong_by_hand():
    changing = [
        row("a", "efficacy", "generate", 0, 1, exact_after=True, old_before=True, old_after=False),
        row("b", "efficacy", "generate", 0, 0, exact_after=False, old_before=True, old_after=True),
        row("c", "efficacy", "generate", 0, 1, exact_after=False, old_before=False, old_after=False),
        row("d", "efficacy", "generate", 0, 1, exact_after=False),
    ]
    entry = score.summarise(changing)["efficacy.generate"]
    assert entry["exact"] == 0.25 and entry["old"] == pytest.approx(1 / 3) and entry["unchanged"] is None
    assert (entry["known"], entry["n_known"], entry["unknown"]) == (0.5, 2, 1.0), (
        "d's old answer is not known"
    )
    kept = [
        row("a", "locality", "generate", 1, 1, changes=False, unchanged=True, exact_after=True),
        row("b", "locality", "generate", 1, 1, changes=False, unchanged=False, exact_after=False),
        row("c", "locality", "generate", 0, 0, changes=False, unchanged=False, exact_after=False),
    ]
    entry = score.summarise(kept)["locality.generate"]
    assert entry["unchanged"] == pytest.approx(1 / 3) and entry["exact"] == 0.5 and entry["old"] is None


def test_measures_are_averaged_over_all_rows():
    table = [
        row("a", "neighbourhood", "kl", 0, float(v), reverse=float(2 * v), nkl_legacy=v / 10)
        for v in range(1, 6)
    ]
    entry = score.summarise(table)["neighbourhood.kl"]
    # 95 % of the way along 1..5 is place 3.8
    assert (entry["mean"], entry["reverse"], entry["n"]) == (3.0, 6.0, 5)
    assert entry["p95"] == pytest.approx(4.8) and entry["reverse_p95"] == pytest.approx(9.6)
    assert score.legacy_scores({"neighbourhood.kl": entry})["NKL"] == pytest.approx(0.3)
    spans = [
        row("a", "entity_locality", "perplexity", 0.5, 3.0, changes=False),
        row("b", "entity_locality", "perplexity", 2, math.inf),
    ]
    entry = score.summarise(spans)["entity_locality.perplexity"]
    assert entry["n"] == 2 and entry["mean"] == math.inf and entry["ci"] == [None, None]
    assert score.legacy_scores({"entity_locality.perplexity": entry}, side="before") == {"PPL.spec": 1.25}


def test_probabilities_and_divergence_reach_the_rows():
    probe = Probe("neighbourhood", "Bo is in", ("Esk",), ("Esk",), "Tallow")
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    old = Observation(" Esk.", (math.log(0.5),), (True,), (math.log(0.1),) * 2, p)
    new = Observation(" Tallow.", (math.log(0.3),), (False,), (math.log(0.6),) * 2, q)
    rows = {r.protocol: r for r in score.rows(Case("c", REQUEST, (probe,)), [old], [new])}
    forced = rows["probability"]
    # per token 0.3 against 0.6, as a whole 0.3 against 0.36
    assert (forced.before, forced.after) == (1.0, 0.0) and not forced.detail["summed_after"]
    assert forced.detail["answer_after"] == pytest.approx(0.3) and forced.detail[
        "rival_after"
    ] == pytest.approx(0.6)
    kl = rows["kl"]
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl.after == pytest.approx(forward, rel=1e-6) and kl.before == 0.0
    assert kl.detail["reverse"] == pytest.approx(reverse, rel=1e-6)
    assert kl.detail["nkl_legacy"] == pytest.approx(reverse / 2, rel=1e-6)
    scores = score.legacy_scores(score.summarise(rows.values()))
    assert scores["DP.neighbourhood"] == pytest.approx(60) and scores["EOS.neighbourhood"] == 0.0


def test_the_most_probable_choice_is_per_token_and_summed():
    probe = Probe("entity", "It was a", ("long one",), (), form="choice", choices=("short", "long one"))
    seen = Observation("", (), (), (), choice_logprobs=((-1.0,), (-0.8, -0.9)))
    case = Case("c", REQUEST, (probe,))
    made = score.rows(case, [seen], [seen])[0]
    # per token -1 against -0.85; as a whole -1 against -1.7
    assert made.after == 1.0 and not made.detail["summed_after"] and made.detail["text_after"] == "long one"
    assert made.detail["probabilities_after"] == pytest.approx([math.exp(-1), math.exp(-0.85)])
    broken = replace(seen, choice_logprobs=((math.nan,), (math.nan,)))
    assert score.rows(case, [seen], [broken])[0].after == 0.0, "numbers that are none choose nothing"
    assert score.rows(case, [answer("")], [answer("")]) == [], "not asked"
    with pytest.raises(DataError, match="2 choices, log-probabilities of 1"):
        score.rows(case, [seen], [replace(seen, choice_logprobs=((-1.0,),))])


def test_long_answers_carry_the_usual_and_the_published_scores():
    case = Case("c", REQUEST, (Probe("long", "Tell", ("the cat on a mat",), (), form="long"),))
    made = score.rows(case, [answer("")], [answer("The cat sat on the mat.")])[0]
    # longest common subsequence of 4 terms, of 6 said and 5 wanted
    assert made.after == pytest.approx(2 * 4 / 11) and made.before == 0.0
    assert made.detail["precision_after"] == pytest.approx(4 / 6)
    assert made.detail["recall_after"] == pytest.approx(4 / 5)
    assert made.detail["length_ratio_after"] == pytest.approx(6 / 5)
    entry = score.summarise([made])["long.long_form"]
    assert entry["recall_after"] == pytest.approx(4 / 5) and entry["bleu_before"] == 0.0
    assert (
        score.legacy_scores({"long.long_form": entry})["ROUGE-L"] == 100 * made.detail["legacy_recall_after"]
    )


def test_open_texts_are_measured_with_their_prompt_and_against_passages():
    probes = tuple(Probe("generation", p, ("cats purr", "dogs bark"), (), form="open") for p in ("Ada", "Bo"))
    case = Case("c", REQUEST, probes)
    idf = consistency.idf(["cats purr", "dogs bark"])
    before, after = [answer(" one two"), answer(" one two")], [answer(" cats purr"), answer(" dogs bark")]
    told = [replace(probe, prompt="cats purr") for probe in probes]
    rows = score.rows(case, before, after, idf=idf, checkpoint=7)
    # Ada one two: two 2-grams and one 3-gram, (2/3 * 1 + 0) / 2 bits
    assert rows[0].protocol == "fluency" and rows[0].before == pytest.approx(100 / 3)
    assert [r.protocol for r in rows] == ["fluency", "fluency", "reference"]
    assert (rows[2].before, rows[2].after) == (0.0, pytest.approx(1.0)), "joined, the texts are the passages"
    with_prompts = score.rows(Case("c", REQUEST, tuple(told)), before, after, idf=idf)[-1]
    assert with_prompts.before == pytest.approx(math.sqrt(0.5)), "cats purr, of cats purr dogs bark"
    assert all(r.detail["checkpoint"] == 7 for r in rows)
    assert score.legacy_scores(score.summarise(rows))["RS"] == pytest.approx(100)
    entry = score.summarise(rows)["generation.fluency"]
    assert (
        entry["mean"] == entry["after"] and entry["distinct_after"] == 1.0 and entry["evenness_after"] is None
    )


@pytest.mark.parametrize("form", ["short", "long", "thought", "choice", "span"])
def test_a_probe_without_an_accepted_answer_is_refused(form):
    case = Case("c", REQUEST, (Probe("efficacy", "Ada is in", (), (), form=form),))
    with pytest.raises(DataError, match="case c, prompt 'Ada is in'.*at least one accepted answer"):
        score.rows(case, [answer("")], [answer("")])


def test_two_methods_side_by_side():
    a = [row(f"c{i}", "efficacy", "generate", 0, float(i < 10)) for i in range(40)]
    b = [row(f"c{i}", "efficacy", "generate", 0, float(i < 30)) for i in range(40)]
    kept = [row(f"c{i}", "locality", "generate", float(i < 2), 1.0, changes=False) for i in range(4)]
    found = score.paired([*a, *kept], [*b, *kept, row("c1", "hop", "generate", 0, 1)])
    assert set(found) == {"efficacy.generate", "locality.generate"}
    assert found["efficacy.generate"].mean == 0.5 and found["efficacy.generate"].clear
    # 20 of 40 cases differ: standard error sqrt(0.5 * 0.5 / 40) = 0.079
    assert found["efficacy.generate"].low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.02)
    assert found["locality.generate"].cases == 2, "only what was right before counts"
