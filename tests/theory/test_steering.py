"""What the forms of steering are: their limits, what they keep, and the algebra of conceptors."""

from __future__ import annotations

import pytest
import torch

from errata.linalg import steering

D = 12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(rows: int, seed: int = 1) -> torch.Tensor:
    return steering.orthonormal_rows(draw(rows, D, seed=seed))


H = draw(7, D)


def test_projecting_twice_is_projecting_once_and_sets_the_coordinates():
    rows, target = basis(3), draw(3, seed=2)
    once = steering.project(H, rows, target, 1.0)
    torch.testing.assert_close(steering.project(once, rows, target, 1.0), once)
    torch.testing.assert_close(once @ rows.mT, target.expand(7, -1))
    outside = torch.eye(D, dtype=H.dtype) - rows.mT @ rows
    torch.testing.assert_close(once @ outside, H @ outside)


def test_rotating_keeps_norms_and_a_whole_turn_is_the_identity():
    plane = basis(2)
    for degrees in (17.0, 90.0, 200.0):
        torch.testing.assert_close(steering.rotate(H, plane, degrees).norm(dim=1), H.norm(dim=1))
    torch.testing.assert_close(steering.rotate(H, plane, 360.0), H)
    there = steering.rotate(H, plane, 30.0)
    torch.testing.assert_close(steering.rotate(there, plane, -30.0), H)
    torch.testing.assert_close(steering.rotate(plane[:1], plane, 90.0), plane[1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("degrees", [0.0, 75.0, -120.0])
def test_turning_keeps_norms_and_is_angular_steering_at_strength_1(degrees):
    plane = basis(2)
    inside = H @ plane.mT @ plane
    angle = torch.tensor(degrees).double().deg2rad()
    direction = angle.cos() * plane[0] + angle.sin() * plane[1]
    published = H - inside + inside.norm(dim=1, keepdim=True) * direction
    torch.testing.assert_close(steering.turn_to(H, plane, degrees, 1.0), published)
    for strength in (0.3, 0.7):
        there = steering.turn_to(H, plane, degrees, strength)
        torch.testing.assert_close(there.norm(dim=1), H.norm(dim=1))
        rest = steering.turn_to(there, plane, degrees, 1.0)
        torch.testing.assert_close(rest, published)
    torch.testing.assert_close(steering.turn_to(H, plane, degrees, 0.0), H)


def test_a_low_rank_change_with_a_full_basis_replaces_states_by_an_affine_map():
    """LoReFT with R = I is W h + b; with R W = R and b = 0 nothing changes."""
    weight, bias, eye = draw(D, D, seed=3), draw(D, seed=4), torch.eye(D, dtype=H.dtype)
    got = steering.low_rank(H, eye, weight - eye, bias, 0.0, 1.0)
    torch.testing.assert_close(got, H @ weight.mT + bias)
    torch.testing.assert_close(steering.low_rank(H, eye, weight, bias, 1.0, 1.0), got)
    torch.testing.assert_close(steering.low_rank(H, eye, 0 * eye, 0 * bias, 0.0, 1.0), H)


def test_a_clamped_feature_has_its_target():
    decoder = basis(2)
    encoder, bias, threshold = 5 * decoder, torch.tensor([0.1, -0.2]).double(), torch.zeros(2).double()
    target = torch.tensor([3.0, 2.0]).double()
    on = H[((H @ encoder.mT + bias) > 0).all(1)]
    assert len(on)
    new = steering.clamp_features(on, encoder, bias, threshold, decoder / 5, target, 1.0)
    torch.testing.assert_close(
        steering.activations(new, encoder, bias, threshold), target.expand(len(on), -1)
    )
    cut = steering.activations(H, encoder, bias, torch.full((2,), 1e9).double())
    assert not cut.any()


def test_piecewise_moves_states_on_to_their_own_side():
    vector = draw(D, seed=5)
    new = steering.piecewise(H, vector, 2.0)
    torch.testing.assert_close((new @ vector).abs(), (H @ vector).abs() + 2 * vector @ vector)


def test_the_first_component_of_pairs_has_the_sign_of_their_mean():
    direction = steering.unit(draw(D, seed=6))
    spread = draw(40, D, seed=7) * 0.1 + torch.linspace(0.5, 3, 40).double()[:, None] * direction
    found = steering.principal(spread)
    assert float(found @ direction) > 0.99 and float(steering.principal(-spread) @ direction) < -0.99
    with pytest.raises(ValueError, match="no direction"):
        steering.principal(torch.zeros(3, D).double())


def test_a_plane_holds_the_first_direction_and_the_best_of_the_rest():
    first, other = basis(2, seed=8)
    candidates = torch.stack([first + 0.5 * other, first - 0.4 * other, first + 0.45 * other])
    plane = steering.plane(3 * first, candidates)
    torch.testing.assert_close(plane @ plane.mT, torch.eye(2).double())
    torch.testing.assert_close(plane[0], first)
    assert abs(float(plane[1] @ other)) > 1 - 1e-9
    with pytest.raises(ValueError, match="span no plane"):
        steering.plane(first, first.expand(3, -1))


# --- conceptors -----------------------------------------------------------------------------


def second(rank: int, seed: int) -> torch.Tensor:
    x = draw(30, rank, seed=seed) @ draw(rank, D, seed=seed + 1)
    return x.mT @ x / 30


def test_conceptors_reach_nothing_and_the_whole_span_as_the_aperture_goes():
    moment = second(4, 10)
    values = torch.linalg.eigvalsh(steering.conceptor(moment, 2.0))
    assert float(values.min()) > -1e-9 and float(values.max()) < 1
    assert float(steering.conceptor(moment, 1e-6).abs().max()) < 1e-9
    _, vectors = torch.linalg.eigh(moment)
    span = vectors[:, -4:] @ vectors[:, -4:].mT
    wide = steering.conceptor(moment, 1e4)
    torch.testing.assert_close(wide, span, atol=1e-5, rtol=0)
    traces = [float(steering.conceptor(moment, a).trace()) for a in (0.1, 1.0, 10.0)]
    assert traces == sorted(traces)
    eye = torch.eye(D).double()
    torch.testing.assert_close(steering.conceptor(moment, 3.0), moment @ torch.linalg.inv(moment + eye / 9))


def test_the_algebra_of_conceptors():
    c, d = (steering.conceptor(second(D, seed), 1.5) for seed in (20, 30))
    torch.testing.assert_close(steering.conceptor_not(steering.conceptor_not(c)), c)
    inverse = torch.linalg.inv
    both = inverse(inverse(c) + inverse(d) - torch.eye(D).double())
    torch.testing.assert_close(steering.conceptor_and(c, d), both)
    torch.testing.assert_close(steering.conceptor_and(c, d), steering.conceptor_and(d, c))
    either = steering.conceptor_or(c, d)
    assert float(torch.linalg.eigvalsh(either - c).min()) > -1e-9, "a union is at least each of its parts"
    assert float(torch.linalg.eigvalsh(c - both).min()) > -1e-9, "and an intersection at most"
    one, other = basis(4, seed=9)[:2], basis(4, seed=9)[2:]
    apart = [0.5 * rows.mT @ rows for rows in (one, other)]
    torch.testing.assert_close(steering.conceptor_and(*apart), torch.zeros(D, D).double(), atol=1e-9, rtol=0)
    # pseudo-inverses of rounding errors would make rubbish of singular ones
    torch.testing.assert_close(steering.conceptor_and(apart[0], apart[0]), apart[0] / 1.5)


def test_factors_give_a_symmetric_matrix_back():
    c = steering.conceptor(second(4, 10), 2.0)
    left, right = steering.factors(c)
    assert right.shape == (4, D)
    torch.testing.assert_close(left @ right, c, atol=1e-6, rtol=1e-5)
    assert steering.factors(0 * c)[1].shape == (1, D)
