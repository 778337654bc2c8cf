"""Attribution of an answer to feed-forward neurons, by integrated gradients of its probability.

A neuron is an entry of a down-projection's input w ``[d_in]`` (after the activation; for gated
feed-forwards after the product with the gate), at the position that predicts a token t. Along the
straight path from no activation to the full one, all neurons of a layer scaled together,

    attribution_i = w_i / T * sum over points a of dp(t | x) / dw_i at a w       (Dai et al. 2022, Sec. 3.2)

with T points a. ``right``: k/T for k = 1 to T, as in the paper's equation. ``left``: (k - 1)/T, as
in its code. ``midpoint``: (k - 1/2)/T, whose error falls with 1/T^2 and not 1/T. As T grows the
attributions of one layer add up to p(t | x) with the layer's neurons less p(t | x) without them: slowly
where a norm follows the projection, because it undoes the scaling until the inputs are near zero.

A path at one layer does not affect the layers below it: the text is run once, and every point starts from the
states cached there. At the projection the path is a shift of its output by (a - 1) W w, so gradients are
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
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.passes import output_head
from errata.host.prefix import Prefix, PrefixRunner, align, can_reuse, no_prefix
from errata.host.tokens import Batch
from errata.locate.keys import BATCH_TOKENS, tokens_batches
from errata.progress import OnCount, ignore

Rule = Literal["right", "left", "midpoint"]


class Neuron(NamedTuple):
    """An entry of a layer's down-projection input, and the weight's column that goes with it."""

    layer: int
    index: int


@dataclass(frozen=True)
class Question:
    """A text whose next token is to be explained."""

    ids: tuple[int, ...]
    """The text up to the position that predicts; later tokens cannot influence it in a causal model."""
    token: int
    """The token whose probability is attributed."""


def questions(host: Host, prompt: str, answer: str | Sequence[int]) -> list[Question]:
    """Return one question per token of an answer after a prompt, each at its own position.

    An answer of token ids is appended to the prompt's ids unchanged. Raises RequestError for an answer
    without tokens, or with no token before it.
    """
    if isinstance(answer, str):
        row = host.encode_answer(prompt, answer)
        ids, start = row.ids, row.start
    else:
        prompt_ids = host.encode_base(prompt, slots=len(answer))
        ids, start = (*prompt_ids, *answer), len(prompt_ids)
    if start == 0 or start == len(ids):
        raise RequestError(
            f"the answer {answer!r} needs a token of its own and one before it, after {prompt!r}; "
            "use a longer prompt"
        )
    return [Question(ids[:at], ids[at]) for at in range(start, len(ids))]


def greedy_tokens(host: Host, prompt: str, count: int) -> tuple[int, ...]:
    """Return the ``count`` tokens that the host generates greedily after a prompt."""
    ids = list(host.encode_base(prompt, slots=count))
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(host.forward(host.batch([ids]), keep=1)[0, -1].argmax()))
    return tuple(ids[-count:])


def attribute(
    host: Host,
    questions: Sequence[Question],
    sites: Sequence[Site],
    *,
    steps: int = 20,
    rule: Rule = "right",
    on_layer: OnCount = ignore,
) -> dict[Site, Tensor]:
    """Attribute each question's probability to the neurons of each site, float64 ``[n, d_in]``.

    ``steps`` is T; ``on_layer(count, total)`` is called after each layer. The host is left unchanged.
    """
    attributions = {site: torch.zeros(len(questions), site.d_in, dtype=torch.float64) for site in sites}
    points = path_points(steps, rule)
    groups = tokens_batches([q.ids for q in questions])
    with hooks.frozen(host.model):
        for batch, group in enumerate(groups):
            state = _run_once(host, [questions[i] for i in group], sites)
            for layer, site in enumerate(sites):
                attributions[site][group] = _integrate_gradients(host, state, site, points)
                on_layer(batch * len(sites) + layer + 1, len(groups) * len(sites))
    return attributions


def path_points(steps: int, rule: Rule) -> Tensor:
    """Return the points of the path in [0, 1], float64 ``[T]``."""
    first = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (torch.arange(steps, dtype=torch.float64) + first) / steps


@dataclass(frozen=True)
class _State:
    """A batch of questions and the states of one unmodified forward pass below every site.

    Only the last token of a text predicts, so where the host can use a key-value cache it is the only one that is
    run again; the others are its prefix.
    """

    runner: PrefixRunner
    tokens: Batch
    prefix: Prefix
    at: Tensor
    """Column that predicts ``[n]``."""
    token: Tensor
    """Token to predict ``[n]``."""
    blocks: dict[int, Tensor]
    """Output of each block ``[n, columns, d]``."""
    keys: dict[Site, Tensor]
    """Input of each site at the position ``[n, d_in]``."""

    def rows(self, index: Tensor) -> tuple[Batch, Prefix]:
        """Return tokens and prefix of the rows ``index``, which may repeat."""
        return self.tokens.select(index), self.prefix.share(index)


def _run_once(host: Host, questions: Sequence[Question], sites: Sequence[Site]) -> _State:
    """Run texts once up to the highest site and cache the states of all blocks below."""
    count = len(questions)
    inputs = [host.reading(q.ids) for q in questions]
    places = [column for _, column in inputs]
    reuse = not host.fills and can_reuse(host, max(places) + 1, [ids for ids, _ in inputs])
    tokens, column = align(host, [ids for ids, _ in inputs], places, [0] * count, left=reuse)
    at = torch.tensor([column if reuse else place for place in places], device=host.device)
    line = torch.arange(count, device=host.device)
    keys: dict[Site, Tensor] = {}

    def key_hook(site: Site) -> Callable[[Tensor], None]:
        def write(tensor: Tensor) -> None:
            shaped = tensor.detach().reshape(count, -1, site.d_in)
            keys[site] = shaped[line.to(tensor.device), at.to(tensor.device)]

        return write

    runner = PrefixRunner(host)
    all_blocks = range(len(runner.blocks))
    before = no_prefix(host, count)
    top = all_blocks[-1] if reuse else max(site.layer for site in sites)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooks.on_input(host.model.get_submodule(site.name), key_hook(site)))
        result = runner.run(
            tokens, before, keep=range(top), remember=all_blocks if reuse else (), stop=runner.blocks[top]
        )
    token = torch.tensor([q.token for q in questions], device=host.device)
    if not reuse:
        return _State(runner, tokens, before, at, token, result.states, keys)
    blocks = {block: states[:, column:] for block, states in result.states.items()}
    prefix = before.followed_by(result.key_values, tokens, column)
    return _State(runner, tokens.columns(column), prefix, at - column, token, blocks, keys)


def _integrate_gradients(host: Host, state: _State, site: Site, points: Tensor) -> Tensor:
    """Return attributions at one site: keys times the mean of dp/dw over the points, float64 ``[n, d_in]``."""
    weight = host.weight(site)  # [d_out, d_in]
    wide = torch.promote_types(weight.dtype, torch.float32)
    keys = state.keys[site].to(wide)
    outputs = keys @ weight.to(wide).mT  # [n, d_out], without bias
    count = len(state.token)
    total = torch.zeros(count, site.d_out, dtype=torch.float64)
    line = torch.arange(count).repeat_interleave(len(points))
    scale = points.repeat(count)
    batch_rows = max(1, BATCH_TOKENS // state.tokens.ids.shape[1])
    for first in range(0, len(line), batch_rows):
        rows = line[first : first + batch_rows]
        share = (scale[first : first + batch_rows] - 1).to(device=outputs.device, dtype=wide)
        shift = share[:, None] * outputs[rows.to(outputs.device)]
        total.index_add_(0, rows, _gradient(host, state, site, rows, shift))
    mean = (total / len(points)).to(device=weight.device, dtype=wide)
    return (keys.double() * (mean @ weight.to(wide)).double()).cpu()


def _gradient(host: Host, state: _State, site: Site, rows: Tensor, shift: Tensor) -> Tensor:
    """Return dp/dy for rows whose site output y is shifted at the position, float64 ``[rows, d_out]``."""
    rows = rows.to(host.device)
    line = torch.arange(len(rows), device=host.device)
    tokens, prefix = state.rows(rows)
    at, token = state.at[rows], state.token[rows]

    def add_shift(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(len(rows), -1, site.d_out)
        place = (line.to(flat.device), at.to(flat.device))
        full = torch.zeros_like(flat).index_put(place, shift.to(device=flat.device, dtype=flat.dtype))
        return (flat + full).reshape(hidden.shape)

    below = state.blocks[site.layer - 1] if site.layer else None
    states = None if below is None else below[rows.to(below.device)]
    shift.requires_grad_(True)
    with torch.enable_grad(), hooks.on_output(host.model.get_submodule(site.name), add_shift):
        logits = state.runner.run(tokens, prefix.at_depth(site.layer, states), at=(line, at)).logits
        assert logits is not None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = wide.log_softmax(-1).gather(1, token.to(wide.device)[:, None])[:, 0]
        (slope,) = torch.autograd.grad(logprobs.sum(), shift)
    return logprobs.detach().cpu().double().exp()[:, None] * slope.cpu().double()


# --- choosing -------------------------------------------------------------------------------


def coarse(scores: Mapping[Site, Tensor], *, threshold: float) -> dict[Neuron, float]:
    """Choose the neurons of all sites that score above a share of the largest score.

    ``scores`` holds ``[d_in]`` per site. Where no score is positive, only the best neuron is returned.
    Raises HostError for scores that are not finite or all zero.
    """
    top = {site: float(score.max()) for site, score in scores.items()}
    if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
        raise HostError("attributions contain NaN or infinite numbers; load the model in float32")
    if not any(bool(score.any()) for score in scores.values()):
        raise HostError(
            "no feed-forward neuron contributes to the answer's probability: all attributions are 0. "
            "Check that the host can generate the answer, and load the model in float32"
        )
    site = max(top, key=lambda s: top[s])
    best = top[site]
    selection = {
        Neuron(s.layer, int(i)): float(score[i])
        for s, score in scores.items()
        for i in (score > threshold * best).nonzero()[:, 0]
    }
    return selection or {Neuron(site.layer, int(scores[site].argmax())): best}


def coarse_sets(
    host: Host,
    prompts: Sequence[str],
    answer: str | Sequence[int],
    sites: Sequence[Site],
    *,
    steps: int,
    rule: Rule,
    threshold: float,
    on_layer: OnCount = ignore,
) -> list[dict[Neuron, float]]:
    """Choose the coarse neurons of an answer after each of several prompts; scores are summed over its tokens."""
    by_prompt = [questions(host, prompt, answer) for prompt in prompts]
    all_questions = [question for one in by_prompt for question in one]
    scores = attribute(host, all_questions, sites, steps=steps, rule=rule, on_layer=on_layer)
    parts = {site: score.split([len(one) for one in by_prompt]) for site, score in scores.items()}
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
    """Return the neurons in more than a share of the prompts' coarse sets, most votes first.

    Where fewer than ``fewest`` or more than ``most`` would remain, the share is changed as little as necessary.
    If no share gives a number between them, neurons are ranked by votes, then by mean score, and the last are
    dropped; with fewer than ``fewest`` in all sets together, all remain. At least one always remains.
    """
    votes = Counter(neuron for one in sets for neuron in one)
    score = {neuron: sum(one.get(neuron, 0.0) for one in sets) / len(sets) for neuron in votes}
    by_votes = sorted(votes, key=lambda n: (-votes[n], -score[n], n))
    low, high = max(1, fewest or 1), inf if most is None else most
    levels = range(1, len(sets) + 1)  # votes needed
    counts = {level: sum(v >= level for v in votes.values()) for level in levels}
    start = min(len(sets), floor(share * len(sets) + 1e-9) + 1)
    between = [level for level in levels if low <= counts[level] <= high]
    if between:
        level = min(between, key=lambda one: (abs(one - start), one))
    else:
        level = max((one for one in levels if counts[one] >= low), default=1)
    return by_votes[: int(min(counts[level], high))]


def unshared(sets: Sequence[Sequence[Neuron]], *, share: float) -> list[list[Neuron]]:
    """Return the neurons of each fact without those shared by more than ``share`` of the facts (and more than one).

    A fact that would lose all its neurons keeps its first.
    """
    facts = Counter(neuron for one in sets for neuron in one)
    limit = max(1.0, share * len(sets))
    return [[n for n in one if facts[n] <= limit] or list(one[:1]) for one in sets]


# --- what values say ------------------------------------------------------------------------


@torch.no_grad()
def value_tokens(host: Host, values: Tensor, *, count: int = 10) -> list[list[str]]:
    """Return the most probable tokens of softmax(E v) for each value v of ``[n, d]``, the first one first.

    E: the output embeddings, without the norm before them (Geva et al., EMNLP 2022, arXiv 2203.14680). Raises
    HostError for a host that has none.
    """
    weight = getattr(output_head(host.model), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != values.shape[1]:
        raise HostError(f"{host.name} has no output embeddings of width {values.shape[1]} to read values by")
    logits = values.to(weight.device, torch.float32) @ weight.float().mT  # [n, vocab]
    best = logits.topk(min(count, logits.shape[1]), dim=1).indices.tolist()
    return [[str(host.tokenizer.decode([token])) for token in row] for row in best]
