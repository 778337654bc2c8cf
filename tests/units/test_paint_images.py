"""PAINT on models of images: labelled folders, heads made of texts, and the search for alpha."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.data.images import read_classes
from errata.edits import Edit, WeightEdit
from errata.edits.edit import Provenance
from errata.errors import ConfigError, DataError, HostError
from errata.host import two_towers
from errata.host.images import ImageHost, is_image_classifier
from errata.ledger.interpolating import (
    ImagePoint,
    ImageTask,
    accuracy,
    choose_images,
    scan_images,
)
from tests.images import SIDE, fresh_images

Image = pytest.importorskip("PIL.Image")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ("[PAD]", "[END]", "a", "photo", "of", "drawing", ".", "moss", "rust", "sand")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Write a tiny random CLIP with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        common = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        words = {
            "vocab_size": len(WORDS),
            "max_position_embeddings": 12,
            "eos_token_id": 1,
            "bos_token_id": 0,
        }
        config = CLIPConfig(
            text_config={**common, **words, "pad_token_id": 0},
            vision_config={**common, "image_size": SIDE, "patch_size": 8}, projection_dim=8,
        )  # fmt: skip
        CLIPModel(config).save_pretrained(folder)
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A [END]", special_tokens=[("[END]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]").save_pretrained(
        folder
    )
    return folder


def opened(folder) -> ImageHost:
    host: Any = errata.load(folder, device="cpu")
    assert isinstance(host, ImageHost)
    return host


def write(folder, classes, *, seed=0, count=3):
    """Write noise images for each class."""
    draw = torch.Generator().manual_seed(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


def test_labelled_images_are_read_by_folder(tmp_path):
    folder = write(tmp_path / "task", ["rust", "moss"], count=2)
    images, labels, names = read_classes(folder)
    assert names == ["moss", "rust"] and labels == [0, 0, 1, 1] and images.shape == (4, 3, SIDE, SIDE)
    with Image.open(folder / "rust" / "0.png") as one:
        assert images[2, 1, 5, 7] == pytest.approx(one.getpixel((7, 5))[1] / 255)
    (folder / "sand").mkdir()
    with pytest.raises(DataError, match="no images in sand"):
        read_classes(folder)
    with pytest.raises(DataError, match="no folder"):
        read_classes(tmp_path / "none")


def test_a_two_tower_model_is_a_host_of_images(clip):
    host = opened(clip)
    assert host.size == (SIDE, SIDE) and is_image_classifier(clip)
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    plain: Any = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = functional.normalize(plain.get_image_features(pixel_values=images).pooler_output, dim=-1)
    torch.testing.assert_close(host.logits(images), expected)
    assert (
        all(site.name.startswith("vision_model.") for site in host.layout.sites) and host.layout.prefix == 1
    )
    with pytest.raises(HostError, match="no classes of its own"):
        host.labels(images)


def test_a_head_is_the_mean_of_a_names_embeddings(clip):
    host, tokenizer = opened(clip), two_towers.read_tokenizer(clip)
    templates = ("a photo of a {}.", "a drawing of a {}.")
    head = two_towers.text_head(host.model, tokenizer, ["moss", "rust"], templates)
    plain: Any = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        rows = [
            plain.get_text_features(
                **tokenizer(one.replace("{}", "rust"), return_tensors="pt")
            ).pooler_output[0]
            for one in templates
        ]
    mean = torch.stack([row / row.norm() for row in rows]).sum(0)
    torch.testing.assert_close(head[1], mean / mean.norm())
    with pytest.raises(ConfigError, match="one slot"):
        two_towers.text_head(host.model, tokenizer, ["moss"], ("a photo",))
    with pytest.raises(HostError, match="no text tower"):
        two_towers.text_head(fresh_images("vit").model, tokenizer, ["moss"])


def test_the_choice_gains_the_most_within_the_bound():
    points = [ImagePoint(0.0, 0.2, 0.8), ImagePoint(0.5, 0.6, 0.795), ImagePoint(1.0, 0.9, 0.7)]
    assert choose_images(points) == points[1]
    assert choose_images(points, 0.2) == points[2]
    assert choose_images(points, 0.0) is None
    assert choose_images([points[0], ImagePoint(0.5, 0.2, 0.9)]) is None, "no gain is no patch"
    equal = [*points, ImagePoint(0.4, 0.6, 0.8)]
    assert choose_images(equal) == equal[-1]


def move(host, parameter, size):
    """Return an edit that moves one weight."""
    weight = host.model.get_parameter(parameter)
    draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * size
    return WeightEdit({parameter: draw}, frozenset(), Provenance("import", (), {}, host.fingerprint))


def test_a_scan_measures_accuracy_between_the_two_models():
    """The classes that the edited model gives are the patch's, those of the unedited one the supported task's."""
    host = fresh_images("vit")
    images = torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    edit = move(host, host.layout.sites[-1].parameter, 1.0)
    before = host.logits(images).argmax(-1)
    with edit.on(host):
        after = host.logits(images).argmax(-1)
    assert (before != after).any()
    start = host.weights_hash()
    patch, kept = ImageTask("patch", images, after), ImageTask("kept", images, before)
    points = scan_images(host, edit, patch, [kept], alphas=(1.0, 0.5))
    assert [point.alpha for point in points] == [0.0, 0.5, 1.0]
    assert (points[0].supported, points[2].patched) == (1.0, 1.0)
    assert points[2].supported == points[0].patched == float((before == after).double().mean())
    with edit.on(host):
        assert accuracy(host, patch) == 1.0
    assert host.weights_hash() == start
    with pytest.raises(ConfigError, match="at least one task"):
        scan_images(host, edit, patch, [])
    with pytest.raises(ConfigError, match="above 0"):
        scan_images(host, edit, patch, [kept], alphas=(0.0,))


def test_the_command_chooses_alpha_for_a_two_tower_model(clip, tmp_path):
    """A fine-tuned checkpoint is imported, and painted with heads made of the folders' names."""
    tuned = CLIPModel.from_pretrained(clip)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if name.startswith("vision_model.encoder") and weight.ndim == 2:
                weight.add_(torch.randn(weight.shape, generator=draw), alpha=0.5)
    tuned.save_pretrained(tmp_path / "tuned")
    host = opened(clip)
    edit = errata.import_edit(tmp_path / "tuned", host)
    assert isinstance(edit, WeightEdit) and all(name.startswith("vision_model.") for name in edit.deltas)
    file = edit.save(tmp_path / "tuned.safetensors")
    patch = write(tmp_path / "patch", ["moss", "rust"], seed=1)
    kept = write(tmp_path / "kept", ["sand", "moss"], seed=2)
    words = ("combine", file, "--how", "paint", "--model", clip, "--alphas", "0.5,1", "--most-lost", "1")
    run = CliRunner().invoke(
        app, [*map(str, words), "--patch", str(patch), "--supported", str(kept), "--template", "a drawing of a {}.",
              "-o", str(tmp_path / "painted.safetensors"), "--device", "cpu", "--json"],
    )  # fmt: skip
    assert run.exit_code in (0, 1), run.output
    document = json.loads(run.stdout)
    tokenizer = two_towers.read_tokenizer(clip)
    tasks = []
    for folder in (patch, kept):
        images, labels, names = read_classes(folder, size=host.size)
        head = two_towers.text_head(host.model, tokenizer, names, ("a drawing of a {}.",))
        tasks.append(ImageTask(folder.name, images, torch.tensor(labels), head))
    points = scan_images(host, edit, tasks[0], tasks[1:], alphas=(0.5, 1.0))
    assert document["scan"] == [point.to_dict() for point in points]
    best = choose_images(points, 1.0)
    assert document["alpha"] == (best.alpha if best else None)
    assert (run.exit_code == 0) == (best is not None)
    if best is not None:
        assert Edit.load(tmp_path / "painted.safetensors").provenance.config["weights"] == [best.alpha]


def test_what_the_search_refuses(clip, tmp_path):
    host = opened(clip)
    file = move(host, host.layout.sites[0].parameter, 0.1).save(tmp_path / "a.safetensors")
    words = [
        "combine",
        str(file),
        "--how",
        "paint",
        "--model",
        str(clip),
        "-o",
        str(tmp_path / "b.safetensors"),
    ]
    run = CliRunner().invoke(app, words)
    assert isinstance(run.exception, ConfigError) and "--patch and --supported" in str(run.exception)
    run = CliRunner().invoke(app, ["combine", str(file), "-o", words[-1], "--patch", "x"])
    assert isinstance(run.exception, ConfigError) and "for the search" in str(run.exception)
