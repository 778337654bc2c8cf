"""Cells of vectors: a partition, searched to the same end as comparing all, and built from the vectors alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from errata.linalg import cells as module
from errata.linalg.cells import Cells


def drawn(count: int, width: int = 16, seed: int = 0, centres: int = 40):
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(centres, width, generator=generator)
    chosen = torch.randint(centres, (count,), generator=generator)
    return functional.normalize(around[chosen] + 0.5 * torch.randn(count, width, generator=generator), dim=1)


@pytest.mark.parametrize("distance", [False, True])
def test_every_vector_is_in_one_cell_near_its_centre(distance):
    vectors = drawn(20_000) * (1 if not distance else 3)
    cells = Cells.of(vectors, distance=distance)
    assert cells.numbers.sort().values.tolist() == list(range(20_000))
    assert torch.equal(cells.vectors, vectors[cells.numbers])
    assert cells.starts[0] == 0 and cells.starts[-1] == 20_000
    assert len(cells.starts) == len(cells.centres) + 1 and min(torch.tensor(cells.starts).diff()) > 0
    own = torch.repeat_interleave(torch.arange(len(cells.centres)), torch.tensor(cells.starts).diff())
    if distance:
        nearest = torch.cdist(cells.vectors, cells.centres).argmin(1)
    else:
        nearest = (cells.vectors @ cells.centres.mT).argmax(1)
        torch.testing.assert_close(cells.centres.norm(dim=1), torch.ones(len(cells.centres)))
    assert float((nearest == own).float().mean()) > 0.99
    tensors = (cells.vectors, cells.numbers, cells.centres)
    least = sum(t.numel() * t.element_size() for t in tensors)
    assert cells.size == least + (4 * 20_000 if distance else 0)


@pytest.mark.parametrize("distance", [False, True])
def test_a_search_of_all_cells_is_exact(distance, monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 10**6)
    monkeypatch.setattr(module, "LEAST_CELLS", 1)
    vectors, queries = drawn(3000), drawn(50, seed=5)
    cells = Cells.of(vectors, distance=distance)
    for query in queries:
        value, number = cells.nearest(query)
        if distance:
            exact = (vectors.double() - query.double()).norm(dim=1)
            assert value == pytest.approx(float(exact.min()), rel=1e-5)
            assert float(exact[number]) == pytest.approx(float(exact.min()), rel=1e-6)
        else:
            exact = vectors.double() @ query.double()
            assert value == pytest.approx(float(exact.max()), rel=1e-5)
            assert float(exact[number]) == pytest.approx(float(exact.max()), rel=1e-6)


@pytest.mark.parametrize("distance", [False, True])
def test_what_is_near_a_vector_is_found_among_very_many(distance):
    vectors = drawn(60_000, 32, centres=300)
    generator = torch.Generator().manual_seed(1)
    near = vectors[torch.randint(60_000, (300,), generator=generator)]
    queries = functional.normalize(near + 0.06 * torch.randn(300, 32, generator=generator), dim=1)
    cells = Cells.of(vectors, distance=distance)
    found = torch.tensor([cells.nearest(query)[1] for query in queries])
    exact = (queries @ vectors.mT).argmax(1)  # of unit length: the nearest by either measure
    assert float((found == exact).float().mean()) >= 0.99


def test_a_stored_vector_is_at_distance_zero_however_long_it_is():
    vectors = 1000 * drawn(5000)
    cells = Cells.of(vectors, distance=True)
    for number in (0, 17, 4999):
        assert cells.nearest(vectors[number]) == (0.0, number)


def test_the_same_vectors_give_the_same_cells_and_no_global_randomness_is_used():
    vectors = drawn(4000)
    state = torch.random.get_rng_state()
    one, other = (Cells.of(vectors, distance=False) for _ in range(2))
    assert torch.equal(one.numbers, other.numbers) and one.starts == other.starts
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("distance", [False, True])
def test_few_and_equal_vectors_are_found(count, distance):
    vectors = torch.ones(count, 4) / 2
    cells = Cells.of(vectors, distance=distance)
    value, number = cells.nearest(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    assert 0 <= number < count and value == (0.0 if distance else 1.0)
