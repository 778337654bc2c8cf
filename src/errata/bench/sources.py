"""Read cases from the lab's world, a named dataset, or a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from errata import files, lab
from errata.errors import ConfigError, DataError
from errata.lab import bilingual, chains, shown
from errata.lab.cases import PARTS, Part
from errata.lab.dated import dated
from errata.lab.overfitting import overfitting
from errata.types import Case, Probe, plain_case

BESIDE = ("locality", "entity_locality", "other_task")
"""Kinds of probes about facts that are unrelated to any edit, so they can be added to cases of any dataset."""


def is_lab(source: str) -> bool:
    """Whether a source names cases of the lab's world: ``lab:N``, ``lab:train`` and the like."""
    return source.startswith((f"{lab.NAME}:", f"{lab.PICTURES}:"))


def read(
    source: str,
    *,
    seed: int = 0,
    together: bool = False,
    demonstrations: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> tuple[list[Case], dict[str, Any]]:
    """Read the cases of a source; return them and the facts to record about them.

    ``source``: ``lab:N`` for N cases of the lab's world, drawn with ``seed``, or ``lab:N:SEED`` for those of another
    seed; with ``together``, edits of all of them can be in place at once. ``lab:train`` and ``lab:train:N`` are cases
    to train an editor on, ``lab:test:N`` those of subjects that none of them is about. ``lab:evoke:N`` are the edits
    of ``lab:N`` with the questions of EVOKE, where an edit's target is wrong. ``lab:dated:N`` are the same edits, each
    since a year, with questions about today and years before and after (:mod:`errata.lab.dated`).
    ``lab:forget:N`` has all facts about N of its subjects, for unlearning (:func:`errata.lab.cases_to_forget`).
    ``lab-vl:N`` are cases about pictures (:func:`errata.lab.shown.cases`). ``lab:bilingual:N``,
    ``lab:bilingual:train`` and so on are asked in two languages and edited in the first, ``lab:bilingual-tavi:N`` in
    the second, ``lab:bilingual-both:N`` by turns (:mod:`errata.lab.bilingual`). ``lab:chains-K:N``, K from 1 to 4 or
    ``last``, are questions that need K edits, or one at their last step (:mod:`errata.lab.chains`). Otherwise as for
    :func:`errata.data.reading.read`. ``demonstrations``: files to put before multi-hop questions, see
    :func:`errata.data.sets.mquake.with_demonstrations`. ``beside``: sources whose probes of the kinds :data:`BESIDE`
    are added to every case; of cases of the lab, the facts that they change. The facts are ``{"source", "together",
    "sha256", "rows", "cases", "check", "demonstrations", "beside"}``: the hash is that of the cases with everything
    added, so a changed file, loader or number of cases is another dataset. Raises ConfigError or DataError.
    """
    cases, rows, check = _lab_cases(source, seed, together) if is_lab(source) else _dataset_cases(source)
    cases, examples = _add_demonstrations(cases, demonstrations)
    cases, added = _add_probes(cases, beside, together)
    return cases, {
        "source": source,
        "together": together and is_lab(source),
        "sha256": digest(cases),
        "rows": rows,
        "cases": len(cases),
        "check": check,
        "demonstrations": examples,
        "beside": added,
    }


def again(facts: Mapping[str, Any]) -> tuple[list[Case], dict[str, Any]]:
    """Read the cases again that :func:`read` returned with these facts, with the seed of runs."""
    return read(
        facts["source"],
        together=facts["together"],
        demonstrations=[entry["path"] for entry in facts.get("demonstrations", ())],
        beside=[entry["source"] for entry in facts.get("beside", ())],
    )


def digest(cases: Sequence[Case]) -> str:
    """Return the SHA-256 of the content of some cases, 64 hex digits."""
    hasher = hashlib.sha256()
    for case in cases:
        hasher.update(json.dumps(plain_case(case), sort_keys=True).encode() + b"\n")
    return hasher.hexdigest()


EDITED_IN = {
    "bilingual": bilingual.FIRST, "bilingual-tavi": bilingual.SECOND, "bilingual-both": bilingual.BOTH,
}  # fmt: skip
"""Cases of the lab in two languages, with the language of their requests."""


FORMS: Mapping[str, Callable[[list[Case]], list[Case]]] = {
    "evoke": lambda cases: [overfitting(case) for case in cases], "dated": dated,
}  # fmt: skip
"""What is made of the cases of ``lab:N``, by what stands before N."""


def _lab_cases(source: str, seed: int, together: bool) -> tuple[list[Case], int, Any]:
    world_name, *parts = source.split(":")
    if world_name == lab.PICTURES:
        return _shown(source, parts, seed, together)
    if parts[0] == "forget":
        return _lab_forget(source, parts[1:], seed)
    if parts[0].startswith(CHAINS):
        return _lab_chains(source, parts, seed, together)
    edited = EDITED_IN[parts.pop(0)] if parts[0] in EDITED_IN else None
    form = FORMS.get(parts[0]) if parts and edited is None else None
    parts = parts[1:] if form else parts
    part: Part | None = next((name for name in PARTS if parts[:1] == [name] and not form), None)
    parts = parts if part is None else parts[1:]
    if not (parts or part == "train") or len(parts) > 2 or not all(text.isdecimal() for text in parts):
        raise ConfigError(
            f"{source!r}: expected lab:N or lab:N:SEED, lab:train, or lab:train:N, lab:test:N, lab:evoke:N, "
            "lab:dated:N and the same with :SEED, or the first ones with bilingual:, bilingual-tavi: or "
            "bilingual-both: after lab:, N and SEED numbers"
        )
    count, seed = int(parts[0]) if parts else None, int(parts[1]) if len(parts) > 1 else seed
    facts: dict[str, Any] = {"seed": seed}
    if edited is not None:
        cases = bilingual.cases(count, part=part, seed=seed, together=together, edited=edited)
    elif part == "train":
        cases = lab.training_cases(count, seed=seed)
    else:
        world = lab.world_of("test") if part == "test" else None
        cases = lab.cases(count or 0, seed=seed, together=together, world=world)
    if part == "train":
        facts["left_out"] = {
            "subjects": sorted(lab.world_of("test").by_subject), "phrasings": "paraphrase", "relations": [],
        }  # fmt: skip
    if form is not None:
        cases = form(cases)
    return cases, len(cases), facts


def _shown(source: str, parts: Sequence[str], seed: int, together: bool) -> tuple[list[Case], int, Any]:
    if len(parts) > 2 or not all(text.isdecimal() for text in parts):
        raise ConfigError(f"{source!r}: expected lab-vl:N or lab-vl:N:SEED, N cases and SEED numbers")
    if together:
        raise ConfigError(f"{source!r}: cases about pictures are edited one at a time (--schedule single)")
    seed = int(parts[1]) if len(parts) > 1 else seed
    cases = shown.cases(int(parts[0]), seed=seed)
    return cases, len(cases), {"seed": seed}


def _lab_forget(source: str, parts: list[str], seed: int) -> tuple[list[Case], int, Any]:
    if not 1 <= len(parts) <= 2 or not all(text.isdecimal() for text in parts):
        raise ConfigError(
            f"{source!r}: expected lab:forget:N or lab:forget:N:SEED, N subjects and SEED numbers"
        )
    seed = int(parts[1]) if len(parts) > 1 else seed
    cases = lab.cases_to_forget(int(parts[0]), seed=seed)
    return cases, len(cases), {"seed": seed}


CHAINS = "chains-"


def _lab_chains(source: str, parts: list[str], seed: int, together: bool) -> tuple[list[Case], int, Any]:
    kind, *numbers = parts[0].removeprefix(CHAINS), *parts[1:]
    if not 1 <= len(numbers) <= 2 or not all(text.isdecimal() for text in numbers):
        kinds = ", ".join(CHAINS + kind for kind in chains.KINDS)
        raise ConfigError(f"{source!r}: expected lab:KIND:N or lab:KIND:N:SEED, KIND one of {kinds}")
    if together:
        raise ConfigError(f"{source}: chains of edits contradict one another; use schedule: single")
    seed = int(numbers[1]) if len(numbers) > 1 else seed
    cases = chains.chain_cases(kind, int(numbers[0]), seed=seed)
    return cases, len(cases), {"seed": seed}


def _dataset_cases(source: str) -> tuple[list[Case], int, Any]:
    from errata.data import reading

    loaded = reading.read(source)
    if not loaded.cases:
        raise ConfigError(f"{source} contains no cases; see: errata data check {source}")
    return list(loaded.cases), loaded.check.rows, asdict(loaded.check)


def _add_demonstrations(cases: list[Case], paths: Sequence[str]) -> tuple[list[Case], list[dict[str, str]]]:
    """Put files of demonstrations before questions. Raises ConfigError if two apply to the same questions."""
    from errata.data.sets.mquake import with_demonstrations

    files: dict[tuple[str, str], str] = {}
    facts = []
    for path in paths:
        text, sha = _text(path)
        try:
            new_cases = with_demonstrations(cases, text)
        except DataError as error:
            raise DataError(f"demonstrations {path}: {error}") from error
        probe_types = {
            (new.kind, new.form)
            for before, after in zip(cases, new_cases, strict=True)
            for old, new in zip(before.probes, after.probes, strict=True)
            if old != new
        }
        for kind, form in sorted(probe_types):
            if (kind, form) in files:
                raise ConfigError(
                    f"demonstrations: {files[kind, form]} and {path} apply to the same questions, kind {kind} of "
                    f"form {form}; leave one out"
                )
            files[kind, form] = path
        cases = new_cases
        facts.append({"path": path, "sha256": sha})
    return cases, facts


def _text(path: str) -> tuple[str, str]:
    """Read a text file; return its text and its hash. Raises DataError."""
    content = files.read_bytes(
        Path(path).expanduser(), DataError, most=files.LARGEST_YAML, what="demonstrations"
    )
    text = files.decode(content, f"demonstrations {path}", DataError)
    return text.replace("\r\n", "\n"), hashlib.sha256(content).hexdigest()


def _add_probes(
    cases: list[Case], sources: Sequence[str], together: bool
) -> tuple[list[Case], list[dict[str, Any]]]:
    """Add the probes of other sources to every case, except those that it already has."""
    from errata.data import reading

    facts = []
    for source in sources:
        if is_lab(source):
            cases, fact = _add_lab_facts(cases, source, together)
            facts.append(fact)
            continue
        loaded = reading.read(source)
        probes = [
            # a group belongs to one case, so the probes of several cases must not share its name
            probe if probe.group is None else replace(probe, group=f"{case.id} {probe.group}")
            for case in loaded.cases
            for probe in case.probes
            if probe.kind in BESIDE
        ]
        if not probes:
            kinds = ", ".join(sorted(loaded.check.probes)) or "none"
            raise ConfigError(
                f"beside {source}: expected probes of the kinds {', '.join(BESIDE)}, found {kinds}; "
                f"see: errata data check {source}"
            )
        unique_probes = dict.fromkeys(probes)
        cases = [_with_extra_probes(case, unique_probes) for case in cases]
        facts.append({"source": source, "sha256": loaded.check.sha256, "probes": len(unique_probes)})
    return cases, facts


def _add_lab_facts(cases: list[Case], source: str, together: bool) -> tuple[list[Case], dict[str, Any]]:
    """Add facts of the lab, as they are unedited, to every case that names none of their subjects.

    With ``together`` no case may name them. Raises ConfigError where a case is left with none.
    """
    drawn = _lab_cases(source, 0, False)[0]
    probes = {}
    for one in drawn:
        before = one.probes[0].before  # the first probe is the request itself
        probes[Probe("locality", one.request.text, before, before)] = one.request.subject
    every = {name for case in cases for name in _names(case)}
    found = []
    for case in cases:
        taken = every if together else _names(case)
        own = [probe for probe, subject in probes.items() if subject not in taken]
        if not own:
            raise ConfigError(
                f"beside {source}: all its facts are about entities of case {case.id}; draw others"
            )
        found.append(_with_extra_probes(case, own))
    return found, {"source": source, "sha256": digest(drawn), "probes": len(probes)}


def _names(case: Case) -> set[str | None]:
    """Return the subjects of a case's requests, and their targets before and after."""
    return {name for r in case.requests for name in (r.subject, r.target, r.target_old)}


def _with_extra_probes(case: Case, probes: Iterable[Probe]) -> Case:
    """Add the probes that a case does not have."""
    own = set(case.probes)
    return replace(case, probes=(*case.probes, *(probe for probe in probes if probe not in own)))
