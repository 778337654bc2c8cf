"""Every promise of the contract for methods that steer by contrast pairs, and what each one's edit is."""

from __future__ import annotations

import dataclasses
import importlib
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import errata
from errata import config as settings
from errata.data.contrasts import read_contrasts, write_contrasts
from errata.edits import Edit, SteerEdit
from errata.edits.export import EXPORTERS
from errata.errors import ConfigError, DataError, EditError, RequestError
from errata.host.build import new_model
from errata.host.states import LabelledRows, module_states
from errata.linalg import steering
from errata.methods import REGISTRY
from errata.types import ContrastPair, Contrasts
from tests.models import fresh, tokenizer
from tests.units.test_hosts import HYBRIDS

NAMES = ("Ada Brenner", "Bruno Holner", "Ivo Marn", "Lena Ost", "Pia Holt", "Éric")
PAIRS = Contrasts(
    "music",
    tuple(
        ContrastPair(prompt.format(name), f"plays the {thing}", f"lives in {town}", name)
        for name, thing, town in zip(NAMES, ("cello", "harp") * 3, ("Esk", "Merrin", "Tallow") * 2, strict=True)
        for prompt in ("{}", "The old {}")
    ),
)  # fmt: skip
ALL = [name for name in REGISTRY if REGISTRY.get(name).takes == "contrasts"]
OPTIONS = {
    "loreft": {"steps": 2, "per_step": 6, "count": 2, "learning_rate": 0.05}, "reps": {"steps": 2, "per_step": 6},
    "sae": {"layers": [1]},
}  # fmt: skip
TEXTS = ("The old Ada waited for", "Esk")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sae") / "features.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_file(
        {"W_enc": torch.randn(32, 48, generator=draw), "W_dec": torch.randn(48, 32, generator=draw) / 6,
         "b_enc": torch.zeros(48), "b_dec": torch.zeros(32)}, path,
    )  # fmt: skip
    return path


def fit(name: str, host, book: Path, **more) -> SteerEdit:
    given = {**OPTIONS.get(name, {}), **({"dictionary": str(book)} if name == "sae" else {}), **more}
    edit = errata.edit(host, PAIRS, method=name, **given)
    assert isinstance(edit, SteerEdit)
    return edit


def logits(host) -> torch.Tensor:
    batch = host.batch([host.encode(text).ids for text in TEXTS])
    with torch.no_grad():
        return host.forward(batch)[batch.mask.bool()]


FAMILIES = [(name, "llama") for name in ALL] + [("iti", "gpt2"), ("loreft", "gpt2")]


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def fitted(request, book):
    name, family = request.param
    host = fresh(family)
    return name, host, fit(name, host, book)


def test_facts_are_declared_and_settings_round_trip():
    names = {"actadd", "angular", "caa", "conceptor", "iti", "loreft", "repe", "reps", "sae"}
    assert names <= set(ALL)
    for name in ALL:
        method = REGISTRY.get(name)
        module = importlib.import_module(REGISTRY.origin(name))
        assert method.name == name == Path(str(module.__file__)).stem and "arXiv" in method.paper
        for word in ("Paper", "Implements", "Departs", "Needs"):
            assert f"\n{word} " in (module.__doc__ or ""), word
        default = settings.make(method.config, {}, name)
        text = yaml.safe_dump(dataclasses.asdict(default)).replace("!!python/tuple", "")
        assert settings.make(method.config, yaml.safe_load(text), name) == default
        for field in settings.settings(method.config):
            assert field.meaning, f"{name}.{field.name} says nothing"
        with pytest.raises(ConfigError, match="different layers"):
            settings.make(method.config, {"layers": [1, 1]}, name)


def test_a_fit_changes_nothing_and_is_repeatable(fitted, book, capfd):
    name, host, edit = fitted
    start, states = host.weights_hash(), (torch.get_rng_state(), random.getstate())
    again = fit(name, host, book)
    assert again.digest == edit.digest and host.weights_hash() == start
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())
    assert all(p.requires_grad and p.grad is None for p in host.model.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in edit.parts().values())
    assert edit.provenance.requests == (PAIRS.record,) and capfd.readouterr().out == ""


