"""Any order of applying, taking back, casting, interrupting and changing from outside: no bit is ever lost."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import errata
from errata.errors import EditError
from tests.models import fresh
from tests.units.test_durability import Interrupt, bits, free, make

EDITS = 3
SPREAD = ((0, 2), (1, 2), (0, 1))
"""Layers that each edit changes: every two meet on one weight."""


@lru_cache(maxsize=1)
def model() -> Any:
    """A model whose weights are not exact in 16 bits, and its tokenizer."""
    host = fresh("gpt2", n_embd=8, n_inner=12, n_head=2, vocab_size=400)
    with torch.no_grad():
        for weight in host.model.parameters():
            weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return host


@lru_cache(maxsize=1)
def edits() -> list[Any]:
    return [make(model(), i, layers=SPREAD[i]) for i in range(EDITS)]


class LiveWeights(RuleBasedStateMachine):
    """What is known without looking at the model: base values, which edits are in place, how it was cast."""

    def __init__(self) -> None:
        super().__init__()
        self.host = errata.Host(copy.deepcopy(model().model), model().tokenizer, name="live")
        self.edits = [copy.copy(edit) for edit in edits()]
        self.base = bits(self.host)
        """The unedited model as it would be: what others did to a weight without edits counts."""
        self.kept = dict(self.base)
        """The bits of each weight from before the first edit that stands on it."""
        self.merged: set[int] = set()
        self.beside: set[int] = set()
        self.spoilt: set[str] = set()
        """Weights that something else has changed while an edit stood on them."""
        self.count = 0

    def on(self, name: str) -> set[int]:
        return {i for i in self.merged if name in self.edits[i].deltas}

    def weight(self, name: str) -> torch.Tensor:
        return self.host.model.get_parameter(name)

    @rule(i=st.integers(0, EDITS - 1), beside=st.booleans(), line=st.none() | st.integers(1, 130))
    def apply(self, i: int, beside: bool, line: int | None) -> None:
        edit = self.edits[i]
        spoilt = not beside and self.spoilt & set(edit.deltas)
        standing = {name: bool(self.on(name)) for name in edit.deltas}
        try:
            with nullcontext() if line is None else Interrupt(line):
                edit.apply_(self.host, foreign=True, merge=not beside)
        except KeyboardInterrupt:
            return  # nothing happened, as the invariant sees
        except EditError as error:
            assert i in self.merged | self.beside or spoilt, error
            return
        assert i not in self.merged | self.beside and not spoilt
        (self.beside if beside else self.merged).add(i)
        if not beside:
            self.kept.update({name: self.base[name] for name in edit.deltas if not standing[name]})

    @rule(i=st.integers(0, EDITS - 1), line=st.none() | st.integers(1, 90),
          outside=st.sampled_from(["refuse", "refuse", "discard", "leave"]))  # fmt: skip
    def revert(self, i: int, line: int | None, outside: Any) -> None:
        edit = self.edits[i]
        names = set(edit.deltas) if i in self.merged else set()
        spoilt = self.spoilt & names
        try:
            with nullcontext() if line is None else Interrupt(line):
                edit.revert_(self.host, outside=outside)
        except KeyboardInterrupt:
            if edit.in_place(self.host):
                edit.revert_(self.host, outside=outside)  # a second try finishes what the first began
        except EditError as error:
            assert i not in self.merged | self.beside or (spoilt and outside == "refuse"), error
            return
        else:
            assert i in self.merged | self.beside and (not spoilt or outside != "refuse")
        self.merged.discard(i)
        self.beside.discard(i)
        for name in spoilt:
            self.spoilt.discard(name)
            if outside == "leave":
                self.left(name)

    def left(self, name: str) -> None:
        """A weight stays as it is, and all edits that stood on it are forgotten there, not elsewhere."""
        self.base[name] = self.weight(name).detach().clone()
        for i in range(EDITS):
            deltas = dict(self.edits[i].deltas)
            if (
                i in self.merged
                and deltas.pop(name, None) is not None
                and not self.edits[i].in_place(self.host)
            ):
                self.merged.discard(i)
        self.forgotten(name)

    def forgotten(self, name: str) -> None:
        for i in sorted(self.merged):
            if name in self.edits[i].deltas:
                self.edits[i].revert_(self.host, outside="discard")
                self.merged.discard(i)
                self.spoilt -= {n for n in self.edits[i].deltas if not self.on(n)}

    @precondition(lambda self: not self.spoilt)
    @rule(kind=st.sampled_from([torch.bfloat16, torch.float32]))
    def cast(self, kind: torch.dtype) -> None:
        self.host.model.to(kind)
        standing = {name for i in self.merged for name in self.edits[i].deltas}
        for name, value in self.base.items():
            # below an edit the original bits are kept whole, however often the model is cast
            self.base[name] = (self.kept[name] if name in standing else value).to(kind)

    @rule(layer=st.integers(0, 2), how=st.sampled_from(["add", "data", "replace"]))
    def change(self, layer: int, how: str) -> None:
        name = model().layout.site(layer).parameter
        weight = self.weight(name)
        if how == "replace":
            path, _, leaf = name.rpartition(".")
            setattr(self.host.model.get_submodule(path), leaf, torch.nn.Parameter(weight.detach() + 0.25))
        elif how == "data":
            weight.data += 0.25
        else:
            with torch.no_grad():
                weight[0].add_(0.25)
        if self.on(name):
            self.spoilt.add(name)
        else:
            self.base[name] = self.weight(name).detach().clone()

    @rule()
    def fingerprint(self) -> None:
        if not self.spoilt:
            with torch.no_grad():
                plain = copy.deepcopy(model().model).to(self.host.dtype)
                for name, weight in plain.named_parameters():
                    weight.copy_(self.base[name])
            assert self.host.fingerprint == errata.Host(plain, self.host.tokenizer, name="plain").fingerprint

    @invariant()
    def what_is_in_place_is_known(self) -> None:
        assert list(self.host.placed) == sorted(self.edits[i].digest for i in self.merged | self.beside)
        assert free(self.host)
        for name, weight in self.host.model.named_parameters():
            if name not in self.spoilt and not self.on(name):
                assert torch.equal(weight, self.base[name]), name
        for name, stands in self.host.overlays.items():
            assert torch.equal(stands.base, self.kept[name]), f"{name}: the original bits are gone"

    def teardown(self) -> None:
        for i in sorted(self.merged | self.beside):
            if self.edits[i].in_place(self.host):
                self.edits[i].revert_(self.host, outside="discard")
        assert not self.host.placed
        for name, weight in self.host.model.named_parameters():
            assert torch.equal(weight, self.base[name]), name


def explore(sequences: int, steps: int) -> None:
    found = settings(
        max_examples=sequences, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(LiveWeights, settings=found)


def test_no_order_of_events_loses_a_bit():
    explore(25, 12)


@pytest.mark.slow
def test_no_order_of_events_loses_a_bit_at_length():
    explore(500, 15)
