"""Statistics of a host: packed rows, one pass for all sites, resumed and cached bit by bit."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from typer.testing import CliRunner

from errata import api
from errata.cli import stats as verb
from errata.cli.main import app
from errata.edits.edit import Provenance
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, DataError, ErrataError, HostError
from errata.host import hooks
from errata.job import workspace
from errata.linalg import moments as maths
from errata.stats import cache, collect
from errata.stats.collect import Corpus, cost, eigen_of, facts, public_corpus, row_tokens, second_moments
from tests.models import TEXTS, fresh

CORPUS = Corpus("texts", lambda: TEXTS)
LONG = Corpus("long", lambda: TEXTS * 10)


class Killed(Exception):
    """Stands for the end of a process."""


def batches(host, corpus=LONG, tokens=2000):
    return list(collect._batches(host, corpus, tokens))


def rows(host, corpus=LONG, tokens=2000):
    return [row for batch in batches(host, corpus, tokens) for row in batch]


def same(one, two) -> bool:
    assert one.keys() == two.keys()
    return all(
        one[s].count == two[s].count
        and one[s].squares == two[s].squares
        and torch.equal(one[s].total, two[s].total)
        and torch.equal(one[s].second, two[s].second)
        for s in one
    )


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_hold_the_texts_in_order_without_padding(family):
    host = fresh(family)
    mark = host.tokenizer.bos_token_id
    made = rows(host, CORPUS, 10_000)
    assert all(len(row) == row_tokens(host) == 128 for row in made[:-1]) and len(made[-1]) <= 128
    assert all(row[0] == mark and row[1] != mark for row in made)
    given = [token for row in made for token in row if token != mark]
    assert given == [t for text in TEXTS for t in host.encode(text).ids if t != mark]
    assert sum(row[1:].count(mark) for row in made) <= len(TEXTS)  # one between texts, save at a row's start
    assert host.pad_id not in {token for row in made for token in row}
    assert all(len({len(row) for row in batch}) == 1 for batch in batches(host, CORPUS, 10_000))


def test_the_budget_is_met_to_the_token():
    host = fresh("llama")
    mark = host.tokenizer.bos_token_id
    for tokens in (1, 100, 127, 128, 1000):
        assert sum(token != mark for row in rows(host, LONG, tokens) for token in row) == tokens
        assert second_moments(host, [host.layout.site(1)], LONG, tokens=tokens).popitem()[1].count == tokens


def test_texts_longer_than_a_row_go_on_in_the_next():
    host = fresh("llama")
    mark = host.tokenizer.bos_token_id
    book = " ".join(TEXTS)
    made = rows(host, Corpus("book", lambda: [book]), 10_000)
    assert len(made) > 2 and [t for row in made for t in row[1:]] == list(host.encode(book).ids[1:])
    assert all(row.count(mark) == 1 for row in made)


def test_a_tokenizer_without_a_begin_token_uses_the_end_token():
    host = fresh("gpt2")
    host.tokenizer = copy.deepcopy(host.tokenizer)  # the other is shared
    host.tokenizer.bos_token = None
    host.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end, made = host.tokenizer.eos_token_id, rows(host, CORPUS, 10_000)
    assert all(row[0] == end for row in made)
    given = [token for row in made for token in row if token != end]
    assert given == [token for text in TEXTS for token in host.encode(text).ids]
    assert sum(row[1:].count(end) for row in made) > len(TEXTS) / 2
    site = host.layout.site(0)
    assert second_moments(host, [site], CORPUS, tokens=10**6)[site].count == len(given)


def test_a_corpus_that_ends_early_says_so():
    host = fresh("llama")
    site, told = host.layout.site(0), []
    whole = sum(len(host.encode(text).ids) - 1 for text in TEXTS)
    made = second_moments(host, [site], CORPUS, tokens=10**6, on_tokens=lambda *at: told.append(at))
    assert made[site].count == whole and told[-1] == (whole, 10**6)
    with pytest.raises(DataError, match="no text"):
        second_moments(host, [site], Corpus("empty", lambda: ["", ""]), tokens=10)
    with pytest.raises(ConfigError, match="budget of 0"):
        second_moments(host, [site], CORPUS, tokens=0)


# --- one pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_moments_are_those_of_the_keys(family):
    host = fresh(family)
    sites = [host.layout.site(2), host.layout.site(0), host.layout.site(1, "attn_out")]
    made = second_moments(host, sites, LONG, tokens=700)
    mark = host.tokenizer.bos_token_id
    for site in sites:
        seen = []
        for row in rows(host, LONG, 700):
            with torch.no_grad(), hooks.on_input(host.model.get_submodule(site.name), seen.append):
                host.forward(host.batch([row]))
            seen[-1] = seen[-1].reshape(len(row), -1)[[t != mark for t in row]].double()
        keys = torch.cat(seen)
        assert made[site].count == len(keys) == 700
        torch.testing.assert_close(made[site].second, keys.mT @ keys / 700, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(made[site].mean, keys.mean(0), rtol=1e-4, atol=1e-6)


def test_one_pass_gives_every_site_what_a_pass_of_its_own_would():
    host = fresh("llama")
    sites = host.layout.sites
    together = second_moments(host, sites, LONG, tokens=700)
    apart = {site: second_moments(host, [site], LONG, tokens=700)[site] for site in sites}
    assert same(together, apart)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_the_pass_stops_at_the_last_input(family):
    """The last projection is not computed, nor anything above it."""
    host = fresh(family)
    last = host.layout.site(1)
    run = []
    watched = {**{f"block {i}": p for i, p in enumerate(host.layout.blocks)}, "last": last.name}
    handles = [
        host.model.get_submodule(path).register_forward_hook(lambda *_, name=name: run.append(name))
        for name, path in watched.items()
    ]
    second_moments(host, [host.layout.site(0), last], LONG, tokens=700)
    for handle in handles:
        handle.remove()
    assert set(run) == {"block 0"}


def test_the_host_is_left_alone():
    host = fresh("llama")
    start, state = host.weights_hash(), torch.get_rng_state()
    second_moments(host, [host.layout.site(1)], LONG, tokens=300)
    assert host.weights_hash() == start and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_keys_that_are_not_finite_are_refused(monkeypatch):
    host = fresh("llama")
    site = host.layout.site(0)
    monkeypatch.setattr(host.model.model.layers[0].mlp.act_fn, "forward", lambda x: x / 0)
    with pytest.raises(HostError, match=r"not finite in torch\.float32"):
        second_moments(host, [site], CORPUS, tokens=50)


def test_sums_are_kept_where_there_is_memory():
    host = fresh("llama")
    site = host.layout.site(0)
    assert collect.device_of(host, site) == host.device
    host.model.get_submodule(site.name).to("meta")  # as weights do that are fetched for each pass
    assert collect.device_of(host, site) == torch.device("cpu")


# --- resumed --------------------------------------------------------------------------------------


def interrupted(host, sites, folder: Path, after: int, corpus=LONG, tokens=3000) -> None:
    """Run until the sums of some batches are kept, then die."""
    passed = []

    def tick(done: int, wanted: int) -> None:
        passed.append(done)
        if len(passed) == after:
            raise Killed

    with pytest.raises(Killed):
        second_moments(host, sites, corpus, tokens=tokens, folder=folder, on_tokens=tick, save_seconds=0)
    assert [p.name.partition("-")[0] for p in folder.iterdir()] == ["partial"]


def forwards(host, monkeypatch) -> list[int]:
    """Count the batches a host runs from now on."""
    count: list[int] = []
    real = host.forward
    monkeypatch.setattr(host, "forward", lambda batch, **more: (count.append(1), real(batch, **more))[1])
    return count


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(collect, "BATCH_TOKENS", 256)


@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_pass_ends_with_the_same_bits(small_batches, tmp_path, monkeypatch, after):
    host = fresh("llama")
    sites = [host.layout.site(0), host.layout.site(2)]
    whole = second_moments(host, sites, LONG, tokens=3000)
    interrupted(host, sites, tmp_path, after)
    ran = forwards(host, monkeypatch)
    told: list[int] = []
    resumed = second_moments(
        host, sites, LONG, tokens=3000, folder=tmp_path, on_tokens=lambda done, wanted: told.append(done)
    )
    assert same(resumed, whole)
    assert len(ran) == len(batches(host, LONG, 3000)) - after > 3
    assert told[0] > 0 and told == sorted(told) and told[-1] == 3000
    assert sorted(p.name.partition("-")[0] for p in tmp_path.iterdir()) == ["moments", "moments"]
    assert same(second_moments(host, sites, LONG, tokens=3000, folder=tmp_path), whole)
    assert len(ran) == len(batches(host, LONG, 3000)) - after  # the second call read them


def test_some_of_the_sites_go_on_too_and_others_start_anew(small_batches, tmp_path):
    host = fresh("llama")
    sites = [host.layout.site(i) for i in range(3)]
    whole = second_moments(host, sites, LONG, tokens=3000)
    interrupted(host, sites[:2], tmp_path, 3)
    told: list[int] = []
    second_moments(host, sites[:1], LONG, tokens=3000, folder=tmp_path, on_tokens=lambda d, w: told.append(d))
    assert told[0] > 700
    for path in tmp_path.iterdir():
        path.unlink()
    interrupted(host, sites[:2], tmp_path, 3)
    made = second_moments(host, sites, LONG, tokens=3000, folder=tmp_path)
    assert same(made, whole) and not list(tmp_path.glob("partial-*"))


def test_a_changed_corpus_is_noticed_and_started_again(small_batches, tmp_path):
    host = fresh("llama")
    site = host.layout.site(1)
    interrupted(host, [site], tmp_path, 3)
    for texts in (TEXTS[1:] * 10, TEXTS[:2]):  # other texts, and too few to get to the place
        other = Corpus(LONG.name, lambda texts=texts: texts)
        with pytest.warns(RuntimeWarning, match="has changed since"):
            made = second_moments(host, [site], other, tokens=3000, folder=tmp_path)
        assert same(made, second_moments(host, [site], other, tokens=3000))
        for path in tmp_path.iterdir():
            path.unlink()
        interrupted(host, [site], tmp_path, 3)


def test_a_damaged_partial_file_counts_as_absent(small_batches, tmp_path):
    host = fresh("llama")
    site = host.layout.site(1)
    interrupted(host, [site], tmp_path, 3)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(partial.read_bytes()[:-20])
    with pytest.warns(RuntimeWarning, match=r"partial-.* is not usable"):
        made = second_moments(host, [site], LONG, tokens=3000, folder=tmp_path)
    assert same(made, second_moments(host, [site], LONG, tokens=3000))
    assert not list(tmp_path.glob("partial-*"))


def test_nothing_is_kept_on_the_way_before_it_is_time(small_batches, tmp_path):
    host = fresh("llama")
    seen = []
    second_moments(
        host, [host.layout.site(1)], LONG, tokens=1000, folder=tmp_path,
        on_tokens=lambda *_: seen.extend(tmp_path.iterdir()),
    )  # fmt: skip
    assert seen == []


# --- cached ---------------------------------------------------------------------------------------


def test_the_name_tells_everything_the_numbers_depend_on(monkeypatch):
    host, other = fresh("llama"), fresh("llama", seed=5)
    sites = host.layout.sites
    keys = {
        cache.key(facts(host, sites[0], CORPUS, tokens=10)),
        cache.key(facts(host, sites[1], CORPUS, tokens=10)),
        cache.key(facts(host, sites[0], LONG, tokens=10)),
        cache.key(facts(host, sites[0], CORPUS, tokens=11)),
        cache.key(facts(other, sites[0], CORPUS, tokens=10)),
    }
    monkeypatch.setattr(collect, "ROW_TOKENS", 64)
    keys.add(cache.key(facts(host, sites[0], CORPUS, tokens=10)))
    host.model.double()
    keys.add(cache.key(facts(host, sites[0], CORPUS, tokens=10)))
    assert len(keys) == 7


@pytest.mark.parametrize("how", ["cut", "empty", "text", "foreign", "missing tensor"])
def test_a_damaged_file_is_reported_and_made_anew(tmp_path, how):
    host = fresh("llama")
    site = host.layout.site(1)
    first = second_moments(host, [site], CORPUS, tokens=200, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    header = {"errata": json.dumps({"facts": facts(host, site, CORPUS, tokens=200), "sums": {"columns": 1}})}
    if how == "foreign":
        save_file({"total": torch.zeros(3)}, path)
    elif how == "missing tensor":
        save_file({"total": torch.zeros(3)}, path, metadata=header)
    else:
        path.write_bytes({"cut": good[:-9], "empty": b"", "text": b"not a file of numbers"}[how])
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is not usable"):
        again = second_moments(host, [site], CORPUS, tokens=200, folder=tmp_path)
    assert same(again, first) and path.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    host = fresh("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="ERRATA_CACHE"):
        second_moments(host, [host.layout.site(1)], CORPUS, tokens=50, folder=tmp_path / "file" / "sub")


def test_statistics_of_an_edited_host_are_never_kept(tmp_path):
    host = fresh("llama")
    site = host.layout.site(0)
    record = Provenance("ft", (), {}, host.fingerprint, host.name, 0, {})
    edit = WeightEdit({site.parameter: torch.ones(site.d_out, site.d_in)}, frozenset(), record)
    with edit.on(host), pytest.raises(HostError, match="edited"):
        second_moments(host, [site], CORPUS, tokens=50, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_eigendecomposition_is_made_once_and_read_after(tmp_path, monkeypatch):
    host = fresh("llama")
    site = host.layout.site(1)
    moments = second_moments(host, [site], LONG, tokens=600, folder=tmp_path)[site]

    def ask(folder=tmp_path, of=moments):
        return eigen_of(host, site, LONG, tokens=600, folder=folder, moments=of)

    first = ask()
    with monkeypatch.context() as patch:
        patch.setattr(maths, "eigen", lambda _: pytest.fail("decomposed again"))
        second = ask()
    assert torch.equal(first.values, second.values) and torch.equal(first.vectors, second.vectors)
    assert first.vectors.stride() == second.vectors.stride()
    eye = torch.eye(site.d_in, dtype=torch.float64)
    assert float((second.vectors.mT @ second.vectors - eye).norm()) < 1e-11
    torch.testing.assert_close(second.vectors @ torch.diag(second.values) @ second.vectors.mT, moments.second)
    assert torch.equal(ask(folder=None).values, first.values)
    other = second_moments(host, [site], LONG, tokens=500)[site]
    with pytest.warns(RuntimeWarning, match="other moments"):
        made = ask(of=other)
    assert torch.equal(made.values, maths.eigen(other.second).values)


# --- corpora --------------------------------------------------------------------------------------


def file_corpus(path: Path) -> Corpus:
    made = workspace(fresh("llama"), seed=0, corpus=path).corpus
    assert made is not None
    return made


def test_text_and_jsonl_files_give_the_same_texts(tmp_path):
    texts = ["One line.\nTwo lines.", "Éric: «oui».", "Three."]
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(("\n\n" + "\n \n\n".join(texts) + "\n\n\n").replace("\n", "\r\n").encode())
    lines.write_text(
        "\n".join([json.dumps({"text": t, "id": i}) for i, t in enumerate(texts)] + ["", '{"text": " "}'])
    )
    one, two = file_corpus(plain), file_corpus(lines)
    assert list(one.texts()) == list(two.texts()) == list(two.texts()) == texts
    assert one.name.partition("@")[2] == two.name.partition("@")[2]
    plain.write_text("Something else.")
    assert file_corpus(plain).name != one.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", '{"text": "fine"}\n\n{"body": "x"}', "line 3: expected"),
        ("a.jsonl", '["text"]', "line 1: expected"),
        ("a.jsonl", '{"text": 3}', "line 1: expected"),
        ("a.jsonl", "\n", "no text"),
        ("a.txt", " \n\n", "no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.txt", None, "cannot read"),
    ],
)
def test_bad_corpus_files_are_refused_with_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        file_corpus(tmp_path / name)


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(10_000)))
    made = iter(file_corpus(path).texts())
    assert next(made) == "paragraph 0"
    path.write_text("")  # a reader that has it all would go on to the end
    assert sum(1 for _ in made) < 9_000


def test_without_the_package_a_dataset_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no file 'some/set' here; .*pip install datasets; or save its text"):
        public_corpus("some/set")


def test_a_dataset_is_streamed_under_its_version(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/text":
            return [{"body": "x"}]
        return ({"text": text} for text in TEXTS)

    def builder(name, config):
        if name == "away/set":
            raise ConnectionError("no network")
        return types.SimpleNamespace(hash="abc")

    fake = types.SimpleNamespace(load_dataset=load_dataset, load_dataset_builder=builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    made = public_corpus("some/set:part")
    assert made.name == "some/set:part@abc" and asked == []
    assert list(made.texts()) == list(made.texts()) == TEXTS
    assert asked == [("some/set", "part", "train", True)] * 2
    with pytest.raises(DataError, match="no network; download it"):
        public_corpus("away/set")
    with pytest.raises(DataError, match="text"):
        list(public_corpus("no/text").texts())


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A small model on disk, and a cache of its own."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    host = fresh("gpt2")
    host.model.save_pretrained(tmp_path / "model")
    host.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS * 20))
    return tmp_path


def errata(*words: str):
    return CliRunner().invoke(app, ["stats", *words])


def test_the_command_reports_every_layer_and_keeps_them(saved):
    words = (
        "--model",
        str(saved / "model"),
        "--corpus",
        str(saved / "texts.txt"),
        "--tokens",
        "5000",
        "--json",
    )
    first = json.loads(errata(*words).stdout)
    assert [row["layer"] for row in first["layers"]] == [0, 1, 2]
    for row in first["layers"]:
        assert row["tokens"] == 5000 and Path(row["path"]).exists() and row["seconds"] > 0
        assert 1 <= row["effective_rank"] <= row["width"] == 80
        assert row["condition"] > 1 and 0 < row["remaining_error"] < 1
    again = json.loads(errata(*words).stdout)
    assert all(row["kept_already"] and row["seconds"] is None for row in again["layers"])
    numbers = ("tokens", "effective_rank", "condition", "remaining_error", "path")
    assert [[r[k] for k in numbers] for r in again["layers"]] == [
        [r[k] for k in numbers] for r in first["layers"]
    ]
    decomposed = errata(*words, "--layers", "1", "--eigen")
    assert decomposed.exit_code == 0 and len(list((saved / "cache").glob("eigen-*"))) == 1


def test_what_the_command_keeps_is_what_an_edit_reads(saved, monkeypatch):
    words = (
        "--model",
        str(saved / "model"),
        "--corpus",
        str(saved / "texts.txt"),
        "--tokens",
        "600",
        "--layers",
        "1",
    )
    shown = errata(*words)
    assert shown.exit_code == 0 and "--set tokens=600" in shown.stdout
    host = api.load(saved / "model")
    monkeypatch.setattr(collect, "_collect", lambda *_: pytest.fail("collected again"))
    work = workspace(host, seed=0, corpus=saved / "texts.txt")
    assert list(work.costs(host, [host.layout.site(1)], 600)) == [host.layout.site(1)]


def test_a_dry_run_costs_nothing_and_says_what_it_would(saved):
    words = ("--model", str(saved / "model"), "--corpus", str(saved / "texts.txt"), "--dry-run")
    document = json.loads(errata(*words, "--json").stdout)
    assert document["tokens"] == 1_000_000 and document["kept_already"] == [] and document["flop"] > 1e6
    assert not (saved / "cache").exists()
    assert "nothing was computed" in errata(*words).stdout


def test_the_estimated_size_is_the_size(tmp_path):
    host = fresh("llama")
    sites = [host.layout.site(0), host.layout.site(2)]
    second_moments(host, sites, CORPUS, tokens=100, folder=tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert cost(host, sites, tokens=100).disk_bytes == pytest.approx(size, rel=0.05)
    weights = sum(p.numel() for i in (0, 1, 2) for p in host.model.model.layers[i].parameters() if p.ndim > 1)
    assert cost(host, sites, tokens=7).flop > 7 * 2 * weights
    assert cost(host, [], tokens=7).flop == 0


def test_a_short_corpus_is_said(saved):
    (saved / "few.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    shown = errata("--model", str(saved / "model"), "--corpus", str(saved / "few.jsonl"))
    assert "the corpus ended after" in shown.stdout and "of 1,000,000 tokens" in shown.stdout
    assert "singular" in shown.stdout and "unknown" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "one"), "expected numbers and ranges"),
        (("--layers", "0,7"), "layer 7 does not exist"),
        (("--layers", "0,0-1"), "different layer numbers"),
        (("--corpus", "no/such/file.txt"), "cannot read corpus"),
        (("--corpus", "no/such.jsonl"), "cannot read corpus"),
    ],
)
def test_bad_input_is_refused(saved, words, message):
    result = errata("--model", str(saved / "model"), *words)
    assert isinstance(result.exception, ErrataError) and message in str(result.exception)
    assert not (saved / "cache").exists()


def test_a_model_without_texts_is_refused(saved, monkeypatch):
    host = fresh("gpt2")
    host.tokenizer = None
    monkeypatch.setattr(verb.common, "open_host", lambda *_: host)
    assert "reads none" in str(errata("--model", "x").exception)


def test_layers_are_read_as_numbers_and_ranges():
    assert verb._layers("0,2,5-8") == (0, 2, 5, 6, 7, 8)
    assert verb._layers("-1, 3") == (-1, 3)
    assert verb._layers(None) is None
