"""Names that stand for things loaded on demand, with help for those who mistype them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from errata.errors import ConfigError, shown

T = TypeVar("T")

LONGEST_NAME = 100
"""Characters of a name that are compared with the known ones."""


class Registry(Generic[T]):
    """A lazy table: every public module of a package defines one entry under a fixed attribute.

    The names are the file names, so none is kept by hand; other packages add theirs through the
    entry-point group of the same name as the package.
    """

    def __init__(self, package: str, attribute: str, kind: type[T] | str) -> None:
        self._package = package
        self._attribute = attribute
        self._kind = kind

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
            entry = self._foreign()[name].load()
        else:
            raise ConfigError(unknown(name, self.names(), self._package.rpartition(".")[2].rstrip("s")))
        if getattr(entry, "name", None) != name:
            raise ConfigError(
                f"{self.origin(name)} defines {getattr(entry, 'name', None)!r}, expected {name!r}: "
                "the name of the file and of the entry must agree"
            )
        return entry

    def origin(self, name: str) -> str:
        """Say where an entry is defined."""
        if name in self._own():
            return f"{self._package}.{name}"
        return str(self._foreign()[name].value)

    def _own(self) -> set[str]:
        package = importlib.import_module(self._package)
        return {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}

    def _foreign(self) -> dict:
        own = self._own()
        found = {point.name: point for point in entry_points(group=self._package)}
        clash = sorted(own & set(found))
        if clash:
            raise ConfigError(
                f"entry point {found[clash[0]].value} takes the name {clash[0]!r}, "
                f"which {self._package}.{clash[0]} has"
            )
        return found


def close(name: str, names: list[str], most: int = 3) -> list[str]:
    """Return the names closest to one, whatever its case; a few at most, and none where none is close."""
    folded: dict[str, str] = {}
    for each in names:
        folded.setdefault(each.casefold(), each)
    found = difflib.get_close_matches(name.casefold(), list(folded), n=most, cutoff=0.5)
    return [folded[each] for each in found]


def nearest(name: str, names: list[str]) -> str | None:
    """Return the closest of some names, or None if none is close."""
    close = difflib.get_close_matches(str(name)[:LONGEST_NAME], [str(n) for n in names], n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(name: str, names: list[str], what: str) -> str:
    """Word the complaint about a name that does not exist."""
    hint = nearest(name, names)
    suggestion = f"did you mean {hint!r}? " if hint else ""
    return f"unknown {what} {shown(name)}: {suggestion}known: {', '.join(names) or 'none'}"
