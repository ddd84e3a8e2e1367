"""Keras 3, on JAX, PyTorch and TensorFlow: a callback that tracks ``fit``, saves, and goes on after a kill."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.checkpoint.rng import setters
from model_checkpoint.checkpoint.state import random_states
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking.experiment_tracker import ExperimentTracker
from model_checkpoint.tracking.queries import Queries
from model_checkpoint.tracking.runs import go_back
from model_checkpoint.utils.optional import require

log = logging.getLogger(__name__)

keras: Any = require("keras", "keras", "CheckpointCallback")
Callback: Any = keras.callbacks.Callback
_PLAIN = (bool, int, float, str, type(None))
# What ``fit`` gives every callback, and a setting of which Keras turns the sign once it knows whether less is better.
_NOT_KEPT = ("_model", "params", "min_delta")


class CheckpointCallback(Callback):  # type: ignore[misc]
    """Tracks ``model.fit``, saves at its epochs and batches, and lets a script that is run again go on with its run.

    Put it last in ``callbacks``: it saves what those before it have done. The logs of each epoch become metrics of the
    run, with the epoch as their step, and the arguments of ``fit`` and the optimizer's go into its config. A checkpoint
    has the model, its optimizer, the random states, the history that ``fit`` returns and the place in the data; within
    an epoch also the running metrics. It is the manager that decides which is best and which go.

    When training begins, the checkpoint that ``resume`` names is put back, where there is one; ``fit`` then begins with
    the epoch that comes next. If it was saved within an epoch, the batches of that epoch up to there are drawn again
    and not trained on, so that the same ones follow; callbacks see them go by, with the logs of the checkpoint. It all
    ends with the bits that it would have had, if the script has the same data each time, in an order that the random
    states decide: NumPy's arrays with ``shuffle``, data loaders of PyTorch, ``PyDataset``. TensorFlow's backend
    shuffles arrays by the seed that is set when ``fit`` is called, and nothing else: call
    ``keras.utils.set_random_seed`` first. What a ``tf.data`` pipeline shuffles is known to nobody but itself: give
    ``shuffle`` a seed and ``reshuffle_each_iteration=False``. Generators, and ``steps_per_epoch``, with which one pass
    over the data goes on from epoch to epoch, cannot be taken up where they were.

    Args:
        store: the folder for checkpoints and the database of runs, made when it does not exist; or a manager, which
            stays its owner's, as its tracker does.
        run_name: of the run in a folder: the newest run of this name is gone on with, or one is started. Each call of
            ``fit`` in a script needs a name of its own.
        tracker: whose run it is, if ``store`` is a manager: the one that was given to it. None: metrics are not logged.
        every_n_epochs: how often to save at the end of an epoch; None for never.
        every_n_batches: how often to save within an epoch; None for never. With ``steps_per_execution``, whenever as
            many have gone by.
        resume: a checkpoint's type, such as ``best_val_loss`` (see ``load_checkpoint``), or its id; False begins anew.
        also: other callbacks that are to be saved and put back, such as ``EarlyStopping`` and ``ReduceLROnPlateau``,
            which else forget the best value and how long ago it was: what is a number, text or array of them, and has
            changed since training began.

    Attributes:
        manager, tracker: those in use; None where a folder is not open. It is while ``fit`` runs.

    Raises:
        ConfigurationError: an argument that cannot be used; in ``fit``, a model that is not built, or is not as it was.
        From ``fit`` also what ``restore`` and ``save_checkpoint`` raise.
    """

    def __init__(
        self,
        store: EnhancedCheckpointManager | str | PathLike[str],
        *,
        run_name: str = "keras",
        tracker: ExperimentTracker | None = None,
        every_n_epochs: int | None = 1,
        every_n_batches: int | None = None,
        resume: str | bool = "latest",
        also: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        for name, count in (("every_n_epochs", every_n_epochs), ("every_n_batches", every_n_batches)):
            if count is not None and (type(count) is not int or count < 1):
                raise ConfigurationError(f"{name} must be at least 1, or None for never, not {count!r}")
        if resume is True or not isinstance(resume, (str, bool)):
            raise ConfigurationError(
                f"resume must be a checkpoint's type or id, or False to begin anew, not {resume!r}"
            )
        self._folder = None if isinstance(store, EnhancedCheckpointManager) else Path(fspath(store))
        if self._folder is not None and tracker is not None:
            raise ConfigurationError("tracker belongs to a manager; for a folder, pass run_name")
        self.manager = store if isinstance(store, EnhancedCheckpointManager) else None
        self.tracker = tracker
        self._run_name = run_name
        self._epochs_between = every_n_epochs
        self._batches_between = every_n_batches
        self._resume = resume
        self._also = {f"{type(callback).__name__} {i}": callback for i, callback in enumerate(also)}
        self._fresh: dict[str, dict[str, Any]] = {}  # what callbacks were when training began
        self.async_safe = every_n_batches is None  # then what is called at batches does nothing

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the folder, note the config, and put a checkpoint back."""
        if self._folder is not None:
            self.tracker, self.manager = _open(self._folder, self._run_name, new=self._resume is False)
        model = self.model
        self._epoch = 0
        self._trained = 0  # batches of this epoch
        self._saved = 0  # of these, how many when it was last saved
        self._place: dict[str, Any] = {}  # where a checkpoint that was put back left off, until training is there
        self._fresh = {name: dict(vars(callback)) for name, callback in self._kept().items()}
        model._initial_epoch = None
        if self.tracker is not None:
            self.tracker.log_hyperparameters(_config(model, self.params or {}))
        found = _chosen(self.manager, self._resume)
        if found is not None:
            self._put_back(model, found)

    def _put_back(self, model: Any, which: dict[str, Any]) -> None:
        if not model.built:
            raise ConfigurationError(
                f"{model.name} is not built yet, so the checkpoint has nowhere to go; call it on a batch, or build(), "
                "before fit()"
            )
        optimizer = _built_optimizer(model)
        extra: dict[str, Any] = {"place": {}}
        restored = _of(self.manager).restore(model, optimizer, extra_state=extra, on_corruption="fallback", **which)
        self._place = place = extra["place"]
        if not place:
            raise ConfigurationError(
                "that checkpoint was not saved by a CheckpointCallback; use restore() before fit()"
            )
        self._put_back_others()
        self._place["random"] = random_states()
        checkpoint = restored["_checkpoint_metadata"]["checkpoint_id"]
        if self.tracker is not None:
            go_back(self.tracker, checkpoint)
        model._initial_epoch = (self.params or {}).get("epochs") if place["stopped"] else place["epoch"]
        log.info("going on from checkpoint %s, with epoch %d, batch %d", checkpoint, place["epoch"], place["batch"])

    def _put_back_others(self) -> None:
        for name, callback in self._kept().items() if self._place else ():
            vars(callback).update(self._place["callbacks"].get(name, {}))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note where the epoch begins; in the first one after a checkpoint was put back, go on with its batch."""
        self._epoch, self._trained, self._saved = epoch, 0, 0
        self._put_back_others()  # those that come after this one have forgotten all when training began
        if self._place and self._place["batch"]:
            for put_back in setters(self._place["epoch_random"]):
                put_back()
            self._trained = self._saved = self._place["batch"]
            _pass_over(self.model, self._place)
        else:
            self._place = {}
        self._epoch_random = None if self._batches_between is None else random_states()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save, if it is time to."""
        if batch < self._trained:
            if batch + 1 == self._trained:  # others have counted what went by once more
                self._put_back_others()
                self._place = {}
            return
        if self._batches_between is None:
            return
        self._trained = batch + 1
        last = self._trained == (self.params or {}).get("steps") and self._is_due(self._epoch)
        if self._trained - self._saved >= self._batches_between and not last:
            self._saved = self._trained
            running = [_number(variable) for variable in self.model.metrics_variables]
            place = {"batch": self._trained, "epoch_random": self._epoch_random, "metrics": running}
            self._save(self._epoch, _numbers(logs), {"epoch": self._epoch, **place}, update_best=False)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the metrics, and save."""
        numbers = _numbers(logs)
        if self.tracker is not None:
            self.tracker.log_metrics(numbers, step=epoch)
        if self._is_due(epoch) or self._model.stop_training:
            self._save(epoch, numbers, {"epoch": epoch + 1, "batch": 0}, history=logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        """Close what belongs to a folder."""
        self._put_back_others()  # there was no epoch left to train
        self._place = {}
        self.model._initial_epoch = None
        _of(self.manager).wait()
        if self._folder is not None:
            _of(self.manager).close()
            if self.tracker is not None:
                self.tracker.close()
            self.tracker = self.manager = None

    def _is_due(self, epoch: int) -> bool:
        last = epoch + 1 == (self.params or {}).get("epochs")
        return self._epochs_between is not None and (last or (epoch + 1) % self._epochs_between == 0)

    def _kept(self) -> dict[str, Any]:
        history = getattr(self._model, "history", None)
        return self._also if history is None else {"history": history, **self._also}

    def _save(
        self,
        epoch: int,
        numbers: Mapping[str, float],
        place: dict[str, Any],
        history: Mapping[str, float] | None = None,
        update_best: bool = True,
    ) -> None:
        model = self.model  # on JAX, this brings its variables up to date
        place["stopped"] = bool(model.stop_training)
        kept = {name: _changed(vars(callback), self._fresh[name]) for name, callback in self._kept().items()}
        place["callbacks"], past = kept, kept.get("history")
        if past is not None and history is not None:  # Keras' own callback comes after this one
            past["history"] = {name: [*past["history"].get(name, []), value] for name, value in history.items()}
            past["epoch"] = [*past["epoch"], epoch]
        optimizer = model.optimizer
        _of(self.manager).save_checkpoint(
            model,
            optimizer,
            epoch=epoch,
            step=0 if optimizer is None else int(optimizer.iterations),
            loss=numbers.get("loss"),
            val_loss=numbers.get("val_loss"),
            metrics={name: value for name, value in numbers.items() if name not in ("loss", "val_loss")},
            extra_state={"place": place},
            update_best=update_best,
        )


def _open(folder: Path, run_name: str, new: bool) -> tuple[ExperimentTracker, EnhancedCheckpointManager]:
    """Return tracker and manager of the newest run of a name that has a checkpoint, or of a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "experiments.db"
    url = f"sqlite:///{file}"
    found = None
    if not new and file.exists():
        with Queries(url) as queries:
            found = next(iter(queries.search_checkpoints(f"experiment.name == {run_name!r}", limit=1)), None)
    tracker = (
        ExperimentTracker(run_name, database_url=url)
        if found is None
        else ExperimentTracker.resume(found.experiment_id, url)
    )
    return tracker, EnhancedCheckpointManager(tracker, folder / "checkpoints")


