"""How far a statement is believed: by itself, or by premises that entail it and are believed in turn.

Source     Tafjord et al., "Entailer: Answering Questions with Faithful and Truthful Chains of Reasoning", EMNLP 2022,
           arXiv 2210.12217: s_r = s_e s(p_1) ... s(p_n) of a proof, and s = max(s_d, s_r) of a statement
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Belief = Callable[[str], float]
"""s_d, how far a statement is believed without a proof, 0 to 1."""
Proposals = Callable[[str], Sequence[Sequence[str]]]
"""Returns sets of premises for a statement."""
Entailment = Callable[[Sequence[str], str], float]
"""s_e, how far premises entail a statement, 0 to 1."""


@dataclass(frozen=True)
class Believed:
    """A statement with its score, and what the score rests on."""

    statement: str
    direct: float
    """s_d, 0 to 1."""
    score: float
    """s, the larger of s_d and the best proof's s_r."""
    premises: tuple[Believed, ...] = ()
    """Of the best proof; empty where no proof exceeds s_d."""
    entailed: float = 0.0
    """s_e of that proof."""


def believe(
    statement: str, direct: Belief, propose: Proposals, entails: Entailment, *, depth: int, least: float = 0.5,
    key: Callable[[str], str] = str, above: Sequence[str] = (),
) -> Believed:  # fmt: skip
    """Return how far a statement is believed, proofs of at most ``depth`` steps included.

    A proof is left out if it repeats a statement that it is to prove, also one ``above``, or has a premise whose s_d is
    below ``least``; statements with one ``key`` are the same. A premise is proved in turn only while the proof can
    still exceed the best score so far, which changes no score: every factor is at most 1.
    """
    own = direct(statement)
    best = Believed(statement, own, own)
    if depth < 1 or own >= 1:
        return best
    unproved = (*above, key(statement))
    for premises in propose(statement):
        if not premises or set(map(key, premises)) & set(unproved):
            continue
        if any(direct(premise) < least for premise in premises):
            continue
        entailed = entails(premises, statement)
        score, nodes = entailed, list[Believed]()
        for premise in premises:
            if score <= best.score:
                break
            node = believe(
                premise, direct, propose, entails, depth=depth - 1, least=least, key=key, above=unproved
            )  # fmt: skip
            nodes.append(node)
            score *= node.score
        if score > best.score:
            best = Believed(statement, own, score, tuple(nodes), entailed)
    return best
