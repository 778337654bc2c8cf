"""LiME: gates and masks by their formulas, languages apart from each other, and the editor that closed gates leave."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import errata
from errata.edits.artefact import Artefact
from errata.errors import ConfigError
from errata.methods import lime, mend
from errata.methods._hypernetwork import Editor
from errata.training.factors import capture
from errata.training.gates import LARGEST, Gates
from errata.training.hypernetwork import NetworkShape
from errata.training.loop import TrainingFiles
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", language="a")
EXAMPLES = [
    errata.Case(
        f"example {i}",
        errata.Request("{} works in", name, town, "Esk", language="ab"[i % 2]),
        (
            errata.Probe("paraphrase", f"The place where {name} works is", (town,), ("Esk",)),
            errata.Probe("cross_efficacy", f"Where works {name}", (town,), ("Esk",)),
            errata.Probe("neighbourhood", "Ivo works in", ("Esk",), ("Esk",)),
        ),
    )
    for i, (name, town) in enumerate(
        (("Ivo Marn", "Tallow"), ("Lena Ost", "Merrin"), ("Pia Holt", "Esk")) * 3
    )
]
QUICK = {"steps": 4, "every": 2, "per_step": 2, "rank": 8, "held_out": 0.3}


def made(host, *, languages=("a", "b"), seed=0):
    names = [site.name for site in host.layout.mlp_out]
    rows = [host.encode_answer(one.text, one.target) for one in (ADA, replace(ADA, target="Esk"))]
    factors = capture(host, rows, names, tokens="all", rows=2)
    editor = Editor({n: f.shape for n, f in factors.items()}, NetworkShape(8, 2, "inside"), ("step",), seed)
    return lime.Masked(editor, languages, lime.Config(spread=0.5), seed), factors


def test_gates_are_open_as_often_as_their_odds_say():
    generator = torch.Generator().manual_seed(0)
    gates = Gates(5, open_share=0.5, spread=2.0, generator=generator)
    draws = torch.stack([gates.values(torch.rand(5, generator=generator)) for _ in range(20_000)])
    draws = draws.detach()
    assert float(draws.min()) == 0.0 and float(draws.max()) == 1.0
    torch.testing.assert_close((draws > 0).float().mean(0), gates.open_probability(), atol=0.02, rtol=0)
    with torch.no_grad():
        gates.log_odds.copy_(torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0]))
    expected = torch.tensor([0.5, 0.7311 * 1.2 - 0.1, 0.2689 * 1.2 - 0.1, 1.0, 0.0])
    torch.testing.assert_close(gates.values(), expected, atol=1e-4, rtol=0)
    most = torch.sigmoid(torch.tensor(LARGEST + 2 / 3 * 2.3979))
    torch.testing.assert_close(gates.open_probability()[3], most, atol=1e-4, rtol=0)


def test_with_all_gates_closed_it_is_mend_to_the_bit():
    masked, factors = made(fresh("llama"))
    masked.editor.network.set_statistics_([lambda: factors])
    with torch.no_grad():
        for gates in masked.by_shape().values():
            gates.log_odds.fill_(-LARGEST)
    found = lime.changes_of(masked, factors, torch.tensor([0, 1]))
    for name, change in mend.changes_of(masked.editor, factors).items():
        assert torch.equal(found[name].outer, change.outer) and torch.equal(found[name].inner, change.inner)


def test_the_language_of_an_edit_weighs_the_features_of_what_is_read():
    """-a sum (m_d d)(m_u u)^T with m = 1 + e z of the text's own language, where the network does nothing."""
    masked, factors = made(fresh("llama"))
    with torch.no_grad():
        masked.editor.logs["step"].fill_(0.0)
        for scale in masked.scales.values():
            scale.copy_(torch.linspace(0.5, 2.0, scale.numel()).view_as(scale))
    found = lime.changes_of(masked, factors, torch.tensor([1, 0]))
    for name, one in factors.items():
        shape = f"{one.shape[0]}x{one.shape[1]}"
        mask = 1 + masked.scales[shape] * masked.by_shape()[shape].values()
        rows = torch.stack([mask[1 if owner == 0 else 0] for owner in one.owner])
        width = one.keys.shape[1]
        torch.testing.assert_close(found[name].inner, one.keys * rows[:, :width])
        torch.testing.assert_close(found[name].outer, -one.gradients * rows[:, width:])


def test_the_masks_of_one_language_learn_nothing_from_edits_in_another():
    masked, factors = made(fresh("llama"))
    generator = torch.Generator().manual_seed(3)
    changes = lime.changes_of(masked, factors, torch.tensor([1, 1]), masked.noise(generator))
    losses = [change.outer.square().sum() + change.inner.square().sum() for change in changes.values()]
    learned = [gates.log_odds for gates in masked.by_shape().values()] + list(masked.scales.values())
    for gradient in torch.autograd.grad(torch.stack(losses).sum(), learned):
        assert not gradient[0].any() and gradient[1].any()


def test_edits_in_each_language_train_its_masks_and_a_file_holds_them(tmp_path):
    host = fresh("llama")
    artefact = errata.train(host, method="lime", cases=EXAMPLES, **{**QUICK, "mask_rate": 0.1})
    assert artefact.body["languages"] == ["a", "b"]
    scales = [tensor for name, tensor in artefact.tensors.items() if name.startswith("scales.")]
    assert scales and all((scale != 1).any(1).all() for scale in scales)  # every language has had edits
    file = artefact.save(tmp_path / "lime.safetensors")
    assert Artefact.load(file).digest == artefact.digest
    first, second = (
        errata.edit(host, replace(ADA, language=one), method="lime", editor=str(file)).parts() for one in "ab"
    )
    assert first.keys() == second.keys() and first
    assert any(not torch.equal(first[name], second[name]) for name in first)  # other masks, another edit
    with pytest.raises(ConfigError, match="trained on edits in a, b, found a request in de"):
        errata.edit(host, replace(ADA, language="de"), method="lime", editor=str(file))
    with pytest.raises(ConfigError, match=r"found a request in \(not told\)"):
        errata.edit(host, replace(ADA, language=None), method="lime", editor=str(file))


def test_a_weight_on_open_gates_closes_them(tmp_path):
    log = tmp_path / "log.jsonl"
    options = {
        **QUICK,
        "steps": 30,
        "every": 30,
        "mask_rate": 0.1,
        "decay": "none",
        "warmup": 0,
        "sparsity": 10.0,
    }
    errata.train(fresh("llama"), method="lime", cases=EXAMPLES, files=TrainingFiles(log=log), **options)
    shares = [line["open"] for line in map(json.loads, log.read_text().splitlines()) if "open" in line]
    assert len(shares) == 30 and shares[-1] < 0.5 * shares[0]


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    options = {**QUICK, "steps": 6, "mask_rate": 0.1}
    whole = errata.train(fresh("llama"), method="lime", cases=EXAMPLES, **options)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        errata.train(
            fresh("llama"),
            method="lime",
            cases=EXAMPLES,
            files=TrainingFiles(checkpoint),
            on_progress=stop,
            **options,
        )
    again = TrainingFiles(checkpoint, resume=True)
    resumed = errata.train(fresh("llama"), method="lime", cases=EXAMPLES, files=again, **options)
    assert resumed.digest == whole.digest


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="open_share: expected a share between 0 and 1"):
        errata.edit(fresh("llama"), ADA, method="lime", examples=EXAMPLES, open_share=1.0)
