"""Edit every family of decoder that the tests have in miniature, from a folder as `save_pretrained` writes it.

    python benchmarks/families.py -o families.json
    python benchmarks/families.py --only mixtral --only mamba

For each family: a small random model is written to a folder, `errata model FOLDER` is run, and with each method an
edit is fitted, saved, loaded, seen and taken off. *Seen*: the target's log-probability rises. The subject ends the
prompt, as in a random model nothing leads from an earlier token to the answer, and nothing but the target is asked of
a value. Needs the `dev` extra, whose tests hold the families' settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from tests.models import MIXTURES, tokenizer
from tests.units import test_hosts, test_towers
from transformers import AutoModelForImageTextToText

import errata
from errata.cli.app import app
from errata.errors import ErrataError
from errata.evaluation.observe import observe
from errata.host.build import new_model
from errata.host.host import Host
from errata.types import AskOptions, Probe, Request

REQUEST = Request("Birthplace of {}", "Ada Brenner", "Merrin")
METHODS: dict[str, dict[str, Any]] = {
    "memit": {"tokens": 300, "steps": 20, "clamp": 10.0, "decay": 0.0, "kl": 0.0},
    "grace": {"steps": 20, "learning_rate": 0.1},
    "ft": {"steps": 20},
}
HYBRIDS = tuple(name for name in test_hosts.HYBRIDS if name not in ("qwen2_moe", "gemma4_text"))
"""State-space models, and those that mix such layers or linear attention with attention."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one family: log-probabilities of the target, or why it was refused."""

    group: str
    family: str
    method: str
    before: float | None
    after: float | None
    restored: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the target became likelier, the same after loading, and the weights came back bit for bit."""
        return not self.note and self.restored and (self.after or 0.0) > (self.before or 0.0)


def built(group: str, family: str) -> Any:
    """Return a random model of a family."""
    if group == "vision-language":
        return test_towers.model(family)
    settings = test_hosts.HYBRIDS[family][0] if group == "state space and hybrid" else MIXTURES[family]
    return new_model(family, settings, seed=0).float()


def likelihood(host: Host) -> float:
    """Return the log-probability of the request's target."""
    probe = Probe("efficacy", REQUEST.text, (REQUEST.target,), ())
    return sum(observe(host, [probe], AskOptions(generate=False))[0].answer_logprobs)


def opened(group: str, folder: Path) -> Host:
    """Open a folder as a user does; a vision-language model is given with its tokenizer."""
    if group == "vision-language":
        return errata.load(AutoModelForImageTextToText.from_pretrained(folder), tokenizer())
    return errata.load(str(folder))


def run(group: str, family: str, method: str, host: Host, folder: Path) -> Row:
    """Fit, save, load, see and take off one edit."""
    start, before = host.weights_hash(), likelihood(host)
    try:
        edit = errata.edit(host, REQUEST, method=method, **METHODS[method])
    except ErrataError as error:
        return Row(
            group, family, method, before, None, host.weights_hash() == start, str(error).splitlines()[0]
        )
    path = folder / f"{method}.safetensors"
    edit.save(path)
    with errata.Edit.load(path).on(host):
        after = likelihood(host)
    return Row(
        group, family, method, before, after, host.weights_hash() == start and likelihood(host) == before
    )


def shown(folder: Path) -> str:
    """Run ``errata model FOLDER``; return why it failed, or nothing."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["model", str(folder), "--json"])
    return "" if result.exit_code == 0 else (result.output or str(result.exception)).strip().splitlines()[-1]


def rows_of(group: str, family: str) -> list[Row]:
    """Return a family's rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built(group, family).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        note = shown(folder)
        if note:
            return [Row(group, family, "errata model", None, None, True, note)]
        host = opened(group, folder)
        return [run(group, family, method, host, folder) for method in METHODS]


def print_table(rows: Sequence[Row]) -> None:
    """Print a line for each family and method."""
    table = Table("kind", "family", "method", "log p(target)", "weights back", "", title="families")
    for row in rows:
        moved = "" if row.after is None else f"{row.before:.3f} -> {row.after:.3f}"
        table.add_row(
            row.group, row.family, row.method, moved, "yes" if row.restored else "NO",
            row.note or ("" if row.passed else "not seen"),
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> int:
    """Run the families; exit 1 if a step failed that was not refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="A family; may be repeated.")
    parser.add_argument("-o", "--output", type=Path, help="Write the rows as JSON.")
    options = parser.parse_args()
    groups: dict[str, tuple[str, ...]] = {
        "experts": tuple(MIXTURES),
        "state space and hybrid": HYBRIDS,
        "vision-language": tuple(test_towers.FAMILIES),
    }
    torch.set_num_threads(1)
    rows = [
        row
        for group, families in groups.items()
        for family in families
        if not options.only or family in options.only
        for row in rows_of(group, family)
    ]
    print_table(rows)
    if options.output:
        options.output.write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    return 0 if all(row.passed or row.note for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
