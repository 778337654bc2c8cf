"""The closed-form family on a float64 host against the equations of the papers."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import errata
from errata.errors import CollidingRequests, EditError
from errata.job import workspace
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, similar_pairs
from errata.locate import values
from errata.locate.contexts import Context
from errata.locate.keys import all_keys, subject_keys
from errata.locate.problems import value_problems
from errata.locate.sweep import LayerSweep
from errata.methods import _settings, memit_csk
from tests.models import FAMILIES, fresh

FAST = {"steps": 4, "tokens": 2000}
REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada"),
    errata.Request("{} lives in", "Bruno Holner", "Tallow", id="bruno"),
    errata.Request("The capital of {} is", "Arvania", "Esk", id="arvania"),
    errata.Request("The small dog of {} saw", "Merrin", "Ada", id="merrin"),
]
CONTEXTS = [
    Context("", 0.5),
    Context("The rain fell on. ", 0.25),
    Context("Therefore the dog waited. ", 0.25),
]


@pytest.fixture(scope="module")
def host():
    made = fresh("llama")
    made.model.double()
    return made


def fit(host, requests=REQUESTS, method="memit", **options):
    return errata.edit(host, requests, method=method, **{**FAST, **options})


def dense(edit, site):
    delta = edit.deltas[site.parameter]
    return (delta.dense() if isinstance(delta, LowRank) else delta).double()


def relative(one, other):
    return float((one - other).norm() / other.norm())


def moment(host, site, tokens=FAST["tokens"]):
    """C with its ridge, from the factor that the workspace gives."""
    factor = workspace(host, seed=0).costs(host, [site], tokens)[site].factor
    return factor @ factor.mT


# --- M of each method -------------------------------------------------------------------------


def test_emmet_with_weight_and_damping_is_memit_with_their_product(host):
    emmet = fit(host, method="emmet", layers=[1], cov_weight=50.0, damping=0.1)
    memit = fit(host, method="memit", layers=[1], cov_weight=5.0)
    site = host.layout.site(1)
    assert relative(dense(emmet, site), dense(memit, site)) < 1e-10


def test_emmet_for_one_request_is_exact(host):
    edit = fit(host, REQUESTS[:1], "emmet", layers=[1])
    record = edit.records[host.layout.site(1).parameter]
    assert relative(edit.deltas[host.layout.site(1).parameter] @ record.keys, record.target_changes) < 1e-9
    damped = fit(host, REQUESTS[:1], "emmet", layers=[1], damp_single=True)
    key = damped.records[host.layout.site(1).parameter]
    assert relative(damped.deltas[host.layout.site(1).parameter] @ key.keys, key.target_changes) > 1e-3


def test_alphaedit_is_the_published_formula_and_leaves_preserved_keys_alone(host):
    """Second batch of two: [P (K K^T + C_p) + L2 I] X = P K R^T, a system that is not symmetric."""
    site = host.layout.site(1)
    first = fit(host, REQUESTS[:2], "alphaedit", layers=[1], energy=0.9, ridge=3.0)
    both = fit(host, REQUESTS[2:], "alphaedit", layers=[1], energy=0.9, ridge=3.0, after=first)
    record = both.records[site.parameter]
    eigen, _ = workspace(host, seed=0).spectra(host, [site], FAST["tokens"])[site]
    free = int((eigen.values.clamp_min(0).cumsum(0) <= 0.1 * eigen.values.clamp_min(0).sum()).sum())
    small = eigen.values < eigen.values[free]
    assert 0 < int(small.sum()) < len(small)
    u = eigen.vectors[:, small]
    projection = u @ u.mT
    past, keys = record.keys[:, :2], record.keys[:, 2:]
    residual = record.target_changes[:, 2:] - dense(first, site) @ keys
    eye = torch.eye(len(small)).double()
    system = projection @ (keys @ keys.mT + past @ past.mT) + 3.0 * eye
    step = torch.linalg.solve(system, projection @ keys @ residual.mT).mT
    assert relative(dense(both, site) - dense(first, site), step) < 1e-9
    preserved = eigen.vectors[:, ~small]
    assert float((dense(both, site) @ preserved).norm() / dense(both, site).norm()) < 1e-10


def test_the_two_bases_of_a_null_space_agree(host):
    torch.manual_seed(0)
    samples = torch.randn(40, 12).double() * torch.linspace(0.01, 2, 12)
    values_, vectors = torch.linalg.eigh(samples.mT @ samples / 40)
    keys = torch.randn(12, 3).double()
    for free in (3, 9):
        cost = CostMatrix.within(values_, vectors, below=float(values_[free]), cost=2.0)
        assert cost.outside == (free > 6) and cost.basis.shape[1] == min(free, 12 - free)
        u = vectors[:, :free]
        torch.testing.assert_close(cost.solve(keys), u @ u.mT @ keys / 2.0)


def test_encore_prices_the_norm(host):
    site = host.layout.site(1)
    edit = fit(host, method="encore", layers=[1], cov_weight=5.0, penalty=0.5)
    record = edit.records[site.parameter]
    eigen, _ = workspace(host, seed=0).spectra(host, [site], FAST["tokens"])[site]
    price = 0.5 * 5.0 * float(eigen.values.clamp_min(0).mean())
    system = 5.0 * moment(host, site) + price * torch.eye(site.d_in).double() + record.keys @ record.keys.mT
    expected = torch.linalg.solve(system, record.keys @ record.target_changes.mT).mT
    assert relative(dense(edit, site), expected) < 1e-9


def test_pmet_gives_the_feed_forward_its_value(host):
    """With a negligible lambda the written layer says its target value, attention's share left out."""
    edit = fit(host, REQUESTS[:1], "pmet", layers=[1], cov_weight=1e-12)
    site = host.layout.site(1)
    record = edit.records[site.parameter]
    assert relative(edit.deltas[site.parameter] @ record.keys, record.target_changes) < 1e-6
    work = workspace(host, seed=0)
    config = edit.provenance.config
    contexts = work.contexts(host, [(config["contexts"], config["context_tokens"])], "half_bare")
    settings = _settings.search_config(dataclasses.replace(_config("pmet"), **config), relax=True)
    found = values.optimise(host, REQUESTS[:1], contexts, layer=1, where="attn_and_mlp", config=settings)[0]
    assert relative(record.target_changes[:, 0], found.shift) < 1e-6


