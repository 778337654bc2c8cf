"""Rewrite against the equations of its paper, on tiny classifiers in float64, recomputed from raw hooks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import errata
from errata.errors import ConfigError, HostError, RequestError
from errata.linalg.directions import least_squares, principal_directions, shrink, shrinkage_share
from errata.linalg.moments import Moments
from errata.linalg.solve import CostMatrix, update
from tests.images import fresh_images, pairs

SITES = {
    "vit": "vit.layers.0.mlp.fc1",  # an activation follows
    "resnet": "resnet.encoder.stages.1.layers.0.layer.0.convolution",  # 3 x 3, stride 2; batch norm, ReLU
}
FAMILIES = sorted(SITES)


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    made = fresh_images(request.param)
    made.model.double()
    return made


def fit(host, request=None, **options):
    options = {"layer": SITES[host.family], "steps": 200, **options}
    return errata.edit(host, request or pairs(4), method="rewrite", **options)


def site_of(host, edit):
    return host.layout.by_name(edit.provenance.config["layer"])


def delta_of(edit):
    ((_, delta),) = edit.deltas.items()
    return delta


def io(host, name, images):
    """Input and output of a module, by a hook of the test's own."""
    seen = []
    handle = host.model.get_submodule(name).register_forward_hook(
        lambda _, args, out: seen.append((args[0].clone(), out.clone()))
    )
    with torch.no_grad():
        host.model(pixel_values=images.to(host.dtype))
    handle.remove()
    return seen[0]


def patches(host, site, inputs):
    """Keys ``[n, places, d_in]``: tokens, or patches cut out one by one."""
    if site.part == "linear":
        return inputs
    (kh, kw), (sh, sw), (ph, pw) = site.kernel, site.stride, site.padding
    wide = functional.pad(inputs, (pw, pw, ph, ph))
    rows = range(0, wide.shape[2] - kh + 1, sh)
    columns = range(0, wide.shape[3] - kw + 1, sw)
    cut = [wide[:, :, r : r + kh, c : c + kw].flatten(1) for r in rows for c in columns]
    return torch.stack(cut, 1)


def values(site, outputs):
    return outputs if site.part == "linear" else outputs.flatten(2).mT


def places(host, site, mask, count):
    """Masked share of every place, by plain averaging over equal cells; the class token gets none."""
    grid = int((count - (site.part == "linear")) ** 0.5)
    cell = mask.shape[-1] // grid
    small = mask.reshape(len(mask), grid, cell, grid, cell).mean((2, 4)).flatten(1).double()
    return torch.cat([torch.zeros(len(mask), 1).double(), small], 1) if site.part == "linear" else small


def captured(host, site, request):
    """Masked keys ``[m, N]``, residuals of the linear output ``[d, N]``, weights ``[N]``, and C."""
    inputs, said = io(host, site.name, request.changed)
    reference, wanted = io(host, site.name, request.original)
    keys, everywhere = patches(host, site, inputs), patches(host, site, reference).flatten(0, 1)
    weights = places(host, site, request.mask, keys.shape[1])
    inside = weights > 0
    residual = (values(site, wanted) - values(site, said))[inside].mT
    n, m = everywhere.shape
    second = everywhere.mT @ everywhere / n
    share = m / (m + n)
    second = (1 - share) * second + share * second.diagonal().mean() * torch.eye(m).double()
    return keys[inside].mT, residual, weights[inside], second


def same_span(one, two, atol=1e-6):
    """Whether the rows of two matrices span the same space, by their projectors."""
    projectors = [torch.linalg.pinv(m.double()) @ m.double() for m in (one, two)]
    torch.testing.assert_close(projectors[0], projectors[1], atol=atol, rtol=0)


# --- the change ---------------------------------------------------------------------------


