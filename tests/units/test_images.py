"""Image classifiers as hosts, pairs of images from folders, and the verbs that take them."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import errata
from errata.data.images import read_pairs
from errata.edits import Provenance
from errata.errors import ConfigError, DataError, HostError, RequestError
from errata.host.base import ModelHost
from errata.host.host import Host
from errata.host.image_sites import discover
from errata.host.images import ImageHost, is_image_classifier, load_images
from errata.types import ImageRequest
from tests.images import SIDE, fresh_images, pairs
from tests.models import fresh

Image = pytest.importorskip("PIL.Image")


# --- requests -----------------------------------------------------------------------------


def test_a_request_lists_all_that_is_wrong():
    good = pairs(2)
    with pytest.raises(RequestError) as caught:
        ImageRequest(good.original[0], good.changed, good.mask[0], "", "snow")
    assert all(word in str(caught.value) for word in ("concept", "original", "mask", "[n, c, h, w]"))
    with pytest.raises(RequestError, match="must agree"):
        ImageRequest(good.original, good.changed[:1], good.mask, "road", "snow")
    with pytest.raises(RequestError, match=r"mask is \[2, 16, 32\]"):
        ImageRequest(good.original, good.changed, good.mask[:, :16], "road", "snow")
    with pytest.raises(RequestError, match="outside 0 to 1"):
        ImageRequest(good.original, good.changed, good.mask * 255, "road", "snow")
    with pytest.raises(RequestError, match="pair 2 .* marks nothing"):
        ImageRequest(
            good.original, good.changed, good.mask * torch.tensor([1.0, 0.0])[:, None, None], "a", "b"
        )
    with pytest.raises(RequestError, match=r"'x': .*changed holds NaN"):
        ImageRequest(good.original, good.changed / 0, good.mask, "road", "snow", id="x")


def test_a_record_tells_content_apart():
    plain, moved = pairs(2), pairs(2)
    assert plain.record == moved.record
    moved.changed[0, 0, 0, 0] += 1e-3
    changed = ImageRequest(moved.original, moved.changed, moved.mask, "road", "snow")
    more = pairs(2, reference=pairs(1).original)
    assert len({r.record.digest for r in (plain, changed, more)}) == 3
    assert Provenance("rewrite", (plain,), {}, "host").requests == (plain.record,)  # type: ignore[arg-type]
    assert plain.record.to_dict() == {
        "concept": "road", "replacement": "snow", "pairs": 2, "digest": plain.record.digest,
    }  # fmt: skip


# --- layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_sites_compute_what_their_modules_say(family):
    host = fresh_images(family)
    images = pairs(2).changed
    inside = {
        f"{n}.weight" for n, m in host.model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not n.startswith("classifier")
    }  # fmt: skip
    assert {site.parameter for site in host.layout.sites} == inside
    for site in host.layout.sites:
        inputs, outputs = host.at(site, images, batch_size=1)
        weight = host.model.get_parameter(site.parameter).detach().flatten(1)
        bias = host.model.get_submodule(site.name).bias
        bias = 0 if bias is None else bias.detach()
        flat = outputs.flatten(2).mT if site.part == "conv" else outputs
        torch.testing.assert_close(
            functional.linear(site.keys(inputs), weight) + bias, flat, atol=1e-4, rtol=1e-4
        )
        moved = site.product(inputs, weight)
        moved = moved.flatten(2).mT if site.part == "conv" else moved
        torch.testing.assert_close(moved + bias, flat, atol=1e-4, rtol=1e-4)
        assert site.keys(inputs).shape[-1] == site.d_in


class Shortcut(nn.Module):
    """A block that adds its input in place, to the very tensor that leaves the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, pixel_values):
        said = self.norm(self.conv(pixel_values))
        said += pixel_values
        return self.pool(self.relu(said))


def test_tails_end_before_what_is_added_in_place_and_before_pools():
    block = Shortcut()
    assert discover(block, torch.rand(1, 3, 8, 8)).sites[0].tail == ("norm",)
    plain = nn.Sequential(block.conv, block.norm, block.relu, block.pool)
    plain.forward = lambda pixel_values: block.pool(block.relu(block.norm(block.conv(pixel_values))))
    assert discover(plain, torch.rand(1, 3, 8, 8)).sites[0].tail == ("1", "2")


