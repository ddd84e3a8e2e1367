"""Training in the standard library alone, for the tests of resuming; a module of its own, so that it loads at once."""

from __future__ import annotations

import random
from array import array
from typing import Any

from model_checkpoint import EnhancedCheckpointManager


def walk(manager: EnhancedCheckpointManager, steps: int, **options: Any) -> None:
    random.seed(6)
    state = {"x": array("d", [0.0]), "y": array("d", [0.0])}
    restore_rng = options.pop("restore_rng", True)
    start = manager.restore(state, restore_rng=restore_rng)["step"] if manager.list_checkpoints() else 0
    for step in range(start + 1, steps + 1):
        state["x"][0] += 1
        state["y"][0] += random.random()
        manager.save_checkpoint(state, step=step, **options)


def walk_without_random_states(manager: EnhancedCheckpointManager, steps: int) -> None:
    walk(manager, steps, restore_rng=False)


def walk_without_saving_random_states(manager: EnhancedCheckpointManager, steps: int) -> None:
    walk(manager, steps, save_rng=False)


def leave_out_a_step(manager: EnhancedCheckpointManager, steps: int) -> None:
    saved = manager.list_checkpoints()
    for step in range(saved[-1]["step"] + 2 if saved else 1, steps + 1):
        manager.save_checkpoint({"x": array("d", [step])}, step=step)


def fail(manager: EnhancedCheckpointManager, steps: int) -> None:
    raise ArithmeticError("no data")


def save_nothing(manager: EnhancedCheckpointManager, steps: int) -> None:
    """Trains, perhaps."""
