"""The lab's cases with the questions of EVOKE (arXiv 2410.07819): in all of them the edit's target is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from errata.types import Case, Probe

ASKED = ("efficacy", "paraphrase", "neighbourhood", "same_subject")
CHAINS = ("one_hop", "two_hop")


def overfitting(case: Case) -> Case:
    """Return a case with the probes that EVOKE has, out of those that the lab has.

    As they are: efficacy, paraphrase, neighbourhood and same_subject. ``multi_hop``: chains whose answer is not the
    target, which is their rival. ``distracting``: each neighbour after the edit was stated.
    """
    return replace(case, probes=tuple(_probes(case)))


def _probes(case: Case) -> Iterator[Probe]:
    request = case.request
    for probe in case.probes:
        if probe.kind in ASKED:
            yield probe
        if probe.kind in CHAINS and request.target not in probe.answers:
            yield replace(probe, kind="multi_hop", rival=request.target)
    for probe in case.probes:
        if probe.kind == "neighbourhood":
            yield replace(
                probe, kind="distracting", prompt=f"{request.text} {request.target}. {probe.prompt}"
            )
