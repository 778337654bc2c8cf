"""Read TFRecord files of tf.Example messages, without TensorFlow.

A record is framed by its length (8 bytes, little endian), a checksum of those, its bytes, and a checksum of
them; a checksum is CRC-32C, rotated and shifted by a constant. A tf.Example is a protocol buffer: a map of
names to lists of bytes, float32 or int64. Sources: the descriptions of both formats in TensorFlow's and
Protocol Buffers' documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from errata.data._base import Malformed
from errata.data.formats import Truncated
from errata.errors import DataError

Feature = list[bytes] | list[float] | list[int]

_CASTAGNOLI = 0x82F63B78
_SHIFT = 0xA282EAD8
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_CASTAGNOLI if byte & 1 else 0)
        entries.append(byte)
    return tuple(entries)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes; RFC 3720, appendix B.4, has test values."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Return the checksum as stored in TFRecord files: CRC-32C, rotated and shifted."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _SHIFT) & 0xFFFFFFFF


def is_tfrecord(path: Path) -> bool:
    """Whether a file begins like a TFRecord: with a length and its checksum."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError:
        return False
    return len(head) == _HEADER.size and masked_crc32c(head[:8]) == _HEADER.unpack(head)[1]


def examples(path: Path) -> Iterator[dict[str, Feature] | Malformed]:
    """Yield the features of each record; for a damaged record, a Malformed with the reason.

    Raises DataError where the file cannot be opened, Truncated where reading cannot continue: the file ends
    inside a record, or a length is damaged.
    """
    try:
        with path.open("rb") as file:
            number = 1
            while True:
                data = _record(path, file, number)
                if data is None:
                    return
                yield data if isinstance(data, Malformed) else _features(data)
                number += 1
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _record(path: Path, file: BinaryIO, number: int) -> bytes | Malformed | None:
    """Read one record's bytes; None at the end of the file."""
    header = file.read(_HEADER.size)
    if not header:
        return None
    place = f"{path} breaks off at record {number}"
    if len(header) < _HEADER.size:
        raise Truncated(f"{place}: the file ends inside its length; get the file again")
    length, check = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != check:
        raise Truncated(f"{place}: its length does not match its checksum; not a TFRecord file, or damaged")
    data, footer = file.read(length), file.read(_FOOTER.size)
    if len(data) < length or len(footer) < _FOOTER.size:
        raise Truncated(
            f"{place}: expected {length} bytes and a checksum, the file ends before; get it again"
        )
    if masked_crc32c(data) != _FOOTER.unpack(footer)[0]:
        return Malformed("its bytes do not match their checksum")
    return data


def _features(data: bytes) -> dict[str, Feature] | Malformed:
    try:
        return parse(data)
    except Malformed as error:
        return error


def parse(data: bytes) -> dict[str, Feature]:
    """Return the features of a serialised tf.Example by name. Raises Malformed."""
    parsed_features: dict[str, Feature] = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            name = next(_messages(entry, 1), b"")
            parsed_features[_text(name)] = _feature(next(_messages(entry, 2), b""))
    return parsed_features


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"a feature's name is not UTF-8 text: {error}") from error


def _feature(data: bytes) -> Feature:
    """Decode one of the three kinds of lists; a feature without any is an empty list."""
    values: Feature = []
    for kind, content in _fields(data):
        if not isinstance(content, bytes):
            raise Malformed(f"field {kind} of a feature is no message")
        items = [value for number, value in _fields(content) if number == 1]
        if kind == 1:
            values = [item for item in items if isinstance(item, bytes)]
        elif kind == 2:
            values = [number for item in items for number in _floats(item)]
        elif kind == 3:
            values = [number for item in items for number in _integers(item)]
    return values


def _floats(item: int | bytes) -> list[float]:
    """Decode float32 numbers, one or packed."""
    data = item if isinstance(item, bytes) else item.to_bytes(8, "little").removesuffix(bytes(4))
    if len(data) % 4 or (isinstance(item, int) and len(data) > 4):
        raise Malformed(
            f"float32 numbers in {len(data)} bytes, expected a multiple of 4, or 4 for a single one"
        )
    return [number for (number,) in struct.iter_unpack("<f", data)]


def _integers(item: int | bytes) -> list[int]:
    """Decode int64 numbers, one or packed; negative ones are in two's complement."""
    numbers, at = [item] if isinstance(item, int) else [], 0
    while isinstance(item, bytes) and at < len(item):
        number, at = _varint(item, at)
        numbers.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    for field, value in _fields(data):
        if field == number:
            if not isinstance(value, bytes):
                raise Malformed(f"field {number} is a number, expected a run of bytes")
            yield value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message. Raises Malformed."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise Malformed(f"unknown wire type {wire} of field {number}")
        piece = data[at : at + size]
        if len(piece) < size:
            raise Malformed(f"field {number} has {len(piece)} bytes, expected {size}")
        at += size
        yield number, piece if wire == _BYTES else int.from_bytes(piece, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a number of 7-bit groups, the lowest first; return it and the place after it."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number & (1 << 64) - 1, at
    raise Malformed("a number ends in the middle, or is longer than ten bytes")
