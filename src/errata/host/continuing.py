"""Go on from rows of tokens: run what they begin with once, then read, say or draw what follows.

A causal model's attention keeps keys and values of the tokens it has seen, so many texts may go on from one
beginning at the cost of their own tokens. Rows that have said their answer leave the batch, which is why
this is not transformers' own loop; both say the same.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host import locking, tokens
from errata.host.passes import SETS, Pass
from errata.host.prefixes import TRIAL_ERRORS, agree, keeps_attention_only
from errata.host.stopping import Stop, done

if TYPE_CHECKING:
    from errata.host.load import Host

Ids = tuple[int, ...]
Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""Chooses the next token of some rows: logits ``[n, vocab]`` and which rows they are of, to ids."""

HARMLESS = frozenset(
    (
        # sampling
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        # beams, of which there is one
        "num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty",
        "num_return_sequences",
        # lengths and ends, which callers give
        "max_length", "max_new_tokens", "max_time", "pad_token_id", "bos_token_id", "eos_token_id",
        "decoder_start_token_id",
        # caches, compiling and drafts: how the same text is computed
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
        "continuous_batching_config", "prefill_chunk_size", "low_memory", "use_mtp", "is_assistant",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
        # what is returned
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "renormalize_logits", "transformers_version",
    )
)  # fmt: skip
"""Settings of generation that leave greedy text as it is. Any other field of transformers' GenerationConfig may change
it where it is not at its default, also one that a later version adds."""


@lru_cache(maxsize=1)
def plain_values() -> dict[str, Any]:
    """Return transformers' defaults of the settings of generation that may change greedy text."""
    from transformers import GenerationConfig

    config = GenerationConfig()
    # a new config leaves its fields open; what they then mean is told apart
    meant = getattr(config, "_get_default_generation_params", dict)()
    fields = {**vars(config), **meant}
    return {
        name: value for name, value in fields.items() if name not in HARMLESS and not name.startswith("_")
    }


@dataclass(frozen=True, eq=False)
class Begun(Sequence[Ids]):
    """Rows of ids that were run once, with all that is needed to go on from them; still read as rows."""

    rows: tuple[Ids, ...]
    logits: Tensor
    """After each row, ``[rows, vocab]``."""
    mask: Tensor
    """int64 ``[rows, length]``, 1 for tokens; rows are padded on the left."""
    cache: Any
    """The model's keys and values of these columns, copied where rows go on; None for a host whose texts
    cannot be cut (:attr:`Host.continues`): what goes on from a row is run with it."""
    routes: Mapping[str, Tensor] = field(default_factory=dict)
    """What routers decided at the rows' ends, int64 ``[rows]`` by edit."""

    @overload
    def __getitem__(self, index: int) -> Ids: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Ids, ...]: ...
    def __getitem__(self, index: int | slice) -> Ids | tuple[Ids, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@torch.no_grad()
@locking.shared
def begin(host: Host, rows: Sequence[Ids], sets: Tensor | None = None) -> Begun:
    """Run rows together; ``sets``: number of each row's edit set, int64 ``[rows]``.

    Raises RequestError for a row longer than the model's window.
    """
    routes = {} if sets is None else {SETS: sets}
    if host.continues:
        return _begin(host, rows, routes)
    batch = host.batch(rows)
    line, last = torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])
    ran = host.run(host.as_pass(batch, at=(line, last), routes=routes))
    return Begun(tuple(rows), ran.logits, batch.mask, None, ran.routes)


def _begin(host: Host, rows: Sequence[Ids], routes: Mapping[str, Tensor] | None = None) -> Begun:
    batch = host.batch(rows, side="left")
    line = torch.arange(len(rows))
    last = torch.full_like(line, batch.ids.shape[1] - 1)
    ran = host.run(
        Pass(batch.ids, batch.mask, batch.positions, use_cache=True, at=(line, last), routes=routes or {})
    )
    return Begun(tuple(rows), ran.logits, batch.mask, ran.prefix, ran.routes)


