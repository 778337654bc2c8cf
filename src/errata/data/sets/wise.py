"""WISE: corrections of hallucinated passages, and events after the model's training cutoff, for lifelong editing.

A record has ``prompt``, ``subject``, ``target_new`` (a sentence or a paragraph), ``locality_prompt`` and
``locality_ground_truth``: a piece of web text cut in two. No old answer is given. Records of the temporal file also
have ``ood_rephrase``, another paragraph about the subject.

Texts are too long for exact match, so the published runs score their perplexity: the target after the prompt, the
target after ``ood_rephrase`` (as in EasyEdit), and the second piece of web text after the first, which must not
change; these are probes of form ``span``. The target is also probed as a long answer. Where the web text was cut
inside a word, the whole word goes to the answer, since a tokenizer sees no other boundary. WISE's third file is zsRE
with portability questions: read it with ``easyedit_portability``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.sets._parts import FLAT, has, long_answer, name_of, read_request
from errata.types import Case, Probe

HALLUCINATION, TEMPORAL = "hallucination", "temporal"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case, by its shape; the variant only names the file. Raises Skip or Malformed."""
    name = f"wise:{name_of(record)}"
    request = read_request(record, FLAT, id=name)
    probes = [
        Probe("efficacy", request.text, (request.target,), (), form="span"),
        long_answer("long", request.text, request.target),
    ]
    for text in record.texts("ood_rephrase"):
        probes.append(Probe("paraphrase", text.strip(), (request.target,), (), form="span"))
    if record.texts("locality_ground_truth"):
        prompt, answer = continuation(record.text("locality_prompt"), record.text("locality_ground_truth"))
        probes.append(Probe("locality", prompt, (answer,), (answer,), form="span"))
    else:
        record.omissions["web texts without a second piece"] += 1
    yield Case(name, request, tuple(probes))


def continuation(head: str, tail: str) -> tuple[str, str]:
    """Return the two pieces of a text, moving a split word to the second. Raises Skip for a single word."""
    word = re.search(r"\w+$", head)
    if word and re.match(r"\w", tail):
        head, tail = head[: word.start()], word.group() + tail
    if not head.strip():
        raise Skip(
            "no text comes before the text that must not change, so a causal model has no prompt for it"
        )
    return head.rstrip(), tail.strip()


def fits(value: Any) -> bool:
    """Whether a record has an unrelated text, and no old answer."""
    own = has(value, "prompt", "subject", "target_new", "locality_prompt", "locality_ground_truth")
    return own and not any(
        name in value for name in ("ground_truth", "rephrase_prompt", "portability", "locality")
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the temporal file by its second paragraphs."""
    return (TEMPORAL,) if any(has(record, "ood_rephrase") for record in records) else (HALLUCINATION,)


DATASET = Dataset(
    name="wise",
    title="WISE, hallucination and temporal",
    paper="WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models, NeurIPS 2024, "
    "arXiv 2405.14768",
    licence="MIT (repository); the web text keeps its own terms",
    home="GitHub zjunlp/EasyEdit, README, WISE's data; a copy in fasdkljfds/EasyEdit, data/wise",
    fits=fits,
    cases=cases,
    variants=(HALLUCINATION, TEMPORAL),
    files={HALLUCINATION: "hallucination-edit.json", TEMPORAL: "temporal-edit.json"},
    variants_of=variants_of,
)
