"""SLAG: how often its editor is applied, what an update is charged for, and what stays in place meanwhile."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.linalg.lowrank import LowRank
from errata.methods import slag
from errata.training.editing import losses_of
from errata.training.factors import beside
from tests.models import fresh
from tests.theory.test_mend import EXAMPLES


def with_consequence(case: errata.Case) -> errata.Case:
    probe = errata.Probe("one_hop", f"Near {case.request.subject} flows", ("Esk",), ("Tallow",))
    return errata.Case(case.id, case.request, (*case.probes, probe))


CASES = [with_consequence(case) for case in EXAMPLES]
SHORT = {"steps": 2, "every": 1, "per_step": 2, "held_out": 0.2, "encoder": 8, "condition": 12, "head": 8}


def test_it_is_applied_until_the_answer_is_right_and_no_oftener_than_allowed(monkeypatch, tmp_path):
    host = fresh("llama")
    artefact = errata.train(host, method="slag", cases=CASES, **SHORT)
    editor = str(artefact.save(tmp_path / "editor.safetensors"))
    for right_after, most, expected in ((1, 5, 1), (3, 5, 3), (9, 2, 2)):
        verdicts = iter([False] * (right_after - 1) + [True])
        with monkeypatch.context() as patch:
            patch.setattr(slag, "answered", lambda host, lines, v=verdicts: [next(v)])
            calls = _count(patch)
            edit = errata.edit(host, EXAMPLES[0].request, method="slag", applications=most, editor=editor)
        assert len(calls) == expected
        for name, delta in edit.deltas.items():
            whole = delta.dense() if isinstance(delta, LowRank) else delta
            total = sum(one[name.removesuffix(".weight")] for one in calls)
            torch.testing.assert_close(whole, total, atol=1e-5, rtol=1e-4)


def _count(patch) -> list[dict[str, torch.Tensor]]:
    calls: list[dict[str, torch.Tensor]] = []
    original = slag.Course.add

    def add(self, factors, changes):
        calls.append({name: (c.outer.mT @ c.inner).detach() for name, c in changes.items()})
        original(self, factors, changes)

    patch.setattr(slag.Course, "add", add)
    return calls


def test_an_update_is_charged_for_five_things_by_their_weights(monkeypatch):
    host, seen = fresh("llama"), []
    original = slag._Task._loss

    def loss(self, sample, unedited, changes):
        found = original(self, sample, unedited, changes)
        own = len(sample.outside) - sample.others
        with torch.no_grad(), beside(host, {}, ()):
            main = losses_of(host, [sample.item.inside[:1]], [sample.outside[own:]], changes)
            words = losses_of(host, [sample.inside], [sample.outside[:own]], changes)
            entailed = losses_of(host, [sample.item.entailed], [()], changes)
        weights = {
            1: main.edit,
            2: main.locality if sample.others else None,
            3: words.edit,
            4: entailed.edit,
            5: words.locality,
        }
        parts = [(weight, float(value[0])) for weight, value in weights.items() if value is not None]
        seen.append((float(found.detach()), sum(w * v for w, v in parts) / sum(w for w, _ in parts)))
        return found

    monkeypatch.setattr(slag._Task, "_loss", loss)
    start = host.weights_hash()
    names = ("main", "other", "paraphrase", "entailed", "neutral")
    options = {f"{name}_weight": float(i + 1) for i, name in enumerate(names)}
    errata.train(
        host, method="slag", cases=CASES, **{**SHORT, "steps": 1, "applications": 1, "per_step": 1}, **options
    )
    assert len(seen) == 1
    for found, expected in seen:  # the host is unedited at the first update, as the divergence's reference is
        assert found == pytest.approx(expected, rel=1e-4)
    assert host.weights_hash() == start and host.placed == ()


def test_an_update_is_not_charged_for_what_another_of_its_step_changes(monkeypatch):
    host, charged = fresh("llama"), []
    near = errata.Probe("neighbourhood", "Lena Ost works in", ("Esk",), ("Esk",))
    cases = [
        errata.Case(case.id, case.request, (*case.probes, near))
        if case.request.subject == "Ivo Marn"
        else case
        for case in CASES
    ]
    original = slag._Task._loss

    def loss(self, sample, unedited, changes):
        texts = [host.tokenizer.decode(line.ids) for line in sample.outside]
        charged.append((sample.item.request.subject, any("Lena Ost" in text for text in texts)))
        assert len(unedited) == len(texts)
        return original(self, sample, unedited, changes)

    monkeypatch.setattr(slag._Task, "_loss", loss)
    options = {**SHORT, "steps": 8, "every": 8, "applications": 1, "outside": 9, "others": 0}
    errata.train(host, method="slag", cases=cases, **options)
    steps = [dict(charged[i : i + 2]) for i in range(0, len(charged), 2)]
    asked = {("Lena Ost" in step, step["Ivo Marn"]) for step in steps if "Ivo Marn" in step}
    assert asked == {(True, False), (False, True)}
