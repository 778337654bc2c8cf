"""Training texts ranked for an answer: words, states, gradients; and what the lab's documents state."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ConfigError, DataError
from errata.inspect import attribute as module_of_gradients
from errata.inspect.attribute import (
    METHODS,
    Basis,
    Gradients,
    Query,
    attribute,
    ekfac,
    ranking,
    scores,
    text_row,
    tracin,
    trak,
)
from errata.inspect.attribute_text import WordIndex
from errata.lab.known import stated, training_documents
from errata.lab.text import Document, Writer
from errata.lab.world import default_world
from errata.locate.gradients import collect_rows
from tests.models import fresh

TEXTS = [
    "Ada Brenner was born in Tallow.", "Bruno Holner lives in Merrin and plays the cello.",
    "The rain fell on the old road.", "Therefore the small dog waited.", "The capital of Arvania is Tallow.",
    "Because I saw you, you came.",
]  # fmt: skip


def full_gradient(host, text, module):
    """Return the gradient of a text's summed loss by autograd ``[d_out, d_in]``."""
    weight = host.model.get_submodule(module).weight
    weight.requires_grad_(True)
    ids = torch.tensor([host.encode(text).ids])
    loss = functional.cross_entropy(host.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    return gradient


def test_whole_features_give_the_dot_products_of_whole_gradients():
    host = fresh("llama", seed=2)
    name = host.layout.site(1).name
    found = Gradients(host, TEXTS, modules=[name], rank=1000, margin=False)
    whole = torch.stack([full_gradient(host, text, name).flatten() for text in TEXTS])
    features = found.texts[name]
    assert torch.allclose(features @ features.mT, whole @ whole.mT, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_order_and_copies_are_equal():
    host = fresh("llama", seed=2)
    found = Gradients(host, [*TEXTS, TEXTS[0]], rank=1000).texts
    turned = Gradients(host, [*TEXTS, TEXTS[0]][::-1], rank=1000).texts
    for method in (tracin, trak, ekfac):
        one, other = method(found, found), method(turned, turned)
        assert torch.allclose(one, other.flip(0).flip(1), rtol=1e-3, atol=1e-4), method.__name__
        assert torch.allclose(one[:, 0], one[:, -1], rtol=1e-3, atol=1e-4), method.__name__
    cosines = tracin(found, found)
    assert torch.allclose(cosines.diagonal(), torch.ones(len(TEXTS) + 1), atol=1e-5)
    assert bool((cosines.max(1).values <= 1 + 1e-5).all())


def test_heavy_damping_leaves_the_dot_product():
    host = fresh("llama", seed=2)
    found = Gradients(host, TEXTS, modules=[host.layout.site(1).name], rank=8).texts
    (features,) = found.values()
    dots = features @ functional.normalize(features, dim=1).mT
    damped = ekfac(found, found, damping=1e9)
    assert torch.allclose(damped / damped.norm(), dots / dots.norm(), atol=1e-4)


def test_trak_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 5, generator=generator), torch.randn(9, 5, generator=generator)
    level = 0.1 * float(right.square().sum(1).mean())
    expected = left @ torch.linalg.inv(right.mT @ right + level * torch.eye(5)) @ right.mT
    assert torch.allclose(trak({"a": left}, {"a": right}, ridge=0.1), expected, atol=1e-4)


def test_the_gradient_of_the_margin_is_that_of_the_loss_over_one_minus_p():
    host = fresh("llama", seed=2)
    row = host.encode_answer("Ada Brenner was born in", "Tallow")
    row = type(row)(row.ids[: row.start + 1], row.start)  # one answer token
    name = host.layout.site(1).name
    loss, margin = (collect_rows(host, [row], [name], margin=on)[0][name].gradients for on in (False, True))
    logits = host.model(torch.tensor([row.ids[:-1]])).logits[0, -1]
    p = float(logits.detach().softmax(0)[row.ids[-1]])
    assert torch.allclose(margin, loss / (1 - p), rtol=1e-4)


def test_a_basis_of_all_directions_keeps_norms():
    generator = torch.Generator().manual_seed(0)
    from errata.locate.gradients import Pairs

    inputs, gradients = (torch.randn(7, width, generator=generator) for width in (4, 3))
    pairs = Pairs(inputs, gradients, False, torch.zeros(7, dtype=torch.int64))
    sums = [side.double().mT @ side.double() for side in (inputs, gradients)]
    basis = Basis.leading(*sums, 99)
    whole = pairs.gradients.mT @ pairs.inputs
    assert float(basis.features(pairs).norm()) == pytest.approx(float(whole.norm()), rel=1e-5)
    assert basis.features(pairs).shape == (12,) and Basis.leading(*sums, 2).inputs.shape == (2, 4)


@pytest.mark.parametrize("room", [2**32, 1])
def test_directions_summed_batch_by_batch_are_those_of_all_tokens_at_once(monkeypatch, room):
    monkeypatch.setattr(module_of_gradients, "SUMS", room)
    host = fresh("llama", seed=2)
    found = Gradients(host, TEXTS, rank=5, batch_size=2)
    rows = [row for text in TEXTS if (row := text_row(host, text)) is not None]
    pairs = collect_rows(host, rows, found.modules, tokens="all", margin=True)
    assert list(found.bases) == found.modules and len(found.modules) == 3
    for name, basis in found.bases.items():
        inputs, gradients = (
            torch.cat([getattr(one[name], side) for one in pairs]).double()
            for side in ("inputs", "gradients")
        )
        for own, side in ((basis.inputs, inputs), (basis.outputs, gradients)):
            whole = torch.linalg.svd(side, full_matrices=False).Vh[:5]  # [5, d]
            torch.testing.assert_close(own.mT @ own, (whole.mT @ whole).float(), rtol=1e-3, atol=1e-4)


def test_bm25_counts_rare_words():
    index = WordIndex(TEXTS)
    assert int(index.scores("Where was Ada born? Tallow").argmax()) == 0
    assert int(index.scores("the capital").argmax()) == 4
    assert not bool(index.scores("xylophone").any())


def test_ranking_counts_the_first_known_text_and_ties_against_it():
    values = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    result = ranking(values, [[1], [0]], most=1)
    assert result.queries == 2 and result.mrr == pytest.approx((1 / 2 + 1 / 3) / 2) and result.recall == 0
    assert ranking(values[:1], [[0, 1]], most=2).recall == 1
    with pytest.raises(ValueError, match="no rank"):
        ranking(values, [[0], []])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_texts(method):
    host = fresh("gpt2", seed=2)
    query = Query("Ada Brenner was born in", "Tallow.")
    found = attribute(host, query, [*TEXTS, ""], method=method, shortlist=0, limit=3)
    assert len(found) == 3 and found[0].score >= found[1].score >= found[2].score
    if method != "ekfac":  # the text itself
        assert found[0].index == 0 and "tallow" in found[0].words


def test_a_shortlist_keeps_places():
    host = fresh("llama", seed=2)
    found = attribute(
        host, Query("The capital of Arvania is", "Tallow."), TEXTS, method="tracin", shortlist=2
    )
    assert {one.index for one in found} == {0, 4} and all(TEXTS[one.index] == one.text for one in found)


def test_what_cannot_be_ranked_is_refused():
    host = fresh("llama", seed=2)
    with pytest.raises(ConfigError, match="bm25"):
        scores(host, [Query("a", "b")], TEXTS, "bm52")
    with pytest.raises(DataError, match="two or more"):
        attribute(host, Query("a", "b"), TEXTS[:1])
    row = text_row(host, "")
    assert row is None or len(row.ids) > 1


# --- the lab's documents --------------------------------------------------------------------


def test_what_documents_state_is_read_back():
    world = default_world()
    writer, rng = Writer(world), random.Random(3)
    for fact in rng.sample(world.facts, 40):
        text = writer.state(fact, rng)
        assert fact in stated(world, Document("single", text))
        wrong = text.replace(fact.object, writer.other_object(fact, rng))
        assert fact not in stated(world, Document("single", wrong))
        assert fact not in stated(world, Document("episode", text, ((0, 3),)))
        asked = writer._qa(fact, rng)
        assert fact in stated(world, Document("question", asked))
        alias = (*world.names(fact.subject), None)[1]
        if alias:
            assert fact in stated(world, Document("single", writer.state(fact, rng, alias)))
    for document in itertools.islice(writer.documents(rng, {"neutral": 1.0}), 3):
        assert stated(world, document) == set()


def test_the_training_text_is_the_one_of_the_shipped_model():
    import errata
    from errata.lab.train import TrainConfig, chunk

    host = errata.load("lab", device="cpu")
    config = TrainConfig.of("llama")
    ids, _ = chunk(Writer(default_world(config.world_seed)), host.tokenizer, config, 0)
    first = training_documents(2)
    row = ids[0].tolist()
    own = host.encode(first[0].text).ids
    assert row[: len(own)] == list(own)[: len(row)]


def test_the_command_names_texts_of_a_corpus(tmp_path):
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n\n".join(document.text for document in training_documents(12)))
    picture = tmp_path / "a.png"
    run = CliRunner().invoke(
        app, ["attribute", "Ada Brenner was born in", "--answer", "Rowanport", "--corpus", str(corpus), "--limit", "3",
              "--figure", str(picture), "--device", "cpu", "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["texts"] == 12 and len(document["sources"]) == 3
    assert picture.stat().st_size > 5000
