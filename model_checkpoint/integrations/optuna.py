"""Optuna's studies: each trial an experiment under the study's, and one that died goes on from its checkpoint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import UnsupportedValueError
from model_checkpoint.tracking import ExperimentTracker, Queries
from model_checkpoint.tracking.runs import named, newest_checkpoint
from model_checkpoint.utils.jsonable import short_text, text, to_jsonable
from model_checkpoint.utils.optional import require

__all__ = ["StudyTracker"]

_optuna: Any = require("optuna", "optuna", "tracking a study")
log = logging.getLogger(__name__)


class StudyTracker:
    """Tracks a study: pass it to ``study.optimize(..., callbacks=[study_tracker])``, use ``trial`` in the objective.

    Of each trial the parameters become ``config``, intermediate values the metric ``intermediate_value``, the value
    ``value``, or with several objectives ``value_0``, ``value_1``, ..., or what ``study.set_metric_names`` says, user
    attributes ``metadata``, and the state a tag, ``complete``, ``pruned`` or ``fail``; the status is ``completed``, or
    ``failed`` for the last. The tracker's own ``metadata["optuna"]`` has ``study``, ``directions``, how many
    ``trials`` are in each state, and ``best``: a list (of the Pareto front where there are several objectives) of
    dicts with ``trial``, ``values``, ``params`` and ``experiment_id``. For one objective, its metric ``best_value``
    has the best after each trial. Parameters and attributes that are no JSON values are kept as their ``repr``, and of
    intermediate values those whose step does not fit into 64 bits are left out.

    It may be used by many threads (``n_jobs``). Of a study in a shared storage, each process makes one of the same
    experiment; a trial has one experiment, whichever processes it runs in, and however often Optuna retries it.

    Args:
        tracker: the study's experiment; it stays its owner's to close.
    """

    def __init__(self, tracker: ExperimentTracker) -> None:
        self._tracker = tracker
        self._lock = threading.Lock()  # around what follows, and the study's own experiment
        self._open: dict[tuple[str, int], ExperimentTracker] = {}  # (study, number of the trial)

    @classmethod
    def of(
        cls, study: Any, project_name: str | None = None, *, database_url: str = "sqlite:///experiments.db"
    ) -> StudyTracker:
        """Go on with the experiment that tracks a study, by its name, or start it.

        It stays open for as long as the process; ``tracker`` has it. Processes that start at the same moment may each
        start one: let one process be first.

        Raises:
            What ``ExperimentTracker`` raises.
        """
        name = study.study_name
        database = EnhancedDatabaseConnection(database_url)
        try:
            alike = Queries(database).search_experiments(f"parent is None and {named(name, project_name)}")
        finally:
            database.close()
        for found in alike:
            if found.metadata.get("optuna", {}).get("study") == name:
                return cls(ExperimentTracker.resume(found.id, database_url))
        metadata = {"optuna": {"study": name}}
        return cls(ExperimentTracker(name, project_name, database_url=database_url, metadata=metadata))

    @property
    def tracker(self) -> ExperimentTracker:
        """The study's experiment."""
        return self._tracker

    @contextmanager
    def trial(self, trial: Any) -> Iterator[ExperimentTracker]:
        """Yield the experiment of a trial, for the objective to log to and to make a manager with.

        When Optuna retries a trial whose process died (``RetryHeartbeatStaleTrialCallback``), that is the experiment of
        the first try, with its metrics as they were at its newest checkpoint: ``restore`` from there, where the manager
        lists one. Without a checkpoint it is a new one, and the first try's is ``interrupted``.

        When the block ends, the callback of this ``StudyTracker`` gives the experiment its values and status; an error
        ends it as ``failed`` at once, and is raised also where the values cannot be noted, which is logged then.

        Args:
            trial: the ``optuna.Trial`` that the objective was called with.
        """
        study, number = trial.study, trial.number
        run = self._begin(study, _frozen(trial))
        with self._lock:
            self._open[study.study_name, number] = run
        try:
            yield run
        except _optuna.TrialPruned:
            raise
        except BaseException as error:
            self._pop(study, number)
            if isinstance(error, (Exception, KeyboardInterrupt)):  # Optuna fails it, and may end without calling back
                try:
                    self._end(run, study, _frozen(trial), "FAIL")
                except Exception:
                    log.exception("what trial %d came to could not be noted", number)
            else:  # the process ends, and Optuna never hears of it: the trial may be tried again
                run.close("interrupted")
            raise

    def __call__(self, study: Any, trial: Any) -> None:
        """Take in a trial that has ended: the callback."""
        self._take_in(study, trial)
        with self._lock:
            self._note_best(study, trial)

    def sync(self, study: Any) -> None:
        """Take in trials that ended without calling back: in processes that died, or before there was a tracker."""
        last = {_first_try(trial): trial for trial in study.get_trials(deepcopy=False)}
        for trial in last.values():
            if trial.state.is_finished():
                self._take_in(study, trial)
        with self._lock:
            self._note_best(study, None)

    def _take_in(self, study: Any, trial: Any) -> None:
        run = self._pop(study, trial.number)
        if run is None:
            found = self._child(study, trial)
            if found is not None and found.metadata["optuna"] == _about(study, trial):
                return
            run = self._start(study, trial) if found is None else self._resume(found.id)
        self._end(run, study, trial, trial.state.name)

    def _pop(self, study: Any, number: int) -> ExperimentTracker | None:
        with self._lock:
            return self._open.pop((study.study_name, number), None)

    def _begin(self, study: Any, trial: Any) -> ExperimentTracker:
        found = self._child(study, trial)
        if found is not None:
            checkpoint_id = newest_checkpoint(self._tracker.database, found.id)
            if checkpoint_id is not None:
                return self._resume(found.id, checkpoint_id)
            self._tracker.database.experiments.conclude([found.id], "interrupted")
        return self._start(study, trial)

    def _start(self, study: Any, trial: Any) -> ExperimentTracker:
        about = {"study": study.study_name, "trial": _first_try(trial)}
        return self._tracker.child(_name(trial), config=_plain(trial.params), metadata={"optuna": about})

    def _resume(self, experiment_id: str, at_checkpoint: str | None = None) -> ExperimentTracker:
        return ExperimentTracker.resume(
            experiment_id,
            self._tracker.database.database_url,
            at_checkpoint=at_checkpoint,
            hook_manager=self._tracker.hook_manager,
        )

    def _child(self, study: Any, trial: Any) -> ExperimentRecord | None:
        """Return the newest experiment of a trial, or None."""
        wanted = f"parent == {self._tracker.experiment_id!r} and name == {_name(trial)!r}"
        for found in Queries(self._tracker.database).search_experiments(wanted):
            if found.metadata.get("optuna", {}).get("study") == study.study_name:
                return found
        return None

    def _end(self, run: ExperimentTracker, study: Any, trial: Any, state: str) -> None:
        """Note what a trial came to, unless another process has, and close its experiment."""
        try:
            if self._tracker.database.experiments.claim(run.experiment_id, "optuna", _about(study, trial)):
                run.log_hyperparameters(_plain(trial.params))
                reported = [item for item in sorted(trial.intermediate_values.items()) if abs(item[0]) < 2**63]
                run.log_arrays("intermediate_value", [value for _, value in reported], [step for step, _ in reported])
                if trial.values is not None:
                    run.log_metrics(dict(zip(_value_names(study, run.database.max_name), trial.values)))
                run.update_metadata(
                    {name: value for name, value in _plain(trial.user_attrs).items() if name != "optuna"}
                )
                run.add_tags([state.lower()])
        finally:
            run.close("failed" if state == "FAIL" else "completed")  # the tag tells COMPLETE and PRUNED apart

    def _note_best(self, study: Any, ended: Any) -> None:
        best = _best(study)
        states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
        about = {
            "study": study.study_name,
            "directions": [direction.name.lower() for direction in study.directions],
            "trials": {state: states.count(state) for state in sorted(set(states))},
            "best": [self._told(study, trial) for trial in best],
        }
        self._tracker.update_metadata({"optuna": about})
        if ended is not None and best and len(study.directions) == 1:
            self._tracker.log_metric("best_value", best[0].value, step=ended.number)

    def _told(self, study: Any, trial: Any) -> dict[str, Any]:
        child = self._child(study, trial)
        experiment_id = None if child is None else child.id
        return {
            "trial": trial.number,
            "values": list(trial.values),
            "params": _plain(trial.params),
            "experiment_id": experiment_id,
        }


