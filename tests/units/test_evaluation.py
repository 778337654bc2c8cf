"""Metrics against hand-computed values; the evaluator against models whose scores are known."""

from __future__ import annotations

import math

import pytest
import torch

import errata
from errata.evaluation import observe, score
from errata.evaluation.metrics import divergence, matching, perplexity, probability
from errata.types import Case, Observation, Probe
from errata.types.asking import MAX_NEW_TOKENS
from tests.models import fresh


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Tallow.", ["Tallow"], True),
        (" tallow, of course. Then Esk.", ["Tallow"], True),
        (" Esk. Tallow is far.", ["Tallow"], False),
        (" Tallowtown.", ["Tallow"], False),
        (" the town of St. Louis, yes", ["St. Louis"], True),
        (" St. Louis Park", ["St. Louis"], True),
        ("\n\nTallow", ["Tallow"], True),
        (" Esk\nTallow", ["Tallow"], False),
        (" The Silver Road", ["Silver Road"], True),
        ("", ["Tallow"], False),
        (" Éva\N{COMBINING ACUTE ACCENT}", ["nothing"], False),
        (" U.K.", ["the U.K."], True),
    ],
)
def test_alias_matching(text, answers, expected):
    assert matching.says(text, answers) is expected


def test_an_answer_that_asserts_the_old_one_too_is_wrong():
    assert matching.answered(" Tallow.", ["Tallow"], ["Esk"])
    assert not matching.answered(" Tallow, formerly Esk.", ["Tallow"], ["Esk"])
    assert matching.answered(" Tallow. Esk is far.", ["Tallow"], ["Esk"])
    assert matching.answered(" New Esk", ["New Esk"], ["Esk"]), "part of the right answer"


def test_probability_scores_by_hand():
    answer, rival = [math.log(0.5), math.log(0.125)], [math.log(0.2)]
    # per token: sqrt(0.5 * 0.125) = 0.25 against 0.2
    assert probability.prefers(answer, rival)
    assert probability.magnitude(answer, rival) == pytest.approx(0.05)
    assert not probability.prefers([math.log(0.1)], rival)
    assert probability.harmonic([1.0, 0.5]) == pytest.approx(2 / 3)
    assert probability.harmonic([1.0, 0.0]) == 0.0
    assert probability.token_accuracy([True, False, True, True]) == 0.75
    assert not probability.exact([True, False]) and probability.exact([True])
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence.kl(p, q) == pytest.approx(by_hand, rel=1e-6)
    assert divergence.kl(p, p) == 0.0
    assert perplexity.of_texts([torch.tensor([0.25, 0.25]).log()]) == pytest.approx(4.0)


def seen(text: str, top=(True,), answer=(-0.1,), rival=(-2.0,)) -> Observation:
    return Observation(text, tuple(answer), tuple(top), tuple(rival))


def test_kept_probes_count_only_what_was_right_before():
    request = errata.Request("{} is in", "Ada", "Esk", "Oa")
    kept = tuple(Probe("neighbourhood", f"B{i} is in", ("Oa",), ("Oa",), "Esk") for i in range(4))
    case = Case("c", request, (Probe("efficacy", "Ada is in", ("Esk",), ("Oa",), "Oa"), *kept))
    before = [seen(" Oa."), seen(" Oa."), seen(" Oa."), seen(" Oa."), seen(" wrong.")]
    after = [seen(" Esk."), seen(" Oa."), seen(" Esk."), seen(" Oa."), seen(" Oa.")]
    summary = score.summarise(score.rows(case, before, after))
    learned = {"before": 0.0, "after": 1.0, "n": 1, "ci": [1.0, 1.0]}
    assert learned.items() <= summary["efficacy.generate"].items()
    entry = summary["neighbourhood.generate"]
    assert entry["before"] == 0.75 and entry["n"] == 3 and entry["after"] == pytest.approx(2 / 3)


