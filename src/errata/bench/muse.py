"""How much of texts a model still holds: by membership, word for word, and as knowledge.

The measures of MUSE, Shi et al., arXiv 2407.06460: privacy leakage by Min-K% probability beside a model that never had
the texts, verbatim and knowledge memorisation by ROUGE-L.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.errors import DataError
from errata.evaluation import likelihood
from errata.evaluation.check import answer_requests
from errata.evaluation.metrics import longform, matching
from errata.host.host import Host
from errata.linalg.samples import auc
from errata.types import Request

LEAST = 0.4
"""Share of a text's tokens, the least probable ones, that Min-K% reads (MUSE)."""


def membership(host: Host, texts: Sequence[str], *, share: float = LEAST) -> list[float]:
    """Return each text's Min-K% score: the mean log-probability of the ``share`` least probable tokens, nats.

    Texts that were trained on score higher. Raises DataError for a text without tokens. Source: Shi et al., arXiv
    2310.16789.
    """
    scores: list[float] = []
    for text, row in zip(texts, likelihood.rolling(host, texts), strict=True):
        if not row:
            raise DataError(f"{text!r} has no tokens to score")
        lowest = sorted(row)[: max(1, round(share * len(row)))]
        scores.append(sum(lowest) / len(lowest))
    return scores


def separation(host: Host, members: Sequence[str], others: Sequence[str]) -> float:
    """Return how often a text that is not a member scores above one that is, ties counted half: MUSE's AUC.

    0.5: membership does not show; near 0: it does.
    """
    return auc(membership(host, others), membership(host, members))


def privacy_leakage(separation: float, reference: float) -> float:
    """Return by how much a separation exceeds that of a model that never had the texts, in per cent of the latter.

    0 is right; -100: members are told as before; far above 0: they are told by how improbable they were made. Raises
    DataError where the reference tells all members, because nothing can be compared with it.
    """
    if reference <= 0:
        raise DataError(
            "the reference, which was trained on neither, tells all answers to forget from the others by their "
            "probability: they differ in more than membership, so choose others that are like them"
        )
    return 100 * (separation - reference) / reference


def verbatim(host: Host, texts: Sequence[str]) -> float:
    """Return the mean ROUGE-L F1 of how a host continues the first half of each text with its second half.

    Greedily, as many tokens as there are. Raises DataError for a text of one token.
    """
    heads, tails, lengths = list[str](), list[str](), list[int]()
    for text in texts:
        encoded = host.encode(text)
        middle = len(encoded.ids) // 2
        border = encoded.spans[middle][0] if middle else 0
        heads.append(text[:border].rstrip())
        tails.append(text[border:].strip())
        lengths.append(len(encoded.ids) - middle)
        if not heads[-1] or not tails[-1]:
            raise DataError(f"{text!r} is too short to be divided in two")
    found = likelihood.generate_texts(host, heads, (), max(lengths))
    scores: list[float] = []
    for text, tail, length in zip(found, tails, lengths, strict=True):
        (own,) = host.decode([host.encode(text, special=False).ids[:length]])
        scores.append(longform.rouge_l(own, tail).f)
    return sum(scores) / len(scores)


def knowledge(host: Host, requests: Sequence[Request]) -> float:
    """Return the mean ROUGE-L recall of the answers' first lines beside the requests' targets."""
    answers = answer_requests(host, requests)
    pairs = zip(answers, requests, strict=True)
    scores = [longform.rouge_l(matching.first_answer(text), request.target).recall for text, request in pairs]
    return sum(scores) / len(scores)
