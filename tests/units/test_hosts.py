"""Models that are not plain: hybrids, recurrent ones, odd windows, grown vocabularies, adapters, live states."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import nn

import errata
from errata.errors import EditError, HostError, RequestError
from errata.evaluation.observe import observe
from errata.host.build import new_model
from errata.host.generate import generate_rows, sample_rows
from errata.host.host import Host
from errata.locate.contexts import Context
from errata.locate.problems import value_problems
from errata.locate.sweep import LayerSweep
from errata.types import AskOptions, Case, Probe
from tests.models import COMMON, FAMILIES, ROTARY, fresh, tokenizer

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
FAST = {"steps": 3, "tokens": 300}
ODD = {**ROTARY, "num_hidden_layers": 4}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
STATE_SPACE = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

HYBRIDS = {
    "qwen3_5_text": ({**ODD, "head_dim": 8, **LINEAR}, ["mlp.down_proj"] * 4),
    "lfm2": (
        {**ODD, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ["feed_forward.w2"] * 4,
    ),
    "bamba": ({**ODD, "attn_layer_indices": [1], "mamba_expand": 2, **MAMBA}, ["feed_forward.down_proj"] * 4),
    "falcon_h1": ({**ODD, "head_dim": 8, "mamba_d_ssm": 64, **MAMBA}, ["feed_forward.down_proj"] * 4),
    "jamba": (  # blocks of two classes, experts in every second
        {
            **ODD, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
        ["feed_forward.down_proj", "feed_forward.experts", "feed_forward.down_proj", "feed_forward.experts"],
    ),
    "nemotron_h": (
        {
            **ODD, "head_dim": 8, "hybrid_override_pattern": "M-*-", "mamba_num_heads": 8, "mamba_head_dim": 8,
            "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
        },
        [None, "mixer.down_proj", None, "mixer.down_proj"],
    ),
    "recurrent_gemma": ({**ODD, "head_dim": 8, "lru_width": 32}, ["mlp_block.down_proj"] * 4),
    "qwen2_moe": (
        {**ODD, **EXPERTS, "shared_expert_intermediate_size": 48}, ["mlp.shared_expert.down_proj"] * 4
    ),
    "mamba": ({**STATE_SPACE, "time_step_rank": 8}, ["mixer.out_proj"] * 2),
    "falcon_mamba": ({**STATE_SPACE, "time_step_rank": 8}, ["mixer.out_proj"] * 2),
    "mamba2": (
        {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}, ["mixer.out_proj"] * 2
    ),
    "gemma4_text": (
        {
            **ODD, "head_dim": 8, "sliding_window": 64, "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 8,
        },
        ["mlp.down_proj"] * 4,
    ),
    "rwkv": (
        {**COMMON, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "context_length": 128},
        ["feed_forward.value"] * 4,
    ),
}  # fmt: skip


def hybrid(family: str) -> Host:
    return errata.load(new_model(family, HYBRIDS[family][0], seed=0), tokenizer())


# --- structure --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_dense_feed_forward_is_a_site(family):
    host = hybrid(family)
    found = [
        None if site is None else site.name.removeprefix(f"{host.layout.blocks[site.layer]}.")
        for site in host.layout.mlp_out
    ]
    assert found == HYBRIDS[family][1]
    # qwen2_moe and rwkv gate what it writes, gemma4 norms it
    assert host.layout.adds_directly == (family not in ("qwen2_moe", "rwkv", "gemma4_text"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "jamba", "rwkv", "mamba"])
def test_hybrids_are_edited_and_restored(family):
    host = hybrid(family)
    start = host.weights_hash()
    edit = errata.edit(host, REQUEST, method="memit", tokens=300, steps=20)
    probe = Probe("efficacy", REQUEST.text, (REQUEST.target,), ())
    before = observe(host, [probe], AskOptions(generate=False))[0].answer_logprobs
    with edit.on(host):
        assert observe(host, [probe], AskOptions(generate=False))[0].answer_logprobs != before
    assert host.weights_hash() == start
    # what is written at the subject hardly reaches the answer of a random model; the descent of all weights does
    tuned = errata.edit(host, REQUEST, method="ft")
    with tuned.on(host):
        assert sum(observe(host, [probe], AskOptions(generate=False))[0].answer_logprobs) > sum(before)
    assert host.weights_hash() == start


def test_keys_do_not_depend_on_neighbours_where_padding_is_seen():
    host = hybrid("rwkv")
    requests = [REQUEST, errata.Request("The long road went to where {} was", "Bruno Holner", "Esk")]
    bare = [Context("", 1.0)]
    site = host.layout.site(2)
    together = LayerSweep(host, value_problems(host, requests, bare), 2).keys(site)
    alone = torch.cat([LayerSweep(host, value_problems(host, [one], bare), 2).keys(site) for one in requests])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_the_mixer_of_a_model_without_feed_forwards_takes_an_edit_exactly(family):
    host = hybrid(family)
    site, start = host.layout.site(1), host.weights_hash()
    assert site.name.endswith("mixer.out_proj") and site.part == "mlp_out"
    assert [s.name for s in host.layout.sites] == [f"backbone.layers.{i}.mixer.out_proj" for i in range(2)]
    edit = errata.edit(host, REQUEST, method="emmet", layers=[1], contexts=0, **FAST)
    problem, layer = value_problems(host, [REQUEST], [Context("", 1.0)]), host.model.get_submodule(site.name)
    key = LayerSweep(host, problem, 1).keys(site)[0]
    record = edit.records[site.parameter]
    torch.testing.assert_close(record.keys[:, 0].float(), key)
    change, before = record.target_changes[:, 0].float(), layer.weight.detach() @ key
    assert change.norm() > 1e-3 * before.norm()
    with edit.on(host):
        torch.testing.assert_close(LayerSweep(host, problem, 1).keys(site)[0], key)
        torch.testing.assert_close(layer.weight.detach() @ key, before + change)
    assert host.weights_hash() == start


def test_a_map_whose_weight_is_read_directly_is_named():
    with pytest.raises(HostError, match=r"mixer\.dt_proj is not called as a layer"):
        errata.edit(hybrid("mamba"), REQUEST, method="melo", maps=("dt_proj",))


def test_a_model_that_reads_no_text_without_an_image_is_refused_with_the_reason():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"embed_dim": 32, "ffn_dim": 80, "layers": 2, "attention_heads": 4, "max_position_embeddings": 128}
    config = transformers.AutoConfig.for_model(
        "kosmos-2", text_config={**COMMON, **text}, vision_config={**vision, "image_size": 28, "patch_size": 14},
        latent_query_num=4,
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(HostError, match="reads no text without an image"):
        errata.load(model, tokenizer())


# --- padding and windows ----------------------------------------------------------------------

PROMPTS = ["Ada", "The small dog waited on the old road because the rain", "Bruno Holner lives"]


@pytest.mark.parametrize(
    ("family", "manner"),
    [
        ("rwkv", "equal"),
        ("jamba", "left"),
        ("recurrent_gemma", "left"),
        ("mamba", "left"),
        ("mamba2", "left"),
    ],
)
def test_what_a_prompt_is_answered_does_not_depend_on_its_neighbours(family, manner):
    host = hybrid(family)
    assert host.padding == manner
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    assert generate_rows(host, rows, 6, "end") == [generate_rows(host, [row], 6, "end")[0] for row in rows]
    assert len(sample_rows(host, rows, 4, top_k=5, seed=0)) == 3


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("mpt", {"vocab_size": 400, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}, 48),
        ("gpt2", {**FAMILIES["gpt2"], "n_positions": 40}, 40),
        ("opt", {**FAMILIES["opt"], "max_position_embeddings": 40}, 40),  # its table has two places more
        ("bloom", FAMILIES["bloom"], None),
        ("rwkv", {**HYBRIDS["rwkv"][0], "context_length": 64}, 64),
    ],
)
def test_windows_by_any_name(family, settings, window):
    host = errata.load(new_model(family, settings, seed=0), tokenizer())
    assert host.window == window
    if window:
        host.forward(host.batch([[5] * window]))
        with pytest.raises(RequestError, match="window"):
            host.batch([[5] * (window + 1)])


def test_a_table_of_positions_bounds_what_no_setting_does():
    model = new_model("gpt2", {**FAMILIES["gpt2"], "n_positions": 40}, seed=0)
    model.config.n_positions = 4000
    assert errata.load(model, tokenizer()).window == 40


@pytest.mark.parametrize("method", ["memit", "rome", "kn", "ft_l", "ultraedit"])
def test_contexts_are_shortened_to_the_window(method):
    host = fresh("gpt2", n_positions=40)
    lead = "The rain fell on the old road. "
    while len(host.encode_answer(lead + REQUEST.text, REQUEST.target).ids) < 39:
        lead = f"The {lead}"
    request = errata.Request(lead + REQUEST.prompt, REQUEST.subject, REQUEST.target)
    given = {"memit": FAST, "rome": FAST, "kn": {"steps": 2}}.get(method, {})
    assert errata.edit(host, request, method=method, **given).provenance.method == method


def test_probes_that_do_not_fit_are_named_before_anything_runs(monkeypatch):
    host = fresh("gpt2", n_positions=40)
    long = "word " * 60
    probes = {
        "prompt": Probe("paraphrase", f"{long}Ada hails from", ("Esk",), ()),
        "answer": Probe("paraphrase", "Ada hails from", (long,), ()),
        "rival": Probe("paraphrase", "Ada hails from", ("Esk",), (), long),
        "fits": Probe("paraphrase", "Ada hails from", ("Esk",), ()),
        "cut": Probe(
            "paraphrase", "Ada hails from", (long,), (), form="long"
        ),  # long answers are scored as far as
    }
    cases = [Case(name, REQUEST, (probe,)) for name, probe in probes.items()]
    monkeypatch.setattr(Host, "forward", lambda *_, **__: pytest.fail("something ran"))
    host.__dict__["window"] = 40
    with pytest.raises(RequestError) as error:
        errata.evaluate(host, cases, method="ft")
    assert [line.split(",")[0] for line in str(error.value).splitlines()] == [
        "case prompt", "case answer", "case rival",
    ]  # fmt: skip


# --- vocabulary -------------------------------------------------------------------------------


def test_tokens_without_an_embedding_are_said_at_load_and_refused_in_texts():
    import copy

    grown = copy.deepcopy(tokenizer())
    grown.add_tokens(["Zorblax", "Quorn"])
    with pytest.warns(RuntimeWarning, match="2 tokens .*'Zorblax'"):
        host = errata.load(new_model("gpt2", FAMILIES["gpt2"], seed=0), grown)
    for work in (
        lambda: host.generate("Zorblax was"),
        lambda: errata.edit(host, errata.Request("{} was born in", "Ada", "Zorblax"), method="ft"),
        lambda: errata.edit(host, errata.Request("{} was born in", "Quorn", "Esk"), method="ft"),
    ):
        with pytest.raises(RequestError, match="no embedding for the token"):
            work()
    assert isinstance(host.generate("Ada was", max_new_tokens=2), str)
    host.model.resize_token_embeddings(len(grown))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errata.load(host.model, grown).generate("Zorblax was", max_new_tokens=2)


# --- adapters ---------------------------------------------------------------------------------


def adapted(kind: str, family: str = "llama"):
    import peft

    modules = ["fc2"] if family == "opt" else ["c_proj"] if family == "gpt2" else ["down_proj"]
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False),
        "elsewhere": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        "ia3": lambda: peft.IA3Config(target_modules=modules, feedforward_modules=modules),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=modules, use_dora=True),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }[kind]()
    torch.manual_seed(0)
    return peft.get_peft_model(new_model(family, FAMILIES[family], seed=0), config)


@pytest.mark.parametrize("kind", ["lora", "elsewhere", "ia3", "merged", "off"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_layer_below_an_adapter_is_edited(kind, beside):
    model = adapted(kind if kind in ("lora", "elsewhere", "ia3") else "lora")
    if kind == "merged":
        model.merge_adapter()
    if kind == "off":
        model.base_model.disable_adapter_layers()
    host = errata.load(model, tokenizer())
    edit = errata.edit(host, REQUEST, method="rome", contexts=[2], context_tokens=[4], **FAST)
    (name,) = edit.deltas
    assert name.endswith("down_proj.weight" if kind == "elsewhere" else "down_proj.base_layer.weight")
    ids = torch.tensor([host.encode_prompt(REQUEST.text)])
    start, plain = host.weights_hash(), model.eval()(input_ids=ids).logits
    with edit.on(host, merge=not beside):
        assert not torch.equal(model(input_ids=ids).logits, plain)  # what the server says changes, too
    assert host.weights_hash() == start and torch.equal(model(input_ids=ids).logits, plain)


def test_fingerprints_tell_whether_an_adapter_acts():
    model = adapted("lora")
    acting = errata.load(model, tokenizer()).fingerprint
    model.base_model.disable_adapter_layers()
    assert errata.load(model, tokenizer()).fingerprint != acting


def test_adapters_that_rescale_or_prompt_are_refused_with_the_reason():
    host = errata.load(adapted("dora"), tokenizer())
    with pytest.raises(HostError, match="DoRA adapter.*merge"):
        errata.edit(host, REQUEST, method="rome", **FAST)
    with pytest.raises(HostError, match="PROMPT_TUNING"):
        errata.load(adapted("prompt"), tokenizer())


def test_an_adapter_attached_after_loading_is_seen():
    import peft

    host = fresh("llama")
    assert host.layout.site(1).name.endswith("down_proj")
    peft.get_peft_model(host.model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    assert host.layout.site(1).name.endswith("down_proj.base_layer")


def test_adapters_in_folders_are_refused_saying_what_to_do(tmp_path):
    adapted("lora").save_pretrained(tmp_path / "adapter")
    with pytest.raises(HostError, match=r"PEFT adapter .* and no model: merge"):
        errata.load(tmp_path / "adapter")
    both = tmp_path / "both"
    new_model("llama", FAMILIES["llama"], seed=0).save_pretrained(both)
    adapted("lora").save_pretrained(both)
    with pytest.raises(HostError, match=r"PEFT adapter .* beside a model"):
        errata.load(both)


# --- live states ------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As averaging wrappers are: one child, called module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def checkpointing(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def default_dtype(dtype):
    class Context:
        def __enter__(self):
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(torch.float32)

    return Context()


STATES = {
    "no_grad": (torch.no_grad, None),
    "inference_mode": (torch.inference_mode, None),
    "float64 as default": (lambda: default_dtype(torch.float64), None),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), None),
    "train mode": (nullcontext, lambda model: model.train()),
    "checkpointing": (nullcontext, checkpointing),
    "DataParallel": (nullcontext, nn.DataParallel),
    "compiled": (nullcontext, torch.compile),
    "compiled and parallel": (nullcontext, lambda model: nn.DataParallel(torch.compile(model))),
    "averaged": (nullcontext, Wrapper),
}


@pytest.fixture(scope="module")
def plain():
    host = errata.load(new_model("gpt2", FAMILIES["gpt2"], seed=0), tokenizer())
    return host.fingerprint, errata.edit(host, REQUEST, method="memit", **FAST)


@pytest.mark.parametrize("state", STATES)
def test_live_models_give_the_edit_of_a_plain_one(state, plain):
    around, change = STATES[state]
    model = new_model("gpt2", FAMILIES["gpt2"], seed=0).eval()  # with dropout of 0.1, were it trained
    given = model if change is None else change(model)
    training = model.training
    with around():
        host = errata.load(given, tokenizer())
        edit = errata.edit(host, REQUEST, method="memit", **FAST)
    assert (host.fingerprint, edit.digest) == (plain[0], plain[1].digest)
    assert model.training == training and torch.get_default_dtype() == torch.float32
    start = host.weights_hash()
    with edit.on(host):
        assert host.generate(REQUEST.text, max_new_tokens=3) == host.generate(REQUEST.text, max_new_tokens=3)
        assert host.weights_hash() != start
    assert host.weights_hash() == start and model.training == training


def test_models_compiled_in_part_are_refused_at_load():
    for change in (
        lambda model: model.compile(),
        lambda model: setattr(model, "forward", torch.compile(model.forward)),
        lambda model: model.transformer.h.__setitem__(1, torch.compile(model.transformer.h[1])),
    ):
        model = new_model("gpt2", FAMILIES["gpt2"], seed=0)
        change(model)
        with pytest.raises(HostError, match="compiled in place"):
            errata.load(model, tokenizer())


def test_models_made_in_inference_mode_are_refused_at_load():
    with torch.inference_mode():
        model = new_model("gpt2", FAMILIES["gpt2"], seed=0)
    with pytest.raises(HostError, match="inference mode"):
        errata.load(model, tokenizer())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("BertForMaskedLM", "no mask token"),
        ("BertLMHeadModel", "no causal language model"),
        ("RobertaForMaskedLM", "no mask token"),
    ],
)
def test_models_that_look_ahead_are_refused_without_a_mask_to_fill(kind, reason):
    import transformers

    config = "RobertaConfig" if kind.startswith("Roberta") else "BertConfig"
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=400, **settings))
    with pytest.raises(HostError, match=reason):
        errata.load(model, tokenizer())


def test_models_without_a_head_are_refused_at_load():
    with pytest.raises(HostError, match="logits"):
        errata.load(new_model("gpt2", FAMILIES["gpt2"], seed=0).transformer, tokenizer())


# --- names, dtypes, few tokens ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c", "nothing/"])
def test_a_path_that_is_not_there_is_said_to_be_none(name):
    with pytest.raises(HostError, match="no folder"):
        errata.load(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "bad name!"])
def test_a_name_that_is_not_there_is_said_at_once(name, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(HostError, match="no folder"):
        errata.load(name)


def test_float16_is_named_where_it_makes_fingerprints_differ():
    model = new_model("gpt2", FAMILIES["gpt2"], seed=0)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = 1e-9
    edit = errata.edit(errata.load(model, tokenizer()), REQUEST, method="ft", steps=1)
    half = errata.load(model, tokenizer(), dtype="float16")
    with pytest.raises(EditError, match="float32 .*float16.*dtype"):
        edit.apply_(half)
    back = errata.edit(half, REQUEST, method="ft", steps=1)
    with pytest.raises(EditError, match="made in float16"):
        back.apply_(fresh("gpt2"))
    with pytest.raises(EditError) as error:
        edit.apply_(fresh("gpt2", seed=1))
    assert "float16" not in str(error.value)


@pytest.mark.parametrize(
    "method", ["memit", "alphaedit", "rome", "emmet", "pmet", "encore", "lyaplock", "nse"]
)
def test_few_tokens_of_statistics_are_solved_with_and_counted(method, tmp_path):
    host = fresh("llama")
    (tmp_path / "own.txt").write_text("Ada plays.\n\nThe rain fell.")
    with pytest.warns(RuntimeWarning, match="tokens too few"):
        edit = errata.edit(host, REQUEST, method=method, steps=2, corpus=tmp_path / "own.txt")
    assert 0 < edit.norm() < float("inf")


def test_keys_that_are_all_zero_are_an_error_with_the_reason():
    host = fresh("llama")
    with torch.no_grad():
        for block in host.model.model.layers:
            block.mlp.up_proj.weight.zero_()
    with pytest.raises(errata.ErrataError, match="zero"):
        errata.edit(host, REQUEST, method="memit", **FAST)


@pytest.mark.parametrize("text", ["\ud800", "Ada \udcff was born in", "\ud83d Ada \ude00"])
def test_half_a_surrogate_pair_is_one_clear_error(text):
    """A terminal's broken bytes and JSON's escapes bring them; tokenizers fail on them with an error of their own."""
    host = fresh("llama")
    for use in (host.encode, host.encode_prompt, host.generate):
        with pytest.raises(RequestError, match="half a surrogate pair"):
            use(text)
