"""Single requests are taken out of memories and prompts as if they had never been made, or the edit says why not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import errata
from errata import lab
from errata.edits.model import ModelEdit
from errata.edits.prompt import PromptEdit
from errata.edits.routers.fulltext import FullText
from errata.edits.routers.radius import Radius
from errata.edits.undo import without
from errata.errors import EditError
from errata.methods import REGISTRY
from tests.contract.test_methods import ALL, fit, logits, new
from tests.program import errata as program

A = errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada")
B = errata.Request("{} plays the", "Bruno Holner", "harp", id="bruno")
C = errata.Request("The capital of {} is", "Arvania", "Esk", id="arvania")
AT_RUN_TIME = [name for name in ALL if REGISTRY.get(name).gives.kind != "weight" and REGISTRY.get(name).batch]


def same(one, other) -> None:
    """Both hold the same tensors, texts and requests; only the time and the parents tell them apart."""
    assert one.provenance.requests == other.provenance.requests
    mine, theirs = one.parts(), other.parts()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)
    assert json.dumps(one.body(), sort_keys=True) == json.dumps(other.body(), sort_keys=True)


@pytest.mark.parametrize("name", AT_RUN_TIME)
def test_a_request_is_taken_out_as_its_method_declares(name):
    method, host = REGISTRY.get(name), new(name, "llama")
    more = (
        {"scope": "subject"} if name in ("in_prompt", "ike", "ice", "reliable") else {}
    )  # as several requests have by default
    both = fit(name, host, [A, B], **more)
    if method.undo == "none":
        with pytest.raises(EditError, match="fit the others again|apart"):
            errata.retract(both, ["bruno"])
        return
    left = errata.retract(both, "bruno")
    same(left, fit(name, host, [A], **more))
    assert left.provenance.parents == (both.digest,)
    if method.undo == "any":
        first = errata.retract(both, [0])
        same(first, fit(name, host, [B], **more))
        with first.on(host), torch.no_grad():
            assert torch.isfinite(logits(host)).all()


@pytest.mark.filterwarnings("ignore:requests .* have one prompt")
def test_what_grace_did_to_an_earlier_entry_is_undone_with_the_request():
    host = errata.load("lab")
    near = errata.Request("{} was born in", "Ada Brenner", "Esk", id="again")
    alone, both = (errata.edit(host, some, method="grace", steps=2) for some in ([A, B], [A, B, near]))
    assert both.log[2]["action"] == "split" and both.router.radii[0] < alone.router.radii[0]
    back = errata.retract(both, "again")
    assert isinstance(back.router, Radius) and torch.equal(back.router.radii, alone.router.radii)
    assert torch.equal(back.router.keys, alone.router.keys) and len(back.log) == 2
    with pytest.raises(EditError, match="request 3 changed an entry that request 1"):
        errata.retract(both, "ada")
    assert errata.retract(both, ["ada", "again"]).entries == 1
    expanded = errata.edit(host, [A, B, A], method="grace", steps=2)
    with pytest.raises(EditError, match="fit the others again"):
        errata.retract(expanded, "bruno")


def test_an_entry_that_another_replaced_takes_prompts_again():
    host = new("keel_memory", "llama")
    newer = errata.Request("{} was born in", "Ada Brenner", "Esk", id="newer")
    with pytest.warns(UserWarning, match="one prompt"):
        edit = fit("keel_memory", host, [A, newer])
    assert edit.log[1]["action"] == "replace" and edit.router.phrases == ("", "Ada Brenner")
    older, newest = errata.retract(edit, "newer"), errata.retract(edit, "ada")
    assert older.router.phrases == newest.router.phrases == ("Ada Brenner",)
    assert [entry["action"] for entry in (*older.log, *newest.log)] == ["add", "add"]
    for one, request in ((older, A), (newest, newer)):
        same(one, fit("keel_memory", host, [request]))
        with one.on(host), torch.no_grad():
            first = host.forward(host.batch([host.encode_prompt(request.text)]))[0, -1].argmax()
        assert int(first) == host.encode_answer(request.text, request.target).target[0]


def test_neurons_of_a_batch_go_together():
    host = errata.load("lab")
    first = errata.edit(host, [A, B], method="calinet", slots=4, steps=3)
    both = errata.edit(host, [C], method="calinet", slots=4, steps=3, after=first)
    with pytest.raises(EditError, match="requests 1 to 2 share their neurons"):
        errata.retract(both, "ada")
    same(errata.retract(both, "arvania"), first)
    rest = errata.retract(both, ["ada", "bruno"])
    assert torch.equal(rest.interventions[0].payload["keys"], both.interventions[0].payload["keys"][:, 4:])
    assert rest.state["owners"].tolist() == [0] * 4


def test_texts_keep_their_order_and_the_last_request_is_not_taken_out():
    record = errata.edit(errata.load("lab"), [A, B, C], method="rag", retriever="words").provenance
    edit = PromptEdit(("a one", "b two", "c three"), FullText(("a one", "b two", "c three")), record)
    assert without(edit, [1]).contexts == ("a one", "c three")
    assert without(edit, [1]).router.passages == ("a one", "c three")
    with pytest.raises(EditError, match="no request would be left"):
        errata.retract(edit, [0, 1, 2])


def test_the_command_line_takes_a_request_out_of_a_memory(tmp_path):
    host, path, out = errata.load("lab"), tmp_path / "both.safetensors", tmp_path / "one.safetensors"
    cases = lab.cases(2, seed=1)
    errata.edit(host, [c.request for c in cases], method="rag", retriever="words").save(path)
    done = program("retract", path, "--request", cases[1].request.id, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert [r["id"] for r in json.loads(done.stdout)["requests"]] == [cases[0].request.id]
    assert len(errata.Edit.load(out).contexts) == 1
    assert program("retract", path, "--request", "1", "-o", tmp_path / "two.safetensors").returncode == 0


def test_requests_that_contradict_each_other_are_named():
    host = errata.load("lab")
    newer = errata.Request("{} was born in", "Ada Brenner", "Esk", id="newer")
    with pytest.warns(UserWarning, match="'ada' and 'newer' have one prompt"):
        edit = errata.edit(host, [A, B, newer], method="rag", retriever="words")
    assert edit.provenance.notes["conflicts"] == [["ada", "newer"]]
    plain = errata.edit(host, [A, B], method="rag", retriever="words")
    assert "conflicts" not in plain.provenance.notes
    with pytest.warns(UserWarning, match="'ada' and 'newer'"):
        assert errata.edit(host, [newer], method="rag", retriever="words", after=plain).provenance.notes[
            "conflicts"
        ]


def empty(edit):
    """The edit without any entry."""
    if isinstance(edit, PromptEdit):
        return dataclasses.replace(edit, contexts=(), router=edit.router.select([]))
    if isinstance(edit, ModelEdit):
        return dataclasses.replace(edit, contexts=(), router=edit.router.select([]))
    none = tuple(
        dataclasses.replace(one, payload={n: t[:0] for n, t in one.payload.items()})
        for one in edit.interventions
    )
    return dataclasses.replace(edit, interventions=none, router=edit.router.select([]))


@pytest.mark.parametrize(
    "name", ["grace", "keel_memory", "remedi", "rag", "serac", "lte", "memprompt", "ice", "patches"]
)
def test_an_empty_memory_is_the_model_itself_bit_for_bit(name):
    host = new(name, "llama")
    more = {"scope": "subject"} if name == "ice" else {}
    edit = empty(fit(name, host, [A, B], **more))
    before = logits(host), host.generate([A.text, B.text], max_new_tokens=4)
    with edit.on(host):
        assert torch.equal(logits(host), before[0])
        assert host.generate([A.text, B.text], max_new_tokens=4) == before[1]
