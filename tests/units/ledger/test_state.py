"""The state is a fold over events: what each kind does to the edits in place, and how a revision is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import LedgerError
from errata.ledger.events import FIRST, Event
from errata.ledger.state import check_tag, fold, revision

NAMES = [f"{i:x}" * 16 for i in range(1, 7)]
WHEN = "2026-01-01T00:00:00+00:00"


def chain(*drafts: tuple[str, str, dict]) -> list[Event]:
    """Return events that follow one another, the first of them the ledger's creation."""
    events, previous = [], FIRST
    for number, (kind, edit, body) in enumerate([("created", "", {"name": "m"}), *drafts], 1):
        events.append(Event(kind, WHEN, "a", edit=edit, body=body, previous=previous, number=number))
        previous = events[-1].id
    return events


def proposals() -> list[tuple[str, str, dict]]:
    return [("proposed", name, {"method": "m", "requests": [], "blob": "0" * 64}) for name in NAMES]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["applied", "reverted", "reset"]), st.integers(0, 5), st.integers(0, 9))
    )
)
def test_the_fold_agrees_with_a_plain_list(steps):
    """Whatever is applied, reverted and reset: a list that is edited by hand has the same edits in place."""
    drafts, naive, seen = proposals(), [], [[]]
    for kind, which, back in steps:
        name = NAMES[which]
        if kind == "applied" and name not in naive:
            naive = [*naive, name]
            drafts.append((kind, name, {}))
        elif kind == "reverted" and name in naive:
            naive = [one for one in naive if one != name]
            drafts.append((kind, name, {}))
        elif kind == "reset":
            naive = seen[back % len(seen)]
            drafts.append((kind, "", {"active": naive, "to": "x"}))
        seen.append(naive)
    assert list(fold(chain(*drafts)).active) == naive


def test_an_edit_takes_the_place_of_those_it_includes_and_gives_it_back():
    a, b, c, d = NAMES[:4]
    drafts = [*proposals(), ("applied", a, {}), ("applied", b, {}), ("applied", c, {})]
    drafts.append(("applied", d, {"replaces": [b]}))
    assert fold(chain(*drafts)).active == (a, d, c)
    assert fold(chain(*drafts)).edits[d].replaces == (b,)
    drafts.append(("reverted", d, {"restores": [b]}))
    assert fold(chain(*drafts)).active == (a, b, c)


def test_a_revision_has_many_names():
    a, b = NAMES[:2]
    events = chain(
        *proposals(), ("applied", a, {}), ("tagged", "", {"name": "v1", "number": 8}), ("applied", b, {})
    )
    state = fold(events)
    assert state.find_event("base") == 0 and state.find_event("now") == len(events)
    assert state.find_event("v1") == 8 == state.find_event(a[:6]) == state.find_event("8")
    assert state.find_event(events[7].id[:10]) == 8
    assert fold(events[:8]).active == (a,)
    assert fold(events[:0]).active == ()
    with pytest.raises(LedgerError, match="never in place"):
        state.find_event(NAMES[4])


@pytest.mark.parametrize("name", ["", "12", "99", "ffff", "v2", "\0", "1" * 5000, "../x", "é"])
def test_an_unknown_revision_is_refused(name):
    with pytest.raises(LedgerError, match="has no revision"):
        fold(chain(*proposals())).find_event(name)


def test_the_beginning_of_several_ids_is_refused():
    first, second = "abcd" + "0" * 12, "abcd" + "1" * 12
    drafts = [("proposed", one, {"method": "m", "requests": [], "blob": ""}) for one in (first, second)]
    with pytest.raises(LedgerError, match="begins 2 ids"):
        fold(chain(*drafts)).find_edit("abcd")
    assert fold(chain(*drafts)).find_edit("abcd0").digest == first


@pytest.mark.parametrize("name", ["v1", "release/2026-11", "a.b_c"])
def test_a_name_of_a_tag(name):
    check_tag(name)


@pytest.mark.parametrize(
    "name", ["", "base", "NOW", "abcd", "deadbeef", "1", "-x", "a..b", "a b", "a\0", "x" * 101]
)
def test_what_no_tag_is_called(name):
    with pytest.raises(LedgerError, match="cannot be called"):
        check_tag(name)


def test_revisions_differ_by_edits_and_order():
    a, b = NAMES[:2]
    names = {revision(()), revision((a,)), revision((b,)), revision((a, b)), revision((b, a))}
    assert len(names) == 5 and "base" in names
