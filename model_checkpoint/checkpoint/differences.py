"""How the elements of two arrays differ, in float64: by NumPy where it is installed, else by the standard library.

Elements are equal when their bits are: then they differ by 0, be they NaN, and -0.0 differs from 0.0, by 0 too. NaN
against anything else differs by NaN, infinity against a number by infinity; NaN outdoes infinity.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from model_checkpoint.arrays import DTYPES

_BLOCK = 1 << 15  # elements at once: what NumPy makes of them stays in the cache, and what Python makes is 4 MiB


class Difference(NamedTuple):
    """What was found of ``elements`` elements of ``a`` and as many of ``b``.

    Attributes:
        elements, differing: how many there are, and how many have other bits.
        max_abs: the largest absolute difference of two elements; of complex ones, of their modulus.
        distance: the Euclidean norm of the difference.
        norm: that of ``a``, whose NaNs and infinities are left out.
    """

    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    distance: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        """The distance as a part of the norm; 0 where both are 0, infinite where only the norm is."""
        if self.distance == 0:
            return 0.0
        return self.distance / self.norm if self.norm else self.distance * math.inf

    def joined(self, other: Difference) -> Difference:
        """Return what both say together, of other elements each."""
        return Difference(
            self.elements + other.elements,
            self.differing + other.differing,
            _unless_nan(max, self.max_abs, other.max_abs),
            _unless_nan(math.hypot, self.distance, other.distance),
            math.hypot(self.norm, other.norm),
        )


def difference(dtype: str, a: memoryview, b: memoryview, np: Any) -> Difference:
    """Return how elements differ.

    Args:
        dtype: a name of ``DTYPES`` whose elements are whole bytes.
        a, b: the elements, little-endian, flat and of one length; they are only read.
        np: NumPy, or None to do without.
    """
    form = _form(dtype)
    size = DTYPES[dtype].bits // 8
    compute = _by_hand if np is None else _by_numpy
    found = Difference()
    for begin in range(0, a.nbytes, _BLOCK * size):
        end = min(a.nbytes, begin + _BLOCK * size)
        differing, gaps, norm = compute(form, a[begin:end], b[begin:end], np)
        found = found.joined(Difference((end - begin) // size, differing, *gaps, norm))
    return found


class _Form(NamedTuple):
    """How to read an element: ``lanes`` numbers that ``struct`` calls ``code``, whose bits are integers ``raw``.

    What ``struct`` has no code for is read as integers: ``table`` has the numbers that each stands for, and those of
    ``upper`` are the upper half of a float32.
    """

    code: str
    raw: str
    lanes: int = 1
    table: tuple[tuple[float, ...], ...] = ()
    upper: bool = False


@cache
def _form(dtype: str) -> _Form:
    if dtype.startswith("complex"):
        code = {32: "e", 64: "f", 128: "d"}[DTYPES[dtype].bits]
        return _Form(code, {"e": "H", "f": "I", "d": "Q"}[code], 2)
    if dtype == "bfloat16":
        return _Form("H", "H", upper=True)
    if dtype in _NARROW:
        return _Form("B", "B", table=_NARROW[dtype]())
    code = (DTYPES[dtype].format or "B").replace("?", "B")
    return _Form(code, {1: "B", 2: "H", 4: "I", 8: "Q"}[struct.calcsize(f"<{code}")])


def _narrow(exponents: int, bias: int, special: str) -> Callable[[], tuple[tuple[float, ...], ...]]:
    """Return what makes the 256 numbers of an 8-bit float.

    Args:
        exponents: bits of the exponent; those right of it are the mantissa's.
        bias: what is taken off the exponent.
        special: ``ieee``: the largest exponent is for infinity and NaN. ``fn``: only the two largest patterns are, and
            are NaN. ``fnuz``: only minus zero is, and is NaN.
    """
    mantissas = 7 - exponents

    def number(byte: int) -> float:
        exponent, mantissa = byte >> mantissas & (1 << exponents) - 1, byte & (1 << mantissas) - 1
        sign = -1.0 if byte & 0x80 else 1.0
        if special == "ieee" and exponent == (1 << exponents) - 1:
            return math.nan if mantissa else sign * math.inf
        if (special == "fn" and byte & 0x7F == 0x7F) or (special == "fnuz" and byte == 0x80):
            return math.nan
        hidden = 1 << mantissas if exponent else 0
        return sign * math.ldexp(mantissa + hidden, max(exponent, 1) - bias - mantissas)

    return lambda: tuple((number(byte),) for byte in range(256))


_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_NARROW: dict[str, Callable[[], tuple[tuple[float, ...], ...]]] = {
    "float8_e4m3fn": _narrow(4, 7, "fn"),
    "float8_e5m2": _narrow(5, 15, "ieee"),
    "float8_e4m3fnuz": _narrow(4, 8, "fnuz"),
    "float8_e5m2fnuz": _narrow(5, 16, "fnuz"),
    "float8_e8m0fnu": lambda: (*((math.ldexp(1, byte - 127),) for byte in range(255)), (math.nan,)),
    "float4_e2m1fn_x2": lambda: tuple((_FLOAT4[byte & 15], _FLOAT4[byte >> 4]) for byte in range(256)),
}


_Found = tuple[int, tuple[float, float], float]  # how many differ, the largest gap and the distance, the norm of a


def _by_hand(form: _Form, a: memoryview, b: memoryview, _: None) -> _Found:
    left, right = bytes(a), bytes(b)
    numbers = _numbers(form, left)
    norm = math.hypot(*filter(math.isfinite, map(float, numbers)))
    if left == right:
        return 0, (0.0, 0.0), norm
    pairs = zip(_unpack(form.raw, left), _unpack(form.raw, right))
    unequal = [x != y for x, y in pairs]
    each = len(numbers) // len(unequal)
    spread = chain.from_iterable([flag] * each for flag in unequal)
    gaps = [abs(float(x - y)) if u else 0.0 for x, y, u in zip(numbers, _numbers(form, right), spread)]
    if any(map(math.isnan, gaps)):
        sizes = (math.nan, math.nan)
    else:
        moduli = map(math.hypot, gaps[::2], gaps[1::2]) if form.lanes == 2 else gaps
        sizes = (max(moduli), math.hypot(*gaps))
    differing = sum(map(max, unequal[::2], unequal[1::2])) if form.lanes == 2 else sum(unequal)
    return differing, sizes, norm


def _numbers(form: _Form, data: bytes) -> Sequence[float]:
    raw = _unpack(form.code, data)
    if form.table:
        return list(chain.from_iterable(map(form.table.__getitem__, raw)))
    return _unpack("f", struct.pack(f"<{len(raw)}I", *(number << 16 for number in raw))) if form.upper else raw


def _unpack(code: str, data: bytes) -> tuple[Any, ...]:
    return struct.unpack(f"<{len(data) // struct.calcsize(f'<{code}')}{code}", data)


def _by_numpy(form: _Form, a: memoryview, b: memoryview, np: Any) -> _Found:
    with np.errstate(all="ignore"):  # infinity and NaN are as good as other numbers here
        x, y = (_array(form, data, np) for data in (a, b))
        unequal = np.frombuffer(a, f"<{form.raw}") != np.frombuffer(b, f"<{form.raw}")
        sizes = np.abs(x.astype("f8"))
        norm = _norm(sizes[np.isfinite(sizes)], np)
        if not unequal.any():
            return 0, (0.0, 0.0), norm
        if form.code in "qQ":  # where float64 would round before the subtraction
            bits = [number.view("<u8") for number in (x, y)]
            gaps = np.where(x > y, bits[0] - bits[1], bits[1] - bits[0]).astype("f8")
        else:
            gaps = np.abs(x.astype("f8") - y.astype("f8"))
        gaps[~np.repeat(unequal, gaps.size // unequal.size)] = 0.0
        differing = unequal.reshape(-1, form.lanes).any(1).sum()
        largest = (np.hypot(gaps[::2], gaps[1::2]) if form.lanes == 2 else gaps).max()
        distance = _norm(gaps, np)
    return int(differing), (math.nan if distance != distance else float(largest), distance), norm


def _array(form: _Form, data: memoryview, np: Any) -> Any:
    raw = np.frombuffer(data, f"<{form.code}")
    if form.table:
        return np.array(form.table)[raw].reshape(-1)
    return (raw.astype("<u4") << 16).astype("<u4").view("<f4") if form.upper else raw


def _norm(sizes: Any, np: Any) -> float:
    """Return the Euclidean norm of what is not negative, also where squares are beyond float64."""
    largest = sizes.max(initial=0.0)
    if not 0 < largest < math.inf:
        return float(largest)
    return float(largest * np.sqrt(np.square(sizes / largest).sum()))


def _unless_nan(function: Callable[[float, float], float], x: float, y: float) -> float:
    return math.nan if x != x or y != y else function(x, y)