def test_tails_are_the_norms_and_activations_that_follow():
    layout = fresh_images("resnet").layout
    first, last = (f"resnet.encoder.stages.1.layers.1.layer.{i}" for i in (0, 1))
    assert layout.by_name(f"{first}.convolution").tail == (f"{first}.normalization", f"{first}.activation")
    assert layout.by_name(f"{last}.convolution").tail == (f"{last}.normalization", f"{last}.activation")
    tail = fresh_images("vit").layout.by_name("vit.layers.0.mlp.fc1").tail
    assert tail == ("vit.layers.0.mlp.activation_fn",)


def test_the_default_is_deep_and_writes_out_of_its_block():
    assert fresh_images("vit", num_hidden_layers=5).layout.default.name == "vit.layers.3.mlp.fc2"
    found = fresh_images("resnet", depths=[1, 1], layer_type="bottleneck", hidden_sizes=[8, 16]).layout
    assert found.default.name == "resnet.encoder.stages.1.layers.0.layer.2.convolution"
    assert found.blocks == ("resnet.encoder.stages.0", "resnet.encoder.stages.1")


@pytest.mark.parametrize("patch", [4, 16])
def test_tokens_and_the_class_token_are_found(patch):
    layout = fresh_images("vit", patch_size=patch).layout
    assert layout.prefix == 1 and layout.patches is not None
    assert layout.patches.grid(SIDE, SIDE) == (SIDE // patch, SIDE // patch)


def test_two_leading_tokens_are_found():
    from transformers import DeiTConfig, DeiTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeiTForImageClassification(DeiTConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=SIDE,
            patch_size=8, initializer_range=0.2,
        ))  # fmt: skip
    host = errata.load(model)
    assert isinstance(host, ImageHost) and host.layout.prefix == 2
    edit = errata.edit(host, pairs(2), method="rewrite", solve="closed")
    with edit.on(host):
        assert host.logits(pairs(2).original).shape == (2, 2)


def test_maps_with_groups_are_left_out():
    host = fresh_images("resnet")
    module = host.model.get_submodule("resnet.encoder.stages.0.layers.0.layer.0")
    module.convolution = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
    assert "resnet.encoder.stages.0.layers.0.layer.0.convolution" not in [s.name for s in host.layout.sites]
    with pytest.raises(HostError, match="no editable .* it has resnet.embedder"):
        host.layout.by_name("resnet.encoder.stages.0.layers.0.layer.0.convolution")


# --- hosts --------------------------------------------------------------------------------


def test_batches_do_not_matter_nor_does_training_mode():
    host = fresh_images("resnet")
    images = pairs(5).changed
    start, whole = host.weights_hash(), host.logits(images)
    torch.testing.assert_close(host.logits(images, batch_size=2), whole)
    host.model.train()
    torch.testing.assert_close(host.logits(images), whole)
    assert host.weights_hash() == start and host.model.training
    assert host.labels(images) == [f"LABEL_{i}" for i in whole.argmax(-1).tolist()]


def test_fingerprints_see_running_statistics_but_not_precision():
    host, twin = fresh_images("resnet"), fresh_images("resnet")
    assert host.fingerprint == twin.fingerprint != fresh_images("resnet", seed=1).fingerprint
    twin.model.to(torch.bfloat16)
    assert ImageHost(twin.model, name="halved").fingerprint == host.fingerprint
    first = host.fingerprint
    host.model.get_buffer("resnet.embedder.embedder.normalization.running_mean").add_(1.0)
    assert ImageHost(host.model, name="moved").fingerprint == host.fingerprint != first


