"""TensorBoard's event files: records with checksums, and the few fields of their protocol buffers that hold scalars.

The framing is TFRecord: the length of a record, its checksum, the record, its checksum. The records are messages
``Event`` of tensorflow/core/util/event.proto, with ``Summary`` of framework/summary.proto and ``TensorProto`` of
framework/tensor.proto in them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from model_checkpoint.database.columns import Point
from model_checkpoint.errors import FormatError

_HEAD = struct.Struct("<QI")  # bytes of the record, checksum of that number
_CHECKSUM = struct.Struct("<I")
_CHUNK = 1 << 16  # bytes that a checksum takes apart at once; even
_PIECE = 1 << 20  # bytes that are read at once: the length of a damaged record is not believed
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # kinds of fields
_INT64 = 1 << 63
Fields = Iterator[tuple[int, int, int, bytes]]
# TensorProto: type -> the format of one number, and the field for numbers that are not in tensor_content.
_TYPES = {1: ("<f", 5), 2: ("<d", 6), 3: ("<i", 7), 9: ("<q", 10), 10: ("<?", 11), 19: ("<e", 13)}


def read_scalars(path: Path) -> Iterator[Point]:
    """Yield every scalar of an event file; a record that is cut off at its end ends it.

    Raises:
        FormatError: a record is damaged; those before it were yielded.
        OSError: the file cannot be read.
    """
    plugins: dict[str, str] = {}  # tag -> the plugin, which writers may name once and not again
    for start, record in _records(path):
        try:
            yield from list(_scalars(record, plugins))
        except (ValueError, struct.error) as error:
            raise FormatError(f"{path}: the record at byte {start:,} is no event: {error}") from error


def started_at(path: Path) -> float | None:
    """Return the Unix seconds at which the writer of an event file began, or None where nothing is in it.

    Raises:
        FormatError: its first record is damaged.
        OSError: the file cannot be read.
    """
    for start, record in _records(path):
        try:
            return _event(record)[0]
        except (ValueError, struct.error) as error:
            raise FormatError(f"{path}: the record at byte {start:,} is no event: {error}") from error
    return None


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the place and the content of every record that is whole."""
    with open(path, "rb") as file:
        start = 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            if _masked(head[:8]) != checksum:
                raise FormatError(f"{path}: the length of the record at byte {start:,} fails its checksum")
            content = _read(file, length + _CHECKSUM.size)
            if content is None:
                return
            if _masked(content[:-4]) != _CHECKSUM.unpack(content[-4:])[0]:
                raise FormatError(f"{path}: the record at byte {start:,} fails its checksum")
            yield start, content[:-4]
            start += _HEAD.size + len(content)


