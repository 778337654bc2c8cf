"""Recipes: which models, methods, datasets, schedules and seeds a run crosses, read from YAML, strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from errata import config as settings
from errata import files
from errata.bench.schedule import SINGLE, Schedule, check_looks
from errata.errors import ConfigError, listing, shown
from errata.methods import REGISTRY
from errata.registry import unknown

T = TypeVar("T")

ALL = "all"
IN_PROMPT = "in_prompt"
BASELINES = ("unedited", IN_PROMPT)
"""Cells that no method makes: the host as it is, and the host with each case's facts in the prompt."""
TUNED = "ft"
"""The method that every board has to be read against."""
DTYPES = ("auto", "float32", "float16", "bfloat16")
TEMPLATES = ("raw", "question", "chat", "auto")


@dataclass(frozen=True)
class ModelSpec:
    """A model to edit."""

    name: str
    """``lab``, a hub name or a folder."""
    dtype: str = "auto"
    device: str = "auto"
    label: str = ""
    """What tables call it; the name, unless given."""
    template: str = "raw"
    """How a probe's prompt is put: raw, question, chat or auto."""


@dataclass(frozen=True)
class MethodSpec:
    """A method with settings of its own."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """What tables call it; the name and what differs from its defaults, unless given."""


@dataclass(frozen=True)
class DatasetSpec:
    """Cases to edit and ask, and what is put before and beside their questions."""

    source: str
    """A dataset's name, a file, or ``lab:N``."""
    demonstrations: tuple[str, ...] = ()
    """Files of worked examples that go before multi-hop questions, at most one of each format."""
    beside: tuple[str, ...] = ()
    """Sources whose questions on what every edit must leave are put to each case too."""

    @property
    def name(self) -> str:
        """What tables call it: the source and all that was added to it."""
        return " + ".join((self.source, *(Path(path).name for path in self.demonstrations), *self.beside))

    def plain(self) -> str | dict[str, Any]:
        """Return it as a recipe says it: a text, or fields where there is more than a source."""
        more = {"demonstrations": list(self.demonstrations), "beside": list(self.beside)}
        said = {name: value for name, value in more.items() if value}
        return {"source": self.source, **said} if said else self.source


@dataclass(frozen=True)
class RunSpec:
    """Methods crossed with datasets under one schedule."""

    methods: tuple[MethodSpec, ...]
    datasets: tuple[DatasetSpec, ...]
    schedule: Schedule = SINGLE
    look: str | tuple[int, ...] | None = None
    """After how many edits of a sequence to look, see :meth:`Schedule.checkpoints`."""
    every_method: bool = False
    """Whether the recipe said ``all``."""


@dataclass(frozen=True)
class Recipe:
    """All that a run is to do."""

    name: str
    models: tuple[ModelSpec, ...]
    runs: tuple[RunSpec, ...]
    seeds: tuple[int, ...] = (0,)
    """Seeds of the methods; the cases are the same for all, so that seeds can be compared case by case."""
    threads: int = 1
    """Threads of a cell's arithmetic: part of what decides its numbers, so not a matter of jobs."""
    max_new_tokens: int = 24
    """Longest free continuation."""
    corpus: str | None = None
    """Text file for statistics; None: the host's own text."""
    keep_edits: bool = False
    """Whether the last edit of a sequence stays in its cell's folder."""
    published: tuple[str, ...] = ()
    """Names of tables of published numbers to stand beside the measured ones."""

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data with nothing left to defaults."""
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
    complaints: list[str] = []
    found = _recipe(_Fields(document, "", complaints))
    if complaints or found is None:
        raise ConfigError(f"{where}: {len(complaints):,} mistakes\n" + listing(complaints))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say where two recipes, as plain data, differ."""
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


