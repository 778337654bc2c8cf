"""A ledger's settings: the model it is about, and what an edit must keep to be applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from errata import config, files
from errata.errors import ConfigError

Policy = Literal["error", "replace", "keep"]


@dataclass(frozen=True)
class Bounds:
    """Bounds that an edit has to keep to be applied; what is measured is in :mod:`errata.ledger.guard`."""

    answered: float = 1.0
    """Share of the edit's requests that are answered with their target under free generation, at least."""
    earlier: float = 1.0
    """Share of the requests of edits already in place that were answered with their target and still are, at least."""
    subject: float = 0.75
    """Share of other statements about the subjects, completed by the model itself, that keep their answer, at least."""
    canaries: float = 0.95
    """Share of canary prompts that keep their answer, at least."""
    divergence: float = 0.1
    """Mean Kullback-Leibler divergence of the next token behind canary prompts, in nats, at most."""
    perplexity: float = 1.05
    """Perplexity of neutral text as a multiple of that before the edit, at most."""
    total_perplexity: float = 1.25
    """Perplexity of neutral text as a multiple of the unedited model's, at most."""
    norm: float = 1.0
    """Norm of the change of a weight, all edits together, as a multiple of the weight's own, at most."""


LEAST: Mapping[str, str] = {
    "answered": "requests answered with their target",
    "earlier": "requests of earlier edits still answered with their target",
    "subject": "other statements about the subjects with the same answer",
    "canaries": "canary prompts with the same answer",
}
"""What the bounds that are minima are called in messages."""
MOST: Mapping[str, str] = {
    "divergence": "divergence of the next token behind canaries and neutral text, in nats",
    "perplexity": "perplexity of neutral text over that before",
    "total_perplexity": "perplexity of neutral text over the unedited model's",
    "norm": "norm of a weight's change over the weight's",
}
"""The same of those that are maxima."""


@dataclass(frozen=True)
class GuardSettings:
    """How the guard measures."""

    bounds: Bounds = field(default_factory=Bounds)
    """What an edit must keep."""
    statements: int = 8
    """Other statements about each subject."""
    subjects: int = 20
    """Subjects whose other statements are asked, at most; of a longer batch they are spread evenly over it."""
    prompts: int = 40
    """Canary prompts that are drawn from what the model says about other subjects."""
    canaries: tuple[str, ...] = ()
    """Canary prompts of your own; errata check fails where an edit changed the answer to one."""
    texts: int = 50
    """Neutral texts, for perplexity."""
    corpus: str = ""
    """Text file with neutral text; empty: the model's own corpus, else text that the unedited model writes."""


@dataclass(frozen=True)
class LedgerSettings:
    """The settings of a ledger, ``config.yaml`` in its folder."""

    model: str = ""
    """The model: lab, a hub name, or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto, float32, float16 or bfloat16."""
    conflicts: Policy = "error"
    """What to do about a request that contradicts an edit in place: error, replace it, or keep both."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """The guard's settings."""

    @staticmethod
    def read(path: Path) -> LedgerSettings:
        """Read settings from a file. Raises ConfigError with every problem in it."""
        text = files.read_text(path, ConfigError, what="the ledger's settings")
        content = files.parse_yaml(text, lambda reason: ConfigError(f"{path}: {reason}"))
        return config.make(LedgerSettings, content or {}, str(path))

    def text(self) -> str:
        """Return the settings as YAML, each with its meaning above it."""
        return "\n".join(_lines(self, "")) + "\n"


def _lines(record: Any, indent: str) -> list[str]:
    meanings = {row.name: row.meaning for row in config.settings(type(record))}
    lines: list[str] = []
    for one in fields(record):
        value = getattr(record, one.name)
        lines.append(f"{indent}# {meanings[one.name]}")
        if hasattr(value, "__dataclass_fields__"):
            lines += [f"{indent}{one.name}:", *_lines(value, indent + "  ")]
        else:
            plain = list(value) if isinstance(value, tuple) else value
            lines.append(f"{indent}{one.name}: {json.dumps(plain, ensure_ascii=False)}")  # JSON is YAML too
    return lines
