"""Every promise of the contract, for the methods that edit text-to-image pipelines."""

from __future__ import annotations

import dataclasses
import importlib
import random
from pathlib import Path

import pytest
import torch
import yaml

import errata
from errata import config as settings
from errata.edits.export import EXPORTERS
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, EditError, RequestError
from errata.host.text_to_image import TextToImageHost, load_pipeline
from errata.linalg.lowrank import LowRank
from errata.methods import REGISTRY
from errata.methods._method import Workspace
from tests.models import fresh
from tests.pipelines import diffusers, edited, fresh_pipeline, written

METHODS = [name for name in REGISTRY if "text_to_image" in REGISTRY.get(name).hosts]
REQUESTS = [
    errata.Request("a pack of {}", "roses", "blue roses"),
    errata.Request("a {} by the road", "house", "red house"),
]
OPTIONS = {"uce": {"preserve": ("a dog",)}, "time": {}, "refact": {"steps": 4, "learning_rate": 0.5}}
TEXTS = ["a pack of roses", "a house by the road", "a dog"]


def fit(name: str, host: TextToImageHost, requests=None, after=None):
    return edited(host, requests or REQUESTS[:1], method=name, after=after, **OPTIONS[name])


def logits(host: TextToImageHost) -> torch.Tensor:
    with torch.no_grad():
        return host.run(host.as_pass(TEXTS)).logits


def same(one, other) -> bool:
    a, b = dict(one.parts()), dict(other.parts())
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def host() -> TextToImageHost:
    return fresh_pipeline()


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, host):
    return request.param, host, fit(request.param, host)


def test_there_are_methods():
    assert set(METHODS) >= {"time", "uce"}


@pytest.mark.parametrize("name", METHODS)
def test_facts_and_settings(name):
    method = REGISTRY.get(name)
    module = importlib.import_module(REGISTRY.origin(name))
    assert method.name == name == Path(str(module.__file__)).stem and "arXiv" in method.paper
    assert all(f"\n{word} " in str(module.__doc__) for word in ("Paper", "Implements", "Departs", "Needs"))
    assert all(field.meaning for field in settings.settings(method.config))
    default = settings.make(method.config, {}, name)
    text = yaml.safe_dump(dataclasses.asdict(default)).replace("!!python/tuple", "")
    assert settings.make(method.config, yaml.safe_load(text), name) == default
    with pytest.raises(ConfigError, match="zqxw"):
        settings.make(method.config, {"zqxw": 1}, name)


