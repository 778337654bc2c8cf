"""Patchscopes: what a state says when another prompt reads it in place of a word.

Source     Ghandeharioun et al., "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language
           Models", ICML 2024, arXiv 2401.06102, Sec. 3
What       The state of a text's last token at a source layer takes the place of one token's state at a target layer of
           a prompt, and the model goes on from there: blocks from the target layer up, then the next tokens. All pairs
           of layers are read. The logit lens is the special case of the last layer and the prompt's last token.
Departs    Model and prompt are the same model's, and states are put in as they are: no map between layers, no scaling
           to the target's norm. The whole row is run again for each token that is written, with the state in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host.host import Host
from errata.host.prefix import plain_prefix
from errata.inspect.facts import fact
from errata.inspect.lens import Lens

PLACEHOLDER = "x"
"""The word whose state is replaced."""
SLOT = "{}"


@dataclass(frozen=True)
class Target:
    """A prompt with a word that a state takes the place of."""

    text: str
    ids: tuple[int, ...]
    place: int
    """Index of the word's last token."""


def target(host: Host, text: str, word: str = PLACEHOLDER) -> Target:
    """Tokenise a prompt in which ``{}`` stands for the word. Raises RequestError without exactly one ``{}``."""
    if text.count(SLOT) != 1:
        raise RequestError(f"{text!r} needs one {SLOT}, the place that the state is put in")
    found = fact(host, text, word)
    return Target(found.text, found.ids, found.place[-1])


@torch.no_grad()
def patched(lens: Lens, rows: Sequence[Sequence[int]], place: int, layer: int, states: Tensor) -> Tensor:
    """Return the logits after rows of one length with states ``[rows, d]`` at a token and layer, ``[rows, vocab]``.

    ``layer``: from 1, the output of block ``layer - 1``.
    """
    if not 1 <= layer <= lens.depth:
        raise RequestError(f"a state is put in at layers 1 to {lens.depth}, found {layer}")
    below = torch.stack([own[layer] for own in lens.states(rows)])  # [rows, length, d]
    below[:, place] = states.to(below)
    batch = lens.host.batch(rows)
    at = torch.arange(len(rows), device=batch.ids.device), torch.full((len(rows),), batch.ids.shape[1] - 1)
    logits = lens.runner.run(batch, plain_prefix().at_depth(layer, below), at=at).logits
    assert logits is not None
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


@dataclass(frozen=True, eq=False)
class Scope:
    """What a prompt makes of a text's states, by source layer (0: word embeddings) and target layer (from 1)."""

    source: str
    target: Target
    answer: int
    plain: float
    """The answer's probability in the prompt with the text itself in place of the word."""
    logs: Tensor
    """Log probabilities of the first token, float32 ``[layers + 1, layers, vocab]``."""
    texts: tuple[tuple[str, ...], ...]
    """What the model goes on to write."""

    @property
    def rank(self) -> Tensor:
        """Return the answer's rank, 0 for the first choice, int64 ``[layers + 1, layers]``."""
        return (self.logs > self.logs[..., self.answer, None]).sum(-1)

    def to_dict(self, host: Host) -> dict[str, Any]:
        """Return it as plain data."""
        probability = self.logs[..., self.answer].exp()
        return {
            "source": self.source, "target": self.target.text, "into": self.target.place,
            "answer": {
                "token": str(host.tokenizer.decode([self.answer])), "id": self.answer, "plain": round(self.plain, 6),
            },
            "probability": [[round(value, 6) for value in row] for row in probability.tolist()],
            "rank": self.rank.tolist(), "texts": [list(row) for row in self.texts],
        }  # fmt: skip


@torch.no_grad()
def scope(lens: Lens, source: str, into: str, *, answer: str | None = None, tokens: int = 4) -> Scope:
    """Put the states of a text's last token into a prompt, at every pair of layers, and write ``tokens`` tokens.

    ``into``: the prompt, with ``{}`` where the state goes. ``answer``: whose first token is followed; None: the
    model's first choice in the prompt with the text in that place. Raises RequestError for a prompt without ``{}``.
    """
    host, goal = lens.host, target(lens.host, into)
    states = lens.states([host.encode_base(source)])[0][:, -1]  # [layers + 1, d]
    whole = into.replace(SLOT, source)
    last = host.forward(host.batch([host.encode_base(whole)]), keep=1)[0, -1].float().log_softmax(-1)
    token = int(last.argmax()) if answer is None else host.encode_answer(whole, answer).target[0]
    logs, texts = [], []
    for layer in range(1, lens.depth + 1):
        rows = [list(goal.ids) for _ in states]
        first: Tensor | None = None
        for _ in range(tokens):
            logits = patched(lens, rows, goal.place, layer, states)
            first = logits.log_softmax(-1) if first is None else first
            for row, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(best)
        assert first is not None
        logs.append(first)
        texts.append([str(host.tokenizer.decode(row[len(goal.ids) :])) for row in rows])
    by_source = tuple(zip(*texts, strict=True))
    return Scope(source, goal, token, float(last[token].exp()), torch.stack(logs, 1), by_source)
