"""Recipes: the models, methods, datasets, schedules and seeds of a run, read from YAML with strict validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from errata import files
from errata.bench import recipe_document as documents
from errata.bench.recipe_document import ALL
from errata.bench.schedule import SINGLE, Schedule
from errata.errors import ConfigError, listing, shown
from errata.methods import REGISTRY


@dataclass(frozen=True)
class ModelSpec:
    """A model to edit."""

    name: str
    """``lab``, a hub name or a folder."""
    dtype: str = "auto"
    device: str = "auto"
    label: str = ""
    """Name in tables; default: the model's name."""
    template: str = "raw"
    """Prompt format of probes: raw, question, chat or auto."""


@dataclass(frozen=True)
class MethodSpec:
    """A method with settings of its own."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """Name in tables; default: the method's name and its settings that differ from the defaults."""


@dataclass(frozen=True)
class DatasetSpec:
    """Cases to edit and evaluate, with demonstrations and further probes for them."""

    source: str
    """A dataset's name, a file, ``lab:N`` or ``lab:N:SEED``."""
    demonstrations: tuple[str, ...] = ()
    """Files of worked examples to put before multi-hop questions, at most one of each format."""
    beside: tuple[str, ...] = ()
    """Sources whose probes of unrelated facts are added to each case."""

    @property
    def name(self) -> str:
        """Name in tables: the source and everything added to it."""
        return " + ".join((self.source, *(Path(path).name for path in self.demonstrations), *self.beside))

    def plain(self) -> str | dict[str, Any]:
        """Return it in a recipe's form: a text, or fields if there is more than a source."""
        options = {"demonstrations": list(self.demonstrations), "beside": list(self.beside)}
        extra = {name: value for name, value in options.items() if value}
        return {"source": self.source, **extra} if extra else self.source


@dataclass(frozen=True)
class RunSpec:
    """Methods crossed with datasets under one schedule."""

    methods: tuple[MethodSpec, ...]
    datasets: tuple[DatasetSpec, ...]
    schedule: Schedule = SINGLE
    look: str | tuple[int, ...] | None = None
    """Numbers of edits of a sequence after which to evaluate, see :meth:`Schedule.checkpoints`."""
    every_method: bool = False
    """Whether the recipe names ``all`` methods."""


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe."""

    name: str
    models: tuple[ModelSpec, ...]
    runs: tuple[RunSpec, ...]
    seeds: tuple[int, ...] = (0,)
    """Seeds of the methods; all use the same cases, so that seeds can be compared case by case."""
    threads: int = 1
    """Number of torch threads of a cell. The last bits of results depend on it, so it is independent of ``--jobs``."""
    max_new_tokens: int = 24
    """Maximum number of tokens of a generated answer."""
    corpus: str | None = None
    """Text file for statistics; None: the host's own corpus, or text sampled from the host."""
    keep_edits: bool = False
    """Whether the last edit of a sequence is kept in its cell's folder."""
    published: tuple[str, ...] = ()
    """Names of tables of published numbers to show next to the measured ones."""

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data with all defaults filled in."""
        document = asdict(self)
        for run, spec in zip(document["runs"], self.runs, strict=True):
            run["schedule"] = str(spec.schedule)
            run["datasets"] = [dataset.plain() for dataset in spec.datasets]
            every = run.pop("every_method")
            run["methods"] = ALL if every else run["methods"]
        return json.loads(json.dumps(document))  # tuples as lists

    @property
    def sha256(self) -> str:
        """Hash of :meth:`to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Recipe:
    """Read a recipe file. Raises ConfigError listing everything that is wrong with it."""
    text = files.read_text(path, ConfigError, most=files.LARGEST_YAML, what="recipe")
    document = files.parse_yaml(text, lambda reason: ConfigError(f"recipe {path}: {reason}"))
    return parse(document, str(path))


def parse(document: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from plain data. Raises ConfigError listing everything that is wrong with it."""
    read, complaints = documents.check(document)
    if read is None:
        raise ConfigError(f"{where}: {len(complaints):,} mistakes\n" + listing(complaints))
    return Recipe(
        name=read.name,
        models=tuple(_model(model) for model in read.models),
        runs=tuple(_run(run) for run in read.runs),
        seeds=read.seeds,
        threads=read.threads,
        max_new_tokens=read.max_new_tokens,
        corpus=read.corpus,
        keep_edits=read.keep_edits,
        published=read.published,
    )


def on_model(recipe: Recipe, model: str) -> Recipe:
    """Return a recipe for another model: a folder, or a name, which tables show too.

    Its published figures are paired with a folder that has the published model's name. Dtype, device and prompt
    format stay. Raises ConfigError for a recipe of several models.
    """
    if len(recipe.models) != 1:
        names = ", ".join(spec.label for spec in recipe.models)
        raise ConfigError(
            f"another model takes the place of a recipe's only one, and {recipe.name} has {len(recipe.models)}: "
            f"{names}; write a recipe of your own"
        )
    return replace(recipe, models=(replace(recipe.models[0], name=model, label=model),))


def _model(read: documents.ModelDocument) -> ModelSpec:
    return ModelSpec(read.name, read.dtype, read.device, read.label or read.name, read.template)


def _run(read: documents.RunDocument) -> RunSpec:
    methods = tuple(
        MethodSpec(method.name, dict(method.settings), method.title) for method in read.methods or ()
    )
    if read.methods is None:
        methods = tuple(
            MethodSpec(name, label=name) for name in REGISTRY if REGISTRY.get(name).takes == "requests"
        )
    datasets = tuple(DatasetSpec(each.source, each.demonstrations, each.beside) for each in read.datasets)
    return RunSpec(methods, datasets, read.schedule, read.look, every_method=read.methods is None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two recipes, or other settings, given as plain data."""
    one, other = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key or 'recipe'}: was {shown(one.get(key, 'nothing'))}, is {shown(other.get(key, 'nothing'))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key, _flat) != other.get(key, _flat)
    ]


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [item for key in value for item in _flat(value[key], f"{at}.{key}" if at else str(key))]
    if isinstance(value, list) and value:
        return [item for i, part in enumerate(value) for item in _flat(part, f"{at}[{i}]")]
    return [(at, value)]
