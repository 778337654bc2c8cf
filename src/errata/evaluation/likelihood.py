"""Log-probabilities of continuations and of running text, tokenised exactly as written.

``observe`` scores answers after formatted prompts; here nothing is added to a text or removed from it, as tasks
of other tools expect, and texts may be longer than the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from errata.evaluation.observe import LOGITS, SCORE_TOKENS
from errata.host import tokens
from errata.host.generate import generate_rows
from errata.host.host import Host
from errata.progress import OnCount, ignore

Ids = tuple[int, ...]
TokenScores = tuple[tuple[float, ...], tuple[bool, ...]]
"""Per token of a continuation: its log-probability in nats, and whether it was the most probable one."""

WINDOW = 2048
"""Tokens of context for running text where the host sets no bound."""
GENERATE_ROWS = 16
"""Prompts per batch of generation."""


def rolling(host: Host, texts: Sequence[str], *, on_rows: OnCount = ignore) -> list[tuple[float, ...]]:
    """Return the log-probability of every token of each text, in nats.

    The first token follows the begin token (the end token where there is none). A text longer than the
    window is scored in pieces, each token once; the last piece has a whole window of context.
    """
    rows, owners = [], []
    for i, text in enumerate(texts):
        for row in _windows(host, text):
            rows.append(row)
            owners.append(i)
    logprobs: list[list[float]] = [[] for _ in texts]
    for i, (row_logprobs, _) in zip(owners, score(host, rows, on_rows=on_rows), strict=True):
        logprobs[i] += row_logprobs
    return [tuple(row_logprobs) for row_logprobs in logprobs]


def _windows(host: Host, text: str) -> Iterator[tokens.Answer]:
    """Split a text into rows, each with the tokens to score at its end."""
    begin, body = _split_prefix(host, text)
    ids, start = (*begin, *body), len(begin)
    size = host.window or WINDOW
    position = start
    while position < len(ids):
        stop = min(len(ids), position + size if position > start else size + 1)
        first = max(0, stop - size - 1)  # a row of size + 1 ids: the last one is a target only
        yield tokens.Answer(ids[first:stop], position - first)
        position = stop


def _split_prefix(host: Host, text: str) -> tuple[Ids, Ids]:
    """Tokenise a text; return the special tokens before it (at least one id) and its own ids."""
    encoding = host.encode(text)
    first = next((i for i, (a, b) in enumerate(encoding.spans) if b > a), len(encoding.ids))
    begin = encoding.ids[:first] or tokens.encode_prompt(host.tokenizer, "").ids
    return begin, encoding.ids[first:]


def continuation(host: Host, context: str, text: str) -> tokens.Answer:
    """Tokenise a context with its continuation exactly as written; return the ids and where the continuation starts.

    White space at the end of the context belongs to the continuation, and so does a token across the
    border. A row longer than the window is truncated at its beginning.
    """
    context = host.rewritten(context)
    encoding = host.encode(context + text)
    ids, border = encoding.ids, len(context.rstrip())
    start = next((i for i, (a, b) in enumerate(encoding.spans) if b > max(a, border)), len(ids))
    if start == 0:
        begin = tokens.encode_prompt(host.tokenizer, "").ids
        ids, start = (*begin, *ids), len(begin)
    excess = max(0, len(ids) - (host.window or len(ids)) - 1)
    return tokens.Answer(ids[excess:], max(1, start - excess))


def score(
    host: Host, answers: Sequence[tokens.Answer], *,
    on_rows: OnCount = ignore,
) -> list[TokenScores]:  # fmt: skip
    """Return, for each answer's tokens, the log-probability in nats and whether it is the most probable token.

    Answers that differ in their last token only, such as lettered choices, share one row. An answer
    without tokens has empty scores.
    """
    by_row: dict[
        tuple[Ids, int], list[int]
    ] = {}  # by tokens and where the context ends, at which routers decide
    for i, answer in enumerate(answers):
        if answer.target:
            by_row.setdefault((answer.ids[:-1], answer.start), []).append(i)
    rows = list(by_row)
    positions = sum(len(answer.target) for answer in answers)
    density = max(positions, 1) / max(1, sum(len(ids) for ids, _ in rows))  # logits needed per token of a row
    budget = min(SCORE_TOKENS, int(LOGITS / host.vocab_size / density))
    scores: list[TokenScores] = [((), ())] * len(answers)
    completed = 0
    for group in tokens.by_length([ids for ids, _ in rows], budget):
        lines = [(line, i) for line, row in enumerate(group) for i in by_row[rows[row]]]
        for i, answer_scores in zip(
            (i for _, i in lines),
            _score_batch(host, [rows[row] for row in group], lines, answers),
            strict=True,
        ):
            scores[i] = answer_scores
        completed += len(group)
        on_rows(completed, len(rows))
    return scores


@torch.no_grad()
def _score_batch(
    host: Host,
    rows: Sequence[tuple[Ids, int]],
    lines: Sequence[tuple[int, int]],
    answers: Sequence[tokens.Answer],
) -> list[TokenScores]:
    """Run rows and score answers; ``lines``: line in the batch and index of each answer."""
    positions = [(line, at, answers[i].ids[at + 1]) for line, i in lines
                 for at in range(answers[i].start - 1, len(answers[i].ids) - 1)]  # fmt: skip
    line, at, targets = torch.tensor(positions).unbind(1)
    ends = torch.tensor([start - 1 for _, start in rows])
    logprobs = (
        host.forward_at(host.batch([ids for ids, _ in rows]), line, at, ends=ends).float().log_softmax(-1)
    )  # [positions, vocab]
    targets = targets.to(logprobs.device)
    target_logprobs = logprobs.gather(1, targets[:, None])[:, 0].tolist()
    is_greedy = (logprobs.argmax(-1) == targets).tolist()
    scores, begin = [], 0
    for _, i in lines:
        end = begin + len(answers[i].target)
        scores.append((tuple(target_logprobs[begin:end]), tuple(is_greedy[begin:end])))
        begin = end
    return scores


def generate_texts(
    host: Host, prompts: Sequence[str], until: Sequence[str], limit: int, *,
    on_rows: OnCount = ignore,
) -> list[str]:  # fmt: skip
    """Generate greedily at most ``limit`` tokens after each prompt, up to the first of the stop texts ``until``.

    A prompt that leaves no room in the window is truncated at its beginning.
    """
    rows = [tokens.encode_prompt(host.tokenizer, host.rewritten(prompt)).ids for prompt in prompts]
    if host.window is not None:
        limit = min(limit, host.window - 1)
        rows = [row[-(host.window - limit) :] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    texts = [""] * len(rows)
    for begin in range(0, len(order), GENERATE_ROWS):
        group = order[begin : begin + GENERATE_ROWS]
        # the host itself can stop generation at a line break only
        generated = generate_rows(host, [rows[i] for i in group], limit, "line" if "\n" in until else "end")
        for i, text in zip(group, generated, strict=True):
            texts[i] = _until(text, until)
        on_rows(begin + len(group), len(order))
    return texts


def _until(text: str, stops: Sequence[str]) -> str:
    """Truncate a text at the first of some stop texts."""
    positions = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(positions)] if positions else text
