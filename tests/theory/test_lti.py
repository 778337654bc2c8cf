"""LTI's constraints on a float64 host against plain forward passes with the fact in the context."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import errata
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.prefix import PrefixRunner
from errata.locate import values
from errata.locate.contexts import Context
from errata.locate.inference import Inference, divergence, informed, teach
from errata.locate.problems import value_problems
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin road"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
]
CONTEXTS = [Context("", 0.5), Context("The rain fell on. ", 0.5)]
FACTS = [
    "Imagine that Ada Brenner was born in Merrin road.\n",
    "Imagine that the capital of Arvania is Esk.\n",
]
PLAIN = values.ValueConfig(4, 0.5, 1.5, 0.5, 0.0)
WEIGHTS = Inference(2, 0.7, 0.3)


@pytest.fixture(scope="module")
def host():
    made = fresh("llama", tie_word_embeddings=False, initializer_range=0.2)
    made.model.double()
    return made


def searching(host, facts=FACTS, weights=WEIGHTS, where: values.Where = "block_out"):
    problems = informed(host, REQUESTS, value_problems(host, REQUESTS, CONTEXTS), CONTEXTS, facts)
    config = dataclasses.replace(PLAIN, inference=weights)
    return problems, values._Search(host, problems, 1, where, config, True)


def plain_row(host, ids, shift, at, layer=1):
    """Logits of a row and what its token at a place says after block 2, a shift added there after a block."""
    captured = []

    def push(hidden):
        moved = hidden.clone()
        moved[0, at] += shift
        return moved

    blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
    with hooks.on_output(blocks[layer], push), hooks.on_output(blocks[2], captured.append), torch.no_grad():
        logits = host.forward(host.batch([ids]))[0]
    model = host.model
    read = model.get_output_embeddings()(model.model.norm(captured[0][0, at]))
    return logits.log_softmax(-1), read.log_softmax(-1)


@pytest.mark.parametrize("direction", ["edited", "unedited"])
def test_terms_are_those_of_whole_passes(host, direction):
    weights = dataclasses.replace(WEIGHTS, direction=direction)
    problems, search = searching(host, weights=weights)
    shift = torch.randn(2, host.layout.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), hooks.frozen(host.model):
        found = search._forward(search.groups, [shift])[2]
    for i, problem in enumerate(problems):
        expected = 0.0
        for row in problem.rows:
            edited, state = plain_row(host, row.ids, shift[i], row.position)
            assert row.informed is not None and row.informed.ids != row.ids
            taught, read = plain_row(host, row.informed.ids, torch.zeros(1), row.informed.position)
            count = len(row.targets)
            outputs = divergence(edited[-count:], taught[-count:], direction).mean()
            subject = divergence(state[None], read[None], direction)[0]
            expected += row.loss_weight * float(weights.output * outputs + weights.subject * subject)
        assert float(found[i]) == pytest.approx(expected, rel=1e-9) and expected > 1e-3


def test_nothing_stated_nothing_to_learn(host):
    _, search = searching(host, facts=["", ""])
    shift = torch.zeros(2, host.layout.width, dtype=torch.float64, requires_grad=True)
    with hooks.frozen(host.model):
        inferred = search._forward(search.groups, [shift])[2]
    (gradient,) = torch.autograd.grad(inferred.sum(), [shift])
    assert float(inferred.detach().abs().max()) < 1e-12 and float(gradient.abs().max()) < 1e-9


def test_the_teacher_does_not_depend_on_padding(host):
    problems, _ = searching(host)
    rows = [row for problem in problems for row in problem.rows]
    assert len({len(row.informed.ids) for row in rows if row.informed is not None}) > 1
    one, other = (teach(PrefixRunner(host), rows, WEIGHTS, side=side) for side in ("right", "left"))
    for name in ("subject", "output"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-9)


@pytest.mark.parametrize("where", ["block_out", "mlp_out"])
def test_without_weight_it_is_the_plain_search(host, where):
    problems, _ = searching(host, where=where)
    settings = dataclasses.replace(PLAIN, inference=Inference(2, 0.0, 0.0))
    plain = values.find_values(host, problems, layer=1, where=where, config=PLAIN)
    off = values.find_values(host, problems, layer=1, where=where, config=settings)
    held = dataclasses.replace(PLAIN, inference=WEIGHTS)
    on = values.find_values(host, problems, layer=1, where=where, config=held)
    for one, two, three in zip(plain, off, on, strict=True):
        assert torch.equal(one.shift, two.shift) and not torch.allclose(one.shift, three.shift, atol=1e-3)


def test_divergence_of_a_distribution_with_itself_is_zero_both_ways():
    logs = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1)
    other = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1)
    for direction in ("edited", "unedited"):
        assert float(divergence(logs, logs, direction).abs().max()) < 1e-14
    reverse = torch.nn.functional.kl_div(logs, other, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence(logs, other, "unedited"), reverse)
    assert torch.allclose(divergence(other, logs, "edited"), reverse)


def test_stopped_problems_leave_with_their_teachers(host):
    problems, search = searching(host)
    keep = torch.tensor([False, True])
    shift = torch.zeros(2, host.layout.width, dtype=torch.float64)
    with torch.no_grad(), hooks.frozen(host.model):
        whole = search._forward(search.groups, [shift])[2]
        part = search._forward([group.select(keep) for group in search.groups], [shift])[2]
    assert float(part[0]) == 0.0 and float(part[1]) == pytest.approx(float(whole[1]), rel=1e-9)
    assert len(problems) == 2


def test_what_cannot_be_held_is_refused(host):
    with pytest.raises(ConfigError, match="subject_layer 1: expected a layer above the edited layer 1"):
        errata.edit(host, REQUESTS, method="lti", layers=[1], subject_layer=1, tokens=400)
    with pytest.raises(RequestError, match="longer than the model's window"):
        errata.edit(host, REQUESTS[:1], method="lti", fact="rain " * 140 + "{text}\n", tokens=400)
    with pytest.raises(ConfigError, match=r"expected \{text\} in it"):
        errata.edit(host, REQUESTS[:1], method="lti", fact="Imagine that.\n")


def test_one_request_is_fitted_exactly_and_several_at_all_layers(host):
    one = errata.edit(host, REQUESTS[:1], method="lti", steps=3, tokens=400)
    assert isinstance(one, WeightEdit) and len(one.deltas) == 1
    several = errata.edit(host, REQUESTS, method="lti", steps=3, tokens=400, layers=[0, 1])
    assert isinstance(several, WeightEdit) and len(several.deltas) == 2
    settings = one.provenance.config
    assert (settings["subject_layer"], settings["target_weight"]) == (2, 0.125)
