"""One worker of the grid of test_grid_monitoring.py, a process of its own."""

from __future__ import annotations

import sys
import time
from array import array
from pathlib import Path

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.hooks import HookManager
from model_checkpoint.hooks.grid_monitoring import ExperimentRecoveryHook, GridCoordinatorHook, GridProgressHook

STEPS = 5


def configurations() -> list[dict[str, float]]:
    return [{"rate": 0.1 * (number + 1), "seed": number} for number in range(12)]


def train(rate: float, manager: EnhancedCheckpointManager, begin: int, slow: Path) -> float:
    """Follow a parabola downhill; a checkpoint a step."""
    weight = 10.0
    if begin:
        (weight,) = manager.load_checkpoint()["model_state_dict"]["weight"]
    for step in range(begin, STEPS):
        weight -= rate * weight / 10
        manager.save_checkpoint({"weight": array("d", [weight])}, step=step + 1, loss=weight**2)
        if slow.exists():  # the one that is to be killed is caught at work
            print("at work", flush=True)
            time.sleep(1000)
    return weight


def work(url: str, folder: Path, lease: float) -> None:
    hooks, database = HookManager(), EnhancedDatabaseConnection(url)
    grid = GridCoordinatorHook(database, "grid", configurations(), lease=lease)
    hooks.register_hook(grid)
    hooks.register_hook(GridProgressHook(folder / "progress.jsonl", total=12, heartbeat=0.2))
    hooks.register_hook(ExperimentRecoveryHook(folder / "running"))
    while (claim := grid.claim()) is not None:
        if claim.experiment_id is None:
            tracker = ExperimentTracker(
                f"run {claim.number}", "grid", config=claim.config, database_url=url, hook_manager=hooks
            )
        else:
            tracker = ExperimentTracker.resume(claim.experiment_id, url, hook_manager=hooks)
        with tracker, EnhancedCheckpointManager(tracker, folder / "checkpoints", max_checkpoints=2) as manager:
            begin = manager.list_checkpoints()[-1]["step"] if manager.list_checkpoints() else 0
            final = train(claim.config["rate"], manager, begin, folder / f"slow {sys.argv[4]}")
            tracker.log_metric("final", final)
        print("done", claim.number, claim.attempt, begin, final, flush=True)
    database.close()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
