"""Pages that mkdocs makes while it builds the site: the reference of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PAGE = "reference/cli.md"
INTRODUCTION = """# Command line

Exit codes: 0 done, 1 a check failed, 2 bad input, which changes nothing, 5 a guard refused an edit, 130 interrupted.
Every command takes `--help`; errors go to the standard error, results to the standard output.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page; called by mkdocs once its files are known."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=reference()))
    return files


def reference() -> str:
    """Return the page as Markdown: every verb with its help, arguments and options."""
    return "\n".join(
        [INTRODUCTION, *(part for words, command in commands() for part in section(words, command))]
    )


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command with its words, those of groups too, in the order of ``errata --help``."""
    import typer

    from errata.cli.main import app

    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", verb) for inner, verb in command.commands.items())
        else:
            yield name, command


def section(words: str, command: Any) -> Iterator[str]:
    """Yield the lines of one command: its help as paragraphs, then a table of what it takes."""
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    yield f"\n## errata {words}\n"
    yield f"{(command.help or '').strip()}\n"
    yield "```text"
    yield " ".join(["errata", words, *map(usage, arguments), "[OPTIONS]"])
    yield "```\n"
    yield "| | default | |"
    yield "|---|---|---|"
    for parameter in shown:
        yield f"| {names(parameter)} | {default(parameter)} | {cell(getattr(parameter, 'help', None) or '')} |"


def usage(argument: Any) -> str:
    """Return an argument as a line of usage has it."""
    name = (argument.metavar or argument.name).strip("[]{}")
    many = "..." if argument.nargs == -1 else ""
    return f"{name}{many}" if argument.required else f"[{name}{many}]"


def names(parameter: Any) -> str:
    """Return the spellings of a parameter as code."""
    if parameter.param_type_name == "argument":
        return f"`{usage(parameter)}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def default(parameter: Any) -> str:
    """Return a default that says something; flags are off where nothing is said."""
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or callable(value) or isinstance(value, bool) or value in ("", [], ()):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def cell(text: str) -> str:
    """Return a text as a table's cell can hold it."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
