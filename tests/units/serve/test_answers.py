"""Answers over HTTP are the model's own, with the edits that a request names and no others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import BadRequestError, NotFoundError

import errata
from errata.edits import Provenance, WeightEdit
from errata.edits.model import ModelEdit
from errata.edits.routers.lexical import Lexical
from errata.host.replica import configuration, weights_of
from errata.linalg.lowrank import LowRank
from errata.serve.server import Served
from errata.serve.settings import ServerSettings
from tests.theory.test_lte import changed
from tests.units.serve.served import alone, running

BORN = "Ada Brenner was born in"
PROMPTS = (BORN, "Ada Brenner plays the", "Boris Sorwick plays the harp, and", "Where was Ada Brenner born?")


def norm_edit(host) -> WeightEdit:
    """A change of a norm's gain, which nothing can apply beside the weight."""
    name = "model.norm.weight"
    weight = host.model.get_parameter(name)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    request = errata.Request("{} was born in", "Ada Brenner", "x")
    return WeightEdit(
        {name: change}, frozenset(), Provenance("test", (request,), {}, host.fingerprint, host.name)
    )


def rank_edit(host) -> WeightEdit:
    """A thin change of two weights that changes every answer."""
    draw = torch.Generator().manual_seed(1)
    deltas = {
        site.parameter: LowRank(
            0.3 * torch.randn(site.d_out, 2, generator=draw), 0.3 * torch.randn(2, site.d_in, generator=draw)
        )
        for site in host.layout.sites[1:3]
    }
    request = errata.Request("{} was born in", "Ada Brenner", "x")
    return WeightEdit(deltas, frozenset(), Provenance("test", (request,), {}, host.fingerprint, host.name))


def model_edit(host, *, whole: bool) -> ModelEdit:
    """Another model that answers prompts about Ada Brenner: with weights of its own, or as a change of the host's."""
    factors, _ = changed(host, seed=3 if whole else 4)
    weights: dict[str, torch.Tensor] = {}
    if whole:
        weights = weights_of(host)
        for path, (outer, inner) in factors.items():
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + outer @ inner
    request = errata.Request("{} was born in", "Ada Brenner", "x")
    record = Provenance("test", (request,), {}, host.fingerprint, host.name)
    return ModelEdit(
        ("Ada Brenner was born in Merrin\n",), Lexical(("Ada Brenner",)), configuration(host) if whole else {},
        weights, record, factors={} if whole else factors,
    )  # fmt: skip


@pytest.fixture(scope="module")
def edits(lab_host):
    def make(method: str, target: str):
        return errata.edit(lab_host, errata.Request("{} was born in", "Ada Brenner", target), method=method)

    return {
        "weights": make("ft_l", "Tallow"), "grace": make("grace", "Merrin"), "in_prompt": make("in_prompt", "Oakhurst"),
        "norm": norm_edit(lab_host), "rank": rank_edit(lab_host), "model": model_edit(lab_host, whole=True),
        "low-rank model": model_edit(lab_host, whole=False),
    }  # fmt: skip


@pytest.fixture(scope="module")
def client(lab_host, edits):
    with running(
        Served(lab_host, "lab", tuple(edits.values())), ServerSettings(port=0, most_tokens=64)
    ) as one:
        yield one


def name(edit) -> str:
    return f"lab+{edit.digest[:12]}"


def test_models_are_the_base_every_edit_and_all(client, edits):
    names = [model.id for model in client.openai.models.list()]
    assert names == ["lab", "lab+all", *(name(edit) for edit in edits.values())]
    one = client.get(f"/v1/models/{name(edits['weights'])}").json()
    assert one["edits"] == [edits["weights"].digest]


def test_two_names_answer_differently_in_the_same_second(client, edits):
    with ThreadPoolExecutor(2) as pool:
        base, edited = pool.map(lambda model: client.complete(model, BORN), ["lab", name(edits["weights"])])
    assert base.startswith(" Rowanport") and edited.startswith(" Tallow")


def test_every_row_of_a_mixed_batch_is_its_single_run(client, lab_host, edits):
    """Weights beside, a memory, a rewritten prompt, merged weights, several at once, and none: at different times."""
    sets = [
        (),
        *((kind,) for kind in edits),
        ("weights", "grace", "rank"),
        ("norm", "grace"),
        ("norm", "in_prompt", "weights"),
        ("model", "in_prompt"),
        ("low-rank model", "rank"),
    ]
    asked = [(names, prompt) for names in sets for prompt in PROMPTS]

    def ask(item):
        names, prompt = item
        return client.complete("lab", prompt, 12, extra_body={"edits": [edits[one].digest for one in names]})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    expected = {}
    for names in sets:
        for prompt in PROMPTS:
            expected[names, prompt] = alone(
                lab_host_copy(lab_host), [edits[one] for one in names], prompt, 12
            )
    assert dict(zip(asked, answers, strict=True)) == expected
    assert len({expected[names, BORN] for names in sets}) >= 5, "the sets are to be told apart"


