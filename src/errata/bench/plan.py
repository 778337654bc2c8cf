"""Plans: the cells of a recipe, each named by a hash of everything that determines its rows."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from errata import config as settings
from errata.bench import machine, published, sources
from errata.bench import recipe as recipes
from errata.bench.baselines import baselines
from errata.bench.recipe import DatasetSpec, MethodSpec, ModelSpec, Recipe, RunSpec
from errata.bench.results import SCHEMA, finite
from errata.bench.schedule import Schedule
from errata.edits.edit import versions
from errata.errors import ConfigError, DataError, ErrataError, brief, shown
from errata.evaluation import score
from errata.methods import REGISTRY
from errata.types import Case

SLUG = 60
"""Maximum length of the readable part of a cell's name."""


@dataclass(frozen=True)
class Cell:
    """One model, method, dataset, schedule and seed; has one folder of results."""

    id: str
    model: str
    """Label of the model."""
    method: str
    """Registered name."""
    label: str
    settings: Mapping[str, Any]
    dataset: str
    """Name among the run's datasets."""
    schedule: str
    look: tuple[int, ...] | None
    """Numbers of edits of a sequence after which the host is evaluated."""
    seed: int
    baseline: bool
    """Whether it is a baseline, which is run for every model, dataset and schedule."""
    rank: int | None = None
    """Position of a baseline among the baselines."""
    role: str = ""
    """What the row of a baseline shows."""

    @property
    def plan(self) -> Schedule:
        """The parsed schedule."""
        return Schedule.parse(self.schedule)


@dataclass(frozen=True)
class Plan:
    """The recipe of a run, its datasets, and its cells in order."""

    recipe: Recipe
    datasets: Mapping[str, Mapping[str, Any]]
    """Facts by name, see :func:`errata.bench.sources.read`."""
    cells: tuple[Cell, ...]
    cases: Mapping[str, Sequence[Case]] = field(default_factory=dict, compare=False, repr=False)
    """Cases by name of the dataset, if they were read."""
    published: Sequence[Mapping[str, Any]] = ()
    """Published tables for comparison, see :mod:`errata.bench.published`."""

    def model(self, label: str) -> ModelSpec:
        """Return the model with a label."""
        return next(model for model in self.recipe.models if model.label == label)

    def select_ids(self, only: str | None) -> list[str]:
        """List the ids of all cells, or of those whose label or id has a text, see :func:`is_named`.

        Raises ConfigError if there are none.
        """
        ids = [cell.id for cell in self.cells if is_named(cell.id, only) or (only and only in cell.label)]
        if not ids:
            raise ConfigError(f"no cell id contains {only!r}; list the cells with --dry-run")
        return ids

    def document(self) -> dict[str, Any]:
        """Return the content of ``run.json``."""
        return finite({
            "schema": SCHEMA,
            "name": self.recipe.name,
            "recipe": self.recipe.to_dict(),
            "recipe_sha256": self.recipe.sha256,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "hardware": machine.hardware(),
            "threads": self.recipe.threads,
            "datasets": {name: dict(facts) for name, facts in self.datasets.items()},
            "published": [dict(table) for table in self.published],
            "cells": [asdict(cell) for cell in self.cells],
        })  # fmt: skip


