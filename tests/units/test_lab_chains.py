"""Chains of edits on the lab: what is edited, what follows, and which prompts imply a subject."""

from __future__ import annotations

import pytest

from errata.bench import sources
from errata.errors import ConfigError
from errata.lab.chains import KINDS, LAST, chain_cases
from errata.lab.world import default_world, sentence

WORLD = default_world()


def relation_of(prompt: str, subject: str) -> str:
    (name,) = {
        relation.name
        for relation in WORLD.relations.values()
        for wording in relation.phrasings
        if sentence(wording, subject) == prompt
    }
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_where_the_edited_chain_leads(kind: str) -> None:
    for case in chain_cases(kind, 12):
        assert len(case.requests) == (1 if kind == LAST else int(kind))
        edits = {(r.subject, relation_of(r.text, r.subject)): r.target for r in case.requests}
        direct, stepped = (p for p in case.probes if p.kind == "multi_hop")
        hops = [p for p in case.probes if p.kind == "hop"]
        assert len(hops) == len(stepped.steps) + 1 == (2 if kind == LAST else max(2, int(kind)))
        start = next(name for name in WORLD.by_subject if name in stepped.prompt and WORLD.by_subject[name])
        path = [relation_of(stepped.prompt, start)]
        at = new = start
        for i, step in enumerate((*stepped.steps, None)):
            at = edits.get((at, path[-1])) or WORLD.get(at, path[-1]) or ""
            new = at
            assert hops[i].answers[0] == at
            if step is not None:
                path.append(relation_of(step, "{}"))
        assert new == stepped.answers[0] == direct.answers[0]
        assert stepped.before == direct.before == WORLD.names(WORLD.follow(start, tuple(path)) or "")
        assert not set(stepped.answers) & set(stepped.before)


def test_every_edit_is_needed() -> None:
    for case in chain_cases("3", 10):
        stepped = next(p for p in case.probes if p.form == "steps")
        first = case.requests[0]
        assert stepped.answers[0] == case.requests[-1].target
        assert [r.subject for r in case.requests[1:]] == [r.target for r in case.requests[:-1]]
        assert first.subject in stepped.prompt


@pytest.mark.parametrize("kind", ["1", "2", LAST])
def test_indirect_prompts_lead_to_the_request_and_are_not_the_question(kind: str) -> None:
    found = 0
    for case in chain_cases(kind, 12):
        asked = {p.prompt for p in case.probes}
        for request in case.requests:
            relation = relation_of(request.text, request.subject)
            for prompt in request.indirect:
                found += 1
                assert prompt not in asked and request.subject not in prompt
                leads = [
                    chain
                    for chain in WORLD.chains.values()
                    for first in WORLD.by_relation[chain.path[0]]
                    if first.object == request.subject and chain.path[1:] == (relation,)
                    if any(sentence(w, first.subject) == prompt for w in chain.phrasings)
                ]
                assert leads
    assert found > 5


def test_a_neighbour_is_no_part_of_the_chain() -> None:
    for case in chain_cases("2", 10):
        neighbours = [p for p in case.probes if p.kind == "neighbourhood"]
        assert neighbours and not any(p.changes for p in neighbours)
        names = {r.subject for r in case.requests} | {r.target for r in case.requests}
        assert not any(name in p.prompt for p in neighbours for name in names)


def test_fewer_cases_are_the_first_ones_and_seeds_differ() -> None:
    assert chain_cases("2", 3) == chain_cases("2", 6)[:3]
    assert chain_cases("2", 3, seed=1) != chain_cases("2", 3)


def test_sources_name_chains() -> None:
    cases, facts = sources.read("lab:chains-2:3:7")
    assert cases == chain_cases("2", 3, seed=7) and facts["check"] == {"seed": 7}
    for wrong in ("lab:chains-5:3", "lab:chains-2", "lab:chains-2:x", "lab:chains-2:0"):
        with pytest.raises(ConfigError, match="expected"):
            sources.read(wrong)
    with pytest.raises(ConfigError, match="schedule: single"):
        sources.read("lab:chains-2:3", together=True)
