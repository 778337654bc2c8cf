"""MELO: how clusters grow, split and forget; points lead to blocks; prompts take the block of their requests."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers._router import NONE, Question, best_of_blocks
from errata.edits.routers.always import Always
from errata.edits.routers.clusters import Clusters
from errata.errors import ConfigError, EditError
from errata.host import hooks
from errata.locate.own import OwnText
from errata.methods._clusters import BORDER, ClusterDatabase
from errata.methods._method import Workspace
from errata.training.slots import outputs_of
from errata.training.tune import Losses
from errata.types import Corpus
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
HARP = errata.Request("{} plays the", "Bruno Holner", "harp")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk")
OTHERS = ("The rain fell on the old", "Therefore the small dog", "Carla sings in")


def database(*entries: tuple[float, int, int], radius: float = 1.0) -> ClusterDatabase:
    """Enter queries on a line, each with a target and a block."""
    made = ClusterDatabase()
    for number, (place, target, block) in enumerate(entries):
        made.enter(number, torch.tensor([place, 0.0]), (target,), block, radius)
    return made


def asked(router: Clusters, *places: float) -> list[int]:
    queries = torch.tensor([[place, 0.0] for place in places])
    question = Question(
        torch.zeros(len(places), 7), queries, list
    )  # the input is another width, and not read
    scores = router.scores(question)
    decided = router.decide(question)
    if scores.shape[1]:
        best = torch.where(scores.max(1).values > 0, scores.argmax(1), NONE)
        inside = scores.max(1).values != 0
        assert torch.equal(decided[inside], best[inside])
    return decided.tolist()


# --- the rules ------------------------------------------------------------------------------


def test_a_query_beyond_both_radii_begins_a_cluster():
    made = database((0.0, 1, 0), (2.001, 1, 0), (-2.001, 2, 1))
    assert [one.radius for one in made.clusters] == [1.0] * 3
    assert [entry["action"] for entry in made.log] == ["add"] * 3


def test_a_query_of_the_same_target_joins_and_the_cluster_reaches_all_its_points():
    made = database((0.0, 1, 0), (2.0, 1, 1), (3.0, 1, 2))
    (one,) = made.clusters
    assert float(one.centre[0]) == pytest.approx(5 / 3)
    assert one.radius == pytest.approx(5 / 3, rel=1e-3) and one.radius > 5 / 3
    assert asked(made.router(), 0.0, 2.0, 3.0, 0.9, 1.1, 3.4, -0.1) == [0, 1, 2, 0, 1, NONE, NONE]


def test_a_cluster_of_near_points_keeps_its_first_radius():
    made = database((0.0, 1, 0), (0.2, 1, 0))
    assert made.clusters[0].radius == 1.0


def test_a_query_of_another_target_splits_the_distance():
    made = database((-0.75, 1, 0), (0.75, 2, 1))
    old, new = made.clusters
    assert old.radius == pytest.approx(0.75 - BORDER) and new.radius == pytest.approx(0.75 + BORDER)
    assert made.log[1]["action"] == "split" and made.log[1]["radius"] == 1.0 and made.log[1]["forgotten"] == 0
    places = (-0.75, -0.01, 0.01, 0.75, 1.45, 1.55, -1.49, -1.51)
    assert asked(made.router(), *places) == [0, 0, 1, 1, 1, NONE, 0, NONE]


def test_points_outside_of_a_split_cluster_are_forgotten_and_a_hole_stays_where_none_remain():
    made = database((0.0, 1, 0), (2.0, 1, 1), (1.5, 2, 2))  # the centre is 1, at 0.5 from the third
    old, _ = made.clusters
    assert made.log[2]["forgotten"] == 2 and old.blocks == [NONE]
    assert torch.equal(old.points[0], old.centre)
    assert asked(made.router(), 1.0, 0.9, 1.5, 0.0) == [NONE, NONE, 2, NONE]
    some = database(
        (0.0, 1, 0), (0.4, 1, 1), (1.6, 2, 2), radius=1.2
    )  # the centre is 0.2, the split radius 0.7
    assert some.log[2]["forgotten"] == 0 and asked(some.router(), 0.0, 0.4, 1.6) == [0, 1, 2]


def test_the_same_query_with_another_target_takes_its_place():
    made = database((0.5, 1, 0), (0.5, 2, 1), (0.5, 2, 2))
    assert [entry["action"] for entry in made.log] == ["add", "replace", "join"]
    assert len(made.clusters) == 1 and asked(made.router(), 0.5, 1.4, 1.6)[2] == NONE
    assert asked(database((0.5, 1, 0), (0.5, 2, 1)).router(), 0.5, 1.4) == [1, 1]


def test_targets_are_compared_token_by_token():
    """(1, 3) and (2, 2) have one sum."""
    made = ClusterDatabase()
    made.enter(0, torch.zeros(2), (1, 3), 0, 1.0)
    made.enter(1, torch.tensor([0.5, 0.0]), (2, 2), 1, 1.0)
    assert made.log[1]["action"] == "split"


@pytest.mark.parametrize("seed", range(4))
def test_a_query_that_its_own_cluster_is_nearest_to_finds_its_own_block(seed):
    """Random queries of three targets, those that were not forgotten."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(60, 3, generator=generator)
    made = ClusterDatabase()
    for i, query in enumerate(queries):
        made.enter(i, query, (i % 3,), i, 0.3)
    router = made.router()
    decided = router.decide(Question(queries, queries, list))
    nearest = torch.cdist(queries, router.centres).argmin(1)
    owner = {int(block): int(owner) for block, owner in zip(router.blocks, router.owners, strict=True)}
    own = [i for i in range(60) if owner.get(i) == int(nearest[i])]
    assert len(own) > 30 and [int(decided[i]) for i in own] == own
    assert {entry["action"] for entry in made.log} == {"add", "join", "split"}


