"""Which feed-forward neurons an answer hangs on: integrated gradients of its probability.

A neuron is an entry of a down-projection's input w ``[d_in]`` (behind the activation; for gated
feed-forwards behind the product with the gate), at the position that predicts a token t. Along the
straight path from no activation to the full one, all neurons of a layer scaled together,

    attribution_i = w_i / T * sum over points a of dp(t | x) / dw_i at a w       (Dai et al. 2022, Sec. 3.2)

with T points a. ``right``: k/T for k = 1 to T, as the paper's equation has it. ``left``: (k - 1)/T, as
its code has it. ``midpoint``: (k - 1/2)/T, whose error falls with 1/T^2 and not 1/T. As T grows the
attributions of one layer add up to p(t | x) with the layer's neurons less p(t | x) without them: slowly
where a norm stands behind the projection, which undoes the scaling until near zero.

A path at one layer leaves all below it alone: the text is run once, and every point starts from the
states kept there. At the projection the path is a shift of its output by (a - 1) W w, so gradients are
taken with respect to that output, summed over points, and multiplied by W once. The gradient of p is
p times that of log p, which does not vanish in 16 bits where p is small.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from errata.errors import HostError, RequestError
from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.host.partial import Partial, Past, Tokens, align, can_reuse, nothing_before
from errata.locate.keys import BATCH_TOKENS, tokens_batches

Rule = Literal["right", "left", "midpoint"]
Tick = Callable[[int, int], None]


class Neuron(NamedTuple):
    """An entry of a layer's down-projection input, and the weight's column that goes with it."""

    layer: int
    index: int


@dataclass(frozen=True)
class Question:
    """A text whose next token is to be explained."""

    ids: tuple[int, ...]
    """The text up to the position that predicts; causality makes what follows immaterial."""
    token: int
    """The token whose probability is attributed."""


def questions(host: Host, prompt: str, answer: str | Sequence[int]) -> list[Question]:
    """Ask for every token of an answer behind a prompt, each at its own position.

    An answer of token ids is put behind the prompt's as it is. Raises RequestError for an answer
    without tokens, or with no token before it.
    """
    if isinstance(answer, str):
        made = host.encode_answer(prompt, answer)
        ids, start = made.ids, made.start
    else:
        head = host.encode_base(prompt, slots=len(answer))
        ids, start = (*head, *answer), len(head)
    if start == 0 or start == len(ids):
        raise RequestError(
            f"the answer {answer!r} needs a token of its own and one before it, after {prompt!r}; "
            "use a longer prompt"
        )
    return [Question(ids[:at], ids[at]) for at in range(start, len(ids))]


def said(host: Host, prompt: str, count: int) -> tuple[int, ...]:
    """Return the tokens, so many, with which the host goes on from a prompt by itself."""
    ids = list(host.encode_base(prompt, slots=count))
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(host.forward(host.batch([ids]), keep=1)[0, -1].argmax()))
    return tuple(ids[-count:])


def attribute(
    host: Host,
    asked: Sequence[Question],
    sites: Sequence[Site],
    *,
    steps: int = 20,
    rule: Rule = "right",
    on_layer: Tick = lambda done, total: None,
) -> dict[Site, Tensor]:
    """Attribute each question's probability to the neurons of each site, float64 ``[n, d_in]``.

    ``steps`` is T; ``on_layer`` is told how many layers are done, and of how many. The host is left as
    it was.
    """
    found = {site: torch.zeros(len(asked), site.d_in, dtype=torch.float64) for site in sites}
    points = _points(steps, rule)
    groups = tokens_batches([q.ids for q in asked])
    with hooks.frozen(host.model):
        for turn, group in enumerate(groups):
            state = _freeze(host, [asked[i] for i in group], sites)
            for done, site in enumerate(sites):
                found[site][group] = _along_the_path(host, state, site, points)
                on_layer(turn * len(sites) + done + 1, len(groups) * len(sites))
    return found


def _points(steps: int, rule: Rule) -> Tensor:
    """Points of the path in [0, 1], float64 ``[T]``."""
    first = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (torch.arange(steps, dtype=torch.float64) + first) / steps


@dataclass(frozen=True)
class _State:
    """A batch of questions and what one clean run of it leaves below every site.

    Only the last token of a text predicts, so where tokens may stand in a cache it is the only one that is
    run again; the others are its past.
    """

    partial: Partial
    tokens: Tokens
    past: Past
    at: Tensor
    """Column that predicts ``[n]``."""
    token: Tensor
    """Token to predict ``[n]``."""
    blocks: dict[int, Tensor]
    """Output of each block ``[n, columns, d]``."""
    keys: dict[Site, Tensor]
    """Input of each site at the position ``[n, d_in]``."""

    def rows(self, chosen: Tensor) -> tuple[Tokens, Past]:
        """Return tokens and past of some rows, each as often as it is chosen."""
        return self.tokens.rows(chosen), Past(self.past.states, self.past.mask, chosen)


def _freeze(host: Host, asked: Sequence[Question], sites: Sequence[Site]) -> _State:
    """Run texts once up to the highest site and keep the states on the way."""
    count = len(asked)
    inputs = [host.reading(q.ids) for q in asked]
    places = [column for _, column in inputs]
    reuse = not host.fills and can_reuse(host, max(places) + 1)
    tokens, column = align(host, [ids for ids, _ in inputs], places, [0] * count, left=reuse)
    at = torch.tensor([column if reuse else place for place in places], device=host.device)
    line = torch.arange(count, device=host.device)
    keys: dict[Site, Tensor] = {}

    def keep_key(site: Site) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            shaped = tensor.detach().reshape(count, -1, site.d_in)
            keys[site] = shaped[line.to(tensor.device), at.to(tensor.device)]

        return keep

    partial = Partial(host)
    every = range(len(partial.blocks))
    before = nothing_before(host, count)
    top = every[-1] if reuse else max(site.layer for site in sites)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooks.on_input(host.model.get_submodule(site.name), keep_key(site)))
        ran = partial.run(
            tokens, before, keep=range(top), remember=every if reuse else (), stop=partial.blocks[top]
        )
    token = torch.tensor([q.token for q in asked], device=host.device)
    if not reuse:
        return _State(partial, tokens, before, at, token, ran.states, keys)
    blocks = {block: states[:, column:] for block, states in ran.states.items()}
    past = before.followed_by(ran.past, tokens, column)
    return _State(partial, tokens.columns(column), past, at - column, token, blocks, keys)


def _along_the_path(host: Host, state: _State, site: Site, points: Tensor) -> Tensor:
    """Attribute at one site: keys times the mean of dp/dw over the points, float64 ``[n, d_in]``."""
    weight = host.weight(site)  # [d_out, d_in]
    wide = torch.promote_types(weight.dtype, torch.float32)
    keys = state.keys[site].to(wide)
    written = keys @ weight.to(wide).mT  # [n, d_out], without bias
    count = len(state.token)
    total = torch.zeros(count, site.d_out, dtype=torch.float64)
    line = torch.arange(count).repeat_interleave(len(points))
    scale = points.repeat(count)
    per = max(1, BATCH_TOKENS // state.tokens.ids.shape[1])
    for first in range(0, len(line), per):
        rows = line[first : first + per]
        share = (scale[first : first + per] - 1).to(device=written.device, dtype=wide)
        shift = share[:, None] * written[rows.to(written.device)]
        total.index_add_(0, rows, _gradient(host, state, site, rows, shift))
    mean = (total / len(points)).to(device=weight.device, dtype=wide)
    return (keys.double() * (mean @ weight.to(wide)).double()).cpu()


def _gradient(host: Host, state: _State, site: Site, rows: Tensor, shift: Tensor) -> Tensor:
    """Return dp/dy for rows whose site output y is shifted at the position, float64 ``[rows, d_out]``."""
    rows = rows.to(host.device)
    line = torch.arange(len(rows), device=host.device)
    tokens, past = state.rows(rows)
    at, token = state.at[rows], state.token[rows]

    def push(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(len(rows), -1, site.d_out)
        place = (line.to(flat.device), at.to(flat.device))
        full = torch.zeros_like(flat).index_put(place, shift.to(device=flat.device, dtype=flat.dtype))
        return (flat + full).reshape(hidden.shape)

    below = state.blocks[site.layer - 1] if site.layer else None
    given = None if below is None else below[rows.to(below.device)]
    shift.requires_grad_(True)
    with torch.enable_grad(), hooks.on_output(host.model.get_submodule(site.name), push):
        logits = state.partial.run(tokens, past, first=site.layer, given=given, at=(line, at)).logits
        assert logits is not None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        known = wide.log_softmax(-1).gather(1, token.to(wide.device)[:, None])[:, 0]
        (slope,) = torch.autograd.grad(known.sum(), shift)
    return known.detach().cpu().double().exp()[:, None] * slope.cpu().double()


# --- choosing -------------------------------------------------------------------------------


def coarse(scores: Mapping[Site, Tensor], *, threshold: float) -> dict[Neuron, float]:
    """Choose the neurons of all sites that score above a share of the largest score.

    ``scores`` holds ``[d_in]`` per site. Where none does, because no score is positive, the best neuron
    stands alone. Raises HostError for scores that are not finite or all zero.
    """
    top = {site: float(score.max()) for site, score in scores.items()}
    if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
        raise HostError("attributions hold NaN or infinite numbers; load the model in float32")
    if not any(bool(score.any()) for score in scores.values()):
        raise HostError(
            "no feed-forward neuron has any part in the answer's probability: all attributions are 0. "
            "Check that the answer is one the host may give, and load the model in float32"
        )
    site = max(top, key=lambda s: top[s])
    best = top[site]
    kept = {
        Neuron(s.layer, int(i)): float(score[i])
        for s, score in scores.items()
        for i in (score > threshold * best).nonzero()[:, 0]
    }
    return kept or {Neuron(site.layer, int(scores[site].argmax())): best}


def coarse_sets(
    host: Host,
    prompts: Sequence[str],
    answer: str | Sequence[int],
    sites: Sequence[Site],
    *,
    steps: int,
    rule: Rule,
    threshold: float,
    on_layer: Tick = lambda done, total: None,
) -> list[dict[Neuron, float]]:
    """Choose the coarse neurons of an answer behind each of several prompts; its tokens add up."""
    asked = [questions(host, prompt, answer) for prompt in prompts]
    flat = [question for one in asked for question in one]
    scores = attribute(host, flat, sites, steps=steps, rule=rule, on_layer=on_layer)
    parts = {site: score.split([len(one) for one in asked]) for site, score in scores.items()}
    return [
        coarse({site: part[i].sum(0) for site, part in parts.items()}, threshold=threshold)
        for i in range(len(prompts))
    ]


def refine(
    sets: Sequence[Mapping[Neuron, float]],
    *,
    share: float,
    fewest: int | None = None,
    most: int | None = None,
) -> list[Neuron]:
    """Keep neurons that stand in more than a share of the prompts' coarse sets, most votes first.

    Where fewer than ``fewest`` or more than ``most`` would stay, the share moves as little as it must.
    If no share gives a number between them, the last neurons are cut by votes, then by mean score; with
    fewer than ``fewest`` in all sets together, all of them stay. At least one always does.
    """
    votes = Counter(neuron for one in sets for neuron in one)
    score = {neuron: sum(one.get(neuron, 0.0) for one in sets) / len(sets) for neuron in votes}
    ranked = sorted(votes, key=lambda n: (-votes[n], -score[n], n))
    low, high = max(1, fewest or 1), inf if most is None else most
    levels = range(1, len(sets) + 1)  # votes needed
    counts = {level: sum(v >= level for v in votes.values()) for level in levels}
    start = min(len(sets), floor(share * len(sets) + 1e-9) + 1)
    between = [level for level in levels if low <= counts[level] <= high]
    if between:
        level = min(between, key=lambda one: (abs(one - start), one))
    else:
        level = max((one for one in levels if counts[one] >= low), default=1)
    return ranked[: int(min(counts[level], high))]


def unshared(chosen: Sequence[Sequence[Neuron]], *, share: float) -> list[list[Neuron]]:
    """Leave out neurons chosen for more than a share of the facts, and for more than one.

    A fact that would lose all keeps its first.
    """
    facts = Counter(neuron for one in chosen for neuron in one)
    limit = max(1.0, share * len(chosen))
    return [[n for n in one if facts[n] <= limit] or list(one[:1]) for one in chosen]
