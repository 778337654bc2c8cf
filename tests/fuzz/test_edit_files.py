"""Edit files damaged in many ways: each is refused by name, or says what was written."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import errata
from errata.checksum import FIELD, checksum
from errata.cli.show import _requests
from errata.edits import Provenance, WeightEdit
from errata.edits.format import KEY, tensor_digest
from errata.edits.records import Record
from errata.errors import EditError
from errata.linalg.lowrank import LowRank
from tests.fuzz.mutations import Findings, byte_variants, document_variants, judge

Facts = tuple[str, str, tuple[tuple[str, bytes], ...]]


def made() -> WeightEdit:
    """An edit with all that a file holds: thin and dense deltas, records, state, notes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    requests = (
        errata.Request("{} was born in", "Ada Brenner", "Tallow", "Esk", id="ada"),
        errata.Request("{} plays the", "Bruno Holner", "harp"),
    )
    provenance = Provenance(
        "memit", requests, {"layers": [1, 2], "steps": 5, "kl": 0.0625, "history": True, "name": None},
        "0123456789abcdef", "tiny", 3, {"errata": "0.1", "torch": "2"}, {"loss": [0.5, 0.25]},
        parents=("fedcba9876543210",), created="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    keys = draw(6, 2)
    record = Record(keys, draw(4, 2), 2 * keys, 1.0, "C of a corpus", ((0,), (1,)))
    return WeightEdit(
        {"a.weight": LowRank(draw(4, 2), draw(2, 6)), "b.weight": draw(3, 3)},
        frozenset({"b.weight"}),
        provenance,
        {"a.weight": record},
        {"history": draw(2)},
    )


def facts(edit: Any) -> Facts:
    """All that an edit says, and that its file has to say."""
    summary = {**edit.summary(), "records": {name: r.facts() for name, r in edit.records.items()}}
    _requests(summary["requests"])
    for name in edit.records:
        edit.records[name].select(range(len(summary["requests"])))
    tensors = tuple((n, t.numpy().tobytes()) for n, t in sorted(edit.parts().items()))
    return json.dumps(summary, sort_keys=True), repr(sorted(edit.transposed)), tensors


class Reader:
    """Writes a variant to a file and reads it as an edit."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "edit.safetensors"
        made().save(self.path)
        self.data = self.path.read_bytes()
        self.start = 8 + struct.unpack("<Q", self.data[:8])[0]
        outer = json.loads(self.data[8 : self.start])
        self.outer = outer
        self.header = json.loads(outer["__metadata__"][KEY])
        self.tensors = load_file(self.path)
        self.right = facts(errata.Edit.load(self.path))

    def bytes(self, data: bytes) -> Facts:
        self.path.write_bytes(data)
        return facts(errata.Edit.load(self.path))

    def file(self, header: Any) -> Facts:
        """Read a file whose safetensors header was changed."""
        text = json.dumps(header).encode(errors="surrogatepass")
        return self.bytes(struct.pack("<Q", len(text)) + text + self.data[self.start :])

    def unsigned(self, header: Any) -> Facts:
        """Read a file whose own header was changed, the hash left as it was."""
        metadata = {**self.outer["__metadata__"], KEY: json.dumps(header)}
        return self.file({**self.outer, "__metadata__": metadata})

    def signed(self, header: Any) -> Facts:
        """Read a file whose header was changed before the hash was taken: it truly says what it says."""
        if isinstance(header, dict):
            header = {**header, FIELD: checksum(header, self.tensors)}
        return self.bytes(save(self.tensors, metadata={KEY: json.dumps(header)}))

    def first(self, header: Any) -> Facts:
        """Read a file of the version without a hash."""
        return self.bytes(save(self.tensors, metadata={KEY: json.dumps(header)}))


def first_header(reader: Reader) -> dict[str, Any]:
    """Return the header that version 1 would have written: no hash, and a digest of the tensors alone."""
    known = {key: value for key, value in reader.header.items() if key not in ("protection", FIELD)}
    return {**known, "format": 1, "digest": tensor_digest(reader.tensors)}


def damaged(reader: Reader, count: int, seed: int) -> Iterator[tuple[str, Callable[[], Facts], bool]]:
    """Yield what is done, how it is read, and whether another value than the right one is a fault."""
    share = count // 8

    def way(name: str, variants: Any, read: Callable[[Any], Facts], strict: bool) -> Any:
        return ((f"{name}: {what}", lambda v=v: read(v), strict) for what, v in variants)

    in_header = ((w, v) for w, v in byte_variants(reader.data[: reader.start], 2 * share, seed=seed))
    tail = reader.data[reader.start :]
    old = first_header(reader)
    yield from itertools.chain(
        way("header bytes", ((w, v + tail) for w, v in in_header), reader.bytes, True),
        way("bytes", byte_variants(reader.data, share, seed=seed + 1), reader.bytes, True),
        way("file header", document_variants(reader.outer, share, seed=seed + 2), reader.file, True),
        way("header", document_variants(reader.header, 2 * share, seed=seed + 3), reader.unsigned, True),
        way("signed", document_variants(reader.header, share, seed=seed + 4), reader.signed, False),
        way("first version", document_variants(old, count - 7 * share, seed=seed + 5), reader.first, False),
    )


def run(folder: Path, count: int, seed: int) -> Findings:
    reader = Reader(folder)
    cases = list(damaged(reader, count, seed))
    strict = {what for what, _, must in cases if must}
    current: list[str] = []

    def read(case: tuple[str, Callable[[], Facts]]) -> Facts:
        current[:] = [case[0]]
        return case[1]()

    return judge(
        ((what, (what, reads)) for what, reads, _ in cases),
        read,
        lambda found: found == reader.right or current[0] not in strict,
    )


def report(findings: Findings, count: int) -> None:
    assert sum(findings.outcomes.values()) == count
    assert not findings.faults, f"{findings}\n" + "\n".join(findings.faults[:20])
    assert findings.outcomes["refused"] > count / 2


def test_damaged_edit_files(tmp_path):
    report(run(tmp_path, 800, seed=0), 800)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 101])
def test_many_damaged_edit_files(tmp_path, seed):
    report(run(tmp_path, 3800, seed=seed), 3800)


def test_the_undamaged_file_and_one_of_the_version_before_say_the_same(tmp_path):
    reader = Reader(tmp_path)
    assert reader.signed(reader.header) == reader.first(first_header(reader)) == reader.right


@pytest.mark.parametrize("change", [
    {"format": 1}, {"format": 4}, {"format": 0}, {"format": -1}, {"format": True}, {"format": "2"},
    {"format": 2.0}, {"protection": None}, {"protection": "none"},
])  # fmt: skip
def test_a_file_cannot_be_passed_off_as_one_without_a_hash(tmp_path, change):
    reader = Reader(tmp_path)
    header = {**reader.header, **change}
    for read in (reader.unsigned, reader.first, reader.signed):
        with pytest.raises(EditError, match="format|hash"):
            read(header)
    with pytest.raises(EditError, match="hash was removed"):
        reader.first({key: value for key, value in reader.header.items() if key != FIELD})


@pytest.mark.parametrize(("change", "complaint"), [
    ({"records": {"a.weight": {"gamma": "much"}}}, "requests"),
    ({"records": []}, "expected an object"),
    ({"transposed": "b.weight"}, "expected a list"),
    ({"transposed": ["c.weight"]}, "called transposed"),
    ({"provenance": None}, "expected an object"),
    ({"kind": ["weight"]}, "kind"),
    ({"kind": "w" * 10_000}, "kind"),
])  # fmt: skip
def test_wrong_fields_are_named_in_one_short_message(tmp_path, change, complaint):
    reader = Reader(tmp_path)
    with pytest.raises(EditError, match=complaint) as caught:
        reader.signed({**reader.header, **change})
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_sizes_and_depths_are_bounded_before_anything_is_parsed(tmp_path):
    reader = Reader(tmp_path)
    for length in (0, 2**40, 2**63, 2**64 - 1, len(reader.data)):
        with pytest.raises(EditError, match="truncated|not an edit"):
            reader.bytes(struct.pack("<Q", length) + reader.data[8:])
    for text in ("[" * 100_000, '{"a":' * 50_000, "1" * 10_000, '{"format": 2, "a": ' + "9" * 5000 + "}"):
        path = tmp_path / "deep.safetensors"
        path.write_bytes(save(reader.tensors, metadata={KEY: text}))
        with pytest.raises(EditError, match="deep.safetensors") as caught:
            errata.Edit.load(path)
        assert len(str(caught.value)) < 600
    for data in (b"", b"x", b"\x00" * 9, b"{}", reader.data[:8]):
        with pytest.raises(EditError, match="truncated|not an edit"):
            reader.bytes(data)
