"""MALMEN: its regression in both forms, and the gradient that its training takes in two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata.linalg.gram import solve_gram
from errata.methods import _ridge as regression
from errata.methods._hypernetwork import Editor
from errata.training.editing import Item, Sample, apart, items_apart, items_of, line_of, losses_of
from errata.training.examples import examples_of
from errata.training.factors import Change, Factors, beside, capture
from errata.training.gradients import sum_gradients
from errata.training.hypernetwork import Damping, NetworkShape
from tests.models import fresh
from tests.theory.test_mend import EXAMPLES, QUICK


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [3, 7, 20])
def test_both_gram_matrices_give_the_regression(count):
    """S = (U^T U + r I)^-1 U^T D as U^T C, for fewer and more rows than their width."""
    u, d, ridge = rows(count, 7), rows(count, 4, 1), 0.3
    expected = torch.linalg.solve(u.mT @ u + ridge * torch.eye(7, dtype=u.dtype), u.mT @ d)
    torch.testing.assert_close(u.mT @ solve_gram(u, d, ridge), expected, atol=1e-10, rtol=1e-8)
    with pytest.raises(ValueError, match="finite"):
        solve_gram(u * float("nan"), d, ridge)


def editor_and_factors(
    count: int = 5, width: int = 6, out: int = 4, damped: int = 0
) -> tuple[Editor, dict[str, Factors]]:
    """Return an editor away from its start, in float64, and factors of two maps of one shape."""
    torch.manual_seed(0)
    factors = {
        name: Factors(rows(count, width, i), rows(count, out, i + 5), torch.arange(count))
        for i, name in enumerate(("one", "two"))
    }
    shapes = {n: f.shape for n, f in factors.items()}
    editor = Editor(shapes, NetworkShape(3, 2, "outside"), regression.LOGS, 0, damped).double()
    for i, damping in enumerate(editor.damping):
        damping.set_moments_(moments(width, i), 0.2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return editor, factors


def moments(width: int, seed: int) -> torch.Tensor:
    inputs = rows(50, width, seed + 20) * torch.linspace(0.1, 3, width, dtype=torch.float64) + 1
    return inputs.mT @ inputs / len(inputs)


def metric(width: int, damped: int, seed: int) -> torch.Tensor:
    """I + V^T (s / e) V of the directions V with the largest moments s, e a fifth of the mean of all."""
    matrix = moments(width, seed)
    values, vectors = torch.linalg.eigh(matrix)
    chosen = vectors[:, width - damped :]
    return (
        torch.eye(width, dtype=torch.float64)
        + chosen @ torch.diag(values[width - damped :] / (0.2 * matrix.trace() / width)) @ chosen.mT
    )


def through_everything(editor: Editor, factors: dict[str, Factors], loss) -> torch.Tensor:
    """The loss as one graph, with weights as the paper writes them, S = (U^T U + l I)^-1 U^T D; I or the metric."""
    weights = []
    for i, (name, one) in enumerate(factors.items()):
        gram = one.keys.mT @ one.keys
        gram = gram + editor.positive("ridge", name) * metric(len(gram), editor.damped, i)
        weights.append(torch.linalg.solve(gram, one.keys.mT @ regression.values_of(editor, name, one)))
    return loss(weights)


@pytest.mark.parametrize(("count", "damped"), [(4, 0), (9, 0), (4, 2), (9, 6)])
def test_two_stages_give_the_gradient_through_everything(count, damped):
    """Of every parameter: the network's, steps and ridges; and of the paper's weights, by finite differences."""
    editor, factors = editor_and_factors(count, damped=damped)
    asked = rows(8, 6, 9)

    def loss(weights: list[torch.Tensor]) -> torch.Tensor:
        return sum(
            ((asked @ w + 1).square() * (i + 1)).sum() + (asked @ w).sin().sum()
            for i, w in enumerate(weights)
        )

    expected = torch.autograd.grad(through_everything(editor, factors, loss), list(editor.parameters()))
    solved = regression.solve(editor, factors)
    # never as a matrix: U^T C, of which C is differentiated
    whole = loss([c.inner.mT @ c.outer for c in solved.changes.values()])
    gradients = torch.autograd.grad(whole, list(solved.coefficients))
    found = regression.differentiate(editor, factors, solved, gradients)
    for (name, parameter), mine, theirs in zip(editor.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(
            mine, theirs, atol=1e-7, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        if name.startswith("logs"):
            for i in range(2):
                with torch.no_grad():
                    sides = []
                    for step in (1e-5, -2e-5):
                        parameter[i] += step
                        sides.append(float(through_everything(editor, factors, loss)))
                    parameter[i] += 1e-5
                assert float(mine[i]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


def test_damping_takes_what_inputs_have_in_common_out_of_a_change():
    """One edit at a key with a large common part: it acts less at other inputs, and as before at the key."""
    common = torch.zeros(6, dtype=torch.float64)
    common[0] = 5
    key, others = rows(1, 6) + common, rows(40, 6, 1) + common
    damping = Damping(6, 2).double()
    left = damping.set_moments_(others.mT @ others / 40, 0.03)
    assert left == pytest.approx(float(damping(others).square().sum() / others.square().sum()), rel=1e-9)
    assert left < 0.2
    spill = []
    for inner in (key, damping(damping(key))):
        change = inner / (inner @ key.mT)
        spill.append(float((others @ change.mT).square().mean()))
    assert spill[1] < 0.3 * spill[0]
    assert torch.equal(Damping(6, 3)(key.float()), key.float())  # until moments are set


def test_prompts_that_another_edit_may_change_are_not_out_of_scope():
    host = fresh("llama")
    first, second = items_of(host, examples_of(EXAMPLES[:2]), {})
    assert first.request.subject != second.request.subject
    strange = [
        line_of(host, text, "Esk") for text in (second.request.text, f"About {second.request.subject} I know")
    ]
    fine = line_of(host, "The sky is", "blue")
    items = [replace(first, outside=(*strange, fine)), second]
    kept, other = items_apart(host, items)
    assert kept.outside == (fine,) and other.outside == second.outside
    samples = [
        Sample(items[0], first.inside, (fine, strange[0], fine, strange[1]), 2),
        Sample(second, second.inside, (), 0),
    ]
    assert [(one.outside, one.others) for one in apart(host, samples)] == [((fine, fine), 1), ((), 0)]
    assert items_apart(host, items[:1]) == items[:1]  # alone, nothing else is edited


def test_the_gradient_of_a_model_s_loss_reaches_the_coefficients():
    """As the gradient with respect to a weight S of its own would, U times it."""
    host = fresh("llama")
    host.model.double()
    items = items_of(host, examples_of(EXAMPLES[:3]), {})
    (name,) = [site.name for site in host.layout.mlp_out][1:2]
    factors = capture(host, [item.answer for item in items], [name], tokens="answer", rows=3)
    one = factors[name]
    editor = Editor({name: one.shape}, NetworkShape(4, 2, "outside"), regression.LOGS, 0).double()
    solved = regression.solve(editor, factors)

    def loss_of(numbers) -> tuple[torch.Tensor, list[None]]:
        inside = [items[i].inside for i in numbers]
        parts = losses_of(
            host, inside, [items[i].outside for i in numbers], solved.changes, [0] * len(numbers)
        )
        return (parts.edit + parts.locality).sum(), [None] * len(numbers)

    _, (found,) = sum_gradients(range(3), solved.coefficients, loss_of, batch=2)
    weight = host.model.get_submodule(name).weight
    with torch.no_grad():
        before = weight.clone()
        weight += solved.changes[name].outer.mT @ solved.changes[name].inner
    gradient = torch.zeros_like(weight)  # [d_out, d_in]
    for item in items:
        gradient += torch.autograd.grad(_losses_in_place(host, item, weight, before), [weight])[0]
    torch.testing.assert_close(found, one.keys @ gradient.mT, atol=1e-7, rtol=1e-6)
    with torch.no_grad():
        weight.copy_(before)


def _losses_in_place(host, item: Item, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The losses of one item on a model whose weight is changed already; the divergence from that without."""
    changed = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before)
        unedited = _answers(host, item.outside)
        weight.copy_(changed)
    own = _answers(host, item.inside)
    nll = [
        -line[range(len(one.targets)), list(one.targets)].mean()
        for line, one in zip(own, item.inside, strict=True)
    ]
    edited = _answers(host, item.outside)
    kl = [
        (before_.exp() * (before_ - after)).sum(-1).mean()
        for before_, after in zip(unedited, edited, strict=True)
    ]
    return sum(nll) / len(nll) + sum(kl) / len(kl)


