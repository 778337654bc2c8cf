"""What only running a model tells: tried out on a few tokens rather than looked up by a family's name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from errata.errors import ErrataError, HostError
from errata.host import tokens
from errata.host.files import first_line
from errata.host.generation_settings import end_tokens
from errata.host.passes import Pass
from errata.host.text import Padding, TextHost

WINDOWS = (
    "max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_seq_len", "max_seq_length",
    "max_sequence_length", "model_max_length", "context_length",
)  # fmt: skip
"""Settings that bound a model's input, by the names families give them."""
STEPS = 3
"""New tokens of a trial generation."""


# --- at load --------------------------------------------------------------------------------


def check(host: TextHost) -> None:
    """Raise HostError for a model that does not run or is no causal one; warn of tokens without embedding."""
    _warn_of_vocabulary(host)
    try:
        end_tokens(host)
    except (TypeError, ValueError, OverflowError) as error:
        raise HostError(
            f"the end token of {host.name}'s generation settings is no number: {first_line(error)}"
        ) from error
    if host.reads_by_encoder:
        return
    if host.fills:
        _check_slots(host)
        return
    try:
        host.position_tables = tuple(_tables(host))  # here rather than later: a pass is seen by hooks
        with torch.no_grad():
            logits = host.forward(host.batch(_rows(host, (5, 5), last=1))).float()
    except ErrataError:
        raise
    except AttributeError as error:
        raise HostError(
            f"{type(host.model).__name__} gives no logits: {first_line(error)}; expected a causal language "
            "model, as AutoModelForCausalLM opens it"
        ) from error
    except Exception as error:
        if "pixel_values" in first_line(error):
            raise HostError(
                f"{type(host.model).__name__} reads no text without an image, so it cannot be edited as a language "
                f"model: {first_line(error)}"
            ) from error
        raise HostError(f"the model does not run: {first_line(error)}") from error
    if logits.ndim != 3 or logits.shape[:2] != (2, 5):
        raise HostError(
            f"{type(host.model).__name__} gives logits of shape {list(logits.shape)} for 2 x 5 tokens; "
            "expected a causal language model, with a score for each token of the vocabulary at each place"
        )
    change = (logits[0] - logits[1]).abs().amax(-1)  # [5]
    # tokens routed to experts together share products, so a causal model's bits may differ, too
    loose = 5e-2 if host.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if float(change[:-1].max()) > loose * float(change[-1]) + 1e-6 * float(logits.abs().max()):
        raise HostError(
            f"{type(host.model).__name__} is no causal language model: what it predicts depends on later tokens, "
            "as in masked language models; errata edits models that continue a text (AutoModelForCausalLM)"
        )


@torch.no_grad()
def _check_slots(host: TextHost) -> None:
    """Raise HostError where a model that fills places does not run, or gives other scores than those of a place."""
    try:
        host.position_tables = tuple(_tables(host))
        logits = host.forward(host.batch([host.encode_prompt("a")]), keep=1)
    except ErrataError:
        raise
    except Exception as error:
        if "pixel_values" in first_line(error):
            raise HostError(
                f"{type(host.model).__name__} reads no text without an image, so it cannot be edited as a language "
                f"model: {first_line(error)}"
            ) from error
        raise HostError(f"the model does not run: {first_line(error)}") from error
    if logits.ndim != 3 or logits.shape[:2] != (1, 1) or logits.shape[2] < host.vocab_size:
        raise HostError(
            f"{type(host.model).__name__} gives scores of shape {list(logits.shape)} for one place; expected "
            f"[1, 1, {host.vocab_size}], a score for each answer"
        )


def _rows(host: TextHost, lengths: Sequence[int], last: int = 0) -> list[tuple[int, ...]]:
    """Return rows of ids that begin alike; ``last``: how much the last token of each differs from the one before."""
    count = max(2, min(host.vocab_size, embedded(host.model) or host.vocab_size))
    return [
        (*((7 * k + 3) % count for k in range(n - 1)), (7 * n + i * last) % count)
        for i, n in enumerate(lengths)
    ]


# --- vocabulary -----------------------------------------------------------------------------


