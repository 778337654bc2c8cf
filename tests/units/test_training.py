"""The loop that trains changes beside frozen weights: layout, stop, batches, constraints, randomness."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.prefix import ComputedRows, split_rows
from errata.training.gradients import sum_gradients
from errata.training.tune import (
    Losses,
    Stop,
    beside,
    clip_,
    descend,
    lay_out,
    rms,
    seeded,
    with_weights,
)
from tests.models import fresh

LONG = errata.Request("{} was born in", "Ada Brenner", "Marmelundsen on the old road")
SHORT = errata.Request("The capital of {} is", "Arvania", "Esk")
FAMILIES = ("llama", "gpt2", "gemma2", "bloom", "gptj")


@pytest.fixture(scope="module")
def host():
    made = fresh("llama")
    made.model.double()
    return made


def least_squares(goals: list[float]):
    """Items that each want one number to be theirs; returns the number, its optimiser, and the losses."""
    point = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor(goals, dtype=torch.float64)
    return point, torch.optim.SGD([point], lr=0.1), lambda chosen: (point - wanted[list(chosen)]).square()


def test_each_target_token_is_predicted_by_the_one_before_it(host):
    answer = host.encode_answer(LONG.text, LONG.target)
    assert len(answer.target) > 3
    line = lay_out(host, LONG, "target")
    assert line.ids == answer.ids[:-1] and line.targets == answer.target
    assert [answer.ids[at + 1] for at in line.at] == list(answer.target)
    last = lay_out(host, LONG, "prompt_last")
    assert last.ids == answer.ids[: answer.start] and set(last.at) == {answer.start - 1}
    assert last.targets == answer.target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_kept_blocks_change_no_loss_and_padding_no_side(family, depth):
    host = fresh(family)
    host.model.double()
    requests = [LONG, SHORT]
    with hooks.frozen(host.model), torch.no_grad():
        plain = torch.cat([Losses(host, [request], "target")([0]) for request in requests])
        # Gemma takes its softmax in float32; Gemma and BLOOM give no numbers behind padding in float64
        bound = 1e-6 if family == "gemma2" else 1e-10
        for side in ("right",) if family in ("gemma2", "bloom") else ("right", "left"):
            losses = Losses(host, requests, "target", depth=depth, side=side)
            torch.testing.assert_close(losses([0, 1]), plain, atol=bound, rtol=0)
            torch.testing.assert_close(losses([1, 0]), plain.flip(0), atol=bound, rtol=0)
    assert not any("forward" in module.__dict__ for module in host.model.modules())


def test_kept_blocks_do_not_run_again(host):
    calls = []
    with hooks.frozen(host.model):
        computed = ComputedRows(host, [(0, 5, 6), (0, 7)], 2)
        batch, prefix = computed.select([1, 0])
        below = host.model.get_submodule(host.layout.blocks[1] + ".mlp")
        above = host.model.get_submodule(host.layout.blocks[2] + ".mlp")
        with (
            hooks.on_output(below, lambda _: calls.append("below")),
            hooks.on_output(above, lambda _: calls.append("above")),
        ):
            computed.runner.run(batch, prefix)
    assert calls == ["above"]


def test_states_are_cut_to_a_rows_own_tokens(host):
    rows = [(0, 5, 6), (0, 7)]
    for side in ("left", "right"):
        batch = host.batch(rows, side=side)
        own = split_rows(batch.ids[..., None].double(), [3, 2], batch)
        assert [state[:, 0].long().tolist() for state in own] == [list(row) for row in rows]


def test_a_mean_hides_the_unfinished_and_each_does_not():
    losses = torch.tensor([0.0, 0.019])
    assert Stop(0.01, "mean").reached(losses) and not Stop(0.01, "each").reached(losses)
    assert not Stop(None).reached(torch.zeros(2))


def test_descent_is_gradient_descent_on_the_mean():
    point, optimizer, losses = least_squares([1.0, 3.0])
    outcome = descend(optimizer, losses, 2, steps=1, stop=Stop(None))
    assert point.item() == pytest.approx(0.1 * 4.0)  # minus rate times the mean of 2 (0 - goal)
    assert outcome.start.tolist() == [1.0, 9.0] and outcome.steps == 1
    assert outcome.losses.tolist() == pytest.approx([0.36, 6.76])
    assert point.grad is None


def test_rows_run_at_once_change_nothing_and_steps_per_request_do():
    found = {}
    for name, options in {"all": {}, "by one": {"rows": 1}, "steps": {"per_step": 1}}.items():
        point, optimizer, losses = least_squares([1.0, 3.0, 8.0])
        taken: list[int] = []
        descend(optimizer, losses, 3, steps=2, stop=Stop(None), after_step=taken.append, **options)
        found[name] = point.item(), taken[-1]
    assert found["all"] == pytest.approx(found["by one"])
    assert found["all"][1] == 2 and found["steps"][1] == 6
    value = 0.0
    for goal in [1.0, 3.0, 8.0] * 2:
        value -= 0.1 * 2 * (value - goal)
    assert found["steps"][0] == pytest.approx(value)


def test_a_descent_stops_before_a_step_that_is_not_needed():
    point, optimizer, losses = least_squares([0.0, 0.05])
    outcome = descend(optimizer, losses, 2, steps=5, stop=Stop(0.01))
    assert outcome.steps == 0 and point.item() == 0.0
    # with a step per request, the last pass is one in which every request is looked at and none moves
    point, optimizer, losses = least_squares([1.0, 1.05])
    outcome = descend(optimizer, losses, 2, steps=100, stop=Stop(0.01), per_step=1)
    assert outcome.steps < 100
    assert outcome.losses.tolist() == losses([0, 1]).tolist() and outcome.losses.max() < 0.01


def test_a_descent_that_leaves_the_numbers_is_refused():
    point, _, losses = least_squares([1.0])
    with pytest.raises(ConfigError, match=r"after \d+ steps; lower the learning rate"):
        descend(torch.optim.SGD([point], lr=1e200), losses, 1, steps=9, stop=Stop(None))


def test_a_parameter_no_item_reaches_is_left_alone():
    point, other = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([point, other], lr=0.1, weight_decay=0.5)
    descend(optimizer, lambda chosen: point.square(), 1, steps=3, stop=Stop(None))
    assert other.item() == 1.0 and point.item() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_box_is_kept_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    for bound in (0.1, 1 / 3, 1e-7, 0.2 * 0.1371):
        change = torch.randn(50, 20, generator=generator).to(dtype)
        inside = change.abs() < bound * (1 - 1e-6)
        kept = change.clone()
        clip_(change, bound, "inf")
        assert float(change.abs().max()) <= bound  # compared in float64
        assert float(change.abs().max()) > bound * (1 - 1e-6)
        assert torch.equal(change[inside], kept[inside])


def test_the_ball_is_kept_and_the_direction_too():
    change = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = change.clone()
    clip_(change, 0.5, "2")
    assert float(change.norm()) == pytest.approx(0.5)
    torch.testing.assert_close(change / change.norm(), kept / kept.norm())
    clip_(change, 9.0, "2")
    assert float(change.norm()) == pytest.approx(0.5)
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_equals_a_changed_weight(family):
    host = fresh(family)
    host.model.double()
    site = host.layout.site(1)
    change = 0.1 * torch.randn(
        site.d_out, site.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight = host.model.get_parameter(site.parameter)
    batch = host.batch([host.encode(LONG.text).ids])
    held = host.weights_hash()
    with torch.no_grad():
        changed = weight + (change.mT if site.transposed else change)
        with beside(host, {site: change}):
            one = host.forward(batch)
        two = with_weights(host, {site.parameter: changed}, lambda: host.forward(batch))
        before = host.forward(batch)
    torch.testing.assert_close(one, two, atol=1e-10, rtol=0)
    assert not torch.allclose(one, before, atol=1e-4)
    assert host.weights_hash() == held and host.model.get_parameter(site.parameter) is weight


def test_weights_are_back_after_an_error(host):
    name = host.layout.site(0).parameter
    weight = host.model.get_parameter(name)

    def fail() -> None:
        assert host.model.get_parameter(name) is not weight
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        with_weights(host, {name: torch.nn.Parameter(torch.zeros_like(weight))}, fail)
    assert host.model.get_parameter(name) is weight


def test_seeded_draws_repeat_and_leave_the_global_state(host):
    state, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with seeded(host, seed):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_summed_over_batches_are_those_of_the_whole():
    """Also where a batch runs out of memory after its loss was computed: no part of it is counted twice."""
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sizes = []

    def loss_of(part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError
        losses = (inputs[list(part)] @ weights[0]).square() + inputs[list(part)] @ weights[1]
        return losses.sum(), losses.tolist()

    values, gradients = sum_gradients(range(5), weights, loss_of, batch=4)
    whole = (inputs @ weights[0]).square() + inputs @ weights[1]
    assert sizes == [4, 2, 2, 1] and values == pytest.approx(whole.tolist(), rel=1e-12)
    for found, expected in zip(gradients, torch.autograd.grad(whole.sum(), weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
