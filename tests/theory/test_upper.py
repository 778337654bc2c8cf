"""Running only what a change can influence: the same logits, losses and trained values as with the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import errata
from errata.host import hooks
from errata.methods import t_patcher
from errata.training.rows import RowAdam, RowPlateau, clip_rows, descend_each
from errata.training.slots import Slots, inputs_of, last_activations
from errata.training.tune import Losses, Stop, descend, lay_out
from errata.training.upper import UpperRows, rows_at_once
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin and Tallow"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
    errata.Request("{} plays the", "Bruno", "harp or the cello"),
    errata.Request("{}", "Esk", "is old"),
]
DIRECT = ("gpt2", "llama", "qwen3", "gptj", "opt", "bloom", "falcon", "mistral")


def wide_host(family):
    host = fresh(family)
    host.model.double()
    return host


def lines_of(host):
    return [lay_out(host, request, "target") for request in REQUESTS]


def change_of(host, lines, whole, width):
    """A change that depends on the module's input, on the row and on the token."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(lines), width, generator=generator).double()

    def change(index):
        def act(inputs, output, distance):
            share = inputs.abs().mean(-1, keepdim=True) + 0.1 * distance[..., None]
            acting = distance >= (-99 if whole else 0)
            return torch.where(acting[..., None], output + share * values[index][:, None], output)

        return act

    return change


def whole_logits(host, module, lines, index, change):
    """Each row by itself through the whole model, with a hook at the module."""
    found, layer = [], host.model.get_submodule(module)
    for i in index:
        inputs, line = [], lines[i]
        distance = (torch.arange(len(line.ids)) - line.at[0])[None]

        def act(output, i=i, inputs=inputs, distance=distance):
            shape = (1, distance.shape[1], -1)
            new = change([i])(inputs.pop().reshape(shape), output.reshape(shape), distance)
            return new.reshape(output.shape)

        with hooks.on_input(layer, inputs.append), hooks.on_output(layer, act):
            found.append(host.forward(host.batch([line.ids]))[0, list(line.at)])
    return torch.cat(found)


@pytest.mark.parametrize("family", [*DIRECT, "gemma2", "olmo2"])
@pytest.mark.parametrize("whole", [False, True])
def test_upper_blocks_give_the_logits_of_the_whole_model(family, whole):
    host = wide_host(family)
    lines = lines_of(host)
    # Gemma's norms compute in float32 inside a float64 model: there, sums in another order are a rounding step apart
    bound = 1e-6 if family == "gemma2" else 1e-8
    with hooks.frozen(host.model), torch.no_grad():
        for layer in range(3):
            site = host.layout.site(layer)
            rows = UpperRows(host, lines, site.name, layer, whole=whole)
            assert rows.start == ("stream" if family in DIRECT else "block")
            assert rows.reuse
            change = change_of(host, lines, whole, site.d_out)
            for index in ([0, 1, 2, 3], [2], [3, 1], [0, 1, 2, 3]):
                logits = rows.logits(index, change(index))
                expected = whole_logits(host, site.name, lines, index, change)
                torch.testing.assert_close(logits, expected, atol=bound, rtol=0)


def test_losses_and_correctness_are_those_of_the_plain_way():
    host = wide_host("llama")
    lines = lines_of(host)
    with hooks.frozen(host.model), torch.no_grad():
        rows = UpperRows(host, lines, host.layout.site(1).name, 1, whole=False)
        logits = rows.logits([2, 0], lambda _, output, __: output)
        torch.testing.assert_close(rows.losses([2, 0], logits), Losses(host, REQUESTS)([2, 0]))
        assert not rows.correct([2, 0], logits).any()
        row, _ = rows._places([2, 0])
        first = torch.tensor([row.tolist().index(r) for r in (0, 1)])
        targets = torch.tensor([*lines[2].targets, *lines[0].targets])
        right = torch.zeros_like(logits).scatter(1, targets[:, None], 1.0)
        assert rows.correct([2, 0], right).tolist() == [True, True]
        right[first[1]] = 0.0
        right[first[1], (targets[first[1]] + 1) % 400] = 1.0
        assert rows.correct([2, 0], right).tolist() == [True, False]


class Bypass(nn.Module):
    """A final norm to which the first block's output is added, past all other blocks."""

    def __init__(self, norm, block):
        super().__init__()
        self.norm = norm
        self.first = None
        block.register_forward_hook(self.keep)

    def keep(self, _, __, output):
        self.first = hooks.first_tensor(output)

    def forward(self, hidden):
        return self.norm(hidden + self.first)


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_cannot_be_run_in_parts_is_run_whole(whole):
    host = wide_host("llama")
    host.model.model.norm = Bypass(host.model.model.norm, host.model.model.layers[0])
    lines = lines_of(host)
    with hooks.frozen(host.model), torch.no_grad():
        site = host.layout.site(2)
        rows = UpperRows(host, lines, site.name, 2, whole=whole)
        assert rows.start == "model"
        change = change_of(host, lines, whole, site.d_out)
        logits = rows.logits([3, 0], change([3, 0]))
        expected = whole_logits(host, site.name, lines, [3, 0], change)
        torch.testing.assert_close(logits, expected, atol=1e-8, rtol=0)


