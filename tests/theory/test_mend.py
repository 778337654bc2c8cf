"""MEND: what its editor is before training, what comes out, and trainings that are stopped and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import errata
from errata.edits.artefact import Artefact
from errata.edits.deltas import dense
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, EditError
from errata.lab import load
from errata.linalg.lowrank import LowRank
from errata.methods import mend
from errata.methods._hypernetwork import Editor
from errata.training.factors import capture
from errata.training.hypernetwork import NetworkShape
from errata.training.loop import TrainingFiles
from tests.models import fresh
from tests.program import errata as program

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
EXAMPLES = [
    errata.Case(
        f"example {i}",
        errata.Request("{} works in", name, town, "Esk"),
        (
            errata.Probe("paraphrase", f"The place where {name} works is", (town,), ("Esk",)),
            errata.Probe("neighbourhood", "Ivo works in", ("Esk",), ("Esk",)),
        ),
    )
    for i, (name, town) in enumerate(
        (("Ivo Marn", "Tallow"), ("Lena Ost", "Merrin"), ("Pia Holt", "Esk")) * 3
    )
]
QUICK = {"steps": 6, "every": 2, "per_step": 2, "rank": 8, "held_out": 0.3}


def maps(host) -> list[str]:
    return [site.name for site in host.layout.mlp_out]


def train(host, **options):
    return errata.train(host, method="mend", cases=EXAMPLES, **{**QUICK, **options})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untrained_and_without_normalisation_it_is_a_step_of_gradient_descent(family):
    """W - a dL/dW, a the step of each map, L the request's summed loss over all tokens."""
    host = fresh(family)
    row = host.encode_answer(ADA.text, ADA.target)
    factors = capture(host, [row], maps(host), tokens="all", rows=1)
    editor = Editor({n: f.shape for n, f in factors.items()}, NetworkShape(8, 2, "inside"), ("step",), 0)
    with torch.no_grad():
        editor.logs["step"].copy_(torch.tensor([0.1, 0.2, 0.3]).log())
    changes = mend.changes_of(editor, factors)
    weights = [host.model.get_submodule(name).weight for name in maps(host)]
    at = torch.arange(row.start - 1, len(row.ids) - 1)
    logits = host.forward_at(host.batch([row.ids[:-1]]), torch.zeros_like(at), at)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum")
    for name, step, gradient in zip(
        maps(host), (0.1, 0.2, 0.3), torch.autograd.grad(loss, weights), strict=True
    ):
        found = changes[name].outer.mT @ changes[name].inner
        expected = -step * (gradient.mT if factors[name].transposed else gradient)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_untrained_it_normalises_by_what_it_measured():
    """-a sum of ((g - m) / s) ((h - m) / s)^T, entries that never differ left out."""
    host = fresh("llama")
    rows = [host.encode_answer(case.request.text, case.request.target) for case in EXAMPLES[:3]]
    (name,) = maps(host)[1:2]
    factors = capture(host, rows, [name], tokens="all", rows=3)
    one = factors[name]
    one.keys[:, 0] = 2.5
    editor = Editor({name: one.shape}, NetworkShape(8, 2, "inside"), ("step",), 0)
    energy = editor.network.set_statistics_([lambda: factors])
    assert energy[name] == pytest.approx(float(one.keys.square().sum(1).mean()), rel=1e-5)
    change = mend.changes_of(editor, factors)[name]
    sides = [(side - side.mean(0)) / side.std(0) for side in (one.keys, one.gradients)]
    sides[0][:, 0] = 0
    torch.testing.assert_close(change.inner, sides[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(change.outer, -sides[1], atol=1e-3, rtol=1e-3)


def test_an_edit_has_at_most_the_rank_of_its_tokens():
    host = fresh("llama")
    artefact = train(host)
    row = host.encode_answer(ADA.text, ADA.target)
    for token, most in (("answer", len(row.target)), ("all", len(row.ids) - 1)):
        edit = errata.edit(host, ADA, method="mend", examples=EXAMPLES, token=token, **QUICK)
        assert isinstance(edit, WeightEdit)
        assert all(isinstance(delta, LowRank) and 1 <= delta.rank <= most for delta in edit.deltas.values())
        assert set(artefact.body["maps"]) == {n.removesuffix(".weight") for n in edit.deltas}


def test_training_lowers_the_losses_and_reaches_the_network(tmp_path):
    host, log = fresh("llama"), tmp_path / "log.jsonl"
    with torch.no_grad():
        host.model.lm_head.weight.mul_(20)  # a random model's logits hardly move
    options = {
        "steps": 60,
        "every": 20,
        "step": 0.3,
        "learning_rate": 1e-2,
        "step_rate": 0.05,
        "patience": 100,
    }
    start = host.weights_hash()
    artefact = train(host, files=TrainingFiles(log=log), **options)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert [line["step"] for line in lines if "validation" in line] == [20, 40, 60]
    assert artefact.tensors["network.networks.32x80.blocks.1.outer"].abs().max() > 0
    assert host.weights_hash() == start and all(p.grad is None for p in host.model.parameters())


def test_a_training_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    whole = train(fresh("llama"))
    checkpoint, log = tmp_path / "checkpoint", tmp_path / "log.jsonl"

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh("llama"), files=TrainingFiles(checkpoint, log=log), on_progress=stop)
    with log.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = train(fresh("llama"), files=TrainingFiles(checkpoint, resume=True, log=log))
    assert resumed.digest == whole.digest
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    steps = [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="another|other settings"):
        train(fresh("llama"), files=TrainingFiles(checkpoint, resume=True), learning_rate=1e-2)
    with pytest.raises(ConfigError, match="other settings"):
        train(fresh("llama", seed=1), files=TrainingFiles(checkpoint, resume=True))


def test_numbers_that_are_not_finite_end_the_training_with_the_step(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(ConfigError, match=r"step \d+ of the training: \w+ is not finite"):
        train(fresh("llama"), learning_rate=1e30, clip=None, every=1, files=TrainingFiles(checkpoint))
    with pytest.raises(ConfigError, match="is not finite"):
        train(
            fresh("llama"),
            learning_rate=1e30,
            clip=None,
            every=1,
            files=TrainingFiles(checkpoint, resume=True),
        )
    tensors = errata.edits.format.read(checkpoint)[0]
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_file_of_half_the_size_gives_nearly_the_same_edit(tmp_path):
    host = fresh("llama")
    whole, half = train(host), train(host, stored="float16")
    assert all(t.dtype == (torch.float16 if t.ndim > 1 else torch.float32) for t in half.tensors.values())
    assert half.size < 0.6 * whole.size
    edits = [
        errata.edit(host, ADA, method="mend", editor=str(one.save(tmp_path / f"{i}.safetensors")))
        for i, one in enumerate((whole, half))
    ]
    first, second = edits
    assert isinstance(first, WeightEdit) and isinstance(second, WeightEdit)
    for name, delta in first.deltas.items():
        one = dense(delta, torch.zeros(delta.shape))
        assert 0 < (dense(second.deltas[name], one) - one).norm() / one.norm() < 5e-3


def test_an_editor_s_file_gives_the_same_edit_in_another_process(tmp_path):
    host = load()
    options = {"steps": 2, "every": 1, "most": 12, "rank": 8, "layers": [3]}
    path = errata.train(host, method="mend", cases="lab:train:12", **options).save(tmp_path / "e.safetensors")
    expected = errata.edit(host, ADA_OF_THE_LAB, method="mend", editor=str(path))
    code = (
        "import errata, sys\n"
        "from errata.lab import load\n"
        "from tests.theory.test_mend import ADA_OF_THE_LAB\n"
        "print(errata.edit(load(), ADA_OF_THE_LAB, method='mend', editor=sys.argv[1]).digest)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.split()[-1] == expected.digest


ADA_OF_THE_LAB = errata.lab.cases(1, seed=7, world=errata.lab.world_of("test"))[0].request


def test_editors_and_examples_that_do_not_fit_are_refused(tmp_path):
    host = fresh("llama")
    artefact = train(host)
    path = str(artefact.save(tmp_path / "editor.safetensors"))
    assert errata.edit(host, ADA, method="mend", editor=path).provenance.notes["editor"] == artefact.digest
    with pytest.raises(EditError, match="trained on host"):
        errata.edit(fresh("llama", seed=1), ADA, method="mend", editor=path)
    with pytest.raises(ConfigError, match="trained for .*, found"):
        errata.edit(host, ADA, method="mend", editor=path, layers=[0])
    with pytest.raises(ConfigError, match="prompt format"):
        errata.edit(host, ADA, method="mend", editor=path, template="question")
    tensors = {name: tensor for name, tensor in artefact.tensors.items() if "mean" not in name}
    broken = Artefact("mend", artefact.host, tensors, artefact.body, artefact.card).save(
        tmp_path / "b.safetensors"
    )
    with pytest.raises(EditError, match="do not fit"):
        errata.edit(host, ADA, method="mend", editor=str(broken))
    plain = [
        errata.Case(c.id, c.request, tuple(p for p in c.probes if p.kind != "paraphrase")) for c in EXAMPLES
    ]
    with pytest.raises(ConfigError, match="mend is trained on the request in other words"):
        errata.train(host, method="mend", cases=plain)
    plain = [
        errata.Case(c.id, c.request, tuple(p for p in c.probes if p.kind == "paraphrase")) for c in EXAMPLES
    ]
    with pytest.raises(ConfigError, match="must not change"):
        errata.train(host, method="mend", cases=plain)


def test_from_the_command_line_a_training_resumes_to_the_same_editor(tmp_path, monkeypatch):
    """A short training, stopped by an error after its first checkpoint."""
    path, log = tmp_path / "mend.safetensors", tmp_path / "log.jsonl"
    words = ("train", "mend", "--model", "lab", "--cases", "lab:train:20", "--quick", "--set", "steps=4", "--set",
             "every=2", "--set", "layers=[4]", "--json", "-o")  # fmt: skip
    whole = program(*words, path)
    assert whole.returncode == 0, whole.stderr
    digest = json.loads(whole.stdout)["digest"]
    path.unlink()

    def fail(self, step, examples):
        if step == 3:
            raise ConfigError("the power went out")
        return original(self, step, examples)

    original = mend._Task.differentiate
    monkeypatch.setattr(mend._Task, "differentiate", fail)
    assert program(*words, path, "--log", log).returncode != 0
    checkpoint = tmp_path / "mend.safetensors.checkpoint"
    assert checkpoint.exists() and not path.exists()
    monkeypatch.setattr(mend._Task, "differentiate", original)
    refused = program(*words, path)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = program(*words, path, "--resume", "--log", log)
    assert resumed.returncode == 0 and json.loads(resumed.stdout)["digest"] == digest, resumed.stderr
    assert not checkpoint.exists() and len(log.read_text().splitlines()) == 6
    refused = program("train", "serac", "--model", "lab", "--quick", "-o", tmp_path / "s.safetensors")
    assert refused.returncode == 2 and "no quick training" in refused.stderr
    refused = program("train", "serac", "--model", "lab", "--resume", "-o", tmp_path / "s.safetensors")
    assert refused.returncode == 2 and "mend" in refused.stderr
