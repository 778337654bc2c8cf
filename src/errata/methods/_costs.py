"""What second moments are taken over, and what becomes of them: which pictures beside the texts, cost matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.errors import DataError
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.block_moments import AnyMoments
from errata.linalg.solve import CostMatrix
from errata.stats.gallery import file_gallery
from errata.types import Corpus, Gallery, Request

Remember = Callable[[tuple[Any, ...], Callable[[], Gallery]], Gallery]


def gallery_for(host: Host, requests: Sequence[Any], config: Any, remember: Remember) -> dict[str, Any]:
    """Return the workspace's fields for the pictures that second moments are taken at too: none, or them and the share.

    Those of the setting ``pictures``; else the host's own, where a request is beside a picture. Raises DataError for
    files that cannot be read.
    """
    file, share = getattr(config, "pictures", None), getattr(config, "picture_share", 0.0)
    if not share or getattr(config, "moments", None) is not None:
        return {}
    if file is not None:
        gallery = remember(("gallery", file), lambda: file_gallery(Path(file)))
    elif any(isinstance(request, Request) and request.image is not None for request in requests):
        gallery = host.resources.gallery
    else:
        return {}
    return {"gallery": gallery, "picture_share": share}


def factorised(second: Tensor, what: str, *, ridge: float, name: str, overwrite: bool = False) -> CostMatrix:
    """Factorise a second moment ``[d_in, d_in]``, which may be overwritten if said so.

    Raises DataError where nothing can be solved with it.
    """
    try:
        return CostMatrix.of(second, ridge=ridge, name=name, overwrite=overwrite)
    except ValueError as error:
        raise DataError(f"{what} cannot be used: {error}; give a longer corpus, or another layer") from error


def warn_of_few(moments_by_site: Mapping[Site, AnyMoments], corpus: Corpus) -> None:
    """Say how many tokens are missing where there are fewer than a key has entries."""
    short = {site: moments for site, moments in moments_by_site.items() if moments.count < site.d_in}
    if short:
        site = max(short, key=lambda one: one.d_in)
        warnings.warn(
            f"{corpus.name} gives {short[site].count} tokens of statistics for the {site.d_in} entries of a key of "
            f"{site.name}: {site.d_in - short[site].count} tokens too few, at least. Directions that no token "
            "showed count as free to change, so the edit may reach further than it should; give a longer corpus",
            RuntimeWarning,
            stacklevel=3,
        )
