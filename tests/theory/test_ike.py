"""IKE's context: which demonstrations it shows, in which order, and what comes last."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import errata
from errata.edits.prompt import PromptEdit
from errata.errors import ConfigError, EditError
from errata.host.embedding import embed
from errata.methods.ike import Config, _kinds
from tests.models import fresh, tokenizer

FACT = errata.Request("{} was born in", "Ada Brenner", "Merrin")
OTHER = errata.Request("{} plays the", "Bruno", "harp")


def example(number: int, subject: str, target: str) -> errata.Case:
    return errata.Case(
        f"e{number}",
        errata.Request("{} lives in", subject, target, "Esk"),
        (
            errata.Probe("paraphrase", f"The town of {subject} is", (target,), ("Esk",)),
            errata.Probe("neighbourhood", f"Ivo {number} lives in", ("Tallow",), ("Tallow",)),
        ),
    )


EXAMPLES = [example(i, f"Person {i}", "Merrin" if i % 2 else "Esk") for i in range(16)]


def roomy(family: str = "llama"):
    return fresh(family, max_position_embeddings=2048)


def blocks(edit: PromptEdit, entry: int = 0) -> list[str]:
    return edit.contexts[entry].split("\n\n")


def test_the_papers_shares_are_four_copies_twelve_updates_and_sixteen_kept_answers():
    assert Counter(_kinds(32, Config())) == {"copy": 4, "update": 12, "retain": 16}
    assert len(_kinds(7, Config())) == 7 and _kinds(0, Config()) == []


def test_each_kind_asks_what_it_says():
    host = roomy()
    given = {"method": "ike", "examples": EXAMPLES, "demonstrations": 4}
    for kind, ask, answer in (
        ("copy", "Person {} lives in", None),
        ("update", "The town of Person {} is", None),
        ("retain", "Ivo {} lives in", "Tallow"),
    ):
        shares = {name: int(name == kind) for name in ("copy", "update", "retain")}
        edit = errata.edit(host, FACT, **given, **shares)
        *shown, own, end = blocks(edit)
        assert len(shown) == 4 and end == "New Fact: Ada Brenner was born in Merrin\nPrompt: "
        assert own == "New Fact: Ada Brenner was born in Merrin\nPrompt: Ada Brenner was born in Merrin"
        for block in shown:
            fact, prompt = block.split("\n")
            number = fact.split()[3]
            target = "Merrin" if int(number) % 2 else "Esk"
            assert fact == f"New Fact: Person {number} lives in {target}"
            assert prompt == f"Prompt: {ask.format(number)} {answer or target}"


def test_the_most_similar_demonstration_stands_last():
    host = roomy()
    edit = errata.edit(
        host, FACT, method="ike", examples=EXAMPLES, demonstrations=5, copy=1, update=0, retain=0
    )
    facts = [block.split("\n")[0] for block in blocks(edit)[:5]]
    vectors = embed(host, [f"New Fact: {c.request.text} {c.request.target}" for c in EXAMPLES])
    near = vectors @ embed(host, ["New Fact: Ada Brenner was born in Merrin"])[0]
    best = near.argsort(descending=True)[:5].flip(0).tolist()
    assert facts == [f"New Fact: {EXAMPLES[i].request.text} {EXAMPLES[i].request.target}" for i in best]


def test_examples_about_the_subject_itself_are_not_shown():
    host = roomy()
    leak = example(99, "Ada Brenner", "Tallow")
    edit = errata.edit(host, FACT, method="ike", examples=[leak, *EXAMPLES[:3]], demonstrations=4)
    assert "lives in" in edit.contexts[0] and "Ada Brenner lives in" not in edit.contexts[0]


def test_what_the_window_cannot_hold_is_left_out_least_like_first():
    small, large = fresh("llama", max_position_embeddings=320), roomy()
    given = {"method": "ike", "examples": EXAMPLES, "demonstrations": 16, "room": 32}
    short, whole = errata.edit(small, FACT, **given), errata.edit(large, FACT, **given)
    count = short.provenance.notes["demonstrations"]
    assert 0 < count < whole.provenance.notes["demonstrations"] == 16
    assert whole.contexts[0].endswith(short.contexts[0])
    with pytest.raises(ConfigError, match="the fact alone has more"):
        errata.edit(fresh("llama"), FACT, method="ike", examples=EXAMPLES, room=120)


def test_one_fact_stands_before_every_prompt_and_several_where_their_subject_is_named():
    host = roomy()
    given = {"method": "ike", "examples": EXAMPLES, "demonstrations": 2}
    one = errata.edit(host, FACT, **given)
    assert one.rewrite("The rain fell") == one.contexts[0] + "The rain fell"
    both = errata.edit(host, [FACT, OTHER], **given)
    assert both.rewrite("The rain fell") == "The rain fell"
    assert both.rewrite("bruno likes") == both.contexts[1] + "bruno likes"
    assert both.rewrite("Ada Brenner and Bruno") == both.contexts[0] + "Ada Brenner and Bruno"
    grown = errata.edit(host, OTHER, after=one, **given)
    assert grown.contexts == both.contexts and grown.provenance.requests == (FACT, OTHER)
    with pytest.raises(ConfigError, match="need scope: subject"):
        errata.edit(host, [FACT, OTHER], scope="always", **given)


def test_without_examples_it_says_what_to_give():
    with pytest.raises(ConfigError, match="examples"):
        errata.edit(roomy(), FACT, method="ike")
    plain = errata.edit(roomy(), FACT, method="ike", demonstrations=0)
    assert len(blocks(plain)) == 2


def test_generation_scores_and_distributions_all_see_the_context():
    from errata.evaluation.observe import observe

    host = roomy()
    edit = errata.edit(host, FACT, method="ike", examples=EXAMPLES, demonstrations=2)
    probe = errata.Probe("neighbourhood", "Bruno lives in", ("Esk",), ("Esk",), "Merrin")
    written = errata.Probe("neighbourhood", edit.contexts[0] + "Bruno lives in", ("Esk",), ("Esk",), "Merrin")
    want, plain = observe(host, [written])[0], observe(host, [probe])[0]
    with edit.on(host):
        got = observe(host, [probe])[0]
        with pytest.raises(EditError, match="active on this host already"):
            edit.apply_(host)
    assert got == want and torch.equal(got.next_logprobs, want.next_logprobs) and got != plain
    assert observe(host, [probe])[0] == plain


def test_a_sentence_encoder_from_a_folder(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    host = roomy()
    own, other = (
        embed(host, ["Ada was born", "Bruno"], encoder=e) for e in (None, str(tmp_path / "encoder"))
    )
    assert own.shape == (2, 32) and other.shape == (2, 16)
    torch.testing.assert_close(other.norm(dim=1), torch.ones(2))
    with pytest.raises(errata.ErrataError, match="cannot open the encoder"):
        embed(host, ["Ada"], encoder=str(tmp_path / "none"))
