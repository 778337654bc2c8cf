"""Files of statistics damaged in many ways: each is made anew with the same numbers, and a warning."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from errata.checksum import FIELD
from errata.linalg.moments import Eigen, Moments
from errata.linalg.moments import eigen as decompose
from errata.stats import cache
from tests.fuzz.mutations import Findings, byte_variants, document_variants, judge

FACTS = {"host": "0123456789abcdef", "corpus": "texts", "tokens": 40, "site": "a.weight"}
WIDTH = 7


def moments(seed: int = 0) -> Moments:
    found = Moments.empty(WIDTH)
    found.update_(torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return found


def numbers(value: Any) -> Any:
    """All numbers of what was read, bit by bit."""
    if isinstance(value, Moments):
        tensors = [value.total, *value.columns]
        return value.count, value.parts, value.squares, [t.numpy().tobytes() for t in tensors]
    if isinstance(value, Eigen):
        return [value.values.numpy().tobytes(), value.vectors.numpy().tobytes()]
    if isinstance(value, cache.Partial):
        return {name: numbers(one) for name, one in value.moments.items()}, value.batches, value.digest
    return value


def kinds(folder: Path) -> dict[str, tuple[Path, Callable[[], Any], Any]]:
    """By kind: the file, what reads it or makes it anew, and what that is to give."""
    one = moments()
    cache.write(folder, FACTS, one)
    cache.eigen(folder, FACTS, one)
    partial = cache.Partial({"a.weight": one, "b.weight": moments(1)}, 3, "ab" * 32)
    cache.write_partial(folder, FACTS, partial)
    return {
        "moments": (cache.path(folder, FACTS), lambda: cache.read(folder, FACTS), one),
        "eigen": (
            cache.path(folder, FACTS, "eigen"), lambda: cache.eigen(folder, FACTS, one), decompose(one.second)
        ),
        "partial": (cache.path(folder, FACTS, "partial"), lambda: cache.read_partial(folder, FACTS), partial),
    }  # fmt: skip


def documents(data: bytes, count: int, seed: int) -> Any:
    """Yield files whose header was changed: that of safetensors, or the one inside it."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8:start])
    inner = json.loads(outer["__metadata__"]["errata"])

    def file(header: Any) -> bytes:
        text = json.dumps(header).encode(errors="surrogatepass")
        return struct.pack("<Q", len(text)) + text + data[start:]

    half = count // 2
    yield from ((f"file header: {what}", file(h)) for what, h in document_variants(outer, half, seed=seed))
    for what, header in document_variants(inner, count - half, seed=seed + 1):
        metadata = {**outer["__metadata__"], "errata": json.dumps(header)}
        yield f"header: {what}", file({**outer, "__metadata__": metadata})


def run(folder: Path, kind: str, count: int, seed: int) -> Findings:
    """Damage one kind of file; only a file that is as it was may be read without a warning."""
    place, read, expected = kinds(folder)[kind]
    data, right = place.read_bytes(), numbers(expected)

    def reading(variant: bytes) -> tuple[Any, bool]:
        place.write_bytes(variant)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = read()
        told = any("not usable and is recomputed" in str(w.message) for w in heard)
        assert all(len(str(w.message)) < 1000 for w in heard)
        return numbers(found), told

    def fine(outcome: tuple[Any, bool]) -> bool:
        found, told = outcome
        return found == right if not told or kind == "eigen" else found is None

    half = count // 2
    variants = [*byte_variants(data, half, seed=seed), *documents(data, count - half, seed + 1)]
    return judge(iter(variants), reading, fine)


@pytest.mark.parametrize("kind", ["moments", "eigen", "partial"])
def test_damaged_statistics(tmp_path, kind):
    findings = run(tmp_path, kind, 100, seed=0)
    assert not findings.faults, f"{findings}\n" + "\n".join(findings.faults[:20])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moments", "eigen", "partial"])
def test_much_damaged_statistics(tmp_path, kind):
    findings = run(tmp_path, kind, 1000, seed=50)
    assert not findings.faults, f"{findings}\n" + "\n".join(findings.faults[:20])


@pytest.mark.parametrize("kind", ["moments", "eigen", "partial"])
def test_one_flipped_bit_of_any_tensor_is_told(tmp_path, kind):
    place, read, expected = kinds(tmp_path)[kind]
    data = place.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(start, len(data), max(1, (len(data) - start) // 24)):
        place.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.warns(RuntimeWarning, match="does not match its hash"):
            found = read()
        assert numbers(found) == numbers(expected) if kind == "eigen" else found is None


@pytest.mark.parametrize("kind", ["moments", "eigen", "partial"])
def test_a_hash_that_was_taken_out_is_told(tmp_path, kind):
    place, read, _ = kinds(tmp_path)[kind]
    with safe_open(place, "pt") as file:
        text = file.metadata()
    header = {name: value for name, value in json.loads(text["errata"]).items() if name != FIELD}
    place.write_bytes(save(load_file(place), metadata={"errata": json.dumps(header)}))
    with pytest.warns(RuntimeWarning, match="not usable"):
        read()
