"""What a model recites: the index against a plain search, probabilities against sampling, estimates, secrets."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ConfigError, DataError
from errata.inspect import extract as inspecting
from errata.inspect.extract import discovery, estimates, exposure, extract, recitals, wilson
from errata.inspect.extract_index import TokenIndex
from tests.models import fresh


def plain_places(texts, window):
    size = len(window)
    return [
        (i, j) for i, text in enumerate(texts) for j in range(len(text) - size + 1)
        if list(text[j : j + size]) == list(window)
    ]  # fmt: skip


def test_the_index_agrees_with_a_plain_search():
    draw = random.Random(0)
    texts = [[draw.randrange(3) for _ in range(draw.randrange(0, 30))] for _ in range(12)]
    index = TokenIndex(texts)
    for _ in range(300):
        window = [draw.randrange(3) for _ in range(draw.randrange(1, 7))]
        expected = plain_places(texts, window)
        assert index.places(window) == expected and index.count(window) == len(expected)
        longest = max(
            size for size in range(len(window) + 1) if not size or plain_places(texts, window[:size])
        )
        assert index.longest(window) == longest


def test_no_match_crosses_texts():
    index = TokenIndex([[1, 2], [3, 4]])
    assert index.count([2, 3]) == 0 and index.count([1, 2]) == 1 and index.longest([2, 3]) == 1
    assert index.spans([9, 1, 2, 3, 4], 2) == [(1, 3), (3, 5)]
    assert TokenIndex([]).count([1]) == 0


def test_the_digest_changes_with_one_token():
    assert TokenIndex([[1, 2, 3]]).digest != TokenIndex([[1, 2, 4]]).digest
    assert TokenIndex([[1, 2], [3]]).digest != TokenIndex([[1], [2, 3]]).digest


def greedy(host, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(host.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_what_greedy_decoding_gives_is_discovered():
    host = fresh("llama", seed=2)
    own = greedy(host, host.encode("Ada Brenner").ids, 6)
    size = len(own) - 6
    other = [*own[:-1], (own[-1] + 1) % 300]
    wrong = [*own[:size], *((token + 1) % 300 for token in own[size:])]
    found = recitals(host, [own, [1, 2], other, wrong], prefix=size, suffix=6)
    assert [one.text for one in found] == [0, 2, 3]
    assert [one.greedy for one in found] == [True, False, False]
    assert found[0].strength == 1 and found[0].exact == 1
    assert found[1].strength == 0 and found[1].exact == pytest.approx(5 / 6)
    assert found[2].strength == 0
    summary = discovery(found, prefix=size, suffix=6)
    assert summary.greedy == pytest.approx(1 / 3) and summary.texts == 3
    assert list(summary.within.values()) == sorted(summary.within.values())


def test_the_product_is_the_frequency_of_samples():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    one = inspecting._recital(0, logits, torch.tensor([0, 1]), 0.7, 2)
    scheme = [row.topk(2) for row in logits]
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(2000):
        drawn = [
            int(top.indices[torch.multinomial((top.values / 0.7).softmax(0), 1, generator=generator)])
            for top in scheme
        ]
        hits += drawn == [0, 1]
    low, high = wilson(hits, 2000, z=3.5)
    assert low < math.exp(one.log_probability) < high
    assert one.samples(0.5) < one.samples(0.9)
    never = inspecting._recital(0, logits, torch.tensor([2, 0]), 1.0, 1)
    assert never.samples() == math.inf
    sure = inspecting._recital(0, logits, torch.tensor([0, 1]), 1.0, 1)
    assert sure.samples() == 1


def test_good_turing_and_chao():
    assert estimates(Counter()) == (1.0, 0.0)
    unseen, total = estimates(Counter({"a": 1, "b": 1, "c": 2, "d": 5}))
    assert unseen == pytest.approx(2 / 9) and total == pytest.approx(4 + 2 / (2 * 2))
    # the mean of f_1 / n over draws is the mean mass that the draws before the last have not seen
    weights = [0.5, 0.3, 0.1, 0.1]
    draw = random.Random(0)
    ones, missing = 0.0, 0.0
    for _ in range(4000):
        drawn = draw.choices(range(4), weights, k=6)
        ones += estimates(Counter(drawn))[0]
        missing += sum(weight for kind, weight in enumerate(weights) if kind not in drawn[:-1])
    assert ones / 4000 == pytest.approx(missing / 4000, abs=0.02)


def test_samples_are_found_in_a_corpus_that_holds_them():
    host = fresh("llama", seed=2)
    from errata.host.generate import sample_rows
    from errata.host.tokens import encode_prompt

    start = encode_prompt(host.tokenizer, "").ids
    texts = sample_rows(host, [start] * 4, 12, top_k=None, seed=5)
    ids = [host.encode(text, special=False).ids for text in texts]
    found = extract(host, TokenIndex(ids), samples=4, tokens=12, window=4, seed=5)
    assert found.hits + found.dropped == sum(len(one) >= 4 for one in ids) and found.hits > 0
    assert found.total >= found.distinct
    nothing = extract(host, TokenIndex([[1, 2, 3]]), samples=2, tokens=8, window=8)
    assert nothing.hits == 0 and nothing.unseen == 1


def test_a_secret_is_as_exposed_as_its_rank():
    host = fresh("llama", seed=2)
    others = ["Tallow", "Merrin", "Esk", "harp"]
    logs = {}
    for text in others:
        row = host.encode_answer("Ada was born in", text)
        scores = host.model(torch.tensor([row.ids])).logits[0].detach().log_softmax(1)
        logs[text] = sum(float(scores[row.start - 1 + j, token]) for j, token in enumerate(row.target))
    order = sorted(others, key=lambda text: -logs[text])
    for rank, text in enumerate(order, 1):
        found = exposure(host, "Ada was born in", text, others)
        assert found.rank == rank and found.of == 4
        assert found.exposure == pytest.approx(2 - math.log2(rank))
    with pytest.raises(DataError, match="rank among"):
        exposure(host, "Ada", "Tallow", ["Tallow"])


def test_what_cannot_be_measured_is_refused():
    host = fresh("llama", seed=2)
    with pytest.raises(ConfigError, match="positive"):
        recitals(host, [[1, 2]], prefix=0, suffix=1)
    with pytest.raises(ConfigError, match="fits"):
        extract(host, TokenIndex([[1]]), samples=1, tokens=4, window=5)
    with pytest.raises(DataError, match="shorter"):
        discovery([], prefix=4, suffix=4)


def test_the_command_counts_and_keeps_texts_to_itself(tmp_path):
    secrets = tmp_path / "secrets.jsonl"
    secrets.write_text(json.dumps({"prompt": "Ada Brenner was born in", "secret": "Rowanport",
                                   "others": ["Tallow", "Merrin", "Oakhurst"]}) + "\n")  # fmt: skip
    options = ["extract", "--limit", "30", "--prefix", "4,8", "--suffix", "6", "--free", "4", "--window", "6",
               "--secrets", str(secrets), "--figure", str(tmp_path / "a.png"), "--device", "cpu", "--json"]  # fmt: skip
    run = CliRunner().invoke(app, options)
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert [one["prefix"] for one in found["discovered"]] == [4, 8]
    assert found["extracted"]["examples"] is None and found["extracted"]["samples"] == 4
    assert found["secrets"][0]["rank"] == 1 and found["secrets"][0]["exposure"] == 2
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert isinstance(CliRunner().invoke(app, ["extract", "--prefix", "0"]).exception, ConfigError)
    for option in (["--text"], ["--window", "20"]):
        refused = CliRunner().invoke(app, ["extract", *option]).exception
        assert isinstance(refused, ConfigError) and f"{option[0]}: for --free" in str(refused)
    secrets.write_text('{"prompt": "a"}\n')
    assert isinstance(CliRunner().invoke(app, ["extract", "--secrets", str(secrets)]).exception, DataError)