def test_wrong_images_are_refused_in_the_models_words():
    host = fresh_images("vit")
    with pytest.raises(RequestError, match=r"expected \[n, 3, height, width\]"):
        host.logits(torch.zeros(1, 1, SIDE, SIDE))
    with pytest.raises(RequestError, match=r"does not take images \[1, 3, 16, 16\]"):
        errata.edit(host, pairs(1, side=16), method="rewrite")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A ViT saved by transformers, with the settings of its image processor."""
    target = tmp_path_factory.mktemp("models") / "vit-like"
    fresh_images("vit").model.save_pretrained(target)
    settings = {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip
    (target / "preprocessor_config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (
            {
                "size": {"shortest_edge": 48},
                "crop_size": {"height": SIDE, "width": SIDE},
                "do_center_crop": True,
            },
            SIDE,
        ),
        ({"size": {"height": 48, "width": 48}, "crop_size": SIDE}, SIDE),
        ({"size": SIDE, "crop_size": 48, "do_center_crop": False}, SIDE),
        ({"size": {"height": 48, "width": 48}}, SIDE),  # the model's table of positions allows no other
    ],
)
def test_a_folder_of_pictures_that_are_cropped_is_of_the_size_behind_the_crop(
    folder, tmp_path, settings, size
):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    host = errata.load(tmp_path, device="cpu")
    assert host.size == (size, size)
    assert host.layout.prefix == 1 and len(host.layout.sites) > 0


def test_a_processor_sets_the_size_of_a_model_that_takes_any(tmp_path):
    model = fresh_images("resnet").model
    model.config.image_size = SIDE
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 48}))
    assert errata.load(tmp_path, device="cpu").size == (48, 48)


def test_a_model_that_takes_no_image_of_the_size_it_names_has_no_layout():
    host = fresh_images("vit")
    host.model.config.image_size = 48
    with pytest.raises(HostError, match=r"does not take an image of \[1, 3, 48, 48\]"):
        _ = host.layout


def test_a_folder_opens_as_what_it_holds(folder, tmp_path):
    host = errata.load(folder, device="cpu")
    live = fresh_images("vit")
    assert isinstance(host, ImageHost) and host.fingerprint == live.fingerprint
    assert host.size == (SIDE, SIDE) and host.pixels.mean == (0.5, 0.4, 0.3)
    images = torch.rand(2, 3, SIDE, SIDE)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)))
    torch.testing.assert_close(host.logits(images), live.logits((images - mean) / std))
    assert errata.load(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="no tokenizer"):
        errata.load(folder, tokenizer="gpt2")
    words = fresh("gpt2")
    words.model.save_pretrained(tmp_path)
    words.tokenizer.save_pretrained(tmp_path)
    assert not is_image_classifier(tmp_path) and not is_image_classifier("no/such/folder")
    assert not is_image_classifier(words.model)
    assert not isinstance(errata.load(tmp_path, device="cpu"), ImageHost)


def test_unusable_classifiers_are_refused(tmp_path):
    host = fresh_images("resnet")
    host.model.get_buffer("resnet.embedder.embedder.normalization.running_var").fill_(float("nan"))
    with pytest.raises(HostError, match="running_var holds NaN"):
        load_images(host.model)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(HostError, match="pickled weights are never opened"):
        errata.load(tmp_path)


# --- folders of pairs ---------------------------------------------------------------------


def write(root: Path, count: int = 2, side: int = 40, *, mask: str = "png", seed: int = 0) -> Path:
    """Write pairs of random images with a masked square."""
    generator = torch.Generator().manual_seed(seed)
    for part in ("original", "changed", "mask"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        for part in ("original", "changed"):
            noise = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(root / part / f"{i}.png")
        area = torch.zeros(side, side, dtype=torch.uint8)
        area[side // 4 : side // 2, : side // 2] = 255
        Image.fromarray(area.numpy()).save(root / "mask" / f"{i}.{mask}")
    return root


def test_a_folder_of_pairs_is_read_as_it_is(tmp_path):
    root = write(tmp_path / "snow")
    (root / "reference").mkdir()
    Image.new("RGB", (40, 40), (255, 0, 51)).save(root / "reference" / "street.png")
    (root / "original" / "notes.txt").write_text("not an image")
    request = read_pairs(root, concept="road", replacement="snow")
    assert request.original.shape == request.changed.shape == (2, 3, 40, 40)
    assert request.mask.shape == (2, 40, 40) and request.mask.unique().tolist() == [0.0, 1.0]
    assert bool((request.mask[:, 10:20, :20] == 1).all()) and float(request.mask.sum()) == 2 * 10 * 20
    pixel = Image.open(root / "changed" / "1.png").getpixel((7, 3))  # column, row
    torch.testing.assert_close(request.changed[1, :, 3, 7], torch.tensor(pixel) / 255)
    assert request.id == "snow" and request.reference is not None
    torch.testing.assert_close(request.reference[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_everything_is_brought_to_the_models_size(tmp_path):
    request = read_pairs(write(tmp_path / "a", side=64), size=(16, 32))
    assert request.original.shape == (2, 3, 16, 32) and request.mask.shape == (2, 16, 32)
    assert float(request.mask.mean()) == pytest.approx(1 / 8, abs=0.02)
    assert read_pairs(tmp_path / "a", channels=1).original.shape == (2, 1, 64, 64)


def test_what_does_not_match_is_listed(tmp_path):
    with pytest.raises(DataError, match=r"no original/, changed/, mask/"):
        read_pairs(tmp_path)
    root = write(tmp_path / "a", 3)
    (root / "mask" / "0.png").unlink()
    (root / "changed" / "1.png").unlink()
    with pytest.raises(DataError) as caught:
        read_pairs(root)
    assert "0 is in original/, changed/ but not in mask/" in str(caught.value)
    assert "1 is in original/, mask/ but not in changed/" in str(caught.value)
    other = write(tmp_path / "b")
    (other / "changed" / "0.png").write_bytes((other / "changed" / "0.png").read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(other / "original" / "1.png")
    with pytest.raises(DataError) as caught:
        read_pairs(other)
    assert "2 problems" in str(caught.value) and "changed/0.png cannot be read" in str(caught.value)
    assert "original/1.png is 8 x 8, original/0.png is 40 x 40" in str(caught.value)
    Image.new("L", (8, 8)).save(other / "mask" / "1.jpg")
    with pytest.raises(DataError, match=r"both 1\.jpg and 1\.png"):
        read_pairs(other)
    empty = tmp_path / "c"
    for part in ("original", "changed", "mask"):
        (empty / part).mkdir(parents=True)
    with pytest.raises(DataError, match="has no images"):
        read_pairs(empty)


def test_without_pillow_the_reader_says_what_to_install(tmp_path, monkeypatch):
    root, plain = write(tmp_path / "a"), builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"errata\[images\]"):
        read_pairs(root)


# --- the command line ---------------------------------------------------------------------


def run(*words: str):
    from typer.testing import CliRunner

    from errata.cli.main import app

    return CliRunner().invoke(app, words)


def test_the_command_line_edits_a_classifier(folder, tmp_path):
    root, out = write(tmp_path / "winter"), tmp_path / "e.safetensors"
    words = (
        "edit",
        str(root),
        "--model",
        str(folder),
        "--method",
        "rewrite",
        "-o",
        str(out),
        "--device",
        "cpu",
    )
    dry = run(*words, "--dry-run", "--json")
    assert dry.exit_code == 0 and json.loads(dry.stdout)["requests"] == 1 and not out.exists()
    done = run(*words, "--subject", "snow", "--target", "road", "--set", "steps=20", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [sorted(a) for a in document["answers"]] == [
        ["answered", "changed, after", "changed, before", "original", "pair"]
    ] * 2
    assert document["edit"]["requests"][0]["replacement"] == "snow"
    assert all(a["answered"] == (a["changed, after"] == a["original"]) for a in document["answers"])
    assert document["answered"] == document["total"] - len(document["missed"])
    assert isinstance(run(*words, "--set", "steps=20").exception, errata.ErrataError)
    shown = run(*words, "--set", "steps=20", "--force")
    assert shown.exit_code == 0 and "edit written to" in shown.stdout and "errata ask" not in shown.stdout
    host, edit = errata.load(folder, device="cpu"), errata.Edit.load(out)
    before = host.logits(read_pairs(root, size=host.size).changed)
    with edit.on(host):
        assert not torch.equal(host.logits(read_pairs(root, size=host.size).changed), before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{pairs}", "--model", "{model}"), "--method rewrite"),
        (("no-such-folder", "--model", "{model}", "--method", "rewrite"), "expected a folder"),
        (("{pairs}", "--model", "lab", "--method", "rewrite"), "edits image classifiers"),
        (
            ("Ada is", "--subject", "Ada", "--target", "Esk", "--model", "{model}"),
            "keel edits causal language models",
        ),
        (("{model}", "--model", "{model}", "--method", "rewrite"), "has no original/"),
    ],
)
def test_the_command_line_refuses_what_does_not_belong(folder, tmp_path, words, said):
    root, out = write(tmp_path / "pairs"), tmp_path / "e.safetensors"
    filled = [word.format(pairs=root, model=folder) for word in words]
    result = run("edit", *filled, "-o", str(out), "--device", "cpu")
    assert isinstance(result.exception, errata.ErrataError) and said in str(result.exception)
    assert not out.exists()


def test_a_host_of_images_has_nothing_of_a_host_of_text():
    host = fresh_images("vit")
    assert isinstance(host, ModelHost) and not isinstance(host, Host)
    for name in (
        "generate",
        "forward",
        "forward_at",
        "batch",
        "encode",
        "encode_answer",
        "continues",
        "pad_id",
    ):
        assert not hasattr(host, name)
    assert host.fingerprint and not host.edited and host.tokenizer is None


@pytest.mark.parametrize("words", [("ask", "Ada was born in"), ("ability", "winogrande")])
def test_commands_that_put_prompts_refuse_a_model_of_images(folder, words):
    verb, *rest = words
    result = run(verb, *rest, "--model", str(folder), "--device", "cpu")
    assert isinstance(result.exception, HostError) and "image classifier" in str(result.exception)
