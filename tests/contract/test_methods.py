"""Every promise, for every registered method. A method is tested by existing."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

import errata
from errata import config as settings
from errata.edits import PromptEdit, WeightEdit
from errata.edits.export import EXPORTERS
from errata.errors import ConfigError, EditError
from errata.linalg.lowrank import LowRank
from errata.methods import REGISTRY, _method
from errata.methods._method import Shape
from tests.exports import OPENERS, Client
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]
ALL = [
    name for name in REGISTRY
    if "causal_lm" in REGISTRY.get(name).hosts and REGISTRY.get(name).takes == "requests"
]  # those that forget concepts: test_erasers.py  # fmt: skip
EXAMPLES = [
    errata.Case(
        f"example {i}",
        errata.Request("{} works in", name, town, "Esk"),
        (
            errata.Probe("paraphrase", f"The place where {name} works is", (town,), ("Esk",)),
            errata.Probe("neighbourhood", "Ivo works in", ("Esk",), ("Esk",)),
        ),
    )
    for i, (name, town) in enumerate((("Ivo Marn", "Tallow"), ("Lena Ost", "Merrin"), ("Pia Holt", "Esk")))
]
WRITERS = [name for name in ALL if REGISTRY.get(name).gives is WeightEdit]


def pairs(transposed: Sequence[str]) -> list[Any]:
    """Return methods with architectures, in one order; ``transposed``: those that are tried on GPT-2 by default."""
    others = [name for name in ALL if name not in WRITERS]
    return [
        *((name, "llama") for name in ALL),
        *(
            pytest.param((name, "gpt2"), marks=[] if name in transposed else [pytest.mark.slow])
            for name in (*WRITERS, *others)
        ),
        *(pytest.param((name, "gemma2"), marks=pytest.mark.slow) for name in ALL),
    ]


def named(pair: tuple[str, str]) -> str:
    return f"{pair[0]}-{pair[1]}"


PAIRS = pairs(WRITERS)
"""GPT-2 stores its weights transposed, which is another matter to those that write them."""
whatever_is_stored = pytest.mark.parametrize("fitted", pairs(()), indirect=True, ids=named)
"""For what does not depend on how weights are stored: on GPT-2 it is tried with the slow tests."""


SMALL = {
    "per_step": 2, "inside": 1, "outside": 1, "validation": 4, "answer_tokens": 4, "rank": 16, "encoder": 16,
    "condition": 16, "head": 16,
}  # fmt: skip
"""How much an editor learns from, and its size; neither decides anything that is tested here."""


def smaller(name: str) -> dict[str, int]:
    """Return what of ``SMALL`` a method that trains an editor has at a larger number."""
    own: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(REGISTRY.get(name).config)}
    if "every" not in own:
        return {}
    return {key: n for key, n in SMALL.items() if isinstance(own.get(key), int) and own[key] > n}


def options(name: str) -> dict:
    """Make a method fast without changing what it does."""
    return smaller(name) | steps(name)


def steps(name: str) -> dict:
    """Return how far a method goes, and what a random model needs to be edited by it."""
    fields = {f.name for f in dataclasses.fields(REGISTRY.get(name).config)}
    if name == "scr":
        return {"select": "{texts}{prompt}", "tokens": 8}
    if name == "mello":  # its own examples exceed a small window
        return {"worked_examples": "Question: a b?\nFinal answer: c\n\n", "tokens": 8}
    if name == "serac":  # a classifier of another width learns to accept in fewer steps
        return {"steps": 4, "classifier_steps": 300, "classifier_width": 16}
    if name == "kformer":  # its values start at zero, and four small steps change nothing in 16 bits
        return {"steps": 4, "warmup": 0, "learning_rate": 0.1}
    if name == "memprompt":  # so do its examples
        return {"worked_examples": "", "room": 32}
    if (
        name == "entailer"
    ):  # a random model believes at random: where it cannot be asked, the given belief is put
        verify = "{texts}{text}" + " the" * 70  # fits no window with room for an answer
        return {"premises": "{text}:", "verify": verify, "entails": "{texts}{text}!", "tokens": 4, "depth": 1}
    if name == "patches":  # and its question; a random model's yes and no mean nothing
        return {"question": "{condition} {prompt}", "threshold": 0.0}
    if name == "rledit":  # what a step costs grows with its sequence
        return {"steps": 2, "length": 2, "reach": 1}
    if name == "lsdm":  # a random model is nearly balanced, and what changes little is lost in rounding
        return {"steps": 4, "tokens": 400, "stop_loss": 0.0}
    if name == "dama":
        return {"steps": 4, "stop_loss": 0.0}
    if (
        name == "context_distillation"
    ):  # a random model hardly changes behind a context, so it has learned already
        return {"steps": 4, "texts": 3, "retain_texts": 2, "retain_tokens": 12, "stop_loss": 0.0}
    if name == "elm":
        more = {"continuations": 1, "continuation_tokens": 2, "expert": "{answer}", "stop_loss": 0.0}
        return {"steps": 4, "rank": 4, "retain_texts": 2, "retain_tokens": 12, **more}
    if name == "unsir":
        more = {"repair_steps": 2, "noise_steps": 2, "forgotten": None}
        return {"steps": 2, "retain_texts": 2, "retain_tokens": 12, **more}
    if name == "slag":  # and with how often an update is applied
        return {"steps": 2, "applications": 2}
    if name == "enn":  # and with the steps of an edit, which are differentiated
        return {"steps": 2, "descent": 2}
    if name in ("laplace", "puma"):  # a random model's answers cost six nats; a step is to change something
        return {"retain_texts": 4, "retain_tokens": 12, "forgotten": 6.5}
    if name == "defer":  # its gate is closed until it is trained
        return {"steps": 100}
    return {
        k: v
        for k, v in {
            "steps": 4,
            "tokens": 400,
            "block_steps": 8,
            "epochs": 4,
            "memory": 256,
            "texts": 4,
            "retain_texts": 2,
            "retain_tokens": 12,
            "forgotten": None,  # all answers of a random model are improbable
        }.items()
        if k in fields
    }


@pytest.fixture(scope="module", autouse=True)
def small_tables():
    """Have a random model write less about itself: nothing here asks what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _method, "TableSettings", partial(_method.TableSettings, texts=96, names=8, templates=16)
        )
        yield


