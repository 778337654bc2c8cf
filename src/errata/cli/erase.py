"""errata erase: take a concept that labelled texts show out of a model's hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.evaluation.erasure import Erasure
    from errata.host.host import Host
    from errata.types import Concept

Source = Annotated[
    str,
    typer.Option(
        "--from",
        help="Labelled texts: a file of records with text, label and optionally subject, the part that the label is "
        "about; or lab, the texts of the lab's world for kind or one of its relations.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the edit to this file (.safetensors).")]
HeldOut = Annotated[
    float,
    typer.Option("--held-out", min=0.01, max=0.9, help="Share of the subjects to measure on, not fitted on."),
]
Fuse = Annotated[
    bool,
    typer.Option("--fuse", help="Write the eraser into the weights that read it; needs --set where=norms."),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts", help="Texts, one a line, to measure perplexity on; default: the model's own (lab)."
    ),
]


def command(
    concept: Annotated[str, typer.Argument(metavar="CONCEPT", help="Name of what the labels tell apart.")],
    source: Source,
    model: common.Model,
    output: Output,
    method: Annotated[str, typer.Option(help="leace, sal or inlp.")] = "leace",
    settings: common.Settings = None,
    held_out: HeldOut = 0.2, fuse: Fuse = False, texts: Texts = None,
    force: common.Force = False, dry_run: common.DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Take a concept out of a model's hidden states, and print what probes still read of it.

    The accuracy of a linear probe and of a small network is measured on held-out texts before and after at every site,
    and the perplexity of neutral text. The edit is applied, exported and reverted as any other. Erasing is linear: what
    the network still reads is not gone.
    """
    from errata import api
    from errata import config as configs
    from errata.errors import ConfigError
    from errata.evaluation import erasure
    from errata.job import check_takes
    from errata.methods import REGISTRY

    options, entry = configs.parse_assignments(settings or []), REGISTRY.get(method)
    outputs.check_new_edit(output, force=force)
    whole = common.read_concept(source, concept)
    check_takes(entry, [whole])  # what takes concepts has sites
    config = configs.make(entry.config, options, method)
    if fuse and config.where != "norms":
        raise ConfigError(
            "--fuse writes the eraser into the maps that read norms: fit it there, --set where=norms"
        )
    fitted, measured = whole.split(held_out, seed=seed)
    host = common.open_text_host(model, device, dtype)
    neutral = common.text_lines(texts, host)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare(host, fitted, method=method, options=config, seed=seed, on_progress=tick)
        if dry_run:
            counts = ", ".join(f"{label} {count}" for label, count in whole.record.labels.items())
            common.show_dry(
                job.to_dict(), f"{len(whole.texts)} texts ({counts})", json, concept=whole.to_dict()
            )
            return
        edit = job.run()
        final = _fused(edit, host, fitted) if fuse else edit
        path = outputs.save_edit(
            final, output, None
        )  # before it is measured, which takes longer and may be stopped
        outcome = erasure.measure(
            host, edit, fitted, measured, list(edit.provenance.notes["sites"]), tokens=config.tokens, texts=neutral,
            seed=seed, on_progress=tick,
        )  # fmt: skip
    if json:
        common.emit({"path": str(path), "edit": final.summary(), **outcome.to_dict()})
    else:
        _show(outcome, final, path, whole)


def _fused(edit: Edit, host: Host, concept: Concept) -> Edit:
    """Return the edit as a change of weights. Raises EditError where that is not exact, or does not agree."""
    from errata.edits.fusing import difference, fuse
    from errata.edits.memory import MemoryEdit
    from errata.errors import EditError

    assert isinstance(edit, MemoryEdit)
    fused = fuse(edit, host)
    share = difference(host, edit, fused, tuple(text.text for text in concept.texts[:4]))
    if share > 1e-2:
        raise EditError(
            f"fused into the weights, the logits differ by {share:.2g} of the largest: not written"
        )
    return fused


def _show(outcome: Erasure, edit: Edit, path: Path, concept: Concept) -> None:
    notes = edit.provenance.notes
    facts = {site: (int(rank), moved) for site, rank, moved in zip(
        notes["sites"], notes["rank"], notes["moved"], strict=True)}  # fmt: skip
    rows = [
        (one.site, facts[one.site][0], f"{facts[one.site][1]:.1%}", f"{one.majority:.3f}", f"{one.linear_before:.3f}",
         f"{one.linear_after:.3f}", f"{one.network_before:.3f}", f"{one.network_after:.3f}")
        for one in outcome.sites
    ]  # fmt: skip
    common.table(
        f"accuracy of probes of {concept.name} on {outcome.held_out} held-out examples, {outcome.fitted} fitted on",
        ("site", "rank", "moved", "chance", "linear before", "after", "network before", "after"),
        rows, right=tuple(range(1, 8)),
    )  # fmt: skip
    print(
        f"perplexity of neutral text: {outcome.perplexity_before:.2f} before, {outcome.perplexity_after:.2f} after"
    )
    print(
        f"{path}  {common.size(path)}  edit {edit.digest} of {edit.provenance.method}; the model is unchanged"
    )


VERB = Verb("erase", command, order=16)