def test_scores_of_keys_become_scores_of_blocks():
    scores = torch.tensor([[1.0, 3.0, 2.0, 9.0], [4.0, 0.0, -1.0, 9.0]])
    best = best_of_blocks(scores, torch.tensor([1, 0, 1, NONE]))
    assert best.tolist() == [[3.0, 2.0], [0.0, 4.0]]
    assert best_of_blocks(torch.zeros(3, 0), torch.zeros(0, dtype=torch.int64)).shape == (3, 0)


# --- the edit -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_requests_take_their_blocks_and_other_prompts_none(family):
    host = fresh(family)
    before = host.generate(list(OTHERS), max_new_tokens=5)
    # a random model's states lie close together
    edit = errata.edit(host, [ADA, HARP, CITY], method="melo", per_block=2, radius=1e-3, steps=80)
    assert isinstance(edit, MemoryEdit) and edit.entries == 2
    assert edit.state["owners"].tolist() == [0, 0, 1]
    with edit.on(host):
        answers = host.generate([r.text for r in (ADA, HARP, CITY)], max_new_tokens=3)
        assert host.generate(list(OTHERS), max_new_tokens=5) == before
    assert [a.strip().startswith(r.target) for a, r in zip(answers, (ADA, HARP, CITY), strict=True)] == [
        True
    ] * 3


def test_a_model_that_does_not_tell_rows_apart_at_the_site_is_refused():
    with pytest.raises(ConfigError, match="tell rows apart"):
        errata.edit(fresh("opt"), ADA, method="melo", steps=1)


def test_a_block_s_change_is_alpha_over_rank_times_the_product():
    """The authors' (alpha / R) sqrt(R / r) B sqrt(R / r) A for R directions in all, R cancelling out."""
    host = fresh("llama")
    one, four = (
        errata.edit(host, ADA, method="melo", rank=2, alpha=alpha, steps=1, radius=1.0, learning_rate=rate)
        for alpha, rate in ((2.0, 1e-3), (8.0, 1e-3))
    )
    left, right = (one.parts()[f"0.{name}"] for name in ("left", "right"))
    # Adam's first step has the length of its rate whatever the scale, so that B is the same
    torch.testing.assert_close(four.parts()["0.left"], 4 * left, rtol=1e-3, atol=1e-7)
    assert left.shape[-1] == right.shape[-2] == 2
    many = 350 * 2
    a, b = right[0], left[0]
    published = (many / many) * ((many / 2) ** 0.5 * b) @ ((many / 2) ** 0.5 * a)
    torch.testing.assert_close(published, (many / 2) * b @ a)


