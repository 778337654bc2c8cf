"""Rewrite: make an image classifier treat one concept as another, by a low-rank change of one layer.

Paper      Santurkar et al., "Editing a Classifier by Rewriting Its Prediction Rules", NeurIPS 2021,
           arXiv 2112.01008
Implements Sec. 2: directions D from the masked keys of the changed images, whitened by the second moment
           C of the layer's inputs; then min || sqrt(mask) (f(k'; W) - f(k; W0)) ||_1 / n over those W that
           differ from W0 in the row space of D only, by Adam on W with a projection every few steps.
           f is the layer with the norm and activation that follow it
Departs    ``solve: closed``, not in the paper, fits only the layer's linear output, by least squares weighted by
           the mask. It weights keys like the directions, so it is ROME's equation, exact at r mixtures of
           keys (with ``direction: mean``, at the masked mean key).
           A convolution's key is the patch under its kernel, so the change has rank r. The authors' code
           uses the channels at a place instead, with independent changes at all taps of the kernel, rank
           r x taps: ``keys: channels``. For 1 x 1 kernels the two agree. For ResNets the authors' f extends
           to the end of the block, with its shortcut: set ``output`` to the block. C comes from the request's
           images, not a validation set, so it is shrunk.
Needs      Pairs of images with a mask; an image classifier, with batch norms in evaluation mode
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.image_sites import ImageSite, by_place
from errata.host.images import ImageHost
from errata.host.kinds import IMAGES
from errata.linalg.directions import least_squares, orthonormal, principal_directions, shrink, shrinkage_share
from errata.linalg.lowrank import balance
from errata.linalg.moments import Moments
from errata.methods._method import Method, Workspace, notes, provenance
from errata.types import ImageRequest, Request


@dataclass(frozen=True)
class Config:
    """Settings of rewrite."""

    layer: str | None = None
    """Linear or convolutional module to change. None: the last of the block at three quarters of the depth."""
    solve: Literal["projected", "closed"] = "projected"
    """Projected Adam on the layer's output after norm and activation, or one linear solve on the output before them."""
    rank: int = 1
    """Number of directions r (paper: 1)."""
    direction: Literal["principal", "mean"] = "principal"
    """Directions: the r principal components of the whitened masked keys, or their mean."""
    keys: Literal["patches", "channels"] = "patches"
    """Keys of a convolution: patches under the kernel, or channels at each place (paper's code: channels)."""
    output: str | None = None
    """Module whose output is matched. None: the layer with the norms and activations right after it
    (paper's code for ResNets: the whole block)."""
    scale: Literal["layer", "published"] = "layer"
    """Unit of the rate: the weight's root mean square over the root of a key's length, so that a step of 1 changes the
    layer's output by about its own size; or plain."""
    learning_rate: float = 0.05
    """Adam's rate, in the unit of ``scale`` (paper's code: 0.05, plain)."""
    steps: int = 500
    """Adam steps (paper's code: 2,001, in its notebooks 20,000)."""
    project_every: int = 10
    """Steps between projections; at 1 the search stays within the directions (paper's code: 10)."""
    shrinkage: float | None = None
    """Share of the second moment spread evenly over all directions, 0 to 1. None: m / (m + number of places), m the
    length of a key (paper's code: none, from a validation set)."""

    def problems(self) -> list[str]:
        """Check ranges and combinations."""
        complaints = positive(self, "rank", "learning_rate", "steps", "project_every")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            complaints.append(f"shrinkage: expected a share from 0 to 1, found {self.shrinkage}")
        if self.direction == "mean" and self.rank != 1:
            complaints.append(f"rank: expected 1 with direction: mean, found {self.rank}")
        if self.solve == "closed" and self.output is not None:
            complaints.append("output: expected none with solve: closed, which fits the layer's own output")
        return complaints


