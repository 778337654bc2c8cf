"""Published tables of scores, for comparison with measured ones, with their provenance.

One YAML file per table in the folder ``published`` of this package. Figures are taken from the papers named in each
file; none is included that is known from memory only. A row is matched with a measured one by the method's registered
name, or by the label that a recipe gives to a method with its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Annotated, Any, Literal

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
from errata import files
from errata.bench.schedule import Schedule
from errata.errors import ConfigError, listing, shown
from errata.registry import unknown

Provenance = Literal["confirmed", "secondary", "memory"]
"""``confirmed``: read in the primary source. ``secondary``: quoted by another source, not checked against the original.
``memory``: neither; never shown as published."""

LARGEST = 1e300
"""Larger numbers are rejected."""


@dataclass(frozen=True)
class PublishedRow:
    """One method's row of a published table."""

    method: str
    """The paper's name of it; ``unedited`` for the model before any edit."""
    errata_method: str | None
    """Registered name, or a baseline; None if errata has none, or only with settings that a recipe labels."""
    scores: Mapping[str, float]
    """By the paper's name of the score, in its unit."""
    provenance: Provenance


@dataclass(frozen=True)
class PublishedTable:
    """One published table, for one model, dataset and schedule."""

    name: str
    title: str
    source: str
    """Authors, title, venue."""
    arxiv: str
    provenance: Provenance
    """Default provenance of the rows."""
    note: str
    model: str
    """Hub name."""
    dataset: str
    """Source of the cases, in the form of recipes."""
    schedule: str
    metric_convention: str
    """Definition of the scores; scores with another definition are not comparable."""
    tolerance: float
    """Largest difference between a published and a measured score that counts as agreement, in the table's unit."""
    rows: tuple[PublishedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, without rows known from memory only."""
        document = asdict(self)
        document["rows"] = [row for row in document["rows"] if row["provenance"] != "memory"]
        return document


def names() -> list[str]:
    """List the tables included in the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def read(name: str) -> PublishedTable:
    """Read a table by name, or from a file that ends in ``.yaml``.

    Raises ConfigError listing everything that is wrong with it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if path.parent == _folder() and name not in names():
        raise ConfigError(unknown(name, names(), "published table"))
    text = files.read_text(path, ConfigError, most=files.LARGEST_YAML, what="published table")
    document = files.parse_yaml(text, lambda reason: ConfigError(f"published table {path}: {reason}"))
    return parse(document, path.stem)


def documents(names_or_files: Sequence[str]) -> list[dict[str, Any]]:
    """Return tables as plain data for ``run.json``. Raises ConfigError listing all that cannot be read."""
    tables, complaints = [], []
    for name in names_or_files:
        try:
            tables.append(read(name).to_dict())
        except ConfigError as error:
            complaints.append(str(error))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return tables


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise settings.expected("a text")


def _note(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    raise settings.expected("a text")


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    raise settings.expected("a number")


def _above_zero(value: float) -> float:
    if value > 0:
        return value
    raise settings.expected("a number above zero")


def _registered(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise settings.expected("a registered name, or null where there is none")


def _scores(value: Any) -> Any:
    if isinstance(value, Mapping) and value:
        return value
    raise settings.expected("names with numbers")


def _rows(value: Any) -> Any:
    if isinstance(value, list) and value:
        return value
    raise settings.expected("a list with at least one row")


def _schedule(value: str) -> str:
    try:
        Schedule.parse(value)
    except ConfigError as error:
        raise settings.problem(str(error)) from error
    return value


Text = Annotated[str, BeforeValidator(_text)]
Note = Annotated[str, BeforeValidator(_note)]
Score = Annotated[float, BeforeValidator(_number)]


class _Row(BaseModel):
    """One row of a table's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Text
    errata_method: Annotated[str | None, BeforeValidator(_registered)]
    scores: Annotated[dict[str, Score], BeforeValidator(_scores)]
    provenance: Provenance = "memory"
    """Default: that of the table."""


class _Table(BaseModel):
    """A table's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text
    title: Text
    source: Text
    arxiv: Text
    provenance: Provenance
    note: Note = ""
    model: Text
    dataset: Text
    schedule: Annotated[Text, AfterValidator(_schedule)]
    metric_convention: Text
    tolerance: Annotated[Score, AfterValidator(_above_zero)]
    rows: Annotated[tuple[_Row, ...], BeforeValidator(_rows)]

    @field_validator("name")
    @classmethod
    def _agrees(cls, name: str, info: ValidationInfo) -> str:
        if name != info.context:
            raise settings.problem(f"{name!r} in a file named {info.context}; they must be equal")
        return name


def parse(document: Any, name: str) -> PublishedTable:
    """Build a table from plain data. Raises ConfigError listing everything that is wrong with it."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"published table {name}: expected fields, found {type(document).__name__}")
    table, complaints = None, []
    try:
        table = _Table.model_validate(document, context=name)
    except ValidationError as error:
        complaints = settings.explain(error, _Table, document)
    complaints += _repeated(document.get("rows"))
    if table is None or complaints:
        raise ConfigError(f"published table {name}: {len(complaints):,} mistakes\n" + listing(complaints))
    facts = {field: getattr(table, field) for field in _Table.model_fields if field != "rows"}
    rows = tuple(
        PublishedRow(
            row.method,
            row.errata_method,
            row.scores,
            provenance=row.provenance if "provenance" in row.model_fields_set else table.provenance,
        )
        for row in table.rows
    )
    return PublishedTable(**facts, rows=rows)


def _repeated(rows: Any) -> list[str]:
    """List methods that have several rows, also where other fields are wrong."""
    methods = (
        [row.get("method") for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    )
    methods = [method for method in methods if isinstance(method, str)]
    return [f"rows: {shown(m)} occurs twice" for m in sorted(set(methods)) if methods.count(m) > 1]


def _folder() -> Path:
    return Path(str(resources("errata.bench"))) / "published"
