"""Steering as a checkpoint: plain transformers gives the logits of the edit in place, and the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import errata
from errata.edits import SteerEdit
from errata.edits.edit import Provenance
from errata.edits.steer import Steering
from errata.errors import EditError
from errata.linalg import steering
from tests.models import fresh

TEXTS = ("The old Ada waited for", "Bruno Holner lives in Esk and")
WIDTH = 32


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(host, *sites: Steering, strength: float = 0.7) -> SteerEdit:
    record = Provenance("caa", (), {}, host.fingerprint, host.name, 0)
    return SteerEdit(sites, record, strength)


def vector(module: str, seed: int = 0, **more) -> Steering:
    return Steering(module, "vector", {"values": 2 * draw(1, WIDTH, seed=seed)}, **more)


def projection(module: str, seed: int = 0, target: float = 0.0) -> Steering:
    basis = torch.linalg.qr(draw(WIDTH, 2, seed=seed)).Q.mT
    return Steering(module, "projection", {"basis": basis, "target": torch.full((2,), target)})


def rotation(module: str, seed: int = 0, **more) -> Steering:
    plane = torch.linalg.qr(draw(WIDTH, 2, seed=seed)).Q.mT
    return Steering(module, "rotation", {"plane": plane, "degrees": torch.tensor([70.0])}, **more)


def rank(module: str, drop: float, seed: int = 0) -> Steering:
    right = torch.linalg.qr(draw(WIDTH, 2, seed=seed)).Q.mT
    payload = {"left": right.mT + 0.3, "right": right, "bias": draw(2), "drop": torch.tensor([drop])}
    return Steering(module, "rank", payload)


@torch.no_grad()
def plain_logits(model, host) -> list[torch.Tensor]:
    return [model(torch.tensor([host.encode(text).ids])).logits[0] for text in TEXTS]


def exported(edit: SteerEdit, host, folder: Path, **options):
    """Export, open in plain transformers, and require the logits of the edit in place to 1e-5."""
    receipt = errata.export(edit, folder, to="checkpoint", host=host, **options)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with edit.on(host):
        expected = plain_logits(host.model, host)
    unedited = plain_logits(host.model, host)
    for found, steered, before in zip(plain_logits(model, host), expected, unedited, strict=True):
        torch.testing.assert_close(found, steered, atol=1e-5, rtol=0)
        assert float((steered - before).abs().max()) > 1e-2
    assert receipt.verified is not None and receipt.verified["difference"] <= receipt.verified["bound"]
    return receipt, model


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "opt", "bloom", "llama", "falcon"])
def test_vectors_behind_blocks_are_biases(family, tmp_path):
    """GPT-2, GPT-J, GPT-NeoX, OPT and Bloom have them; Llama's and Falcon's configuration has a setting for them."""
    host = fresh(family)
    edit = made(host, *(vector(host.layout.blocks[i], seed=i) for i in (0, 2)))
    receipt, model = exported(edit, host, tmp_path / "out")
    switched = {"llama": {"mlp_bias": True}, "falcon": {"bias": True}}.get(family)
    assert receipt.facts.get("settings") == switched
    for name, value in (switched or {}).items():
        assert getattr(model.config, name) is value
    sites = [host.layout.site(i).name for i in (0, 2)]
    if switched:
        assert receipt.facts["biases"] == sites
        torch.testing.assert_close(model.get_parameter(f"{sites[1]}.bias"), 1.4 * draw(WIDTH, seed=2))
    assert len(receipt.facts["lost"]) == 2 and max(receipt.facts["lost"].values()) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_maps_into_the_stream_take_affine_changes(family, tmp_path):
    """Every linear form of steering at a linear map is another weight and bias, exactly."""
    host = fresh(family)
    attention = [host.layout.site(i, "attn_out").name for i in range(3)]
    sites = [
        projection(attention[0], target=0.5),
        rotation(attention[1], seed=1),
        rank(attention[2], 0.4, seed=2),
    ]
    if family == "llama":
        sites.append(
            vector(host.layout.blocks[2], seed=3)
        )  # behind a block, beside a change of attention's map
    receipt, _ = exported(made(host, *sites), host, tmp_path / "out")
    expected = {
        "llama": {"attention_bias": True, "mlp_bias": True}, "gpt2": None, "qwen3": {"attention_bias": True},
    }[family]  # fmt: skip
    assert receipt.facts.get("settings") == expected


def test_one_map_is_changed_and_steered_behind(tmp_path):
    """A projection of a map's output, and a vector behind the block that the map ends."""
    host = fresh("gpt2")
    edit = made(host, vector(host.layout.blocks[1]), projection(host.layout.site(1).name, target=1.0))
    exported(edit, host, tmp_path / "out")
    receipt = errata.export(edit, tmp_path / "delta", to="delta", host=host)
    assert receipt.facts["weights"] == 2 and receipt.verified is not None


