"""ECBD: entities newer than the model, introduced by a defining sentence and probed in another sentence.

A record holds ``definition`` with one span masked as ``<extra_id_0>`` and its filling ``def_target``; the
entity ``ent_str``; and ``probe_sentences`` by template, each masked and filled in the same way. Not used:
``additional_sentences`` (the definition under other masks, meant for training), ``category``, ``attribute``
and ``conceptnet`` (the same or empty in every record of the published files) and ``qid`` (the entity's
class).

The authors fill masks literally and score the span's tokens given the text before it; a causal model does not see
the text after the span. Probes of form ``span`` do the same. Where a span begins inside a word, the prompt ends
before that word and the answer has the whole word, since a tokenizer sees no other boundary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, SubjectAbsent, make_request
from errata.data.sets._files import read_records
from errata.data.sets._parts import has
from errata.types import Case, Probe, Request

READINGS = ("titled", "span", "definition")
"""How a definition becomes a request, see :func:`edit`."""
POPULAR = "popular"
NEW_PAGES = 40_000_000
"""Wikipedia page ids below this are popular entities, above it new ones."""

_MASK = "<extra_id_0>"
_MARKS = re.compile(r"<extra_id_\d+>")
_CLOSES = ".,;:!?%)]}"
_OPENS = "([{"


@dataclass(frozen=True)
class Cloze:
    """A sentence in three parts, with white space: before the masked span, the span's text, and after it."""

    left: str
    span: str
    right: str

    @classmethod
    def read(cls, sentence: str, filling: str) -> Cloze:
        """Split a masked sentence at its span, at a word boundary. Raises Malformed, Skip."""
        masks = sentence.count(_MASK)
        if masks != 1:
            raise Malformed(f"expected one {_MASK}, found {masks} in {sentence!r:.80}")
        left, _, right = sentence.partition(_MASK)
        span = unmarked(filling)
        word = re.search(r"\S+$", left)
        if word and word.group()[-1] not in _OPENS and not (span[0].isspace() or span[0] in _CLOSES):
            left, span = left[: word.start()], word.group() + span
        if not left.strip():
            raise Skip(f"no text comes before the span {span!r}, so a causal model has no prompt for it")
        return cls(left, span, right)

    @property
    def prompt(self) -> str:
        """What a causal model continues."""
        return self.left.rstrip()

    @property
    def answer(self) -> str:
        """The expected continuation."""
        return self.span.strip()

    @property
    def text(self) -> str:
        """The sentence with its span filled in."""
        return self.left + self.span + self.right


def unmarked(filling: str) -> str:
    """Return the span's text without the mask markers around it. Raises Malformed if it is then empty."""
    text = _MARKS.sub("", filling).strip(" ")
    if not text.strip():
        raise Malformed(f"expected a filling between its marks, found {filling!r}")
    return text


def mention(entity: str, text: str) -> tuple[int, int] | None:
    """Find an entity in a text, as whole words, ignoring case and a final bracket in its name.

    The bracket disambiguates Wikipedia titles, as in ``Lake Fire (2020)``, and does not occur in running text.
    """
    names = dict.fromkeys((entity.strip(), re.sub(r"\s*\([^()]*\)$", "", entity.strip())))
    for flags in (0, re.IGNORECASE):
        for name in names:
            match = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags)
            if match and name:
                return match.span()
    return None


def edit(record: Record, reading: str) -> Request:
    """Turn a record's definition into a request.

    ``titled``: prompt, the definition up to its masked span; target, the span. If the prompt does not name the
    entity, its name and a colon are prepended, so that every row can be used. ``span``: the same without
    prepending; rows that do not name the entity are skipped. ``definition``: prompt, the definition up to and
    including the entity; target, the rest, filled in; closest to fine-tuning on the sentence. Raises Skip,
    Malformed.
    """
    cloze = Cloze.read(record.text("definition"), record.text("def_target"))
    entity = record.text("ent_str")
    text = cloze.text if reading == "definition" else cloze.prompt
    place = mention(entity, text)
    if place is None and reading == "titled":
        return make_request(f"{{}}: {cloze.prompt}", entity, cloze.answer)
    if place is None:
        where = "its definition" if reading == "definition" else f"the text before the span, {text!r:.80}"
        raise SubjectAbsent(f"the entity {entity!r} is not named in {where}")
    begin, end = place
    target = cloze.answer
    if reading == "definition":
        word = re.compile(rf"[^\s{re.escape(_CLOSES)}]*").match(text, end)
        after = word.end() if word else end
        text, target = text[:after], text[after:]
    return make_request(f"{text[:begin]}{{}}{text[end:]}", text[begin:end], target)


def sentences(record: Record) -> Iterator[Record]:
    """Yield the probe sentences of a record, in the order of their templates. Raises Malformed."""
    groups = record.get("probe_sentences")
    if not isinstance(groups, Mapping) or not groups:
        raise Malformed(f"probe_sentences: expected sentences by template, found {groups!r:.60}")
    for i, (name, value) in enumerate(groups.items()):
        yield Record(value, f"{record.where}, {name}", i)


def efficacy(request: Request, *, same_before: bool = False) -> Probe:
    """Return the efficacy probe: how probable the definition's own words are."""
    return Probe(
        "efficacy", request.text, (request.target,), (request.target,) if same_before else (), form="span"
    )


def span_probes(record: Record, kind: str, *, same_before: bool) -> tuple[Probe, ...]:
    """Return a probe per probe sentence: the text before its masked span, the span as answer.

    ``known``: the entity is popular, the answer is that of the unedited model too.
    """
    probes = []
    for sentence in sentences(record):
        cloze = Cloze.read(sentence.text("probe_sentence"), sentence.text("label"))
        before = (cloze.answer,) if same_before else ()
        probes.append(Probe(kind, cloze.prompt, (cloze.answer,), before, form="span"))
    return tuple(probes)


def popular(path: Path) -> tuple[Probe, ...]:
    """Return the locality probes from the file of popular entities, to evaluate after every edit of a run.

    Raises DataError where the file cannot be read, Malformed naming a record that is none of ECBD's.
    """
    return tuple(
        probe
        for record in read_records(path)
        for probe in span_probes(record, "entity_locality", same_before=True)
    )


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; the variant is a reading, or says that entities are popular.

    Raises Skip or Malformed.
    """
    is_popular = variant == POPULAR
    # a popular entity is only there for its probes, so its definition is read as "titled", which skips none
    request = edit(record, "titled" if is_popular else variant)
    probes = span_probes(record, "entity_locality" if is_popular else "entity", same_before=is_popular)
    yield Case(f"ecbd:{record.text('ex_id')}", request, (efficacy(request, same_before=is_popular), *probes))


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
