"""Which training texts taught a model an answer: baselines by words and states, and gradients of the loss.

Gradients are of the margin log(p / (1 - p)), summed over a text's tokens: what a converged model has learned has next
to no loss, and so no gradient of it, while the tokens that nothing decides (which fact comes next) fill the gradient of
a text's loss. The gradient for a linear map is the sum over tokens of g h^T. It is read in two small bases, of the
map's inputs h and of the gradients g at its output, so that a text is a matrix ``[r, r]`` for each map (LoGra, arXiv
2405.13954, with the leading directions of both second moments). From these features:

* ``tracin``: cosine of the query's gradient and the text's (arXiv 2002.08484; one checkpoint, normalised as in
  2205.11482);
* ``trak``: the query's features times the inverse kernel of the texts' (2303.14186). Departs: the factor 1 - p of each
  text is left out;
* ``ekfac``: the query's gradient divided by the mean squares of the texts' features in the eigenbases of the Kronecker
  factors, the corrected eigenvalues of 2308.03296. Departs: squares are of the texts' own labels, not of sampled ones,
  and beyond the leading directions nothing is seen.

``bm25`` ranks by words, ``embedding`` by the cosine of mean hidden states at half the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import ConfigError, DataError
from errata.host.embedding import embed
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.host.tokens import Answer
from errata.inspect.attribute_text import WordIndex, words
from errata.linalg.gram import solve_gram
from errata.linalg.moments import eigen
from errata.locate.gradients import Pairs, collect_rows
from errata.progress import OnCount, ignore
from errata.registry import unknown

RANK = 32
"""Leading directions of inputs, and of gradients, that features are taken in."""
SAMPLE = 64
"""Texts that the directions are taken from."""
SUMS = 2**32
"""Bytes of sums of outer products held at once, while directions are taken; more maps need further passes."""
DAMPING = 0.1
"""Added to the corrected eigenvalues of ``ekfac``, in units of their mean."""
RIDGE = 1e-3
"""Added to the kernel of ``trak``, in units of its mean diagonal."""
LONGEST = 512
"""Tokens of a text that are read."""
GRADIENT = ("tracin", "trak", "ekfac")
METHODS = ("bm25", "embedding", *GRADIENT)


@dataclass(frozen=True)
class Query:
    """An answer whose origin is asked for."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Source:
    """A text and how strongly it is held to have taught an answer."""

    index: int
    """Place in the corpus, from 0."""
    score: float
    words: tuple[str, ...]
    """Words of prompt and answer that the text holds."""
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


# --- features -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """Directions that gradients of one map are read in."""

    inputs: Tensor
    """Orthonormal rows ``[r_in, d_in]``."""
    outputs: Tensor
    """Orthonormal rows ``[r_out, d_out]``."""

    @staticmethod
    def leading(inputs: Tensor, gradients: Tensor, rank: int) -> Basis:
        """Take the leading eigenvectors of sums of outer products, of inputs and of output gradients ``[d, d]``."""
        return Basis(*(eigen(s).vectors.flip(1)[:, :rank].mT.float() for s in (inputs, gradients)))

    def features(self, pairs: Pairs) -> Tensor:
        """Return the gradient of a weight in these directions, ``[r_out * r_in]``."""
        inner = pairs.inputs.float() @ self.inputs.mT  # [tokens, r_in]
        outer = pairs.gradients.float() @ self.outputs.mT  # [tokens, r_out]
        return (outer.mT @ inner).flatten()


