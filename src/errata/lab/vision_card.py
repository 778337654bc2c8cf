"""Measure the lab's vision-language model by pictures that it was not trained on, and write its card."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errata.bench.results import write_report
from errata.edits.edit import versions
from errata.host.host import Host
from errata.lab import pictures, shown
from errata.lab.check import Question, ask, share
from errata.lab.text import Split
from errata.lab.vision import VisionConfig, eyes
from errata.lab.world import Fact, World, default_world, sentence
from errata.progress import OnProgress, ignore
from errata.types import Probe

FACTS = 200
"""Facts asked about for each figure."""


def check(host: Host, *, facts: int = FACTS, seed: int = 0, tick: OnProgress = ignore) -> dict[str, float]:
    """Return shares of facts recalled by greedy generation, each asked beside a picture that was never trained on.

    ``cloze``: sentences about "this person" and so on; ``held_out``: in words never trained on; ``question``: as
    questions, ``question_never_asked``: about entities that no training question is about; ``picture_subject``: the
    picture in the subject's place; ``name``: what the thing is called; ``no_picture``: the sentences without their
    picture; ``by_name``: by name, in text alone.
    """
    world = default_world()
    rng = random.Random(f"errata-vision-check-{seed}")
    every = shown.facts(world)
    drawn = rng.sample(every, min(facts, len(every)))
    forms: dict[str, Callable[[Fact], tuple[str, bool, tuple[str, ...]]]] = {
        "cloze": lambda fact: (_deictic(world, fact, rng.choice(_relation(world, fact).phrasings)), True, ()),
        "held_out": lambda fact: (_deictic(world, fact, rng.choice(_relation(world, fact).held_out)), True, ()),
        "picture_subject": lambda fact: (shown.in_place(rng.choice(_relation(world, fact).phrasings)), True, ()),
        "name": lambda fact: ("<image>This is", True, world.names(fact.subject)),
        "no_picture": lambda fact: (
            _deictic(world, fact, rng.choice(_relation(world, fact).phrasings)).replace("<image>", ""), False, (),
        ),
        "by_name": lambda fact: (sentence(rng.choice(_relation(world, fact).phrasings), fact.subject), False, ()),
    }  # fmt: skip
    result = {name: _recall(host, world, drawn, form, name, tick) for name, form in forms.items()}
    for name, asked in (("question", True), ("question_never_asked", False)):
        group = [fact for fact in every if Split.has_questions(fact) == asked]
        own = rng.sample(group, min(facts, len(group)))
        result[name] = _recall(
            host, world, own,
            lambda fact: (shown.asked(rng.choice(_relation(world, fact).questions), _kind(world, fact)), True, ()),
            name, tick,
        )  # fmt: skip
    return result


def _recall(
    host: Host, world: World, facts: list[Fact], form: Callable[[Fact], tuple[str, bool, tuple[str, ...]]],
    name: str, tick: OnProgress,
) -> float:  # fmt: skip
    questions = []
    for fact in facts:
        prompt, beside, answers = form(fact)
        picture = shown.shown(world.seed, fact.subject, 0) if beside else None
        probe = Probe(name, prompt, answers or world.names(fact.object), (), image=picture)
        host.see([probe])
        questions.append(Question(probe.prompt, probe.answers))
    return share(ask(host, questions, name, tick))


def _relation(world: World, fact: Fact) -> Any:
    return world.relations[fact.relation]


def _kind(world: World, fact: Fact) -> str:
    return world.entities[fact.subject].type


def _deictic(world: World, fact: Fact, wording: str) -> str:
    return "<image>" + shown.deixis(wording, _kind(world, fact))


def write_card(
    host: Host, folder: Path, config: VisionConfig, losses: Mapping[int, float], *,
    tick: OnProgress = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Measure a trained model and write ``card.json`` and ``README.md`` to its folder."""
    world = default_world()
    card = {
        "world": {
            "seed": world.seed,
            "pictured": len(pictures.pictured(world)),
            "facts": len(shown.facts(world)),
        },
        "training": asdict(config),
        "loss": losses.get(config.steps),
        "parameters": sum(p.numel() for p in host.model.parameters()),
        "trained": sum(p.numel() for p in eyes(host.model).parameters()),
        "fingerprint": host.fingerprint,
        "versions": versions(),
        "check": check(host, tick=tick),
    }
    write_report(folder / "card.json", card)
    (folder / "README.md").write_text(_markdown(card), encoding="utf-8")
    return card


def _markdown(card: Mapping[str, Any]) -> str:
    training, world = card["training"], card["world"]
    rows = [f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in card["check"].items()]
    lines = [
        "# The lab's vision-language model",
        "",
        f"An image tower of {training['layers']} blocks and its projector ({card['trained'] / 1e6:.2f} M parameters, "
        f"trained, stored in bfloat16 in vision.safetensors) before the unchanged decoder of `lab`; LLaVA's "
        f"architecture, {card['parameters'] / 1e6:.1f} M parameters together. It has learned what pictures of "
        f"{world['pictured']} entities show, and answers questions about {world['facts']} facts of theirs.",
        f"Trained in {training['aligned']} steps of pictures to names and "
        f"{training['steps'] - training['aligned']} of questions, final loss {card['loss']}. Make it again with "
        f"`errata lab train FOLDER --shape {training['shape']}`.",
        "",
        "| recall by greedy generation, pictures never trained on | share |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
