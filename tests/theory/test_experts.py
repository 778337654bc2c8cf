"""Stacked experts by the one formula: block keys, one n x n solve, a cost that is block-diagonal."""

from __future__ import annotations

import pytest
import torch

from errata.linalg.block_moments import BlockMoments
from errata.linalg.moments import Moments, eigen
from errata.linalg.solve import CostMatrix, update, update_primal

D, E, M, N, K = 5, 4, 6, 7, 2


def block_keys(n: int = N, seed: int = 0) -> torch.Tensor:
    """Keys ``[E M, n]``: K experts of E for each, gate-weighted, the other blocks zero."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.zeros(n, E, M, dtype=torch.float64)
    for i in range(n):
        chosen = torch.randperm(E, generator=g)[:K]
        gates = torch.rand(K, generator=g, dtype=torch.float64).softmax(0)
        keys[i, chosen] = gates[:, None] * torch.randn(K, M, generator=g, dtype=torch.float64)
    return keys.flatten(1).mT


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    residuals = torch.randn(D, N, generator=g, dtype=torch.float64)
    roots = torch.randn(E, M, 3 * M, generator=g, dtype=torch.float64)
    return block_keys(), residuals, roots @ roots.mT / (3 * M)


def cost(blocks: torch.Tensor, weight: float = 1.0) -> CostMatrix:
    return CostMatrix.of(blocks, weight=weight, ridge=0.0)


@pytest.mark.parametrize("weight", [0.1, 1.0, 100.0])
def test_the_block_solve_is_ridge_regression_over_all_experts_side_by_side(weight: float):
    keys, residuals, blocks = problem()
    dual = update(keys, residuals, cost(blocks, weight), gamma=1.0).dense()
    whole = weight * torch.block_diag(*blocks)
    brute = residuals @ keys.mT @ torch.linalg.inv(whole + keys @ keys.mT)
    torch.testing.assert_close(dual, brute, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(dual, update_primal(keys, residuals, whole, gamma=1.0), atol=1e-12, rtol=1e-9)


def test_block_coordinate_descent_arrives_at_the_same_change():
    """Solving for one expert at a time, the others fixed, as published for mixtures, over and over."""
    keys, residuals, blocks = problem()
    one_solve = update(keys, residuals, cost(blocks), gamma=1.0).dense().unflatten(1, (E, M))
    parts, change = keys.unflatten(0, (E, M)), torch.zeros(D, E, M, dtype=torch.float64)
    gaps = []
    for _ in range(60):
        for e in range(E):
            rest = residuals - torch.einsum("dem,emn->dn", change, parts) + change[:, e] @ parts[e]
            change[:, e] = rest @ parts[e].mT @ torch.linalg.inv(blocks[e] + parts[e] @ parts[e].mT)
        gaps.append(float((change - one_solve).abs().max()))
    assert gaps[0] > 1e-3 and gaps[-1] < 1e-10


def test_experts_that_no_key_takes_are_not_changed():
    keys, residuals, blocks = problem()
    keys = keys.unflatten(0, (E, M)).clone()
    keys[2] = 0
    change = update(keys.flatten(0, 1), residuals, cost(blocks), gamma=1.0).dense().unflatten(1, (E, M))
    assert not change[:, 2].any() and change[:, [0, 1, 3]].abs().amax((0, 2)).min() > 0


def test_a_block_diagonal_cost_does_all_that_the_whole_matrix_does():
    keys, residuals, blocks = problem()
    block, whole = cost(blocks, 3.0), CostMatrix.of(torch.block_diag(*blocks), weight=3.0, ridge=0.0)
    torch.testing.assert_close(block.solve(keys), whole.solve(keys), atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(block.dense(), whole.dense(), atol=1e-12, rtol=1e-9)
    delta = update(keys, residuals, block, gamma=1.0)
    assert block.energy(delta) == pytest.approx(whole.energy(delta), rel=1e-9)
    for transposed in (False, True):
        ours, theirs = (one.whiten(keys, transposed=transposed) for one in (block, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
    some = torch.tensor([1, 4, 9, 20])
    torch.testing.assert_close(
        block.only(some).solve(keys[some]), whole.only(some).solve(keys[some]), atol=1e-9, rtol=0
    )


def test_the_null_space_of_each_expert_is_that_of_the_whole():
    keys, _, blocks = problem()
    pairs, whole = eigen(blocks), eigen(torch.block_diag(*blocks))
    bound = float(whole.values[len(whole.values) // 2])
    block = CostMatrix.within(pairs.values, pairs.vectors, below=bound, cost=2.0)
    reference = CostMatrix.within(whole.values, whole.vectors, below=bound, cost=2.0)
    torch.testing.assert_close(block.solve(keys), reference.solve(keys), atol=1e-10, rtol=0)
    penalised = CostMatrix.of_eigen(pairs.values, pairs.vectors, weight=2.0, add=0.3, ridge=0.0)
    plain = CostMatrix.of_eigen(whole.values, whole.vectors, weight=2.0, add=0.3, ridge=0.0)
    torch.testing.assert_close(penalised.solve(keys), plain.solve(keys), atol=1e-10, rtol=0)


def test_moments_by_block_are_means_over_all_vectors():
    vectors = block_keys(400).mT
    moments = BlockMoments.empty(E, M)
    for part in vectors.split(150):
        moments.update_(part)
    expected = torch.einsum("tei,tej->eij", *[vectors.unflatten(1, (E, M))] * 2) / 400
    torch.testing.assert_close(moments.second, expected, atol=1e-12, rtol=0)
    assert moments.count == 400 and float(moments.shares.sum()) == pytest.approx(K)
    whole = torch.block_diag(*expected)
    rank = float(whole.trace() ** 2 / whole.square().sum())
    assert moments.effective_rank == pytest.approx(rank, rel=1e-6)
    error = moments.remaining_error()
    assert error is not None and 0 < error < 1


def test_an_expert_that_was_hardly_seen_counts_as_used_like_the_others():
    vectors = block_keys(200).mT.unflatten(1, (E, M)).clone()
    vectors[1:, 3] = 0  # one token of two hundred, at most
    moments = BlockMoments.empty(E, M)
    moments.update_(vectors.flatten(1))
    own = [block.second * block.count / 200 for block in moments.blocks]
    share = moments.blocks[3].count / M
    expected = share * own[3] + (1 - share) * torch.stack(own).mean(0)
    torch.testing.assert_close(moments.second[3], expected)
    torch.testing.assert_close(moments.second[0], own[0])
    assert CostMatrix.of(moments.second).blocks == E
    assert isinstance(moments.blocks[0], Moments)