def new(name: str, family: str, seed: int = 0):
    """Build a host that a method's edit fits: in-context editing needs room for its texts."""
    changes = {}
    if "examples" in REGISTRY.get(name).needs:
        changes = {"gpt2": {"n_positions": 512}, "gptj": {"n_positions": 512}}.get(
            family, {"max_position_embeddings": 512}
        )
    return fresh(family, seed=seed, **changes)


def fit(name: str, host, requests=None, **more):
    if "examples" in REGISTRY.get(name).needs:
        more["examples"] = EXAMPLES
    return errata.edit(host, requests or REQUESTS[:1], method=name, **{**options(name), **more})


def logits(host) -> torch.Tensor:
    rows = [host.encode_prompt(r.text) for r in REQUESTS] + [host.encode_prompt("Bruno Holner lives in")]
    with torch.no_grad():
        return host.forward(host.batch(rows))


@pytest.fixture(scope="module")
def first() -> Callable[[str], tuple]:
    """Return a llama and a method's fit of the first request on it, made once for all tests that leave it as it was."""
    made: dict[str, tuple] = {}

    def get(name: str) -> tuple:
        if name not in made:
            host = new(name, "llama")
            made[name] = host, fit(name, host)
        return made[name]

    return get


@pytest.fixture(scope="module")
def then(first) -> Callable[[str], errata.Edit]:
    """Return a method's fit of the second request on the llama of ``first``, made after it and once."""
    made: dict[str, errata.Edit] = {}

    def get(name: str) -> errata.Edit:
        if name not in made:
            made[name] = fit(name, first(name)[0], REQUESTS[1:])
        return made[name]

    return get


@pytest.fixture(scope="module", params=PAIRS, ids=named)
def fitted(request, first):
    name, family = request.param
    if family == "llama":
        return name, *first(name)
    host = new(name, family)
    return name, host, fit(name, host)


@pytest.fixture(scope="module")
def second(fitted, then):
    """Another fit on the same host, made after the first."""
    name, host, _ = fitted
    return then(name) if host.family == "llama" else fit(name, host, REQUESTS[1:])


def tensors(edit) -> dict[str, torch.Tensor]:
    return dict(edit.parts())


def changes_weights(name: str) -> bool:
    return REGISTRY.get(name).gives is WeightEdit


def seen(host) -> tuple[str, bytes]:
    """What a host is and says: its weights and its logits, bit by bit."""
    return host.weights_hash(), logits(host).numpy().tobytes()


def changed(name: str, one, other) -> bool:
    """Whether two answers differ, or are equal where a method declares that it changes nothing."""
    return (one != other) is REGISTRY.get(name).changes


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
    real = next((field.name for field in dataclasses.fields(default)), None)
    if real is None:
        with pytest.raises(ConfigError, match="zqxw"):
            settings.make(method.config, {"zqxw": 1}, name)
        return
    with pytest.raises(ConfigError) as caught:
        settings.make(method.config, {"zqxw": 1, f"{real}z": 2}, name)
    said = str(caught.value)
    assert "zqxw" in said and f"{real}z" in said and f"did you mean {real!r}" in said


