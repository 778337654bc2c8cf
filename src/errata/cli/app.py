"""The command line: a thin skin over the Python interface. Imports nothing heavy until a verb runs.

Every file of this package that defines ``VERB`` or ``VERBS`` is found here; see :class:`errata.cli._verb.Verb`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from errata.cli._verb import Verb
from errata.registry import Records

REGISTRY: Records[Verb] = Records(
    "errata.cli", ("VERB", "VERBS"), Verb, group="errata.verbs", order=lambda verb: verb.order
)


class Commands(Mapping[str, Any]):
    """The verbs' commands by name. To read the options of all would take a third of ``errata --help``, so each is
    made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            verb = REGISTRY.find(name)
            if verb is None:
                raise KeyError(name)
            self._made[name] = verb.command()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY.names())

    def __len__(self) -> int:
        return len(REGISTRY.names())


class Program(TyperGroup):
    """The group of all verbs: lets an interrupt and a closed pipe through to the entry point.

    Versions of typer and click differ in what they make of those: codes 1 and 130, "Aborted!" or nothing.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the options of the program and the help text of every verb."""
        whole, self.commands = self.commands, {verb.name: verb.listed() for verb in REGISTRY.values()}
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands = whole

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a verb with its errors of usage shown; see :mod:`errata.cli.main`."""
        try:
            return super().main(*args, **extra)
        except _Through as through:
            assert through.__cause__ is not None
            raise through.__cause__ from None

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        gc.enable()  # off while the command line loads, see errata.cli.main
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _Through from error


class _Through(BaseException):
    """Carries what typer is not to handle."""


app = typer.Typer(
    name="errata",
    cls=Program,
    help="Edit what language models know: change a fact, measure what changed, save it as a file, revert it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 a check failed (a request not answered under --strict, a failed cell, a "
    "broken file); 2 bad input, nothing was changed; 5 a ledger's guard refused an edit; 130 interrupted. "
    "Every command takes --json.",
)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Handle options before a verb."""
    if version:
        from importlib.metadata import version as installed

        print(installed("errata"))
        raise typer.Exit