def make(recipe: Recipe) -> Plan:
    """Read a recipe's datasets and build its cells. Raises ConfigError or DataError listing all problems."""
    complaints: list[str] = []
    read: dict[str, tuple[Sequence[Case], Mapping[str, Any]]] = {}
    cells: dict[str, Cell] = {}
    for i, run in enumerate(recipe.runs):
        for spec in run.datasets:
            try:
                name, (cases, facts) = _read(spec, run.schedule, read)
                look = _looks(run, len(cases))
                score.check_packages(cases)
            except ErrataError as error:
                complaints.append(f"runs[{i}], {spec.name}: {error}")
                continue
            read[name] = cases, facts
            for cell in _crossed(recipe, run, name, facts, look):
                cells.setdefault(cell.id, cell)
    tables: Sequence[Mapping[str, Any]] = ()
    try:
        tables = published.documents(recipe.published)
    except ConfigError as error:
        complaints.append(f"published: {error}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    facts = {name: facts for name, (_, facts) in read.items()}
    order = {model.label: place for place, model in enumerate(recipe.models)}
    # one model after the other, so that a worker opens each once; baselines first, others compare with them
    ordered = sorted(cells.values(), key=lambda cell: (order[cell.model], not cell.baseline))
    return Plan(recipe, facts, tuple(ordered), {name: cases for name, (cases, _) in read.items()}, tables)


def restore(document: Mapping[str, Any]) -> Plan:
    """Build the plan that a ``run.json`` holds. Raises DataError for one of another schema."""
    if document.get("schema") != SCHEMA:
        raise DataError(
            f"run.json has schema {shown(document.get('schema'))}, expected {SCHEMA}; start a new run"
        )
    try:
        cells = tuple(
            Cell(**{**cell, "look": None if cell["look"] is None else tuple(cell["look"])})
            for cell in document["cells"]
        )
        return Plan(recipes.parse(document["recipe"], "run.json"), document["datasets"], cells)
    except (TypeError, LookupError, ValueError) as error:
        raise DataError(f"run.json is damaged: {brief(str(error))}; start a new run") from error


def changes(old: Mapping[str, Any], new: Plan) -> list[str]:
    """List why a run folder cannot be resumed under a plan; empty if it can."""
    if old.get("recipe_sha256") != new.recipe.sha256:
        return recipes.differences(old["recipe"], new.recipe.to_dict())
    differences = []
    for name, facts in new.datasets.items():
        before = old["datasets"].get(name, {}).get("sha256")
        if before != facts["sha256"]:
            differences.append(f"dataset {name}: was {str(before)[:12]}, is {facts['sha256'][:12]}")
    if not differences and [cell["id"] for cell in old["cells"]] != [cell.id for cell in new.cells]:
        was = old.get("versions", {}).get("errata")
        differences.append(
            f"the cells differ: defaults of settings that the recipe does not give changed since errata {was}"
        )
    return differences


def _read(
    spec: DatasetSpec, schedule: Schedule, read: Mapping[str, Any]
) -> tuple[str, tuple[Sequence[Case], Mapping[str, Any]]]:
    """Read a dataset unless it was read before; return its name among the datasets, its cases and its facts.

    Raises ConfigError if another dataset of the recipe has the same name.
    """
    together = schedule.together and sources.is_lab(spec.source)
    name = replace(spec, source=f"{spec.source} together").name if together else spec.name
    if name not in read:
        return name, sources.read(
            spec.source, together=together, demonstrations=spec.demonstrations, beside=spec.beside
        )
    other_files = [entry["path"] for entry in read[name][1]["demonstrations"]]
    if other_files != list(spec.demonstrations):
        raise ConfigError(
            f"two datasets would have this name, one with the demonstrations {', '.join(other_files)}, one with "
            f"{', '.join(spec.demonstrations)}; give the files different names"
        )
    return name, read[name]


def _looks(run: RunSpec, count: int) -> tuple[int, ...] | None:
    if run.schedule.kind != "sequential":
        return None
    return run.schedule.checkpoints(count, run.look)


def _crossed(
    recipe: Recipe, run: RunSpec, dataset: str, facts: Mapping[str, Any], look: tuple[int, ...] | None
) -> list[Cell]:
    """Cross models, methods with the baselines, and seeds, for one dataset."""
    always = [(MethodSpec(method.name, label=method.name), method.baseline) for method in baselines()]
    specs = [spec for spec, _ in always]
    methods = [*always, *((spec, None) for spec in run.methods if spec not in specs)]
    cells = []
    for model in recipe.models:
        for spec, baseline in methods:
            for seed in recipe.seeds if REGISTRY.get(spec.name).random else recipe.seeds[:1]:
                cell = Cell(
                    "", model.label, spec.name, spec.label, dict(spec.settings), dataset, str(run.schedule),
                    look, seed, baseline is not None,
                    baseline.rank if baseline else None, baseline.role if baseline else "",
                )  # fmt: skip
                cells.append(replace(cell, id=_name(cell, recipe, model, facts)))
    return cells


def _name(cell: Cell, recipe: Recipe, model: ModelSpec, facts: Mapping[str, Any]) -> str:
    """Build a cell's name: a readable part and a hash of everything that determines its rows."""
    config = _config(cell)
    decides = {
        "model": asdict(replace(model, label="")),
        "method": cell.method,
        "config": config,
        "dataset": facts["sha256"],
        "schedule": cell.schedule,
        "look": cell.look,
        "seed": cell.seed,
        "threads": recipe.threads,
        "max_new_tokens": recipe.max_new_tokens,
        "corpus": _file_hash(recipe.corpus),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = f"{cell.model}-{cell.label}-{cell.dataset}-{cell.schedule}-s{cell.seed}"
    return f"{_slug(words)[:SLUG].rstrip('-.')}-{digest}"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", words.lower()).strip("-.")


def is_named(cell_id: str, only: str | None) -> bool:
    """Whether a cell's id contains a text, as it is or written like an id: ``keel, 3 layers`` is ``keel-3-layers``."""
    return only is None or only in cell_id or bool(_slug(only) and _slug(only) in cell_id)


def _config(cell: Cell) -> dict[str, Any]:
    """Return a method's settings with its defaults filled in."""
    return settings.plain(settings.make(REGISTRY.get(cell.method).config, cell.settings, cell.method))


def _file_hash(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
