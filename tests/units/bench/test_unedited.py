"""The unedited side: observed once for all cells and processes, and bit by bit what observing gives."""

from __future__ import annotations

import pytest
import torch

from errata.bench import unedited
from errata.bench.unedited import Unedited
from errata.errors import DataError
from errata.evaluation.observe import observe, unique
from errata.types import AskOptions, Case, Probe, Request
from tests.models import fresh


@pytest.fixture(scope="module")
def host():
    return fresh("llama")


def made(count: int) -> list[Case]:
    cases = []
    for i in range(count):
        request = Request("{} was born in", f"Ada {i}", "Esk", "Tallow")
        probes = (
            Probe("efficacy", request.text, ("Esk",), ("Tallow",), "Tallow"),
            Probe("neighbourhood", "Bruno lives in", ("Tallow",), ("Tallow",), "Esk"),
            Probe("choice", f"Ada {i} is", ("old",), ("old",), form="choice", choices=("old", "young")),
        )
        cases.append(Case(f"c{i}", request, probes))
    return cases


def test_what_is_read_back_is_what_was_observed(host, tmp_path, monkeypatch):
    monkeypatch.setattr(unedited, "CHUNK", 2)
    cases = made(5)
    first = Unedited(tmp_path, host, cases, AskOptions(max_new_tokens=5))
    found = {case.id: first.of(case) for case in cases}
    for begin in (0, 2, 4):
        chunk = cases[begin : begin + 2]
        probes = unique(p for case in chunk for p in case.probes)
        said = dict(zip(probes, observe(host, probes, AskOptions(max_new_tokens=5)), strict=True))
        for case in chunk:
            assert found[case.id] == [said[p] for p in case.probes]
            for one, probe in zip(found[case.id], case.probes, strict=True):
                if probe.kind == "neighbourhood":
                    assert torch.equal(one.next_logprobs, said[probe].next_logprobs)
                else:
                    assert one.next_logprobs is None

    def never(*args, **more):
        raise AssertionError("observed again")

    monkeypatch.setattr(unedited, "observe", never)
    again = Unedited(tmp_path, host, cases, AskOptions(max_new_tokens=5))
    assert {case.id: again.of(case) for case in cases} == found
    assert again.seconds() == first.seconds() > 0
    for other in (
        Unedited(tmp_path, host, cases, AskOptions(max_new_tokens=6)),
        Unedited(tmp_path, fresh("gpt2"), cases, AskOptions()),
    ):
        with pytest.raises(AssertionError, match="observed again"):
            other.of(cases[0])


def test_names_of_cases_must_differ(host, tmp_path, monkeypatch):
    monkeypatch.setattr(unedited, "CHUNK", 1)
    case = made(1)[0]
    with pytest.raises(DataError, match="2 cases have only 1 different names"):
        Unedited(tmp_path, host, [case, case], AskOptions())