def _config(name):
    return errata.methods.REGISTRY.get(name).config()


def test_a_residual_is_shared_by_the_layers_left(host):
    """MEMIT halves what is missing at the first of two layers, PMET takes it over the square root of two."""
    for name, share in (("memit", 2.0), ("pmet", 2.0**0.5)):
        one = fit(host, method=name, layers=[1])
        two = fit(host, method=name, layers=[0, 1])
        first, last = (host.layout.site(i).parameter for i in (0, 1))
        assert relative(two.records[first].target_changes * share, one.records[last].target_changes) < 1e-6


def test_nse_writes_chosen_neurons_only(host):
    site = host.layout.site(1)
    edit = fit(host, method="nse", layers=[1], share=0.5, passes=1, cov_weight=5.0)
    record = edit.records[site.parameter]
    size = record.keys.abs().sum(1)
    order = size.argsort(descending=True)
    count = int((size[order].cumsum(0) < 0.5 * size.sum()).sum())  # the one that crosses stays out
    chosen = order[:count].sort().values
    written = dense(edit, site).norm(dim=0) > 0
    assert set(written.nonzero()[:, 0].tolist()) == set(chosen.tolist()) and count < site.d_in
    k = record.keys[chosen]
    c = moment(host, site)[chosen][:, chosen]
    # delta (5 C + K K^T) = R K^T for the residuals R, which the record, made for later fits, does not keep
    product = dense(edit, site)[:, chosen] @ (5.0 * c + k @ k.mT)
    residuals = torch.linalg.solve(k.mT @ k, k.mT @ product.mT).mT
    assert relative(residuals @ k.mT, product) < 1e-8
    assert relative(dense(edit, site) @ record.keys, record.target_changes) < 1e-8
    again = fit(host, method="nse", layers=[1], share=0.5, passes=2, cov_weight=5.0, off=1e-6)
    assert relative(dense(again, site), dense(edit, site)) > 1e-6  # a second pass over what is still off


