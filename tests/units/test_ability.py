"""General ability: scores against sums written out, and tasks on a world whose every fact is known."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from contextlib import contextmanager

import pytest
import torch

import errata
from errata.errors import ConfigError, DataError
from errata.evaluation import ability as room
from errata.evaluation import likelihood
from errata.evaluation.ability import ability, running_text
from errata.host import tokens
from errata.host.seq2seq import EncoderDecoderCodec
from errata.lab.world import sentence
from tests.models import fresh

FAMILIES = ("gpt2", "llama", "gemma2")
LONG = " ".join(["Ada Brenner was born in Tallow and lives in Merrin."] * 30)


def by_hand(host, ids, start):
    """Log-probabilities of ids[start:] from one plain forward pass."""
    with torch.no_grad():
        logits = host.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return [float(logits[at - 1, ids[at]]) for at in range(start, len(ids))]


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_scored_as_written(family):
    host = fresh(family)
    pairs = [("Ada Brenner was born in", " Tallow"), ("Ada Brenner was born in ", "Tallow"),
             ("Ada Bren", "ner was"), ("", "The rain fell"), ("Answer:\n", "Esk"), ("Ada", "")]  # fmt: skip
    asked = [likelihood.continuation(host, *pair) for pair in pairs]
    assert asked[0] == asked[1], "a space belongs to the continuation, on whichever side it stands"
    for answer, (said, first) in zip(asked, likelihood.score(host, asked), strict=True):
        assert said == pytest.approx(by_hand(host, answer.ids, answer.start), abs=1e-4)
        assert len(first) == len(said) == len(answer.target)
    text = host.tokenizer.decode(asked[2].target)
    assert text.strip().endswith("was") and "Ada" not in text
    assert likelihood.score(host, asked)[-1] == ((), ())


@pytest.mark.parametrize("family", FAMILIES)
def test_running_text_predicts_every_token_once_whatever_the_window(family):
    host = fresh(family)
    host.window = 16
    body = host.encode(LONG).ids
    begin = tokens.encode_prompt(host.tokenizer, "").ids
    ids = body if body[0] == begin[0] else (*begin, *body)
    (found,) = likelihood.rolling(host, [LONG])
    assert len(found) == len(ids) - 1
    assert found[:16] == pytest.approx(by_hand(host, ids[:17], 1), abs=1e-4)
    assert found[16:32] == pytest.approx(by_hand(host, ids[16:33], 1), abs=1e-4), "one token of context"
    rest = (len(ids) - 1) % 16
    assert rest, "the last piece is to be a short one"
    assert found[-rest:] == pytest.approx(by_hand(host, ids[-17:], 17 - rest), abs=1e-4), "a whole window"


def test_perplexity_and_bits_per_byte_by_hand(monkeypatch):
    # two texts of 4 and 2 bytes, 2 and 2 tokens: L = 2 ln 2, ln 2 + ln 8 = 4 ln 2; sums 6 ln 2, 4 tokens, 6 bytes
    said = [(-math.log(2), -math.log(2)), (-math.log(2), -math.log(8))]
    monkeypatch.setattr(room, "rolling", lambda host, texts: said)
    found = running_text(None, ["abcd", "é"])  # type: ignore[arg-type]
    assert found["perplexity"].value == pytest.approx(2**1.5)
    assert found["bits_per_byte"].value == pytest.approx(1.0)
    # residuals of L / ln 2 = (2, 4) against 1 bit a byte: -2, +2; error = sqrt(8 * 2 / 1) / 6
    assert found["bits_per_byte"].stderr == pytest.approx(4 / 6)
    # against 1.5 bits a token: -1, +1, in nats times ln 2; error = ppl * ln 2 * sqrt(2 * 2 / 1) / 4
    assert found["perplexity"].stderr == pytest.approx(2**1.5 * math.log(2) * 2 / 4)
    assert running_text.__doc__ and room._ratio_error([1.0], [2]) is None


def test_paired_error_by_hand():
    # differences 1, 0, 0, 1: mean 1/2, variance 1/3, error sqrt(1/12)
    assert room._paired_error([0, 1, 0, 0], [1, 1, 0, 1]) == pytest.approx(math.sqrt(1 / 12))
    assert room._paired_error([0], [1]) is None and room._paired_error(None, [1, 0]) is None


@pytest.fixture(scope="module")
def facts(tmp_path_factory, lab_host):
    """A fact to change, a file that asks for its new object and for others as they are, and a choice of objects."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    world, case = errata.lab.default_world(), errata.lab.cases(1, seed=3)[0]
    others = [
        f for f in world.facts if f.subject != case.request.subject and f.object != case.request.target
    ][:12]
    rows = [{"question": case.request.text, "answers": [case.request.target]}]
    for fact in others:
        wording = world.relations[fact.relation].phrasings[0]
        rows.append({"question": sentence(wording, fact.subject), "answers": list(world.names(fact.object))})
    (folder / "free.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    choice = []
    for fact in others:
        wrong = [o for o in world.objects(fact.relation) if o not in (fact.object, fact.subject)][:3]
        wording = world.relations[fact.relation].questions[0]
        choice.append({"question": sentence(wording, fact.subject), "choices": [*wrong, fact.object],
                       "label": fact.object, "context": "The rain fell."})  # fmt: skip
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, choice)) + "\n\n", encoding="utf-8")
    (folder / "plain.txt").write_text("\n\n".join(errata.lab.neutral_texts(5)), encoding="utf-8")
    return folder, errata.edit(lab_host, case.request, method="rome", tokens=20_000), choice


