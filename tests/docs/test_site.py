"""The documentation site: every verb and option in its reference, every page found, no broken link."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from errata.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the folder of the site, built strictly: any warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def pages(entries: object) -> set[str]:
    """Return the pages of the navigation."""
    if isinstance(entries, str):
        return {entries}
    values = entries.values() if isinstance(entries, dict) else entries
    return {page for value in values for page in pages(value)}  # type: ignore[union-attr]


def sections(text: str) -> dict[str, str]:
    """Return the reference's sections by the command that each is about."""
    parts = text.split("\n## errata ")[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


def test_every_verb_and_option_is_in_the_reference(hooks):
    found = sections(hooks.reference())
    program = typer.main.get_command(app)
    flat = dict(hooks.commands())
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        assert {name} <= set(flat) if inner is None else {f"{name} {verb}" for verb in inner} <= set(flat)
    assert set(found) == set(flat)
    for words, command in flat.items():
        text = found[words]
        assert command.help.split("\n")[0] in text
        for parameter in command.params:
            assert all(f"`{option}`" in text for option in parameter.opts if option.startswith("-")), words
            assert (
                parameter.hidden or (getattr(parameter, "help", None) or "").split(" ")[0].strip("<") in text
            )


def test_a_new_option_would_be_in_the_reference(hooks, monkeypatch):
    import click

    command = click.Command(
        "frob", params=[click.Option(["--much"], default=7, help="How | much.")], help="Frob it."
    )
    monkeypatch.setattr(typer.main, "get_command", lambda app: click.Group(commands={"frob": command}))
    text = sections(hooks.reference())["frob"]
    assert "| `--much` | `7` | How \\| much. |" in text and "errata frob [OPTIONS]" in text


def test_every_page_is_in_the_navigation(hooks):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = pages(yaml.safe_load(text)["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert named == written | {hooks.PAGE}


def test_the_site_builds_and_asks_nobody_else(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "Fix a fact and ship it" in index
    assert "--message" in (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    python = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert 'id="errata.api.edit"' in python and 'id="errata.edits.edit.Edit.apply_"' in python
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text and 'src="http' not in text, page
