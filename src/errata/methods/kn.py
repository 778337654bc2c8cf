"""KN: find the few feed-forward neurons an answer hangs on, and change what they write.

Paper      Dai et al., "Knowledge Neurons in Pretrained Transformers", ACL 2022, arXiv 2104.08696
Implements Sec. 3.2 and 3.3: integrated gradients of the answer's probability per neuron, coarse sets by a
           share of the largest score over all layers, refinement by votes over several prompts; then
           one of the operations. A neuron's value is its column c of the down-projection:
             update    c - l1 e(old) + l2 e(new)     (Sec. 5.1)      suppress  0 (activation 0)
             erase     0, or e(unknown token)        (Sec. 5.2)      amplify   2 c (activation doubled)
Departs    A method sees the request only, so its prompt behind sampled prefixes stands in for the paper's
           paraphrases, p adapts to each request and not to a relation's average, and erase takes the requests'
           neurons, not the 20 most common ones of a relation. e is a row of the OUTPUT embedding, which the paper's
           BERT ties to the input one. Ports also attribute activations before the nonlinearity, or a gate alone; here
           a neuron is what the down-projection multiplies. Gated neurons are often negative: ``signed`` turns
           their column's change round. l1 and l2 are in norms of the column, e at unit length (authors' code), or
           plain (ports): ``scale``. Answers of several tokens are attributed token by token, masks' one by one.
           Of several requests each updates its own neurons; a neuron of two gets both changes, as from two fits.
Limits     A few neurons can only replace an answer that depends on the feed-forwards where it is read. In the tests'
           BERT of two layers these carry less than 5 % of its probability: update moves it, but stays behind the old.
Needs      Gradients; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, HostError
from errata.host.kinds import CAUSAL, MASKED
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.locate.contexts import prompt_behind
from errata.locate.keys import Place, capture
from errata.locate.neurons import Neuron, Rule, coarse_sets, greedy_tokens, questions, refine, unshared
from errata.methods._method import Method, Workspace, provenance, resolve_layers
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of KN."""

    operation: Literal["update", "suppress", "amplify", "erase"] = "update"
    """What to do to the neurons: of the old answer, or for amplify of the target. Old is target_old, else
    what the host says now."""
    layers: tuple[int, ...] | None = None
    """Layers to search. None: all, as in the paper."""
    steps: int = 20
    """T, points on the path of the integrated gradients (paper: 20)."""
    rule: Rule = "right"
    """Where they lie: right end (paper's equation), left end (its code) or midpoint of each of T parts."""
    threshold: float = 0.2
    """t, share of the largest attribution that a neuron of a coarse set exceeds (paper: 0.2)."""
    share: float = 0.7
    """p, share of the prompts' coarse sets that a neuron stands in more often than (paper: 0.7 at first)."""
    fewest: int | None = 2
    """p gives way until so many neurons stay (paper: 2). None: it does not."""
    most: int | None = 5
    """p gives way until no more neurons stay (paper: 5). None: it does not."""
    shared: float | None = None
    """Drop neurons chosen for more than this share of the requests (paper's updates: 0.1, of a relation)."""
    contexts: int = 8
    """How many sampled prefixes, beside the bare prompt (paper: about 9 paraphrases a fact)."""
    context_tokens: int = 10
    """Their length in tokens."""
    lambda_old: float = 1.0
    """update: l1, weight of the old answer's embedding, in the unit of ``scale`` (paper: 1; ports: 2, plain)."""
    lambda_new: float = 8.0
    """update: l2, weight of the new answer's embedding, in the unit of ``scale`` (paper: 8; ports: 2, plain)."""
    scale: Literal["column", "plain"] = "column"
    """Unit of embeddings: the norm of the column as the unedited host has it (authors' code), or plain."""
    signed: bool = True
    """update: turn the change by the sign of the neuron's activation at the prompt (paper: no)."""
    answer: Literal["sum", "first"] = "sum"
    """update: an answer's embedding: the sum over its tokens (ports: the same), or its first token's."""
    factor: float = 2.0
    """amplify: what the column is multiplied with (paper: 2)."""
    erase: Literal["zero", "unknown"] = "zero"
    """erase: what replaces the column: zero, or the unknown token's embedding (paper: zero; either in its code)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "steps", "context_tokens", "fewest", "most", "shared")
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) < 1:
                complaints.append(f"{name}: expected a share from 0 to below 1, found {getattr(self, name)}")
        for name in ("contexts", "lambda_old", "lambda_new", "factor"):
            if getattr(self, name) < 0:
                complaints.append(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.factor == 1 or self.lambda_old == self.lambda_new == 0:
            complaints.append("factor: 1, or lambda_old and lambda_new both 0, would change nothing")
        if self.fewest is not None and self.most is not None and self.fewest > self.most:
            complaints.append(f"fewest: {self.fewest} is more than most, {self.most}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit of the columns of the requests' neurons."""
    if not requests:
        raise ConfigError("kn needs at least one request")
    layers = resolve_layers(host, config.layers, lambda depth: tuple(range(depth)))
    config = replace(config, layers=layers)
    sites = {layer: host.layout.site(layer) for layer in layers}
    unknown = config.operation == "erase" and config.erase == "unknown"
    table = _Embeddings(host, unknown=unknown) if unknown or config.operation == "update" else None
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    prefixes = [context.prefix for context in work.contexts(host, groups, "flat")]
    old = [_old_answer(host, request) for request in requests]
    chosen = []
    for i, (request, before) in enumerate(zip(requests, old, strict=True)):
        answer = request.target if config.operation == "amplify" else before
        prompts = [prompt_behind(host, prefix, request) for prefix in prefixes]
        sets = coarse_sets(
            host, prompts, answer, list(sites.values()),
            steps=config.steps, rule=config.rule, threshold=config.threshold,
            on_layer=partial(work.on_progress, f"attribution {i + 1}/{len(requests)}"),
        )  # fmt: skip
        chosen.append(refine(sets, share=config.share, fewest=config.fewest, most=config.most))
    if config.shared is not None:
        chosen = unshared(chosen, share=config.shared)
    changes: dict[Neuron, Tensor] = {}
    if config.operation == "update" and table is not None:
        for request, before, neurons in zip(requests, old, chosen, strict=True):
            for neuron, change in _update(host, request, before, neurons, sites, table, config).items():
                changes[neuron] = changes[neuron] + change if neuron in changes else change
    else:
        for neuron in {neuron for one in chosen for neuron in one}:
            changes[neuron] = _replace(host, neuron, sites, table, config)
    edited = [sites[layer] for layer in sorted({neuron.layer for neuron in changes})]
    return WeightEdit(
        {site.parameter: _delta(site, changes) for site in edited},
        frozenset(site.parameter for site in edited if site.transposed),
        provenance("kn", host, requests, config, work, neurons=[[list(n) for n in one] for one in chosen]),
    )


