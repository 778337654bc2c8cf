"""Packed weights: quantised linear maps are read as the numbers they stand for and edited beside."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional

import errata
from errata.edits import Provenance, WeightEdit
from errata.errors import EditError, HostError
from errata.host import placement
from errata.host.layout import linear_map
from errata.linalg.lowrank import LowRank
from tests.models import fresh, tokenizer
from tests.units.test_placement import OTHER, REQUEST, logits, make

# --- packed -----------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear map in eight bits: codes and a scale per row, unpacked when run."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def values(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return functional.linear(x, self.values().to(x.dtype), self.bias)


class Coded(Packed):
    """The same with the codes in place of the weight, as bitsandbytes keeps them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = nn.Parameter(self._buffers.pop("codes"), requires_grad=False)

    def values(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale


def replace(model: nn.Module, build) -> None:
    """Put something else in place of every linear map of the blocks."""
    for block in model.model.layers:
        for parent in (block.mlp, block.self_attn):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, build(child))


def unpack(child: nn.Linear) -> nn.Linear:
    made = copy.deepcopy(child)
    with torch.no_grad():
        made.weight.copy_(Packed(child).values())
    return made


@pytest.fixture(params=[Packed, Coded])
def pair(request):
    """A packed model and the float model that computes the same."""
    one, two = fresh("llama").model, fresh("llama").model
    replace(one, request.param)
    replace(two, unpack)
    return errata.load(one, tokenizer(), device="cpu"), errata.load(two, tokenizer(), device="cpu")


def test_packed_sites_are_found_and_read(pair):
    packed, plain = pair
    assert len(packed.layout.sites) == len(plain.layout.sites) == 6
    for mine, theirs in zip(packed.layout.sites, plain.layout.sites, strict=True):
        assert mine.packed and not theirs.packed and not mine.transposed
        assert (mine.name, mine.parameter) == (theirs.name, theirs.parameter)
        assert (mine.d_in, mine.d_out) == (theirs.d_in, theirs.d_out)
        torch.testing.assert_close(packed.weight(mine), plain.weight(theirs), atol=1e-6, rtol=1e-5)
    assert packed.layout.adds_directly


def test_a_weight_is_read_with_what_stands_on_and_beside_it(pair):
    for host in (*pair, fresh("gpt2")):
        site = host.layout.site(1)
        edit = make(host)
        edit = WeightEdit(
            edit.deltas, frozenset({site.parameter} if site.transposed else ()), edit.provenance
        )
        base = host.weight(site)
        for merge in (None, False):
            assert not host.placed
            with edit.on(host, merge=merge):
                assert host.placed
                change = host.weight(site) - base
                torch.testing.assert_close(change, edit.deltas[site.parameter].dense(), atol=1e-5, rtol=1e-5)
        assert torch.equal(host.weight(site), base)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_fit_on_packed_weights_is_that_on_the_same_numbers(pair, method):
    """Keys and values are read by hooks alone, so packing changes nothing but how the edit is applied."""
    requests = [REQUEST] if method == "rome" else [REQUEST, OTHER]
    start = pair[0].weights_hash()
    edits = [errata.edit(h, requests, method=method, steps=4, tokens=400, layers=[0, 1][: len(requests)])
             for h in pair]  # fmt: skip
    assert pair[0].weights_hash() == start
    assert edits[0].deltas.keys() == edits[1].deltas.keys()
    for name, delta in edits[1].deltas.items():
        torch.testing.assert_close(edits[0].deltas[name].dense(), delta.dense(), atol=1e-4, rtol=1e-3)
    with edits[1].on(pair[1]):
        expected = logits(pair[1])
    plain = logits(pair[0])
    with edits[0].on(pair[0]):  # beside of itself
        assert list(pair[0].placed) == [edits[0].digest] and pair[0].weights_hash() == start
        torch.testing.assert_close(logits(pair[0]), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits(pair[0]), plain) and float((expected - plain).abs().max()) > 1e-2
    with pytest.raises(EditError, match="packed.*merge=False"):
        edits[0].apply_(pair[0], merge=True)
    assert edits[0].trial(pair[0]) == {}


