"""NumPy arrays and scalars, with bfloat16 and the narrow floats through ml_dtypes."""

from __future__ import annotations

from typing import Any

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.utils.optional import require

_ML_DTYPES = {name for name in DTYPES if name.startswith(("bfloat", "float8", "float6_", "float4_"))}


class NumpyAdapter:
    """Adapter of ``numpy.ndarray`` (kind ``numpy``) and of NumPy's scalars (kind ``numpy.scalar``)."""

    def to_host(self, value: object) -> HostArray | None:
        import numpy as np  # its own array is here, so it is loaded

        if not isinstance(value, (np.ndarray, np.generic)):
            return None
        if isinstance(value, np.ma.MaskedArray):
            raise ValueError("a masked array has two parts; store its .data and its .mask")
        array = np.asarray(value)
        known = DTYPES.get(array.dtype.name)
        if known is None or known.bits != array.itemsize * 8:  # ml_dtypes gives a whole byte to 4 and 6 bit floats
            raise ValueError(f"NumPy's dtype {array.dtype} has no portable form; convert it with .astype() first")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        flat: Any = np.ravel(little, order="C")  # a view when contiguous, a copy otherwise
        kind = "numpy.scalar" if isinstance(value, np.generic) else "numpy"
        identity = None
        if kind == "numpy" and little is array:
            identity = _layout(array)
        data = memoryview(flat.view(np.uint8))
        copied = not np.may_share_memory(flat, array)
        return HostArray(array.dtype.name, array.shape, data, kind, identity, immutable=copied)

    def describe(self, value: object) -> HostArray | None:
        import numpy as np

        if not isinstance(value, np.ndarray) or value.flags.c_contiguous:
            return self.to_host(value)
        empty = np.lib.stride_tricks.as_strided(value, (0,) * value.ndim, subok=True)  # nothing of it can be copied
        described = self.to_host(empty)
        if described is None:
            return None
        upwards = value[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in value.strides)]
        return described._replace(shape=value.shape, identity=_layout(upwards))

    def settle(self) -> None:
        """Nothing is copied in the background."""

    def from_host(self, array: HostArray, device: object = None) -> object:
        np = require("numpy", "numpy", "loading a NumPy array")
        flat = np.frombuffer(array.data, dtype=self._dtype(np, array.dtype))
        made = flat.reshape(array.shape)
        return made[()] if array.kind == "numpy.scalar" else made

    def fill(self, target: object, array: HostArray) -> None:
        target[...] = self.from_host(array)  # type: ignore[index]

    def touched(self, target: object) -> None:
        """Nobody counts its changes."""

    def view(self, base: object, layout: Layout, offset: int) -> object:
        np = require("numpy", "numpy", "loading a NumPy array")
        strides = [stride * base.itemsize for stride in layout.strides]  # type: ignore[attr-defined]
        return np.lib.stride_tricks.as_strided(base[offset:], layout.shape, strides)  # type: ignore[index]

    def _dtype(self, np: Any, name: str) -> Any:
        if name not in _ML_DTYPES:
            return np.dtype(name)
        module = require("ml_dtypes", "numpy", f"loading {name} as a NumPy array")
        return np.dtype(getattr(module, name))


def _layout(array: Any) -> Layout | None:
    """Return where an array lies; None if it is empty, or its strides do not count elements, as in structured ones."""
    if not array.size or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return None
    strides = tuple(s // array.itemsize for s in array.strides)
    return Layout("cpu", array.ctypes.data, array.dtype.name, array.shape, strides)
