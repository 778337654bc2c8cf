"""Image files as Pillow's images, upright and with 8 bits a channel, whatever the file has."""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any, Literal

Mode = Literal["L", "RGB", "RGBA"]
WHITE = 65535
"""Of 16 bits."""


def opened(source: str | os.PathLike[str] | BytesIO, mode: Mode) -> Any:
    """Return an image file, of an animated one the first picture. Raises ImportError without Pillow, ValueError for a
    file that cannot be read, with the reason in one line."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source) as file:
            return _eight_bits(ImageOps.exif_transpose(file), file.format).convert(mode)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("it is in no format of images that is known") from error
    except Exception as error:  # each format's reader raises its own, also RuntimeError and struct.error
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(lines[0]) from error


def _eight_bits(image: Any, form: str | None) -> Any:
    """Return an image with 8 bits a channel; Pillow itself cuts greater numbers off, so that all but black is white."""
    if image.mode[0] not in "IF":
        return image
    import numpy
    from PIL import Image

    values = numpy.asarray(image)
    if image.mode == "F" or (image.mode == "I" and form != "PNG"):  # some releases read 16 bits of a PNG as I
        raise ValueError(
            "it has numbers of 32 bits a pixel, which do not say what is white; save it with 8 bits a channel"
        )
    return Image.fromarray((values.astype("float64") * (255 / WHITE)).round().astype("uint8"))
