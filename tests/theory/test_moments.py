"""Second moments: exact sums by half the work, an honest error, and what is read off the result."""

from __future__ import annotations

import math

import pytest
import torch

from errata.linalg import moments as maths
from errata.linalg.moments import BLOCK, CHUNK, Moments, condition, eigen, full_precision

WIDE = 2 * BLOCK + 37


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(*batches: torch.Tensor) -> Moments:
    moments = Moments.empty(batches[0].shape[1])
    for batch in batches:
        moments.update_(batch)
    return moments


def spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Make a symmetric matrix with given eigenvalues."""
    turn = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = turn @ torch.diag(values) @ turn.mT
    return (matrix + matrix.mT) / 2


@pytest.mark.parametrize("width", [5, BLOCK, BLOCK + 1, WIDE])
def test_block_columns_give_the_whole_symmetric_sum(width):
    data = normal(300, width)
    moments = streamed(*data.split([7, 200, 1, 92]))
    torch.testing.assert_close(moments.second, data.mT @ data / 300, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.mean, data.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(moments.second, moments.second.mT)
    assert moments.count == 300


def test_only_the_blocks_on_and_below_the_diagonal_are_held():
    blocks = 8
    held = sum(column.numel() for column in Moments.empty(blocks * BLOCK).columns)
    assert held == BLOCK**2 * blocks * (blocks + 1) // 2


def test_an_update_multiplies_about_half_of_what_the_whole_product_would(monkeypatch):
    done = []
    real = torch.Tensor.__matmul__

    def counting(a, b):
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting)
    width = 8 * BLOCK
    Moments.empty(width).update_(torch.ones(4, width))
    assert sum(done) == 4 * width**2 * (1 + 1 / 8) / 2


def test_float32_vectors_lose_no_digits_over_long_sums():
    """Keys with a large mean, as real ones: a float32 sum drifts, the streamed one does not."""
    data = (normal(60 * CHUNK, 6, seed=1) + 30).float()
    exact = data.double().mT @ data.double() / len(data)
    made = streamed(*data.split(3 * CHUNK + 5)).second
    plain = torch.zeros(6, 6)
    for row in data.split(64):
        plain += row.mT @ row
    assert float((made - exact).norm() / exact.norm()) < 2e-7
    assert float((plain.double() / len(data) - exact).norm() / exact.norm()) > 5e-7


def test_sixteen_bit_vectors_are_summed_in_float32():
    data = (normal(400, 6) * 300).to(torch.float16)  # their squares are beyond float16
    made = streamed(data).second
    exact = data.double().mT @ data.double() / 400
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=exact.abs().max().item() * 1e-6)


# --- the remaining error ------------------------------------------------------------------------


def keys(rows: int, length: int, seed: int, shared: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of vectors alike within a row, around a mean; and their true second moment."""
    m = 24
    mean = 0.7 * normal(m, seed=900)
    tokens, texts = normal(m, m, seed=901) / m**0.5, shared * normal(m, m, seed=902) / m**0.5
    own = normal(rows, length, m, seed=2 * seed) @ tokens
    common = normal(rows, 1, m, seed=2 * seed + 1) @ texts
    true = torch.outer(mean, mean) + tokens.mT @ tokens + texts.mT @ texts
    return mean + own + common, true


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("shared", "length"), [(0.0, 32), (1.0, 32), (1.0, 128)])
def test_the_estimate_is_the_true_error(seed, shared, length):
    rows = 40 * CHUNK // length
    data, true = keys(rows, length, seed, shared)
    moments = streamed(*data.reshape(-1, 24).split(2 * CHUNK))
    error = float((moments.second - true).norm() / true.norm())
    estimate = moments.remaining_error()
    assert estimate is not None and 1 / 1.5 < estimate / error < 1.5
    if shared:
        # taking every vector for independent would promise far too much
        size = data.reshape(-1, 24).square().sum(1).square().mean() - moments.second.square().sum()
        alone = float((size / moments.count).sqrt() / true.norm())
        assert alone < error / 1.5


