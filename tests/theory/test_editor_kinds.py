"""Editors of encoder-decoders, masked models and classifiers: what they read, what they are trained on, how scored."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional

import errata
from errata.config import make
from errata.errors import ConfigError, HostError
from errata.evaluation.observe import observe
from errata.locate.gradients import collect, linear_maps, selected_maps
from errata.methods import mend
from errata.methods._hypernetwork import map_names
from errata.training.editing import by_row, line_of, log_probabilities, losses_of
from errata.training.factors import Change, beside, capture
from errata.training.loop import TrainingFiles
from tests.models import fresh, fresh_kind

KINDS = ("t5", "bart", "bert", "classifier")
METHODS = ("mend", "lime", "ke", "slag", "malmen", "rledit")
FACTS = [("Ivo Marn", "Tallow"), ("Lena Ost", "Merrin"), ("Pia Holt", "Esk")]


def requests(kind: str) -> list[errata.Request]:
    """Questions with an answer, or claims with a label."""
    if kind == "classifier":
        return [errata.Request("{} lives in " + town, name, label) for (name, town), label in
                zip(FACTS, ("SUPPORTS", "REFUTES", "SUPPORTS"), strict=True)]  # fmt: skip
    return [errata.Request("Question: Where was {} born?", name, town) for name, town in FACTS]


def cases(kind: str, count: int = 9) -> list[errata.Case]:
    """Facts as zsRE has them, a question with its answer and other words; or claims with labels, as FEVER's."""
    found, labels = [], ("SUPPORTS", "REFUTES")
    for i in range(count):
        name, town = FACTS[i % 3][0].replace("o", "o" * (1 + i // 3)), FACTS[i % 3][1]
        if kind == "classifier":
            new, old = labels[i % 2], labels[1 - i % 2]
            request = errata.Request("{} lives in " + town, name, new, old)
            asked = (errata.Probe("paraphrase", f"{town} is where {name} lives", (new,), (old,)),
                     errata.Probe("neighbourhood", f"The rain fell on {town}", (old,), (old,)))  # fmt: skip
        else:
            request = errata.Request("Question: Where was {} born?", name, town, "Esk")
            asked = (errata.Probe("paraphrase", f"The town where {name} was born is", (town,), ("Esk",)),
                     errata.Probe("neighbourhood", "Question: Where was Ada born?", ("Esk",), ("Esk",)))  # fmt: skip
        found.append(errata.Case(f"example {i}", request, asked))
    return found


def double(kind: str):
    host = fresh_kind(kind)
    host.model.double()
    return host


def loss_of(host, request: errata.Request) -> torch.Tensor:
    """The summed negative log-likelihood of an answer, with the model called directly."""
    row, model = host.encode_answer(request.text, request.target), host.model
    target = torch.tensor(row.target)
    if host.kind == "encoder_decoder":
        middle = row.ids.index(-1)
        source, written = torch.tensor([row.ids[:middle]]), torch.tensor([row.ids[middle + 1 :]])
        logits = model(input_ids=source, decoder_input_ids=written[:, :-1]).logits[0, -len(target) :]
        return functional.cross_entropy(logits, target, reduction="sum")
    losses = []
    for at, token in zip(range(row.start, len(row.ids)), target, strict=True):
        ids, column = host.reading(row.ids[:at])
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        logits = logits[column] if host.kind == "masked_lm" else logits
        losses.append(functional.cross_entropy(logits, token))
    return torch.stack(losses).sum()


def everywhere(host) -> list[str]:
    """All linear maps that run once for every token of their stack: not those by which a decoder reads the encoder."""
    stacks = ["decoder"] if host.layout.encoder is None else ["decoder", "encoder"]
    names = [
        f"{block}.{name}"
        for stack in stacks
        for layer, block in enumerate(host.layout.of(stack).blocks)
        for name in linear_maps(host, layer, stack)
    ]
    return [name for name in names if "EncDecAttention" not in name and "encoder_attn" not in name]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_all_tokens_add_up_to_the_weights_gradient(kind):
    """sum g h^T of each request is the gradient of its loss for the weight, in both stacks."""
    host, asked = double(kind), requests(kind)
    names = everywhere(host)
    answers = [host.encode_answer(r.text, r.target) for r in asked]
    found = capture(host, answers, names, tokens="all", rows=2)
    for i, request in enumerate(asked):
        weights = [host.model.get_submodule(name).weight for name in names]
        wanted = torch.autograd.grad(loss_of(host, request), weights)
        # of a single token in a decoder, no query has a choice
        assert sum(bool(gradient.any()) for gradient in wanted) >= len(names) - 4
        for name, gradient in zip(names, wanted, strict=True):
            own = found[name].owner == i
            made = found[name].gradients[own].mT @ found[name].keys[own]
            # T5 takes its norms in float32, whatever its weights are
            torch.testing.assert_close(made, gradient, atol=1e-6 if kind == "t5" else 1e-9, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_factors_of_the_answer_are_those_that_predict_it(kind):
    """Nothing above the last feed-forward mixes tokens, so they are the whole gradient there."""
    host, asked = double(kind), requests(kind)
    answers = [host.encode_answer(r.text, r.target) for r in asked]
    name = host.layout.site(len(host.layout.blocks) - 1).name
    few, every = (collect(host, answers, [name], tokens=tokens)[name] for tokens in ("answer", "all"))
    assert few.owner.bincount().tolist() == [len(a.target) for a in answers]
    assert len(every.inputs) > len(few.inputs) or host.reads_by_encoder, "a decoder's tokens all predict"
    torch.testing.assert_close(few.gradients.mT @ few.inputs, every.gradients.mT @ every.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_sees_the_change_of_its_own_edit(kind):
    """Two edits in one pass, beside the weights, against each alone in the weights."""
    host, asked = double(kind), requests(kind)
    names = map_names(host, mend.Config(stack="both" if host.layout.encoder else "decoder"), ("mlp_out",))
    changes = {}
    for seed, name in enumerate(names):
        weight, generator = host.model.get_submodule(name).weight, torch.Generator().manual_seed(seed)
        outer = torch.randn(3, weight.shape[0], generator=generator, dtype=torch.float64)
        inner = torch.randn(3, weight.shape[1], generator=generator, dtype=torch.float64)
        changes[name] = Change(outer, inner, torch.tensor([0, 1, 1]))
    lines = [line for line in (line_of(host, r.text, r.target) for r in asked[:2]) if line is not None]
    with torch.no_grad():
        with beside(host, changes, by_row(host, lines, [0, 1])):
            together = log_probabilities(host, lines)[0]
        sizes, alone = [len(line.at) for line in lines], []
        for edit, line in enumerate(lines):
            kept = {name: host.model.get_submodule(name).weight.clone() for name in names}
            for name, change in changes.items():
                own = change.owner == edit
                host.model.get_submodule(name).weight += change.outer[own].mT @ change.inner[own]
            alone.append(log_probabilities(host, [line])[0])
            for name, weight in kept.items():
                host.model.get_submodule(name).weight.copy_(weight)
    exact: dict[str, Any] = {
        "atol": 1e-5 if kind == "t5" else 1e-9,
        "rtol": 1e-5,
    }  # T5 takes its norms in float32
    for one, other in zip(together.split(sizes), alone, strict=True):
        torch.testing.assert_close(one, other, **exact)
    assert not torch.allclose(together, log_probabilities(host, lines)[0])
    both = losses_of(host, [[lines[0]], [lines[1]]], [[lines[1]], [lines[0]]], changes)
    nll = [
        -own.gather(1, torch.tensor(line.targets)[:, None]).mean()
        for own, line in zip(alone, lines, strict=True)
    ]
    torch.testing.assert_close(both.edit.detach(), torch.stack(nll).detach(), **exact)
    assert float(both.locality.detach().min()) > 0


@pytest.mark.parametrize("kind", ["t5", "bert", "classifier"])
@pytest.mark.parametrize("method", METHODS)
def test_an_editor_is_trained_edits_and_is_taken_back(method, kind, tmp_path):
    host, asked = fresh_kind(kind), requests(kind)
    settings = {"steps": 2, "every": 1, "per_step": 2, "held_out": 0.3, "step": 0.3}
    settings |= {"rledit": {"length": 2, "reach": 1}, "slag": {"applications": 2}}.get(method, {})
    if method in ("mend", "lime", "malmen", "rledit"):
        settings["rank"] = 8
    if kind == "t5":
        settings["stack"] = "both"
    log, start = tmp_path / "log.jsonl", host.weights_hash()
    artefact = errata.train(host, method=method, cases=cases(kind), files=TrainingFiles(log=log), **settings)
    assert {"encoder" in name for name in artefact.body["maps"]} == (
        {True, False} if kind == "t5" else {kind != "t5"}
    )
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 1, 2, 2]
    path = artefact.save(tmp_path / "editor.safetensors")
    edit = errata.edit(host, asked[:2], method=method, editor=str(path))
    assert host.weights_hash() == start
    assert edit.digest == errata.edit(host, asked[:2], method=method, editor=str(path)).digest
    probes = [errata.Probe("efficacy", r.text, (r.target,), ()) for r in asked]
    before = [seen.answer_logprobs for seen in observe(host, probes)]
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with loaded.on(host):
        after = [seen.answer_logprobs for seen in observe(host, probes)]
    assert after != before and host.weights_hash() == start
    assert [seen.answer_logprobs for seen in observe(host, probes)] == before


def test_modules_and_stacks_that_are_not_there_are_refused(tmp_path):
    t5, llama = fresh_kind("t5"), fresh("llama")
    assert selected_maps(t5, ("wi",), (1,), "encoder") == ["encoder.block.1.layer.1.DenseReluDense.wi"]
    assert [n.split(".")[0] for n in map_names(t5, mend.Config(stack="both"), ("mlp",))] == [
        "encoder"
    ] * 4 + ["decoder"] * 2
    with pytest.raises(HostError, match="no encoder"):
        errata.train(llama, method="mend", cases=cases("t5"), stack="encoder")
    with pytest.raises(ConfigError, match="stack"):
        make(mend.Config, {"stack": "middle"}, "mend")
    artefact = errata.train(t5, method="mend", cases=cases("t5"), steps=1, rank=4)
    with pytest.raises(ConfigError, match="trained for"):
        errata.edit(t5, requests("t5")[0], method="mend", examples=cases("t5"), stack="encoder",
                    editor=str(artefact.save(tmp_path / "e.safetensors")))  # fmt: skip
