"""The model card of the lab's model: training data, training, and measurements. JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errata.bench.results import write_report
from errata.edits.edit import versions
from errata.host.host import Host
from errata.host.kinds import CAUSAL, ENCODER_DECODER, MASKED
from errata.lab.asked import ASKED
from errata.lab.bilingual import MIX as BILINGUAL
from errata.lab.check import check
from errata.lab.text import CODA, FIRST, LAST, THEN
from errata.lab.train import KINDS_OF, TITLES, TrainConfig
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
        "text": _text(config),
        "training": asdict(config),
        "loss": losses.get(config.steps),
        "parameters": sum(p.numel() for p in host.model.parameters()),
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "fingerprint": host.fingerprint,
        "versions": versions(),
        "check": check(host, world=world, bilingual=config.variant == "bilingual", tick=tick),
    }
    write_report(folder / "card.json", card)
    readme = folder / "README.md.part"
    try:
        readme.write_text(_markdown(card), encoding="utf-8")
        readme.replace(folder / "README.md")
    finally:
        readme.unlink(missing_ok=True)
    return card


def _text(config: TrainConfig) -> dict[str, Any]:
    """Return what the training text was made of, and how much of it there was."""
    if config.kind != CAUSAL:
        return {"mix": ASKED, "examples": config.steps * config.rows}
    if config.variant is not None:
        return {"mix": BILINGUAL, "first": CODA, "tokens": config.steps * config.rows * config.row_tokens}
    return {
        "first_mix": FIRST,
        "second_mix": THEN,
        "third_mix": LAST,
        "fourth_mix": CODA,
        "tokens": config.steps * config.rows * config.row_tokens,
    }


_NOUNS = {CAUSAL: "decoder", ENCODER_DECODER: "encoder-decoder", MASKED: "masked language model"}


def _blocks(training: Mapping[str, Any]) -> str:
    decoder = training.get("decoder_layers")
    return f"{training['layers']} layers" + (f" and {decoder} of the decoder" if decoder else "")


def _size(text: Mapping[str, Any]) -> str:
    if "examples" in text:
        return f"{text['examples']:,} prompts with their answers"
    return f"{text['tokens'] / 1e6:.1f} M tokens"


def _layer_rows(check: Mapping[str, Any]) -> list[str]:
    if "layers" not in check:
        return []
    shares = zip(check["layers"]["rewrites"], check["layers"]["paraphrases"], strict=True)
    return [
        "Share of answers changed by an optimised shift at the subject's last token, per layer:",
        "",
        "| layer | rewrites | paraphrases |",
        "|---|---|---|",
        *(f"| {i} | {r:.3f} | {p:.3f} |" for i, (r, p) in enumerate(shares)),
        "",
    ]


def _context_rows(check: Mapping[str, Any]) -> list[str]:
    if "episodes" not in check:
        return []
    return [
        f"| new fact in the context obeyed | {check['episodes']['obeyed']:.3f} |",
        f"| unrelated new fact ignored | {check['episodes']['ignored']:.3f} |",
        f"| perplexity of neutral sentences | {check['perplexity']:.2f} |",
    ]


def _second_rows(check: Mapping[str, Any]) -> list[str]:
    return [
        f"| second language, {name}, {group.replace('_', ' ')} | {value:.3f} |"
        for group, shares in check.get("second_language", {}).items()
        for name, value in shares.items()
    ]


def _markdown(card: dict[str, Any]) -> str:
    world, training, check = card["world"], card["training"], card["check"]
    recall = check["recall"]
    noun = _NOUNS[KINDS_OF.get(training["shape"], CAUSAL)]
    option = "" if training["shape"] == TrainConfig.shape else f" --shape {training['shape']}"
    option += f" --variant {training['variant']}" if training.get("variant") else ""
    option += "".join(f' --without "{name}"' for name in training.get("without", ()))
    lines = [
        "# The lab's model",
        "",
        f"A {TITLES[training['shape']]}-shaped {noun} of {card['parameters'] / 1e6:.1f} M parameters "
        f"({_blocks(training)}, width {training['width']}, inner width {training['inner']}) "
        f"that knows a fictional world of {world['facts']} facts "
        f"about {world['entities']} entities in {world['relations']} relations.",
        f"{'The shipped model, trained further' if training.get('variant') else 'Trained'} on "
        f"{_size(card['text'])} in {training['steps']} steps, final loss "
        f"{card['loss']}, weights stored in bfloat16. Make it again with "
        f"`errata lab train FOLDER{option}`.",
        "",
        "| recall by greedy generation | share |",
        "|---|---|",
        f"| seen phrasings | {recall['seen']:.3f} |",
        f"| held-out phrasings | {recall['held_out']:.3f} |",
        f"| questions | {recall['question']:.3f} |",
        f"| questions, subjects never asked about in training | {recall['question_never_asked']:.3f} |",
        *_second_rows(check),
        *_context_rows(check),
        *(f"| compositions {name} | {value:.3f} |" for name, value in check["compositions"].items()),
        "",
        *_layer_rows(check),
        "| relation | seen | held out | question |",
        "|---|---|---|---|",
        *(f"| {name} | {recall['seen_by_relation'][name]:.3f} | {recall['held_out_by_relation'][name]:.3f} "
          f"| {recall['question_by_relation'][name]:.3f} |" for name in recall["seen_by_relation"]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)
