"""Small classifiers of vectors, as probes: logistic regression, and a network with one hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Classifier:
    """Scores W x + b of each class."""

    weight: Tensor
    """``[classes, d]``."""
    bias: Tensor
    """``[classes]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the scores ``[n, classes]`` of vectors ``[n, d]``."""
        return x.to(self.weight) @ self.weight.mT + self.bias


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, *, ridge: float = 1e-3, steps: int = 60
) -> Classifier:
    """Return the logistic regression of labels, int64 ``[n]``, on vectors ``[n, d]``, by L-BFGS in float64.

    Fitted on standardised vectors; ``ridge``: half the weight of the squared coefficients there. Features that do not
    vary have coefficient 0.
    """
    mean, scale = _scales(x)
    standard = (x.double() - mean) / scale
    weight, bias = standard.new_zeros(classes, x.shape[1]), standard.new_zeros(classes)

    def loss(parts: Sequence[Tensor]) -> Tensor:
        scores = standard @ parts[0].mT + parts[1]
        return functional.cross_entropy(scores, labels) + ridge / 2 * parts[0].square().sum()

    weight, bias = _minimise(loss, (weight, bias), steps)
    weight = weight / scale
    return Classifier(weight, bias - weight @ mean)


def fit_network(
    x: Tensor, labels: Tensor, classes: int, *, hidden: int = 64, ridge: float = 1e-3, steps: int = 60, seed: int = 0
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Return what gives the scores ``[n, classes]`` of a network with one hidden layer of ReLUs.

    Fitted on x ``[n, d]`` and its labels ``[n]`` as :func:`fit_logistic` is.
    Its first weights come from ``seed``; float32, which is enough to classify by.
    """
    mean, scale = _scales(x)
    standard = ((x.double() - mean) / scale).float()
    generator = torch.Generator().manual_seed(seed)
    width = x.shape[1]
    start = (
        torch.randn(hidden, width, generator=generator) / width**0.5, torch.zeros(hidden),
        torch.randn(classes, hidden, generator=generator) / hidden**0.5, torch.zeros(classes),
    )  # fmt: skip

    def scores(parts: Sequence[Tensor], values: Tensor) -> Tensor:
        return functional.relu(values @ parts[0].mT + parts[1]) @ parts[2].mT + parts[3]

    def loss(parts: Sequence[Tensor]) -> Tensor:
        penalty = parts[0].square().sum() + parts[2].square().sum()
        return functional.cross_entropy(scores(parts, standard), labels) + ridge / 2 * penalty

    fitted = _minimise(loss, start, steps)
    return lambda values: scores(fitted, ((values.double() - mean) / scale).float())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest score ``[n, classes]`` is the label's, int64 ``[n]``."""
    return float((scores.argmax(-1) == labels).double().mean())


def _scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature ``[d]``, infinite where it does not vary."""
    x = x.double()
    scale = x.std(0, correction=0)
    still = scale <= 1e-9 * scale.max().clamp_min(torch.finfo(scale.dtype).tiny)
    return x.mean(0), scale.masked_fill(still, torch.inf)


def _minimise(
    loss: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor], steps: int
) -> list[Tensor]:  # fmt: skip
    """Return tensors that minimise a loss, by L-BFGS with a line search; gradients are recorded whatever is around."""
    with torch.inference_mode(False), torch.enable_grad():
        parts = [tensor.clone().requires_grad_() for tensor in start]
        optimiser = torch.optim.LBFGS(
            parts, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6, tolerance_change=1e-10
        )

        def closure() -> Tensor:
            gradients = torch.autograd.grad(value := loss(parts), parts)
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
            return value

        optimiser.step(closure)  # type: ignore[arg-type]  # annotated as giving a number
    return [part.detach() for part in parts]