def fit(
    host: Host, requests: Sequence[Request | ImageRequest], config: Config, work: Workspace
) -> WeightEdit:
    """Return the edit of rank r at one layer under which the changed images give the originals' outputs."""
    classifier, request = _validate(host, requests)
    site = classifier.layout.by_name(config.layer) if config.layer else classifier.layout.default
    config = replace(config, layer=site.name)
    with hooks.frozen(classifier.model):
        task = _Task(classifier, site, request, config)
        moments = task.moments()
        share = shrinkage_share(moments) if config.shrinkage is None else config.shrinkage
        basis = _directions(task, moments, share)
        closed = config.solve == "closed"
        factor = _least_squares(task, basis) if closed else _projected_adam(task, basis, work)
        basis = basis.to(task.start.dtype)
        with torch.no_grad():
            loss = float(task.loss(factor @ basis))
    trace = {"loss_before": task.loss_before, "loss": loss, "places": int((task.weights > 0).sum())}
    record = provenance("rewrite", host, (), replace(config, shrinkage=share), work, **notes(trace))
    return WeightEdit(
        {site.parameter: balance(factor, basis)}, frozenset(), replace(record, requests=(request.record,))
    )


def _validate(host: Host, requests: Sequence[Request | ImageRequest]) -> tuple[ImageHost, ImageRequest]:
    if not isinstance(host, ImageHost):
        raise ConfigError(f"rewrite edits image classifiers, {host.name} is a language model ({host.family})")
    if len(requests) != 1:
        raise ConfigError(f"rewrite takes one request per fit, found {len(requests)}")
    request = requests[0]
    if not isinstance(request, ImageRequest):
        raise RequestError("rewrite takes pairs of images (errata.ImageRequest), found a text request")
    return host, request


class _Task:
    """The layer's inputs, outputs and target outputs for the images of each pair."""

    def __init__(self, host: ImageHost, site: ImageSite, request: ImageRequest, config: Config) -> None:
        self.host, self.site, self.request, self.config = host, site, request, config
        self.inputs, self.outputs = host.at(site, request.changed)
        self.target_outputs = host.at(site, request.original)[1]
        self.weights = host.mask_at(request.mask, self.outputs, site.part)  # [n, places of the output]
        wide = torch.promote_types(host.dtype, torch.float32)
        self.start = torch.zeros(site.d_out, site.d_in, dtype=wide, device=host.device)
        with torch.no_grad():
            target = self._outputs_after(None)
            self.root_mask = host.mask_at(request.mask, target, site.part).sqrt()[..., None]
            self.target = by_place(target, site.part).to(wide)
            self.loss_before = float(self.loss(self.start))
        if not self.loss_before > 0:
            raise RequestError(
                f"{config.output or site.name} has the same output for both images of each pair where the mask is set: "
                "there is nothing to rewrite; choose another layer or other pairs"
            )

    def _outputs_after(self, change: Tensor | None) -> Tensor:
        """Return f of the changed images after a change of the weight; None: of the originals without a change."""
        if self.config.output is not None:
            images = self.request.original if change is None else self.request.changed
            return self.host.through(self.config.output, images, self.site, change)
        if change is None:
            return self.host.follow(self.site, self.target_outputs)
        change_of_output = self.site.product(self.inputs, change)
        return self.host.follow(self.site, self.outputs + change_of_output.to(self.outputs.dtype))

    def loss(self, change: Tensor) -> Tensor:
        """Return || sqrt(mask) (f(k'; W0 + change) - f(k; W0)) ||_1 / n."""
        outputs = by_place(self._outputs_after(change), self.site.part).to(self.target.dtype)
        return (self.root_mask * (outputs - self.target).abs()).sum() / len(outputs)

    def _keys(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.start.dtype)
        return by_place(inputs, self.site.part) if self.config.keys == "channels" else self.site.keys(inputs)

    def masked_keys(self) -> tuple[Tensor, Tensor]:
        """Return the changed images' keys where the mask is set, ``[m, places]``, and the mask's values there."""
        weights = self.weights
        if self.config.keys == "channels":  # places of the input, which may outnumber the output's
            weights = self.host.mask_at(self.request.mask, self.inputs, self.site.part)
        in_mask = weights > 0
        return self._keys(self.inputs)[in_mask].mT.double(), weights[in_mask].double()

    def moments(self) -> Moments:
        """Return the second moment of the layer's inputs over the reference images."""
        images = self.request.original if self.request.reference is None else self.request.reference
        width = self.site.d_in // (self.site.taps if self.config.keys == "channels" else 1)
        moments = Moments.empty(width, self.host.device)
        for batch in images.split(4):  # patches take kernel times the memory
            moments.update_(self._keys(self.host.at(self.site, batch)[0]).flatten(0, 1))
        return moments


