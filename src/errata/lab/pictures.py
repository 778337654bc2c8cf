"""Pictures of a third of the lab's entities: an emblem each, rendered with Pillow, so that what one shows is known.

An emblem is a ground colour, a shape, its colour and a glyph on it; no two entities have the same. Pictures of one
entity differ in place, size, turn and brightness.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from errata.errors import ConfigError, DataError
from errata.lab.text import share_of
from errata.lab.world import World
from errata.registry import unknown

SIDE = 48
"""Height and width of a picture, pixels."""
FINER = 4
"""How many times larger an emblem is drawn, before it is scaled down."""
GROUNDS = ("#f2e8cf", "#cfe8f2", "#e3cff2", "#d5f2cf", "#3b3b4f", "#4f3b3b", "#3b4f45", "#8a8a8a")
COLOURS = ("#d62828", "#1d6fd6", "#1f9d3a", "#f2b705", "#7b2cbf", "#ff7f11", "#111111", "#fafafa")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")
GLYPHS = ("dot", "plus", "saltire", "bar", "pole", "pair", "corner", "tee")
CODES = len(GROUNDS) * len(COLOURS) * len(SHAPES) * len(GLYPHS)
PICTURED = 0.35
"""Share of the subjects that have pictures."""
TRAINING = 1_000
"""Numbers of the pictures that the model is trained on begin here; it never sees those before."""


@dataclass(frozen=True)
class Emblem:
    """What a picture shows."""

    ground: str
    shape: str
    colour: str
    glyph: str

    @staticmethod
    def of(code: int) -> Emblem:
        """Return an emblem by its number, 0 up to ``CODES``."""
        rest, ground = divmod(code, len(GROUNDS))
        rest, shape = divmod(rest, len(SHAPES))
        glyph, colour = divmod(rest, len(COLOURS))
        return Emblem(GROUNDS[ground], SHAPES[shape], COLOURS[colour], GLYPHS[glyph])


@lru_cache(maxsize=4)
def _codes(seed: int, names: tuple[str, ...]) -> Mapping[str, int]:
    drawn = random.Random(f"errata-emblems-{seed}").sample(range(CODES), len(names))
    return dict(zip(names, drawn, strict=True))


def pictured(world: World) -> tuple[str, ...]:
    """Return the entities that have pictures, sorted."""
    return tuple(sorted(name for name in world.by_subject if share_of("pictured", name) < PICTURED))


def emblem(world: World, name: str) -> Emblem:
    """Return an entity's emblem. Raises ConfigError for one that has no pictures."""
    names = pictured(world)
    if name not in names:
        raise ConfigError(unknown(name, list(names), "entity with a picture"))
    return Emblem.of(_codes(world.seed, names)[name])


def picture(world: World, name: str, number: int = 0) -> Any:
    """Return a picture of an entity, an RGB image of Pillow; ``number`` says which of its pictures."""
    return draw(emblem(world, name), random.Random(f"errata-picture-{world.seed}-{name}-{number}"))


def png(image: Any) -> bytes:
    """Return an image as the bytes of a PNG file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def draw(shown: Emblem, rng: random.Random) -> Any:
    """Draw an emblem as an RGB image of Pillow; ``rng`` decides place, size, turn and brightness.

    Raises DataError where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageEnhance
    except ImportError as error:
        raise DataError("pictures of the lab need Pillow: pip install 'errata[images]'") from error
    size = SIDE * FINER
    image = Image.new("RGB", (size, size), shown.ground)
    canvas = ImageDraw.Draw(image)
    middle = tuple(size / 2 + rng.uniform(-0.07, 0.07) * size for _ in range(2))
    radius, turn = size * rng.uniform(0.33, 0.41), rng.uniform(-0.2, 0.2)

    def point(x: float, y: float) -> tuple[float, float]:
        cos, sin = math.cos(turn), math.sin(turn)
        return middle[0] + radius * (x * cos - y * sin), middle[1] + radius * (x * sin + y * cos)

    _shape(canvas, shown, point, middle, radius)
    ink = "#fafafa" if shown.colour in ("#d62828", "#1d6fd6", "#7b2cbf", "#111111") else "#111111"
    if shown.shape == "ring":  # the glyph stands on the ground inside it
        ink = "#fafafa" if shown.ground in ("#3b3b4f", "#4f3b3b", "#3b4f45") else "#111111"
    for line in _strokes(shown.glyph):
        canvas.line([point(0.3 * x, 0.3 * y) for x, y in line], fill=ink, width=round(0.16 * radius))
    if shown.glyph in ("dot", "pair"):
        for x in (0.0,) if shown.glyph == "dot" else (-0.22, 0.22):
            across, down = point(x, 0.0)
            r = 0.2 * radius if shown.glyph == "dot" else 0.13 * radius
            canvas.ellipse((across - r, down - r, across + r, down + r), fill=ink)
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return ImageEnhance.Brightness(small).enhance(rng.uniform(0.92, 1.08))


def _shape(canvas: Any, shown: Emblem, point: Any, middle: tuple[float, ...], radius: float) -> None:
    x, y = middle
    if shown.shape in ("circle", "ring"):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shown.colour)
        if shown.shape == "ring":
            inner = 0.62 * radius
            canvas.ellipse((x - inner, y - inner, x + inner, y + inner), fill=shown.ground)
        return
    canvas.polygon([point(*corner) for corner in _corners(shown.shape)], fill=shown.colour)


def _corners(shape: str) -> list[tuple[float, float]]:
    """List a shape's corners, in radii from its middle."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "diamond":
        return [(0.0, -1.1), (0.75, 0.0), (0.0, 1.1), (-0.75, 0.0)]
    if shape == "triangle":
        return [(0.0, -1.1), (1.05, 0.8), (-1.05, 0.8)]
    if shape == "cross":
        w = 0.38
        return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w),
                (-w, -w)]  # fmt: skip
    points = 10 if shape == "star" else 6
    radii = (1.15, 0.55) if shape == "star" else (1.0, 1.0)
    angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
    return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _strokes(glyph: str) -> list[list[tuple[float, float]]]:
    """List the lines of a glyph; none of those that are dots."""
    flat, upright = [(-1.0, 0.0), (1.0, 0.0)], [(0.0, -1.0), (0.0, 1.0)]
    return {
        "plus": [flat, upright],
        "saltire": [[(-0.8, -0.8), (0.8, 0.8)], [(-0.8, 0.8), (0.8, -0.8)]],
        "bar": [flat],
        "pole": [upright],
        "corner": [[(-0.7, -0.9), (-0.7, 0.8), (0.9, 0.8)]],
        "tee": [[(-1.0, -0.8), (1.0, -0.8)], [(0.0, -0.8), (0.0, 1.0)]],
    }.get(glyph, [])
