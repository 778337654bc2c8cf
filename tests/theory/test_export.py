"""Exports: what is written does what the edit does, or nothing is written and the reason is given."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import errata
from errata.edits.memory import Intervention
from errata.edits.prompt import PromptEdit
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.similarity import Similarity
from errata.edits.weight import WeightEdit
from errata.errors import HostError
from errata.host import wider
from errata.host.host import Host
from errata.linalg.lowrank import LowRank, nearest
from tests.exports import ADA, BRUNO, Client, neurons, open_adapter, open_checkpoint, refused
from tests.models import fresh, tokenizer

PROMPTS = [ADA.text, BRUNO.text, "The rain fell on the", "Éric said"]
CALINET = {"method": "calinet", "steps": 60, "slots": 8}
UNGATED = [
    ("gpt2", {}, "gelu_tanh"),
    ("gpt2", {"n_inner": None, "activation_function": "relu", "tie_word_embeddings": False}, "relu"),
    ("gpt_neox", {}, "gelu"),
    ("gptj", {"n_inner": 80}, "gelu_tanh"),
    ("falcon", {}, "gelu"),
]
GATED = [("llama", {}, "silu"), ("llama", {"mlp_bias": True, "tie_word_embeddings": True}, "silu")]
EVERY = [
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
]


def logits(host: Host) -> torch.Tensor:
    """Logits of each prompt alone, end to end."""
    rows = [host.forward(host.batch([host.encode_prompt(text)]))[0] for text in PROMPTS]
    return torch.cat(rows)


@torch.no_grad()
def agree(edit: errata.Edit, host: Host, exported: Host, *, close: float = 1e-5) -> None:
    """The exported model gives the logits and the answers of the host with the edit, which are not those without."""
    plain = logits(host)
    with edit.on(host):
        expected, answers = logits(host), host.generate(PROMPTS, max_new_tokens=6, natural_stop=False)
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 100 * close * scale, "the edit was to be seen"
    torch.testing.assert_close(logits(exported).to(expected), expected, rtol=0, atol=close * max(scale, 1.0))
    assert exported.generate(PROMPTS, max_new_tokens=6, natural_stop=False) == answers


# --- weights in a checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_merged_weights_are_those_of_the_edit_in_place(family, tmp_path):
    host = fresh(family)
    start = host.weights_hash()
    edit = errata.edit(host, ADA, method="ft", steps=4)
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert host.weights_hash() == start and not host.edited
    exported = open_checkpoint(tmp_path / "out", host)
    agree(edit, host, exported)
    with edit.on(host) as placement:
        own = dict(host.model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in exported.model.named_parameters())
        assert receipt.facts["lost"] == dict(placement.lost)
    assert {"config.json", "model.safetensors", "errata-export.json"} <= set(receipt.files)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(receipt.files)


@pytest.mark.parametrize("method", ["rome", "memit", "lora"])
@pytest.mark.parametrize("model", ["lab", "lab-gpt2", "lab-qwen3"])
def test_edits_of_the_lab_are_exported(model, method, tmp_path, request):
    """The lab's models have tied embeddings, and one of them stores its weights transposed."""
    host = request.getfixturevalue("lab_host") if model == "lab" else errata.load(model, device="cpu")
    ask = errata.lab.cases(3, seed=0)[1].request
    options = {"lora": {"steps": 4}}.get(method, {"tokens": 1000, "steps": 4})
    edit = errata.edit(host, ask, method=method, **options)
    errata.export(edit, tmp_path / "full", to="checkpoint", host=host)
    agree(edit, host, open_checkpoint(tmp_path / "full", host))
    errata.export(edit, tmp_path / "adapter", to="peft", host=host)
    agree(edit, host, open_adapter(tmp_path / "adapter", host))


