"""MMEdit's records of edits about pictures (E-VQA, E-IC), and VLKEB's, which add questions that follow from the edit.

``src`` is asked beside ``image`` and is to be answered with ``alt`` in place of ``pred``. It is asked in other words
(``rephrase``) and beside another picture (``image_rephrase``). What must stay: a question in text alone (``loc``,
T-Loc) and one beside an unrelated picture (``m_loc``, ``m_loc_q``, M-Loc). Added here: the same question beside no
picture, where the new answer is a sign that the edit has attached to the words.

Paths of pictures are relative to the folder of the file. No subject is annotated: it is what the question calls the
thing shown ("this building"), else the picture itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.pictures import read_picture, subject_in
from errata.data.sets._parts import efficacy, has, locality_probe, name_of, rival_to, spellings
from errata.errors import RequestError
from errata.types import IMAGE, Case, Picture, Probe, Request


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip, also where a picture cannot be read, and Malformed."""
    name = f"mmedit:{name_of(record)}"
    prompt = record.text("src").strip()
    old = spellings("", record.texts("pred"))
    target = record.get("alt")
    if isinstance(target, str) and not target.strip():
        raise Skip("the record has no new answer")
    target, subject = record.text("alt").strip(), subject_in(prompt)
    image, second, other = (_picture(record, field) for field in ("image", "image_rephrase", "m_loc"))
    text = f"{IMAGE}{prompt}"
    request = Request(text, subject, target, old[0] if old else None, name, image=image)
    answers, rival = (request.target,), rival_to((request.target,), request.target_old, old)
    first = efficacy(request, before=old)
    probes = [
        Probe(first.kind, first.prompt, first.answers, first.before, first.rival, image=image),
        *(Probe("paraphrase", f"{IMAGE}{one.strip()}", answers, old, rival, image=image)
          for one in record.texts("rephrase", required=True)),
        Probe("other_view", text, answers, old, rival, image=second),
        locality_probe("locality", record.text("loc"), spellings("", record.texts("loc_ans", required=True))),
        _kept(record, other),
        *_following(record, image),
    ]  # fmt: skip
    if old:
        probes.append(Probe("no_picture", prompt, old, old, rival_to(old, request.target)))
    yield Case(name, request, tuple(probes))


def _kept(record: Record, picture: Picture | None) -> Probe:
    question, answers = record.text("m_loc_q").strip(), spellings("", record.texts("m_loc_a", required=True))
    return Probe("picture_locality", f"{IMAGE}{question}", answers, answers, image=picture)


def _following(record: Record, picture: Picture | None) -> Iterator[Probe]:
    """Yield VLKEB's questions that follow from the edit, asked beside its picture."""
    for port in record.records("port_new"):
        question, answer = port.text("Q&A.Question").strip(), port.text("Q&A.Answer").strip()
        yield Probe("portability", f"{IMAGE}{question}", (answer,), (), image=picture)


def _picture(record: Record, field: str) -> Picture | None:
    """Read the picture that a field names; None where the file's folder is not known. Raises Skip, Malformed."""
    path = record.text(field)
    if record.base is None:
        return None
    try:
        return read_picture(path, base=record.base)
    except RequestError as error:
        raise Skip(f"{field}: {error}") from error


def fits(value: Any) -> bool:
    """Whether a record asks beside pictures, in MMEdit's fields."""
    return has(
        value,
        "src",
        "rephrase",
        "pred",
        "alt",
        "image",
        "image_rephrase",
        "loc",
        "m_loc",
        "m_loc_q",
        "m_loc_a",
    )


DATASET = Dataset(
    name="mmedit",
    title="MMEdit (E-VQA, E-IC) and VLKEB",
    paper="Cheng et al., Can We Edit Multimodal Large Language Models?, EMNLP 2023, arXiv 2310.08475; "
    "Huang et al., VLKEB, NeurIPS 2024, arXiv 2403.07350",
    licence="not stated",
    home="GitHub zjunlp/EasyEdit (vqa_eval.json, caption_eval.json) and VLKEB/VLKEB (eval.json), with their pictures",
    fits=fits,
    cases=cases,
    files={"": "vqa_eval.json"},
)
