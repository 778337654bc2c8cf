"""What a file of this package defines to be a verb of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Verb:
    """A verb: ``errata NAME``. Its help text is the first line of the function's docstring."""

    name: str
    run: Callable[..., Any] | typer.Typer
    """A function whose parameters are the options, or a group of further verbs."""
    order: int = 1000
    """Place in ``errata --help``, the lowest first; equal ones by name."""

    def add_to(self, program: typer.Typer) -> None:
        """Make it a verb of a program."""
        if isinstance(self.run, typer.Typer):
            program.add_typer(self.run, name=self.name)
        else:
            program.command(self.name)(self.run)
