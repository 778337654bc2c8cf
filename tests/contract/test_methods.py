"""Every promise, for every registered method. A method is tested by existing."""

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
from errata.errors import ConfigError
from errata.linalg.lowrank import LowRank
from errata.methods import REGISTRY
from errata.methods._method import Shape
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]
ALL = [name for name in REGISTRY if REGISTRY.get(name).host == "causal_lm"]
PAIRS = [(name, family) for name in ALL for family in ("llama", "gpt2", "gemma2")]


def options(name: str) -> dict:
    """Make a method fast without changing what it does."""
    fields = {f.name for f in dataclasses.fields(REGISTRY.get(name).config)}
    return {k: v for k, v in {"steps": 4, "tokens": 400}.items() if k in fields}


def fit(name: str, host, requests=None, **more):
    return errata.edit(host, requests or REQUESTS[:1], method=name, **{**options(name), **more})


def logits(host) -> torch.Tensor:
    rows = [host.encode(r.text).ids for r in REQUESTS] + [host.encode("Bruno Holner lives in").ids]
    with torch.no_grad():
        return host.forward(host.batch(rows))


@pytest.fixture(scope="module", params=PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
def fitted(request):
    name, family = request.param
    host = fresh(family)
    return name, host, fit(name, host)


def tensors(edit) -> dict[str, torch.Tensor]:
    return dict(edit.parts())


def same(a, b) -> bool:
    one, two = tensors(a), tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", ALL)
def test_facts_are_declared(name):
    method = REGISTRY.get(name)
    module = importlib.import_module(REGISTRY.origin(name))
    assert method.name == name == Path(module.__file__).stem
    assert "arXiv" in method.paper
    for word in ("Paper", "Implements", "Departs", "Needs"):
        assert f"\n{word} " in module.__doc__, word
    for field in settings.settings(method.config):
        assert field.meaning, f"{name}.{field.name} says nothing"


@pytest.mark.parametrize("name", ALL)
def test_what_is_published_are_settings(name):
    """Each row says which shape of model it is for, and would be accepted from a user."""
    method = REGISTRY.get(name)
    for shape, row in method.published.items():
        assert isinstance(shape, Shape) and shape.depth > 0 and shape.width > 0 and row
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
        config = settings.make(method.config, given, name)
        assert {key: getattr(config, key) for key in row} == dict(row)


@pytest.mark.parametrize("name", ALL)
def test_settings_round_trip_and_refuse(name):
    method = REGISTRY.get(name)
    default = settings.make(method.config, {}, name)
    text = yaml.safe_dump(dataclasses.asdict(default))
    assert settings.make(method.config, yaml.safe_load(text.replace("!!python/tuple", "")), name) == default
    real = dataclasses.fields(default)[0].name
    with pytest.raises(ConfigError) as caught:
        settings.make(method.config, {"zqxw": 1, f"{real}z": 2}, name)
    said = str(caught.value)
    assert "zqxw" in said and f"{real}z" in said and f"did you mean {real!r}" in said


def test_fit_leaves_the_host_alone(fitted, tmp_path, monkeypatch, capfd):
    name, host, _ = fitted
    monkeypatch.chdir(tmp_path)
    start, asked = host.weights_hash(), [p.requires_grad for p in host.model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    fit(name, host)
    assert host.weights_hash() == start
    assert [p.requires_grad for p in host.model.parameters()] == asked
    assert all(p.grad is None for p in host.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert not any("forward" in m.__dict__ for m in host.model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_same_seed_same_edit_also_after_other_fits(fitted):
    name, host, edit = fitted
    other = fresh("gptj", seed=3)
    fit(name, other, REQUESTS[1:])
    fit(name, host, REQUESTS[1:])
    assert same(fit(name, host), edit)
    assert same(fit(name, fresh(host.family)), edit)


def test_on_changes_inside_and_nothing_outside(fitted):
    _, host, edit = fitted
    before = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    assert torch.equal(logits(host), before)
    with pytest.raises(RuntimeError), edit.on(host):
        raise RuntimeError("inside")
    assert torch.equal(logits(host), before)


def test_revert_is_bit_exact_in_any_order(fitted):
    name, host, edit = fitted
    start = host.weights_hash()
    second = fit(name, host, REQUESTS[1:])
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
    with pytest.raises(errata.ErrataError, match="not active"):
        edit.revert_(host)


def test_save_load_apply_gives_the_same_logits(fitted, tmp_path):
    _, host, edit = fitted
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = errata.Edit.load(path)
    assert same(loaded, edit) and loaded.provenance == dataclasses.replace(
        edit.provenance, config=loaded.provenance.config
    )
    with edit.on(host):
        expected = logits(host)
    with loaded.on(host):
        assert torch.equal(logits(host), expected)


def writable(host, name: str) -> set[str]:
    """Weights a method may change by its own declaration."""
    if REGISTRY.get(name).writes == "site":
        return {s.parameter for s in host.layout.sites}
    inside = {n: p for n, p in host.model.named_parameters() if n.startswith(host.layout.blocks)}
    wide = {n for n, p in inside.items() if p.ndim == 2}
    return wide if REGISTRY.get(name).writes == "linear" else set(inside)


def test_only_declared_sites_change(fitted):
    name, host, edit = fitted
    before = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    with edit.on(host):
        changed = {n for n, p in host.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(edit.deltas) <= writable(host, name)


def test_the_change_read_back_is_the_delta(fitted):
    _, host, edit = fitted
    before = {n: host.model.get_parameter(n).detach().clone() for n in edit.deltas}
    with edit.on(host):
        assert edit.rounding(host) < 1e-3
        for name, delta in edit.deltas.items():
            dense = delta.dense() if isinstance(delta, LowRank) else delta
            moved = host.model.get_parameter(name).detach() - before[name]
            torch.testing.assert_close(
                moved, dense.mT if name in edit.transposed else dense, atol=1e-5, rtol=1e-3
            )


def test_beside_equals_merged_and_revert_detaches(fitted):
    name, host, edit = fitted
    if REGISTRY.get(name).writes == "block":
        pytest.skip("declares that it writes norms and biases too, which are no linear maps")
    start, before = host.weights_hash(), logits(host)
    with edit.on(host):
        merged = logits(host)
    edit.apply_(host, merge=False)
    assert host.weights_hash() == start and list(host.placed) == [edit.digest]
    torch.testing.assert_close(logits(host), merged, atol=1e-4, rtol=1e-4)
    edit.revert_(host)
    assert torch.equal(logits(host), before) and host.weights_hash() == start and list(host.placed) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


@pytest.mark.parametrize("name", ALL)
def test_several_requests_iff_batch(name):
    host = fresh("llama")
    if REGISTRY.get(name).batch:
        edit = fit(name, host, REQUESTS)
        assert edit.provenance.requests == tuple(REQUESTS)
    else:
        with pytest.raises(ConfigError, match="one request"):
            fit(name, host, REQUESTS)


@pytest.mark.parametrize("name", ALL)
def test_fits_follow_one_another_iff_sequential(name):
    if not REGISTRY.get(name).sequential:
        pytest.skip("declared as not sequential")
    host = fresh("llama")
    start = host.weights_hash()
    first = fit(name, host)
    first.apply_(host)
    held = host.weights_hash()
    second = fit(name, host, REQUESTS[1:])
    assert host.weights_hash() == held
    second.apply_(host)
    first.revert_(host)
    second.revert_(host)
    assert host.weights_hash() == start


@pytest.mark.parametrize("name", ALL)
def test_going_on_is_the_same_stopped_saved_and_loaded_or_not(name, tmp_path):
    if not REGISTRY.get(name).sequential:
        pytest.skip("declared as not sequential")
    third = errata.Request("Bruno Holner lives in", "Bruno Holner", "Esk")
    host = fresh("llama")
    start = host.weights_hash()
    edit = None
    for request in (*REQUESTS, third):
        edit = fit(name, host, [request], after=edit)
        assert host.weights_hash() == start
    first = fit(name, host, REQUESTS[:1])
    path = first.save(tmp_path / "first.safetensors")
    second = fit(name, fresh("llama"), REQUESTS[1:], after=errata.Edit.load(path))
    path = second.save(tmp_path / "second.safetensors")
    stopped = fit(name, fresh("llama"), [third], after=errata.Edit.load(path))
    assert same(stopped, edit) and stopped.digest == edit.digest
    assert edit.provenance.requests == (*REQUESTS, third)
    alone = fit(name, host, [third])
    assert same(alone, fit(name, fresh("llama"), [third])), "a sequence must leave nothing behind"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_hosts_get_float32_deltas(name, dtype):
    host = fresh("llama")
    host.model.to(dtype)
    start = host.weights_hash()
    edit = fit(name, host)
    assert all(t.dtype == torch.float32 for t in tensors(edit).values())
    edit.apply_(host)
    assert host.dtype == dtype and 0 < edit.rounding(host) < 1
    edit.revert_(host)
    assert host.weights_hash() == start


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", ALL)
def test_on_cuda(name):
    host = fresh("llama")
    host.model.to("cuda")
    start = host.weights_hash()
    edit = fit(name, host)
    before = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), before)
    assert host.weights_hash() == start


@pytest.mark.parametrize(("name", "layers", "clamp"), [("rome", (2,), 4.0), ("memit", (0, 1), 0.75)])
def test_known_models_get_their_published_settings(name, layers, clamp, monkeypatch):
    host, method = fresh("gpt2"), REGISTRY.get(name)
    assert method.published_for(host) == {}
    plain = fit(name, host).provenance.config
    assert plain["scale"] == "stream" and plain["clamp"] == 1.5
    row = {"layers": layers, "scale": "published", "learning_rate": 0.5, "clamp": clamp}
    if name == "memit":
        row["cov_weight"] = 20_000.0
    monkeypatch.setitem(method.published, Shape("gpt2", 3, 32), row)
    known = fit(name, host).provenance.config
    assert known["layers"] == layers and known["scale"] == "published" and known["clamp"] == clamp
    assert name == "rome" or known["cov_weight"] == 20_000.0
    own = fit(name, host, layers=[1], clamp=2.0, scale="site").provenance.config
    assert own["layers"] == (1,) and own["clamp"] == 2.0 and own["scale"] == "site"
