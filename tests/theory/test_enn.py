"""ENN: its steps are gradient descent, they are differentiated, and each edit holds the change that it begins with."""

from __future__ import annotations

import json

import pytest
import torch

import errata
from errata.edits.deltas import dense
from errata.edits.edit import Provenance
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.methods import _hypernetwork as hypernetwork
from errata.training.editable import Descent, Editable, descend, twice_differentiable
from errata.training.editing import losses_of
from errata.training.factors import capture
from errata.training.loop import TrainingFiles
from tests.models import fresh
from tests.theory.test_mend import ADA, EXAMPLES

SHORT = {"steps": 4, "every": 2, "per_step": 2, "rank": 4, "held_out": 0.3}
ONE = Descent(1, 1e9, False, "all")


def rows_of(host, count: int):
    return [host.encode_answer(case.request.text, case.request.target) for case in EXAMPLES[:count]]


def editor_of(host, *, steps: float = 0.1, size: float = 0.0) -> Editable:
    names = [site.name for site in host.layout.mlp_out]
    maps = {n: f.shape for n, f in capture(host, rows_of(host, 1), names, tokens="all", rows=1).items()}
    editor = Editable(maps, 3, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        editor.steps.copy_(torch.tensor([steps * (i + 1) for i in range(len(names))]).log())
        for outer in editor.outer:
            outer.copy_(size * torch.randn_like(outer))
    return editor


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_step_is_gradient_descent_on_the_answer(family, normalise):
    """-a G, or -a G / rms(G), for each row by itself, G the gradient of its summed negative log-likelihood."""
    host, how = fresh(family), Descent(1, 1e9, normalise, "all")
    rows, editor = rows_of(host, 2), editor_of(host)
    with hooks.frozen(host.model):
        changes = descend(host, rows, editor, how, graph=False)
    weights = [host.model.get_submodule(name).weight for name in editor.names]
    for number, row in enumerate(rows):
        at = torch.arange(row.start - 1, len(row.ids) - 1)
        logits = host.forward_at(host.batch([row.ids[:-1]]), torch.zeros_like(at), at)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum")
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            change = changes[editor.names[i]]
            mine = change.owner == number
            found = change.outer[mine].mT @ change.inner[mine]
            plain = gradient.mT if found.shape != gradient.shape or family == "gpt2" else gradient
            unit = plain.square().mean().sqrt() if normalise else 1.0
            torch.testing.assert_close(found, -0.1 * (i + 1) * plain / unit, atol=1e-5, rtol=1e-3)


def test_a_second_step_is_taken_on_the_model_as_the_first_left_it():
    host = fresh("llama")
    editor, row = editor_of(host, steps=0.5), rows_of(host, 1)
    with hooks.frozen(host.model):
        both = descend(host, row, editor, Descent(2, 1e9, False, "all"), graph=False)
        first = descend(host, row, editor, ONE, graph=False)
        factors = capture(host, row, editor.names, tokens="all", rows=1)
        edit = hypernetwork.weight_edit(first, factors, Provenance("sequence", (), {}, host.fingerprint))
        with edit.on(host):
            second = descend(host, row, editor, ONE, graph=False)
    for name in editor.names:
        sums = [one[name].outer.mT @ one[name].inner for one in (both, first, second)]
        torch.testing.assert_close(sums[0], sums[1] + sums[2], atol=1e-5, rtol=1e-3)


def test_the_loss_after_the_steps_is_differentiated_through_them():
    """Gradients for the change and for the sizes of steps agree with differences, in float64."""
    host = fresh("gpt2")  # Llama's norms are float32 in any case
    host.model.double()
    editor, rows = editor_of(host, steps=0.3, size=0.1).double(), rows_of(host, 2)
    inside = [[line] for line in _lines(host, 2)]

    def loss() -> torch.Tensor:
        with editor.beneath(host):
            changes = descend(host, rows, editor, Descent(2, 1e9, True, "all"), graph=True)
            return losses_of(host, inside, [[], []], changes).edit.sum()

    with hooks.frozen(host.model), twice_differentiable():
        gradients = torch.autograd.grad(loss(), [editor.outer[0], editor.steps])
        for parameter, gradient, place in (
            (editor.outer[0], gradients[0], (1, 2)),
            (editor.steps, gradients[1], (0,)),
        ):
            values = []
            for shift in (1e-4, -1e-4):
                with torch.no_grad():
                    parameter[place] += shift
                values.append(float(loss().detach()))
                with torch.no_grad():
                    parameter[place] -= shift
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3, abs=1e-7)
            assert abs(float(gradient[place])) > 1e-5


def _lines(host, count: int):
    from errata.training.editing import line_of

    lines = [line_of(host, case.request.text, case.request.target) for case in EXAMPLES[:count]]
    return [line for line in lines if line is not None]


def test_steps_end_where_the_answer_leads_by_the_margin():
    host = fresh("llama")
    with torch.no_grad():
        host.model.lm_head.weight.mul_(20)  # a random model's logits hardly move
    editor, row = editor_of(host, steps=0.005), rows_of(host, 1)
    length = len(row[0].ids) - 1
    with hooks.frozen(host.model):
        none = descend(host, row, editor, Descent(3, -1e9, True, "all"), graph=False)
        taken = [
            len(descend(host, row, editor, Descent(30, margin, True, "all"), graph=False)[name].outer)
            / length
            for margin in (0.0, 1.0)
            for name in editor.names[:1]
        ]
    assert all(len(change.outer) == 0 for change in none.values())
    assert 1 <= taken[0] <= taken[1] < 30


def test_training_makes_edits_work_and_leaves_the_model(tmp_path):
    host, log = fresh("llama"), tmp_path / "log.jsonl"
    with torch.no_grad():
        host.model.lm_head.weight.mul_(20)
    start = host.weights_hash()
    options = {"steps": 24, "every": 24, "step": 0.02, "learning_rate": 1e-2, "step_rate": 0.1, "patience": 9}
    artefact = errata.train(
        host, method="enn", cases=EXAMPLES, files=TrainingFiles(log=log), **{**SHORT, **options}
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert artefact.tensors["outer.0"].abs().max() > 0 and host.weights_hash() == start


def test_each_edit_holds_the_change_once(tmp_path):
    host = fresh("llama")
    artefact = errata.train(host, method="enn", cases=EXAMPLES, step=1e-7, learning_rate=1e-2, **SHORT)
    path = str(artefact.save(tmp_path / "enn.safetensors"))
    # its steps are next to nothing
    first = errata.edit(host, ADA, method="enn", editor=path)
    assert isinstance(first, WeightEdit)
    for number, name in enumerate(artefact.body["maps"]):
        change = artefact.tensors[f"outer.{number}"].mT @ artefact.tensors[f"inner.{number}"]
        torch.testing.assert_close(
            dense(first.deltas[f"{name}.weight"], change), change, atol=1e-6, rtol=1e-4
        )
    second = errata.edit(host, EXAMPLES[0].request, after=first, method="enn", editor=path)
    assert isinstance(second, WeightEdit)
    for name, delta in second.deltas.items():
        begun = dense(first.deltas[name], torch.zeros(delta.shape))
        torch.testing.assert_close(dense(delta, begun), begun, atol=1e-6, rtol=1e-4)
    with first.on(host), pytest.raises(ConfigError, match="go on from it"):
        errata.prepare(
            host, EXAMPLES[0].request, method="enn", options={"editor": path}, beneath=[first]
        ).run()
