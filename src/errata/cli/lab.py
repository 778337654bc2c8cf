"""errata lab: the embedded world and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from errata.cli import common
from errata.cli._verb import Verb

app = typer.Typer(no_args_is_help=True, help="The embedded world and its model: inspect, check, train.")


@app.command("world")
def world(
    subject: Annotated[str | None, typer.Argument(help="An entity whose facts to list.")] = None,
    json: common.Json = False,
    seed: Annotated[int, typer.Option(help="Seed of the world; default: the shipped one.")] = 20,
) -> None:
    """Show the facts of the lab's world: counts by relation, or all facts of one entity."""
    from errata.errors import ConfigError
    from errata.lab.world import default_world
    from errata.registry import close

    lab_world = default_world(seed)
    if subject is None:
        rows = [
            (name, r.subject, r.object, len(lab_world.by_relation[name]))
            for name, r in lab_world.relations.items()
        ]
        if json:
            common.emit({"facts": len(lab_world.facts), "relations": {name: n for name, _, _, n in rows}})
            return
        common.table(
            f"{len(lab_world.facts)} facts", ("relation", "subject", "object", "facts"), rows, right=(3,)
        )
        return
    if subject not in lab_world.by_subject:
        near = close(subject, list(lab_world.by_subject))
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "none has a similar name"
        raise ConfigError(f"the lab's world has no entity {subject!r}: {hint}")
    facts = [{"relation": f.relation, "object": f.object} for f in lab_world.by_subject[subject]]
    aliases = list(lab_world.entities[subject].aliases)
    if json:
        common.emit({"subject": subject, "aliases": aliases, "facts": facts})
        return
    title = subject + (f", also {', '.join(aliases)}" if aliases else "")
    common.table(title, ("relation", "object"), [(f["relation"], f["object"]) for f in facts])


@app.command("check")
def check(
    model: common.Model = "lab",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of facts to ask; default: all.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of requests in the layer test.")] = 48,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    bilingual: Annotated[
        bool, typer.Option("--bilingual", help="Also recall in the second language.")
    ] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Measure the lab's model: recall, new facts in the prompt, compositions of facts, and a test of each layer."""
    from errata.lab.check import check as measure

    host = common.open_host(model, device, dtype)
    with common.progress(not json) as tick:
        report = measure(host, seed=seed, limit=limit, requests=requests, bilingual=bilingual, tick=tick)
    if json:
        common.emit(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    recall = report["recall"]
    kinds = ("seen", "held_out", "question")
    rows = [("all", *(f"{recall[kind]:.3f}" for kind in kinds))]
    rows += [
        (name, *(f"{recall[f'{kind}_by_relation'][name]:.3f}" for kind in kinds))
        for name in recall["seen_by_relation"]
    ]
    common.table(
        f"recall of {report['facts']} facts by greedy generation",
        ("relation", "seen phrasing", "held-out phrasing", "question"),
        rows,
        right=(1, 2, 3),
    )
    print(
        f"recall by questions on subjects with no question in training: {recall['question_never_asked']:.3f}"
    )
    for group, shares in report.get("second_language", {}).items():
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shares.items())
        print(f"recall in the second language, subjects {group.replace('_', ' ')} in it: {told}")
    if "episodes" in report:  # what models that answer prompts are not measured by
        used, ignored = (f"{report['episodes'][name]:.3f}" for name in ("obeyed", "ignored"))
        print(f"new fact in the prompt: used {used}; unrelated one ignored {ignored}")
        print(f"perplexity of sentences without facts: {report['perplexity']:.2f}")
    common.table(
        "compositions of facts", ("group", "recall"),
        [(k, f"{v:.3f}") for k, v in report["compositions"].items()], right=(1,),
    )  # fmt: skip
    if "layers" not in report:
        return
    layers = report["layers"]
    common.table(
        "share of answers changed by a shift at the subject's last token",
        ("layer", "rewrites", "paraphrases"),
        [(i, f"{r:.3f}", f"{p:.3f}")
         for i, (r, p) in enumerate(zip(layers["rewrites"], layers["paraphrases"], strict=True))],
        right=(1, 2),
    )  # fmt: skip


@app.command("train")
def train(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoints and the model; an unfinished run is resumed.")],
    shape: Annotated[
        str | None,
        typer.Option(help="Architecture: llama, gpt2, qwen3, t5, bert, or llava (lab-vl); default: llama."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: the shipped model's.")] = None,
    precision: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="Type of matrix products; default: the shipped model's."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="bilingual: go on from the shipped model, on text in a second, invented language too."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="An entity that no training document names, or lab:forget:N; repeatable. For causal models."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: about a sixth faster, needs a C++ compiler.")
    ] = False,
    device: common.Device = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Train a model on the lab's world, or a variant of the shipped one: seeded, resumable; writes it and its card."""
    from errata.errors import ConfigError
    from errata.lab.carding import write_card
    from errata.lab.forgetting import left_out
    from errata.lab.train import Progress, TrainConfig, logged
    from errata.lab.train import train as run

    place = _place(device)
    if shape == "llava":
        others = {"--precision": precision, "--variant": variant, "--without": without, "--compile": compiled}
        return _train_vision(folder, steps, seed, place, others, json=json)
    chosen = {"steps": steps, "precision": precision, "without": left_out(without) if without else None}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if variant is None:
        config = TrainConfig.of(shape or TrainConfig.shape, seed=seed, **chosen)
    else:
        if shape is not None:
            raise ConfigError("--variant goes on from the shipped Llama-shaped model; leave --shape out")
        config = TrainConfig.of_variant(variant, seed=seed, **chosen)
    with common.progress(not json) as tick:

        def note(at: Progress) -> None:
            tick("training", at.step, at.steps)

        model = run(folder, config, device=place, compiled=compiled, on_step=note)
        host = common.open_host(str(model), device, "auto")
        card = write_card(host, model, config, logged(folder), tick=tick)
    if json:
        common.emit(card)
    else:
        print(f"model and card written to {model}")
        _show(card["check"])


def _train_vision(
    folder: Path, steps: int | None, seed: int, device: str, others: dict[str, Any], *, json: bool
) -> None:  # fmt: skip
    """Train the image tower of the lab's vision-language model, two fifths of the steps or more on names."""
    from errata.errors import ConfigError
    from errata.host.open import load
    from errata.lab import load as load_lab
    from errata.lab.train import Progress, logged
    from errata.lab.vision import VisionConfig, assemble
    from errata.lab.vision_card import write_card
    from errata.lab.vision_training import train as run

    refused = [name for name, value in others.items() if value]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: the image tower of llava is trained before the lab's own decoder"
        )
    config = VisionConfig(seed=seed)
    if steps is not None:
        config = VisionConfig(
            seed=seed, steps=steps, cooled=steps, aligned=steps * config.aligned // config.cooled
        )
    with common.progress(not json) as tick:

        def note(at: Progress) -> None:
            tick("training", at.step, at.steps)

        target = run(folder, config, device=device, on_step=note)
        host = load(*assemble(target, load_lab(device="cpu", dtype="float32")), device=device, name="lab-vl")
        card = write_card(host, target, config, logged(folder), tick=tick)
    if json:
        common.emit(card)
        return
    print(f"image tower and card written to {target}")
    rows = [(name.replace("_", " "), f"{value:.3f}") for name, value in card["check"].items()]
    common.table("recall beside pictures never trained on", ("asked", "recall"), rows, right=(1,))


def _place(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


VERB = Verb("lab", app, order=140)