def test_an_edit_may_be_merged_here_and_beside_there():
    host = fresh("llama")
    host.model.model.layers[1].mlp.down_proj = Packed(host.model.model.layers[1].mlp.down_proj)
    start, plain = host.weights_hash(), logits(host)
    names = tuple(host.layout.site(layer).parameter for layer in (0, 1))
    edit = make(host, names=names)
    placement = edit.apply_(host)
    assert placement.lost.keys() == {names[0]} and placement.unmerged == (names[1],)
    assert edit.rounding_by_weight(host)[names[1]] == 0
    assert not torch.equal(logits(host), plain)
    edit.revert_(host)
    assert host.weights_hash() == start and torch.equal(logits(host), plain)


def test_fingerprints_of_packed_weights_count_codes_and_scales(pair):
    packed = pair[0]

    def twin():
        return errata.Host(copy.deepcopy(packed.model), packed.tokenizer, name="twin")

    assert twin().fingerprint == packed.fingerprint != pair[1].fingerprint
    for part in ("codes", "scale"):
        other = twin()
        module = other.model.model.layers[2].mlp.up_proj
        getattr(module, "weight" if part == "codes" and isinstance(module, Coded) else part).data[3, 0] += 1
        assert other.fingerprint != packed.fingerprint, part
        assert other.weights_hash() != packed.weights_hash(), part


def test_what_counts_as_packed():
    assert not placement.packed(torch.zeros(2, 2, dtype=torch.float16))
    assert not placement.packed(nn.Parameter(torch.zeros(2, 2)))
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn):
        assert placement.packed(torch.zeros(2, 2).to(dtype))
    assert placement.is_packed(Packed(nn.Linear(4, 3)))
    indexed = nn.Module()  # positions, masks and counters are integers as well
    indexed.register_buffer("positions", torch.arange(8)[None])
    indexed.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    for plain in (nn.Linear(4, 3), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Embedding(4, 3), indexed):
        assert not placement.is_packed(plain)


def test_what_is_a_linear_map():
    like = torch.empty(0)
    assert linear_map(nn.Linear(6, 4), 6, like) == (4, False)
    assert linear_map(Packed(nn.Linear(6, 4)), 6, like) == (4, False)
    from transformers.pytorch_utils import Conv1D

    for width in (4, 6):  # the second is square
        assert linear_map(Conv1D(width, 6), 6, like) == (width, True)
    for module in (nn.Linear(6, 4), nn.LayerNorm(5), nn.GELU(), nn.Embedding(9, 5), nn.Bilinear(5, 5, 5)):
        assert linear_map(module, 5, like) is None


def test_a_packed_map_that_passes_no_gradient_is_refused_with_the_reason():
    class Blind(Packed):
        def forward(self, x):
            return super().forward(x.detach())

    model = fresh("llama").model
    replace(model, Blind)
    host = errata.load(model, tokenizer(), device="cpu")
    with pytest.raises(HostError, match="passes no gradient"):
        errata.edit(host, REQUEST, method="rome")
    assert host.fingerprint  # it can still be asked, and edited beside
    name = "model.layers.1.mlp.down_proj.weight"
    record = Provenance("test", (REQUEST,), {}, host.fingerprint)
    edit = WeightEdit({name: LowRank(torch.ones(32, 1), torch.ones(1, 80))}, frozenset(), record)
    plain = logits(host)
    with edit.on(host):
        assert not torch.equal(logits(host), plain)


def test_layers_that_would_stop_passing_gradients_are_kept_from_it():
    model = fresh("llama").model
    layer = model.model.layers[0].mlp.down_proj
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it where the processor can
    host = errata.load(model, tokenizer(), device="cpu")
    assert not layer.support_avx512bf16_for_cpu and host.layout.site(0)