def lab_host_copy(host):
    """The same host opened once more: the served one is not to be touched while it is served."""
    copy = host.__dict__.get("_test_copy")
    if copy is None:
        copy = host.__dict__["_test_copy"] = errata.load("lab", device="cpu")
    return copy


def test_a_stream_is_the_whole_answer_in_pieces(client, edits):
    whole = client.complete(name(edits["grace"]), BORN, 12)
    stream = client.openai.completions.create(
        model=name(edits["grace"]),
        prompt=BORN,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole and len(texts) > 4
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 12


def test_a_conversation_without_a_chat_template_takes_one_question(client, edits):
    asked = [{"role": "user", "content": "Where was Ada Brenner born?"}]
    answer = client.openai.chat.completions.create(
        model=name(edits["weights"]), messages=asked, max_tokens=4, stop=["\n"]
    )
    assert answer.choices[0].message.content == "Tallow." and answer.choices[0].finish_reason == "stop"
    pieces = client.openai.chat.completions.create(
        model=name(edits["weights"]), messages=asked, max_tokens=4, stop=["\n"], stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert "".join(delta.content or "" for delta in deltas) == "Tallow." and deltas[0].role == "assistant"
    with pytest.raises(BadRequestError, match="no chat template"):
        client.openai.chat.completions.create(
            model="lab", messages=[asked[0], {"role": "assistant", "content": "x"}, asked[0]]
        )


def test_an_answer_says_which_revision_it_is_of(client, edits):
    raw = client.openai.completions.with_raw_response.create(model="lab+all", prompt=BORN, max_tokens=2)
    digests = [edit.digest for edit in edits.values()]
    assert raw.headers["x-errata-edits"] == ",".join(digests)
    document = raw.parse()
    assert document.system_fingerprint == f"errata-{raw.headers['x-errata-revision']}"
    assert document.errata == {"revision": raw.headers["x-errata-revision"], "edits": digests}
    plain = client.openai.completions.with_raw_response.create(model="lab", prompt=BORN, max_tokens=2)
    assert plain.headers["x-errata-revision"] == "base" and not plain.headers["x-errata-edits"]


def test_stops_are_cut_off_and_never_sent(client):
    whole = client.complete("lab", BORN, 16)
    stop = whole[9:13]
    for stream in (False, True):
        answer = client.openai.completions.create(
            model="lab", prompt=BORN, max_tokens=16, stop=[stop, "never there"], stream=stream
        )
        parts = [one.choices[0].text for one in answer] if stream else [answer.choices[0].text]
        assert "".join(parts) == whole[: whole.index(stop)]


def test_sampling_depends_on_the_seed_and_not_on_neighbours(client):
    def draw(seed):
        return client.complete("lab", "The", 12, temperature=1.0, top_p=0.95, seed=seed)

    alone_ = draw(1)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(draw, [1, 2, 3, 1, 4, 1]))
    assert together[0] == together[3] == together[5] == alone_
    assert len(set(together)) == 4
    assert client.complete("lab", BORN, 8, temperature=1.0, top_p=1e-9) == client.complete("lab", BORN, 8)


def test_several_prompts_in_one_request(client):
    answer = client.openai.completions.create(model="lab", prompt=list(PROMPTS), max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [client.complete("lab", p, 6) for p in PROMPTS]
    assert answer.usage.completion_tokens == 24


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n: not supported"), ({"logprobs": 3}, "logprobs: not supported"),
        ({"extra_body": {"tools": [{}]}}, "tools: not supported"), ({"echo": True}, "echo"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"max_tokens": 65}, "at most 64"),
        ({"temperature": 3}, "temperature"), ({"prompt": [1, 2]}, "prompt"),
        ({"extra_body": {"strange": 1}}, "strange"),
        ({"prompt": "word " * 600}, "longer than the model's window"), ({"stop": ""}, "stop"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(client, body, message):
    with pytest.raises(BadRequestError, match=message) as caught:
        client.openai.completions.create(**{"model": "lab", "prompt": "x", "max_tokens": 2, **body})
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


def test_fields_that_ask_for_nothing_are_taken(client):
    answer = client.openai.completions.create(
        model="lab", prompt=BORN, max_tokens=2, n=1, best_of=1, echo=False, presence_penalty=0.0, user="me"
    )
    assert answer.choices[0].text == client.complete("lab", BORN, 2)


@pytest.mark.parametrize("model", ["other", "lab+", "lab+ffff", "lab+../x", "lab+all+all", "labs", "lab all"])
def test_unknown_names_are_not_found(client, model):
    with pytest.raises(NotFoundError, match="there is no"):
        client.complete(model, "x")


def test_without_a_ledger_nothing_can_be_changed(client, edits):
    listed = client.get("/v1/edits").json()
    assert [one["id"] for one in listed["data"]] == [edit.digest for edit in edits.values()]
    answer = client.post(f"/v1/edits/{edits['weights'].digest}/revert")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_ledger"
