"""The door to a model: what a pass hands over, what it gives, and that nothing gets in otherwise."""

from __future__ import annotations

import sys

import pytest
import torch

import errata
from errata.evaluation.observe import observe
from errata.host import passes
from errata.host.passes import Pass
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("{} plays the", "Bruno", "harp"),
]
PROBES = [errata.Probe("efficacy", "Ada Brenner was born in", ("Merrin",), ("Esk",), "Esk")]


def through_the_door() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == passes.__file__:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_every_pass_of_a_fit_an_evaluation_and_statistics_goes_through_it(monkeypatch, family):
    host = fresh(family)
    forward, seen = type(host.model).forward, []

    def watched(*given, **named):
        seen.append(through_the_door())
        return forward(*given, **named)

    watched.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(type(host.model), "forward", watched)
    for method in ("rome", "memit", "ft", "kn", "ultraedit"):
        settings = {"steps": 2} if method in ("rome", "memit", "ft") else {}
        more = {"tokens": 300} if method in ("rome", "memit") else {}
        with errata.edit(host, REQUESTS[:1], method=method, **settings, **more).on(host):
            observe(host, PROBES)
            host.generate("Ada Brenner was born in", max_new_tokens=3)
    assert len(seen) > 50 and all(seen)


def test_logits_wanted_at_some_places_are_those_of_the_whole_pass():
    host = fresh("llama")
    batch = host.batch([host.encode_prompt("Ada Brenner was born in"), host.encode_prompt("Bruno")])
    plain = Pass(batch.ids, batch.mask, batch.positions)
    with torch.no_grad():
        whole = host.run(plain).logits
        row, column = torch.tensor([1, 0, 0]), torch.tensor([0, 2, 1])
        some = host.run(Pass(batch.ids, batch.mask, batch.positions, at=(row, column))).logits
        last = host.run(Pass(batch.ids, batch.mask, batch.positions, last=2)).logits
    torch.testing.assert_close(some, whole[row, column])
    torch.testing.assert_close(last, whole[:, -2:])


def test_a_prefix_is_continued():
    host = fresh("gpt2")
    ids = torch.tensor([host.encode_prompt("Ada Brenner was born in the town of Esk")])
    ones, place = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        whole = host.run(Pass(ids, ones, place)).logits
        start = host.run(Pass(ids[:, :3], ones[:, :3], place[:, :3], use_cache=True))
        rest = host.run(Pass(ids[:, 3:], ones, place[:, 3:], prefix=start.prefix))
    assert start.prefix is not None and rest.prefix is None
    torch.testing.assert_close(rest.logits, whole[:, 3:], atol=1e-5, rtol=1e-4)