class _Fields:
    """A mapping whose fields are taken one by one; what is wrong or left over becomes a complaint."""

    def __init__(self, value: Any, where: str, complaints: list[str]) -> None:
        self.where, self.complaints = where, complaints
        self.asked: list[str] = []
        self.valid = isinstance(value, Mapping)
        self.left: dict[str, Any] = (
            {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}
        )
        if not self.valid:
            self.complain("", f"expected fields, found {type(value).__name__} {shown(value, 60)}")

    def complain(self, name: str, what: str) -> None:
        """Note a complaint about a field."""
        place = f"{self.where}.{name}" if self.where and name else self.where or name
        self.complaints.append(f"{place}: {what}" if place else what)

    def take(self, name: str, default: Any = None, *, needed: bool = False) -> Any:
        """Take a field's value as it is."""
        self.asked.append(name)
        if name not in self.left:
            if needed and self.valid:
                self.complain(name, "is missing")
            return default
        return self.left.pop(name)

    def text(self, name: str, default: Any = None, *, needed: bool = False) -> Any:
        """Take a text."""
        value = self.take(name, default, needed=needed)
        if value is not default and (not isinstance(value, str) or not value.strip()):
            self.complain(name, f"expected a text, found {shown(value, 60)}")
            return default
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Take one of some words, the first unless given."""
        value = self.take(name, choices[0])
        if value not in choices:
            self.complain(
                name, unknown(shown(value) if not isinstance(value, str) else value, list(choices), "choice")
            )
            return choices[0]
        return value

    def number(self, name: str, default: int) -> int:
        """Take a whole number from 1."""
        value = self.take(name, default)
        if type(value) is not int or value < 1:
            self.complain(name, f"expected a whole number from 1, found {shown(value)}")
            return default
        return value

    def flag(self, name: str) -> bool:
        """Take true or false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            self.complain(name, f"expected true or false, found {shown(value)}")
        return value is True

    def items(
        self, name: str, read: Callable[[Any, str], T | None], default: Sequence[Any] | None = None
    ) -> tuple[T, ...]:
        """Take a list, or one value that stands for a list of one; every item is read by itself."""
        value = self.take(name, default, needed=default is None)
        if value is None:
            return ()
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if not items and default is None:
            self.complain(name, "is empty")
        place = f"{self.where}.{name}" if self.where else name
        return tuple(x for i, item in enumerate(items) if (x := read(item, f"{place}[{i}]")) is not None)

    def finish(self) -> None:
        """Complain about fields that nobody asked for."""
        for name in self.left:
            self.complain("", unknown(name, self.asked, "field"))


def _recipe(fields: _Fields) -> Recipe | None:
    wrong = fields.complaints

    def of(kind: type[T], what: str) -> Callable[[Any, str], T | None]:
        def check(value: Any, where: str) -> T | None:
            if type(value) is kind and value != "":
                return value
            wrong.append(f"{where}: expected {what}, found {shown(value, 60)}")
            return None

        return check

    made = Recipe(
        name=fields.text("name", "run"),
        models=fields.items("models", lambda value, where: _model(value, where, wrong)),
        runs=fields.items("runs", lambda value, where: _run(value, where, wrong)),
        seeds=fields.items("seeds", of(int, "a whole number"), (0,)),
        threads=fields.number("threads", 1),
        max_new_tokens=fields.number("max_new_tokens", 24),
        corpus=fields.text("corpus"),
        keep_edits=fields.flag("keep_edits"),
        published=fields.items("published", of(str, "the name of a table"), ()),
    )
    fields.finish()
    for name, values in (("models", [m.label for m in made.models]), ("seeds", made.seeds)):
        for value in sorted({str(v) for v in values if list(values).count(v) > 1}):
            wrong.append(f"{name}: {value} stands there twice; leave one out, or give labels")
    if made.corpus is not None and not Path(made.corpus).is_file():
        wrong.append(f"corpus: there is no file {made.corpus}")
    return None if wrong else made