def test_it_acts_inside_is_saved_and_taken_off_exactly(fitted, tmp_path):
    _, host, edit = fitted
    before = logits(host)
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(path)
    assert loaded.digest == edit.digest and b"plays the" not in path.read_bytes()
    with edit.on(host):
        inside = logits(host)
        assert not torch.allclose(inside, before, atol=1e-5)
    assert torch.equal(logits(host), before)
    with loaded.on(host):
        assert torch.equal(logits(host), inside)
    with edit.with_strength(0.0).on(host):
        assert torch.equal(logits(host), before)


def test_rows_of_a_batch_answer_as_alone_and_edits_compose(fitted):
    _, host, edit = fitted
    with edit.on(host):
        together = host.generate(list(TEXTS), max_new_tokens=3)
        assert together == [host.generate(text, max_new_tokens=3) for text in TEXTS]
    other = edit.with_strength(0.5 * edit.strength)
    start, seen = logits(host), []
    for order in ((edit, other), (other, edit)):
        for one in order:
            one.apply_(host)
        seen.append(logits(host))
        for one in order:
            one.revert_(host)
        assert torch.equal(logits(host), start)
    assert torch.equal(*seen)


@pytest.mark.parametrize("to", list(EXPORTERS))
def test_an_export_is_refused_with_a_reason(to, tmp_path, book):
    host = fresh("llama")
    needs = host if EXPORTERS.get(to).needs_host else None
    with pytest.raises(EditError) as reason:
        errata.export(fit("angular", host, book), tmp_path / "out", to=to, host=needs)
    assert len(str(reason.value).split()) >= 8 and not list(tmp_path.iterdir())


# --- what each one's edit is ----------------------------------------------------------------


