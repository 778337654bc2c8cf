"""The model card of an export: what the Hub sorts by, and what the export's record says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from errata.edits.export import _folder as folders

CARD = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card(record: Mapping[str, Any]) -> str:
    """Return a model card in Markdown with its YAML head. What the edit changes is not told: it may be private."""
    base, exporter = str(record.get("base_model") or ""), str(record["exporter"])
    head: dict[str, Any] = {"tags": ["errata", "model-editing"]}
    library = {"peft": "peft", "checkpoint": "transformers"}.get(exporter)
    library = record.get("library", library)
    if library is not None:
        head["library_name"] = library
    if HUB_NAME.fullmatch(base):  # a folder's path is nobody else's concern
        head |= {"base_model": base} | ({"base_model_relation": "adapter"} if exporter == "peft" else {})
    shown = {
        "method": record.get("method"), "requests": record.get("requests"), "export": exporter,
        "numbers": record.get("dtype"), "made for the model with fingerprint": record.get("host"),
    }  # fmt: skip
    lines = [
        "---",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()),
        "---",
        "",
    ]
    what = (
        "text-to-image model with single concepts"
        if library == "diffusers"
        else "language model with single facts"
    )
    lines += [f"# errata edit {record['edit']}", "", f"A {what} changed.", ""]
    lines += [f"* {name}: {value}" for name, value in shown.items() if value is not None]
    lines.append(
        f"* `{folders.RECORD}` has the checksums of all files, and what was compared with the edit in place."
    )
    return "\n".join(lines) + "\n"
