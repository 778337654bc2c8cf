"""The small version of benchmarks/reliability.py: every fault that it brings about keeps its bound.

Kills have a test of their own in tests/units/ledger/test_store.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "reliability.py"
FAULTS = (
    "full_disks", "damaged", "wrong_models", "not_finite", "sequences", "conflicts", "writers", "texts", "names",
    "pickles", "hub_code", "unwritable", "parity", "export_kills", "tampered", "collapses", "hot_edits", "requests",
)  # fmt: skip


@pytest.fixture(scope="module")
def reliability() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reliability"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process's files are POSIX's")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_nothing(reliability, lab_host, fault):
    before = lab_host.weights_hash()
    for figure in getattr(reliability, fault)(lab_host, 0.01):
        assert figure.kept and figure.tried > 0, figure
    assert lab_host.weights_hash() == before and not lab_host.placed


def test_a_count_beyond_its_bound_is_seen(reliability):
    assert not reliability.Figure("fault", 1, "lost", 1).kept
    assert reliability.Figure("fault", 1, "lost", 0).kept
