"""A value of a text encoder's feed-forward by contrast: phrasings become more alike to one text than to others.

An embedding is the state of the token that ends a text, as a denoiser reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.layout import Site
from errata.host.text_to_image import TextToImageHost
from errata.linalg.routines import norm
from errata.progress import OnProgress


@dataclass(frozen=True)
class Search:
    """Settings of a search."""

    similarity: Literal["l2", "cosine"]
    """Likeness of embeddings: minus their distance, or their cosine times 100."""
    steps: int
    """Adam steps at most."""
    learning_rate: float
    """Adam's rate."""
    decay: float
    """Weight of the shift's norm over the squared norm of the value it begins at."""
    clamp: float
    """Longest shift, in norms of the value it begins at."""
    stop_probability: float
    """Mean probability of the target among all candidates at which the search ends."""


@dataclass(frozen=True)
class Phrasings:
    """Texts that name one subject, and the places of its last token and of their end in each."""

    texts: tuple[str, ...]
    at: tuple[int, ...]
    ends: tuple[int, ...]


class Contrast:
    """Phrasings of a source at one feed-forward, and the embeddings that they are compared with."""

    def __init__(
        self, host: TextToImageHost, site: Site, phrasings: Phrasings, candidates: Sequence[str]
    ) -> None:
        """``candidates``: the target first, then the source and other texts.

        Raises RequestError where target and source have one embedding.
        """
        self.host, self.site, self.texts = host, site, phrasings.texts
        self.module = host.model.get_submodule(site.name)
        self.at, self.ends = torch.tensor(phrasings.at), torch.tensor(phrasings.ends)
        self.rows = torch.arange(len(phrasings.at))
        with torch.no_grad():
            ends = torch.tensor([len(host.read(text).ids) - 1 for text in candidates])
            self.candidates = self._embed(candidates, ends)
        if torch.equal(self.candidates[0], self.candidates[1]):
            raise RequestError(f"{candidates[1]!r:.80} and {candidates[0]!r:.80} have one embedding already")

    def _embed(self, texts: Sequence[str], ends: Tensor) -> Tensor:
        states = self.host.run(self.host.as_pass(texts)).logits[..., : self.host.layout.width]
        return states[torch.arange(len(texts)), ends].float()

    @torch.no_grad()
    def read(self) -> tuple[Tensor, Tensor]:
        """Return the feed-forward's keys ``[n, d_in]`` and outputs ``[n, d]`` at the subject, a row a phrasing."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> None:
            outputs.append(output.clone())

        with hooks.on_input(self.module, inputs.append), hooks.on_output(self.module, keep):
            self._embed(self.texts, self.ends)
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        return inputs[0][self.rows, self.at].to(wide), outputs[0][self.rows, self.at].to(wide)

    def search(
        self, start: Tensor, config: Search, on_progress: OnProgress
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the shift ``[d]`` of a value that begins at ``start``, and steps and probabilities of the search.

        Raises ConfigError where the layer has no influence on embeddings, RequestError where the source is taken for
        the target from the start.
        """
        size = float(norm(start))
        shift = torch.zeros_like(start).requires_grad_()
        optimizer = torch.optim.Adam([shift], lr=config.learning_rate)
        first = probability = 0.0
        step = 0
        with hooks.frozen(self.host.model), torch.enable_grad():
            for step in range(config.steps + 1):
                on_progress("value", step, config.steps)
                log_probability = self._log_probability(shift, config.similarity)
                loss = -log_probability.mean() + config.decay * shift.norm() / size**2
                probability = float(log_probability.detach().exp().mean())
                first = first if step else probability
                if probability >= config.stop_probability or step == config.steps:
                    break
                optimizer.zero_grad()
                loss.backward()
                if shift.grad is None or not shift.grad.any():
                    raise ConfigError(
                        f"nothing above layer {self.site.layer} brings the subject to the end of the text, whose "
                        "embedding is searched with; name a lower one"
                    )
                optimizer.step()
                with torch.no_grad():
                    shift.mul_(min(1.0, config.clamp * size / max(float(norm(shift)), 1e-30)))
        found = shift.detach()
        if not found.any():
            raise RequestError(
                "the source is taken for the target already, as its embedding shows: nothing to edit"
            )
        return found, {
            "probability_before": first, "probability": probability, "steps": float(step),
            "shift": float(norm(found)) / size,
        }  # fmt: skip

    def _log_probability(self, shift: Tensor, similarity: str) -> Tensor:
        """Return the log-probability of the target ``[n]`` for each phrasing, with a shift in place."""

        def add(output: Tensor) -> Tensor:
            moved = output.clone()
            moved[self.rows, self.at] = moved[self.rows, self.at] + shift.to(output.dtype)
            return moved

        with hooks.on_output(self.module, add):
            embeddings = self._embed(self.texts, self.ends)
        if similarity == "l2":
            scores = -torch.cdist(embeddings, self.candidates, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            one, other = (
                torch.nn.functional.normalize(part, dim=-1) for part in (embeddings, self.candidates)
            )
            scores = 100.0 * one @ other.mT
        return torch.log_softmax(scores, dim=-1)[:, 0]
