"""Feed-forward layers as memories: what switches a neuron on, what its value says, which ones decide a prompt.

Source     Keys: Geva et al., "Transformer Feed-Forward Layers Are Key-Value Memories", EMNLP 2021, arXiv 2012.14913.
           Values: Geva et al., "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the
           Vocabulary Space", EMNLP 2022, arXiv 2203.14680
What       A neuron is an entry m_i of what the down-projection reads; its value v_i is the projection's column, so
           that the feed-forward adds the sum of m_i v_i. Triggers are the texts on which m_i is largest; a value is
           read by the output embeddings; the values that dominate a prompt are those with the largest |m_i| |v_i|.
Departs    Triggers are kept while the texts stream by, not searched in stored activations. In gated feed-forwards m_i
           has a sign, so the texts on which it is lowest are kept beside. An effect on the answer goes through the
           final norm, linearised where the model's own state is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import HostError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.passes import output_head
from errata.inspect.lens import Lens
from errata.locate.keys import tokens_batches
from errata.locate.neurons import Neuron, value_tokens
from errata.locate.patching import require_plain
from errata.progress import OnCount, ignore

CONTEXT = 12
"""Tokens of a trigger that are shown, its last one the one that switches the neuron on."""


def sites(host: Host) -> list[Site]:
    """Return the down-projections of all layers. Raises HostError where a layer has none, as in mixtures."""
    require_plain(host, "looking at neurons")
    return [host.layout.site(layer) for layer in range(len(host.layout.blocks))]


def neuron(host: Host, text: str) -> Neuron:
    """Read ``layer.index``. Raises RequestError for one that does not exist."""
    layer, dot, index = text.partition(".")
    every = sites(host)
    if dot and layer.isdecimal() and index.isdecimal() and int(layer) < len(every):
        found = Neuron(int(layer), int(index))
        if found.index < every[found.layer].d_in:
            return found
    raise RequestError(
        f"{text!r} is no neuron: expected layer.index, layers 0 to {len(every) - 1}, indices below {every[0].d_in}"
    )


# --- what dominates a prompt ----------------------------------------------------------------


@dataclass(frozen=True)
class SubUpdate:
    """What one neuron adds to the residual stream at a prompt's last token."""

    neuron: Neuron
    coefficient: float
    """m_i."""
    size: float
    """|m_i| |v_i|."""
    share: float
    """Of the sum of these over the layer."""
    effect: float
    """On the answer's logit, directly, nats."""
    tokens: tuple[str, ...]
    """The most probable tokens of what it adds: of the value, or of its negative where m_i is negative."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "neuron": f"{self.neuron.layer}.{self.neuron.index}", "coefficient": round(self.coefficient, 6),
            "size": round(self.size, 6), "share": round(self.share, 6), "effect": round(self.effect, 6),
            "tokens": list(self.tokens),
        }  # fmt: skip


def coefficients(host: Host, ids: Sequence[int]) -> list[Tensor]:
    """Return what each layer's down-projection reads at a row's last token, float32 ``[d_in]`` each."""
    found: dict[int, Tensor] = {}
    every = sites(host)

    def keep(layer: int, width: int):
        def store(tensor: Tensor) -> None:
            found[layer] = tensor.detach().reshape(-1, width)[-1].float().cpu()

        return store

    with torch.no_grad(), ExitStack() as stack:
        for site in every:
            module = host.model.get_submodule(site.name)
            stack.enter_context(hooks.on_input(module, keep(site.layer, site.d_in)))
        host.forward(host.batch([tuple(ids)]), keep=1)
    return [found[site.layer] for site in every]


def dominant(
    host: Host, prompt: str, *, answer: str | None = None, count: int = 10, layers: Sequence[int] | None = None
) -> list[SubUpdate]:  # fmt: skip
    """Return the ``count`` largest sub-updates of each layer at a prompt's last token, the largest of a layer first.

    ``answer``: whose first token effects are on; None: the host's first choice. Raises HostError where a norm stands
    between the feed-forward and the residual stream, so that values are not what is added.
    """
    every = sites(host)
    if not host.layout.adds_directly:
        raise HostError(
            f"{host.name} puts a norm between its feed-forwards and the residual stream ({host.family}), so a value "
            "is not what a neuron adds: use errata trace"
        )
    ids = host.encode_base(prompt)
    token = None if answer is None else host.encode_answer(prompt, answer).target[0]
    slope = _slope(host, ids, token)
    found = []
    for site, own in zip(every, coefficients(host, ids), strict=True):
        if layers is not None and site.layer not in layers:
            continue
        values = host.weight(site).float().cpu()  # [d, d_in]
        sizes = own.abs() * values.square().sum(0).sqrt()
        best = sizes.topk(min(count, len(sizes))).indices
        said = value_tokens(host, (values[:, best] * own[best].sign()).mT)
        for index, tokens in zip(best.tolist(), said, strict=True):
            found.append(
                SubUpdate(
                    Neuron(site.layer, index), float(own[index]), float(sizes[index]),
                    float(sizes[index] / sizes.sum()), float(own[index] * (values[:, index] @ slope)), tuple(tokens),
                )
            )  # fmt: skip
    return found


def _slope(host: Host, ids: Sequence[int], token: int | None) -> Tensor:
    """Return the gradient of the answer's logit by the last block's output at the last token, float32 ``[d]``."""
    lens = Lens(host)
    state = lens.states([tuple(ids)])[0][-1, -1:]
    with torch.enable_grad():
        leaf = state.detach().clone().requires_grad_(True)
        logits = lens.read(lens.depth, leaf)[0]
        (slope,) = torch.autograd.grad(logits[int(logits.argmax()) if token is None else token], leaf)
    return slope[0].float().cpu()


# --- what switches neurons on ---------------------------------------------------------------


@dataclass(frozen=True)
class Trigger:
    """A place in the texts at which a neuron is high, or low."""

    value: float
    row: int
    position: int


class Triggers:
    """The highest and lowest places of the neurons of some layers, while rows of tokens stream by."""

    def __init__(self, host: Host, layers: Sequence[int], *, count: int = 10) -> None:
        every = sites(host)
        self.host, self.count = host, count
        self.sites = [every[layer] for layer in layers]
        self.best: dict[int, Tensor] = {}
        """By layer, largest values ``[d_in, 2, count]``: of m_i, and of -m_i."""
        self.place: dict[int, Tensor] = {}
        """Row and position of each ``[d_in, 2, count, 2]``."""

    @torch.no_grad()
    def add(self, rows: Sequence[Sequence[int]], *, on_rows: OnCount = ignore) -> None:
        """Look at all tokens of some rows but the first, on which heads rest; rows are counted from 0."""
        done = 0
        for group in tokens_batches(rows):
            batch = self.host.batch([rows[i] for i in group])
            keep = batch.mask.bool() & (batch.positions > 0)
            row = torch.tensor(group)[:, None].expand(batch.ids.shape)[keep.cpu()]
            place = torch.stack([row, batch.positions[keep].cpu()], 1)  # [n, 2]
            with ExitStack() as stack:
                for site in self.sites:
                    module = self.host.model.get_submodule(site.name)
                    stack.enter_context(hooks.on_input(module, self._merger(site, keep, place)))
                last = self.host.model.get_submodule(max(self.sites, key=lambda one: one.layer).name)
                stack.enter_context(hooks.stop_after(last))
                with contextlib.suppress(hooks.Stopped):
                    self.host.forward(batch, keep=1)
            done += len(group)
            on_rows(done, len(rows))

    def _merger(self, site: Site, keep: Tensor, place: Tensor):
        def merge(tensor: Tensor) -> None:
            shaped = tensor.reshape(*keep.shape, site.d_in)[keep.to(tensor.device)].float().cpu()  # [n, d_in]
            best, places = _largest(torch.stack([shaped, -shaped]).permute(2, 0, 1), place, self.count)
            if site.layer in self.best:
                best = torch.cat([self.best[site.layer], best], 2)
                places = torch.cat([self.place[site.layer], places], 2)
                top = best.topk(min(self.count, best.shape[2]), dim=2)
                best, index = top.values, top.indices[..., None]
                places = places.gather(2, index.expand(*top.indices.shape, 2))
            self.best[site.layer], self.place[site.layer] = best, places

        return merge

    def of(self, one: Neuron, *, lowest: bool = False) -> list[Trigger]:
        """Return a neuron's highest places, or its lowest, the most extreme first."""
        side = int(lowest)
        values = self.best[one.layer][one.index, side]
        places = self.place[one.layer][one.index, side]
        sign = -1 if lowest else 1
        return [
            Trigger(sign * float(v), int(p[0]), int(p[1])) for v, p in zip(values, places, strict=True)
        ]  # fmt: skip

    def agreement(self, rows: Sequence[Sequence[int]]) -> dict[int, float]:
        """Return, by layer, how often a value's most probable token follows its neuron's first trigger.

        Over the neurons whose first trigger is not the end of its row; chance is about one in the vocabulary.
        """
        found: dict[int, float] = {}
        head = _embeddings(self.host)
        for site in self.sites:
            values = self.host.weight(site).float().cpu()  # [d, d_in]
            says = torch.cat([(head @ part).argmax(0) for part in values.split(512, 1)])
            first = self.place[site.layer][:, 0, 0].tolist()
            follows = [rows[r][p + 1] if p + 1 < len(rows[r]) else None for r, p in first]
            pairs = [
                (int(said), token) for said, token in zip(says, follows, strict=True) if token is not None
            ]
            found[site.layer] = sum(a == b for a, b in pairs) / max(1, len(pairs))
        return found


