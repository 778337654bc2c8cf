"""What a model makes of two texts that it reads together: the host's states, or a cross-encoder's logit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, tokens
from errata.host.encoder import weights_digest
from errata.host.host import Host
from errata.writing import filled

BATCH_TOKENS = 8192
ROWS = 64
PairScorer = Callable[[Sequence[str], Sequence[str]], Tensor]
"""From the first and the second text of some pairs to a logit of each, float32 ``[n]`` on the CPU."""


@dataclass(frozen=True)
class PairReader:
    """How a fact and a prompt are read together."""

    template: str = "New fact: {fact}\n{prompt}"
    """The text that the host reads, the prompt behind the fact."""
    layer: int = 0
    """Block of the host whose output is taken."""
    model: str | None = None
    """Name or folder of a cross-encoder of transformers that reads the pair instead; None: the host does."""


def read_pairs(host: Host, reader: PairReader, facts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return what is read of pairs of a fact and a prompt, float32 ``[n, d]`` on the CPU.

    Of the host the mean state of the fact's tokens less that of the prompt's tokens behind it, both of unit length; of
    a cross-encoder its logit, d = 1. Raises HostError for a cross-encoder that cannot be opened.
    """
    if reader.model is not None:
        score, _ = open_cross_encoder(reader.model, host.device)
        return score(facts, prompts)[:, None]
    pairs = [_laid_out(host, reader.template, *pair) for pair in zip(facts, prompts, strict=True)]
    block = host.model.get_submodule(host.layout.blocks[reader.layer])
    found = torch.zeros(len(pairs), host.layout.width)
    for group in tokens.by_length([row for row, _ in pairs], BATCH_TOKENS):
        batch, seen = host.batch([pairs[i][0] for i in group]), list[Tensor]()
        with (
            torch.no_grad(), hooks.on_output(block, seen.append), hooks.stop_after(block),
            suppress(hooks.Stopped),
        ):  # fmt: skip
            host.forward(batch, keep=1)
        states = seen[0].reshape(*batch.ids.shape, -1)
        for line, i in enumerate(group):
            own = states[line][batch.mask[line].bool().to(states.device)].float().cpu()  # [tokens, d]
            parts = [(own * of[:, None]).sum(0) for of in pairs[i][1].float()]
            found[i] = functional.normalize(parts[0], dim=0) - functional.normalize(parts[1], dim=0)
    return found


def _laid_out(host: Host, template: str, fact: str, prompt: str) -> tuple[tuple[int, ...], Tensor]:
    """Return the ids of a pair, and which are of the fact and of the prompt, bool ``[2, tokens]``.

    Of what the window does not hold, the first tokens are left out.
    """
    before, _, rest = template.partition("{fact}")
    between, _, _ = rest.partition("{prompt}")
    whole = host.encode(filled(template, fact=fact, prompt=prompt))
    first = len(before), len(before) + len(fact) + len(between)
    last = first[0] + len(fact), first[1] + len(prompt)
    own = [
        [start < stop and start < b and stop > a for start, stop in whole.spans]
        for a, b in zip(first, last, strict=True)
    ]
    room = len(whole.ids) if host.window is None else host.window
    return whole.ids[-room:], torch.tensor(own)[:, -room:]


@lru_cache(maxsize=2)
def open_cross_encoder(name: str, device: torch.device) -> tuple[PairScorer, str]:
    """Open a transformers cross-encoder with one logit by name or folder; also return its checksum.

    Only safetensors are opened, and no code of the model's repository is run. Raises HostError where it cannot be
    opened, or has several logits.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HostError(f"cannot open the cross-encoder {name!r}: {first}") from error
    logits = int(model.config.num_labels)
    if logits != 1:
        raise HostError(
            f"{name} has {logits} logits; expected a cross-encoder with one, which grows with how well two texts match"
        )
    encoder = model.to(device).eval()

    @torch.no_grad()
    def score(facts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        parts = [torch.zeros(0)]
        for begin in range(0, len(facts), ROWS):
            pairs = [list(texts[begin : begin + ROWS]) for texts in (facts, prompts)]
            batch: Mapping[str, Tensor] = tokenizer(
                *pairs, padding=True, truncation=True, return_tensors="pt"
            ).to(device)
            parts.append(encoder(**batch).logits[:, 0].float().cpu())
        return torch.cat(parts)

    return score, weights_digest(encoder)


def pair_digest(host: Host, model: str | None) -> str:
    """Return the checksum of the cross-encoder that reads pairs; empty for the host itself."""
    return "" if model is None else open_cross_encoder(model, host.device)[1]
