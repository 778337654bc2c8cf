"""What a host is asked and how: forms of answers, templates, batches, and an own loop that says the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from errata.errors import ConfigError, RequestError
from errata.evaluation.observe import observe
from errata.host import decoding, generation_settings, stopping
from errata.host.generate import draw_rows, generate_rows
from errata.host.host import Host
from errata.types import AskOptions, Probe
from errata.types.asking import MAX_NEW_TOKENS
from tests.models import FAMILIES, fresh, tokenizer

PROMPTS = [
    "Ada Brenner was born in",
    "The rain fell on the old road. Question: where was Bruno born?\nAnswer:",
    "Esk",
    "Therefore the small dog waited because",
]
NARROW = [("mistral", {"sliding_window": 6}), ("gemma2", {"sliding_window": 6})]
ALL = [(family, {}) for family in FAMILIES] + NARROW


def probe(prompt: str, *answers: str, **more) -> Probe:
    return Probe(more.pop("kind", "efficacy"), prompt, answers, (), **more)


def by_hand(host: Host, prompt: str, answer: str, *, special: bool = True) -> list[float]:
    """Log-probabilities of an answer's tokens from one row that is run by itself."""
    made = host.encode_answer(prompt, answer, special=special)
    with torch.no_grad():
        spread = host.forward(host.batch([made.ids]))[0].double().log_softmax(-1)
    return [spread[i - 1, made.ids[i]].item() for i in range(made.start, len(made.ids))]


# --- the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), ALL, ids=lambda value: str(value))
def test_the_own_loop_says_what_transformers_loop_says(family, changes):
    host = fresh(family, **changes)
    assert host.continues
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    prefixes = decoding.run_prefixes(host, rows)
    said = decoding.greedy(host, prefixes, [12] * len(rows), "end")
    batch = host.batch(rows, side="left")
    theirs = host.model.generate(
        **host.inputs(batch), max_new_tokens=12, do_sample=False, pad_token_id=host.pad_id
    )[:, batch.ids.shape[1] :]
    for mine, other in zip(said, theirs.tolist(), strict=True):
        end = next(
            (i + 1 for i, token in enumerate(other) if token in generation_settings.end_tokens(host)), 12
        )
        assert mine == other[:end]
    assert decoding.greedy(host, prefixes, [12] * len(rows), "end") == said, "going on changes nothing"


def test_rows_that_are_done_leave_and_the_others_say_the_same():
    host = fresh("gpt2", seed=3)
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    whole = decoding.greedy(host, decoding.run_prefixes(host, rows), [10] * 4, "end")
    cut = decoding.greedy(host, decoding.run_prefixes(host, rows), [10, 1, 4, 10], "end")
    assert cut == [whole[0], whole[1][:1], whole[2][:4], whole[3]]


def test_settings_that_change_greedy_text_are_left_to_transformers():
    host = fresh("llama")
    assert generation_settings.is_plain(host)
    usual = host.generate(PROMPTS[:1], max_new_tokens=12)
    host.model.generation_config.repetition_penalty = 5.0
    assert not generation_settings.is_plain(host)
    batch = host.batch([host.encode_prompt(PROMPTS[0])])
    theirs = host.model.generate(**host.inputs(batch), max_new_tokens=12, do_sample=False, pad_token_id=2)
    text = host.tokenizer.decode(theirs[0, batch.ids.shape[1] :], skip_special_tokens=True)
    assert host.generate(PROMPTS[0], max_new_tokens=12, natural_stop=False) == text != usual[0]


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("temperature", 0.2, True), ("top_k", 3, True), ("num_beams", 4, True), ("max_length", 7, True),
        ("no_repeat_ngram_size", 0, True), ("bad_words_ids", [], True), ("min_new_tokens", 0, True),
        ("repetition_penalty", 1.0, True), ("no_repeat_ngram_size", 2, False), ("bad_words_ids", [[5]], False),
        ("min_length", 3, False), ("token_healing", True, False), ("guidance_scale", 1.5, False),
        ("forced_eos_token_id", 2, False), ("encoder_repetition_penalty", 1.2, False), ("dola_layers", "low", False),
    ],
)  # fmt: skip
def test_settings_are_told_apart_by_transformers_own_defaults(name, value, plain):
    host = fresh("llama")
    setattr(host.model.generation_config, name, value)
    assert generation_settings.is_plain(host) is plain


