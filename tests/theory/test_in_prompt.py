"""In-context facts: what is put before which prompt, and an edit that changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import errata
from errata.edits import Edit, PromptEdit
from errata.edits.questions import states_at_end
from errata.edits.routers.statement import Statement
from errata.errors import ConfigError, EditError
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


# --- scopes that read the model -------------------------------------------------------------


def test_a_fact_is_put_only_where_its_subject_and_its_relation_are_asked_for(tmp_path):
    """The gate is given: it is open for the state at the end of one prompt, and closed for another's."""
    host = fresh("llama")
    site = host.layout.site(0)
    inside, outside = (
        states_at_end(host, host.encode_prompt(text), site.name)[0][0]
        for text in (ADA.text, "Ada Brenner plays the")
    )
    weight = 2 * (inside - outside) / (inside - outside).square().sum()
    bias = -float(weight @ (inside + outside)) / 2
    router = Statement(("Ada Brenner",), weight[None], torch.tensor([bias]))
    plain = errata.edit(host, ADA, method="in_prompt")
    edit = dataclasses.replace(plain, router=router, module=site.name)
    expected = [edit.contexts[0] + ADA.text, "Ada Brenner plays the", "Ivo was born in"]
    prompts = [ADA.text, *expected[1:]]
    with edit.on(host):
        assert [host.rewritten(prompt) for prompt in prompts] == expected
        answers = host.generate(prompts, max_new_tokens=3)
        assert answers == [host.generate(prompt, max_new_tokens=3) for prompt in prompts]
    with plain.on(host):
        assert answers[0] == host.generate(ADA.text, max_new_tokens=3)
    assert answers[1:] == host.generate(prompts[1:], max_new_tokens=3)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.digest == edit.digest and again.module == site.name
    with again.on(host):
        assert host.rewritten(prompts[0]) == expected[0]


def test_a_router_of_states_needs_a_module_that_is_there():
    host = fresh("llama")
    plain = errata.edit(host, ADA, method="in_prompt")
    router = Statement(("Ada",), torch.zeros(1, 80), torch.zeros(1))
    with pytest.raises(EditError, match="name the module"):
        dataclasses.replace(plain, router=router)
    with pytest.raises(EditError, match="leave module out"):
        dataclasses.replace(plain, module="model.layers.0")
    with pytest.raises(EditError, match="no module 'nowhere'"):
        dataclasses.replace(plain, router=router, module="nowhere").apply_(host)


def test_every_scope_goes_on_from_an_earlier_edit():
    host = fresh("llama")
    bruno = errata.Request("{} plays the", "Bruno Holner", "harp")
    for scope in ("subject", "statement", "similar"):
        one = errata.edit(host, ADA, method="in_prompt", scope=scope, gate_names=2)
        both = errata.edit(host, bruno, method="in_prompt", scope=scope, gate_names=2, after=one)
        assert len(both.contexts) == 2 and both.router.name == one.router.name
        assert both.contexts[0] == one.contexts[0]
        for name, tensor in one.router.tensors().items():
            assert torch.equal(both.router.tensors()[name][:1], tensor)
