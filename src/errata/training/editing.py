"""What an editor is trained on and measured by: prompts in an edit's scope, and others that it must not change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from errata.host.host import Host
from errata.host.tokens import Answer
from errata.locate.gradients import FLOAT16_LOSS_SCALE
from errata.training.examples import Example
from errata.training.factors import Change, beside
from errata.training.gradients import sum_gradients
from errata.training.tune import Line
from errata.training.workers import ALONE, Workers
from errata.types import Request


@dataclass(frozen=True)
class Item:
    """An example as the model reads it."""

    request: Request
    old: str
    """Its old answer."""
    answer: Answer
    """The request with its target: what the editor reads."""
    inside: tuple[Line, ...]
    """Prompts in scope with the edit's answer, the request's own first."""
    outside: tuple[Line, ...]
    """Prompts that the edit must not change, each with an answer, at whose tokens it is compared with the host."""
    own: Line | None
    """The request's prompt with its old answer: for other examples, one more prompt out of scope."""
    entailed: tuple[Line, ...] = ()
    """Prompts about what follows, each with what is then true."""


@dataclass(frozen=True)
class Sample:
    """What a step asks about one example."""

    item: Item
    inside: tuple[Line, ...]
    outside: tuple[Line, ...]
    """Out of scope: the example's own, then those of other examples."""
    others: int
    """How many of these are of other examples."""


@dataclass(frozen=True)
class Sampling:
    """How many prompts a step asks about each example."""

    inside: int
    """In scope: in other words than the request's where there are any, else the request itself."""
    outside: int
    """Out of scope, of the example."""
    others: int
    """Other examples' requests."""
    request: float
    """Share of the samples in which one of the prompts in scope is the request itself."""

    @property
    def prompts(self) -> int:
        """How many prompts are asked about an example at most, one at least."""
        return max(1, self.inside + self.outside + self.others)


def line_of(host: Host, prompt: str, answer: str) -> Line | None:
    """Return a prompt with its answer; None where it is longer than the model's window or has no token of its own."""
    row = host.encode_answer(prompt, answer)
    short = host.window is None or host.length(row.ids) <= host.window
    if row.start < 1 or not row.target or not short:
        return None
    return Line(row.ids[:-1], tuple(range(row.start - 1, len(row.ids) - 1)), row.target)


def items_of(host: Host, examples: Sequence[Example], old: Mapping[str, str]) -> list[Item]:
    """Return examples as the model reads them, but for those that no window holds.

    ``old``: what the host answers to requests that do not say it, by prompt.
    """
    items = []
    for example in examples:
        request = example.request
        inside = _lines(host, example.inside)
        if not inside:
            continue
        answer = request.target_old or old[request.text]
        row = host.encode_answer(request.text, request.target)
        outside = _lines(host, tuple(zip(example.outside, example.answers, strict=True)))
        own = line_of(host, request.text, answer) if answer else None
        items.append(Item(request, answer, row, inside, outside, own, _lines(host, example.entailed)))
    return items


@torch.no_grad()
def with_own_choices(host: Host, items: Sequence[Item], rows: int) -> list[Item]:
    """Return items whose prompts out of scope have, as targets, the host's first choice at each token.

    An edit leaves such a prompt alone where the first choices stay what they are, whatever they were.
    """
    lines = [line for item in items for line in item.outside]
    chosen: dict[Line, Line] = {}
    for first in range(0, len(lines), rows):
        part = lines[first : first + rows]
        best = log_probabilities(host, part)[0].argmax(-1).split([len(line.at) for line in part])
        chosen |= {
            line: replace(line, targets=tuple(own.tolist())) for line, own in zip(part, best, strict=True)
        }
    return [replace(item, outside=tuple(chosen[line] for line in item.outside)) for item in items]


def _lines(host: Host, pairs: Sequence[tuple[str, str]]) -> tuple[Line, ...]:
    return tuple(line for line in (line_of(host, *pair) for pair in pairs) if line is not None)


def draw(
    items: Sequence[Item], chosen: Sequence[int], sampling: Sampling, rng: random.Random
) -> list[Sample]:
    """Return what a step asks about the chosen items."""
    samples = []
    for number in chosen:
        item = items[number]
        words = item.inside[1:] or item.inside
        inside = [words[i] for i in sorted(rng.sample(range(len(words)), min(sampling.inside, len(words))))]
        if rng.random() < sampling.request:
            inside[0] = item.inside[0]
        count = min(sampling.outside, len(item.outside))
        outside = [item.outside[i] for i in sorted(rng.sample(range(len(item.outside)), count))]
        for other in rng.sample(range(len(items)), min(sampling.others, len(items))):
            line = items[other].own
            if line is not None and other != number and line.ids not in {one.ids for one in item.inside}:
                outside.append(line)
        samples.append(Sample(item, tuple(inside), tuple(outside), len(outside) - count))
    return samples


