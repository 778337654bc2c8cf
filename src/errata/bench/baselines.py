"""What a board is read against: the host as it is, and the host that is told the facts in every prompt."""

from __future__ import annotations

from dataclasses import replace

from errata.types import Case


def told(case: Case) -> Case:
    """Return a case with its own facts before every probe's prompt, each as ``New fact: <text> <target>.``, a line.

    The ceiling of retrieval: the right facts are always found, whatever is asked.
    """
    facts = "".join(
        f"New fact: {request.text.rstrip()} {request.target.strip()}.\n" for request in case.requests
    )
    return replace(case, probes=tuple(replace(p, prompt=facts + p.prompt) for p in case.probes))