def test_a_later_fit_leaves_earlier_blocks_as_they_are_and_enters_its_own(tmp_path):
    host = fresh("gpt2")
    options = {"method": "melo", "radius": 1e-3, "steps": 5}
    first = errata.edit(host, [ADA, HARP], **options)
    loaded = errata.Edit.load(first.save(tmp_path / "first.safetensors"))
    both = errata.edit(host, CITY, after=loaded, **options)
    assert both.entries == 2 and both.reads == first.reads and both.router.blocks.tolist() == [0, 0, 1]
    for i, one in enumerate(first.interventions):
        for name in ("left", "right"):
            assert torch.equal(both.interventions[i].payload[name][:1], one.payload[name])
    assert [entry["request"] for entry in both.log] == [0, 1, 2]
    with pytest.raises(ConfigError, match="use the same layers and maps"):
        errata.edit(host, CITY, after=first, maps=["mlp_out"], **options)
    with pytest.raises(ConfigError, match="layers above 1"):
        errata.edit(host, CITY, method="melo", query_layer=1, layers=[1, 2])


def test_the_radius_is_half_the_distance_to_what_the_model_writes():
    host = fresh("llama")
    corpus = [" ".join(OTHERS), "Ada Brenner was here."]
    edit = errata.edit(
        host, ADA, method="melo", near=0.0, steps=1,
        corpus=Corpus("two texts", lambda: corpus),
    )  # fmt: skip
    rows = [host.encode(text).ids[:32] for text in corpus]
    around = torch.cat(outputs_of(host, edit.reads, rows))
    query = outputs_of(host, edit.reads, [host.encode_prompt(ADA.text)])[0][-1]
    torch.testing.assert_close(edit.router.centres[0], query)
    assert float(edit.router.radii) == pytest.approx(float((around - query).norm(dim=1).min()) / 2, rel=1e-4)


def test_own_wordings_become_points_that_lead_to_the_same_block(monkeypatch):
    host, comes = fresh("gpt2"), errata.Request("{} comes from", "Ada Brenner", "Merrin")
    monkeypatch.setattr(Workspace, "own_texts", lambda *_: [OwnText(paraphrases=(comes,)), OwnText()])
    edit = errata.edit(host, [ADA, HARP], method="melo", paraphrases=1, radius=1e-3, steps=80, alpha=32.0)
    assert [entry["request"] for entry in edit.log] == [0, 0, 1] and edit.router.blocks.tolist() == [0, 0, 0]
    with edit.on(host):
        assert host.generate(comes.text, max_new_tokens=3).strip().startswith("Merrin")


# --- taking a block out ---------------------------------------------------------------------


def test_a_block_is_dropped_with_all_its_requests_and_never_in_part(tmp_path):
    host = fresh("llama")
    requests = [ADA, HARP, CITY, errata.Request("{} lives in", "Carla", "Esk")]
    edit = errata.edit(host, requests, method="melo", per_block=2, radius=1e-3, steps=80)
    with pytest.raises(EditError, match=r"requests 1, 2 \(counted from 1\) share their blocks"):
        errata.retract(edit, 0)
    with pytest.raises(EditError, match="no request would be left"):
        errata.retract(edit, [0, 1, 2, 3])
    rest = errata.retract(edit, [0, 1])
    assert rest.entries == 1 and rest.provenance.requests == tuple(requests[2:])
    assert rest.provenance.parents == (edit.digest,) and rest.state["owners"].tolist() == [0, 0]
    assert [entry["request"] for entry in rest.log] == [0, 1]
    prompts = [request.text for request in requests]
    plain = host.generate(prompts, max_new_tokens=4)
    with edit.on(host):
        full = host.generate(prompts, max_new_tokens=4)
    with errata.Edit.load(rest.save(tmp_path / "rest.safetensors")).on(host):
        assert host.generate(prompts, max_new_tokens=4) == [*plain[:2], *full[2:]]
    assert plain[:2] != full[:2]
    more = errata.edit(host, ADA, method="melo", after=rest, radius=1e-3, steps=5)
    assert more.router.blocks.tolist() == [0, 0, 1]


