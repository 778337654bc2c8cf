"""RLEdit: edits of a sequence stay in place while it is walked, and what each is charged for."""

from __future__ import annotations

import json
import random

import torch

import errata
from errata.methods import _hypernetwork as hypernetwork
from errata.methods import _ridge as regression
from errata.methods import rledit
from errata.training.factors import Change, Factors
from errata.training.loop import TrainingFiles
from tests.models import fresh
from tests.theory.test_malmen import editor_and_factors
from tests.theory.test_mend import EXAMPLES

SHORT = {"steps": 2, "every": 1, "per_step": 2, "length": 3, "reach": 2, "held_out": 0.3, "rank": 8}


def test_the_gradient_of_a_change_s_norm_is_that_of_the_matrix():
    editor, factors = editor_and_factors(9)
    solved = regression.solve(editor, factors)
    norm = sum((c.inner.mT @ c.outer).square().sum() for c in solved.changes.values())
    expected = torch.autograd.grad(0.3 * norm, list(solved.coefficients))
    for mine, theirs in zip(regression.norm_gradients(solved, 0.3), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7)


def test_changes_of_a_sequence_add_up_in_place_and_are_taken_off():
    host = fresh("gpt2")
    name = host.layout.mlp_out[1].name
    weight = host.model.get_submodule(name).weight
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    course, total = hypernetwork.Course(host), torch.zeros(80, 32)
    with course.kept():
        for _ in range(3):
            outer, inner = (0.1 * torch.randn(2, n, generator=generator) for n in (32, 80))
            factors = {name: Factors(inner, outer, torch.tensor([0, 1]), transposed=True)}
            course.add(factors, {name: Change(outer, inner, torch.tensor([0, 0]))})
            total += inner.mT @ outer
            torch.testing.assert_close(weight.detach() - before, total, atol=1e-6, rtol=1e-4)
    assert torch.equal(weight, before) and host.placed == ()


def test_a_batch_is_charged_for_those_before_it_as_far_as_it_reaches(monkeypatch):
    calls: list[tuple[int, float]] = []
    original = rledit._Task._cost

    def cost(self, samples, before, solved, share):
        calls.append((len(samples), round(share * 3, 6)))
        assert all(one is None or not one.requires_grad for one in before)
        return original(self, samples, before, solved, share)

    monkeypatch.setattr(rledit._Task, "_cost", cost)
    host = fresh("llama")
    start = host.weights_hash()
    errata.train(host, method="rledit", cases=EXAMPLES, **{**SHORT, "steps": 1})
    assert calls == [(2, 1.0), (2, 1.0), (2, 0.95), (2, 1.0), (2, 0.95)]
    assert host.weights_hash() == start


def test_facts_before_a_sequence_are_in_place_and_can_be_charged(monkeypatch):
    charged: list[tuple[int, ...]] = []
    placed: list[int] = []
    original, add = rledit._Task._cost, hypernetwork.Course.add

    def cost(self, samples, before, solved, share):
        charged.append(tuple(id(sample.item) for sample in samples))
        return original(self, samples, before, solved, share)

    def count(self, factors, changes):
        placed.append(len(charged))
        add(self, factors, changes)

    monkeypatch.setattr(rledit._Task, "_cost", cost)
    monkeypatch.setattr(hypernetwork.Course, "add", count)
    host = fresh("llama")
    start = host.weights_hash()
    short = {**SHORT, "steps": 6, "length": 1, "reach": 9, "earlier": 4, "charged": "any", "every": 6}
    before_first: set[int] = set()
    steps: list[list[tuple[int, ...]]] = []
    differentiate = rledit._Task.differentiate

    def step(self, number, examples):
        placed.clear()
        charged.clear()
        result = differentiate(self, number, examples)
        before_first.add(placed.count(0))
        steps.append(list(charged))
        assert (
            len(placed) == placed.count(0) + 1
        )  # the one batch of the sequence is put in place after its charge
        return result

    monkeypatch.setattr(rledit._Task, "differentiate", step)
    errata.train(host, method="rledit", cases=EXAMPLES, **short)
    assert before_first == {0, 1, 2}  # up to four facts, in batches of two
    for one in steps:
        assert len(set(one)) == len(one)  # each batch is charged for once
    assert {len(one) for one in steps} == {1, 2, 3}  # itself and as many as are there
    assert host.weights_hash() == start


def test_no_batch_is_charged_that_is_not_in_place_yet():
    task = rledit._Task.__new__(rledit._Task)
    object.__setattr__(task, "config", rledit.Config(reach=3, charged="any"))
    draws = [task._charged(random.Random(seed), 5) for seed in range(50)]
    assert all(one[0] == 5 and len(set(one)) == 3 and max(one[1:]) < 5 for one in draws)
    assert {i for one in draws for i in one} == set(range(6))
    assert task._charged(random.Random(0), 0) == [0]
    object.__setattr__(task, "config", rledit.Config(reach=3, charged="last"))
    assert task._charged(random.Random(0), 5) == [5, 4, 3]


def test_training_lowers_the_cost_and_resumes_to_the_same_bits(tmp_path):
    def host():
        new = fresh("llama")
        with torch.no_grad():
            new.model.lm_head.weight.mul_(20)
        return new

    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "checkpoint"
    options = {
        **SHORT,
        "steps": 24,
        "every": 4,
        "step": 3.0,
        "learning_rate": 1e-2,
        "step_rate": 0.1,
        "patience": 99,
    }
    whole = errata.train(host(), method="rledit", cases=EXAMPLES, files=TrainingFiles(log=log), **options)
    losses = [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == 10:
            raise KeyboardInterrupt

    files = TrainingFiles(checkpoint)
    try:
        errata.train(host(), method="rledit", cases=EXAMPLES, files=files, on_progress=stop, **options)
    except KeyboardInterrupt:
        files = TrainingFiles(checkpoint, resume=True)
    resumed = errata.train(host(), method="rledit", cases=EXAMPLES, files=files, **options)
    assert files.resume and resumed.digest == whole.digest
