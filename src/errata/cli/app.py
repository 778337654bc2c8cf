"""The command line: a thin skin over the Python interface. Imports nothing heavy until a verb runs."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from errata.cli import (
    ability,
    ask,
    bench,
    data,
    demo,
    edit,
    evaluate,
    judge,
    lab,
    methods,
    model,
    refit,
    report,
    show,
    stats,
)


class Program(TyperGroup):
    """The group of all verbs: lets an interrupt and a closed pipe through to the entry point.

    Versions of typer and click differ in what they make of those: codes 1 and 130, "Aborted!" or nothing.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a verb with its errors of usage shown; see :mod:`errata.cli.main`."""
        try:
            return super().main(*args, **extra)
        except _Through as through:
            assert through.__cause__ is not None
            raise through.__cause__ from None

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _Through from error


class _Through(BaseException):
    """Carries what typer is not to handle."""


app = typer.Typer(
    name="errata",
    cls=Program,
    help="Edit what language models know: change a fact, prove what changed, keep it as a file, take it back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 a check failed (a request not answered under --strict, a failed cell, a "
    "broken file); 2 bad input, nothing was changed; 130 interrupted. Every command takes --json.",
)

app.command("demo")(demo.command)
app.command("edit")(edit.command)
app.command("ask")(ask.command)
app.command("eval")(evaluate.command)
app.command("bench")(bench.command)
app.command("report")(report.command)
app.command("judge")(judge.command)
app.command("ability")(ability.command)
app.command("refit")(refit.refit)
app.command("retract")(refit.retract)
app.command("show")(show.command)
app.command("methods")(methods.command)
app.command("model")(model.command)
app.command("stats")(stats.command)
app.add_typer(data.app, name="data")
app.add_typer(lab.app, name="lab")


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Handle what stands before a verb."""
    if version:
        from importlib.metadata import version as installed

        print(installed("errata"))
        raise typer.Exit
