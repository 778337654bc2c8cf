"""What a board is read against: the host as it is, and the host that is told the facts in every prompt."""

from __future__ import annotations

from dataclasses import replace

from errata.types import Case
from errata.writing import Join, statement


def told(case: Case, join: Join = "auto") -> Case:
    """Return a case with its own facts before every probe's prompt, each as ``New fact: <text> <target>.``, a line.

    Text and target are joined, and the sentence is ended, as their writing requires.
    The ceiling of retrieval: the right facts are always found, whatever is asked.
    """
    facts = "".join(f"New fact: {statement(r.text, r.target, join)}\n" for r in case.requests)
    return replace(case, probes=tuple(replace(p, prompt=facts + p.prompt) for p in case.probes))
