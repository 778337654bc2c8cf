"""WinoBias: which of two people of a sentence a pronoun means, where that agrees with a stereotype and where not.

A line of its text files is a number and a sentence with two brackets, the person that is meant and the pronoun:
``1 [The developer] argued with the designer because [she] did not like the design.`` Files come in pairs,
``pro_stereotyped_type1.txt.dev`` and ``anti_stereotyped_type1.txt.dev``: line by line the same sentence with the
pronoun of the other gender. Type 1 needs knowledge of the world, type 2 syntax alone.

A case is a sentence with both pronouns; either file of a pair stands for both, and the other must lie beside it. Its
questions, of kind ``coreference``, are DAMA's: the sentence, then ``'She' refers to the``, whose answer is the person
without article. The request teaches the answer of the sentence against the stereotype.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.formats import open_text
from errata.data.sets._parts import has
from errata.errors import DataError
from errata.types import Case, Probe

PRO, ANTI = "pro_stereotyped", "anti_stereotyped"
MALE, FEMALE = ("he", "him", "his", "himself"), ("she", "her", "hers", "herself")
_LINE = re.compile(r"\d+[ \t]+\S")
_BRACKET = re.compile(r"\[([^\[\]]+)\]")
_ARTICLE = re.compile(r"(?:the|a|an)\s+", re.IGNORECASE)
_PRONOUN = re.compile(r"\b(?:" + "|".join(MALE + FEMALE) + r")\b", re.IGNORECASE)


def read_file(path: Path) -> Iterator[Any]:
    """Pair the lines of a file with those of the file of the other pronouns.

    Raises DataError where that is not there, or has another number of lines.
    """
    own, other = (PRO, ANTI) if PRO in path.name else (ANTI, PRO)
    if own not in path.name:
        raise DataError(f"{path}: expected a name as {PRO}_type1.txt.dev or {ANTI}_type1.txt.dev")
    beside = path.with_name(path.name.replace(own, other))
    if not beside.is_file():
        raise DataError(
            f"{path} has sentences with one of two pronouns each; its pair {beside.name} is not beside it"
        )
    lines = {PRO: _lines(path if own == PRO else beside), ANTI: _lines(path if own == ANTI else beside)}
    if len(lines[PRO]) != len(lines[ANTI]):
        raise DataError(
            f"{path} and {beside.name} do not belong together: {len(lines[own])} and {len(lines[other])} lines"
        )
    for pro, anti in zip(lines[PRO], lines[ANTI], strict=True):
        yield {"pro": pro, "anti": anti}


def _lines(path: Path) -> list[str]:
    with open_text(path) as file:
        return [line.strip() for line in file if line.strip()]


def is_winobias(path: Path) -> bool:
    """Whether a file begins with a numbered sentence with two brackets."""
    try:
        with open_text(path) as file:
            first = file.readline(1000)
    except DataError:
        return False
    return bool(_LINE.match(first)) and len(_BRACKET.findall(first)) == 2


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn a sentence with either pronoun into a case. Raises Malformed."""
    pro, anti = (_read(record.text(side)) for side in ("pro", "anti"))
    (person, male, text), (other, male_too, beside) = pro, anti
    if person != other or male == male_too or _PRONOUN.sub("*", text) != _PRONOUN.sub("*", beside):
        raise Malformed(f"expected one sentence with two pronouns, found {text!r:.80} and {beside!r:.80}")
    name = f"winobias:{record.index}"
    probes = [
        _probe(prompt, person, male, against) for (_, male, prompt), against in ((pro, False), (anti, True))
    ]
    yield Case(name, make_request(probes[1].prompt, person, person, id=name), tuple(probes))


def _read(line: str) -> tuple[str, bool, str]:
    """Return the person without article, whether the pronoun is male, and the prompt."""
    sentence = line.split(maxsplit=1)[1] if _LINE.match(line) else ""
    marked = _BRACKET.findall(sentence)
    pronouns = [one for one in marked if one.casefold() in MALE + FEMALE]
    people = [one for one in marked if one not in pronouns]
    if len(people) != 1 or len(pronouns) != 1:
        raise Malformed(
            f"expected a number and a sentence with a person and a pronoun in brackets, found {line!r:.100}"
        )
    (person,), (pronoun,) = people, pronouns
    prompt = f"{_BRACKET.sub(lambda found: found.group(1), sentence)} '{pronoun.capitalize()}' refers to the"
    return _ARTICLE.sub("", person, count=1).strip(), pronoun.casefold() in MALE, prompt


def _probe(prompt: str, person: str, male: bool, against: bool) -> Probe:
    numbers = (("against", float(against)), ("male", float(male)))
    return Probe("coreference", prompt, (person,), (), form="span", covariates=numbers)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count people, and sentences by the gender that agrees with the stereotype."""
    male = Counter("male" if dict(case.probes[0].covariates)["male"] else "female" for case in cases)
    return {"people": len({case.request.target for case in cases}), "stereotypes": dict(sorted(male.items()))}


def fits(value: Any) -> bool:
    """Whether a record is a pair of lines."""
    return has(value, "pro", "anti") and all(_LINE.match(str(value[side])) for side in ("pro", "anti"))


_VARIANTS = tuple(f"type{number}-{part}" for number in (1, 2) for part in ("dev", "test"))

DATASET = Dataset(
    name="winobias",
    title="WinoBias",
    paper="Gender Bias in Coreference Resolution: Evaluation and Debiasing Methods, NAACL 2018, arXiv 1804.06876",
    licence="MIT (repository)",
    home="GitHub uclanlp/corefBias, WinoBias/wino/data: both files of a pair",
    fits=fits,
    cases=cases,
    variants=_VARIANTS,
    facts=facts,
    files={name: f"{PRO}_{name.replace('-', '.txt.')}" for name in _VARIANTS},
    read_file=read_file,
    fits_file=is_winobias,
)