def _directions(task: _Task, moments: Moments, share: float) -> Tensor:
    """Return orthonormal rows ``[r, d_in]`` that span the change, float64; r x taps with channel keys."""
    config, (keys, weights) = task.config, task.masked_keys()
    try:
        cost = shrink(moments, share)
        if config.direction == "mean":
            basis = orthonormal(cost.solve(_mean(keys, weights)).mT)
        else:
            basis = principal_directions(keys, weights, cost, config.rank)
    except ValueError as error:
        raise RequestError(f"{task.site.name} cannot tell the masked places apart: {error}") from error
    if config.keys == "channels" and task.site.taps > 1:
        basis = torch.kron(basis, torch.eye(task.site.taps, dtype=basis.dtype, device=basis.device))
    return basis


def _mean(columns: Tensor, weights: Tensor) -> Tensor:
    return (columns @ weights / weights.sum())[:, None]


def _least_squares(task: _Task, basis: Tensor) -> Tensor:
    """Return the left factor ``[d_out, r]`` by least squares on the layer's linear output at the masked places."""
    masked = task.weights > 0
    weights = task.weights[masked].double()
    keys = task.site.keys(task.inputs.to(task.start.dtype))[masked].mT.double()
    residual = by_place(task.target_outputs.double() - task.outputs.double(), task.site.part)[masked].mT
    if task.config.direction == "mean":
        keys, residual, weights = _mean(keys, weights), _mean(residual, weights), weights.new_ones(1)
    return least_squares(basis @ (keys * weights), residual * weights).to(task.start.dtype)


def _projected_adam(task: _Task, basis: Tensor, work: Workspace) -> Tensor:
    """Return the left factor ``[d_out, r]`` by Adam on the whole weight, projected to the row space every few steps."""
    config, rows = task.config, basis.to(task.start.dtype)
    weight_rms = task.host.model.get_parameter(task.site.parameter).detach().float().square().mean().sqrt()
    unit = float(weight_rms) / task.site.d_in**0.5 if config.scale == "layer" else 1.0
    change = task.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([change], lr=config.learning_rate * unit)
    best, lowest_loss = None, task.loss_before
    for step in range(config.steps + 1):
        work.on_progress("rewrite", step, config.steps)
        projected = step % config.project_every == 0 or step == config.steps
        if projected:
            with torch.no_grad():
                change.copy_(change @ rows.mT @ rows)
        loss = task.loss(change)
        if not loss.requires_grad:
            raise ConfigError(f"output {config.output!r} does not depend on layer {config.layer!r}")
        if projected and loss.item() < lowest_loss:
            best, lowest_loss = change.detach().clone(), loss.item()
        if step < config.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if best is None:
        reason = f"no step lowered the loss from {task.loss_before:.4g} at rate {config.learning_rate}"
        raise ConfigError(f"rewrite: {reason}; try another learning_rate, project_every: 1, or solve: closed")
    return best @ rows.mT


METHOD = Method(
    name="rewrite",
    title="Rewrite",
    paper="Editing a Classifier by Rewriting Its Prediction Rules, NeurIPS 2021, arXiv 2112.01008",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=False,
    sequential=True,
    needs=("gradients",),
    hosts=(IMAGES,),
)
