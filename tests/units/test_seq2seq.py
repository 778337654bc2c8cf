"""Encoder-decoders: opened as such, observed with the decoder's inputs shifted, with sites in both stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import processors

import errata
from errata.edits import WeightEdit
from errata.edits.edit import Provenance
from errata.errors import ConfigError, HostError, RequestError
from errata.evaluation import observe as room
from errata.evaluation import score
from errata.evaluation.observe import observe
from errata.host.build import BEGIN, END, new_tokenizer
from errata.host.codec import BREAK
from errata.host.generate import generate_rows
from errata.host.host import Host
from errata.job import workspace
from errata.methods import REGISTRY
from errata.types import Case, Probe
from errata.types.asking import MAX_NEW_TOKENS
from tests.models import TEXTS, fresh

FACTS = {
    "Where was Ada Brenner born?": "Tallow Esk",
    "Where does Bruno live?": "Merrin",
    "What is the capital of Arvania?": "Esk Tallow",
    "Who fell on the old road?": "the small dog",
}
SMALL: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2,
    },
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": 1,
    },
}  # fmt: skip
FRAMES = {"t5": f"$A {END}", "bart": f"{BEGIN} $A {END}"}


def own_tokenizer(family: str) -> Any:
    """A tokenizer that closes every text, as T5's does, and begins it too, as BART's does."""
    made = new_tokenizer([*TEXTS, *FACTS, *FACTS.values()], 400)
    pairs = [(token, made.convert_tokens_to_ids(token)) for token in (BEGIN, END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=FRAMES[family], pair=f"{FRAMES[family]} $B", special_tokens=pairs
    )
    return made


def taught(family: str, tokenizer: Any, *, shifted: bool = True) -> Any:
    """Train a tiny model until it answers; not ``shifted``: to say each token when it is given that token."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(
        family, vocab_size=400, dropout_rate=0.0, dropout=0.0, **ids, **SMALL[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).float()
    source = tokenizer(list(FACTS), padding=True, return_tensors="pt")
    said = tokenizer(text_target=list(FACTS.values()), padding=True, return_tensors="pt")
    labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)
    given = {} if shifted else {"decoder_input_ids": said.input_ids}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        out = model(input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels, **given)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if out.loss.item() < 2e-3:
            break
    return model.eval()


@pytest.fixture(scope="module", params=["t5", "bart"])
def host(request) -> Host:
    tokenizer = own_tokenizer(request.param)
    made = errata.load(taught(request.param, tokenizer), tokenizer)
    assert made.kind == "encoder_decoder"
    return made


PROBES = tuple(
    Probe("efficacy", question, (answer,), ("Oa",), "Oa and Merrin") for question, answer in FACTS.items()
)


def scores(host: Host) -> dict[str, float]:
    seen = observe(host, PROBES)
    request = errata.Request("Where was {} born?", "Ada Brenner", "Tallow Esk")
    summary = score.summarise(score.rows(Case("c", request, PROBES), seen, seen))
    return {name: entry["after"] for name, entry in summary.items()}


def test_a_model_that_answers_right_scores_one_under_every_protocol(host):
    found = scores(host)
    assert {name.split(".")[1] for name in found} >= {"generate", "teacher_forced", "probability"}
    assert set(found.values()) == {1.0}, found


def test_the_unshifted_comparison_says_less_of_the_same_model(host):
    """Handing the decoder the answer and comparing place by place: what a right model does not do."""
    right = []
    for question, answer in FACTS.items():
        said = torch.tensor([host.tokenizer(text_target=answer)["input_ids"]])
        with torch.no_grad():
            logits = host.model(
                input_ids=torch.tensor([host.encode(question).ids]), decoder_input_ids=said
            ).logits
        right.append(torch.equal(logits.argmax(-1), said))
    assert not any(right), "no answer is found right as a whole"


def test_a_model_trained_without_the_shift_scores_less():
    """It repeats what it is given, so an unshifted comparison calls it perfect; it answers nothing."""
    tokenizer = own_tokenizer("t5")
    model = taught("t5", tokenizer, shifted=False)
    found = scores(Host(model, tokenizer, name="unshifted"))
    assert found["efficacy.generate"] < 0.5 and found["efficacy.teacher_forced"] < 0.5


