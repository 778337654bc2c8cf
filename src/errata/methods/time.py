"""TIME: makes the cross-attention of a text-to-image model read a source text as a more specific one, token by token.

Paper      Orgad, Kawar and Belinkov, "Editing Implicit Assumptions in Text-to-Image Diffusion Models", ICCV 2023,
           arXiv 2303.08084
Implements Sec. 4, for every map of keys and values: W = (lambda W0 + sum W0 c* c^T)(lambda I + sum c c^T)^-1, over all
           tokens c of the source text and c* of the same words in the target text; of the words that only the target
           has, nothing is taken. That is UCE with the identity as all that is preserved
Departs    Solved as an update of low rank, as all closed-form editors here; the result is the same.
           A source whose words are not all in its target, in their order, is refused: the paper aligns by words
Needs      A text-to-image pipeline whose cross-attention reads the text alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import RequestError
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.text_to_image import TextToImageHost
from errata.methods import _concepts as concepts
from errata.methods._concepts import Columns
from errata.methods._method import Method, Workspace, check_requests, without
from errata.types import Request

FRAMES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
"""The bare text, and its augmentations as in the authors' code."""


@dataclass(frozen=True)
class Config:
    """Settings of TIME."""

    ridge: float = 0.1
    """lambda: weight of leaving each map as it is (paper: 0.1)."""
    maps: Literal["both", "values"] = "both"
    """Maps to edit: of keys and values (paper), or of values alone (code without with_to_k)."""
    augment: bool = False
    """Whether three more phrasings of each text are edited too (code: with_augs, off)."""
    padding: bool = True
    """Whether the tokens that fill a text up to its full length are edited too (code: yes)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "ridge")


def fit(host: Any, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the change of all maps under which each source text is read as its target text."""
    pipeline = concepts.pipeline_of("time", host)
    check_requests("time", requests)
    sites = pipeline.layout.cross_sites()
    if config.maps == "values":
        sites = tuple(site for site in sites if site.part == "cross_value")
    with without(work.after, host):
        columns = Columns()
        for number, request in enumerate(requests):
            for frame in FRAMES if config.augment else FRAMES[:1]:
                pair = concepts.pair_of(request, frame)
                _add(pipeline, columns, pair.source, pair.target, number, pad=config.padding)
        cost = concepts.costs(pipeline, (), (), ridge=config.ridge, scale=0.0)
        return concepts.solve(
            "time", pipeline, requests, config, work, columns=columns, cost=cost, scale=1.0, sites=sites
        )


def _add(
    host: TextToImageHost, columns: Columns, source: str, target: str, number: int, *, pad: bool
) -> None:
    """Add every token of a source text with the same token of its target text."""
    rows = [host.read(text).ids for text in (source, target)]
    places = aligned(_without_articles(host, rows[0]), _without_articles(host, rows[1]))
    if places is None:
        raise RequestError(
            f"time reads every word of the source as the same word of the target, and those of {source!r:.80} are not "
            f"all in {target!r:.80} in their order: name a more specific target, or use uce"
        )
    states = host.inputs([source, target], pad=pad)
    if pad:
        length = next(iter(states.values())).shape[1]
        # behind the text, padding is read as the padding that follows in the target
        places += range(places[-1] + 1, length)
        places += [length - 1] * (length - len(places))
    keys = {name: both[0, : len(places)] for name, both in states.items()}
    goals = {name: both[1, places] for name, both in states.items()}
    columns.add(keys, goals, number)


def aligned(source: Sequence[int], target: Sequence[int]) -> list[int] | None:
    """Return for each token of a source its place in a target, in rising order; None where one is not there."""
    places: list[int] = []
    at = 0
    for token in source:
        while at < len(target) and target[at] != token:
            at += 1
        if at == len(target):
            return None
        places.append(at)
        at += 1
    return places


def _without_articles(host: TextToImageHost, ids: Sequence[int]) -> list[int]:
    """Return ids with "an" as "a", which is the same word before another one."""
    texts = [host.tokenizer.decode([token]).strip() for token in ids]
    article = next(iter(host.read("a").ids[-2:-1]), None)
    return [
        article if text == "an" and article is not None else token
        for text, token in zip(texts, ids, strict=True)
    ]


METHOD = Method(
    name="time",
    title="TIME",
    paper="Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.08084",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
    hosts=(TEXT_TO_IMAGE,),
)
