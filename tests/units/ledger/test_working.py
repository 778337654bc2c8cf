"""A ledger's host: whatever is put in place and taken off, its weights are those of the edits in place, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from errata.errors import EditError, LedgerError
from errata.ledger import reverting
from errata.ledger.contents import load_edit
from errata.ledger.working import Working
from errata.methods._method import Workspace
from errata.types import Corpus
from tests.models import fresh
from tests.units.ledger.small import add, of_host, random_edit

EDITS = 5


class Machine(RuleBasedStateMachine):
    """Edits applied, reverted and reset at random, as a user of several terminals would."""

    @initialize()
    def begin(self) -> None:
        import tempfile
        from pathlib import Path

        self.host = fresh("llama")
        self.base = self.host.weights_hash()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = of_host(Path(self.folder.name), self.host)
        self.working = Working(self.ledger, self.host)
        self.edits = [random_edit(self.host, i) for i in range(EDITS)]
        self.expected: list[str] = []
        self.seen: list[list[str]] = [[]]

    @rule(which=st.integers(0, EDITS - 1))
    def apply(self, which: int) -> None:
        edit = self.edits[which]
        if edit.digest not in self.expected:
            add(self.ledger, edit)
            self.expected = [*self.expected, edit.digest]
            self.seen.append(self.expected)

    @precondition(lambda self: self.expected)
    @rule(which=st.integers(0, 99))
    def revert(self, which: int) -> None:
        digest = self.expected[which % len(self.expected)]
        reverting.revert(self.ledger, digest)
        self.expected = [one for one in self.expected if one != digest]

    @rule(which=st.integers(0, 99))
    def reset(self, which: int) -> None:
        target = self.seen[which % len(self.seen)]
        reverting.reset(
            self.ledger,
            target[-1] if target and self.ledger.active_at(target[-1]) == tuple(target) else "base",
        )
        self.expected = list(self.ledger.state().active)

    @rule()
    def show(self) -> None:
        self.working.show(self.ledger.state().active)

    @invariant()
    def weights_are_those_of_the_edits_in_place(self) -> None:
        active = self.ledger.state().active
        assert list(active) == self.expected
        with self.working.showing(active) as host:
            found = host.weights_hash()
        other = fresh("llama")
        for digest in reversed(active):  # another order of placing gives the same bits
            load_edit(self.ledger, digest).apply_(other)
        assert found == other.weights_hash()
        assert (found == self.base) == (not active)

    def teardown(self) -> None:
        if hasattr(self, "working"):
            self.working.show(())
            assert self.host.weights_hash() == self.base
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
test_apply_revert_and_reset_in_any_order = Machine.TestCase


def test_another_model_is_refused(tmp_path):
    ledger = of_host(tmp_path, fresh("llama"))
    with pytest.raises(LedgerError, match="the ledger is about host"):
        Working(ledger, fresh("llama", seed=1))


def test_an_edit_that_cannot_be_placed_leaves_those_before_it(tmp_path):
    host, other = fresh("llama"), fresh("llama", seed=1)
    ledger = of_host(tmp_path, host)
    good, foreign = random_edit(host, 1), random_edit(other, 2)
    add(ledger, good)
    add(ledger, foreign)
    working = Working(ledger, host)
    with pytest.raises(EditError, match="edit made for host"):
        working.show(ledger.state().active)
    assert working.active == (good.digest,) and host.placed == (good.digest,)
    working.show(())
    assert not host.placed


def test_a_damaged_file_is_refused_before_the_model_is_touched(tmp_path):
    host = fresh("llama")
    ledger = of_host(tmp_path, host)
    add(ledger, random_edit(host, 1))
    add(ledger, random_edit(host, 2))
    path = ledger.file(ledger.state().active[1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    working, before = Working(ledger, host), host.weights_hash()
    with pytest.raises(LedgerError, match="was changed after"):
        working.show(ledger.state().active)
    assert host.weights_hash() == before and not host.placed


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_beneath_edits_are_the_unedited_hosts(layer):
    host = fresh("llama")
    edit = random_edit(host, 1, scale=1.0)
    texts = Corpus("some", lambda: [f"word {i} and more words of text" for i in range(40)])
    site = host.layout.site(layer)

    def factor(work: Workspace) -> torch.Tensor:
        found = work.costs(host, [site], 200)[site].factor
        assert found is not None
        return found

    alone = factor(Workspace(corpus=texts))
    with edit.on(host):
        beneath = factor(Workspace(corpus=texts, beneath=[edit]))
        edited = factor(Workspace(corpus=texts))
        assert host.placed == (edit.digest,)
    assert torch.equal(alone, beneath)
    assert torch.equal(alone, edited) == (layer == 0)  # what layer 0 reads is below all that the edit changes
