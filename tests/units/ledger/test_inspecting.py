"""Blame, bisect, check, diff and merge on the embedded model: the right edit is named, and the host is left alone."""

from __future__ import annotations

import shutil

import pytest

from errata.errors import ConflictError, LedgerError
from errata.ledger import folders, inspecting, merging, reverting
from errata.ledger.recording import Order, guard_of, record
from errata.ledger.settings import GuardSettings, LedgerSettings
from errata.ledger.working import Working, describe
from errata.types import Request
from tests.units.ledger.small import add

SETTINGS = LedgerSettings(model="lab", guard=GuardSettings(prompts=20, statements=4, texts=20))
BORN = Request("{} was born in", "Ada Brenner", "Tallow", id="born")
PLAYS = Request("{} plays the", "Boris Sorwick", "violin", id="plays")
LIVES = Request("{} lives in", "Ivor Hartette", "Merrin", id="lives")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lab_host):
    """A ledger of the embedded model with three edits."""
    folder = tmp_path_factory.mktemp("ledger")
    ledger = folders.create(folder, SETTINGS, describe(lab_host, "lab"))
    working = Working(ledger, lab_host)
    for request in (BORN, PLAYS, LIVES):
        outcome = record(working, [request], Order("keel", reason=f"{request.id} was wrong", author="Ada"))
        assert outcome.passed, outcome.attempts[0].verdict
    working.show(())
    return folder


@pytest.fixture
def working(folder, tmp_path, lab_host):
    """The same ledger in a copy of its own, with its host as it was before."""
    shutil.copytree(folder, tmp_path / "copy")
    before = lab_host.weights_hash()
    working = Working(folders.find(tmp_path / "copy"), lab_host)
    yield working
    working.show(())
    assert lab_host.weights_hash() == before and not lab_host.placed


@pytest.mark.parametrize(
    ("request_", "number"), [(BORN, 0), (PLAYS, 1), (LIVES, 2)], ids=["born", "plays", "lives"]
)
def test_blame_names_the_edit(working, request_, number):
    found = inspecting.blame(working, request_.text)
    first = found.suspects[0]
    assert first.edit == working.ledger.state().active[number] and first.to_blame
    assert [one.to_blame for one in found.suspects] == [True, False, False]
    assert request_.target in found.answer and first.answer == found.base
    assert first.strength == max(one.strength for one in found.suspects)  # the cheap screen finds it too


def test_blame_with_one_to_leave_out_asks_the_strongest(working):
    found = inspecting.blame(working, PLAYS.text, most=1)
    assert [one.answer is not None for one in found.suspects] == [True, False, False]
    assert found.suspects[0].to_blame


def test_two_edits_of_one_fact_are_to_blame_together(working):
    add(working.ledger, working.fit([BORN], method="keel", options={"contexts": 4}))  # on the unedited model
    found = inspecting.blame(working, BORN.text)
    assert found.together and not any(one.to_blame for one in found.suspects)


def test_bisect_finds_the_edit_that_broke_an_answer(working):
    base = [Request(BORN.prompt, BORN.subject, "Rowanport"), Request(PLAYS.prompt, PLAYS.subject, "harp")]
    first, second, _ = working.ledger.state().active
    assert inspecting.bisect(working, base[:1]).edit == first
    found = inspecting.bisect(working, base[1:])
    assert found.edit == second and found.failing == ("1",) and found.asked <= 4
    assert inspecting.bisect(working, base).edit == first
    kept = inspecting.bisect(working, [Request("{} is employed by", "Ada Brenner", "Zenith Works")])
    assert kept.edit is None and kept.base_passes and kept.now_passes
    never = inspecting.bisect(working, [BORN])
    assert never.edit is None and not never.base_passes and never.now_passes


def test_diff_lists_what_changed_between_two_revisions(working):
    ledger = working.ledger
    first, second, third = ledger.state().active
    rows, asked = inspecting.diff(working, (first,), (first, second, third))
    changed = {row.prompt: (row.first, row.second) for row in rows}
    assert asked >= 3 and BORN.text not in changed
    assert "harp" in changed[PLAYS.text][0] and "violin" in changed[PLAYS.text][1]
    assert inspecting.diff(working, (first,), (first,))[0] == []


def test_check_passes_and_names_what_fails(working):
    guard = guard_of(working)
    assert inspecting.check(working, [], guard).passed
    given = [Request("{} is employed by", "Ada Brenner", "Merrin")]
    found = inspecting.check(working, given, guard)
    assert [(f["kind"], f["prompt"], f["expected"]) for f in found.failures] == [
        ("given", "Ada Brenner is employed by", "Merrin")
    ]


def test_check_reads_every_file(working):
    path = working.ledger.file(working.ledger.state().active[1])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(LedgerError, match="was changed after"):
        inspecting.check(working, [], guard_of(working))


# --- conflicts and merging ------------------------------------------------------------------


def test_a_contradiction_is_refused_with_both_names(working):
    with pytest.raises(
        ConflictError, match=r"Ada Brenner was born in.*Ostend.*contradicts.*'born' -> 'Tallow'"
    ):
        record(working, [Request(BORN.prompt, BORN.subject, "Ostend")], Order("keel"))
    assert len(working.ledger.events()) == 10


