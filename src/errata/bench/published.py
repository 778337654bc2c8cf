"""Published tables of numbers, as data: what a run can be read against, with how sure the digits are.

One YAML file a table in the folder ``published`` beside this file. Figures are facts taken from the papers
named in each file; none stands there that is known from memory only. A method's row is found among the
measured ones by its registered name, or by the label a recipe gives to a method with settings of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Literal, get_args

from errata import files
from errata.bench.schedule import Schedule
from errata.errors import ConfigError, listing, shown
from errata.registry import unknown

Provenance = Literal["confirmed", "secondary", "memory"]
"""``confirmed``: read in the primary source. ``secondary``: quoted by another source, not checked digit by
digit. ``memory``: neither; never to be shown as published."""

TEXTS = ("name", "title", "source", "arxiv", "model", "dataset", "schedule", "metric_convention")
FIELDS = (*TEXTS, "provenance", "note", "tolerance", "rows")
LARGEST = 1e300
"""Numbers from here on are no scores."""
ROW_FIELDS = ("method", "errata_method", "scores", "provenance")


@dataclass(frozen=True)
class PublishedRow:
    """One method's line of a published table."""

    method: str
    """As the paper calls it; ``unedited`` for the model before any edit."""
    errata_method: str | None
    """Registered name, or a baseline; None where errata has none, or only under settings that a recipe labels."""
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
    """Of every row that says nothing else."""
    note: str
    model: str
    """Hub name."""
    dataset: str
    """Source of cases, as recipes name it."""
    schedule: str
    metric_convention: str
    """What the scores mean; rows under another convention are not comparable."""
    tolerance: float
    """How far a repetition may lie from a figure and still agree, in the table's unit."""
    rows: tuple[PublishedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data, rows known from memory left out."""
        document = asdict(self)
        document["rows"] = [row for row in document["rows"] if row["provenance"] != "memory"]
        return document


def names() -> list[str]:
    """List the tables that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def read(name: str) -> PublishedTable:
    """Read a table by name, or a file of one's own that ends in ``.yaml``.

    Raises ConfigError listing everything that is wrong with it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if path.parent == _folder() and name not in names():
        raise ConfigError(unknown(name, names(), "published table"))
    text = files.read_text(path, ConfigError, most=files.LARGEST_YAML, what="published table")
    document = files.parse_yaml(text, lambda reason: ConfigError(f"published table {path}: {reason}"))
    return parse(document, path.stem)


def documents(wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Return tables as plain data for a run's record. Raises ConfigError for all that cannot be read."""
    found, complaints = [], []
    for name in wanted:
        try:
            found.append(read(name).to_dict())
        except ConfigError as error:
            complaints.append(str(error))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return found


def parse(document: Any, name: str) -> PublishedTable:
    """Build a table from plain data. Raises ConfigError listing everything that is wrong with it."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"published table {name}: expected fields, found {type(document).__name__}")
    complaints = [unknown(str(key), list(FIELDS), "field") for key in document if key not in FIELDS]
    complaints += [
        f"{key}: expected a text, found {shown(document.get(key), 60)}"
        for key in TEXTS
        if not _is_text(document.get(key))
    ]
    provenance: Any = document.get("provenance")
    complaints += _provenance_problems(provenance)
    complaints += _table_problems(document, name)
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows:
        complaints.append(f"rows: expected a list with at least one row, found {shown(rows, 60)}")
        rows = []
    complaints += [f"rows[{i}]: {what}" for i, row in enumerate(rows) for what in _row_problems(row)]
    if not complaints:
        methods = [row["method"] for row in rows]
        complaints += [
            f"rows: {shown(m)} stands there twice" for m in sorted(set(methods)) if methods.count(m) > 1
        ]
    if complaints:
        raise ConfigError(f"published table {name}: {len(complaints):,} mistakes\n" + listing(complaints))
    made = tuple(_row(row, provenance) for row in rows)
    note = str(document.get("note") or "").strip()
    texts = {key: document[key].strip() for key in TEXTS}
    return PublishedTable(
        **texts, provenance=provenance, note=note, tolerance=float(document["tolerance"]), rows=made
    )


def _table_problems(document: Mapping[str, Any], name: str) -> list[str]:
    found = []
    if document.get("name") not in (None, name):
        found.append(f"name: {shown(document['name'])} in a file called {name}; they must agree")
    tolerance: Any = document.get("tolerance")
    if not _is_number(tolerance) or tolerance <= 0:
        found.append(f"tolerance: expected a number above zero, found {shown(tolerance)}")
    if not isinstance(document.get("note", ""), str):
        found.append(f"note: expected a text, found {shown(document['note'], 60)}")
    if _is_text(document.get("schedule")):
        try:
            Schedule.parse(document["schedule"])
        except ConfigError as error:
            found.append(f"schedule: {error}")
    return found


def _row_problems(row: Any) -> list[str]:
    if not isinstance(row, Mapping):
        return [f"expected fields, found {shown(row, 60)}"]
    found = [unknown(str(key), list(ROW_FIELDS), "field") for key in row if key not in ROW_FIELDS]
    if not _is_text(row.get("method")):
        found.append(f"method: expected a text, found {shown(row.get('method'), 60)}")
    if "errata_method" not in row or not (row["errata_method"] is None or _is_text(row["errata_method"])):
        found.append("errata_method: expected a registered name, or null where there is none")
    scores = row.get("scores")
    if not isinstance(scores, Mapping) or not scores:
        found.append(f"scores: expected names with numbers, found {shown(scores, 60)}")
    else:
        found += [
            f"scores.{key}: expected a number, found {shown(value, 60)}"
            for key, value in scores.items()
            if not isinstance(key, str) or not _is_number(value)
        ]
    if "provenance" in row:
        found += _provenance_problems(row["provenance"])
    return found


def _provenance_problems(value: Any) -> list[str]:
    known = get_args(Provenance)
    if value in known:
        return []
    return [
        f"provenance: {unknown(value if isinstance(value, str) else shown(value), list(known), 'provenance')}"
    ]


def _row(row: Mapping[str, Any], provenance: Any) -> PublishedRow:
    scores = {key: float(value) for key, value in row["scores"].items()}
    return PublishedRow(row["method"], row["errata_method"], scores, row.get("provenance", provenance))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _folder() -> Path:
    return Path(str(resources("errata.bench"))) / "published"
