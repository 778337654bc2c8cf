"""Taking edits out: an edit that another includes is taken out of it as if it had never been made."""

from __future__ import annotations

import pytest
import torch

from errata.edits.algebra import retract
from errata.errors import LedgerError
from errata.job import prepare
from errata.ledger import reverting
from errata.ledger.contents import facts_of, keep, load_edit
from errata.ledger.store import Ledger
from errata.types import Corpus, Request
from tests.models import fresh
from tests.units.ledger.small import add, of_host, random_edit

TEXTS = Corpus("some", lambda: [f"word {i} and more words of text" for i in range(40)])
OPTIONS = {"layers": [1], "tokens": 200, "steps": 2, "contexts": 2, "context_tokens": 4}
REQUESTS = [Request("{} lives in", name, "Rome", id=name) for name in ("Ada", "Bob", "Eve")]


@pytest.fixture
def chain(tmp_path):
    """Three alphaedit edits, each continuing and including the one before; the third is in place."""
    host = fresh("llama")
    ledger = of_host(tmp_path, host)
    digests: list[str] = []
    for request in REQUESTS:
        after = load_edit(ledger, digests[-1]) if digests else None
        edit = prepare(host, request, method="alphaedit", options=OPTIONS, corpus=TEXTS, after=after).run()
        ledger.append("proposed", edit=edit.digest, body=facts_of(edit, keep(ledger, edit), ()))
        ledger.append("applied", edit=edit.digest, body={"replaces": digests[-1:]})
        digests.append(edit.digest)
    assert ledger.state().active == (digests[-1],)
    return ledger, digests


def dense(ledger: Ledger) -> dict[str, torch.Tensor]:
    """Return the change of each weight by all edits in place."""
    total: dict[str, torch.Tensor] = {}
    for digest in ledger.state().active:
        for name, delta in load_edit(ledger, digest).deltas.items():  # type: ignore[attr-defined]
            change = delta.dense() if hasattr(delta, "dense") else delta
            total[name] = total.get(name, 0) + change
    return total


def test_the_latest_gives_its_place_back(chain):
    ledger, digests = chain
    reverting.revert(ledger, digests[2], reason="wrong")
    assert ledger.state().active == (digests[1],)
    reverting.revert(ledger, digests[1])
    reverting.revert(ledger, digests[0])
    assert ledger.state().active == ()


@pytest.mark.parametrize("which", [0, 1])
def test_one_in_the_middle_is_taken_out_exactly(chain, which):
    """As if it had never been made: the same as solving for the other requests alone."""
    ledger, digests = chain
    # the first edit holds one request, the second that one too: taking out the second takes both
    names = {0: ["Bob", "Eve"], 1: ["Eve"]}[which]
    whole = load_edit(ledger, digests[2])
    expected = retract(whole, [r.id for r in REQUESTS if r.id not in names])
    reverting.revert(ledger, digests[which])
    (rest,) = ledger.state().active
    assert rest == expected.digest
    assert [r["id"] for r in ledger.state().edits[rest].requests] == names
    ledger.events()
    reverting.revert(ledger, rest)  # what is left goes as a whole; nothing comes back
    assert ledger.state().active == ()


def test_single_requests_are_taken_out(chain):
    ledger, digests = chain
    reverting.take_out(ledger, digests[2], [1], reason="Bob moved")
    (rest,) = ledger.state().active
    assert [r["id"] for r in ledger.state().edits[rest].requests] == ["Ada", "Eve"]
    reverting.take_out(ledger, rest, [0, 1])
    assert ledger.state().active == ()
    reverting.reset(ledger, digests[2])
    assert ledger.state().active == (digests[2],)


def test_what_is_not_in_place_is_refused(chain):
    ledger, digests = chain
    reverting.reset(ledger, "base")
    with pytest.raises(LedgerError, match="is not in place"):
        reverting.revert(ledger, digests[0])
    with pytest.raises(LedgerError, match="has no edit"):
        reverting.revert(ledger, "ffffff")


def test_an_edit_that_cannot_be_taken_apart_says_so(tmp_path):
    host = fresh("llama")
    ledger = of_host(tmp_path, host)
    one = random_edit(host, 1)
    from dataclasses import replace

    two = replace(one, provenance=replace(one.provenance, requests=tuple(REQUESTS)))
    add(ledger, two)
    with pytest.raises(LedgerError, match="revert the whole edit"):
        reverting.take_out(ledger, two.digest, [0])
    assert ledger.state().active == (two.digest,)
