"""errata model: what can be edited in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.layout import Site


def command(
    model: Annotated[str, typer.Argument(help="lab, a hub name, or a folder with a saved model.")],
    json: common.Json = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
) -> None:
    """Show a model's layout as found by structure: its layers and the sites that can be edited."""
    host = common.open_host(model, device, dtype)
    layout = host.layout
    sites = [
        {"layer": s.layer, "part": s.part, "name": s.name, "d_in": s.d_in, "d_out": s.d_out,
         "stored": _stored(s), "experts": s.experts}
        for s in sorted(layout.sites, key=lambda s: (s.layer, s.part))
    ]  # fmt: skip
    facts = {
        "model": host.name,
        "family": host.family,
        "fingerprint": host.fingerprint,
        "parameters": sum(p.numel() for p in host.model.parameters()),
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": str(host.device),
        "layers": len(layout.blocks),
        "width": layout.width,
        "window": host.window,
        "feed_forward_adds_directly": layout.adds_directly,
        "refused": layout.refused,
        "sites": sites,
    }
    if json:
        common.emit(facts)
        return
    print(
        f"{facts['model']}: {facts['family']}, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"{facts['layers']} layers of width {facts['width']}, {facts['dtype']} on {facts['device']}, "
        f"fingerprint {facts['fingerprint']}"
    )
    if not layout.adds_directly:
        print("the feed-forward output is normalised before it is added to the residual stream")
    rows = [(s["layer"], s["part"], s["name"], s["d_in"], s["d_out"], s["stored"]) for s in sites]
    common.table("editable sites", ("layer", "part", "module", "d_in", "d_out", "stored"), rows, right=(3, 4))
    if layout.refused:
        print(f"not editable: {layout.refused}")


def _stored(site: Site) -> str:
    """Word how a site's weight is stored."""
    if site.experts:
        m = site.d_in // site.experts
        return f"[{site.experts}, {m}, d_out]" if site.transposed else f"[{site.experts}, d_out, {m}]"
    return "[d_in, d_out]" if site.transposed else "[d_out, d_in]"


VERB = Verb("model", command, order=110)