def embedded(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where that cannot be read off."""
    embeddings = model.get_input_embeddings()
    count = getattr(embeddings, "num_embeddings", None)
    if isinstance(count, int):
        return count
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def beyond(host: TextHost) -> dict[int, str]:
    """Return the tokenizer's tokens that the model has no embedding for, by their ids."""
    count = embedded(host.model)
    if count is None or not hasattr(host.tokenizer, "get_vocab"):
        return {}
    return {index: token for token, index in host.tokenizer.get_vocab().items() if index >= count}


def _warn_of_vocabulary(host: TextHost) -> None:
    extra = host.beyond
    if extra:
        names = ", ".join(f"{token!r:.40}" for _, token in sorted(extra.items())[:5])
        warnings.warn(
            f"the tokenizer of {host.name} has {len(extra)} tokens that the model has no embedding for ({names}"
            f"{', ...' if len(extra) > 5 else ''}): texts with them are refused; resize the model first "
            "(model.resize_token_embeddings(len(tokenizer))), or use the tokenizer it was trained with",
            RuntimeWarning,
            stacklevel=4,
        )


# --- window ---------------------------------------------------------------------------------


def window(host: TextHost) -> int | None:
    """Return the longest input in tokens: the smaller of the configuration's and the position tables' bounds."""
    settings = [getattr(host.text_config, name, None) for name in WINDOWS]
    bounds = [v for v in settings if isinstance(v, int) and not isinstance(v, bool) and v > 0][:1]
    return min([*bounds, *host.position_tables], default=None)


@torch.no_grad()
def _tables(host: TextHost) -> list[int]:
    """Find embeddings that are looked up by position, and how many positions each has room for.

    An offset in front, as OPT's, is no room.
    """
    rows = [row[::-1] for row in _rows(host, (4,))]  # falling ids are no positions
    lookups = _Lookups()
    batch = tokens.pad(rows, side="right", fill=0, device=host.device)
    with lookups:
        host.run(Pass(batch.ids, batch.mask, batch.positions))
    return lookups.room


class _Lookups(TorchFunctionMode):
    """Watches lookups in tables; records the room of those that are indexed by consecutive numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.room: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding and len(args) > 1 and not args[0].is_floating_point():
            ids = args[0].reshape(-1).tolist()
            if len(ids) == 4 and all(after - before == 1 for before, after in pairwise(ids)):
                self.room.append(int(args[1].shape[0]) - ids[0])
        return func(*args, **(kwargs or {}))


# --- padding --------------------------------------------------------------------------------


@torch.no_grad()
def padding(host: TextHost) -> Padding:
    """Find how rows may be generated from together so that each is continued as it is alone.

    Models that ignore the mask see padding as text. Raises HostError where even a row alone is continued
    otherwise than the model's forward pass predicts.
    """
    rows = _rows(host, (3, 6))
    alone = [host.forward(host.batch([row]))[0, -1].float() for row in rows]
    loose = 5e-2 if host.dtype in (torch.float16, torch.bfloat16) else 1e-3
    manners: dict[Padding, list[list[tuple[int, ...]]]] = {
        "left": [rows], "equal": [[row] for row in rows], "uncached": [[row] for row in rows]
    }  # fmt: skip
    for manner, groups in manners.items():
        try:
            steps = [_steps(host, group, cached=manner != "uncached") for group in groups]
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ):
            continue  # it takes rows in another manner, or none
        first = torch.cat([logits[0] for _, logits in steps])  # [2, vocab]
        near = [_near(first[i], alone[i], loose) for i in range(len(rows))]
        if all(near) and all(
            _follows(host, group, *generated, loose) for group, generated in zip(groups, steps, strict=True)
        ):
            return manner
    raise HostError(
        f"{type(host.model).__name__} continues texts otherwise than its forward pass predicts; it cannot be measured"
    )


def _near(one: Tensor, other: Tensor, loose: float) -> bool:
    return bool((one - other).abs().max() <= loose * other.abs().max())


def _steps(
    host: TextHost, rows: Sequence[tuple[int, ...]], *, cached: bool
) -> tuple[list[list[int]], list[Tensor]]:
    """Generate a few tokens; the new ids, and the logits ``[rows, vocab]`` before each."""
    batch = tokens.pad(rows, side="left", fill=host.pad_id, device=host.device)
    output = host.generate_batch(
        batch, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1, temperature=None,
        top_p=None, top_k=None, output_logits=True, return_dict_in_generate=True, use_cache=cached,
    )  # fmt: skip
    new = output.sequences[:, batch.ids.shape[1] :].tolist()
    return new, [logits.float() for logits in output.logits]


def _follows(
    host: TextHost, rows: Sequence[tuple[int, ...]], new: list[list[int]], logits: list[Tensor], loose: float
) -> bool:
    """Whether the last step's logits are those of the forward pass on each whole row."""
    last = len(logits) - 1
    return all(
        _near(logits[last][i], host.forward(host.batch([(*row, *new[i][:last])]))[0, -1].float(), loose)
        for i, row in enumerate(rows)
    )


def groups(rows: Sequence[Sequence[int]], manner: Padding) -> list[list[int]]:
    """Group rows that may be generated from together; indices into ``rows``."""
    if manner == "left":
        return [list(range(len(rows)))]
    alike: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(len(row), []).append(i)
    return list(alike.values())
