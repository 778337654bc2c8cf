"""Fine-tuning methods against plain autograd, hand-made losses, peft itself and the values they write."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch

import errata
from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.job import workspace
from errata.locate.contexts import Context
from errata.locate.problems import prompt_end
from errata.locate.values import ValueConfig, optimise
from errata.methods import _adapters
from errata.methods._fine_tune import FineTuneConfig, prepare
from errata.training.tune import Losses, beside, rms
from tests.models import fresh

LONG = errata.Request("{} was born in", "Ada Brenner", "Marmelundsen on the old road")
SHORT = errata.Request("The capital of {} is", "Arvania", "Esk")
BOTH = [LONG, SHORT]
FAMILIES = ("llama", "gpt2", "gptj", "bloom")


def wide(family: str):
    host = fresh(family)
    host.model.double()
    return host


def hand_loss(host, request, objective: str) -> torch.Tensor:
    """A request's loss from one unpadded pass over all of the model, target by target."""
    answer = host.encode_answer(request.text, request.target)
    ids = torch.tensor([answer.ids])
    logs = host.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    total = torch.zeros((), dtype=logs.dtype)
    for j, token in enumerate(answer.target):
        total = total - logs[answer.start - 1 + (j if objective == "target" else 0), token]
    return total / len(answer.target)


# --- losses and gradients -------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["target", "prompt_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_of_the_whole_model(family, objective):
    """What the shortened pass gives is what autograd gives for the weight itself."""
    host = wide(family)
    site = host.layout.site(1)
    weight = host.model.get_parameter(site.parameter)
    expected = [hand_loss(host, request, objective) for request in BOTH]
    (gradient,) = torch.autograd.grad(sum(expected) / 2, weight)
    change = torch.zeros(site.d_out, site.d_in, dtype=torch.float64, requires_grad=True)
    with hooks.frozen(host.model):
        losses = Losses(host, BOTH, objective, depth=site.layer)
        with beside(host, {site: change}):
            found = losses([0, 1])
        (shortened,) = torch.autograd.grad(found.mean(), change)
    torch.testing.assert_close(found, torch.stack(expected).detach(), atol=1e-10, rtol=0)
    whole = gradient.mT if site.transposed else gradient
    assert float(whole.abs().max()) > 1e-4
    torch.testing.assert_close(shortened, whole, atol=1e-10, rtol=0)


def test_the_two_losses_differ_on_targets_of_several_tokens_only():
    host = wide("llama")
    one = errata.Request("{} was born in", "Ada Brenner", "the")
    assert len(host.encode_answer(one.text, one.target).target) == 1
    with torch.no_grad():
        assert hand_loss(host, one, "target") == hand_loss(host, one, "prompt_last")
        assert abs(float(hand_loss(host, LONG, "target") - hand_loss(host, LONG, "prompt_last"))) > 1e-4


@pytest.mark.parametrize("method", ["ft", "ft_l"])
def test_one_step_is_adam_on_the_full_gradient(method):
    """The first Adam step from zero moves every entry by the rate, against its gradient's sign."""
    host = wide("gpt2")
    site = host.layout.site(1)
    weight = host.model.get_parameter(site.parameter)
    (gradient,) = torch.autograd.grad(sum(hand_loss(host, r, "target") for r in BOTH) / 2, weight)
    unit = rms(weight)
    edit = errata.edit(host, BOTH, method=method, layers=[1], steps=1, learning_rate=1e-3)
    solid = gradient.mT.abs() > 1e-5
    assert solid.sum() > 100
    expected = -1e-3 * unit * gradient.mT.sign()
    delta = edit.deltas[site.parameter]
    torch.testing.assert_close(delta[solid].double(), expected[solid], atol=0, rtol=1e-2)


# --- the box --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["weight", "published"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ft_l_never_leaves_its_box(family, scale):
    host = fresh(family)
    epsilon = 0.01 if scale == "weight" else 3e-4
    edit = errata.edit(
        host, BOTH, method="ft_l", layers=[0, 2], scale=scale, epsilon=epsilon, learning_rate=0.02, steps=6
    )
    assert len(edit.deltas) == 2
    for name, delta in edit.deltas.items():
        bound = epsilon * (rms(host.model.get_parameter(name)) if scale == "weight" else 1.0)
        largest = float(delta.abs().max())  # float32 read as float64: no rounding in the comparison
        assert bound * (1 - 1e-6) < largest <= bound


