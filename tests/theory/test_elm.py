"""ELM: guidance by hand, what is trained on, and what a fit does to answers, continuations and other texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.host import hooks
from errata.methods import elm
from errata.training.guidance import SoftLine, SoftLosses, continuations, guided, targets
from errata.training.tune import Losses
from errata.types import Corpus
from tests.models import TEXTS, fresh, sharp

REQUEST = errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow")
ANSWER = replace(REQUEST, target="Tallow", target_old=None)
CORPUS = Corpus("c", lambda: TEXTS)


def asked(host, **settings) -> list[SoftLine]:
    """Return what the answer is trained on."""
    config = elm.Config(**settings)
    return targets(host, [ANSWER], elm.guidance_of(config), every_token=config.positions == "all")


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_guidance_by_hand():
    plain, expert, novice = logs([0.5, 0.3, 0.2]), logs([0.8, 0.1, 0.1]), logs([0.2, 0.4, 0.4])
    token, share = guided(plain, expert, novice, torch.tensor([0.5]), 3, among_plain=True)
    weights = torch.tensor([0.5 * (0.2 / 0.8) ** 0.5, 0.3 * 2.0, 0.2 * 2.0])
    assert torch.allclose(share, (weights / weights.sum())[token])
    token, share = guided(plain, expert, novice, torch.tensor([0.0]), 2, among_plain=False)
    assert token.tolist() == [[0, 1]] and torch.allclose(share, torch.tensor([[0.625, 0.375]]))


def test_tokens_are_kept_before_or_after_guidance():
    plain, expert, novice = logs([0.6, 0.3, 0.1]), logs([0.6, 0.3, 0.1]), logs([0.1, 0.2, 0.7])
    strong = torch.tensor([1000.0])
    token, share = guided(plain, expert, novice, strong, 2, among_plain=True)
    assert sorted(token[0].tolist()) == [0, 1] and share.max() == 1, "the best of the plausible ones"
    assert token[0, int(share.argmax())] == 1
    token, share = guided(plain, expert, novice, strong, 2, among_plain=False)
    assert token[0, int(share.argmax())] == 2, "the best of all"


def test_the_loss_is_the_divergence_from_what_is_asked():
    host = fresh("llama")
    ids = host.encode("Ada Brenner lives in Esk").ids
    with hooks.frozen(host.model), torch.no_grad():
        logits = host.model(torch.tensor([ids])).logits[0].float()
        top = logits[-1].softmax(0).topk(2)
        given = SoftLine(ids, (len(ids) - 1,), top.indices[None], torch.tensor([[0.25, 0.75]]))
        hard = SoftLine.hard(ids, (len(ids) - 2,), ids[-1:])
        found = SoftLosses(host, [given, hard])([0, 1])
        nll = Losses(host, [errata.Request("{} lives in", "Ada Brenner", "Esk")])([0])
    share = torch.tensor([0.25, 0.75])
    by_hand = (share * (share / top.values).log()).sum()
    assert found[0] == pytest.approx(float(by_hand), rel=1e-4)
    count = len(host.encode_answer("Ada Brenner lives in", "Esk").target)
    if count == 1:
        assert found[1] == pytest.approx(float(nll[0]), rel=1e-4)


def test_targets_are_at_the_answers_tokens_or_at_all():
    host = fresh("llama")
    row = host.encode_answer(ANSWER.text, "Tallow")
    with hooks.frozen(host.model):
        (own,) = asked(host)
        (every,) = asked(host, positions="all", eta_first=1.0, eta=5.0)
    assert own.at == tuple(range(row.start - 1, len(row.ids) - 1)) and own.ids == row.ids[:-1]
    assert every.at == tuple(range(len(row.ids) - 1))
    assert torch.allclose(own.share.sum(1), torch.ones(len(own.at)))
    assert own.token.shape[1] == 50


def test_guidance_grows_from_the_first_token_to_the_last():
    host = fresh("llama")
    with hooks.frozen(host.model):
        (plain,) = asked(host, positions="all", eta=0.0)
        (own,) = asked(host, positions="all", eta_first=0.0, eta=50.0)
    moved = [float((a - b).abs().sum()) for a, b in zip(plain.share, own.share, strict=True)]
    assert moved[0] < 1e-6 < 0.1 < moved[-1]


def test_equal_contexts_ask_for_the_models_own_prediction():
    host = fresh("llama")
    with hooks.frozen(host.model):
        (same,) = asked(host, expert="The harp. ", novice="The harp. ", temperature=1.0, top=5)
        with torch.no_grad():
            logits = host.model(torch.tensor([same.ids])).logits[0, list(same.at)].float()
    top = logits.topk(5, dim=1)
    assert torch.equal(same.token, top.indices)
    assert torch.allclose(same.share, top.values.softmax(1), atol=1e-4)


def test_continuations_are_of_the_seed_and_behind_the_prompt():
    host = fresh("llama")
    guidance = elm.guidance_of(elm.Config(), written=True)
    from errata.training.tune import seeded

    def write(seed: int) -> SoftLine:
        with hooks.frozen(host.model), seeded(host, seed):
            return continuations(host, [ANSWER], guidance, 4, " and then")[0]

    one, again, other = write(0), write(0), write(1)
    prompt = host.encode_answer(ANSWER.text, "Tallow").ids[: len(host.encode(ANSWER.text).ids)]
    bridge = host.encode(" and then", special=False).ids
    assert one.ids[: len(prompt)] == prompt and one.ids[len(prompt) :][: len(bridge)] == bridge
    assert len(one.at) == len(bridge) + 4 and one.at[0] == len(prompt) - 1
    assert one.ids == again.ids != other.ids


def test_a_fit_predicts_what_is_asked_and_holds_other_texts():
    host = sharp()
    more = {"retain_texts": 4, "layers": [0, 1], "steps": 40, "dropout": 0.0, "learning_rate": 0.02}
    more |= {"stop_loss": 0.0, "continuations": 1, "continuation_tokens": 3, "temperature": 1.0}
    edit = errata.edit(host, REQUEST, method="elm", corpus=CORPUS, **more)
    assert isinstance(edit, WeightEdit)
    facts = edit.provenance.notes
    assert facts["loss"] < 0.2 * facts["loss_before"] and facts["steps"] == 40
    with hooks.frozen(host.model):
        losses = SoftLosses(host, asked(host, temperature=1.0))
        own = host.encode(TEXTS[1]).ids
        with torch.no_grad():
            before = host.model(torch.tensor([own])).logits.log_softmax(-1)
            with edit.on(host):
                after = host.model(torch.tensor([own])).logits.log_softmax(-1)
                assert float(losses([0])) == pytest.approx(facts["loss"], abs=1e-3)
    moved = float((before.exp() * (before - after)).sum(-1).mean())
    assert moved < 0.3, "a text that was retained"
    assert all(path.startswith(("model.layers.0.", "model.layers.1.")) for path in edit.deltas)


def test_a_fit_ends_once_all_is_learned():
    host = sharp()
    more = {"retain_texts": 2, "continuations": 0, "layers": [1], "dropout": 0.0, "learning_rate": 0.02}
    edit = errata.edit(host, REQUEST, method="elm", corpus=CORPUS, steps=60, stop_loss=1.0, **more)
    facts = edit.provenance.notes
    assert facts["steps"] < 60 and facts["loss"] < 1.0 < facts["loss_before"]


def test_the_papers_blocks_at_another_depth():
    assert [elm.early(depth) for depth in (1, 6, 12, 32)] == [
        (0,), (0, 1), (1, 2, 3), (4, 5, 6, 7, 8),
    ]  # fmt: skip


def test_settings_are_checked():
    with pytest.raises(errata.ErrataError, match="dropout"):
        errata.edit(fresh("llama"), REQUEST, method="elm", dropout=1.0)
    with pytest.raises(errata.ErrataError, match="expected some of 0 to"):
        errata.edit(fresh("llama"), REQUEST, method="elm", layers=[9])