def test_without_a_cache_rows_are_run_from_their_first_token(monkeypatch):
    monkeypatch.setattr("errata.training.upper.can_reuse", lambda *_: False)
    host = wide_host("llama")
    lines = lines_of(host)
    with hooks.frozen(host.model), torch.no_grad():
        site = host.layout.site(1)
        rows = UpperRows(host, lines, site.name, 1, whole=False)
        assert rows.start == "stream" and not rows.reuse
        change = change_of(host, lines, False, site.d_out)
        expected = whole_logits(host, site.name, lines, [1, 2], change)
        torch.testing.assert_close(rows.logits([1, 2], change([1, 2])), expected, atol=1e-8, rtol=0)


def test_while_a_memory_is_in_place_the_whole_model_is_run():
    host = fresh("llama")
    other = errata.edit(host, REQUESTS[1], method="grace", layer=0, steps=2, radius=1e-3)
    with hooks.frozen(host.model), other.on(host):
        rows = UpperRows(host, lines_of(host), host.layout.site(1).name, 1, whole=False)
        assert rows.start == "model"


def test_rows_at_once_fall_with_their_length_and_are_at_least_one():
    host = fresh("llama")
    assert rows_at_once(host, 1, 8) > rows_at_once(host, 1, 64) > 1
    assert rows_at_once(host, 1, 10**9) == 1


def test_activations_at_ends_are_those_of_every_token():
    host = fresh("gpt2")
    name, rows = host.layout.site(1).name, [(0, 5, 6, 9), (0, 7), (3, 4, 5)]
    inputs, outputs = last_activations(host, name, rows)
    torch.testing.assert_close(inputs, inputs_of(host, name, rows)[[3, 5, 8]])
    weight, bias = host.model.get_submodule(name).weight, host.model.get_submodule(name).bias
    torch.testing.assert_close(outputs, (inputs @ weight + bias).detach(), atol=1e-6, rtol=1e-5)


# --- items that are trained at once ----------------------------------------------------------


