"""Image files of every sort that Pillow reads: 8 bits a channel, and what cannot be read is said."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
from PIL import Image

from errata import rasters
from errata.data.images import read_classes
from errata.errors import DataError, RequestError
from errata.host.pictures import _opened

RAMP = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)


def encoded(values: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_sixteen_bits_are_read_as_eight(form, mode):
    """Cut off at 255, as Pillow has it, such a picture is white but for its blackest places."""
    data = encoded(RAMP.astype(numpy.uint16) * 257, form)
    read = numpy.asarray(rasters.opened(io.BytesIO(data), mode))
    grey = read if mode == "L" else read[..., 0]
    assert read.dtype == numpy.uint8 and numpy.array_equal(grey, RAMP)


def test_other_sorts_keep_their_colours():
    flat = numpy.full((8, 8, 3), (200, 30, 40), dtype=numpy.uint8)
    colour = Image.fromarray(flat)
    for data in (
        encoded(colour, "PNG"), encoded(colour.quantize(4), "PNG"), encoded(colour.convert("RGBA"), "PNG"),
        encoded(colour, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        encoded(colour, "BMP"), encoded(colour.convert("CMYK"), "TIFF"),
    ):  # fmt: skip
        assert numpy.abs(numpy.asarray(_opened(data, "x")).astype(int) - flat).max() <= 2
    assert numpy.asarray(_opened(encoded(Image.new("1", (8, 8), 1), "PNG"), "x")).min() == 255


@pytest.mark.parametrize("kind", [numpy.int32, numpy.float32])
def test_numbers_without_a_white_are_refused(kind):
    data = encoded((RAMP / 255).astype(kind), "TIFF")
    with pytest.raises(RequestError, match="x cannot be read as an image: it has numbers of 32 bits"):
        _opened(data, "x")


def test_what_a_reader_raises_is_one_message(monkeypatch):
    whole = encoded(RAMP, "PNG")
    for data in (b"", b"text", whole[:4], whole[:40], whole[: len(whole) // 2]):
        with pytest.raises(RequestError, match="x cannot be read as an image: ") as caught:
            _opened(data, "x")
        assert "0x" not in str(caught.value)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "Failed to decode image: Missing or empty image item\nmore"
        )  # as AVIF's reader does

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(RequestError, match=r"Missing or empty image item\Z"):
        _opened(whole, "x")


def test_folders_of_images_are_read_alike(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.png").write_bytes(encoded(RAMP.astype(numpy.uint16) * 257, "PNG"))
    images, labels, names = read_classes(tmp_path, channels=1)
    assert (labels, names) == ([0], ["a"]) and numpy.array_equal((images[0, 0] * 255).round().numpy(), RAMP)
    (tmp_path / "a" / "float.tif").write_bytes(encoded(RAMP.astype(numpy.float32), "TIFF"))
    with pytest.raises(
        DataError, match=r"a/float\.tif cannot be read as an image: it has numbers of 32 bits"
    ):
        read_classes(tmp_path, channels=1)
