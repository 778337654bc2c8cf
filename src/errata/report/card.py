"""The card: all tables of a report as Markdown, with what is needed to repeat them."""

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
    """Write a report's Markdown card."""
    made = boards(runs)
    lines = [f"# {escape(heading(runs))}", ""]
    for section in tables.sections(made):
        lines += [f"## {escape(section.title)}", "", f"Protocol: {escape(section.tag)}", ""]
        for table in section.tables:
            lines += _table(table)
    if not made:
        lines += ["No cell has results yet.", ""]
    for table in tables.published_tables(comparisons(runs, made)):
        lines += _table(table, "##")
    absent = tables.absent_table(runs)
    if absent is not None:
        lines += _table(absent, "##")
    lines += ["## Made with", ""]
    for run in runs:
        lines += [f"* {escape(run.name)}: {escape(fact)}" for fact in run_facts(run)]
    return "\n".join(lines).rstrip() + "\n"


def heading(runs: Sequence[Run]) -> str:
    """Name a report after its runs."""
    return "Report: " + ", ".join(dict.fromkeys(run.name for run in runs))


def run_facts(run: Run) -> list[str]:
    """List what a run was made with, and whether its files could be verified."""
    unverified = [] if run.verified else ["not verified: written before results carried hashes"]
    return [*facts(run.document), *unverified]


def facts(document: Mapping[str, Any]) -> list[str]:
    """List what a run was made with: when, recipe, versions, hardware, data."""
    found = []
    if document.get("created"):
        found.append(f"created {document['created']}")
    if document.get("recipe_sha256"):
        found.append(f"recipe sha256 {str(document['recipe_sha256'])[:16]}")
    versions = document.get("versions") or {}
    if versions:
        found.append("versions " + ", ".join(f"{name} {value}" for name, value in versions.items() if value))
    hardware = hardware_line(document.get("hardware") or {}, document.get("threads"))
    if hardware:
        found.append(hardware)
    for source, entry in (document.get("datasets") or {}).items():
        sha = str(entry.get("sha256") or "")[:16]
        cases = entry.get("cases")
        words = [f"{cases:,} cases" if isinstance(cases, int) else "", f"sha256 {sha}" if sha else ""]
        found.append(f"data {source}: {', '.join(word for word in words if word) or 'no facts'}")
    return found


def hardware_line(hardware: Mapping[str, Any], threads: Any = None) -> str:
    """Word the hardware on one line; empty where nothing is known."""
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
    """Keep text from being read as Markdown or HTML."""
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
