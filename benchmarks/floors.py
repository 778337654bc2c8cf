"""Operations that cannot be avoided: what an edit costs when nothing is computed twice.

Counted from the model's shape and the requests' own tokens, two operations (one multiplication, one
addition) for each entry of a weight matrix and each token it is applied to. With

    B[l]   entries of all weight matrices of block l
    H      entries of the output head
    L      the layer whose output is shifted; T the steps of the search
    D(x)   number of distinct beginnings among token sequences x: texts that begin alike share the
           states of what they have in common, so a context's prefix counts once, not once a request

the floors are, summed over all requests of a fit,

    values      2 (B[0] + ... + B[N-1]) D(tokens before the subject's last one)
                + 2 (B[0] + ... + B[L]) tail
                + (T + T - 1) 2 ((B[L+1] + ... + B[N-1]) tail + H read)
    keys        2 (B[0] + ... + B[L']) D(tokens up to the subject's last one)

``tail`` counts, over all contexts, the tokens from the subject's last one to the one before the last
target token, and one token for the row that keeps the subject's essence; ``read`` counts the positions
where logits are needed: target tokens and one for that row. The tail's states up to layer L are fixed
and computed once; each of T steps runs it forwards through the blocks above, each but the last also
backwards to activations, which costs the same again (weights take no gradient). L' is the last layer
written; every block is run once for the keys, although the residual is measured anew at each layer.

    statistics  2 (B[0] + ... + B[top] less the top site's own matrix) + sum over sites m (m + 1), a token:
                k k^T is symmetric, so half of it will do
    gradients   2 (B[0] + ... + B[N-1]) D(all tokens) + 2 H read
                + (2 (B[low+1] + ... + B[N-1]) + 2 H) read
                for one gradient at the answers' own positions, ``low`` the lowest layer edited
    descent     2 (B[0] + ... + B[low]) D(all tokens)
                + (T + 1 + T) (2 (B[low+1] + ... + B[N-1]) D(all tokens) + 2 H read)
                for T steps on changes of several layers, ``low`` the lowest: all gradients but none behind the
                last step, whose loss alone is needed; keys come with the first of these passes

Left out, so that the floor stays a floor: attention's products of queries, keys and values, norms and
activations, embeddings, the closed-form solve (2 m^2 n operations a layer in thin form). Blocks count
whole: what could still be saved inside the first block above the shift and inside the last one
(tokens between subject and answer need no more than their keys and values there) is not deducted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.naive import Prefixes, Row, lay_out, subject_place

from errata.host.host import Host
from errata.types import Request


@dataclass(frozen=True)
class Size:
    """Entries of a model's weight matrices."""

    blocks: tuple[int, ...]
    """Per block, all its matrices."""
    head: int
    """The output head."""

    @staticmethod
    def of(host: Host) -> Size:
        """Count them; norms, biases and embeddings are no matrices here."""
        blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
        entries = tuple(sum(p.numel() for p in block.parameters() if p.ndim >= 2) for block in blocks)
        return Size(entries, host.model.get_output_embeddings().weight.numel())

    def up_to(self, layer: int) -> int:
        """Entries of the blocks 0 to ``layer``."""
        return sum(self.blocks[: layer + 1])

    def above(self, layer: int) -> int:
        """Entries of the blocks over ``layer``."""
        return sum(self.blocks[layer + 1 :])


def distinct(rows: Iterable[Sequence[int]]) -> int:
    """Count the distinct beginnings of token sequences: the states there are to compute."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def values(size: Size, rows: Sequence[Row], *, layer: int, steps: int) -> float:
    """Floor of a value search over all rows of all requests, in operations."""
    before = distinct(row.ids[: row.place] for row in rows)
    tail = sum(len(row.ids) - row.place if row.targets else 1 for row in rows)
    read = sum(len(row.targets) or 1 for row in rows)
    once = 2 * size.up_to(len(size.blocks) - 1) * before + 2 * size.up_to(layer) * tail
    return float(once + (2 * steps - 1) * 2 * (size.above(layer) * tail + size.head * read))


def keys(size: Size, rows: Sequence[Row], *, layer: int) -> float:
    """Floor of reading keys at all layers up to ``layer``, in operations."""
    upto = distinct(row.ids[: row.place + 1] for row in rows if row.targets)
    return float(2 * size.up_to(layer) * upto)


def edit(
    host: Host, requests: Sequence[Request], prefixes: Prefixes, *, layers: Sequence[int], steps: int
) -> dict[str, float]:
    """Return the floors of one fit of a method with a value search, by phase."""
    size = Size.of(host)
    rows = [row for request in requests for row in lay_out(host, request, prefixes)]
    top = max(layers)
    return {
        "values": values(size, rows, layer=top, steps=steps),
        "keys": keys(size, rows, layer=top),
    }


def statistics(host: Host, layers: Sequence[int]) -> float:
    """Floor of second moments at some layers in one pass, operations a token."""
    size = Size.of(host)
    sites = [host.layout.site(layer) for layer in layers]
    top = max(sites, key=lambda site: site.layer)
    passed = 2 * (size.up_to(top.layer) - top.d_in * top.d_out)
    return float(passed + sum(site.d_in * (site.d_in + 1) for site in sites))


def gradients(host: Host, requests: Sequence[Request], *, lowest: int) -> dict[str, float]:
    """Return the floor of one gradient per request at its answer's positions."""
    size = Size.of(host)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    read = sum(len(answer.target) for answer in answers)
    forward = 2 * size.up_to(len(size.blocks) - 1) * distinct(a.ids[:-1] for a in answers)
    backward = 2 * size.above(lowest) * read
    return {"gradients": float(forward + backward + 4 * size.head * read)}


def descent(host: Host, requests: Sequence[Request], *, lowest: int, steps: int) -> dict[str, float]:
    """Return the floor of a descent on changes of layers from ``lowest`` on, in operations."""
    size = Size.of(host)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    read = sum(len(answer.target) for answer in answers)
    tokens = distinct(answer.ids[:-1] for answer in answers)
    once = 2 * (size.above(lowest) * tokens + size.head * read)
    return {"descent": float(2 * size.up_to(lowest) * tokens + (2 * steps + 1) * once)}


def forward(host: Host, requests: Sequence[Request]) -> float:
    """Return the operations of one pass over the requests with their answers, each alone."""
    size = Size.of(host)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    tokens, read = (
        sum(len(part) for part in parts)
        for parts in zip(*((a.ids[:-1], a.target) for a in answers), strict=True)
    )
    return float(2 * (size.up_to(len(size.blocks) - 1) * tokens + size.head * read))


def subject_tokens(host: Host, request: Request) -> int:
    """Count the tokens of a request's subject."""
    start, stop = request.span
    encoded = host.encode(request.text)
    return subject_place(host, request) - encoded.first_of(start, stop) + 1
