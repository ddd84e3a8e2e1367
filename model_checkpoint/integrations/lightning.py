"""Lightning: a callback that saves and resumes exactly, a ``CheckpointIO`` and a logger."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.checkpoint.rng import setters
from model_checkpoint.checkpoint.state import random_states
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, UnsupportedValueError
from model_checkpoint.integrations import lightning_metrics
from model_checkpoint.integrations.lightning_io import ManagerCheckpointIO, assembled, lightning, store
from model_checkpoint.integrations.pytorch import ResumableLoader
from model_checkpoint.tracking import ExperimentTracker
from model_checkpoint.tracking.closing import status_after
from model_checkpoint.utils.jsonable import to_jsonable, to_number
from model_checkpoint.utils.names import is_id
from model_checkpoint.utils.optional import require

__all__ = ["CheckpointCallback", "ManagerCheckpointIO", "TrackerLogger"]

_Checkpoint: Any = lightning.callbacks.Checkpoint
_CombinedLoader: Any = lightning.utilities.CombinedLoader
_Logger: Any = lightning.loggers.Logger
_rank_zero_only: Any = lightning.utilities.rank_zero_only

log = logging.getLogger(__name__)

_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class CheckpointCallback(_Checkpoint):  # type: ignore[misc]
    """Saves what a ``Trainer`` has, and goes on from there by itself: bit for bit as if it had never stopped.

    A checkpoint holds the module, optimizers, schedulers, precision plugin, loops, the states of all callbacks and of
    the datamodule, random states, the place in the training data (see ``ResumableLoader``; there is nothing to do for
    it) and metrics that were averaged in part. The manager knows what was logged for these weights as ``metrics``, and
    ``loss`` and ``val_loss`` under these names; it finds the best and decides what is kept.

    What the module's own ``on_train_batch_end`` changes after a save in the middle of an epoch is not in that save: do
    it in ``training_step``, or in a callback. A save that falls on a batch before a validation is made after that, and
    one at an epoch's end when all hooks and schedulers of the epoch are through.

    Args:
        manager: saves, and loads; only rank zero's is used, others may pass None.
        every_n_train_steps: save when so many optimizer steps were made since the last multiple of it.
        every_n_epochs: save at the end of each n-th epoch; each one when neither is given.
        resume: what ``fit`` begins with: ``latest`` (the newest sound one of the manager's run, if there is any),
            another type or an id, as for ``load_checkpoint``, or False. ``fit``'s ``ckpt_path`` goes before it.

    Raises:
        ConfigurationError: an argument that cannot be used; from ``fit``, which also raises what saving and loading
            raise, a strategy with which each process has a part of the state only.
    """

    def __init__(
        self,
        manager: EnhancedCheckpointManager | None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        resume: str | bool = "latest",
    ) -> None:
        super().__init__()
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number from 1, or None")
        if resume is True or not isinstance(resume, (str, bool)):
            raise ConfigurationError(f'resume is {resume!r}; it must be "latest", another type, an id or False')
        self._manager = manager
        self._every_steps = every_n_train_steps
        self._every_epochs = every_n_epochs or (1 if every_n_train_steps is None else None)
        self._resume = resume
        self._due = False  # a save waits for the end of a validation or epoch
        self._last_step = 0
        self._validated: tuple[int, set[str]] = (-1, set())  # the step of the newest validation, and what it measured
        self._state: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        if _SHARDED.intersection(base.__name__ for base in type(trainer.strategy).__mro__):
            raise ConfigurationError(
                f"with {type(trainer.strategy).__name__} each process has a part of the state, which "
                "CheckpointCallback does not save; use Lightning's own ModelCheckpoint"
            )
        source = trainer.fit_loop._data_source
        if "dataloader" not in vars(source):
            source.dataloader = partial(_resumable, source.dataloader)
        found = self._load() if trainer.is_global_zero and self._resume is not False else None
        found = trainer.strategy.broadcast(found)
        if found is not None:  # a ckpt_path takes its place; otherwise Lightning restores it as if it had loaded it
            trainer._checkpoint_connector._loaded_checkpoint = found
            trainer.num_sanity_val_steps = 0  # as Lightning itself does within an epoch: it would count in the loops

    def _load(self) -> dict[str, Any] | None:
        manager, wanted = _given(self._manager), str(self._resume)
        try:
            if is_id(wanted):
                return assembled(manager.load_checkpoint(wanted))
            return assembled(manager.load_checkpoint(checkpoint_type=wanted, on_corruption="fallback"))
        except CheckpointNotFoundError:
            if wanted != "latest":
                raise
            return None

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        if self._resumed is None:
            return
        self._validated = self._resumed["validated"]
        lightning_metrics.put_back(trainer, pl_module, self._resumed["metrics"])
        loop, loaders = trainer.fit_loop, trainer.fit_loop._combined_loader
        if self._resumed["epoch_ended"]:  # nothing is to be finished, whatever the loop concludes from max_steps
            loop._restarting = loop.epoch_loop.restarting = False
            loaders._load_state_dicts(self._resumed["loaders"])
        else:
            loaders.random = self._random_of(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._resumed is not None and self._resumed["epoch_ended"]:
            _put_back(self._random_of(trainer))
            if getattr(trainer.fit_loop._data_fetcher, "batches", None):
                iter(trainer.fit_loop._data_fetcher)  # it has fetched ahead, with other random states
        self._resumed = None
        self._save_ended_epoch(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
        if self._resumed is not None:
            lightning_metrics.complete(trainer, self._resumed["metrics"]["partial"])
            trainer.fit_loop._restarting = False  # or it leaves out the schedulers that ask for metrics, which are here
        if step == self._last_step or loop._num_ready_batches_reached():
            return  # gradients are being accumulated; or the save at the epoch's end is the one to make
        every = self._every_steps
        self._due |= every is not None and step // every > self._last_step // every
        self._due |= trainer.should_stop or step == trainer.max_steps
        self._last_step = step
        if self._due and not trainer.fast_dev_run and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._save(trainer, trainer._logger_connector.metrics["callback"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            return
        measured = trainer._logger_connector.metrics["callback"]
        self._validated = trainer.global_step, {*self._validated[1], *measured}
        if self._due and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save(trainer, measured)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        every, step = self._every_steps, trainer.global_step
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._due |= every is not None and step // every > self._last_step // every
            self._due |= self._every_epochs is not None and (trainer.current_epoch + 1) % self._every_epochs == 0
            self._last_step = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save_ended_epoch(trainer)
        if trainer.is_global_zero:
            _given(self._manager).wait()

    def _save_ended_epoch(self, trainer: Any) -> None:
        if self._due and not trainer.fast_dev_run:
            step, names = self._validated
            stale = names if step != trainer.global_step else set()
            current = {name: value for name, value in trainer.callback_metrics.items() if name not in stale}
            self._save(trainer, current, epoch_ended=True)

    def _save(self, trainer: Any, metrics: Mapping[str, Any], epoch_ended: bool = False) -> None:
        loaders = trainer.fit_loop._combined_loader
        loaders.settle(trainer.fit_loop._data_fetcher, epoch_ended)
        self._state = {
            "epoch_ended": epoch_ended,
            "random": _of_all_ranks(trainer, random_states()),
            "loaders": loaders._state_dicts() if epoch_ended else [],
            "validated": self._validated,
            "metrics": lightning_metrics.state_of(trainer),
        }
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if epoch_ended:
            for counted in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counted["ready"] = counted["started"]  # the next epoch may have been announced
        if trainer.is_global_zero:
            values = {name: to_number(value, f"metrics.{name}") for name, value in metrics.items()}
            store(
                _given(self._manager),
                checkpoint,
                epoch=trainer.current_epoch - epoch_ended,
                step=trainer.global_step,
                loss=values.pop("loss", None),
                val_loss=values.pop("val_loss", None),
                metrics=values,
            )
        self._due, self._state = False, {}
        trainer.strategy.barrier("CheckpointCallback")

    def _random_of(self, trainer: Any) -> Any:
        assert self._resumed is not None
        states = self._resumed["random"]
        if len(states) != trainer.world_size:
            log.warning("random states of %d processes were saved, and %d train now", len(states), trainer.world_size)
        return states[trainer.global_rank] if trainer.global_rank < len(states) else None


class TrackerLogger(_Logger):  # type: ignore[misc]
    """A Lightning logger over an ``ExperimentTracker``: metrics, hyperparameters, and how training ended.

    Args:
        tracker: where to log; it stays its owner's to close. Only rank zero's is used, others may pass None.
    """

    def __init__(self, tracker: ExperimentTracker | None) -> None:
        super().__init__()
        self._tracker = tracker

    @property
    def experiment(self) -> ExperimentTracker | None:
        """The tracker."""
        return self._tracker

    @property
    def name(self) -> str | None:
        """The project's name, or where there is none the experiment's."""
        return None if self._tracker is None else self._tracker.project_name or self._tracker.experiment_name

    @property
    def version(self) -> str | None:
        """The experiment's id."""
        return None if self._tracker is None else self._tracker.experiment_id

    @_rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers; see ``ExperimentTracker.log_metrics``, also for what it raises."""
        _given(self._tracker).log_metrics(metrics, step)

    @_rank_zero_only  # type: ignore[untyped-decorator]
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log a dict or ``argparse.Namespace``; what is no JSON value is noted as its text."""
        params = params if isinstance(params, Mapping) else vars(params)
        _given(self._tracker).log_hyperparameters({str(name): _json_or_text(value) for name, value in params.items()})

    @_rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        """Note how it ended: ``completed``, or by the exception that ended it ``failed`` or ``interrupted``."""
        tracker = _given(self._tracker)
        tracker.flush()
        error = sys.exc_info()[1]
        tracker.set_status("completed" if status == "success" else "failed" if error is None else status_after(error))


class _Loaders(_CombinedLoader):  # type: ignore[misc]
    """The loaders of a fit, each made resumable when Lightning has given them the samplers that it wants."""

    flattened: Any
    random: Any = None  # states to put back before the next batch

    def _make_resumable(self) -> None:
        self.flattened = [one if isinstance(one, ResumableLoader) else ResumableLoader(one) for one in self.flattened]

    def _load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        self._make_resumable()
        super()._load_state_dicts(states)

    def __iter__(self) -> Any:
        self._make_resumable()
        return super().__iter__()

    def __next__(self) -> Any:
        _put_back(self.random)
        self.random = None
        return super().__next__()

    def settle(self, fetcher: Any, epoch_ended: bool) -> None:
        """Say what of the loaders was used: not the batches that Lightning has fetched ahead."""
        for loader in self.flattened:
            if epoch_ended:
                loader.end_epoch()
            loader.ahead = len(getattr(fetcher, "batches", ()))


def _resumable(dataloader: Any) -> Any:
    given = dataloader()
    if isinstance(given, _Loaders):
        return given
    return _Loaders(given.iterables, given._mode) if isinstance(given, _CombinedLoader) else _Loaders(given, _CYCLE)


_CYCLE = "max_size_cycle"  # how Lightning combines several loaders of a training


def _of_all_ranks(trainer: Any, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    found = [None] * trainer.world_size
    require("torch.distributed", "torch", "training in many processes").all_gather_object(found, value)
    return found


def _put_back(states: Any) -> None:
    for put_back in setters(states):
        put_back()


def _json_or_text(value: Any) -> Any:
    try:
        return to_jsonable(value, "hyperparameters")
    except UnsupportedValueError:
        return str(value)


def _given(value: Any) -> Any:
    if value is None:
        raise ConfigurationError("rank zero has no manager or tracker; only the other ranks may pass None")
    return value