def test_lyaplock_refits_everything_at_its_price(host):
    site = host.layout.site(1)
    edit = None
    # a tiny budget makes the queue move
    for request in REQUESTS:
        edit = fit(host, [request], "lyaplock", layers=[1], cov_weight=5.0, alpha=0.5, after=edit)
        record = edit.records[site.parameter]
        system = 5.0 * record.cost_scale * moment(host, site) + record.keys @ record.keys.mT
        expected = torch.linalg.solve(system, record.keys @ record.target_changes.mT).mT
        assert relative(dense(edit, site), expected) < 1e-6
    assert record.cost_scale > 1.0
    assert edit.deltas[site.parameter].rank == len(REQUESTS)
    assert edit.provenance.requests == tuple(REQUESTS)


def test_lyaplock_with_an_ample_budget_is_memit_with_history(host):
    locked, plain = None, None
    same = {"clamp": 1.5, "cov_relative": 0.1}
    for request in REQUESTS:
        locked = fit(host, [request], "lyaplock", layers=[0, 1], alpha=1e9, after=locked, **same)
        plain = fit(host, [request], "memit", layers=[0, 1], history=True, after=plain, **same)
    for layer in (0, 1):
        site = host.layout.site(layer)
        assert relative(dense(locked, site), dense(plain, site)) < 1e-9


# --- sequences are one ridge regression ---------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [
    ("memit", {"history": True}), ("alphaedit", {"energy": 0.9}), ("encore", {}), ("lyaplock", {}),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_a_history_is_one_refit_and_any_edit_can_be_retracted(method, options, dtype, bound):
    host = fresh("llama")
    host.model.to(dtype)
    edit = None
    for request in REQUESTS:
        edit = fit(host, [request], method, layers=[0, 1], after=edit, **options)
    whole = errata.refit(edit)
    for name in edit.deltas:
        assert relative(whole.deltas[name].dense(), edit.deltas[name].dense()) <= bound
    # never made: solve for the others from their keys and wanted values by the m x m system
    for gone in range(len(REQUESTS)):
        left = errata.retract(edit, gone)
        assert [r.id for r in left.provenance.requests] == [r.id for i, r in enumerate(REQUESTS) if i != gone]
        keep = [i for i in range(len(REQUESTS)) if i != gone]
        for name, record in edit.records.items():
            never = dataclasses.replace(record.select(keep))
            gram = never.keys.double().mT @ (never.solved / never.cost_scale).double()
            eye = torch.eye(len(keep)).double()
            expected = never.target_changes.double() @ torch.linalg.solve(
                (gram + gram.mT) / 2 + eye, (never.solved / never.cost_scale).double().mT
            )
            assert relative(left.deltas[name].dense().double(), expected) <= bound


def test_retraction_in_any_order_is_the_same(host):
    edit = fit(host, method="alphaedit", layers=[0, 1], energy=0.9)
    one = errata.retract(errata.retract(edit, "ada"), "arvania")
    other = errata.retract(errata.retract(edit, "arvania"), "ada")
    together = errata.retract(edit, ["arvania", "ada"])
    for name in edit.deltas:
        assert relative(one.deltas[name].dense(), other.deltas[name].dense()) < 1e-10
        assert relative(one.deltas[name].dense(), together.deltas[name].dense()) < 1e-10


def test_refit_of_separate_edits_does_not_depend_on_order_and_equals_fitting_the_never_retracted(host):
    """Values found on the unedited host are absolute, so apart or together they give one solution."""
    parts = [fit(host, [request], layers=[1]) for request in REQUESTS]
    together = fit(host, REQUESTS, layers=[1])
    site = host.layout.site(1)
    joined = errata.refit(parts)
    assert relative(dense(joined, site), dense(together, site)) < 1e-6
    assert relative(dense(errata.refit(parts[::-1]), site), dense(joined, site)) < 1e-10
    without = errata.retract(together, "bruno")
    assert relative(dense(without, site), dense(errata.refit([parts[0], *parts[2:]]), site)) < 1e-6


