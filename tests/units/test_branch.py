"""Edits beside a weight: exact in 16 bits, possible on packed weights, gone without a trace."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.edits import Provenance, WeightEdit
from errata.errors import EditError
from errata.host import hooks
from errata.linalg.lowrank import LowRank
from tests.models import fresh

LINEAR = ["llama", "gpt2"]


def record(host) -> Provenance:
    return Provenance("test", (errata.Request("{} is", "Ada", "Esk"),), {}, host.fingerprint)


def factors(d_out: int, d_in: int, *, seed: int = 0, scale: float = 0.1, rank: int = 2) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    wide = {"generator": g, "dtype": torch.float64}
    return LowRank(torch.randn(d_out, rank, **wide) * scale, torch.randn(rank, d_in, **wide)).to(
        torch.float32
    )


def make(host, *, layer: int = 1, part: str = "mlp_out", form: str = "thin", **more) -> WeightEdit:
    """An edit of one site: thin factors, dense as the mathematics has it, or dense as the weight is stored."""
    site = host.layout.site(layer, part)
    delta = factors(site.d_out, site.d_in, **more)
    flags = frozenset({site.parameter} if site.transposed and form != "stored" else ())
    dense = delta.dense().mT if form == "stored" and site.transposed else delta.dense()
    return WeightEdit({site.parameter: delta if form == "thin" else dense}, flags, record(host))


def logits(host) -> torch.Tensor:
    rows = [host.encode(t).ids for t in ("Ada Brenner was born in Tallow", "Bruno", "The old road was")]
    with torch.no_grad():
        return host.forward(host.batch(rows))


def untouched(host) -> bool:
    bare = not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    return bare and "_errata_branches" not in host.model.__dict__ and list(host.placed) == []


@pytest.mark.parametrize("form", ["thin", "dense", "stored"])
@pytest.mark.parametrize("part", ["mlp_out", "attn_out"])  # attention's projection is square
@pytest.mark.parametrize("family", LINEAR)
def test_beside_is_merged_in_exact_arithmetic(family, part, form):
    host = fresh(family)
    host.model.double()
    edit = make(host, part=part, form=form)
    start, plain = host.weights_hash(), logits(host)
    with edit.on(host):
        merged = logits(host)
    with edit.on(host, merge=False):
        assert host.weights_hash() == start, "no weight is touched"
        assert list(host.placed) == [edit.digest] and edit.rounding(host) == 0
        torch.testing.assert_close(logits(host), merged, atol=1e-12, rtol=1e-12)
    assert float((merged - plain).abs().max()) > 1e-2
    assert torch.equal(logits(host), plain) and untouched(host)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", LINEAR)
def test_sums_in_float32_and_casts_once(family, dtype):
    """What the module says is the old output plus the thin products, summed wide, to the last bit."""
    host = fresh(family)
    host.model.to(dtype)
    site = host.layout.site(1)
    module = host.model.get_submodule(site.name)
    edits = sorted((make(host, seed=s) for s in range(2)), key=lambda e: e._key)
    x = torch.randn(3, 5, site.d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = module(x).float()
        for edit in edits:
            (delta,) = edit.deltas.values()
            expected = expected + (x.float() @ delta.A.mT) @ delta.B.mT
        with edits[1].on(host, merge=False), edits[0].on(host, merge=False):
            said = module(x)
    assert said.dtype == dtype and torch.equal(said, expected.to(dtype))


def test_thin_factors_are_never_multiplied_out():
    host = fresh("llama")
    edit = make(host)
    site = host.layout.site(1)
    made: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                made.add(tuple(out.shape))
            return out

    with edit.on(host, merge=False), Shapes(), torch.no_grad():
        host.model.get_submodule(site.name)(torch.zeros(1, 7, site.d_in))
    assert not {(site.d_out, site.d_in), (site.d_in, site.d_out)} & made
    with Shapes():
        factors(site.d_out, site.d_in).dense()
    assert (site.d_out, site.d_in) in made, "the test sees products when there are some"


def test_any_order_with_merged_edits_and_other_branches():
    host = fresh("gpt2")
    start, plain = host.weights_hash(), logits(host)
    edits = [make(host, seed=s) for s in range(4)]
    forms = [True, False, True, False]  # two beside, two merged, all on one weight
    seen = set()
    for order in itertools.permutations(range(4)):
        for i in order:
            edits[i].apply_(host, merge=not forms[i])
        assert list(host.placed) == sorted(e.digest for e in edits)
        seen.add(logits(host).numpy().tobytes())
        for i in order[2:] + order[:2]:
            edits[i].revert_(host)
        assert host.weights_hash() == start and untouched(host)
    assert len(seen) == 1, "the order of edits must not matter"
    assert torch.equal(logits(host), plain)


def test_an_edit_is_active_once_in_whichever_form():
    host = fresh("llama")
    twin = errata.Host(host.model, host.tokenizer, name="twin")
    edit = make(host)
    for first, second in ((True, False), (False, True), (True, True)):
        edit.apply_(host, merge=not first)
        with pytest.raises(EditError, match="active"):
            make(host).apply_(twin, merge=not second)
        assert list(twin.placed) == [edit.digest]
        edit.revert_(twin)
        with pytest.raises(EditError, match="not active"):
            edit.revert_(host)
        assert untouched(host)


def test_older_hooks_see_the_module_with_its_branch():
    """Capturing keys and values must not depend on whether the edit or the hook came first."""
    host = fresh("llama")
    module = host.model.get_submodule(host.layout.site(1).name)
    edit, seen = make(host), []
    with hooks.on_output(module, lambda out: seen.append(out.clone())):
        edit.apply_(host, merge=False)
        logits(host)
    with hooks.on_output(module, lambda out: seen.append(out.clone())):
        logits(host)
    edit.revert_(host)
    assert torch.equal(seen[0], seen[1])


def test_gradients_pass_through():
    host = fresh("llama")
    host.model.double()
    edit = make(host, layer=2)
    found = []
    for beside in (False, True):
        x = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_(True)
        with edit.on(host, merge=not beside), hooks.frozen(host.model):
            host.model(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)


def test_what_is_no_linear_maps_weight_is_refused_with_the_reason():
    host = fresh("gpt2")
    start, plain = host.weights_hash(), logits(host)
    good = make(host)
    wrong = {
        "transformer.h.0.ln_1.weight": (torch.ones(32), "has two axes"),
        "transformer.h.0.mlp.c_proj.bias": (torch.ones(32), "no linear map's weight"),
        "transformer.wte.weight": (torch.ones(400, 32), "no linear map's weight"),
        "transformer.h.0.mlp.c_fc.weight": (torch.ones(31, 80), "does not compute"),
        "transformer.h.0.mlp.act.weight": (torch.ones(32, 32), "no weight"),
        "nowhere.weight": (torch.ones(2, 2), "no weight"),
    }
    for name, (delta, reason) in wrong.items():
        edit = WeightEdit({**good.deltas, name: delta}, good.transposed, good.provenance)
        with pytest.raises(EditError, match=reason):
            edit.apply_(host, merge=False)
    assert host.weights_hash() == start and untouched(host) and torch.equal(logits(host), plain)

    conv = nn.Module()
    conv.weight = nn.Parameter(torch.ones(4, 4, 3))
    host.model.add_module("extra", conv)
    edit = WeightEdit({"extra.weight": torch.ones(4, 12)}, frozenset(), record(host))
    with pytest.raises(EditError, match="two axes"):
        edit.apply_(host, foreign=True, merge=False)


def test_a_copy_of_the_model_takes_its_branches_along():
    host = fresh("llama")
    edit = make(host)
    edit.apply_(host, merge=False)
    held = logits(host)
    other = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="copy")
    edit.revert_(host)
    assert untouched(host) and list(other.placed) == [edit.digest] and torch.equal(logits(other), held)
    edit.revert_(other)
    assert untouched(other) and torch.equal(logits(other), logits(host))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("family", LINEAR)
def test_beside_is_closer_to_the_float32_models_edit_than_merging(family, dtype, digits):
    """An edit a quarter of a weight's last digit in size, aimed at one key: of use, and lost if merged."""
    totals = {True: 0.0, False: 0.0}
    for seed in range(4):
        half = fresh(family, seed=seed, **{"n_inner" if family == "gpt2" else "intermediate_size": 1024})
        site = half.layout.site(2)
        with torch.no_grad():  # as in trained models, what the last feed-forward says matters
            half.model.get_parameter(site.parameter).mul_(1e3 if family == "llama" else 1e2)
        half.model.to(dtype)
        wide = errata.Host(copy.deepcopy(half.model).float(), half.tokenizer, name="wide")
        keys: list[torch.Tensor] = []
        with hooks.on_input(wide.model.get_submodule(site.name), keys.append):
            plain = logits(wide)[0, 3]
        key = keys[0].reshape(-1, site.d_in)[3]
        aim = torch.randn(site.d_out, 1, generator=torch.Generator().manual_seed(seed))
        size = 0.25 * 2.0**-digits * wide.weight(site).norm() / (aim.norm() * key.norm())
        edit = WeightEdit(
            {site.parameter: LowRank(aim * size, key[None])},
            frozenset({site.parameter} if site.transposed else ()),
            record(half),
        )
        with edit.on(wide, foreign=True):
            wanted = logits(wide)[0, 3]
        gaps = {}
        for beside in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what merging loses
                with edit.on(half, merge=not beside):
                    gaps[beside] = float((logits(half)[0, 3].float() - wanted).norm())
        moved = float((wanted - plain).norm())
        assert gaps[True] < gaps[False] and gaps[True] < 0.5 * moved, (gaps, moved)
        totals = {beside: totals[beside] + gap for beside, gap in gaps.items()}
    assert totals[True] < 0.75 * totals[False], totals


