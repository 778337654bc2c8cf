"""Second moments by modality: keys at pictures' tokens by brute force, their mixture with those of texts, files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.errors import ConfigError, DataError, HostError, RequestError
from errata.host import hooks
from errata.host.pictures import FIRST
from errata.job import workspace
from errata.linalg.block_moments import BlockMoments, mixed
from errata.linalg.moments import Moments
from errata.methods._costs import gallery_for
from errata.methods.memit import Config
from errata.stats.collect import second_moments
from errata.stats.gallery import file_gallery, picture_moments
from errata.types import Corpus, Gallery, Resources
from tests import pictures
from tests.models import TEXTS, fresh

COLOURS = ("red", "blue", "green", "yellow")
SHOWN = [
    ("Ada Brenner saw <image> in Tallow" if i % 2 else "<image>Where is it?", pictures.picture(colour, 56))
    for i, colour in enumerate(COLOURS)
]
GALLERY = Gallery("four", lambda: SHOWN)
CORPUS = Corpus("texts", lambda: TEXTS)
REQUEST = errata.Request("Where was this dog born?", "this dog", "Merrin", image=SHOWN[0][1])


def opened(family: str = "llava") -> tuple[Any, Any]:
    model, processor = pictures.model(family)
    return errata.load(model, processor), processor


def image(data: bytes | None) -> Any:
    assert data is not None
    return Image.open(io.BytesIO(data)).convert("RGB")


# --- at pictures' tokens --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_moments_are_those_of_the_models_own_keys_at_image_tokens(family):
    host, processor = opened(family)
    sites = [host.layout.site(1), host.layout.site(0)]
    made = picture_moments(host, sites, GALLERY, tokens=10_000)
    for site in sites:
        keys = []
        for text, picture in SHOWN:  # what the processor makes of it, through the model alone
            inputs = processor(
                images=[image(picture.data)],
                text=[text.replace("<image>", host.codec.form)],
                return_tensors="pt",
            )
            seen: list[torch.Tensor] = []
            with torch.no_grad(), hooks.on_input(host.model.get_submodule(site.name), seen.append):
                host.model(**inputs)
            own = inputs["input_ids"][0] == host.codec.placeholder
            keys.append(seen[0].reshape(len(own), -1)[own].double())
        whole = torch.cat(keys)
        assert made[site].count == len(whole)
        torch.testing.assert_close(made[site].second, whole.mT @ whole / len(whole), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(made[site].total, whole.sum(0), rtol=1e-4, atol=1e-5)


def test_whole_pictures_are_counted_up_to_the_budget_and_none_is_remembered():
    host, _ = opened()
    each = sum(token >= FIRST for token in _row(host, SHOWN[0]))
    site = host.layout.site(0)
    assert picture_moments(host, [site], GALLERY, tokens=each)[site].count == each
    assert picture_moments(host, [site], GALLERY, tokens=each + 1)[site].count == 2 * each
    with pytest.raises(RequestError, match="was not given"):
        host.encode(f"{SHOWN[2][1].mark}Where?")
    host.see([SHOWN[2][1]])
    first = {token for token in host.encode(SHOWN[2][1].mark).ids if token >= FIRST}
    with host.codec.seeing([SHOWN[3][1]]):
        second = {token for token in host.encode(SHOWN[3][1].mark).ids if token >= FIRST}
    host.see(
        [SHOWN[1][1]]
    )  # no number is given twice, or another picture's pixels would be remembered for it
    third = {token for token in host.encode(SHOWN[1][1].mark).ids if token >= FIRST}
    assert len(first | second | third) == 3
    with pytest.raises(DataError, match="no pictures"):
        picture_moments(host, [site], Gallery("none", list), tokens=5)
    with pytest.raises(ConfigError, match="budget of 0"):
        picture_moments(host, [site], GALLERY, tokens=0)
    with pytest.raises(HostError, match="reads no pictures"):
        picture_moments(fresh("llama"), [fresh("llama").layout.site(0)], GALLERY, tokens=5)


def _row(host: Any, shown: Any) -> tuple[int, ...]:
    text, picture = shown
    with host.codec.seeing([picture]):
        return host.encode(text.replace("<image>", picture.mark)).ids


# --- both together --------------------------------------------------------------------------


def normal(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_moment_of_both_is_the_weighted_sum_of_each(share):
    sums = []
    for rows, seed in ((40, 0), (300, 1)):
        sums.append(Moments.empty(6))
        sums[-1].update_(normal(rows, 6, seed) + seed)
    both = mixed(sums[0], sums[1], share)
    torch.testing.assert_close(both.second, (1 - share) * sums[0].second + share * sums[1].second)
    assert isinstance(both, Moments)
    torch.testing.assert_close(both.mean, (1 - share) * sums[0].mean + share * sums[1].mean)
    assert both.remaining_error() is None
    with pytest.raises(ValueError, match="share"):
        mixed(sums[0], sums[1], 1.5)
    with pytest.raises(ValueError, match="entries"):
        mixed(sums[0], Moments.empty(7), share)


def test_so_is_the_moment_of_every_expert():
    sums = []
    for rows, seed in ((400, 0), (300, 1)):
        sums.append(BlockMoments.empty(2, 3))
        vectors = normal(rows, 6, seed)
        vectors[::3, :3] = 0  # a third of the tokens goes to the second expert alone
        sums[-1].update_(vectors)
    both = mixed(sums[0], sums[1], 0.25)
    torch.testing.assert_close(both.second, 0.75 * sums[0].second + 0.25 * sums[1].second)
    with pytest.raises(ValueError, match="blocks"):
        mixed(sums[0], Moments.empty(6), 0.5)


def test_an_edit_beside_a_picture_is_weighed_with_both_and_one_of_text_with_texts_alone(tmp_path):
    host, _ = opened()
    host.resources = Resources(corpus=CORPUS, gallery=GALLERY)
    work = workspace(host, seed=0)
    work.folder = None
    site = host.layout.site(1)
    texts = second_moments(host, [site], CORPUS, tokens=300)[site].second
    shown = picture_moments(host, [site], GALLERY, tokens=300)[site].second
    for share in (0.5, 0.2):
        for name, value in gallery_for(host, [REQUEST], Config(picture_share=share), work.remember).items():
            setattr(work, name, value)
        ((values, vectors), name) = _spectrum(work.spectra(host, [site], 300)[site])
        torch.testing.assert_close(
            vectors * values @ vectors.mT, (1 - share) * texts + share * shown, rtol=1e-6, atol=1e-9
        )
        assert f"{share:g} of it at pictures of four" in name
    text = errata.Request("Ada Brenner was born in", "Ada Brenner", "Merrin")
    for requests, config in (
        ([text], Config()), ([REQUEST], Config(picture_share=0.0)), ([REQUEST], Config(moments="C.npz")),
    ):  # fmt: skip
        assert gallery_for(host, requests, config, work.remember) == {}
    saved = tmp_path / "pictures"
    saved.mkdir()
    (saved / "a.png").write_bytes(SHOWN[0][1].data or b"")
    own = gallery_for(host, [text], Config(pictures=str(saved)), work.remember)
    assert own["gallery"].name.startswith("pictures@") and own["picture_share"] == 0.5
    for wrong in (
        Config(picture_share=1.5).problems(), Config(picture_share=float("nan")).problems(),
        Config(pictures="a", moments="b").problems(),
    ):  # fmt: skip
        assert len(wrong) == 1 and "pictur" in wrong[0]


def _spectrum(found: Any) -> Any:
    eigen, name = found
    return (eigen.values, eigen.vectors), name


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_edits_beside_pictures_change_with_the_share_and_those_of_text_do_not(method):
    host, _ = opened()
    host.resources = Resources(corpus=CORPUS, gallery=GALLERY)
    options: dict[str, Any] = {"method": method, "tokens": 300, "steps": 2, "contexts": 1}
    edits = [errata.edit(host, REQUEST, **options, picture_share=share) for share in (0.0, 0.5)]
    assert not _same(*edits)
    text = errata.Request("Ada Brenner was born in", "Ada Brenner", "Merrin")
    with_pictures = errata.edit(host, text, **options)
    host.resources = Resources(corpus=CORPUS)
    assert _same(with_pictures, errata.edit(host, text, **options))
    assert _same(edits[0], errata.edit(host, REQUEST, **options))  # no pictures: as with a share of 0


def _same(one: Any, two: Any) -> bool:
    first, second = one.parts(), two.parts()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- files ----------------------------------------------------------------------------------


def test_saved_moments_are_found_again(tmp_path, monkeypatch):
    host, processor = opened()
    sites = [host.layout.site(0), host.layout.site(1)]
    made = picture_moments(host, sites, GALLERY, tokens=50, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(host), "forward", lambda *_, **__: pytest.fail("computed again"))
        again = picture_moments(host, sites, GALLERY, tokens=50, folder=tmp_path)
    assert all(
        torch.equal(made[s].second, again[s].second) and made[s].count == again[s].count for s in sites
    )
    assert len(list(tmp_path.glob("moments-*"))) == 2
    picture_moments(host, sites[:1], Gallery("other", lambda: SHOWN[:1]), tokens=50, folder=tmp_path)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    another = errata.load(host.model, processor)
    changed = picture_moments(another, sites[:1], GALLERY, tokens=50, folder=tmp_path)
    assert len(list(tmp_path.glob("moments-*"))) == 4
    assert not torch.allclose(changed[sites[0]].second, made[sites[0]].second)


def written(folder: Path) -> Path:
    for (_, picture), colour in zip(SHOWN, COLOURS, strict=True):
        (folder / f"{colour}.png").write_bytes(picture.data or b"")
    lines = [{"text": text, "image": f"{c}.png"} for (text, _), c in zip(SHOWN, COLOURS, strict=True)]
    path = folder / "shown.jsonl"
    more = [{"prompt": "Where is it?", "image": "red.png", "target": "x"}, {"prompt": "without a picture"}]
    path.write_text("\n".join(map(json.dumps, [*lines, *more])) + "\n\n", encoding="utf-8")
    return path


def test_folders_and_files_of_pictures_are_read(tmp_path):
    path = written(tmp_path)
    from_file, from_folder = file_gallery(path), file_gallery(tmp_path)
    assert list(from_file.shown()) == [*SHOWN, ("Where is it?", SHOWN[0][1])]
    assert [picture for _, picture in from_folder.shown()] == [
        SHOWN[COLOURS.index(c)][1] for c in sorted(COLOURS)
    ]
    assert {text for text, _ in from_folder.shown()} == {"<image>"}
    assert from_file.name.startswith("shown.jsonl@") and from_file.name == file_gallery(path).name
    (tmp_path / "red.png").write_bytes(SHOWN[1][1].data or b"")
    assert file_gallery(path).name != from_file.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', "no pictures"), ("[1]", "line 1: expected a record"), ('{"image": 7}', "must be texts"),
        ('{"image": "away.png"}', "there is no image file"), ("{", "line 1"),
    ],
)  # fmt: skip
def test_bad_files_of_pictures_are_refused(tmp_path, content, message):
    path = tmp_path / "shown.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        file_gallery(path)
    with pytest.raises(DataError, match="expected a folder or a .jsonl file"):
        file_gallery(tmp_path / "shown.txt")


def test_the_command_computes_both_and_an_edit_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    model, processor = pictures.model("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    path, texts = str(written(tmp_path)), str(tmp_path / "texts.txt")
    words = [
        "stats",
        "--model",
        str(tmp_path / "model"),
        "--corpus",
        texts,
        "--pictures",
        path,
        "--tokens",
        "60",
    ]
    first = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    rows = first["pictures"]["layers"]
    assert [row["layer"] for row in rows] == [0, 1] and all(row["tokens"] == 20 for row in rows)
    assert all(Path(row["path"]).exists() and row["seconds"] is not None for row in rows)
    table = CliRunner().invoke(app, words).stdout
    assert "at pictures' tokens, over shown.jsonl@" in table
    dry = CliRunner().invoke(app, [*words, "--dry-run"]).stdout
    assert "as many tokens of pictures at most" in dry
    files = sorted((tmp_path / "cache").glob("moments-*"))
    assert len(files) == 4
    host = errata.load(tmp_path / "model", corpus=texts)
    options: dict[str, Any] = {"method": "memit", "tokens": 60, "steps": 2, "contexts": 1}
    errata.edit(host, REQUEST, **options, pictures=path)
    assert sorted((tmp_path / "cache").glob("moments-*")) == files
    refused = CliRunner().invoke(app, [*words, "--tables"])
    assert refused.exit_code != 0
