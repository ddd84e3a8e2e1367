"""PyTorch tensors on any device; host tensors are stored from their own memory, without a copy."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.optional import require

if TYPE_CHECKING:
    import torch


class TorchAdapter:
    """Adapter of ``torch.Tensor`` and ``torch.nn.Parameter`` (kind ``torch``)."""

    def to_host(self, value: object) -> HostArray | None:
        import torch  # its own tensor is here, so it is loaded

        if not isinstance(value, torch.Tensor):
            return None
        _check_storable(torch, value)
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"torch's dtype {value.dtype} has no portable form; convert it with .to() first")
        identity = None
        if value.numel() and not (value.is_conj() or value.is_neg()):  # those differ from their memory by a lazy bit
            identity = Layout(str(value.device), value.data_ptr(), dtype, tuple(value.shape), value.stride())
        # Conjugate and negative views are lazy bits over shared memory: resolve them before looking at bytes.
        host = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        nbytes = host.numel() * host.element_size()
        buffer: Any = b""
        if nbytes:
            buffer = (ctypes.c_ubyte * nbytes).from_address(host.data_ptr())
            buffer.owner = host  # whoever holds the memoryview keeps the tensor, and so the memory, alive
        return HostArray(dtype, tuple(host.shape), memoryview(buffer).cast("B"), "torch", identity, host)

    def from_host(self, array: HostArray, device: Any = None) -> object:
        torch = require("torch", "torch", "loading a torch tensor")
        tensor = array.source if isinstance(array.source, torch.Tensor) else _tensor(torch, array)
        if device is None:
            return tensor
        try:
            return tensor.to(device)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ConfigurationError(f"device={device!r} cannot take a tensor: {error}") from error

    def view(self, base: object, layout: Layout, offset: int) -> object:
        torch = require("torch", "torch", "loading a torch tensor")
        return torch.as_strided(base, layout.shape, layout.strides, offset)


def _check_storable(torch: Any, value: torch.Tensor) -> None:
    if value.is_nested:
        raise ValueError("a nested tensor has no one shape; store the list of its parts, .unbind()")
    if value.layout != torch.strided:
        raise ValueError(f"a {value.layout} tensor has no plain memory; store its indices and values, or .to_dense()")
    if value.is_quantized:
        raise ValueError("a quantized tensor carries scales beside its data; store .int_repr() and the scales")
    if value.device.type == "meta":
        raise ValueError("a tensor on the meta device has no data; materialise the model first")


def _tensor(torch: Any, array: HostArray) -> torch.Tensor:
    dtype = getattr(torch, array.dtype)
    data: Any = array.data
    if data.nbytes == 0:
        return torch.empty(array.shape, dtype=dtype)  # type: ignore[no-any-return]
    if data.readonly or _address(data) % dtype.itemsize:
        data = bytearray(data)  # torch wants writable memory on the element's own boundary
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.view(dtype).reshape(array.shape)  # type: ignore[no-any-return]


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(data))
