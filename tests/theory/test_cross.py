"""The classifier that reads a fact and a prompt together: what it reads, what it learns, and where it decides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import errata
from errata import lab
from errata.edits.edit import Provenance
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.cross import Cross
from errata.errors import ConfigError, EditError, HostError
from errata.host import hooks
from errata.host.pairs import PairReader, open_cross_encoder, read_pairs
from errata.methods import _cross
from errata.training.scope import Pairs, ScopeTraining, train_head
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
FACTS = ["Ada Brenner was born in Merrin.", "Bruno Holner plays the harp."]
PROMPTS = ["Ada Brenner came from", "Esk", "Bruno Holner, they say, likes the harp, and so"]
QUICK = {"steps": 2, "classifier": "cross", "classifier_steps": 150, "every": 2}


def ask(*texts: str, pairs=None) -> Question:
    empty = torch.zeros(len(texts), 0)
    return Question(empty, empty, lambda: list(texts), **({} if pairs is None else {"pairs": pairs}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_read_is_the_mean_state_of_the_fact_less_that_of_the_prompt_behind_it(family):
    host, reader = fresh(family), PairReader("So: {fact}\n{prompt}", 1)
    facts, prompts = [f for f in FACTS for _ in PROMPTS], [*PROMPTS, *PROMPTS]
    together = read_pairs(host, reader, facts, prompts)
    block = host.model.get_submodule(host.layout.blocks[1])
    for fact, prompt, found in zip(facts, prompts, together, strict=True):
        whole, seen = host.encode(f"So: {fact}\n{prompt}"), []
        with torch.no_grad(), hooks.on_output(block, seen.append):
            host.forward(host.batch([whole.ids]))
        edge = 4 + len(fact)
        of_fact = [i for i, (a, b) in enumerate(whole.spans) if a < edge and b > 4 and b > a]
        of_prompt = [i for i, (_, b) in enumerate(whole.spans) if b > edge + 1]
        u, v = (seen[0].reshape(len(whole.ids), -1)[some].mean(0) for some in (of_fact, of_prompt))
        torch.testing.assert_close(found, u / u.norm() - v / v.norm(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read_pairs(host, reader, [fact], [prompt])[0], found, atol=1e-5, rtol=1e-4)


def test_only_the_nearest_entries_are_read_and_the_most_probable_one_acts():
    read: list[tuple[str, str]] = []
    statements = ("the harp is old", "the drum is old", "the lute is new", "a flute")

    def pairs(facts, prompts):
        read.extend(zip(facts, prompts, strict=True))
        return torch.tensor(
            [[float("drum" in f), float("drum" in p)] for f, p in zip(facts, prompts, strict=True)]
        )

    router = Cross(
        statements, torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.5, candidates=2
    )
    scores = router.scores(ask("is the drum old", "xyzzy", pairs=pairs))
    assert len(read) == 4 and {f for f, p in read if "drum" in p} == {"the harp is old", "the drum is old"}
    h = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # the drum's entry, the harp's
    logits = 0.5 + h @ router.weight - (h @ router.projection.mT).square().sum(1)
    torch.testing.assert_close(scores[0, [1, 0]], torch.sigmoid(logits) - 0.5)
    assert scores[0, 2:].tolist() == [-0.5, -0.5]
    best = torch.where(scores.max(1).values > 0, scores.argmax(1), NONE)
    assert router.decide(ask("is the drum old", "xyzzy", pairs=pairs)).tolist() == best.tolist()
    read.clear()
    dataclasses.replace(router, candidates=4).scores(ask("xyzzy", pairs=pairs))
    assert [fact for fact, _ in read] == list(statements), "a small memory is read as a whole"
    calibrated, costs = router.calibrate(ask("old harp", pairs=pairs), ask("is the drum old", pairs=pairs))
    assert calibrated.threshold == pytest.approx(float(torch.sigmoid(logits).max()))
    assert costs.accepted_out_of_scope == 0
    assert router.select([1, 3]).statements == ("the drum is old", "a flute")
    with pytest.raises(EditError, match="facts and prompts together"):
        router.decide(ask("the drum"))


def test_entries_are_recalled_by_vectors_too():
    keys = torch.eye(3)
    router = Cross(
        ("a", "b", "c"), torch.ones(1), torch.zeros(0, 1), candidates=1, recall="vectors", keys=keys
    )
    empty = torch.zeros(2, 0)
    question = Question(
        empty,
        empty,
        lambda: ["x", "y"],
        lambda: keys[[2, 0]],
        pairs=lambda f, p: torch.full((len(f), 1), 2.0),
    )
    assert router.decide(question).tolist() == [2, 0]
    assert router.select([2, 0]).decide(question).tolist() == [0, 1]


def test_entries_are_recalled_by_the_subjects_that_a_prompt_names():
    read: list[tuple[str, str]] = []

    def pairs(facts, prompts):
        read.extend(zip(facts, prompts, strict=True))
        return torch.tensor([[float(fact[-1])] for fact in facts])

    names = ("Ada", "Bruno", "Ada", "Ada")
    router = Cross(
        ("fact 1", "fact 2", "fact 4", "fact 3"), torch.ones(1), torch.zeros(0, 1), -2.0, recall="names",
        phrases=names, candidates=2,
    )  # fmt: skip
    assert router.decide(ask("Where is ADA?", "Bruno sings", "Adam", pairs=pairs)).tolist() == [2, NONE, NONE]
    assert read == [("fact 4", "Where is ADA?"), ("fact 3", "Where is ADA?"), ("fact 2", "Bruno sings")]
    assert router.decide(ask("nobody")).tolist() == [NONE], "nothing is read where no subject is named"
    assert router.select([1, 0]).phrases == ("Bruno", "Ada")
    with pytest.raises(ValueError, match="recall by names"):
        dataclasses.replace(router, phrases=None)


def test_the_head_learns_what_the_scope_depends_on_and_calibrates_a_logit():
    torch.manual_seed(0)
    noise = torch.randn(900, 6)  # the last six numbers say nothing, the first four are small in scope
    wide = [
        torch.cat([scale * torch.randn(300, 4), noise[i::3]], 1) for i, scale in enumerate((0.2, 2.0, 2.0))
    ]
    plan = ScopeTraining(8, 600, 32, 1e-2, 0.5)
    weight, projection, bias, loss = train_head(Pairs(*wide), plan, seed=0, on_progress=lambda *_: None)
    again = train_head(Pairs(*wide), plan, seed=0, on_progress=lambda *_: None)
    assert torch.equal(projection, again[1]) and loss < 0.4
    assert projection[:, 4:].norm() < 0.3 * projection[:, :4].norm()
    router = Cross((), weight, projection, bias)
    accepted = [float((router.logits(part) > 0).float().mean()) for part in wide]
    assert accepted[0] > 0.9 and max(accepted[1:]) < 0.1
    logits = [torch.randn(300, 1) + middle for middle in (5.0, 3.0, 1.0)]
    weight, projection, bias, _ = train_head(Pairs(*logits), plan, seed=0, on_progress=lambda *_: None)
    assert projection.shape == (0, 1) and 3.0 < -bias / float(weight) < 4.6  # where it is as likely as not


# --- a cross-encoder of transformers --------------------------------------------------------


def cross_encoder(folder, *, logits: int = 1, seed: int = 0) -> str:
    """Save a small cross-encoder with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "Ada",
        "Brenner",
        "was",
        "born",
        "in",
        "harp",
        "Merrin",
        "came",
        "from",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, num_labels=logits,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_cross_encoder_reads_pairs_with_its_own_logit(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, host = cross_encoder(tmp_path / "one"), fresh("llama")
    score, _ = open_cross_encoder(folder, host.device)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    facts = [f for f in FACTS for _ in PROMPTS]
    found = score(facts, [*PROMPTS, *PROMPTS])
    for fact, prompt, logit in zip(facts, [*PROMPTS, *PROMPTS], found, strict=True):
        with torch.no_grad():
            own = model.eval()(**tokenizer(fact, prompt, return_tensors="pt")).logits
        assert float(logit) == pytest.approx(float(own), abs=1e-5)
    assert found.std() > 0
    with pytest.raises(HostError, match="2 logits"):
        open_cross_encoder(cross_encoder(tmp_path / "two", logits=2), host.device)
    with pytest.raises(HostError, match="cannot open the cross-encoder"):
        open_cross_encoder(str(tmp_path / "none"), host.device)


def test_an_edit_remembers_its_cross_encoder_and_refuses_another(tmp_path):
    folder, host = cross_encoder(tmp_path / "one"), fresh("llama", max_position_embeddings=512)
    edit = errata.edit(host, [ADA, BRUNO], method="in_prompt", scope="cross", cross=folder, threshold=0.001)
    assert edit.router.model == folder and edit.router.model_digest
    score, _ = open_cross_encoder(folder, host.device)
    for prompt in (ADA.text, BRUNO.text):
        best = int(score(FACTS, [prompt] * 2).argmax())
        assert edit.rewrite(prompt, host) == f"New fact: {FACTS[best]}\n{prompt}"
    path = edit.save(tmp_path / "edit.safetensors")
    cross_encoder(tmp_path / "one", seed=1)
    open_cross_encoder.cache_clear()
    with pytest.raises(EditError, match="cross-encoder with checksum"):
        errata.Edit.load(path).apply_(host)
    with pytest.raises(ConfigError, match="scope: cross needs a classifier"):
        errata.edit(host, ADA, method="in_prompt", scope="cross")


# --- as SERAC's classifier, and as a scope of texts -----------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    host = errata.load("lab")
    trained = errata.train(host, method="serac", cases=lab.cases(24, seed=77), **QUICK)
    return host, str(trained.save(tmp_path_factory.mktemp("cross") / "serac.safetensors"))


def test_serac_decides_by_what_it_reads_of_fact_and_prompt(editor, tmp_path):
    host, path = editor
    options = {"method": "serac", "editor": path, "classifier": "cross"}
    edit = errata.edit(host, ADA, **options)
    both = errata.edit(host, BRUNO, after=edit, **options)
    together = errata.edit(host, [ADA, BRUNO], **options)
    assert both.router.statements == together.router.statements == tuple(FACTS)
    assert both.router.template == "New fact: {fact}\n{prompt}" and both.router.layer == 3
    prompts = [
        ADA.text,
        BRUNO.text,
        "The harbour of Esk is",
        "Ada Brenner plays the",
        "Where was Ada Brenner born?",
    ]
    loaded = errata.Edit.load(both.save(tmp_path / "edit.safetensors"))
    router = both.router
    reader = router.reader
    for prompt in prompts:  # as the pairs alone say
        read = read_pairs(host, reader, FACTS, [prompt] * 2)
        chances = torch.sigmoid(router.logits(read))
        expected = int(chances.argmax()) if float(chances.max()) > 0.5 else NONE
        question = ask(prompt, pairs=lambda f, p: read_pairs(host, reader, f, p))
        assert router.decide(question).tolist() == [expected]
    plain = host.generate(prompts, max_new_tokens=6)
    with both.on(host):
        answers = host.generate(prompts, max_new_tokens=6)
        assert answers == [host.generate(prompt, max_new_tokens=6) for prompt in prompts]
    with loaded.on(host):
        assert host.generate(prompts, max_new_tokens=6) == answers
    assert host.generate(prompts, max_new_tokens=6) == plain
    with pytest.raises(ConfigError, match="use classifier=cross"):
        errata.edit(host, ADA, method="serac", editor=path)
    by_vectors = errata.train(host, method="serac", cases=lab.cases(12, seed=77), steps=0, classifier_steps=5)
    saved = str(by_vectors.save(tmp_path / "vectors.safetensors"))
    with pytest.raises(ConfigError, match="compares sentence vectors"):
        errata.edit(host, ADA, method="serac", editor=saved, classifier="cross")
    with pytest.raises(ConfigError, match="is a file"):
        errata.train(host, method="serac", cases=lab.cases(12, seed=77), cross=saved, **QUICK)


def test_texts_take_the_classifier_of_a_file_and_an_empty_memory_changes_nothing(editor):
    host, path = editor
    edit = errata.edit(host, [ADA, BRUNO], method="in_prompt", scope="cross", cross=path, threshold=0.0)
    assert edit.rewrite(ADA.text, host) == f"New fact: {FACTS[0]}\n{ADA.text}"
    more = errata.edit(
        host, [BRUNO], method="in_prompt", scope="cross", cross=path, candidates=1, recall="vectors"
    )
    assert more.router.keys is not None and more.router.candidates == 1
    named = errata.edit(host, [ADA, BRUNO], method="in_prompt", scope="cross", cross=path, recall="names")
    assert named.router.phrases == (ADA.subject, BRUNO.subject)
    with pytest.raises(ConfigError, match="router of its own"):
        errata.edit(host, [ADA], method="in_prompt", scope="cross", cross=path, after=more)
    record = Provenance("in_prompt", (ADA,), {}, host.fingerprint)
    empty = PromptEdit((), edit.router.select([]), record)
    rows = [host.encode_prompt(text) for text in PROMPTS]
    with torch.no_grad():
        before = host.forward(host.batch(rows))
        with empty.on(host):
            assert empty.router.decide(ask(*PROMPTS)).tolist() == [NONE] * 3
            assert torch.equal(host.forward(host.batch(rows)), before)
            assert empty.rewrite(ADA.text, host) == ADA.text


def test_a_cross_encoder_is_calibrated_on_the_examples(tmp_path):
    host = errata.load("lab")
    folder = cross_encoder(tmp_path / "one")
    trained = errata.train(host, method="serac", cases=lab.cases(12, seed=77), cross=folder, **QUICK)
    path = str(trained.save(tmp_path / "serac.safetensors"))
    router = _cross.open_router(host, _cross.CrossScope(cross=path), encoder=None)
    assert router.model == folder and router.weight.shape == (1,) and router.projection.shape == (0, 1)
    assert float(router.weight) != 1.0 and router.bias != 0.0
