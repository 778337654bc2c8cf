"""What a verb declares it uses: read off the code, so that no option is taken and ignored."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from errata.cli.app import REGISTRY
from errata.cli.main import app


def verbs() -> dict[str, Callable[..., Any]]:
    """Return the function of every command by its words, those of groups too."""
    found = {}
    for verb in REGISTRY.values():
        if isinstance(verb.run, typer.Typer):
            found |= {f"{verb.name} {info.name}": info.callback for info in verb.run.registered_commands}
        else:
            found[verb.name] = verb.run
    return found


def function(run: Callable[..., Any]) -> ast.FunctionDef:
    """Return the code of a command."""
    code = run.__code__
    tree = ast.parse(Path(code.co_filename).read_text(encoding="utf-8"))
    return next(
        node for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == run.__name__
        and node.lineno <= code.co_firstlineno + 5 and node.end_lineno >= code.co_firstlineno
    )  # fmt: skip


def unused(node: ast.FunctionDef) -> set[str]:
    """Return parameters that a function's body never reads."""
    names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    read = {
        inner.id
        for statement in node.body
        for inner in ast.walk(statement)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)
    }
    return names - read


def options(name: str) -> set[str]:
    """Return the long options that a verb shows."""
    command: object = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}  # type: ignore[attr-defined]


def test_the_reading_itself_finds_what_is_ignored():
    node = ast.parse("def f(a, b, *, c=1, d=2):\n    b = a\n    return [c for x in b]").body[0]
    assert isinstance(node, ast.FunctionDef) and unused(node) == {"d"}


@pytest.mark.parametrize("name", sorted(verbs()))
def test_every_option_is_used(name):
    assert unused(function(verbs()[name])) == set()


@pytest.mark.parametrize("name", sorted(verbs()))
def test_every_verb_takes_json(name):
    assert "--json" in options(name)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("edit", {"--device", "--dtype", "--seed", "--force", "--strict"}),
        ("eval", {"--device", "--dtype", "--seed", "--force"}),
        ("ability", {"--device", "--dtype", "--seed"}), ("unlearn", {"--device", "--dtype", "--seed", "--force"}),
        ("combine", {"--device", "--dtype", "--seed", "--force"}),
        ("trace", {"--device", "--dtype", "--seed"}),
        ("lens", {"--device", "--dtype", "--seed", "--force"}), ("neurons", {"--device", "--dtype", "--seed"}),
        ("stats", {"--device", "--dtype", "--seed"}),
        ("train", {"--device", "--dtype", "--seed", "--force"}),
        ("erase", {"--device", "--dtype", "--seed", "--force"}),
        ("debias", {"--device", "--dtype", "--seed", "--force"}),
        ("steer", {"--device", "--dtype", "--seed", "--force"}),
        ("lab check", {"--device", "--dtype", "--seed"}), ("demo", {"--device", "--dtype", "--seed", "--force"}),
        ("init", {"--device", "--dtype"}), ("log", set()), ("tag", set()), ("revert", set()), ("reset", set()),
        ("status", {"--device", "--dtype"}), ("diff", {"--device", "--dtype"}), ("blame", {"--device", "--dtype"}),
        ("bisect", {"--device", "--dtype"}), ("check", {"--device", "--dtype"}),
        ("merge", {"--device", "--dtype"}), ("ask", {"--device", "--dtype"}),
        ("model", {"--device", "--dtype"}), ("show", {"--device", "--dtype", "--strict"}),
        ("lab train", {"--device", "--seed"}), ("lab world", {"--seed"}), ("refit", {"--force"}),
        ("retract", {"--force"}), ("data export", {"--force"}), ("methods", set()), ("bench", set()),
        ("report", set()), ("judge", set()), ("data list", set()), ("data check", set()), ("data show", set()),
        ("data fetch", set()), ("export", {"--device", "--dtype", "--force"}),
        ("detect", {"--device", "--dtype", "--force"}), ("attribute", {"--device", "--dtype"}),
        ("extract", {"--device", "--dtype", "--seed"}),
        ("import", {"--device", "--dtype", "--force"}), ("push hub", set()), ("push vllm", set()),
        ("push remove", set()),
        ("serve", {"--device", "--dtype"}), ("ui", {"--device", "--dtype"}),
    ],
)  # fmt: skip
def test_which_verbs_take_the_common_options(name, more):
    common = {"--device", "--dtype", "--seed", "--force", "--strict"}
    assert options(name) & common == more


def test_the_list_above_is_whole():
    marks = test_which_verbs_take_the_common_options.pytestmark
    assert {name for name, _ in marks[0].args[1]} == set(verbs())


def test_help_names_the_exit_codes():
    epilog = app.info.epilog
    assert all(f"{code} " in epilog for code in (0, 1, 2, 130))