def test_retraction_says_what_it_cannot_do(host, tmp_path):
    edit = fit(host, layers=[1])
    with pytest.raises(EditError, match="no request 'nobody'"):
        errata.retract(edit, "nobody")
    with pytest.raises(EditError, match="no request would be left"):
        errata.retract(edit, [0, 1, 2, 3])
    with pytest.raises(EditError, match="has no records of keys"):
        errata.retract(errata.edit(host, REQUESTS[:2], method="ft", steps=2), 0)
    with pytest.raises(EditError, match="modified after it was solved"):
        errata.refit(fit(host, layers=[1], stabilise=["rect"]))
    with pytest.raises(EditError, match="different cost matrices"):
        errata.refit([edit, fit(host, layers=[1], cov_weight=3.0)])
    loaded = errata.Edit.load(edit.save(tmp_path / "e.safetensors"))
    site = host.layout.site(1)
    assert relative(dense(errata.retract(loaded, 1), site), dense(errata.retract(edit, 1), site)) < 1e-12


def test_leverages_are_shares_of_ones_own_target(host):
    """The diagonal of the ridge regression's hat matrix, by moving one target and solving again."""
    edit = fit(host, layers=[1])
    record = edit.records[host.layout.site(1).parameter]
    for i, share in enumerate(errata.leverages(edit)):
        moved = record.target_changes.clone()
        moved[:, i] += 1.0
        shifted = dataclasses.replace(record, target_changes=moved).delta() @ record.keys[:, i : i + 1]
        effect = (shifted - record.delta() @ record.keys[:, i : i + 1]).mean()
        assert abs(float(effect) - share) < 1e-8 and 0 < share < 1


# --- same subjects, colliding keys ----------------------------------------------------------------


def test_requests_with_one_key_get_one_value(host):
    same = [
        errata.Request("{} was born in", "Ada Brenner", "Merrin"),
        errata.Request("{} lives in", "Ada Brenner", "Esk"),
        REQUESTS[1],
    ]
    merged = fit(host, same, layers=[1], steps=20)
    record = merged.records[host.layout.site(1).parameter]
    assert record.requests == ((0, 1), (2,)) and record.keys.shape[1] == 2
    with pytest.raises(EditError, match="share one target value"):
        errata.retract(merged, 0)
    assert len(errata.retract(merged, [0, 1]).provenance.requests) == 1

    def loss(edit):
        with edit.on(host):
            rows = [host.encode_answer(r.text, r.target) for r in same[:2]]
            with torch.no_grad():
                logits = host.forward(host.batch([a.ids for a in rows])).log_softmax(-1)
            return sum(-float(logits[i, a.start - 1, a.target[0]]) for i, a in enumerate(rows))

    with pytest.warns(CollidingRequests):
        apart = fit(host, same, layers=[1], steps=20, merge=False, cov_weight=1e-6)
    assert loss(fit(host, same, layers=[1], steps=20, cov_weight=1e-6)) < loss(apart)