def apart(host: Host, samples: Sequence[Sample]) -> list[Sample]:
    """Return samples whose edits are in place together, without prompts out of scope that another's edit may change."""
    outside = _apart(host, [sample.item for sample in samples], [sample.outside for sample in samples])
    return [
        replace(
            sample,
            outside=tuple(line for _, line in kept),
            others=sum(place >= len(sample.outside) - sample.others for place, _ in kept),
        )
        for sample, kept in zip(samples, outside, strict=True)
    ]


def items_apart(host: Host, items: Sequence[Item]) -> list[Item]:
    """Return items whose edits are in place together, without prompts out of scope that another's edit may change."""
    outside = _apart(host, items, [item.outside for item in items])
    return [
        replace(item, outside=tuple(line for _, line in kept))
        for item, kept in zip(items, outside, strict=True)
    ]


def _apart(
    host: Host, items: Sequence[Item], lines: Sequence[Sequence[Line]]
) -> list[list[tuple[int, Line]]]:
    """Return of each item's lines, with their places, those that are not in another's scope nor name its subject."""
    asked = Counter(prompt for item in items for prompt in {prompt_of(line) for line in item.inside})
    subjects = {item.request.subject for item in items} - {None}
    result: list[list[tuple[int, Line]]] = []
    for item, own in zip(items, lines, strict=True):
        mine = {prompt_of(line) for line in item.inside}
        texts = [host.codec.text_of(prompt_of(line)) for line in own]
        others = [name for name in subjects if name is not None and name != item.request.subject]
        result.append([
            (place, line)
            for place, (line, text) in enumerate(zip(own, texts, strict=True))
            if asked[prompt_of(line)] == (prompt_of(line) in mine) and not any(name in text for name in others)
        ])  # fmt: skip
    return result


def prompt_of(line: Line) -> tuple[int, ...]:
    """Return a line's tokens up to the one that predicts the first of its answer; of a classifier's text, all."""
    return line.ids[: line.at[0] + 1] if line.at else line.ids


# --- losses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Of each of some edits."""

    edit: Tensor
    """Negative log-likelihood of the answers in scope, in nats per token ``[n]``."""
    locality: Tensor
    """KL divergence from the unedited host's answers out of scope, in nats per token ``[n]``."""


def log_probabilities(host: Host, lines: Sequence[Line]) -> tuple[Tensor, Tensor]:
    """Return the log probabilities that predict each line's answer ``[t, vocab]``, and the line of each ``[t]``."""
    row = torch.tensor([i for i, line in enumerate(lines) for _ in line.at])
    at = torch.tensor([place for line in lines for place in line.at])
    ends = torch.tensor([line.at[0] for line in lines])
    logits = host.forward_at(host.batch([line.ids for line in lines]), row, at, ends=ends)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1), row.to(logits.device)


def losses_of(
    host: Host, inside: Sequence[Sequence[Line]], outside: Sequence[Sequence[Line]],
    changes: Mapping[str, Change], edits: Sequence[int] | None = None, before: Tensor | None = None,
) -> Losses:  # fmt: skip
    """Return the losses of edits with their changes beside the weights; gradients reach the changes.

    ``inside``, ``outside``: by edit, what is asked about it. ``edits``: the owner of each edit's products in the
    changes; None: its number. ``before``: the log probabilities of the unedited host at all tokens out of scope
    ``[t, vocab]``; None: the host as it is is asked, without gradients.
    """
    numbers = range(len(inside)) if edits is None else edits
    near, near_edit = _flat(inside)
    far, far_edit = _flat(outside)
    if before is None and far:
        with torch.no_grad():
            before = log_probabilities(host, far)[0]
    owners = [numbers[edit] for edit in (*near_edit, *far_edit)]
    with beside(host, changes, by_row(host, [*near, *far], owners)):
        after, row = log_probabilities(host, [*near, *far])
    targets = torch.tensor([t for line in near for t in line.targets], device=after.device)
    count = len(targets)
    nll = -after[torch.arange(count, device=after.device), targets]
    edit = _means(nll, row[:count], near, near_edit, len(inside))
    if before is None or not far:
        return Losses(edit, torch.zeros_like(edit))
    kl = functional.kl_div(after[count:], before, reduction="none", log_target=True).sum(-1)
    return Losses(edit, _means(kl, row[count:] - len(near), far, far_edit, len(inside)))


ChangesOf = Callable[[Sequence[Item]], Mapping[str, Change]]
"""The changes of some items, each product owned by the item's number, or all by 0 where they are one edit."""


