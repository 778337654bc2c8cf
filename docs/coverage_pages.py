"""Write the pages that say where each published system is, from coverage.yaml: `python docs/coverage_pages.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
TABLE = DOCS / "coverage.yaml"
INTRODUCTIONS = {
    "coverage.md": """# Published systems

Where each method and system of the field is: a registered method (`errata methods NAME` lists its settings), a
command, or not here, with the reason. Editing is on this page; steering, erasing, unlearning, looking inside and
pictures are [on the next](coverage-inside.md); datasets and benchmarks: [Published datasets](coverage-data.md). The
pages are written by `python docs/coverage_pages.py` from `docs/coverage.yaml`; a test compares every name with the
registries.
""",
    "coverage-inside.md": """# Published systems beside editing

Steering, erasing, unlearning, looking inside, pictures: a registered method, a command, or not here, with the reason.
Editors: [Published systems](coverage.md).
""",
    "coverage-data.md": """# Published datasets

Where each dataset and benchmark of the field is: a dataset of `errata data list`, a metric, a recipe, a published
table that results are printed beside, or not here, with the reason. Methods and systems:
[Published systems](coverage.md). What a dataset asks, and under which licence: [Datasets](datasets.md).
""",
}
"""The pages, and how each begins."""


@dataclass(frozen=True)
class System:
    """One published system: where it is, or why it is not here."""

    name: str
    arxiv: tuple[str, ...] = ()
    """Ids; the first one dates the system where no year is given."""
    year: int | None = None
    method: tuple[str, ...] = ()
    """Registered names, each followed by the settings that make it the system."""
    verb: tuple[str, ...] = ()
    """Commands, each followed by its options."""
    data: tuple[str, ...] = ()
    metric: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    note: str = ""
    why: str = ""

    @property
    def places(self) -> tuple[str, ...]:
        """Return everything that the system is found by."""
        return (*self.method, *self.verb, *self.data, *self.metric, *self.recipe, *self.table)

    @property
    def paper(self) -> str:
        """Return year and arXiv ids, as far as they are known."""
        year = self.year or (2000 + int(self.arxiv[0][:2]) if self.arxiv else "")
        return ", ".join(str(part) for part in (year, *self.arxiv) if part)


@dataclass(frozen=True)
class Section:
    """The systems of one kind, and the page that lists them."""

    title: str
    page: str
    systems: tuple[System, ...]


def read(document: Any = None) -> list[Section]:
    """Read the table. Raises ValueError for a field that is unknown, and for a system in two places or in none."""
    parts = yaml.safe_load(TABLE.read_text(encoding="utf-8")) if document is None else document
    return [
        Section(part["section"], part.get("page", "coverage.md"), tuple(map(system, part["systems"])))
        for part in parts
    ]


def system(entry: Mapping[str, Any]) -> System:
    """Read one system. Raises ValueError as ``read`` does."""
    several = {field.name for field in fields(System) if field.default == () and field.name != "arxiv"}
    known = {field.name for field in fields(System)}
    if set(entry) - known:
        raise ValueError(f"{entry.get('name')}: unknown field {sorted(set(entry) - known)}; quote commas")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        values[name] = tuple(value if isinstance(value, list) else [value]) if name in several else value
    values["arxiv"] = tuple(entry.get("arxiv", "").split())
    result = System(**values)
    if bool(result.places) == bool(result.why):
        raise ValueError(f"{result.name}: expected either where it is or why: not both, not neither")
    return result


def problems(sections: Sequence[Section]) -> list[str]:
    """List what the table and the registries do not agree on, as messages."""
    systems = [one for section in sections for one in section.systems]
    names = [one.name for one in systems]
    found = [f"{name}: listed twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for one in systems:
        found += [f"{one.name}: {complaint}" for complaint in (*_methods(one), *_verbs(one), *_files(one))]
    return [*found, *_unlisted(systems)]


def _methods(one: System) -> Iterator[str]:
    """Yield what is wrong with the methods of a system, their settings and its arXiv ids."""
    from errata.config import make, parse_assignments
    from errata.errors import ConfigError
    from errata.methods import REGISTRY

    for place in one.method:
        name, *settings = place.split()
        try:
            make(REGISTRY.get(name).config, parse_assignments(settings), name)
        except ConfigError as error:
            yield str(error)


def _verbs(one: System) -> Iterator[str]:
    """Yield the commands and options of a system that do not exist."""
    import typer

    from errata.cli.main import app

    program: Any = typer.main.get_command(app)
    for place in one.verb:
        name, *options = place.split()
        if name not in program.commands:
            yield f"there is no command errata {name}"
            continue
        known = {spelling for parameter in program.commands[name].params for spelling in parameter.opts}
        yield from (f"errata {name} has no option {option}" for option in options if option not in known)


def _files(one: System) -> Iterator[str]:
    """Yield the datasets, metrics, recipes and published tables of a system that do not exist."""
    from errata.bench import published
    from errata.data.sets import REGISTRY as DATASETS
    from errata.evaluation.metrics import REGISTRY as METRICS

    for place in one.data:
        name, _, variant = place.partition("/")
        if name not in DATASETS or (variant and variant not in DATASETS.get(name).variants):
            yield f"there is no dataset {place}"
    metrics = {metric.name for metric in METRICS.values()}
    yield from (f"there is no metric {name}" for name in one.metric if name not in metrics)
    recipes = {path.stem for path in (DOCS.parent / "recipes").glob("*.yaml")}
    yield from (f"there is no recipe {name}" for name in one.recipe if name not in recipes)
    yield from (f"there is no published table {name}" for name in one.table if name not in published.names())


def _unlisted(systems: Sequence[System]) -> Iterator[str]:
    """Yield the registered methods and datasets that are in no row, and the papers of methods that are not."""
    from errata.data.sets import REGISTRY as DATASETS
    from errata.methods import REGISTRY

    listed = {name.split()[0]: one for one in systems for name in one.method}
    papers = {number for one in systems for number in one.arxiv}
    for name in _own(REGISTRY):
        if name not in listed:
            yield f"the method {name} is in no row"
        yield from (
            f"arXiv {number}, the paper of {name}, is in no row"
            for number in _numbers(REGISTRY.get(name).paper)
            if number not in papers
        )
    sets = {place.partition("/")[0] for one in systems for place in one.data}
    yield from (f"the dataset {name} is in no row" for name in _own(DATASETS) if name not in sets)


def _own(registry: Any) -> list[str]:
    """Return the names of a registry that this package defines, without those of installed plug-ins."""
    return [name for name in registry if registry.origin(name).startswith("errata.")]


def _numbers(text: str) -> list[str]:
    """Return the arXiv ids in a text."""
    return re.findall(r"\b\d{4}\.\d{4,5}\b", text)


def pages(sections: Sequence[Section]) -> dict[str, str]:
    """Return every page's text by its name."""
    return {
        page: "\n".join([text, *(line for part in sections if part.page == page for line in lines(part))])
        for page, text in INTRODUCTIONS.items()
    }


