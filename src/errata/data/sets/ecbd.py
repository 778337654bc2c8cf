"""ECBD: entities younger than the model, told by one defining sentence and asked about in another.

A record holds ``definition`` with one span masked as ``<extra_id_0>`` and its filling ``def_target``; the
entity ``ent_str``; and ``probe_sentences`` by template, each masked and filled in the same way. Left aside:
``additional_sentences`` (the definition under other masks, meant for training), ``category``, ``attribute``
and ``conceptnet`` (the same or empty in every record of the published files) and ``qid`` (the entity's
class).

The authors fill masks literally and score the span's tokens given what stands before it; what follows the
span is not seen by a causal model. The same is done here, by probes of form ``span``. Where a span begins
inside a word, the prompt ends before that word and the answer has it whole, since a tokenizer sees no other
boundary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, SubjectAbsent, request
from errata.data.sets._files import records_of
from errata.data.sets._parts import has
from errata.types import Case, Probe, Request

READINGS = ("titled", "span", "definition")
"""How a definition becomes a request, see :func:`edit`."""
POPULAR = "popular"
NEW_PAGES = 40_000_000
"""Page id of Wikipedia between those of popular and of new entities."""

_MASK = "<extra_id_0>"
_MARKS = re.compile(r"<extra_id_\d+>")
_CLOSES = ".,;:!?%)]}"
_OPENS = "([{"


@dataclass(frozen=True)
class Cloze:
    """A sentence in three parts with their white space: before a masked span, its filling, and after."""

    left: str
    span: str
    right: str

    @classmethod
    def read(cls, sentence: str, filling: str) -> Cloze:
        """Take a masked sentence and its filling apart, at the border of a word. Raises Malformed, Skip."""
        masks = sentence.count(_MASK)
        if masks != 1:
            raise Malformed(f"expected one {_MASK}, found {masks} in {sentence!r:.80}")
        left, _, right = sentence.partition(_MASK)
        span = unmarked(filling)
        word = re.search(r"\S+$", left)
        if word and word.group()[-1] not in _OPENS and not (span[0].isspace() or span[0] in _CLOSES):
            left, span = left[: word.start()], word.group() + span
        if not left.strip():
            raise Skip(f"nothing stands before the span {span!r}, so a causal model cannot be asked for it")
        return cls(left, span, right)

    @property
    def prompt(self) -> str:
        """What a causal model continues."""
        return self.left.rstrip()

    @property
    def answer(self) -> str:
        """What it is to say next."""
        return self.span.strip()

    @property
    def text(self) -> str:
        """The sentence, filled."""
        return self.left + self.span + self.right


def unmarked(filling: str) -> str:
    """Return a filling without the marks around it. Raises Malformed when nothing is left."""
    text = _MARKS.sub("", filling).strip(" ")
    if not text.strip():
        raise Malformed(f"expected a filling between its marks, found {filling!r}")
    return text


def mention(entity: str, text: str) -> tuple[int, int] | None:
    """Find an entity in a text, as whole words; capitals and a bracket at the end of the name may differ.

    The bracket tells articles of one name apart, as in ``Lake Fire (2020)``, and is no part of running text.
    """
    names = dict.fromkeys((entity.strip(), re.sub(r"\s*\([^()]*\)$", "", entity.strip())))
    for flags in (0, re.IGNORECASE):
        for name in names:
            found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags)
            if found and name:
                return found.span()
    return None


def edit(record: Record, reading: str) -> Request:
    """Return the request that a record's definition stands for.

    ``titled``: the definition up to its masked span is continued with the span; a definition that does not
    name its entity before the span is headed by the name and a colon, so that every row is kept. ``span``:
    the same without such heads; other rows are left out. ``definition``: the definition up to the entity is
    continued with all the rest, filled; closest to fine-tuning on the sentence. Raises Skip, Malformed.
    """
    cloze = Cloze.read(record.text("definition"), record.text("def_target"))
    entity = record.text("ent_str")
    text = cloze.text if reading == "definition" else cloze.prompt
    place = mention(entity, text)
    if place is None and reading == "titled":
        return request(f"{{}}: {cloze.prompt}", entity, cloze.answer)
    if place is None:
        where = "its definition" if reading == "definition" else f"what stands before the span, {text!r:.80}"
        raise SubjectAbsent(f"the entity {entity!r} is not named in {where}")
    begin, end = place
    target = cloze.answer
    if reading == "definition":
        word = re.compile(rf"[^\s{re.escape(_CLOSES)}]*").match(text, end)
        after = word.end() if word else end
        text, target = text[:after], text[after:]
    return request(f"{text[:begin]}{{}}{text[end:]}", text[begin:end], target)


def sentences(record: Record) -> Iterator[Record]:
    """Yield the probe sentences of a record, in the order of their templates. Raises Malformed."""
    listed = record.get("probe_sentences")
    if not isinstance(listed, Mapping) or not listed:
        raise Malformed(f"probe_sentences: expected sentences by template, found {listed!r:.60}")
    for i, (name, value) in enumerate(listed.items()):
        yield Record(value, f"{record.where}, {name}", i)


def efficacy(made: Request, *, known: bool = False) -> Probe:
    """Return the probe that asks for the definition itself: how expected its own words are."""
    return Probe("efficacy", made.text, (made.target,), (made.target,) if known else (), form="span")


def span_probes(record: Record, kind: str, *, known: bool) -> tuple[Probe, ...]:
    """Return a probe per probe sentence: the text before its masked span, the span as answer.

    ``known``: the entity is popular, the answer is that of the unedited model too.
    """
    made = []
    for sentence in sentences(record):
        cloze = Cloze.read(sentence.text("probe_sentence"), sentence.text("label"))
        before = (cloze.answer,) if known else ()
        made.append(Probe(kind, cloze.prompt, (cloze.answer,), before, form="span"))
    return tuple(made)


def popular(path: Path) -> tuple[Probe, ...]:
    """Return the locality probes of the file of popular entities, to be asked after every edit of a run.

    Raises DataError where the file cannot be read, Malformed naming a record that is none of ECBD's.
    """
    return tuple(
        probe for record in records_of(path) for probe in span_probes(record, "entity_locality", known=True)
    )


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; the variant is a reading, or says that entities are popular.

    Raises Skip or Malformed.
    """
    known = variant == POPULAR
    # a popular entity is there for its probe: a definition without its name is headed by it, not left out
    made = edit(record, "titled" if known else variant)
    probes = span_probes(record, "entity_locality" if known else "entity", known=known)
    yield Case(f"ecbd:{record.text('ex_id')}", made, (efficacy(made, known=known), *probes))


