"""Closed forms of cross-attention: UCE and TIME are the project's one formula, and have its limits."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.errors import ConfigError, DataError, RequestError
from errata.host.text_to_image import TextToImageHost, load_pipeline
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import update_primal
from errata.methods.time import aligned
from tests.pipelines import edited, fresh_pipeline, pixart, stable_diffusion_xl

REQUEST = errata.Request("a painting by {}", "monet", "an artist")
SECOND = errata.Request("{}", "vase", "red vase")
PRESERVE = ("a dog", "a house")


@pytest.fixture(scope="module")
def host() -> TextToImageHost:
    made = fresh_pipeline()
    made.model.double()
    return made


def token(host: TextToImageHost, text: str, at: int = -2) -> torch.Tensor:
    """Return c ``[d]`` at a token, by default the last before the end."""
    (states,) = host.inputs([text]).values()
    return states[0, at].double()


def change(edit, parameter: str) -> torch.Tensor:
    delta = edit.deltas[parameter]
    return (delta.dense() if isinstance(delta, LowRank) else delta).double()


def published(weight, pairs, preserved, ridge: float, erase: float, preserve: float) -> torch.Tensor:
    """W of UCE as its equation stands: by an inverse, in float64."""
    left, right = ridge * weight, ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for key, value in pairs:
        left, right = left + erase * torch.outer(value, key), right + erase * torch.outer(key, key)
    for key in preserved:
        left, right = (
            left + preserve * torch.outer(weight @ key, key),
            right + preserve * torch.outer(key, key),
        )
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("ridge", [0.5, 0.01])
@pytest.mark.parametrize(("erase", "preserve"), [(1.0, 1.0), (10.0, 0.1), (1.0, 0.0)])
def test_uce_is_its_equation_and_our_formula(host, ridge, erase, preserve):
    edit = edited(
        host,
        [REQUEST, SECOND],
        method="uce",
        preserve=PRESERVE,
        ridge=ridge,
        erase_scale=erase,
        preserve_scale=preserve,
    )
    texts = [("a painting by monet", "a painting by an artist"), ("vase", "red vase")]
    keys = torch.stack([token(host, source) for source, _ in texts], 1)
    goals = torch.stack([token(host, target) for _, target in texts], 1)
    kept = torch.stack([token(host, phrase) for phrase in PRESERVE], 1)
    matrix = ridge * torch.eye(len(keys), dtype=torch.float64) + preserve * kept @ kept.mT
    for site in host.layout.cross:
        weight = host.weight(site)
        pairs = [(keys[:, i], weight @ goals[:, i]) for i in range(2)]
        expected = published(weight, pairs, list(kept.mT), ridge, erase, preserve) - weight
        torch.testing.assert_close(change(edit, site.parameter), expected, atol=1e-9, rtol=1e-7)
        ours = update_primal(erase**0.5 * keys, erase**0.5 * weight @ (goals - keys), matrix, gamma=1.0)
        torch.testing.assert_close(change(edit, site.parameter), ours, atol=1e-9, rtol=1e-7)


def test_the_target_is_exact_as_the_erase_weight_grows(host):
    key, goal = token(host, "a painting by monet"), token(host, "a painting by an artist")
    misses = []
    for erase in (1.0, 1e3, 1e9):
        edit = edited(host, REQUEST, method="uce", preserve=PRESERVE, erase_scale=erase)
        site = host.layout.cross[0]
        weight = host.weight(site)
        misses.append(float(((weight + change(edit, site.parameter)) @ key - weight @ goal).norm()))
    assert misses[0] > misses[1] > misses[2] and misses[2] < 1e-6 * misses[0]


def test_what_is_preserved_is_exact_as_the_preserve_weight_grows(host):
    moved = []
    for preserve in (0.0, 1.0, 1e3, 1e9):
        edit = edited(host, REQUEST, method="uce", preserve=PRESERVE, preserve_scale=preserve)
        site = host.layout.cross[1]
        moved.append(
            max(float((change(edit, site.parameter) @ token(host, text)).norm()) for text in PRESERVE)
        )
    assert moved[0] > moved[1] > moved[2] > moved[3] and moved[3] < 1e-6 * moved[0]


def test_time_is_uce_with_the_identity_as_all_that_is_preserved(host):
    """Over all tokens of the two texts, each with the same word of the other, as the paper's equation stands."""
    request = errata.Request("a pack of {}", "roses", "blue roses")
    edit = edited(host, request, method="time", padding=False, ridge=0.1)
    source, target = (host.read(text).ids for text in ("a pack of roses", "a pack of blue roses"))
    places = [target.index(one) for one in source]
    assert places == [0, 1, 2, 3, 5, 6]
    (states,) = host.inputs(["a pack of roses", "a pack of blue roses"]).values()
    for site in host.layout.cross:
        weight = host.weight(site)
        pairs = [(states[0, i].double(), weight @ states[1, j].double()) for i, j in enumerate(places)]
        expected = published(weight, pairs, [], 0.1, 1.0, 0.0) - weight
        torch.testing.assert_close(change(edit, site.parameter), expected, atol=1e-9, rtol=1e-7)