@torch.no_grad()
@locking.shared
def behind(host: Host, begun: Begun, rows: Sequence[tuple[int, Ids]], at: tuple[Tensor, Tensor]) -> Tensor:
    """Run rows that go on from some begun: (which one, the tokens that follow).

    Returns logits ``[n, vocab]`` after the tokens (at[0][i], at[1][i]), counted in the given rows. Raises
    RequestError where the whole is longer than the model's window.
    """
    longest = max(len(begun.rows[i]) + len(row) for i, row in rows)
    if host.window is not None and longest > host.window:
        raise RequestError(f"a text of {longest} tokens is longer than the model's window of {host.window}")
    which = torch.tensor([i for i, _ in rows])
    batch = tokens.pad([row for _, row in rows], side="right", fill=host.pad_id, device=host.device)
    before = torch.tensor([len(begun.rows[i]) for i, _ in rows], device=host.device)
    last = torch.tensor([len(row) - 1 for _, row in rows], device=host.device)
    inside = torch.minimum(batch.positions, last[:, None])  # padding stays inside the window
    mask = torch.cat([begun.mask[which.to(begun.mask.device)], batch.mask], 1)
    ends = torch.full((len(rows),), begun.mask.shape[1] - 1)  # rows are padded on the left
    return host.run(
        Pass(
            batch.ids, mask, before[:, None] + inside, prefix=_selected(begun.cache, which), use_cache=True, at=at,
            ends=ends, routes=_chosen(begun.routes, which),
        )
    ).logits  # fmt: skip


def greedy(host: Host, begun: Begun, limits: Sequence[int], stop: Stop) -> list[list[int]]:
    """Say the most probable token after each row until it has said its answer; ids without the row's own.

    ``limits``: how many tokens each row may say.
    """
    return _say(host, begun, limits, stop, lambda logits, rows: logits.argmax(-1).tolist())


def draw(host: Host, begun: Begun, limits: Sequence[int], *, top_k: int, seed: int) -> list[list[int]]:
    """Draw each next token among the ``top_k`` most probable ones, up to the end token.

    Each row has a random state of its own, from the seed and its tokens, so neither its neighbours nor the
    global state matter.
    """
    states = [torch.Generator().manual_seed(_seed(seed, row)) for row in begun.rows]

    def choose(logits: Tensor, rows: Sequence[int]) -> list[int]:
        best, ids = logits.float().topk(min(top_k, logits.shape[-1]))
        bounds = best.double().softmax(-1).cumsum(-1).cpu()
        thrown = torch.stack([torch.rand((), generator=states[i], dtype=torch.float64) for i in rows])
        place = torch.searchsorted(bounds, thrown[:, None]).clamp_max(bounds.shape[-1] - 1)
        return ids.cpu().gather(1, place)[:, 0].tolist()

    return _say(host, begun, limits, "end", choose)


def _seed(seed: int, row: Ids) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:6], "big")


@torch.no_grad()
@locking.shared
def _say(host: Host, begun: Begun, limits: Sequence[int], stop: Stop, choose: Choose) -> list[list[int]]:
    ends = end_tokens(host)
    said: list[list[int]] = [[] for _ in begun.rows]
    alive = [i for i, limit in enumerate(limits) if limit > 0]
    front = _Front(host, begun, alive)
    logits = begun.logits[torch.tensor(alive, dtype=torch.long).to(begun.logits.device)]
    while alive:
        chosen = choose(logits, alive)
        for i, token in zip(alive, chosen, strict=True):
            said[i].append(token)
        texts = host.tokenizer.batch_decode([said[i] for i in alive], skip_special_tokens=True)
        going = [
            k
            for k, (i, text) in enumerate(zip(alive, texts, strict=True))
            if chosen[k] not in ends and len(said[i]) < limits[i] and not done(text, stop)
        ]
        alive = [alive[k] for k in going]
        if alive:
            logits = front.step(going, [chosen[k] for k in going])
    return said


