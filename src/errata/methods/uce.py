"""UCE: makes the cross-attention of a text-to-image model read a concept as another, and preserves named concepts.

Paper      Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv 2308.14761
Implements Eq. 7, for every map of keys and values: W = (lambda W0 + e sum v* c^T + p sum W0 c c^T)
           (lambda I + e sum c c^T + p sum c c^T)^-1, over the last tokens c of what is edited and of what is
           preserved. v* = W0 c* erases towards a phrase or, as in moderation, towards the empty text;
           v* = W0 (c + sum alpha a) debiases towards attributes
Departs    Solved as an update of low rank, as all closed-form editors here; the result is the same.
           alpha is given: the authors adjust it by images that they draw and classify. A phrase may stand in a prompt;
           its last token is taken, as of bare phrases. With ``expand`` the authors' code also preserves what it
           erases, which is left out. Tokens of a corpus of captions may be preserved besides
Needs      A text-to-image pipeline whose cross-attention reads the text alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.text_to_image import TextToImageHost
from errata.methods import _concepts as concepts
from errata.methods._concepts import Columns
from errata.methods._method import Method, Workspace, check_requests, without
from errata.types import Request

EXPANDED = {
    "none": ("{}",),
    "art": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
"""Phrasings of a concept, as in the authors' code."""


@dataclass(frozen=True)
class Config:
    """Settings of UCE."""

    ridge: float = 0.5
    """lambda: weight of leaving each map as it is (code: 0.5)."""
    erase_scale: float = 1.0
    """e: weight of the requests (code: 1)."""
    preserve_scale: float = 1.0
    """p: weight of what is preserved (code: 1)."""
    preserve: tuple[str, ...] = ()
    """Phrases whose keys and values are preserved at their last tokens."""
    captions: int = 1000
    """Of a corpus, where one is given, how many texts are preserved at all their tokens (paper: none)."""
    form: Literal["replace", "moderate", "debias"] = "replace"
    """What a concept is read as: the request's target; the empty text, whatever the target is; or itself, with
    ``attributes`` added."""
    attributes: tuple[str, ...] = ()
    """For debias: phrases a whose keys and values are added (paper: as male, female)."""
    strengths: tuple[float, ...] = ()
    """For debias: alpha of each attribute (code: summed differences of wanted and drawn shares)."""
    expand: Literal["none", "art", "object"] = "none"
    """Whether a concept is edited in five more phrasings, of an artist or of an object (code: off)."""

    def problems(self) -> list[str]:
        """Check ranges and combinations."""
        complaints = positive(self, "ridge", "erase_scale")
        if self.preserve_scale < 0 or self.captions < 0:
            complaints.append("preserve_scale, captions: expected 0 or more")
        complaints += concepts.check_phrases("preserve", self.preserve)
        complaints += concepts.check_phrases("attributes", self.attributes)
        if len(self.attributes) != len(self.strengths):
            complaints.append(
                f"strengths: expected one for each of {len(self.attributes)} attributes, found {len(self.strengths)}"
            )
        if (self.form == "debias") != bool(self.attributes):
            complaints.append("attributes: expected phrases with form: debias, and none without")
        return complaints


def fit(host: Any, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the change of all maps of keys and values under which each concept is read as its request says."""
    pipeline = concepts.pipeline_of("uce", host)
    check_requests("uce", requests)
    with without(work.after, host):
        columns = _columns(pipeline, requests, config)
        texts = concepts.captions(pipeline, work, config.captions)
        cost = concepts.costs(
            pipeline, config.preserve, texts, ridge=config.ridge, scale=config.preserve_scale
        )
        return concepts.solve(
            "uce", pipeline, requests, config, work, columns=columns, cost=cost, scale=config.erase_scale,
            sites=pipeline.layout.cross_sites(), preserved=len(config.preserve), captions=len(texts),
        )  # fmt: skip


def _columns(host: TextToImageHost, requests: Sequence[Request], config: Config) -> Columns:
    """Return the last token of each concept, and what it is to be read as."""
    columns = Columns()
    added = _attributes(host, config)
    for number, request in enumerate(requests):
        pairs = [
            concepts.pair_of(request, frame, empty=config.form == "moderate")
            for frame in EXPANDED[config.expand]
        ]
        keys = concepts.last_tokens(host, [p.source for p in pairs], [p.source_span for p in pairs])
        if config.form == "debias":
            goals = {source: rows + added[source] for source, rows in keys.items()}
        else:
            goals = concepts.last_tokens(host, [p.target for p in pairs], [p.target_span for p in pairs])
        columns.add(keys, goals, number)
    return columns


def _attributes(host: TextToImageHost, config: Config) -> dict[str, Tensor]:
    """Return sum alpha a, ``[1, d_in]`` by source; nothing without attributes."""
    if not config.attributes:
        return {}
    rows = concepts.last_tokens(host, config.attributes, [(0, len(text)) for text in config.attributes])
    strengths = torch.tensor([config.strengths], dtype=torch.float64)
    return {source: (strengths.to(own) @ own) for source, own in rows.items()}


METHOD = Method(
    name="uce",
    title="UCE",
    paper="Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
    hosts=(TEXT_TO_IMAGE,),
)
