"""Optuna's studies under a tracker: a trial is an experiment, once, whoever runs it and however often it dies."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", minversion="4.9")

import optuna

from model_checkpoint import ExperimentTracker, Queries
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.integrations.optuna import StudyTracker
from tests.frameworks.optuna_study import learn, optimize
from tests.frameworks.processes import in_process


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[ExperimentTracker]:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with ExperimentTracker("sweep", "p", database_url=f"sqlite:///{tmp_path}/experiments.db") as tracker:
        yield tracker


def children(tracker: ExperimentTracker) -> dict[str, ExperimentRecord]:
    found = tracker.queries.search_experiments(f"parent == {tracker.experiment_id!r}", order_by="created_at")
    assert len({run.name for run in found}) == len(found)
    return {run.name: run for run in found}


def points(url: str, experiment_id: str) -> dict[str, list[Any]]:
    logged: dict[str, list[Any]] = {}
    with ExperimentTracker.resume(experiment_id, url) as run:
        for point in run.get_metrics():
            logged.setdefault(point["metric_name"], []).append((point["step"], point["metric_value"]))
    return logged


def test_each_end_of_a_trial_is_told(parent: ExperimentTracker) -> None:
    study_tracker = StudyTracker(parent)

    def objective(trial: Any) -> float:
        rate = trial.suggest_float("rate", 0, 1)
        trial.set_user_attr("note", {"n": trial.number})
        with study_tracker.trial(trial) as run:
            run.log_metric("own", 7.0)
            trial.report(rate, 1)
            trial.report(rate / 2, 3)
            if trial.number == 1:
                raise optuna.TrialPruned
            if trial.number == 2:
                raise ArithmeticError("overflow")
            return rate

    study = optuna.create_study(study_name="s")
    study.optimize(objective, n_trials=4, callbacks=[study_tracker], catch=ArithmeticError)

    found = children(parent)
    assert {name: (run.status, run.tags) for name, run in found.items()} == {
        "trial 0": ("completed", ("complete",)),
        "trial 1": ("completed", ("pruned",)),
        "trial 2": ("failed", ("fail",)),
        "trial 3": ("completed", ("complete",)),
    }
    for number, trial in enumerate(study.trials):
        run = found[f"trial {number}"]
        assert run.config == trial.params
        assert run.project == "p"
        assert run.metadata["note"] == {"n": number}
        logged = points(parent.database.database_url, run.id)
        rate = trial.params["rate"]
        assert logged["intermediate_value"] == [(1, rate), (3, rate / 2)]
        assert logged["own"] == [(None, 7.0)]
        assert logged.get("value", [(None, None)])[0][1] == trial.value
    told = parent.record.metadata["optuna"]
    best = study.best_trial
    assert told["trials"] == {"complete": 2, "fail": 1, "pruned": 1}
    assert told["directions"] == ["minimize"]
    assert told["best"] == [
        {
            "trial": best.number,
            "values": [best.value],
            "params": best.params,
            "experiment_id": found[f"trial {best.number}"].id,
        }
    ]
    assert parent.metric_summaries()["best_value"]["last"] == best.value


@pytest.mark.parametrize(
    ("error", "status", "tags"), [(ArithmeticError, "failed", ("fail",)), (SystemExit, "interrupted", ())]
)
def test_an_error_that_ends_the_study_ends_the_trial(
    parent: ExperimentTracker, error: type[BaseException], status: str, tags: tuple[str, ...]
) -> None:
    study_tracker = StudyTracker(parent)

    def objective(trial: Any) -> float:
        with study_tracker.trial(trial):
            raise error

    with pytest.raises(error):
        optuna.create_study(study_name="s").optimize(objective, n_trials=1, callbacks=[study_tracker])

    run = children(parent)["trial 0"]
    assert (run.status, run.tags) == (status, tags)


class Choice:
    """Something that is no JSON value."""

    def __repr__(self) -> str:
        return "Choice\0()"


@pytest.mark.filterwarnings("ignore")  # Optuna's, of such choices
def test_what_cannot_be_stored_is_kept_as_text(parent: ExperimentTracker) -> None:
    study_tracker, choice = StudyTracker(parent), Choice()

    def objective(trial: Any) -> float:
        trial.suggest_categorical("choice", [choice])
        trial.suggest_categorical("n\0l", [1])
        trial.set_user_attr("a\0", "x\0")
        trial.set_user_attr("optuna", "mine")
        trial.report(1.0, 2**70)
        trial.report(2.0, 5)
        with study_tracker.trial(trial):
            if trial.number == 1:
                raise ArithmeticError("the user's own")
            return 1.0

    study = optuna.create_study(study_name="s")
    study.set_metric_names(["n\0l"])
    study.optimize(objective, n_trials=2, callbacks=[study_tracker], catch=ArithmeticError)

    found = children(parent)
    assert [(run.status, run.tags) for run in found.values()] == [("completed", ("complete",)), ("failed", ("fail",))]
    for run in found.values():
        assert run.config == {"choice": "Choice\\0()", "'n\\x00l'": 1}
        assert run.metadata["'a\\x00'"] == "'x\\x00'"
        assert points(parent.database.database_url, run.id)["intermediate_value"] == [(5, 2.0)]
    assert points(parent.database.database_url, found["trial 0"].id)["value"] == [(None, 1.0)]
    assert parent.record.metadata["optuna"]["best"][0]["params"] == found["trial 0"].config


def test_the_users_own_error_is_raised_where_the_trial_cannot_be_noted(
    parent: ExperimentTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study_tracker = StudyTracker(parent)

    def refuse(*_: object) -> None:
        raise OSError("no space")

    def objective(trial: Any) -> float:
        with study_tracker.trial(trial) as run:
            monkeypatch.setattr(run, "log_arrays", refuse)
            raise ArithmeticError("the user's own")

    with pytest.raises(ArithmeticError, match="the user's own"):
        optuna.create_study(study_name="s").optimize(objective, n_trials=1, callbacks=[study_tracker])
    assert children(parent)["trial 0"].status == "failed"
    assert "no space" in caplog.text


def test_a_trial_that_two_processes_see_ending_is_noted_once(parent: ExperimentTracker) -> None:
    own = StudyTracker(parent)
    other = StudyTracker(ExperimentTracker.resume(parent.experiment_id, parent.database.database_url))

    def objective(trial: Any) -> float:
        with own.trial(trial) as run:
            run.log_metric("own", 7.0)
            trial.report(3.0, 1)
            return 1.0

    study = optuna.create_study(study_name="s")
    study.optimize(objective, n_trials=1, callbacks=[lambda study, _: other.sync(study), own])
    own.sync(study)
    run = children(parent)["trial 0"]
    logged = points(parent.database.database_url, run.id)
    assert logged == {"own": [(None, 7.0)], "intermediate_value": [(1, 3.0)], "value": [(None, 1.0)]}
    assert (run.status, run.tags) == ("completed", ("complete",))
    other.tracker.close()


def test_sync_takes_in_a_trial_that_the_end_of_its_process_ended(parent: ExperimentTracker) -> None:
    study_tracker = StudyTracker(parent)

    def objective(trial: Any) -> float:
        with study_tracker.trial(trial):
            trial.set_user_attr("note", 1)
            raise SystemExit

    study = optuna.create_study(study_name="s")
    with pytest.raises(SystemExit):
        study.optimize(objective, n_trials=1, callbacks=[study_tracker])
    study.tell(0, state=optuna.trial.TrialState.FAIL)
    study_tracker.sync(study)
    run = children(parent)["trial 0"]
    assert (run.status, run.tags, run.metadata["note"]) == ("failed", ("fail",), 1)


def test_several_objectives_have_their_names_and_a_pareto_front(parent: ExperimentTracker) -> None:
    study = optuna.create_study(study_name="s", directions=["minimize", "maximize"])
    study.set_metric_names(["cost", "gain"])

    def objective(trial: Any) -> tuple[float, float]:
        x = trial.suggest_int("x", 0, 9)
        return x, x % 5

    study.optimize(objective, n_trials=8, callbacks=[StudyTracker(parent)])

    found = children(parent)
    assert len(found) == 8
    logged = points(parent.database.database_url, found["trial 3"].id)
    assert [logged["cost"][0][1], logged["gain"][0][1]] == study.trials[3].values
    told = parent.record.metadata["optuna"]
    assert {best["trial"] for best in told["best"]} == {trial.number for trial in study.best_trials}
    assert "best_value" not in parent.metric_summaries()


def test_trials_in_threads_do_not_mix(parent: ExperimentTracker) -> None:
    study_tracker = StudyTracker(parent)

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", 0, 1)
        with study_tracker.trial(trial) as run:
            run.log_metric("x", x, step=trial.number)
        return x

    study = optuna.create_study(study_name="s")
    study.optimize(objective, n_trials=16, n_jobs=4, callbacks=[study_tracker])

    found = children(parent)
    assert len(found) == 16
    for trial in study.trials:
        logged = points(parent.database.database_url, found[f"trial {trial.number}"].id)
        assert logged["x"] == [(trial.number, trial.value)]
        assert logged["value"] == [(None, trial.value)]
    assert parent.record.metadata["optuna"]["best"][0]["values"] == [study.best_value]


def test_sync_takes_in_what_was_there_before_and_each_trial_once(parent: ExperimentTracker) -> None:
    study = optuna.create_study(study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    study_tracker = StudyTracker(parent)
    study_tracker.sync(study)
    study_tracker.sync(study)

    assert [run.status for run in children(parent).values()] == ["completed"] * 3
    assert parent.record.metadata["optuna"]["best"][0]["values"] == [study.best_value]


def test_a_killed_trial_that_is_retried_goes_on_from_its_checkpoint_as_the_same_experiment(tmp_path: Path) -> None:
    in_process(optimize, tmp_path, 3, (1, 5), killed=True)
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")  # much time goes by
    in_process(optimize, tmp_path, 3)  # a new process on the same study: the retry and two more

    url = f"sqlite:///{tmp_path}/experiments.db"
    study = optuna.load_study(study_name="rates", storage=f"sqlite:///{tmp_path}/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    retry = study.trials[2]
    assert retry.value == learn(retry.params["rate"])  # to the bit what unbroken learning comes to
    with Queries(url) as queries:
        (root,) = queries.tree()
        runs = {run.name: run.id for run in root.children}
        assert sorted(runs) == ["trial 0", "trial 1", "trial 3", "trial 4"]
        assert [run.status for run in root.children] == ["completed"] * 4
        assert queries.search_experiments("name == 'rates'")[0].metadata["optuna"]["trials"] == {
            "complete": 4,
            "fail": 1,
        }
    logged = points(url, runs["trial 1"])
    assert [step for step, _ in logged["loss"]] == list(range(1, 10))  # step 5 is there once
    assert logged["value"] == [(None, retry.value)]


def test_a_killed_trial_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    in_process(optimize, tmp_path, 1, (0, 1), killed=True)
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")
    in_process(optimize, tmp_path, 1)

    with Queries(f"sqlite:///{tmp_path}/experiments.db") as queries:
        runs = queries.search_experiments("name == 'trial 0'", order_by="created_at")
    assert [run.status for run in runs] == ["interrupted", "completed"]
