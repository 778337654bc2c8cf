"""Which of two answers a host prefers to a prompt: yes or no to a question about a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.host import passes, tokens
from errata.host.host import Host
from errata.host.prompts import PromptFormat

BATCH_TOKENS = 8192


@torch.no_grad()
def preference(host: Host, prompts: Sequence[str], first: str, second: str) -> Tensor:
    """Return the probability of the first of two answers to each prompt, float32 ``[n]`` on the CPU.

    That is p(first) / (p(first) + p(second)), each of all its tokens. Prompts are read as they are, whatever the host's
    format and what acts on it at run time; one that the window does not hold gets 0.
    """
    plain = host.with_prompt_format(PromptFormat())
    result = torch.zeros(len(prompts))
    with passes.without_interventions():
        pairs = [tuple(plain.encode_answer(prompt, one) for one in (first, second)) for prompt in prompts]
        held = [
            i
            for i, pair in enumerate(pairs)
            if host.window is None or max(len(answer.ids) for answer in pair) <= host.window
        ]
        if held:
            scores = _scores(plain, [answer for i in held for answer in pairs[i]]).reshape(len(held), 2)
            result[torch.tensor(held)] = torch.sigmoid(scores[:, 0] - scores[:, 1])
    return result


def _scores(host: Host, answers: Sequence[tokens.Answer]) -> Tensor:
    """Return the log-probability of each answer, float32 ``[n]`` on the CPU."""
    scores = torch.zeros(len(answers))
    rows = [answer.ids[:-1] for answer in answers]
    for group in tokens.by_length(rows, BATCH_TOKENS):
        places = [
            (line, at, answers[i].ids[at + 1], i)
            for line, i in enumerate(group)
            for at in range(answers[i].start - 1, len(rows[i]))
        ]
        line, at, target, owner = torch.tensor(places).unbind(1)
        logits = host.forward_at(host.batch([rows[i] for i in group]), line, at).float()
        logprobs = logits.log_softmax(-1).gather(1, target.to(logits.device)[:, None])[:, 0]
        scores.index_add_(0, owner, logprobs.cpu())
    return scores
