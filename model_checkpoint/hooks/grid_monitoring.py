"""Built-in hooks for many runs: how far a grid is, which runs died, and who does which configuration."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.experiment_recovery import ExperimentRecoveryHook, InterruptedRun
from model_checkpoint.hooks.grid_coordinator import Claim, GridCoordinatorHook
from model_checkpoint.utils.heartbeat import Heartbeat

__all__ = [
    "Claim",
    "ExperimentRecoveryHook",
    "GridCoordinatorHook",
    "GridProgressHook",
    "InterruptedRun",
    "read_progress",
]


class GridProgressHook(BaseHook):
    """Notes how far the runs of a grid are, in a file of JSON lines that many processes may write to.

    Each line has ``time`` (Unix seconds), ``host``, ``pid`` and ``event``: ``started``, ``saved``, ``heartbeat`` or
    ``ended``; lines of an experiment ``experiment_id`` and ``name``, of a save ``epoch`` and ``step``, of an end
    ``status`` and ``seconds``. Every line is one write at the end of the file. ``read_progress`` sums them up.

    Args:
        path: the file.
        total: how many runs the grid has; None when nobody knows.
        heartbeat: seconds between two signs of life while a run goes on.
        name, priority: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    events = (HookEvent.ON_EXPERIMENT_START, HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.ON_EXPERIMENT_END)

    def __init__(
        self,
        path: str | os.PathLike[str],
        total: int | None = None,
        heartbeat: float = 30.0,
        name: str | None = None,
        priority: int = HookPriority.LOW,
    ) -> None:
        super().__init__(name, priority=priority)
        if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
            raise ConfigurationError(f"total must be an integer of at least 1, or None, not {total!r}")
        self._path, self._total, self._heartbeat = os.fspath(path), total, heartbeat
        self._names: dict[str | None, str] = {}  # of the runs that go on
        self._beat = Heartbeat(heartbeat, lambda: self._write("heartbeat"))

    def execute(self, context: HookContext) -> None:
        """Write a line."""
        about: dict[str, Any] = {"experiment_id": context.experiment_id}
        if context.event is HookEvent.ON_EXPERIMENT_START:
            self._names[context.experiment_id] = context.data["name"]
            self._write("started", **about, name=context.data["name"])
            if len(self._names) == 1:
                self._beat.start()
            return
        about["name"] = self._names.get(context.experiment_id)
        if context.event is HookEvent.AFTER_CHECKPOINT_SAVE:
            self._write("saved", **about, epoch=context.data["epoch"], step=context.data["step"])
            return
        self._names.pop(context.experiment_id, None)
        if not self._names:
            self._beat.stop()
        self._write("ended", **about, status=context.data["status"], seconds=context.data["seconds"])

    def progress(self) -> dict[str, Any]:
        """Return what ``read_progress`` says of the file now."""
        return read_progress(self._path, self._total, 3 * self._heartbeat)

    def _write(self, event: str, **more: Any) -> None:
        told = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "event": event, **more}
        line = f"\n{json.dumps(told)}\n".encode()  # the first break ends a line that a full disk has cut off
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)


def read_progress(path: str | os.PathLike[str], total: int | None = None, patience: float = 90.0) -> dict[str, Any]:
    """Sum up a file that ``GridProgressHook`` has written.

    Args:
        path: the file.
        total: how many runs the grid has.
        patience: seconds without a sign of life after which a process is taken for dead.

    Returns:
        ``total``; counts ``done`` (completed), ``failed`` (ended in another way), ``running`` and ``dead`` (of which
        the process has been silent for too long); ``experiments``: id -> ``name``, ``state`` and ``epoch`` and ``step``
        of its last save; ``seconds`` since the first line; ``eta_seconds``: what is left of ``total`` times the mean
        time of the completed runs, by the number of runs at once, or None while nothing tells.
    """
    runs: dict[str, dict[str, Any]] = {}
    alive: dict[tuple[str, int], float] = {}
    times: list[float] = []
    for told in _lines(path):
        times.append(told["time"])
        process = told["host"], told["pid"]
        alive[process] = told["time"]
        if told["event"] == "started":
            run = {"name": told["name"], "state": "running", "epoch": None, "step": None, "seconds": None}
            runs[told["experiment_id"]] = {**run, "process": process}
        elif told["event"] == "saved" and told["experiment_id"] in runs:
            runs[told["experiment_id"]].update(epoch=told["epoch"], step=told["step"])
        elif told["event"] == "ended" and told["experiment_id"] in runs:
            state = "done" if told["status"] == "completed" else "failed"
            runs[told["experiment_id"]].update(state=state, seconds=told["seconds"])
    now = time.time()
    for run in runs.values():
        if now - alive[run.pop("process")] > patience and run["state"] == "running":
            run["state"] = "dead"
    states = [run["state"] for run in runs.values()]
    counts = {state: states.count(state) for state in ("done", "failed", "running", "dead")}
    took = [run["seconds"] for run in runs.values() if run["state"] == "done"]
    eta = None
    if total is not None and took:
        left = max(0, total - counts["done"] - counts["failed"])
        eta = left * (sum(took) / len(took)) / max(1, counts["running"])
    since = now - times[0] if times else 0.0
    return {"total": total, **counts, "experiments": runs, "seconds": since, "eta_seconds": eta}


def _lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    found = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            told = json.loads(line) if line else None
        except ValueError:
            continue  # cut off by a full disk
        if isinstance(told, dict):
            found.append(told)
    return found
