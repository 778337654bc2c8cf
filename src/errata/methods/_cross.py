"""What methods share that have a model read a fact and a prompt together to decide whether the prompt is in scope."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.routers import _stored
from errata.edits.routers._router import Question, Router
from errata.edits.routers.cross import Cross
from errata.errors import ConfigError
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.host.pairs import pair_digest, read_pairs
from errata.progress import OnProgress
from errata.training.examples import Example
from errata.training.scope import Pairs, ScopeTraining, train_head
from errata.types import Request
from errata.writing import statement

TRAINER = "serac"
"""The method whose editors hold a classifier of pairs."""
NEAREST, ANY = 2, 1
"""Other facts that a prompt in scope is read with in training: those nearest to it, and any."""


@dataclass(frozen=True)
class CrossScope:
    """Settings of a classifier that reads a fact and a prompt together."""

    cross: str | None = None
    """With scope cross, what reads a fact and a prompt together: a file that errata train serac wrote with
    classifier=cross, or name or folder of a cross-encoder of transformers with one logit."""
    candidates: int = 8
    """With scope cross, facts nearest to a prompt that are read with it at most; each costs a pass."""
    recall: Literal["words", "names", "vectors"] = "words"
    """With scope cross, what is nearest: by BM25 of words in common, or by sentence vectors; or only those facts whose
    subject a prompt names."""

    def cross_problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "candidates")


def empty_router(host: Host, settings: CrossScope, *, encoder: str | None, template: str) -> Cross:
    """Return a router without entries: a cross-encoder's own logit, or the untrained host.

    Raises ConfigError for a file in place of a cross-encoder.
    """
    model = settings.cross
    if model is not None and Path(model).is_file():
        raise ConfigError(
            f"cross: {model} is a file; name a cross-encoder, or leave it out to train the host"
        )
    width = host.layout.width if model is None else 1
    return Cross(
        (), torch.ones(width), torch.zeros(0, width), model=model, model_digest=pair_digest(host, model),
        template=template, layer=len(host.layout.blocks) // 2, **_recall(host, settings, encoder),
    )  # fmt: skip


def open_router(host: Host, settings: CrossScope, *, encoder: str | None) -> Cross:
    """Return the router without entries that ``cross`` names.

    Raises ConfigError where it names none, EditError for a file of another method or host.
    """
    if settings.cross is None:
        raise ConfigError(
            "scope: cross needs a classifier: train one for this model (errata train serac --set classifier=cross) "
            "and give its file as cross=, or name a cross-encoder of transformers"
        )
    if not Path(settings.cross).is_file():
        return empty_router(host, settings, encoder=encoder, template=Cross.template)
    editor = Artefact.load(settings.cross)
    editor.check(TRAINER, host.fingerprint)
    return router_of(host, editor, settings, encoder=encoder)


def _recall(host: Host, settings: CrossScope, encoder: str | None) -> dict[str, Any]:
    return {
        "candidates": settings.candidates, "recall": settings.recall, "encoder": encoder,
        "encoder_digest": encoder_digest(host, encoder),
    }  # fmt: skip


def router_of(host: Host, editor: Artefact, settings: CrossScope, *, encoder: str | None) -> Cross:
    """Return the router without entries that an editor holds. Raises ConfigError for one that was trained without."""
    if "router" not in editor.body:
        raise ConfigError(
            "classifier: the editor compares sentence vectors; train one with classifier=cross, or use "
            "classifier=embed"
        )
    router = _stored.restore(editor.tensors, editor.body)
    if not isinstance(router, Cross):
        raise ConfigError(f"classifier: the editor holds a {router.name} router, expected {Cross.name}")
    return replace(router, **_recall(host, settings, encoder))


def with_requests(
    host: Host, router: Cross, requests: Sequence[Request], before: Router | None, threshold: float | None
) -> Cross:
    """Return a router with an entry for each request, those of the router ``before`` first.

    ``threshold``: least probability; None: 0.5. Raises ConfigError where ``before`` decides in another way.
    """
    recall = router.recall
    router = replace(router, threshold=0.5 if threshold is None else threshold)
    if before is not None and (not isinstance(before, Cross) or not _alike(before, router)):
        raise ConfigError(
            f"scope: the earlier edit has a {before.name} router of its own; go on with the same one"
        )
    facts = tuple(statement(r.text, r.target, host.prompt_format.join) for r in requests)
    router = replace(router, statements=facts, recall="words", phrases=None, keys=None)
    if recall == "words":
        return router
    if recall == "names":
        return replace(router, recall=recall, phrases=tuple(request.subject for request in requests))
    old = [] if before is None or before.keys is None else [before.keys]
    new = facts[sum(map(len, old)) :]
    keys = torch.cat([*old, embed(host, new, encoder=router.encoder)])
    return replace(router, recall=recall, keys=keys)


def _alike(one: Cross, other: Cross) -> bool:
    """Whether two routers decide in the same way, but for their entries and thresholds."""
    plain = [
        {
            n: v
            for n, v in router.facts().items()
            if n not in ("statements", "phrases", "threshold", "candidates")
        }
        for router in (one, other)
    ]
    tensors = [{n: t for n, t in router.tensors().items() if n != "keys"} for router in (one, other)]
    return (
        plain[0] == plain[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    )


def train_router(
    host: Host, examples: Sequence[Example], router: Cross, settings: ScopeTraining, *, seed: int,
    on_progress: OnProgress,
) -> tuple[Cross, float]:  # fmt: skip
    """Train a router's classifier on examples; return it without entries, and its last loss."""
    facts = [statement(e.request.text, e.request.target, host.prompt_format.join) for e in examples]
    inside = [(fact, p) for fact, e in zip(facts, examples, strict=True) for p, _ in e.inside]
    outside = [(fact, p) for fact, e in zip(facts, examples, strict=True) for p in e.outside]
    others = _others(host, examples, facts, router, random.Random(f"cross {seed}"))

    def read(pairs: Sequence[tuple[str, str]]) -> Tensor:
        return read_pairs(host, router.reader, [fact for fact, _ in pairs], [prompt for _, prompt in pairs])

    pairs = Pairs(read(inside), read(outside), read(others))
    weight, projection, bias, loss = train_head(pairs, settings, seed=seed, on_progress=on_progress)
    return replace(router, weight=weight, projection=projection, bias=bias), loss


def _others(
    host: Host, examples: Sequence[Example], facts: Sequence[str], router: Cross, draw: random.Random
) -> list[tuple[str, str]]:
    """Return prompts in scope with other facts: those that the router would read them with, and any."""
    by = replace(router, recall="words") if router.recall == "names" else router
    memory = with_requests(host, by, [example.request for example in examples], None, None)
    prompts = [prompt for example in examples for prompt, _ in example.inside]
    empty = torch.zeros(len(prompts), 0)
    asked = Question(empty, empty, lambda: prompts, lambda: embed(host, prompts, encoder=router.encoder))
    nearest = iter(memory.nearest(asked))
    pairs: list[tuple[str, str]] = []
    for example in examples:
        strange = [i for i, one in enumerate(examples) if one.request.text != example.request.text]
        for prompt, _ in example.inside:
            close = [i for i in next(nearest) if i in strange][:NEAREST]
            chosen = [*close, *draw.sample(strange, min(ANY, len(strange)))]
            pairs += [(facts[i], prompt) for i in dict.fromkeys(chosen)]
    return pairs
