"""Intervals, retention, cost and bias, against closed forms and hand-made numbers."""

from __future__ import annotations

import math
import random
import statistics
import time

import pytest

from errata.evaluation.metrics import bias, collapse, cost, intervals, retention
from errata.evaluation.metrics.retention import EditRecall, Health
from errata.types import Row


def test_a_share_of_single_rows_has_the_binomial_interval():
    cases = [[1.0]] * 70 + [[0.0]] * 30
    low, high = intervals.bootstrap(cases)
    # the number right among 100 draws is Binomial(100, 0.7), whose 2.5 and 97.5 % quantiles are 61 and 79
    assert low == pytest.approx(0.61, abs=0.01) and high == pytest.approx(0.79, abs=0.01)


def test_many_different_values_have_the_normal_interval():
    rng = random.Random(1)
    values = [rng.gauss(5, 2) for _ in range(400)]
    low, high = intervals.bootstrap([[v] for v in values])
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    expected = (mean - 1.96 * spread / 20, mean + 1.96 * spread / 20)
    assert (low, high) == pytest.approx(expected, abs=0.03)
    assert expected[1] - expected[0] == pytest.approx(2 * 1.96 * 2 / 20, rel=0.1)


def test_both_ways_of_drawing_agree():
    rng = random.Random(2)
    cases = [[float(rng.random() < 0.4) for _ in range(3)] for _ in range(200)]
    few = intervals.bootstrap(cases)
    # shifted by next to nothing every case is different, so whole rows are drawn
    many = intervals.bootstrap([[v + 1e-9 * i for v in case] for i, case in enumerate(cases)])
    assert few == pytest.approx(many, abs=0.01)


def test_whole_cases_are_drawn():
    rows = [[1.0] * 50, [0.0] * 50]
    assert intervals.bootstrap(rows) == (0.0, 1.0), "two cases, not a hundred rows"
    single = [[v] for case in rows for v in case]
    low, high = intervals.bootstrap(single)
    assert low > 0.35 and high < 0.65


def test_intervals_repeat_and_do_not_depend_on_order():
    rng = random.Random(3)
    cases = [[rng.random()] for _ in range(100)]
    shuffled = rng.sample(cases, len(cases))
    assert intervals.bootstrap(cases, seed=5) == intervals.bootstrap(shuffled, seed=5)
    assert intervals.bootstrap(cases, seed=5) != intervals.bootstrap(cases, seed=6)
    assert intervals.bootstrap([]) is None is intervals.bootstrap([[]])
    assert intervals.bootstrap([[1.0], [math.inf]]) is None is intervals.bootstrap([[math.nan]])


def test_ten_thousand_resamples_of_a_hundred_cases_are_fast():
    rng = random.Random(4)
    cases = [[rng.random()] for _ in range(100)]
    at = time.process_time()
    intervals.bootstrap(cases)
    assert time.process_time() - at < 0.3


def test_pairing_sees_what_single_intervals_do_not():
    rng = random.Random(5)
    hardness = {f"c{i}": rng.gauss(0, 10) for i in range(60)}
    first = {name: [h] for name, h in hardness.items()}
    second = {name: [h + 1 + rng.gauss(0, 0.5)] for name, h in hardness.items()}
    found = intervals.paired(first, second)
    assert found.clear and found.cases == 60 and found.mean == pytest.approx(1, abs=0.3)
    assert found.low < found.mean < found.high and found.high - found.low < 0.5
    a, b = intervals.bootstrap(list(first.values())), intervals.bootstrap(list(second.values()))
    assert a[1] > b[0], "apart their intervals overlap"
    back = intervals.paired(second, first)
    # a quantile of 10,000 draws has a standard error of about 0.03 standard deviations, here 0.002
    assert back.mean == pytest.approx(-found.mean)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.01)
    same = intervals.paired(first, first)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.clear
    assert intervals.paired({"a": [1.0]}, {"b": [1.0]}) is None, "no case in common"
    assert intervals.paired(first | {"only": [9.0]}, second).cases == 60


def test_small_averages():
    assert intervals.macro([[1, 1, 1, 1], [0]]) == 0.5 and intervals.macro([]) is None
    # 0.95 of the way along 1..5 is place 3.8: 4 + 0.8
    assert intervals.quantile([5, 1, 4, 2, 3], 0.95) == pytest.approx(4.8)
    assert intervals.quantile([1, math.inf], 1.0) == math.inf and intervals.quantile([], 0.5) is None
    assert math.isnan(intervals.quantile([1.0, math.nan], 0.5))


SEEN = [
    EditRecall(1, 1, 1.0),
    EditRecall(1, 10, 1.0), EditRecall(10, 10, 1.0), EditRecall(5, 10, 0.0),
    EditRecall(1, 100, 0.0), EditRecall(5, 100, 0.0), EditRecall(100, 100, 1.0), EditRecall(60, 100, 1.0),
]  # fmt: skip


