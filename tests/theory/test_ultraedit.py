"""UltraEdit on float64 hosts: its pairs against autograd, its update against the ridge problem."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import errata
from errata import config as settings
from errata.edits import WeightEdit
from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.job import workspace
from errata.linalg.lowrank import LowRank
from errata.linalg.running import Running
from errata.locate.gradients import collect, feed_forward, linear_maps
from errata.methods import ultraedit
from errata.methods.ultraedit import METHOD, Config
from tests.models import FAMILIES, fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("{} lives in", "Bruno Holner", "Tallow"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
    errata.Request("The old road leads to {}, near", "Tallow", "the small harp"),
]


def double(family: str = "llama", **changes):
    made = fresh(family, **changes)
    made.model.double()
    return made


@pytest.fixture(scope="module")
def host():
    return double()


def answers(host, requests=REQUESTS):
    return [host.encode_answer(r.text, r.target) for r in requests]


def loss_of(host, answer):
    """Summed negative log-likelihood of a target, row by row and without any shortcut."""
    logits = host.forward(host.batch([answer.ids]))[0]
    return functional.cross_entropy(
        logits[answer.start - 1 : -1], torch.tensor(answer.target), reduction="sum"
    )


def everywhere(host) -> list[str]:
    """Every linear map of every block."""
    blocks = host.layout.blocks
    return [f"{blocks[i]}.{name}" for i in range(len(blocks)) for name in linear_maps(host, i)]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two tensors."""
    return float((one - other).norm() / other.norm())


def exactness(family: str) -> float:
    """Bound on rounding: three families compute attention in float32 whatever the weights are."""
    return 1e-6 if family in ("gptj", "bloom", "gemma2") else 1e-12


def dense(delta) -> torch.Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def turn(host, requests=REQUESTS, after=None, **options) -> WeightEdit:
    config = settings.make(Config, options, "ultraedit")
    edit = METHOD.run(host, requests, config, workspace(host, seed=0), after=after)
    assert isinstance(edit, WeightEdit)
    return edit


