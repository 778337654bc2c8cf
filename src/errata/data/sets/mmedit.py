"""MMEdit's records of edits about pictures (E-VQA, E-IC), VLKEB's, which add questions that follow from the edit, and
MMKE-Bench's, which teach a text and ask about its parts.

``src`` is asked beside ``image`` and is to be answered with ``alt`` in place of ``pred``. It is asked in other words
(``rephrase``) and beside another picture (``image_rephrase``). What must stay: a question in text alone (``loc``,
T-Loc) and one beside an unrelated picture (``m_loc``, ``m_loc_q``, M-Loc). Added here: the same question beside no
picture, where the new answer is a sign that the edit has attached to the words.

MMKE-Bench's records have a ``knowledge_type``. Questions about parts of the text are asked in text alone (``rel``,
T-Rel), beside the picture (``m_rel``, I-Rel) and beside the other one (I-Gen): two of each about an entity or something
a user teaches, ``rel_1`` with ``rel_ans_1`` or ``rel_1_ans``; one about a visual meaning, with
``image_rephrase_question`` for the other picture. Questions that follow go with ``one_hop_img`` where there is one.

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
        *_parts(record, image, second),
        *_following(record, _picture(record, "one_hop_img") if record.get("one_hop_img") else image),
    ]  # fmt: skip
    if old:
        probes.append(Probe("no_picture", prompt, old, old, rival_to(old, request.target)))
    yield Case(name, request, tuple(probes))


def _kept(record: Record, picture: Picture | None) -> Probe:
    question, answers = record.text("m_loc_q").strip(), spellings("", record.texts("m_loc_a", required=True))
    return Probe("picture_locality", f"{IMAGE}{question}", answers, answers, image=picture)


def _parts(record: Record, image: Picture | None, second: Picture | None) -> Iterator[Probe]:
    """Yield MMKE-Bench's questions about parts of the text: alone, beside the picture, beside the other one."""
    if record.get("knowledge_type") is None:
        return
    for number in ("_1", "_2") if record.get("rel_1") is not None else ("",):
        yield _part("alone", record.text(f"rel{number}"), _answer(record, "rel", number))
        question, answer = record.text(f"m_rel{number}"), _answer(record, "m_rel", number)
        yield _part("beside", question, answer, image)
        other = record.get("image_rephrase_question")
        yield _part("other_view", question if other is None else str(other), answer, second)


def _part(how: str, question: str, answer: str, picture: Picture | None = None) -> Probe:
    mark = "" if how == "alone" else IMAGE
    return Probe(f"sub_question.{how}", f"{mark}{question.strip()}", (answer.strip(),), (), image=picture)


def _answer(record: Record, name: str, number: str) -> str:
    """Return the answer to a numbered question, whose field is spelt in two ways."""
    first = f"{name}_ans{number}"
    return record.text(f"{name}{number}_ans" if record.get(first) is None else first)


def _following(record: Record, picture: Picture | None) -> Iterator[Probe]:
    """Yield VLKEB's and MMKE-Bench's questions that follow from the edit, asked beside a picture."""
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
    title="MMEdit (E-VQA, E-IC), VLKEB and MMKE-Bench",
    paper="Cheng et al., Can We Edit Multimodal Large Language Models?, EMNLP 2023, arXiv 2310.08475; "
    "Huang et al., VLKEB, NeurIPS 2024, arXiv 2403.07350; MMKE-Bench, ICLR 2025",
    licence="not stated",
    home="GitHub zjunlp/EasyEdit (vqa_eval.json, caption_eval.json), VLKEB (eval.json), MMKE-Bench; with pictures",
    fits=fits,
    cases=cases,
    files={"": "vqa_eval.json"},
)
