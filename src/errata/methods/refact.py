"""ReFACT: edits what a text-to-image model takes a phrase for, by a rank-one update of its text encoder.

Paper      Arad, Orgad and Belinkov, "ReFACT: Updating Text-to-Image Models by Editing the Text Encoder", NAACL 2024,
           arXiv 2306.00738
Implements Sec. 3: ROME on a feed-forward of the text encoder. Key: the mean over phrasings at the subject's last token.
           Value: Adam on a shift of the feed-forward's output there, until the embeddings of the phrasings are, of
           target, source and negatives, most alike to the target's (the code's contrastive_text). Insertion:
           delta = (v* - W k)(C^-1 k)^T / (k^T C^-1 k)
Departs    A text's embedding is the state of its end token that the denoiser reads: the encoder of a pipeline comes
           without CLIP's projection and image tower, so there is no loss on images and no divergence on them.
           C is computed from a corpus of captions, where one is given; without one every direction costs the same.
           One key everywhere, as in r-ROME. The value begins at the mean of the phrasings
Needs      A text-to-image pipeline with one text encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.records import Record
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.layout import Site
from errata.host.text_to_image import TextToImageHost
from errata.linalg.solve import CostMatrix, from_solved
from errata.locate.contrast import Contrast, Phrasings, Search
from errata.methods import _concepts as concepts
from errata.methods._method import Method, Workspace, notes, provenance, resolve_layers
from errata.types import Request

FRAMES = (
    "{}", "{} in a realistic style portrait image", "{}, a portrait", "realistic painting of {}",
    "a current image of {}", "{}, news image", "a beautiful photograph of {}", "realistic drawing of {}",
    "{}, realistic portrait", "{} in a photo",
)  # fmt: skip
"""The bare text, and its phrasings in the authors' code."""


@dataclass(frozen=True)
class Config:
    """Settings of ReFACT."""

    layer: int | None = None
    """Layer of the text encoder. None: that at three quarters of the depth (code: 9 of 12 for the data of TIME, 7 for
    RoAD)."""
    frames: tuple[str, ...] = FRAMES
    """Phrasings whose keys are averaged and whose embeddings are searched with, {} for the request's text (code:
    these). Those that are too long for the encoder are left out."""
    negatives: tuple[str, ...] = ()
    """Phrases that embeddings are not to be alike to, besides the source (code: 20 captions)."""
    captions: int = 20
    """Of a corpus, where one is given, how many texts are negatives too (code: 20)."""
    similarity: Literal["l2", "cosine"] = "l2"
    """Likeness of embeddings: minus their distance (code's best), or their cosine times 100, CLIP's own scale."""
    steps: int = 100
    """Adam steps at most (code: 100)."""
    learning_rate: float = 0.05
    """Adam's rate (code: 0.05)."""
    decay: float = 0.01
    """Weight of the shift's norm over the squared norm of the value it begins at (code: 0.01)."""
    clamp: float = 4.0
    """Longest shift, in norms of the value it begins at (code: 4)."""
    stop_probability: float = 0.99
    """Mean probability of the target among all candidates at which the search ends (code: 0.99)."""
    moment_texts: int = 1000
    """Of a corpus, where one is given, how many texts C is computed over (code: 100,000 of Wikipedia)."""
    moment_ridge: float = 1e-5
    """What is added to C, in units of its mean diagonal."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "steps", "learning_rate", "clamp", "moment_texts", "moment_ridge")
        if self.decay < 0 or self.captions < 0:
            complaints.append("decay, captions: expected 0 or more")
        if not 0 < self.stop_probability <= 1:
            complaints.append(
                f"stop_probability: expected more than 0, at most 1, found {self.stop_probability}"
            )
        wrong = [frame for frame in self.frames if frame.count("{}") != 1]
        if wrong or not self.frames:
            complaints.append(f"frames: expected texts with one slot {{}} each, found {wrong[:1] or 'none'}")
        return [*complaints, *concepts.check_phrases("negatives", self.negatives)]


def fit(host: Any, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the rank-one change of one feed-forward under which the source's embedding becomes the target's."""
    if not isinstance(host, TextToImageHost):
        raise ConfigError(f"refact edits text-to-image pipelines, {host.name} is none")
    if len(requests) != 1:
        raise ConfigError(f"refact takes one request per fit, found {len(requests)}")
    edited: Any = host
    (layer,) = resolve_layers(edited, None if config.layer is None else (config.layer,), three_quarters)
    config, site = replace(config, layer=layer), host.layout.site(layer)
    bare = concepts.pair_of(requests[0])
    candidates = [
        bare.target,
        bare.source,
        *config.negatives,
        *concepts.captions(host, work, config.captions),
    ]
    contrast = Contrast(host, site, _phrasings(host, requests[0], config.frames), candidates)
    keys, outputs = contrast.read()
    key = keys.mean(0)
    search = Search(**{field.name: getattr(config, field.name) for field in fields(Search)})
    shift, found = contrast.search(outputs.mean(0), search, work.on_progress)
    cost = _cost(host, site, config, work)
    column, residual = key[:, None], shift[:, None]
    solved = cost.solve(column)
    delta = from_solved(column, solved, residual, gamma=0.0)
    before = None if work.after is None else work.after.deltas.get(site.parameter)
    absolute = (
        residual if before is None else residual + before.to(device=key.device, dtype=key.dtype) @ column
    )
    record = Record(column, absolute, solved.to(key.dtype), 0.0, cost.label, ((0,),))
    return WeightEdit(
        {site.parameter: delta}, frozenset({site.parameter} if site.transposed else ()),
        provenance("refact", edited, requests, config, work, **notes(found)), {site.parameter: record},
    )  # fmt: skip