# --- pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_autograds_at_every_linear_map(family):
    host = double(family)
    names = everywhere(host)
    assert len(names) >= 4 * 3
    pairs = collect(host, answers(host), names, batch_size=3)
    seen: dict[str, list] = {name: [[], []] for name in names}
    for answer in answers(host):
        # a copy of the output, since some families add to it in place
        kept: dict[str, list] = {name: [] for name in names}

        def hook(module, args, output, into):
            into.append(args[0].detach().reshape(-1, args[0].shape[-1]))
            copy = output.clone()
            copy.retain_grad()
            into.append(copy)
            return copy.clone()

        handles = [
            host.model.get_submodule(name).register_forward_hook(
                lambda m, a, o, into=kept[name]: hook(m, a, o, into)
            )
            for name in names
        ]
        loss_of(host, answer).backward()
        for handle in handles:
            handle.remove()
        predicting = slice(answer.start - 1, len(answer.ids) - 1)
        for name, (inputs, output) in kept.items():
            seen[name][0].append(inputs[predicting])
            seen[name][1].append(output.grad.reshape(-1, output.shape[-1])[predicting])
    for name, (inputs, gradients) in seen.items():
        wanted = torch.cat(gradients)
        assert float(wanted.abs().max()) > 0
        assert apart(pairs[name].inputs, torch.cat(inputs)) < exactness(family)
        assert apart(pairs[name].gradients, wanted) < exactness(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_add_up_to_the_weights_gradient(family):
    """sum g h^T over all tokens is the gradient of the loss with respect to the weight, as stored."""
    host = double(family)
    names = everywhere(host)
    pairs = collect(host, answers(host), names, tokens="all")
    torch.stack([loss_of(host, answer) for answer in answers(host)]).sum().backward()
    for name in names:
        made = pairs[name].gradients.mT @ pairs[name].inputs
        wanted = host.model.get_submodule(name).weight.grad
        wanted = wanted.mT if pairs[name].transposed else wanted
        assert apart(made, wanted) < exactness(family)


def test_in_the_last_feed_forward_only_predicting_tokens_count(host):
    """No attention above it: what the other tokens say there reaches no loss."""
    name = host.layout.site(2).name
    few = collect(host, answers(host), [name])[name]
    all_of_them = collect(host, answers(host), [name], tokens="all")[name]
    assert len(all_of_them.inputs) > len(few.inputs)
    torch.testing.assert_close(
        few.gradients.mT @ few.inputs, all_of_them.gradients.mT @ all_of_them.inputs, atol=1e-12, rtol=1e-10
    )


def test_rows_do_not_depend_on_their_company(host):
    names = [host.layout.site(1).name]
    together = collect(host, answers(host), names, batch_size=10)[names[0]]
    alone = collect(host, answers(host), names, batch_size=1)[names[0]]
    torch.testing.assert_close(together.inputs, alone.inputs, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(together.gradients, alone.gradients, atol=1e-12, rtol=1e-10)


def test_nothing_below_the_lowest_module_is_differentiated(host):
    seen: dict[int, bool] = {}

    def note(layer):
        return lambda hidden: seen.__setitem__(layer, hidden.requires_grad)

    blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
    with hooks.on_output(blocks[0], note(0)), hooks.on_output(blocks[1], note(1)):
        collect(host, answers(host), [host.layout.site(1).name])
    assert seen == {0: False, 1: True}
    assert all(p.grad is None and p.requires_grad for p in host.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_give_the_same_pairs_coarsely(dtype):
    host, exact = fresh("llama"), double()
    host.model.to(dtype)
    exact.model.load_state_dict(host.model.state_dict())
    name = host.layout.site(1).name
    made, wanted = collect(host, answers(host), [name])[name], collect(exact, answers(host), [name])[name]
    assert made.gradients.dtype == made.inputs.dtype == torch.float32
    for one, other in ((made.inputs, wanted.inputs), (made.gradients, wanted.gradients)):
        assert apart(one, other) < 0.05


def test_modules_that_are_not_one_linear_map_are_refused():
    host = double()
    block = host.layout.blocks[1]
    doubled = host.model.get_submodule(f"{block}.mlp.up_proj")
    handle = doubled.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(HostError, match="does not compute W x"):
        collect(host, answers(host), [f"{block}.mlp.up_proj"])
    handle.remove()
    host.model.model.layers[2].mlp.down_proj = host.model.model.layers[1].mlp.down_proj
    with pytest.raises(HostError, match="once for every token"):
        collect(host, answers(host), [f"{block}.mlp.down_proj"])
    host.model.model.layers[2].mlp.extra = torch.nn.Linear(4, 4).double()
    with pytest.raises(HostError, match="not run"):
        collect(host, answers(host), [f"{host.layout.blocks[2]}.mlp.extra"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_feed_forward_is_found_whole(family):
    host = fresh(family)
    for layer in range(3):
        inner, outer = feed_forward(host, layer)
        site = host.layout.site(layer)
        assert f"{host.layout.blocks[layer]}.{outer}" == site.name
        assert len(inner) == (2 if len(linear_maps(host, layer)) == 7 else 1)
        filled = 0
        for name in inner:
            weight = host.model.get_submodule(f"{host.layout.blocks[layer]}.{name}").weight
            filled += weight.numel() // (site.d_in * site.d_out)
        assert filled in (1, 2), "one hidden layer, or that and its gate"


# --- the update -----------------------------------------------------------------------------


def by_hand(host, names, requests=REQUESTS, *, eta, ridge, earlier=()):
    """Pseudo-values, ridge and primal solution per module, from the batch formulas."""
    pairs = collect(host, answers(host, requests), names)
    rows = {n: torch.cat([p.inputs, p.gradients], 1) for n, p in pairs.items()}
    pooled = torch.cat([*earlier, *rows.values()])  # one shape
    mean, deviation = pooled.mean(0), pooled.std(0)
    made = {}
    for name, pair in pairs.items():
        h, a = pair.inputs, pair.inputs.shape[1]
        both = (rows[name] - mean) / deviation
        weight = host.model.get_submodule(name).weight.detach()
        size = h.square().sum(1).mean()
        step = eta * weight.square().mean().sqrt() * size.sqrt() / a
        values = -step * both[:, :a].square().sum(1, keepdim=True) * both[:, a:]
        penalty = ridge * size
        eye = penalty * torch.eye(a, dtype=torch.float64)
        made[name] = values, float(penalty), torch.linalg.solve(h.mT @ h + eye, h.mT @ values).mT
    return pairs, rows, made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_delta_is_the_primal_solution(family):
    host = double(family)
    edit = turn(host, layers=[1, 2], eta=0.3, ridge=0.05)
    names = [host.layout.site(i).name for i in (1, 2)]
    _, rows, made = by_hand(host, names, eta=0.3, ridge=0.05)
    assert len(rows[names[0]]) < 80, "fewer tokens than the input is wide: the dual was solved"
    assert set(edit.deltas) == {f"{name}.weight" for name in names}
    for name in names:
        delta = edit.deltas[f"{name}.weight"]
        assert isinstance(delta, LowRank) and delta.A.dtype == torch.float64
        # the floor under the deviations is 1e-7 of the mean
        assert apart(delta.dense(), made[name][2]) < 1e-5
    wide = host.layout.site(1).d_in
    assert all(edit.state[f"normaliser.{wide}x32.{part}"].numel() for part in Running.PARTS)


def test_dual_and_primal_agree(host):
    """The same regression in N x N and in a x a coordinates, and by brute force."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 9, generator=g, dtype=torch.float64)
    gradients = torch.randn(12, 5, generator=g, dtype=torch.float64)
    for rows in (3, 8, 9, 12):  # thin, dense from the dual, and the primal
        pair = ultraedit.Pairs(inputs[:rows], gradients[:rows], False, torch.arange(rows))
        running = Running.of(torch.cat([inputs, gradients], 1))
        config = Config(eta=0.7, ridge=0.2, scale="published")
        delta = ultraedit._solve(pair, running, 1.0, config)
        assert isinstance(delta, LowRank) == (rows * (9 + 5) < 9 * 5)
        values = torch.cat(list(ultraedit._values(pair, running, 0.7, config)))
        stacked = torch.cat([pair.inputs, math.sqrt(0.2) * torch.eye(9, dtype=torch.float64)])
        target = torch.cat([values, torch.zeros(9, 5, dtype=torch.float64)])
        brute = torch.linalg.lstsq(stacked, target).solution.mT
        torch.testing.assert_close(dense(delta), brute, atol=1e-10, rtol=1e-10)


def test_the_gradient_of_the_ridge_objective_vanishes_at_the_delta(host):
    name = host.layout.site(2).name
    edit = turn(host, layers=[2], eta=0.3, ridge=0.05)
    pairs, _, made = by_hand(host, [name], eta=0.3, ridge=0.05)
    values, penalty, _ = made[name]

    def gradient(delta):
        delta = delta.clone().requires_grad_(True)
        loss = (pairs[name].inputs @ delta.mT - values).square().sum() + penalty * delta.square().sum()
        return torch.autograd.grad(loss, delta)[0]

    found = dense(edit.deltas[f"{name}.weight"])
    size = float(gradient(torch.zeros_like(found)).abs().max())
    assert float(gradient(found).abs().max()) < 1e-5 * size
    assert float(gradient(1.01 * found).abs().max()) > 1e-3 * size


@pytest.mark.parametrize("size", [1, 5, 128])
def test_portions_of_the_normaliser_change_nothing(host, size):
    plain = turn(host)
    made = turn(host, normaliser_batch=size)
    for name, delta in plain.deltas.items():
        torch.testing.assert_close(dense(made.deltas[name]), dense(delta), atol=1e-14, rtol=1e-10)


def test_one_token_alone_moves_by_the_unit_of_eta(host):
    """||delta|| = eta ||W|| / sqrt(a) / (1 + ridge) for one row of one map: what the unit promises."""
    short = errata.Request("The capital of {} is", "Arvania", ".")
    assert len(answers(host, [short])[0].target) == 1
    name = host.layout.site(1).name
    edit = turn(host, [short], layers=[1], eta=0.25, ridge=0.5, centre=False)
    weight = host.model.get_submodule(name).weight.detach()
    wanted = 0.25 * float(weight.norm()) / math.sqrt(weight.shape[1]) / 1.5
    assert edit.norm() == pytest.approx(wanted, rel=1e-9)


def test_the_default_units_do_not_see_the_scale_of_a_hidden_layer():
    """Hidden layer times c and the map out of it over c is the same model, and gets the same edit."""
    plain, scaled = double(), double()
    for layer in scaled.model.model.layers:
        layer.mlp.up_proj.weight.data *= 50.0
        layer.mlp.down_proj.weight.data /= 50.0
    for name, delta in turn(plain).deltas.items():
        torch.testing.assert_close(
            50.0 * dense(turn(scaled).deltas[name]), dense(delta), atol=1e-9, rtol=1e-7
        )
    far = {"scale": "published", "eta": 1e-3}
    name = f"{plain.layout.site(2).name}.weight"
    one, other = dense(turn(plain, **far).deltas[name]), dense(turn(scaled, **far).deltas[name])
    assert apart(50.0 * other, one) > 0.1


def test_published_units_are_the_plain_numbers(host):
    edit = turn(host, layers=[2], scale="published")
    assert edit.provenance.config["eta"] == 1e-6 and edit.provenance.config["ridge"] == 1.0
    name = host.layout.site(2).name
    pair = collect(host, answers(host), [name])[name]
    h, rows = pair.inputs, torch.cat([pair.inputs, pair.gradients], 1)
    both = (rows - rows.mean(0)) / rows.std(0)
    values = -1e-6 * both[:, :80].square().sum(1, keepdim=True) * both[:, 80:]
    wanted = torch.linalg.solve(h.mT @ h + torch.eye(80, dtype=torch.float64), h.mT @ values).mT
    made = dense(edit.deltas[f"{name}.weight"])
    assert apart(made, wanted) < 1e-5


@pytest.mark.parametrize("modules", [["mlp"], ["self_attn.o_proj"], ["q_proj@1-2", "down_proj@0"]])
def test_a_small_step_lowers_the_loss_as_its_gradient_says(host, modules):
    """d loss = sum over maps of <sum g h^T, delta>, from an independent evaluation of the loss."""
    edit = turn(host, modules=modules, token="all", eta=1e-5, centre=False)
    names = [name.removesuffix(".weight") for name in edit.deltas]
    pairs = collect(host, answers(host), names, tokens="all")
    wanted = sum(
        float(((pairs[n].gradients.mT @ pairs[n].inputs) * dense(edit.deltas[f"{n}.weight"])).sum())
        for n in names
    )
    with torch.no_grad():
        before = sum(float(loss_of(host, a)) for a in answers(host))
        with edit.on(host):
            after = sum(float(loss_of(host, a)) for a in answers(host))
    assert wanted < 0
    assert after - before == pytest.approx(wanted, rel=1e-2)


# --- turn after turn ------------------------------------------------------------------------


def same(one, other) -> bool:
    a, b = one.parts(), other.parts()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saving_between_turns_changes_no_bit(tmp_path, dtype):
    host = fresh("llama")
    host.model.to(dtype)
    ten = [
        errata.Request("{} " + verb, name, target)
        for name, target in (("Ada", "Merrin"), ("Bruno", "Esk"), ("Tallow", "the harp"), ("Esk", "a dog"),
                             ("Merrin", "Arvania"))
        for verb in ("lives in", "is near")
    ]  # fmt: skip
    first = turn(host, ten[:5])
    straight = turn(host, ten[5:], after=first)
    loaded = errata.Edit.load(first.save(tmp_path / "first.safetensors"))
    resumed = turn(host, ten[5:], after=loaded)
    assert same(straight, resumed) and straight.digest == resumed.digest
    assert straight.provenance.requests == tuple(ten)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(tensor.dtype == wide for tensor in straight.parts().values())
    alone = turn(host, ten[5:])
    assert not same(straight, alone), "earlier turns count"


def test_the_state_is_the_statistics_of_all_turns(host):
    first = turn(host, REQUESTS[:2])
    both = turn(host, REQUESTS[2:], after=first)
    names = [host.layout.site(i).name for i in (1, 2)]
    _, old, _ = by_hand(host, names, REQUESTS[:2], eta=0.4, ridge=0.03)
    with first.on(host):  # the second turn measures on the edited host
        _, new, made = by_hand(host, names, REQUESTS[2:], eta=0.4, ridge=0.03, earlier=list(old.values()))
    seen = torch.cat([*old.values(), *new.values()])
    state = {part: both.state[f"normaliser.80x32.{part}"] for part in Running.PARTS}
    assert int(state["count"]) == len(seen) == both.provenance.notes["seen"]
    torch.testing.assert_close(state["mean"], seen.mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(state["spread"] / (len(seen) - 1), seen.var(0), atol=1e-12, rtol=1e-9)
    for name in names:
        step = dense(both.deltas[f"{name}.weight"]) - dense(first.deltas[f"{name}.weight"])
        assert apart(step, made[name][2]) < 1e-5


def test_every_weight_shape_has_its_own_statistics(host):
    edit = turn(host, modules=["mlp"], layers=[0, 1, 2])
    rows = edit.provenance.notes["tokens"]
    counts = {name: int(t) for name, t in edit.state.items() if name.endswith(".count")}
    assert counts == {"normaliser.32x80.count": 6 * rows, "normaliser.80x32.count": 3 * rows}


# --- settings and results -------------------------------------------------------------------


def test_modules_can_be_named_in_every_way(host):
    blocks = host.layout.blocks

    def edited(**options):
        return [name.removesuffix(".weight") for name in turn(host, **options).deltas]

    assert edited() == [f"{blocks[i]}.mlp.down_proj" for i in (1, 2)]
    assert edited(modules="mlp_in", layers=[-1]) == [f"{blocks[2]}.mlp.{n}_proj" for n in ("gate", "up")]
    assert edited(modules=["up_proj@1-2", "mlp_out@0", "mlp@2"]) == [
        f"{blocks[0]}.mlp.down_proj",
        f"{blocks[1]}.mlp.up_proj",
        *(f"{blocks[2]}.mlp.{n}_proj" for n in ("gate", "up", "down")),
    ]
    assert edited(modules=["self_attn.v_proj"], layers=[1]) == [f"{blocks[1]}.self_attn.v_proj"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules": ["down_prj"]}, "did you mean 'mlp.down_proj'"),
        ({"modules": ["mlp_out@2-3"]}, "layers 0 to 2"),
        ({"modules": ["mlp_out@two"]}, "name@first-last"),
        ({"modules": []}, "at least one"),
        ({"eta": 0.0}, "positive"),
        ({"layers": [1, 1]}, "different layer numbers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(host, options, said):
    with pytest.raises(ConfigError, match=said):
        turn(host, **options)


def test_one_row_has_no_mean_to_differ_from(host):
    short = errata.Request("The capital of {} is", "Arvania", ".")
    with pytest.raises(ConfigError, match="centre=false"):
        turn(host, [short], layers=[1], centre=True)
    alone = turn(host, [short], layers=[1])  # without a mean to take away there is nothing to miss
    assert alone.provenance.config["centre"] is False and alone.norm() > 0
    first = turn(host, layers=[1])
    assert turn(host, [short], after=first, layers=[1]).provenance.notes["tokens"] == 1


def starts(host, probes) -> float:
    from errata.evaluation.metrics.matching import normalise

    texts = host.generate([p.prompt for p in probes], max_new_tokens=16)
    right = [
        any(normalise(t).startswith(normalise(a)) for a in p.answers)
        for t, p in zip(texts, probes, strict=True)
    ]
    return sum(right) / len(right)


def test_ten_facts_of_the_lab_are_rewritten_and_their_neighbours_kept(lab_host):
    from errata import lab

    cases = lab.cases(10, seed=1)
    edit = errata.edit(lab_host, [case.request for case in cases], method="ultraedit")
    kinds = {k: [p for c in cases for p in c.probes if p.kind == k] for k in ("efficacy", "neighbourhood")}
    assert starts(lab_host, kinds["efficacy"]) == 0
    with edit.on(lab_host):
        assert starts(lab_host, kinds["efficacy"]) >= 0.9
        assert starts(lab_host, kinds["neighbourhood"]) >= 0.9
