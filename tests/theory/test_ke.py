"""KnowledgeEditor: what its heads write as products, where it starts, and the constraint that it is trained under."""

from __future__ import annotations

import json

import pytest
import torch

import errata
from errata.methods import _conditional as conditional
from errata.methods import ke
from errata.training.conditional import ConditionalEditor, ConditionalShape
from errata.training.factors import capture
from errata.training.loop import TrainingFiles
from tests.models import fresh
from tests.theory.test_mend import EXAMPLES

SHORT = {"steps": 4, "every": 2, "per_step": 2, "held_out": 0.3, "encoder": 8, "condition": 12, "head": 8}
SHAPE = ConditionalShape(32, 8, 12, 8)


def captured(host, count: int = 2):
    rows = [host.encode_answer(case.request.text, case.request.target) for case in EXAMPLES[:count]]
    return capture(host, rows, [site.name for site in host.layout.mlp_out][:2], tokens="all", rows=count)


def editor_of(factors) -> ConditionalEditor:
    torch.manual_seed(0)
    return ConditionalEditor({name: one.shape for name, one in factors.items()}, SHAPE)


def test_products_are_the_masked_gradient_and_the_shift():
    """sigmoid(n) (u A * G + v B) with A = softmax(a) c^T, G the whole gradient; one product more than tokens."""
    factors = captured(fresh("llama"))
    editor = editor_of(factors)
    conditions = torch.randn(2, 12)
    with torch.no_grad():
        changes = editor.changes(conditions, factors)
        for name, one in factors.items():
            rows_a, columns_a, rows_b, columns_b, gate = editor.head(name)(conditions)
            for edit in range(2):
                own = one.owner == edit
                gradient = one.gradients[own].mT @ one.keys[own]
                mask = torch.outer(rows_a[edit], columns_a[edit])
                expected = gate[edit] * (mask * gradient + torch.outer(rows_b[edit], columns_b[edit]))
                mine = changes[name].owner == edit
                found = changes[name].outer[mine].mT @ changes[name].inner[mine]
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
                assert int(mine.sum()) == int(own.sum()) + 1
            assert changes[name].owner.tolist() == sorted(changes[name].owner.tolist())


def test_what_a_text_becomes_does_not_depend_on_those_beside_it():
    editor = editor_of(captured(fresh("llama")))
    texts = [torch.randn(n, 32) for n in (3, 9, 5)]
    with torch.no_grad():
        together = editor.conditions(texts)
        alone = torch.cat([editor.conditions([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert (together[0] - together[1]).norm() > 1e-3


def test_it_starts_as_a_step_of_descent_of_a_share_of_the_weight():
    host = fresh("gpt2")
    start: list[float] = []
    original = ke._Task.differentiate

    def look(self, step, examples):
        if step == 0:
            items = [self.data.items[0]]
            factors = conditional.factors_of(host, items, self.editor, self.config)
            changes = self._changes(items)
            for name, one in factors.items():
                gradient = one.gradients.mT @ one.keys
                change = changes[name].outer.mT @ changes[name].inner
                change = change.detach()
                start.append(float((change * gradient).sum() / (change.norm() * gradient.norm())))
                size = host.model.get_submodule(name).weight.norm()
                assert 0.02 < float(change.norm() / size) < 1.0
        return original(self, step, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ke._Task, "differentiate", look)
        errata.train(host, method="ke", cases=EXAMPLES, **{**SHORT, "step": 0.5})
    assert len(start) == 2 and all(cosine < -0.5 for cosine in start)


def test_the_multiplier_rises_above_the_margin_and_the_margin_falls(tmp_path):
    host, log = fresh("llama"), tmp_path / "log.jsonl"
    with torch.no_grad():
        host.model.lm_head.weight.mul_(20)  # a random model's logits hardly move
    options = {**SHORT, "multiplier_rate": 0.5, "margin": 1e-3, "least_margin": 1e-4}
    trained = errata.train(host, method="ke", cases=EXAMPLES, files=TrainingFiles(log=log), **options)
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    multiplier = 0.0
    for line in lines:
        assert line["multiplier"] == pytest.approx(multiplier, abs=1e-6)
        assert line["loss"] == pytest.approx(line["edit"] + multiplier * line["locality"], rel=1e-5)
        multiplier = max(0.0, multiplier + 0.5 * (line["locality"] - 1e-3))
    assert multiplier > 0
    assert float(trained.tensors["margin"]) in (
        pytest.approx(1e-3),
        pytest.approx(8e-4),
        pytest.approx(6.4e-4),
    )
    task = ke._Task(host, ke.Config(margin_factor=0.8, least_margin=1e-4), None, editor_of(captured(host)), 0)  # type: ignore[arg-type]
    task.editor.margin.fill_(1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ke, "validate", lambda *_, **__: {"success": 0.95, "score": 0.9})
        object.__setattr__(task, "data", type("Data", (), {"held": ()})())
        for expected in (8e-4, 6.4e-4):
            task.validate()
            assert float(task.editor.margin) == pytest.approx(expected)
        for _ in range(20):
            task.validate()
    assert float(task.editor.margin) == pytest.approx(1e-4)


def test_an_edit_has_one_column_more_than_tokens_for_each_request():
    host = fresh("llama")
    requests = [case.request for case in EXAMPLES[:2]]
    edit = errata.edit(host, requests, method="ke", examples=EXAMPLES, token="answer", **SHORT)
    tokens = sum(len(host.encode_answer(r.text, r.target).target) for r in requests)
    assert all(delta.rank <= tokens + len(requests) for delta in edit.deltas.values())
    unknown = errata.Request("{} works in", "Ivo Marn", "Tallow")
    assert errata.edit(host, unknown, method="ke", examples=EXAMPLES, **SHORT).deltas
