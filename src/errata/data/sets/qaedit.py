"""QAEdit: questions of existing benchmarks as edits, each with its benchmark's own answer.

Made for evaluation by free generation (WILD). Targets are used unchanged, including any markup of their source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, make_request
from errata.data.sets._parts import efficacy, has, locality_probe, name_of
from errata.types import Case, Probe


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case with its rephrasings and unrelated questions. Raises Skip or Malformed."""
    name = f"{record.text('source')}-{name_of(record)}"
    request = make_request(record.text("prompt"), record.text("subject"), record.text("target"), id=name)
    probes = [efficacy(request)]
    probes += [Probe("paraphrase", text.strip(), (request.target,), ()) for text in record.texts("rephrase")]
    for other in record.records("locality"):
        probes.append(locality_probe("locality", other.text("loc").strip(), (other.text("loc_ans").strip(),)))
    yield Case(f"qaedit:{name}", request, tuple(probes))


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count rows by source benchmark."""
    sources = Counter(case.id.partition(":")[2].rpartition("-")[0] for case in cases)
    return {"rows by source": dict(sorted(sources.items()))}


def fits(value: Any) -> bool:
    """Whether a record names its source benchmark and a list of unrelated questions."""
    return has(value, "source", "prompt", "subject", "target", "rephrase", "locality")


DATASET = Dataset(
    name="qaedit",
    title="QAEdit",
    paper="The Mirage of Model Editing: Revisiting Evaluation in the Wild, ACL 2025, arXiv 2502.11177",
    licence="Apache-2.0 (repository)",
    home="hub WenDingY/QAEdit; 1,000 rows in GitHub WanliYoung/Revisit-Editing-Evaluation, "
    "data/QAEdit_inter_1k.json",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "QAEdit_inter_1k.json"},
)
