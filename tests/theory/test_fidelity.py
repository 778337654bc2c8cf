"""Published runs reproduced by settings alone, against plain forms written after the papers and their code.

A small GPT-2 with a made-up covariance in the files that the authors' code writes; each method is configured
as its code was, and its delta compared with ``benchmarks/naive.py``: whole forward passes, explicit loops,
m x m systems. ``docs/fidelity.md`` tells the figures.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks import naive

import errata
from errata.stats.collect import Corpus
from tests.models import fresh

FAITHFUL = 1e-3
"""Relative Frobenius error below which a delta counts as the authors'."""
LAYERS = (0, 1)
PREFIXES = ("The old road. ", "Because I saw you. ")
ROME = [(text, 1 / 3) for text in ("", *PREFIXES)]
MEMIT = [("", 0.5), *((text, 0.25) for text in PREFIXES)]
REQUESTS = [
    errata.Request("The capital of {}", "Arvania", "Esk"),
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("{} plays the", "Bruno Holner", "rain"),
    errata.Request("The old dog of {} lives in", "Mira Tallow", "Tallow road"),
]
BATCHES = (REQUESTS[:2], REQUESTS[2:3], REQUESTS[3:])
TEXT = "Ada Brenner was born in Tallow, and the rain fell on the old road."
SEARCH = {"steps": 12, "learning_rate": 0.5, "clamp": 4.0, "decay": 0.5, "kl": 0.0625}


@pytest.fixture(scope="module")
def host():
    made = fresh("gpt2", initializer_range=0.2)
    made.model.double()
    return made


