"""DAMA's sentences about professions: a training set to edit with, and a test set to measure bias on.

Training rows are requests: ``prompt``, ``subject``, ``target_new.str`` (a pronoun, against the stereotype)
and ``gender_score`` (the stereotype, see :mod:`errata.data.sets.professions`, not used). Test rows are
texts alone. They ask for nothing, so under ``test`` each is skipped with that reason, and :func:`probes`
gives them as questions to be asked after the edits of the training set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._files import read_records
from errata.data.sets._parts import has, name_of
from errata.data.sets.professions import SENTENCES, Score, bias_probe, profession, pronoun_probe
from errata.types import Case, Probe


def probes(path: Path, scores: Mapping[str, Score]) -> tuple[Probe, ...]:
    """Return a bias probe per text of the test file; the group names the profession.

    ``scores``: those of :func:`errata.data.sets.professions.scores`, which decide where a word itself says
    the gender. Raises DataError where the file cannot be read, Malformed naming a record that is none of its
    sentences or is about a profession without scores.
    """
    questions = []
    for record in read_records(path):
        text, name = record.value, _profession(record.value)
        if name is None or name not in scores:
            raise Malformed(
                f"{record.where}: expected a sentence about a profession with scores, found {text!r:.60}"
            )
        questions.append(bias_probe(text, name, scores[name]))
    return tuple(questions)


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one training row into a case. Raises Skip for a test row, and Malformed."""
    if isinstance(record.value, str):
        if _profession(record.value) is None:
            raise Malformed(
                f"expected one of DAMA's sentences about a profession, found {record.value!r:.60}"
            )
        raise Skip(
            "a test sentence: asks for nothing, is only measured; errata.data.sets.dama.probes gives it"
        )
    name = name_of(record)
    request = make_request(
        record.text("prompt"), record.text("subject"), record.text("target_new.str"), id=name
    )
    group = profession(request.subject)
    yield Case(f"dama:{name}", request, (pronoun_probe(request), bias_probe(request.text, group)))


def _profession(text: Any) -> str | None:
    """Return the profession a sentence is about; None where it is none of DAMA's."""
    if not isinstance(text, str) or not text.startswith("The "):
        return None
    for sentence in SENTENCES:
        end = sentence.removeprefix("{}")
        if text.endswith(end) and len(text) > len("The ") + len(end):
            return profession(text.removesuffix(end))
    return None


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count rows by target, and professions."""
    return {
        "rows by target": dict(sorted(Counter(case.request.target for case in cases).items())),
        "professions": len({case.request.subject for case in cases}),
    }


def fits(value: Any) -> bool:
    """Whether a record is a training row or a test sentence."""
    return has(value, "prompt", "subject", "target_new", "gender_score") or _profession(value) is not None


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the test file by its texts."""
    return ("test",) if all(isinstance(record, str) for record in records) else ("train",)


DATASET = Dataset(
    name="dama",
    title="DAMA gender data",
    paper="Debiasing Algorithm through Model Adaptation, ICLR 2024, arXiv 2310.18913",
    licence="MIT",
    home="GitHub tomlimi/DAMA, data/train_dama.json and data/test_dama.json",
    fits=fits,
    cases=cases,
    variants=("train", "test"),
    facts=facts,
    files={"train": "dama_train.json", "test": "dama_test.json"},
    variants_of=variants_of,
)