def _answers(host, lines) -> list[torch.Tensor]:
    found = []
    for line in lines:
        at = torch.tensor(line.at)
        logits = host.forward_at(host.batch([line.ids]), torch.zeros_like(at), at)
        found.append(logits.log_softmax(-1))
    return found


def test_all_facts_are_one_edit_that_export_and_undo_see_as_factors():
    """Its rank is at most the number of answer tokens, and what acts beside is what the edit places."""
    host = fresh("gpt2")
    requests = [case.request for case in EXAMPLES[:3]]
    edit = errata.edit(host, requests, method="malmen", examples=EXAMPLES, **QUICK)
    tokens = sum(len(host.encode_answer(r.text, r.target).target) for r in requests)
    assert all(1 <= delta.rank <= tokens for delta in edit.deltas.values())
    start, before = host.weights_hash(), host.forward(host.batch([host.encode_prompt(requests[0].text)]))
    answers = [host.encode_answer(r.text, r.target) for r in requests]
    with torch.no_grad(), edit.on(host):
        placed = host.forward(host.batch([answers[0].ids]))
    changes = {
        name.removesuffix(".weight"): Change(delta.B.mT, delta.A, torch.zeros(delta.rank, dtype=torch.long))
        for name, delta in edit.deltas.items()
    }
    with torch.no_grad(), beside(host, changes, (0,)):
        found = host.forward(host.batch([answers[0].ids]))
    torch.testing.assert_close(found, placed, atol=1e-5, rtol=1e-4)
    assert host.weights_hash() == start and not torch.allclose(
        placed[:, : before.shape[1]], before, atol=1e-4
    )
