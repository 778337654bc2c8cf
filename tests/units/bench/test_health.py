"""What a cell says of a host's health and cost, and of its protocol."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import errata
from errata.bench import health, summing
from errata.bench.schedule import Schedule
from errata.edits import Provenance, WeightEdit
from errata.evaluation.metrics.collapse import Limits
from errata.types import AskOptions
from tests.models import fresh

SOUND = [f"a{i} b{i} c{i} d{i} e{i} f{i} g{i} h{i}" for i in range(5)]
LOOPING = ["the cat sat on the mat " + "and it sat " * 4 + f"near x{i}" for i in range(5)]
"""As a sound base model goes on greedily: into a loop, now and then out of it."""
BROKEN = ["no " * 40 for _ in range(5)]


def alarm(texts: list[str], unedited: list[str]) -> list[str]:
    return health.condition(texts, unedited, (10.0, 10.0), [])["alarm"]


def test_what_the_unedited_host_does_too_is_no_collapse():
    assert health.condition(LOOPING, LOOPING, (10.0, 10.0), [])["before"]["repetition"] > Limits().repetition
    assert alarm(LOOPING, LOOPING) == []
    assert alarm(LOOPING, SOUND), "a host that did not loop before is worse now"
    assert alarm(BROKEN, LOOPING) and alarm(BROKEN, SOUND)
    assert alarm(SOUND, SOUND) == []


def test_usual_limits_hold_for_a_host_within_them():
    assert health.limits(None, None) == health.limits(0.2, 0.9) == Limits()
    looser = health.limits(0.5, 0.4)
    assert looser.repetition == 0.75 and looser.entropy < Limits().entropy


def test_a_collapse_point_is_read_by_the_same_limits():
    looks = [{"edits": 1, "perplexity_before": 9.0, "perplexity_after": 9.0,
              "collapse": health.condition(LOOPING, LOOPING, (9.0, 9.0), [])}]  # fmt: skip
    contents = summing._CellRows(checkpoints=looks, recalls=[summing.retention.EditRecall(1, 1, 1.0)])
    assert (summing._retention(contents) or {})["collapse_point"] is None


def test_every_cell_has_a_peak_of_its_own():
    host: Any = SimpleNamespace(device=torch.device("cpu"))
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        pytest.skip(f"the peak of a process cannot be reset here: {error}")
    health.reset_peak(host)
    start = health.peak_mb(host)
    # pages of the system's own: malloc might give some that it kept from earlier tests, which raise no peak
    held = mmap.mmap(-1, 160_000_000)
    held.write(b"x" * len(held))
    high = health.peak_mb(host)
    held.close()
    health.reset_peak(host)
    assert high > start + 100 and health.peak_mb(host) < high - 100


@pytest.mark.parametrize(
    ("schedule", "edits", "batch"),
    [("single", 1, 1), ("batch:4", 4, 4), ("batch:100", 10, 10), ("sequential:2", 10, 2)],
)
def test_a_tag_names_as_many_edits_as_stand_together(schedule, edits, batch):
    plan = SimpleNamespace(
        datasets={"d": {"sha256": "ab", "check": {}}}, model=lambda label: SimpleNamespace(template="raw"),
        recipe=SimpleNamespace(max_new_tokens=24),
    )  # fmt: skip
    room = SimpleNamespace(
        plan=plan,
        cases=lambda cell: range(10),
        host=lambda cell: SimpleNamespace(dtype=torch.float32),
        ask=lambda cell: AskOptions("raw"),
    )
    cell = SimpleNamespace(dataset="d", model="m", plan=Schedule.parse(schedule))
    tag = summing.tag(cast("Any", room), cast("Any", cell))
    assert (tag["edits"], tag["batch"]) == (edits, batch)


def test_a_model_that_repeats_one_word_raises_the_alarm():
    """Its last bias is moved along one token's embedding, so that this token always comes first."""
    host = fresh("gpt2")
    prompts = ["Ada was born in the town of", "The capital of Bruno is a city", "Clara lives in a house and"]
    token = host.encode_answer("Ada was born in", "Esk").target[0]
    name = "transformer.ln_f.bias"
    push = 1e3 * host.model.get_input_embeddings().weight.detach()[token]
    record = Provenance("test", (errata.Request("{} was born in", "Ada", "Esk"),), {}, host.fingerprint)
    before = ["a healthy text says something new with every word that it adds to the rest"] * len(prompts)
    with WeightEdit({name: push}, frozenset(), record).on(host):
        texts = host.generate(prompts, max_new_tokens=40, natural_stop=False)
    assert len(set(texts)) == 1
    alarm = health.condition(texts, before, (3.0, 3.0), [])["alarm"]
    assert any("repeated" in reason for reason in alarm) and any("entropy" in reason for reason in alarm)
    assert not health.condition(before, before, (3.0, 3.0), [])["alarm"]