def test_an_edit_shows_in_the_tasks_that_ask_for_it(facts, lab_host):
    folder, edit, _ = facts
    names = [str(folder / name) for name in ("free.jsonl", "choice.jsonl", "plain.txt")]
    weights, state = lab_host.weights_hash(), (random.getstate(), torch.get_rng_state())
    ticks: list[tuple[str, int, int]] = []
    found = ability(lab_host, names, edit=edit, on_progress=lambda *tick: ticks.append(tick))
    assert lab_host.weights_hash() == weights and random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert set(found) == {"free", "choice", "plain"}
    free = found["free"]["answered"]
    assert free["n"] == 13 and free["before"] == pytest.approx(12 / 13) and free["after"] == 1.0
    # one document of 13 changes by 1: variance (1 - 1/13) / 13 * 13 / 12 = 1/13, error 1/13
    assert free["stderr_difference"] == pytest.approx(1 / 13)
    assert found["choice"]["acc"]["before"] > 0.5 and found["choice"]["acc"]["n"] == 12
    assert 1.0 < found["plain"]["perplexity"]["before"] < 20
    assert {tick[0].split(":")[0] for tick in ticks} == {"before", "after"}


def test_choices_are_the_most_probable_text(facts, lab_host):
    folder, _, choice = facts
    right = 0
    for row in choice:
        prompt = f"The rain fell.\n\nQuestion: {row['question']}\nAnswer:"
        asked = [likelihood.continuation(lab_host, prompt, f" {text}") for text in row["choices"]]
        sums = [sum(by_hand(lab_host, answer.ids, answer.start)) for answer in asked]
        right += row["choices"][sums.index(max(sums))] == row["label"]
    found = ability(lab_host, [str(folder / "choice.jsonl")])["choice"]["acc"]
    assert found["before"] == pytest.approx(right / 12) and found["after"] is None
    limited = ability(lab_host, [str(folder / "choice.jsonl")], limit=4)["choice"]["acc"]
    assert limited["n"] == 4


def test_a_change_that_changes_nothing_differs_by_nothing(facts, lab_host):
    folder, _, _ = facts

    class Nothing:
        @contextmanager
        def on(self, host, **options):
            yield

    tasks = [str(folder / name) for name in ("free.jsonl", "choice.jsonl", "plain.txt")]
    for metrics in ability(lab_host, tasks, edit=Nothing(), shots=2, seed=5).values():  # type: ignore[arg-type]
        for entry in metrics.values():
            assert entry["after"] == entry["before"]
            assert entry["stderr_difference"] in (0.0, None)


def test_answers_end_where_the_task_says(lab_host):
    (line,) = likelihood.generate_texts(lab_host, ["Question: Where was Ada born?\nAnswer:"], ["\n"], 24)
    (whole,) = likelihood.generate_texts(lab_host, ["Question: Where was Ada born?\nAnswer:"], [], 24)
    assert "\n" not in line and whole.startswith(line)
    assert likelihood._until("one, two. three", [". ", ","]) == "one"
    host = fresh("gpt2")
    assert len(host.encode(LONG).ids) > host.window
    (text,) = likelihood.generate_texts(host, [LONG], [], 8)
    assert isinstance(text, str), "a prompt longer than the window loses its beginning"


