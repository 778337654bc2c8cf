"""Beliefs with proofs: the algebra of their scores, and answers of a scripted model that rest on them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import errata
from errata.edits.procedures import Procedure
from errata.edits.proving import Prover
from errata.errors import ConfigError, EditError
from errata.linalg.proofs import believe
from tests.models import fresh

NAMES = "abcde"
SHARE = st.floats(0, 1)
WORLDS = st.tuples(
    st.fixed_dictionaries(dict.fromkeys(NAMES, SHARE)),
    st.fixed_dictionaries(
        {name: st.lists(st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True), SHARE),
                        max_size=3) for name in NAMES}
    ),
)  # fmt: skip
"""How far each statement is believed, and its proofs: premises and how far they entail it."""


def score(world, statement: str, depth: int, least: float = 0.0) -> float:
    direct, proofs = world

    def entails(premises, statement):
        return max(share for own, share in proofs[statement] if own == list(premises))

    return believe(
        statement,
        direct.__getitem__,
        lambda s: [own for own, _ in proofs[s]],
        entails,
        depth=depth,
        least=least,
    ).score


def exhaustive(world, statement: str, depth: int, least: float, above: tuple[str, ...] = ()) -> float:
    """The definition, every proof written out: max(s_d, s_e s(p_1) ... s(p_n))."""
    direct, proofs = world
    path = (*above, statement)
    scores = [direct[statement]]
    for premises, _ in proofs[statement] if depth else ():
        share = max(s for own, s in proofs[statement] if own == premises)
        if not set(premises) & set(path) and all(direct[p] >= least for p in premises):
            scores.append(share * math.prod(exhaustive(world, p, depth - 1, least, path) for p in premises))
    return max(scores)


@given(WORLDS, st.integers(0, 4), st.sampled_from([0.0, 0.5]))
def test_a_score_is_the_best_of_all_proofs_whatever_is_pruned(world, depth, least):
    for name in NAMES:
        assert score(world, name, depth, least) == pytest.approx(exhaustive(world, name, depth, least))


@given(WORLDS, st.integers(0, 3))
def test_a_score_lies_between_direct_belief_and_one_and_grows_with_depth(world, depth):
    for name in NAMES:
        one, deeper = score(world, name, depth), score(world, name, depth + 1)
        assert world[0][name] <= one <= deeper <= 1
    assert score(world, "a", 0) == world[0]["a"]


@given(WORLDS, st.sampled_from(NAMES), SHARE, SHARE)
def test_a_belief_that_is_raised_lowers_no_other(world, name, low, high):
    low, high = sorted((low, high))
    below, above = (({**world[0], name: share}, world[1]) for share in (low, high))
    for other in NAMES:
        assert score(below, other, 3) <= score(above, other, 3) + 1e-12


@given(WORLDS, st.sampled_from(NAMES))
def test_a_belief_that_is_denied_carries_no_proof(world, name):
    denied = ({**world[0], name: 0.0}, world[1])
    without = (
        denied[0],
        {s: [(own, e) for own, e in proofs if name not in own] for s, proofs in world[1].items()},
    )
    for other in set(NAMES) - {name}:
        assert score(denied, other, 3, least=0.5) == score(without, other, 3, least=0.5)


def test_the_proof_is_returned_with_its_factors():
    direct = {"h": 0.3, "p": 0.9, "q": 0.4, "r": 1.0}
    proofs = {"h": [("p", "q"), ("h", "r")], "q": [("r",)]}
    node = believe("h", direct.__getitem__, lambda s: proofs.get(s, ()), lambda p, s: 0.8, depth=2, least=0.4)
    assert node.score == pytest.approx(0.8 * 0.9 * (0.8 * 1.0)) and node.direct == 0.3
    assert [one.statement for one in node.premises] == ["p", "q"] and node.entailed == 0.8
    assert [one.statement for one in node.premises[1].premises] == ["r"]
    assert (
        believe("h", direct.__getitem__, lambda s: proofs.get(s, ()), lambda p, s: 0.8, depth=2).score == 0.3
    )


def test_a_statement_in_other_capitals_proves_nothing():
    proofs = {"h": [("H", "r")]}
    more = {"direct": lambda s: 0.2 if s == "h" else 0.9, "entails": lambda p, s: 1.0, "depth": 2}
    circular = believe("h", propose=lambda s: proofs.get(s, ()), key=str.casefold, **more)
    assert circular.score == 0.2 and not circular.premises
    assert believe("h", propose=lambda s: proofs.get(s, ()), **more).score == pytest.approx(0.81)


# --- the procedure --------------------------------------------------------------------------

TEMPLATES = {
    "premises": "why {text}", "verify": "{texts}true {text}", "entails": "{texts}so {text}",
    "answer": "{texts} {prompt}", "yes": "true", "no": "false",
}  # fmt: skip
PENNY, METAL = "A penny is made of wood.", "Wood is not magnetic."


def prover(generated: dict[str, str], chances: dict[str, float], beliefs: list[str], **more) -> Prover:
    def prefer(text: str, first: str, second: str) -> float:
        assert (first, second) == ("true", "false")
        return chances.get(text, 0.0)

    return Prover(
        TEMPLATES, 20, 1, 0.5, lambda text: beliefs, lambda text, tokens: generated.get(text, ""), prefer,
        **{"fits": lambda text: True, **more},
    )  # fmt: skip


def test_an_answer_that_rests_on_a_belief_wins_by_its_proof():
    generated = {
        "A penny is": " magnetic. It is old.\nmore", f"{PENNY} A penny is": " not magnetic",
        f"why A penny is not magnetic\n- {PENNY}\n-": f" {METAL}\n\n- unrelated",
        "why A penny is magnetic.\n-": " Coins are magnetic.",
    }  # fmt: skip
    facts = f"- {PENNY}\n"
    chances = {
        f"{facts}true A penny is magnetic.": 0.7, f"{facts}true A penny is not magnetic": 0.3,
        f"{facts}true {METAL}": 0.95, f"{facts}- {METAL}\nso A penny is not magnetic": 0.9,
        f"{facts}true Coins are magnetic.": 0.8, "- Coins are magnetic.\nso A penny is magnetic.": 0.5,
    }  # fmt: skip
    model = prover(generated, chances, [PENNY])
    assert model.answer("A penny is") == f"{PENNY} A penny is"
    proved = model.believed("A penny is not magnetic")
    assert proved.score == pytest.approx(0.9 * 1.0 * 0.95), "the given belief counts as 1"
    assert [one.statement for one in proved.premises] == [PENNY, METAL]
    weak = {**chances, f"{facts}- {METAL}\nso A penny is not magnetic": 0.5}
    assert prover(generated, weak, [PENNY]).answer("A penny is") == "A penny is"
    assert prover(generated, chances, []).answer("A penny is") == "A penny is"


def test_a_given_belief_answers_its_own_prompt_and_is_no_premise_of_itself():
    generated = {"A penny is made": " of copper.", f"{PENNY} A penny is made": " of wood."}
    chances = {f"- {PENNY}\ntrue A penny is made of copper.": 0.99}
    model = prover(generated, chances, [PENNY])
    assert model.answer("A penny is made") == f"{PENNY} A penny is made"
    generated = {f"why a penny is made of wood\n- {PENNY}\n-": " x"}
    assert not prover(generated, {}, [PENNY]).believed("a penny is made of wood").premises


def test_what_the_window_does_not_hold_is_not_asked():
    model = prover({"q": "a"}, {}, [PENNY], fits=lambda text: len(text) < 12)
    assert model.answer("q") == "q" and model.believed("s").score == 0.0


def test_the_procedure_round_trips_and_needs_a_model():
    procedure = Procedure("prove", 2, TEMPLATES, 20, 3, 0.25)
    assert Procedure.restore(procedure.body()) == procedure
    assert "least" not in Procedure().body()
    with pytest.raises(EditError, match="give prefer"):
        procedure.run("q", lambda _: [], lambda *_: "", lambda _: True)


ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")


def test_the_edit_asks_its_host():
    host = fresh("llama", max_position_embeddings=512)
    asked = {
        "premises": "why {text}",
        "verify": "{texts}true {text}",
        "entails": "{texts}so {text}",
        "tokens": 4,
    }
    edit = errata.edit(host, ADA, method="entailer", retriever="words", **asked)
    with pytest.raises(EditError, match="place it on a host"):
        edit.rewrite(ADA.text)
    texts = (ADA.text, f"Ada Brenner was born in Merrin.\n{ADA.text}")
    with edit.on(host):
        assert host.rewritten(ADA.text) in texts and host.rewritten("xyzzy") == "xyzzy"
    with pytest.raises(ConfigError, match="verify: .* tokens leave too little"):
        errata.edit(host, ADA, method="entailer", **{**asked, "verify": "{text}{texts}" + "a b c d " * 80})


def test_a_proof_in_the_second_step_repeats_nothing_in_other_capitals_either():
    proposals = {"a": [["b"]], "b": [["A"]]}
    beliefs = {"a": 0.1, "b": 0.6, "A": 0.9}
    more = {
        "direct": beliefs.__getitem__,
        "propose": lambda s: proposals.get(s, ()),
        "entails": lambda *_: 1.0,
    }
    strict = believe("a", **more, depth=2, key=str.casefold)
    assert strict.score == pytest.approx(0.6), "b must not be proved from A, which is a itself"
    assert believe("a", **more, depth=2).score == pytest.approx(0.9)