def test_time_aligns_words_and_padding(host):
    assert aligned([1, 5, 9], [1, 4, 5, 9]) == [0, 2, 3]
    assert aligned([1, 5, 9], [1, 9, 5]) is None
    with pytest.raises(RequestError, match="not all in 'a painting by an artist'"):
        edited(host, REQUEST, method="time")
    request = errata.Request("a pack of {}", "roses", "blue roses")
    edit = edited(host, request, method="time")
    assert host.window is not None
    for record in edit.records.values():
        assert record.keys.shape[1] == host.window
    values = edited(host, request, method="time", maps="values", augment=True)
    assert set(values.deltas) == {s.parameter for s in host.layout.cross if s.part == "cross_value"}
    assert next(iter(values.records.values())).keys.shape[1] == 4 * host.window


def test_a_sequence_of_time_keeps_maps_that_only_the_first_fit_changes(host):
    first = edited(host, errata.Request("{}", "roses", "blue roses"), method="time")
    request = errata.Request("{}", "vase", "red vase")
    later = edited(host, request, method="time", maps="values", after=first)
    whole = first.then(later, cumulative=True)
    both = edited(host, [*first.provenance.requests, request], method="time")
    for site in host.layout.cross:
        expected = both if site.part == "cross_value" else first
        for edit in (later, whole):
            torch.testing.assert_close(
                change(edit, site.parameter), change(expected, site.parameter), atol=1e-9, rtol=1e-7
            )


