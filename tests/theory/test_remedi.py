"""REMEDI: where its direction is added, what the map is trained to do, and what it is computed from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import errata
from errata.edits import memory_active
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.memory_active import name_end
from errata.edits.routers.always import Always
from errata.edits.routers.lexical import Lexical
from errata.errors import ConfigError, EditError
from errata.host import hooks
from errata.methods._method import Workspace
from errata.methods.remedi import METHOD, Config, _attributes, _example, _loss
from errata.writing import folded, names
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
TOWNS = ("Tallow", "Merrin", "Esk")
EXAMPLES = [
    errata.Case(f"e{i}", errata.Request("{} was born in", name, TOWNS[i % 3], TOWNS[(i + 1) % 3]), ())
    for i, name in enumerate(
        ("Ivo Marn", "Lena Ost", "Pia Holt", "Bruno Holner", "Carla Dorn", "Otto Vane") * 3
    )
]


def test_the_name_s_last_token_is_found_where_it_is_first_said_in_full():
    host = fresh("llama")
    tokens = host.tokenizer
    for text, phrase in (
        ("Ada Brenner was born in", "Ada Brenner"), ("Where was ada brenner born, Ada Brenner?", "Ada Brenner"),
        ("Adam and Ada", "Ada"), ("Ada", "Ada"),
    ):  # fmt: skip
        ids = list(host.encode(text).ids)
        at = name_end(tokens, ids, phrase)
        assert at is not None
        before, upto = (tokens.decode(ids[: at + n], skip_special_tokens=True) for n in (0, 1))
        assert upto.casefold().endswith(phrase.casefold()) and not before.casefold().endswith(
            phrase.casefold()
        )
    assert name_end(tokens, list(host.encode("Adam was born").ids), "Ada") is None
    assert name_end(tokens, [], "Ada") is None


class Counted:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, ids: list[int], **more: Any) -> str:
        self.tokens += len(ids)
        return self.tokenizer.decode(ids, **more)


def test_a_long_prompt_is_decoded_a_few_times_and_a_name_looked_for_once_in_a_pass(monkeypatch):
    host = fresh("llama")
    ids = list(host.encode("The rain fell on Adam. " * 40 + "Ada Brenner was born in").ids)
    counted = Counted(host.tokenizer)
    beginnings = [folded(host.tokenizer.decode(ids[: at + 1])) for at in range(len(ids))]
    first = next(at for at, text in enumerate(beginnings) if names(text, "ada brenner"))
    assert name_end(counted, ids, "Ada Brenner") == first
    assert counted.tokens < (2 + len(ids).bit_length()) * len(ids)

    calls: list[str] = []

    def once(tokenizer: Any, ids: Any, phrase: str) -> int | None:
        calls.append(phrase)
        return name_end(tokenizer, ids, phrase)

    monkeypatch.setattr(memory_active, "name_end", once)
    made = errata.edit(host, ADA, method="in_prompt").provenance
    zeros = {"values": torch.zeros(1, host.layout.width)}
    interventions = tuple(Intervention(block, "add", zeros, "subject") for block in host.layout.blocks[:2])
    with MemoryEdit(interventions, Lexical(("Ada Brenner",)), made).on(host):
        host.forward(host.batch([host.encode_prompt(ADA.text)]))
    assert calls == ["Ada Brenner"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_direction_is_added_at_the_subject_s_last_token_alone(family):
    host = fresh(family)
    direction = torch.randn(1, host.layout.width, generator=torch.Generator().manual_seed(0))
    block = host.layout.blocks[1]
    made = errata.edit(host, ADA, method="in_prompt").provenance
    edit = MemoryEdit(
        (Intervention(block, "add", {"values": direction}, "subject"),), Lexical(("Ada Brenner",)), made
    )
    texts = ["Tell me, Ada Brenner was born in", "Ada Brenner", "Bruno Holner was born in"]
    rows = [host.encode_prompt(text) for text in texts]
    outputs = []
    handle = host.model.get_submodule(block).register_forward_hook(
        lambda _, args, out: outputs.append(
            (out if isinstance(out, torch.Tensor) else out[0]).detach().clone()
        )
    )
    batch = host.batch(rows, side="left")
    host.forward(batch)
    with edit.on(host):
        host.forward(batch)
        texts_with = host.generate(texts[:1], max_new_tokens=4)
        assert texts_with == [host.generate(texts[0], max_new_tokens=4)]
    handle.remove()
    change = outputs[1] - outputs[0]
    for row, ids in enumerate(rows):
        at = name_end(host.tokenizer, ids, "Ada Brenner")
        expected = torch.zeros(len(ids), host.layout.width)
        if at is not None:
            expected[at] = direction[0]
        torch.testing.assert_close(change[row, -len(ids) :], expected, rtol=1e-4, atol=1e-5)


def test_a_router_without_names_has_no_subject_to_act_at():
    host = fresh("llama")
    made = errata.edit(host, ADA, method="in_prompt").provenance
    values = {"values": torch.zeros(1, host.layout.width)}
    with pytest.raises(EditError, match="knows no names"):
        MemoryEdit((Intervention(host.layout.blocks[0], "add", values, "subject"),), Always(), made)


def test_each_request_has_the_direction_of_its_target_s_state():
    host = fresh("llama")
    options = {"method": "remedi", "examples": EXAMPLES, "layer": 1, "epochs": 2}
    edit = errata.edit(host, ADA, **options)
    weight, bias = edit.state["weight"], edit.state["bias"]
    (state,) = _attributes(host, [ADA], 1)
    torch.testing.assert_close(edit.interventions[0].payload["values"][0], weight @ state + bias)
    both = errata.edit(host, errata.Request("{} was born in", "Nora Lind", "Esk"), after=edit, **options)
    assert both.router.phrases == ("Ada Brenner", "Nora Lind")
    assert torch.equal(both.state["weight"], weight)
    assert torch.equal(both.interventions[0].payload["values"][0], edit.interventions[0].payload["values"][0])


def test_the_map_learns_to_write_the_examples_targets():
    host = errata.load("lab")
    facts = [case.request for case in errata.lab.cases(24, seed=3)]
    cases = [errata.Case(f"e{i}", fact, ()) for i, fact in enumerate(facts)]
    config = Config(layer=0, epochs=30, held_out=0.0, kl_weight=0.0, per_step=8)
    edit = errata.edit(
        host,
        ADA,
        method="remedi",
        examples=cases,
        layer=0,
        epochs=30,
        held_out=0.0,
        kl_weight=0.0,
        per_step=8,
    )
    with hooks.frozen(host.model), torch.no_grad():
        states = _attributes(host, facts, 0)
        examples = [_example(host, fact, state) for fact, state in zip(facts, states, strict=True)]
        trained, nothing = (torch.nn.Linear(host.layout.width, host.layout.width) for _ in range(2))
        trained.weight.copy_(edit.state["weight"])
        trained.bias.copy_(edit.state["bias"])
        nothing.weight.zero_()
        nothing.bias.zero_()
        before, after = (float(_loss(host, one, examples, config)) for one in (nothing, trained))
    assert after < before / 4


def test_one_example_at_least_is_trained_on():
    """Whatever share is held out: an untrained map would add random directions."""
    options = {"method": "remedi", "examples": EXAMPLES[:2], "layer": 1, "epochs": 1, "seed": 0}
    one = errata.edit(fresh("llama"), ADA, held_out=0.9, **options)
    other = errata.edit(fresh("llama"), ADA, held_out=0.9, learning_rate=0.1, **options)
    assert one.provenance.notes["loss"] > 0
    assert not torch.equal(one.state["weight"], other.state["weight"])


def test_a_map_is_of_the_host_with_the_edits_in_place():
    host, work = fresh("llama"), Workspace(load_examples=lambda: EXAMPLES[:4])
    config = Config(layer=1, epochs=1)
    beside = errata.edit(host, ADA, method="ft", steps=2, learning_rate=0.1)
    alone = METHOD.fit(host, [ADA], config, work)
    with beside.on(host):
        other = METHOD.fit(host, [ADA], config, work)
    assert not torch.equal(alone.state["weight"], other.state["weight"])
    assert torch.equal(METHOD.fit(host, [ADA], config, work).state["weight"], alone.state["weight"])


def test_it_needs_examples():
    with pytest.raises(ConfigError, match="two examples"):
        errata.edit(fresh("llama"), ADA, method="remedi")
