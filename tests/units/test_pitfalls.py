"""Mistakes that public editing code is known for, each with its guard."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import errata
from errata.errors import HostError, RequestError
from errata.evaluation.observe import observe
from errata.host import tokens
from errata.host.build import new_model, new_tokenizer
from errata.locate import contexts
from errata.locate.contexts import prefixes, sampled_corpus
from errata.locate.keys import subject_place
from errata.methods._method import Workspace
from tests.models import FAMILIES, TEXTS, fresh, tokenizer

# --- subject lookup ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "The rain fell. ", "É\N{ZERO WIDTH SPACE}«oui» "])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("{} was born in", "Ada Brenner"),
        ("The mother of {} is", "Éric"),
        ("Where was {}?", "Bruno Holner"),
        ("{}", "Ada"),
        ("Is it ({})", "Ada"),
    ],
)
def test_the_subjects_last_token_ends_with_the_subject(prompt, subject, prefix):
    host = fresh("llama")
    request = errata.Request(prompt, subject, "Esk")
    place = subject_place(host, request, prefix)
    text = prefix + request.text
    span = host.encode(text).spans[place.position]
    end = len(prefix) + request.span[1]
    assert span[0] < end <= span[1]


def test_begin_token_is_counted_once():
    host = fresh("llama")
    ids = host.encode("Ada Brenner").ids
    assert ids.count(host.tokenizer.bos_token_id) == 1 and ids[0] == host.tokenizer.bos_token_id
    twice = host.encode(host.tokenizer.bos_token + "Ada Brenner").ids
    assert twice.count(host.tokenizer.bos_token_id) == 1


def test_a_subject_that_occurs_twice_must_be_marked():
    with pytest.raises(RequestError, match="2 times"):
        errata.Request("Ada met Ada in", "Ada", "Esk")
    marked = errata.Request("Ada met {} in", "Ada", "Esk")
    assert marked.text == "Ada met Ada in" and marked.span == (8, 11)


def test_braces_in_user_text_are_only_text():
    request = errata.Request("The set {1, 2} of Ada is", "Ada", "{x}")
    assert request.text == "The set {1, 2} of Ada is"
    filled = errata.Request("In {}: {0} and {name}", "Ada {Q}", "Esk")
    assert filled.text == "In Ada {Q}: {0} and {name}"
    with pytest.raises(RequestError, match="2 slots"):
        errata.Request("{} and {}", "Ada", "Esk")


# --- targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("born in", "Esk", "born in Esk"),
        ("born in ", "Esk", "born in Esk"),
        ("born in", " Esk", "born in Esk"),
        ("born in ", " Esk", "born in Esk"),
        ("Answer:\n", "Esk", "Answer:\nEsk"),
        ("born", ", he said", "born, he said"),
        ("said («", "oui", "said («oui"),
        ("was", "'quoted'", "was 'quoted'"),
        ("rate is 50", "%", "rate is 50%"),
    ],
)
def test_leading_space_rule(prompt, answer, text):
    made, at = tokens.joint(prompt, answer)
    assert made == text
    assert made[at:].strip(" ") == answer.strip(" ")


def test_prompt_and_answer_are_tokenised_together_and_kept_as_ids():
    host = fresh("llama")
    for prompt, answer in (("Ada was born in", "Tallow"), ("Answer:", "Marmelund sen"), ("«", "oui»")):
        made = host.encode_answer(prompt, answer)
        text, _ = tokens.joint(prompt, answer)
        assert made.ids == host.encode(text).ids
        assert host.tokenizer.decode(made.target).strip() == answer


def test_a_target_without_tokens_is_refused():
    with pytest.raises(RequestError, match="target is empty"):
        errata.Request("{} is", "Ada", "  ")
    blind = new_tokenizer(TEXTS, 300)
    from tokenizers import normalizers

    blind.backend_tokenizer.normalizer = normalizers.Replace("\N{WORD JOINER}", "")
    host = errata.Host(fresh("llama").model, blind, name="blind")
    with pytest.raises(RequestError, match="no token"):
        host.encode_answer("Ada is", "\N{WORD JOINER}")


def test_multi_token_scores_use_every_token():
    host = fresh("llama")
    probe = errata.Probe("efficacy", "Ada was born in", ("Marmelundsen",), ("Esk",), "Esk")
    seen = observe(host, [probe])[0]
    made = host.encode_answer(probe.prompt, "Marmelundsen")
    assert len(made.target) > 1 and len(seen.answer_logprobs) == len(made.target)
    with torch.no_grad():
        logits = host.model(torch.tensor([made.ids])).logits[0].log_softmax(-1)
    expected = [float(logits[made.start + i - 1, t]) for i, t in enumerate(made.target)]
    assert seen.answer_logprobs == pytest.approx(expected, abs=1e-5)


# --- padding, positions -----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_padding_side_is_immaterial(side):
    host = fresh("gpt2")
    plain = host.generate(["Ada", "The rain fell on the old road and"], max_new_tokens=5)
    host.tokenizer.padding_side, kept = side, host.tokenizer.padding_side
    try:
        assert host.generate(["Ada", "The rain fell on the old road and"], max_new_tokens=5) == plain
    finally:
        host.tokenizer.padding_side = kept
    assert plain == [
        host.generate(text, max_new_tokens=5) for text in ("Ada", "The rain fell on the old road and")
    ]


def test_a_prompt_longer_than_the_window_is_refused_before_anything_runs():
    host = fresh("llama")
    request = errata.Request("{} " + "was born " * 100, "Ada", "Esk")
    with pytest.raises(RequestError, match="window"):
        errata.edit(host, request, method="rome")


# --- weights and structure ----------------------------------------------------------------------


def test_square_matrices_keep_their_orientation():
    """Where d = m, shape cannot tell a stored transpose; the layout reads it off the numbers."""
    for family, changes in (("gpt2", {"n_inner": 32}), ("llama", {"intermediate_size": 32})):
        host = fresh(family, **changes)
        site = host.layout.site(1)
        assert site.d_in == site.d_out and site.transposed == (family == "gpt2")


def test_tied_embeddings_stay_tied_and_untouched():
    host = fresh("llama", tie_word_embeddings=True)
    edit = errata.edit(host, errata.Request("{} is", "Ada", "Esk"), method="ft", steps=2)
    with edit.on(host):
        head, embedding = host.model.get_output_embeddings(), host.model.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_biases_survive_an_edit():
    host = fresh("gpt2")
    site = host.layout.site(0)
    bias = host.model.get_submodule(site.name).bias
    with torch.no_grad():
        bias.fill_(0.3)
    start = host.weights_hash()
    edit = errata.edit(host, errata.Request("{} is", "Ada", "Esk"), method="rome", steps=2, tokens=300)
    with edit.on(host):
        assert float(bias[0].detach()) == pytest.approx(0.3)
    assert host.weights_hash() == start


def test_experts_that_compute_something_else_are_refused_with_the_reason():
    host = fresh("mixtral")
    for layer in (
        host.model.model.layers
    ):  # a norm behind every expert makes the sum another function of their weights
        experts, plain = layer.mlp.experts, layer.mlp.experts.forward
        experts.forward = lambda *given, plain=plain: torch.nn.functional.normalize(plain(*given), dim=-1)
    assert all(site is None for site in host.layout.mlp_out) and not host.layout.experts
    with pytest.raises(HostError, match="stacks experts in a form that is not known"):
        errata.edit(host, errata.Request("{} is", "Ada", "Esk"), method="rome")


def test_a_model_without_blocks_is_refused():
    class Flat(torch.nn.Module):
        config = fresh("llama").config

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(400, 8)
            self.head = torch.nn.Linear(8, 400)

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return SimpleNamespace(logits=self.head(self.table(input_ids)))

    host = errata.load(Flat(), tokenizer())
    with pytest.raises(HostError, match="no editable site"):
        errata.edit(host, errata.Request("{} is", "Ada", "Esk"), method="ft")


def test_wrapped_projections_are_refused_with_the_reason():
    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    host = fresh("llama")
    for block in host.model.model.layers:
        old = block.mlp.down_proj
        block.mlp.down_proj = Wrapped(old.in_features, old.out_features, bias=False)
    with pytest.raises(HostError, match="does not compute"):
        errata.edit(host, errata.Request("{} is", "Ada", "Esk"), method="ft")


def test_nan_and_meta_weights_are_refused():
    model = new_model("llama", FAMILIES["llama"], seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(HostError, match=r"layers\.1\.mlp\.up_proj"):
        errata.load(model, tokenizer())
    with torch.device("meta"):
        away = new_model("llama", FAMILIES["llama"], seed=0)
    with pytest.raises(HostError, match="meta"):
        errata.load(away, tokenizer())


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(HostError, match="offsets"):
        tokens.encode(Slow(), "Ada")


# --- state and randomness ----------------------------------------------------------------------


def test_statistics_and_contexts_belong_to_their_host(tmp_path, monkeypatch):
    """Two hosts of one name never share what was computed for one of them."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    request = errata.Request("{} is", "Ada", "Esk")
    one, two = fresh("llama", seed=1), fresh("llama", seed=2)
    one.name = two.name = "same name"
    errata.edit(one, request, method="rome", steps=2, tokens=300)
    after_one = errata.edit(two, request, method="rome", steps=2, tokens=300)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "other"))
    alone = errata.edit(fresh("llama", seed=2), request, method="rome", steps=2, tokens=300)
    (a,), (b,) = after_one.deltas.values(), alone.deltas.values()
    assert torch.equal(a.B, b.B) and torch.equal(a.A, b.A)


