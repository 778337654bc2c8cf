"""UltraEdit: one ridge regression from inputs to normalised gradients; no search, no subject, no corpus.

Paper      Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language
           Models", 2025, arXiv 2505.14679
Implements One turn per fit. At the tokens that predict the answers, every edited map has inputs h and
           loss gradients g at its output. Running means and deviations of (h, g), one set per weight
           shape, updated from turn to turn, give (h^, g^) and pseudo-values v = -eta ||h^||^2 g^; with rows
           stacked, delta^T = (H^T H + I)^-1 H^T V. Normalised as in the authors' code: by statistics that
           include this turn, over all modules of a shape
Departs    Statistics are merged exactly, with the unbiased variance. The authors' code weights a batch's
           variance by its size B instead of B - 1, and one batch of a single token makes all later ones
           NaN; its lower bound of the deviation is absolute, here it is the rounding error of the mean. The
           loss is summed over tokens, not averaged over a micro-batch: no row depends on its batch, and the
           common factor cancels in the normalisation. ``statistics`` and ``reduction`` select the code's forms.
           A single first request is not centred, and its step is larger: see ``centre``, ``eta``.
           eta and the ridge are relative (``scale``): ||h^||^2 is about the input width a and g^ about 1
           per entry, so the plain eta is the shift of an output entry over a, in that output's own unit.
           Here eta = 1 changes the output at h by as much as W's output for a random input of that norm:
           a single token has ||delta|| = eta ||W|| / sqrt(a). H^T H has the squared
           norm of the inputs, and so has the ridge.
           Solved in the dual where there are fewer tokens than input dimensions.
Needs      Gradients: one forward and one backward pass. The first turn should have several requests:
           centring a few vectors removes what they share, see ``centre``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import Delta, WeightEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.linalg.running import RESOLUTION, Running
from errata.linalg.solve import CostMatrix, update, update_primal
from errata.locate.gradients import Pairs, collect, selected_maps
from errata.methods._method import Method, Shape, Workspace, check_requests, notes, provenance, resolve_layers
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of UltraEdit."""

    modules: tuple[str, ...] | None = None
    """None: published for known models, else mlp_out. Linear maps to edit: mlp_in and mlp_out, the
    feed-forward's into and out of its hidden layer, mlp, both; or the end of a path inside a block.
    ``name@first-last`` sets the layers of one (paper's code: mlp_out@18-26 for GPT-J and @29-30 for
    Mistral 7B; gate_proj@11-15 and up_proj@18-24 for Llama 3 8B; both @18-26 for Qwen2.5 7B)."""
    layers: tuple[int, ...] | None = None
    """Layers of modules without their own. None: the upper half of the depth."""
    eta: float | None = None
    """Step, in the unit of ``scale``. None: 0.7 for one request without earlier turns, else 0.4 (both chosen on the
    lab), or 1e-6 as published (paper's code: 1e-6)."""
    ridge: float | None = None
    """Ridge of the regression, in the unit of ``scale``. None: 0.03, or 1 as published."""
    scale: Literal["weight", "published"] = "weight"
    """Units. ``weight``: eta in ||W|| / sqrt(a) of change per token, ridge in mean squared norms of the inputs;
    ``published``: both plain (1e-6 suits models as wide as the paper's; in others it may have no effect)."""
    centre: bool | None = None
    """Whether to subtract the running mean (paper: yes). If not, (h, g) are divided by their root mean squares.
    None: no for one request without earlier turns, unless ``scale`` is published, because the mean of its few
    tokens is most of their signal; else yes."""
    token: Literal["answer", "all"] = "answer"
    """Tokens that give rows: those that predict the answer, or all (paper's code: answer; EasyEdit: all)."""
    statistics: Literal["exact", "published"] = "exact"
    """How the running variance is updated: exactly; or as in the code, per micro-batch and module,
    with its variance weighted by its size B instead of B - 1, and 1.2e-7 added to every deviation."""
    reduction: Literal["sum", "mean"] = "sum"
    """Loss whose gradients are taken: the sum over the answers' tokens, or their mean in each micro-batch (code)."""
    micro_batch: int = 10
    """Requests run at once (paper: 10); changes only rounding unless statistics or reduction follow the code."""
    normaliser_batch: int = 128
    """Tokens normalised at once (paper: 128); does not change the result."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "eta", "ridge", "micro_batch", "normaliser_batch")
        if self.modules == ():
            complaints.append("modules: expected at least one, found none")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit of one turn: all requests together, on the host in its present state."""
    check_requests("ultraedit", requests)
    single = len(requests) == 1 and work.after is None
    config, names = _resolve(host, config, single)
    answers = [host.encode_answer(r.text, r.target) for r in requests]
    pairs = collect(
        host, answers, names, tokens=config.token, batch_size=work.batch_size or config.micro_batch,
        on_rows=lambda count: work.on_progress("gradients", count, len(answers)),
    )  # fmt: skip
    rows = [len(a.ids) - 1 if config.token == "all" else len(a.target) for a in answers]
    starts = range(0, len(answers), config.micro_batch)
    sizes = [sum(rows[i : i + config.micro_batch]) for i in starts]
    if config.reduction == "mean":
        counts = [sum(len(a.target) for a in answers[i : i + config.micro_batch]) for i in starts]
        shares = torch.cat([torch.full((size, 1), 1 / n) for size, n in zip(sizes, counts, strict=True)])
        pairs = {name: replace(p, gradients=p.gradients * shares) for name, p in pairs.items()}
    running = _running(pairs, sizes, work.after, config)
    deltas = {
        f"{name}.weight": _solve(pair, running[_shape(pair)], _weight_rms(host, name), config)
        for name, pair in pairs.items()
    }
    first_pair = next(iter(pairs.values()))
    facts = {"tokens": len(first_pair.inputs), "seen": max(r.count for r in running.values())}
    return WeightEdit(
        deltas,
        frozenset(f"{name}.weight" for name, pair in pairs.items() if pair.transposed),
        provenance("ultraedit", host, requests, config, work, **notes(facts)),
        state={
            f"{shape}.{part}": tensor
            for shape, statistics in running.items()
            for part, tensor in statistics.tensors(first_pair.gradients.dtype).items()
        },
    )


