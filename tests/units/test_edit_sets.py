"""Several sets of edits in one batch: every row says what it says with its own set alone in place."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.errors import ConfigError, EditError
from tests.contract.test_methods import EXAMPLES
from tests.models import fresh
from tests.units.test_edits import make as weights
from tests.units.test_memory import make as memory

PROMPTS = ["Ada Brenner was born in", "Bruno", "Esk was born in", "Merrin is"]
FAMILIES = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}}


def ike(host, target: str):
    request = errata.Request("{} was born in", "Ada Brenner", target)
    return errata.edit(host, request, method="ike", examples=EXAMPLES, demonstrations=2)


def pairs(host) -> dict:
    return {
        "weight": (weights(host, 1, scale=3.0), weights(host, 2, scale=3.0)),
        "memory": (memory(host, prompts=PROMPTS, seed=1), memory(host, prompts=PROMPTS, seed=2)),
        "prompt": (ike(host, "Merrin"), ike(host, "Esk")),
    }


def say(host, prompts, **more) -> list[str]:
    return host.generate(prompts, max_new_tokens=6, natural_stop=False, **more)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", ["weight", "memory", "prompt"])
def test_each_half_of_a_batch_is_as_with_its_own_set_alone(family, kind):
    host = fresh(family, **FAMILIES[family])
    first, second = pairs(host)[kind]
    plain = say(host, PROMPTS)
    alone = []
    for edit in (first, second):
        with edit.on(host, merge=False if kind == "weight" else None):
            alone.append(say(host, PROMPTS))
    assert alone[0] != alone[1] and plain not in alone
    with first.on(host, rows="one") as a, second.on(host, rows="two") as b:
        assert (a.rows, b.rows) == ("one", "two") and not a.lost
        sets = ["one"] * 4 + ["two"] * 4 + [None] * 4
        together = say(host, PROMPTS * 3, sets=sets)
        mixed = say(host, PROMPTS, sets=["two", None, "one", "two"])
        assert say(host, PROMPTS) == plain, "rows of no set are left alone"
    assert together == alone[0] + alone[1] + plain
    assert mixed == [alone[1][0], plain[1], alone[0][2], alone[1][3]]
    assert say(host, PROMPTS) == plain and not host.placed


def test_edits_of_all_rows_act_beside_those_of_a_set():
    host = fresh("llama")
    common, own = weights(host, 1, scale=3.0), memory(host, prompts=PROMPTS)
    with common.on(host, merge=False):
        base = say(host, PROMPTS)
        with own.on(host):
            both = say(host, PROMPTS)
        with own.on(host, rows="mine"):
            assert say(host, PROMPTS * 2, sets=["mine"] * 4 + [None] * 4) == both + base


def test_a_model_without_a_prefix_cache_keeps_rows_apart_too():
    host = fresh("gpt2")
    first, second = weights(host, 1, scale=3.0), weights(host, 2, scale=3.0)
    host.__dict__["continues"] = False
    alone = []
    for edit in (first, second):
        with edit.on(host, merge=False):
            alone.append(say(host, PROMPTS))
    with first.on(host, rows="one"), second.on(host, rows="two"):
        together = say(host, PROMPTS * 2, sets=["one"] * 4 + ["two"] * 4)
    assert together == alone[0] + alone[1]


def test_what_does_not_belong_together_is_refused():
    host = fresh("llama")
    edit = weights(host)
    start = host.weights_hash()
    with pytest.raises(EditError, match="cannot be merged"):
        edit.apply_(host, merge=True, rows="one")
    assert not host.placed
    with edit.on(host, rows="one"):
        assert host.weights_hash() == start
        with pytest.raises(ConfigError, match="no edit was placed for the set 'two'; known: one"):
            say(host, PROMPTS[:1], sets=["two"])
        site = host.layout.site(1)
        unit = host.weight(site)
    assert torch.equal(unit, host.weight(site)), "the weight of rows of no set"