def test_the_estimate_does_not_depend_on_the_sizes_of_updates():
    data, _ = keys(40 * CHUNK // 32, 32, 3, 1.0)
    flat = data.reshape(-1, 24)
    even = streamed(*flat.split(CHUNK)).remaining_error()
    odd = streamed(
        *flat.split([CHUNK // 2, 3 * CHUNK, CHUNK] * 8 + [len(flat) - 36 * CHUNK])
    ).remaining_error()
    assert even is not None and odd == pytest.approx(even, rel=0.25)


def test_the_estimate_falls_as_the_root_of_the_tokens():
    data, _ = keys(128 * CHUNK // 64, 64, 5, 1.0)
    flat = data.reshape(-1, 24)
    few = streamed(flat[: 32 * CHUNK]).remaining_error()
    many = streamed(*flat.split(CHUNK)).remaining_error()
    assert few is not None and many is not None and few / many == pytest.approx(2, rel=0.25)


def test_no_estimate_where_there_is_nothing_to_compare():
    assert Moments.empty(4).remaining_error() is None
    assert streamed(normal(9, 4)).remaining_error() is None
    same = normal(1, 4).expand(9, 4)
    assert streamed(same, same, same).remaining_error() == pytest.approx(0, abs=1e-6)


# --- what is read off -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, BLOCK + 10])
def test_effective_rank_is_that_of_the_eigenvalues(width):
    data = normal(3 * width, width) * torch.linspace(0.1, 2, width, dtype=torch.float64)
    moments = streamed(data)
    values = torch.linalg.eigvalsh(moments.second)
    assert moments.effective_rank == pytest.approx(
        float(values.sum() ** 2 / values.square().sum()), rel=1e-10
    )
    line = streamed(normal(50, 1) * normal(1, width))
    assert line.effective_rank == pytest.approx(1)
    assert streamed(torch.eye(width, dtype=torch.float64)).effective_rank == pytest.approx(width)
    assert Moments.empty(width).effective_rank == 0


@pytest.mark.parametrize("decades", [0, 2, 5, 9])
@pytest.mark.parametrize("width", [3, 60, 200])
def test_condition_is_within_a_few_per_cent_and_never_above(width, decades):
    matrix = spectrum(10 ** torch.linspace(-decades, 0, width, dtype=torch.float64))
    values = torch.linalg.eigvalsh(matrix)
    true = float(values[-1] / values[0])
    assert 0.95 * true < condition(matrix) < true * (1 + 1e-5)


def test_fewer_vectors_than_entries_are_singular():
    assert condition(streamed(normal(59, 60)).second) == math.inf
    assert condition(torch.zeros(4, 4)) == math.inf
    assert math.isfinite(condition(streamed(normal(120, 60)).second))


def test_eigen_restores_the_matrix_with_orthonormal_vectors():
    matrix = spectrum(10 ** torch.linspace(-6, 0, 150, dtype=torch.float64))
    made = eigen(matrix.float())
    assert made.values.dtype == made.vectors.dtype == torch.float64
    assert (made.values.diff() >= 0).all()
    torch.testing.assert_close(
        made.vectors @ torch.diag(made.values) @ made.vectors.mT,
        (matrix.float().double() + matrix.float().double().mT) / 2, rtol=1e-12, atol=1e-13,
    )  # fmt: skip
    eye = torch.eye(150, dtype=torch.float64)
    assert float((made.vectors.mT @ made.vectors - eye).norm()) < 1e-11


# --- precision of products ------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", ["ieee", "tf32", "none"])
def test_reduced_precision_is_off_inside_and_as_before_outside(allowed):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one switch only")
    before = matmul.fp32_precision
    matmul.fp32_precision = allowed
    try:
        with pytest.raises(RuntimeError, match="inside"), full_precision():
            assert matmul.fp32_precision == "ieee"
            raise RuntimeError("inside")
        assert matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before


def test_the_older_switch_is_served_too(monkeypatch):
    class Older:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Older())
    with full_precision():
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is True


def test_products_are_made_inside(monkeypatch):
    inside = []
    real = maths.Moments._add_
    matmul = torch.backends.cuda.matmul

    def noting(self, chunk):
        inside.append(getattr(matmul, "fp32_precision", matmul.allow_tf32))
        return real(self, chunk)

    monkeypatch.setattr(maths.Moments, "_add_", noting)
    streamed(normal(4, 3).float())
    assert inside in (["ieee"], [False])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_no_tf32_on_cuda():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        data = normal(CHUNK, 64).float()
        made = streamed(data.cuda()).second.cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = data.double().mT @ data.double() / CHUNK
    assert float((made - exact).norm() / exact.norm()) < 1e-6