def lines(section: Section) -> Iterator[str]:
    """Yield the lines of one section: a table of what is here, then what is not, by the reason."""
    here = [one for one in section.systems if not one.why]
    yield f"## {section.title}\n"
    if here:
        yield "| system | paper | in errata |"
        yield "|---|---|---|"
        yield from (f"| {one.name} | {one.paper} | {places(one)} |" for one in here)
        yield ""
    reasons: dict[str, list[str]] = {}
    for one in section.systems:
        if one.why:
            reasons.setdefault(one.why, []).append(f"{one.name} ({one.paper})" if one.paper else one.name)
    if reasons:
        yield "Not here:\n"
        yield from (f"* {'; '.join(names)}: {why}." for why, names in reasons.items())
        yield ""


def places(one: System) -> str:
    """Return where a system is, as the cell of a table."""
    parts = [
        *(_method(place) for place in one.method),
        *(f"`errata {place}`" for place in one.verb),
        *(f"data `{place}`" for place in one.data),
        *(f"metric `{place}`" for place in one.metric),
        *(f"`recipes/{place}.yaml`" for place in one.recipe),
        *(f"table `{place}`" for place in one.table),
        *((one.note,) if one.note else ()),
    ]
    return "; ".join(parts)


def _method(place: str) -> str:
    """Return a method with its settings as code."""
    name, *settings = place.split()
    return f"`{name}`" + "".join(f", `{setting}`" for setting in settings)


if __name__ == "__main__":
    for name, text in pages(read()).items():
        (DOCS / name).write_text(text, encoding="utf-8")