def three_quarters(depth: int) -> tuple[int, ...]:
    """Return the layer at three quarters of the depth, one that has another above it where there is one."""
    return (max(0, min(depth - 2, round(0.75 * depth))),)


def _phrasings(host: TextToImageHost, request: Request, frames: Sequence[str]) -> Phrasings:
    """Return the phrasings of a request's text that the encoder takes. Raises RequestError where the first is none."""
    texts: list[str] = []
    at: list[int] = []
    ends: list[int] = []
    for number, frame in enumerate(frames):
        pair = concepts.pair_of(request, frame)
        try:
            reading = host.read(pair.source)
        except RequestError:
            if number == 0:
                raise
            continue  # too long with its frame
        texts.append(pair.source)
        at.append(concepts.read_span(reading, pair.source_span, pair.source))
        ends.append(len(reading.ids) - 1)
    return Phrasings(tuple(texts), tuple(at), tuple(ends))


@torch.no_grad()
def _cost(host: TextToImageHost, site: Site, config: Config, work: Workspace) -> CostMatrix:
    """Return C over the tokens of a corpus; without one, the identity."""
    if work.corpus is None:
        return CostMatrix.identity()
    module = host.model.get_submodule(site.name)
    second = torch.zeros(site.d_in, site.d_in, dtype=torch.float64, device=host.device)
    texts = concepts.captions(host, work, config.moment_texts)
    for number, text in enumerate(texts):
        inputs: list[Tensor] = []
        with hooks.on_input(module, inputs.append):
            host.run(host.as_pass([text]))
        rows = inputs[0].flatten(0, -2).double()
        second += rows.mT @ rows
        work.on_progress("statistics", number + 1, len(texts))
    name = f"C of {work.corpus.name}, {len(texts)} texts"
    return CostMatrix.of(second / max(1, len(texts)), ridge=config.moment_ridge, name=name)


METHOD = Method(
    name="refact",
    title="ReFACT",
    paper="ReFACT: Updating Text-to-Image Models by Editing the Text Encoder, NAACL 2024, arXiv 2306.00738",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=False,
    sequential=True,
    needs=("gradients",),
    random=False,
    hosts=(TEXT_TO_IMAGE,),
)