def _read(file: BinaryIO, length: int) -> bytes | None:
    """Return exactly so many bytes, or None where the file has fewer."""
    pieces = []
    while length:
        piece = file.read(min(length, _PIECE))
        if not piece:
            return None
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _masked(content: bytes) -> int:
    checksum = crc32c(content)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes; zlib has only the other one. Some 7 MB/s: seconds for logged images."""
    table = _table()
    checksum = 0xFFFFFFFF
    if len(content) % 2:
        # One byte first, then two in each turn: twice as fast as one by one.
        checksum = _shifted(checksum ^ content[0], 8)
        content = content[1:]
    for start in range(0, len(content), _CHUNK):
        part = content[start : start + _CHUNK]
        for pair in struct.unpack(f"<{len(part) // 2}H", part):
            checksum = table[(checksum ^ pair) & 0xFFFF] ^ (checksum >> 16)
    return checksum ^ 0xFFFFFFFF


def _shifted(checksum: int, bits: int) -> int:
    for _ in range(bits):
        checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    return checksum


@cache
def _table() -> list[int]:
    single = [_shifted(byte, 8) for byte in range(256)]
    # The low byte goes through first, and meets the high one.
    return [single[single[pair & 255] & 255 ^ pair >> 8] ^ single[pair & 255] >> 8 for pair in range(1 << 16)]


def _event(record: bytes) -> tuple[float, int, list[bytes]]:
    """Return the wall time, the step and the summaries of an event."""
    at, step, summaries = 0.0, 0, []
    for number, kind, value, content in _fields(record):
        if number == 1 and kind == _EIGHT:
            (at,) = struct.unpack("<d", content)
        elif number == 2 and kind == _VARINT:
            step = _signed(value)
        elif number == 5 and kind == _BYTES:
            summaries.append(content)
    if not math.isfinite(at):
        raise ValueError(f"its time is {at}")
    return at, step, summaries


def _scalars(record: bytes, plugins: dict[str, str]) -> Iterator[Point]:
    at, step, summaries = _event(record)
    for summary in summaries:
        for number, kind, _, content in _fields(summary):
            if number == 1 and kind == _BYTES:
                tag, value = _value(content, plugins)
                if value is not None:
                    yield tag, value, step, at


def _value(content: bytes, plugins: dict[str, str]) -> tuple[str, float | None]:
    """Return the tag of a ``Summary.Value``, and its number if it is a scalar."""
    tag, simple, tensor, metadata = "", None, None, b""
    for number, kind, _, part in _fields(content):
        if number == 1 and kind == _BYTES:
            tag = part.decode()
        elif number == 2 and kind == _FOUR:
            (simple,) = struct.unpack("<f", part)
        elif number == 8 and kind == _BYTES:
            tensor = part
        elif number == 9 and kind == _BYTES:
            metadata = part
    plugin = plugins.setdefault(tag, _plugin(metadata)) if metadata else plugins.get(tag, "scalars")
    if simple is not None or tensor is None or plugin != "scalars":
        return tag, simple
    return tag, _number(tensor)


def _plugin(metadata: bytes) -> str:
    for number, kind, _, plugin_data in _fields(metadata):
        if number == 1 and kind == _BYTES:
            for inner, inner_kind, _, name in _fields(plugin_data):
                if inner == 1 and inner_kind == _BYTES:
                    return name.decode()
    return ""


def _number(tensor: bytes) -> float | None:
    """Return the number of a tensor that holds a single one, else None."""
    fields = list(_fields(tensor))
    types = [value for number, kind, value, _ in fields if number == 1 and kind == _VARINT]
    if not types or types[0] not in _TYPES:
        return None
    layout, home = _TYPES[types[0]]
    size = struct.calcsize(layout)
    for number, kind, value, content in fields:
        if number == 4 and kind == _BYTES and len(content) == size:
            return float(struct.unpack(layout, content)[0])
        if number == home:
            found = _numbers(kind, value, content, layout)
            if len(found) == 1:
                return found[0]
    return None


def _numbers(kind: int, value: int, content: bytes, layout: str) -> list[float]:
    """Return the numbers of one field of a tensor: one by itself, or packed."""
    if layout in ("<f", "<d"):
        return [float(number) for (number,) in struct.iter_unpack(layout, content)]
    varints, at = [value], 0
    if kind == _BYTES:
        varints = []
        while at < len(content):
            value, at = _varint(content, at)
            varints.append(value)
    if layout == "<e":  # the bits of a half
        return [float(struct.unpack(layout, struct.pack("<H", bits & 0xFFFF))[0]) for bits in varints]
    return [float(_signed(bits)) for bits in varints]


def _fields(message: bytes) -> Fields:
    """Yield (number, kind, value of a varint, content of anything else) of every field of a message.

    Raises:
        ValueError: these are no bytes of a message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, value, length = key & 7, 0, 0
        if kind == _VARINT:
            value, at = _varint(message, at)
        elif kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_EIGHT, _FOUR):
            length = 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + length > len(message):
            raise ValueError("a field that is longer than its message")
        yield key >> 3, kind, value, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value & (2 * _INT64 - 1), at
    raise ValueError("a number that does not end")


def _signed(value: int) -> int:
    return value - 2 * _INT64 if value >= _INT64 else value
