"""Ask a host. The only place where evaluation runs a model; nothing is judged here.

Rows are sorted by length and padded in batches of bounded size, so a probe's answer does not depend
on its neighbours beyond rounding. What several probes ask alike is run once: a prompt is continued
once, and what follows a text is read off any row that begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from errata.host import tokens
from errata.host.load import Host, generate_rows
from errata.types import Observation, Probe

Ids = tuple[int, ...]

SCORE_TOKENS = 8192
GENERATE_TOKENS = 8192
MAX_NEW_TOKENS = 24

TEXT_TOKENS = 256
"""Tokens of a running text that are scored; the rest is left."""
LOGITS = 2**27
"""How many logits of running text are held at once: half a gigabyte in float32."""

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
    answers = [_answer(host, p.prompt, p.answers[0]) for p in probes]
    rivals = [None if p.rival is None else _answer(host, p.prompt, p.rival) for p in probes]
    after = _After(host, batch_tokens)
    for answer in (*answers, *(rival for rival in rivals if rival is not None)):
        after.ask(answer)
    for prompt, probe in zip(prompts, probes, strict=True):
        if probe.kind in KL_KINDS:
            after.ask_all(prompt)
    after.run()
    texts = _texts(prompts, host, max_new_tokens, on_progress) if generate else [""] * len(probes)
    seen = []
    for probe, prompt, answer, rival, text in zip(probes, prompts, answers, rivals, texts, strict=True):
        said, top = after.of(answer)
        against = () if rival is None else after.of(rival)[0]
        spread = after.spread[prompt] if probe.kind in KL_KINDS else None
        seen.append(Observation(text, said, top, against, spread))
    return seen


def _answer(host: Host, prompt: str, answer: str) -> tokens.Answer:
    """Tokenise an answer after its prompt, with at least one token before it."""
    made = host.encode_answer(prompt, answer)
    if made.start:
        return made
    begin = tokens.encode_prompt(host.tokenizer, prompt).ids
    return tokens.Answer((*begin, *made.ids), len(begin))


def _texts(
    prompts: Sequence[Ids], host: Host, limit: int, on_progress: Callable[[int, int], None]
) -> list[str]:
    different = list(dict.fromkeys(prompts))
    texts: dict[Ids, str] = {}
    padded = [[*row, *[0] * limit] for row in different]
    for group in tokens.by_length(padded, GENERATE_TOKENS):
        rows = [different[i] for i in group]
        room = limit
        if host.window is not None:
            room = max(1, min(limit, host.window - max(map(len, rows))))
        texts.update(zip(rows, generate_rows(host, rows, room), strict=True))
        on_progress(len(texts), len(different))
    return [texts[prompt] for prompt in prompts]


class _After:
    """What comes after texts: collects what is asked, runs it together, holds what was found.

    A causal model says the same after a text whatever follows it in the row. So only texts that no
    other text goes on from are run, and the others are read off those.
    """

    def __init__(self, host: Host, budget: int) -> None:
        self.host, self.budget = host, budget
        self.spread: dict[Ids, Tensor] = {}
        """By text, log-probabilities of the next token, float32 ``[vocab]`` on the CPU."""
        self._tokens: dict[Ids, set[int]] = {}
        self._whole: set[Ids] = set()
        self._found: dict[tuple[Ids, int], tuple[float, bool]] = {}

    def ask(self, answer: tokens.Answer) -> None:
        """Ask for each token of an answer, given what stands before it."""
        for end in range(answer.start, len(answer.ids)):
            self._tokens.setdefault(answer.ids[:end], set()).add(answer.ids[end])

    def ask_all(self, text: Ids) -> None:
        """Ask for the whole distribution after a text."""
        self._tokens.setdefault(text, set())
        self._whole.add(text)

    def of(self, answer: tokens.Answer) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Return each answer token's log-probability in nats, and whether it came first."""
        places = range(answer.start, len(answer.ids))
        found = [self._found[answer.ids[:end], answer.ids[end]] for end in places]
        return tuple(logprob for logprob, _ in found), tuple(first for _, first in found)

    def run(self) -> None:
        """Run the host on all that was asked."""
        ends = _rows(self._tokens)
        rows = list(ends)
        for group in tokens.by_length(rows, self.budget):
            texts = [(line, rows[i][:end]) for line, i in enumerate(group) for end in ends[rows[i]]]
            line = torch.tensor([line for line, _ in texts])
            last = torch.tensor([len(text) - 1 for _, text in texts])
            with torch.no_grad():
                logits = self.host.forward_at(self.host.batch([rows[i] for i in group]), line, last)
            self._read([text for _, text in texts], logits.float().log_softmax(-1))

    def _read(self, texts: Sequence[Ids], logprobs: Tensor) -> None:
        pairs = [(i, text, token) for i, text in enumerate(texts) for token in self._tokens[text]]
        if pairs:
            row = torch.tensor([i for i, _, _ in pairs], device=logprobs.device)
            token = torch.tensor([token for _, _, token in pairs], device=logprobs.device)
            first = logprobs.argmax(-1)[row] == token
            values = zip(logprobs[row, token].tolist(), first.tolist(), strict=True)
            for (_, text, wanted), value in zip(pairs, values, strict=True):
                self._found[text, wanted] = value
        for i, text in enumerate(texts):
            if text in self._whole:
                self.spread[text] = logprobs[i].cpu()


def _rows(texts: Iterable[Ids]) -> dict[Ids, list[int]]:
    """Find the texts that begin no other one; with each, the lengths at which texts are read off it.

    In sorted order all that goes on from a text follows it at once.
    """
    rows: dict[Ids, list[int]] = {}
    row: Ids = ()
    for text in sorted(texts, reverse=True):
        if row[: len(text)] != text:
            row = text
        rows.setdefault(row, []).append(len(text))
    return rows


def logprobs(host: Host, texts: Sequence[str], *, batch_tokens: int = SCORE_TOKENS) -> list[Tensor]:
    """Return each text's log-probabilities per token given what stands before, in nats.

    float32 ``[tokens - 1]`` on the CPU, in the order of the texts. The first token, which is the begin
    token where the tokenizer sets one, is given and not scored; texts are cut to the window and to
    ``TEXT_TOKENS``, and a text of fewer than two tokens gives none.
    """
    limit = min(TEXT_TOKENS, host.window or TEXT_TOKENS)
    rows = [host.encode(text).ids[:limit] for text in texts]
    wanted = [i for i, row in enumerate(rows) if len(row) > 1]
    budget = max(limit, min(batch_tokens, LOGITS // host.config.vocab_size))
    found = [torch.empty(0)] * len(rows)
    for places in tokens.by_length([rows[i] for i in wanted], budget):
        group = [wanted[place] for place in places]
        batch = host.batch([rows[i] for i in group])
        with torch.no_grad():
            spread = host.forward(batch).float().log_softmax(-1)
        said = spread[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0].cpu()
        for line, i in enumerate(group):
            found[i] = said[line, : len(rows[i]) - 1]
    return found


def unique(probes: Iterable[Probe]) -> list[Probe]:
    """Drop repeats, keeping order."""
    return list(dict.fromkeys(probes))
