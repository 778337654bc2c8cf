"""Published tables and recipes: schema, ranges, and sums that a typing fault would break."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from errata.bench import published, recipe
from errata.data.sets import REGISTRY as DATASETS
from errata.errors import ConfigError
from errata.methods import REGISTRY as METHODS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TABLES = published.names()
SIGNED = {"EM", "PM", "NM", "NM+"}
ENTROPIES = {"GE", "Fluency"}


def scores(table: str, method: str) -> dict[str, float]:
    return dict(next(row.scores for row in published.read(table).rows if row.method == method))


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_what_they_must(name):
    table = published.read(name)
    assert table.name == name and table.provenance in ("confirmed", "secondary")
    assert not any(row.provenance == "memory" for row in table.rows), "nothing from memory is kept"
    for row in table.rows:
        known = row.errata_method is None or row.errata_method in METHODS or row.errata_method == "unedited"
        assert known, f"{row.method}: {row.errata_method} is not registered"
        for score, value in row.scores.items():
            low, high = (-100, 100) if score in SIGNED else (0, 800) if score in ENTROPIES else (0, 100)
            assert low <= value <= high, f"{row.method} {score}"
    head = table.dataset.partition(":")[0].split("/")
    assert head[0] in DATASETS, table.dataset
    assert len(head) == 1 or head[1] in DATASETS.get(head[0]).variants, table.dataset


def spread(values: tuple[float, ...], half: float) -> tuple[float, float]:
    """The least and the greatest harmonic mean of numbers that were rounded to ``2 * half``."""
    means = [
        len(values) / sum(1 / max(v + side, 1e-9) for v, side in zip(values, sides, strict=True))
        for sides in itertools.product((-half, half), repeat=len(values))
    ]
    return min(means), max(means)


def test_harmonic_means_are_those_of_their_parts():
    checked = 0
    for name, row in [(table, row) for table in TABLES for row in published.read(table).rows]:
        for total, parts in (("S", ("ES", "PS", "NS")), ("Score", ("Rel", "Gen", "Loc"))):
            if total not in row.scores:
                continue
            least, most = spread(tuple(row.scores[part] for part in parts), 0.05)
            assert least - 0.05 - 1e-9 <= row.scores[total] <= most + 0.05 + 1e-9, f"{name} {row.method}"
            checked += 1
    assert checked >= 25


def test_averages_are_those_of_their_parts():
    for name in (name for name in TABLES if name.startswith("wise")):
        for row in published.read(name).rows:
            mean = sum(row.scores[part] for part in ("Rel", "Gen", "Loc.agreement")) / 3
            assert abs(mean - row.scores["Avg"]) <= 1.0 + 1e-9, f"{name} {row.method}"  # all in steps of 1


@pytest.mark.parametrize(
    ("table", "method", "expected"),
    [
        (
            "rome-gpt2-xl-counterfact",
            "unedited",
            {"ES": 22.2, "PS": 24.7, "NS": 78.1, "GE": 626.6, "RS": 31.9},
        ),
        ("rome-gpt2-xl-counterfact", "ROME", {"S": 89.2, "ES": 100, "PS": 96.4, "NS": 75.4}),
        ("rome-gpt2-xl-zsre", "unedited", {"Rel": 22.2, "Gen": 21.3, "Loc": 24.2}),
        ("memit-gpt-j-10k", "MEMIT", {"S": 85.8}),
        ("memit-gpt-j-10k-zsre", "MEMIT", {"Rel": 96.7, "Gen": 89.7, "Loc": 26.6}),
        ("alphaedit-llama3-2000", "AlphaEdit", {"ES": 98.90, "PS": 94.22, "NS": 67.88}),
        ("lyaplock-llama3-2000", "AlphaEdit", {"ES": 99.15, "PS": 93.15, "NS": 69.27}),
        ("lyaplock-llama3-10k", "AlphaEdit", {"ES": 72.60, "PS": 61.97, "NS": 52.98}),
        ("easyedit-llama2-zsre", "ROME", {"Rel": 92.45, "Gen": 87.04, "Loc.agreement": 99.63}),
        ("wise-grace-lifelong", "WISE", {"Rel": 77, "Gen": 72, "Loc.agreement": 100}),
        ("wise-grace-lifelong", "GRACE", {"Rel": 93, "Gen": 8, "Loc.agreement": 100}),
        ("mirage-wild-zsre", "ROME", {"wild": 74.1}),
        ("mirage-wild-counterfact", "ROME", {"wild": 83.6}),
        ("counterfact-plus", "ROME", {"NS": 76, "NS+": 14}),
        ("mquake-ifmet", "MEMIT", {"MH.any.thought": 12.3}),
        ("mquake-ifmet", "ROME", {"MH.any.thought": 18.1}),
    ],
)
def test_targets_of_reproduction(table, method, expected):
    found = scores(table, method)
    assert {name: found[name] for name in expected} == expected


def test_a_re_run_is_near_what_it_repeats():
    for method in ("AlphaEdit", "MEMIT", "RECT"):
        first, again = scores("alphaedit-llama3-2000", method), scores("lyaplock-llama3-2000", method)
        assert all(abs(first[name] - again[name]) < 2 for name in again), method


GOOD: dict[str, Any] = {
    "name": "toy", "title": "Toy", "source": "A paper", "arxiv": "0000.00000", "provenance": "secondary",
    "model": "toy", "dataset": "counterfact", "schedule": "single", "metric_convention": "per cent",
    "tolerance": 1, "rows": [
        {"method": "ROME", "errata_method": "rome", "scores": {"ES": 99.9}},
        {"method": "KE", "errata_method": None, "scores": {"ES": 50}, "provenance": "memory"},
    ],
}  # fmt: skip


def test_rows_from_memory_never_reach_a_run(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    table = published.read(str(path))
    assert [row.provenance for row in table.rows] == ["secondary", "memory"]
    (document,) = published.documents([str(path)])
    assert [row["method"] for row in document["rows"]] == ["ROME"] and document["tolerance"] == 1.0


def test_every_mistake_is_reported_at_once():
    bad = copy.deepcopy(GOOD)
    bad |= {
        "title": "",
        "provenance": "sure",
        "tolerance": 0,
        "schedule": "thrice",
        "nots": "x",
        "name": "other",
    }
    bad["rows"] += [
        {"method": "ROME", "errata_method": "rome", "scores": {"ES": "high"}, "extra": 1},
        {"method": "", "scores": {}},
        "row",
    ]
    with pytest.raises(ConfigError) as caught:
        published.parse(bad, "toy")
    for part in ("title", "provenance", "tolerance", "schedule", "did you mean 'note'", "name: 'other'", "rows[2]",
                 "scores['ES']", "'extra'", "rows[3].method", "errata_method", "rows[4]"):  # fmt: skip
        assert part in str(caught.value), part
    twice = copy.deepcopy(GOOD)
    twice["rows"].append(twice["rows"][0])
    with pytest.raises(ConfigError, match="twice"):
        published.parse(twice, "toy")
    with pytest.raises(ConfigError, match="expected fields"):
        published.parse([], "toy")


def test_unknown_tables_are_answered_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        published.documents(["rome-gpt2-xl-counterfat", "no such"])
    assert "did you mean 'rome-gpt2-xl-counterfact'" in str(caught.value) and "'no such'" in str(caught.value)


# --- recipes ---------------------------------------------------------------------------------


def test_there_are_recipes():
    assert len(RECIPES) >= 12 and "lab" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_run(path):
    made = recipe.read(path)
    assert made.name == path.stem
    tables = [published.read(name) for name in made.published]
    for table in tables:
        assert table.model in {model.name for model in made.models}, table.name
    for run in made.runs:
        for source in (dataset.source for dataset in run.datasets):
            head = source.partition(":")[0].split("/")
            assert head[0] in ("lab", "lab-vl") or head[0] in DATASETS, source
            assert len(head) == 1 or head[1] in DATASETS.get(head[0]).variants, source


def fits(table: published.PublishedTable, run: recipe.RunSpec, source: str) -> bool:
    same = table.dataset.partition(":")[0] == source.partition(":")[0]
    return same and table.schedule == str(run.schedule)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "lab"], ids=lambda path: path.stem)
def test_what_a_recipe_runs_stands_in_its_tables(path):
    """By registered name or by label; and every table is for something that is run."""
    made = recipe.read(path)
    tables = [published.read(name) for name in made.published]
    uncertain = {("ultraedit", "alphaedit")}  # the digits of that row could not be read
    for run, source in [(spec, dataset.source) for spec in made.runs for dataset in spec.datasets]:
        rows = [row for table in tables if fits(table, run, source) for row in table.rows]
        names = {name for row in rows for name in (row.method, row.errata_method)}
        missing = {method.label for method in run.methods if rows and not {method.label, method.name} & names}
        assert not {(made.name, label) for label in missing} - uncertain, source
    for table in tables:
        near = [d.source for run in made.runs for d in run.datasets if table.schedule == str(run.schedule)]
        assert any(s.startswith(table.dataset.partition(":")[0]) for s in near), table.name
