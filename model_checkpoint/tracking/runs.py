"""Going on with a run that ended early, or starting it: what every training script that may be killed begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.tracking import ExperimentTracker, Queries
from model_checkpoint.utils.jsonable import text


def resume_or_start(
    experiment_name: str,
    project_name: str | None = None,
    *,
    tags: Any = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    database_url: str = "sqlite:///experiments.db",
) -> ExperimentTracker:
    """Go on with the newest run of this name that has a checkpoint, unless it has completed, or start a new one.

    So a script that is killed goes on when it is started again. Give runs that go on at the same time different names.
    Runs that are another's children are not looked at.

    Args:
        experiment_name, project_name: which run; both are compared.
        tags, config, metadata: of a new run; one that goes on keeps its own.
        database_url: see ``EnhancedDatabaseConnection``.

    Returns:
        The tracker; ``list_checkpoints`` of a manager made with it tells whether there is something to go on from. The
        metrics are as they were at the newest checkpoint; see ``at_checkpoint`` of ``ExperimentTracker.resume``.

    Raises:
        What ``ExperimentTracker`` raises.
    """
    filter = f"parent is None and {named(experiment_name, project_name)}"
    database = EnhancedDatabaseConnection(database_url)
    try:
        newest_first = Queries(database).search_experiments(filter)
        with_checkpoints = ((run, newest_checkpoint(database, run.id)) for run in newest_first)
        found, checkpoint_id = next((pair for pair in with_checkpoints if pair[1] is not None), (None, None))
    finally:
        database.close()
    if found is not None and found.status != "completed":
        return ExperimentTracker.resume(found.id, database_url, at_checkpoint=checkpoint_id)
    return ExperimentTracker(experiment_name, project_name, tags, config, database_url, metadata=metadata)


def named(experiment_name: str, project_name: str | None) -> str:
    """Return a filter for the experiments of a name in a project, or in none.

    Raises:
        UnsupportedValueError: as from ``ExperimentTracker``, for names that are no text, or cannot be stored.
    """
    name = text(experiment_name, "experiment_name")
    project = "is None" if project_name is None else f"== {text(project_name, 'project_name')!r}"
    return f"name == {name!r} and project {project}"


def newest_checkpoint(database: EnhancedDatabaseConnection, experiment_id: str) -> str | None:
    """Return the id of the newest checkpoint of a run that nothing is known against, or None."""
    sound = [record.id for record in database.checkpoints.of_experiment(experiment_id) if record.status == "committed"]
    return sound[-1] if sound else None


def go_back(tracker: ExperimentTracker, checkpoint_id: str) -> None:
    """Let the metrics be what they were at a checkpoint of the run; see ``ExperimentTracker.resume``."""
    tracker.flush()
    where = tracker.database.checkpoints.position(tracker.experiment_id, checkpoint_id)
    if where is not None:
        tracker.database.attempts.go_back(tracker.experiment_id, checkpoint_id, *where)
