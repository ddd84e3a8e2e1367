"""Does a save cost more when an experiment holds 2,000 checkpoints than when it holds 20?

Two experiments in directories of their own: a large one is filled to 1,989 checkpoints; then 21 saves around its
2,000th are timed in turn with 21 saves around the 20th of a fresh one, so that noise strikes both. Also counts the
files that the process holds open at the end.

    python benchmarks/scale.py [--checkpoints 2000] [--json results.json]

Prints medians, the ratio (to reach: 1.5 at most) and open files (to reach: 20 at most); exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

PAIRS = 21
STATE = {"weight": array("f", range(256)), "bias": array("f", range(16))}  # about 1 KB: what grows is the bookkeeping


class Run:
    """An experiment that is saved to again and again."""

    def __init__(self, folder: Path, max_checkpoints: int | None) -> None:
        self.tracker = ExperimentTracker("scale", database_url=f"sqlite:///{folder}/experiments.db")
        self.manager = EnhancedCheckpointManager(
            self.tracker, str(folder / "checkpoints"), max_checkpoints=max_checkpoints
        )
        self.epoch = 0

    def close(self) -> None:
        self.tracker.close()

    def save(self) -> float:
        """Save once; returns seconds."""
        self.epoch += 1
        start = time.perf_counter()
        self.manager.save_checkpoint(STATE, epoch=self.epoch, loss=1 / self.epoch, metrics={"accuracy": 0.5})
        return time.perf_counter() - start


def measure(folder: Path, checkpoints: int, max_checkpoints: int | None, label: str) -> dict[str, float]:
    """Return the medians of both runs in seconds, their ratio, and the files open while the large run still is."""
    for name in ("large", "small"):
        (folder / name).mkdir(parents=True)
    large, small = Run(folder / "large", max_checkpoints), Run(folder / "small", max_checkpoints)
    lead = PAIRS // 2
    for i in range(checkpoints - lead - 1):
        large.save()
        if i % 100 == 0:
            print(f"\r{label}: {i:,} of {checkpoints:,} saved", end="", file=sys.stderr, flush=True)
    for _ in range(20 - lead - 1):
        small.save()
    pairs = [(small.save(), large.save()) for _ in range(PAIRS)]
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    small.close()
    open_files = len(os.listdir("/proc/self/fd"))
    large.close()
    first, last = (statistics.median(times) for times in zip(*pairs))
    return {"save_20": first, f"save_{checkpoints}": last, "ratio": last / first, "open_files": open_files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "all kept": measure(Path(folder) / "kept", options.checkpoints, None, "all kept"),
            "10 kept": measure(Path(folder) / "default", options.checkpoints, 10, "10 kept"),
        }
    print(f"{'':12}{'20th save':>12}{options.checkpoints:>8,}th save{'ratio':>8}{'open files':>12}")
    for name, row in found.items():
        first, last, ratio, open_files = row.values()
        print(f"{name:12}{first * 1e3:>9.2f} ms{last * 1e3:>13.2f} ms{ratio:>8.2f}{open_files:>12}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(row["ratio"] > 1.5 or row["open_files"] > 20 for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
