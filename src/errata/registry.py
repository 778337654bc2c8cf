"""Registries: entries found by name and loaded on demand, with suggestions for mistyped names."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from errata.errors import ConfigError, shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class HasName(Protocol):
    """A record with a name."""

    @property
    def name(self) -> str:
        """Return the name."""
        ...


T = TypeVar("T")
R = TypeVar("R", bound=HasName)

LONGEST_NAME = 100
"""Maximum characters of a name that are compared with the known ones."""


class Registry(Generic[T]):
    """A lazy table: every public module of a package defines one entry under a fixed attribute.

    The names are the file names, so none is listed by hand; other packages add theirs through the entry-point
    group.
    """

    def __init__(self, package: str, attribute: str, kind: type[T] | str, *, group: str) -> None:
        self._package = package
        self._attribute = attribute
        self._kind = kind
        self._group = group

    def names(self) -> list[str]:
        """List every name, sorted; nothing is imported but the package itself."""
        return sorted({*self._own(), *self._foreign()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """Load an entry. Raises ConfigError with the nearest names for an unknown one."""
        if name in self._own():
            module = importlib.import_module(f"{self._package}.{name}")
            entry = getattr(module, self._attribute)
        elif name in self._foreign():
            entry = _load(self._foreign()[name])
        else:
            raise ConfigError(unknown(name, self.names(), self._package.rpartition(".")[2].rstrip("s")))
        if getattr(entry, "name", None) != name:
            raise ConfigError(
                f"{self.origin(name)} defines {getattr(entry, 'name', None)!r}, expected {name!r}: "
                "the name of the file and of the entry must agree"
            )
        return entry

    def origin(self, name: str) -> str:
        """Return where an entry is defined."""
        if name in self._own():
            return f"{self._package}.{name}"
        return str(self._foreign()[name].value)

    def _own(self) -> set[str]:
        package = importlib.import_module(self._package)
        return {name for place in package.__path__ for name in _public_modules(place, _changed(Path(place)))}

    def _foreign(self) -> dict:
        own = self._own()
        points = {point.name: point for point in _entry_points(self._group)}
        clash = sorted(own & set(points))
        if clash:
            raise ConfigError(
                f"entry point {points[clash[0]].value} takes the name {clash[0]!r}, "
                f"which {self._package}.{clash[0]} has"
            )
        return points


class Records(Generic[R]):
    """All records that the public modules of a package define, one or more per module, loaded at first use.

    Other packages add records through an entry-point group; each entry point loads one or more. Records are sorted by
    ``order``, then by name.
    """

    def __init__(
        self, package: str, attributes: tuple[str, str], kind: type[R], *, group: str,
        order: Callable[[R], int] = lambda record: 0,
    ) -> None:  # fmt: skip
        """``attributes``: names under which a module defines one record, or a sequence of them."""
        self._package, self._attributes, self._kind = package, attributes, kind
        self._group, self._order = group, order

    def names(self) -> list[str]:
        """List every name, in order."""
        return list(self._records)

    def values(self) -> list[R]:
        """List every record, in order."""
        return list(self._records.values())

    def find(self, name: str) -> R | None:
        """Return a record, None where none has the name."""
        return self._records.get(name)

    def get(self, name: str) -> R:
        """Return a record. Raises ConfigError with the nearest names for an unknown one."""
        record = self.find(name)
        if record is None:
            raise ConfigError(unknown(name, sorted(self.names()), self._kind.__name__.lower()))
        return record

    def reload(self) -> None:
        """Search again at the next use, e.g. after installing a package."""
        self.__dict__.pop("_records", None)

    @cached_property
    def _records(self) -> dict[str, R]:
        records: dict[str, R] = {}
        origins: dict[str, str] = {}
        for origin, record in self._search():
            if not isinstance(record, self._kind):
                raise ConfigError(
                    f"{origin} defines {type(record).__name__} {shown(record)}, expected {self._kind.__name__}"
                )
            if record.name in records:
                raise ConfigError(
                    f"{origin} takes the name {record.name!r}, which {origins[record.name]} has"
                )
            records[record.name], origins[record.name] = record, origin
        return dict(sorted(records.items(), key=lambda item: (self._order(item[1]), item[0])))

    def _search(self) -> Iterator[tuple[str, Any]]:
        """Yield the records of the package's modules and of the entry points, each with its origin."""
        package = importlib.import_module(self._package)
        for entry in pkgutil.iter_modules(package.__path__):
            if not entry.name.startswith("_"):
                module = importlib.import_module(f"{self._package}.{entry.name}")
                for attribute in self._attributes:
                    yield from _each(module.__name__, getattr(module, attribute, ()))
        for point in _entry_points(self._group):
            yield from _each(str(point.value), _load(point))


def _load(point: EntryPoint) -> Any:
    """Load what another package brings. Raises ConfigError naming the package where it cannot be loaded."""
    try:
        return point.load()
    except Exception as error:
        owner = point.dist.name if point.dist else "an installed package"
        raise ConfigError(
            f"cannot load {point.value} of {owner}, entry point {point.name!r} of {point.group}: "
            f"{type(error).__name__}: {error}; mend or uninstall that package"
        ) from error


def _each(origin: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield one record, or each of several, with its origin."""
    for record in value if isinstance(value, (tuple, list)) else (value,):
        yield origin, record


def close(name: str, names: list[str], most: int = 3) -> list[str]:
    """Return at most ``most`` names similar to a name, ignoring case; none if none is similar."""
    folded: dict[str, str] = {}
    for each in names:
        folded.setdefault(each.casefold(), each)
    matches = difflib.get_close_matches(name.casefold(), list(folded), n=most, cutoff=0.5)
    return [folded[each] for each in matches]


def nearest(name: str, names: list[str]) -> str | None:
    """Return the most similar of some names, or None if none is similar."""
    close = difflib.get_close_matches(str(name)[:LONGEST_NAME], [str(n) for n in names], n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(name: str, names: list[str], what: str) -> str:
    """Return the error message for a name that does not exist."""
    hint = nearest(name, names)
    suggestion = f"did you mean {hint!r}? " if hint else ""
    return f"unknown {what} {shown(name)}: {suggestion}known: {', '.join(names) or 'none'}"


@lru_cache(maxsize=64)
def _public_modules(place: str, changed: int) -> frozenset[str]:
    """Return the names of a folder's modules; ``changed``: see :func:`_changed`, a folder is listed once for each."""
    return frozenset(m.name for m in pkgutil.iter_modules([place]) if not m.name.startswith("_"))


def _entry_points(group: str) -> list[EntryPoint]:
    """List the entry points of a group that installed packages declare."""
    heading = f"[{group}]".encode()
    places = (Path(entry or ".").absolute() for entry in sys.path)
    if not any(_may_declare(place, _changed(place), heading) for place in places):
        return []  # reading all metadata would take an eighth of `errata --help`
    from importlib.metadata import entry_points

    return list(entry_points(group=group))


@lru_cache(maxsize=256)
def _may_declare(place: Path, changed: int, heading: bytes) -> bool:
    """Whether a package in a place where Python imports from may declare a group; an archive always may.

    ``changed``: see :func:`_changed`; a place is searched once for each, as an installation changes it.
    """
    if place.is_file():
        return True
    files = (
        file
        for pattern in ("*.dist-info", "*.egg-info")
        for file in place.glob(f"{pattern}/entry_points.txt")
    )
    return any(heading in file.read_bytes() for file in files)


def _changed(place: Path) -> int:
    """Return when entries of a folder were last added or removed, in nanoseconds; 0 where there is none."""
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return 0