def gradients_of(
    host: Host, samples: Sequence[Sample], variables: Sequence[Tensor], changes_of: ChangesOf,
    weights: tuple[float, float], *, batch: int, one: bool = False,
    before: Sequence[Tensor | None] | None = None, workers: Workers = ALONE,
) -> tuple[list[tuple[float, float]], list[Tensor]]:  # fmt: skip
    """Return each sample's losses in scope and out of it, and the gradients of their weighted mean ``[...]``.

    ``variables``: what it is differentiated for. ``weights``: of the two losses. ``batch``: samples run at once, fewer
    where memory runs out. ``one``: whether the changes are one edit's. ``before``: by sample, the log probabilities of
    the unedited host at its tokens out of scope ``[t, vocab]``; None: as of :func:`losses_of`. ``workers``: the
    processes that share the samples; each gets the whole result.
    """
    scale = loss_scale(host)

    def loss_of(numbers: Sequence[int]) -> tuple[Tensor, list[tuple[float, float]]]:
        some = [samples[i] for i in numbers]
        known = [] if before is None else [part for part in (before[i] for i in numbers) if part is not None]
        parts = losses_of(
            host, [s.inside for s in some], [s.outside for s in some], changes_of([s.item for s in some]),
            [0] * len(some) if one else None, torch.cat(known) if known else None,
        )  # fmt: skip
        whole = weights[0] * parts.edit + weights[1] * parts.locality
        facts = list(zip(parts.edit.tolist(), parts.locality.tolist(), strict=True))
        return scale * whole.sum() / len(samples), facts

    own, gradients = sum_gradients(workers.share(range(len(samples))), variables, loss_of, batch=batch)
    workers.add_up_(gradients)
    facts = [(edit, locality) for edit, locality in workers.rows(own, len(samples))]
    return facts, [gradient / scale for gradient in gradients]


def means(facts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the means of the losses in scope and out of it."""
    edit, locality = (sum(values) / len(facts) for values in zip(*facts, strict=True))
    return edit, locality


def by_row(host: Host, lines: Sequence[Line], owners: Sequence[int]) -> list[int]:
    """Return the owner of each row of the pass that lines are run in, from the owner of each line.

    A host that fills places runs a row for every token that a line predicts, others one for every line.
    """
    return [
        owner for line, owner in zip(lines, owners, strict=True) for _ in (line.at if host.fills else (0,))
    ]


def _flat(groups: Sequence[Sequence[Line]]) -> tuple[list[Line], list[int]]:
    """Return all lines, and the group of each."""
    return [line for group in groups for line in group], [i for i, group in enumerate(groups) for _ in group]


def _means(values: Tensor, row: Tensor, lines: Sequence[Line], groups: Sequence[int], count: int) -> Tensor:
    """Return each group's mean over its lines of the mean over a line's tokens ``[count]``."""
    size = torch.tensor([groups.count(group) for group in groups], dtype=values.dtype)
    share = 1 / (size * torch.tensor([len(line.at) for line in lines]))
    group = torch.tensor(groups, device=values.device)
    return values.new_zeros(count).index_add(0, group[row], values * share.to(values.device)[row])


def loss_scale(host: Host) -> float:
    """Return what a loss is multiplied by before it is differentiated, since gradients underflow in float16."""
    return FLOAT16_LOSS_SCALE if host.dtype == torch.float16 else 1.0


# --- validation -----------------------------------------------------------------------------


@torch.no_grad()
def validate(
    host: Host, items: Sequence[Item], changes_of: ChangesOf, *, together: int, rows: int, one: bool
) -> dict[str, float]:
    """Return shares of prompts, asked with edits in place: answered as the edit says in scope, and as before out of it.

    An answer counts where each of its tokens is the first choice after those before it. ``success``: the requests;
    ``paraphrase``: other prompts in scope; ``drawdown``: answers out of scope that changed, of items as of
    :func:`with_own_choices`; ``score``: the mean over all prompts in scope times what is left. ``together``: items in
    place at once, ``one``: as one edit.
    """
    hits: dict[str, list[bool]] = {"success": [], "paraphrase": [], "kept": []}
    for first in range(0, len(items), together):
        group = items_apart(host, items[first : first + together]) if one else items[first : first + together]
        changes = changes_of(group)
        asked = [
            (kind, 0 if one else i, line)
            for i, item in enumerate(group)
            for kind, lines in (
                ("success", item.inside[:1]), ("paraphrase", item.inside[1:]), ("kept", item.outside),
            )
            for line in lines
        ]  # fmt: skip
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            lines = [line for _, _, line in part]
            with beside(host, changes, by_row(host, lines, [edit for _, edit, _ in part])):
                right = answered(host, lines)
            for (kind, _, _), hit in zip(part, right, strict=True):
                hits[kind].append(hit)
    shares = {kind: sum(found) / len(found) if found else 1.0 for kind, found in hits.items()}
    inside = [*hits["success"], *hits["paraphrase"]]
    score = sum(inside) / len(inside) * shares["kept"]
    return {
        "success": shares["success"], "paraphrase": shares["paraphrase"], "drawdown": 1 - shares["kept"],
        "score": score,
    }  # fmt: skip


@torch.no_grad()
def answered(host: Host, lines: Sequence[Line]) -> list[bool]:
    """Tell of each line whether all tokens of its answer are the host's first choice after those before them."""
    scores, row = log_probabilities(host, lines)
    targets = torch.tensor([t for line in lines for t in line.targets], device=scores.device)
    wrong = (scores.argmax(-1) != targets).to(torch.long)
    return (
        torch.zeros(len(lines), dtype=torch.long, device=row.device).index_add(0, row, wrong) == 0
    ).tolist()
