"""LEACE, its oracle, SAL and INLP in float64: what is erased, and what erasing costs."""

from __future__ import annotations

import pytest
import torch

from errata.linalg.classifiers import accuracy, fit_logistic, fit_network
from errata.linalg.erasers import Eraser, cross_covariance, inlp, leace, mean_square, one_hot, oracle, sal

CLASSES = 3


def data(n: int = 400, d: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated vectors whose means differ by class; the classes are of different size."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) ** 2 * CLASSES).long()
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    x = x + 2 * torch.randn(CLASSES, d, generator=generator, dtype=torch.float64)[labels] + 5
    return x, one_hot(labels, CLASSES), labels


ERASERS = {
    "leace": lambda x, z, labels: leace(x, z),
    "leace, shrunk": lambda x, z, labels: leace(x, z, shrink=True),
    "sal": lambda x, z, labels: sal(x, z),
}


@pytest.mark.parametrize("name", ERASERS)
def test_covariance_and_class_means_are_erased_exactly(name):
    x, z, labels = data()
    eraser = ERASERS[name](x, z, labels)
    after = eraser(x)
    assert float(cross_covariance(x, z).abs().max()) > 0.1
    assert float(cross_covariance(after, z).abs().max()) < 1e-10
    means = torch.stack([after[labels == one].mean(0) for one in range(CLASSES)])
    torch.testing.assert_close(means, x.mean(0).expand_as(means), atol=1e-9, rtol=0)
    assert eraser.rank == CLASSES - 1


@pytest.mark.parametrize("name", ERASERS)
def test_a_linear_probe_falls_to_the_largest_class(name):
    x, z, labels = data()
    largest = float(torch.bincount(labels).max()) / len(labels)
    after = ERASERS[name](x, z, labels)(x)
    assert accuracy(fit_logistic(x, labels, CLASSES)(x), labels) > largest + 0.15
    probe = fit_logistic(after, labels, CLASSES)
    assert float((probe.weight - probe.weight.mean(0)).abs().max()) < 1e-4
    assert accuracy(probe(after), labels) == pytest.approx(largest)


@pytest.mark.parametrize("name", [*ERASERS, "inlp"])
def test_erasers_are_affine_idempotent_and_keep_the_mean(name):
    x, z, labels = data()
    eraser = inlp(x, labels, CLASSES) if name == "inlp" else ERASERS[name](x, z, labels)
    torch.testing.assert_close(eraser(eraser(x)), eraser(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        eraser.B.mT @ eraser.A, torch.eye(eraser.rank, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(eraser(0.3 * x[0] + 0.7 * x[1]), 0.3 * eraser(x[0]) + 0.7 * eraser(x[1]))
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0), atol=1e-9, rtol=0)


def test_leace_changes_least():
    """Less than SAL, than the shrunk one, than any other affine map with the same kernel; the oracle less still."""
    x, z, _ = data()
    best = leace(x, z)
    change = mean_square(best(x) - x)
    assert (
        change < mean_square(sal(x, z)(x) - x)
        and change < mean_square(leace(x, z, shrink=True)(x) - x) + 1e-12
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        read = best.B + 0.02 * torch.randn(best.B.shape, generator=generator, dtype=torch.float64)
        other = Eraser(best.A @ torch.inverse(read.mT @ best.A), read, best.mean)
        assert float(cross_covariance(other(x), z).abs().max()) < 1e-9  # erases as well
        assert mean_square(other(x) - x) > change
    knowing = oracle(x, z)(x, z)
    assert float(cross_covariance(knowing, z).abs().max()) < 1e-10
    assert 0 < mean_square(knowing - x) < change


def test_leace_is_equivariant_and_sal_is_not():
    """Least in any norm given by a positive definite matrix: the eraser of M x is M r(x)."""
    x, z, _ = data()
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(
        leace(x @ mixing.mT, z)(x @ mixing.mT), leace(x, z)(x) @ mixing.mT, atol=1e-6, rtol=0
    )
    assert not torch.allclose(sal(x @ mixing.mT, z)(x @ mixing.mT), sal(x, z)(x) @ mixing.mT, atol=0.1)


def test_labels_that_say_nothing_erase_nothing():
    x, z, _ = data()
    constant = torch.ones(len(x), 1, dtype=torch.float64)
    for eraser in (leace(x, constant), sal(x, constant)):
        assert eraser.rank == 0 and torch.equal(eraser(x), x)
    torch.testing.assert_close(leace(x, torch.cat([z, constant], 1))(x), leace(x, z)(x), atol=1e-8, rtol=0)


def test_singular_vectors_and_rare_classes():
    x, z, _ = data()
    flat = torch.cat(
        [x, x[:, :2] + x[:, 2:4], torch.ones(len(x), 1, dtype=torch.float64)], 1
    )  # rank 12 of 15
    assert float(cross_covariance(leace(flat, z)(flat), z).abs().max()) < 1e-9
    rare = torch.zeros(len(x), dtype=torch.long)
    rare[:2] = 1
    assert leace(x, one_hot(rare, 2)).rank == 1
    assert leace(x, one_hot(rare, 2), tolerance=0.99).rank == 0
    with pytest.raises(ValueError, match="n at least 2"):
        leace(x[:1], z[:1])
    with pytest.raises(ValueError, match="NaN"):
        leace(x * torch.inf, z)


@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_tolerated_are_canonical_correlations(classes):
    """Of one-hot labels, whose columns say the same more than once: as of the labels themselves."""
    x, _, labels = data()
    z = one_hot(labels % classes, classes)
    whitened = [torch.linalg.qr(part - part.mean(0))[0] for part in (x, z[:, 1:])]  # the first column follows
    correlations = torch.linalg.svdvals(whitened[0].mT @ whitened[1])
    assert (
        len(correlations) == classes - 1 and 0.1 < float(correlations[-1]) < float(correlations[0]) + 1e-9 < 1
    )
    for number, value in enumerate(correlations.tolist()):
        assert leace(x, z, tolerance=value + 1e-6).rank == number
        assert leace(x, z, tolerance=value - 1e-6).rank == number + 1
        scaled = z * torch.tensor([1e-4, 1.0, 1e3][:classes], dtype=torch.float64)
        assert leace(x, scaled, tolerance=value + 1e-6).rank == number


def test_inlp_stops_at_chance_and_erases_more_directions():
    x, z, labels = data()
    eraser = inlp(x, labels, CLASSES)
    largest = float(torch.bincount(labels).max()) / len(labels)
    after = eraser(x)
    assert accuracy(fit_logistic(after, labels, CLASSES)(after), labels) <= largest + 0.02
    assert eraser.rank >= leace(x, z).rank
    assert inlp(x, labels, CLASSES, rounds=1).rank == CLASSES - 1


def test_a_network_reads_what_no_linear_probe_can():
    """A class that depends on the sign of a product has equal means: linear erasing leaves it."""
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    after = leace(x, one_hot(labels, 2))(x)
    assert accuracy(fit_logistic(after, labels, 2)(after), labels) < 0.6
    assert accuracy(fit_network(after, labels, 2)(after), labels) > 0.75