def means(
    host, module: str, tokens: str = "last", *, inputs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states of the answers' tokens the plain way, a text at a time ``[pairs, d]`` each."""
    found = []
    for answers in ([p.positive for p in PAIRS.pairs], [p.negative for p in PAIRS.pairs]):
        rows = []
        for pair, answer in zip(PAIRS.pairs, answers, strict=True):
            row = host.encode_answer(pair.prompt, answer)
            at = (len(row.ids) - 1,) if tokens == "last" else tuple(range(row.start, len(row.ids)))
            one = LabelledRows((row.ids,), (at,), torch.zeros(len(at)))
            rows.append(module_states(host, one, [module], inputs=inputs)[module].double().mean(0))
        found.append(torch.stack(rows))
    return found[0], found[1]


def values(edit: SteerEdit) -> torch.Tensor:
    return edit.sites[0].payload["values"].double()


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_caa_is_the_mean_difference(book, tokens):
    host = fresh("llama")
    edit = fit("caa", host, book, tokens=tokens, layers=[2])
    one, other = means(host, host.layout.blocks[2], tokens)
    torch.testing.assert_close(values(edit)[0], (one - other).mean(0), atol=1e-5, rtol=1e-4)
    assert edit.sites[0].module == host.layout.blocks[2] and edit.strength == 1.0


def test_actadd_is_the_difference_of_one_pair_token_by_token(book):
    host = fresh("llama")
    pairs = Contrasts("mood", (ContrastPair("", "The rain fell on", "The cello"), PAIRS.pairs[0]))
    edit = errata.edit(host, pairs, method="actadd", layers=[0], strength=2.0)
    long, short = (host.encode_answer("", text).ids for text in ("The rain fell on", "The cello"))
    space = host.encode(" ", special=False).ids[0]
    rows = [long, (*short, *[space] * (len(long) - len(short)))]
    every = LabelledRows(tuple(rows), (tuple(range(len(long))),) * 2, torch.zeros(2 * len(long)))
    found = module_states(host, every, [host.layout.blocks[0]])[host.layout.blocks[0]]
    expected = found[: len(long)] - found[len(long) :]
    torch.testing.assert_close(values(edit), expected.double(), atol=1e-5, rtol=1e-4)
    assert edit.sites[0].positions == "first" and edit.sites[0].count == len(long) and edit.strength == 2.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_iti_shifts_heads_before_the_output_map(book, family):
    """Its constant behind the map is what adding alpha sigma u to the chosen heads before it gives."""
    host = fresh(family)
    edit = fit("iti", host, book, heads=1, layers=[1])
    (layer, number, right), site = edit.provenance.notes["heads"][0], host.layout.attn_out[1]
    one, other = means(host, site.name, inputs=True)
    width = site.d_in // 4
    own = slice(number * width, (number + 1) * width)
    u = steering.unit((one - other).mean(0)[own])
    sigma = (torch.cat([one, other])[:, own] @ u).std(correction=0)
    shift = torch.zeros(site.d_in, dtype=torch.float64)
    shift[own] = sigma * u
    module = host.model.get_submodule(site.name)
    behind = (module(shift.float()[None]) - module(torch.zeros(1, site.d_in)))[0]
    torch.testing.assert_close(values(edit)[0].float(), behind.detach(), atol=1e-5, rtol=1e-4)
    assert layer == 1 and 0 <= right <= 1 and edit.strength == 15.0


def test_repe_reads_the_first_component_and_projects_it_off(book):
    host = fresh("llama")
    edit = fit("repe", host, book, layers=[1])
    one, other = means(host, host.layout.blocks[1])
    _, _, vectors = torch.linalg.svd(one - other)
    unit = steering.unit(values(edit)[0])
    assert abs(float(unit @ vectors[0])) > 1 - 1e-6 and float((one - other).mean(0) @ unit) > 0
    off = fit("repe", host, book, layers=[1], operator="project")
    with off.on(host):
        one, other = means(host, host.layout.blocks[1])
    assert float((torch.cat([one, other]) @ off.sites[0].payload["basis"][0].double()).abs().max()) < 1e-5
    assert fit("repe", host, book, operator="piecewise", reader="means").sites[0].form == "piecewise"


def test_a_conceptor_lets_nothing_or_the_span_pass(book):
    host = fresh("llama")
    module = host.layout.blocks[1]
    plain = means(host, module, "all")[0]
    for aperture, expected in ((1e-4, 0 * plain), (1e4, plain)):
        with fit("conceptor", host, book, layers=[1], aperture=aperture).on(host):
            torch.testing.assert_close(means(host, module, "all")[0], expected, atol=1e-2, rtol=1e-3)
    quotas = [
        fit("conceptor", host, book, aperture=a).provenance.notes["quotas"][0] for a in (0.1, 1.0, 10.0)
    ]
    assert quotas == sorted(quotas)
    for poles in ("both", "contrast"):
        assert fit("conceptor", host, book, poles=poles).provenance.notes["quotas"][0] < 1


def test_angular_keeps_norms_and_points_along_the_behaviour(book):
    host = fresh("llama")
    edit = fit("angular", host, book, layers=[1], source=1)
    one, other = means(host, host.layout.blocks[1])
    first = steering.unit((one - other).mean(0))
    plane = edit.sites[0].payload["plane"].double()
    torch.testing.assert_close(plane[0], first, atol=1e-5, rtol=1e-4)
    with edit.on(host):
        moved = means(host, host.layout.blocks[1])[0]
    torch.testing.assert_close(moved.norm(dim=1), one.norm(dim=1), atol=1e-4, rtol=1e-4)
    assert float((moved @ plane[1]).abs().max()) < 1e-4 and float((moved @ plane[0]).min()) > 0


def test_loreft_changes_a_subspace_and_learns_the_answers(book):
    host = fresh("llama")
    edit = fit("loreft", host, book, layers=[1], rank=2, steps=6, learning_rate=0.1)
    left = edit.sites[0].payload["left"].double()  # R^T
    torch.testing.assert_close(left.mT @ left, torch.eye(2).double(), atol=1e-5, rtol=0)
    module, text = (
        host.layout.blocks[1],
        LabelledRows((host.encode_prompt(TEXTS[0]),), ((0,),), torch.zeros(1)),
    )
    before = module_states(host, text, [module])[module].double()
    with edit.on(host):
        moved = module_states(host, text, [module])[module].double() - before
    assert float(moved.norm()) > 0
    torch.testing.assert_close(moved - moved @ left @ left.mT, 0 * moved, atol=1e-5, rtol=0)
    notes = edit.provenance.notes
    assert notes["loss"] < notes["loss_before"] - 0.05, (
        "and the edit in place gives the loss that training saw"
    )
    for form, kind in (("direft", "rank"), ("add", "vector"), ("set", "projection")):
        other = fit("loreft", host, book, layers=[1], form=form)
        assert other.sites[0].form == kind and other.sites[0].positions == "ends"


def losses(host) -> float:
    """Return the mean loss per token of the positive answers, as the model is now."""
    from errata.evaluation import likelihood

    rows = [host.encode_answer(pair.prompt, pair.positive) for pair in PAIRS.pairs]
    scores = [logprobs for logprobs, _ in likelihood.score(host, rows)]
    return -sum(sum(one) / len(one) for one in scores) / len(scores)


@pytest.mark.parametrize("form", ["loreft", "set"])
def test_the_edit_is_the_function_that_was_trained(book, form):
    host = fresh("llama")
    edit = fit("loreft", host, book, form=form)
    with edit.on(host):
        assert losses(host) == pytest.approx(edit.provenance.notes["loss"], abs=1e-4)


def test_reps_makes_the_positive_answers_likelier_and_its_opposite_the_others(book):
    host = fresh("llama")
    edit = fit("reps", host, book, steps=10, learning_rate=0.1)
    norm = edit.provenance.notes["state_norms"][0]
    assert float(values(edit).norm()) == pytest.approx(edit.provenance.notes["factor"] * norm, rel=1e-4)

    def margin() -> float:
        from errata.evaluation import likelihood

        sides = [
            likelihood.score(host, [host.encode_answer(p.prompt, getattr(p, side)) for p in PAIRS.pairs])
            for side in ("positive", "negative")
        ]
        one, other = (sum(sum(lp) / len(lp) for lp, _ in side) / len(side) for side in sides)
        return one - other

    plain = margin()
    with edit.on(host):
        assert margin() > plain + 0.05
    with edit.with_strength(-1.0).on(host):
        assert margin() < plain


def test_features_are_chosen_added_and_clamped(book):
    host = fresh("llama")
    module = host.layout.blocks[1]
    edit = fit("sae", host, book)
    (feature,), (difference,) = (edit.provenance.notes[name] for name in ("features", "differences"))
    from safetensors.torch import load_file

    tensors = load_file(book)
    torch.testing.assert_close(
        values(edit)[0].float(), difference * tensors["W_dec"][feature], atol=1e-4, rtol=1e-4
    )
    clamped = fit("sae", host, book, how="clamp", features=[7])
    assert clamped.sites[0].form == "features" and clamped.provenance.notes["features"] == [7]
    several = fit("sae", host, book, how="sta", atoms=0.5).provenance.notes
    assert 1 <= several["of"] <= 24
    with pytest.raises(ConfigError, match="feature 48 does not exist"):
        fit("sae", host, book, features=[48])
    with pytest.raises(ConfigError, match="--set dictionary"):
        errata.edit(host, PAIRS, method="sae")
    with pytest.raises(DataError, match="no .safetensors file"):
        errata.edit(host, PAIRS, method="sae", dictionary=str(book.parent / "none.safetensors"))
    with pytest.raises(DataError, match=r"W_enc is|W_dec is"):
        errata.edit(fresh("llama", hidden_size=64), PAIRS, method="sae", dictionary=str(book))
    assert module == edit.sites[0].module


@pytest.mark.parametrize("how", ["add", "clamp", "sta"])
@pytest.mark.parametrize("shape", [(0, 32), (0,), ()])
def test_a_dictionary_without_features_is_refused(how, shape, tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({"W_dec": torch.zeros(shape), "W_enc": torch.zeros(32, 0), "b_enc": torch.zeros(0)}, path)
    with pytest.raises(DataError, match=r"W_dec is \[.*expected \[features, 32\]"):
        fit("sae", fresh("llama"), path, how=how)


@pytest.mark.parametrize(
    ("family", "steered"),
    [
        ("qwen3_5_text", [3]),
        ("jamba", [1, 3]),
        ("lfm2", [2]),
        ("recurrent_gemma", [2]),
        ("rwkv", []),
        ("mamba", []),
    ],
)
def test_iti_takes_heads_of_attention_alone(family, steered, book):
    """What a state space, a recurrence or a convolution gives has no heads to slice it into."""
    host = errata.load(new_model(family, HYBRIDS[family][0], seed=0).float(), tokenizer())
    if not steered:
        with pytest.raises(ConfigError, match="no layer has an output map of attention"):
            fit("iti", host, book)
        return
    edit = fit("iti", host, book, heads=4 * len(steered))
    assert sorted({layer for layer, _, _ in edit.provenance.notes["heads"]}) == steered
    names = [site.name for site in host.layout.attn_out if site is not None and site.layer in steered]
    assert [site.module for site in edit.sites] == names


def test_pairs_are_read_split_and_refused(tmp_path, book):
    path = tmp_path / "music.jsonl"
    assert write_contrasts(path, PAIRS.pairs) == 12 and read_contrasts(path) == PAIRS
    parts = PAIRS.split((0.2, 0.3), seed=1)
    subjects = [{pair.subject for pair in part.pairs} for part in parts]
    assert [len(one) for one in subjects] == [3, 1, 2] and set.union(*subjects) == set(NAMES)
    assert not subjects[0] & subjects[1] and parts == PAIRS.split((0.2, 0.3), seed=1) != PAIRS.split(
        (0.2, 0.3)
    )
    with pytest.raises(RequestError, match="too few"):
        Contrasts("music", PAIRS.pairs[:2]).split((0.5,))
    texts = [ContrastPair("", f"plays {i}", f"lives in {i}", "" if i % 2 else None) for i in range(6)]
    alone = Contrasts("music", tuple(texts)).split(
        (0.2, 0.3)
    )  # without prompt and subject each is about itself
    assert [len(part.pairs) for part in alone] == [3, 1, 2]
    assert {pair for part in alone for pair in part.pairs} == set(texts)
    with pytest.raises(RequestError, match="both 'yes'"):
        Contrasts("music", (ContrastPair("Is it?", "yes", "yes "),))
    path.write_text(
        '{"positive": "a"}\n{"positive": "a", "negative": "b", "colour": "c"}\n', encoding="utf-8"
    )
    with pytest.raises(RequestError, match=r"missing negative(.|\n)*unknown field 'colour'"):
        read_contrasts(path)
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    with pytest.raises(ConfigError, match="contrast pairs.*errata steer"):
        errata.edit(host, request, method="caa")
    with pytest.raises(ConfigError, match="methods for those: .*caa"):
        errata.edit(host, PAIRS, method="rome")
    with pytest.raises(ConfigError, match="one set of contrast pairs a fit, found 2"):
        errata.edit(host, [PAIRS, PAIRS], method="caa")
    with pytest.raises(ConfigError, match="some of 0 to 2"):
        fit("caa", host, book, layers=[3])
    with pytest.raises(RequestError, match="window"):
        errata.edit(host, Contrasts("long", (ContrastPair("", "Esk " * 400, "no"),)), method="caa")
    with pytest.raises(ConfigError, match="expected 4 pairs or more"):
        errata.edit(host, Contrasts("few", PAIRS.pairs[:3]), method="iti")
    with pytest.raises(ConfigError, match="does not go on"):
        fit("caa", host, book, after=fit("caa", host, book))


def test_repe_at_the_writers_leaves_nothing_of_the_vector(book, tmp_path):
    """Directional ablation, also in the exported model: by another path than the edit's own."""
    host = fresh("llama", tie_word_embeddings=False)
    edit = fit("repe", host, book, operator="project", where="writers", layers=[1])
    basis = edit.sites[0].payload["basis"]
    read = fit("repe", host, book, operator="project", layers=[1])
    assert torch.equal(basis, read.sites[0].payload["basis"])
    assert len(edit.sites) == 1 + 2 * 3 and edit.sites[0].module == "model.embed_tokens"
    ids = torch.tensor([host.encode(TEXTS[0]).ids])
    with torch.no_grad(), edit.on(host):
        states = host.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(float((h @ basis.mT).abs().max()) < 1e-6 for h in states[:-1])
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert receipt.verified is not None and receipt.verified["effect"] > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2"])
def test_repe_at_the_writers_is_refused_where_more_writes(family, book):
    """Learned positions, a norm behind the embedding, norms behind the maps."""
    host = fresh(family)
    with torch.no_grad():
        for weight in host.model.parameters():
            if weight.ndim == 1:  # norms as a trained model has them, not all ones
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match="writes into the stream"):
        fit("repe", host, book, operator="project", where="writers")


def test_repe_at_the_writers_takes_one_layer_and_projects(book):
    with pytest.raises(ConfigError, match="where: writers is of operator=project"):
        fit("repe", fresh("llama"), book, where="writers")
    with pytest.raises(ConfigError, match="expected the one block"):
        fit("repe", fresh("llama"), book, where="writers", operator="project", layers=[0, 1])
