"""Old answers erased by a value search (KELE), and a second site for prompts that imply the subject (IFMET)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import errata
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.locate.contexts import Context
from errata.locate.problems import value_problems, with_erased
from errata.locate.values import ValueConfig, find_values
from errata.methods import ifmet
from tests.models import fresh

BORN = errata.Request("{} was born in", "Ada Brenner", "Merrin", "Tallow")
INDIRECT = "The wife of Bruno Holner was born in"
BARE = [Context("", 1.0)]
SEARCH = ValueConfig(steps=60, learning_rate=0.5, clamp=8.0, decay=0.0, kl=0.0)


def fitted(*requests: errata.Request, host: Host, method: str, **settings: Any) -> WeightEdit:
    edit = errata.edit(host, list(requests), method=method, **settings)
    assert isinstance(edit, WeightEdit)
    return edit


def dense(edit: WeightEdit) -> list[torch.Tensor]:
    return [delta.dense() if isinstance(delta, LowRank) else delta for delta in edit.deltas.values()]


def logprob(host: Host, prompt: str, answer: str) -> float:
    (seen,) = observe(host, [errata.Probe("efficacy", prompt, (answer,), ())])
    return sum(seen.answer_logprobs)


def test_what_is_erased_is_less_likely_than_without_and_the_target_more_than_before() -> None:
    host = fresh("llama")
    before = {answer: logprob(host, BORN.text, answer) for answer in ("Merrin", "Tallow")}
    common: dict[str, Any] = {
        "tokens": 400, "contexts": 0, "steps": 30, "clamp": 8.0, "learning_rate": 0.2,
        "decay": 0.0, "kl": 0.0,
    }  # fmt: skip
    after = {}
    for erase in (0.0, 1.0):
        edit = errata.edit(host, BORN, method="kele", erase=erase, erase_above=-60.0, **common)
        with edit.on(host):
            after[erase] = {answer: logprob(host, BORN.text, answer) for answer in before}
        assert after[erase]["Merrin"] > before["Merrin"]
    assert after[1.0]["Tallow"] < min(after[0.0]["Tallow"], before["Tallow"]) - 0.01


def test_without_a_weight_old_answers_change_nothing_in_the_search() -> None:
    host = fresh("gpt2")
    problems = value_problems(host, [BORN], BARE)
    erasing = with_erased(host, [BORN], problems, BARE, ["Tallow"])
    (plain,), (unweighed,) = (
        find_values(host, some, layer=1, where="mlp_out", config=SEARCH) for some in (problems, erasing)
    )
    torch.testing.assert_close(plain.shift, unweighed.shift, rtol=0, atol=0)
    config = replace(SEARCH, erase=1.0, erase_above=-30.0)
    (other,) = find_values(host, erasing, layer=1, where="mlp_out", config=config)
    assert not torch.allclose(plain.shift, other.shift)


def test_the_loss_counts_the_old_answer_above_its_bound_alone() -> None:
    """At the first evaluation nothing is shifted, so the hinge is that of the model as it is."""
    host = fresh("llama")
    problems = value_problems(host, [BORN], BARE)
    erasing = with_erased(host, [BORN], problems, BARE, ["Tallow"])
    now, target = (logprob(host, BORN.text, answer) for answer in ("Tallow", "Merrin"))
    count = len(erasing[0].rows[0].targets)
    for bound, steps in ((now - 1.0, 1), (now + 1.0, 0)):  # stops at once only where nothing is left of it
        config = replace(SEARCH, steps=2, erase=1.0, erase_above=bound, stop_loss=-target / count + 0.5)
        (value,) = find_values(host, erasing, layer=1, where="mlp_out", config=config)
        assert value.steps == steps


@pytest.mark.parametrize("old", ["", "  ", "Mer"])
def test_an_old_answer_that_begins_the_target_or_is_empty_gets_no_rows(old: str) -> None:
    host = fresh("llama")
    (problem,) = with_erased(host, [BORN], value_problems(host, [BORN], BARE), BARE, [old])
    assert problem.erased == ()


def test_an_unknown_old_answer_is_what_the_unedited_model_generates() -> None:
    host = fresh("llama")
    request = replace(BORN, target_old=None)
    own = host.generate([request.text], max_new_tokens=8)[0].strip(" .\n")
    given = replace(BORN, target_old=own)
    one, two = (
        fitted(r, host=host, method="kele", tokens=400, contexts=0, steps=4, erase_above=-50.0)
        for r in (request, given)
    )
    assert own and all(map(torch.equal, dense(one), dense(two)))


def test_kele_without_erasure_is_rome_with_the_same_contexts() -> None:
    host = fresh("llama")
    common: dict[str, Any] = {"tokens": 400, "steps": 5, "layers": (1,)}
    kele = fitted(BORN, host=host, method="kele", erase=0.0, contexts=0, **common)
    rome = fitted(BORN, host=host, method="rome", contexts=(), context_tokens=(), **common)
    torch.testing.assert_close(dense(kele), dense(rome), rtol=1e-4, atol=1e-6)


def test_kele_takes_one_request_and_one_layer() -> None:
    host = fresh("llama")
    other = errata.Request("The capital of {} is", "Arvania", "Esk")
    with pytest.raises(ConfigError, match="one request"):
        errata.edit(host, [BORN, other], method="kele")
    with pytest.raises(ConfigError, match="one layer"):
        errata.edit(host, BORN, method="kele", layers=(0, 1))
    with pytest.raises(ConfigError, match="less than 0"):
        errata.edit(host, BORN, method="memit", erase=1.0, erase_above=0.5)


TWO = {
    "tokens": 400, "contexts": 0, "steps": 30, "learning_rate": 0.2, "clamp": 8.0, "cov_weight": 1e-4, "decay": 0.0,
}  # fmt: skip


def test_the_shallow_edit_is_memits_and_the_deep_one_answers_what_implies_the_subject() -> None:
    host = fresh("llama", num_hidden_layers=5)
    request = replace(BORN, indirect=(INDIRECT,))
    both = fitted(request, host=host, method="ifmet", layers=(1,), second_layers=(3,), **TWO)
    single = fitted(request, host=host, method="memit", layers=(1,), **TWO)
    shallow, deep = (host.layout.site(layer).parameter for layer in (1, 3))
    assert set(both.deltas) == {shallow, deep}
    torch.testing.assert_close(dense(both)[:1], dense(single))
    answers = {}
    for name, edit in (("memit", single), ("ifmet", both)):
        with edit.on(host):
            answers[name] = logprob(host, INDIRECT, "Merrin")
    assert answers["ifmet"] > answers["memit"] + 0.02


def test_a_request_without_indirect_prompts_is_edited_at_its_own_end() -> None:
    host = fresh("gpt2", n_layer=5)
    edit = fitted(BORN, host=host, method="ifmet", layers=(1,), second_layers=(3,), **{**TWO, "steps": 6})
    record = edit.records[host.layout.site(3).parameter]
    assert record.keys.shape[1] == 1 and record.requests == ((0,),)


def test_every_column_of_the_second_site_belongs_to_its_request() -> None:
    host = fresh("llama", num_hidden_layers=5)
    first = replace(BORN, indirect=(INDIRECT, "The man from the harp was born in"))
    second = errata.Request("The capital of {} is", "Arvania", "Esk")
    edit = fitted(
        first, second, host=host, method="ifmet", layers=(1,), second_layers=(3,), **{**TWO, "steps": 4}
    )
    assert edit.records[host.layout.site(3).parameter].requests == ((0,), (0,), (1,))
    assert edit.provenance.requests == (first, second)


@pytest.mark.parametrize(
    ("layers", "second", "words"),
    [
        ((2,), None, "above layer 2"),
        ((1,), (1,), "above the edited layer"),
        ((1,), (0,), "above the edited layer"),
    ],
)
def test_deep_layers_lie_above_the_others(layers: Any, second: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        errata.edit(fresh("llama"), BORN, method="ifmet", layers=layers, second_layers=second, tokens=400)


@pytest.mark.parametrize("depth", [2, 3, 6, 12, 28, 48])
def test_default_bands_do_not_meet(depth: int) -> None:
    shallow, deep = ifmet.shallow(depth), ifmet.deep(depth)
    assert shallow and deep and max(shallow) < min(deep) and max(deep) < depth