# --- which modules --------------------------------------------------------------------------


def _resolve(host: Host, config: Config, single: bool) -> tuple[Config, list[str]]:
    """Return the settings with unset ones filled in, and the paths of the modules, each once."""
    eta, ridge = (1e-6, 1.0) if config.scale == "published" else (0.7 if single else 0.4, 0.03)
    layers = config.layers
    modules = config.modules or METHOD.published_for(host).get("modules", ("mlp_out",))
    if any("@" not in entry for entry in modules):
        layers = resolve_layers(host, layers, lambda depth: tuple(range(depth // 2, depth)))
    resolved = replace(
        config,
        modules=modules,
        layers=layers,
        eta=eta if config.eta is None else config.eta,
        ridge=ridge if config.ridge is None else config.ridge,
        centre=not single or config.scale == "published" if config.centre is None else config.centre,
    )
    return resolved, selected_maps(host, modules, layers)


# --- the turn -------------------------------------------------------------------------------


def _shape(pair: Pairs) -> str:
    """Return the name of a module's statistics, which modules of one weight shape share."""
    return f"normaliser.{pair.inputs.shape[1]}x{pair.gradients.shape[1]}"


def _running(
    pairs: Mapping[str, Pairs], sizes: Sequence[int], after: WeightEdit | None, config: Config
) -> dict[str, Running]:
    """Return the statistics by weight shape, of earlier turns and this one; ``sizes``: rows of each micro-batch.

    Raises ConfigError for a single row where rows are centred.
    """
    running: dict[str, Running] = {}
    state = {} if after is None else after.state
    for pair in pairs.values():
        shape = _shape(pair)
        if shape not in running:
            tensors = {part: state[f"{shape}.{part}"] for part in Running.PARTS if f"{shape}.{part}" in state}
            width = pair.inputs.shape[1] + pair.gradients.shape[1]
            running[shape] = Running.restore(tensors) if tensors else Running.empty(width)
        if config.statistics == "exact":
            running[shape].update_(torch.cat([pair.inputs, pair.gradients], 1))
    if config.statistics == "published":
        _add_batches(pairs, sizes, running)
    for shape, statistics in running.items():
        if config.centre and statistics.count < 2:
            raise ConfigError(
                f"{shape}: a single token equals its mean, so centring leaves nothing; "
                "give more requests, edit more layers, or set centre=false"
            )
    return running


def _add_batches(pairs: Mapping[str, Pairs], sizes: Sequence[int], running: Mapping[str, Running]) -> None:
    """Add each micro-batch in turn, module after module, as in the authors' code."""
    if min(sizes) < 2:
        raise ConfigError("a micro-batch of one token has no variance in statistics=published; use exact")
    batches = {name: [t.split(list(sizes)) for t in (p.inputs, p.gradients)] for name, p in pairs.items()}
    for i in range(len(sizes)):
        for name, (inputs, gradients) in batches.items():
            running[_shape(pairs[name])].update_published_(torch.cat([inputs[i], gradients[i]], 1))


def _weight_rms(host: Host, name: str) -> float:
    """Return the root mean square of a weight's entries."""
    weight = host.model.get_submodule(name).weight.detach()
    return float(weight.to(torch.promote_types(weight.dtype, torch.float32)).norm()) / weight.numel() ** 0.5


def _solve(pair: Pairs, running: Running, weight_rms: float, config: Config) -> Delta:
    """Return the ridge regression of the pseudo-values V on the inputs H, in the smaller of primal and dual."""
    rows, width = pair.inputs.shape
    eta, ridge = config.eta, config.ridge
    assert eta is not None and ridge is not None
    if config.scale == "weight":
        energy = max(float(pair.inputs.double().square().sum(1).mean()), torch.finfo(torch.float32).tiny)
        eta, ridge = eta * weight_rms * energy**0.5 / width, ridge * energy
    values = torch.cat(list(_values(pair, running, eta, config)))  # [n, b]
    if rows >= width:
        penalty = ridge * torch.eye(width, dtype=torch.float64)
        return update_primal(pair.inputs.mT, values.mT, penalty, gamma=1.0).to(values.dtype)
    low_rank = update(pair.inputs.mT, values.mT, CostMatrix.identity(ridge), gamma=1.0)
    out = values.shape[1]
    return low_rank if rows * (width + out) < width * out else low_rank.dense()


def _values(pair: Pairs, running: Running, eta: float, config: Config) -> Iterator[Tensor]:
    """Yield v = -eta ||h^||^2 g^, ``[some, b]`` in the precision of g."""
    size, floor = config.normaliser_batch, RESOLUTION if config.statistics == "published" else None
    for h, g in zip(pair.inputs.split(size), pair.gradients.split(size), strict=True):
        normalised = running.normalise(torch.cat([h, g], 1), centre=config.centre is not False, floor=floor)
        inputs, gradients = normalised.tensor_split([h.shape[1]], 1)
        yield (-eta * inputs.square().sum(1, keepdim=True) * gradients).to(g.dtype)


METHOD = Method(
    name="ultraedit",
    title="UltraEdit",
    paper="UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models, 2025, "
    "arXiv 2505.14679",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    writes="linear",
    published={
        Shape("gptj", 28, 4096): {"modules": ("mlp_out@18-26",)},
        Shape("llama", 32, 4096): {"modules": ("gate_proj@11-15", "up_proj@18-24")},
        Shape("mistral", 32, 4096): {"modules": ("mlp_out@29-30",)},
        Shape("qwen2", 28, 3584): {"modules": ("gate_proj@18-26", "up_proj@18-26")},
    },
)
