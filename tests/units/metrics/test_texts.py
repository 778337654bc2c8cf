"""Running text and long answers: entropy, alarm, ROUGE, BLEU, TF-IDF, chains of thought; worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from errata.errors import ConfigError
from errata.evaluation import score
from errata.evaluation.metrics import collapse, consistency, longform, ngrams, propagation
from errata.types import Case, Probe, Request

HEALTHY = (
    "She was born in Tallow, the old harbour town, and moved to Esk when she was nine. Her father kept bees; "
    "her mother wrote letters for people who could not. After school she went to work at the mill, where the "
    "owner soon noticed that she could count faster than his clerk. Ten years later the mill was hers, and the "
    "first thing she did was to raise the wages. In winter the river froze and the children skated to church. "
    "Nobody in the valley remembers a colder year, or a happier one."
)


def test_entropy_by_hand():
    # words a b a b c: 2-grams ab ba ab bc, so 1/2, 1/4, 1/4: H_2 = 1.5; 3-grams aba bab abc: H_3 = log2 3
    text = "a b a b c"
    assert collapse.entropy(text, 2) == pytest.approx(1.5)
    assert collapse.entropy(text, 3) == pytest.approx(math.log2(3))
    # (2/3 * 1.5 + 4/3 * 1.585) / 2 = 0.5 + 2/3 * 1.585
    assert collapse.generation_entropy(text) == pytest.approx(0.5 + 2 / 3 * math.log2(3))
    assert collapse.legacy_fluency(text) == pytest.approx(100 * (0.5 + 2 / 3 * math.log2(3)))
    # bound: 4 and 3 n-grams, (2/3 * 2 + 4/3 * log2 3) / 2
    bound = (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2
    assert collapse.evenness(text) == pytest.approx((0.5 + 2 / 3 * math.log2(3)) / bound)
    assert collapse.evenness("a b c") == 1.0 and collapse.evenness("a b") is None
    assert collapse.entropy("a", 2) == 0.0 and math.copysign(1, collapse.entropy("a a a", 2)) == 1.0


def test_healthy_text_of_a_hundred_words_has_the_published_entropy():
    hundred = " ".join(HEALTHY.split()[:90])
    assert 95 <= len(ngrams.words(hundred)) <= 110
    assert 600 < collapse.legacy_fluency(hundred) < 680


@pytest.mark.parametrize(
    "text",
    [
        "Esk " * 100,
        "Esk Esk Esk",
        "Esk, " * 20,
        "a" * 300,
        "the river is the river is the river is the river is " * 3,
    ],
)
def test_repetition_trips_the_alarm(text):
    assert collapse.alarm([text])


def test_healthy_text_of_any_length_does_not():
    words = HEALTHY.split()
    for end in (3, 8, 20, 50, len(words)):
        assert collapse.alarm([" ".join(words[:end])]) == []
    assert collapse.alarm([]) == [] == collapse.alarm(["", "yes"]), "nothing to tell from"
    assert collapse.legacy_fluency(" ".join(words[:20])) < 500, "the printed limit would trip on a short text"


def test_each_sign_gives_its_reason():
    limits = collapse.Limits(norm=0.5)
    found = collapse.alarm(
        [HEALTHY], perplexity_ratio=2.5, norm_ratios=[0.1, 0.7, math.nan], finite=False, limits=limits
    )
    assert (
        len(found) == 3 and "not finite" in found[0] and "2.5 times" in found[1] and "2 weights" in found[2]
    )
    assert collapse.alarm([HEALTHY], perplexity_ratio=2.0, norm_ratios=[0.5], limits=limits) == []
    assert collapse.alarm([HEALTHY], perplexity_ratio=math.nan), "a ratio that is no number is no good sign"
    assert "2 of its 3 texts are empty" in collapse.alarm(["", " \n", HEALTHY])[0]
    assert collapse.alarm(["", HEALTHY]) == []
    assert collapse.alarm([HEALTHY, "Esk " * 100]), "half of the texts collapsed: 48 % of the 4-grams repeat"


def test_repetition_and_distinct_by_hand():
    # x y x y x y: 2-grams xy yx xy yx xy, 2 of 5; 4-grams xyxy yxyx xyxy, one of three stood there before
    assert ngrams.distinct("x y x y x y") == pytest.approx(0.4)
    assert ngrams.repetition("x y x y x y") == pytest.approx(1 / 3)
    assert ngrams.repetition("too short") == 0.0
    assert ngrams.words("东京 is, ok") == ["东", "京", "is", ",", "ok"]
    found = collapse.fluency(["x y x y x y", "one two three", "no"])
    assert found.repetition == pytest.approx(1 / 6) and found.distinct == pytest.approx(0.7)
    assert collapse.fluency(["no"]) == collapse.Fluency(None, None, None, None)


def test_norm_ratios():
    weight = torch.diag(torch.tensor([4.0, 3.0]))
    change = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert collapse.norm_ratio(change, weight) == pytest.approx(3 / 5)  # norms 3 and 5
    assert collapse.spectral_ratio(weight + change, weight) == pytest.approx(6 / 4)
    torch.manual_seed(0)
    big = torch.randn(30, 20)
    exact = float(np.linalg.norm(big.numpy(), 2))
    assert collapse.spectral_ratio(big, torch.eye(20), steps=300) == pytest.approx(exact, rel=1e-3)
    assert collapse.norm_ratio(change, torch.zeros(2, 2)) == math.inf
    assert collapse.spectral_ratio(change, torch.zeros(2, 2)) == math.inf
    assert not math.isfinite(collapse.spectral_ratio(weight * math.nan, weight))


def test_rouge_by_hand():
    said, wanted = "The cat sat on the mat.", "the cat on a mat"
    # 1-grams: the(1) cat on mat in common = 4 of 6 said, of 5 wanted
    found = longform.rouge(said, wanted, 1)
    assert (found.precision, found.recall) == (pytest.approx(4 / 6), pytest.approx(4 / 5))
    assert found.f == pytest.approx(2 * 4 / (6 + 5))
    # 2-grams: only "the cat": 1 of 5, 1 of 4
    assert longform.rouge(said, wanted, 2).recall == pytest.approx(1 / 4)
    # longest common subsequence: the cat on mat
    assert longform.rouge_l(said, wanted).precision == pytest.approx(4 / 6)
    assert longform.rouge_l("mat on cat", wanted).recall == pytest.approx(1 / 5), "order counts"
    assert longform.rouge_l("", wanted).f == 0.0 == longform.rouge_l(said, "...").f
    same = longform.rouge_l(wanted, wanted)
    assert (same.precision, same.recall, same.f) == (1.0, 1.0, 1.0)


def test_letters_of_scripts_without_spaces_are_terms():
    # "巴黎 是 法 国 的 首 都" letter by letter: 8 letters, all in common, in another order
    text, reference = "巴黎是法国的首都。", "法国的首都是巴黎。"
    assert longform.rouge(text, reference, 1).f == 1.0
    assert longform.rouge(text, reference, 2).f == pytest.approx(5 / 7)  # 巴黎 法国 国的 的首 首都
    assert longform.rouge_l(text, reference).f == pytest.approx(5 / 8)  # 法国的首都
    assert longform.rouge_l("Paris, 法国", "paris 法 国").f == 1.0
    assert 0.0 < longform.bleu(text, reference) < 1.0 == pytest.approx(longform.bleu(text, text))
    assert longform.rouge("Übung für Ärzte", "übung FÜR ärzte", 2).f == 1.0, "letters beyond a to z are kept"


@pytest.mark.parametrize("package", ["rouge_score", "sacrebleu"])
def test_long_answers_are_refused_before_anything_runs_without_their_packages(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    request = Request("{} is", "Ada", "a harpist")
    long, short = (
        Case("a", request, (Probe("efficacy", "Ada is", ("a harpist",), (), form=form),))
        for form in ("long", "short")
    )
    score.check_packages([short])
    with pytest.raises(ConfigError, match=rf"long answers needs {package}: pip install 'errata\[text\]'"):
        score.check_packages([short, long])


def test_legacy_recall_by_hand():
    # sentences "a b x" and "d" against "a b" and "c d": {a, b}, {}, {}, {d}, so 3 of the words a b c d
    assert longform.legacy_recall("a b x. d", "a b. c d") == pytest.approx(3 / 4)
    # one set of words: "a" is found twice, and counts once of a b c
    assert longform.legacy_recall("a. a", "a b. a c") == pytest.approx(1 / 3)
    assert longform.legacy_recall("a b c d", "a b c d") == 1.0
    # more text never hurts: precision is not looked at
    assert longform.legacy_recall("x " * 500 + "a b c d", "a b c d") == 1.0
    # ". " at the end: the blank after it counts as one more word, here 1 of 3
    assert longform.legacy_recall("a b", "a b. ") == pytest.approx(2 / 3)
    assert longform.legacy_recall("A b", "a b") == 0.5, "case counts"
    assert longform.legacy_recall("a", "") == 0.0


def test_word_bleu_by_hand():
    # said 4 tokens, wanted 5: p1 = 4/4, p2 = 2/3 (ab, de), p3 = 0/2 -> 1/(2 * 2), p4 = 0/1 -> 1/(4 * 1)
    by_hand = math.exp(1 - 5 / 4) * (1 * 2 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert longform.bleu("a b d e", "a b c d e") == pytest.approx(by_hand)
    # longer than wanted: no penalty. p1 = 2/3, p2 = 1/2, p3 = 0/1 -> 1/2; there are no 4-grams, so of three
    assert longform.bleu("a b x", "a b") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))
    # clipped: "the" stands once in the wanted text: p1 = 1/3, p2 = 0/2 -> 1/4, p3 = 0/1 -> 1/4
    assert longform.bleu("the the the", "the") == pytest.approx((1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3))
    assert longform.bleu("x", "a") == 0.0 == longform.bleu("", "a")
    text = 'It cost $1,000.50, "they" said - in 1999-2000.'
    assert longform.bleu(text, text) == pytest.approx(1.0)
    assert longform.bleu("in 3.5 days", "in 3 . 5 days") < 1.0, "a period inside a number stays"
    assert longform.bleu("so, yes", "so , yes") == pytest.approx(1.0), "other marks stand alone"


def test_the_published_bleu_is_of_characters():
    # abcde and abcdx: p1 = 4/5, p2 = 3/4, p3 = 2/3, p4 = 1/2
    assert longform.legacy_character_bleu("abcde", "abcdx") == pytest.approx(
        (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )
    assert longform.legacy_character_bleu("abcd", "abcdefgh") == pytest.approx(math.exp(1 - 8 / 4))
    assert longform.legacy_character_bleu("abc", "abd") == 0.0, "no smoothing"
    # unrelated sentences look alike to it
    said, wanted = "The harbour town of Tallow is old.", "The capital of Esk is on the river."
    assert longform.legacy_character_bleu(said, wanted) > 2 * longform.bleu(said, wanted)


def test_long_answers_in_other_ways():
    assert (
        longform.length_ratio("one two three", "one two") == 1.5
        and longform.length_ratio("a", "") == math.inf
    )


def test_reference_score_by_hand():
    weights = consistency.idf(["cats purr", "cats bark"])
    # n = 2: cats in both: ln(3/3) + 1 = 1; purr in one: ln(3/2) + 1
    rare = math.log(1.5) + 1
    assert weights == {"cats": 1.0, "purr": pytest.approx(rare), "bark": pytest.approx(rare)}
    # (cats 2, purr 1) against (cats 1, bark 1): 2 * 1 / (sqrt(4 + rare^2) * sqrt(1 + rare^2))
    found = consistency.reference_score(["Cats purr,", "cats"], ["cats bark"], weights)
    assert found == pytest.approx(2 / (math.sqrt(4 + rare**2) * math.sqrt(1 + rare**2)))
    assert consistency.reference_score(["cats"], ["cats"], weights) == pytest.approx(1.0)
    assert consistency.reference_score(["unknown"], ["cats"], weights) == 0.0
    assert consistency.terms("A cat's I x") == ["cat"], "words of two letters and more"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Thoughts: Ada is from Esk.\nAnswer: Tallow\n\nQuestion: Next?\nAnswer: Oa", "Tallow"),
        ("The answer is Esk. No, the answer is: Tallow.", "Tallow."),
        ("So the answer to the question is **Tallow**", "Tallow**"),
        ("**Answer:** Tallow", "Tallow"),
        ("Answer:\nTallow\nmore", "Tallow"),
        ("The answer is Tallow.\nAnswer:", "Tallow."),
        ("Ada is from Esk.\nSo it is Tallow", "So it is Tallow"),
        ("It answers to Esk", "It answers to Esk"),
        ("", ""),
    ],
)
def test_the_answer_is_read_out_of_a_chain_of_thought(text, answer):
    assert propagation.final_answer(text) == answer


def test_propagation_by_hand():
    assert propagation.together([True, False], "any") and not propagation.together([True, False], "all")
    assert not propagation.together([], "all"), "nothing asked is nothing passed"
    assert propagation.counts([True, True], edited=True) and propagation.counts([], edited=True)
    assert not propagation.counts([True, False], edited=True) and not propagation.counts([], edited=False)
    # aliasing: per example 1/2 and 1: 0.75, not 2/3; forgetfulness: one example has none that counts
    found = propagation.criteria([
        {"subject_aliasing": [True, False], "forgetfulness": []},
        {"subject_aliasing": [True], "forgetfulness": [False]},
    ])  # fmt: skip
    assert found == {"subject_aliasing": 0.75, "forgetfulness": 0.0, "mean": 0.375}
    assert propagation.criteria([{"forgetfulness": []}]) == {}


def test_scores_of_tables_load_no_torch():
    """Reports read result files with these; they must not pay for a model."""
    code = (
        "import sys; import errata.evaluation.metrics.summary, errata.evaluation.metrics.retention; "
        "import errata.evaluation.metrics.longform, errata.evaluation.metrics.cost; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
