"""UpdateROUGE and the other scores of rewritten articles; what is forgotten for what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.data.reading import read
from errata.evaluation.metrics import REGISTRY, article, generate
from errata.evaluation.metrics._metric import ProbeResult
from errata.evaluation.metrics.summary import legacy_scores, summarise
from errata.types import Observation, Probe

OLD = "Ada is a singer. She lives in Esk. Her band is Tallow."
NEW = "Ada is a singer and composer. She lives in Esk. In 2020 she joined Merrin Choir."
EVIDENCE = "(0) Merrin_Choir Ada, composer, joined in 2020"
PROBE = Probe("long", f"[0] Ada is a singer. [CONTEXT] {EVIDENCE}", (NEW,), (OLD,), form="long")


def result(before: str, after: str, probe: Probe = PROBE) -> ProbeResult:
    one, other = (Observation(text, (), (), ()) for text in (before, after))
    return ProbeResult("case", probe, one, other)


def test_only_what_changed_counts():
    assert article.changed(NEW, OLD) == [
        "Ada is a singer and composer.", "In 2020 she joined Merrin Choir.",
    ]  # fmt: skip
    copied, right = article.update_rouge(OLD, NEW, OLD), article.update_rouge(OLD, NEW, NEW)
    assert (copied.rouge1, copied.rouge2, copied.rouge_l) == (0.0, 0.0, 0.0)
    assert (right.rouge1, right.rouge2, right.rouge_l) == (1.0, 1.0, 1.0)
    assert article.update_rouge(OLD, OLD, OLD).rouge1 == 1.0  # nothing to change and nothing changed
    assert article.update_rouge(OLD, OLD, NEW).rouge1 == 0.0


def test_update_rouge_by_hand():
    text = "Ada is a singer and poet. She lives in Esk. Her band is Tallow."
    scores = article.update_rouge(OLD, NEW, text)
    # of "ada is a singer and poet" (6 words) and the 12 of the two new sentences, 5 are shared, in 4 pairs of 5 and 11
    assert scores.rouge1 == pytest.approx(2 * 5 / (6 + 12))
    assert scores.rouge2 == pytest.approx(2 * 4 / (5 + 11))
    assert scores.rouge_l == pytest.approx(2 * 5 / (6 + 12))


def test_sentences_are_cut_where_a_capital_or_digit_follows():
    text = "He left (early.) Then 3.5 m of e.g. wood fell. 2 left.  It ended!"
    assert article.sentences(text) == [
        "He left (early.)",
        "Then 3.5 m of e.g. wood fell.",
        "2 left.",
        "It ended!",
    ]


def test_names_are_recalled_from_the_evidence_and_the_others_unsupported():
    assert article.names("In 2020 she joined Merrin Choir. The Old Road fell.") == {
        "2020", "Merrin Choir", "Old Road",
    }  # fmt: skip
    evidence = EVIDENCE.replace("_", " ")
    assert article.name_recall(OLD, NEW, NEW, evidence) == 1.0
    assert article.name_recall(OLD, NEW, f"{OLD} In 2020 she joined others.", evidence) == 0.5
    assert article.name_recall(OLD, NEW, f"{OLD} She joined others.", "Others") is None, "none could be known"
    assert article.name_recall(OLD, NEW, OLD, EVIDENCE) == 0.0
    assert article.name_recall(OLD, OLD, OLD, EVIDENCE) is None
    assert article.name_precision(OLD, f"{OLD} In 2020 Bruno Holner came.", EVIDENCE) == 0.5
    assert article.name_precision(OLD, OLD, EVIDENCE) is None


def test_sentences_that_stay():
    assert article.retained(OLD, NEW, NEW) == (1.0, 1.0, 1.0)
    precision, recall, f = article.retained(OLD, NEW, OLD)  # keeps three, of which one should stay
    assert (precision, recall, f) == (pytest.approx(1 / 3), 1.0, 0.5)
    assert article.retained(OLD, NEW, "Other.") == (0.0, 0.0, 0.0)
    assert article.retained(OLD, "New.", "Other.") == (1.0, 1.0, 1.0)


def test_rows_have_old_article_and_evidence():
    (row,) = article.rows(result(OLD, NEW))
    assert (row.before, row.after) == (0.0, 1.0)
    assert (row.detail["exact_before"], row.detail["exact_after"]) == (0.0, 1.0)
    assert article.rows(result(OLD, NEW, Probe("long", "Ada", (NEW,), (OLD,), form="long"))) == []
    scores = legacy_scores(summarise([row]))
    assert scores["UpdateROUGE-L"] == 100.0 and scores["FRUIT.exact"] == 100.0
    assert scores["FRUIT.name-recall"] == 100.0  # the evidence spells one of them Merrin_Choir
    assert legacy_scores(summarise([row]), side="before")["UpdateROUGE-1"] == 0.0
    assert "article" in {metric.name for metric in REGISTRY.values()}


def test_published_articles(shared_fruit):
    cases = read(f"fruit@{shared_fruit}").cases
    for case in cases:
        (probe,) = case.probes
        old, new = probe.before[0], probe.answers[0]
        (row,) = article.rows(result(old, new, probe))
        assert row.after == 1.0 and row.before < 1.0
        assert row.detail["retained_f_after"] == 1.0


@pytest.fixture
def shared_fruit() -> Path:
    path = Path(__file__).parents[4] / "shared/data/fruit/inputlabels.jsonl"
    if not path.exists():
        pytest.skip("needs FRUIT's file beside the repository")
    return path


def test_fuar_is_loss_over_gain():
    summary = {
        "efficacy.generate": {"macro_before": 0.0, "macro_after": 0.8},
        "neighbourhood.generate": {"macro_before": 0.9, "macro_after": 0.7},
        "same_subject.generate": {"macro_before": 0.6, "macro_after": 0.8},
        "two_hop.generate": {"macro_before": 0.9, "macro_after": 0.0},
    }
    assert generate.fuar(summary, "after") == pytest.approx((0.2 + 0.0) / 2 / 0.8)
    assert generate.fuar(summary, "before") is None
    nothing = {**summary, "efficacy.generate": {"macro_before": 0.8, "macro_after": 0.8}}
    assert generate.fuar(nothing, "after") is None
    assert generate.fuar({"efficacy.generate": summary["efficacy.generate"]}, "after") is None
