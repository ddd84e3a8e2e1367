"""PyTorch tensors on any device; host tensors are stored from their own memory, without a copy.

Those of a GPU are copied to pinned memory on a stream of their own, beside what training has queued after them. Torch
keeps pinned memory that is let go for the next copy of that size. Source: "CUDA semantics" of PyTorch's notes, "Use
pinned memory buffers" and "CUDA streams".
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from model_checkpoint.arrays.dtypes import DTYPES
from model_checkpoint.arrays.host import HostArray, Layout
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.optional import require

if TYPE_CHECKING:
    import torch


class TorchAdapter:
    """Adapter of ``torch.Tensor`` and ``torch.nn.Parameter`` (kind ``torch``)."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, value: object) -> HostArray | None:
        import torch  # its own tensor is here, so it is loaded

        if not isinstance(value, torch.Tensor):
            return None
        dtype, plain, identity = _described(torch, value)
        if plain.is_conj() or plain.is_neg():  # lazy bits over shared memory
            plain, identity = plain.resolve_conj().resolve_neg(), None
        if plain.device.type == "cuda" and identity is not None:
            host = self._pinned(torch, plain)
        else:
            host = plain.cpu().contiguous()
        copied = identity is None or host.data_ptr() != identity.address
        return HostArray(dtype, tuple(host.shape), _bytes_of(host), "torch", identity, host, immutable=copied)

    def describe(self, value: object) -> HostArray | None:
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        dtype, plain, identity = _described(torch, value)
        lazy = plain.is_conj() or plain.is_neg()
        borrowed = identity is not None and not lazy and identity.device == "cpu" and plain.is_contiguous()
        data = _bytes_of(plain) if borrowed else memoryview(b"")
        return HostArray(dtype, tuple(plain.shape), data, "torch", identity, plain)

    def _pinned(self, torch: Any, value: torch.Tensor) -> torch.Tensor:
        """Begin to copy a GPU's tensor; the copy is whole when ``settle`` has returned."""
        stream = self._streams.get(value.device)
        if stream is None:  # several threads may make one; all use the first that is noted
            stream = self._streams.setdefault(value.device, torch.cuda.Stream(value.device))
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
        value.record_stream(stream)  # so that its memory is not given away before it is read
        return host  # type: ignore[no-any-return]

    def settle(self) -> None:
        for stream in list(self._streams.values()):  # another thread may add one meanwhile
            stream.synchronize()

    def from_host(self, array: HostArray, device: Any = None) -> object:
        torch = require("torch", "torch", "loading a torch tensor")
        tensor = array.source if isinstance(array.source, torch.Tensor) else _tensor(torch, array)
        if device is None:
            return tensor
        try:
            if not isinstance(device, (str, torch.device)) and type(device) is not int:
                raise TypeError("a device is named by text such as 'cuda:0', by its number, or by a torch.device")
            return tensor.to(torch.device(device))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ConfigurationError(f"device={device!r} cannot take a tensor: {error}") from error

    def fill(self, target: object, array: HostArray) -> None:
        target.detach().copy_(self.from_host(array))  # type: ignore[attr-defined]

    def touched(self, target: object) -> None:
        import torch

        if isinstance(target, torch.Tensor) and not target.is_inference():  # autograd would use the new values unseen
            torch.autograd.graph.increment_version(target)

    def view(self, base: object, layout: Layout, offset: int) -> object:
        torch = require("torch", "torch", "loading a torch tensor")
        return torch.as_strided(base, layout.shape, layout.strides, offset)


def _described(torch: Any, value: torch.Tensor) -> tuple[str, torch.Tensor, Layout | None]:
    """Return the dtype's name, the tensor without autograd, and where it lies; None for an empty one."""
    _check_storable(torch, value)
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"torch's dtype {value.dtype} has no portable form; convert it with .to() first")
    plain = value.detach()
    if not value.numel():
        return dtype, plain, None
    layout = Layout(str(value.device), value.data_ptr(), dtype, tuple(value.shape), value.stride())
    reach = sum([(n - 1) * step for n, step in zip(layout.shape, layout.strides)]) + 1
    if not layout.address or value.untyped_storage().nbytes() < (value.storage_offset() + reach) * value.itemsize:
        raise ValueError("its memory was freed, or was never there; gather or materialise it first")
    return dtype, plain, layout


def _bytes_of(host: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor in host memory; whoever holds it keeps the tensor alive."""
    nbytes = host.numel() * host.element_size()
    if not nbytes:
        return memoryview(b"")
    buffer = _bytes_type(nbytes).from_address(host.data_ptr())
    buffer.owner = host
    return memoryview(buffer).cast("B")


@lru_cache(maxsize=1024)
def _bytes_type(nbytes: int) -> Any:
    return ctypes.c_ubyte * nbytes  # making the type takes longer than all else, and a model has few sizes


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
    # Torch wants writable memory, on the element's own boundary.
    flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)
    if flat.data_ptr() % dtype.itemsize:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.view(array.shape)  # type: ignore[no-any-return]
