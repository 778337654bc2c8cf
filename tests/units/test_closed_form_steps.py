"""The shared steps of closed-form methods: what one hands to the next, and what is published for a model."""

from __future__ import annotations

import torch

import errata
from errata.edits import format as file_format
from errata.linalg.solve import CostMatrix
from errata.methods import _closed_form as closed_form
from errata.methods import memit
from errata.methods._closed_form import LayerStep
from errata.methods._method import Method, Shape, Workspace
from errata.methods._settings import SearchDefaults, fill_search_defaults
from errata.stats.collect import Corpus
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} lives in", "Bruno Holner", "Tallow")
TEXT = "Ada Brenner was born in Tallow, and the rain fell on the old road."


def step(host, columns: int = 3) -> LayerStep:
    site, draw = host.layout.site(1), torch.Generator().manual_seed(0)
    keys = torch.randn(site.d_in, columns, generator=draw)
    missing = torch.randn(site.d_out, columns, generator=draw)
    return LayerStep(site, 2, keys, missing, ((0, 3), (1,), (2,)))


def task(host, requests=(ADA, BRUNO), **options):
    config = closed_form.resolve_config(host, memit.Config(steps=2, layers=(0, 1), **options), {})
    corpus = Corpus("one text", lambda: [TEXT])
    return closed_form.start_task("memit", host, requests, config, Workspace(corpus=corpus, tokens=500))


def test_some_columns_of_a_layer_take_their_requests_along():
    host = fresh("gpt2")
    whole = step(host)
    some = whole.select(torch.tensor([True, False, True]))
    assert some.requests == ((0, 3), (2,))
    assert torch.equal(some.keys, whole.keys[:, [0, 2]])
    assert torch.equal(some.missing, whole.missing[:, [0, 2]])


def test_a_solution_leaves_preserved_keys_alone_and_serves_the_others():
    """With a negligible M every key gets its residual: the preserved ones none."""
    host = fresh("gpt2")
    whole, preserved = step(host), torch.randn(80, 5, generator=torch.Generator().manual_seed(1))
    both = whole.with_preserved(preserved)
    assert both.keys.shape[1] == 8 and both.requests == ((0, 3),) * 5 + whole.requests
    cost = CostMatrix.identity(1e-9)
    solution = closed_form.solve_layer(task(host), both, cost, both.missing / both.layers_left)
    torch.testing.assert_close(solution.delta @ whole.keys, whole.missing / 2, rtol=1e-4, atol=1e-4)
    assert float((solution.delta @ preserved).abs().max()) < 1e-4
    assert solution.record.is_exact_solution


def test_a_solution_that_was_reshaped_says_so():
    host = fresh("gpt2")
    whole = step(host)
    solution = closed_form.solve_layer(
        task(host, stabilise=("rect:0.5",)), whole, CostMatrix.identity(), whole.missing
    )
    assert not solution.record.is_exact_solution
    assert 0.4 < float((solution.delta == 0).double().mean()) < 0.6


def test_lower_layers_are_in_place_while_the_next_is_read_and_the_host_is_left_alone():
    host = fresh("gpt2")
    before, one = host.weights_hash(), task(host)
    problems = closed_form.make_problems(one)
    sweep = closed_form.LayerSweep(host, problems, 0)
    values = closed_form.find_target_values(one, problems)
    draft = closed_form.start_edit(one, values)
    seen = []
    for layer in closed_form.sweep_layers(one, sweep, values, draft):
        assert host.weights_hash() == before, "between layers the host is as it was"
        seen.append((layer.site.layer, layer.layers_left, float(layer.missing.norm())))
        draft.add(
            closed_form.solve_layer(one, layer, CostMatrix.identity(1e-6), layer.missing / layer.layers_left)
        )
    assert [(layer, left) for layer, left, _ in seen] == [(0, 2), (1, 1)]
    assert seen[1][2] != seen[0][2], "the second layer is measured with the first one's change in place"
    edit = draft.build()
    assert set(edit.deltas) == {site.parameter for site in one.sites} and host.weights_hash() == before


def test_a_task_starts_again_with_the_state_it_began_with():
    one = task(fresh("gpt2"))
    one.state["x"] = torch.ones(1)
    assert one.with_initial_state().state == {} and "x" in one.state


def test_the_more_precise_shape_is_preferred():
    host = fresh("gpt2")  # 3 blocks, 32 wide, 80 inside
    rows = {Shape("gpt2", 3, 32): {"layers": (0,)}, Shape("gpt2", 3, 32, 81): {"layers": (2,)}}

    def published(rows):
        return Method("m", "M", "", memit.Config, memit.fit, errata.Edit, True, True, published=rows)

    assert published(rows).published_for(host) == {"layers": (0,)}
    assert published({**rows, Shape("gpt2", 3, 32, 80): {"layers": (1,)}}).published_for(host) == {
        "layers": (1,)
    }
    assert published({Shape("llama", 3, 32): {"layers": (1,)}}).published_for(host) == {}


def test_open_search_settings_are_filled_and_named_ones_stay():
    config = fill_search_defaults(memit.Config(clamp=3.0), SearchDefaults(0.1, 0.75, "published"))
    assert (config.learning_rate, config.clamp, config.scale) == (0.1, 3.0, "published")


def test_records_are_stored_under_the_names_of_the_first_format(tmp_path):
    """Files of every version name them alike, whatever the code calls them."""
    host = fresh("gpt2")
    options = {"layers": [1], "steps": 2, "corpus": Corpus("one text", lambda: [TEXT]), "tokens": 500}
    edit = errata.edit(host, ADA, method="memit", **options)
    tensors, header = file_format.read(edit.save(tmp_path / "edit.safetensors"))
    name = host.layout.site(1).parameter
    assert set(header["records"][name]) == {"gamma", "metric", "requests", "solves", "price"}
    assert {f"{name}.record.{part}" for part in ("keys", "wanted", "solved")} <= set(tensors)
