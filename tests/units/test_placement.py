"""Weights that cannot simply be written: offloaded, sharded, tied, packed. Detected, never ignored."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import errata
from errata.edits import Provenance, WeightEdit
from errata.errors import EditError, HostError
from errata.host import placement
from errata.linalg.lowrank import LowRank
from tests.models import fresh, tokenizer

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
OTHER = errata.Request("The capital of {} is", "Arvania", "Esk")


def make(host, *, names: tuple[str, ...] | None = None, scale: float = 0.1) -> WeightEdit:
    site = host.layout.site(1)
    g = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(site.d_out, 2, generator=g) * scale, torch.randn(2, site.d_in, generator=g))
    record = Provenance("test", (REQUEST,), {}, host.fingerprint)
    return WeightEdit(dict.fromkeys(names or (site.parameter,), delta), frozenset(), record)


def logits(host) -> torch.Tensor:
    rows = [host.encode(r.text).ids for r in (REQUEST, OTHER)]
    with torch.no_grad():
        return host.forward(host.batch(rows))


def site_module(host, layer: int = 1):
    return host.model.get_submodule(host.layout.site(layer).name)


# --- offloaded --------------------------------------------------------------------------------


def test_offloading_hooks_are_refused_at_load_and_when_applied():
    host = fresh("llama")
    edit, start = make(host), host.weights_hash()
    block = host.model.model.layers[1]
    for hook in (SimpleNamespace(offload=True), SimpleNamespace(hooks=(SimpleNamespace(offload=True),))):
        block._hf_hook = hook
        with pytest.raises(HostError, match="offloaded.*model.layers.1"):
            errata.load(host.model, tokenizer())
        with pytest.raises(EditError, match="offloaded.*merge=False"):
            edit.apply_(host)
        assert host.weights_hash() == start and list(host.placed) == []
    block._hf_hook = SimpleNamespace(offload=False, execution_device="cpu")  # only moves its inputs
    errata.load(host.model, tokenizer())
    with edit.on(host):
        assert host.weights_hash() != start


@pytest.mark.parametrize(
    ("placed", "refused"),
    [
        ({"model.embed_tokens": 0, "model.layers": "disk"}, "model.layers on disk"),
        ({"model.embed_tokens": 0, "model.layers": "cpu"}, "model.layers on cpu"),
        ({"model.embed_tokens": "cpu", "model.layers": "disk"}, "model.layers on disk"),
        ({"": "cpu"}, None),
        ({"model.embed_tokens": "cpu", "model.layers": "cpu"}, None),
        ({"model.embed_tokens": 0, "model.layers": 1}, None),
    ],
)
def test_device_maps_that_keep_weights_away_are_refused(placed, refused):
    model = fresh("llama").model
    model.hf_device_map = placed
    if refused is None:
        errata.load(model, tokenizer())
        return
    with pytest.raises(HostError, match=refused):
        errata.load(model, tokenizer())


def test_weights_that_went_to_the_meta_device_are_refused_when_applied():
    host = fresh("llama")
    edit = make(host)
    site_module(host).to("meta")
    with pytest.raises(EditError, match="meta device"):
        edit.apply_(host)
    assert list(host.placed) == []
    with pytest.raises(HostError, match="cannot be read"):
        host.weights_hash()


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_accelerates_offloading(kind, tmp_path):
    import accelerate

    host = fresh("llama")
    edit, plain = make(host), logits(host)
    with edit.on(host):
        expected = logits(host)
    if kind == "cpu":
        accelerate.cpu_offload(host.model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(host.model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(logits(host), plain), "the offloaded model itself runs as before"
    with pytest.raises(EditError, match="offloaded"):
        edit.apply_(host)
    with pytest.raises(HostError, match="offloaded"):
        errata.load(host.model, tokenizer())
    with edit.on(host, merge=False):  # leaves the weights where they are
        torch.testing.assert_close(logits(host), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(host), plain)


# --- sharded, tied, not to be written -----------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_sharded_weights_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    host = fresh("llama")
    edit = make(host)
    module = site_module(host)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(1)]))
        for merge in (None, True, False):
            with pytest.raises(EditError, match="sharded"):
                edit.apply_(host, merge=merge)
        with pytest.raises(HostError, match="sharded"):
            errata.load(host.model, tokenizer())
    finally:
        torch.distributed.destroy_process_group()
    assert list(host.placed) == []


def test_sharding_wrappers_and_partitioned_weights_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = fresh("llama").model
    model.model.layers[1] = FullyShardedDataParallel(model.model.layers[1])
    with pytest.raises(HostError, match="FSDP"):
        errata.load(model, tokenizer())
    host = fresh("llama")
    edit = make(host)
    site_module(host).weight.ds_id = 7  # DeepSpeed, stage 3
    with pytest.raises(EditError, match="sharded"):
        edit.apply_(host)
    with pytest.raises(HostError, match="sharded"):
        errata.load(host.model, tokenizer())


def test_tied_weights_are_refused_and_can_be_edited_beside():
    host = fresh("llama", tie_word_embeddings=True)
    head = LowRank(torch.ones(400, 1) * 0.01, torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    record = Provenance("test", (REQUEST,), {}, host.fingerprint)
    edit = WeightEdit({"lm_head.weight": head}, frozenset(), record)
    start, hidden = host.weights_hash(), host.model.get_input_embeddings()(torch.tensor([5])).detach()
    with pytest.raises(EditError, match=r"lm_head\.weight.*embed_tokens\.weight"):
        edit.apply_(host)
    assert host.weights_hash() == start
    plain = logits(host)
    with edit.on(host, merge=False):  # one end of the tie alone
        assert not torch.equal(logits(host), plain)
        assert torch.equal(host.model.get_input_embeddings()(torch.tensor([5])), hidden)
    both = WeightEdit({"lm_head.weight": head, "model.embed_tokens.weight": head}, frozenset(), record)
    with pytest.raises(EditError, match="shares its memory"):
        both.apply_(host)
    assert host.weights_hash() == start and torch.equal(logits(host), plain)


def test_only_overlapping_memory_counts_as_shared():
    host = fresh("llama")
    one, two = site_module(host, 0), site_module(host, 1)
    flat = torch.cat([one.weight.detach().reshape(-1), two.weight.detach().reshape(-1)])
    half = one.weight.numel()
    one.weight.data, two.weight.data = flat[:half].view(32, 80), flat[half:].view(32, 80)
    start = host.weights_hash()
    with make(host).on(host):  # neighbours in one block of memory
        pass
    assert host.weights_hash() == start
    one.weight.data = flat[80 : half + 80].view(32, 80)  # now by one row into the other
    with pytest.raises(EditError, match="shares its memory"):
        make(host).apply_(host, foreign=True)


def test_a_write_that_does_not_stick_is_an_error_and_undone():
    class Stubborn(TorchDispatchMode):
        """Ignores writes to one weight, as memory that is not the model's own would."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "copy_" in str(func) and args[0].shape == (32, 80):
                return args[0]
            return func(*args, **(kwargs or {}))

    host = fresh("llama")
    edit, start = make(host), host.weights_hash()
    edit.digest  # noqa: B018  computed outside the mode
    with pytest.raises(EditError, match="did not take the change"), Stubborn():
        edit.apply_(host)
    assert host.weights_hash() == start and host.overlays == {}


