"""TensorFlow's eager tensors and variables, stored from their own memory, without a copy where that is the host's.

A tensor never changes. Nor does the memory that a variable had when it was read: TensorFlow gives the variable other
memory when it is assigned to while somebody holds the earlier one. So background saves need no copy either.
"""

from __future__ import annotations

from typing import Any

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.arrays.numpy import NumpyAdapter
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.optional import require


class TensorflowAdapter:
    """Adapter of ``tf.Tensor`` (kind ``tensorflow``) and ``tf.Variable`` (kind ``tensorflow.variable``).

    Both come back as tensors, but for variables that are filled where they are.
    """

    def to_host(self, value: object) -> HostArray | None:
        described = self.describe(value)
        if described is None or 0 in described.shape:
            return described
        np = require("numpy", "numpy", "saving a TensorFlow tensor")
        tensor: Any = value.read_value() if _is_variable(value) else value  # type: ignore[attr-defined]
        # On the CPU a view, of other devices a copy. NumPy cannot make an array of a scalar of ml_dtypes in a tensor.
        flat = np.ravel(np.asarray(tensor if described.shape else tensor.numpy()))
        return described._replace(data=memoryview(flat.view(np.uint8)))

    def describe(self, value: object) -> HostArray | None:
        tf = require("tensorflow", "tensorflow", "saving a TensorFlow tensor")  # its own object is here: it is loaded
        if not isinstance(value, (tf.Tensor, tf.Variable)):
            if isinstance(value, (tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices)):
                raise ValueError("it has several parts; store them one by one, or tf.sparse.to_dense() or .to_tensor()")
            return None
        if not tf.executing_eagerly() or not (_is_variable(value) or hasattr(value, "numpy")):
            raise ValueError("it is symbolic; save outside of tf.function and tf.compat.v1 graphs")
        name = value.dtype.name
        known = DTYPES.get("float16" if name == "half" else name)
        if known is None or known.bits < 8:
            raise ValueError(f"TensorFlow's dtype {name} has no portable form; convert it with tf.cast() first")
        kind = "tensorflow.variable" if _is_variable(value) else "tensorflow"
        return HostArray(known.name, tuple(value.shape), memoryview(b""), kind, id(value), immutable=True)

    def settle(self) -> None:
        """Nothing is copied in the background."""

    def from_host(self, array: HostArray, device: Any = None) -> object:
        tf = require("tensorflow", "tensorflow", "loading a TensorFlow tensor")
        plain: Any = NumpyAdapter().from_host(array._replace(kind="numpy"))
        try:
            with tf.device(device or "CPU:0"):
                # A copy: TensorFlow's kernels want memory on a boundary that files do not keep.
                return tf.constant(plain)
        except (RuntimeError, TypeError, ValueError, tf.errors.OpError) as error:
            raise ConfigurationError(
                f"TensorFlow cannot take {array.dtype}{list(array.shape)} on device={device!r}: {error}"
            ) from error

    def fill(self, target: object, array: HostArray) -> None:
        tf = require("tensorflow", "tensorflow", "loading a TensorFlow variable")
        if not isinstance(target, tf.Variable):
            raise ValueError("a TensorFlow tensor cannot be changed")
        target.assign(NumpyAdapter().from_host(array._replace(kind="numpy")))

    def touched(self, target: object) -> None:
        """Nobody counts its changes."""

    def view(self, base: object, layout: Layout, offset: int) -> object:
        np = require("numpy", "numpy", "loading a TensorFlow tensor")
        tf = require("tensorflow", "tensorflow", "loading a TensorFlow tensor")
        with tf.device(base.device):  # type: ignore[attr-defined]
            return tf.constant(NumpyAdapter().view(np.asarray(base), layout, offset))


def _is_variable(value: object) -> bool:
    return hasattr(value, "read_value")
