"""Points of one metric as columns: what is stored of them, 16 bytes each or fewer, to the bit.

A row a point would cost a database some 40 bytes and a microsecond each. Numbers that are all the same, or count up
evenly as steps and positions do, take 16 bytes however many they are.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

_HEAD = struct.Struct("<BI")  # version, points
_PEAK = struct.Struct("<qqBdd")  # position, step, whether there is none, value, time
_LENGTH = struct.Struct("<I")
_SAME, _EVEN, _RAW = b"=", b"+", b"."
_VERSION = 1
Point = tuple[str, float, int | None, float]  # name, value, step, timestamp
MAX_POINTS = 4096  # of one block; a whole run of them is read in a few, and one is cut or added to cheaply


@dataclass
class Columns:
    """Points of one metric, in the order in which they were logged.

    Attributes:
        positions: int64; the place of each among all points of the experiment.
        steps: int64; 0 where there is none.
        stepless: uint8; 1 where there is no step. Empty when every point has one.
        values: float64.
        times: float64; Unix seconds.
    """

    positions: array[Any] = field(default_factory=lambda: array("q"))
    steps: array[Any] = field(default_factory=lambda: array("q"))
    stepless: array[Any] = field(default_factory=lambda: array("B"))
    values: array[Any] = field(default_factory=lambda: array("d"))
    times: array[Any] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> Columns:
        """Return a part, as a copy."""
        return Columns(self.positions[part], self.steps[part], self.stepless[part], self.values[part], self.times[part])

    @classmethod
    def of(
        cls, positions: Iterable[int], values: Iterable[float], steps: Sequence[int | None], times: Iterable[float]
    ) -> Columns:
        """Return the columns of points of one metric, each with its position, value, step or None, and time."""
        stepless = array("B")
        if None in steps:
            stepless = array("B", [step is None for step in steps])
            steps = [step or 0 for step in steps]
        return cls(array("q", positions), array("q", steps), stepless, array("d", values), array("d", times))

    def moved(self, distance: int) -> Columns:
        """Return the columns with ``distance`` added to every position."""
        return replace(self, positions=array("q", [position + distance for position in self.positions]))

    def extend(self, other: Columns) -> None:
        """Put the points of ``other`` behind these."""
        if self.stepless or other.stepless:
            self.stepless = self._mask() + other._mask()
        self.positions += other.positions
        self.steps += other.steps
        self.values += other.values
        self.times += other.times

    def _mask(self) -> array[Any]:
        return self.stepless or array("B", bytes(len(self)))

    def step(self, index: int) -> int | None:
        """Return the step of one point, or None."""
        return None if self.stepless and self.stepless[index] else self.steps[index]

    def all_steps(self) -> list[int | None]:
        """Return the steps, None where there is none."""
        if not self.stepless:
            return list(self.steps)
        return [None if missing else step for step, missing in zip(self.steps, self.stepless)]

    def extremes(self) -> list[int]:
        """Return the indices of the lowest and the highest value, in order; of the first one where all are NaN."""
        values = self.values.tolist()
        low, high = min(values), max(values)
        if not (low == low and high == high):  # with a NaN among them, what min() finds depends on where it stands
            numbers = [value for value in values if value == value]
            if not numbers:
                return [0]
            low, high = min(numbers), max(numbers)
        return sorted({values.index(low), values.index(high)})

    def pick(self, indices: Iterable[int]) -> Columns:
        """Return the points with these indices."""
        chosen = list(indices)
        parts = [self.positions, self.steps, self.stepless, self.values, self.times]
        return Columns(*(array(part.typecode, [part[i] for i in chosen] if part else []) for part in parts))

    def split(self, position: int) -> tuple[Columns, Columns]:
        """Return the points that were logged before ``position``, and the others."""
        place = bisect_left(self.positions, position)
        return self[:place], self[place:]

    def peaks(self) -> bytes:
        """Return the lowest and the highest point, in order, as bytes that ``of_peaks`` takes."""
        first, *rest = self.extremes()
        chosen = self.pick([first, *(rest or [first])])
        stepless = chosen.stepless or b"\0\0"
        return b"".join(map(_PEAK.pack, chosen.positions, chosen.steps, stepless, chosen.values, chosen.times))

    @classmethod
    def of_peaks(cls, peaks: Iterable[bytes]) -> Columns:
        """Return the points of which ``peaks`` made those bytes, of every block two."""
        positions, steps, stepless, values, times = zip(*_PEAK.iter_unpack(b"".join(peaks)))
        mask = array("B", stepless if any(stepless) else ())
        return cls(array("q", positions), array("q", steps), mask, array("d", values), array("d", times))

    def encode(self) -> bytes:
        """Return the bytes from which ``decode`` makes the same columns."""
        parts = [self.positions, self.steps, self.stepless, self.values, self.times]
        return _HEAD.pack(_VERSION, len(self)) + b"".join(chain.from_iterable(map(_encode, parts)))


def pack(batch: Mapping[str, Columns]) -> bytes:
    """Return name -> columns as bytes, from which ``unpack`` makes it again."""
    parts = []
    for name, columns in batch.items():
        for start in range(0, len(columns), MAX_POINTS):
            for content in (name.encode(), columns[start : start + MAX_POINTS].encode()):
                parts += [_LENGTH.pack(len(content)), content]
    return b"".join(parts)


def unpack(content: bytes) -> dict[str, Columns]:
    """Return what ``pack`` was given.

    Raises:
        ValueError: these are no bytes of it.
    """
    parts, at = [], 0
    while at < len(content):
        (length,) = _LENGTH.unpack(_exactly(content, at, _LENGTH.size))
        parts.append(_exactly(content, at + _LENGTH.size, length))
        at += _LENGTH.size + length
    batch: dict[str, Columns] = {}
    for name, columns in zip(parts[::2], parts[1::2]):
        batch.setdefault(name.decode(), Columns()).extend(decode(columns))
    return batch


def decode(content: bytes) -> Columns:
    """Return what ``Columns.encode`` was called on.

    Raises:
        ValueError: these are no bytes of it.
    """
    try:
        version, count = _HEAD.unpack_from(content)
        if version != _VERSION or count > MAX_POINTS:
            raise ValueError(f"a block of metric points has version {version} and {count} points")
        made, at = [], _HEAD.size
        for typecode in "qqBdd":
            column, at = _decode(content, at, typecode, count)
            made.append(column)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a block of metric points is damaged: {error}") from None
    if at != len(content):
        raise ValueError(f"a block of metric points has {len(content)} bytes, not {at}")
    return Columns(*made)


def _encode(column: array[Any]) -> Iterator[bytes]:
    if not column:
        yield _RAW + b"\0"
        return
    first = column[:1]
    stride = int(column[1]) - int(first[0]) if column.typecode == "q" and len(column) > 1 else 0
    if column[-1] == first[0] != 0.0 and column.count(first[0]) == len(column):
        yield _SAME + _little(first)
    elif (
        stride > 0
        and column[-1] == first[0] + stride * (len(column) - 1)
        and column.tolist() == list(range(first[0], first[0] + stride * len(column), stride))
    ):
        yield _EVEN + struct.pack("<qq", first[0], stride)
    else:
        yield _RAW + b"\1"
        yield _little(column)


def _decode(content: bytes, at: int, typecode: str, count: int) -> tuple[array[Any], int]:
    column: array[Any] = array(typecode)
    kind, at = content[at : at + 1], at + 1
    if kind == _SAME:
        column.frombytes(_exactly(content, at, column.itemsize))
        at += column.itemsize
        column *= count
    elif kind == _EVEN and typecode == "q":
        first, stride = struct.unpack_from("<qq", content, at)
        return array("q", range(first, first + stride * count, stride)), at + 16
    elif kind == _RAW:
        length = column.itemsize * count * content[at : at + 1].count(1)
        column.frombytes(_exactly(content, at + 1, length))
        at += 1 + length
    else:
        raise ValueError(f"a block of metric points has a column of an unknown kind, {kind!r}")
    if sys.byteorder == "big":
        column.byteswap()
    return column, at


def _exactly(content: bytes, at: int, length: int) -> bytes:
    if len(content) < at + length:
        raise ValueError(f"a block of metric points ends too early: at byte {len(content)}, not {at + length}")
    return content[at : at + length]


def _little(column: array[Any]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()