def _largest(values: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest of ``[d_in, 2, n]`` along the last axis, and their places ``[d_in, 2, count, 2]``."""
    top = values.topk(min(count, values.shape[2]), dim=2)
    return top.values, place[top.indices]


def _embeddings(host: Host) -> Tensor:
    """Return the output embeddings, float32 ``[vocab, d]`` on the CPU. Raises HostError for a host without."""
    weight = getattr(output_head(host.model), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != host.layout.width:
        raise HostError(f"{host.name} has no output embeddings to read values by")
    return weight.detach().float().cpu()


def shown(host: Host, row: Sequence[int], position: int) -> str:
    """Return a trigger's text: what is read up to and including its token."""
    return str(host.tokenizer.decode(list(row[max(0, position + 1 - CONTEXT) : position + 1])))


def describe(host: Host, one: Neuron, rows: Sequence[Sequence[int]], *, count: int = 10) -> dict[str, Any]:
    """Return what a neuron's value promotes and demotes, and the texts on which it is highest and lowest."""
    value = host.weight(sites(host)[one.layer])[:, one.index].float()
    promoted, demoted = value_tokens(host, torch.stack([value, -value]), count=count)
    triggers = Triggers(host, [one.layer], count=count)
    triggers.add(rows)
    return {
        "neuron": f"{one.layer}.{one.index}", "promoted": promoted, "demoted": demoted,
        **{
            name: [
                {"value": round(t.value, 6), "text": shown(host, rows[t.row], t.position)}
                for t in triggers.of(one, lowest=name == "lowest")
            ]
            for name in ("highest", "lowest")
        },
    }  # fmt: skip


def promoting(host: Host, token: int, *, count: int = 10) -> list[dict[str, Any]]:
    """Return the values of all layers in which a token stands highest: ``U v``, over the deviation of its entries."""
    head = _embeddings(host)
    found: list[dict[str, Any]] = []
    for site in sites(host):
        values = host.weight(site).float().cpu()
        logits = torch.cat([_standing(head, part, token) for part in values.split(512, 1)])
        best = logits.topk(min(count, len(logits)))
        found += [
            {"neuron": f"{site.layer}.{index}", "standing": round(score, 4)}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return sorted(found, key=lambda one: -one["standing"])[:count]


def _standing(head: Tensor, values: Tensor, token: int) -> Tensor:
    """Return by how many deviations a token's logit is above the mean, for values ``[d, n]``: ``[n]``."""
    logits = head @ values  # [vocab, n]
    return (logits[token] - logits.mean(0)) / logits.std(0).clamp_min(1e-12)
