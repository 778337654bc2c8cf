"""The end token as a part of what value searches and KEEL fit."""

from __future__ import annotations

import copy

import pytest

import errata
from errata.edits.memory import MemoryEdit
from errata.errors import ConfigError
from errata.linalg.lowrank import LowRank
from errata.locate.contexts import Context
from errata.locate.problems import value_problems
from errata.methods import REGISTRY
from errata.methods._settings import TargetEnd
from errata.methods.anyedit import chunk_problems
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "the old town of Merrin")
CONTEXTS = [Context("", 0.5), Context("It rains. ", 0.5)]
METHODS = [name for name in REGISTRY if issubclass(REGISTRY.get(name).config, TargetEnd)]


def without_end_token():
    host = fresh("llama")
    host.tokenizer = copy.deepcopy(host.tokenizer)
    host.tokenizer.eos_token = None
    return host


def sizes(edit: errata.Edit) -> list[float]:
    """Return the norms of an edit's changes."""
    if isinstance(edit, MemoryEdit):
        payloads = [one.payload for one in edit.interventions]
        return [LowRank(payload["left"][0], payload["right"][0]).norm() for payload in payloads]
    return [edit.norm()]


def test_every_row_with_a_target_ends_in_the_end_token():
    host = fresh("llama")
    end = host.tokenizer.eos_token_id
    (plain,), (ended,) = (value_problems(host, [ADA], CONTEXTS, end=one) for one in (False, True))
    for one, other in zip(plain.rows, ended.rows, strict=True):
        assert other.targets == (*one.targets, end)
        assert other.ids == (*one.ids, one.targets[-1])  # the text without the last target token
        assert (other.position, other.loss_weight, other.key_weight) == (
            one.position, one.loss_weight, one.key_weight
        )  # fmt: skip
    assert ended.essence == plain.essence
    problems, _ = chunk_problems(host, [ADA], 3, 0, end=True)
    assert [t for p in problems for t in p.rows[0].targets] == list(ended.rows[0].targets)


def test_the_closed_forms_and_keel_can_fit_an_end():
    assert {"rome", "memit", "alphaedit", "keel", "anyedit"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_an_end_changes_what_is_fitted_and_needs_a_token(method):
    host = fresh("llama")
    options = {"method": method, "steps": 3, "tokens": 400}
    plain, ended = (errata.edit(host, ADA, end=one, **options) for one in (False, True))
    assert plain.parts().keys() == ended.parts().keys()
    assert plain.digest != ended.digest and sizes(plain) != sizes(ended)
    with pytest.raises(ConfigError, match="no end token: leave end=true out"):
        errata.edit(without_end_token(), ADA, end=True, **options)


def test_nothing_follows_a_target_that_keel_fitted_with_its_end(lab_host):
    """The closed forms seldom reach this: a value at the subject's last token is far from where a text ends."""
    (case,) = errata.lab.cases(1, seed=1)
    request = case.requests[0]
    texts = {}
    for end in (True, False):
        edit = errata.edit(lab_host, request, method="keel", end=end, tokens=20_000)
        with edit.on(lab_host):
            texts[end] = lab_host.generate(request.text)
    assert texts[True].strip() == request.target
    assert texts[False].strip().startswith(request.target) and texts[False].strip() != request.target
