"""A run that goes back to a checkpoint: no step is there twice, and nothing that was logged is lost."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, DatabaseError
from tests.servers import KINDS, new_database


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path) as url:
        yield url


def train(run: ExperimentTracker, folder: Path, steps: range, offset: float = 0.0) -> dict[int, str]:
    """Log two metrics a step and one now and then; save every tenth step. Returns step -> checkpoint id."""
    saved = {}
    with EnhancedCheckpointManager(run, folder, max_checkpoints=100) as manager:
        for step in steps:
            run.log_metrics({"loss": 1 / (step + 1) + offset, "acc": step / 100}, step=step)
            if step % 25 == 24:
                run.log_metric(f"rare-{step}", 1.0, step=step)
            if step % 10 == 9:
                saved[step] = manager.save_checkpoint({"w": [float(step)]}, step=step)
    return saved


def steps(run: ExperimentTracker, name: str = "loss") -> list[int | None]:
    return [point["step"] for point in run.get_metrics(name)]


def test_metrics_after_the_checkpoint_become_an_earlier_attempt(url: str, tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=url)
    saved = train(run, tmp_path / "c", range(57))
    run.close("failed")
    run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved[29])
    assert steps(run) == list(range(30))
    assert set(run.metric_summaries()) == {"loss", "acc", "rare-24"}
    (attempt,) = run.attempts
    assert (attempt.number, attempt.checkpoint_id, attempt.points) == (1, saved[29], 2 * 27 + 1)
    assert run.metric_history("loss", attempt=1).steps == list(range(30, 57))
    assert run.metric_history("rare-49", attempt=1).steps == [49]
    train(run, tmp_path / "c", range(30, 57), offset=1.0)
    assert steps(run) == list(range(57))
    found = run.metric_summaries()["loss"]
    assert (found["points"], found["min_step"], found["max_step"], found["max"]) == (57, 29, 30, 1 / 31 + 1.0)
    assert [point["metric_name"] for point in run.get_metrics()][:4] == ["loss", "acc", "loss", "acc"]
    run.close()


def test_going_back_again_and_again_keeps_every_attempt(url: str, tmp_path: Path, chance: random.Random) -> None:
    run = ExperimentTracker("run", database_url=url)
    saved = train(run, tmp_path / "c", range(40))
    run.close()
    cut = 0
    for number in range(1, 4):
        before = len(run_points(run.experiment_id, url))
        back = chance.choice([9, 19, 29])
        run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved[back])
        assert steps(run) == list(range(back + 1))
        assert len(run.attempts) == number
        after = len(run.get_metrics())
        cut += before - after
        saved |= train(run, tmp_path / "c", range(back + 1, 40), offset=float(number))
        run.close()
    run = ExperimentTracker.resume(run.experiment_id, url)
    assert sum(attempt.points for attempt in run.attempts) == cut
    for attempt in run.attempts:
        values = run.metric_history("loss", None, attempt=attempt.number).values
        assert all(math.isclose(value % 1, values[0] % 1, abs_tol=0.2) for value in values)
    run.close()


def run_points(experiment_id: str, url: str) -> list[dict[str, object]]:
    run = ExperimentTracker.resume(experiment_id, url)
    try:
        return run.get_metrics()
    finally:
        run.close()


def logged(run: ExperimentTracker) -> list[tuple[str, float, int | None]]:
    return [(point["metric_name"], point["metric_value"], point["step"]) for point in run.get_metrics()]


def test_going_back_to_any_checkpoint_brings_its_metrics_back_also_from_an_earlier_attempt(
    url: str, tmp_path: Path, chance: random.Random
) -> None:
    run = ExperimentTracker("run", database_url=url)
    known = {}  # checkpoint -> what was logged when it was saved, and its step
    step, value = 0, 0.0
    for _ in range(12):
        with EnhancedCheckpointManager(run, tmp_path / "c", max_checkpoints=100) as manager:
            for _ in range(chance.randrange(4)):
                for _ in range(chance.randrange(1, 8)):
                    step, value = step + 1, value + 1
                    run.log_metrics({"loss": value, chance.choice("abc"): -value}, step)
                known[manager.save_checkpoint({"w": [value]}, step=step)] = (logged(run), step)
            for _ in range(chance.randrange(4)):
                value += 1
                run.log_metric("loss", value, step + 1)
        run.close()
        back = chance.choice([None, *known])
        run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=back)
        if back is not None:
            before, step = known[back]
            assert logged(run) == before
            losses = [value for name, value, _ in before if name == "loss"]
            assert run.metric_summaries()["loss"]["points"] == len(losses)
            assert run.metric_summaries()["loss"]["last"] == losses[-1]
    numbers = {value for attempt in run.attempts for value in run.metric_history("loss", attempt=attempt.number).values}
    numbers |= set(run.metric_history("loss").values)
    assert numbers == set(range(1, int(value) + 1)), "nothing that was logged is lost"
    run.close()


def test_a_save_that_recovery_finishes_is_where_it_was_and_not_where_the_recovery_was(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ExperimentTracker("run", database_url=url)

    def fail(*_: object, **__: object) -> None:
        raise DatabaseError("away")

    with EnhancedCheckpointManager(run, tmp_path / "c") as manager, monkeypatch.context() as patch:
        run.log_arrays("loss", range(10), range(10))
        patch.setattr(run.database.checkpoints, "commit", fail)
        with pytest.raises(DatabaseError, match="away"):
            manager.save_checkpoint({"w": [1.0]})
    run.log_arrays("loss", range(10, 30), range(10, 30))
    run.flush()
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager:
        manager.recover()
        (saved,) = manager.list_checkpoints()
    run.close()
    with ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved["checkpoint_id"]) as run:
        assert steps(run) == list(range(10))


def test_going_back_to_the_last_point_cuts_nothing(url: str, tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=url)
    saved = train(run, tmp_path / "c", range(30))
    run.close()
    run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved[29])
    assert run.attempts == []
    assert steps(run) == list(range(30))
    run.close()


def test_a_long_series_is_cut_within_a_block(url: str, tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=url)
    run.log_arrays("loss", range(10_000), range(10_000))
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager:
        saved = manager.save_checkpoint({"w": [1.0]})
    run.log_arrays("loss", range(10_000, 20_000), range(10_000, 20_000))
    run.close()
    run = ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=saved)
    assert list(run.metric_history("loss", None).values) == list(range(10_000))
    assert list(run.metric_history("loss", None, attempt=1).values) == list(range(10_000, 20_000))
    assert run.metric_summaries()["loss"]["max"] == 9999.0
    run.close()


def test_a_checkpoint_that_is_not_the_experiments_is_refused_and_nothing_is_cut(url: str, tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=url)
    train(run, tmp_path / "c", range(20))
    other = ExperimentTracker("other", database_url=url)
    foreign = train(other, tmp_path / "c", range(10))
    other.close()
    run.close("failed")
    for checkpoint_id in (foreign[9], "nothing"):
        with pytest.raises(CheckpointNotFoundError):
            ExperimentTracker.resume(run.experiment_id, url, at_checkpoint=checkpoint_id)
    run = ExperimentTracker.resume(run.experiment_id, url)
    assert steps(run) == list(range(20))
    run.close()
