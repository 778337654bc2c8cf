"""How kinds of probes are grouped, labelled and ordered in tables; their facts are in ``errata.types.kinds``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from errata.types.kinds import KINDS, Group, kind_of

GROUPS: Mapping[Group, str] = {
    "learned": "learned", "kept": "kept", "follows": "consequences", "other": "other"
}  # fmt: skip
"""Groups of kinds in the order of columns, with their titles."""


EARLIER_PARTS = 3
"""Number of parts of the headline score in earlier versions."""


def group(kind: str, preserved: Iterable[str] = ()) -> Group:
    """Return the group of a kind; ``preserved``: kinds whose answers must not change."""
    record = kind_of(kind)
    return "kept" if record.group == "follows" and record.name in set(preserved) else record.group


def label(kind: str, *, short: bool = False) -> str:
    """Return the heading of a kind: ``multi_hop.any`` is "multi hop, any"; ``short``: for a narrow table."""
    record = kind_of(kind)
    rest = kind.partition(".")[2].replace(".", ", ").replace("_", " ")
    name = record.short_label if short else record.label
    return f"{name}, {rest}" if rest else name


def headline_parts() -> list[list[str]]:
    """List the parts of the headline score; each is a list of alternative kinds, the preferred one first."""
    parts: dict[int, list[str]] = {}
    for kind in KINDS.values():
        if kind.headline is not None:
            parts.setdefault(kind.headline, []).append(kind.name)
    return [names for _, names in sorted(parts.items())]


def earlier_headline(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts of the headline score of earlier versions, which left out other facts of the same subject.

    Empty where nothing differs.
    """
    parts = tuple(parts)
    earlier = tuple(part for part in parts if (kind_of(part).headline or 0) <= EARLIER_PARTS)
    return () if earlier == parts else earlier


def is_main(kind: str) -> bool:
    """Whether a kind has a column in the first table; a group of probes, ``efficacy.any``, has none."""
    return kind in KINDS and KINDS[kind].main


def order(kinds: Iterable[str], preserved: Iterable[str] = ()) -> list[str]:
    """Sort kinds by group; learned and kept ones in the order of the table of kinds, all others by name."""
    main_kinds = [name for name, kind in KINDS.items() if kind.group in ("learned", "kept")]
    rank = {name: place for place, name in enumerate(main_kinds)}
    groups = list(GROUPS)
    return sorted(
        dict.fromkeys(kinds),
        key=lambda k: (groups.index(group(k, preserved)), rank.get(k.partition(".")[0], len(main_kinds)), k),
    )
