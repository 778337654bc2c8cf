"""What the routers of text edits look at: a prompt's text, a module's states at its end, its sentence vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Router
from errata.edits.routers.cross import Cross
from errata.errors import EditError
from errata.host import hooks, passes
from errata.host.base import ModelHost
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.host.pairs import pair_digest, read_pairs
from errata.host.preference import preference


def question(
    host: Host | None, router: Router, text: str, row: Sequence[int] | None, module: str
) -> Question:
    """Return what a router may look at about one prompt.

    ``host``: reads the prompt for routers that do not decide by its text alone. ``row``: its ids, where they are known.
    ``module``: the one whose states the router reads; empty: none.
    """
    empty = torch.zeros(1, 0)
    if host is None or router.reads <= {"text"}:
        return Question(empty, empty, lambda: [text])
    inputs = outputs = empty
    if module:
        with passes.without_interventions():
            inputs, outputs = states_at_end(host, host.encode_prompt(text) if row is None else row, module)
    return Question(
        inputs, outputs, lambda: [text], lambda: _vectors(host, router, text),
        lambda prompts, first, second: preference(host, prompts, first, second),
        lambda facts, prompts: _pairs(host, router, facts, prompts),
    )  # fmt: skip


def _vectors(host: Host, router: Router, text: str) -> Tensor:
    with passes.without_interventions():
        return embed(host, [text], encoder=router.facts().get("encoder"))


def _pairs(host: Host, router: Router, facts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    if not isinstance(router, Cross):
        raise EditError(f"a {router.name} router does not say how pairs are read")
    with passes.without_interventions():
        return read_pairs(host, router.reader, facts, prompts)


@torch.no_grad()
def states_at_end(host: Host, row: Sequence[int], module: str) -> tuple[Tensor, Tensor]:
    """Return a module's input ``[1, d_in]`` and output ``[1, d_out]`` at a row's last token, float32, on the CPU."""
    layer = host.model.get_submodule(module)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    with hooks.on_input(layer, inputs.append), hooks.on_output(layer, outputs.append):
        host.forward(host.batch([tuple(row)]), keep=1)
    return inputs[0][:, -1].float().cpu(), outputs[0][:, -1].float().cpu()


def check_module(router: Router, module: str) -> None:
    """Raise EditError unless a module is named exactly where the router reads one's states, for one entry a row."""
    if router.several:
        raise EditError(f"a {router.name} router lets several entries act on a row: use it in a memory")
    if bool(module) != ("states" in router.reads):
        raise EditError(
            f"a {router.name} router reads a module's states: name the module"
            if not module
            else f"a {router.name} router reads no module's states: leave module out"
        )


def check_reader(host: ModelHost, router: Router, module: str) -> None:
    """Raise EditError where a host cannot show a router what it reads, or its sentence encoder is another one."""
    if router.reads <= {"text"}:
        return
    if not isinstance(host, Host):
        raise EditError(f"a {router.name} router runs the model to decide, and {host.name} reads no text")
    if module:
        try:
            host.model.get_submodule(module)
        except AttributeError as error:
            raise EditError(f"the host has no module {module!r}, which the router reads") from error
    if isinstance(router, Cross):
        _check_pairs(host, router)
    if "vectors" in router.reads:
        facts = router.facts()
        found = encoder_digest(host, facts.get("encoder"))
        if found != facts.get("encoder_digest"):
            raise EditError(
                f"the edit's vectors were made by an encoder with checksum {facts.get('encoder_digest')}, and "
                f"{facts.get('encoder')!r} has {found}; open the same encoder, or fit the edit again"
            )


def _check_pairs(host: Host, router: Cross) -> None:
    """Raise EditError where another cross-encoder would read pairs, or the host has no such block."""
    found = pair_digest(host, router.model)
    if found != router.model_digest:
        raise EditError(
            f"the edit's scope is decided by a cross-encoder with checksum {router.model_digest}, and "
            f"{router.model!r} has {found}; open the same one, or fit the edit again"
        )
    depth = len(host.layout.blocks)
    if router.model is None and not 0 <= router.layer < depth:
        raise EditError(f"the edit's scope is decided in block {router.layer}, and the host has {depth}")
