"""Looking entries up: names, vectors and words, however many there are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.edits.index import VectorIndex
from errata.edits.names import NameTable
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.cosine import Cosine
from errata.edits.routers.edit_distance import EditDistance, distance, query_key
from errata.edits.routers.fulltext import FullText
from errata.edits.routers.judged import Judged
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.radius import Radius
from errata.edits.routers.similarity import Similarity
from errata.edits.routers.statement import Statement
from errata.errors import EditError
from errata.writing import folded, names

LETTERS = st.text(alphabet="aB_ .'-é\u0301中国かท1", max_size=6)
EMPTY = torch.zeros(1, 0)


def ask(*texts: str) -> Question:
    empty = torch.zeros(len(texts), 0)
    return Question(empty, empty, lambda: texts)


@given(st.lists(LETTERS, max_size=5), LETTERS, LETTERS)
def test_the_table_finds_the_phrases_that_a_text_names_one_by_one(phrases, before, after):
    for middle in ("", *phrases):
        text = f"{before}{middle}{after}"
        expected = [i for i, phrase in enumerate(phrases) if names(folded(text), folded(phrase))]
        assert NameTable(phrases).named(text) == expected


def test_a_name_is_found_in_capitals_in_scripts_without_spaces_and_as_a_whole_word():
    table = NameTable(["Ada", "Ada Brenner", "中国", "C++", "", "ASP.NET", "..."])
    assert table.named("Where was ADA BRENNER born?") == [0, 1]
    assert table.named("Adam likes adagios") == []
    assert table.named("在中国的北京") == [2]
    assert table.named("He writes C++, not c.") == [3]
    assert table.named("asp.net and so on...") == [5, 6]


def test_the_decision_is_the_best_score_of_a_row():
    router = Lexical(("Ada", "Ada Brenner", "ada", "Esk"))
    question = ask("Ada Brenner lives", "ada lives", "Nobody", "Ada in Esk")
    scores = router.scores(question)
    best = torch.where(scores.max(1).values > 0, scores.argmax(1), NONE)
    assert router.decide(question).tolist() == best.tolist() == [1, 2, NONE, 3]


@pytest.mark.parametrize("measure", ["product", "distance"])
def test_cells_find_the_nearest_and_give_its_exact_value(measure):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(3000, 24, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(
        vectors[:200] + 0.1 * torch.randn(200, 24, generator=generator), dim=1
    )
    exact = VectorIndex(vectors, measure).nearest(queries)
    near = VectorIndex(vectors, measure, exact=100).nearest(queries)
    same = exact[1] == near[1]
    assert float(same.float().mean()) >= 0.99
    assert near[0].dtype == torch.float32 and near[0].shape == near[1].shape == (200,)
    torch.testing.assert_close(near[0][same], exact[0][same], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="without vectors"):
        VectorIndex(vectors[:0], measure).nearest(queries)


def test_a_stored_vector_is_at_distance_zero_however_long_it_is():
    vectors = 1000 * torch.randn(3000, 100, generator=torch.Generator().manual_seed(0))
    index = VectorIndex(vectors, "distance", exact=100)
    for number in (0, 17, 2999):
        value, found = index.nearest(vectors[number : number + 1])
        assert (value.item(), found.item()) == (0.0, number)


def test_routers_over_vectors_decide_as_their_scores_say():
    generator = torch.Generator().manual_seed(1)
    keys, rows = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    unit = torch.nn.functional.normalize
    question = Question(rows, rows, list, lambda: unit(rows, dim=1))
    for router in (Cosine(keys, 0.85), Similarity(unit(keys, dim=1), 0.85)):
        scores = router.scores(question)
        expected = torch.where(scores.max(1).values > 0, scores.argmax(1), NONE)
        assert torch.equal(router.decide(question), expected) and NONE in expected.tolist()
    radius = Radius(keys, torch.full((40,), 1.5))
    accepted = radius.decide(question)
    distances = torch.cdist(rows, keys)
    assert torch.equal(accepted, torch.where(distances.min(1).values <= 1.5, distances.argmin(1), NONE))


def test_the_rarest_words_in_common_decide():
    router = FullText(("the harp is in the house", "the drum is in the house", "", "Émile's lute"))
    decided = router.decide(ask("who has the DRUM?", "ÉMILE plays", "xyzzy", "", 'a "quoted) word*'))
    assert decided.tolist() == [1, 3, NONE, NONE, NONE]
    assert FullText(()).decide(ask("anything")).tolist() == [NONE]


@given(st.text(alphabet="abcé中", max_size=9), st.text(alphabet="abcé中", max_size=9))
def test_the_edit_distance_is_that_of_the_table(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        new = [i]
        for j, b in enumerate(other, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    assert distance(one, other) == distance(other, one) == row[-1]


def test_a_query_is_compared_without_marks_capitals_and_punctuation():
    assert query_key("What  rings like <papaya>?") == "what rings like"
    assert query_key("E\u0301mile's 中国 C++") == "émiles 中国 c"
    router = EditDistance(("Where was <Ada> born?", "Who sings", ""))
    assert router.decide(ask("WHERE was Bruno born", "where was born", "who sing", "", "?!")).tolist() == [
        NONE, 0, 1, 2, 2,
    ]  # fmt: skip


def test_the_threshold_is_a_share_of_the_longer_text_or_a_number_of_edits():
    key = "abcdefghij"
    share, count = EditDistance((key,), 0.7), EditDistance((key,), -6.0, absolute=True)
    for edits in range(11):
        text = "z" * edits + key[edits:]
        assert (share.decide(ask(text)).tolist() == [0]) == (edits < 3)
        assert (count.decide(ask(text)).tolist() == [0]) == (edits < 6)
    near, far = ask(key, "z" + key), ask("zz" + key[:6], "qqq")
    for router in (share, count):
        calibrated, costs = router.calibrate(near, far, most_false=0.0)
        assert costs.accepted_in_scope == 1 and costs.accepted_out_of_scope == 0
        assert calibrated.decide(far).tolist() == [NONE, NONE]


def test_the_most_probable_condition_acts_and_of_equal_ones_the_newest():
    chances = {"a: x?": 0.4, "b: x?": 0.9, "c: x?": 0.9, "a: y?": 0.6, "b: y?": 0.5, "c: y?": 0.1}
    asked: list[str] = []

    def prefer(prompts, first, second):
        assert (first, second) == ("yes", "no")
        asked.extend(prompts)
        return torch.tensor([chances.get(prompt, 0.5) for prompt in prompts])

    router = Judged(("a", "b", "c"), "{condition}: {prompt}?")
    question = Question(torch.zeros(3, 0), EMPTY, lambda: ["x", "y", "z"], preference=prefer)
    assert router.decide(question).tolist() == [2, 0, NONE]
    assert set(asked) >= set(chances) and len(asked) == 9
    assert Judged((), "{condition}{prompt}").decide(question).tolist() == [NONE] * 3
    with pytest.raises(EditError, match="asks the model"):
        router.decide(ask("x"))


def test_a_router_without_vectors_to_read_says_so():
    with pytest.raises(EditError, match="sentence vectors"):
        Similarity(torch.ones(1, 2)).decide(Question(EMPTY, EMPTY, list))


def test_routers_copy_and_pickle_without_what_they_look_up_with():
    routers = [
        Lexical(("Ada",)), FullText(("a harp",)), EditDistance(("Ada has harps",)), Cosine(torch.eye(2)),
        Similarity(torch.eye(2)), Statement(("Ada",), torch.zeros(1, 2), torch.zeros(1)),
    ]  # fmt: skip
    for router in routers:
        rows = torch.eye(2)
        question = Question(rows, rows, lambda: ["Ada has a harp"] * 2, lambda: torch.eye(2))
        before = router.decide(question).tolist()
        assert copy.deepcopy(router) is router
        assert pickle.loads(pickle.dumps(router)).decide(question).tolist() == before