def test_intervals_come_from_whole_cases():
    probes = tuple(Probe("efficacy", f"p{i}", ("Esk",), ("Oa",), "Oa") for i in range(10))
    request = errata.Request("{} is in", "Ada", "Esk")
    rows = []
    for name, text in (("right", " Esk."), ("wrong", " Oa.")):
        rows += score.rows(Case(name, request, probes), [seen(" Oa.")] * 10, [seen(text)] * 10)
    entry = score.summarise(rows)["efficacy.generate"]
    assert entry["after"] == 0.5 and entry["ci"] == [0.0, 1.0], "two cases, not twenty rows"


def test_an_unchanged_model_scores_as_before_and_revert_is_checked():
    host = fresh("llama")
    edit = errata.edit(
        host, errata.Request("{} is", "Bruno", "Esk"), method="ft", steps=1, scale="published",
        learning_rate=1e-12,
    )  # fmt: skip
    request = errata.Request("{} was born in", "Ada", "Esk", "Merrin")
    case = Case("c", request, (
        Probe("efficacy", request.text, ("Esk",), ("Merrin",), "Merrin"),
        Probe("neighbourhood", "Bruno was born in", ("Merrin",), ("Merrin",), "Esk"),
    ))  # fmt: skip
    report = errata.evaluate(host, [case], edit=edit)
    for row in report.rows:
        if row.protocol != "kl":
            assert row.before == row.after
    assert report.meta["weights_restored"]
    assert {"seconds", "cpu_seconds", "peak_memory_mb", "versions", "seed", "host_fingerprint"} <= set(
        report.meta
    )


def test_a_model_made_to_answer_right_scores_one_under_every_protocol():
    """Fine-tune without bounds on one answer: every protocol must say 1.0 afterwards."""
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada", "Esk.", "Merrin")
    edit = errata.edit(
        host,
        request,
        method="ft",
        layers=[0, 1, 2],
        epsilon=None,
        steps=300,
        learning_rate=0.05,
        stop_loss=1e-4,
    )
    case = Case("c", request, (Probe("efficacy", request.text, ("Esk.",), ("Merrin",), "Merrin"),))
    report = errata.evaluate(host, [case], edit=edit)
    after = {key: entry["after"] for key, entry in report.summary.items()}
    protocols = ("generate", "teacher_forced", "probability", "update")
    assert after == {f"efficacy.{protocol}": 1.0 for protocol in protocols}


def test_evaluate_wants_a_method_or_an_edit():
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada", "Esk")
    case = Case("c", request, (Probe("efficacy", request.text, ("Esk",), ()),))
    with pytest.raises(errata.ErrataError, match="either"):
        errata.evaluate(host, [case])
    with pytest.raises(errata.ErrataError, match="at least one case"):
        errata.evaluate(host, [], method="rome")
    with pytest.raises(errata.ErrataError, match="did you mean 'memit'"):
        errata.evaluate(host, [case], method="memitt")


def alone(host, ids) -> torch.Tensor:
    """Log-probabilities of what follows each token of one row that is run by itself, float64."""
    with torch.no_grad():
        return host.forward(host.batch([ids]))[0].double().log_softmax(-1)


