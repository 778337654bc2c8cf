"""Recipes and plans: strict reading, baselines that are always there, names that say what decides."""

from __future__ import annotations

import pytest

from errata.bench import plan, recipe
from errata.bench.schedule import Schedule
from errata.errors import ConfigError
from errata.methods import REGISTRY

GOOD = {
    "name": "good",
    "models": ["lab", {"name": "lab", "dtype": "bfloat16", "label": "lab16"}],
    "seeds": [0, 1],
    "runs": [
        {"methods": ["rome", {"name": "rome", "settings": {"steps": 3}}], "datasets": ["lab:3"]},
        {"methods": "all", "datasets": "lab:5", "schedule": "sequential:2", "look": [2, 4]},
    ],
}


def test_every_mistake_is_told_at_once():
    bad = {
        "nmae": "x",
        "models": ["lab", "lab", {"name": "y", "dtype": "float8", "colour": 1}],
        "threads": 0,
        "seeds": ["one"],
        "runs": [
            {"methods": ["roem", {"name": "rome", "settings": {"stepps": 3}}, "unedited"], "datasets": []},
            {"methods": ["rome", "rome"], "datasets": ["lab:3"], "schedule": "daily", "look": [1]},
            {"methods": ["rome"], "datasets": ["lab:3"], "schedule": "sequential:1", "look": "evry:2"},
            {"methods": "rome"},
            {"methods": [{"name": "memit", "label": "ft"}], "datasets": ["lab:3"]},
        ],
    }
    with pytest.raises(ConfigError) as caught:
        recipe.parse(bad)
    text = str(caught.value)
    for piece in (
        "unknown field 'nmae': did you mean 'name'", "models: 'lab' occurs twice", "'float8'", "'colour'",
        "threads: expected a whole number from 1, found 0", "seeds[0]", "did you mean 'rome'",
        "did you mean 'steps'", "unknown method 'unedited'", "runs[0].datasets: is empty",
        "runs[1].methods: 'rome' occurs twice", "runs[1].schedule", "runs[1].look: requires a sequential schedule",
        "runs[2].look: checkpoints 'evry:2'", "runs[3].datasets: is missing",
        "runs[4].methods[0].label: ft is the name of a baseline",
    ):  # fmt: skip
        assert piece in text, piece


@pytest.mark.parametrize("value", [None, [], "lab", {}, {"models": ["lab"]}, {"runs": [{}]}])
def test_what_is_no_recipe_is_refused(value):
    with pytest.raises(ConfigError):
        recipe.parse(value)


def test_a_recipe_reads_what_it_writes():
    made = recipe.parse(GOOD)
    again = recipe.parse(made.to_dict())
    assert again == made and again.sha256 == made.sha256
    other = recipe.parse({**GOOD, "threads": 2})
    assert other.sha256 != made.sha256
    assert recipe.differences(made.to_dict(), other.to_dict()) == ["threads: was 1, is 2"]


REQUESTED = {name for name in REGISTRY if REGISTRY.get(name).takes == "requests"}
"""Methods that boards measure: those that are asked for answers, not to forget a concept."""


def test_baselines_stand_beside_every_model_dataset_and_schedule():
    made = plan.make(recipe.parse(GOOD))
    assert len({cell.id for cell in made.cells}) == len(made.cells)
    for model in ("lab", "lab16"):
        for dataset, schedule, methods in (
            ("lab:3", "single", {"rome", "rome steps=3"}),
            ("lab:5 together", "sequential:2", REQUESTED - {"none", "in_prompt", "ft"}),
        ):
            cells = [c for c in made.cells if (c.model, c.dataset, c.schedule) == (model, dataset, schedule)]
            always = [(c.method, c.seed) for c in cells if c.baseline]
            assert always == [("none", 0), ("in_prompt", 0), ("ft", 0), ("ft", 1)]
            assert {c.label for c in cells if not c.baseline} == methods
            assert all(c.look == ((2, 4, 5) if schedule != "single" else None) for c in cells)
    labels = [cell.model for cell in made.cells]
    assert labels == sorted(labels), "one model after the other"


def test_a_cells_name_says_what_decides_its_rows_and_nothing_else():
    def names(**changes):
        words = {**GOOD, "models": ["lab"], "seeds": [0], "runs": GOOD["runs"][:1], **changes}
        return {cell.label: cell.id for cell in plan.make(recipe.parse(words)).cells}

    base = names()
    assert names(name="other", keep_edits=True) == base
    labelled = names(models=[{"name": "lab", "label": "mine"}])
    assert [i[-8:] for i in labelled.values()] == [i[-8:] for i in base.values()]
    for change in (
        {"threads": 2},
        {"max_new_tokens": 5},
        {"seeds": [3]},
        {"models": [{"name": "lab", "dtype": "float16"}]},
    ):
        assert not set(names(**change).values()) & set(base.values()), change
    assert base["rome"] != base["rome steps=3"]
    default = {"name": "rome", "settings": {"seed_of_nothing": 1}}
    with pytest.raises(ConfigError):
        recipe.parse({**GOOD, "runs": [{"methods": [default], "datasets": ["lab:3"]}]})


def test_what_a_plan_cannot_do_is_told_for_all_runs():
    words = {**GOOD, "runs": [
        {"methods": ["ft"], "datasets": ["lab:zero"]},
        {"methods": ["ft"], "datasets": ["lab:10"], "schedule": "sequential:5", "look": [7]},
        {"methods": ["ft"], "datasets": ["no/such/file.json"]},
    ]}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        plan.make(recipe.parse(words))
    text = str(caught.value)
    assert "lab:N" in text and "no checkpoint after 7" in text and "no/such/file.json" in text


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (1, 1200, (1, 10, 32, 100, 316, 1000, 1200)),
        (10, 200, (10, 40, 100, 200)),
        (1, 10_000, (1, 10, 32, 100, 316, 1000, 3162, 10_000)),
        (100, 50, (50,)),
        (1, 1, (1,)),
    ],
)
def test_decades(size, count, expected):
    assert Schedule("sequential", size).checkpoints(count, "decades") == expected