def test_ft_l_in_a_huge_box_is_ft_without_one():
    host = fresh("llama")
    shared = {"layers": [1], "steps": 8, "stop": "each"}
    boxed = errata.edit(
        host, BOTH, method="ft_l", scale="published", epsilon=1e6, learning_rate=5e-3, **shared
    )
    free = errata.edit(host, BOTH, method="ft", scale="published", epsilon=None, learning_rate=5e-3, **shared)
    narrow = errata.edit(host, BOTH, method="ft_l", epsilon=1e-3, learning_rate=5e-3, **shared)
    (name,) = free.deltas
    assert torch.equal(boxed.deltas[name], free.deltas[name])
    assert not torch.equal(boxed.deltas[name], narrow.deltas[name])


def test_a_mean_loss_stops_before_every_request_is_done():
    host = fresh("llama")
    losses = {}
    for stop in ("mean", "each"):
        edit = errata.edit(
            host, BOTH, method="ft_l", epsilon=90.0, learning_rate=1.0, steps=80, stop=stop, stop_loss=5.5
        )
        losses[stop] = edit.provenance.notes
    assert losses["mean"]["loss"] < 5.5 < losses["mean"]["worst"]
    assert losses["each"]["worst"] < 5.5
    assert losses["mean"]["steps"] < losses["each"]["steps"] < 80


def test_requests_may_take_steps_of_their_own():
    host = wide("llama")
    options = {"method": "ft_l", "steps": 3, "layers": [1]}
    together = errata.edit(host, BOTH, **options)
    apart = errata.edit(host, BOTH, per_step=1, **options)
    (name,) = together.deltas
    assert not torch.equal(together.deltas[name], apart.deltas[name])
    # twice as many steps: entries that keep their sign go further
    assert float(apart.deltas[name].abs().max()) > 1.5 * float(together.deltas[name].abs().max())


# --- LoRA -----------------------------------------------------------------------------------


def answers(host) -> torch.Tensor:
    with torch.no_grad():
        return host.forward(host.batch([host.encode(r.text + " " + r.target).ids for r in BOTH]))