def test_inference_weights_are_refused():
    host = fresh("llama")
    edit = make(host)
    with torch.inference_mode():
        site_module(host).weight = nn.Parameter(
            site_module(host).weight.detach().clone(), requires_grad=False
        )
    with pytest.raises(EditError, match="inference mode"):
        edit.apply_(host)
    with edit.on(host, merge=False):
        assert list(host.placed) == [edit.digest]


def test_numbers_that_are_not_finite_are_refused_and_nothing_changes():
    host = fresh("llama")
    host.model.half()
    start = host.weights_hash()
    good = make(host)
    ((name, delta),) = good.deltas.items()
    other = host.layout.site(2).parameter
    bad = {
        "NaN or infinite": LowRank(delta.B * float("nan"), delta.A),
        "overflow": LowRank(delta.B * 1e6, delta.A),
    }
    for reason, wrong in bad.items():
        edit = WeightEdit({name: delta, other: wrong}, frozenset(), good.provenance)
        with pytest.raises(EditError, match=reason):
            edit.apply_(host)
        assert host.weights_hash() == start and list(host.placed) == []


# --- precision --------------------------------------------------------------------------------


def test_merging_says_what_it_lost_and_warns_of_most():
    host = fresh("llama")
    host.model.bfloat16()
    site = host.layout.site(1)
    start = host.weights_hash()
    strong, weak = make(host, scale=1e-2), make(host, scale=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lost = strong.apply_(host).lost
    assert 0 < lost[site.parameter] < 0.5
    assert lost == strong.rounding_by_weight(host)
    assert strong.rounding(host) == pytest.approx(lost[site.parameter])
    strong.revert_(host)
    with pytest.warns(UserWarning, match="most of the edit was lost; use merge=False") as caught:
        weak.apply_(host)
    weak.revert_(host)
    with pytest.warns(UserWarning, match="most of the edit was lost") as again, weak.on(host) as placement:
        assert placement.lost[site.parameter] > 0.5
    assert {w.filename for w in (*caught, *again)} == {__file__}, "the warnings point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with weak.on(host, merge=False) as placement:
            assert placement.lost == {} and placement.unmerged == (site.parameter,)
            assert weak.rounding(host) == 0
        trial = weak.trial(host)
    assert trial[site.parameter] > 0.5 and trial.keys() == weak.deltas.keys()
    assert host.weights_hash() == start and list(host.placed) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_that_of_the_realised_change(dtype):
    """Against a recomputation that shares no code: cast once from the float32 sum."""
    host = fresh("gpt2")
    host.model.to(dtype)
    site = host.layout.site(1)
    weight = host.model.get_parameter(site.parameter)
    base = weight.detach().clone()
    edit = WeightEdit(make(host).deltas, frozenset({site.parameter}), make(host).provenance)
    (delta,) = edit.deltas.values()
    change = (delta.B @ delta.A).mT
    with edit.on(host) as placement:
        assert torch.equal(weight, (base.float() + change).to(dtype))
        realised = weight.detach().float() - base.float()
    expected = float((realised - change).norm() / change.norm())
    assert placement.lost[site.parameter] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert torch.equal(weight, base)


def test_a_weight_moved_while_edited_is_still_restored():
    host = fresh("llama")
    start = host.weights_hash()
    one, two = make(host), make(host, scale=0.3)
    one.apply_(host)
    host.model.get_parameter(host.layout.site(1).parameter).data = host.model.get_parameter(
        host.layout.site(1).parameter
    ).data.clone()
    with two.on(host, merge=False):
        one.revert_(host)
    assert host.weights_hash() == start


def test_a_model_is_named_by_all_its_modules_each_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ModuleDict({"again": shared, "own": nn.Sequential(nn.ReLU())}))
    model.register_module("absent", None)
    before = placement.identities(model)
    assert sorted(before) == sorted(id(module) for module in model.modules())
    model[1]["own"][0] = nn.ReLU()
    assert placement.identities(model) != before


def test_sixteen_bit_hosts_have_the_same_layout(lab_host):
    """A stream of large states rounds coarsely; what structure says must not depend on that."""
    for dtype in ("bfloat16", "float16"):
        half = errata.load("lab", device="cpu", dtype=dtype)
        assert half.layout == lab_host.layout and half.layout.adds_directly
