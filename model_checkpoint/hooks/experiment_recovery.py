"""The hook that finds runs that died; ``grid_monitoring`` is where users find it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.utils.fork import watch

log = logging.getLogger(__name__)
_PROBE = 1.0  # seconds; whoever only looks whether a run lives holds its lock for far less


@dataclass(frozen=True)
class InterruptedRun:
    """A run that died, and where it goes on.

    Attributes:
        experiment_id, name: of it.
        checkpoint_id, epoch, step: its last durable checkpoint, or None: it has none, and begins anew.
    """

    experiment_id: str
    name: str
    checkpoint_id: str | None
    epoch: int | None
    step: int | None


class ExperimentRecoveryHook(BaseHook):
    """Keeps a small file for each run that goes on, and finds the runs that died.

    The file is replaced in one step at the start and after every save, and removed when the run has ended. A lock that
    the kernel holds for the process, and drops when it dies in whatever way, tells whether it lives; so the folder must
    be on a file system that all the processes share and that knows ``flock``.

    Args:
        folder: where the files are; made when it does not exist.
        name, priority: see ``BaseHook``.
    """

    events = (HookEvent.ON_EXPERIMENT_START, HookEvent.AFTER_CHECKPOINT_SAVE, HookEvent.ON_EXPERIMENT_END)

    def __init__(
        self, folder: str | os.PathLike[str], name: str | None = None, priority: int = HookPriority.HIGH
    ) -> None:
        super().__init__(name, priority=priority)
        self._folder = os.fspath(folder)
        os.makedirs(self._folder, exist_ok=True)
        self._locks: dict[str, int] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._busy = threading.Lock()  # around both: saves end in other threads
        watch(self)

    def before_fork(self) -> None:
        """Nothing has to rest."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Let go of the parent's locks: a child that lives on would make a dead run look alive."""
        for lock in self._locks.values():
            os.close(lock)
        self._locks, self._states, self._busy = {}, {}, threading.Lock()

    def execute(self, context: HookContext) -> None:
        """Write or remove the file of a run."""
        if context.experiment_id is not None:
            with self._busy:
                self._note(context.experiment_id, context)

    def _note(self, key: str, context: HookContext) -> None:
        if context.event is HookEvent.ON_EXPERIMENT_START:
            if key not in self._locks:
                lock = self._lock(key, patience=_PROBE)
                if lock is None:
                    log.warning("experiment %s goes on in another process, too; that one keeps its state", key)
                    return
                self._locks[key] = lock
            self._states[key] = {"experiment_id": key, "name": context.data["name"], **_read(self._path(key))}
        elif key not in self._locks:
            return
        elif context.event is HookEvent.ON_EXPERIMENT_END:
            self._forget(key)
            return
        else:
            told = {
                "checkpoint_id": context.checkpoint_id,
                "epoch": context.data["epoch"],
                "step": context.data["step"],
            }
            self._states[key] |= told
        _replace(self._path(key), json.dumps(self._states[key]))

    def interrupted(self) -> list[InterruptedRun]:
        """Return the runs whose processes died before their end, in the order of their names.

        Whoever asks at the same time gets the same runs. The checkpoint of each was durable when it was noted. If
        retention or somebody has removed it since, the newest that is left is what
        ``load_checkpoint(experiment_id=...)`` loads.
        """
        found = []
        for path in sorted(Path(self._folder).glob("*.json")):
            lock = None if path.stem in self._locks else self._lock(path.stem, fcntl.LOCK_SH)
            if lock is None:
                continue  # it lives
            try:
                state = _read(str(path))
            finally:
                os.close(lock)
            if isinstance(state.get("name"), str):
                place = (state.get(name) for name in ("checkpoint_id", "epoch", "step"))
                found.append(InterruptedRun(path.stem, state["name"], *place))
        return sorted(found, key=lambda run: run.name)

    def forget(self, experiment_id: str) -> None:
        """Remove the note of a run that died, which nobody will go on with.

        Raises:
            ConfigurationError: it lives, or there is no such note.
        """
        if os.path.basename(experiment_id) != experiment_id or not os.path.exists(self._path(experiment_id)):
            raise ConfigurationError(f"there is no note of an experiment {experiment_id!r}; interrupted() lists them")
        with self._busy:
            lock = None if experiment_id in self._locks else self._lock(experiment_id, patience=_PROBE)
            if lock is None:
                raise ConfigurationError(f"experiment {experiment_id} goes on; end it first")
            self._locks[experiment_id] = lock
            self._forget(experiment_id)

    def _forget(self, key: str) -> None:
        Path(self._path(key)).unlink(missing_ok=True)
        Path(self._lock_path(key)).unlink(missing_ok=True)
        self._states.pop(key, None)
        os.close(self._locks.pop(key))

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, f"{key}.json")

    def _lock(self, key: str, kind: int = fcntl.LOCK_EX, patience: float = 0.0) -> int | None:
        """Return a descriptor that holds the run's lock; None where a process has it that lives.

        Args:
            key: of the run.
            kind: alone, or ``LOCK_SH``, beside others who only look.
            patience: seconds to wait for those who only look.
        """
        deadline = time.monotonic() + patience
        while True:
            file = os.open(self._lock_path(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
                continue
            try:
                if os.path.samestat(os.fstat(file), os.stat(self._lock_path(key))):
                    return file
            except FileNotFoundError:
                pass  # its last holder has removed it between the two lines
            os.close(file)

    def _lock_path(self, key: str) -> str:
        return os.path.join(self._folder, f"{key}.lock")


def _read(path: str) -> dict[str, Any]:
    try:
        told = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _replace(path: str, text: str) -> None:
    """Let a file hold ``text``, durably; at every moment it is the old one or the new one, whole."""
    beside = f"{path}.{uuid4()}"
    try:
        with open(beside, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