@pytest.mark.parametrize("solve", ["projected", "closed"])
@pytest.mark.parametrize("keys", ["patches", "channels"])
def test_inputs_orthogonal_to_the_directions_see_no_change(host, solve, keys):
    edit = fit(host, solve=solve, keys=keys, rank=2)
    site, rows = site_of(host, edit), delta_of(edit).A
    inside = torch.linalg.qr(rows.mT).Q
    key = torch.randn(site.d_in, 5, generator=torch.Generator().manual_seed(1)).double()
    free = key - inside @ (inside.mT @ key)  # [m, 5]
    weight = host.model.get_parameter(site.parameter)
    before = weight.detach().flatten(1).clone()
    with edit.on(host):
        after = weight.detach().flatten(1)
        torch.testing.assert_close(after @ free, before @ free, atol=1e-12, rtol=0)
        assert float((after @ key - before @ key).abs().max()) > 1e-6


@pytest.mark.parametrize("solve", ["projected", "closed"])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_is_at_most_r(host, solve, rank):
    delta = delta_of(fit(host, solve=solve, rank=rank))
    assert delta.rank == rank == int(torch.linalg.matrix_rank(delta.dense()))
    site = host.layout.by_name(SITES[host.family])
    assert delta.shape == (site.d_out, site.d_in)


def test_channel_keys_leave_the_taps_free_along_one_direction_of_channels():
    host = fresh_images("resnet")
    host.model.double()
    edit = fit(host, keys="channels", rank=1)
    site, delta = site_of(host, edit), delta_of(edit)
    taps = delta.dense().reshape(site.d_out, -1, site.taps)  # [out, channels, taps]
    assert (
        int(torch.linalg.matrix_rank(taps.permute(0, 2, 1).flatten(0, 1))) == 1
    )  # one line in channel space
    assert 1 < int(torch.linalg.matrix_rank(delta.dense())) <= site.taps


@pytest.mark.parametrize("solve", ["projected", "closed"])
def test_the_direction_of_the_mean_key_is_c_inverse_k(host, solve):
    edit = fit(host, solve=solve, direction="mean")
    keys, _, weights, second = captured(host, site_of(host, edit), pairs(4))
    mean = keys @ weights / weights.sum()
    same_span(delta_of(edit).A, torch.linalg.solve(second, mean)[None], atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_are_the_papers(host, rank):
    """Whitened by C^-1/2 (ZCA), weighted, top right singular vectors, whitened once more."""
    edit = fit(host, rank=rank, solve="closed")
    keys, _, weights, second = captured(host, site_of(host, edit), pairs(4))
    energy, basis = torch.linalg.eigh(second)
    zca = basis @ torch.diag(energy.rsqrt()) @ basis.mT
    rows = (zca @ keys * weights).mT  # [N, m]
    top = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
    same_span(delta_of(edit).A, top @ zca, atol=1e-3)


def test_no_whitening_gives_the_mean_key_itself(host):
    edit = fit(host, solve="closed", direction="mean", shrinkage=1.0)
    keys, _, weights, _ = captured(host, site_of(host, edit), pairs(4))
    same_span(delta_of(edit).A, (keys @ weights)[None])


def test_shrinkage_fades_with_what_was_seen():
    moments = Moments.empty(6)
    moments.update_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double())
    assert int(torch.linalg.matrix_rank(moments.second)) == 3  # fewer than the width
    assert shrinkage_share(moments) == pytest.approx(2 / 3)
    factor = shrink(moments, shrinkage_share(moments)).factor
    expected = moments.second / 3 + 2 / 3 * moments.second.trace() / 6 * torch.eye(6).double()
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-4, atol=1e-4)
    exact = shrink(moments, 0.0).factor
    torch.testing.assert_close(exact @ exact.mT, moments.second, atol=1e-4, rtol=0)


# --- the closed form ----------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["patches", "channels"])
@pytest.mark.parametrize("rank", [1, 3])
def test_closed_form_attains_the_least_squares_optimum(host, rank, keys):
    edit = fit(host, solve="closed", rank=rank, keys=keys)
    delta = delta_of(edit)
    masked, residual, weights, _ = captured(host, site_of(host, edit), pairs(4))
    features, wanted = (delta.A @ masked) * weights, residual * weights
    brute = torch.linalg.lstsq(features.mT, wanted.mT, driver="gelsd").solution.mT
    best = float((brute @ features - wanted).square().sum())
    found = float((delta.B @ features - wanted).square().sum())
    assert found == pytest.approx(best, rel=1e-8)
    assert best < 0.999 * float(wanted.square().sum())


