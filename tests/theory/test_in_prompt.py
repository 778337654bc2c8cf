"""In-context facts: what is put before which prompt, and an edit that changes nothing."""

from __future__ import annotations

import pytest

import errata
from errata.edits import PromptEdit
from errata.errors import ConfigError
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
ADA_TOO = errata.Request("{} lives in", "Ada Brenner", "Esk")
BRUNO = errata.Request("{} was born in", "Bruno Holner", "Tallow")


@pytest.fixture(scope="module")
def host():
    return fresh("llama", max_position_embeddings=256)


def test_few_facts_stand_before_every_prompt(host):
    edit = errata.edit(host, [ADA, BRUNO], method="in_prompt")
    facts = "New fact: Ada Brenner was born in Merrin.\nNew fact: Bruno Holner was born in Tallow.\n"
    assert isinstance(edit, PromptEdit) and edit.contexts == (facts,)
    for prompt in ("Ada Brenner was born in", "The capital of Arvania is"):
        assert edit.rewrite(prompt) == facts + prompt
        with edit.on(host):
            assert host.frame(prompt).text == facts + prompt
        assert host.frame(prompt).text == prompt


def test_many_facts_stand_where_their_subject_is_named(host):
    edit = errata.edit(host, [ADA, BRUNO, ADA_TOO], method="in_prompt", most=2)
    ada = "New fact: Ada Brenner was born in Merrin.\nNew fact: Ada Brenner lives in Esk.\n"
    assert edit.rewrite("Where does Ada Brenner live?") == f"{ada}Where does Ada Brenner live?"
    assert edit.rewrite("Bruno Holner speaks").startswith("New fact: Bruno Holner was born in Tallow.\nBruno")
    assert edit.rewrite("The capital of Arvania is") == "The capital of Arvania is"


def test_a_fit_on_top_of_another_holds_both_by_subject(host):
    first = errata.edit(host, ADA, method="in_prompt")
    both = errata.edit(host, BRUNO, method="in_prompt", after=first)
    together = errata.edit(host, [ADA, BRUNO], method="in_prompt", scope="subject")
    assert both.contexts == together.contexts
    assert both.provenance.requests == (ADA, BRUNO) and both.provenance.parents == (first.digest,)


def test_scope_and_bound_are_checked(host):
    with pytest.raises(ConfigError, match="most"):
        errata.edit(host, ADA, method="in_prompt", most=0)
    with pytest.raises(ConfigError, match="scope"):
        errata.edit(host, ADA, method="in_prompt", scope="never")


def test_none_is_an_edit_that_changes_nothing(host, tmp_path):
    prompts = ["Ada Brenner was born in", "The capital of Arvania is"]
    before = host.generate(prompts, max_new_tokens=6)
    edit = errata.Edit.load(errata.edit(host, [ADA, BRUNO], method="none").save(tmp_path / "n.safetensors"))
    assert edit.provenance.requests == (ADA, BRUNO) and edit.summary()["entries"] == 0
    edit.apply_(host)
    assert host.placed == (edit.digest,) and host.generate(prompts, max_new_tokens=6) == before
    edit.revert_(host)
    assert host.placed == ()
    report = errata.evaluate(
        host,
        [errata.Case("a", ADA, (errata.Probe("efficacy", ADA.text, ("Merrin",), ()),))],
        method="none",
    )
    assert all(row.after == pytest.approx(row.before, abs=1e-6) for row in report.rows)
