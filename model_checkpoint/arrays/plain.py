"""Arrays of the standard library: ``bytes``, ``bytearray``, ``memoryview`` and ``array.array``."""

from __future__ import annotations

from array import array

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout

_SIGNED, _UNSIGNED = "bhilqn", "BHILQN"
_FLOATS = {"e": "float16", "f": "float32", "d": "float64"}


def _dtype_of(format: str, itemsize: int) -> str:
    code = format.lstrip("@=<") or "B"
    if code in ("c", "B", "?"):
        return "bool" if code == "?" else "uint8"
    if len(code) == 1 and code in _SIGNED:
        return f"int{itemsize * 8}"
    if len(code) == 1 and code in _UNSIGNED:
        return f"uint{itemsize * 8}"
    if code in _FLOATS:
        return _FLOATS[code]
    raise ValueError(f"its element format {format!r} has no portable meaning; convert it to numbers or bytes first")


class PlainAdapter:
    """Adapter of the standard library's buffers; needs nothing."""

    def to_host(self, value: object) -> HostArray | None:
        if isinstance(value, array):
            dtype, kind = _dtype_of(value.typecode, value.itemsize), f"array:{value.typecode}"
            return HostArray(dtype, (len(value),), memoryview(value).cast("B"), kind, id(value))
        if isinstance(value, memoryview):
            dtype = _dtype_of(value.format, value.itemsize)
            flat = value if value.c_contiguous else memoryview(value.tobytes())
            data = memoryview(b"") if value.nbytes == 0 else flat.cast("B")
            return HostArray(dtype, tuple(value.shape or ()), data, f"memoryview:{value.format}", id(value))
        if isinstance(value, (bytes, bytearray)):
            return HostArray("uint8", (len(value),), memoryview(value), type(value).__name__, id(value))
        return None

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
        if format is None or flat.nbytes == 0:
            return flat if format is None else memoryview(b"").cast(format)  # type: ignore[call-overload]
        return flat.cast(format, array_.shape)  # type: ignore[call-overload]

    def view(self, base: object, layout: Layout, offset: int) -> object:
        if not isinstance(base, memoryview):
            raise TypeError(f"{type(base).__name__} has no strided views")
        count = 1
        for length, stride in reversed(list(zip(layout.shape, layout.strides))):
            if length > 1 and stride != count:
                raise ValueError("a memoryview cannot be transposed; install numpy or torch to load this array")
            count *= length
        return base[offset : offset + count].cast("B").cast(base.format, layout.shape)  # type: ignore[call-overload]