def fits(value: Any) -> bool:
    """Whether a record is a definition with further maskings of it."""
    return has(value, "definition", "def_target", "additional_sentences")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count entities, by the names they have in their definitions."""
    return {"entities": len({case.request.subject for case in cases})}


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell popular entities by the age of their articles, which the page id in ``ex_id`` says.

    Wikipedia numbers pages in the order they are made: the new entities begin at 58 million (2018), the popular ones
    end at 24 million (2009).
    """
    pages = [re.search(r"_(\d+)_\d+_\d+$", str(r.get("ex_id"))) for r in records if isinstance(r, Mapping)]
    if not pages or not all(pages):
        return ()
    popular = all(int(page.group(1)) < NEW_PAGES for page in pages if page)
    return (POPULAR,) if popular else READINGS


DATASET = Dataset(
    name="ecbd",
    title="Entity Cloze By Date",
    paper="Can LMs Learn New Entities from Descriptions? Challenges in Propagating Injected Knowledge, "
    "ACL 2023, arXiv 2305.01651",
    licence="not stated",
    home="GitHub yasumasaonoe/entity_knowledge_propagation, data/ecbd",
    fits=fits,
    cases=cases,
    variants=(*READINGS, POPULAR),
    facts=facts,
    files={"": "ecbd_np_easy.json", POPULAR: "ecbd_specificity.json"},
    variants_of=variants_of,
)
