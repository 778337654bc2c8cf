"""errata demo: the main job on the embedded model, start to finish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb
from errata.methods import DEFAULT

if TYPE_CHECKING:
    from errata.types import Case, Observation, Probe

NAME = "errata-demo.safetensors"
"""The demo's own file, which it writes anew each time."""
SHOWN = {
    "efficacy": ("rewrite", 1),
    "paraphrase": ("paraphrase", 2),
    "neighbourhood": ("neighbour", 2),
    "same_subject": ("same subject", 2),
}


def command(
    file: Annotated[
        Path | None, typer.Argument(help="Requests about the lab's world; default: three drawn from it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Where to write the edit (.safetensors); default: {NAME}, also again."),
    ] = None,
    force: common.Force = False,
    method: Annotated[str, typer.Option(help="A method that takes several requests.")] = DEFAULT,
    model: Annotated[str, typer.Option("--model", help="One of the lab's models, such as lab-t5.")] = "lab",
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Change facts in an embedded model, see what moved, save the edit, undo it bit by bit."""
    from errata import api, lab
    from errata.edits import Edit
    from errata.evaluation.observe import observe

    target = Path(NAME) if output is None else output
    outputs.check_new_edit(target, force=force or output is None)
    lab.folder(model)  # another model knows nothing of the lab's world
    cases = _cases(file, seed)
    host = common.open_host(model, device, dtype)
    start = host.weights_hash()
    probes = [p for case in cases for p in _select_probes(case)]
    with common.progress(not json) as tick:
        before = observe(host, probes, on_progress=lambda d, t: tick("asking before", d, t))
        edit = api.edit(host, [case.request for case in cases], method=method, seed=seed, on_progress=tick)
        path = edit.save(target)
        loaded = Edit.load(path)  # what is applied is what was written
        loaded.apply_(host)
        after = observe(host, probes, on_progress=lambda d, t: tick("asking after", d, t))
        changed = host.weights_hash()
        loaded.revert_(host)
    end = host.weights_hash()
    rows = [_row(p, b, a) for p, b, a in zip(probes, before, after, strict=True)]
    document = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "rows": rows,
        "weights_before": start,
        "weights_edited": changed,
        "weights_after_undo": end,
        "bit_identical": start == end,
    }
    if json:
        common.emit(document)
    else:
        _print(document, method, len(cases), "the lab's model" if model == lab.NAME else model)
    if start != end or changed == start:
        raise typer.Exit(1)


def _cases(file: Path | None, seed: int) -> list[Case]:
    from errata import lab
    from errata.data.requests import read_requests

    if file is None:
        return lab.cases(3, seed=seed)
    return [lab.case_of(request, seed=seed) for request in read_requests(file)]


def _select_probes(case: Case) -> list[Probe]:
    probes: list[Probe] = []
    for kind, (_, count) in SHOWN.items():
        probes += [p for p in case.probes if p.kind == kind][:count]
    return probes


def _row(probe: Probe, before: Observation, after: Observation) -> dict[str, Any]:
    from errata.evaluation.metrics.matching import answered, first_answer

    return {
        "probe": SHOWN[probe.kind][0],
        "prompt": probe.prompt,
        "wanted": probe.answers[0],
        "before": first_answer(before.text).split(". ")[0].rstrip("."),
        "after": first_answer(after.text).split(". ")[0].rstrip("."),
        "right": answered(after.text, probe.answers),
    }


def _print(document: dict[str, Any], method: str, count: int, where: str) -> None:
    rows = []
    for row in document["rows"]:
        if row["probe"] == "rewrite" and rows:
            rows.append(("",) * 5)
        verdict = common.mark("as wanted", "green") if row["right"] else common.mark("not as wanted", "red")
        rows.append((row["probe"], row["prompt"], row["before"], row["after"], verdict))
    common.table(
        f"{count} facts changed in {where} by {method}",
        ("probe", "prompt", "before", "after", ""),
        rows,
    )
    path = Path(document["path"])
    print(f"edit saved:  {path} ({common.size(path)})")
    print(
        f"undone:      sha256 {document['weights_after_undo'][:16]}, at the start {document['weights_before'][:16]}"
    )
    if document["bit_identical"]:
        print("the weights are bit-identical to the start")
    else:
        print("THE WEIGHTS DIFFER FROM THE START")


VERB = Verb("demo", command, order=0)
