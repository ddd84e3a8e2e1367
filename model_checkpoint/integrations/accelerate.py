"""Accelerate: what an ``Accelerator`` trains, saved and restored exactly, and a tracker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.checkpoint.rng import setters
from model_checkpoint.checkpoint.state import random_states
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError
from model_checkpoint.integrations.pytorch import ResumableLoader
from model_checkpoint.tracking import ExperimentTracker
from model_checkpoint.tracking.closing import status_after
from model_checkpoint.utils.names import is_id
from model_checkpoint.utils.optional import require

__all__ = ["AcceleratorState", "EngineTracker"]

_utils: Any = require("accelerate.utils", "accelerate", "training with Accelerate")
_tracking: Any = require("accelerate.tracking", "accelerate", "training with Accelerate")
_GeneralTracker: Any = _tracking.GeneralTracker

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


class AcceleratorState:
    """Saves and restores all that an ``Accelerator`` has prepared, in the middle of an epoch, too, bit for bit.

    That is models, optimizers, schedulers, objects given to ``register_for_checkpointing``, the gradient scaler, the
    count of accumulated batches, the random states of each process, and the place in ``loaders``. The state is one
    that every process has whole, as with DDP: the main process writes it, and each reads it. Gradients that are being
    accumulated are not in it: save when ``accelerator.sync_gradients`` is true. In a checkpoint that is loaded
    otherwise, ``model_state_dict`` has the lists ``models`` and ``registered``, and ``optimizer_state_dict``
    ``optimizers`` and ``scalers``.

    Make it after ``prepare``, and iterate over ``state.loaders`` in place of the prepared loaders: these know where
    they are. After ``restore`` in the middle of an epoch the next iteration gives the rest of that epoch.

    Args:
        manager: saves and loads. Only the main process's saves; other processes' managers load, without a tracker (a
            tracker would make an experiment of its own), from the same directory and database.
        accelerator: after ``prepare``.
        loaders: what ``prepare`` returned for the training's data loaders.

    Attributes:
        loaders: these, each a ``ResumableLoader``, in the order in which they were given.

    Raises:
        ConfigurationError: processes have parts of the state only (FSDP, DeepSpeed, Megatron, tensor parallelism).
    """

    def __init__(self, manager: EnhancedCheckpointManager, accelerator: Any, *loaders: Any) -> None:
        how = accelerator.distributed_type.value
        if how in _SHARDED:
            raise ConfigurationError(
                f"with {how} each process has a part of the state, which this does not save; "
                "use accelerator.save_state()"
            )
        self._manager = manager
        self._accelerator = accelerator
        self.loaders = [ResumableLoader(loader) for loader in loaders]

    def save(self, epoch: int = 0, step: int = 0, **known: Any) -> str:
        """Save a checkpoint; every process must call this.

        Args:
            epoch: the one that training is in, or after its last batch the next one: where ``restore`` goes on.
            step: how many steps were made.
            known: other arguments of ``save_checkpoint``: ``loss``, ``val_loss``, ``metrics``, ``config``, ``notes``.

        Returns:
            The checkpoint's id.

        Raises:
            ConfigurationError: ``known`` names a part of the state; and what ``save_checkpoint`` raises.
        """
        for name in ("model", "optimizer", "scheduler", "extra_state"):
            if name in known:
                raise ConfigurationError(f"{name} is the accelerator's own; register_for_checkpointing() adds to it")
        accelerator = self._accelerator
        place = {"random": random_states(), "loaders": [loader.state_dict() for loader in self.loaders]}
        places = _utils.gather_object([place])
        made = [""]
        if accelerator.is_main_process:
            extra = {"accumulated": accelerator.step, "processes": places}
            known = {"save_rng": False, **known}
            made = [self._manager.save_checkpoint(**self._parts(), epoch=epoch, step=step, extra_state=extra, **known)]
        return str(_utils.broadcast_object_list(made)[0])

    def restore(self, which: str = "latest", experiment_id: str | None = None) -> dict[str, Any] | None:
        """Go on from a checkpoint; every process must call this.

        Args:
            which: ``latest`` (the newest sound one), another type or an id, as for ``load_checkpoint``.
            experiment_id: whose; that of the main process's tracker when None.

        Returns:
            What ``EnhancedCheckpointManager.restore`` returns, with ``epoch`` and ``step``; None where ``latest`` was
            asked for and there is none.

        Raises:
            ConfigurationError: it was saved by another number of processes, or with other loaders; models, optimizers
                and schedulers are restored all the same.
            And what ``EnhancedCheckpointManager.restore`` raises; nothing was changed then.
        """
        found: dict[str, Any] | None = None
        if self._accelerator.is_main_process:
            found = self._read(which, experiment_id)
        told = [None if found is None else found["_checkpoint_metadata"]["checkpoint_id"]]
        checkpoint_id = _utils.broadcast_object_list(told)[0]
        if checkpoint_id is None:
            return None
        if found is None:
            found = self._read(checkpoint_id, None)
        saved = self._manager.load_checkpoint(checkpoint_id, keys="extra")["extra_state"]
        place = self._own_place(checkpoint_id, saved["processes"])
        self._accelerator.step = saved["accumulated"]
        for loader, position in zip(self.loaders, place["loaders"]):
            loader.load_state_dict(position)
        for put_back in setters(place["random"]):
            put_back()
        return found

    def _read(self, which: str, experiment_id: str | None) -> dict[str, Any] | None:
        parts: dict[str, Any] = {**self._parts(), "restore_rng": False}
        try:
            if is_id(which):
                return self._manager.restore(**parts, checkpoint_id=which)
            parts |= {"experiment_id": experiment_id, "checkpoint_type": which}
            return self._manager.restore(**parts, on_corruption="fallback")
        except CheckpointNotFoundError:
            if which != "latest":
                raise
            return None

    def _own_place(self, checkpoint_id: str, processes: list[Any]) -> Mapping[str, Any]:
        accelerator = self._accelerator
        if len(processes) != accelerator.num_processes:
            raise ConfigurationError(
                f"checkpoint {checkpoint_id} was saved by {len(processes)} processes, and {accelerator.num_processes} "
                "train now, which divide the data otherwise; load_checkpoint() gives you its model and optimizer"
            )
        place: Mapping[str, Any] = processes[accelerator.process_index]
        if len(place["loaders"]) != len(self.loaders):
            raise ConfigurationError(
                f"checkpoint {checkpoint_id} has the places in {len(place['loaders'])} loaders, and there are "
                f"{len(self.loaders)}; make the AcceleratorState with those that it was saved with"
            )
        return place

    def _parts(self) -> dict[str, Any]:
        accelerator = self._accelerator
        models = [accelerator.unwrap_model(model) for model in accelerator._models]
        optimizers = [optimizer.optimizer for optimizer in accelerator._optimizers]
        scalers = [] if accelerator.scaler is None else [accelerator.scaler]
        return {
            "model": {"models": models, "registered": list(accelerator._custom_objects)},
            "optimizer": {"optimizers": optimizers, "scalers": scalers},
            "scheduler": [scheduler.scheduler for scheduler in accelerator._schedulers],
        }


class EngineTracker(_GeneralTracker):  # type: ignore[misc]
    """An ``ExperimentTracker`` for ``Accelerator(log_with=[EngineTracker(tracker)])``.

    Args:
        tracker: where to log; it stays its owner's to close. Only the main process's is used, others may pass None.
    """

    name = "model_checkpoint"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, tracker: ExperimentTracker | None) -> None:
        super().__init__()
        self._tracker = tracker

    @property
    def tracker(self) -> ExperimentTracker | None:
        """The tracker; ``accelerator.get_tracker("model_checkpoint").tracker`` is it, too."""
        return self._tracker

    @_tracking.on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Log hyperparameters; see ``ExperimentTracker.log_hyperparameters``, also for what it raises."""
        self._given().log_hyperparameters(values)

    @_tracking.on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers; see ``ExperimentTracker.log_metrics``, also for what it raises."""
        self._given().log_metrics(values, step)

    @_tracking.on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Note that it is ``completed``; after an exception, ``failed`` or ``interrupted``."""
        tracker = self._given()
        tracker.flush()
        tracker.set_status(status_after(sys.exc_info()[1]))

    def _given(self) -> ExperimentTracker:
        if self._tracker is None:
            raise ConfigurationError("the main process has no tracker; only others may pass None")
        return self._tracker
