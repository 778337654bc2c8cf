"""Settings: every kind of field, every mistake at once, nothing converted silently, names that are taken."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import pytest
import yaml

import errata
from errata import config
from errata.errors import ConfigError
from errata.methods import REGISTRY
from errata.methods._method import Method


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    """How many."""
    rate: float = 0.5
    quick: bool = False
    name: str = "a"
    mode: Literal["mean", "each"] = "mean"
    layers: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, float], ...] = ()
    artefact: Path | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    size: int | Literal["auto"] = "auto"
    where: int | str = 0
    spans: tuple[int, ...] | str = "all"
    share: Annotated[float, annotated_types.Gt(0)] = 1.0


def make(**values: Any) -> Settings:
    return config.make(Settings, values, "toy")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 4, 4), ("steps", "4", 4), ("rate", 1, 1.0), ("rate", "1e-4", 1e-4), ("quick", "true", True),
        ("name", "3", "3"), ("mode", "each", "each"), ("layers", [1, 2], (1, 2)), ("layers", 3, (3,)),
        ("layers", range(2), (0, 1)), ("layers", None, None), ("layers", ["1", 2], (1, 2)),
        ("pairs", [[1, 0.5], (2, 1)], ((1, 0.5), (2, 1.0))), ("artefact", "a/b.safetensors", Path("a/b.safetensors")),
        ("artefact", Path("c"), Path("c")), ("weights", {"a": 1, "b": "0.5"}, {"a": 1.0, "b": 0.5}),
        ("size", "auto", "auto"), ("size", 8, 8), ("size", "8", 8), ("where", "3", "3"), ("where", 3, 3),
        ("spans", "first", "first"), ("spans", [1, 2], (1, 2)), ("share", 0.5, 0.5),
    ],
)  # fmt: skip
def test_fields_of_every_kind(name, value, expected):
    found = getattr(make(**{name: value}), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "many", "toy.steps: expected int, found 'many'"), ("steps", 3.0, "expected int, found 3.0"),
        ("steps", True, "expected int, found True"), ("rate", False, "expected float, found False"),
        ("rate", 10**400, "expected float, found a whole number of 1,329 bits"), ("quick", 1, "expected bool, found 1"),
        ("name", 3, "expected str, found 3"), ("mode", "eahc", "unknown choice 'eahc': did you mean 'each'"),
        ("layers", [1, "x"], r"toy.layers[1]: expected int, found 'x'"), ("layers", {"a": 1}, "toy.layers: expected"),
        ("pairs", [[1, 0.5], [2]], "toy.pairs[1]: expected a list of 2 (int, float), found [2]"),
        ("artefact", 3, "toy.artefact: expected Path, found 3"),
        ("weights", {"a": "x"}, "toy.weights['a']: expected float, found 'x'"),
        ("weights", [1], "toy.weights: expected a mapping of str to float, found [1]"),
        ("size", "big", "toy.size: expected int or one of 'auto', found 'big'"),
        ("where", 1.5, "toy.where: expected int or str, found 1.5"),
        ("spans", [1, "b"], "toy.spans: expected a list of int or str, found [1, 'b']"),
        ("share", 0, "toy.share: expected greater than 0, found 0"),
        ("name", ["x" * 10_000] * 100, "toy.name: expected str, found ["),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, value, message):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def test_every_mistake_is_told_at_once():
    @dataclass(frozen=True)
    class Needy:
        path: Path
        steps: int = 1

    with pytest.raises(ConfigError) as caught:
        make(stepz=3, steps="many", layers=[1.5], mode=2)
    text = str(caught.value)
    for part in ("'stepz': did you mean 'steps'", "toy.steps", "toy.layers[0]", "toy.mode: unknown choice"):
        assert part in text, part
    assert len(text.splitlines()) == 4
    with pytest.raises(ConfigError, match=r"toy\.path: is missing"):
        config.make(Needy, {"steps": 2}, "toy")


def test_settings_survive_yaml():
    made = make(layers=[1], pairs=[[1, 2]], artefact="a/b", weights={"x": 1}, spans=[3], size=4)
    text = yaml.safe_dump(config.plain(made))
    assert config.make(Settings, yaml.safe_load(text), "toy") == made
    for name in REGISTRY:
        default = REGISTRY.get(name).config()
        again = config.make(type(default), yaml.safe_load(yaml.safe_dump(config.plain(default))), name)
        assert again == default


def test_names_beside_the_settings_are_refused():
    @dataclass(frozen=True)
    class Taken:
        seed: int = 0
        corpus: str = ""
        steps: int = 1

    facts: dict[str, Any] = {"title": "T", "paper": "P", "fit": lambda *_: None, "gives": errata.Edit}
    with pytest.raises(ConfigError, match="toy has settings named corpus, seed: expected other names"):
        Method(name="toy", config=Taken, batch=True, sequential=True, **facts)
    assert Method(name="toy", config=Settings, batch=True, sequential=True, **facts).config is Settings


@pytest.mark.parametrize("verb", [errata.edit, errata.evaluate])
def test_the_reserved_names_are_those_of_the_verbs(verb):
    parameters = inspect.signature(verb).parameters.values()
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    missing = named - config.RESERVED
    assert not missing, f"a setting named {missing} could not be set from Python"


def test_a_class_without_source_has_settings_without_meanings():
    space: dict[str, Any] = {"__name__": __name__}
    code = "@dataclass(frozen=True)\nclass NowhereWritten:\n    steps: int = 3\n    '''Text.'''"
    exec(f"from dataclasses import dataclass\n{code}", space)
    assert [(s.name, s.default, s.meaning) for s in config.settings(space["NowhereWritten"])] == [
        ("steps", 3, "")
    ]
    assert config.settings(Settings)[0].meaning == "How many."


def test_pydantic_is_loaded_when_settings_are_read_only():
    code = "import sys, errata, errata.config, errata.cli.main; print('pydantic' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
