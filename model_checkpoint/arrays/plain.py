"""Arrays of the standard library: ``bytes``, ``bytearray``, ``memoryview`` and ``array.array``."""

from __future__ import annotations

import struct
import sys
from array import array

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.errors import MissingDependencyError

_FORMATS = {"?": "bool", "c": "uint8", "e": "float16", "f": "float32", "d": "float64"}
for _code in "bhilqn":  # sizes of the C types differ between machines: ask this one
    _FORMATS[_code] = f"int{struct.calcsize(_code) * 8}"
    _FORMATS[_code.upper()] = f"uint{struct.calcsize(_code) * 8}"


class PlainAdapter:
    """Adapter of the standard library's buffers; needs nothing."""

    def to_host(self, value: object) -> HostArray | None:
        if isinstance(value, array):
            if value.typecode not in _FORMATS:
                raise ValueError("an array of characters has no portable element size; store it as a string")
            dtype, kind = _FORMATS[value.typecode], f"array:{value.typecode}"
            return HostArray(dtype, (len(value),), memoryview(value).cast("B"), kind, id(value))
        if isinstance(value, memoryview):
            code = value.format.removeprefix("@")
            if code not in _FORMATS:
                raise ValueError(f"its element format {value.format!r} has no portable meaning; cast it to 'B' first")
            dtype = _FORMATS[code]
            flat = value if value.c_contiguous else memoryview(value.tobytes())
            data = memoryview(b"") if value.nbytes == 0 else flat.cast("B")
            return HostArray(dtype, tuple(value.shape or ()), data, f"memoryview:{value.format}", id(value))
        if isinstance(value, (bytes, bytearray)):
            frozen = isinstance(value, bytes)
            name = "bytes" if frozen else "bytearray"  # of subclasses, too: theirs could be any library's name
            return HostArray("uint8", (len(value),), memoryview(value), name, id(value), immutable=frozen)
        return None

    def describe(self, value: object) -> HostArray | None:
        if isinstance(value, memoryview) and not value.c_contiguous:
            described = self.to_host(memoryview(b"").cast(value.format))  # type: ignore[call-overload]
            return None if described is None else described._replace(shape=tuple(value.shape or ()), identity=id(value))
        return self.to_host(value)

    def settle(self) -> None:
        """Nothing is copied."""

    def from_host(self, array_: HostArray, device: object = None) -> object:
        kind, _, detail = array_.kind.partition(":")
        if kind in ("bytes", "bytearray"):
            return bytes(array_.data) if kind == "bytes" else bytearray(array_.data)
        if kind == "array":
            made = array(detail)
            made.frombytes(array_.data)
            return made
        flat = array_.data
        format = detail.lstrip("@=<") or DTYPES[array_.dtype].format
        if format is None or (format == "e" and sys.version_info < (3, 12)):
            return flat  # this Python has no elements of that type; the bytes are the best there is
        if flat.nbytes == 0:
            return memoryview(b"").cast(format)  # type: ignore[call-overload]
        return flat.cast(format, array_.shape)  # type: ignore[call-overload]

    def fill(self, target: object, array: HostArray) -> None:
        flat = memoryview(target)  # type: ignore[arg-type]
        if flat.readonly or not flat.c_contiguous:
            raise ValueError("its memory is read-only or has gaps")
        if flat.nbytes:
            flat.cast("B")[:] = array.data

    def touched(self, target: object) -> None:
        """Nobody counts its changes."""

    def view(self, base: object, layout: Layout, offset: int) -> object:
        if not isinstance(base, memoryview):
            raise TypeError(f"{type(base).__name__} has no strided views")
        count = 1
        for length, stride in reversed(list(zip(layout.shape, layout.strides))):
            if length > 1 and stride != count:
                raise MissingDependencyError("numpy", "numpy", "loading a transposed view of another array")
            count *= length
        width = DTYPES[layout.dtype].bits // 8 // base.itemsize  # of a dtype without a format, base is bytes
        if width > 1:
            return base[offset * width : (offset + count) * width]
        return base[offset : offset + count].cast("B").cast(base.format, layout.shape)  # type: ignore[call-overload]