class _Front:
    """What rows that are being continued have behind them."""

    def __init__(self, host: Host, begun: Begun, rows: Sequence[int]) -> None:
        self.host = host
        self.texts = [begun.rows[i] for i in rows]
        self.length = begun.mask.shape[1]
        """Columns of what was begun; rows end in the last one."""
        self.mask, self.cache, self.routes = begun.mask, begun.cache, begun.routes
        self.ends = torch.tensor([len(begun.rows[i]) - 1 for i in rows])
        self._keep(rows)

    def _keep(self, rows: Sequence[int]) -> None:
        """Leave only some of the rows."""
        if self.cache is None and rows:
            self.routes = _chosen(self.routes, torch.tensor(rows, dtype=torch.long))
        if self.cache is not None and rows:
            kept = torch.tensor(rows, dtype=torch.long) if len(rows) < len(self.mask) else None
            self.cache = _selected(self.cache, kept)
            if kept is not None:
                self.mask = self.mask[kept.to(self.mask.device)]
                self.routes = _chosen(self.routes, kept)

    def step(self, going: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """Put a token behind each row that goes on; logits after it ``[rows going, vocab]``."""
        if len(going) < len(self.texts):
            self._keep(going)
            self.ends = self.ends[torch.tensor(going)]
        self.texts = [(*self.texts[k], token) for k, token in zip(going, chosen, strict=True)]
        if self.cache is None:
            line, last = torch.arange(len(going)), torch.tensor([len(text) - 1 for text in self.texts])
            batch = self.host.batch(self.texts)
            own = {name: rows for name, rows in self.routes.items() if name == SETS}
            return self.host.run(self.host.as_pass(batch, at=(line, last), ends=self.ends, routes=own)).logits
        ids = torch.tensor(chosen, device=self.host.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(going), 1)], 1)
        position = self.mask.sum(1, keepdim=True) - 1
        ends = torch.full((len(going),), self.length - 1)
        ran = self.host.run(
            Pass(ids, self.mask, position, prefix=self.cache, use_cache=True, ends=ends, routes=self.routes)
        )
        self.cache = ran.prefix
        return ran.logits[:, -1]


def _selected(cache: Any, rows: Tensor | None) -> Any:
    """Copy a cache with some of its rows, None all; the given one stays as it is, whatever follows."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]  # a layer replaces its tensors as it grows
    for layer in made.layers:
        if rows is not None and layer.is_initialized:
            layer.batch_select_indices(rows.to(layer.keys.device))
    return made


def _chosen(routes: Mapping[str, Tensor], rows: Tensor) -> Mapping[str, Tensor]:
    """Return the decisions about some rows."""
    return {digest: entry[rows.to(entry.device)] for digest, entry in routes.items()}


def end_tokens(host: Host) -> frozenset[int]:
    """Return the ids that end a text, by the model's generation settings and by the tokenizer."""
    named = getattr(getattr(host.model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, (list, tuple)) else [named]
    own = getattr(host.tokenizer, "eos_token_id", None)
    return frozenset(int(token) for token in (*listed, own) if token is not None)


def plain(host: Host) -> bool:
    """Whether the model's generation settings leave greedy text as it is: each time the most probable token."""
    config = getattr(host.model, "generation_config", None)
    for name, default in plain_values().items():
        value = getattr(config, name, None)
        if (
            value is not None and value != default and (value or default)
        ):  # 0, False and [] are off where None is
            return False
    return True


@torch.no_grad()
@locking.shared
def works(host: Host) -> bool:
    """Try out whether a host's texts may be cut: two rows of different lengths, in one piece and in two.

    False for models that keep more than attention's keys and values.
    """
    if not keeps_attention_only(host):
        return False
    count = host.vocab_size
    rows = [tuple((7 * i + 3 + k) % count for i in range(5 + 2 * k)) for k in range(2)]
    line, column = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 5, 6])
    whole = host.forward_at(host.batch(rows), line, column)
    try:
        begun = _begin(host, [row[:-2] for row in rows])
        layers = getattr(begun.cache, "layers", [None])
        if not all(hasattr(layer, "batch_select_indices") for layer in layers):
            return False
        cut = behind(host, begun, [(0, rows[0][-2:]), (1, rows[1][-2:])], (line, torch.tensor([0, 1, 0, 1])))
    except TRIAL_ERRORS:
        return False
    return agree(whole, cut, host.dtype)
