"""System metrics, sampled by a thread: CPU, memory, disk, network, GPUs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakMethod

from model_checkpoint.tracking.gpus import devices, find_nvml, readings
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.optional import find

log = logging.getLogger(__name__)
Log = Callable[[Mapping[str, float]], object]
Source = Callable[[], Mapping[str, float]]
_LONGEST_WAIT = 3.0  # seconds for a sample that is being taken


class SystemSampler:
    """Takes a sample of the machine every ``interval`` seconds, in a daemon thread, and gives it to ``log``.

    With psutil: ``system/cpu_percent`` (of all cores since the sample before), ``system/memory_percent``,
    ``system/process_memory_bytes`` (resident), ``system/disk_read_bytes``, ``system/disk_write_bytes``,
    ``system/network_sent_bytes`` and ``system/network_received_bytes`` (of the machine since it started). Without it
    the first three, on Linux. With pynvml and a driver, for each GPU: ``system/gpu0/utilization_percent``,
    ``system/gpu0/memory_bytes`` (in use) and ``system/gpu0/temperature_celsius``.

    What fails is left out and told to the log at level DEBUG. A forked child does not sample until it calls ``start``.

    Args:
        log: a method, called with name -> value in the sampler's thread. Its object is not kept alive; the thread ends
            when that is gone.
        interval: seconds between two samples, and before the first one.
    """

    def __init__(self, log: Log, interval: float = 10.0) -> None:
        self._log = WeakMethod(log)
        self._interval = interval
        self._start_afresh()
        watch(self)

    def _start_afresh(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._sampling = threading.Lock()
        self._resting = False

    def before_fork(self) -> None:
        """Let a sample come to its end: psutil takes locks for it, which the child would find taken for ever."""
        self._resting = self._sampling.acquire(timeout=_LONGEST_WAIT)  # a driver may hang

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._resting:
            self._resting = False
            self._sampling.release()

    def after_fork_in_child(self) -> None:
        """Forget the thread, which is not there."""
        self._start_afresh()

    def start(self) -> None:
        """Begin to sample; does nothing when it has begun.

        Raises:
            RuntimeError: the system gives no thread.
        """
        if self._thread is not None:
            return
        # Imported here and not in the thread: a fork during its import would leave the child unable to import it.
        psutil, nvml = find("psutil"), find_nvml()
        sources = _of_psutil(psutil) if psutil else _of_proc()
        self._stopped = threading.Event()
        thread = threading.Thread(
            target=_run,
            args=(self._log, self._interval, self._stopped, self._sampling, sources, nvml),
            name="model-checkpoint-system",
            daemon=True,
        )
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """End the thread; nothing is logged afterwards. Stopping twice does nothing."""
        self._stopped.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():  # the garbage collector can stop it there
            thread.join(_LONGEST_WAIT)


def _run(
    log_: WeakMethod[Log],
    interval: float,
    stopped: threading.Event,
    sampling: threading.Lock,
    sources: list[Source],
    nvml: Any,
) -> None:
    with devices(nvml) as handles:
        if handles:
            sources = [*sources, lambda: readings(nvml, handles)]
        while not stopped.wait(interval):
            sample = _sample(sampling, sources)
            target = log_()
            if target is None:
                return
            if sample and not stopped.is_set():
                _try(target, sample)
            del target  # or it would live until the next sample


def _sample(sampling: threading.Lock, sources: list[Source]) -> dict[str, float]:
    sample: dict[str, float] = {}
    with sampling:
        for source in sources:
            sample |= _try(source) or {}
    return sample


def _try(act: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return act(*arguments)
    except Exception as error:  # noqa: BLE001 - of any library and any kernel; training goes on
        log.debug("a part of a system sample failed: %s", error)
        return None


class _Cpu:
    """The share of time that the machine's cores were busy since the last call.

    Args:
        times: returns the seconds or ticks since the start: all of them, and those idle.
    """

    def __init__(self, times: Callable[[], tuple[float, float]]) -> None:
        self._times = times
        self._last: tuple[float, float] | None = None
        _try(self)

    def __call__(self) -> dict[str, float]:
        last, self._last = self._last, self._times()
        if last is None or self._last[0] <= last[0]:
            return {}
        idle = (self._last[1] - last[1]) / (self._last[0] - last[0])
        return {"system/cpu_percent": 100 * min(1.0, max(0.0, 1 - idle))}


def _of_psutil(psutil: Any) -> list[Source]:
    def times() -> tuple[float, float]:
        now = psutil.cpu_times()
        # Linux counts the time of guests in user and nice, too.
        return sum(now) - getattr(now, "guest", 0) - getattr(now, "guest_nice", 0), now.idle + getattr(now, "iowait", 0)

    def disk() -> dict[str, float]:
        now = psutil.disk_io_counters()
        return {"system/disk_read_bytes": now.read_bytes, "system/disk_write_bytes": now.write_bytes} if now else {}

    def network() -> dict[str, float]:
        now = psutil.net_io_counters()
        return {"system/network_sent_bytes": now.bytes_sent, "system/network_received_bytes": now.bytes_recv}

    return [
        _Cpu(times),
        lambda: {"system/memory_percent": psutil.virtual_memory().percent},
        lambda: {"system/process_memory_bytes": psutil.Process().memory_info().rss},
        disk,
        network,
    ]


def _of_proc() -> list[Source]:
    return [_Cpu(_proc_times), _proc_memory, _proc_process]


def _proc_times() -> tuple[float, float]:
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in user and nice already (man 5 proc)
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def _proc_memory() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {name: int(number) for name, number, *_ in lines}
    return {"system/memory_percent": 100 * (1 - kilobytes["MemAvailable:"] / kilobytes["MemTotal:"])}


def _proc_process() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"system/process_memory_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
