"""Memory edits: each row of any batch says what it says alone, whatever the cache, the padding and the loop."""

from __future__ import annotations

import copy
from math import cos, sin

import pytest
import torch

import errata
from errata.edits import Provenance
from errata.edits.memory import PARTS, Intervention, MemoryEdit
from errata.edits.routers._router import Question
from errata.edits.routers.always import Always
from errata.edits.routers.cosine import Cosine
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.radius import Radius
from errata.errors import EditError
from errata.evaluation.observe import observe
from errata.host import hooks
from errata.host.generate import draw_rows, generate_rows, sample_rows
from errata.types import AskOptions
from tests.models import fresh

IN = ["Ada Brenner was born in", "Bruno", "Merrin is", "Ada Brenner lives in the town of"]
OUT = ["Esk was born in", "harp", "Ada plays the", "The town of Merrin is known for the"]
MIXED = [text for pair in zip(IN, OUT, strict=True) for text in pair]
FAMILIES = ["gpt2", "llama", "gemma2"]


def keys_of(host, module, prompts) -> torch.Tensor:
    rows = []
    for prompt in prompts:
        with hooks.on_input(
            host.model.get_submodule(module), lambda x: rows.append(x[0, -1].float().clone())
        ):
            host.forward(host.batch([host.encode_prompt(prompt)]))
    return torch.stack(rows)


