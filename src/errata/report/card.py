"""The card: all tables of a report as Markdown, with the facts needed to reproduce them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from errata.errors import printable
from errata.report import numbers, tables
from errata.report.board import boards
from errata.report.published import comparisons
from errata.report.read import Run, number


def card(runs: Sequence[Run]) -> str:
    """Return a report's Markdown card."""
    every_board = boards(runs)
    lines = [f"# {escape(heading(runs))}", ""]
    for section in tables.sections(every_board):
        lines += [f"## {escape(section.title)}", "", f"Protocol: {escape(section.tag)}", ""]
        for table in section.tables:
            lines += _table(table)
    if not every_board:
        lines += ["No cell has results yet.", ""]
    for table in tables.published_tables(comparisons(runs, every_board)):
        lines += _table(table, "##")
    absent = tables.absent_table(runs)
    if absent is not None:
        lines += _table(absent, "##")
    lines += ["## Provenance", ""]
    for run in runs:
        lines += [f"* {escape(run.name)}: {escape(fact)}" for fact in run_facts(run)]
    return "\n".join(lines).rstrip() + "\n"


def heading(runs: Sequence[Run]) -> str:
    """Return a report's title, from the names of its runs."""
    return "Report: " + ", ".join(dict.fromkeys(run.name for run in runs))


def run_facts(run: Run) -> list[str]:
    """List a run's provenance, and whether its files could be verified."""
    unverified = [] if run.verified else ["not verified: written before results carried hashes"]
    return [*facts(run.document), *unverified]


def facts(document: Mapping[str, Any]) -> list[str]:
    """List a run's provenance: time, recipe, versions, hardware, data."""
    lines = []
    if document.get("created"):
        lines.append(f"created {document['created']}")
    if document.get("recipe_sha256"):
        lines.append(f"recipe sha256 {str(document['recipe_sha256'])[:16]}")
    versions = document.get("versions") or {}
    if versions:
        lines.append("versions " + ", ".join(f"{name} {value}" for name, value in versions.items() if value))
    hardware = hardware_line(document.get("hardware") or {}, document.get("threads"))
    if hardware:
        lines.append(hardware)
    for source, entry in (document.get("datasets") or {}).items():
        sha = str(entry.get("sha256") or "")[:16]
        cases = entry.get("cases")
        words = [f"{cases:,} cases" if isinstance(cases, int) else "", f"sha256 {sha}" if sha else ""]
        lines.append(f"data {source}: {', '.join(word for word in words if word) or 'no facts'}")
    return lines


def hardware_line(hardware: Mapping[str, Any], threads: Any = None) -> str:
    """Describe the hardware on one line; empty where nothing is recorded."""
    words = []
    if hardware.get("cpu"):
        words.append(str(hardware["cpu"]))
    if hardware.get("cores"):
        words.append(f"{hardware['cores']} cores")
    memory = number(hardware.get("memory_gb"))
    if memory is not None:
        words.append(f"{numbers.plain(memory)} GB memory")
    gpus = hardware.get("gpus") or []
    words.append(", ".join(map(_gpu, gpus)) if gpus else "no GPU" if words else "")
    if threads:
        words.append(f"{threads} torch thread{'s' if threads != 1 else ''} a cell")
    text = ", ".join(word for word in words if word)
    return f"hardware {text}" if text else ""


def _gpu(gpu: Any) -> str:
    return str(gpu.get("name", gpu)) if isinstance(gpu, Mapping) else str(gpu)


def escape(text: str) -> str:
    """Escape Markdown and HTML in a text."""
    flat = printable(re.sub(r"\s+", " ", text))
    flat = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", flat)
    flat = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", flat)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _table(table: tables.Table, level: str = "###") -> list[str]:
    head = "| " + " | ".join(map(escape, table.columns)) + " |"
    rule = "|" + "|".join([" :-- ", *[" --: "] * (len(table.columns) - 1)]) + "|"
    rows = ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
    notes = [f"* {escape(note)}" for note in table.notes]
    title = escape(table.title[:1].upper() + table.title[1:])
    return [f"{level} {title}", "", head, rule, *rows, "", *notes, *([""] if notes else [])]