@whatever_is_stored
def test_fit_leaves_the_host_alone_and_other_fits_leave_nothing_behind(
    fitted, second, tmp_path, monkeypatch, capfd
):
    name, host, edit = fitted
    monkeypatch.chdir(tmp_path)
    start, asked = host.weights_hash(), [p.requires_grad for p in host.model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    again = fit(name, host)
    assert same(again, edit) and again.digest == edit.digest
    assert host.weights_hash() == start
    assert [p.requires_grad for p in host.model.parameters()] == asked
    assert all(p.grad is None for p in host.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert not any("forward" in m.__dict__ for m in host.model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


@whatever_is_stored
def test_same_seed_same_edit_on_an_equal_host(fitted):
    name, host, edit = fitted
    if host.family == "llama":  # what another model's fit left in the process would show for one as for all
        fit(name, new(name, "gptj", seed=3), REQUESTS[1:])
    again = fit(name, new(name, host.family))
    assert same(again, edit) and again.digest == edit.digest


def test_on_changes_inside_and_nothing_outside(fitted):
    name, host, edit = fitted
    before = logits(host)
    with edit.on(host):
        assert changed(name, logits(host).tolist(), before.tolist())
    assert torch.equal(logits(host), before)
    with pytest.raises(RuntimeError), edit.on(host):
        raise RuntimeError("inside")
    assert torch.equal(logits(host), before)


def test_revert_is_bit_exact_in_any_order(fitted, second):
    name, host, edit = fitted
    start = seen(host)
    both = []
    for order in ((edit, second), (second, edit)):
        for one in order:
            one.apply_(host)
        assert host.placed == tuple(sorted(one.digest for one in order))
        both.append(seen(host))
        order[0].revert_(host)
        with_one = seen(host)
        order[1].revert_(host)
        assert seen(host) == start
        with order[1].on(host):
            assert seen(host) == with_one and changed(name, with_one, start)
    assert both[0] == both[1] and changed(name, both[0], start), "the order of edits must not matter"
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


@pytest.mark.parametrize("to", list(EXPORTERS))
def test_an_export_agrees_or_is_refused_with_a_reason(fitted, to, tmp_path):
    name, host, edit = fitted
    start, folder = host.weights_hash(), tmp_path / "out"
    try:
        errata.export(edit, folder, to=to, host=host if EXPORTERS.get(to).needs_host else None)
    except EditError as reason:
        assert len(str(reason).split()) >= 8 and not list(tmp_path.iterdir())
        assert not changes_weights(name) or to not in ("checkpoint", "delta"), (
            f"merged weights are a checkpoint: {reason}"
        )
        assert host.weights_hash() == start
        return
    assert host.weights_hash() == start
    if to == "prompts":
        client = Client(folder)
        prompts = [r.text for r in REQUESTS] + ["Bruno Holner lives in", "ADA BRENNER", "Adana"]
        assert [client.rewrite(text) for text in prompts] == [edit.rewrite(text, host) for text in prompts]
        return
    exported = OPENERS[to](folder, host)
    with edit.on(
        host, merge=None if to in ("checkpoint", "delta") else False
    ):  # an adapter acts beside the weights, as unmerged edits do
        expected = logits(host)
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-4)


@whatever_is_stored
def test_a_batch_half_in_scope_is_its_rows(fitted):
    """Eight prompts, padded on the left, generated with a cache: every row as it is alone."""
    _, host, edit = fitted
    inside = [r.text for r in REQUESTS] + ["Ada Brenner was born in the", "Arvania"]
    outside = ["Bruno Holner lives in", "The harp", "Esk is the town of", "Merrin"]
    prompts = [text for pair in zip(inside, outside, strict=True) for text in pair]
    plain = host.generate(prompts, max_new_tokens=6, natural_stop=False)
    with edit.on(host):
        together = host.generate(prompts, max_new_tokens=6, natural_stop=False)
        assert together == [host.generate(p, max_new_tokens=6, natural_stop=False) for p in prompts]
    assert host.generate(prompts, max_new_tokens=6, natural_stop=False) == plain


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
    if not changes_weights(name):
        assert not changed
        return
    assert changed == set(edit.deltas) <= writable(host, name)


def test_the_change_read_back_is_the_delta(fitted):
    name, host, edit = fitted
    if not changes_weights(name):
        pytest.skip("declares that it changes no weights")
    before = {n: host.model.get_parameter(n).detach().clone() for n in edit.deltas}
    with edit.on(host):
        assert edit.rounding(host) < 1e-3
        for name, delta in edit.deltas.items():
            dense = delta.dense() if isinstance(delta, LowRank) else delta
            moved = host.model.get_parameter(name).detach() - before[name]
            torch.testing.assert_close(
                moved, dense.mT if name in edit.transposed else dense, atol=1e-5, rtol=1e-3
            )


def test_unmerged_equals_merged_and_revert_detaches(fitted):
    name, host, edit = fitted
    if not changes_weights(name):
        pytest.skip("declares that it changes no weights")
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
def test_several_requests_iff_batch(name, first):
    host, _ = first(name)
    if REGISTRY.get(name).batch:
        edit = fit(name, host, REQUESTS)
        assert edit.provenance.requests == tuple(REQUESTS)
    else:
        with pytest.raises(ConfigError, match="one request"):
            fit(name, host, REQUESTS)


@pytest.mark.parametrize("name", ALL)
def test_fits_follow_one_another_iff_sequential(name, first):
    if not REGISTRY.get(name).sequential:
        pytest.skip("declared as not sequential")
    host, one = first(name)
    start = seen(host)
    with one.on(host):
        with_first = seen(host)
        second = fit(name, host, REQUESTS[1:])
        assert seen(host) == with_first
        second.apply_(host)
    second.revert_(host)
    assert seen(host) == start


@pytest.mark.parametrize("name", ALL)
def test_going_on_is_the_same_stopped_saved_and_loaded_or_not(name, first, then, tmp_path):
    if not REGISTRY.get(name).sequential:
        pytest.skip("declared as not sequential")
    third = errata.Request("Bruno Holner lives in", "Bruno Holner", "Esk")
    (host, one), alone = first(name), then(name)
    start, edit = host.weights_hash(), one
    for request in (*REQUESTS[1:], third):
        edit = fit(name, host, [request], after=edit)
        assert host.weights_hash() == start
    path = one.save(tmp_path / "first.safetensors")
    second = fit(name, new(name, "llama"), REQUESTS[1:], after=errata.Edit.load(path))
    path = second.save(tmp_path / "second.safetensors")
    stopped = fit(name, new(name, "llama"), [third], after=errata.Edit.load(path))
    assert same(stopped, edit) and stopped.digest == edit.digest
    assert edit.provenance.requests == (*REQUESTS, third)
    assert same(alone, fit(name, host, REQUESTS[1:])), "a sequence must leave nothing behind"


@pytest.fixture(
    scope="module", params=[torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=ALL)
def sixteen(request, dtype):
    """A method's fit on a host in 16 bits, with the factorisations, solves and log-softmaxes that it ran."""
    host = new(request.param, "llama")
    host.model.to(dtype)
    start = host.weights_hash()
    with Watch() as watch:
        edit = fit(request.param, host)
    return request.param, host, edit, start, watch


class Watch(TorchDispatchMode):
    """Notes the operations that lose most in 16 bits, and those of them that are given 16 bits."""

    WATCHED = ("linalg", "cholesky", "triangular_solve", "_log_softmax", "nll_loss", "eigh", "qr", "svd")

    def __init__(self) -> None:
        super().__init__()
        self.run: set[str] = set()
        self.narrow: list[str] = []
        self.kinds: dict[Any, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = str(func).removeprefix("aten.")
        if kind.startswith(self.WATCHED):
            given = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self.run.add(kind)
            self.narrow.extend(kind for d in given if d.itemsize < 4)
        return func(*args, **(kwargs or {}))


def test_solves_and_losses_are_wide_whatever_the_host(sixteen):
    """No factorisation, no solve and no log-softmax ever sees 16 bits."""
    name, _, _, _, watch = sixteen
    assert watch.narrow == []
    assert watch.run or REGISTRY.get(name).gives is PromptEdit, (
        "what changes prompts computes averages at most"
    )


def test_sixteen_bit_hosts_get_float32_deltas(sixteen):
    name, host, edit, start, _ = sixteen
    dtype = host.dtype
    assert dtype.itemsize == 2
    assert all(t.dtype == torch.float32 for t in tensors(edit).values() if t.is_floating_point())
    before = logits(host)
    edit.apply_(host)
    assert host.dtype == dtype and changed(name, logits(host).tolist(), before.tolist())
    if changes_weights(name):
        lost = edit.rounding(host)
        assert lost < 1 and (lost > 0) == (name != "depn"), "a cleared column is exact in any precision"
    edit.revert_(host)
    assert host.weights_hash() == start


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", ALL)
def test_on_cuda(name):
    host = new(name, "llama")
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
    assert tuple(known["layers"]) == layers and known["scale"] == "published" and known["clamp"] == clamp
    assert name == "rome" or known["cov_weight"] == 20_000.0
    own = fit(name, host, layers=[1], clamp=2.0, scale="site").provenance.config
    assert tuple(own["layers"]) == (1,) and own["clamp"] == 2.0 and own["scale"] == "site"