def test_the_command_line_drops_a_block(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, [ADA, HARP], method="melo", per_block=1, radius=1e-3, steps=1)
    path, out = edit.save(tmp_path / "e.safetensors"), tmp_path / "r.safetensors"
    result = CliRunner().invoke(app, ["retract", str(path), "-r", "2", "-o", str(out)])
    assert result.exit_code == 0 and "removed request 2" in result.output
    assert errata.Edit.load(out).provenance.requests == (ADA,)


def test_a_cluster_without_points_goes_with_its_block():
    made = database((0.0, 1, 0), (5.0, 2, 1), (10.0, 3, 2), (10.2, 3, 1))
    rest = made.router().without([1])
    assert rest.centres.shape[0] == 2 and rest.blocks.tolist() == [0, 1] and rest.owners.tolist() == [0, 1]
    assert asked(rest, 0.0, 5.0, 10.0) == [0, NONE, 1]
    split = database((0.0, 1, 0), (2.0, 1, 1), (1.5, 2, 2)).router()
    assert split.without([0, 1]).blocks.tolist() == [NONE, 0], "a hole that leads nowhere stays"


# --- a module that the router reads ---------------------------------------------------------


def test_the_router_reads_another_module_than_the_edit_acts_at():
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="melo", radius=1e-3, steps=5)
    assert edit.reads == host.layout.site(1).name and edit.body()["reads"] == edit.reads
    query = outputs_of(host, edit.reads, [host.encode_prompt(ADA.text)])[0][-1]
    torch.testing.assert_close(edit.router.points[0], query)
    with pytest.raises(EditError, match="which the router reads"):
        MemoryEdit(edit.interventions, edit.router, edit.provenance, reads="nowhere").apply_(host)
    with pytest.raises(EditError, match="leads to entry 0, found 0"):
        empty = [
            Intervention(one.module, "lowrank", {n: t[:0] for n, t in one.payload.items()})
            for one in edit.interventions
        ]
        MemoryEdit(tuple(empty), edit.router, edit.provenance, reads=edit.reads)
    late = MemoryEdit(edit.interventions, edit.router, edit.provenance, reads="lm_head")
    with late.on(host), pytest.raises(EditError, match="ran before lm_head"):
        host.generate(ADA.text, max_new_tokens=1)
    upside_down = MemoryEdit(edit.interventions[::-1], Always(), edit.provenance)
    with upside_down.on(host), pytest.raises(EditError, match="ran before the module of the edit's first"):
        host.generate(ADA.text, max_new_tokens=1)
    plain = MemoryEdit(edit.interventions, Always(), edit.provenance)
    assert "reads" not in plain.body() and "reads" not in plain.summary()


@pytest.mark.parametrize("method", ["melo", "grace"])
def test_a_fit_above_a_memory_trains_beside_what_it_decided_below(method):
    """Its lowest blocks are run once: the decision taken there holds in the passes that leave them out."""
    host = fresh("llama")
    options = {"melo": {"radius": 1e-3, "steps": 40}, "grace": {"radius": 1e-3, "layer": 1, "steps": 40}}[
        method
    ]
    below = errata.edit(host, ADA, method=method, **options)
    with below.on(host), hooks.frozen(host.model), torch.no_grad():
        whole, cut = (float(Losses(host, [ADA], depth=depth)([0])) for depth in (0, 2))
    with hooks.frozen(host.model), torch.no_grad():
        without = float(Losses(host, [ADA], depth=2)([0]))
    assert cut == pytest.approx(whole, rel=1e-5) and abs(cut - without) > 0.1
