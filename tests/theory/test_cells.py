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


def nearest(cells: Cells, vectors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The candidate whose exact distance is least."""
    near = [cells.near(query) for query in queries]
    best = [
        (vectors[n].double() - q.double()).norm(dim=1).argmin() for n, q in zip(near, queries, strict=True)
    ]
    return torch.stack([n[place] for n, place in zip(near, best, strict=True)])


def test_every_vector_is_in_one_cell_near_its_centre():
    vectors = 3 * drawn(20_000)
    cells = Cells.of(vectors)
    assert cells.numbers.sort().values.tolist() == list(range(20_000))
    sketches = (vectors[cells.numbers] - cells.mean) @ cells.directions
    torch.testing.assert_close(cells.sketches[:, :-1], sketches)
    torch.testing.assert_close(cells.sketches[:, -1], sketches.square().sum(1) / 2)
    assert cells.starts[0] == 0 and cells.starts[-1] == 20_000
    assert len(cells.starts) == len(cells.centres) + 1 and min(torch.tensor(cells.starts).diff()) > 0
    own = torch.repeat_interleave(torch.arange(len(cells.centres)), torch.tensor(cells.starts).diff())
    near = torch.cdist(sketches, cells.centres).argmin(1)
    assert float((near == own).float().mean()) > 0.99
    tensors = (cells.mean, cells.directions, cells.sketches, cells.numbers, cells.centres)
    assert cells.size == sum(t.numel() * t.element_size() for t in tensors)


def test_a_sketch_is_along_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(3)
    spread = torch.cat([torch.linspace(3, 2, module.SKETCH), torch.full((136,), 0.05)])
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    vectors = torch.randn(5000, 200, generator=generator) * spread @ turn.mT + 100
    cells = Cells.of(vectors)
    torch.testing.assert_close(
        cells.directions.mT @ cells.directions, torch.eye(module.SKETCH), rtol=0, atol=1e-5
    )
    kept = ((vectors - vectors.mean(0)) @ cells.directions).square().sum() / (
        vectors - vectors.mean(0)
    ).square().sum()
    assert kept > 0.999


def test_a_search_of_all_cells_and_candidates_is_exact(monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 10**6)
    monkeypatch.setattr(module, "CHECKED", 10**6)
    monkeypatch.setattr(module, "LEAST_CELLS", 1)
    vectors, queries = drawn(3000, 100), drawn(50, 100, seed=5)
    cells = Cells.of(vectors)
    assert cells.near(queries[0]).sort().values.tolist() == list(range(3000))
    exact = torch.cdist(queries.double(), vectors.double()).argmin(1)
    assert torch.equal(nearest(cells, vectors, queries), exact)


@pytest.mark.parametrize("width", [32, 200])
@pytest.mark.parametrize("common", [0.0, 30.0])
def test_what_is_near_a_vector_is_found_among_very_many(width, common):
    vectors = drawn(60_000, width, centres=300)
    generator = torch.Generator().manual_seed(1)
    near = vectors[torch.randint(60_000, (300,), generator=generator)]
    queries = near + 0.34 / width**0.5 * torch.randn(300, width, generator=generator)
    exact = torch.cdist(queries, vectors).argmin(1)
    # activations of language models share a large mean, most of it in few entries
    offset = torch.zeros(width)
    offset[:3] = common
    cells = Cells.of(vectors + offset)
    found = nearest(cells, vectors + offset, queries + offset)
    assert float((found == exact).float().mean()) >= 0.99


def test_candidates_are_few():
    cells = Cells.of(drawn(20_000))
    near = cells.near(drawn(1, seed=9)[0])
    assert len(near) == len(near.unique()) == module.CHECKED and near.dtype == torch.int64


def test_the_same_vectors_give_the_same_cells_and_no_global_randomness_is_used():
    vectors = drawn(4000)
    state = torch.random.get_rng_state()
    one, other = (Cells.of(vectors) for _ in range(2))
    assert torch.equal(one.numbers, other.numbers) and one.starts == other.starts
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_few_and_equal_vectors_are_found(count):
    vectors = torch.ones(count, 4) / 2
    near = Cells.of(vectors).near(torch.full((4,), 0.5))
    assert len(near) == min(count, module.CHECKED) and 0 <= int(near.min()) <= int(near.max()) < count
