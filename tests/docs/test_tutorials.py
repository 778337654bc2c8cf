"""The tutorials are run: files as they name them, commands and Python in order; what they show is what comes out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.main import app
from tests.docs.test_readme import save_time

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
SERVED = "errata serve"


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    text: str


def blocks(path: Path) -> Iterator[Block]:
    for language, title, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        yield Block(language, title or None, text)


def missing(shown: str, output: str) -> list[str]:
    """Return the lines that an output does not have in this order; ``...`` stands for any text, spaces do not count."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    absent = []
    for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        wanted = re.compile(".*".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", line)))
        at = next((number for number, found in enumerate(lines) if wanted.fullmatch(found)), None)
        if at is None:
            absent.append(line)
        else:
            lines = lines[at + 1 :]
    return absent


def test_the_comparison_sees_what_is_missing():
    assert missing("a ... c\nd\n", "x\n a  b c \n d\n") == []
    assert missing("a\nb\n", "b\na\n") == ["b"]
    assert missing("1 of 2\n", "1 of 3\n") == ["1 of 2"]


QUICK = "fix-a-fact"
TUTORIALS = [
    pytest.param(path, marks=() if path.stem == QUICK else pytest.mark.slow, id=path.stem)
    for path in sorted(FOLDER.glob("*.md"))
]


@pytest.mark.parametrize("path", TUTORIALS)
def test_a_tutorial_runs_as_it_is_printed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(tmp_path))
    save_time(monkeypatch)
    output = ""
    ran = 0
    for block in blocks(path):
        if block.title is not None:
            file = tmp_path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            if file.name == "pyproject.toml":
                install(block.text, tmp_path)
        elif block.language == "bash":
            output = "".join(run(line) for line in block.text.splitlines() if line.startswith("errata "))
            ran += 1
        elif block.language == "python":
            capsys.readouterr()
            exec(compile(block.text, path.name, "exec"), {})
            output = capsys.readouterr().out
            ran += 1
        elif block.language == "text":
            assert missing(block.text, output) == [], output
    assert ran >= 3


def install(project: str, folder: Path) -> None:
    """Leave what pip would: a package's name and its entry points, beside its code."""
    points = (
        project[project.index("[project.entry-points.") :]
        .replace("[project.entry-points.", "[")
        .replace('"', "")
    )
    info = folder / "my_editors-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-editors\nVersion: 0.1\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(points, encoding="utf-8")


def run(line: str) -> str:
    """Run one command and return what it prints; a line may name its exit code in a comment."""
    words = shlex.split(line, comments=True)
    if line.startswith(SERVED):
        return ""
    code = re.search(r"# exit code (\d+)", line)
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == (int(code.group(1)) if code else 0), (line, result.output)
    return result.output