@pytest.mark.parametrize("rank", [1, 3])
def test_closed_form_is_romes_equation_at_mixtures_of_keys(host, rank):
    """With V the top right singular vectors over places, delta is exact at (K w V, R w V), cheapest in C."""
    edit = fit(host, solve="closed", rank=rank)
    masked, residual, weights, second = captured(host, site_of(host, edit), pairs(4))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(second), masked * weights, upper=False)
    mix = torch.linalg.svd(white, full_matrices=False).Vh[:rank].mT  # [N, r]
    rome = update(
        masked * weights @ mix, residual * weights @ mix, CostMatrix.of(second, ridge=1e-5), gamma=0.0
    )
    dense = delta_of(edit).dense()
    torch.testing.assert_close(dense, rome.dense(), atol=1e-3 * float(dense.abs().max()), rtol=1e-3)


def test_closed_form_with_the_mean_key_is_rome(host):
    edit = fit(host, solve="closed", direction="mean")
    masked, residual, weights, second = captured(host, site_of(host, edit), pairs(4))
    key, wanted = masked @ weights / weights.sum(), residual @ weights / weights.sum()
    delta = delta_of(edit).dense()
    torch.testing.assert_close(delta @ key, wanted, atol=1e-9, rtol=1e-9)
    rome = update(key[:, None], wanted[:, None], CostMatrix.of(second, ridge=1e-5), gamma=0.0).dense()
    torch.testing.assert_close(delta, rome, atol=1e-8, rtol=1e-6)


def test_principal_is_the_same_by_places_and_by_entries():
    """The smaller of the two Gram matrices is decomposed; both give one space."""
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(7, 7, generator=generator).double()
    cost = CostMatrix.of(root @ root.mT)
    few = torch.randn(7, 4, generator=generator).double()
    many = torch.cat([few / 2**0.5] * 4, 1)  # twice the energy at every key, and more places than entries
    one, two = (principal_directions(k, torch.ones(k.shape[1]), cost, 3) for k in (few, many))
    same_span(one, two)
    torch.testing.assert_close(one @ one.mT, torch.eye(3).double())
    assert principal_directions(few[:, :1], torch.ones(1), cost, 3).shape == (1, 7)  # one key, one direction
    with pytest.raises(ValueError, match="zero"):
        principal_directions(few * 0, torch.ones(4), cost, 1)


def test_least_squares_is_the_smallest_where_there_are_many():
    features = torch.tensor([[1.0], [1.0]]).double()
    torch.testing.assert_close(least_squares(features, torch.ones(1, 1)), torch.full((1, 2), 0.5).double())


# --- what it is for -----------------------------------------------------------------------


def apart(host, site, request, name=None):
    """What a module, the last of the layer's tail, says of the changed images; and the mask at its places."""
    name = name or (site.tail or (site.name,))[-1]
    with torch.no_grad():
        moved = values(site, io(host, name, request.changed)[1])
    return moved, places(host, site, request.mask, moved.shape[1])[..., None]


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.98),  # one direction goes no further on random weights
        ({"rank": 3}, 0.9),
        ({"rank": 3, "keys": "channels"}, 0.9),
        ({"rank": 3, "scale": "published", "learning_rate": 0.005}, 0.9),
    ],
)
def test_the_layer_comes_closer_to_what_it_says_of_the_original(host, options, share):
    request = pairs(4)
    edit = fit(host, request, **options)
    site = site_of(host, edit)
    end = (site.tail or (site.name,))[-1]
    goal = values(site, io(host, end, request.original)[1])
    moved, weights = apart(host, site, request)
    before = float((weights.sqrt() * (moved - goal).abs()).sum() / 4)
    with edit.on(host):
        moved, _ = apart(host, site, request)
    after = float((weights.sqrt() * (moved - goal).abs()).sum() / 4)
    assert after < share * before
    assert before == pytest.approx(edit.provenance.notes["loss_before"], rel=1e-4)
    assert after == pytest.approx(edit.provenance.notes["loss"], rel=1e-4)


