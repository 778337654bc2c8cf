"""States of labelled texts: what modules give at the tokens that a label is about, and which maps read a norm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import linear_modules
from errata.host.tokens import by_length
from errata.types import Concept

BATCH_TOKENS = 4096
Tokens = Literal["last", "all"]


@dataclass(frozen=True)
class LabelledRows:
    """Texts as ids, with the tokens that are examples of each text's label."""

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    """Indices of the tokens in each row."""
    labels: Tensor
    """Number of the label of each token, int64 ``[n]``, text by text."""


def labelled_rows(host: Host, concept: Concept, tokens: Tokens = "last") -> LabelledRows:
    """Tokenise a concept's texts. ``tokens``: the last one of each subject, or text without one; or all of them.

    Raises RequestError for a text or subject that no token covers.
    """
    rows, positions, labels = list[tuple[int, ...]](), list[tuple[int, ...]](), list[int]()
    for text, label in zip(concept.texts, concept.indices(), strict=True):
        encoding = host.encode(text.text)
        part = text.text.strip() if text.subject is None else text.subject
        start = text.text.index(part)
        last = encoding.last_of(start, start + len(part))
        first = encoding.first_of(start, start + len(part)) if tokens == "all" else last
        rows.append(encoding.ids[: last + 1])  # later tokens cannot influence it in a causal model
        positions.append(tuple(range(first, last + 1)))
        labels += [label] * (last + 1 - first)
    return LabelledRows(tuple(rows), tuple(positions), torch.tensor(labels))


@torch.no_grad()
def module_states(
    host: Host, texts: LabelledRows, modules: Sequence[str], changes: Mapping[str, Callable[[Tensor], Tensor]] = {}, *,
    inputs: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return what modules give at the labelled tokens, each ``[n, d]`` on the CPU, in float32 at least.

    ``changes``: maps ``[..., d]`` of the outputs of modules, in place meanwhile at every token. ``inputs``: what they
    get instead.
    """
    dtype = torch.promote_types(host.dtype, torch.float32)
    found: dict[str, dict[int, Tensor]] = {path: {} for path in modules}
    for group in by_length(texts.rows, BATCH_TOKENS):

        def keep(into: dict[int, Tensor], group: Sequence[int]) -> Callable[[Tensor], None]:
            def act(output: Tensor) -> None:
                for line, i in enumerate(group):
                    into[i] = output[line, list(texts.positions[i])].to("cpu", dtype)

            return act

        with contextlib.ExitStack() as stack:
            for path, change in changes.items():
                stack.enter_context(hooks.on_output(host.model.get_submodule(path), _wide(change)))
            for path in modules:
                look: Any = hooks.on_input if inputs else hooks.on_output
                stack.enter_context(look(host.model.get_submodule(path), keep(found[path], group)))
            host.forward(host.batch([texts.rows[i] for i in group]), keep=1)
    return {path: torch.cat([rows[i] for i in range(len(texts.rows))]) for path, rows in found.items()}


def _wide(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a change of outputs that is computed in float32 at least, as edits compute it."""

    def act(output: Tensor) -> Tensor:
        return change(output.to(torch.promote_types(output.dtype, torch.float32))).to(output.dtype)

    return act


@torch.no_grad()
def norm_readers(host: Host, layer: int) -> dict[str, tuple[str, ...]]:
    """Return a block's norms whose output linear maps read as it is, each with the paths of those maps.

    Found by running one text: a norm is a module with vectors as its only parameters, and a map reads it if it gets
    the very tensor that the norm gave. Raises HostError for a block without any.
    """
    prefix = host.layout.blocks[layer]
    block = host.model.get_submodule(prefix)
    given, read = dict[str, Tensor](), dict[str, Tensor]()  # kept, so that no memory is used twice

    def note(into: dict[str, Tensor], path: str) -> Any:
        def act(tensor: Tensor) -> None:
            into.setdefault(path, tensor)

        return act

    with contextlib.ExitStack() as stack:
        for path, module in block.named_modules():
            if path and _is_norm(module):
                stack.enter_context(hooks.on_output(module, note(given, path)))
        for path, module in linear_modules(block):
            stack.enter_context(hooks.on_input(module, note(read, path)))
        host.forward(host.batch([host.encode("one two").ids]), keep=1)
    readers = {
        f"{prefix}.{norm}": tuple(
            f"{prefix}.{path}" for path, tensor in read.items() if _same(tensor, output)
        )
        for norm, output in given.items()
    }
    readers = {norm: paths for norm, paths in readers.items() if paths}
    if not readers:
        raise HostError(f"no norm of {prefix} is read by a linear map as it is; use where: block")
    return readers


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(one.ndim == 1 for one in own) and not list(module.children())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
