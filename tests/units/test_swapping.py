"""Patching between two prompts, its approximation by gradients, and attention that is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from errata import lab
from errata.errors import HostError, RequestError
from errata.host import hooks
from errata.inspect import facts, knockout, swapping
from errata.inspect.knockout import REST, SELF, SETS, Cutter
from errata.inspect.swapping import Pair, Swapper, agreement
from errata.locate.patching import KINDS, Patch
from tests.models import fresh

PROMPT, NAME, OTHER = "The old Ada Brenner was born in", "Ada Brenner", "Tallow Merrin"


def pair_of(host) -> Pair:
    """Pair two prompts of one length, whatever the random model answers."""
    one, two = (facts.fact(host, f"The old {name} was born in", name) for name in (NAME, OTHER))
    assert len(one.ids) == len(two.ids) and one.place == two.place
    return Pair(one, two if two.answer != one.answer else facts.fact(host, two.text, OTHER, "harp"))


def linear_host():
    """Return a model whose logits are linear in its word embeddings: even attention, no norms, no feed-forward."""
    host = fresh("gpt2")
    model = host.model.transformer
    model.ln_f = nn.Identity()
    with torch.no_grad():
        model.wte.weight *= 20
        for block in model.h:
            block.attn.c_attn.weight *= 20
            block.attn.c_proj.weight *= 10
            block.ln_1 = nn.Identity()
            block.attn.c_attn.weight[:, :32] = (
                0  # all queries nothing: each token attends to all before it alike
            )
            block.attn.c_attn.bias[:32] = 0
            block.mlp.c_proj.weight.zero_()
    return host


@pytest.mark.parametrize("points", [1, 4])
def test_on_a_linear_model_gradients_are_exact(points):
    host = linear_host()
    one = pair_of(host)
    swapper = Swapper(host, len(one.clean.ids), KINDS)
    exact, guess = swapper.exact(one), swapper.attribute(one, points=points, rule="left")
    for kind in KINDS:
        assert torch.allclose(exact.effects[kind], guess.effects[kind], rtol=1e-3, atol=1e-4)
    assert exact.effects["hidden"].abs().max() > 1e-2 and exact.effects["attn"].abs().max() > 1e-3
    assert agreement([guess], [exact])["hidden"]["pearson"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_patching_a_run_with_itself_is_nothing_and_with_all_of_the_other_is_the_other(family):
    host = fresh(family)
    one = pair_of(host)
    swapper = Swapper(host, len(one.clean.ids))
    assert swapper.exact(Pair(one.clean, one.clean)).effects["hidden"].abs().max() < 1e-5
    found = swapper.exact(one)
    assert float(found.effects["hidden"][-1, -1]) == pytest.approx(found.clean - found.other, abs=1e-4)
    back = swapper.exact(one, direction="noise")  # the last state of the last layer is all that is read
    assert float(back.effects["hidden"][-1, -1]) == pytest.approx(found.clean - found.other, abs=1e-4)
    assert back.clean == pytest.approx(found.clean) and back.other == pytest.approx(found.other)
    share = found.normalised
    assert share is None or float(share["hidden"][-1, -1]) == pytest.approx(1, abs=1e-3)


def test_patches_at_different_tokens_commute():
    host = fresh("llama")
    one = pair_of(host)
    patcher = Swapper(host, len(one.clean.ids)).patcher
    clean, other = (patcher.record([side.ids]) for side in (one.clean, one.other))
    first, second = Patch("hidden", 0, (one.clean.place[0],)), Patch("attn", 1, (one.clean.place[1],))
    scores = patcher.run(other, clean, [(first, second), (second, first)], lambda logits: logits)
    assert torch.equal(scores[0], scores[1])


def test_more_points_come_closer_and_the_path_is_complete():
    host = fresh("llama")
    for block in host.model.model.layers:  # so that something bends
        block.mlp.down_proj.weight.data *= 30
    one = pair_of(host)
    swapper = Swapper(host, len(one.clean.ids))
    base, donor = swapper._runs(one, "denoise")
    inputs = []
    for points in (2, 64):
        slopes = {}
        path = swapping.path_points(points, "midpoint")
        embedding = host.model.get_input_embeddings()
        gap = (donor.embeddings - base.embeddings)[0]
        leaf = torch.zeros_like(base.embeddings.expand(points, -1, -1)).requires_grad_(True)
        with (
            torch.enable_grad(),
            hooks.on_output(
                embedding,
                lambda t, leaf=leaf, path=path, gap=gap: (
                    base.embeddings + path.float()[:, None, None] * gap + leaf
                ),
            ),
        ):
            logits = host.forward_at(
                base.batch.select(torch.zeros(points, dtype=torch.long)),
                torch.arange(points),
                torch.full((points,), base.length - 1),
            )
            (slope,) = torch.autograd.grad(one.read(logits).sum(), leaf)
        slopes = slope.mean(0)
        inputs.append(
            abs(float((slopes * gap).sum()) - float((one.read(donor.logits) - one.read(base.logits))[0, 0]))
        )
    assert inputs[1] < 1e-3 and inputs[1] <= inputs[0] + 1e-6


def test_only_the_chosen_cells_are_run():
    host = fresh("llama")
    one = pair_of(host)
    swapper = Swapper(host, len(one.clean.ids), KINDS)
    whole = swapper.exact(one)
    estimate, some = swapper.fast(one, share=0.1)
    every = sum(effect.numel() for effect in whole.effects.values())
    run = {kind: ~effect.isnan() for kind, effect in some.effects.items()}
    assert sum(int(mask.sum()) for mask in run.values()) == round(0.1 * every)
    for kind, mask in run.items():
        assert torch.allclose(some.effects[kind][mask], whole.effects[kind][mask], atol=1e-5)
        assert not estimate.effects[kind].isnan().any()
    assert some.to_dict()["maps"]["hidden"]["effect"][0].count(None) >= 1


def test_pairs_are_of_one_template_and_length():
    host = fresh("llama")
    with pytest.raises(RequestError, match="equally many tokens"):
        swapping.pair(host, PROMPT, NAME, "Zzyzx Qwfp-Ötzi of the North")
    known = [
        facts.fact(host, f"The old {name} was born in", name, answer)
        for name, answer in ((NAME, "Tallow"), (OTHER, "harp"), (NAME, "Tallow"))
    ]
    known.append(facts.fact(host, f"The old {NAME} lives in", NAME, "Merrin"))
    found = swapping.pairs(known)
    assert [(one.clean.subject, one.other.subject) for one in found] == [
        (NAME, OTHER),
        (OTHER, NAME),
        (NAME, OTHER),
    ]


def test_states_are_swapped_token_by_token_only(monkeypatch):
    """Of prompts of one length, in which the subject stands elsewhere, as where it shares a token with what follows."""
    host, plain = fresh("llama"), facts.facts
    assert swapping.pair(host, PROMPT, NAME, OTHER, answer="harp").clean.subject == NAME

    def shifted(*words, **options):
        clean, other = plain(*words, **options)
        return [clean, replace(other, place=(*other.place, other.place[-1] + 1))]

    monkeypatch.setattr(facts, "facts", shifted)
    with pytest.raises(RequestError, match="different tokens"):
        swapping.pair(host, PROMPT, NAME, OTHER, answer="harp")


def test_the_lab_s_estimates_agree_with_exact_effects():
    host = lab.load()
    world = lab.default_world()
    relation = (
        world.relations["born_in"] if "born_in" in world.relations else next(iter(world.relations.values()))
    )
    about = [fact for fact in world.facts if fact.relation == relation.name][:40]
    wording = relation.phrasings[0]
    from errata.lab.world import sentence
    from errata.types import Request

    requests = [Request(sentence(wording, "{}"), fact.subject, fact.object) for fact in about]
    known = [one for one in facts.facts(host, requests, answers=[r.target for r in requests]) if one.known]
    pairs = swapping.pairs(known)[:6]
    assert len(pairs) >= 6
    swapper = Swapper(host, max(len(one.clean.ids) for one in pairs))
    exact = [swapper.exact(one) for one in pairs]
    five = agreement([swapper.attribute(one) for one in pairs], exact)["hidden"]
    single = agreement([swapper.attribute(one, points=1, rule="left") for one in pairs], exact)["hidden"]
    assert five["pearson"] >= 0.9 > single["pearson"]


# --- attention knockout ---------------------------------------------------------------------


def cut_plainly(host, ids, keys):
    """Return logits at the end with attention from the last token to some keys cut in all layers, by a whole mask."""
    length = len(ids)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    mask[-1, list(keys)] = torch.finfo(torch.float32).min
    with torch.no_grad():
        positions = torch.arange(length)[None]
        return host.model(
            torch.tensor([ids]), attention_mask=mask[None, None], position_ids=positions
        ).logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_cutting_equals_a_mask_before_the_softmax(family):
    host = fresh(family)
    fact = facts.fact(host, PROMPT, NAME)
    cutter = Cutter(host, longest=len(fact.ids))
    sets = [fact.place, (0, 1), (len(fact.ids) - 1,), ()]
    found = cutter.probabilities(fact.ids, fact.answer, sets, range(3))
    for value, keys in zip(found, sets, strict=True):
        expected = cut_plainly(host, fact.ids, keys).softmax(-1)[fact.answer]
        assert float(value) == pytest.approx(float(expected), rel=1e-4)


def test_cutting_nothing_or_nowhere_changes_nothing():
    host = fresh("llama")
    fact = facts.fact(host, PROMPT, NAME)
    cutter = Cutter(host, longest=len(fact.ids))
    clean = cutter.fact(fact).clean
    assert float(cutter.probabilities(fact.ids, fact.answer, [()], range(1, 2))[0]) == pytest.approx(
        clean, rel=1e-5
    )
    nowhere = cutter.fact(fact, width=0)
    assert nowhere.change.abs().max() < 1e-5 and nowhere.change.shape == (len(SETS), 3)
    assert cutter.fact(fact, width=3).change.abs().max() > 1e-4


def test_with_all_other_keys_cut_the_last_token_is_alone():
    host = fresh("llama")
    one, two = (facts.fact(host, f"The old {name} was born in", name) for name in (NAME, OTHER))
    cutter = Cutter(host, longest=len(one.ids))
    keys = tuple(range(len(one.ids) - 1))
    alone = [cutter.probabilities(fact.ids, one.answer, [keys], range(3)) for fact in (one, two)]
    assert torch.allclose(*alone, rtol=1e-5)
    with pytest.raises(RequestError, match="all tokens"):
        cutter.probabilities(one.ids, one.answer, [range(len(one.ids))], range(3))


def test_sets_and_averages():
    host = fresh("llama")
    fact = facts.fact(host, PROMPT, NAME)
    sets = knockout.sets_of(fact)
    assert sorted(at for one in sets.values() for at in one) == list(range(len(fact.ids)))
    found = knockout.knockout(host, [fact, fact])
    document = knockout.averaged(found)
    assert document["sets"][SELF]["change"] == pytest.approx(found[0].change[2].tolist(), abs=1e-6)
    assert document["sets"][REST]["low"] == pytest.approx(document["sets"][REST]["high"], abs=1e-6)


def test_positions_that_are_counted_in_the_mask_are_refused():
    host = fresh("bloom")
    fact = facts.fact(host, PROMPT, NAME)
    with pytest.raises(HostError, match="attention mask"):
        knockout.knockout(host, [fact])