def test_eight_bit_floats_are_read():
    """Scaled float8 weights look like numbers, yet mean something else without their scale."""

    class Scaled(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale = nn.Parameter(linear.weight.detach().abs().max() / 400)
            codes = (linear.weight.detach() / self.scale.detach()).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(codes, requires_grad=False)

        def forward(self, x):
            return functional.linear(x, self.weight.to(x.dtype) * self.scale)

    model = fresh("llama").model
    replace(model, Scaled)
    host = errata.load(model, tokenizer(), device="cpu")
    site = host.layout.site(1)
    true = fresh("llama").weight(site)
    assert site.packed and float((host.weight(site) - true).norm() / true.norm()) < 0.1
    with pytest.raises(EditError, match="packed.*float8"):
        make(host).apply_(host, merge=True)
    plain = logits(host)
    with make(host).on(host):
        assert not torch.equal(logits(host), plain)


def test_dtype_of_a_packed_model_is_not_changed():
    model = fresh("llama").model
    replace(model, Packed)
    with pytest.raises(HostError, match="quantised model keeps"):
        errata.load(model, tokenizer(), device="cpu", dtype="bfloat16")


# --- packed by others -------------------------------------------------------------------------


def torchao_int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())


def bitsandbytes_int8(model: nn.Module) -> None:
    import bitsandbytes

    def build(child: nn.Linear):
        made = bitsandbytes.nn.Linear8bitLt(
            child.in_features, child.out_features, bias=False, has_fp16_weights=False
        )
        made.load_state_dict(child.state_dict())
        return made.to("cpu")

    replace(model, build)


def bitsandbytes_4bit(model: nn.Module) -> None:
    import bitsandbytes

    def build(child: nn.Linear):
        made = bitsandbytes.nn.Linear4bit(
            child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32,
            compress_statistics=True,
        )  # fmt: skip
        made.load_state_dict(child.state_dict())
        return made.to("cpu")

    replace(model, build)


REAL = [
    ("torchao", torchao_int8, 0.02),
    ("bitsandbytes", bitsandbytes_int8, 0.02),
    ("bitsandbytes", bitsandbytes_4bit, 0.15),
]


@pytest.mark.parametrize(("package", "quantise", "error"), REAL, ids=[q.__name__ for _, q, _ in REAL])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantised_layers_of_real_packages(package, quantise, error, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    # widths are multiples of the packages' blocks
    widths = {"hidden_size": 64, "intermediate_size": 128}
    original = fresh("llama", **widths)
    model = fresh("llama", **widths).model
    quantise(model)
    host = errata.load(model, tokenizer(), device="cpu")
    start, name = host.weights_hash(), host.fingerprint
    assert name != original.fingerprint
    for site in host.layout.sites:
        assert site.packed and (site.d_in, site.d_out) == ((128 if site.part == "mlp_out" else 64), 64)
        true = original.weight(original.layout.site(site.layer, site.part))
        assert float((host.weight(site) - true).norm() / true.norm()) < error
    edit = errata.edit(host, [REQUEST, OTHER], method="memit", steps=4, tokens=400, layers=[0, 1])
    plain = logits(host)
    loaded = errata.Edit.load(edit.save(tmp_path / "e.safetensors"))
    with loaded.on(host):
        assert host.weights_hash() == start
        inside = logits(host)
    assert float((inside - plain).norm() / plain.norm()) > 0.01
    assert host.weights_hash() == start and torch.equal(logits(host), plain)
    again = errata.Host(host.model, host.tokenizer, name="again")
    assert again.fingerprint == name
    with pytest.raises(EditError, match="packed"):
        edit.apply_(host, merge=True)
    second = errata.edit(host, [REQUEST, OTHER], method="memit", steps=4, tokens=400, layers=[0, 1])
    assert second.digest == edit.digest