def test_a_model_without_attention_is_run_whole_and_scored_alike():
    from errata.host.build import new_model

    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    host = Host(new_model("mamba", settings, seed=0).float(), tokenizer(), name="tiny mamba")
    assert not host.continues
    for asked, seen in zip(SIXTEEN, observe(host, SIXTEEN, AskOptions(max_new_tokens=4)), strict=True):
        expected = by_hand(host, asked.prompt, asked.answers[0])
        assert seen.answer_logprobs == pytest.approx(expected, abs=1e-4) and seen.text
    drawn = observe(host, [probe("Ada was", form="open")])[0].text
    assert len(host.encode("Ada was" + drawn).ids) > 50


# --- batches ---------------------------------------------------------------------------------

SIXTEEN = [
    probe(f"{start} {middle}", "Tallow and Merrin", "Tallow", rival="Esk", kind="neighbourhood")
    for start in ("Ada", "Bruno Holner, who plays the cello,", "The small dog", "Question:")
    for middle in ("was born in", "lives", "waited because I saw you on the old road in", "is (")
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "changes"), [*ALL[:3], ("bloom", {}), ("opt", {}), *NARROW], ids=str)
def test_an_answer_does_not_depend_on_its_neighbours(family, changes, side):
    host = fresh(family, **changes)
    host.tokenizer = copy.deepcopy(host.tokenizer)
    host.tokenizer.padding_side = side
    together = observe(host, SIXTEEN)
    for asked, seen in zip(SIXTEEN, together, strict=True):
        alone = observe(host, [asked])[0]
        assert seen.text == alone.text
        for mine, other in (
            (seen.answer_logprobs, alone.answer_logprobs),
            (seen.rival_logprobs, alone.rival_logprobs),
            (seen.answer_logprobs, by_hand(host, asked.prompt, asked.answers[0])),
        ):
            assert len(mine) == len(other) > 0 and mine == pytest.approx(other, abs=1e-4)
        torch.testing.assert_close(seen.next_logprobs, alone.next_logprobs, atol=1e-4, rtol=0)


def test_a_long_neighbour_takes_no_room_from_a_short_prompt():
    host = fresh("gpt2", n_positions=40)
    long = "was born in " * 12
    row = host.encode_prompt(long)
    assert 30 < len(row) < 40, "chosen to leave room for a few tokens only"
    asked = [probe("Ada", "Esk"), probe(long, "Esk")]
    seen = observe(host, asked, AskOptions(max_new_tokens=20))
    assert seen[0].text == observe(host, asked[:1], AskOptions(max_new_tokens=20))[0].text
    said = decoding.greedy(host, decoding.run_prefixes(host, [row]), [40 - len(row)], "sentence")[0]
    assert seen[1].text == stopping.cut(host.tokenizer.decode(said, skip_special_tokens=True), "sentence")
    with pytest.raises(RequestError, match="window is 40"):
        observe(host, [probe("Ada", "was born in " * 20)])


def test_a_prompt_is_run_once_for_its_text_and_all_its_answers(monkeypatch):
    host = fresh("llama")
    shapes: list[tuple[int, ...]] = []
    run = Host.run

    def counted(host, request):
        shapes.append(tuple(request.ids.shape))
        return run(host, request)

    monkeypatch.setattr(Host, "run", counted)
    assert host.continues  # tried out before counting
    shapes.clear()
    probes = [
        probe("Ada was born in", answer, rival="Merrin sen") for answer in ("Tallow", "Esk", "Oa", "Tal")
    ]
    observe(host, probes, AskOptions(max_new_tokens=3))
    prompt = host.encode_prompt("Ada was born in")
    assert shapes[0] == (1, len(prompt))
    tails = {
        host.encode_answer("Ada was born in", text).target[:-1] for text in ("Tallow", "Esk", "Oa", "Tal")
    }
    assert shapes[1][1] <= max(len(host.encode_answer("Ada", "Merrin sen").target), *map(len, tails))
    assert all(shape == (1, 1) for shape in shapes[2:]) and len(shapes) <= 4


