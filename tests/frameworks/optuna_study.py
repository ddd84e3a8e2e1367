"""A script that optimizes with Optuna, as a function that a test runs in a process of its own and may kill."""

from __future__ import annotations

import os
import random
import signal
import warnings
from array import array
from pathlib import Path
from typing import Any

import optuna

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.integrations.optuna import StudyTracker

STEPS = 9


def storage(folder: Path) -> optuna.storages.RDBStorage:
    """Return a storage that retries trials of which the process has died for an hour."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
        return optuna.storages.RDBStorage(
            f"sqlite:///{folder}/optuna.db", heartbeat_interval=60, heartbeat_stale_trial_callback=retry
        )


def learn(
    rate: float, run: ExperimentTracker | None = None, folder: Path | None = None, kill_at: int | None = None
) -> float:
    """Learn with random noise, with a checkpoint after every second step; from the newest one where there is one."""
    random.seed(5)
    state: dict[str, Any] = {"weights": array("d", [4.0, -2.0]), "step": 0}
    manager = None if run is None else EnhancedCheckpointManager(run, folder)
    if manager is not None and manager.list_checkpoints():
        manager.restore(state)
    while state["step"] < STEPS:
        for i, weight in enumerate(state["weights"]):
            state["weights"][i] = weight - rate * (weight + random.gauss(0, 0.1))
        state["step"] += 1
        if run is not None and manager is not None:
            run.log_metric("loss", sum(map(abs, state["weights"])), step=state["step"])
            if state["step"] % 2 == 0:
                manager.save_checkpoint(state, step=state["step"])
        if state["step"] == kill_at:
            run.flush()  # what was logged since the checkpoint is there, and must not be there twice
            os.kill(os.getpid(), signal.SIGKILL)
    return sum(map(abs, state["weights"]))


def optimize(folder: Path, trials: int, kill: tuple[int, int] | None = None) -> None:
    """Try ``trials`` more; ``kill`` is the trial and the step at which the process is killed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="rates", storage=storage(folder), load_if_exists=True)
    study_tracker = StudyTracker.of(study, "optuna", database_url=f"sqlite:///{folder}/experiments.db")

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("rate", 0.01, 0.5)
        with study_tracker.trial(trial) as run:
            step = kill[1] if kill is not None and trial.number == kill[0] else None
            return learn(rate, run, folder / "checkpoints", step)

    study.optimize(objective, n_trials=trials, callbacks=[study_tracker])
    study_tracker.tracker.close()