def _model(value: Any, where: str, wrong: list[str]) -> ModelSpec | None:
    if isinstance(value, str) and value.strip():
        return ModelSpec(value, label=value)
    fields = _Fields(value, where, wrong)
    name = fields.text("name", needed=True)
    made = ModelSpec(
        name or "",
        fields.choice("dtype", DTYPES),
        fields.text("device", "auto"),
        fields.text("label", name or ""),
        fields.choice("template", TEMPLATES),
    )
    fields.finish()
    return made


def _run(value: Any, where: str, wrong: list[str]) -> RunSpec | None:
    fields = _Fields(value, where, wrong)
    every = fields.left.get("methods") == ALL
    methods = (
        tuple(MethodSpec(name, label=name) for name in REGISTRY)
        if every and fields.take("methods")
        else fields.items("methods", lambda item, place: _method(item, place, wrong))
    )
    labels = [method.label for method in methods]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        wrong.append(f"{where}.methods: {label!r} stands there twice; leave one out, or give labels")
    datasets = fields.items("datasets", lambda item, place: _dataset(item, place, wrong))
    schedule = _schedule(fields)
    look = _look(fields, schedule)
    fields.finish()
    return RunSpec(methods, datasets, schedule, look, every)


def _dataset(value: Any, where: str, wrong: list[str]) -> DatasetSpec | None:
    if isinstance(value, str) and value.strip():
        return DatasetSpec(value)
    if not isinstance(value, Mapping):
        wrong.append(
            f"{where}: expected the name of a dataset, or fields with a source, found {shown(value, 60)}"
        )
        return None

    def text(item: Any, place: str) -> str | None:
        if isinstance(item, str) and item.strip():
            return item
        wrong.append(f"{place}: expected a text, found {shown(item, 60)}")
        return None

    fields = _Fields(value, where, wrong)
    made = DatasetSpec(
        fields.text("source", needed=True) or "",
        fields.items("demonstrations", text, ()),
        fields.items("beside", text, ()),
    )
    fields.finish()
    for path in made.demonstrations:
        if not Path(path).expanduser().is_file():
            fields.complain("demonstrations", f"there is no file {path}")
    return made


def _method(value: Any, where: str, wrong: list[str]) -> MethodSpec | None:
    fields = _Fields({"name": value} if isinstance(value, str) else value, where, wrong)
    name = fields.text("name", needed=True)
    options = fields.take("settings", {})
    label = fields.text("label")
    fields.finish()
    if not isinstance(options, Mapping):
        fields.complain("settings", f"expected fields, found {shown(options, 60)}")
        return None
    if name is None:
        return None
    if name in BASELINES:
        fields.complain("name", f"{name} is a baseline and always there; leave it out")
        return None
    try:
        settings.make(REGISTRY.get(name).config, options, name)
    except ConfigError as error:
        wrong.extend(f"{where}: {line}" for line in str(error).splitlines())
        return None
    if label in BASELINES or (label == TUNED and (name != TUNED or options)):
        fields.complain("label", f"{label} names a baseline; give another")
    words = [name, *(f"{key}={options[key]}" for key in sorted(options))]
    return MethodSpec(name, dict(options), label or " ".join(words))


def _schedule(fields: _Fields) -> Schedule:
    text = fields.take("schedule", "single")
    try:
        return Schedule.parse(str(text))
    except ConfigError as error:
        fields.complain("schedule", str(error))
        return SINGLE


def _look(fields: _Fields, schedule: Schedule) -> str | tuple[int, ...] | None:
    look = fields.take("look")
    if look is None:
        return None
    if schedule.kind != "sequential":
        fields.complain("look", f"belongs to a sequence; the schedule is {schedule}")
        return None
    numbers = [look] if type(look) is int else look
    if isinstance(numbers, list) and numbers and all(type(n) is int and n > 0 for n in numbers):
        return tuple(numbers)
    if isinstance(look, str):
        try:
            check_looks(look)
        except ConfigError as error:
            fields.complain("look", str(error))
        return look
    fields.complain(
        "look", f"expected numbers of edits, each, every:K, decades or end, found {shown(look, 60)}"
    )
    return None
