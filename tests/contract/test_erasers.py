"""Every promise of the contract for methods that forget a concept, and that they erase it in the running model."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import errata
from errata import config as settings
from errata.edits import Edit, MemoryEdit, WeightEdit
from errata.edits.export import EXPORTERS
from errata.edits.fusing import difference, fuse
from errata.errors import ConfigError, EditError, RequestError
from errata.host.states import labelled_rows, module_states, norm_readers
from errata.linalg.erasers import cross_covariance, one_hot
from errata.methods import REGISTRY
from errata.types import Concept, ConceptRecord, LabelledText
from tests.models import fresh

NAMES = ("Ada Brenner", "Bruno Holner", "Ivo Marn", "Lena Ost", "Pia Holt", "Éric", "Ada Holt")
TOWNS = ("Tallow", "Merrin", "Esk", "Arvania", "Road")
CONCEPT = Concept(
    "kind",
    tuple(
        LabelledText(text.format(name), label, name)
        for label, names in (("person", NAMES), ("town", TOWNS))
        for name in names
        for text in ("The old {} waited", "Therefore {} came")
    ),
)
ALL = [name for name in REGISTRY if REGISTRY.get(name).takes == "concept"]
OPTIONS = {"inlp": {"rounds": 2}}
TEXTS = ("The old Ada waited for", "Esk")


def fit(name: str, host, **more) -> MemoryEdit:
    edit = errata.edit(host, CONCEPT, method=name, **{**OPTIONS.get(name, {}), **more})
    assert isinstance(edit, MemoryEdit)
    return edit


def logits(host) -> torch.Tensor:
    batch = host.batch([host.encode(text).ids for text in TEXTS])
    with torch.no_grad():
        return host.forward(batch)[batch.mask.bool()]


@pytest.fixture(
    scope="module", params=[(name, family) for name in ALL for family in ("llama", "gpt2")], ids="-".join
)
def fitted(request):
    name, family = request.param
    host = fresh(family)
    return name, host, fit(name, host)


def test_there_are_such_methods():
    assert {"leace", "sal", "inlp"} <= set(ALL)


def test_a_fit_changes_nothing_and_is_repeatable(fitted, capfd):
    name, host, edit = fitted
    start, states = host.weights_hash(), (torch.get_rng_state(), random.getstate())
    again = fit(name, host)
    assert again.digest == edit.digest and host.weights_hash() == start
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert all(p.requires_grad and p.grad is None for p in host.model.parameters())
    assert capfd.readouterr().out == ""


def test_settings_round_trip_and_refuse(fitted):
    name, _, edit = fitted
    config = REGISTRY.get(name).config
    default = settings.make(config, {}, name)
    assert settings.make(config, dataclasses.asdict(default), name) == default
    for field in settings.settings(config):
        assert field.meaning
    with pytest.raises(ConfigError, match="different layers"):
        settings.make(config, {"layers": [1, 1]}, name)
    assert edit.provenance.requests == (CONCEPT.record,)


def test_on_acts_inside_and_is_taken_off_exactly(fitted):
    _, host, edit = fitted
    before = logits(host)
    with edit.on(host):
        assert not torch.allclose(logits(host), before, atol=1e-4)
    assert torch.equal(logits(host), before)


def test_save_and_load_give_the_same_logits_and_no_text_is_kept(fitted, tmp_path):
    name, host, edit = fitted
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(path)
    (record,) = loaded.provenance.requests
    assert loaded.digest == edit.digest and isinstance(record, ConceptRecord)
    assert record.name == "kind" and record.labels == {"person": 14, "town": 10}
    assert b"waited" not in path.read_bytes()
    with edit.on(host):
        expected = logits(host)
    with loaded.on(host):
        assert torch.equal(logits(host), expected)
    assert "kind" in str(loaded.summary()["requests"]) and loaded.provenance.method == name


@pytest.mark.parametrize("to", list(EXPORTERS))
def test_an_export_is_refused_with_a_reason(fitted, to, tmp_path):
    _, host, edit = fitted
    with pytest.raises(EditError) as reason:
        errata.export(edit, tmp_path / "out", to=to, host=host if EXPORTERS.get(to).needs_host else None)
    assert len(str(reason.value).split()) >= 8 and not list(tmp_path.iterdir())


def test_rows_of_a_batch_answer_as_alone(fitted):
    _, host, edit = fitted
    with edit.on(host):
        together = host.generate(list(TEXTS), max_new_tokens=4)
        assert together == [host.generate(text, max_new_tokens=4) for text in TEXTS]


def test_it_composes_with_another_edit_in_any_order(fitted):
    name, host, edit = fitted
    other = fit(name, host, layers=[1])
    start, seen = logits(host), []
    for order in ((edit, other), (other, edit)):
        for one in order:
            one.apply_(host)
        seen.append(logits(host))
        for one in order:
            one.revert_(host)
        assert torch.equal(logits(host), start)
    assert torch.equal(*seen)


@pytest.mark.parametrize("where", ["block", "norms"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_covariance_is_zero_in_the_running_model(family, where):
    """At every site with all erasers in place; fitted on the unedited model instead, the upper ones miss."""
    host = fresh(family)
    rows = labelled_rows(host, CONCEPT)
    labels = one_hot(rows.labels, 2)

    def left(edit: Edit | None) -> list[float]:
        sites = fit("leace", host, where=where).provenance.notes["sites"]
        found = []
        if edit is not None:
            edit.apply_(host)
        for states in module_states(host, rows, sites).values():
            scale = float(states.double().std())
            found.append(float(cross_covariance(states, labels).abs().max()) / scale)
        if edit is not None:
            edit.revert_(host)
        return found

    assert min(left(None)) > 1e-2
    assert max(left(fit("leace", host, where=where))) < 1e-5
    assert max(left(fit("leace", host, where=where, sequential=False))[1:]) > 1e-3


def test_a_fused_eraser_is_the_same_function():
    """GPT-2's maps have biases, so the mean stays; Llama's have none, and are refused unless nothing is kept."""
    host = fresh("gpt2")
    edit = fit("leace", host, where="norms")
    fused = fuse(edit, host)
    assert isinstance(fused, WeightEdit) and fused.provenance.parents == (edit.digest,)
    assert difference(host, edit, fused, TEXTS) < 1e-5
    start = host.weights_hash()
    with fused.on(host):
        assert host.weights_hash() != start
    assert host.weights_hash() == start
    bare = fresh("llama")
    with pytest.raises(EditError, match="no bias.*centre=false"):
        fuse(fit("leace", bare, where="norms"), bare)
    edit = fit("leace", bare, where="norms", centre=False)
    assert difference(bare, edit, fuse(edit, bare), TEXTS) < 1e-5
    with pytest.raises(EditError, match="fit with where=norms"):
        fuse(fit("leace", bare, layers=[0]), bare)


def test_norms_and_the_maps_that_read_them():
    found = norm_readers(fresh("llama"), 1)
    block = "model.layers.1"
    assert found == {
        f"{block}.input_layernorm": tuple(f"{block}.self_attn.{name}_proj" for name in "qkv"),
        f"{block}.post_attention_layernorm": (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
    }


def test_what_is_refused():
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    with pytest.raises(ConfigError, match="labelled texts.*errata erase"):
        errata.edit(host, request, method="leace")
    with pytest.raises(ConfigError, match="methods for those: .*leace"):
        errata.edit(host, CONCEPT, method="rome")
    with pytest.raises(ConfigError, match="one concept a fit, found 2"):
        errata.edit(host, [CONCEPT, CONCEPT], method="leace")
    with pytest.raises(ConfigError, match="some of 0 to 2"):
        fit("leace", host, layers=[3])
    with pytest.raises(ConfigError, match="does not go on"):
        fit("leace", host, after=fit("leace", host))
    with pytest.raises(ConfigError, match="nothing linear of kind"):
        same = Concept("kind", (LabelledText("Esk", "town"), LabelledText("Esk", "person")))
        errata.edit(host, same, method="leace")
    with pytest.raises(RequestError, match="at least two labels"):
        Concept("kind", CONCEPT.texts[:3])
    with pytest.raises(RequestError, match="does not occur"):
        Concept("kind", (*CONCEPT.texts, LabelledText("a text", "town", "Esk")))
    with pytest.raises(RequestError, match="window"):
        errata.edit(
            host, Concept("kind", (*CONCEPT.texts, LabelledText("Esk " * 400, "town"))), method="leace"
        )


def test_a_split_shares_no_subject():
    fitted, held = CONCEPT.split(0.3)
    names = [{text.subject for text in part.texts} for part in (fitted, held)]
    assert not names[0] & names[1] and names[0] | names[1] == {*NAMES, *TOWNS}
    assert fitted.labels == held.labels == CONCEPT.labels
    assert CONCEPT.split(0.3) == (fitted, held) != CONCEPT.split(0.3, seed=1)
    with pytest.raises(RequestError, match="too few different subjects"):
        Concept("kind", (CONCEPT.texts[0], CONCEPT.texts[-1])).split(0.5)
