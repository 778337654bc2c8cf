"""Read pairs of images with masks from a folder: ``original/``, ``changed/``, ``mask/``, equal file names.

Needs Pillow: ``pip install 'errata[images]'``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import rasters
from errata.errors import DataError
from errata.types import ImageRequest

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("original", "changed", "mask")
REFERENCE = "reference"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
MODES: Mapping[int, rasters.Mode] = {1: "L", 3: "RGB", 4: "RGBA"}


def read_pairs(
    folder: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    concept: str = "original",
    replacement: str = "changed",
    id: str | None = None,
) -> ImageRequest:
    """Read a folder of image pairs into one request, values from 0 to 1.

    ``original/NAME``, ``changed/NAME`` and ``mask/NAME`` belong together; suffixes may differ, so that photos can
    have lossless masks. Masks are read as grey, white where the concept is. ``reference/``, if present, has any
    number of further images. ``size``: height and width to resize all images to (no cropping); None: unchanged,
    and all must have one size. ``channels``: 3 for colour, 1 for grey. Raises DataError listing every missing,
    unmatched or unreadable file, and where Pillow is not installed.
    """
    root = Path(folder).expanduser()
    files = _paths(root)
    problems: list[str] = []
    read = {
        part: [_read(path, 1 if part == "mask" else channels, size, problems) for path in files[part]]
        for part in files
    }
    problems += _sizes(files, read)
    if problems:
        raise DataError(f"{root}: {len(problems)} problems\n" + "\n".join(problems))
    stacked = {part: _stacked(images) for part, images in read.items() if images}
    return ImageRequest(
        stacked["original"],
        stacked["changed"],
        stacked["mask"][:, 0],
        concept,
        replacement,
        id=id or root.resolve().name,
        reference=stacked.get(REFERENCE),
    )


def read_classes(
    folder: str | os.PathLike[str], *, size: tuple[int, int] | None = None, channels: int = 3
) -> tuple[Tensor, list[int], list[str]]:
    """Read labelled images, ``FOLDER/CLASS/NAME.png``: images ``[n, c, h, w]`` from 0 to 1, numbers, names of classes.

    ``size`` and ``channels`` as of :func:`read_pairs`. Raises DataError for a folder without classes, a class without
    images, and as that does.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected one with a folder of images for each class")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = {name: _images(root / name) for name in names}
    empty = [name for name in names if not paths[name]]
    if not names or empty:
        what = f"no images in {', '.join(empty)}" if empty else "no folders"
        raise DataError(
            f"{root} holds {what}; expected a folder of images ({', '.join(SUFFIXES)}) for each class"
        )
    problems: list[str] = []
    read = {name: [_read(path, channels, size, problems) for path in paths[name]] for name in names}
    problems += _sizes(paths, read)
    if problems:
        raise DataError(f"{root}: {len(problems)} problems\n" + "\n".join(problems))
    labels = [number for number, name in enumerate(names) for _ in paths[name]]
    return _stacked([image for name in names for image in read[name]]), labels, names


def _paths(root: Path) -> dict[str, list[Path]]:
    """List the files of each part, sorted by name. Raises DataError where the names do not match."""
    missing = [f"{part}/" for part in PARTS if not (root / part).is_dir()]
    if missing:
        raise DataError(
            f"{root} has no {', '.join(missing)}: expected a folder with original/, changed/ and mask/, "
            "with files of equal names"
        )
    by_name = {part: _by_name(root / part) for part in PARTS}
    everywhere = sorted(set().union(*by_name.values()))
    problems = [
        f"{name} is in {', '.join(f'{p}/' for p in PARTS if name in by_name[p])} but not in "
        f"{', '.join(f'{p}/' for p in PARTS if name not in by_name[p])}"
        for name in everywhere
        if not all(name in by_name[part] for part in PARTS)
    ]
    if problems:
        raise DataError(f"{root}: {len(problems)} names do not match\n" + "\n".join(problems))
    if not everywhere:
        raise DataError(f"{root}/original has no images ({', '.join(SUFFIXES)})")
    paths = {part: [by_name[part][name] for name in everywhere] for part in PARTS}
    if (root / REFERENCE).is_dir():
        paths[REFERENCE] = _images(root / REFERENCE)
    return paths


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _by_name(folder: Path) -> dict[str, Path]:
    """Return files by name without suffix. Raises DataError for two files of one name."""
    by_name: dict[str, Path] = {}
    for path in _images(folder):
        if path.stem in by_name:
            raise DataError(
                f"{folder} has both {by_name[path.stem].name} and {path.name}; expected one of them"
            )
        by_name[path.stem] = path
    return by_name


def _read(path: Path, channels: int, size: tuple[int, int] | None, problems: list[str]) -> Any:
    """Read one image as an array ``[h, w, c]`` of bytes; on failure, add to ``problems`` and return None."""
    import numpy

    library = _pillow()
    if channels not in MODES:
        raise DataError(f"images of {channels} channels are not read; known: {sorted(MODES)}")
    try:
        image = rasters.opened(path, MODES[channels])
    except ValueError as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read as an image: {error}")
        return None
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), library.Resampling.BILINEAR)
    return numpy.array(image).reshape(image.height, image.width, channels)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'errata[images]'") from error
    return Image


def _sizes(files: Mapping[str, list[Path]], read: Mapping[str, list[Any]]) -> list[str]:
    """List images of another size than the first."""
    sizes = [
        (f"{path.parent.name}/{path.name}", image.shape[1], image.shape[0])
        for part in files
        for path, image in zip(files[part], read[part], strict=True)
        if image is not None
    ]
    return [
        f"{name} is {width} x {height}, {sizes[0][0]} is {sizes[0][1]} x {sizes[0][2]}; give all one size"
        for name, width, height in sizes
        if (width, height) != sizes[0][1:]
    ]


def _stacked(images: list[Any]) -> Tensor:
    """Stack byte images into ``[n, c, h, w]``, 0 to 1."""
    import numpy
    import torch

    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).float() / 255