def bowls(count, width):
    """Items whose losses are quartic bowls around places of their own."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(count, width, generator=generator).double()
    scale = torch.logspace(-1, 1, count).double()[:, None]

    def losses(values, index):
        gap = values - centres[list(index)]
        return (scale[list(index)] * gap.square() + 0.1 * gap**4).sum(1)

    return losses


@pytest.mark.parametrize("stop", [None, 0.5])
def test_a_batch_of_items_ends_as_each_alone_does(stop):
    losses = bowls(5, 3)
    values = nn.Parameter(torch.zeros(5, 3).double())
    final = descend_each(
        values, lambda index: losses(values[list(index)], index), steps=60, rate=0.1, stop=Stop(stop)
    )
    for i in range(5):
        own = nn.Parameter(torch.zeros(1, 3).double())
        outcome = descend(
            torch.optim.Adam([own], lr=0.1),
            lambda _, own=own, i=i: losses(own, [i]),
            1,
            steps=60,
            stop=Stop(stop),
        )
        torch.testing.assert_close(values[i].detach(), own[0].detach(), atol=1e-12, rtol=1e-12)
        assert float(final[i]) == pytest.approx(float(outcome.losses[0]), rel=1e-12)
    assert stop is None or float(final.max()) < stop


def test_a_loss_that_is_not_finite_is_refused():
    values = nn.Parameter(torch.zeros(2, 1))
    with pytest.raises(errata.errors.ConfigError, match="lower the learning rate"):
        descend_each(values, lambda _: values[:, 0] / 0, steps=2, rate=1.0, stop=Stop(None))


def test_rates_penalty_and_clipping_are_each_rows_own():
    generator = torch.Generator().manual_seed(2)
    starts = [
        torch.randn(3, 2, generator=generator).double(),
        torch.randn(3, 2, 4, generator=generator).double(),
    ]
    rows = [nn.Parameter(start.clone()) for start in starts]
    alone = [[nn.Parameter(start[i : i + 1].clone()) for start in starts] for i in range(3)]
    rates = [0.1, 0.01, 0.0]
    adam = RowAdam(rows, 1.0, weight_decay=0.3)
    adam.rates = torch.tensor(rates, dtype=torch.float64)
    plain = [torch.optim.Adam(own, lr=rate, weight_decay=0.3) for own, rate in zip(alone, rates, strict=True)]
    for _ in range(12):
        gradients = [10 * torch.randn(*row.shape, generator=generator).double() for row in rows]
        adam.step_(clip_rows(gradients, 5.0))
        for i, (own, optimizer) in enumerate(zip(alone, plain, strict=True)):
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient[i : i + 1].clone()
            nn.utils.clip_grad_norm_(own, 5.0)
            optimizer.step()
    for number, row in enumerate(rows):
        together = torch.cat([own[number] for own in alone])
        torch.testing.assert_close(row.detach(), together.detach(), atol=1e-10, rtol=1e-10)


def test_a_plateau_halves_rates_as_torch_does():
    generator = torch.Generator().manual_seed(3)
    plateau, rates = RowPlateau(4), torch.ones(4).double()
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(4)]
    plain = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(one, factor=0.5, patience=1, threshold=0.05)
        for one in optimizers
    ]
    for step in range(30):
        items = torch.arange(4) if step < 20 else torch.tensor([0, 2])
        losses = torch.rand(len(items), generator=generator) / (1 + step / 5)
        rates[items] *= plateau.factors(items, losses)
        for item, loss in zip(items.tolist(), losses.tolist(), strict=True):
            plain[item].step(loss)
    assert rates.tolist() == [one.param_groups[0]["lr"] for one in optimizers]
    assert float(rates.min()) < 1


# --- methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_grace_trains_a_batch_to_the_values_of_single_fits(family, positions):
    host = fresh(family)
    settings = {
        "method": "grace", "layer": 1, "radius": 1e-4, "steps": 12, "start": "warm", "learning_rate": 0.1,
        "positions": positions, "stop_loss": 4.0,
    }  # fmt: skip
    edit = errata.edit(host, REQUESTS, **settings)
    singles = [errata.edit(host, request, **settings) for request in REQUESTS]
    values = edit.interventions[0].payload["values"]
    alone = torch.cat([one.interventions[0].payload["values"] for one in singles])
    torch.testing.assert_close(values, alone, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(
        edit.router.keys, torch.cat([one.router.keys for one in singles]), atol=1e-5, rtol=1e-5
    )


def test_requests_of_one_entry_go_on_from_each_others_value():
    """As in a sequence of fits: the second request of an entry starts from what the first has trained."""
    host = fresh("llama")
    requests = [REQUESTS[0], REQUESTS[1], REQUESTS[0]]
    settings = {
        "method": "grace",
        "layer": 1,
        "radius": 1e-4,
        "steps": 8,
        "start": "warm",
        "learning_rate": 0.1,
    }
    edit = errata.edit(host, requests, **settings)
    assert [entry["action"] for entry in edit.log] == ["add", "add", "expand"]
    sequence = None
    for request in requests:
        sequence = errata.edit(host, request, after=sequence, **settings)
    torch.testing.assert_close(edit.parts()["0.values"], sequence.parts()["0.values"], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patches_of_a_batch_are_those_of_each_request_alone(family):
    host = fresh(family)
    layer, config = 2, t_patcher.Config(steps=30, least_steps=10, check_every=5, memory=64, top=(5, 20))
    module, lines = host.layout.feed_forward(layer), lines_of(host)
    lines = [line for line in lines if len(line.at) == len(lines[0].at)]
    lines = lines if len(lines) > 1 else [lines[0]] * 2
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(40, 32, generator=generator)
    starts = [torch.randn(min(5, len(line.at)), 32, generator=generator) for line in lines]
    own = torch.zeros(len(lines), 40, dtype=torch.bool)
    own[0, 3] = own[1, 7] = True
    earlier = Slots(*(torch.randn(*s, generator=generator) for s in ((3, 32), (3,), (3, 32))))

    def train(numbers):
        chosen = [lines[i] for i in numbers]
        rows = UpperRows(host, chosen, module, layer, whole=True)
        queries = [inputs_of(host, module, [line.ids])[list(line.at[:5])] for line in chosen]
        batch = t_patcher._Batch(rows, queries, earlier, memory, own[numbers], config)
        return batch.run([starts[i] for i in numbers])

    with hooks.frozen(host.model):
        together = train([0, 1])
        alone = [train([0])[0], train([1])[0]]
    for one, other in zip(together, alone, strict=True):
        for name in ("keys", "biases", "values"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-3, rtol=1e-3)


def test_a_request_trained_together_with_none_is_that_of_a_plain_fit():
    host = fresh("llama")
    settings = {"method": "t_patcher", "steps": 20, "memory": 64}
    one = errata.edit(host, REQUESTS[0], **settings)
    other = errata.edit(host, REQUESTS[0], together=True, **settings)
    for name, tensor in one.parts().items():
        torch.testing.assert_close(tensor, other.parts()[name])


def test_patches_trained_together_answer_every_request():
    host = fresh("llama")
    edit = errata.edit(host, REQUESTS[:3], method="t_patcher", together=True, steps=300, memory=64)
    assert edit.state["owners"].tolist() == sorted(edit.state["owners"].tolist())
    assert set(edit.state["owners"].tolist()) == {0, 1, 2}
    lines = lines_of(host)[:3]
    with edit.on(host), torch.no_grad():
        for line in lines:
            logits = host.forward(host.batch([line.ids]))[0, list(line.at)]
            assert logits.argmax(-1).tolist() == list(line.targets)
