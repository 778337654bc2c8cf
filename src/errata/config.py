"""Settings: frozen dataclasses made from plain data, with every mistake reported at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_origin

from errata.errors import ConfigError, shown
from errata.files import parse_yaml
from errata.registry import unknown

C = TypeVar("C")


def make(config: type[C], values: Mapping[str, Any], owner: str) -> C:
    """Build a settings dataclass; text is read as YAML where the field is not text.

    Raises ConfigError listing all unknown keys and all values of the wrong type or range. A class
    may define ``problems()`` returning complaints about its values.
    """
    hints = _hints(config)
    complaints = []
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            complaints.append(unknown(key, list(hints), f"setting of {owner}"))
            continue
        try:
            made[key] = _coerce(value, hints[key])
        except ValueError as error:
            complaints.append(f"{owner}.{key}: {error}")
    if not complaints:
        result = config(**made)
        complaints = list(getattr(result, "problems", list)())
        if not complaints:
            return result
        complaints = [f"{owner}.{c}" for c in complaints]
    raise ConfigError("\n".join(complaints))


def positive(config: Any, *names: str) -> list[str]:
    """List complaints about settings that are set and not above zero; for ``problems()``."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{n}: expected a positive number, found {shown(v)}"
        for n, v in values.items()
        if v is not None and v <= 0
    ]


def parse_assignments(items: list[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; values are YAML. Raises ConfigError naming all malformed ones."""
    values: dict[str, Any] = {}
    complaints = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            complaints.append(f"{shown(item)} is not of the form key=value")
            continue
        try:
            values[key.strip()] = parse_yaml(text, ConfigError)
        except ConfigError as error:
            complaints.append(f"{shown(item)}: the value is not valid YAML ({error})")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return values


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings class, for tables and help."""

    name: str
    type: str
    default: Any
    meaning: str


def settings(config: type) -> list[Setting]:
    """List a settings class's fields with the text under each."""
    meanings = _meanings(config)
    return [
        Setting(f.name, str(f.type), f.default, meanings.get(f.name, "")) for f in dataclasses.fields(config)
    ]


@lru_cache(maxsize=64)
def _meanings(config: type) -> dict[str, str]:
    import ast
    import inspect
    import textwrap

    meanings: dict[str, str] = {}
    for owner in reversed([c for c in config.__mro__ if dataclasses.is_dataclass(c)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                meanings[field.target.id] = " ".join(str(text.value.value).split())
    return meanings


def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _coerce(value: Any, hint: Any) -> Any:
    """Turn plain data into the hinted type, or raise ValueError saying what was expected."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)))
    if origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(
            unknown(value if isinstance(value, str) else shown(value), [str(a) for a in args], "choice")
        )
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple, range)) else [value]
        return tuple(_coerce(item, args[0]) for item in items)
    if isinstance(value, str) and hint is not str:
        try:  # YAML 1.1 reads 1e-4 as text
            value = float(value) if hint is float else parse_yaml(value, ConfigError)
        except (ValueError, ConfigError) as error:
            raise ValueError(f"expected {_name(hint)}, found {shown(value)}") from error
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"expected {_name(hint)}, found {shown(value)}") from error
    if type(value) is hint:
        return value
    raise ValueError(f"expected {_name(hint)}, found {shown(value)}")


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