def test_fit_leaves_the_host_alone(fitted, tmp_path, monkeypatch, capfd):
    name, host, edit = fitted
    monkeypatch.chdir(tmp_path)
    start, states = host.weights_hash(), (torch.get_rng_state(), random.getstate())
    asked = [p.requires_grad for p in host.model.parameters()]
    again = fit(name, host)
    assert same(again, edit) and again.digest == edit.digest and host.weights_hash() == start
    assert [p.requires_grad for p in host.model.parameters()] == asked
    assert all(p.grad is None for p in host.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not list(tmp_path.iterdir()) and capfd.readouterr().out == ""


def test_same_edit_on_an_equal_host(fitted):
    name, host, edit = fitted
    other = fresh_pipeline()
    assert other.fingerprint == host.fingerprint
    again = fit(name, other)
    assert same(again, edit) and again.digest == edit.digest


def test_on_changes_inside_and_revert_is_exact_in_any_order(fitted):
    name, host, edit = fitted
    start, before = host.weights_hash(), logits(host)
    second = fit(name, host, REQUESTS[1:])
    with edit.on(host):
        assert not torch.allclose(logits(host), before)
    assert torch.equal(logits(host), before)
    hashes = []
    for order in ((edit, second), (second, edit)):
        for one in order:
            one.apply_(host)
        hashes.append(host.weights_hash())
        order[0].revert_(host)
        order[1].revert_(host)
        assert host.weights_hash() == start
    assert hashes[0] == hashes[1] != start


def test_save_load_apply_gives_the_same_logits(fitted, tmp_path):
    _, host, edit = fitted
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert same(loaded, edit) and loaded.digest == edit.digest
    with edit.on(host):
        expected = logits(host)
    with loaded.on(host):
        assert torch.equal(logits(host), expected)


def test_only_declared_sites_change_by_the_delta_and_beside_the_weights_it_is_the_same(fitted):
    _, host, edit = fitted
    before = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    with edit.on(host):
        moved = {n: p.detach() - before[n] for n, p in host.model.named_parameters()}
        merged = logits(host)
    assert (
        {n for n, m in moved.items() if m.any()}
        == set(edit.deltas)
        <= {s.parameter for s in host.layout.sites}
    )
    for name, delta in edit.deltas.items():
        dense = delta.dense() if isinstance(delta, LowRank) else delta
        torch.testing.assert_close(moved[name], dense, atol=1e-5, rtol=1e-3)
    with edit.on(host, merge=False):
        assert all(torch.equal(p, before[n]) for n, p in host.model.named_parameters())
        torch.testing.assert_close(logits(host), merged, atol=1e-4, rtol=1e-4)


def test_several_requests_iff_batch(fitted):
    name, host, _ = fitted
    if REGISTRY.get(name).batch:
        assert fit(name, host, REQUESTS).provenance.requests == tuple(REQUESTS)
    else:
        with pytest.raises(ConfigError, match="one request"):
            fit(name, host, REQUESTS)


def test_going_on_is_the_same_saved_and_loaded_or_not(fitted, tmp_path):
    name, host, edit = fitted
    start = host.weights_hash()
    both = fit(name, host, REQUESTS[1:], after=edit)
    loaded = errata.Edit.load(edit.save(tmp_path / "first.safetensors"))
    again = fit(name, fresh_pipeline(), REQUESTS[1:], after=loaded)
    assert same(both, again) and both.digest == again.digest and host.weights_hash() == start
    assert both.provenance.requests == tuple(REQUESTS) and both.provenance.parents == (edit.digest,)


def test_what_is_solved_in_closed_form_is_taken_apart(fitted):
    """A sequence without its second request is the first edit; refitted, it is what it was."""
    name, host, edit = fitted
    both = fit(name, host, REQUESTS[1:], after=edit)
    rest = errata.retract(both, 1)
    assert isinstance(rest, WeightEdit)
    assert rest.provenance.requests == edit.provenance.requests
    for parameter, delta in edit.deltas.items():
        one = rest.deltas[parameter]
        first, second = (d.dense() if isinstance(d, LowRank) else d for d in (one, delta))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_sixteen_bit_hosts_get_float32_deltas(name, dtype):
    host = fresh_pipeline()
    host.model.to(dtype)
    start, before = host.weights_hash(), logits(host)
    edit = fit(name, host)
    assert all(t.dtype == torch.float32 for t in edit.parts().values())
    edit.apply_(host)
    assert host.dtype == dtype and 0 < edit.rounding(host) < 1 and not torch.equal(logits(host), before)
    edit.revert_(host)
    assert host.weights_hash() == start


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.mark.parametrize("to", list(EXPORTERS))
@pytest.mark.parametrize("name", METHODS)
def test_an_export_is_opened_by_diffusers_alone_or_is_refused(name, to, folder, tmp_path):
    host = load_pipeline(folder, device="cpu")
    edit, start = fit(name, host), host.weights_hash()
    try:
        made = errata.export(
            edit, tmp_path / "out", to=to, host=host if EXPORTERS.get(to).needs_host else None
        )
    except EditError as reason:
        assert len(str(reason).split()) >= 8 and not list(tmp_path.iterdir())
        assert to not in ("checkpoint", "delta"), reason
        return
    assert host.weights_hash() == start and made.verified is not None
    if to == "delta":
        return
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(tmp_path / "out"), safety_checker=None)
    with edit.on(host):
        expected = logits(host)
    torch.testing.assert_close(logits(load_pipeline(pipeline)), expected, atol=1e-6, rtol=1e-6)
    image = pipeline("a pack of roses", num_inference_steps=1, height=8, width=8, output_type="latent").images
    assert torch.isfinite(image).all()


def test_another_pipeline_is_refused(fitted):
    _, host, edit = fitted
    other = fresh_pipeline(seed=9)
    start = other.weights_hash()
    with pytest.raises(EditError, match=host.fingerprint):
        edit.apply_(other)
    with edit.on(other, foreign=True):
        assert other.weights_hash() != start
    assert other.weights_hash() == start


@pytest.mark.parametrize("name", METHODS)
def test_the_kind_of_model_must_fit(name, host):
    words = fresh("llama")
    with pytest.raises(ConfigError, match=f"{name} edits text-to-image pipelines"):
        edited(words, REQUESTS[0], method=name)
    with pytest.raises(ConfigError, match="edits text-to-image pipelines"):
        REGISTRY.get(name).fit(words, REQUESTS[:1], REGISTRY.get(name).config(), Workspace())
    with pytest.raises(ConfigError, match=f"rome edits causal language models.*{name}"):
        edited(host, REQUESTS[0], method="rome")


def test_texts_that_the_encoder_cannot_take_are_refused(host):
    long = errata.Request("a painting of many words that nobody can read by {}", "a man", "an artist")
    with pytest.raises(RequestError, match="longer than the text encoder"):
        edited(host, long, method="uce")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", METHODS)
def test_on_cuda(name):
    host = fresh_pipeline()
    host.model.to("cuda")
    start, before = host.weights_hash(), logits(host)
    edit = fit(name, host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    assert host.weights_hash() == start
