"""JAX arrays. They never change, so they are stored from their own memory, by background saves too."""

from __future__ import annotations

from typing import Any

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.arrays.numpy import NumpyAdapter
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.optional import require


class JaxAdapter:
    """Adapter of ``jax.Array`` (kind ``jax``). XLA does not take a donated array's memory while that is borrowed."""

    def to_host(self, value: object) -> HostArray | None:
        described = self.describe(value)
        if described is None or 0 in described.shape:
            return described
        np = require("numpy", "numpy", "saving a JAX array")
        flat = np.ravel(np.asarray(value))  # on the CPU a view; of other devices a copy
        return described._replace(data=memoryview(flat.view(np.uint8)))

    def describe(self, value: object) -> HostArray | None:
        jax = require("jax", "jax", "saving a JAX array")  # its own array is here, so it is loaded
        if isinstance(value, jax.core.Tracer):
            raise ValueError("it is being traced; save outside of jit, grad and vmap")
        if not isinstance(value, jax.Array):
            return None
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return None  # a typed key is its data and the name of what it is a key of: two things
        if value.is_deleted():
            raise ValueError("it was donated to a compiled function, and is no more")
        if not value.is_fully_addressable:
            raise ValueError("parts of it are on other hosts; gather it first")
        dtype = value.dtype.name
        if dtype not in DTYPES or DTYPES[dtype].bits < 8:
            raise ValueError(f"JAX's dtype {dtype} has no portable form; convert it with .astype() first")
        return HostArray(dtype, tuple(value.shape), memoryview(b""), "jax", id(value), immutable=True)

    def settle(self) -> None:
        """Nothing is copied in the background."""

    def from_host(self, array: HostArray, device: Any = None) -> object:
        jax = require("jax", "jax", "loading a JAX array")
        plain: Any = NumpyAdapter().from_host(array._replace(kind="numpy"))
        try:
            target = jax.devices(device)[0] if isinstance(device, str) else device
            with _with_64_bits(jax):  # JAX would make 32 bits of 64 otherwise
                return jax.device_put(plain, target)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"device={device!r} cannot take a JAX array: {error}") from error

    def fill(self, target: object, array: HostArray) -> None:
        raise ValueError("a JAX array cannot be changed")

    def touched(self, target: object) -> None:
        """Nobody counts its changes."""

    def view(self, base: object, layout: Layout, offset: int) -> object:
        np = require("numpy", "numpy", "loading a JAX array")
        jax = require("jax", "jax", "loading a JAX array")
        with _with_64_bits(jax):
            return jax.device_put(NumpyAdapter().view(np.asarray(base), layout, offset), base.sharding)  # type: ignore[attr-defined]


def _with_64_bits(jax: Any) -> Any:
    return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True)
