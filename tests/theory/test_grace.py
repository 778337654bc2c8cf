"""GRACE's codebook: when an entry is added, widened or split, and that an edit is kept exactly where it acts."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.edits.memory import MemoryEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.radius import Radius
from errata.evaluation.observe import observe
from errata.methods.grace import BORDER, _Codebook
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
HARP = errata.Request("{} plays the", "Bruno", "harp")


def book(*entries: tuple[float, int]) -> _Codebook:
    """Enter keys on a line, each with a target; the radius of a new entry is 1."""
    made = _Codebook([], [], [], [], [])
    for number, (place, target) in enumerate(entries):
        made.assign(number, torch.tensor([place, 0.0]), (target,), 1.0, False)
    return made


def test_far_keys_are_added():
    made = book((0.0, 1), (2.5, 1), (-2.5, 2))
    assert made.radii == [1.0, 1.0, 1.0] and [e["action"] for e in made.log] == ["add"] * 3


def test_a_near_key_of_the_same_target_widens_the_entry():
    made = book((0.0, 1), (1.5, 1), (1.2, 1))
    assert len(made.keys) == 1 and made.radii == [1.5]
    assert [e["action"] for e in made.log] == ["add", "expand", "expand"]


def test_a_near_key_of_another_target_splits_the_distance():
    made = book((0.0, 1), (1.5, 2))
    assert made.radii == pytest.approx([0.75 - BORDER, 0.75]) and made.log[1]["radius"] == 1.0
    router = Radius(torch.stack(made.keys), torch.tensor(made.radii))
    asked = torch.tensor(
        [[0.0, 0.0], [0.74, 0.0], [0.76, 0.0], [1.5, 0.0], [2.2, 0.0], [2.3, 0.0], [-0.8, 0.0]]
    )
    decided = router.decide(Question(asked, asked, list))
    assert decided.tolist() == [0, 0, 1, 1, 1, NONE, NONE]


def test_the_bound_counts_both_radii():
    assert len(book((0.0, 1), (2.0, 1)).keys) == 1  # as far as its radius and a new one together
    assert len(book((0.0, 1), (2.001, 1)).keys) == 2


def test_targets_are_compared_token_by_token():
    """(1, 3) and (2, 2) have one mean."""
    made = _Codebook([], [], [], [], [])
    made.assign(0, torch.zeros(2), (1, 3), 1.0, False)
    made.assign(1, torch.tensor([0.5, 0.0]), (2, 2), 1.0, False)
    assert made.log[1]["action"] == "split"


def test_a_moving_average_moves_the_key_half_way():
    made = _Codebook([], [], [], [], [])
    made.assign(0, torch.zeros(2), (1,), 1.0, True)
    made.assign(1, torch.tensor([1.0, 0.0]), (1,), 1.0, True)
    assert made.keys[0].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("positions", ["last", "prompt", "all"])
def test_the_edited_prompt_says_its_target_and_others_what_they_said(family, positions):
    host = fresh(family)
    others = ["Bruno plays the", "Esk is", "Ada Brenner lives in"]
    before = host.generate(others, max_new_tokens=5)
    # a random model's inputs lie close together, so the radius is small
    edit = errata.edit(host, ADA, method="grace", radius=1e-3, layer=1, positions=positions, steps=150)
    assert isinstance(edit, MemoryEdit) and edit.entries == 1
    probe = [errata.Probe("efficacy", ADA.text, (ADA.target,), ())]
    unedited = sum(observe(host, probe)[0].answer_logprobs)
    with edit.on(host):
        text, after = host.generate(ADA.text, max_new_tokens=5), host.generate(others, max_new_tokens=5)
        edited = sum(observe(host, probe)[0].answer_logprobs)
    assert after == before and edited > unedited
    if (
        family != "gemma2"
    ):  # normalises what is replaced, so that one token of a small model cannot say all of it
        assert text.strip().startswith("Merrin")


def test_a_sequence_is_one_codebook_that_goes_on_to_the_same_bits(tmp_path):
    host = fresh("gpt2")
    settings = {"method": "grace", "radius": 1e-3, "layer": 1, "steps": 5}
    first = errata.edit(host, ADA, **settings)
    loaded = errata.Edit.load(first.save(tmp_path / "first.safetensors"))
    both = errata.edit(host, HARP, after=first, **settings)
    again = errata.edit(host, HARP, after=loaded, **settings)
    assert both.digest == again.digest and both.provenance.parents == (first.digest,)
    assert isinstance(both, MemoryEdit) and both.entries == 2
    assert both.provenance.requests == (ADA, HARP) and [e["request"] for e in both.log] == [0, 1]
    assert torch.equal(both.interventions[0].payload["values"][0], first.parts()["0.values"][0])
    assert not host.placed


def test_a_value_starts_cold_or_warm():
    host = fresh("llama")
    short = {"method": "grace", "layer": 1, "steps": 1, "learning_rate": 1e-12}
    cold = errata.edit(host, ADA, **short).parts()["0.values"][0]
    warm = errata.edit(host, ADA, start="warm", **short).parts()["0.values"][0]
    assert float(cold.min()) >= 0 and float(cold.max()) <= 1 and 0.3 < float(cold.mean()) < 0.7
    seen = []
    from errata.host import hooks

    with hooks.on_output(host.model.get_submodule(host.layout.site(1).name), lambda y: seen.append(y[0, -1])):
        host.forward(host.batch([host.encode_prompt(ADA.text)]))
    torch.testing.assert_close(warm, seen[0].detach().float(), atol=1e-5, rtol=1e-5)