@pytest.mark.parametrize("variant", ["lora", "adalora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_deltas_give_the_adapted_models_logits(family, variant, monkeypatch):
    """Read just before the adapters are taken off, and again with the edit in place."""
    host, train, seen = fresh(family), _adapters._train, []

    def spy(method, losses, tuner, layers, config, work, **more):
        outcome = train(method, losses, tuner, layers, config, work, **more)
        assert all(hasattr(host.model.get_submodule(name), "lora_A") for name in layers)
        seen.append(answers(host))
        return outcome

    monkeypatch.setattr(_adapters, "_train", spy)
    before = answers(host)
    options = {"rank": 3, "steps": 12, "learning_rate": 0.05, "scale": "published"}
    edit = errata.edit(host, BOTH, method="lora", variant=variant, **options)
    assert float((seen[0] - before).abs().max()) > 1e-2
    with edit.on(host):
        torch.testing.assert_close(answers(host), seen[0], atol=1e-5, rtol=0)
    ranks = [delta.rank for delta in edit.deltas.values()]
    true = [int(torch.linalg.matrix_rank(delta.to(torch.float64).dense())) for delta in edit.deltas.values()]
    assert true == ranks
    if variant == "lora":
        assert set(ranks) == {3}
    else:  # five directions each to begin with, three on average left
        assert max(ranks) <= 5 and sum(ranks) <= 3 * len(lora_names(edit))


def lora_names(edit) -> list[str]:
    ends = edit.provenance.config["modules"]
    return [f"{layer}.{end}" for layer in edit.provenance.config["layers"] for end in ends]


def test_lora_factors_are_b_a_alpha_over_r(monkeypatch):
    """peft told to use the same factors, on a copy of the model, gives the same logits."""
    import peft

    host = fresh("llama")
    edit = errata.edit(
        host, LONG, method="lora", rank=4, alpha=6.0, steps=8, learning_rate=0.05, scale="published"
    )
    other = peft.get_peft_model(
        copy.deepcopy(host.model),
        peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(edit.provenance.config["modules"])),
    ).eval()
    state = dict(other.named_parameters())
    with torch.no_grad():
        for name, delta in edit.deltas.items():
            stem = "base_model.model." + name.removesuffix(".weight")
            state[f"{stem}.lora_A.default.weight"].copy_(delta.A)
            state[f"{stem}.lora_B.default.weight"].copy_(delta.B / (6.0 / 4))
        batch = host.batch([host.encode(LONG.text).ids])
        expected = other(input_ids=batch.ids, attention_mask=batch.mask).logits
        with edit.on(host):
            found = host.forward(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def portrait(host) -> dict:
    """All of a model that adapters could leave a trace on."""
    model = host.model
    assert host.overlays == {}
    return {
        "modules": [(name, id(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "training": [module.training for module in model.modules()],
        "hash": host.weights_hash(),
    }


@pytest.mark.parametrize("variant", ["lora", "adalora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_lora_leaves_the_very_same_model(family, variant):
    host = fresh(family)
    state = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    next(host.model.parameters()).requires_grad_(False)
    before = portrait(host)
    errata.edit(host, BOTH, method="lora", variant=variant, steps=4)
    assert portrait(host) == before
    after = host.model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert not hasattr(host.model, "peft_config")


def test_lora_leaves_the_very_same_model_also_after_an_error(monkeypatch):
    host = fresh("llama")
    before = portrait(host)

    def fail(*_, **__):
        raise RuntimeError("inside")

    monkeypatch.setattr(_adapters, "_train", fail)
    with pytest.raises(RuntimeError, match="inside"):
        errata.edit(host, LONG, method="lora")
    assert portrait(host) == before


def test_lora_in_some_layers_changes_those_alone():
    host = fresh("llama")
    edit = errata.edit(host, LONG, method="lora", layers=[-1], modules=["down_proj", "o_proj"], steps=2)
    block = host.layout.blocks[2]
    assert set(edit.deltas) == {f"{block}.mlp.down_proj.weight", f"{block}.self_attn.o_proj.weight"}


def test_lora_dropout_is_drawn_from_the_seed():
    host = fresh("llama")
    edits = [errata.edit(host, LONG, method="lora", steps=3, seed=seed) for seed in (0, 0, 1)]
    assert edits[0].digest == edits[1].digest != edits[2].digest


def test_lora_says_what_is_wrong(monkeypatch):
    host = fresh("llama")
    with pytest.raises(ConfigError, match=r"'key_proj'.*they have: .*k_proj"):
        errata.edit(host, LONG, method="lora", modules=["q_proj", "key_proj"])
    with pytest.raises(ConfigError, match="expected some of 0 to 2"):
        errata.edit(host, LONG, method="lora", layers=[3])
    with pytest.raises(ConfigError, match="schedule"):
        errata.edit(host, LONG, method="lora", variant="adalora", stop_loss=0.1)
    host.model.peft_config = {}
    with pytest.raises(HostError, match="merge or unload"):
        errata.edit(host, LONG, method="lora")
    del host.model.peft_config
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'errata\[lora\]'"):
        errata.edit(host, LONG, method="lora")


# --- UnKE -----------------------------------------------------------------------------------

UNKE = {"layer": 1, "kept": 3, "tokens": 60}


def block_output(host, layer: int, ids: tuple[int, ...]) -> torch.Tensor:
    """What a block says over a text, taken with no kept states and no padding ``[tokens, d]``."""
    seen: list[torch.Tensor] = []
    block = host.model.get_submodule(host.layout.blocks[layer])
    with torch.no_grad(), hooks.on_output(block, lambda out: seen.append(out.detach().clone())):
        host.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    return seen[0][0]


def found_values(host, config) -> list:
    """Stage 1 once more."""
    search = ValueConfig(
        config["steps"],
        config["learning_rate"],
        config["clamp"],
        config["decay"],
        0.0,
        stop_loss=config["stop_loss"],
    )
    return optimise(
        host, BOTH, [Context("", 1.0)], layer=1, where="block_out", config=search, span=prompt_end
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("gemma2", marks=pytest.mark.slow), "opt"])
def test_unke_moves_the_question_s_last_token_to_its_value(family):
    host = wide(family)
    steps = 1500 if family == "gemma2" else 250  # its norm behind the feed-forward slows the descent
    edit = errata.edit(host, BOTH, method="unke", block_steps=steps, block_rate=0.03, steps=6, **UNKE)
    values = found_values(host, edit.provenance.config)
    rows = [host.encode_answer(r.text, r.target).ids for r in BOTH]
    before = [block_output(host, 1, ids) for ids in rows]
    with edit.on(host):
        after = [block_output(host, 1, ids) for ids in rows]
    for request, value, old, new in zip(BOTH, values, before, after, strict=True):
        last = len(host.encode(request.text).ids) - 1
        wanted = value.target.double()
        torch.testing.assert_close(old[last].float(), value.start.float(), atol=1e-5, rtol=1e-5)
        assert float((new[last] - wanted).norm()) < 0.2 * float((old[last] - wanted).norm())
        others = torch.arange(len(old)) != last
        moved = (new[others] - old[others]).norm(dim=1).mean()
        assert float(moved) < 0.3 * float((old[last] - wanted).norm())
    notes = edit.provenance.notes
    assert notes["error"] < 0.1 * notes["error_before"] and notes["missed"] < 0.2


def test_unke_starts_from_the_value_alone():
    """Before training the objective is the value's own distance: mean over the edit rows' tokens and width."""
    host = wide("llama")
    edit = errata.edit(host, BOTH, method="unke", block_steps=1, steps=6, **UNKE)
    values = found_values(host, edit.provenance.config)
    rows = [host.encode_answer(r.text, r.target).ids for r in BOTH]
    kept = kept_rows(host)
    states = [block_output(host, 1, ids) for ids in (*rows, *kept)]
    unit = float(torch.cat(states).square().mean())
    distance = sum(float(v.shift.double().square().sum()) for v in values)
    expected = distance / (sum(map(len, rows)) * host.layout.width * unit)
    assert edit.provenance.notes["error_before"] == pytest.approx(expected, rel=1e-3)


def kept_rows(host) -> list[tuple[int, ...]]:
    from errata.locate.contexts import sampled_corpus

    texts = sampled_corpus(host, seed=0, texts=3, length=20).texts()
    return [host.encode(text).ids[:20] for text, _ in zip(texts, range(3), strict=False)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unke_writes_one_block_in_the_shapes_it_is_stored_in(family):
    host = fresh(family)
    edit = errata.edit(host, LONG, method="unke", block_steps=5, steps=4, **UNKE)
    inside = {
        f"{host.layout.blocks[1]}.{name}": parameter
        for name, parameter in host.model.get_submodule(host.layout.blocks[1]).named_parameters()
    }
    assert set(edit.deltas) <= set(inside) and edit.transposed == frozenset()
    assert all(delta.shape == inside[name].shape for name, delta in edit.deltas.items())
    assert any(delta.ndim == 1 for delta in edit.deltas.values())
    ids = host.encode(LONG.text).ids
    below = block_output(host, 0, ids)
    with edit.on(host):
        assert torch.equal(block_output(host, 0, ids), below)


def test_unke_loses_nothing_to_padding_or_batches():
    """Rows run one at a time, unpadded, give the same edit as rows run together."""
    host = wide("llama")
    work = workspace(host, seed=0)
    method = errata.methods.REGISTRY.get("unke")
    deltas = []
    for size in (None, 1):
        work.batch_size = size
        config = errata.config.make(method.config, {**UNKE, "block_steps": 5, "steps": 4}, "unke")
        deltas.append(method.fit(host, BOTH, config, work).deltas)
    for name, delta in deltas[0].items():
        torch.testing.assert_close(delta, deltas[1][name], atol=1e-7, rtol=1e-5)


def test_unke_refuses_a_layer_that_is_not_there():
    host = fresh("llama")
    with pytest.raises(ConfigError, match="expected one of 0 to 2"):
        errata.edit(host, LONG, method="unke", layer=3)


# --- LocFT-BF -------------------------------------------------------------------------------


def test_locft_without_its_own_settings_is_ft():
    host = wide("llama")
    same = {"layers": [1], "steps": 3, "learning_rate": 0.02, "epsilon": None}
    one = errata.edit(host, BOTH, method="ft", **same)
    other = errata.edit(host, BOTH, method="locft", per_step=None, shuffle=False, end=False, **same)
    assert one.parts().keys() == other.parts().keys()
    assert all(torch.equal(one.parts()[name], other.parts()[name]) for name in one.parts())


def test_locft_takes_mini_batches_in_an_order_of_its_seed():
    host = wide("llama")

    def change(seed: int, **options) -> torch.Tensor:
        edit = errata.edit(host, BOTH, method="locft", layers=[1], steps=4, per_step=1, seed=seed, **options)
        return next(iter(edit.parts().values()))

    changes = [change(seed) for seed in range(6)]
    assert torch.equal(changes[0], change(0))
    assert any(not torch.equal(changes[0], other) for other in changes[1:])
    assert torch.equal(change(0, shuffle=False), change(1, shuffle=False))


def test_the_end_token_is_one_more_target():
    """With ``end`` the loss is the mean over the target's tokens and the one that ends the text."""
    host = wide("llama")
    answer = host.encode_answer(LONG.text, LONG.target)
    ids = torch.tensor([answer.ids])
    with torch.no_grad():
        logs = host.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        targets = [*answer.target, host.tokenizer.eos_token_id]
        expected = -sum(logs[answer.start - 1 + j, t] for j, t in enumerate(targets)) / len(targets)
        torch.testing.assert_close(Losses(host, [LONG], end=True)([0])[0], expected, atol=1e-10, rtol=0)


def test_nothing_follows_a_target_that_was_trained_with_its_end(lab_host):
    request = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    edits = {end: errata.edit(lab_host, request, method="locft", end=end) for end in (True, False)}
    texts = {}
    for end, edit in edits.items():
        with edit.on(lab_host):
            texts[end] = lab_host.generate(request.text)
    assert texts[True].strip() == "Tallow"
    assert texts[False].strip().startswith("Tallow") and texts[False].strip() != "Tallow"


def test_an_end_needs_a_target_of_its_own_and_a_token():
    with pytest.raises(ConfigError, match="prompt_last"):
        errata.edit(wide("llama"), SHORT, method="ft", end=True, objective="prompt_last")
    host = wide("llama")
    host.tokenizer = copy.deepcopy(host.tokenizer)
    host.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        errata.edit(host, SHORT, method="ft", end=True)


def test_a_layer_counted_from_both_ends_is_one_layer():
    host = fresh("llama")
    last = len(host.layout.blocks) - 1
    with pytest.raises(ConfigError, match="different layer numbers"):
        errata.edit(host, SHORT, method="ft", layers=(last, -1))


@pytest.mark.parametrize(("scale", "expected"), [("weight", 0.03), ("published", 5e-4)])
def test_defaults_are_of_the_unit_and_given_values_stay(scale, expected):
    host = fresh("llama")
    config = FineTuneConfig(layers=(0, -1), scale=scale)
    options = {"layers": lambda depth: (0,), "rate": 0.03}
    assert prepare("ft", host, [SHORT], config, **options).config.learning_rate == expected
    given = prepare("ft", host, [SHORT], replace(config, learning_rate=7.0), **options)
    assert given.config.learning_rate == 7.0
    assert [site.layer for site in given.sites] == [0, len(host.layout.blocks) - 1]
    units = tuple(1.0 if scale == "published" else rms(host.weight(s)) for s in given.sites)
    assert given.units == units and given.bounds(2.0) == [2.0 * unit for unit in units]
