"""Second moments of keys at pictures' tokens, apart from those of texts, and the files that pictures are taken from.

A picture has many more tokens than the text beside it, so in one sum over both, "what is to be preserved" would mean
pictures alone. Each modality has sums of its own, cached by themselves; whoever uses both states the share of each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.data.pictures import read_picture
from errata.errors import ConfigError, DataError, HostError, RequestError
from errata.files import parse_json
from errata.host import locking
from errata.host.codec import PICTURES
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.block_moments import AnyMoments
from errata.progress import OnCount, ignore
from errata.stats import cache
from errata.stats.collect import add_keys, device_of, no_sums
from errata.types import IMAGE, Gallery, Picture, Probe

TOGETHER = 16
"""Pictures in a pass."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a folder that are taken for pictures."""


@locking.exclusive
def picture_moments(
    host: Host, sites: Sequence[Site], gallery: Gallery, *, tokens: int, folder: Path | None = None,
    on_tokens: OnCount = ignore,
) -> dict[Site, AnyMoments]:  # fmt: skip
    """Return the second moment of each site's input over the tokens that stand for pictures, delimiters left out.

    Whole pictures are counted until there are ``tokens`` of their tokens; a shorter gallery gives fewer. Results are
    stored in ``folder`` under a key of host, its processor, site, gallery, budget and dtype; None stores nothing.
    Raises HostError where the model reads no pictures, or if a folder is given while an edit is in place; DataError
    for a gallery without pictures, RequestError for one that the host cannot take.
    """
    if tokens < 1:
        raise ConfigError(f"a token budget of {tokens} gives no statistics; expected 1 or more")
    if folder is not None and host.placed:
        raise HostError("statistics of an edited host are not stored: revert its edits, or give no folder")
    moments: dict[Site, AnyMoments] = {}
    for site in sites:
        stored = None if folder is None else cache.read(folder, facts(host, site, gallery, tokens=tokens))
        if stored is not None:
            moments[site] = stored.to(device_of(host, site))
    missing = [site for site in sites if site not in moments]
    if missing:
        fresh = _collect(host, missing, gallery, tokens, on_tokens)
        if folder is not None:
            for site, sums in fresh.items():
                cache.write(folder, facts(host, site, gallery, tokens=tokens), sums)
        moments |= fresh
    return {site: moments[site] for site in sites}


def facts(host: Host, site: Site, gallery: Gallery, *, tokens: int) -> dict[str, str | int]:
    """Return everything that a site's moments at pictures' tokens depend on, the key of :mod:`errata.stats.cache`."""
    return {
        "host": host.fingerprint,
        "pictures": gallery.name,
        "processor": host.codec.pictures_key,
        "tokens": tokens,
        "dtype": str(host.dtype),
        "site": site.parameter,
    }


def _collect(
    host: Host, sites: Sequence[Site], gallery: Gallery, tokens: int, on_tokens: OnCount
) -> dict[Site, AnyMoments]:
    moments: dict[Site, AnyMoments] = {site: no_sums(host, site) for site in sites}
    count = 0
    for group in _groups(gallery.shown(), TOGETHER):
        prompts = [Probe("statistics", text, (), (), image=picture).prompt for text, picture in group]
        with host.codec.seeing([picture for _, picture in group]):
            rows: list[tuple[int, ...]] = []
            for prompt in prompts:
                if count < tokens:
                    rows.append(host.encode(prompt).ids)
                    count += sum(token >= PICTURES for token in rows[-1])
            if rows:
                batch = host.batch(rows)
                add_keys(host, batch, batch.ids >= PICTURES, moments)
        on_tokens(min(count, tokens), tokens)
        if count >= tokens:
            break
    if not count:
        raise DataError(f"{gallery.name} has no pictures to compute statistics over")
    return moments


def _groups(items: Iterable[tuple[str, Picture]], size: int) -> Iterator[list[tuple[str, Picture]]]:
    rest = iter(items)
    while group := list(itertools.islice(rest, size)):
        yield group


# --- files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A picture's file and the text that it stands in."""

    text: str
    path: Path

    def read(self) -> tuple[str, Picture]:
        """Read the picture. Raises DataError where that fails."""
        try:
            return self.text, read_picture(self.path)
        except RequestError as error:
            raise DataError(str(error)) from error


def file_gallery(path: Path) -> Gallery:
    """Return the pictures of a folder, by name, or of a .jsonl file with their texts; named by a hash of the content.

    A line has ``image``, a path relative to the file, and ``text`` (or ``prompt``, as requests have it); ``<image>``
    in it is the picture's place. Lines without an image are left out. Raises DataError for files that cannot be read,
    or no pictures in them.
    """
    path = path.expanduser()
    entries = _folder(path) if path.is_dir() else _lines(path)
    if not entries:
        raise DataError(
            f"{path} has no pictures; expected files {', '.join(SUFFIXES)}, or lines with an image"
        )
    digest = hashlib.sha256()
    for entry in entries:
        text, picture = entry.read()
        digest.update(f"{picture.sha256}{text}\0".encode())
    return Gallery(f"{path.name}@{digest.hexdigest()[:12]}", lambda: (entry.read() for entry in entries))


def _folder(path: Path) -> list[_Entry]:
    try:
        names = sorted(place for place in path.iterdir() if place.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error}") from error
    return [_Entry(IMAGE, place) for place in names]


def _lines(path: Path) -> list[_Entry]:
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"pictures: expected a folder or a .jsonl file of texts with images, found {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        record: Any = parse_json(line, lambda reason, place=place: DataError(f"{place}: {reason}"))
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a record with image and text, found {type(record).__name__}")
        image, text = record.get("image"), record.get("text", record.get("prompt", IMAGE))
        if image is None:
            continue
        if not isinstance(image, str) or not isinstance(text, str):
            raise DataError(f"{place}: image and text must be texts")
        entries.append(_Entry(text, path.parent / image))
    return entries
