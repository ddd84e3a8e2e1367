"""NVIDIA's GPUs by way of NVML, where its Python binding and a driver are there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from model_checkpoint.utils.optional import find

log = logging.getLogger(__name__)


def find_nvml() -> Any:
    """Return the module ``pynvml``, or None where it is not installed."""
    return find("pynvml")


@contextmanager
def devices(nvml: Any) -> Iterator[list[Any]]:
    """Yield the handles of all GPUs of the machine, none where there is no driver; they are good within the block.

    The first call of a process can take a second, while the driver wakes the GPUs.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.debug("no GPU is seen through NVML: %s", error)
        yield []
        return
    try:
        yield [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()  # NVML counts: what the program itself has opened stays open


def described(nvml: Any) -> list[dict[str, Any]]:
    """Return ``name`` and ``memory_bytes`` of each GPU.

    Args:
        nvml: the module; None asks torch, if the program has CUDA running. Starting it here would break later forks.
    """
    if nvml is not None:
        with devices(nvml) as handles:
            return [
                {"name": _text(nvml.nvmlDeviceGetName(each)), "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(each).total}
                for each in handles
            ]
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return []
    found = map(cuda.get_device_properties, range(cuda.device_count()))
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]


def readings(nvml: Any, handles: list[Any]) -> dict[str, float]:
    """Return metric -> value: utilisation in percent, memory in use in bytes, temperature in degrees Celsius.

    What a GPU does not tell, as a part of one (MIG) does not tell its utilisation, is left out.
    """
    found = {}
    for number, handle in enumerate(handles):
        for name, read in _READINGS.items():
            try:
                found[f"system/gpu{number}/{name}"] = float(read(nvml, handle))
            except nvml.NVMLError as error:
                log.debug("GPU %s does not tell its %s: %s", number, name, error)
    return found


_READINGS: dict[str, Callable[[Any, Any], float]] = {
    "utilization_percent": lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    "memory_bytes": lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    "temperature_celsius": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
}


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name  # bytes before nvidia-ml-py 12
