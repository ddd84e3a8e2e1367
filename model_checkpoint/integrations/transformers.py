"""Hugging Face's Trainer: its runs tracked, its checkpoints the manager's, and resumed to the very bit."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.checkpoint.rng import setters
from model_checkpoint.checkpoint.state import random_states
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking import ExperimentTracker
from model_checkpoint.tracking.runs import go_back
from model_checkpoint.utils.optional import require

__all__ = ["train"]

_PURPOSE = "training with a Trainer"
_callbacks: Any = require("transformers.trainer_callback", "transformers", _PURPOSE)
_utils: Any = require("transformers.trainer_utils", "transformers", _PURPOSE)
TrainerCallback: Any = _callbacks.TrainerCallback

_STATE_FILE = "trainer_state.json"  # where the Trainer looks for its state
_TIMES = ("_runtime", "_per_second", "_time", "epoch")  # ends of names that say nothing of how good a model is


def train(trainer: Any, tracker: ExperimentTracker, manager: EnhancedCheckpointManager) -> Any:
    """Do what ``trainer.train()`` does, with every checkpoint the manager's; go on from the newest sound one.

    When it saves, evaluates and logs is what the ``TrainingArguments`` say; which checkpoints are kept, and which is
    best, is what the manager says: ``save_total_limit`` has no effect, and the Trainer writes no folders of its own.
    A checkpoint holds model, optimizer, scheduler, scaler, the Trainer's state and position in the data, states of
    callbacks that can be exported, and random states. Training that was killed and is started again by the same script
    gives the same bits as unbroken training, also where batches are made with random numbers of Python, NumPy or
    PyTorch, such as masks, but not where workers of a data loader or an ``IterableDataset`` draw them. What
    ``trainer.train()`` returns of speed and loss is of this call only.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass, in one process. Metrics of evaluations keep their names,
            ``eval_loss`` is the checkpoint's ``val_loss``, too. With ``load_best_model_at_end`` it has the weights of
            the manager's best checkpoint in the end.
        tracker: the run; gets what is logged at each step, and arguments and model as ``config``. What it was given
            after the checkpoint that training goes on from becomes an earlier attempt.
        manager: of that run. A checkpoint that is corrupt is passed over with a warning.

    Returns:
        The Trainer's ``TrainOutput``. Where training had come to its end already, the model is restored and nothing
        is trained: its loss is NaN then. Where a callback has stopped it before, and not to avoid overfitting, the
        run is ``interrupted``.

    Raises:
        ConfigurationError: transformers is older than 5.3, the Trainer runs in several processes, the metric that it
            takes the best model by is best the other way round for the manager, the manager is of another run, or the
            newest checkpoint is not of such training.
        IntegrityError: there are checkpoints, and none of them is sound.
        StateMismatchError: model, optimizer or scheduler are not like those that were saved.
        Whatever ``trainer.train``, saves and loads raise.
    """
    return _Run(trainer, tracker, manager).train()


class _Run(TrainerCallback):  # type: ignore[misc]
    """One call of ``train``: a callback, and the three methods of the Trainer that touch checkpoints."""

    def __init__(self, trainer: Any, tracker: ExperimentTracker, manager: EnhancedCheckpointManager) -> None:
        self._trainer, self._tracker, self._manager = trainer, tracker, manager
        self._checkpoint_id: str | None = None  # that training goes on from
        self._random = _RandomStates()
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})  # step, metrics
        _check(trainer, manager)
        if manager.experiment_id != tracker.experiment_id:
            raise ConfigurationError(
                f"the manager saves for experiment {manager.experiment_id}, but the tracker is of "
                f"{tracker.experiment_id}; make the manager with this tracker"
            )

    def train(self) -> Any:
        saved = self._newest()
        if saved is None:
            return self._go()
        if saved["ended"] == self._length():
            return self._restore_ended(saved["state"])
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, _STATE_FILE).write_text(json.dumps(saved["state"]), encoding="utf-8")
            return self._go(folder)

    def _go(self, folder: str | None = None) -> Any:
        with self._in_charge():
            output = self._trainer.train(resume_from_checkpoint=folder)
        if not self._at_its_end():
            self._tracker.set_status("interrupted")
        return output

    def _at_its_end(self) -> bool:
        """Whether there is no more to train; a callback may also stop it for the time being."""
        state = self._trainer.state
        return state.global_step >= state.max_steps or any(
            isinstance(callback, _callbacks.EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._trainer.callback_handler.callbacks
        )

    def _newest(self) -> Any:
        """Return what the newest sound checkpoint says of the Trainer, after verifying all of it; None without one."""
        if not self._manager.list_checkpoints():
            return None
        extra = {"trainer": ""}
        found = self._manager.restore(extra_state=extra, strict="skip", restore_rng=False, on_corruption="fallback")[
            "_checkpoint_metadata"
        ]
        try:
            told = json.loads(extra["trainer"])
        except ValueError:
            told = None
        if not isinstance(told, dict) or "last_logged" not in told:
            raise ConfigurationError(
                f"checkpoint {found['checkpoint_id']} was not saved by train(), so a Trainer cannot go on from it; "
                "use a tracker of another run"
            )
        self._checkpoint_id = found["checkpoint_id"]
        go_back(self._tracker, found["checkpoint_id"])
        return told

    @contextmanager
    def _in_charge(self) -> Iterator[None]:
        own = {
            "_save_checkpoint": self._save,
            "_load_from_checkpoint": lambda *_, **__: None,  # on_train_begin does, with all the rest
            "_load_rng_state": lambda *_: self._random.put_back(),
        }
        vars(self._trainer).update(own)
        args, eval_on_start = self._trainer.args, self._trainer.args.eval_on_start
        args.eval_on_start = eval_on_start and self._checkpoint_id is None  # else its start is behind it
        self._trainer.add_callback(self)
        try:
            yield
        finally:
            args.eval_on_start = eval_on_start
            self._trainer.remove_callback(self)
            for name in own:
                del vars(self._trainer)[name]

    def _length(self) -> list[Any]:
        return [self._trainer.args.num_train_epochs, self._trainer.args.max_steps]

    def _save(self, model: Any, trial: Any = None) -> None:
        """Stand in for ``Trainer._save_checkpoint``, which is called when the step is logged and evaluated."""
        trainer = self._trainer
        trainer.store_flos()
        state = trainer.state
        kept = [c for c in (*trainer.callback_handler.callbacks, trainer.control) if _exportable(c)]
        state.stateful_callbacks = _callbacks.TrainerState(stateful_callbacks=kept).stateful_callbacks
        told = {
            "state": dataclasses.asdict(state),
            "last_logged": trainer._globalstep_last_logged,
            "ended": self._length() if self._at_its_end() else None,
            "random": self._random.noted,
        }
        step, metrics = self._evaluated
        metrics = metrics if step == state.global_step else {}
        losses = [logged["loss"] for logged in state.log_history if "loss" in logged]
        self._manager.save_checkpoint(
            trainer.model,
            trainer.optimizer,
            trainer.lr_scheduler,
            epoch=int(state.epoch),
            step=state.global_step,
            loss=losses[-1] if losses else None,
            val_loss=metrics.get("eval_loss"),
            metrics=metrics,
            extra_state={"trainer": json.dumps(told), **self._besides()},
        )

    def _besides(self) -> dict[str, Any]:
        """Return the rest of what training goes on with: the loss that is not logged yet, and the scaler of fp16."""
        scaler = self._trainer.accelerator.scaler
        return {"unlogged_loss": self._trainer._tr_loss} | ({} if scaler is None else {"scaler": scaler})

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Note what is trained, and restore."""
        described = {"training": json.loads(args.to_json_string())}
        config: Any = getattr(self._trainer.model, "config", None)
        if hasattr(config, "to_json_string"):
            described["model"] = json.loads(config.to_json_string(use_diff=False))
        self._tracker.log_hyperparameters(described)
        if self._checkpoint_id is not None:
            self._restore(state)
        sampler = train_dataloader.get_sampler() if hasattr(train_dataloader, "set_sampler") else None
        if sampler is not None and getattr(train_dataloader, "batch_sampler", None) is not None:
            batch_size = train_dataloader.batch_sampler.batch_size
            train_dataloader.set_sampler(_WatchedSampler(sampler, batch_size, self._random))

    def _restore(self, state: Any) -> None:
        trainer = self._trainer
        extra = {"trainer": "", **self._besides()}
        self._manager.restore(trainer.model, trainer.optimizer, trainer.lr_scheduler, extra, self._checkpoint_id)
        told = json.loads(extra["trainer"])
        self._random.expect(told["random"])
        trainer._globalstep_last_logged = told["last_logged"]
        trainer._total_loss_scalar = -trainer._tr_loss.item()  # so that the mean at the end is of this call's steps
        waiting = {name: _as_list(saved) for name, saved in state.stateful_callbacks.items()}
        for callback in filter(_exportable, trainer.callback_handler.callbacks):
            if waiting.get(type(callback).__name__):
                for name, value in waiting[type(callback).__name__].pop(0)["attributes"].items():
                    setattr(callback, name, value)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """Pass on what is logged."""
        numbers = _numbers(logs)
        numbers.pop("epoch", None)  # it comes with every log, also with several of one step
        self._tracker.log_metrics(numbers, step=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        """Keep the metrics for the save of this step; there is one evaluation for each dataset."""
        step, earlier = self._evaluated
        found = {name: value for name, value in _numbers(metrics).items() if not name.endswith(_TIMES)}
        self._evaluated = (state.global_step, {**(earlier if step == state.global_step else {}), **found})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the best weights in, where they are wanted."""
        self._load_best()

    def _load_best(self) -> None:
        args = self._trainer.args
        if not args.load_best_model_at_end:
            return
        metric = _metric(args)
        kind = "best_val_loss" if metric == "eval_loss" else f"best:{metric}"
        if self._manager.list_checkpoints(checkpoint_type=kind):
            self._manager.restore(
                self._trainer.model, checkpoint_type=kind, restore_rng=False, on_corruption="fallback"
            )

    def _restore_ended(self, state: dict[str, Any]) -> Any:
        self._manager.restore(self._trainer.model, checkpoint_id=self._checkpoint_id)
        self._trainer.state = _callbacks.TrainerState(**state)
        self._load_best()
        return _utils.TrainOutput(state["global_step"], float("nan"), {})


class _RandomStates:
    """The random states that resumed training has to have when it shuffles, makes batches, and goes on.

    The newest batch is made before the step that a checkpoint follows is trained, as one is always made ahead. So it
    is made again with the state from before it, and then comes the state of the checkpoint.
    """

    def __init__(self) -> None:
        self.noted: dict[str, Any] = {"epoch": None, "batch": _NO_BATCH, "before_batch": None}
        self._then: dict[str, Any] | None = None  # as ``noted`` when it was saved; None: nothing is to be put back
        self._now: Any = None

    def expect(self, noted: dict[str, Any]) -> None:
        """Take the process's states as those of the checkpoint, and put back those from before when they are due."""
        self._then, self._now = noted, random_states()

    def put_back(self) -> None:
        """Put back the states of the checkpoint, unless that was done."""
        if self._then is not None:
            _put(self._now)
        self._then = None

    def begin_epoch(self) -> None:
        """Be called before it is shuffled."""
        if self._then is not None:
            _put(self._then["epoch"])
        self.noted["epoch"] = random_states()

    def begin_batch(self, number: int) -> None:
        """Be called before the batch ``number`` of the epoch, from 0, is made or passed over."""
        if self._then is not None:
            if number < self._then["batch"]:
                return
            if number == self._then["batch"]:
                _put(self._then["before_batch"])
            else:
                self.put_back()
        self.noted.update(batch=number, before_batch=random_states())


_NO_BATCH = -2  # none follows it


def _put(states: Any) -> None:
    for put_back in setters(states):
        put_back()


class _WatchedSampler:
    """A sampler that says when an epoch and a batch begin; for all else it is the sampler that it is made of."""

    def __init__(self, sampler: Any, batch_size: int, watcher: _RandomStates) -> None:
        self._sampler, self._batch_size, self._watcher = sampler, batch_size, watcher

    def __iter__(self) -> Iterator[int]:
        self._watcher.begin_epoch()
        for i, index in enumerate(self._sampler):
            if i % self._batch_size == 0:
                self._watcher.begin_batch(i // self._batch_size)
            yield index

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def _check(trainer: Any, manager: EnhancedCheckpointManager) -> None:
    if not hasattr(trainer, "_run_epoch"):
        raise ConfigurationError("train() needs transformers 5.3 or newer; update it with: pip install -U transformers")
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigurationError(
            f"the Trainer runs in {trainer.args.world_size} processes, or with DeepSpeed or FSDP; train() knows how to "
            "save the state of one process only: start it without a launcher"
        )
    metric, greater = _metric(trainer.args), trainer.args.greater_is_better
    wanted = "max" if greater else "min"
    if greater is not None and manager.best_direction(metric) != wanted:
        raise ConfigurationError(
            f"greater_is_better={greater} of {metric!r} is not what the manager goes by; make it with "
            f"best_metrics={{{metric!r}: {wanted!r}}}"
        )


def _metric(args: Any) -> str:
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def _exportable(callback: Any) -> bool:
    return isinstance(callback, _callbacks.ExportableState)


def _as_list(saved: Any) -> list[Any]:
    return list(saved) if isinstance(saved, list) else [saved]


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items() if isinstance(value, Real)}
