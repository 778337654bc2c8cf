"""The schema of recipe files; all mistakes are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from errata import config as settings
from errata.bench.baselines import baselines
from errata.bench.schedule import SINGLE, Schedule, check_looks
from errata.errors import ConfigError
from errata.methods import REGISTRY

ALL = "all"


def check(document: Any) -> tuple[RecipeDocument | None, list[str]]:
    """Validate a recipe's plain data; return the document (None if invalid), and the complaints by field."""
    complaints: list[str] = []
    read = None
    try:
        read = RecipeDocument.model_validate(document)
    except ValidationError as error:
        complaints = settings.explain(error, RecipeDocument, document)
    complaints += _repeated(document)
    return (None if complaints else read), complaints


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise settings.expected("a text")


def _whole(value: Any) -> int:
    if type(value) is int:
        return value
    raise settings.expected("a whole number")


def _count(value: Any) -> int:
    if type(value) is int and value >= 1:
        return value
    raise settings.expected("a whole number from 1")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise settings.expected("true or false")


def _items(value: Any) -> list[Any]:
    """Return a list; a single value becomes a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _some(value: Sequence[Any] | None) -> Sequence[Any] | None:
    if value is not None and not value:
        raise settings.problem("is empty")
    return value


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    raise settings.expected("fields")


def _file(path: str) -> str:
    if Path(path).expanduser().is_file():
        return path
    raise settings.problem(f"there is no file {path}")


Text = Annotated[str, BeforeValidator(_text)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, BeforeValidator(_count)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Items = BeforeValidator(_items)
Some = AfterValidator(_some)


class _Document(BaseModel):
    """A record without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    SHORT: ClassVar[str] = ""
    """The field that a plain text sets."""


def _long(kind: type[_Document]) -> BeforeValidator:
    """Convert a plain text to a mapping with its one field."""
    return BeforeValidator(lambda value: {kind.SHORT: value} if isinstance(value, str) else value)


class ModelDocument(_Document):
    """A model to edit."""

    SHORT = "name"
    EXPECTED: ClassVar[str] = "the name of a model, or fields with a name"

    name: Text
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Text = "auto"
    label: Text | None = None
    template: Literal["raw", "question", "chat", "auto"] = "raw"


class MethodDocument(_Document):
    """A method with settings of its own."""

    SHORT = "name"
    EXPECTED: ClassVar[str] = "the name of a method, or fields with a name"

    name: Text
    settings: Annotated[dict[str, Any], BeforeValidator(_mapping)] = {}
    label: Text | None = None

    @property
    def title(self) -> str:
        """Name in tables: its label, else its name and the settings that differ from the defaults."""
        return self.label or _title(self.name, self.settings)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        _reported(REGISTRY.get, name)
        return name

    @field_validator("settings")
    @classmethod
    def _accepted(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is not None:
            _reported(settings.make, REGISTRY.get(name).config, values, name)
        return values

    @field_validator("label")
    @classmethod
    def _free(cls, label: str | None, info: ValidationInfo) -> str | None:
        plain = info.data.get("name", label) == label and not info.data.get("settings")
        if label in {method.name for method in baselines()} and not plain:
            raise settings.problem(f"{label} is the name of a baseline; choose another label")
        return label


class DatasetDocument(_Document):
    """Cases to edit and evaluate, with demonstrations and further probes for them."""

    SHORT = "source"
    EXPECTED: ClassVar[str] = "the name of a dataset, or fields with a source"

    source: Text
    demonstrations: Annotated[tuple[Annotated[Text, AfterValidator(_file)], ...], Items] = ()
    beside: Annotated[tuple[Text, ...], Items] = ()


def _methods(value: Any) -> Any:
    return None if value == ALL else _items(value)


class RunDocument(_Document):
    """Methods crossed with datasets under one schedule."""

    methods: Annotated[
        tuple[Annotated[MethodDocument, _long(MethodDocument)], ...] | None, BeforeValidator(_methods), Some
    ]
    """None: all of them."""
    datasets: Annotated[tuple[Annotated[DatasetDocument, _long(DatasetDocument)], ...], Items, Some]
    schedule: Annotated[Schedule, BeforeValidator(lambda value: _reported(Schedule.parse, str(value)))] = (
        SINGLE
    )
    look: Any = None

    @field_validator("look")
    @classmethod
    def _looks(cls, look: Any, info: ValidationInfo) -> str | tuple[int, ...] | None:
        schedule = info.data.get("schedule", SINGLE)
        if look is None:
            return None
        if schedule.kind != "sequential":
            raise settings.problem(f"requires a sequential schedule; the schedule is {schedule}")
        numbers = [look] if type(look) is int else look
        if isinstance(numbers, list) and numbers and all(type(n) is int and n > 0 for n in numbers):
            return tuple(numbers)
        if isinstance(look, str):
            _reported(check_looks, look)
            return look
        raise settings.expected("numbers of edits, each, every:K, decades or end")


class RecipeDocument(_Document):
    """The contents of a recipe."""

    name: Text = "run"
    models: Annotated[tuple[Annotated[ModelDocument, _long(ModelDocument)], ...], Items, Some]
    runs: Annotated[tuple[RunDocument, ...], Items, Some]
    seeds: Annotated[tuple[Whole, ...], Items] = (0,)
    threads: Count = 1
    max_new_tokens: Count = 24
    corpus: Text | None = None
    keep_edits: Flag = False
    published: Annotated[tuple[Text, ...], Items] = ()

    @field_validator("corpus")
    @classmethod
    def _there(cls, corpus: str | None) -> str | None:
        if corpus is not None and not Path(corpus).is_file():
            raise settings.problem(f"there is no file {corpus}")
        return corpus


def _reported(read: Any, *arguments: Any) -> Any:
    """Call a parser, and report its ConfigError as a problem of the field."""
    try:
        return read(*arguments)
    except ConfigError as error:
        raise settings.problem(str(error)) from error


# --- duplicate names ------------------------------------------------------------------------


def _repeated(document: Any) -> list[str]:
    """List names that occur twice, also where other fields are wrong."""
    if not isinstance(document, Mapping):
        return []
    lists = [
        ("models", [_label(item, lambda name, _: name) for item in _items(document.get("models"))]),
        ("seeds", [str(seed) for seed in _items(document.get("seeds"))]),
    ]
    for number, run in enumerate(_items(document.get("runs"))):
        if isinstance(run, Mapping):
            labels = [_label(item, _title) for item in _items(run.get("methods"))]
            lists.append((f"runs[{number}].methods", labels))
    return [
        f"{place}: {name!r} occurs twice; leave one out, or give labels"
        for place, names in lists
        for name in sorted({name for name in names if name is not None and names.count(name) > 1})
    ]


def _label(item: Any, title: Any) -> str | None:
    """Return what tables would call an item of a recipe; None for what is no item."""
    if isinstance(item, str):
        return title(item, {})
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        return None
    label, options = item.get("label"), item.get("settings")
    return (
        label
        if isinstance(label, str)
        else title(item["name"], options if isinstance(options, Mapping) else {})
    )


def _title(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={options[key]}" for key in sorted(options, key=str))])
