"""NVIDIA's GPUs by way of NVML, where its Python binding and a driver are there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from model_checkpoint.utils.optional import find

log = logging.getLogger(__name__)
Found = TypeVar("Found")


def find_nvml() -> Any:
    """Return the module ``pynvml``, or None where it is not installed."""
    return find("pynvml")


def loaded_nvml() -> Any:
    """Return what ``find_nvml`` has imported, or None; for threads, which should not look for it themselves."""
    return sys.modules.get("pynvml")


@contextmanager
def devices(nvml: Any) -> Iterator[dict[int, Any]]:
    """Yield number -> handle of the GPUs of the machine, none without NVML; they are good within the block.

    A GPU that cannot be opened is left out. The first call of a process can take a second, while the driver wakes the
    GPUs.
    """
    if nvml is None or not _try(lambda: nvml.nvmlInit() or True, "NVML"):
        yield {}
        return
    try:
        found = {
            number: _try(partial(nvml.nvmlDeviceGetHandleByIndex, number), f"GPU {number}")
            for number in range(_try(nvml.nvmlDeviceGetCount, "the number of GPUs") or 0)
        }
        yield {number: handle for number, handle in found.items() if handle is not None}
    finally:
        _try(nvml.nvmlShutdown, "the end of NVML")  # NVML counts: what the program itself has opened stays open


def described(nvml: Any) -> list[dict[str, Any]]:
    """Return ``name`` and ``memory_bytes`` of each GPU, None for what it does not tell.

    Args:
        nvml: the module; None asks torch, if the program has CUDA running. Starting it here would break later forks.
    """
    if nvml is not None:
        with devices(nvml) as handles:
            return [_described(nvml, number, handle) for number, handle in handles.items()]
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return []
    found = map(cuda.get_device_properties, range(cuda.device_count()))
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]


def _described(nvml: Any, number: int, handle: Any) -> dict[str, Any]:
    return {
        "name": _try(lambda: _text(nvml.nvmlDeviceGetName(handle)), f"the name of GPU {number}"),
        "memory_bytes": _try(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total, f"the memory of GPU {number}"),
    }


def readings(nvml: Any, handles: Mapping[int, Any]) -> dict[str, float]:
    """Return metric -> value: utilisation in percent, memory in use in bytes, temperature in degrees Celsius.

    What a GPU does not tell, as a part of one (MIG) does not tell its utilisation, is left out.
    """
    found = {}
    for number, handle in handles.items():
        for name, read in _READINGS.items():
            value = _try(partial(read, nvml, handle), f"{name} of GPU {number}")
            if value is not None:
                found[f"system/gpu{number}/{name}"] = float(value)
    return found


def _try(ask: Callable[[], Found], what: str) -> Found | None:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 - an NVMLError, or whatever a library that is not NVIDIA's raises
        log.debug("%s is left out: %s", what, error)
        return None


_READINGS: dict[str, Callable[[Any, Any], float]] = {
    "utilization_percent": lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    "memory_bytes": lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    "temperature_celsius": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
}


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name  # bytes before nvidia-ml-py 12
