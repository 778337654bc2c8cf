"""A run small enough for tests: a random model in a folder, a file of cases, and a recipe over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errata.bench import plan, recipe, runs
from tests.models import fresh

NEW_TOKENS = 6
NAMES = ["Ada", "Bruno", "Clara", "Dario", "Elsa", "Falk", "Greta", "Hanno", "Ilse", "Jonas"]


def write_model(folder: Path) -> Path:
    """Save a random model with its tokenizer."""
    host = fresh("gpt2")
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    return folder


def write_cases(path: Path, count: int) -> Path:
    """Write cases about people; some neighbours are shared."""
    lines = []
    for i, name in enumerate(NAMES[:count]):
        target = "Esk" if i % 2 else "Merrin"
        kept = [f"{NAMES[-1]} lives in", f"The capital of {name} is"]
        probes: list[dict[str, Any]] = [
            {
                "kind": "neighbourhood",
                "prompt": text,
                "answers": ["Tallow"],
                "before": ["Tallow"],
                "rival": target,
            }
            for text in kept
        ]
        request = {"prompt": "{} was born in", "subject": name, "target": target, "target_old": "Tallow"}
        lines.append({**request, "id": f"c{i}", "probes": probes})
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def corpus_of(cases: Path) -> Path:
    """Write neutral text beside a file of cases, which the model would write itself without."""
    path = cases.parent / "corpus.txt"
    path.write_text("\n\n".join(f"{name} lives in Esk and was born in Tallow." for name in NAMES[:4]))
    return path


def document(model: Path, cases: Path, *blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Word a recipe."""
    filled = [{"datasets": [str(cases)], **block} for block in blocks]
    short = {"max_new_tokens": NEW_TOKENS, "corpus": str(corpus_of(cases))}  # what saves time
    return {
        "name": "small",
        "models": [{"name": str(model), "label": "tiny"}],
        "runs": filled,
        **short,
        **more,
    }


def execute(words: dict[str, Any], folder: Path, **more: Any) -> runs.Outcome:
    """Run a recipe in this process."""
    return runs.execute(plan.make(recipe.parse(words)), folder, **more)


def lines(folder: Path, cell: str) -> list[dict[str, Any]]:
    """Read a cell's lines without what time and memory they took."""
    text = (folder / "cells" / cell / "rows.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cost", "fit_seconds")} for line in found]


def table(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the lines of all cells."""
    return {path.name: lines(folder, path.name) for path in sorted((folder / "cells").iterdir())}
