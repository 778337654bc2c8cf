"""Edits that steer: what each form does in a running model, where, on which rows, beside other edits."""

from __future__ import annotations

from typing import Any, cast, get_args

import pytest
import torch

import errata
from errata.edits import Edit, SteerEdit, WeightEdit
from errata.edits.edit import Provenance
from errata.edits.steer import Steering, Where
from errata.errors import EditError
from errata.host.host import Host
from errata.linalg import steering
from errata.linalg.lowrank import LowRank
from errata.types import ConceptRecord
from tests.models import fresh

D = 32
TEXTS = ("The old Ada waited for", "Esk", "Bruno Holner lives in Merrin and plays")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def payload(form: str, seed: int = 0, p: int = 1) -> dict[str, torch.Tensor]:
    plane = steering.orthonormal_rows(draw(2, D, seed=seed))
    tensors = {
        "vector": {"values": draw(p, D, seed=seed)}, "piecewise": {"values": draw(1, D, seed=seed)},
        "rank": {"left": draw(D, 3, seed=seed), "right": draw(3, D, seed=seed + 1), "bias": draw(3, seed=seed),
                 "drop": torch.ones(1)},
        "projection": {"basis": plane, "target": draw(2, seed=seed)},
        "rotation": {"plane": plane, "degrees": torch.tensor([50.0])},
        "angle": {"plane": plane, "degrees": torch.tensor([50.0])},
        "features": {"encoder": draw(2, D, seed=seed), "bias": draw(2, seed=seed), "threshold": torch.zeros(2),
                     "decoder": draw(2, D, seed=seed + 1), "target": torch.tensor([3.0, 1.0])},
    }  # fmt: skip
    return tensors[form]


FORMS = ("vector", "piecewise", "rank", "projection", "rotation", "angle", "features")


def record(host: Host, created: str = "2026-01-01T00:00:00+00:00") -> Provenance:
    return Provenance(
        "caa", (ConceptRecord("calm", {"positive": 1, "negative": 1}, "0" * 16),), {}, host.fingerprint,
        created=created,
    )  # fmt: skip


def steer(
    host: Host, form: Any = "vector", layer: int = 1, *, strength: float = 1.0, seed: int = 0, p: int = 1,
    created: str = "2026-01-01T00:00:00+00:00", **more,
) -> SteerEdit:  # fmt: skip
    site = Steering(host.layout.blocks[layer], form, payload(form, seed, p), **more)
    return SteerEdit((site,), record(host, created), strength)


def logits(host: Host, texts=TEXTS, ends: list[int] | None = None) -> torch.Tensor:
    rows = [host.encode(text).ids for text in texts]
    batch = host.batch(rows)
    row, at = batch.mask.nonzero().T
    with torch.no_grad():
        return host.forward_at(batch, row, at, ends=None if ends is None else torch.tensor(ends))


