"""What a file of this package defines to be a verb of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand


@dataclass(frozen=True)
class Verb:
    """A verb: ``errata NAME``. Its help text is the first line of the function's docstring."""

    name: str
    run: Callable[..., Any] | typer.Typer
    """A function whose parameters are the options, or a group of further verbs."""
    order: int = 1000
    """Place in ``errata --help``, the lowest first; equal ones by name."""

    def command(self) -> Any:
        """Return the command with its options, or the group with its commands."""
        program = typer.Typer(add_completion=False)
        if isinstance(self.run, typer.Typer):
            program.add_typer(self.run, name=self.name)
        else:
            program.command(self.name)(self.run)
        return typer.main.get_group(program).commands[self.name]

    def listed(self) -> TyperCommand:
        """Return the command with its help text alone."""
        text = self.run.info.help if isinstance(self.run, typer.Typer) else inspect.getdoc(self.run)
        return TyperCommand(self.name, help=text)