def payload(site, operation: str, entries: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    into, out = site.d_in, site.d_out
    shapes = {
        "add": {"values": (entries, out)},
        "replace": {"values": (entries, out)},
        "lowrank": {"left": (entries, out, 2), "right": (entries, 2, into)},
        "slots": {"keys": (entries, 3, into), "biases": (entries, 3), "values": (entries, 3, out)},
        "dense": {"changes": (entries, out, into)},
        "swap": {"weights": (entries, out, into)},
        "affine": {"weights": (entries, out, into), "biases": (entries, out)},
        "erase": {"left": (entries, out, 2), "right": (entries, 2, out), "mean": (entries, out)},
    }[operation]
    return {name: 2 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def make(host, operation="replace", positions="last", prompts=IN, layer=1, seed=0) -> MemoryEdit:
    site = host.layout.site(layer)
    keys = keys_of(host, site.name, prompts)
    return MemoryEdit(
        (Intervention(site.name, operation, payload(site, operation, len(prompts), seed), positions),),
        Radius(keys, torch.full((len(prompts),), 1e-3)),
        Provenance("test", (errata.Request("{} is", "Ada", "Esk"),), {}, host.fingerprint),
    )


def logits(host, prompts) -> list[torch.Tensor]:
    with torch.no_grad():
        return [host.forward(host.batch([host.encode_prompt(p)]))[0, -1] for p in prompts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "operation", sorted(set(PARTS) - {"attend", "side"})
)  # theirs: test_pluglm, test_k_adapter
def test_it_acts_in_scope_and_nowhere_else(family, operation):
    host = fresh(family)
    edit, start = make(host, operation), host.weights_hash()
    before = logits(host, MIXED)
    with edit.on(host) as placement:
        after = logits(host, MIXED)
        assert host.placed == (edit.digest,) == (placement.digest,) and not host.shareable
        assert host.weights_hash() == start
    for i, (one, two) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, two) == (i % 2 == 1), MIXED[i]
    assert all(torch.equal(a, b) for a, b in zip(before, logits(host, MIXED), strict=True))
    assert not host.placed and host.shareable
    assert not host.model._forward_hooks and not host.model._forward_pre_hooks
    assert not any(module._forward_hooks for module in host.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["last", "prompt", "after", "all"])
def test_a_row_of_a_batch_is_what_it_is_alone(family, positions):
    host = fresh(family)
    edit = make(host, positions=positions)
    rows = [host.encode_prompt(prompt) for prompt in MIXED]
    plain = generate_rows(host, rows, 8, "end")
    with edit.on(host):
        alone = [generate_rows(host, [row], 8, "end")[0] for row in rows]
        together = generate_rows(host, rows, 8, "end")
        drawn = draw_rows(host, rows, 20, top_k=4, seed=3)
        drawn_alone = [draw_rows(host, [row], 20, top_k=4, seed=3)[0] for row in rows]
    assert together == alone and drawn == drawn_alone
    assert [a != b for a, b in zip(plain, together, strict=True)].count(True) >= 2
    assert [a == b for a, b in zip(plain, together, strict=True)][1::2] == [True] * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_own_loop_keeps_the_decision_of_the_prompt(family, cached, beams):
    """Past the host, as a server calls the model: left-padded, greedy and with beams."""
    host = fresh(family)
    edit = make(host, positions="last")
    batch = host.batch([host.encode_prompt(p) for p in MIXED], side="left")
    length = batch.ids.shape[1]
    given = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": host.pad_id}

    def said(ids, mask):
        return host.model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, **given)[:, length:]

    plain = said(batch.ids, batch.mask)
    with edit.on(host):
        together = said(batch.ids, batch.mask)
        alone = []
        for prompt in MIXED:
            one = host.batch([host.encode_prompt(prompt)])
            new = host.model.generate(input_ids=one.ids, attention_mask=one.mask, use_cache=cached, **given)
            alone.append(new[0, one.ids.shape[1] :])
    if cached:
        for row, single in zip(together, alone, strict=True):
            width = min(len(row), len(single))
            assert torch.equal(row[:width], single[:width])
    assert torch.equal(together[1::2], plain[1::2]) and not torch.equal(together[::2], plain[::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_stand_behind_the_decision_of_their_own_prompt(family):
    """Prompts that begin one another share no decision, and answers that begin one another do share one."""
    host = fresh(family)
    prompts = ["Ada Brenner", "Ada Brenner was born in", "Ada Brenner was born in the town of"]
    edit = make(host, prompts=prompts[1:2], positions="after")
    probes = [
        errata.Probe("efficacy", prompt, (answer,), ("Esk",), "Esk")
        for prompt in prompts
        for answer in ("Merrin", "Merrin harp", "the town of Merrin")
    ]
    with edit.on(host):
        together = observe(host, probes, AskOptions(max_new_tokens=4))
        alone = [observe(host, [probe], AskOptions(max_new_tokens=4))[0] for probe in probes]
        for probe, one in zip(probes, alone, strict=True):
            answer = host.encode_answer(probe.prompt, probe.answers[0])
            ends = torch.tensor([answer.start - 1])
            at = torch.arange(answer.start - 1, len(answer.ids) - 1)
            spread = host.forward_at(
                host.batch([answer.ids[:-1]]), torch.zeros_like(at), at, ends=ends
            ).log_softmax(-1)
            plain = spread.gather(1, torch.tensor(answer.target)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.answer_logprobs), plain, atol=1e-4, rtol=1e-4)
    for one, two in zip(together, alone, strict=True):
        assert one.text == two.text
        torch.testing.assert_close(
            torch.tensor(one.answer_logprobs), torch.tensor(two.answer_logprobs), atol=1e-4, rtol=1e-4
        )


def test_weights_edits_and_memories_compose_in_any_order():
    host = fresh("llama")
    memory = make(host)
    change = errata.edit(
        host, errata.Request("{} was born in", "Ada Brenner", "Merrin"), method="ft", steps=2, layers=[1]
    )
    results = []
    for order in ((memory, change), (change, memory)):
        for merge in (True, False):
            first, second = (one.on(host, merge=merge if one is change else None) for one in order)
            with first, second:
                assert host.placed == tuple(sorted((memory.digest, change.digest)))
                results.append(torch.stack(logits(host, MIXED)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-4, rtol=1e-4)
    assert host.placed == ()


def test_it_is_saved_loaded_and_refused_where_it_cannot_be(tmp_path):
    host = fresh("gpt2")
    edit = make(host, "lowrank", "prompt")
    loaded = errata.Edit.load(edit.save(tmp_path / "m.safetensors"))
    assert isinstance(loaded, MemoryEdit) and loaded.digest == edit.digest
    assert loaded.summary() == edit.summary() and loaded.size == edit.size > 0
    with edit.on(host):
        want = logits(host, MIXED)
    with loaded.on(host):
        assert all(torch.equal(a, b) for a, b in zip(want, logits(host, MIXED), strict=True))
        with pytest.raises(EditError, match="active on this host already"):
            loaded.apply_(host)
    with pytest.raises(EditError, match="not active"):
        loaded.revert_(host)
    with pytest.raises(EditError, match="cannot be merged"):
        edit.apply_(host, merge=True)
    with pytest.raises(EditError, match="edit made for host"):
        edit.apply_(fresh("gpt2", seed=9))
    with pytest.raises(EditError, match="operation 'times'"):
        Intervention("x", "times", {"values": torch.zeros(1, 2)})  # type: ignore[arg-type]
    with pytest.raises(EditError, match="takes left, right"):
        Intervention("x", "lowrank", {"values": torch.zeros(1, 2)})
    assert host.placed == ()


def test_a_copy_of_the_model_has_a_copy_of_the_edit():
    host = fresh("gpt2")
    edit = make(host)
    with edit.on(host):
        want = logits(host, MIXED)
        twin = errata.load(copy.deepcopy(host.model), tokenizer=host.tokenizer)
    got = logits(twin, MIXED)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    edit.revert_(twin, outside="refuse")
    assert not twin.placed and not torch.equal(torch.stack(logits(twin, IN)), torch.stack(want[::2]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_lexical_router_reads_the_prompt(family):
    host = fresh(family)
    site = host.layout.site(1)
    edit = MemoryEdit(
        (Intervention(site.name, "add", payload(site, "add", 2), "last"),),
        Lexical(("Ada Brenner", "Merrin")),
        Provenance("test", (), {}, host.fingerprint),
    )
    prompts = ["ada brenner lives in", "Ada plays the", "Merrin is", "Esk was born in"]
    before = logits(host, prompts)
    rows = [host.encode_prompt(p) for p in prompts]
    with edit.on(host):
        after = logits(host, prompts)
        together = generate_rows(host, rows, 5, "end")
        assert together == [generate_rows(host, [row], 5, "end")[0] for row in rows]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False, True]


def test_an_edit_on_all_prompts_needs_no_key():
    host = fresh("llama")
    site = host.layout.site(0)
    edit = MemoryEdit(
        (Intervention(site.name, "add", payload(site, "add", 1), "all"),),
        Always(),
        Provenance("test", (), {}, host.fingerprint),
    )
    before = logits(host, MIXED)
    with edit.on(host):
        assert not any(torch.equal(a, b) for a, b in zip(before, logits(host, MIXED), strict=True))
        texts = sample_rows(host, [host.encode_prompt(p) for p in IN], 4, top_k=None, seed=0)
    assert len(texts) == len(IN)


def _rows(*angles: float) -> Question:
    inputs = torch.stack([torch.tensor([cos(a), sin(a)]) for a in angles])
    return Question(inputs, torch.zeros(len(angles), 1), lambda: [""] * len(angles))


def test_a_calibrated_threshold_accepts_the_share_out_of_scope_that_it_may():
    router = Cosine(torch.tensor([[1.0, 0.0]]))
    out_of_scope = _rows(0.5, 0.7, 0.9, 1.1)
    for most_false, bound in ((0.0, 0.5), (0.25, 0.7), (0.5, 0.9), (1.0, 1.1)):
        calibrated, costs = router.calibrate(_rows(0.1, 0.6), out_of_scope, most_false=most_false)
        assert calibrated.threshold == costs.threshold == pytest.approx(cos(bound), abs=1e-6)
        accepted = [int(entry) for entry in calibrated.decide(out_of_scope)].count(0) / 4
        assert accepted == costs.accepted_out_of_scope == min(most_false, 0.75)
        assert costs.accepted_in_scope == (0.5 if bound == 0.5 else 1.0)
    assert router.threshold == 0.5  # frozen


def test_what_cannot_be_calibrated_is_refused():
    router, rows = Cosine(torch.tensor([[1.0, 0.0]])), _rows(0.1)
    nobody = Question(torch.zeros(0, 2), torch.zeros(0, 1), list)
    for questions in ((rows, nobody), (nobody, rows)):
        with pytest.raises(ValueError, match="one out of scope"):
            router.calibrate(*questions)
    with pytest.raises(ValueError, match="one entry"):
        Cosine(torch.zeros(0, 2)).calibrate(rows, rows)
    with pytest.raises(ValueError, match="no threshold"):
        Radius(torch.zeros(1, 2), torch.ones(1)).calibrate(rows, rows)
