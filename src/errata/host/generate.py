"""Continue rows of token ids: greedily, by drawing among the most probable tokens, by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.host import locking, passes, trial
from errata.host.generation_settings import is_plain
from errata.host.text import TextHost

if TYPE_CHECKING:  # opens transformers, which most uses of this file do without
    from errata.host.stopping import Stop


@locking.shared
def generate_rows(
    host: TextHost, rows: Sequence[tuple[int, ...]], max_new_tokens: int, stop: Stop = "sentence",
    sets: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Continue rows of token ids greedily; the new text only, cut at its natural stop.

    Rows that were run already (``decoding.Prefixes``) are continued. No row takes more tokens than the model's
    window holds. ``sets``: number of each row's edit set, int64 ``[rows]``.
    """
    from errata.host import decoding, stopping

    if host.fills:
        stop = "end"
    if (host.continues_rows(rows) and is_plain(host)) or host.fills or not hasattr(host.model, "generate"):
        prefixes = rows if isinstance(rows, decoding.Prefixes) else decoding.run_prefixes(host, rows, sets)
        ids: Any = decoding.greedy(host, prefixes, _limits(host, rows, max_new_tokens), stop)
    else:
        from transformers import StoppingCriteriaList

        def stops(length: int) -> Any:
            return StoppingCriteriaList([stopping.NaturalStop(host.tokenizer, length, stop)])

        limit = min(_limits(host, rows, max_new_tokens))
        ids = _generate(host, rows, limit, stops, sets, do_sample=False)
    return [stopping.cut(text, stop) for text in host.decode(ids)]


def _limits(host: TextHost, rows: Sequence[tuple[int, ...]], most: int) -> list[int]:
    """Return how many tokens each row may take: one at least, as all fit before it."""
    rooms = [host.room(tuple(row)) for row in rows]
    return [most if room is None else min(max(1, most) if room else 0, room) for room in rooms]


@locking.shared
def draw_rows(
    host: TextHost, rows: Sequence[tuple[int, ...]], total: int, *, top_k: int = 5, seed: int = 0
) -> list[str]:
    """Continue rows by drawing among the ``top_k`` most probable tokens, up to ``total`` with the row's own.

    A row's text depends on seed and row, not on its neighbours or the global random state. Rows that were run
    already are continued.
    """
    from errata.host import decoding

    limits = [min(total - len(row), one) for row, one in zip(rows, _limits(host, rows, total), strict=True)]
    prefixes = rows if isinstance(rows, decoding.Prefixes) else decoding.run_prefixes(host, rows)
    ids = decoding.sample(host, prefixes, limits, top_k=top_k, seed=seed)
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


@locking.exclusive
def sample_rows(
    host: TextHost, rows: Sequence[Sequence[int]], new_tokens: int, *, top_k: int | None, seed: int,
    temperature: float = 1.0,
) -> list[str]:  # fmt: skip
    """Continue rows of token ids by sampling exactly ``new_tokens`` tokens each.

    ``top_k`` keeps the k most probable tokens at each step, None all; logits are divided by ``temperature``. The
    global random state is left as it was.
    """
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        ids = _generate(
            host, rows, new_tokens, None, do_sample=True, top_k=top_k or 0, top_p=1.0, temperature=temperature,
            min_new_tokens=new_tokens,
        )  # fmt: skip
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _generate(
    host: TextHost, rows: Sequence[Sequence[int]], new_tokens: int, stops: Callable[[int], Any] | None,
    sets: Tensor | None = None, **options: Any,
) -> list[list[int]]:  # fmt: skip
    """Let transformers continue rows, those together that do not disturb one another; the new ids of each.

    ``stops``: makes stopping criteria from the length of what is continued.
    """
    settings = {"temperature": None, "top_p": None, "top_k": None, "num_beams": 1, **options}
    manner = host.padding
    if manner == "uncached":
        settings["use_cache"] = False
    new: list[list[int]] = [[] for _ in rows]
    for group in trial.groups(rows, manner):
        batch = host.batch([rows[i] for i in group], side="left")
        length = batch.ids.shape[1]
        if stops is not None:
            settings["stopping_criteria"] = stops(length)
        own = {} if sets is None else {passes.SETS: sets[torch.tensor(group)]}
        out = host.generate_batch(batch, own, max_new_tokens=new_tokens, **settings)
        for i, ids in zip(group, out[:, length:].tolist(), strict=True):
            new[i] = ids
    return new