def test_retention_by_age_and_look():
    assert retention.by_age(SEEN) == {0: 1.0, 5: 0.0, 9: 1.0, 40: 1.0, 95: 0.0, 99: 0.0}
    assert retention.mean_by_count(SEEN) == {1: 1.0, 10: pytest.approx(2 / 3), 100: 0.5}
    strata = retention.strata(SEEN)
    assert [(s.youngest, s.oldest, s.n) for s in strata] == [(0, 0, 3), (1, 9, 2), (32, 99, 3)]
    assert [s.right for s in strata] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_retention_is_read_off_rows():
    def row(case: str, edits: int | None, after: float, kind: str = "efficacy") -> Row:
        detail = {} if edits is None else {"checkpoint": edits}
        return Row(case, kind, "generate", "p", 0.0, after, detail)

    table = [
        row("b", 2, 1.0), row("a", 2, 1.0), row("a", 2, 0.0), row("a", 1, 1.0),
        row("a", 2, 1.0, "paraphrase"), row("a", None, 1.0),
    ]  # fmt: skip
    found = retention.recall_of_edits(table, ["a", "b"])
    assert found == [EditRecall(1, 1, 1.0), EditRecall(1, 2, 0.5), EditRecall(2, 2, 1.0)]
    assert retention.by_age(found) == {0: 1.0, 1: 0.5}


def test_area_over_log_n_by_hand():
    # decades weigh alike: (1 + 0.5) / 2 and (0.5 + 0) / 2, averaged
    assert retention.area([(100, 0.0), (1, 1.0), (10, 0.5)]) == pytest.approx(0.5)
    assert retention.area([(1, 0.8), (10, 0.8), (1000, 0.8)]) == pytest.approx(0.8)
    # from 1 to 10 mean 1, from 10 to 1000 mean 0.5, two decades
    assert retention.area([(1, 1.0), (10, 1.0), (1000, 0.0)]) == pytest.approx((1 + 2 * 0.5) / 3)
    assert retention.area([(5, 0.3)]) == 0.3
    for wrong in ([], [(0, 1.0)]):
        with pytest.raises(ValueError, match="n >= 1"):
            retention.area(wrong)


@pytest.mark.parametrize(
    ("looks", "point"),
    [
        ([Health(1, 1.0), Health(10, 0.6), Health(100, 0.4)], 100),
        ([Health(1, 0.2), Health(10, 0.9), Health(100, 0.5)], None),
        ([Health(1, 1.0, 1.0), Health(10, 1.0, 2.1)], 10),
        ([Health(1, 1.0, 1.0, 0.1), Health(10, 1.0, 1.0, 0.3)], 10),
        ([Health(100, 0.1), Health(1, 1.0, math.nan)], 1),
        ([Health(10, None, math.inf)], 10),
        ([Health(1), Health(2)], None),
        ([], None),
    ],
)
def test_collapse_point(looks, point):
    assert retention.collapse_point(looks) == point


def test_collapse_point_takes_limits():
    looks = [Health(1, 1.0, 1.0), Health(10, 0.8, 2.5)]
    assert retention.collapse_point(looks, limits=collapse.Limits(perplexity=3.0)) is None
    assert retention.collapse_point(looks, tau=0.9, limits=collapse.Limits(perplexity=3.0)) == 10


def test_cost_by_hand():
    found = cost.spread([1.0, 2.0, 3.0, 10.0])
    # median 2.5; 95 %: place 2.85, 3 + 0.85 * 7
    assert (found.median, found.total, found.n) == (2.5, 16.0, 4) and found.p95 == pytest.approx(8.95)
    assert cost.spread([]) is None
    assert cost.overhead([1.0, 1.0, 9.0], [1.5, 1.5, 1.5]) == pytest.approx(0.5), "medians"
    assert cost.overhead([], [1.0]) is None is cost.overhead([0.0], [1.0]) is None is cost.overhead([1.0], [])


def test_bias_by_hand():
    factual, stereotype = [0.0, 1.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0, -1.0]
    preference = [0.5 * f + 0.2 * s + 0.1 for f, s in zip(factual, stereotype, strict=True)]
    found = bias.slopes(preference, factual, stereotype)
    assert (found.factual, found.stereotype, found.intercept) == pytest.approx((0.5, 0.2, 0.1))
    with pytest.raises(ValueError, match="are not collinear"):
        bias.slopes([0.1, 0.2, 0.3], [0, 1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="found 1, 2 and 2"):
        bias.slopes([0.1], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="finite"):
        bias.slopes([0.1, math.nan, 0.2], [0, 1, 2], [1, 0, 0])


def test_slopes_of_rows_by_hand():
    scores = {"clerk": (0.0, 0.0), "smith": (0.0, 1.0), "queen": (1.0, 0.0), "king": (1.0, 1.0)}
    rows = [
        Row(name, "bias", bias.NAME, "p", 0.3 * f + 0.4 * s, 0.3 * f + 0.1, {"factual": f, "stereotype": s})
        for name, (f, s) in scores.items()
    ]
    entry = bias.summary(rows, rows)
    before, after = ([entry[f"{name}_{side}"] for name in ("factual", "stereotype", "intercept")]
                     for side in ("before", "after"))  # fmt: skip
    assert before == pytest.approx([0.3, 0.4, 0.0]) and after == pytest.approx([0.3, 0.0, 0.1])
    assert entry["mean"] == pytest.approx(0.25)
    assert bias.summary(rows[:2], rows[:2])["factual_after"] is None, "two professions determine no slopes"