def test_a_checkpoint_in_sixteen_bits_reports_what_rounding_lost(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="rome", tokens=400)
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host, dtype="bfloat16")
    exported = open_checkpoint(tmp_path / "out", host)
    assert exported.dtype == torch.bfloat16 and receipt.facts["dtype"] == "bfloat16"
    (name,) = edit.deltas
    assert 1e-4 < receipt.facts["lost"][name] < 0.5
    assert json.loads((tmp_path / "out" / "errata-export.json").read_text())["lost"] == receipt.facts["lost"]
    cast = fresh("llama")
    cast.model.to(torch.bfloat16)
    with edit.on(cast) as placement:
        assert torch.equal(cast.model.get_parameter(name), exported.model.get_parameter(name))
        assert receipt.facts["lost"] == pytest.approx(dict(placement.lost))


def test_a_change_that_sixteen_bits_lose_is_refused(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="ft", steps=1)
    tiny = dataclasses.replace(edit, deltas={n: 1e-9 * _dense(d) for n, d in edit.deltas.items()})
    refused(tiny, tmp_path / "out", "lost in .*bfloat16", to="checkpoint", host=host, dtype="bfloat16")


def _dense(delta: LowRank | torch.Tensor) -> torch.Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def test_what_is_saved_is_not_shared_with_the_host(tmp_path):
    """Tied embeddings stay tied in the checkpoint, and biases and norms are merged too."""
    host = fresh("gpt2")
    record = errata.edit(host, ADA, method="ft", steps=1).provenance
    deltas = {
        "transformer.h.1.ln_2.weight": torch.full((32,), 0.5),
        "transformer.h.1.mlp.c_fc.bias": torch.full((80,), 0.25),
    }
    edit = WeightEdit(deltas, frozenset(), record)
    errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    exported = open_checkpoint(tmp_path / "out", host)
    assert exported.model.lm_head.weight is exported.model.transformer.wte.weight
    agree(edit, host, exported)
    tied = WeightEdit({"lm_head.weight": torch.full((400, 32), 0.1)}, frozenset(), record)
    refused(tied, tmp_path / "tied", "shares its memory", to="checkpoint", host=host)


# --- neurons in a checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes", "activation"), [*UNGATED, *GATED])
def test_neurons_are_a_wider_feed_forward_in_a_plain_checkpoint(family, changes, activation, tmp_path):
    host = fresh(family, **changes)
    start = host.weights_hash()
    edit = errata.edit(host, [ADA, BRUNO], activation=activation, **CALINET)
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert host.weights_hash() == start
    exported = open_checkpoint(tmp_path / "out", host)
    agree(edit, host, exported)
    width = receipt.facts["width"]
    assert width["before"] == host.layout.site(0).d_in and width["after"] % 64 == 0
    assert {exported.layout.site(layer).d_in for layer in range(3)} == {width["after"]}


@pytest.mark.parametrize(("family", "changes", "activation"), [UNGATED[0], UNGATED[2], GATED[0]])
def test_patches_are_neurons_with_biases(family, changes, activation, tmp_path):
    host = fresh(family, **changes)
    edit = errata.edit(host, [ADA, BRUNO], method="t_patcher", activation=activation, memory=64, steps=50)
    assert bool(edit.interventions[0].payload["biases"].any())
    errata.export(edit, tmp_path / "out", to="checkpoint", host=host, pad_to=1)
    exported = open_checkpoint(tmp_path / "out", host)
    agree(edit, host, exported)
    assert exported.layout.site(0).d_in == 80 + edit.interventions[0].payload["keys"].shape[1]


@pytest.mark.parametrize(("family", "changes", "activation"), [UNGATED[0], *GATED])
def test_several_layers_get_one_width_and_idle_neurons_are_zero(family, changes, activation, tmp_path):
    host = fresh(family, **changes)
    edit = neurons(host, {0: 5, 2: 9}, activation)
    errata.export(edit, tmp_path / "out", to="checkpoint", host=host, pad_to=10)
    exported = open_checkpoint(tmp_path / "out", host)
    agree(edit, host, exported)
    for layer, used in ((0, 5), (1, 0), (2, 9)):
        site = exported.layout.site(layer)
        assert site.d_in == 90
        weight = exported.weight(site)  # [d_out, d_in]
        assert not bool(weight[:, 80 + used :].any()) and torch.equal(
            weight[:, :80], host.weight(host.layout.site(layer))
        )


