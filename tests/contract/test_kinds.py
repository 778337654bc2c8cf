"""An edit on every kind of text model: fitted, applied, saved, loaded and taken back exactly.

Models of two layers and width 64 with random weights are trained on sentences of the lab. All seeds are 0.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, processors
from typer.testing import CliRunner

import errata
from errata import lab
from errata.cli.main import app
from errata.edits import Edit
from errata.errors import ConfigError, HostError, RequestError
from errata.evaluation import score
from errata.evaluation.observe import observe
from errata.host.build import BEGIN, END, new_tokenizer
from errata.host.codec import BREAK
from errata.host.slots import class_logits
from errata.locate.neurons import attribute, questions
from errata.types import Probe
from tests.models import FAMILIES
from tests.models import tokenizer as tokenizer_of_tests

MASK = "[MASK]"
FACTS = 24
STEPS = 300
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def facts() -> list[errata.Request]:
    """The first facts of the lab of one relation, so that one answer may take another's place."""
    groups: dict[str, list[errata.Request]] = {}
    for case in lab.cases(120, seed=0):
        request = case.requests[0]
        groups.setdefault(request.prompt, []).append(request)
    flat = [request for group in sorted(groups.values(), key=len, reverse=True) for request in group]
    return flat[:FACTS]


def old(request: errata.Request) -> str:
    assert request.target_old is not None
    return request.target_old