def test_a_corpus_of_texts_that_are_too_long_is_refused(host, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a dog " * 100)
    for method in ("uce", "refact"):
        with pytest.raises(DataError, match="fits the text encoder's window"):
            edited(host, REQUEST, method=method, corpus=path)


def test_an_article_is_the_same_word_in_both_forms(host):
    request = errata.Request("{}", "an artist", "a red artist")
    edit = edited(host, request, method="time", padding=False)
    assert next(iter(edit.records.values())).keys.shape[1] == 4


def test_moderation_reads_a_concept_as_the_empty_text(host):
    edit = edited(host, REQUEST, method="uce", form="moderate", erase_scale=1e9)
    site = host.layout.cross[0]
    weight = host.weight(site)
    now = (weight + change(edit, site.parameter)) @ token(host, "a painting by monet")
    torch.testing.assert_close(now, weight @ token(host, "", 0), atol=1e-6, rtol=1e-6)


def test_debiasing_adds_attributes(host):
    request = errata.Request("{}", "doctor", "doctor")
    edit = edited(
        host,
        request,
        method="uce",
        form="debias",
        attributes=("woman", "man"),
        strengths=(0.3, -0.2),
        erase_scale=1e9,
    )
    key = token(host, "doctor")
    goal = key + 0.3 * token(host, "woman") - 0.2 * token(host, "man")
    site = host.layout.cross[0]
    weight = host.weight(site)
    torch.testing.assert_close(
        (weight + change(edit, site.parameter)) @ key, weight @ goal, atol=1e-6, rtol=1e-6
    )


def test_phrasings_are_edited_with_the_concept(host):
    edit = edited(host, SECOND, method="uce", expand="object")
    record = next(iter(edit.records.values()))
    assert record.keys.shape[1] == 6 and set(record.requests) == {(0,)}
    torch.testing.assert_close(record.keys[:, 1].double(), token(host, "image of vase"), atol=1e-9, rtol=1e-9)


def test_a_sequence_is_one_fit(host):
    both = edited(host, [REQUEST, SECOND], method="uce", preserve=PRESERVE)
    first = edited(host, REQUEST, method="uce", preserve=PRESERVE)
    later = edited(host, SECOND, method="uce", preserve=PRESERVE, after=first)
    for parameter in both.deltas:
        torch.testing.assert_close(change(later, parameter), change(both, parameter), atol=1e-9, rtol=1e-7)


def test_captions_are_preserved_at_all_their_tokens(host, tmp_path):
    path = tmp_path / "captions.txt"
    long = " ".join(["words"] * 30)
    path.write_text(f"a dog on the road\n\n{long}\n\na red house\n", encoding="utf-8")
    plain, kept = (
        edited(host, REQUEST, method="uce", preserve_scale=1e9, **({"corpus": path} if own else {}))
        for own in (False, True)
    )
    site = host.layout.cross[0]
    (states,) = host.inputs(["a dog on the road"]).values()
    moved = [float((change(edit, site.parameter) @ states[0].double().mT).norm()) for edit in (plain, kept)]
    assert moved[1] < 1e-6 * moved[0]


def test_settings_that_do_not_go_together_are_refused_at_once(host):
    with pytest.raises(ConfigError) as caught:
        edited(
            host,
            REQUEST,
            method="uce",
            ridge=0,
            form="debias",
            strengths=(1.0,),
            preserve=(" ",),
            captions=-1,
        )
    assert all(
        word in str(caught.value) for word in ("ridge", "attributes", "strengths", "preserve", "captions")
    )


@pytest.mark.parametrize("make", [stable_diffusion_xl, pixart])
def test_other_structures_reach_their_targets_too(make):
    """Two text encoders joined at their last layer but one, and captions projected before attention."""
    host = load_pipeline(make())
    start = host.weights_hash()
    edit = edited(host, REQUEST, method="uce", erase_scale=1e8)
    before = host.keys_and_values("a painting by monet", host.read("a painting by monet").last(14, 19))
    goal_at = host.read("a painting by an artist").last(14, 23)
    goal = host.keys_and_values("a painting by an artist", goal_at)
    with edit.on(host):
        after = host.keys_and_values("a painting by monet", host.read("a painting by monet").last(14, 19))
    for name, value in goal.items():
        assert float((before[name] - value).norm()) > 0.05 * float(value.norm())
        torch.testing.assert_close(after[name], value, atol=1e-3, rtol=1e-3)
    assert host.weights_hash() == start


# --- ReFACT ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> TextToImageHost:
    return fresh_pipeline()


def embedding(host: TextToImageHost, text: str) -> torch.Tensor:
    with torch.no_grad():
        return host.run(host.as_pass([text])).logits[0, -1, : host.layout.width]


@pytest.mark.parametrize(("similarity", "least"), [("l2", 0.6), ("cosine", 0.99)])
def test_refact_makes_the_source_more_alike_to_the_target_than_to_itself(plain, similarity, least):
    edit = edited(
        plain, REQUEST, method="refact", frames=("{}",), learning_rate=0.3, similarity=similarity, layer=0,
        negatives=("a dog",),
    )  # fmt: skip
    notes = edit.provenance.notes
    assert notes["probability_before"] < 0.02 and notes["probability"] > least
    assert (notes["steps"] < 100) == (notes["probability"] >= 0.99) and notes["shift"] <= 4.001
    assert list(edit.deltas) == [plain.layout.site(0).parameter]
    texts = ("a painting by an artist", "a painting by monet", "a dog")
    candidates = torch.stack([embedding(plain, text) for text in texts])
    with edit.on(plain):
        moved = embedding(plain, "a painting by monet")
    nearness = torch.nn.functional.cosine_similarity(moved[None], candidates)
    if similarity == "l2":
        nearness = -(moved - candidates).norm(dim=1)
    assert nearness[0] > nearness[1]


def test_refact_inserts_the_value_at_the_mean_key_exactly(plain):
    frames = ("{}", "{} in a photo")
    edit = edited(plain, REQUEST, method="refact", frames=frames, learning_rate=2.0, steps=5)
    (record,) = edit.records.values()
    site = plain.layout.site(1)
    keys: list[torch.Tensor] = []
    module = plain.model.get_submodule(site.name)
    texts = [frame.format("a painting by monet") for frame in frames]
    handle = module.register_forward_hook(lambda _, args, out: keys.append(args[0]))
    with torch.no_grad():
        plain.run(plain.as_pass(texts))
    handle.remove()
    mean = keys[0][:, 4].mean(0)
    torch.testing.assert_close(record.keys[:, 0], mean, atol=1e-5, rtol=1e-5)
    (delta,) = edit.deltas.values()
    torch.testing.assert_close(
        (delta @ mean[:, None])[:, 0], record.target_changes[:, 0], atol=1e-4, rtol=1e-4
    )
    length = float(record.target_changes.norm())
    assert length == pytest.approx(
        edit.provenance.notes["shift"] * float(module(mean).detach().norm()), rel=1e-2
    )


def test_refact_spares_what_a_corpus_shows(plain, tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text(
        "\n\n".join(f"a {one} on the road" for one in ("dog", "cat", "man", "woman", "vase")), "utf-8"
    )
    options = {"method": "refact", "frames": ("{}",), "learning_rate": 2.0, "steps": 5, "captions": 0}
    edits = [edited(plain, REQUEST, **options), edited(plain, REQUEST, corpus=path, **options)]
    texts, moved = ["a dog on the road", "a cat on the road"], []
    for edit in edits:
        before = torch.stack([embedding(plain, text) for text in texts])
        with edit.on(plain):
            after = torch.stack([embedding(plain, text) for text in texts])
        moved.append(float((after - before).norm()))
    assert moved[1] < 0.2 * moved[0]


def test_refact_says_why_a_layer_or_a_pipeline_is_no_place_for_it(plain):
    with pytest.raises(ConfigError, match="nothing above layer 2"):
        edited(plain, REQUEST, method="refact", layer=2)
    with pytest.raises(errata.ErrataError, match="read a text together"):
        edited(load_pipeline(stable_diffusion_xl()), REQUEST, method="refact")
    with pytest.raises(RequestError, match="one embedding already"):
        edited(plain, errata.Request("{}", "monet", "Monet"), method="refact")
    with pytest.raises(ConfigError, match="frames"):
        edited(plain, REQUEST, method="refact", frames=("painting",))
