"""The lab's cases with a year since which each edit holds, asked about today, a later year and an earlier one.

The world's text has no years, so that its models answer for every year alike: what an editor keeps of the past is
what it does not change.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from errata.data.times import with_times
from errata.lab.world import World, default_world
from errata.types import Case

FIRST_YEAR, LAST_YEAR = 1990, 2020
KEPT = ("efficacy", "paraphrase", "neighbourhood", "same_subject")
"""Kinds of probes that stay beside those about a time."""


def dated(cases: Sequence[Case], *, world: World | None = None) -> list[Case]:
    """Return cases of the lab with a year of change, drawn by the case's name, and probes about the time."""
    world = world or default_world()
    found = []
    for case in cases:
        year = random.Random(f"errata-dated-{case.id}").randint(FIRST_YEAR, LAST_YEAR)
        request = replace(case.request, valid_from=str(year))
        own = tuple(probe for probe in case.probes if probe.kind in KEPT)
        found.append(replace(case, request=request, probes=own))
    names = {name: world.names(name) for name in world.entities}
    return with_times(found, names=names)
