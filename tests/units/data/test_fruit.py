"""FRUIT's articles, and the TFRecord files they come in."""

from __future__ import annotations

import json
import struct

import pytest

from errata.data import _tfrecord
from errata.data._base import Malformed, Record
from errata.data.formats import Truncated
from errata.data.reading import check, read
from errata.data.sets import fruit
from errata.errors import DataError

INPUT = (
    "[0] Lutz is a town. [1] It has a clock [7] (1908). [2] It lies on a hill. "
    "[CONTEXT] (0) Ada_Penn INTRODUCTION Ada Penn built the clock (1908). (1) Zubrowka Fair Table"
)
OUTPUT = "[0] (0) (1) It has a clock (1908) by Ada Penn. (1) A fair is held (0) times. [2]"
OLD = "Lutz is a town. It has a clock [7] (1908). It lies on a hill."
NEW = "Lutz is a town. It has a clock (1908) by Ada Penn. A fair is held (0) times. It lies on a hill."


def varint(number):
    number &= (1 << 64) - 1
    groups = []
    while True:
        groups.append(number & 0x7F | (0x80 if number > 0x7F else 0))
        number >>= 7
        if not number:
            return bytes(groups)


def message(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(**features):
    """Serialise a tf.Example: bytes, lists of float, lists of int (packed)."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            kind, content = 1, message(1, value)
        elif isinstance(value[0], float):
            kind, content = 2, message(1, struct.pack(f"<{len(value)}f", *value))
        else:
            kind, content = 3, message(1, b"".join(map(varint, value)))
        entries += message(1, message(1, name.encode()) + message(2, message(kind, content)))
    return message(1, entries)


OVERLONG = message(1, message(1, message(2, message(2, varint(1 << 3 | 1) + b"\xff" * 8))))
"""A list of float32 that holds a number of eight bytes."""


def framed(data):
    length = struct.pack("<Q", len(data))
    return b"".join((length, checksum(length), data, checksum(data)))


def checksum(data):
    return struct.pack("<I", _tfrecord.masked_crc32c(data))


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_checksum_has_the_values_of_the_standard(data, crc):
    assert _tfrecord.crc32c(data) == crc


def test_a_record_of_another_writer_is_read(tmp_path):
    """Bytes written by the package tfrecord, whose checksums and messages are made by other libraries."""
    path = tmp_path / "written.tfrecords"
    written = bytes.fromhex(
        "2100000000000000017becf60a1f0a0b0a02696412051a030a01080a100a06696e7075747312060a040a02c3a981fe6c1e"
    )
    path.write_bytes(written)
    assert list(_tfrecord.examples(path)) == [{"id": [8], "inputs": ["é".encode()]}]
    path.write_bytes(framed(b""))
    assert list(_tfrecord.examples(path)) == [{}]


def test_features_of_every_kind_are_decoded():
    data = example(text="é".encode(), numbers=[0, -3, 1 << 40], parts=[0.5, -2.0])
    assert _tfrecord.parse(data) == {"text": [b"\xc3\xa9"], "numbers": [0, -3, 1 << 40], "parts": [0.5, -2.0]}


def test_numbers_need_not_be_packed_and_unknown_fields_are_passed_over():
    integers = message(3, varint(1 << 3) + varint(5) + varint(1 << 3) + varint(-1))
    floats = message(2, varint(1 << 3 | 5) + struct.pack("<f", 1.5))
    entries = message(1, message(1, b"n") + message(2, integers)) + message(
        1, message(1, b"f") + message(2, floats)
    )
    unknown = varint(9 << 3 | 1) + bytes(8) + varint(8 << 3) + varint(300)
    assert _tfrecord.parse(unknown + message(1, entries)) == {"n": [5, -1], "f": [1.5]}


@pytest.mark.parametrize(
    "data", [b"\x0a\x05abc", b"\xff" * 11, b"\x0b", varint(1 << 3) + b"\x01", b"\x0a", OVERLONG]
)
def test_what_is_no_example_is_malformed(data):
    with pytest.raises(Malformed):
        _tfrecord.parse(data)


def test_every_flipped_byte_is_noticed(tmp_path):
    good = framed(example(id=[1], inputs=b"text"))
    path = tmp_path / "damaged.tfrecords"
    for place in range(len(good)):
        data = bytearray(good)
        data[place] ^= 0x10
        path.write_bytes(bytes(data) + good)
        if place < 12:  # without its length, no later record can be found
            with pytest.raises(Truncated, match="breaks off at record 1"):
                list(_tfrecord.examples(path))
        else:
            first, second = _tfrecord.examples(path)
            assert isinstance(first, Malformed) and second == {"id": [1], "inputs": [b"text"]}


def test_every_cut_is_noticed(tmp_path):
    good = framed(example(id=[1]))
    path = tmp_path / "cut.tfrecords"
    for length in range(1, len(good)):
        path.write_bytes(good + good[:length])
        found = _tfrecord.examples(path)
        assert next(found) == {"id": [1]}
        with pytest.raises(Truncated, match="breaks off at record 2"):
            next(found)
    with pytest.raises(DataError, match="cannot read"):
        list(_tfrecord.examples(tmp_path / "absent.tfrecords"))


def test_an_article_is_rewritten_in_plain_text():
    value = {"id": 4, "inputs": INPUT, "targets": OUTPUT}
    assert fruit.fits(value)
    (case,) = fruit.cases(Record(value, "record 1", 0), "")
    assert case.id == "fruit:4"
    (probe,) = case.probes
    assert (probe.kind, probe.form, probe.prompt) == ("long", "long", INPUT)
    assert (probe.answers, probe.before) == ((NEW,), (OLD,))
    assert (case.request.text, case.request.target, case.request.target_old) == (INPUT, NEW, OLD)


@pytest.mark.parametrize(
    ("output", "plain"),
    [
        ("(0) (1) One. (2) Two. [0]", "One. Two. A."),
        ('"One." (0) Two (0) (1) three', '"One." Two (0) (1) three'),
        ("Of a band (2) and others (12) here.", "Of a band (2) and others (12) here."),
        ("One. (7) is no evidence. [0] [0]", "One. (7) is no evidence. A. A."),
        ("(0)", ""),
    ],
)
def test_evidence_is_named_at_the_beginning_of_a_sentence_only(output, plain):
    assert fruit.expand_output(["A."], "(0) a (1) b (2) c (12) d", output) == plain


def test_sentences_count_up_from_nought():
    assert fruit.sentences("[0] a [2] b [1] c [1] d") == ["a [2] b", "c [1] d"]
    with pytest.raises(Malformed, match="numbered sentences"):
        fruit.sentences("a")


@pytest.mark.parametrize(
    "fields",
    [{"input": "[0] a"}, {"input": "a [CONTEXT] (0) b"}, {"output": "[7]"}, {"output": ""}, {"input": None}],
)
def test_another_record_is_malformed(fields):
    value = {"id": 1, "input": INPUT, "output": OUTPUT} | fields
    with pytest.raises(Malformed):
        list(fruit.cases(Record(value, "record 1", 0), ""))


def test_a_file_is_read_by_name_and_a_damaged_record_is_listed(tmp_path):
    path = tmp_path / "articles.tfrecords-00000-of-00001"
    good = framed(example(id=[4], input=INPUT.encode(), output=OUTPUT.encode()))
    damaged = bytearray(framed(example(id=[5], input=INPUT.encode(), output=OUTPUT.encode())))
    damaged[40] ^= 1
    unreadable = framed(example(id=[6], input=b"\xff", output=OUTPUT.encode()))
    path.write_bytes(good + bytes(damaged) + unreadable + good[:-1])
    with pytest.raises(Truncated):
        read(f"fruit@{path}")
    found = check(f"fruit@{path}")
    assert (found.cases, [fault.where for fault in found.malformed]) == (1, ["record 2", "record 3"])
    assert "checksum" in found.malformed[0].reason and "UTF-8" in found.malformed[1].reason


def test_the_same_as_json_lines_is_read(tmp_path):
    path = tmp_path / "inputlabels.jsonl"
    path.write_text(json.dumps({"inputs": INPUT, "targets": OUTPUT}) + "\n", encoding="utf-8")
    for source in (path, f"fruit@{path}"):
        (case,) = read(source).cases
        assert (case.id, case.request.target) == ("fruit:0", NEW)