def test_a_contradiction_replaces_the_earlier_edit(working):
    first = working.ledger.state().active[0]
    new = Request(BORN.prompt, "ada  BRENNER".title().replace("  ", " "), "Ostend")
    outcome = record(working, [new], Order("keel", conflicts="replace"))
    assert outcome.passed and outcome.conflicts[0].sort == "contradiction"
    active = working.ledger.state().active
    assert first not in active and len(active) == 3
    with working.showing(active) as host:
        assert "Ostend" in host.generate(BORN.text, max_new_tokens=8)


def test_a_merge_brings_the_other_ledgers_edits(working, tmp_path, lab_host):
    other = folders.create(tmp_path / "other", SETTINGS, describe(lab_host, "lab"))
    theirs = Working(other, lab_host)
    new = Request("{} was born in", "Flora Zimley", "Tallow", id="flora")
    again = Request(BORN.prompt, BORN.subject, "Ostend", id="again")
    for request in (new, again):
        assert record(theirs, [request], Order("keel", reason="theirs", author="Eve")).passed
    theirs.show(())
    before = len(working.ledger.events())
    with pytest.raises(ConflictError, match="again"):
        merging.merge(working, other, Order(""))
    assert len(working.ledger.events()) == before
    outcome = merging.merge(working, other, Order("", conflicts="replace", reason="merge"))
    assert outcome.passed, [a.verdict for a in outcome.attempts]
    state = working.ledger.state()
    assert set(other.state().active) <= set(state.active) and len(state.active) == 4
    assert {one.sort for one in outcome.conflicts} >= {"contradiction"}
    assert state.edits[other.state().active[0]].facts["author"] == "Eve"
    assert merging.merge(working, other, Order("")).known == other.state().active


def test_a_merge_of_another_model_is_refused(working, tmp_path):
    from tests.units.ledger.small import empty

    with pytest.raises(LedgerError, match="only edits of one model"):
        merging.merge(working, empty(tmp_path / "other"), Order(""))


# --- the guard at work ----------------------------------------------------------------------


def test_a_collapse_is_stopped_and_the_model_is_as_before(working, lab_host):
    """Fine-tuning at a high rate on many facts: refused, recorded, nothing in place."""
    import errata

    requests = [case.request for case in errata.lab.cases(40, seed=3, together=True)]
    active, before = working.ledger.state().active, len(working.ledger.events())
    order = Order(
        "ft", options={"learning_rate": 1.0, "epsilon": None, "steps": 20}, halve=False, conflicts="keep"
    )
    outcome = record(working, requests, order)
    verdict = outcome.attempts[0].verdict
    assert verdict is not None and not verdict.passed and not outcome.applied
    assert any("perplexity" in failure for failure in verdict.failures), verdict.failures
    assert working.ledger.state().active == active
    kinds = [event.kind for event in working.ledger.events()[before:]]
    assert kinds == ["proposed", "verified"]


def test_a_batch_is_halved_down_to_what_fails(working):
    """One of four requests cannot be met: the other three are applied, it is listed."""
    impossible = Request("{} is employed by", "Flora Zimley", "Qqzzyx Wvvkj", id="impossible")
    good = [
        Request("{} was born in", "Flora Zimley", "Merrin", id="a"),
        Request("{} plays the", "Ivor Hartette", "violin", id="b"),
        Request("{} was born in", "Wanda Sorley", "Tallow", id="c"),
    ]
    outcome = record(working, [good[0], impossible, *good[1:]], Order("keel"))
    assert impossible in outcome.failed
    assert not outcome.passed
    held = [r for a in outcome.applied for r in a.requests]
    assert {r.id for r in held} | {r.id for r in outcome.failed} == {"a", "b", "c", "impossible"}


def test_an_edit_out_of_bounds_can_be_applied_and_that_is_recorded(working):
    impossible = Request("{} is employed by", "Flora Zimley", "Qqzzyx Wvvkj")
    outcome = record(working, [impossible], Order("keel", guard=False, options={"steps": 1}))
    assert outcome.passed and not outcome.attempts[0].verdict.passed
    event = next(e for e in reversed(working.ledger.events()) if e.kind == "verified")
    assert event.body["guard"] is False and event.body["passed"] is False


def test_edits_of_several_kinds_are_in_place_together(working):
    """A memory on top of weights, then weights fitted with the memory put aside; each off in any order."""
    memory = Request("{} was born in", "Flora Zimley", "Merrin")
    assert record(working, [memory], Order("keel_memory", guard=False)).passed
    weights = Request("{} plays the", "Ivor Hartette", "violin")
    assert record(working, [weights], Order("keel", guard=False)).passed
    ledger = working.ledger
    assert [ledger.state().edits[d].facts["kind"] for d in ledger.state().active][-2:] == ["memory", "weight"]
    reverting.revert(ledger, ledger.state().active[3])
    with working.showing(ledger.state().active) as host:
        assert "violin" in host.generate(weights.text, max_new_tokens=8)
        assert "Merrin" not in host.generate(memory.text, max_new_tokens=8)
