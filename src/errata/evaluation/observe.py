"""Ask a host. The only place where evaluation runs a model; nothing is judged here.

Rows are sorted by length and padded on the left in batches of bounded size, so a probe's answer does
not depend on its neighbours beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from errata.host import tokens
from errata.host.load import Host, generate_rows
from errata.types import Observation, Probe

SCORE_TOKENS = 8192
GENERATE_TOKENS = 8192
MAX_NEW_TOKENS = 24

KL_KINDS = frozenset({"neighbourhood"})
"""Kinds whose next-token distribution is kept."""


def observe(
    host: Host,
    probes: Sequence[Probe],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    generate: bool = True,
    batch_tokens: int = SCORE_TOKENS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Observation]:
    """Return what the host says to each probe: greedy text and log-probabilities."""
    prompts = [tokens.encode_prompt(host.tokenizer, probe.prompt).ids for probe in probes]
    answers = [host.encode_answer(p.prompt, p.answers[0]) for p in probes]
    rivals = [None if p.rival is None else host.encode_answer(p.prompt, p.rival) for p in probes]
    scored = _score([*answers, *(r for r in rivals if r is not None)], host, batch_tokens)
    of_answers, of_rivals = scored[: len(answers)], iter(scored[len(answers) :])
    wanted = [i for i, probe in enumerate(probes) if probe.kind in KL_KINDS]
    spread = dict(zip(wanted, _next([prompts[i] for i in wanted], host, batch_tokens), strict=True))
    texts = _texts(prompts, host, max_new_tokens, on_progress) if generate else [""] * len(probes)
    return [
        Observation(
            text=texts[i],
            answer_logprobs=of_answers[i][0],
            answer_top=of_answers[i][1],
            rival_logprobs=() if rivals[i] is None else next(of_rivals)[0],
            next_logprobs=spread.get(i),
        )
        for i in range(len(probes))
    ]


def _texts(
    prompts: Sequence[Sequence[int]], host: Host, limit: int, on_progress: Callable[[int, int], None]
) -> list[str]:
    texts = [""] * len(prompts)
    done = 0
    padded = [[*row, *[0] * limit] for row in prompts]
    for group in tokens.by_length(padded, GENERATE_TOKENS):
        room = limit
        if host.window is not None:
            room = max(1, min(limit, host.window - max(len(prompts[i]) for i in group)))
        for i, text in zip(group, generate_rows(host, [prompts[i] for i in group], room), strict=True):
            texts[i] = text
        done += len(group)
        on_progress(done, len(prompts))
    return texts


def _score(
    rows: Sequence[tokens.Answer], host: Host, budget: int
) -> list[tuple[tuple[float, ...], tuple[bool, ...]]]:
    """Log-probability of each answer token given what stands before it, and whether it came first."""
    found: list[tuple[tuple[float, ...], tuple[bool, ...]]] = [((), ())] * len(rows)
    ids = [row.ids for row in rows]
    for group in tokens.by_length(ids, budget):
        batch = host.batch([ids[i] for i in group], side="left")
        keep = max(len(rows[i].target) for i in group) + 1
        with torch.no_grad():
            logits = host.forward(batch, keep=min(keep, batch.ids.shape[1])).float()
        logprobs = logits.log_softmax(-1)
        for line, i in enumerate(group):
            target = torch.tensor(rows[i].target, device=logprobs.device)
            n = len(rows[i].target)
            at = logprobs[line, -n - 1 : -1]  # [n, vocab]; rows end together
            chosen = at.gather(1, target[:, None])[:, 0]
            found[i] = (tuple(chosen.tolist()), tuple((at.argmax(-1) == target).tolist()))
    return found


def _next(rows: Sequence[Sequence[int]], host: Host, budget: int) -> list[torch.Tensor]:
    """Log-probabilities of the next token after each prompt, float32 on the CPU."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for group in tokens.by_length(rows, budget):
        batch = host.batch([rows[i] for i in group], side="left")
        with torch.no_grad():
            logprobs = host.forward(batch, keep=1)[:, -1].float().log_softmax(-1).cpu()
        for line, i in enumerate(group):
            found[i] = logprobs[line]
    return found


def unique(probes: Iterable[Probe]) -> list[Probe]:
    """Drop repeats, keeping order."""
    return list(dict.fromkeys(probes))
