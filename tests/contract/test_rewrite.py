"""Every promise of the contract that is about more than text, for `rewrite` on image classifiers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import random
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import errata
from errata import config as settings
from errata.edits.export import EXPORTERS
from errata.errors import ConfigError, EditError, RequestError
from errata.host.images import ImageHost
from errata.linalg.lowrank import LowRank
from errata.methods import REGISTRY
from errata.types import ImageRecord
from tests.images import fresh_images, pairs
from tests.models import fresh

REQUESTS = [pairs(2, id="snow"), pairs(3, seed=5, concept="grass", replacement="sand")]
KINDS = [(family, solve) for family in ("vit", "resnet") for solve in ("projected", "closed")]


def fit(host, request=None, **options):
    return errata.edit(host, request or REQUESTS[0], method="rewrite", **{"steps": 12, **options})


def logits(host) -> torch.Tensor:
    return host.logits(torch.cat([REQUESTS[0].changed, REQUESTS[1].original]))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def fitted(request):
    family, solve = request.param
    host = fresh_images(family)
    return host, fit(host, solve=solve), solve


@pytest.mark.parametrize("to", list(EXPORTERS))
def test_an_export_agrees_or_is_refused_with_a_reason(fitted, to, tmp_path):
    host, edit, _ = fitted
    start, family = host.weights_hash(), host.name.split()[-1]
    try:
        errata.export(edit, tmp_path / "out", to=to, host=host if EXPORTERS.get(to).needs_host else None)
    except EditError as reason:
        assert len(str(reason).split()) >= 8 and not list(tmp_path.iterdir())
        assert to in ("prompts", "vllm", "gguf") or (to, family) == ("peft", "resnet"), f"{to}: {reason}"
        return
    assert host.weights_hash() == start and to != "prompts"
    if to == "peft":
        model = peft.PeftModel.from_pretrained(copy.deepcopy(host.model), tmp_path / "out").get_base_model()
    elif to == "delta":
        model = copy.deepcopy(host.model)
        with torch.no_grad():
            for name, change in load_file(tmp_path / "out" / "delta.safetensors").items():
                weight = model.get_parameter(name)
                weight.copy_(weight + change)
    else:
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with edit.on(host):
        expected = logits(host)
    assert not torch.allclose(logits(host), expected, atol=1e-3)
    torch.testing.assert_close(logits(ImageHost(model, name="exported")), expected, atol=1e-5, rtol=1e-5)


def same(a, b) -> bool:
    one, two = dict(a.parts()), dict(b.parts())
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_facts_and_settings():
    method = REGISTRY.get("rewrite")
    module = importlib.import_module(REGISTRY.origin("rewrite"))
    assert method.name == "rewrite" == Path(module.__file__).stem and "arXiv" in method.paper
    assert all(f"\n{word} " in module.__doc__ for word in ("Paper", "Implements", "Departs", "Needs"))
    assert all(field.meaning for field in settings.settings(method.config))
    default = settings.make(method.config, {}, "rewrite")
    text = yaml.safe_dump(dataclasses.asdict(default))
    assert settings.make(method.config, yaml.safe_load(text), "rewrite") == default
    with pytest.raises(ConfigError, match="stepz.*steps"):
        settings.make(method.config, {"stepz": 1}, "rewrite")


def test_fit_leaves_the_host_alone(fitted, tmp_path, monkeypatch, capfd):
    host, _, solve = fitted
    monkeypatch.chdir(tmp_path)
    host.model.train()  # running statistics would move, were they not in evaluation mode
    next(host.model.parameters()).requires_grad_(False)
    start, asked = host.weights_hash(), [p.requires_grad for p in host.model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    try:
        fit(host, solve=solve)
        assert host.weights_hash() == start
        assert all(module.training for module in host.model.modules())
    finally:
        host.model.eval()
    assert [p.requires_grad for p in host.model.parameters()] == asked
    assert all(p.grad is None for p in host.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert not any("forward" in m.__dict__ for m in host.model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_same_seed_same_edit_also_after_other_fits(fitted):
    host, edit, solve = fitted
    fit(fresh_images("resnet" if host.family == "vit" else "vit", seed=3), REQUESTS[1], solve=solve)
    fit(host, REQUESTS[1], solve=solve)
    assert same(fit(host, solve=solve), edit)
    assert same(fit(fresh_images(host.family), solve=solve), edit)


def test_on_changes_inside_and_nothing_outside(fitted):
    host, edit, _ = fitted
    before = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    assert torch.equal(logits(host), before)
    with pytest.raises(RuntimeError), edit.on(host):
        raise RuntimeError("inside")
    assert torch.equal(logits(host), before)


def test_revert_is_bit_exact_in_any_order(fitted):
    host, edit, solve = fitted
    start = host.weights_hash()
    second = fit(host, REQUESTS[1], solve=solve)
    hashes = []
    for order in ((edit, second), (second, edit)):
        for one in order:
            one.apply_(host)
        hashes.append(host.weights_hash())
        order[0].revert_(host)
        with_one = host.weights_hash()
        order[1].revert_(host)
        assert host.weights_hash() == start
        with order[1].on(host):
            assert host.weights_hash() == with_one
    assert hashes[0] == hashes[1], "the order of edits must not matter"
    with pytest.raises(EditError, match="not active"):
        edit.revert_(host)


def test_save_load_apply_gives_the_same_logits(fitted, tmp_path):
    host, edit, _ = fitted
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = errata.Edit.load(path)
    assert same(loaded, edit)
    assert loaded.provenance == dataclasses.replace(edit.provenance, config=loaded.provenance.config)
    with edit.on(host):
        expected = logits(host)
    with loaded.on(host):
        assert torch.equal(logits(host), expected)


def test_the_record_names_the_images_and_holds_none(fitted, tmp_path):
    _, edit, _ = fitted
    (kept,) = edit.provenance.requests
    assert kept == REQUESTS[0].record == ImageRecord("road", "snow", 2, kept.digest, "snow")
    assert kept.digest != REQUESTS[1].record.digest
    path = edit.save(tmp_path / "edit.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["errata"])
        assert set(file.keys()) == {f"{name}.{part}" for name in edit.deltas for part in "AB"}
    assert header["provenance"]["requests"] == [dataclasses.asdict(kept)]
    assert edit.summary()["requests"] == [kept.to_dict()]


def test_only_a_declared_site_changes_and_by_the_delta(fitted):
    host, edit, _ = fitted
    before = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    with edit.on(host):
        moved = {n: p.detach() - before[n] for n, p in host.model.named_parameters()}
        assert edit.rounding(host) < 1e-3
    changed = {n for n, m in moved.items() if bool(m.any())}
    assert changed == set(edit.deltas) <= {site.parameter for site in host.layout.sites}
    assert edit.transposed == frozenset()
    for name, delta in edit.deltas.items():
        assert isinstance(delta, LowRank) and delta.A.dtype == delta.B.dtype == torch.float32
        torch.testing.assert_close(moved[name].flatten(1), delta.dense(), atol=1e-5, rtol=1e-3)


def test_every_site_can_be_edited(fitted):
    host, _, solve = fitted
    start = host.weights_hash()
    for site in host.layout.sites:
        edit = fit(host, solve=solve, layer=site.name)
        assert set(edit.deltas) == {site.parameter}
        with edit.on(host):
            assert host.weights_hash() != start
    assert host.weights_hash() == start


def test_fits_follow_one_another(fitted):
    host, first, solve = fitted
    start = host.weights_hash()
    first.apply_(host)
    held = host.weights_hash()
    second = fit(host, REQUESTS[1], solve=solve)
    assert host.weights_hash() == held
    second.apply_(host)
    first.revert_(host)
    second.revert_(host)
    assert host.weights_hash() == start


def test_a_fit_goes_on_from_an_earlier_one(fitted):
    host, first, solve = fitted
    start = host.weights_hash()
    both = errata.edit(host, REQUESTS[1], method="rewrite", after=first, solve=solve, steps=12)
    assert host.weights_hash() == start
    assert both.provenance.requests == (REQUESTS[0].record, REQUESTS[1].record)
    first.apply_(host)
    second = fit(host, REQUESTS[1], solve=solve)
    second.apply_(host)
    expected = logits(host)
    second.revert_(host)
    first.revert_(host)
    with both.on(host):
        torch.testing.assert_close(logits(host), expected, atol=1e-5, rtol=1e-4)
    assert host.weights_hash() == start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "solve"), KINDS)
def test_sixteen_bit_hosts_get_float32_deltas(family, solve, dtype):
    host = fresh_images(family)
    host.model.to(dtype)
    start = host.weights_hash()
    edit = fit(host, solve=solve)
    assert all(t.dtype == torch.float32 for t in edit.parts().values())
    edit.apply_(host)
    assert host.dtype == dtype and 0 < edit.rounding(host) < 1
    edit.revert_(host)
    assert host.weights_hash() == start


def test_another_classifier_is_refused(fitted):
    host, edit, _ = fitted
    other = fresh_images(host.family, seed=9)
    start = other.weights_hash()
    with pytest.raises(EditError, match=host.fingerprint):
        edit.apply_(other)
    with edit.on(other, foreign=True):
        assert other.weights_hash() != start
    assert other.weights_hash() == start


def test_the_kind_of_model_and_of_request_must_fit():
    images, words = fresh_images("resnet"), fresh("llama")
    spoken = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    with pytest.raises(ConfigError, match="rome edits causal language models.*rewrite"):
        errata.edit(images, spoken, method="rome")
    with pytest.raises(ConfigError, match="rewrite edits image classifiers"):
        errata.edit(words, REQUESTS[0], method="rewrite")
    with pytest.raises(ConfigError, match="edits image classifiers"):
        REGISTRY.get("rewrite").fit(words, REQUESTS, REGISTRY.get("rewrite").config(), None)
    with pytest.raises(RequestError, match="ImageRequest"):
        errata.edit(images, spoken, method="rewrite")
    with pytest.raises(RequestError, match=r"errata\.Request"):
        errata.edit(words, REQUESTS[0], method="rome")
    with pytest.raises(ConfigError, match="one request"):
        errata.edit(images, REQUESTS, method="rewrite")
    with pytest.raises(ConfigError, match="image classifier"):
        errata.evaluate(images, [], method="rewrite")


def test_settings_that_do_not_go_together_are_refused_at_once():
    with pytest.raises(ConfigError) as caught:
        fit(fresh_images("vit"), rank=2, direction="mean", solve="closed", output="vit", shrinkage=2, steps=0)
    assert all(word in str(caught.value) for word in ("rank", "output", "shrinkage", "steps"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize(("family", "solve"), KINDS)
def test_on_cuda(family, solve):
    host = fresh_images(family)
    host.model.to("cuda")
    start = host.weights_hash()
    edit = fit(host, solve=solve)
    before = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    assert host.weights_hash() == start
