"""How much memory does a blocking save take above the state?

Each peer saves GPT-2 with Adam in a new process. When the state is built, the kernel's high-water mark of resident
memory is set back (5 into ``/proc/self/clear_refs``), and read again after the first save (``VmHWM``): the difference
is what the save took at its peak, with all that it imports on first use.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from peers import PEERS
from report import Figure, Section, progress
from states import build

LIMIT = 64.0  # MiB
MEASURED = ("ours", "torch", "safetensors", "dcp", "dcp2")  # Orbax's arrays are JAX's, in another process
SAVES = 2  # the first one and another


def measure_peaks(folder: Path) -> tuple[Section, Figure]:
    """Return the peaks of all peers, and ours to reach: the larger of its two saves."""
    section = Section("memory of a blocking save of gpt2 above the state", unit="MiB")
    for name in MEASURED:
        progress(f"peak memory: {name}")
        place = folder / f"peak-{name}"
        place.mkdir()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            for peak in child.submit(_peaks, name, place).result():
                section.add(f"{name}: peak above the state", peak)
    return section, Figure(
        "peak memory of a blocking save above the state",
        max(section.rows[f"{MEASURED[0]}: peak above the state"]),
        LIMIT,
        "MiB",
    )


def _peaks(name: str, folder: Path) -> list[float]:
    peer = PEERS[name](build("gpt2"), folder)
    found = []
    for _ in range(SAVES):
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        peer.save(lambda row: None)
        found.append((_status("VmHWM") - before) / 1024)
        peer.clear()
    peer.close()
    return found


def _status(field: str) -> int:
    """Return a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
