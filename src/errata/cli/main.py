"""The command line: a thin skin over the Python interface. Imports nothing heavy until a verb runs."""

from __future__ import annotations

import sys

import typer

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

app = typer.Typer(
    name="errata",
    help="Edit what language models know: change a fact, prove what changed, keep it as a file, take it back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Bad input ends with exit code 2 and changes nothing. Every command takes --json.",
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


def run() -> None:
    """Entry point: turn errors of the user into one message and exit code 2."""
    from errata.errors import ErrataError

    try:
        app()
    except ErrataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
