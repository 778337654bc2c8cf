"""What methods have in common that delete answers by one Newton step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.prefix import ROWS
from errata.methods._method import Layers, Workspace, check_requests, notes, provenance, resolve_layers
from errata.methods._unlearn import middle, retained_ids, to_forget
from errata.training.deletion import Gradients, along, gradients
from errata.types import Request

Direction = Callable[[Gradients, Mapping[Site, Tensor]], dict[Site, Tensor]]
"""Maps gradients and the damped Fisher information to a step, by site ``[d_out, d_in]``."""


@dataclass(frozen=True)
class DeletionConfig:
    """Settings of methods that delete by a Newton step."""

    layers: Layers = None
    """Layers whose feed-forward output projection changes. None: the middle third; wide: from a twelfth to five sixths
    of the depth."""
    forgotten: float | None = 4.0
    """Nats per token that answers cost in the mean when the step is long enough. None: the plain step, of length 1."""
    damping: float = 1.0
    """Added to the Fisher information, in means of it over a weight."""
    retain_texts: int = 64
    """How many texts the Fisher information is of: of the corpus, or without one written by the model."""
    retain_tokens: int = 32
    """Their length in tokens at most."""
    answer_tokens: int = 16
    """Longest present answer, in tokens, that is asked of the model where a request has no old target."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "forgotten", "damping", "retain_texts", "answer_tokens")
        if self.retain_tokens < 2:
            complaints.append(f"retain_tokens: expected 2 or more, found {self.retain_tokens}")
        return complaints


def delete(
    method: str, host: Host, requests: Sequence[Request], config: DeletionConfig, work: Workspace,
    direction: Direction,
) -> WeightEdit:  # fmt: skip
    """Return the dense edit that deletes the requests' old answers along a direction."""
    check_requests(method, requests)
    layers = resolve_layers(host, config.layers, middle)
    sites = [host.layout.site(layer) for layer in layers]
    answers = to_forget(host, requests, config.answer_tokens, work)
    kept = retained_ids(host, requests, config, work)
    rows = work.batch_size or ROWS
    found = gradients(host, answers, kept, sites, rows=rows)
    changes, facts = along(
        host, answers, direction(found, found.fisher(config.damping)), config.forgotten, rows=rows
    )
    return WeightEdit(
        changes,
        frozenset(site.parameter for site in sites if site.transposed),
        provenance(method, host, requests, replace(config, layers=layers), work, **notes(facts)),
    )
