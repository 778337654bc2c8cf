"""errata show: say what an edit file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errata.cli import common


def command(
    file: Annotated[Path, typer.Argument(help="An edit file.")],
    json: common.Json = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
) -> None:
    """Say what an edit holds: requests, method, settings, host, weights touched. Opens no model."""
    from errata.edits import Edit

    edit = Edit.load(file)
    facts = edit.summary()
    if json:
        common.emit({"path": str(file), "bytes": file.stat().st_size, **facts})
        return
    print(f"{file}  {common.size(file)}  {facts['kind']} edit {facts['digest']}")
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    print(f"made by {facts['method']} (seed {facts['seed']}) for host {facts['host']} ({facts['host_name']})")
    print(f"with {versions}")
    rows = [(r.get("id", i + 1), r["prompt"], r["subject"], r.get("target_old", ""), r["target"])
            for i, r in enumerate(facts["requests"])]  # fmt: skip
    common.table("requests", ("", "prompt", "subject", "old", "new"), rows)
    weights = [(n, "x".join(map(str, w["shape"])), w["form"], f"{w['norm']:.4g}")
               for n, w in facts["weights"].items()]  # fmt: skip
    common.table("weights", ("name", "shape", "change", "norm"), weights, right=(3,))
    common.table("settings", ("name", "value"), list(facts["config"].items()))
    for note in facts["overrides"]:
        print(f"overruled: {note}")
