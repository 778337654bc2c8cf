"""Threads: one model, one lock. What changes it is alone, what runs it runs side by side, nothing waits for ever."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import errata
from errata.errors import HostError
from errata.host import hooks, locking
from tests.models import fresh
from tests.units.test_durability import make

PATIENCE = 60.0
REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Tallow"),
    errata.Request("{} plays the", "Bruno Holner", "harp"),
]


def together(work: Sequence[Callable[[], Any]]) -> list[BaseException]:
    """Run functions in a thread each; what they raised. Fails where one does not end."""
    problems: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:  # reported by the caller
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for ever"
    return problems


def test_threads_that_apply_and_take_back_leave_the_weights():
    host = fresh("llama")
    twin = errata.Host(host.model, host.tokenizer, name="twin")
    start = host.weights_hash()
    edits = [make(host, seed) for seed in range(3)]

    def flip(edit, mine, beside) -> None:
        for _ in range(15):
            edit.apply_(mine, merge=not beside)
            edit.revert_(mine)

    places = zip(edits, (host, twin, host), (False, False, True), strict=True)
    assert together([lambda p=p: flip(*p) for p in places]) == []
    assert host.weights_hash() == start and not host.placed


def test_fits_in_threads_give_what_they_give_alone():
    host = fresh("llama")
    options = {"method": "memit", "steps": 3, "tokens": 300, "layers": [0, 1]}
    alone = [errata.edit(host, [request], **options).digest for request in REQUESTS]
    found: dict[int, list[str]] = {0: [], 1: []}

    def fit(i: int) -> None:
        for _ in range(2):
            found[i].append(errata.edit(host, [REQUESTS[i]], **options).digest)

    assert together([lambda: fit(0), lambda: fit(1)]) == []
    assert found == {i: [alone[i]] * 2 for i in range(2)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_generation_beside_fits_and_statistics_says_what_it_says_alone():
    host = fresh("llama")
    prompts = ["Ada Brenner was born in", "The rain", "Bruno Holner plays the"]
    alone = [host.generate(prompt, max_new_tokens=6) for prompt in prompts]
    done = threading.Event()
    wrong: list[str] = []

    def serve() -> None:
        while not done.is_set():
            said = [host.generate(prompt, max_new_tokens=6) for prompt in prompts]
            wrong.extend(text for text, right in zip(said, alone, strict=True) if text != right)

    def fit() -> None:
        try:
            for request in REQUESTS:
                errata.edit(host, [request], method="rome", steps=3, tokens=300)
        finally:
            done.set()

    assert together([serve, serve, fit]) == [] and wrong == []


def test_generations_run_side_by_side():
    """Both are inside the model at the same time, or neither would get past the other."""
    host = fresh("llama")
    meeting = threading.Barrier(2, timeout=PATIENCE)
    met = threading.local()

    def meet(*_: Any) -> None:
        if not getattr(met, "done", False):
            met.done = True
            meeting.wait()

    host.generate("Ada", max_new_tokens=2)
    handle = host.model.register_forward_pre_hook(meet)
    answers: dict[int, str] = {}

    def say(i: int) -> None:
        answers[i] = host.generate("Ada Brenner", max_new_tokens=4)

    assert together([lambda: say(0), lambda: say(1)]) == []
    handle.remove()
    assert answers[0] == answers[1] == host.generate("Ada Brenner", max_new_tokens=4)


def test_hooks_act_on_passes_of_their_own_thread():
    host = fresh("llama")
    block = host.model.get_submodule(host.layout.blocks[1])
    batch = host.batch([host.encode("Ada Brenner").ids])
    with torch.no_grad():
        right = host.model(**host.inputs(batch)).logits
        seen: list[torch.Tensor] = []
        other: list[torch.Tensor] = []

        def run() -> None:
            with torch.no_grad():
                other.append(host.model(**host.inputs(batch)).logits)

        with (
            hooks.on_output(block, lambda out: seen.append(out) or out * 0),
            hooks.on_input(block, seen.append),
            hooks.answer_with({host.model.get_submodule(host.layout.blocks[0]): torch.zeros(1)}),
            hooks.stop_after(host.model.get_submodule(host.layout.blocks[2])),
        ):
            assert together([run]) == []
    assert seen == [] and torch.equal(other[0], right)


def test_a_change_waits_for_generation_and_generation_for_a_change():
    lock = locking.ModelLock()
    events: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def change() -> None:
        with lock.exclusive:
            events.append("change")
            inside.set()
            leave.wait(PATIENCE)
            with lock.shared, lock.exclusive:  # a fit generates, and puts its trial edit in place
                events.append("nested")

    def run() -> None:
        inside.wait(PATIENCE)
        with lock.shared:
            events.append("run")

    def release() -> None:
        inside.wait(PATIENCE)
        time.sleep(0.1)
        leave.set()

    assert together([change, run, run, release]) == []
    assert events == ["change", "nested", "run", "run"]


def test_a_waiting_change_is_not_starved_and_a_running_thread_goes_on():
    lock = locking.ModelLock()
    running, waiting = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with lock.shared:
            running.set()
            waiting.wait(PATIENCE)
            time.sleep(0.1)
            with lock.shared:  # must not wait for the one that waits for it
                order.append("again")

    def change() -> None:
        running.wait(PATIENCE)
        waiting.set()
        with lock.exclusive:
            order.append("change")

    def late() -> None:
        waiting.wait(PATIENCE)
        time.sleep(0.05)
        with lock.shared:
            order.append("late")

    assert together([first, change, late]) == []
    assert order == ["again", "change", "late"]


def test_two_running_threads_that_both_ask_to_change_do_not_wait_for_each_other():
    lock = locking.ModelLock()
    both = threading.Barrier(2, timeout=PATIENCE)

    def upgrade() -> None:
        with lock.shared:
            both.wait()
            with lock.exclusive:
                pass

    problems = together([upgrade, upgrade])
    assert (
        len(problems) == 1
        and isinstance(problems[0], HostError)
        and "wait for each other" in str(problems[0])
    )
    with lock.exclusive:
        assert lock.section is not None
    assert lock.section is None


def test_an_error_inside_lets_go():
    lock = locking.ModelLock()
    for side in (lock.exclusive, lock.shared):
        with pytest.raises(KeyboardInterrupt), side:
            raise KeyboardInterrupt

    def take() -> None:
        with lock.exclusive:
            pass

    assert together([take]) == []


def test_copies_have_locks_of_their_own_and_pickles_none():
    host = fresh("llama")
    lock = locking.of(host)
    assert lock is locking.of(host.model) is locking.of(errata.Host(host.model, host.tokenizer, name="twin"))
    assert locking.of(copy.copy(host.model)) is lock, "a shallow copy has the same weights"
    with lock.exclusive:
        other = copy.deepcopy(host.model)
        opened = pickle.loads(pickle.dumps(host.model))
    for model in (other, opened):
        made = locking.of(model)
        assert made is not lock and made is locking.of(model) and made.section is None
    again = pickle.loads(pickle.dumps(opened))
    assert locking.of(again) is locking.of(again) is not locking.of(opened)
