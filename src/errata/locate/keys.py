"""Keys and values in the model's present state: inputs and outputs of sites, and outputs of their blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.locate.contexts import Context, shorten
from errata.locate.problems import edited_token
from errata.types import Request

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Place:
    """A token of a text: where a key is read or a value written."""

    ids: tuple[int, ...]
    """The text up to and including that token; later tokens cannot influence it in a causal model."""

    @property
    def position(self) -> int:
        """Index of the token."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs of sites at some places, one row per place, in float32 at least."""

    keys: dict[Site, Tensor]
    """Input of each site ``[n, d_in]``."""
    values: dict[Site, Tensor]
    """Output of each site ``[n, d_out]``, bias included."""
    hidden: dict[int, Tensor]
    """Output of each site's block ``[n, d]``: the residual stream above it."""


def subject_place(host: Host, request: Request, prefix: str = "") -> Place:
    """Return the place of the subject's last token in the prompt after a prefix."""
    ids, at = edited_token(host, request, prefix)
    return Place(ids[: at + 1])


def capture(host: Host, places: Sequence[Place], sites: Sequence[Site]) -> Activations:
    """Return keys, values and block outputs at places, from one pass that stops after the highest block needed."""
    dtype = torch.promote_types(host.dtype, torch.float32)
    keys = {s: torch.empty(len(places), s.d_in, dtype=dtype) for s in sites}
    values = {s: torch.empty(len(places), s.d_out, dtype=dtype) for s in sites}
    width = host.layout.width
    hidden = {s.layer: torch.empty(len(places), width, dtype=dtype) for s in sites}
    last = max(s.layer for s in sites)
    module = host.model.get_submodule
    rows = [place.ids for place in places]
    for group in tokens_batches(rows):
        batch = host.batch([rows[i] for i in group])
        at = torch.tensor([host.reading(rows[i])[1] for i in group], device=host.device)
        line = torch.arange(len(group), device=host.device)

        def store(into: Tensor, group: list[int], line: Tensor, at: Tensor) -> Callable[[Tensor], None]:
            def write(tensor: Tensor) -> None:
                shaped = tensor.reshape(len(group), -1, tensor.shape[-1])
                into[group] = shaped[line.to(tensor.device), at.to(tensor.device)].detach().to(dtype).cpu()

            return write

        with torch.no_grad(), contextlib.ExitStack() as stack:
            for s in sites:
                stack.enter_context(hooks.on_input(module(s.name), store(keys[s], group, line, at)))
                stack.enter_context(hooks.on_output(module(s.name), store(values[s], group, line, at)))
                block = module(host.layout.blocks[s.layer])
                stack.enter_context(hooks.on_output(block, store(hidden[s.layer], group, line, at)))
            stack.enter_context(hooks.stop_after(module(host.layout.blocks[last])))
            with contextlib.suppress(hooks.Stopped):
                host.forward(batch, keep=1)
    return Activations(keys, values, hidden)


def capture_from(
    host: Host, rows: Sequence[Sequence[int]], first: Sequence[int], sites: Sequence[Site]
) -> dict[Site, list[Tensor]]:
    """Return what each site reads in each row from a position on: per site and row ``[tokens, d_in]``.

    ``first``: index of the first token to read, for each row. One pass that stops at the highest site; float32 at
    least, on the CPU.
    """
    dtype = torch.promote_types(host.dtype, torch.float32)
    keys: dict[Site, dict[int, Tensor]] = {site: {} for site in sites}
    top = host.model.get_submodule(max(sites, key=lambda site: site.layer).name)
    for group in tokens_batches(rows):
        batch = host.batch([rows[i] for i in group])

        def store(into: dict[int, Tensor], group: list[int]) -> Callable[[Tensor], None]:
            def keep(tensor: Tensor) -> None:
                states = tensor.detach().reshape(len(group), -1, tensor.shape[-1]).to(dtype).cpu()
                for line, i in enumerate(group):
                    into[i] = states[line, first[i] : len(rows[i])].clone()

            return keep

        with torch.no_grad(), contextlib.ExitStack() as stack:
            for site in sites:
                module = host.model.get_submodule(site.name)
                stack.enter_context(hooks.on_input(module, store(keys[site], group)))
            stack.enter_context(hooks.stop_after(top))
            with contextlib.suppress(hooks.Stopped):
                host.forward(batch, keep=1)
    return {site: [of_row[i] for i in range(len(rows))] for site, of_row in keys.items()}


def tokens_batches(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group rows of similar length within the token budget of a batch."""
    from errata.host.tokens import by_length

    return by_length(rows, BATCH_TOKENS)


def subject_keys(
    host: Host, requests: Sequence[Request], sites: Sequence[Site], contexts: Sequence[Context]
) -> Activations:
    """Return keys, values and hidden states averaged over contexts by their weights; ``[n requests, ...]``."""
    places = [
        subject_place(host, request, shorten(host, c.prefix, request))
        for request in requests
        for c in contexts
    ]
    activations = capture(host, places, sites)
    weights = torch.tensor([c.weight for c in contexts])
    weights /= weights.sum()  # callers may pass some of the contexts only, such as the bare prompt

    def mean(tensor: Tensor) -> Tensor:
        shaped = tensor.view(len(requests), len(contexts), -1)
        return torch.einsum("ncd,c->nd", shaped, weights.to(shaped.dtype))

    return Activations(
        {s: mean(k) for s, k in activations.keys.items()},
        {s: mean(v) for s, v in activations.values.items()},
        {layer: mean(h) for layer, h in activations.hidden.items()},
    )


def all_keys(
    host: Host,
    requests: Sequence[Request],
    site: Site,
    *,
    skip: Callable[[int, int], bool] = lambda request, position: False,
) -> Tensor:
    """Return a site's input at every token of every prompt with its target ``[tokens, d_in]``.

    ``skip(request index, position)``: whether to leave a position out.
    """
    rows = [host.encode_answer(request.text, request.target).ids for request in requests]
    by_request: list[tuple[int, Tensor]] = []
    module = host.model.get_submodule(site.name)
    dtype = torch.promote_types(host.dtype, torch.float32)
    for group in tokens_batches(rows):
        batch = host.batch([rows[i] for i in group])

        def collect(tensor: Tensor, group: list[int] = group) -> None:
            shaped = tensor.detach().reshape(len(group), -1, tensor.shape[-1]).to(dtype).cpu()
            for line, i in enumerate(group):
                positions = [at for at in range(len(rows[i])) if not skip(i, at)]
                by_request.append((i, shaped[line, positions]))

        with (
            torch.no_grad(),
            hooks.on_input(module, collect),
            hooks.stop_after(module),
            contextlib.suppress(hooks.Stopped),
        ):
            host.forward(batch, keep=1)
    return torch.cat([keys for _, keys in sorted(by_request, key=lambda item: item[0])])