@pytest.fixture(scope="module")
def seconds(host):
    """A second moment a layer: of keys that never were."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for layer in LAYERS:
        keys = torch.randn(400, host.layout.site(layer).d_in, generator=draw, dtype=torch.float64)
        made[layer] = (keys * torch.linspace(0.05, 1.0, keys.shape[1], dtype=torch.float64)).T @ keys / 400
        made[layer] = (made[layer] + made[layer].T) / 2 + 0.6 * torch.eye(keys.shape[1], dtype=torch.float64)
    return made


@pytest.fixture(scope="module")
def files(seconds, tmp_path_factory):
    """The same as ROME's and MEMIT's code keeps it: sums and a count, named by the module."""
    folder = tmp_path_factory.mktemp("stats")
    for layer, second in seconds.items():
        np.savez(
            folder / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz",
            **{"mom2.constructor": "SecondMoment()", "mom2.count": 400, "mom2.mom2": (400 * second).numpy()},
        )
    return str(folder / "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz")


def settings(files, **more):
    return {
        **SEARCH, "scale": "published", "prefixes": list(PREFIXES), "moments": files, "cov_ridge": 0.0,
        "layers": list(LAYERS), **more,
    }  # fmt: skip


def search(**more) -> naive.Search:
    return naive.Search(**{**SEARCH, **more})


def fitted(host, method, batches=(REQUESTS,), **options):
    """Fit batch after batch, each going on from the one before."""
    edit = None
    for batch in batches:
        edit = errata.edit(host, list(batch), method=method, after=edit, **options)
    return edit


def errors(host, edit, expected) -> list[float]:
    """Relative Frobenius error of each change, by layer or by parameter."""
    found = []
    for where, plain in expected.items():
        name = host.layout.site(where).parameter if isinstance(where, int) else where
        delta = edit.deltas[name]
        dense = (delta if isinstance(delta, torch.Tensor) else delta.dense()).double()
        assert float(plain.norm()) > 0
        found.append(float((dense - plain).norm() / plain.norm()))
    return found


def check(host, edit, expected):
    found = errors(host, edit, expected)
    print(f"{edit.provenance.method}: {max(found):.1e}")
    assert max(found) <= FAITHFUL, found


def apart(one, other) -> float:
    return max(float((one[k] - other[k]).norm() / other[k].norm()) for k in other)


@pytest.mark.parametrize("keys", ["mixed", "mean"])
def test_rome(host, files, seconds, keys):
    edit = fitted(host, "rome", [REQUESTS[:1]], **settings(files, layers=[1], keys=keys))
    delta, _ = naive.rome(host, REQUESTS[0], ROME, seconds[1], layer=1, search=search(), keys=keys)
    check(host, edit, {1: delta})


def test_memit(host, files, seconds):
    edit = fitted(host, "memit", **settings(files, cov_weight=3.0))
    expected, _ = naive.memit(host, REQUESTS, MEMIT, seconds, search=search(), cov_weight=3.0)
    check(host, edit, expected)


@pytest.mark.parametrize("batch", [REQUESTS, REQUESTS[:1]], ids=["damped", "alone"])
def test_emmet(host, files, seconds, batch):
    edit = fitted(host, "emmet", [batch], **settings(files, cov_weight=3.0, damping=0.1))
    check(host, edit, naive.emmet(
        host, [batch], MEMIT, seconds, search=search(), cov_weight=3.0, damping=0.1
    ))  # fmt: skip


PMET = {"steps": 30, "learning_rate": 0.2, "clamp": 4.0, "kl": 1.0}


def test_pmet_until_the_target_is_reached(host, files, seconds):
    edit = fitted(host, "pmet", **settings(files, cov_weight=3.0, **PMET))
    plain = naive.pmet(host, [REQUESTS], MEMIT, seconds, search=search(**PMET, relax=True), cov_weight=3.0)
    check(host, edit, plain)
    hard = naive.pmet(host, [REQUESTS], MEMIT, seconds, search=search(**PMET), cov_weight=3.0)
    assert apart(hard, plain) > 0.01, "the targets were reached, and it mattered"


def test_alphaedit_with_the_authors_projection(host, files, seconds, tmp_path):
    stack = []
    for layer in LAYERS:
        values, vectors = torch.linalg.eigh(seconds[layer])
        free = vectors[:, : int(0.6 * len(values))]
        stack.append(free @ free.T)
    torch.save(torch.stack(stack), tmp_path / "null_space_project.pt")
    given = settings(files, ridge=0.5, projection=str(tmp_path / "null_space_project.pt"))
    del given["moments"], given["cov_ridge"]
    plain = naive.alphaedit(
        host, BATCHES, MEMIT, dict(zip(LAYERS, stack, strict=True)), search=search(), ridge_plain=0.5
    )
    check(host, fitted(host, "alphaedit", BATCHES, **given), plain)


def test_alphaedit_with_a_threshold(host, files, seconds):
    bound = float(torch.linalg.eigvalsh(seconds[0])[48:50].mean())
    projections = {}
    for layer, second in seconds.items():
        values, vectors = torch.linalg.eigh(second)
        projections[layer] = vectors[:, values < bound] @ vectors[:, values < bound].T
    given = settings(files, ridge=0.5, threshold=bound)
    del given["cov_ridge"]
    plain = naive.alphaedit(host, BATCHES, MEMIT, projections, search=search(), ridge_plain=0.5)
    check(host, fitted(host, "alphaedit", BATCHES, **given), plain)


ENCORE = {"stop": "top", "top_count": 3, "top_bare": False, "stop_loss": 1e-9}


def test_encore_counts_evaluations_at_the_top(host, files, seconds):
    edit = fitted(
        host, "encore", BATCHES, **settings(files, cov_weight=3.0, update_norm_lambda=10.0, **ENCORE)
    )
    same = {"top_bare": False, "stop_loss": 1e-9}
    plain = naive.encore(
        host, BATCHES, MEMIT, seconds, search=search(top_count=3, **same), cov_weight=3.0, mu=10.0
    )
    check(host, edit, plain)
    for other in (1, None):
        far = naive.encore(
            host, BATCHES, MEMIT, seconds, search=search(top_count=other, **same), cov_weight=3.0, mu=10.0
        )
        assert apart(far, plain) > 0.01, "the count decided when the searches ended"


@pytest.mark.parametrize("remember", ["wanted", "achieved"])
def test_lyaplock_over_several_batches(host, files, seconds, remember):
    given = settings(files, cov_weight=30.0, alpha=0.5, remember=remember)
    plain = naive.lyaplock(
        host, BATCHES, MEMIT, seconds, search=search(), cov_weight=30.0, alpha=0.5,
        achieved=remember == "achieved",
    )  # fmt: skip
    edit = fitted(host, "lyaplock", BATCHES, **given)
    check(host, edit, plain)
    assert any(record.cost_scale > 1 for record in edit.records.values()), "the price of C rose"


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_nse_in_plain_bounds(host, files, seconds, share):
    distances = [
        float(naive.find_value(host, r, MEMIT, layer=1, where="block_out", search=search()).shift.norm())
        for r in REQUESTS
    ]
    lost = sorted(distances)[-1] * 0.999  # the first pass leaves a request out
    off = 0.05 * min(distances)
    given = settings(files, cov_weight=3.0, share=share, bounds="plain", off=off, lost=lost, passes=2)
    plain = naive.nse(
        host, BATCHES, MEMIT, seconds, search=search(), cov_weight=3.0, share=share, passes=2, off=off, lost=lost
    )  # fmt: skip
    check(host, fitted(host, "nse", BATCHES, **given), plain)


@pytest.mark.parametrize("bias", [True, False])
def test_ft_and_its_bias(host, bias):
    steps = {"steps": 10, "learning_rate": 5e-4, "stop_loss": 1e-2}
    edit = fitted(
        host, "ft", layers=[1], objective="prompt_last", scale="published", epsilon=None, bias=bias, **steps
    )
    plain = naive.fine_tune(
        host, REQUESTS, 1, prompt_last=True, steps=10, rate=5e-4, stop_loss=1e-2, bias=bias
    )
    check(host, edit, plain)
    assert len(edit.deltas) == 1 + bias


@pytest.mark.parametrize("bias", [True, False])
def test_ft_l_in_its_box(host, bias):
    edit = fitted(
        host, "ft_l", layers=[0], objective="prompt_last", scale="published", epsilon=1e-3, learning_rate=5e-4,
        steps=10, stop_loss=1e-2, stop="mean", bias=bias,
    )  # fmt: skip
    plain = naive.fine_tune(
        host, REQUESTS, 0, prompt_last=True, steps=10, rate=5e-4, stop_loss=1e-2, bias=bias, bound=1e-3
    )
    check(host, edit, plain)


TURNS = (REQUESTS, [REQUESTS[2], REQUESTS[0], REQUESTS[3]])


def test_ultraedit_over_two_turns(host):
    edit = fitted(
        host, "ultraedit", TURNS, modules=["mlp_out@1-2"], scale="published", eta=1e-4, ridge=1.0, centre=True,
        statistics="published", reduction="mean", micro_batch=3,
    )  # fmt: skip
    names = [f"transformer.h.{layer}.mlp.c_proj" for layer in (1, 2)]
    plain = naive.ultraedit(host, TURNS, names, eta=1e-4, micro_batch=3)
    check(host, edit, {f"{name}.weight": delta for name, delta in plain.items()})


def test_unke_keeps_the_question_alone(host):
    stage = {"steps": 8, "learning_rate": 0.5, "clamp": 4.0, "decay": 1e-3, "stop_loss": 1e-2}
    texts = [TEXT, "Therefore the small dog waited."]
    edit = fitted(
        host, "unke", layer=1, scale="published", block_scale="published", block_rate=2e-4, block_steps=10,
        block_decay=0.01, decay_all=True, keep_tokens="question", kept=2, tokens=60,
        corpus=Corpus("two texts", lambda: texts), **stage,
    )  # fmt: skip
    kept = [host.encode(text).ids[:30] for text in texts]
    plain = naive.unke(
        host, REQUESTS, kept, 1, search=naive.Search(**stage, kl=0.0), steps=10, rate=2e-4, decay=0.01
    )
    stored = {name: delta for name, delta in plain.items() if float(delta.norm()) > 0}
    assert set(edit.deltas) == set(stored)
    check(host, edit, stored)