def test_cached_statistics_give_the_same_edit(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    request = errata.Request("{} is", "Ada", "Esk")
    host = fresh("llama")
    first = errata.edit(host, request, method="rome", steps=2, tokens=300)
    files = list(tmp_path.glob("moments-*.safetensors"))
    assert len(files) == 1
    second = errata.edit(host, request, method="rome", steps=2, tokens=300)
    (a,), (b,) = first.deltas.values(), second.deltas.values()
    assert torch.equal(a.A, b.A)
    files[0].write_bytes(files[0].read_bytes()[:100])  # damaged: made anew, not trusted
    third = errata.edit(host, request, method="rome", steps=2, tokens=300)
    (c,) = third.deltas.values()
    assert torch.equal(a.A, c.A)


def test_prefixes_depend_on_the_seed_alone():
    host = fresh("llama")
    torch.manual_seed(1)
    one = prefixes(host, seed=3, groups=[(2, 4), (2, 6)])
    torch.manual_seed(2)
    assert prefixes(host, seed=3, groups=[(2, 4), (2, 6)]) == one
    assert prefixes(host, seed=4, groups=[(2, 4), (2, 6)]) != one
    assert sum(c.weight for c in one) == pytest.approx(1)
    half = prefixes(host, seed=3, groups=[(4, 4)], weighting="half_bare")
    assert half[0].weight == 0.5 and half[0].prefix == "" and sum(c.weight for c in half) == pytest.approx(1)


def test_what_a_host_writes_is_sampled_once_and_kept_for_the_unedited_host(tmp_path, monkeypatch):
    host = fresh("llama")
    groups = [(2, 4), (2, 6)]
    plain = prefixes(host, seed=0, groups=groups)
    text = list(sampled_corpus(host, texts=20, length=5).texts())
    request = errata.Request("{} is", "Ada", "Esk")
    edit = errata.edit(host, request, method="ft", steps=3, learning_rate=0.5, epsilon=None)
    with edit.on(host):
        other = Workspace(folder=tmp_path / "edited").contexts(host, groups, "flat")
        assert other != plain and not (tmp_path / "edited").exists()
    work = Workspace(folder=tmp_path)
    assert work.contexts(host, groups, "flat") == plain
    assert list(sampled_corpus(host, texts=20, length=5, folder=tmp_path).texts()) == text
    monkeypatch.setattr(contexts, "sample", None)
    assert Workspace(folder=tmp_path).contexts(host, groups, "flat") == plain
    assert list(sampled_corpus(host, texts=20, length=5, folder=tmp_path).texts()) == text
    with edit.on(host):
        assert Workspace(folder=tmp_path, after=edit).contexts(host, groups, "flat") == plain
    with pytest.raises(TypeError):  # of another seed nothing is kept
        prefixes(host, seed=1, groups=groups, folder=tmp_path)