def tokens_of(texts: list[str]) -> Any:
    """A tokenizer of the lab's sentences that closes every text, and knows a mask."""
    made = new_tokenizer(texts, 500)
    made.add_special_tokens({"mask_token": AddedToken(MASK, lstrip=True, special=True)})
    pairs = [(token, made.convert_tokens_to_ids(token)) for token in (BEGIN, END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B", special_tokens=pairs
    )
    return made


def train(model: Any, **batch: torch.Tensor) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 5e-3:
            break
    return model.eval()


@pytest.fixture(scope="module")
def known() -> list[errata.Request]:
    return facts()


@pytest.fixture(scope="module")
def tokenizer(known) -> Any:
    return tokens_of(
        [f"{request.text} {answer}." for request in known for answer in (old(request), request.target)]
    )


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().float()


@pytest.fixture(scope="module")
def t5(known, tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = seeded(lambda: T5ForConditionalGeneration(config))
    source = tokenizer([request.text for request in known], padding=True, return_tensors="pt")
    answers = tokenizer(text_target=[old(request) for request in known], padding=True, return_tensors="pt")
    labels = answers.input_ids.masked_fill(answers.attention_mask == 0, -100)
    train(model, input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels)
    return errata.load(model, tokenizer, device="cpu")


@pytest.fixture(scope="module")
def bert(known, tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **SMALL,
    )  # fmt: skip
    host = errata.load(seeded(lambda: BertForMaskedLM(config)), tokenizer, device="cpu")
    rows, labels = [], []
    for request in known:
        answer = host.encode_answer(request.text, old(request))
        for at in range(answer.start, len(answer.ids)):  # each mask in its turn, those before it filled
            ids, column = host.reading(answer.ids[:at])
            rows.append(ids)
            labels.append([-100] * column + [answer.ids[at]])
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[*row, *[2] * (length - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([[*row, *[-100] * (length - len(row))] for row in labels]),
    }
    train(host.model, **batch)
    return errata.load(host.model, tokenizer, device="cpu")


@pytest.fixture(scope="module")
def classifier(known, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    names = {0: "place", 1: "work", 2: "other"}
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, id2label=names, label2id={n: i for i, n in names.items()}, **SMALL,
    )  # fmt: skip
    model = seeded(lambda: BertForSequenceClassification(config))
    texts = tokenizer([request.text for request in known], padding=True, return_tensors="pt")
    labels = torch.tensor([i % 3 for i in range(len(known))])
    train(model, input_ids=texts.input_ids, attention_mask=texts.attention_mask, labels=labels)
    return errata.load(model, tokenizer, device="cpu")


@pytest.fixture(scope="module")
def change(known) -> errata.Request:
    """The first fact with the answer of another one: a text that the model can say.

    A model of random weights cannot say words that were no answer in its few sentences: their output embeddings
    were only ever pushed away.
    """
    first = known[0]
    others = (old(one) for one in known if one.prompt == first.prompt)
    return dataclasses.replace(first, target=next(text for text in others if text != old(first)))


def answers(host: Any, request: errata.Request, target: str) -> bool:
    """Whether the host answers with exactly a target, each of whose tokens is the most probable one."""
    seen = observe(host, [Probe("efficacy", request.text, (target,), ())])[0]
    return seen.text.strip() == target and all(seen.answer_top)


def there_and_back(host: Any, request: errata.Request, method: str, path: Any, **options: Any) -> bool:
    """Whether the new answer is seen with the edit; everything else is asserted."""
    before = host.weights_hash()
    assert answers(host, request, old(request)), "the model was to know the fact"
    edit = errata.edit(host, request, method=method, **options)
    assert host.weights_hash() == before
    edit.save(path / "e.safetensors")
    loaded = Edit.load(path / "e.safetensors")
    assert loaded.digest == edit.digest
    loaded.apply_(host)
    changed, seen = host.weights_hash(), answers(host, request, request.target)
    loaded.revert_(host)
    assert changed != before and host.weights_hash() == before
    assert answers(host, request, old(request))
    return seen


@pytest.mark.parametrize(
    ("method", "options"), [("ft", {}), ("ft_l", {}), ("lora", {}), ("ft", {"stack": "encoder"})]
)
def test_t5_is_edited(t5, change, method, options, tmp_path):
    assert there_and_back(t5, change, method, tmp_path, **options)


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_bert_is_edited(bert, change, method, tmp_path):
    assert there_and_back(bert, change, method, tmp_path)


def examples(host: Any, known: list[errata.Request]) -> list[errata.Case]:
    """Facts as what editors are trained on: zsRE's questions with answers, or FEVER's claims with labels."""
    cases = []
    for i, (fact, other) in enumerate(zip(known, [*known[1:], known[0]], strict=True)):
        kept = old(other)
        if host.kind == "sequence_classifier":
            names = host.codec.names
            fact = dataclasses.replace(fact, target=names[(i + 1) % 3], target_old=names[i % 3])
            kept = names[known.index(other) % 3]
        probes = (
            Probe("paraphrase", f"That {fact.text}", (fact.target,), (old(fact),)),
            Probe("neighbourhood", other.text, (kept,), (kept,)),
        )
        cases.append(errata.Case(f"c{i}", fact, probes))
    return cases


@pytest.mark.parametrize(
    ("method", "name"),
    [("mend", "t5"), ("mend", "bert"), ("mend", "classifier"), ("ke", "t5"), ("slag", "bert")],
)
def test_learned_editors_edit_every_kind(method, name, request, known, change, tmp_path):
    """The answer comes, or gains at least: a few steps teach an editor little, but it starts as a step of descent."""
    host, asked = request.getfixturevalue(name), change
    if name == "classifier":
        asked = dataclasses.replace(known[0], target="other", target_old="place")
    cases = examples(host, known)[1:]
    options = {"steps": 4, "every": 2, "per_step": 4, "step": 0.1, "validation": 4, "statistics": 16}
    before = log_probability(host, asked, asked.target)
    edit = errata.train(host, method=method, cases=cases, **options).save(tmp_path / "editor.safetensors")
    there_and_back(host, asked, method, tmp_path, editor=str(edit))
    with Edit.load(tmp_path / "e.safetensors").on(host):
        assert log_probability(host, asked, asked.target) > before
    assert log_probability(host, asked, asked.target) == before


@pytest.mark.parametrize("name", ["t5", "bert", "classifier"])
def test_a_right_answer_scores_one_and_another_nothing(name, request, known, change):
    """Under every protocol: generated, each token first, and more probable than a rival."""
    host, fact, wrong = request.getfixturevalue(name), known[0], change.target
    right = old(fact)
    if name == "classifier":
        right, wrong = "place", "work"

    def scores(answer: str, rival: str) -> dict[str, float]:
        probes = (Probe("efficacy", fact.text, (answer,), (), rival),)
        seen = observe(host, probes)
        found = score.summarise(score.rows(errata.Case("c", fact, probes), seen, seen))
        return {metric: entry["after"] for metric, entry in found.items()}

    protocols = ("efficacy.generate", "efficacy.teacher_forced", "efficacy.probability")
    good, bad = scores(right, wrong), scores(wrong, right)
    assert set(protocols) <= set(good) and set(good.values()) == {1.0}
    assert (
        bad["efficacy.generate"] == bad["efficacy.probability"] == 0.0
        and bad["efficacy.teacher_forced"] < 1.0
    )


def log_probability(host: Any, request: errata.Request, answer: str) -> float:
    return sum(observe(host, [Probe("efficacy", request.text, (answer,), ())])[0].answer_logprobs)


def test_neurons_of_bert_are_changed_and_come_back(bert, change, tmp_path):
    """The new answer gains and the old one loses, yet not by so much that the greedy answer changes.

    The next test shows why: no fact of this small model depends on its feed-forwards at the mask.
    """

    def seen() -> tuple[float, float]:
        return log_probability(bert, change, change.target), log_probability(bert, change, old(change))

    before = seen()
    there_and_back(bert, change, "kn", tmp_path)
    assert seen() == before
    with Edit.load(tmp_path / "e.safetensors").on(bert):
        after = seen()
    assert after[0] > before[0] + 0.5, "the new answer"
    assert after[1] < before[1] - 0.5, "the old answer"


def test_attributions_at_a_mask_add_up_to_what_the_feed_forward_gives(bert, change):
    """All neurons of a layer together, against a forward pass of the model without them at the mask.

    They carry less than 5 % of the answer's probability here, so that a few of them cannot replace it.
    """
    question = questions(bert, change.text, old(change))[0]
    ids, column = bert.reading(question.ids)

    def probability(module: Any, factor: float) -> float:
        def scale(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            inputs = args[0].clone()
            inputs[:, column] *= factor
            return (inputs,)

        handle = module.register_forward_pre_hook(scale)
        with torch.no_grad():
            logits = bert.model(input_ids=torch.tensor([ids])).logits[0, column]
        handle.remove()
        return float(logits.double().softmax(-1)[question.token])

    for layer in range(len(bert.layout.blocks)):
        site = bert.layout.site(layer)
        module = bert.model.get_submodule(site.name)
        whole = probability(module, 1.0)
        gained = whole - probability(module, 0.0)
        scores = attribute(bert, [question], [site], steps=200, rule="midpoint")[site]
        assert float(scores.sum()) == pytest.approx(gained, rel=1e-2, abs=1e-5)
        assert whole > 0.9 and abs(gained) < 0.05 * whole


def test_an_answer_in_its_masks_counts_once_against_the_window(bert, known):
    """A prompt and an answer that together fill the window are edited and measured; one token more is refused."""
    answer = old(known[0])
    size = len(bert.encode_answer(known[0].text, answer).target)
    filler = "a "  # a token of its own
    text = known[0].text
    while bert.length(bert.encode_answer(filler + text, answer).ids) <= bert.window:
        text = filler + text
    row = bert.encode_answer(text, answer).ids
    assert bert.length(row) == len(bert.reading(row[: row.index(BREAK) + 1])[0]) == bert.window
    assert size > 1 and len(row) == bert.window + 1 + size
    seen = observe(bert, [Probe("efficacy", text, (answer,), ())])[0]
    assert len(seen.answer_logprobs) == size
    whole = observe(bert, [Probe("efficacy", text, (answer,), (), form="long")])[0]
    assert whole.answer_logprobs == pytest.approx(seen.answer_logprobs, abs=1e-4)
    prompt = text.replace(known[0].subject, "{}")
    errata.edit(bert, errata.Request(prompt, known[0].subject, answer), method="ft", steps=1)
    complaint = f"{bert.window + 1} tokens, the model's window is {bert.window}"
    with pytest.raises(RequestError, match=complaint):
        observe(bert, [Probe("efficacy", filler + text, (answer,), ())])
    with pytest.raises(RequestError, match=complaint):
        errata.edit(bert, errata.Request(filler + prompt, known[0].subject, answer), method="ft", steps=1)


def test_masks_are_filled_one_by_one(bert, known):
    """The sum of log p(t_k | t_<k, masks from k on), with the model called directly."""
    request = max(known, key=lambda one: len(bert.encode_answer(one.text, old(one)).target))
    target = bert.encode_answer(request.text, old(request)).target
    assert len(target) > 1, "an answer of several tokens was wanted"
    ids = list(bert.tokenizer(f"{request.text} {MASK}")["input_ids"])
    at = ids.index(bert.codec.mask_id)
    ids[at : at + 1] = [bert.codec.mask_id] * len(target)
    logprobs = []
    for k, token in enumerate(target):
        with torch.no_grad():
            spread = bert.model(input_ids=torch.tensor([ids])).logits[0, at + k].log_softmax(-1)
        logprobs.append(float(spread[token]))
        ids[at + k] = token
    for prompt in (request.text, f"{request.text} {MASK}", f"{request.text} {MASK}{MASK}"):
        seen = observe(bert, [Probe("efficacy", prompt, (old(request),), ())])[0]
        assert seen.answer_logprobs == pytest.approx(logprobs, abs=1e-4)
    other = observe(bert, [Probe("efficacy", one.text, (old(one),), ()) for one in known])
    assert other[known.index(request)].answer_logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_mask_inside_a_prompt_takes_the_answer(bert):
    row = bert.encode_prompt(f"Ada {MASK}{MASK} in Tallow.")
    read, column = bert.reading(row)
    assert bert.room(row) == 2 and read[column] == bert.codec.mask_id and row[-1] == BREAK
    assert bert.reading((*row, 7))[0][column] == 7 and bert.reading((*row, 7))[1] == column + 1
    with pytest.raises(RequestError, match="2 places"):
        bert.encode_prompt(f"{MASK} was born in {MASK}.")


def test_bert_is_not_asked_for_what_it_cannot_do(bert, known, tmp_path):
    with pytest.raises(ConfigError, match="fills masks.*methods for those: cake, ft"):
        errata.edit(bert, known[0], method="memit")
    with pytest.raises(HostError, match="not running text"):
        bert.forward(bert.batch([bert.encode("Ada").ids]))
    bert.model.save_pretrained(tmp_path)
    bert.tokenizer.save_pretrained(tmp_path)
    opened = errata.load(str(tmp_path), device="cpu")
    assert opened.kind == "masked_lm" and opened.fingerprint == bert.fingerprint
    assert opened.generate(known[0].text) == bert.generate(known[0].text)


def test_a_text_classifier_is_edited_to_a_label(classifier, known, tmp_path):
    assert classifier.kind == "sequence_classifier"
    first = known[0]
    texts = [one.text for one in known[:3]]
    assert classifier.generate(texts) == ["place", "work", "other"]
    best = class_logits(classifier, texts).argmax(-1).tolist()
    assert [classifier.codec.names[i] for i in best] == ["place", "work", "other"]
    assert classifier.generate(first.text) == "place"
    request = dataclasses.replace(first, target="other", target_old="place")
    assert there_and_back(classifier, request, "ft", tmp_path, epsilon=None, steps=100)
    with pytest.raises(RequestError, match="no label"):
        errata.edit(classifier, first, method="ft")
    with pytest.raises(ConfigError, match="label"):
        errata.edit(classifier, request, method="rome")


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_the_command_line_edits_asks_and_measures_them(name, request, known, change, tmp_path, monkeypatch):
    host = request.getfixturevalue(name)
    host.model.save_pretrained(tmp_path / "model")
    host.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        result = CliRunner().invoke(app, [*words, "--model", "model", "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    edited = run("edit", change.prompt, "--subject", change.subject, "--target", change.target, "--method", "ft",
                 "-o", "e.safetensors")  # fmt: skip
    assert edited["answered"] == 1
    (asked,) = run("ask", "--edit", "e.safetensors", change.text)["answers"]
    assert asked["with"].strip() == change.target
    assert asked["without"].strip() and old(change).startswith(
        asked["without"].strip()
    )  # one mask: one token
    case = {
        "id": "a", "prompt": change.prompt, "subject": change.subject, "target": change.target,
        "target_old": old(change),
    }  # fmt: skip
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    report = run("eval", "--method", "ft", "--cases", "cases.jsonl")
    assert report["summary"]["efficacy.generate"]["after"] == 1.0
    assert report["summary"]["efficacy.generate"]["before"] == 0.0


def test_the_language_tower_of_a_vision_language_model_is_found_and_edited(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**FAMILIES["llama"]), image_token_index=3
    )
    host = errata.load(
        seeded(lambda: LlavaForConditionalGeneration(config)), tokenizer_of_tests(), device="cpu"
    )
    assert host.kind == "causal_lm" and len(host.layout.blocks) == 3
    assert all(".vision_tower." not in f".{site.name}." for site in host.layout.sites)
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    start = host.weights_hash()
    edit = errata.edit(host, request, method="memit", tokens=400)
    assert edit.deltas and all("language_model" in name for name in edit.deltas)
    before = host.generate(request.text, max_new_tokens=4, natural_stop=False)
    lora = errata.edit(host, request, method="lora")
    with lora.on(host):
        assert host.generate(request.text, max_new_tokens=4).strip().startswith("Merrin")
    with edit.on(host):
        assert host.weights_hash() != start
    assert host.weights_hash() == start
    assert host.generate(request.text, max_new_tokens=4, natural_stop=False) == before
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    assert errata.load(tmp_path, device="cpu").fingerprint == host.fingerprint
