"""Take a found edit off a checkpoint: an edit that projects its directions out of the weights."""

from __future__ import annotations

import torch

from errata.edits.deltas import Delta
from errata.edits.edit import Provenance, timestamp, versions
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host.host import Host
from errata.host.layout import stored_transposed
from errata.inspect.detect import LEAST_GAP, LEAST_SCORE, Detection, change_of, detect, differences, rounding
from errata.linalg.lowrank import LowRank, balance
from errata.linalg.spectra import Spectrum

METHOD = "detect"
"""What a reversal has in the place of a method's name."""


def reversal(host: Host, base: Host | None = None, found: Detection | None = None) -> WeightEdit:
    """Return an edit of a host that takes off what was found in its weights; the host is left as it was.

    With the base, each difference D is projected away, D - D V V^T = 0 on the right singular vectors V above rounding;
    what has full rank goes as a whole. Without it, the directions above the largest gap of each weight with a trace
    are: W - W V V^T, which also takes what the unedited weight had in them. ``found``: a detection without the base, so
    that it is not made again. Verify afterwards what the model still answers.

    Raises EditError where edits are in place (revert those), where nothing was found, and without the base where no
    weight with a trace has a gap of ``LEAST_GAP`` in its spectrum.
    """
    if host.edited:
        raise EditError(f"edits are in place on {host.name}: {', '.join(host.placed)}; revert them instead")
    deltas = _gaps(host, found or detect(host)) if base is None else _differences(host, base)
    transposed = frozenset(name for name, delta in deltas.items() if _turned(host, name, delta))
    ranks = {name: delta.rank if isinstance(delta, LowRank) else "full" for name, delta in deltas.items()}
    against = None if base is None else base.fingerprint
    provenance = Provenance(
        METHOD, (), {"kind": "reversal", "against": against, "ranks": ranks}, host.fingerprint, host.name,
        versions=versions(), notes={"dtype": str(host.dtype).removeprefix("torch.")}, created=timestamp(),
    )  # fmt: skip
    return WeightEdit(deltas, transposed, provenance)


def _differences(host: Host, base: Host) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    for name, before, delta in differences(host, base):
        change, spectrum = change_of(name, before, delta, rounding(host, base, name))
        turned = _turned(host, name, delta)
        thin = spectrum is not None and delta.ndim == 2 and change.rank * sum(delta.shape) < delta.numel()
        if thin and spectrum is not None:
            minus = _leading(spectrum, change.rank)
            deltas[name] = LowRank(minus.A.mT, minus.B.mT) if turned else minus
        else:
            whole = -delta.to(torch.promote_types(host.dtype, torch.float32))
            deltas[name] = whole.mT if turned else whole
    if not deltas:
        raise EditError(f"{host.name} has the weights of {base.name}: there is no edit to take off")
    return deltas


def _turned(host: Host, name: str, delta: Delta) -> bool:
    """Whether a change is of a matrix that is stored ``[d_in, d_out]``; a bias beside one has a single axis."""
    return len(delta.shape) == 2 and bool(
        stored_transposed(host.model.get_submodule(name.rpartition(".")[0]))
    )


def _gaps(host: Host, found: Detection) -> dict[str, Delta]:
    sites = {site.parameter: site for site in host.layout.sites}
    suspects = [one for one in found.traces if one.score >= LEAST_SCORE]
    chosen = [one for one in suspects if one.gap >= LEAST_GAP]
    if not chosen:
        reason = (
            f"the largest gap in the spectra of {len(suspects)} weights with a trace is below {LEAST_GAP}"
            if suspects else "no weight shows a trace"
        )  # fmt: skip
        raise EditError(f"nothing to take off {host.name} without its base: {reason}")
    return {
        one.weight: _leading(Spectrum.of(host.weight(sites[one.weight]).cpu()), one.drop) for one in chosen
    }


def _leading(spectrum: Spectrum, rank: int) -> LowRank:
    """Return minus the leading directions of a decomposed matrix, in float32."""
    outer = -spectrum.left[:, :rank] * spectrum.values[:rank]
    return balance(outer, spectrum.right[:rank]).to(torch.float32)