def run(*words: str) -> Any:
    """Run the command line in this process; what it printed, as JSON."""
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_the_command_line_applies_beside_and_shows_what_merging_loses(tmp_path):
    host = fresh("gpt2")
    folder = str(tmp_path / "model")
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    edit = make(host)
    path = str(edit.save(tmp_path / "e.safetensors"))
    (name,) = edit.deltas
    place = ("--model", folder, "--device", "cpu")
    for dtype, low, high in (("bfloat16", 1e-3, 0.5), ("float32", 0.0, 1e-3)):
        shown = run("show", path, *place, "--dtype", dtype)
        assert low < shown["lost"][name] < high and shown["digest"] == edit.digest
        table = CliRunner().invoke(app, ["show", path, *place, "--dtype", dtype])
        assert table.exit_code == 0 and f"{shown['lost'][name]:.2%}" in table.output
        merged = run("ask", "Ada", *place, "--edit", path, "--dtype", dtype)
        assert low < merged["lost"][0][name] < high
        aside = run("ask", "Ada", *place, "--edit", path, "--dtype", dtype, "--no-merge")
        assert aside["lost"] == [{}]
        assert aside["answers"][0]["with"] != aside["answers"][0]["without"]
    said = CliRunner().invoke(app, ["ask", "Ada", *place, "--edit", path, "--dtype", "bfloat16"])
    assert "rounding to bfloat16 lost" in said.output and "--no-merge" in said.output
    assert "lost" not in CliRunner().invoke(app, ["ask", "Ada", *place, "--edit", path]).output
    assert "lost if merged" not in CliRunner().invoke(app, ["show", path]).output