# --- forms -----------------------------------------------------------------------------------

LESSON = "Think: where is Ada?"
THOUGHT = (
    " She was born by the sea.\nShe lives in Merrin.\nThe answer is Esk.\nThe rain fell on the old road."
)
ASKED, SHORT = (
    "Where is Bruno?\nAnswer:",
    " He is in Merrin. He was born there, and he waited.\nThe dog fell.",
)


@pytest.fixture(scope="module")
def speaker() -> Host:
    """A small model that has learnt two texts by heart, their ends included."""
    host = fresh("llama", num_hidden_layers=2, hidden_size=64)
    end = host.tokenizer.eos_token_id
    rows = [[*host.encode(text).ids, end] for text in (LESSON + THOUGHT, ASKED + SHORT)]
    batch = host.batch(rows)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    optimizer = torch.optim.Adam(host.model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = host.model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 5e-3:
            break
    return host


def test_each_form_stops_where_its_answer_ends(speaker):
    forms = ("short", "thought", "long")
    short, thought, long = (
        seen.text
        for seen in observe(
            speaker, [probe(LESSON, "Esk", form=f) for f in forms], AskOptions(max_new_tokens=64)
        )
    )
    assert short.strip().startswith("She was born by the sea.") and "Esk" not in short
    assert thought.rstrip().endswith("The answer is Esk.") and "She lives in Merrin." in thought
    assert long == THOUGHT
    limited = observe(speaker, [probe(LESSON, "x", form="long")], AskOptions(long_tokens=5))[0].text
    assert 0 < len(limited) < len(long) and long.startswith(limited)
    limited = observe(speaker, [probe(LESSON, "x", form="thought")], AskOptions(thought_tokens=5))[0].text
    assert 0 < len(limited) < len(thought) and long.startswith(limited)


def test_a_question_gets_a_cue_and_is_answered_by_a_line(speaker):
    asked = probe("Where is Bruno?", "Merrin")
    raw, cued = (
        observe(speaker, [asked], AskOptions(template=t, max_new_tokens=64))[0] for t in ("raw", "question")
    )
    assert cued.text == SHORT.split("\n")[0], "two sentences, one line"
    assert raw.text != cued.text
    behind = by_hand(speaker, "Where is Bruno?\nAnswer:", "Merrin")
    assert cued.answer_logprobs == pytest.approx(behind, abs=1e-4), "scored behind what is continued"
    assert raw.answer_logprobs == pytest.approx(by_hand(speaker, asked.prompt, "Merrin"), abs=1e-4)
    own_cue = observe(speaker, [probe(ASKED, "Merrin")], AskOptions(template="auto", max_new_tokens=64))[0]
    assert own_cue.text == cued.text, "auto is question without a chat template; a cue is not doubled"


def test_choices_are_scored_each_and_nothing_is_said():
    host = fresh("gpt2")
    asked = [
        probe("Ada was born in", "Tallow", form="choice", choices=("Tallow", "Esk and Merrin", "Oa")),
        probe("The small dog", "waited because I saw you", form="span"),
    ]
    choice, span = observe(host, asked)
    assert choice.text == span.text == ""
    assert [list(c) for c in choice.choice_logprobs] == [
        pytest.approx(by_hand(host, asked[0].prompt, text), abs=1e-4) for text in asked[0].choices
    ]
    assert choice.answer_logprobs == choice.choice_logprobs[0]
    assert span.answer_logprobs == pytest.approx(
        by_hand(host, asked[1].prompt, asked[1].answers[0]), abs=1e-4
    )
    assert span.choice_logprobs == ()


def test_a_text_that_is_not_asked_for_is_not_generated(monkeypatch):
    host = fresh("llama")

    def refuse(*_):
        raise AssertionError("something was generated")

    monkeypatch.setattr(decoding, "_generate", refuse)
    observe(host, [probe("Ada", "Esk", form="span"), probe("Ada", "a", form="choice", choices=("a", "b"))])
    observe(host, [probe("Ada", "Esk"), probe("Ada", form="open")], AskOptions(generate=False))
    with pytest.raises(AssertionError, match="generated"):
        observe(host, [probe("Ada", "Esk")])


def test_a_long_answer_is_scored_as_far_as_it_fits():
    host = fresh("gpt2", n_positions=40)
    seen = observe(host, [probe("Ada", "was born in " * 20, form="long")], AskOptions(long_tokens=4))[0]
    made = host.encode_answer("Ada", "was born in " * 20)
    assert len(seen.answer_logprobs) == 40 - made.start < len(made.target)


# --- drawn texts -----------------------------------------------------------------------------


def test_open_texts_depend_on_seed_and_prompt_alone():
    host = fresh("llama")
    asked = [probe(prompt, form="open") for prompt in PROMPTS]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    together = [seen.text for seen in observe(host, asked)]
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state"
    torch.manual_seed(8)
    assert [observe(host, [one])[0].text for one in reversed(asked)] == together[::-1]
    assert [seen.text for seen in observe(host, asked, seed=1)] != together
    observed = observe(host, asked[:1])[0]
    assert observed.answer_logprobs == observed.rival_logprobs == () and observed.next_logprobs is None


def test_open_texts_have_a_hundred_tokens_with_the_prompt_all_among_the_first_five():
    host = fresh("gpt2")
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    ends = generation_settings.end_tokens(host)
    limits = [100 - len(row) for row in rows]
    drawn = decoding.sample(host, decoding.run_prefixes(host, rows), limits, top_k=5, seed=0)
    for row, said, limit in zip(rows, drawn, limits, strict=True):
        assert len(said) == limit or said[-1] in ends
        with torch.no_grad():
            logits = host.forward(host.batch([(*row, *said)]))[0]
        for i, token in enumerate(said):
            best = logits[len(row) + i - 1].topk(6)
            assert token in best.indices[:5] or float(best.values[4] - best.values[5]) < 1e-4
    assert draw_rows(host, rows, 100) == host.tokenizer.batch_decode(drawn, skip_special_tokens=True)


def test_drawn_tokens_are_as_frequent_as_they_are_probable():
    """Against the multinomial: each count within four standard deviations, over 1,500 seeds."""
    host = fresh("llama")
    with torch.no_grad():
        host.model.get_output_embeddings().weight.mul_(40)  # untrained, all are nearly alike
    prefixes = decoding.run_prefixes(host, [host.encode_prompt("Ada was born in")])
    best = prefixes.logits[0].float().topk(5)
    expected = best.values.softmax(-1).tolist()
    assert expected[0] > 3 * expected[4]
    count = 1500
    drawn = [decoding.sample(host, prefixes, [1], top_k=5, seed=seed)[0][0] for seed in range(count)]
    assert set(drawn) <= set(best.indices.tolist())
    for token, p in zip(best.indices.tolist(), expected, strict=True):
        assert abs(drawn.count(token) - count * p) < 4 * math.sqrt(count * p * (1 - p))


def test_rows_do_not_share_their_random_numbers():
    host = fresh("llama")
    with torch.no_grad():
        host.model.get_output_embeddings().weight.zero_()  # the same five tokens are best everywhere
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    drawn = decoding.sample(host, decoding.run_prefixes(host, rows), [20] * 4, top_k=5, seed=0)
    assert len({tuple(said) for said in drawn}) == 4


# --- templates, context ----------------------------------------------------------------------

TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS


def chatting(template: str) -> Host:
    host = fresh("llama")
    host.tokenizer = copy.deepcopy(host.tokenizer)
    host.tokenizer.chat_template = template
    return host


@pytest.mark.parametrize(("template", "system"), [(TURNS, "<system>\n"), (NO_SYSTEM, "")])
def test_chat_is_the_models_own_template_with_an_empty_system_prompt(template, system):
    host = chatting(template)
    written = f"{system}<user>Where is Ada?\n<assistant>\n"
    asked = probe("Where is Ada?", "Tallow", rival="Esk")
    seen = observe(host, [asked], AskOptions(template="chat"))[0]
    row = host.encode_prompt(host.tokenizer.bos_token + written, special=False)
    assert row.count(host.tokenizer.bos_token_id) == 1 and row[0] == host.tokenizer.bos_token_id
    assert host.tokenizer.decode(row[1:]) == written
    assert seen.text == generate_rows(host, [row], MAX_NEW_TOKENS, "end")[0]
    assert seen.answer_logprobs == pytest.approx(by_hand(host, written, "Tallow"), abs=1e-4)
    assert observe(host, [asked], AskOptions(template="auto"))[0] == seen
    raw = observe(host, [asked])[0]
    assert raw.answer_logprobs == pytest.approx(by_hand(host, asked.prompt, "Tallow"), abs=1e-4)


def test_a_chat_template_without_a_begin_token_gets_none():
    host = chatting(TURNS.removeprefix("{{ bos_token }}"))
    written = "<system>\n<user>Where is Ada?\n<assistant>\n"
    row = host.encode_prompt(written, special=False)
    assert host.tokenizer.bos_token_id not in row
    seen = observe(host, [probe("Where is Ada?", "Tallow")], AskOptions(template="chat"))[0]
    assert seen.text == generate_rows(host, [row], MAX_NEW_TOKENS, "end")[0]
    assert seen.answer_logprobs == pytest.approx(by_hand(host, written, "Tallow", special=False), abs=1e-4)


def test_a_template_that_is_not_there_is_refused():
    host = fresh("llama")
    with pytest.raises(ConfigError, match="no chat template"):
        observe(host, [probe("Ada", "Esk")], AskOptions(template="chat"))
    with pytest.raises(ConfigError, match="template"):
        observe(host, [probe("Ada", "Esk")], AskOptions(template="questions"))  # type: ignore[arg-type]


def test_a_context_stands_before_every_prompt():
    host = fresh("llama")
    seen = observe(
        host, [probe("Ada was born in", "Tallow")], AskOptions(context="The rain fell on the old road. ")
    )[0]
    prompt = "The rain fell on the old road.\n\nAda was born in"
    assert seen.answer_logprobs == pytest.approx(by_hand(host, prompt, "Tallow"), abs=1e-4)
    assert seen.text == host.generate(prompt, max_new_tokens=MAX_NEW_TOKENS)


# --- stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "done", "left"),
    [
        ("\n\n Esk\n", "line", True, "\n\n Esk"),
        ("Esk. It is far away, they say", "line", False, "Esk. It is far away, they say"),
        ("Esk. It is far away, they say", "sentence", True, "Esk. It is far away, they say"),
        ("\n\nEsk\n\nmore", "sentence", True, "\n\nEsk"),
        ("St. Louis", "sentence", False, "St. Louis"),
        ("Dr. Martin Luther King, born in", "sentence", False, "Dr. Martin Luther King, born in"),
        ("a (U.S. citizen who lives in", "sentence", False, "a (U.S. citizen who lives in"),
        ("Dr. King. It is far away, they", "sentence", True, "Dr. King. It is far away, they"),
        ("First.\nSecond.", "thought", False, "First.\nSecond."),
        ("First.\nThe answer is: Esk\n", "thought", True, "First.\nThe answer is: Esk\n"),
        ("First.\nAnswer:\n", "thought", False, "First.\nAnswer:\n"),
        ("To answer this, find the town.\n", "thought", False, "To answer this, find the town.\n"),
        ("The answer to it is Esk\n", "thought", True, "The answer to it is Esk\n"),
        ("**Answer:**\n\nEsk\n", "thought", True, "**Answer:**\n\nEsk\n"),
        ("Answer: Esk", "thought", False, "Answer: Esk"),
        ("One.\n\nTwo.\nQuestion: who", "passage", True, "One.\n\nTwo."),
        ("One.\nThe answer is Esk.\nTwo", "passage", False, "One.\nThe answer is Esk.\nTwo"),
        ("One.\nQuestion: who", "end", False, "One.\nQuestion: who"),
    ],
)
def test_natural_stops(text, stop, done, left):
    assert stopping.is_complete(text, stop) is done
    assert stopping.cut(text, stop) == left
