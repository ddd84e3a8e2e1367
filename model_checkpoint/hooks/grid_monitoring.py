"""Built-in hooks for many runs: how far a grid is, which runs died, and who does which configuration."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.experiment_recovery import ExperimentRecoveryHook, InterruptedRun
from model_checkpoint.hooks.grid_coordinator import Claim, GridCoordinatorHook
from model_checkpoint.utils.checks import check_count, check_positive
from model_checkpoint.utils.fork import watch
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
        path: the file; its folder is made when it does not exist.
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
        if total is not None:
            check_count(total=total)
        check_positive(heartbeat=heartbeat)
        self._path, self._total, self._heartbeat = os.fspath(path), total, heartbeat
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        self.after_fork_in_child()
        watch(self)

    def before_fork(self) -> None:
        """Nothing has to rest."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Know of no run: those that there are are the parent's."""
        self._lock = threading.Lock()  # around both
        self._names: dict[str | None, str] = {}  # of the runs that go on
        self._beat: Heartbeat | None = None

    def execute(self, context: HookContext) -> None:
        """Write a line."""
        about: dict[str, Any] = {"experiment_id": context.experiment_id}
        if context.event is HookEvent.ON_EXPERIMENT_START:
            self._write("started", **about, name=context.data["name"])
            with self._lock:
                self._names[context.experiment_id] = context.data["name"]
                self._beat = self._beat or Heartbeat(self._heartbeat, lambda: self._write("heartbeat"))
            return
        about["name"] = self._names.get(context.experiment_id)
        if context.event is HookEvent.AFTER_CHECKPOINT_SAVE:
            self._write("saved", **about, epoch=context.data["epoch"], step=context.data["step"])
            return
        with self._lock:
            self._names.pop(context.experiment_id, None)
            if not self._names and self._beat is not None:
                self._beat.stop()
                self._beat = None
        self._write("ended", **about, status=context.data["status"], seconds=context.data["seconds"])

    def progress(self) -> dict[str, Any]:
        """Return what ``read_progress`` says of the file now."""
        return read_progress(self._path, self._total, 3 * self._heartbeat)

    def _write(self, event: str, **more: Any) -> bool:
        told = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "event": event, **more}
        line = f"\n{json.dumps(told)}\n".encode()  # the first break ends a line that a full disk has cut off
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)
        return True


def read_progress(path: str | os.PathLike[str], total: int | None = None, patience: float = 90.0) -> dict[str, Any]:
    """Sum up a file that ``GridProgressHook`` has written.

    Args:
        path: the file.
        total: how many runs the grid has.
        patience: seconds without a sign of life after which a process is taken for dead.

    Returns:
        ``total``; counts ``completed``, ``failed`` (ended in another way), ``running`` and ``dead`` (of which
        the process has been silent for too long); ``experiments``: id -> ``name``, ``state`` and ``epoch`` and ``step``
        of its last save; ``seconds`` since the first line; ``eta_seconds``: what is left of ``total`` times the mean
        time of the completed runs, by the number of runs at once, or None while nothing tells. Before the first line,
        all of it is zero or None.
    """
    runs: dict[str, dict[str, Any]] = {}
    alive: dict[tuple[str, int], float] = {}
    times: list[float] = []
    for told in _lines(path):
        try:
            process, at = (str(told["host"]), int(told["pid"])), float(told["time"])
            _note(runs, told, process)
        except (KeyError, TypeError, ValueError):
            continue  # nothing that GridProgressHook wrote
        times.append(at)
        alive[process] = at
    now = time.time()
    for run in runs.values():
        if now - alive[run.pop("process")] > patience and run["state"] == "running":
            run["state"] = "dead"
    states = [run["state"] for run in runs.values()]
    counts = {state: states.count(state) for state in ("completed", "failed", "running", "dead")}
    took = [run["seconds"] for run in runs.values() if run["state"] == "completed"]
    eta = None
    if total is not None and took:
        left = max(0, total - counts["completed"] - counts["failed"])
        eta = left * (sum(took) / len(took)) / max(1, counts["running"])
    since = now - times[0] if times else 0.0
    return {"total": total, **counts, "experiments": runs, "seconds": since, "eta_seconds": eta}


def _note(runs: dict[str, dict[str, Any]], told: dict[str, Any], process: tuple[str, int]) -> None:
    """Take a line up into what is known of the runs."""
    key = str(told.get("experiment_id"))
    if told["event"] == "started":
        run = {"name": str(told["name"]), "state": "running", "epoch": None, "step": None, "seconds": None}
        runs[key] = {**run, "process": process}
    elif told["event"] == "saved" and key in runs:
        runs[key].update(epoch=told["epoch"], step=told["step"])
    elif told["event"] == "ended" and key in runs:
        state = "completed" if told["status"] == "completed" else "failed"
        runs[key].update(state=state, seconds=float(told["seconds"]))


def _lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    found = []
    content = Path(path).read_bytes() if os.path.exists(path) else b""
    for line in content.split(b"\n"):
        try:
            told = json.loads(line) if line else None
        except (ValueError, RecursionError):
            continue  # cut off by a full disk
        if isinstance(told, dict):
            found.append(told)
    return found