def _old_answer(host: Host, request: Request) -> str | tuple[int, ...]:
    """Return the answer that goes: as given, or what the host says now, as long as the target in tokens."""
    if request.target_old is not None:
        return request.target_old
    return greedy_tokens(host, request.text, len(questions(host, request.text, request.target)))


class _Embeddings:
    """Rows of the output embedding, the unknown token's if wanted."""

    def __init__(self, host: Host, *, unknown: bool) -> None:
        head = host.model.get_output_embeddings()
        if head is None or head.weight.shape[1] != host.layout.width:
            raise HostError(
                f"kn writes output embeddings of width {host.layout.width}, and this model's are missing "
                "or of another width; use operation: suppress or amplify"
            )
        self.weight: Tensor = head.weight.detach()
        self.unknown: int | None = getattr(host.tokenizer, "unk_token_id", None)
        if unknown and self.unknown is None:
            raise ConfigError("erase: unknown needs a tokenizer with an unknown token; use erase: zero")

    def sum(self, ids: Sequence[int], *, unit: bool) -> Tensor:
        """Sum of the rows of some tokens ``[d]``, brought to unit length if asked."""
        row = _wide(self.weight[torch.tensor(ids, device=self.weight.device)]).sum(0)
        return row / row.norm().clamp_min(torch.finfo(row.dtype).tiny) if unit else row


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu()


def _column(weight: Tensor, site: Site, index: int) -> Tensor:
    """Read a column ``[d_out]`` of a weight as it is stored."""
    return _wide(weight[index] if site.transposed else weight[:, index])


def _length(host: Host, site: Site, index: int) -> float:
    """Norm of a column as the unedited host has it, so that one edit after another does not compound."""
    overlay = host.overlays.get(site.parameter)
    if overlay is not None:
        return float(_column(overlay.base, site, index).norm())
    return float(_wide(host.weight(site)[:, index]).norm())


def _update(
    host: Host,
    request: Request,
    before: str | Sequence[int],
    neurons: Sequence[Neuron],
    sites: Mapping[int, Site],
    table: _Embeddings,
    config: Config,
) -> dict[Neuron, Tensor]:
    """Return what a request adds to the column of each of its neurons ``[d_out]``."""
    going, coming = (questions(host, request.text, answer) for answer in (before, request.target))
    tokens = slice(1) if config.answer == "first" else slice(None)
    relative = config.scale == "column"
    minus, plus = (table.sum([q.token for q in answer][tokens], unit=relative) for answer in (going, coming))
    change = config.lambda_new * plus - config.lambda_old * minus
    touched = [sites[layer] for layer in {neuron.layer for neuron in neurons}]
    keys = capture(host, [Place(going[0].ids)], touched).keys
    added = {}
    for neuron in neurons:
        site = sites[neuron.layer]
        size = _length(host, site, neuron.index) if relative else 1.0
        against = config.signed and float(keys[site][0, neuron.index]) < 0
        added[neuron] = (-size if against else size) * change
    return added


def _replace(
    host: Host, neuron: Neuron, sites: Mapping[int, Site], table: _Embeddings | None, config: Config
) -> Tensor:
    """Return what suppress, amplify or erase adds to a neuron's column ``[d_out]``."""
    site = sites[neuron.layer]
    now = _wide(host.weight(site)[:, neuron.index])
    if config.operation == "amplify":
        return (config.factor - 1) * now
    if table is None or table.unknown is None:
        return -now
    relative = config.scale == "column"
    size = _length(host, site, neuron.index) if relative else 1.0
    return size * table.sum([table.unknown], unit=relative) - now


def _delta(site: Site, changes: Mapping[Neuron, Tensor]) -> LowRank:
    """Put the changes of a site's columns side by side, and one-hot rows under them."""
    columns = sorted(neuron.index for neuron in changes if neuron.layer == site.layer)
    left = torch.stack([changes[Neuron(site.layer, index)] for index in columns], dim=1)  # [d_out, r]
    right = torch.zeros(len(columns), site.d_in, dtype=left.dtype)
    right[torch.arange(len(columns)), columns] = 1.0
    return LowRank(left, right)


METHOD = Method(
    name="kn",
    title="KN",
    paper="Knowledge Neurons in Pretrained Transformers, ACL 2022, arXiv 2104.08696",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("contexts", "gradients"),
    hosts=(CAUSAL, MASKED),
)