def test_log_probabilities_are_minus_the_loss_of_the_model_itself(host):
    """Transformers shifts labels its own way: summed over the answer's tokens both must agree."""
    for question, answer in FACTS.items():
        seen = observe(host, [Probe("efficacy", question, (answer,), ())])[0]
        labels = torch.tensor([host.tokenizer(text_target=answer)["input_ids"]])
        ids = torch.tensor([host.tokenizer(question)["input_ids"]])
        with torch.no_grad():
            spread = host.model(input_ids=ids, labels=labels).logits.log_softmax(-1)[0]
        lead = int(labels[0, 0] == host.tokenizer.bos_token_id)
        each = [float(spread[i, token]) for i, token in enumerate(labels[0].tolist())][lead:-1]
        assert seen.answer_logprobs == pytest.approx(each, abs=1e-5)
        assert len(seen.answer_logprobs) == len(labels[0]) - 1 - lead


def test_what_is_said_is_what_transformers_says_of_each_prompt_alone(host):
    for asked, seen in zip(PROBES, observe(host, PROBES), strict=True):
        ids = torch.tensor([host.tokenizer(asked.prompt)["input_ids"]])
        out = host.model.generate(input_ids=ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        assert seen.text == host.tokenizer.decode(out[0], skip_special_tokens=True) == asked.answers[0]
        assert host.generate(asked.prompt) == seen.text


def test_every_form_and_neighbours(host):
    probes = [
        Probe("neighbourhood", "Where does Bruno live?", ("Merrin",), ("Merrin",), "Esk"),
        Probe("efficacy", "Who fell?", ("the dog",), (), form="choice", choices=("the dog", "Ada and Bruno")),
        Probe("entity", "The rain fell on the old road and", ("the small dog",), (), form="span"),
        Probe("long", "Where was Ada Brenner born?", ("Tallow Esk",), (), form="long"),
        Probe("generation", "Ada", (), (), form="open"),
    ]
    together = observe(host, probes)
    for asked, seen in zip(probes, together, strict=True):
        alone = observe(host, [asked])[0]
        assert seen.text == alone.text
        assert seen.answer_logprobs == pytest.approx(alone.answer_logprobs, abs=1e-4)
        for mine, other in zip(seen.choice_logprobs, alone.choice_logprobs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    torch.testing.assert_close(together[0].next_logprobs.exp().sum(), torch.tensor(1.0))
    first = host.encode_answer("Where does Bruno live?", "Merrin").target[0]
    assert float(together[0].next_logprobs[first]) == pytest.approx(together[0].answer_logprobs[0], abs=1e-4)
    assert together[1].text == together[2].text == "" and together[3].text == "Tallow Esk"


def test_the_padding_side_of_the_decoder_is_immaterial(host):
    answers = [host.encode_answer(p.prompt, p.answers[0]) for p in PROBES]
    rows = [answer.ids for answer in answers]
    line, at = torch.arange(len(rows)), torch.tensor([answer.start - 1 for answer in answers])
    with torch.no_grad():
        right = host.forward_at(host.batch(rows), line, at)
        for i, row in enumerate(rows):
            alone = host.forward_at(host.batch([row]), torch.tensor([0]), at[i : i + 1])[0]
            torch.testing.assert_close(right[i], alone, atol=1e-4, rtol=0)
    assert all(row.count(BREAK) == 1 for row in rows)


def test_a_saved_folder_opens_as_what_it_is(host, tmp_path):
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    opened = errata.load(str(tmp_path), device="cpu")
    assert opened.kind == "encoder_decoder" and type(opened.model) is type(host.model)
    assert opened.fingerprint == host.fingerprint and opened.weights_hash() == host.weights_hash()
    assert [s.text for s in observe(opened, PROBES)] == list(FACTS.values())


def test_an_encoder_decoder_without_a_head_is_refused(host):
    from transformers import AutoModel

    bare = AutoModel.from_config(host.config)
    with pytest.raises(HostError, match="head"):
        errata.load(bare, host.tokenizer)


@pytest.mark.parametrize("name", ["rome", "memit", "grace"])
def test_methods_that_need_subject_and_answer_in_one_stack_refuse_it(host, name):
    request = errata.Request("Where was {} born?", "Ada Brenner", "Esk")
    before = host.weights_hash()
    with pytest.raises(ConfigError, match="encoder-decoders: .*two stacks.*methods for those: cake, ft"):
        errata.edit(host, request, method=name)
    method = REGISTRY.get(name)
    with pytest.raises(ConfigError, match="encoder-decoders"):
        method.run(host, [request], method.config(), workspace(host, seed=0))
    assert host.weights_hash() == before


def test_statements_of_its_own_need_a_model_that_continues_text(host):
    request = errata.Request("Where was {} born?", "Ada Brenner", "Tallow Esk")
    with pytest.raises(ConfigError, match="generates none"):
        errata.edit(host, request, method="ft", anchors=0.3)


def test_both_stacks_have_sites(host):
    layout = host.layout
    assert layout.stack == "decoder" and layout.encoder is not None and layout.refused is None
    for part, within in ((layout, "decoder"), (layout.encoder, "encoder")):
        assert len(part.blocks) == 2 and part.width == 64 and all(within in name for name in part.blocks)
        assert all(site is not None and site.d_in == 128 for site in part.mlp_out)
        assert all(site is not None and "encoder_attn" not in site.name for site in part.attn_out)
        assert all("EncDec" not in site.name for site in part.attn_out if site)
    with pytest.raises(HostError, match="unknown stack"):
        layout.of("middle")
    with pytest.raises(HostError, match="no encoder beside"):
        fresh("llama").layout.of("encoder")


def test_running_text_and_empty_answers_are_refused(host):
    with pytest.raises(HostError, match="not running text"):
        room.logprobs(host, ["The rain fell on the old road."])
    with pytest.raises(RequestError, match="no token"):
        observe(host, [Probe("efficacy", "Where?", (" ",), ())])


def test_an_edit_of_a_weight_by_name_comes_and_goes(host):
    """Scaling the last block's output away makes the model answer otherwise, and only inside."""
    name = next(
        n for n, p in host.model.named_parameters()
        if n.endswith(("decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder.layers.1.fc2.weight"))
    )  # fmt: skip
    before, texts = host.weights_hash(), [s.text for s in observe(host, PROBES)]
    edit = weight_edit(host, name, -2.0 * host.model.get_parameter(name).detach())
    with edit.on(host):
        assert host.placed and host.weights_hash() != before
        inside = observe(host, PROBES)
    assert inside != observe(host, PROBES)
    assert host.weights_hash() == before and [s.text for s in observe(host, PROBES)] == texts


def weight_edit(host: Host, name: str, delta: torch.Tensor) -> WeightEdit:
    made_by = Provenance("ft", (), {}, host.fingerprint, host.name)
    return WeightEdit({name: delta}, frozenset(), made_by)


def test_a_causal_model_stays_a_causal_host():
    model = fresh("llama")
    assert type(errata.load(model.model, model.tokenizer)) is errata.Host


def test_a_prompt_of_the_whole_window_leaves_the_decoder_its_own(host, monkeypatch):
    """The window holds each side by itself, so a long prompt takes nothing from what is generated."""
    monkeypatch.setitem(vars(host), "window", 64)
    filler = "a " * 80
    row = host.encode_prompt(filler)
    place = row.index(BREAK)
    full = (*row[:63], row[place - 1], *row[place:])  # 64 tokens of the encoder, closing one included
    assert host.length(full) == host.window == full.index(BREAK)
    begin = len(full) - 65
    assert begin >= 1 and host.room(full) == 64 - begin
    assert host.room(host.encode_prompt("a")) == host.room(full)
    # the last token that there is room for still runs; one more is refused
    longest = (*full, *[5] * host.room(full))
    assert host.length(longest) == 64 and host.forward(host.batch([longest])).shape[:2] == (1, 64)
    with pytest.raises(RequestError, match="65 tokens"):
        host.batch([(*longest, 5)])
    # neither does it cut what is generated: transformers' own loop gives the same text
    text = generate_rows(host, [full], 100, "end")
    with torch.no_grad():
        ids = host.model.generate(
            **host.inputs(host.batch([full], side="left")), max_new_tokens=64 - begin, do_sample=False
        )
    assert text == host.decode(ids[:, begin:].tolist())
