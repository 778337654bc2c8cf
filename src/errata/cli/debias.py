"""errata debias: make two answers, as two pronouns, follow prompts alike."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.evaluation.debiasing import Debiasing, Gap, Scores
    from errata.types import Request

What = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="Requests whose prompts either answer may follow, one subject each; targets do not matter.",
    ),
]
Pair = Annotated[str, typer.Option("--pair", help="The two answers, with a comma between them.")]
Keep = Annotated[
    Path | None, typer.Option("--keep", help="Requests: facts that are to stay answered as they are.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the edit to this file (.safetensors).")]
HeldOut = Annotated[
    float,
    typer.Option("--held-out", min=0.0, max=0.9, help="Share of the subjects to measure on, not fitted on."),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts", help="Texts, one a line, to measure perplexity on; default: the model's own (lab)."
    ),
]
Measured = Annotated[
    list[str] | None,
    typer.Option("--cases", help="Also print the papers' scores on these: professions, winobias, stereoset."),
]


def command(
    what: What,
    model: common.Model,
    output: Output,
    pair: Pair = "he,she",
    method: Annotated[str, typer.Option(help="lsdm, dama, or another with a setting pair.")] = "lsdm",
    settings: common.Settings = None,
    keep: Keep = None, cases: Measured = None, held_out: HeldOut = 0.2, texts: Texts = None,
    corpus: common.CorpusFile = None,
    force: common.Force = False, dry_run: common.DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Make two answers follow prompts alike, and print how unlike they were on these and on held-out subjects.

    Printed before and after: the mean and largest difference of the answers' log-probabilities, facts that are still
    answered with their target, and the perplexity of neutral text. With --cases also the scores of papers, as errata
    eval gives them.
    """
    from errata import api
    from errata import config as configs
    from errata.data.requests import read_requests
    from errata.errors import ConfigError
    from errata.evaluation import debiasing

    outputs.check_new_edit(output, force=force)
    answers = _answers(pair)
    options = configs.parse_assignments(settings or [])
    if "pair" in options:
        raise ConfigError("the two answers are given with --pair, not with --set")
    config = _config(method, {**options, "pair": list(answers)})
    fitted, measured = _split(read_requests(what), held_out, seed)
    facts = read_requests(keep) if keep else []
    measures = {source: debiasing.bias_cases(common.read_cases(source, seed)) for source in cases or ()}
    host = common.open_text_host(model, device, dtype)
    neutral = common.text_lines(texts, host)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare(
            host, fitted, method=method, options=config, seed=seed, corpus=corpus, on_progress=tick
        )
        if dry_run:
            common.show_dry(job.to_dict(), common.counted(len(fitted), "request"), json)
            return
        edit = job.run()
        path = outputs.save_edit(edit, output, None)  # before it is measured, which may be stopped
        prompts = debiasing.Prompts(answers, fitted, measured, facts, neutral)
        outcome = debiasing.measure(host, edit, prompts)
        scores = {source: debiasing.paper_scores(host, edit, asked) for source, asked in measures.items()}
    if json:
        plain = {source: {"before": before, "after": after} for source, (before, after) in scores.items()}
        common.emit({"path": str(path), "edit": edit.summary(), **outcome.to_dict(), "scores": plain})
    else:
        _show_scores(scores)
        _show(outcome, edit, path, answers)


def _answers(pair: str) -> tuple[str, str]:
    from errata.errors import ConfigError

    parts = [part.strip() for part in pair.split(",")]
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise ConfigError(
            f"--pair {pair!r}: expected two different answers with a comma between them, as he,she"
        )
    return parts[0], parts[1]


def _config(method: str, options: dict[str, object]) -> object:
    """Return a method's settings. Raises ConfigError for one without a pair of answers."""
    from dataclasses import fields

    from errata import config as configs
    from errata.errors import ConfigError
    from errata.methods import REGISTRY

    methods = [REGISTRY.get(name) for name in REGISTRY]
    able = [
        one.name
        for one in methods
        if one.takes == "requests" and "pair" in {field.name for field in fields(one.config)}
    ]
    if method not in able and method in REGISTRY:
        raise ConfigError(f"{method} makes no pair of answers alike; methods that do: {', '.join(able)}")
    return configs.make(REGISTRY.get(method).config, options, method)


def _split(requests: list[Request], share: float, seed: int) -> tuple[list[Request], list[Request]]:
    """Hold a share of the subjects out."""
    from errata.errors import RequestError

    names = sorted({request.subject for request in requests})
    random.Random(f"errata-debias-{seed}").shuffle(names)
    held = set(names[: round(share * len(names))])
    if len(held) == len(names):
        raise RequestError(f"{len(names)} subjects: holding a share of {share:g} out leaves none to fit on")
    return [r for r in requests if r.subject not in held], [r for r in requests if r.subject in held]


def _show_scores(scores: Mapping[str, tuple[Scores, Scores]]) -> None:
    rows = [
        (source, name, f"{before[name]:.3f}", f"{after[name]:.3f}" if name in after else "-")
        for source, (before, after) in scores.items()
        for name in before
    ]
    if rows:
        common.table("scores of papers", ("cases", "score", "before", "after"), rows, right=(2, 3))


def _show(outcome: Debiasing, edit: Edit, path: Path, pair: tuple[str, str]) -> None:
    def row(name: str, before: Gap, after: Gap) -> tuple[str, ...]:
        numbers = (before.mean, after.mean, before.largest, after.largest)
        return (name, str(before.prompts), *(f"{number:.3f}" for number in numbers))

    common.table(
        f"nats between {pair[0]!r} and {pair[1]!r}", ("prompts", "", "mean before", "after", "largest before", "after"),
        [row("fitted on", outcome.fitted_before, outcome.fitted_after),
         row("held out", outcome.held_out_before, outcome.held_out_after)], right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    if outcome.kept is not None:
        print(f"facts kept: {outcome.kept:.3f} of {outcome.known} that were answered before")
    print(
        f"perplexity of neutral text: {outcome.perplexity_before:.2f} before, {outcome.perplexity_after:.2f} after"
    )
    print(
        f"{path}  {common.size(path)}  edit {edit.digest} of {edit.provenance.method}; the model is unchanged"
    )


VERB = Verb("debias", command, order=17)