def _of(manager: EnhancedCheckpointManager | None) -> EnhancedCheckpointManager:
    if manager is None:
        raise ConfigurationError("the folder is open while fit() runs only")
    return manager


def _chosen(manager: EnhancedCheckpointManager | None, resume: str | bool) -> dict[str, Any] | None:
    """Return the arguments of ``restore`` that say which checkpoint; None where there is none to go on from."""
    if isinstance(resume, bool):
        return None
    try:
        uuid.UUID(resume)
    except ValueError:
        return {"checkpoint_type": resume} if _of(manager).list_checkpoints() else None
    return {"checkpoint_id": resume}


def _config(model: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    made = {"keras_backend": keras.backend.backend(), "epochs": params.get("epochs"), "steps": params.get("steps")}
    if model.optimizer is not None:
        optimizer = keras.optimizers.serialize(model.optimizer)
        made["optimizer"] = {"class": optimizer["class_name"], **optimizer["config"]}
    return made


def _numbers(logs: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}


def _built_optimizer(model: Any) -> Any:
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model.optimizer


def _number(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable.value).tolist()


def _changed(attributes: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a callback has counted and remembers: its attributes that can be stored and are not as before."""
    found = {name: value for name, value in attributes.items() if name not in _NOT_KEPT and _is_plain(value)}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, _PLAIN) or name not in before or not _same(value, before[name])
    }


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    return isinstance(value, _PLAIN) or (type(value).__module__ == "numpy" and hasattr(value, "dtype"))


def _pass_over(model: Any, place: Mapping[str, Any]) -> None:
    """Let ``fit`` draw the batches that were trained on before a checkpoint, and not train on them again."""
    train, backend = model.train_function, keras.backend.backend()
    left = place["batch"]
    logs = _put_metrics(model, place["metrics"])
    if backend == "tensorflow" and place["random"]["tensorflow"]["seed"] is None:
        log.warning(
            "no seed is set, so that TensorFlow's shuffling cannot be repeated: in this epoch some samples may come "
            "twice and others not at all; call keras.utils.set_random_seed() before fit()"
        )

    def draw(*arguments: Any) -> Any:
        """Stand in for the train function: of (state, iterator) on JAX, (iterator), or on PyTorch (batches)."""
        nonlocal left, logs
        for _ in range(0 if backend == "torch" else model.steps_per_execution):
            batch = next(arguments[-1], None)
            if logs is None and batch is not None:
                model._symbolic_build(data_batch=batch)
                logs = _put_metrics(model, place["metrics"])
        left -= model.steps_per_execution
        if left <= 0:
            model.train_function = train
            _check(logs)
            for put_back in setters(place["random"]):
                put_back()
        return (logs or {}, arguments[0]) if backend == "jax" else logs or {}

    model.train_function = draw


def _put_metrics(model: Any, values: Sequence[Any]) -> dict[str, Any] | None:
    """Put the running metrics back and return the logs that they make; None where the model has not made them yet."""
    if len(model.metrics_variables) != len(values):
        return None
    for variable, value in zip(model.metrics_variables, values):
        variable.assign(value)
    logs: dict[str, Any] = model.get_metrics_result()
    return logs


def _check(logs: object) -> None:
    if logs is None:
        raise ConfigurationError(
            "the metrics of the model are not those with which the checkpoint was saved within an epoch; compile() it "
            "with the same ones, or resume from the end of an epoch"
        )
