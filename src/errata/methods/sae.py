"""Features of a sparse autoencoder: one is added or set, or a mean difference is restricted to those that matter.

Paper      Templeton et al., "Scaling Monosemanticity", Transformer Circuits 2024 (add, clamp); Wang et al., "Beyond
           Prompt Engineering: Robust Behavior Control in LLMs via Steering Target Atoms", ACL 2025, arXiv 2505.20322
Implements add: h + s sum of d_f W_dec[f] over the chosen features, d_f the difference of their mean activations between
           the sides; clamp: h + s (c_f - a_f(h)) W_dec[f], c_f the largest activation on the positive side; sta, of
           the second paper (Sec. 3.2): the sum over all features whose differences in activation and in frequency have
           one sign and are both among the largest
Departs    Features are chosen by the contrast pairs, by the difference of their mean activations, unless named
Needs      Contrast pairs; a dictionary trained on the same model and layer, see :mod:`errata.stats.dictionaries`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.steer import SteerEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.stats.dictionaries import Dictionary, read_dictionary
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.SteerConfig):
    """Settings of feature steering."""

    layers: tuple[int, ...] | None = None
    """The one block that the dictionary is of, whose output is steered. None: the one at half the depth."""
    dictionary: str | None = None
    """File of the dictionary (.safetensors with W_enc, W_dec, b_enc, and optionally b_dec and threshold). Needed."""
    how: Literal["add", "clamp", "sta"] = "add"
    """What is done with features."""
    features: tuple[int, ...] | None = None
    """Numbers of the features to add or clamp. None: the ``most`` that differ most between the sides."""
    most: int = 1
    """How many features are chosen."""
    atoms: float = 0.35
    """Of sta: share of the features that is kept by each measure (paper: 0.35)."""
    subtract: bool = False
    """Whether b_dec is subtracted from states before they are encoded, as some dictionaries are trained."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = [*super().problems(), *positive(self, "most")]
        if not 0 < self.atoms <= 1:
            wrong.append(f"atoms: expected a share above 0, found {self.atoms}")
        if self.layers is not None and len(self.layers) != 1:
            wrong.append(f"layers: a dictionary is of one layer, found {list(self.layers)}")
        return wrong


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the features as a vector, or as what clamps them."""
    steps = _steering.start("sae", host, requests, config, work, 0.5)
    if config.dictionary is None:
        raise ConfigError("sae needs a dictionary of the layer's features: --set dictionary=FILE.safetensors")
    book = read_dictionary(config.dictionary, host.layout.width)
    wrong = [one for one in config.features or () if not 0 <= one < book.features]
    if wrong:
        raise ConfigError(f"sae: feature {wrong[0]} does not exist: {book.name} has 0 to {book.features - 1}")
    bias = book.bias - book.encoder @ book.centre if config.subtract else book.bias
    module = steps.block(steps.layers[0])
    one, _, other, _ = steps.tokens([module], "all")[module]
    sides = [steering.activations(h.float(), book.encoder, bias, book.threshold) for h in (one, other)]
    difference = sides[0].mean(0) - sides[1].mean(0)
    if config.how == "sta":
        first, second = [(side > 0).float().mean(0) for side in sides]
        chosen = _atoms(difference, first, second, config.atoms)
    else:
        largest = difference.topk(min(config.most, book.features)).indices
        chosen = largest if config.features is None else torch.tensor(config.features)
    if config.how == "clamp":
        site = steps.site(module, "features", _clamp(book, bias, chosen, sides[0]))
    else:
        values = difference[chosen] @ book.decoder[chosen]
        if not float(values.norm()) > 0:
            raise ConfigError(
                "sae: no feature differs between the two sides; name features, or use other pairs"
            )
        site = steps.site(module, "vector", {"values": values[None]})
    shown = chosen.tolist()[:50]
    return steps.edit(
        [site], dictionary=book.name, features=shown, of=len(chosen),
        differences=[_steering.rounded(float(difference[i])) for i in shown],
    )  # fmt: skip


def _clamp(book: Dictionary, bias: Tensor, chosen: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Return what sets features ``[r]`` to their largest activation on the positive side ``[n, f]``."""
    return {
        "encoder": book.encoder[chosen], "bias": bias[chosen], "threshold": book.threshold[chosen],
        "decoder": book.decoder[chosen], "target": active[:, chosen].amax(0),
    }  # fmt: skip


def _atoms(difference: Tensor, positive_share: Tensor, negative_share: Tensor, keep: float) -> Tensor:
    """Return the features ``[r]`` that STA keeps, by differences of activation and of frequency ``[f]``."""
    frequency = positive_share - negative_share
    most = max(1, round(keep * len(difference)))
    by_size, by_share = (set(values.abs().topk(most).indices.tolist()) for values in (difference, frequency))
    same = (difference * frequency > 0).nonzero()[:, 0].tolist()
    return torch.tensor([f for f in same if f in by_size and f in by_share], dtype=torch.long)


METHOD = Method(
    name="sae",
    title="SAE features",
    paper="Scaling Monosemanticity, Transformer Circuits 2024; STA: ACL 2025, arXiv 2505.20322",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