def test_a_chat_model_is_asked_through_its_template(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    host = fresh("llama")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(host.tokenizer, "chat_template", template)  # tests share the tokenizer
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"question": "Who?", "choices": ["Ada", "Bo"], "label": 1}), encoding="utf-8")
    asked: list[tuple[str, str]] = []
    model = room._language_model(host, lambda *tick: None)
    assert model.apply_chat_template([{"role": "user", "content": "Who?"}]) == "<user>Who?<assistant>"
    real = likelihood.continuation
    monkeypatch.setattr(room, "continuation", lambda h, c, t: (asked.append((c, t)), real(h, c, t))[1])
    ability(host, [str(path)], chat=True)
    assert asked[0][0] == "<user>Question: Who?\nAnswer:<assistant>" and asked[0][1].strip() == "Ada"


def test_every_mistake_of_a_task_file_is_listed(tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "bad.jsonl"
    path.write_text(
        "\n".join(
            ['{"question": "Who?", "answers": ["Ada"]}', "{not json", '{"answers": ["Ada"]}',
             '{"question": "Who?", "answers": []}', '{"question": "Who?", "choices": ["Ada"], "label": 0}',
             '{"question": "Who?", "choices": ["Ada", "Bo"], "label": "Cy"}']
        ),
        encoding="utf-8",
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        ability(fresh("gpt2"), [str(path)])
    assert [f"line {n}:" in str(caught.value) for n in range(1, 7)] == [False, True, True, True, True, True]
    path.write_text(
        '{"question": "a?", "answers": "b"}\n{"question": "a?", "choices": ["b", "c"], "label": 0}'
    )
    with pytest.raises(DataError, match="two files"):
        ability(fresh("gpt2"), [str(path)])
    with pytest.raises(DataError, match="cannot read"):
        ability(fresh("gpt2"), [str(tmp_path / "none.txt")])


def test_what_cannot_be_asked_is_refused_with_the_reason(tmp_path, monkeypatch):
    host = fresh("gpt2")
    with pytest.raises(ConfigError, match="no tasks"):
        ability(host, [])
    with pytest.raises(ConfigError, match="limit 0"):
        ability(host, ["a.txt"], limit=0)
    with pytest.raises(ConfigError, match="called a"):
        ability(host, [str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])
    sampled = [("Who?", {"do_sample": True, "temperature": 0.7, "until": ["\n"]})]
    with pytest.raises(ConfigError, match="do_sample"):
        room._generate(host, sampled, lambda *tick: None)
    monkeypatch.setattr(host, "codec", EncoderDecoderCodec(host.model, host.tokenizer, name=host.name))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        ability(host, ["a.txt"])


def test_without_the_harness_only_text_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    host, path = fresh("gpt2"), tmp_path / "a.txt"
    path.write_text("Ada was born in Tallow.\n\nThe rain fell.", encoding="utf-8")
    assert ability(host, [str(path)])["a"]["bits_per_byte"]["before"] > 0
    with pytest.raises(ConfigError, match=r"pip install 'errata\[ability\]'"):
        ability(host, ["hellaswag"])


def test_tasks_that_must_be_downloaded_say_so_offline(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path = tmp_path / "far.yaml"
    path.write_text(
        "task: far\ndataset_path: nobody/nothing-of-this-name\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: label\ndoc_to_choice: choices\n",
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=r"task .*far.yaml. cannot be set up: .*works offline"):
        ability(fresh("gpt2"), [str(path)])


def test_the_harness_is_kept_to_itself(capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.delenv(room.ONE_PROCESS, raising=False)
    state, drawn = random.getstate(), torch.get_rng_state()
    first, second = [], []
    for values in (first, second):
        with room._isolated_harness(7):
            print("noise")
            values += [random.random(), float(torch.rand(()))]
            assert os.environ[room.ONE_PROCESS]
    assert first == second and room.ONE_PROCESS not in os.environ
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), drawn)
    assert capsys.readouterr().out == ""


class Catalogue:
    """A few names of the harness's catalogue, which takes long to read."""

    all_tasks = ("arc_easy", "hellaswag", "piqa", "winogrande")
    task_index = dict.fromkeys(all_tasks)

    def __init__(self, include_defaults: bool) -> None:
        assert include_defaults


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mistyped_task_is_answered_with_the_nearest(whole, monkeypatch):
    pytest.importorskip("lm_eval")
    if not whole:
        monkeypatch.setattr("lm_eval.tasks.TaskManager", Catalogue)
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        ability(fresh("gpt2"), ["helaswag"])
