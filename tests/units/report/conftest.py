"""Run folders to report on."""

from __future__ import annotations

import pytest

from errata.report.read import read_run
from tests.units.report.synthetic import write_run

PUBLISHED = {
    "name": "table", "title": "A table", "source": "A paper", "provenance": "secondary", "model": "hub/LAB",
    "dataset": "lab:7500", "schedule": "single", "tolerance": 2, "metric_convention": "Scores in per cent.",
    "rows": [
        {"method": "ROME", "errata_method": "rome", "scores": {"ES": 12.34}},
        {"method": "MEMIT", "errata_method": "memit", "scores": {"ES": 77.7531}, "provenance": "memory"},
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "run"
    return write_run(
        place, methods=("unedited", "in_prompt", "ft", "rome", "memit"), cases=6, looks=(10, 30),
        published=(PUBLISHED,), nasty=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(folder):
    return read_run(folder)
