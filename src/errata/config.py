"""Settings: frozen dataclasses made from plain data, with every mistake reported at once."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from errata.errors import ConfigError, shown
from errata.files import parse_yaml
from errata.registry import unknown

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

C = TypeVar("C")

RESERVED = frozenset(
    (
        "after", "at", "batch_size", "cases", "corpus", "edit", "examples", "host", "join", "keep", "max_new_tokens",
        "method", "on_progress", "probes", "requests", "run_folder", "schedule", "seed", "system", "template",
        "thinking", "thinking_template", "thought_tokens",
    )
)  # fmt: skip
"""Keywords of functions that also take a method's settings; no setting may have such a name."""

UNIONS = (types.UnionType, typing.Union)


def make(config: type[C], values: Mapping[str, Any], owner: str) -> C:
    """Build a settings dataclass; text is read as YAML where the field is a number or a flag.

    A field may be a number, a flag, a text, a path, one of some words, a tuple, a mapping or a union of these;
    nothing else is converted, but that one value may take the place of a tuple of one. Raises ConfigError listing
    all unknown keys and all values of the wrong type or range. A class may define ``problems()`` returning
    complaints about its values.
    """
    from pydantic import ValidationError

    try:
        fields = _adapter(config).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, config, values, place=owner, noun="setting"))) from error
    result = config(**fields)
    problems = list(getattr(result, "problems", list)())
    if problems:
        raise ConfigError("\n".join(f"{owner}.{problem}" for problem in problems))
    return result


def check_names(config: type, owner: str) -> None:
    """Raise ConfigError where a settings class has a field of a reserved name, see :data:`RESERVED`."""
    conflicts = sorted(RESERVED & {field.name for field in dataclasses.fields(config)})
    if conflicts:
        raise ConfigError(
            f"{owner} has settings named {', '.join(conflicts)}: expected other names, as these are arguments of "
            "errata.edit and errata.evaluate; rename the fields of its settings class"
        )


def plain(value: Any) -> Any:
    """Return settings as plain data that JSON and YAML can write, and :func:`make` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


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


# --- meanings -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings class, for tables and help."""

    name: str
    type: str
    default: Any
    meaning: str


def settings(config: type) -> list[Setting]:
    """List a settings class's fields with the text under each; without text where no source is installed."""
    meanings = _meanings(config)
    return [
        Setting(f.name, str(f.type), f.default, meanings.get(f.name, "")) for f in dataclasses.fields(config)
    ]


@lru_cache(maxsize=64)
def _meanings(config: type) -> dict[str, str]:
    """Read the text under each field off the source; Python keeps it nowhere else."""
    meanings: dict[str, str] = {}
    for owner in reversed([c for c in config.__mro__ if dataclasses.is_dataclass(c)]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError):  # compiled files alone, or a class made in an interpreter
            continue
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


# --- checking -------------------------------------------------------------------------------


def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


@lru_cache(maxsize=64)
def _adapter(config: type) -> TypeAdapter[dict[str, Any]]:
    """Return a checker of a settings class's fields as plain data; only the given ones come back."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import NotRequired, TypedDict

    hints = {name: _strict(hint) for name, hint in _hints(config).items()}
    for field in dataclasses.fields(config):
        optional = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if field.init and optional:
            hints[field.name] = NotRequired[hints[field.name]]
    make_type: Any = TypedDict  # of fields that are known at run time only
    checked = make_type(config.__name__, hints)
    checked.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return TypeAdapter(checked)


def _strict(hint: Any, *, text: bool = True) -> Any:
    """Annotate a type so that pydantic converts nothing silently.

    ``text``: whether text may stand for a number, a flag or the one item of a tuple; not where a union also
    takes text as it is.
    """
    from pydantic import BeforeValidator, Strict

    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_strict(args[0], text=text), *args[1:])]
    if hint in (int, float, bool):
        rule = Annotated[hint, Strict()]
        return Annotated[rule, BeforeValidator(partial(_read, hint))] if text else rule
    if hint is str:
        return Annotated[str, Strict()]
    if origin in UNIONS:
        text = text and not {str, Path} & set(args)
        return typing.Union[tuple(_strict(arm, text=text) for arm in args)]  # noqa: UP007
    if origin is tuple:
        inner = tuple(item if item is ... else _strict(item) for item in args)
        single = len(args) == 2 and args[1] is ...
        return Annotated[tuple[inner], BeforeValidator(partial(_as_items, text))] if single else tuple[inner]
    if args and origin is not Literal:
        return origin[tuple(_strict(arg) for arg in args)]
    return hint


def _read(kind: type, value: Any) -> Any:
    """Read text as a number or flag where it is one; YAML 1.1 takes 1e-4 for text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if kind is float else parse_yaml(value, ConfigError)
    except (ValueError, ConfigError):
        return value


def _as_items(text: bool, value: Any) -> Any:
    """Return one value as a list of one."""
    if isinstance(value, (list, tuple, range)) or value is None or (isinstance(value, str) and not text):
        return value
    return [value]


