"""CuQA: an expert for every set, the nearest stored question's expert acts, and earlier experts stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import errata
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError, EditError
from errata.training.slots import outputs_of
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
HARP = errata.Request("{} plays the", "Bruno Holner", "harp")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk")
OTHERS = ("The rain fell on the old", "Therefore the small dog", "Question: where")
STRICT = {"method": "cuqa", "threshold": 0.9999, "learning_rate": 3e-3}
"""A random model's mean states are all alike."""


def mean_state(host, module: str, prompt: str) -> torch.Tensor:
    return functional.normalize(outputs_of(host, module, [host.encode_prompt(prompt)])[0].mean(0), dim=0)


# --- vectors that lead to entries -----------------------------------------------------------


def test_the_nearest_vector_s_entry_acts_above_the_threshold():
    keys = functional.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    router = Similarity(keys, 0.95, blocks=torch.tensor([0, 1, 0, 1]))
    asked = functional.normalize(
        torch.tensor([[1.0, 0.1], [0.6, 0.7], [0.01, 1.0], [-1.0, 0.01], [0.8, 0.4]]), dim=1
    )
    question = Question(torch.zeros(5, 0), torch.zeros(5, 0), list, lambda: asked)
    assert router.decide(question).tolist() == [0, 1, 0, 1, NONE]
    scores = router.scores(question)
    assert scores.shape == (5, 2)
    cosines = asked @ keys.mT - 0.95
    torch.testing.assert_close(
        scores, torch.stack([cosines[:, [0, 2]].amax(1), cosines[:, [1, 3]].amax(1)], 1)
    )
    rest = router.without([0])
    assert rest.blocks.tolist() == [0, 0] and rest.decide(question).tolist() == [NONE, 0, NONE, 0, NONE]


def test_a_router_with_an_entry_for_each_vector_is_stored_as_before():
    plain = Similarity(torch.eye(2), 0.5)
    assert plain.facts() == {"threshold": 0.5, "encoder": None, "encoder_digest": ""}
    assert set(plain.tensors()) == {"keys"}
    restored = Similarity.restore(plain.tensors(), plain.facts())
    assert restored.blocks is None
    with pytest.raises(EditError, match="no blocks"):
        plain.without([0])


# --- the edit -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_set_s_questions_take_its_expert_and_other_prompts_none(family):
    host = fresh(family)
    before = host.generate(list(OTHERS), max_new_tokens=5)
    first = errata.edit(host, [ADA, HARP], **STRICT)
    both = errata.edit(host, CITY, after=first, **STRICT)
    assert isinstance(both, MemoryEdit) and both.entries == 2
    assert both.router.blocks.tolist() == [0, 0, 1] == both.state["owners"].tolist()
    with both.on(host):
        answers = host.generate([r.text for r in (ADA, HARP, CITY)], max_new_tokens=3)
        assert host.generate(list(OTHERS), max_new_tokens=5) == before
    assert [text.strip() for text in answers] != before
    for text, request in zip(answers, (ADA, HARP, CITY), strict=True):
        assert text.strip().startswith(request.target), request


def test_what_is_stored_is_the_mean_state_that_the_router_sees_in_any_batch():
    host = fresh("llama")
    edit = errata.edit(host, [ADA, HARP], steps=1, **STRICT)
    assert edit.reads == host.layout.blocks[0]
    expected = torch.stack([mean_state(host, edit.reads, request.text) for request in (ADA, HARP)])
    torch.testing.assert_close(edit.router.keys, expected)
    seen = []

    class Spy(Similarity):
        def decide(self, question):
            seen.append(question.vectors())
            return super().decide(question)

    spy = MemoryEdit(
        edit.interventions, Spy(edit.router.keys, 0.9, blocks=edit.router.blocks), edit.provenance, reads=edit.reads
    )  # fmt: skip
    prompts = [ADA.text, "Esk", HARP.text]
    own = torch.stack([mean_state(host, edit.reads, prompt) for prompt in prompts])
    with spy.on(host):
        for side in ("left", "right"):
            host.forward(host.batch([host.encode_prompt(prompt) for prompt in prompts], side=side))
        host.generate(prompts, max_new_tokens=3)
        host.generate_batch(
            host.batch([host.encode_prompt(p) for p in prompts], side="left"), max_new_tokens=2
        )
    assert len(seen) >= 4
    for vectors in seen:
        rows = own if len(vectors) == len(own) else own[[int((own @ vectors[0]).argmax())]]
        torch.testing.assert_close(vectors, rows, atol=1e-4, rtol=1e-4)


def test_earlier_experts_stay_as_they_are_and_ranks_may_differ():
    host = fresh("gpt2")
    first = errata.edit(host, ADA, steps=2, rank=2, **STRICT)
    both = errata.edit(host, HARP, steps=2, rank=5, after=first, **STRICT)
    for one, before in zip(both.interventions, first.interventions, strict=True):
        left, right = one.payload["left"][0], one.payload["right"][0]
        assert left.shape[1] == right.shape[0] == 5
        assert torch.equal(left[:, :2], before.payload["left"][0]) and not left[:, 2:].any()
        assert torch.equal(right[:2], before.payload["right"][0]) and not right[2:].any()
    with pytest.raises(ConfigError, match="use the same layers and maps"):
        errata.edit(host, HARP, steps=2, after=first, query_layer=1, **STRICT)


def test_rank_and_scale_follow_the_width_and_can_be_those_of_the_paper():
    host = fresh("llama")
    default = errata.edit(host, ADA, steps=1, **STRICT).provenance.config
    assert (default["rank"], default["alpha"]) == (8, 32.0)
    given = errata.edit(
        host, ADA, steps=1, rank=3, alpha=6.0, maps=["q_proj", "v_proj", "mlp"], layers=[2], **STRICT
    )  # fmt: skip
    assert [one.module.rpartition(".")[2] for one in given.interventions] == [
        "q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    assert all(one.payload["right"].shape[1] == 3 for one in given.interventions)
    with pytest.raises(ConfigError, match="layers above 1"):
        errata.edit(host, ADA, query_layer=1, layers=[1, 2], **STRICT)
    with pytest.raises(ConfigError, match="0 to 2"):
        errata.edit(host, ADA, layers=[1, 3], **STRICT)


def test_an_expert_is_dropped_with_its_set(tmp_path):
    host = fresh("llama")
    first = errata.edit(host, [ADA, HARP], **STRICT)
    both = errata.edit(host, CITY, after=first, **STRICT)
    with pytest.raises(EditError, match="share their blocks"):
        errata.retract(both, 1)
    rest = errata.Edit.load(errata.retract(both, [0, 1]).save(tmp_path / "rest.safetensors"))
    assert rest.provenance.requests == (CITY,) and rest.router.blocks.tolist() == [0]
    prompts = [ADA.text, CITY.text]
    plain = host.generate(prompts, max_new_tokens=3)
    with both.on(host):
        full = host.generate(prompts, max_new_tokens=3)
    with rest.on(host):
        assert host.generate(prompts, max_new_tokens=3) == [plain[0], full[1]]


def test_a_memory_takes_no_encoder_of_its_own():
    host = fresh("llama")
    edit = errata.edit(host, ADA, steps=1, **STRICT)
    router = Similarity(edit.router.keys, 0.5, "some-encoder", "abc", edit.router.blocks)
    with pytest.raises(EditError, match="leave the router's encoder out"):
        MemoryEdit(edit.interventions, router, edit.provenance, reads=edit.reads)
    assert isinstance(edit.interventions[0], Intervention)
