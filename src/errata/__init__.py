"""errata: edit what language models know, prove what changed, keep the edit, take it back.

Names load on first use; importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata import lab as lab
    from errata import methods as methods
    from errata.api import check_edit, edit, evaluate, load, prepare, trace, train
    from errata.bench.evaluate import Report
    from errata.bench.judging import JudgedCell, judge_run
    from errata.bench.survival import Survival, survives
    from errata.edits import Edit
    from errata.edits.algebra import leverages, refit, retract
    from errata.edits.artefact import Artefact
    from errata.edits.export import Export, export
    from errata.edits.imports import import_edit
    from errata.errors import ErrataError
    from errata.evaluation.check import EditCheck
    from errata.evaluation.judge import JudgeSettings
    from errata.host.host import Host
    from errata.job import Job
    from errata.types import (
        AskOptions,
        Case,
        Concept,
        ContrastPair,
        Contrasts,
        ImageRequest,
        LabelledText,
        Probe,
        Request,
    )

_HOME = {
    "load": "errata.api",
    "prepare": "errata.api",
    "edit": "errata.api",
    "check_edit": "errata.api",
    "evaluate": "errata.api",
    "trace": "errata.api",
    "train": "errata.api",
    "Artefact": "errata.edits.artefact",
    "Edit": "errata.edits",
    "Export": "errata.edits.export",
    "export": "errata.edits.export",
    "import_edit": "errata.edits.imports",
    "refit": "errata.edits.algebra",
    "retract": "errata.edits.algebra",
    "leverages": "errata.edits.algebra",
    "Host": "errata.host.host",
    "Job": "errata.job",
    "AskOptions": "errata.types",
    "Request": "errata.types",
    "ImageRequest": "errata.types",
    "Concept": "errata.types",
    "ContrastPair": "errata.types",
    "Contrasts": "errata.types",
    "LabelledText": "errata.types",
    "Probe": "errata.types",
    "Case": "errata.types",
    "Report": "errata.bench.evaluate",
    "EditCheck": "errata.evaluation.check",
    "JudgeSettings": "errata.evaluation.judge",
    "JudgedCell": "errata.bench.judging",
    "judge_run": "errata.bench.judging",
    "ErrataError": "errata.errors",
    "Survival": "errata.bench.survival",
    "survives": "errata.bench.survival",
}

__all__ = [
    "Artefact",
    "AskOptions",
    "Case",
    "Concept",
    "ContrastPair",
    "Contrasts",
    "Edit",
    "EditCheck",
    "ErrataError",
    "Export",
    "Host",
    "ImageRequest",
    "Job",
    "JudgeSettings",
    "JudgedCell",
    "LabelledText",
    "Probe",
    "Report",
    "Request",
    "Survival",
    "check_edit",
    "edit",
    "evaluate",
    "export",
    "import_edit",
    "judge_run",
    "lab",
    "leverages",
    "load",
    "methods",
    "prepare",
    "refit",
    "retract",
    "survives",
    "trace",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("lab", "methods"):
        return importlib.import_module(f"errata.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("errata")
    if name in _HOME:
        module = importlib.import_module(_HOME[name])
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'errata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