def test_projections_reach_the_optimum_over_the_directions():
    """Without an activation the loss is convex in U; reweighted least squares finds its minimum."""
    host = fresh_images("vit")
    host.model.double()
    request = pairs(4)
    edit = fit(host, request, layer="vit.layers.1.mlp.fc2", steps=3000, learning_rate=0.01, rank=2)
    masked, residual, weights, _ = captured(host, site_of(host, edit), request)
    features = delta_of(edit).A @ masked  # [r, N]
    left = torch.zeros(len(residual), 2).double()
    for _ in range(100):
        pull = weights.sqrt() / (residual - left @ features).abs().clamp_min(1e-9)  # [d, N]
        for row, strength in enumerate(pull):
            gram = (features * strength) @ features.mT
            left[row] = torch.linalg.solve(gram, (features * strength) @ residual[row])
    best = float((weights.sqrt() * (residual - left @ features).abs()).sum() / 4)
    assert best * (1 - 1e-6) <= edit.provenance.notes["loss"] <= 1.01 * best


def test_output_names_what_is_matched(host):
    block = {"vit": "vit.layers.0", "resnet": "resnet.encoder.stages.1.layers.0"}[host.family]
    request = pairs(4)
    edit = fit(host, request, output=block)
    site = site_of(host, edit)
    goal = values(site, io(host, block, request.original)[1])
    moved, weights = apart(host, site, request, block)
    before = float((weights.sqrt() * (moved - goal).abs()).sum())
    with edit.on(host):
        moved, _ = apart(host, site, request, block)
    assert float((weights.sqrt() * (moved - goal).abs()).sum()) < 0.97 * before
    first = {"vit": "vit.embeddings.dropout", "resnet": "resnet.embedder"}[host.family]
    with pytest.raises(ConfigError, match="does not depend"):
        fit(host, request, output=first)
    with pytest.raises(HostError, match="no module"):
        fit(host, request, output="nowhere")
    with pytest.raises(HostError, match="no places"):
        fit(host, request, output={"vit": "classifier", "resnet": "classifier.1"}[host.family])


# --- the mask -----------------------------------------------------------------------------


@pytest.mark.parametrize("solve", ["projected", "closed"])
def test_pixels_outside_the_mask_do_not_matter(solve):
    """Where places are patches that do not overlap, the edit is blind to all patches that are not masked."""
    host = fresh_images("vit")
    host.model.double()
    request = pairs(3)
    mask = torch.zeros_like(request.mask)
    mask[:, 8:24, 8:16] = 1.0  # whole patches of 8
    name = "vit.embeddings.patch_embeddings.projection"

    def made(shift):
        changed = request.changed + shift
        return fit(
            host,
            errata.ImageRequest(request.original, changed, mask, "road", "snow"),
            layer=name,
            solve=solve,
        )

    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    plain, outside, inside = (
        delta_of(made(s)).dense() for s in (0, noise * (1 - mask[:, None]), noise * mask[:, None])
    )
    torch.testing.assert_close(outside, plain, atol=1e-9, rtol=1e-9)
    assert float((inside - plain).norm()) > 0.1 * float(plain.norm())


def test_masked_tokens_are_those_of_the_masked_patches():
    """Before any mixing, the tokens that differ between the images of a pair are those the mask gives weight."""
    host = fresh_images("vit")
    request = pairs(4)
    site = host.layout.by_name("vit.layers.0.attention.q_proj")
    changed, original = host.at(site, request.changed)[0], host.at(site, request.original)[0]
    weights = host.mask_at(request.mask, changed, "linear")
    assert torch.equal((changed != original).any(-1), weights > 0)
    assert bool((weights[:, 0] == 0).all()) and 0 < float((weights > 0).float().mean()) < 1


def test_masks_shrink_by_area():
    host = fresh_images("resnet")
    mask = torch.zeros(1, 32, 32)
    mask[0, :6, :8] = 1.0
    small = host.mask_at(mask, torch.zeros(1, 5, 8, 8), "conv").reshape(8, 8)
    assert small[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0] and small[1].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert float(small.sum()) == 3.0


def test_pairs_without_difference_are_refused(host):
    request = pairs(2)
    same = errata.ImageRequest(request.original, request.original, request.mask, "road", "road")
    with pytest.raises(RequestError, match="nothing to rewrite"):
        fit(host, same)