class Gradients:
    """Features of texts on a host, in the leading directions of some linear maps."""

    def __init__(
        self, host: Host, texts: Sequence[str], *, modules: Sequence[str] | None = None, rank: int = RANK,
        margin: bool = True, batch_size: int = 16, on_texts: OnCount = ignore,
    ) -> None:  # fmt: skip
        """Read the texts once, and a sample of them twice.

        ``modules``: paths of linear maps; None takes every block's output of the feed-forward. ``margin``: False takes
        gradients of the loss. Raises ConfigError for a host that is no causal language model, HostError for modules
        without a plain linear map.
        """
        if host.kind != CAUSAL:
            raise ConfigError(f"gradients of texts need a causal language model, and {host.name} is none")
        own = [site.name for site in host.layout.mlp_out if site is not None]
        self.host, self.modules, self.margin = host, list(modules or own), margin
        self.batch_size = batch_size
        rows = [text_row(host, text) for text in texts]
        step = max(1, len(rows) // SAMPLE)
        self.bases = self._bases([row for row in rows[::step][:SAMPLE] if row is not None], rank)
        self.texts = self._features(rows, on_texts=lambda done: on_texts(done, len(rows)))
        """By map, ``[n, r_out * r_in]``; zeros for a text of one token."""

    def queries(self, queries: Sequence[Query]) -> dict[str, Tensor]:
        """Return the features of answers, by map ``[q, r_out * r_in]``."""
        rows = [self.host.encode_answer(query.prompt, query.answer) for query in queries]
        return self._features(rows)

    def _bases(self, rows: Sequence[Answer], rank: int) -> dict[str, Basis]:
        """Take each map's leading directions over some texts, of as many maps at a time as :data:`SUMS` has room for.

        Raises DataError where no text has two tokens.
        """
        if not rows:
            raise DataError("none of the texts that directions are taken from has two tokens or more")
        (short,) = self._pairs([min(rows, key=lambda row: len(row.ids))], self.modules)
        bases: dict[str, Basis] = {}
        for group in _groups(short):
            sums = {
                name: [s.new_zeros(s.shape[1], s.shape[1], dtype=torch.float64) for s in _sides(short[name])]
                for name in group
            }
            for first in range(0, len(rows), self.batch_size):
                for row in self._pairs(rows[first : first + self.batch_size], group):
                    for name in group:
                        for total, side in zip(sums[name], _sides(row[name]), strict=True):
                            wide = side.double()
                            total.addmm_(wide.mT, wide)
            for name, (inputs, outputs) in sums.items():
                bases[name] = Basis.leading(inputs, outputs, rank)
        return bases

    def _pairs(self, rows: Sequence[Answer], modules: Sequence[str]) -> list[dict[str, Pairs]]:
        return collect_rows(
            self.host, rows, modules, tokens="all", margin=self.margin, batch_size=self.batch_size
        )

    def _features(
        self, rows: Sequence[Answer | None], *, on_texts: Callable[[int], None] = ignore
    ) -> dict[str, Tensor]:
        result = {
            name: torch.zeros(len(rows), len(basis.outputs) * len(basis.inputs))
            for name, basis in self.bases.items()
        }
        places = [i for i, row in enumerate(rows) if row is not None]
        places.sort(key=lambda i: len(rows[i].ids))  # type: ignore[union-attr]
        for first in range(0, len(places), self.batch_size):
            part = places[first : first + self.batch_size]
            found = self._pairs([row for i in part if (row := rows[i]) is not None], self.modules)
            for i, pairs in zip(part, found, strict=True):
                for name, basis in self.bases.items():
                    result[name][i] = basis.features(pairs[name])
            on_texts(first + len(part))
        return result


def _sides(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return pairs.inputs, pairs.gradients


def _groups(pairs: Mapping[str, Pairs]) -> list[list[str]]:
    """Return maps in groups whose sums of outer products fit into :data:`SUMS` bytes; one map at least."""
    groups: list[list[str]] = []
    room = 0
    for name, own in pairs.items():
        size = sum(8 * side.shape[1] ** 2 for side in _sides(own))
        if not groups or size > room:
            groups.append([])
            room = SUMS
        groups[-1].append(name)
        room -= size
    return groups


def text_row(host: Host, text: str) -> Answer | None:
    """Return a text as an answer to its own first token; None for one without a second token."""
    ids = tuple(host.encode(text).ids[: min(LONGEST, host.window or LONGEST)])
    return Answer(ids, 1) if len(ids) > 1 else None


# --- scores ---------------------------------------------------------------------------------


def tracin(queries: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> Tensor:
    """Return cosines of gradients, all maps together, ``[q, n]``."""
    return functional.normalize(_joined(queries), dim=1) @ functional.normalize(_joined(texts), dim=1).mT


def trak(queries: Mapping[str, Tensor], texts: Mapping[str, Tensor], ridge: float = RIDGE) -> Tensor:
    """Return phi_q^T (Phi^T Phi + l I)^-1 Phi^T ``[q, n]`` by its dual, phi_q^T Phi^T (Phi Phi^T + l I)^-1."""
    left, right = _joined(queries).double(), _joined(texts).double()
    level = ridge * float(right.square().sum(1).mean()) or 1.0
    return solve_gram(right, right @ left.mT, level).mT.float()


def ekfac(queries: Mapping[str, Tensor], texts: Mapping[str, Tensor], damping: float = DAMPING) -> Tensor:
    """Return g_q^T (L + l)^-1 g_z, L the mean squares of features, each text's over its own norm in it, ``[q, n]``."""
    total: Tensor | float = 0.0
    own: Tensor | float = 0.0
    for name, right in texts.items():
        squares = right.square().mean(0)
        inverse = 1 / (squares + damping * squares.mean()).clamp_min(1e-30)
        total = total + (queries[name] * inverse) @ right.mT
        own = own + (right.square() * inverse).sum(1)
    assert isinstance(total, Tensor) and isinstance(own, Tensor)
    return total / own.sqrt().clamp_min(1e-30)


SCORES: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]] = {
    "tracin": tracin, "trak": trak, "ekfac": ekfac,
}  # fmt: skip


def _joined(features: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(features.values()), 1)


def scores(
    host: Host, queries: Sequence[Query], texts: Sequence[str], method: str, *, on_texts: OnCount = ignore,
    gradients: Gradients | None = None,
) -> Tensor:  # fmt: skip
    """Return how strongly each text is held to have taught each answer, ``[q, n]``; higher is stronger.

    ``gradients``: features of these texts, to use several methods on. Raises ConfigError for an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(unknown(method, list(METHODS), "method of attribution"))
    asked = [host.encode_answer(query.prompt, query.answer) for query in queries]
    whole = host.decode([list(row.ids) for row in asked])
    if method == "bm25":
        index = WordIndex(texts)
        return torch.stack([index.scores(text) for text in whole])
    if method == "embedding":
        return embed(host, whole) @ embed(host, texts).mT
    found = gradients or Gradients(host, texts, on_texts=on_texts)
    return SCORES[method](found.queries(queries), found.texts)


def attribute(
    host: Host, query: Query, texts: Sequence[str], *, method: str = "ekfac", shortlist: int = 200,
    limit: int = 10, on_texts: OnCount = ignore,
) -> list[Source]:  # fmt: skip
    """Return the texts that are held to have taught an answer, the strongest first.

    ``shortlist``: how many texts, the first by BM25, gradients are taken of; 0 takes all. Raises DataError for too few
    texts, ConfigError for an unknown method.
    """
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts given; a ranking needs two or more")
    places = list(range(len(texts)))
    if method in GRADIENT and 0 < shortlist < len(texts):
        first = scores(host, [query], texts, "bm25")[0].topk(shortlist).indices
        places = sorted(first.tolist())
    values = scores(host, [query], [texts[i] for i in places], method, on_texts=on_texts)[0]
    best, order = values.topk(min(limit, len(places)))
    chosen: list[int] = [places[i] for i in order.tolist()]
    asked = set(words(f"{query.prompt} {query.answer}"))
    result = []
    for score, place in zip(best.tolist(), chosen, strict=True):
        text = texts[place]
        shared = tuple(word for word in dict.fromkeys(words(text)) if word in asked)
        result.append(Source(place, score, shared, text))
    return result


# --- how good a ranking is ------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """How early texts that are known to state a fact come, over some queries."""

    queries: int
    mrr: float
    """Mean of 1 / rank of the first such text."""
    recall: float
    """Mean share of such texts among the first ten, of as many as could be there."""


def ranking(values: Tensor, known: Sequence[Sequence[int]], most: int = 10) -> Ranking:
    """Compare scores ``[q, n]`` with the places of texts known to be right; of equal scores the later counts first.

    Raises ValueError for a query without a known text.
    """
    reciprocal, recalls = [], []
    for row, right in zip(values, known, strict=True):
        if not right:
            raise ValueError("a query without a known text has no rank")
        ranks = sorted(
            1 + int((row > row[i]).sum()) + sum(int(row[j] == row[i]) for j in range(i + 1, len(row)))
            for i in right
        )
        reciprocal.append(1 / ranks[0])
        recalls.append(sum(rank <= most for rank in ranks) / min(most, len(ranks)))
    count = len(reciprocal)
    return Ranking(count, sum(reciprocal) / count, sum(recalls) / count)