def explain(
    error: ValidationError, hint: Any, value: Any, *, place: str = "", noun: str = "field"
) -> list[str]:
    """Word what pydantic found in plain data, one line for each place in it: what was expected and found.

    ``hint``: the type that the value was checked against. ``place``: what the value is called. ``noun``: what its
    fields are called.
    """
    lines: list[str] = []
    for problem in error.errors(include_url=False, include_input=False):
        lines += _lines(problem, _walk(hint, value, problem, place), noun)
    return list(dict.fromkeys(lines))


def problem(text: str) -> Exception:
    """Return an error for a validator to raise whose text is the whole complaint; the place is put before it."""
    from pydantic_core import PydanticCustomError

    return PydanticCustomError("problem", "{text}", {"text": text})


def expected(what: str) -> Exception:
    """Return an error for a validator to raise that says what a value should have been; what was found is added."""
    from pydantic_core import PydanticCustomError

    return PydanticCustomError("expected", "{what}", {"what": what})


@dataclasses.dataclass(frozen=True)
class _At:
    """Where an error's path leads: a type, the value there, and what the place is called."""

    hint: Any
    value: Any
    place: str
    rest: tuple[Any, ...] = ()
    """What is left of the path: a field that is unknown or missing, or the arm of a choice between types."""


def _walk(hint: Any, value: Any, problem: Any, place: str) -> _At:
    """Follow an error's path as long as it leads to one place, a choice between types at most."""
    steps = list(problem["loc"])
    for number, step in enumerate(steps):
        inner = _inside(hint, step)
        is_container = isinstance(value, Mapping) or (
            isinstance(value, (list, tuple, range)) and isinstance(step, int)
        )
        absent = is_container and (step not in value if isinstance(value, Mapping) else step >= len(value))
        if inner is None or absent or steps[number + 1 :] == ["[key]"]:
            return _At(_bare(hint), value, place, tuple(steps[number:]))
        dotted = f"{place}.{step}" if place else str(step)
        place = f"{place}[{step!r}]" if _fields(hint) is None else dotted
        hint, value = inner, value[step] if is_container else value
    return _At(_bare(hint), value, place)


def _lines(problem: Any, at: _At, noun: str) -> list[str]:
    """Word one error; several lines where a validator found several things at one place."""
    before = f"{at.place}: " if at.place else ""
    fields = _fields(at.hint)
    if fields is not None and at.rest:
        name = at.rest[0]
        if problem["type"] == "missing":
            return [f"{at.place}.{name}: is missing" if at.place else f"{name}: is missing"]
        return [f"{before}{unknown(str(name), list(fields), noun)}"]
    if problem["type"] == "problem":
        return [f"{before}{line}" for line in problem["msg"].splitlines()]
    if problem["type"] == "expected":
        return [f"{before}expected {problem['msg']}, found {shown(at.value, 60)}"]
    if at.rest[1:] == ("[key]",):
        return [f"{before}expected {type_name(get_args(at.hint)[0])} as a key, found {shown(at.rest[0], 60)}"]
    if get_origin(at.hint) is Literal:
        name = at.value if isinstance(at.value, str) else shown(at.value)
        return [f"{before}{unknown(name, [str(arg) for arg in get_args(at.hint)], 'choice')}"]
    if problem["type"] in BOUNDS:
        return [f"{before}{problem['msg'].replace('Input should be', 'expected')}, found {shown(at.value)}"]
    return [f"{before}expected {type_name(at.hint)}, found {shown(at.value)}"]


BOUNDS = (
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "multiple_of",
    "finite_number",
)
"""pydantic's errors about a value of the right type."""


def _fields(hint: Any) -> dict[str, Any] | None:
    """Return the fields of a record with their types; None for what is no record."""
    hint = _bare(hint)
    if dataclasses.is_dataclass(hint):
        return _hints(typing.cast("type", hint))
    return typing.get_type_hints(hint, include_extras=True) if hasattr(hint, "model_fields") else None


def _bare(hint: Any) -> Any:
    """Take annotations off a type, and None out of a choice between it and one other."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in UNIONS:
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        return _bare(arms[0]) if len(arms) == 1 else hint
    return hint


def _inside(hint: Any, step: Any) -> Any:
    """Return the type of an item; None where there is none, or where it depends on which type is meant."""
    hint = _bare(hint)
    fields = _fields(hint)
    if fields is not None:
        return fields.get(str(step))
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(step, int):
        return args[0] if args[1:] == (...,) else args[step] if step < len(args) else None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return args[1]
    if origin is list:
        return args[0]
    return None


def type_name(hint: Any) -> str:
    """Name a type as a message calls it; a record by its ``EXPECTED``, if it has one."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return " or ".join(type_name(arm) for arm in args if arm is not type(None))
    if origin is tuple and args[1:] != (...,):
        return f"a list of {len(args)} ({', '.join(map(type_name, args))})"
    if origin in (tuple, list):
        return f"a list of {type_name(args[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {type_name(args[0])} to {type_name(args[1])}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if _fields(hint) is not None:
        return getattr(hint, "EXPECTED", "fields")
    return getattr(hint, "__name__", str(hint))