def states(host: Host, layer: int, text: str) -> torch.Tensor:
    """Return what a block gives, as an edit in place leaves it ``[length, d]``."""
    found = []
    handle = host.model.get_submodule(host.layout.blocks[layer]).register_forward_hook(
        lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        host.forward(host.batch([host.encode(text).ids]))
    handle.remove()
    return found[0][0]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_acts_as_its_formula_and_is_taken_off_exactly(form):
    host = fresh("llama")
    before, plain = states(host, 1, TEXTS[0]), logits(host)
    edit = steer(host, form, strength=0.7)
    expected = edit.sites[0].change(before, edit.sites[0].payload, 0.7, torch.arange(len(before)))
    with edit.on(host):
        torch.testing.assert_close(states(host, 1, TEXTS[0]), expected)
        assert not torch.allclose(logits(host), plain, atol=1e-3)
    assert torch.equal(logits(host), plain)
    with edit.with_strength(0.0).on(host):
        assert torch.equal(logits(host), plain), "no strength, no change, bit by bit"
    with steer(host, form, keep_norm=True).on(host):
        torch.testing.assert_close(states(host, 1, TEXTS[0]).norm(dim=1), before.norm(dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_and_loaded(form, tmp_path):
    host = fresh("llama")
    more = {"aligned": True} if form in ("rotation", "angle") else {}
    edit = steer(host, form, strength=1.5, positions="ends", count=2, keep_norm=True, **more)
    loaded = Edit.load(edit.save(tmp_path / "steer.safetensors"))
    assert isinstance(loaded, SteerEdit) and loaded.digest == edit.digest and loaded.strength == 1.5
    assert loaded.sites[0].description() == edit.sites[0].description()
    with edit.on(host):
        expected = logits(host)
    with loaded.on(host):
        assert torch.equal(logits(host), expected)
    assert edit.with_strength(1.0).digest != edit.digest
    assert edit.with_strength(1.0).provenance.parents == (edit.digest,)
    assert edit.summary()["strength"] == 1.5


@pytest.mark.parametrize(
    ("positions", "count", "expected"),
    [
        ("all", 1, [1, 1, 1, 1, 1, 1]), ("prompt", 1, [1, 1, 1, 1, 0, 0]), ("generated", 1, [0, 0, 0, 0, 1, 1]),
        ("after", 1, [0, 0, 0, 1, 1, 1]), ("last", 1, [0, 0, 0, 1, 0, 0]), ("first", 2, [1, 1, 0, 0, 0, 0]),
        ("first", 9, [1, 1, 1, 1, 0, 0]), ("ends", 1, [1, 0, 0, 1, 0, 0]), ("ends", 3, [1, 1, 1, 1, 0, 0]),
    ],
)  # fmt: skip
def test_where_it_acts(positions, count, expected):
    """A prompt of four tokens and two tokens of an answer."""
    host = fresh("llama")
    edit = steer(
        host, layer=2, positions=positions, count=count
    )  # the last block: no token sees another's change
    ids = host.encode(TEXTS[0]).ids[:6]
    batch = host.batch([ids])
    row, at, ends = torch.zeros(6, dtype=torch.long), torch.arange(6), torch.tensor([3])
    with torch.no_grad():
        before = host.forward_at(batch, row, at, ends=ends)
        with edit.on(host):
            after = host.forward_at(batch, row, at, ends=ends)
    assert [int(not torch.equal(a, b)) for a, b in zip(after, before, strict=True)] == expected


def test_a_vector_a_token_acts_by_its_index():
    host = fresh("llama")
    edit = steer(host, p=3, positions="first", count=3)
    before = states(host, 1, TEXTS[0])
    with edit.on(host):
        moved = states(host, 1, TEXTS[0]) - before
    torch.testing.assert_close(moved[:3], edit.sites[0].payload["values"], atol=1e-5, rtol=1e-5)
    assert not moved[3:].any()


@pytest.mark.parametrize(
    ("family", "positions"),
    [*(("llama", where) for where in get_args(Where)), ("gpt2", "generated"), ("gpt2", "ends")],
)
def test_rows_of_a_batch_answer_as_alone_with_a_cache_and_without(family, positions):
    host = fresh(family)
    several = {"p": 2} if positions == "first" else {}
    edit = steer(host, strength=3.0, positions=positions, count=2, **several)
    plain = host.generate(list(TEXTS), max_new_tokens=4, natural_stop=False)
    with edit.on(host):
        together = host.generate(list(TEXTS), max_new_tokens=4, natural_stop=False)
        alone = [host.generate(text, max_new_tokens=4, natural_stop=False) for text in TEXTS]
        assert together == alone
        assert positions == "first" or together != plain  # what a random model reads first matters little
        inputs = host.inputs(host.batch([host.encode_prompt(text) for text in TEXTS], side="left"))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": host.pad_id, "eos_token_id": []}
        uses = (True, False) if positions == "all" else (True,)  # else nothing tells prompt and answer apart
        for use in uses:
            got = host.model.generate(**inputs, use_cache=use, **options)[:, -4:].tolist()
            assert host.decode(got) == together


def test_generated_positions_leave_the_prompt_as_it_is():
    host = fresh("llama")
    plain = logits(host)
    with steer(host, strength=5.0, positions="generated").on(host):
        assert torch.equal(logits(host), plain)
        assert not torch.equal(logits(host, ends=[1, 0, 1]), plain)


def test_edit_sets_select_rows():
    host = fresh("llama")
    one, other = steer(host, seed=1), steer(host, seed=2)
    plain = host.generate(list(TEXTS[:1]), max_new_tokens=5, natural_stop=False)
    with one.on(host, rows="a"), other.on(host, rows="b"):
        got = host.generate([TEXTS[0]] * 3, max_new_tokens=5, natural_stop=False, sets=["a", "b", None])
    assert got[2:] == plain
    for edit, text in ((one, got[0]), (other, got[1])):
        with edit.on(host):
            assert host.generate(TEXTS[0], max_new_tokens=5, natural_stop=False) == text


def test_edits_compose_in_any_order_of_placing():
    """Of several at one module the oldest acts first; weights are changed below all of them."""
    host = fresh("llama")
    site = host.layout.site(1)
    delta = LowRank(0.3 * draw(site.d_out, 1, seed=5), draw(1, site.d_in, seed=6))
    weight = WeightEdit({site.parameter: delta}, frozenset(), record(host))
    first = steer(host, "projection", created="2026-01-01T00:00:00+00:00")
    second = steer(host, "vector", seed=3, created="2026-01-02T00:00:00+00:00")
    start, seen = logits(host), []
    for order in ((weight, first, second), (second, weight, first), (first, second, weight)):
        for one in order:
            one.apply_(host)
        seen.append(logits(host))
        for one in order:
            one.revert_(host)
        assert torch.equal(logits(host), start) and not host.placed
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    with weight.on(host):
        h = states(host, 1, TEXTS[0])
        want = steering.project(h, first.sites[0].payload["basis"], first.sites[0].payload["target"], 1.0)
        with first.on(host), second.on(host):
            torch.testing.assert_close(states(host, 1, TEXTS[0]), want + second.sites[0].payload["values"][0])


def test_vectors_add():
    host = fresh("llama")
    one, other = steer(host, seed=1), steer(host, seed=2)
    both = Steering(host.layout.blocks[1], "vector", {"values": sum(
        edit.sites[0].payload["values"] for edit in (one, other))})  # fmt: skip
    with one.on(host), other.on(host):
        got = logits(host)
    with SteerEdit((both,), record(host)).on(host):
        torch.testing.assert_close(got, logits(host), atol=1e-5, rtol=1e-5)
    with one.on(host), one.with_strength(-1.0).on(host):
        torch.testing.assert_close(logits(host), logits_of(host), atol=1e-5, rtol=1e-5)


def logits_of(host: Host) -> torch.Tensor:
    """Return the logits of an equal host on which nothing is in place."""
    return logits(fresh(host.family))


def test_sixteen_bit_states_are_changed_in_float32():
    host = fresh("llama")
    host.model.to(torch.bfloat16)
    edit = steer(host, "angle")
    plain = states(host, 1, TEXTS[0])
    with edit.on(host):
        got = states(host, 1, TEXTS[0])
    want = edit.sites[0].change(plain.float(), edit.sites[0].payload, 1.0, torch.zeros(0))
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def test_what_is_refused(tmp_path):
    host = fresh("llama")
    block, make = host.layout.blocks[1], cast("Any", Steering)
    for what, message in (
        (lambda: make(block, "bend", {}), "form 'bend', expected one of vector"),
        (lambda: make(block, "vector", payload("vector"), "never"), "positions 'never'"),
        (lambda: make(block, "vector", payload("projection")), "vector takes values"),
        (lambda: make(block, "rank", {**payload("rank"), "bias": draw(4)}), r"bias is \[4\], expected \[3\]"),
        (lambda: make(block, "projection", {"basis": draw(2, D), "target": draw(2)}), "not orthonormal"),
        (lambda: make(block, "vector", {"values": draw(2, D)}), "act at the first ones"),
        (lambda: make(block, "vector", payload("vector"), aligned=True), "aligned is of rotation"),
        (lambda: make(block, "vector", payload("vector"), count=0), "count: expected 1 or more"),
        (lambda: SteerEdit((), record(host)), "at least one site"),
        (lambda: steer(host, strength=float("nan")), "strength: expected a finite"),
        (lambda: SteerEdit((steer(host).sites[0],) * 2, record(host)), "steered twice"),
        (lambda: steer(host).apply_(host, merge=True), "changes no weights"),
    ):  # fmt: skip
        with pytest.raises(EditError, match=message):
            what()
    wide = Steering(block, "vector", {"values": draw(1, D + 1)})
    with pytest.raises(EditError, match="steered in 33 entries, and the host's states have 32"):
        SteerEdit((wide,), record(host)).apply_(host)
    with pytest.raises(EditError, match="no module 'nowhere'"):
        SteerEdit((Steering("nowhere", "vector", payload("vector")),), record(host)).apply_(host)
    bad = Steering(block, "vector", {"values": torch.full((1, D), float("inf"))})
    with pytest.raises(EditError, match="NaN or infinite"):
        SteerEdit((bad,), record(host)).apply_(host)
    with pytest.raises(EditError, match="for host"):
        steer(host).apply_(fresh("llama", seed=1))
    with pytest.raises(errata.ErrataError, match="no request would be left"):
        errata.retract(steer(host), 0)