def test_two_groups_at_one_layer_are_joined(tmp_path):
    host = fresh("gpt2")
    one, two = (neurons(host, {1: count}, "gelu_tanh", seed=count) for count in (3, 4))
    both = dataclasses.replace(one, interventions=(*one.interventions, *two.interventions))
    errata.export(both, tmp_path / "out", to="checkpoint", host=host)
    agree(both, host, open_checkpoint(tmp_path / "out", host))


def test_neurons_of_the_lab_s_gpt2(tmp_path):
    host = errata.load("lab-gpt2", device="cpu")
    cases = [case.request for case in errata.lab.cases(4, seed=0)]
    edit = errata.edit(host, cases, method="calinet", activation="gelu_tanh", steps=100)
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert receipt.facts["width"] == {"before": 768, "after": 832}
    exported = open_checkpoint(tmp_path / "out", host)
    agree(edit, host, exported)
    with edit.on(host):
        answers = host.generate([case.text for case in cases])
    assert exported.generate([case.text for case in cases]) == answers


def test_neurons_of_the_lab_s_llama(lab_host, tmp_path):
    request = errata.lab.cases(1, seed=0)[0].request
    edit = errata.edit(lab_host, request, method="calinet", activation="silu", steps=60)
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=lab_host)
    assert receipt.facts["settings"] == {"intermediate_size": 832, "mlp_bias": True}
    agree(edit, lab_host, open_checkpoint(tmp_path / "out", lab_host))


