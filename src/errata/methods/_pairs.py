"""What debiasing methods share: requests whose prompts two answers may follow, and the values for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from errata.host.host import Host
from errata.locate.contexts import Context
from errata.locate.problems import Span, ValueProblem, subject_span, value_problems
from errata.types import Request

PRONOUNS = ("he", "she")


def check_pair(pair: Sequence[str]) -> list[str]:
    """Complain about a pair that is not two different answers."""
    two = len(pair) == 2 and all(isinstance(one, str) and one.strip() for one in pair)
    if two and pair[0].strip() != pair[1].strip():
        return []
    return [f"pair: expected two different answers, found {list(pair)}"]


def with_target(requests: Sequence[Request], target: str) -> list[Request]:
    """Return the requests with one of the two answers in place of their own."""
    return [replace(request, target=target, target_old=None) for request in requests]


def balanced_problems(
    host: Host, requests: Sequence[Request], pair: Sequence[str], contexts: Sequence[Context], *,
    span: Span = subject_span, merge: bool = True, end: bool = False,
) -> list[ValueProblem]:  # fmt: skip
    """Return a problem per request, to be searched with ``balance``: the second answer's rows have negative weight.

    So the loss is the square of the difference of their log-probabilities, averaged over contexts.
    ``merge``: one problem for requests that share their text up to the edited token.
    """
    groups = [list(range(len(requests)))] if merge else [[i] for i in range(len(requests))]
    problems = list[ValueProblem]()
    for group in groups:
        own = [requests[i] for i in group]
        both = [*with_target(own, pair[0]), *with_target(own, pair[1])]
        for problem in value_problems(host, both, contexts, span=span, end=end):
            served = sorted({group[i % len(group)] for i in problem.requests})
            signs = [1 if i < len(group) else -1 for i in problem.requests for _ in contexts]
            rows = [
                replace(row, loss_weight=sign * len(row.targets) * row.loss_weight / len(served))
                for sign, row in zip(signs, problem.rows, strict=True)
            ]
            problems.append(replace(problem, requests=tuple(served), rows=tuple(rows)))
    return problems