def test_conflicting_requests_are_warned_of_before_fitting(host):
    clash = [REQUESTS[0], errata.Request("{} was born in", "Ada Brenner", "Esk")]
    with pytest.warns(CollidingRequests, match="nearly the same key"):
        fit(host, clash, layers=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(host, REQUESTS, layers=[1])


def test_whitened_keys_collide_only_where_the_cost_matrix_says_so():
    keys = torch.tensor([[1.0, 1.0], [0.0, 0.1]]).double()
    assert similar_pairs(keys, keys, 0.98) == [(0, 1)]
    cost = CostMatrix.of(torch.diag(torch.tensor([1.0, 1e-4])).double(), ridge=0.0)
    assert similar_pairs(keys, cost.solve(keys), 0.98) == []


# --- places, chunks -------------------------------------------------------------------------------


def test_memit_csk_finds_the_parts_of_a_statement(host):
    request = errata.Request("Some {} eats small apples:", "dog", "True")
    text = request.text
    for part, words in (("subject", "dog"), ("verb", "eats"), ("object", "small apples")):
        start, stop = memit_csk.part_span(request, part)
        assert text[start:stop] == words
    with pytest.raises(errata.ErrataError, match="after its subject"):
        memit_csk.part_span(errata.Request("the {}:", "dog", "True"), "verb")
    plain = fit(host, REQUESTS[:2], "memit", layers=[1])
    subject = fit(host, REQUESTS[:2], "memit_csk", layers=[1])
    verb = fit(host, REQUESTS[:2], "memit_csk", layers=[1], place="verb_last")
    site = host.layout.site(1)
    assert relative(dense(subject, site), dense(plain, site)) < 1e-12
    assert relative(dense(verb, site), dense(plain, site)) > 1e-2


LONG = errata.Request(
    "Tell me about {}.",
    "Arvania",
    "The capital of Arvania is Tallow and the small dog waited on the old road",
)


def test_anyedit_chunks_cover_the_answer_once(host):
    from errata.methods.anyedit import chunk_problems

    answer = host.encode_answer(LONG.text, LONG.target)
    problems, rounds = chunk_problems(host, [LONG], 5, 0)
    tokens = [token for problem in problems for token in problem.rows[0].targets]
    assert tokens == list(answer.target) and len(rounds) == len(problems) == -(-len(answer.target) // 5)
    for problem in problems:
        line = problem.rows[0]
        assert line.position == len(line.ids) - len(line.targets) or len(line.targets) == 1
        assert line.ids[line.position + 1 :] == line.targets[:-1]
    overlapping, _ = chunk_problems(host, [LONG], 5, 2)
    assert overlapping[1].rows[0].targets[:2] == problems[0].rows[0].targets[3:]


def test_anyedit_seeks_chunks_with_earlier_shifts_in_place_and_keeps_other_keys(host):
    edit = fit(host, [LONG], "anyedit", layers=[1], chunk=5, steps=15, cov_weight=1e-3)
    site = host.layout.site(1)
    record = edit.records[site.parameter]
    count = edit.provenance.notes["chunks"]
    kept, chunks = record.keys[:, :-count], record.keys[:, -count:]
    every = all_keys(host, [LONG], site)
    assert kept.shape[1] + count == len(every)
    assert float(record.target_changes[:, :-count].abs().max()) == 0.0
    delta = edit.deltas[site.parameter]
    moved, still = delta @ chunks, delta @ kept
    assert float(still.norm(dim=0).mean()) < 0.2 * float(moved.norm(dim=0).mean())

    def loss(edit):
        answer = host.encode_answer(LONG.text, LONG.target)
        with edit.on(host), torch.no_grad():
            logits = host.forward(host.batch([answer.ids])).log_softmax(-1)[0]
        return -float(sum(logits[answer.start - 1 + j, t] for j, t in enumerate(answer.target)))

    one = fit(host, [LONG], "anyedit", layers=[1], chunk=100, steps=15, cov_weight=1e-3)
    assert loss(edit) < loss(one)


# --- the search and the sweep ------------------------------------------------------------------------


SEARCH = values.ValueConfig(8, 0.5, 1.5, 0.5, 0.0625)


@pytest.fixture(scope="module")
def sure():
    """A host whose predictions can become certain: random heads are too small for that."""
    made = fresh("llama", tie_word_embeddings=False)
    made.model.double()
    with torch.no_grad():
        made.model.get_output_embeddings().weight.mul_(40.0)
    return made


ENDING = [  # a shift at the prompt's last token decides the next one, so searches succeed and stop
    errata.Request("I saw {}", "Ada Brenner", "Merrin"),
    errata.Request("Therefore the dog of {}", "Arvania", "Tallow"),
    errata.Request("The small road to {}", "Bruno Holner", "rain"),
]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("where", ["block_out", "mlp_out", "attn_and_mlp"])
def test_cached_search_equals_whole_rows(family, where, monkeypatch):
    host = fresh(family)
    host.model.double()
    fast = values.optimise(host, REQUESTS, CONTEXTS, layer=1, where=where, config=SEARCH)
    assert vars(host)["_prefix_trials"]["fixed"] is True
    monkeypatch.setattr(values, "can_reuse", lambda *_: False)
    plain = values.optimise(host, REQUESTS, CONTEXTS, layer=1, where=where, config=SEARCH)
    for one, other in zip(fast, plain, strict=True):
        assert one.steps == other.steps
        assert relative(one.shift, other.shift) < 1e-4
        assert abs(one.loss - other.loss) < 1e-6 * (1 + other.loss)


@pytest.mark.parametrize("stop", ["loss", "top"])
def test_batched_values_equal_serial_ones(sure, stop):
    settings = dataclasses.replace(SEARCH, stop=stop, steps=40, clamp=20.0, decay=0.0, stop_loss=1.0)
    problems = value_problems(sure, ENDING, CONTEXTS)
    together = values.find_values(sure, problems, layer=1, where="block_out", config=settings, batch_size=4)
    alone = values.find_values(sure, problems, layer=1, where="block_out", config=settings, batch_size=1)
    assert len({v.steps for v in alone}) > 1, "requests must stop at different steps for this to mean much"
    for one, other in zip(together, alone, strict=True):
        assert one.steps == other.steps and relative(one.shift, other.shift) < 1e-4


def test_batches_give_way_when_memory_runs_out(host):
    problems = value_problems(host, REQUESTS, CONTEXTS)
    plain = values.find_values(host, problems, layer=1, where="block_out", config=SEARCH, batch_size=4)
    seen = []

    def full(module, args):
        rows = args[0].shape[0]
        seen.append(rows)
        if rows > 2 * (len(CONTEXTS) + 1):
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    handle = host.model.get_input_embeddings().register_forward_pre_hook(full)
    try:
        small = values.find_values(host, problems, layer=1, where="block_out", config=SEARCH, batch_size=4)
    finally:
        handle.remove()
    assert max(seen) > 2 * (len(CONTEXTS) + 1)
    for one, other in zip(small, plain, strict=True):
        assert relative(one.shift, other.shift) < 1e-4
    handle = host.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: (_ for _ in ()).throw(torch.OutOfMemoryError("always"))
    )
    try:
        with pytest.raises(torch.OutOfMemoryError):
            values.find_values(host, problems, layer=1, where="block_out", config=SEARCH, batch_size=4)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_sweep_reads_the_keys_of_whole_passes_while_weights_change(family, monkeypatch):
    # eager attention takes its softmax in float32, whose rounding depends on the length of the row
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    host = fresh(family)
    host.model.double()
    sites = [host.layout.site(i) for i in range(3)]
    sweep = LayerSweep(host, value_problems(host, REQUESTS, CONTEXTS), 0)
    before = [p.detach().clone() for p in (host.model.get_parameter(s.parameter) for s in sites)]
    torch.manual_seed(1)
    for site in sites:
        full = subject_keys(host, REQUESTS, sites, CONTEXTS)
        bare = subject_keys(host, REQUESTS, sites, CONTEXTS[:1])
        torch.testing.assert_close(sweep.keys(site), full.keys[site], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sweep.block_outputs(2), bare.hidden[2], rtol=1e-9, atol=1e-9)
        weight = host.model.get_parameter(site.parameter)
        with torch.no_grad():
            weight.add_(0.1 * torch.randn_like(weight))
        if site.layer < 2:
            sweep.advance()
    for site, old in zip(sites, before, strict=True):
        with torch.no_grad():
            host.model.get_parameter(site.parameter).copy_(old)


def test_a_search_that_stops_at_the_first_choice_takes_fewer_steps(sure):
    settings = dataclasses.replace(SEARCH, steps=25, clamp=20.0)
    by_loss = values.optimise(sure, ENDING, CONTEXTS, layer=1, where="block_out", config=settings)
    by_top = values.optimise(
        sure, ENDING, CONTEXTS, layer=1, where="block_out", config=dataclasses.replace(settings, stop="top")
    )
    assert sum(v.steps for v in by_top) < sum(v.steps for v in by_loss)


def test_rows_of_like_length_are_grouped_and_few_join_others():
    from errata.locate.problems import group_by_length as grouped

    for lengths in ([3, 5], [1], [], [4, 4, 4, 2, 2, 9], list(range(20)), [7] * 5 + [6]):
        for least in (1, 2, 3, 50):
            groups = grouped(lengths, least)
            assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
            flat = [lengths[i] for g in groups for i in g]
            assert flat == sorted(flat, reverse=True)
            # only lengths with few rows share a group
            for g in groups:
                for length in {lengths[i] for i in g}:
                    assert len({lengths[i] for i in g}) == 1 or lengths.count(length) < least
    assert grouped([4, 2, 4, 2], 2) == [[0, 2], [1, 3]]
    assert grouped([4, 2, 3], 2) == [[0, 2], [1]]
