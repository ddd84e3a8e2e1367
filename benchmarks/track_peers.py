"""Trackers side by side: each logs into a folder of its own, in a process of its own.

    python benchmarks/track_peers.py calls|ten PEER FOLDER

prints microseconds: of one point, each in a call of its own, until all are stored; or of one call with ten values, in
the thread that calls. Threads that a tracker leaves behind would otherwise slow down whoever comes next.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from model_checkpoint import Capture, ExperimentTracker


class Peer(Protocol):
    """A run of one tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values at one step."""

    def finish(self) -> None:
        """Come back when everything is stored."""


class Ours:
    """This package on SQLite; like the others it is told not to look at code and machine meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._run = ExperimentTracker("run", database_url=f"sqlite:///{folder}/ours.db", capture=Capture.none())
        self.log = self._run.log_metrics
        self.log_one = self._run.log_metric
        self.finish = self._run.close


class MLflow:
    """MLflow's client on SQLite, which is what it is fastest on."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment("bench")
        mlflow.start_run()
        self.finish = mlflow.end_run
        self._mlflow = mlflow

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)


class Trackio:
    """trackio, without its dashboard."""

    def __init__(self, folder: Path) -> None:
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(project=f"bench-{uuid.uuid4().hex[:8]}", embed=False)
        self._trackio = trackio

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


class Aim:
    """Aim in a repository of its own, without system metrics and without capturing the terminal."""

    def __init__(self, folder: Path) -> None:
        from aim import Run

        self._run = Run(
            repo=str(folder), system_tracking_interval=None, capture_terminal_logs=False, log_system_params=False
        )

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._run.track(value, name=name, step=step)

    def finish(self) -> None:
        self._run.close()


class Wandb:
    """Weights & Biases, offline."""

    def __init__(self, folder: Path) -> None:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        import wandb

        self._run = wandb.init(
            dir=folder,
            project="bench",
            mode="offline",
            settings=wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorboardX:
    """tensorboardX's event file."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


# Peer -> how it is made, and how many calls of one value are timed: some would take minutes for more.
PEERS: dict[str, tuple[Callable[[Path], Peer], int]] = {
    "ours": (Ours, 200_000),
    "tensorboardX": (TensorboardX, 20_000),
    "trackio": (Trackio, 20_000),
    "Aim": (Aim, 10_000),
    "W&B offline": (Wandb, 10_000),
    "MLflow": (MLflow, 500),
}
TEN = {f"metric_{i}": i / 10 for i in range(10)}


def measure(what: str, name: str, folder: Path) -> float:
    """Return what a process of its own measures of a peer, in microseconds."""
    command = [sys.executable, __file__, what, name, str(folder)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.split()[-1])


def one_call_a_point(peer: Peer, count: int) -> float:
    """Return microseconds a point, until all are stored."""
    start = time.perf_counter()
    if isinstance(peer, Ours):
        for step in range(count):
            peer.log_one("loss", 0.5 * step, step)
    else:
        for step in range(count):
            peer.log({"loss": 0.5 * step}, step)
    peer.finish()
    return (time.perf_counter() - start) / count * 1e6


def ten_values_a_call(peer: Peer, count: int) -> float:
    """Return the microseconds that one call with ten values keeps its thread; the median of the calls."""
    laps = []
    for step in range(min(count, 2000)):
        start = time.perf_counter()
        peer.log(TEN, step)
        laps.append(time.perf_counter() - start)
    peer.finish()
    return statistics.median(laps) * 1e6


if __name__ == "__main__":
    what, name, folder = sys.argv[1:]
    make, count = PEERS[name]
    found = {"calls": one_call_a_point, "ten": ten_values_a_call}[what](make(Path(folder)), count)
    print(found)