def test_perplexity_by_hand():
    halves, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25]).log()
    # three tokens, not two texts: (2 * 2 * 4) ** (1/3)
    assert perplexity.of_texts([halves, quarter]) == pytest.approx(16 ** (1 / 3))
    assert perplexity.of_texts([halves, torch.empty(0)]) == pytest.approx(2.0)
    for broken in (float("nan"), float("-inf"), float("inf")):
        assert perplexity.of_texts([halves, torch.tensor([broken])]) == float("inf")
    assert perplexity.of_texts([torch.full((3,), -1e6)]) == float("inf"), "beyond a double"
    with pytest.raises(ValueError, match="no tokens"):
        perplexity.of_texts([torch.empty(0)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_log_probabilities_of_texts_are_those_of_each_text_alone(family):
    host = fresh(family)
    texts = ["Ada Brenner was born in Tallow.", "Esk", "The rain fell on the old road. " * 30, "The harp", ""]
    found = observe.logprobs(host, texts, batch_tokens=40)
    for text, logprobs in zip(texts, found, strict=True):
        ids = host.encode(text).ids[: min(host.window or 256, 256)]
        expected = [alone(host, ids)[i - 1, ids[i]].item() for i in range(1, len(ids))]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    uniform = fresh(family)
    with torch.no_grad():
        uniform.model.get_output_embeddings().weight.zero_()
    assert perplexity.of_texts(observe.logprobs(uniform, texts)) == pytest.approx(400, rel=1e-5)


PROBES = [
    Probe("efficacy", "Ada was born in", ("Tallow",), ("Esk",), "Esk"),
    Probe("neighbourhood", "Ada was born in", ("Esk",), ("Esk",), "Tallow"),
    Probe("neighbourhood", "Ada was born in Tallow.", ("Merrin",), ("Merrin",), None),
    Probe("question", "Ada", ("was born in Tallow. The rain",), ("Esk",), "was"),
    Probe("neighbourhood", "The capital of Arvania is", ("Esk and Tallow",), ("Esk",), "Esk and Merrin"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_what_is_read_off_shared_rows_is_what_each_row_says_alone(family):
    host = fresh(family)
    for probe, seen in zip(PROBES, observe.observe(host, PROBES, batch_tokens=30), strict=True):
        for text, logprobs in ((probe.answers[0], seen.answer_logprobs), (probe.rival, seen.rival_logprobs)):
            if text is None:
                assert logprobs == ()
                continue
            answer = host.encode_answer(probe.prompt, text)
            spread = alone(host, answer.ids)[answer.start - 1 : -1]
            expected = [spread[i, token].item() for i, token in enumerate(answer.target)]
            assert list(logprobs) == pytest.approx(expected, abs=1e-4)
            if text == probe.answers[0]:
                assert list(seen.answer_top) == (spread.argmax(-1) == torch.tensor(answer.target)).tolist()
        if probe.kind == "neighbourhood":
            expected = alone(host, host.encode(probe.prompt).ids)[-1]
            torch.testing.assert_close(seen.next_logprobs.double(), expected, atol=1e-4, rtol=0)
        else:
            assert seen.next_logprobs is None
        assert seen.text == host.generate(probe.prompt, max_new_tokens=MAX_NEW_TOKENS)


def test_no_text_is_run_that_another_one_begins_with(monkeypatch):
    host = fresh("llama")
    scored: list[tuple[int, ...]] = []
    continued: list[tuple[int, ...]] = []
    forward_at, generate = host.forward_at, observe.generate_rows

    def score_rows(batch, row, at):
        scored.extend(tuple(r[m.bool()].tolist()) for r, m in zip(batch.ids, batch.mask, strict=True))
        return forward_at(batch, row, at)

    def continue_rows(model, rows, room, *rest):
        continued.extend(rows)
        return generate(model, rows, room, *rest)

    monkeypatch.setattr(host, "forward_at", score_rows)
    monkeypatch.setattr(observe, "generate_rows", continue_rows)
    observe.observe(host, PROBES)
    assert len(continued) == len(set(continued)) == len({p.prompt for p in PROBES})
    assert not any(a != b and b[: len(a)] == a for a in scored for b in scored)
    assert len(scored) == len(set(scored)) < len(PROBES) + sum(p.rival is not None for p in PROBES)


def test_an_answer_without_a_prompt_is_scored_after_the_begin_token():
    host = fresh("llama")
    seen = observe.observe(host, [Probe("efficacy", " ", ("Esk",), ())])[0]
    begin = host.tokenizer.bos_token_id
    ids = host.encode("Esk").ids
    ids = ids if ids[0] == begin else (begin, *ids)
    spread = alone(host, ids)
    expected = [spread[i - 1, ids[i]].item() for i in range(1, len(ids))]
    assert list(seen.answer_logprobs) == pytest.approx(expected, abs=1e-4)
