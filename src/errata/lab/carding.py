"""The model card of the lab's model: training data, training, and measurements. JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errata.bench.results import write_report
from errata.edits.edit import versions
from errata.host.host import Host
from errata.lab.check import check
from errata.lab.text import CODA, FIRST, LAST, THEN
from errata.lab.train import TITLES, TrainConfig
from errata.lab.world import World
from errata.progress import OnProgress, ignore


def write_card(
    host: Host, folder: Path, config: TrainConfig, losses: Mapping[int, float], *,
    tick: OnProgress = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Measure a trained model and write ``card.json`` and ``README.md`` to its folder."""
    world = World.make(config.world_seed)
    card = {
        "world": {
            "seed": world.seed,
            "facts": len(world.facts),
            "entities": len(world.entities),
            "relations": len(world.relations),
            "compositions": sum(1 for _ in world.chain_facts()),
        },
        "text": {
            "first_mix": FIRST,
            "second_mix": THEN,
            "third_mix": LAST,
            "fourth_mix": CODA,
            "tokens": config.steps * config.rows * config.row_tokens,
        },
        "training": asdict(config),
        "loss": losses.get(config.steps),
        "parameters": sum(p.numel() for p in host.model.parameters()),
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "fingerprint": host.fingerprint,
        "versions": versions(),
        "check": check(host, world=world, tick=tick),
    }
    write_report(folder / "card.json", card)
    readme = folder / "README.md.part"
    try:
        readme.write_text(_markdown(card), encoding="utf-8")
        readme.replace(folder / "README.md")
    finally:
        readme.unlink(missing_ok=True)
    return card


def _markdown(card: dict[str, Any]) -> str:
    world, training, check = card["world"], card["training"], card["check"]
    recall, layers = check["recall"], check["layers"]
    option = "" if training["shape"] == TrainConfig.shape else f" --shape {training['shape']}"
    lines = [
        "# The lab's model",
        "",
        f"A {TITLES[training['shape']]}-shaped decoder of {card['parameters'] / 1e6:.1f} M parameters "
        f"({training['layers']} layers, width {training['width']}, inner width {training['inner']}) "
        f"that knows a fictional world of {world['facts']} facts "
        f"about {world['entities']} entities in {world['relations']} relations.",
        f"Trained on {card['text']['tokens'] / 1e6:.1f} M tokens in {training['steps']} steps, final loss "
        f"{card['loss']}, weights stored in bfloat16. Make it again with "
        f"`errata lab train FOLDER{option}`.",
        "",
        "| recall by greedy generation | share |",
        "|---|---|",
        f"| seen phrasings | {recall['seen']:.3f} |",
        f"| held-out phrasings | {recall['held_out']:.3f} |",
        f"| questions | {recall['question']:.3f} |",
        f"| questions, subjects never asked about in training | {recall['question_never_asked']:.3f} |",
        f"| new fact in the context obeyed | {check['episodes']['obeyed']:.3f} |",
        f"| unrelated new fact ignored | {check['episodes']['ignored']:.3f} |",
        f"| perplexity of neutral sentences | {check['perplexity']:.2f} |",
        *(f"| compositions {name} | {value:.3f} |" for name, value in check["compositions"].items()),
        "",
        "Share of answers changed by an optimised shift at the subject's last token, per layer:",
        "",
        "| layer | rewrites | paraphrases |",
        "|---|---|---|",
        *(f"| {i} | {r:.3f} | {p:.3f} |"
          for i, (r, p) in enumerate(zip(layers["rewrites"], layers["paraphrases"], strict=True))),
        "",
        "| relation | seen | held out | question |",
        "|---|---|---|---|",
        *(f"| {name} | {recall['seen_by_relation'][name]:.3f} | {recall['held_out_by_relation'][name]:.3f} "
          f"| {recall['question_by_relation'][name]:.3f} |" for name in recall["seen_by_relation"]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)