def test_neurons_in_sixteen_bits(tmp_path):
    host = fresh("gpt2")
    edit = neurons(host, {1: 4}, "gelu_tanh")
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host, dtype="bfloat16")
    assert (
        all(1e-5 < share < 1e-2 for share in receipt.facts["lost"].values())
        and len(receipt.facts["lost"]) == 3
    )
    exported = open_checkpoint(tmp_path / "out", host)
    assert exported.dtype == torch.bfloat16
    with edit.on(host):
        torch.testing.assert_close(logits(exported).float(), logits(host), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("family", "changes", "activation", "reason"),
    [
        ("qwen2", {}, "silu", "gate and no biases, and Qwen2Config has no setting"),
        ("qwen3", {}, "silu", "Qwen3Config has no setting"),
        ("mistral", {}, "silu", "MistralConfig has no setting"),
        ("gemma2", {}, "gelu_tanh", "Gemma2Config has no setting"),
        ("phi3", {}, "silu", "a gate is part of it"),
        ("bloom", {}, "gelu_tanh", "cannot be run by itself"),
        ("gpt2", {}, "gelu", "applies gelu_tanh; fit the edit with activation=gelu_tanh"),
        ("gpt_neox", {}, "relu", "applies gelu; fit"),
        ("llama", {}, "relu", "applies silu; fit"),
        ("gpt2", {"activation_function": "tanh"}, "relu", "applies none of"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused(family, changes, activation, reason, tmp_path):
    host = fresh(family, **changes)
    text = refused(neurons(host, {1: 4}, activation), tmp_path / "out", reason, to="checkpoint", host=host)
    assert "Edit.load(path).apply_(host)" in text


def test_neurons_with_biases_need_a_map_with_biases(tmp_path):
    host = fresh("falcon")
    edit = neurons(host, {0: 3}, "gelu")
    refused(edit, tmp_path / "out", "neurons have biases and .* has none", to="checkpoint", host=host)


def test_neurons_at_the_output_projection_read_something_else(tmp_path):
    host = fresh("gpt2")
    site = host.layout.site(1)
    edit = neurons(host, {1: 4}, "gelu_tanh")
    payload = {**edit.interventions[0].payload, "keys": torch.ones(1, 4, site.d_in)}
    moved = dataclasses.replace(
        edit, interventions=(Intervention(site.name, "slots", payload, "all", "gelu_tanh"),)
    )
    refused(moved, tmp_path / "out", "go into|goes into the whole", to="checkpoint", host=host)


def test_a_router_that_decides_is_named(tmp_path):
    host = fresh("llama")
    for method, router in (("grace", "radius"), ("defer", "gate"), ("wise", "margin")):
        options = {"defer": {"steps": 5}, "wise": {"steps": 5, "texts": 4}}.get(method, {"steps": 4})
        edit = errata.edit(host, ADA, method=method, **options)
        for to in ("checkpoint", "peft"):
            refused(edit, tmp_path / "out", f"its {router} router accepts", to=to, host=host)
    always = neurons(host, {0: 2}, "silu")
    at_end = dataclasses.replace(
        always, interventions=(dataclasses.replace(always.interventions[0], positions="last"),)
    )
    refused(at_end, tmp_path / "out", "on some tokens of a prompt", to="checkpoint", host=host)
    swap = Intervention(host.layout.site(0).name, "swap", {"weights": torch.zeros(1, 32, 80)}, "all")
    refused(
        dataclasses.replace(always, interventions=(swap,)),
        tmp_path / "out",
        "swap at",
        to="checkpoint",
        host=host,
    )


def test_a_wider_feed_forward_is_checked_by_running_it():
    """A feed-forward that computes more than its two maps is not taken for one."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.c_fc, self.c_proj, self.act = inner.c_fc, inner.c_proj, inner.act

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 1.01 * self.c_proj(self.act(self.c_fc(hidden)))

    host = fresh("gpt2")
    host.model.transformer.h[1].mlp = Scaled(host.model.transformer.h[1].mlp)
    acts = {"gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
    assert wider.feed_forward(host.model, host.layout, 0, acts).activation == "gelu_tanh"
    with pytest.raises(HostError, match="computes more than its linear maps"):
        wider.feed_forward(host.model, host.layout, 1, acts)


# --- matrices of a memory ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_matrices_on_all_prompts_are_changes_of_weights(family, tmp_path):
    host = fresh(family)
    site = host.layout.site(1)
    generator = torch.Generator().manual_seed(0)
    payload = {
        "left": torch.randn(1, site.d_out, 2, generator=generator),
        "right": torch.randn(1, 2, site.d_in, generator=generator),
    }
    thin = Intervention(site.name, "lowrank", payload, "all")
    wide = Intervention(
        site.name, "dense", {"changes": torch.randn(1, site.d_out, site.d_in, generator=generator)}, "all"
    )
    edit = dataclasses.replace(neurons(host, {0: 1}, "relu"), interventions=(thin,))
    both = dataclasses.replace(edit, interventions=(thin, wide))
    for number, one in enumerate((edit, both)):
        errata.export(one, tmp_path / f"{number}", to="checkpoint", host=host)
        agree(one, host, open_checkpoint(tmp_path / f"{number}", host))
    errata.export(edit, tmp_path / "adapter", to="peft", host=host)
    agree(edit, host, open_adapter(tmp_path / "adapter", host))
    refused(both, tmp_path / "out", "give a rank", to="peft", host=host)
    refused(edit, tmp_path / "out", "adds none; leave it out", to="checkpoint", host=host, pad_to=8)


# --- adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_an_adapter_is_the_edit_in_place(family, tmp_path):
    host = fresh(family)
    start = host.weights_hash()
    edit = errata.edit(host, [ADA, BRUNO], method="lora", steps=20, scale="published")
    receipt = errata.export(edit, tmp_path / "out", to="peft", host=host)
    assert host.weights_hash() == start
    agree(edit, host, open_adapter(tmp_path / "out", host))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and set(config["target_modules"]) == set(
        receipt.facts["ranks"]
    )
    assert config["fan_in_fan_out"] is (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ranks_may_differ_from_layer_to_layer(family, tmp_path):
    host = fresh(family)
    generator = torch.Generator().manual_seed(0)
    sites = [host.layout.site(layer) for layer in range(3)] + [host.layout.site(0, "attn_out")]
    deltas = {
        site.parameter: LowRank(
            torch.randn(site.d_out, rank, generator=generator),
            torch.randn(rank, site.d_in, generator=generator),
        )
        for site, rank in zip(sites, (1, 3, 3, 5), strict=True)
    }
    record = errata.edit(host, ADA, method="ft", steps=1).provenance
    edit = WeightEdit(deltas, frozenset(s.parameter for s in sites if s.transposed), record)
    receipt = errata.export(edit, tmp_path / "out", to="peft", host=host)
    assert sorted(receipt.facts["ranks"].values()) == [1, 3, 3, 5] and receipt.facts["rank"] == 5
    agree(edit, host, open_adapter(tmp_path / "out", host))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5 and not {"rank_pattern", "alpha_pattern"} & set(config)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.shape[0 if ".lora_A." in name else 1] for name, value in factors.items()} == {5}
    for site in sites:  # a program that scales by alpha / (rank of this tensor) does the same
        b, a = (factors[f"base_model.model.{site.name}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(
            config["lora_alpha"] / len(a) * (b @ a), deltas[site.parameter].dense(), atol=1e-6, rtol=1e-6
        )
    thinner = errata.export(edit, tmp_path / "thin", to="peft", host=host, rank=3)
    assert [share > 0 for _, share in sorted(thinner.facts["lost"].items())] == [
        name == sites[3].parameter for name in sorted(deltas)
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_rank_limit_first_removes_what_is_no_rank_at_all(family, tmp_path):
    """A sum of dependent changes fits its true rank exactly; below that the energy that is kept is reported."""
    host = fresh(family)
    site = host.layout.site(1)
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(site.d_out, 3, generator=generator), torch.randn(3, site.d_in, generator=generator)
    mixed = torch.randn(3, 40, generator=generator)
    delta = LowRank(b @ mixed, torch.linalg.pinv(mixed) @ a)
    record = errata.edit(host, ADA, method="ft", steps=1).provenance
    edit = WeightEdit({site.parameter: delta}, frozenset({site.parameter} if site.transposed else ()), record)
    for name, options in {
        "unlimited": {},
        "three": {"rank": 3},
    }.items():  # 40 is more than the matrix has rows
        receipt = errata.export(edit, tmp_path / name, to="peft", host=host, **options)
        assert receipt.facts["rank"] == 3 and receipt.facts["lost"][site.parameter] < 1e-6
        assert "energy" not in receipt.facts and "answered" not in receipt.facts
        agree(edit, host, open_adapter(tmp_path / name, host))
    receipt = errata.export(edit, tmp_path / "two", to="peft", host=host, rank=2)
    s = torch.linalg.svdvals(delta.dense().double())[:3].square()
    assert receipt.facts["energy"] == {site.parameter: pytest.approx(float(s[:2].sum() / s.sum()), rel=1e-5)}
    assert receipt.facts["answered"] in (0.0, 1.0) and receipt.facts["answered_exactly"] in (0.0, 1.0)


def test_an_approximation_says_how_many_requests_still_hold(tmp_path, lab_host):
    request = errata.lab.cases(3, seed=0)[1].request
    edit = errata.edit(lab_host, request, method="ft", steps=25)
    close = errata.export(edit, tmp_path / "close", to="peft", host=lab_host, rank=64, dry_run=True)
    assert close.facts["answered"] == close.facts["answered_exactly"] == 1.0
    weak = dataclasses.replace(edit, deltas={n: 1e-3 * _dense(d) for n, d in edit.deltas.items()})
    far = errata.export(weak, tmp_path / "far", to="peft", host=lab_host, rank=1, dry_run=True)
    assert far.facts["answered"] == far.facts["answered_exactly"] == 0.0


def test_an_adapter_merged_by_peft_is_the_checkpoint(tmp_path):
    import peft

    for family in ("gpt2", "llama"):
        host = fresh(family)
        edit = errata.edit(host, ADA, method="rome", tokens=400)
        errata.export(edit, tmp_path / family, to="peft", host=host)
        merged = peft.PeftModel.from_pretrained(
            copy.deepcopy(host.model), tmp_path / family
        ).merge_and_unload()
        agree(edit, host, Host(merged, host.tokenizer, name="merged"))


@pytest.mark.parametrize("kind", ["t5", "bert", "classifier"])
def test_other_kinds_of_model_are_exported(kind, tmp_path):
    """Opened by transformers or peft, their logits are those of the edit in place."""
    import peft
    import transformers

    sizes = {"vocab_size": 400, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    bert = {**sizes, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 2}
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"mask_token": "<|pad|>"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            config = transformers.T5Config(
                vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2,
                bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )  # fmt: skip
            model, opener = (
                transformers.T5ForConditionalGeneration(config),
                transformers.AutoModelForSeq2SeqLM,
            )
        elif kind == "bert":
            model, opener = (
                transformers.BertForMaskedLM(transformers.BertConfig(**bert)),
                transformers.AutoModelForMaskedLM,
            )
        else:
            config = transformers.BertConfig(
                **bert, id2label={0: "Merrin", 1: "Esk"}, label2id={"Merrin": 0, "Esk": 1}
            )
            model = transformers.BertForSequenceClassification(config)
            opener = transformers.AutoModelForSequenceClassification
    host = errata.load(model.eval(), words, device="cpu")
    edit = errata.edit(host, ADA, method="lora", steps=5, scale="published", learning_rate=0.05)
    errata.export(edit, tmp_path / "full", to="checkpoint", host=host)
    errata.export(edit, tmp_path / "adapter", to="peft", host=host)
    ids = torch.tensor([words(ADA.text)["input_ids"]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(host.model), tmp_path / "adapter")
    with torch.no_grad():
        plain = host.model(**inputs).logits
        with edit.on(host):
            expected = host.model(**inputs).logits
        assert float((expected - plain).abs().max()) > 1e-3
        for exported in (opener.from_pretrained(tmp_path / "full"), adapted):
            torch.testing.assert_close(exported.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_wide_change_is_approximated_only_when_asked_for(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="ft", steps=4)
    assert all(isinstance(delta, torch.Tensor) for delta in edit.deltas.values())
    refused(edit, tmp_path / "out", "give a rank to approximate it", to="peft", host=host)
    coarse = errata.export(edit, tmp_path / "coarse", to="peft", host=host, rank=1).facts["lost"]
    fine = errata.export(edit, tmp_path / "fine", to="peft", host=host, rank=4).facts["lost"]
    for name, delta in edit.deltas.items():
        s = torch.linalg.svdvals(delta.double())
        for lost, rank in ((coarse, 1), (fine, 4)):
            assert lost[name] == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-6, abs=1e-9)
    whole = errata.export(edit, tmp_path / "whole", to="peft", host=host, rank=32)
    assert max(whole.facts["lost"].values()) < 1e-6
    agree(edit, host, open_adapter(tmp_path / "whole", host))


def test_the_nearest_matrix_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(6, 3, generator=generator) @ torch.randn(3, 5, generator=generator)
    thin, error = nearest(exact, 3)
    assert error < 1e-7 and torch.allclose(thin.dense(), exact, atol=1e-6)
    thin, error = nearest(exact, 2)
    assert float((thin.dense() - exact).norm() / exact.norm()) == pytest.approx(error, rel=1e-5)
    assert nearest(torch.zeros(3, 2), 1)[1] == 0.0


def test_what_an_adapter_cannot_say_is_refused(tmp_path):
    host = fresh("gpt2")
    record = errata.edit(host, ADA, method="ft", steps=1).provenance
    changes = {
        "transformer.h.1.mlp.c_fc.bias": (80,), "transformer.h.1.ln_2.weight": (32,),
        "transformer.wte.weight": (400, 32),
    }  # fmt: skip
    for name, shape in changes.items():
        edit = WeightEdit({name: torch.ones(shape)}, frozenset(), record)
        text = refused(
            edit, tmp_path / "out", "changes the weights of linear maps", to="peft", host=host, rank=2
        )
        assert name in text
    refused(neurons(host, {0: 1}, "relu"), tmp_path / "out", "adds no matrix", to="peft", host=host)
    refused(
        errata.edit(host, ADA, method="in_prompt"),
        tmp_path / "out",
        "export it to prompts",
        to="peft",
        host=host,
    )


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_say_what_the_edit_says(tmp_path, lab_host):
    """A client with the standard library and the exported files rewrites prompts as the edit does."""
    cases = errata.lab.cases(6, seed=0)
    requests = [case.request for case in cases[:4]]
    texts = [probe.prompt for case in cases for probe in case.probes][:40]
    short = "Question: a b?\nFinal answer: c\n\n"
    for name, options in {
        "in_prompt": {}, "in_prompt subject": {"scope": "subject"}, "ike": {"demonstrations": 3},
        "rag": {"retriever": "words"}, "scr": {"retriever": "words", "tokens": 8},
        "mello": {"retriever": "words", "worked_examples": short, "tokens": 8, "hops": 2},
    }.items():  # fmt: skip
        edit = errata.edit(lab_host, requests, method=name.split()[0], **options)
        receipt = errata.export(edit, tmp_path / name, to="prompts")
        assert receipt.facts["entries"] == len(edit.contexts)

        def generate(text: str, tokens: int) -> str:
            return lab_host.generate([text], max_new_tokens=tokens, natural_stop=False)[0]

        client = Client(tmp_path / name, generate)
        some = texts if edit.procedure.name == "put" else texts[:3]
        rewritten = [client.rewrite(text) for text in some]
        assert rewritten == [edit.rewrite(text, lab_host) for text in some]
        assert rewritten != some


def test_an_edit_of_all_prompts_is_one_prefix(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, [ADA, BRUNO], method="in_prompt")
    errata.export(edit, tmp_path / "out", to="prompts")
    document = json.loads((tmp_path / "out" / "prompts.json").read_text(encoding="utf-8"))
    assert (
        document["prefix"] == edit.contexts[0] and "Merrin" in document["prefix"] and document["suffix"] == ""
    )
    assert document["router"]["name"] == "always" and document["template"] == "{contexts}{prompt}{suffix}"
    framed = dataclasses.replace(edit, suffixes=(" (really)",))
    errata.export(framed, tmp_path / "framed", to="prompts")
    assert (
        Client(tmp_path / "framed").rewrite("Ada")
        == framed.rewrite("Ada")
        == f"{edit.contexts[0]}Ada (really)"
    )


def test_prompts_are_the_same_bytes_and_keep_every_character(tmp_path):
    host = fresh("llama")
    record = errata.edit(host, ADA, method="in_prompt").provenance
    contexts = ("Éric: «oui»\n", "東京 {prompt} \u2028\n", "third\n")
    edit = PromptEdit(contexts, Lexical(("Éric", "東京", "Éric Bon")), record)
    for name in ("one", "two"):
        errata.export(edit, tmp_path / name, to="prompts")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and "Éric" in one["entries.jsonl"].decode()
    assert one["entries.jsonl"].count(b"\n") == 3
    loaded = errata.Edit.load(edit.save(tmp_path / "e.safetensors"))
    assert isinstance(loaded, PromptEdit) and loaded.contexts == contexts
    for prompt in ("Where is éric bon?", "Eric Bon", "ÉRIC is here", "Éricson"):
        assert Client(tmp_path / "one").rewrite(prompt) == edit.rewrite(prompt)


def test_routers_that_read_the_model_are_refused(tmp_path):
    host = fresh("llama")
    own = errata.edit(host, ADA, method="rag")
    refused(own, tmp_path / "out", "similarity router decides by vectors of the edited model", to="prompts")
    assert isinstance(own.router, Similarity)
    named = dataclasses.replace(
        own, router=dataclasses.replace(own.router, encoder="small", encoder_digest="ab")
    )
    errata.export(named, tmp_path / "named", to="prompts")
    client = Client(tmp_path / "named")
    assert (
        client.document["router"]["encoder"] == "small"
        and client.document["router"]["encoder_digest"] == "ab"
    )
    torch.testing.assert_close(torch.tensor(client.entries[0]["vector"]), own.router.keys[0])
    stated = errata.edit(host, ADA, method="in_prompt", scope="statement")
    refused(stated, tmp_path / "out", "statement router decides by states", to="prompts")
    weights = errata.edit(host, ADA, method="ft", steps=1)
    refused(weights, tmp_path / "out", "no texts to put into prompts", to="prompts")
