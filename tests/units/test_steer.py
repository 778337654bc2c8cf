"""`errata steer`: the lab's task and its scorer, the choice of a strength, and the verb."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks import steering as board
from tokenizers.processors import ByteLevel
from typer.testing import CliRunner

import errata
from errata import lab
from errata.cli.main import app
from errata.data.contrasts import read_contrasts
from errata.edits import Edit, SteerEdit
from errata.errors import ConfigError, ErrataError
from errata.evaluation import steering
from errata.evaluation.steering import Material, Point, Scores, choose
from errata.host.build import new_tokenizer
from errata.lab.steering import PAIRS, Scorer, contrast_pairs
from errata.types import ContrastPair, Contrasts
from tests.models import TEXTS as CORPUS
from tests.models import fresh
from tests.units.test_steer_edit import steer

EXAMPLE = Path(__file__).parents[2] / "examples" / "steer-questions.jsonl"


# --- the lab's task -------------------------------------------------------------------------


def test_the_example_file_is_the_lab_s_task_and_all_it_states_is_true():
    world, scorer = lab.world(), Scorer()
    pairs = read_contrasts(EXAMPLE)
    assert list(pairs.pairs) == contrast_pairs() and len({pair.subject for pair in pairs.pairs}) == PAIRS
    for pair in pairs.pairs[:30]:
        asked = []
        for text in (pair.prompt.strip(), pair.positive, pair.negative):
            found = scorer.read(text)
            assert found is not None and found.subject == pair.subject, text
            assert world.get(found.subject, found.relation) == found.object
            asked.append(found.question)
        assert asked == [False, True, False]
    more = contrast_pairs(limit=PAIRS + 5)
    assert more[:PAIRS] == list(pairs.pairs) and len(more) == PAIRS + 5
    assert contrast_pairs(limit=5, seed=1) != contrast_pairs(limit=5)


def test_texts_are_scored_by_the_grammar():
    world, scorer, name = lab.world(), Scorer(), "Ada Brenner"
    job, home = (world.get(name, relation) for relation in ("profession", "lives_in"))
    other = next(one for one in world.objects("profession") if one != job)
    someone = "Boris Sorwick"
    theirs = world.get(someone, "profession")
    wrong = next(one for one in world.objects("profession") if one != theirs)
    country = world.follow(name, ("born_in", "located_in"))
    ask, tell = f"Question: What is {name}'s trade?\nAnswer: {job}.", f"{name} lives in {home}."
    cases = {
        f"{ask}\n{tell}\n{name} was": Scores(2, 2, 2),
        f"{tell} {ask}": Scores(1, 2, 2),
        tell: Scores(0, 2, 2),
        f"{ask.replace(str(job), other)}\n{tell}": Scores(2, 1, 2),
        f"Question: What is Bruno's trade?\nAnswer: {job}.": Scores(0, 0, 0),
        f"Question: What is {someone}'s trade?\nAnswer: {theirs}.": Scores(2, 1, 2),
        f"Question: What is {someone}'s trade?\nAnswer: {theirs}.\n{tell}": Scores(2, 1, 2),
        f"Question: What is {someone}'s trade?\nAnswer: {wrong}.": Scores(2, 0, 2),
        f"{ask}\n{ask}": Scores(2, 2, 1),
        f"{ask} works as works as.": Scores(2, 1, 1),
        "Question: Question: Question:\nAnswer: a.": Scores(0, 0, 0),
        f"Question: What is {name}'s trade?\n{tell}": Scores(0, 1, 1),
        f"Question: What is {name}'s trade?\nAnswer: {job}": Scores(0, 0, 0),
        f"{ask} The old cat stayed quite still.": Scores(2, 1, 2),
        f"New fact: {tell} Question: In which country was {name} born?\nAnswer: {country}.": Scores(1, 2, 2),
        "": Scores(0, 0, 0),
    }
    for text, expected in cases.items():
        assert scorer(name, text) == expected, text
    assert Scores(2, 1, 1).overall == pytest.approx(1.2) and Scores(2, 0, 2).overall == 0
    assert Scores(2, 2, 2).overall == 2


# --- the choice -----------------------------------------------------------------------------


def point(strength: float, value: float, perplexity: float, repetition: float = 0.0) -> Point:
    return Point(strength, value, 0.5, perplexity, 0.1, repetition)


def test_the_best_within_the_limit_is_chosen():
    base = point(0, 0.1, 10.0)
    points = [base, point(1, 0.5, 11.0), point(2, 0.9, 11.9), point(3, 2.0, 12.1)]
    assert choose(points, 1.2).strength == 2 and choose(points, 1.3).strength == 3
    assert choose([base, point(1, 0.05, 10.0)], 1.2).strength == 0, "nothing better than none"
    assert choose([base, point(1, 0.5, 10.0), point(2, 0.5, 10.0)], 1.2).strength == 1, (
        "of equal ones the weakest"
    )
    assert choose([base, point(1, 0.5, 10.0, 0.1), point(2, 0.9, 10.0, 0.3)], 1.2).strength == 1
    assert choose([base, point(1, math.nan, 10.0), point(2, 0.9, math.inf)], 1.2).strength == 0
    scored = [dataclasses.replace(p, overall=o) for p, o in zip(points, (0.3, 0.2, 0.1, 0.9), strict=True)]
    assert choose(scored, 1.2).strength == 0, "with a scorer its mean decides"


PROMPTS = ("The old dog", "Bruno", "Ada Brenner")
MUSIC = Contrasts("music", tuple(ContrastPair(p, "plays the harp", "lives in Esk") for p in PROMPTS))
TEXTS = ["The rain fell on the old road.", "Therefore the small dog waited."]


def test_a_sweep_measures_each_strength_and_leaves_the_host_alone():
    host = fresh("llama")
    start = host.weights_hash()
    edit = steer(host, strength=0.5)
    seen: list[tuple[str, str]] = []

    def scorer(subject: str, text: str) -> Scores:
        seen.append((subject, text))
        return Scores(2, 1, 2)

    material = Material(MUSIC, TEXTS, scorer, 4)
    new, sweep = steering.calibrate(steering.Gauge(host, material), edit, strengths=(0.1, 1.0), limit=1.5)
    assert host.weights_hash() == start and not host.placed
    assert [one.strength for one in sweep.points] == [0.0, 0.1, 1.0]
    base = sweep.points[0]
    assert base.divergence == 0 and all(one.divergence > 0 for one in sweep.points[1:])
    assert base.overall == pytest.approx(1.5) and [subject for subject, _ in seen[:3]] == [
        pair.prompt for pair in MUSIC.pairs
    ]
    assert new.strength == sweep.chosen == 0.0 and new.provenance.notes["calibration"] == sweep.to_dict()
    assert new.provenance.parents == (edit.digest,)
    gauge = steering.Gauge(host, Material(MUSIC, TEXTS, None, 4))
    assert gauge.base.overall is None and gauge.base.value == gauge.base.margin
    from errata.evaluation.erasure import text_perplexity

    assert gauge.base.perplexity == pytest.approx(text_perplexity(host, TEXTS), rel=0.2)
    assert gauge.at(edit, 1.0).margin != gauge.base.margin
    json.dumps(sweep.to_dict())


class Steep(steering.Gauge):
    """A gauge on which everything grows with the strength."""

    def __init__(self) -> None:
        self.base = point(0, 0.0, 1.0)

    def at(self, edit: SteerEdit, strength: float) -> Point:
        return point(strength, strength, 10**strength)


def test_answers_without_a_prompt_are_scored_behind_a_begin_token():
    """Of a tokenizer that writes none itself, as GPT-2's and Qwen's do not."""
    tokenizer = new_tokenizer(CORPUS, 400)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    host = errata.load(fresh("llama").model, tokenizer)
    assert host.encode("Tallow").ids[0] != tokenizer.bos_token_id
    pairs = [ContrastPair("", "Tallow.", "Esk."), ContrastPair("", "the", "a")]
    gauge = steering.Gauge(host, Material(Contrasts("x", tuple(pairs)), ["Ada Brenner was born in Tallow."]))

    def mean(text: str) -> float:
        ids = torch.tensor([[tokenizer.bos_token_id, *host.encode(text).ids]])
        with torch.no_grad():
            logprobs = host.model(ids).logits[0].log_softmax(-1)
        return float(logprobs[:-1].gather(1, ids[0, 1:, None]).mean())

    margins = [mean(pair.positive) - mean(pair.negative) for pair in pairs]
    assert gauge.base.margin == pytest.approx(sum(margins) / 2, abs=1e-5)
    assert gauge.base.preferred == sum(margin > 0 for margin in margins) / 2


def test_a_sweep_ends_where_perplexity_is_far_beyond_the_limit():
    host, gauge = fresh("llama"), Steep()
    new, sweep = steering.calibrate(gauge, steer(host, strength=0.5), limit=1.2)
    halved = [0.0625, 0.078125, 0.09375]  # 10 ** 0.079 is 1.2
    assert [one.strength for one in sweep.points] == [0.0, *halved, 0.125, 0.25, 0.375, 0.5, 0.75]
    assert sweep.chosen == new.strength == 0.078125, (
        "1.33 times the perplexity, at 0.125, is beyond the limit"
    )
    assert steering.calibrate(gauge, steer(host, strength=0.5), limit=2.0)[0].strength == 0.296875
    options = {"limit": 1.2, "strengths": (-0.5, -0.25, 0.5)}
    assert steering.calibrate(gauge, steer(host, strength=0.5), refine=0, **options)[1].chosen == 0.0
    _, sweep = steering.calibrate(gauge, steer(host, strength=0.5), refine=2, **options)
    assert [one.strength for one in sweep.points] == [0.0, 0.125, -0.25, 0.25, -0.5, 0.5], "of one sign"
    turned = steer(host, "angle")
    _, sweep = steering.calibrate(gauge, turned, limit=1e9)
    assert [one.strength for one in sweep.points] == [0.0, 0.25, 0.5, 0.75, 1.0] and sweep.chosen == 1.0
    with pytest.raises(ConfigError, match="expected 1 or more"):
        steering.calibrate(gauge, turned, limit=0.5)
    with pytest.raises(ConfigError, match="at strength 1, found 2"):
        steering.calibrate(gauge, turned, strengths=(2.0,))


# --- the verb -------------------------------------------------------------------------------


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["steer", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Twelve pairs of the lab, and two neutral texts."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()[:12]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "neutral.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return folder


def test_steering_the_lab_from_the_command_line(few, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out, figure = tmp_path / "steer.safetensors", tmp_path / "steer.png"
    words = (
        str(few / "questions.jsonl"), "--model", "lab", "-o", str(out), "--texts", str(few / "neutral.txt"),
        "--max-new-tokens", "12", "--score", "lab:questions", "--limit", "1.5",
        "--set", "alone=true", "--set", "positions=last",
    )  # fmt: skip
    told = json.loads(run(*words, "--figure", str(figure), "--json"))
    edit = Edit.load(out)
    assert isinstance(edit, SteerEdit) and edit.digest == told["edit"]["digest"]
    assert edit.strength == told["calibration"]["chosen"] == told["steered"]["strength"]
    points = told["calibration"]["points"]
    assert points[0]["strength"] == 0 and len(points) > 2 and told["held_out"] == 2
    chosen = next(one for one in points if one["strength"] == edit.strength)
    assert chosen["perplexity"] <= 1.5 * points[0]["perplexity"] and chosen["overall"] >= points[0]["overall"]
    assert figure.stat().st_size > 10_000
    shown = run(*words, "--force", "--strength", "0.5")
    assert "strength 0.5" in shown and "unsteered" in shown and "overall" in shown
    fixed = Edit.load(out)
    assert isinstance(fixed, SteerEdit) and fixed.strength == 0.5 and not fixed.provenance.parents
    asked_for = run(*words, "--force", "--strength", "0")  # no sweep found that nothing is better
    assert "strength 0" in asked_for and "no strength is better" not in asked_for


def test_what_the_verb_refuses(few, tmp_path):
    words = [str(few / "questions.jsonl"), "--model", "lab", "-o", str(tmp_path / "steer.safetensors")]
    for more, message in (
        (["--strength", "much"], "expected a number or auto"), (["--strength", "inf"], "expected a number or auto"),
        (["--strength", "1", "--figure", "a.png"], "needs --strength auto"), (["--score", "judge"], "lab:questions"),
        (["--method", "rome"], "methods for those"), (["--figure", "a.pdf"], ".png or .svg"),
        (["--set", "strength=3", "--strength", "2"], "given with --strength"),
        (["--set", "layer=1"], "did you mean 'layers'"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["steer", *words, *more])
        assert isinstance(result.exception, ErrataError) and message in str(result.exception), more
    told = json.loads(run(*words, "--dry-run", "--json"))
    assert told["pairs"] == [8, 2, 2] and not list(tmp_path.iterdir())


# --- the board ------------------------------------------------------------------------------


def test_a_board_is_continued_with_its_own_settings_only(tmp_path):
    file, settings = tmp_path / "steering.json", {"blocks": 2, "size": 64}
    assert board.earlier_rows(file, settings) == []
    file.write_text(json.dumps({"settings": settings, "rows": [{"method": "caa"}]}))
    assert board.earlier_rows(file, settings) == [{"method": "caa"}]
    for other in ({"blocks": 3, "size": 64}, {"blocks": 2}):
        with pytest.raises(SystemExit, match="name another file"):
            board.earlier_rows(file, other)
    file.write_text(json.dumps({"limit": 1.2, "rows": [{"method": "caa"}]}))
    with pytest.raises(SystemExit, match="settings None"):
        board.main(["-o", str(file)])