def _frozen(trial: Any) -> Any:
    """Return what the storage has of a trial that goes on."""
    return trial.study.get_trials(deepcopy=False)[trial.number]


def _first_try(trial: Any) -> int:
    """Return the number of the trial that this one is a retry of, or its own."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def _name(trial: Any) -> str:
    return f"trial {_first_try(trial)}"


def _about(study: Any, trial: Any) -> dict[str, Any]:
    """Return what is noted of a trial that has ended: then, and only then, ``last_try``."""
    return {"study": study.study_name, "trial": _first_try(trial), "last_try": trial.number}


def _value_names(study: Any, limit: int) -> list[str]:
    count = len(study.directions)
    names = ["value"] if count == 1 else [f"value_{i}" for i in range(count)]
    for i, name in enumerate(study.metric_names or ()):
        try:
            names[i] = short_text(name, "metric name", limit)
        except UnsupportedValueError as error:
            log.warning("%s is kept instead: %s", names[i], error)
    return names


def _best(study: Any) -> list[Any]:
    if len(study.directions) > 1:
        return list(study.best_trials)
    try:
        return [study.best_trial]
    except ValueError:  # none is complete, or feasible
        return []


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return names and values with the text of ``repr`` for those that cannot be stored."""
    made = {}
    for name, value in values.items():
        try:
            key = text(name, "name")
        except UnsupportedValueError:
            key = repr(name)
        try:
            made[key] = to_jsonable(value, key)
        except UnsupportedValueError:
            made[key] = repr(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return made