def test_a_direction_projected_off_every_map_is_gone(tmp_path):
    """Directional ablation: the stream has nothing of the direction left, in plain transformers."""
    host = fresh("llama", tie_word_embeddings=False)
    layers = range(len(host.layout.blocks))
    writers = [host.layout.site(i, part).name for i in layers for part in ("attn_out", "mlp_out")]
    sites = [projection(module) for module in ("model.embed_tokens", *writers)]
    _, model = exported(made(host, *sites, strength=1.0), host, tmp_path / "out")
    with torch.no_grad():
        states = model(torch.tensor([host.encode(TEXTS[0]).ids]), output_hidden_states=True).hidden_states[
            :-1
        ]
    basis = sites[0].payload["basis"]
    assert all(float((state @ basis.mT).abs().max()) < 1e-6 for state in states)
    receipt = errata.export(made(host, *sites[1:], strength=1.0), tmp_path / "peft", to="peft", host=host)
    assert receipt.verified is not None


def test_sixteen_bits_and_trained_vectors(tmp_path):
    host = fresh("llama")
    edit = made(host, vector(host.layout.blocks[1]))
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host, dtype="bfloat16")
    assert 0 < receipt.facts["lost"]["model.layers.1.mlp.down_proj.bias"] < 0.01
    assert receipt.verified is not None


@pytest.mark.parametrize(
    ("family", "site", "words"),
    [
        ("llama", lambda host: vector(host.layout.blocks[1], positions="after"), r"some tokens \(after\)"),
        ("llama", lambda host: vector(host.layout.blocks[1], keep_norm=True), "norm back, which no linear map"),
        ("llama", lambda host: rotation(host.layout.blocks[1], aligned=True), r"depends on the state \(rotation, ali"),
        ("llama", lambda host: Steering(host.layout.blocks[1], "piecewise", {"values": draw(1, WIDTH)}),
         r"depends on the state \(piecewise\)"),
        ("llama", lambda host: projection(host.layout.blocks[1]), r"all of the stream behind model.layers.1 \(proj"),
        ("llama", lambda host: vector("model.norm"), "neither a block, a linear map nor an embedding"),
        ("gemma2", lambda host: vector(host.layout.blocks[1]), "a norm stands between"),
        ("qwen2", lambda host: vector(host.layout.blocks[1]), "Qwen2Config has no setting that gives it one"),
        ("mistral", lambda host: vector(host.layout.blocks[1]), "MistralConfig has no setting"),
        ("qwen3", lambda host: vector(host.layout.blocks[1]), "mlp.down_proj has no bias, and Qwen3Config"),
        ("gpt2", lambda host: projection("transformer.wte"), "also the output's weight"),
        ("mixtral", lambda host: vector(host.layout.blocks[1]), "no one linear map"),
    ],
    ids=["tokens", "norm", "aligned", "piecewise", "block", "layer norm", "gemma2", "qwen2", "mistral", "qwen3",
         "tied", "mixtral"],
)  # fmt: skip
def test_what_no_weight_does_is_refused_with_the_reason(family, site, words, tmp_path):
    host = fresh(family)
    with pytest.raises(EditError, match=words):
        errata.export(made(host, site(host)), tmp_path / "out", to="checkpoint", host=host)
    assert not list(tmp_path.iterdir())


def test_other_exports_hold_biases_that_are_there(tmp_path):
    host = fresh("llama")
    with pytest.raises(EditError, match=r"down_proj has no bias.*a checkpoint can hold"):
        errata.export(made(host, vector(host.layout.blocks[1])), tmp_path / "a", to="delta", host=host)
    host = fresh("gpt2")
    with pytest.raises(EditError, match="changes the weights of linear maps"):
        errata.export(made(host, vector(host.layout.blocks[1])), tmp_path / "b", to="peft", host=host)


def test_a_rotation_by_the_strength():
    """The change of a weight is of the rotation by strength times degrees, as the edit in place has it."""
    from errata.edits.export._steering import _affine

    one, h = rotation("x"), draw(5, WIDTH).double()
    act = _affine(one, 0.5)
    turned = steering.rotate(h, one.payload["plane"].double(), 35.0)
    torch.testing.assert_close(h + act.times(h.mT).mT, turned)
