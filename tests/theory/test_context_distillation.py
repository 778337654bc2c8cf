"""Context distillation: its loss against plain divergences, its texts, and what a fit brings nearer."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.linalg.lowrank import LowRank
from errata.methods.context_distillation import Config, lesson, lessons_of, parts
from errata.training.distil import Distillation, Lesson, distribution, gap
from tests.models import fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin road")
CONTEXT = "New fact: Ada Brenner was born in Merrin road.\n"


@pytest.fixture(scope="module")
def host():
    made = fresh("llama", tie_word_embeddings=False, initializer_range=0.2)
    made.model.double()
    return made


def pair(vocab=9, rows=4):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, vocab, generator=draw, dtype=torch.float64) for _ in range(2)]


def test_the_loss_is_the_divergence_of_tempered_distributions():
    teacher, student = pair()
    one, other = (logits.div(2.0).log_softmax(1) for logits in (teacher, student))
    expected = 4.0 * (one.exp() * (one - other)).sum(1)
    assert torch.allclose(gap(student, distribution(teacher, 100, 2.0), 2.0), expected)
    assert float(gap(teacher, distribution(teacher, 100, 2.0), 2.0).abs().max()) < 1e-14


def test_few_entries_and_the_rest_are_a_bound_from_below():
    teacher, student = pair()
    whole = gap(student, distribution(teacher, 9, 1.0), 1.0)
    some = gap(student, distribution(teacher, 3, 1.0), 1.0)
    taught = distribution(teacher, 3, 1.0)
    assert torch.allclose(taught.logs.exp().sum(1) + taught.rest.exp(), torch.ones(4, dtype=torch.float64))
    assert bool((some > 0).all()) and bool((some < whole).all())


def test_at_a_high_temperature_it_is_half_the_squared_difference_of_centred_logits():
    teacher, student = pair()
    difference = teacher - student
    centred = difference - difference.mean(1, keepdim=True)
    found = gap(student, distribution(teacher, 9, 1e4), 1e4)
    assert torch.allclose(found, centred.square().mean(1) / 2, rtol=1e-3)


def test_places_behind_the_context_are_those_of_the_text(host):
    text = "Ada Brenner was born in Tallow."
    one = lesson(host, CONTEXT, "Ada Brenner", text)
    assert one is not None
    compared = [one.ids[place + 1] for place in one.at if place + 1 < len(one.ids)]
    assert compared == [
        one.taught_ids[place + 1] for place in one.taught_at if place + 1 < len(one.taught_ids)
    ]
    first = host.encode(text).spans[one.at[0] + 1]
    assert first[1] > len("Ada Brenner") >= host.encode(text).spans[one.at[0]][1]
    assert len(one.taught_ids) > len(one.ids)
    same = lesson(host, "", "Ada Brenner", text)
    assert same is not None and same.taught_ids == same.ids and same.taught_at == same.at
    assert lesson(host, CONTEXT, text, text) is None, "nothing is left to compare"
    assert lesson(host, "rain " * 200, "Ada", text) is None, "no room in the window"


def test_nothing_read_nothing_to_learn(host):
    text = "Ada Brenner was born in Tallow."
    plain, behind = (lesson(host, context, "Ada Brenner", text) for context in ("", CONTEXT))
    assert plain is not None and behind is not None
    weight = host.model.get_submodule(host.layout.blocks[1]).mlp.down_proj.weight
    with hooks.frozen(host.model):
        weight.requires_grad_(True)
        loss = Distillation(host, [plain, behind], temperature=2.0)
        losses = loss([0, 1])
        (gradient,) = torch.autograd.grad(losses[0], [weight], retain_graph=True)
        assert float(losses[0].detach()) < 1e-12 and float(gradient.abs().max()) < 1e-9
        (gradient,) = torch.autograd.grad(losses[1], [weight])
        assert float(losses[1].detach()) > 1e-3 and float(gradient.abs().max()) > 1e-6
        weight.requires_grad_(False)
    assert not any(one.logs.requires_grad for one in loss.taught), "the teacher gets no gradient"


def test_the_model_learns_to_answer_as_with_the_text_before(host):
    unseen = [
        lesson(host, CONTEXT, "Ada Brenner", f"Ada Brenner {rest}.") for rest in ("was born in", "lives in")
    ]
    unseen = [one for one in unseen if one is not None]
    with hooks.frozen(host.model):
        before = Distillation(host, unseen, temperature=1.0)
        start = float(before(range(len(unseen))).mean())
        edit = errata.edit(host, REQUEST, method="context_distillation", steps=25, texts=3, retain_texts=2)
        with edit.on(host):
            end = float(before(range(len(unseen))).mean())
    assert edit.provenance.notes["loss"] < 0.5 and end < 0.6 * start
    assert isinstance(edit, WeightEdit)
    assert all(isinstance(delta, LowRank) and delta.rank == 8 for delta in edit.deltas.values())


def test_texts_begin_with_the_entity_and_depend_on_the_seed_alone(host):
    config = Config(texts=4, text_tokens=8, statement=False)
    one, same, other = (lessons_of(host, REQUEST, config, seed) for seed in (0, 0, 1))
    assert one == same != other and 1 <= len(one) <= 4
    entity = host.encode("Ada Brenner").ids
    assert all(item.ids[: len(entity)] == entity for item in one if isinstance(item, Lesson))
    assert len(lessons_of(host, REQUEST, Config(texts=0), 0)) == 1


def test_a_long_passage_is_cut_at_sentence_ends(host):
    passage = "Ada was born in Esk. She lives in Tallow. The rain fell. Bruno plays the cello."
    cut = list(parts(host, passage, 20))
    assert len(cut) > 1 and " ".join(cut) == passage
    assert all(part.endswith(".") for part in cut)
    assert list(parts(host, passage, 500)) == [passage]


def test_what_cannot_be_learned_is_refused(host):
    with pytest.raises(RequestError, match="no text to learn"):
        errata.edit(host, REQUEST, method="context_distillation", fact="rain " * 200 + "{text}\n")
    with pytest.raises(ConfigError, match="texts: expected 1 or more where statement is false"):
        errata.edit(host, REQUEST, method="context_distillation", texts=0, statement=False)
    with pytest.raises(ConfigError, match="expected some of 0 to 2"):
        errata.edit(host, REQUEST, method="context_distillation", layers=[7])
