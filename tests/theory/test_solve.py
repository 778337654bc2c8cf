"""The closed-form updates against their defining properties, in float64."""

from __future__ import annotations

import pytest
import torch

from errata.linalg.lowrank import LowRank
from errata.linalg.moments import Moments
from errata.linalg.solve import CostMatrix, leverage, update, update_primal

D, M, N = 7, 12, 4


def problem(seed: int = 0, n: int = N):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(M, n, generator=g, dtype=torch.float64)
    residuals = torch.randn(D, n, generator=g, dtype=torch.float64)
    root = torch.randn(M, 3 * M, generator=g, dtype=torch.float64)
    return keys, residuals, root @ root.mT / (3 * M)


def exact(matrix: torch.Tensor, weight: float = 1.0) -> CostMatrix:
    return CostMatrix.of(matrix, weight=weight, ridge=0.0)


def test_one_key_without_slack_is_hit_exactly():
    keys, residuals, moment = problem(n=1)
    delta = update(keys, residuals, exact(moment), gamma=0.0)
    torch.testing.assert_close(delta @ keys, residuals, atol=1e-12, rtol=0)
    assert delta.rank == 1


def test_many_keys_without_slack_are_all_hit_exactly():
    keys, residuals, moment = problem()
    delta = update(keys, residuals, exact(moment), gamma=0.0)
    torch.testing.assert_close(delta @ keys, residuals, atol=1e-10, rtol=0)


def test_no_smaller_change_hits_the_same_values():
    """ROME's optimality: among all deltas with delta K = R, the least tr(delta C delta^T)."""
    keys, residuals, moment = problem()
    best = update(keys, residuals, exact(moment), gamma=0.0).dense()
    cost = torch.trace(best @ moment @ best.mT)
    complement = torch.eye(M, dtype=torch.float64) - keys @ torch.linalg.pinv(keys)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        other = best + 0.3 * torch.randn(D, M, generator=g, dtype=torch.float64) @ complement
        torch.testing.assert_close(other @ keys, residuals, atol=1e-9, rtol=0)
        assert torch.trace(other @ moment @ other.mT) > cost


def test_dual_equals_primal():
    keys, residuals, moment = problem()
    for weight in (0.1, 1.0, 15_000.0):
        dual = update(keys, residuals, exact(moment, weight), gamma=1.0).dense()
        primal = update_primal(keys, residuals, weight * moment, gamma=1.0)
        torch.testing.assert_close(dual, primal, atol=1e-12, rtol=1e-9)


def test_memit_equals_brute_force_ridge():
    """Stack sqrt(lambda C) with target 0 under the keys and solve ordinary least squares."""
    keys, residuals, moment = problem()
    weight = 3.0
    root = torch.linalg.cholesky(weight * moment)  # root root^T = lambda C
    left = torch.cat([keys, root], 1)  # [m, n + m]
    right = torch.cat([residuals, torch.zeros(D, M, dtype=torch.float64)], 1)
    brute = torch.linalg.lstsq(left.mT, right.mT).solution.mT
    made = update(keys, residuals, exact(moment, weight), gamma=1.0).dense()
    torch.testing.assert_close(made, brute, atol=1e-10, rtol=1e-8)


def test_memit_gradient_vanishes_only_at_the_solution():
    keys, residuals, moment = problem()

    def gradient(delta: torch.Tensor) -> torch.Tensor:
        delta = delta.clone().requires_grad_(True)
        loss = (delta @ keys - residuals).square().sum() + 2.0 * torch.trace(delta @ moment @ delta.mT)
        return torch.autograd.grad(loss, delta)[0]

    made = update(keys, residuals, exact(moment, 2.0), gamma=1.0).dense()
    assert gradient(made).abs().max() < 1e-10
    for wrong in (made * 1.01, update(keys, residuals, exact(moment, 2.2), gamma=1.0).dense()):
        assert gradient(wrong).abs().max() > 1e-3


def test_memit_tends_to_the_exact_fit_as_lambda_falls():
    keys, residuals, moment = problem()
    gaps = [
        (update(keys, residuals, exact(moment, w), gamma=1.0) @ keys - residuals).norm()
        for w in (10.0, 1.0, 0.1, 1e-6)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-4


def test_dependent_keys_need_slack():
    keys, residuals, moment = problem()
    keys = torch.cat([keys, keys[:, :1]], 1)
    residuals = torch.cat([residuals, residuals[:, :1]], 1)
    with pytest.raises(ValueError, match="gamma"):
        update(keys, residuals, CostMatrix.identity(), gamma=0.0)
    update(keys, residuals, exact(moment), gamma=1.0)


def test_weighting_a_metric_equals_making_it_weighted():
    keys, _, moment = problem()
    torch.testing.assert_close(exact(moment).weighted(7.0).solve(keys), exact(moment, 7.0).solve(keys))
    torch.testing.assert_close(leverage(keys, CostMatrix.identity()), keys.square().sum(0))


def test_ridge_makes_a_rank_deficient_moment_usable():
    few = torch.randn(M, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = CostMatrix.of(few @ few.mT)
    assert torch.isfinite(cost.solve(torch.eye(M, dtype=torch.float64))).all()


@pytest.mark.parametrize("rank", [3, 3 * M])
def test_overwriting_changes_the_diagonal_alone_and_gives_the_same_bits(rank):
    few = torch.randn(M, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = few @ few.mT
    kept, spent = matrix.clone(), matrix.clone()
    cost, same = CostMatrix.of(kept, ridge=1e-20), CostMatrix.of(spent, ridge=1e-20, overwrite=True)
    assert torch.equal(kept, matrix) and torch.equal(same.factor, cost.factor) and same.name == cost.name
    assert torch.equal(spent - spent.diagonal().diag(), matrix - matrix.diagonal().diag())


def test_streaming_moments_equal_batch_moments():
    data = torch.randn(50, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    streamed = Moments.empty(M)
    for part in data.split([7, 20, 1, 22]):
        streamed.update_(part)
    assert streamed.count == 50
    torch.testing.assert_close(streamed.second, data.mT @ data / 50)
    torch.testing.assert_close(streamed.mean, data.mean(0))


def test_low_rank_values_behave_like_their_products():
    g = torch.Generator().manual_seed(1)
    a = LowRank(torch.randn(D, 3, generator=g).double(), torch.randn(3, M, generator=g).double())
    b = LowRank(torch.randn(D, 2, generator=g).double(), torch.randn(2, M, generator=g).double())
    torch.testing.assert_close((a + b).dense(), a.dense() + b.dense())
    torch.testing.assert_close((2.0 * a).dense(), 2 * a.dense())
    assert a.norm() == pytest.approx(float(a.dense().norm()), rel=1e-12)
    cut, lost = (a + b).truncate(2)
    spectrum = torch.linalg.svdvals((a + b).dense()).square()
    assert lost == pytest.approx(float(spectrum[2:].sum() / spectrum.sum()), rel=1e-9)
    assert float((cut.dense() - (a + b).dense()).norm() ** 2) == pytest.approx(
        float(spectrum[2:].sum()), rel=1e-9
    )
    with pytest.raises(ValueError, match="factors"):
        LowRank(torch.zeros(2, 3), torch.zeros(2, 3))
