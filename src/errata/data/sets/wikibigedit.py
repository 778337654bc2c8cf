"""WikiBigEdit: half a million changes of Wikidata in eight windows of 2024, as questions with their answers.

Fields: ``subject``, ``update`` (the question), ``ans``, ``rephrase``, ``personas`` (the question in
somebody's voice), ``loc``/``loc_ans`` (a question on an unchanged fact), ``mhop``/``mhop_ans`` (two hops,
the change among them; may be empty). The authors' runs read the same rows with ``src`` and ``alt`` for
question and answer and ``genv2_<voice>`` for the voices. Not used: ``tag`` (new or changed), ``relation``,
``object`` and the Wikidata ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.sets._parts import efficacy, has, locality_probe, name_of
from errata.types import Case, Probe

WINDOWS = (
    "20240201_20240220",
    "20240220_20240301",
    "20240301_20240320",
    "20240320_20240401",
    "20240401_20240501",
    "20240501_20240601",
    "20240601_20240620",
    "20240620_20240701",
)
_VOICE = "genv2_"
_FOLDER = "https://huggingface.co/datasets/lukasthede/WikiBigEdit/resolve/main"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; the variant names its window. Raises Skip or Malformed."""
    own = record.get("update") is not None
    name = name_of(record) if not variant else f"{variant}/{name_of(record)}"
    question, answer = record.text("update" if own else "src"), record.text("ans" if own else "alt")
    request = make_request(question, record.text("subject"), answer, id=name)
    wordings = [("paraphrase", text) for text in record.texts("rephrase")]
    voices = ["personas"] if own else [key for key in record.value if key.startswith(_VOICE)]
    wordings += [("persona", text) for voice in voices for text in record.texts(voice)]
    probes = [efficacy(request)]
    probes += [Probe(kind, text.strip(), (request.target,), ()) for kind, text in wordings]
    hop = pair(record, "mhop", "mhop_ans")
    if hop:
        probes.append(Probe("multi_hop", hop[0], (hop[1],), ()))
    other = pair(record, "loc", "loc_ans")
    if other:
        probes.append(locality_probe("locality", other[0], (other[1],)))
    yield Case(f"wikibigedit:{name}", request, tuple(probes))


def pair(record: Record, question: str, answer: str) -> tuple[str, str] | None:
    """Return an optional question with its answer, None where neither is given. Raises Malformed for one."""
    questions, answers = record.texts(question), record.texts(answer)
    if not questions and not answers:
        return None
    if len(questions) != 1 or len(answers) != 1:
        raise Malformed(
            f"{question}, {answer}: expected one of each, found {len(questions)} and {len(answers)}"
        )
    return questions[0].strip(), answers[0].strip()


def fits(value: Any) -> bool:
    """Whether a record has the fields of the published files, or those of the authors' runs."""
    return has(value, "subject", "update", "ans") or has(value, "subject", "src", "alt", "mhop", "mhop_ans")


DATASET = Dataset(
    name="wikibigedit",
    title="WikiBigEdit",
    paper="WikiBigEdit: Understanding the Limits of Lifelong Knowledge Editing in LLMs, ICML 2025, "
    "arXiv 2503.05683",
    licence="see the dataset card",
    home="hub lukasthede/WikiBigEdit, one JSON file per window",
    fits=fits,
    cases=cases,
    variants=("", *WINDOWS),
    files={
        **{window: f"wiki_big_edit_{window}.json" for window in WINDOWS},
        "": f"wiki_big_edit_{WINDOWS[0]}.json",
    },
    urls={window: f"{_FOLDER}/wiki_big_edit_{window}.json" for window in WINDOWS},
)
