"""Log-probabilities of whatever follows whatever: continuations as they are written, and running text.

``observe`` asks about answers after prompts; here texts are taken to the letter, as tasks that were made
for other tools need it, and text of any length is read to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from errata.evaluation.observe import LOGITS, SCORE_TOKENS
from errata.host import tokens
from errata.host.load import Host, generate_rows

Ids = tuple[int, ...]
Said = tuple[tuple[float, ...], tuple[bool, ...]]
"""Per token of a continuation: its log-probability in nats, and whether it was the most probable one."""

WINDOW = 2048
"""Tokens of context for running text where the host sets no bound."""
GENERATE_ROWS = 16
"""Prompts continued together."""


def rolling(
    host: Host, texts: Sequence[str], *, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> list[tuple[float, ...]]:
    """Return the log-probability of every token of each text, in nats; none is left out.

    The first token follows the begin token (the end token where there is none). A text longer than the
    window is read in pieces, each token predicted once; the last piece keeps a whole window of context.
    """
    rows, owners = [], []
    for i, text in enumerate(texts):
        for row in _windows(host, text):
            rows.append(row)
            owners.append(i)
    found: list[list[float]] = [[] for _ in texts]
    for i, (said, _) in zip(owners, score(host, rows, on_rows=on_rows), strict=True):
        found[i] += said
    return [tuple(said) for said in found]


def _windows(host: Host, text: str) -> Iterator[tokens.Answer]:
    """Cut a text into rows whose ends are to be predicted."""
    begin, body = _split_begin(host, text)
    whole, lead = (*begin, *body), len(begin)
    size = host.window or WINDOW
    done = lead
    while done < len(whole):
        end = min(len(whole), done + size if done > lead else size + 1)
        first = max(0, end - size - 1)  # a row of size + 1 ids: the last one is only predicted
        yield tokens.Answer(whole[first:end], done - first)
        done = end


def _split_begin(host: Host, text: str) -> tuple[Ids, Ids]:
    """Tokenise a text; return what stands before it (at least one id) and its own ids."""
    made = host.encode(text)
    own = next((i for i, (a, b) in enumerate(made.spans) if b > a), len(made.ids))
    begin = made.ids[:own] or tokens.encode_prompt(host.tokenizer, "").ids
    return begin, made.ids[own:]


def continuation(host: Host, context: str, text: str) -> tokens.Answer:
    """Tokenise a context with its continuation exactly as they are written, and find where the latter starts.

    White space at the end of the context counts as the continuation's, and so does a token across the
    border. A row longer than the window loses its beginning.
    """
    context = host.rewritten(context)
    made = host.encode(context + text)
    ids, border = made.ids, len(context.rstrip())
    start = next((i for i, (a, b) in enumerate(made.spans) if b > max(a, border)), len(ids))
    if start == 0:
        begin = tokens.encode_prompt(host.tokenizer, "").ids
        ids, start = (*begin, *ids), len(begin)
    cut = max(0, len(ids) - (host.window or len(ids)) - 1)
    return tokens.Answer(ids[cut:], max(1, start - cut))


def score(
    host: Host, asked: Sequence[tokens.Answer], *,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Said]:  # fmt: skip
    """Return, for each answer's tokens, the log-probability in nats and whether the token came first.

    Answers that differ in their last token only, as lettered choices do, are read off one row. An answer
    without tokens has none of either.
    """
    by_row: dict[
        tuple[Ids, int], list[int]
    ] = {}  # by tokens and where the context ends, at which routers decide
    for i, answer in enumerate(asked):
        if answer.target:
            by_row.setdefault((answer.ids[:-1], answer.start), []).append(i)
    rows = list(by_row)
    positions = sum(len(answer.target) for answer in asked)
    density = max(positions, 1) / max(
        1, sum(len(ids) for ids, _ in rows)
    )  # logits wanted for a token that is run
    budget = min(SCORE_TOKENS, int(LOGITS / host.vocab_size / density))
    found: list[Said] = [((), ())] * len(asked)
    done = 0
    for group in tokens.by_length([ids for ids, _ in rows], budget):
        places = [(line, i) for line, row in enumerate(group) for i in by_row[rows[row]]]
        for i, said in zip(
            (i for _, i in places), _read(host, [rows[row] for row in group], places, asked), strict=True
        ):
            found[i] = said
        done += len(group)
        on_rows(done, len(rows))
    return found


@torch.no_grad()
def _read(
    host: Host,
    rows: Sequence[tuple[Ids, int]],
    places: Sequence[tuple[int, int]],
    asked: Sequence[tokens.Answer],
) -> list[Said]:
    """Run rows and read answers off them; ``places``: line and number of each answer."""
    spots = [(line, at, asked[i].ids[at + 1]) for line, i in places
             for at in range(asked[i].start - 1, len(asked[i].ids) - 1)]  # fmt: skip
    line, at, wanted = torch.tensor(spots).unbind(1)
    ends = torch.tensor([start - 1 for _, start in rows])
    logprobs = (
        host.forward_at(host.batch([ids for ids, _ in rows]), line, at, ends=ends).float().log_softmax(-1)
    )  # [spots, vocab]
    wanted = wanted.to(logprobs.device)
    said = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    first = (logprobs.argmax(-1) == wanted).tolist()
    read, begin = [], 0
    for _, i in places:
        end = begin + len(asked[i].target)
        read.append((tuple(said[begin:end]), tuple(first[begin:end])))
        begin = end
    return read


def continued(
    host: Host, prompts: Sequence[str], until: Sequence[str], limit: int, *,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:  # fmt: skip
    """Continue prompts greedily by at most ``limit`` tokens each, up to the first of the stop texts.

    A prompt that leaves no room in the window loses its beginning.
    """
    rows = [tokens.encode_prompt(host.tokenizer, host.rewritten(prompt)).ids for prompt in prompts]
    if host.window is not None:
        limit = min(limit, host.window - 1)
        rows = [row[-(host.window - limit) :] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    texts = [""] * len(rows)
    for begin in range(0, len(order), GENERATE_ROWS):
        group = order[begin : begin + GENERATE_ROWS]
        # a line break is the only stop text the host can end at by itself
        made = generate_rows(host, [rows[i] for i in group], limit, "line" if "\n" in until else "end")
        for i, text in zip(group, made, strict=True):
            texts[i] = _until(text, until)
        on_rows(begin + len(group), len(order))
    return texts


def _until(text: str, stops: Sequence[str]) -> str:
    """Cut a text at the first of some stop texts."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text
