"""A script that is started again finds the run that it was killed in."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import UnsupportedValueError
from model_checkpoint.tracking.runs import resume_or_start

NAME = "it's \\ a name"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/experiments.db"


def save(run: ExperimentTracker, folder: Path) -> None:
    with EnhancedCheckpointManager(run, folder / "checkpoints") as manager:
        manager.save_checkpoint({"w": 1})


@pytest.mark.parametrize("status", ["failed", "interrupted"])
@pytest.mark.parametrize("project", [None, "p"])
def test_a_run_that_ended_early_goes_on_at_its_newest_checkpoint(
    url: str, tmp_path: Path, status: str, project: str | None
) -> None:
    with resume_or_start(NAME, project, config={"lr": 1}, database_url=url) as run:
        run.log_metric("loss", 1.0, step=1)
        save(run, tmp_path)
        run.log_metric("loss", 0.5, step=2)
        run.close(status)
    resume_or_start(NAME, project, database_url=url).close(status)

    with resume_or_start(NAME, project, config={"lr": 2}, database_url=url) as again:
        assert again.experiment_id == run.experiment_id
        assert again.record.config == {"lr": 1}
        assert [point["step"] for point in again.get_metrics("loss")] == [1]


def test_what_completed_or_saved_nothing_or_is_called_otherwise_is_not_gone_on_with(url: str, tmp_path: Path) -> None:
    with resume_or_start(NAME, database_url=url) as abandoned:
        save(abandoned, tmp_path)
        abandoned.close("interrupted")
    with ExperimentTracker(NAME, database_url=url) as completed:
        save(completed, tmp_path)
    with ExperimentTracker(NAME, database_url=url) as without:
        without.close("failed")

    earlier = {abandoned.experiment_id, completed.experiment_id, without.experiment_id}
    for name, project in ((NAME, None), ("other", None), (NAME, "p")):
        with resume_or_start(name, project, database_url=url) as run:
            assert run.experiment_id not in earlier
            assert run.record.status == "running"


def test_a_child_of_another_run_is_not_gone_on_with(url: str, tmp_path: Path) -> None:
    with ExperimentTracker("sweep", database_url=url) as sweep, sweep.child(NAME) as child:
        save(child, tmp_path)
        child.close("failed")
    with resume_or_start(NAME, database_url=url) as run:
        assert run.experiment_id != child.experiment_id


class Names(str, Enum):
    NET = "the net's"


class Text(str):
    """Text whose ``repr`` is not that of text, such as NumPy's."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Text({str(self)!r})"


@pytest.mark.parametrize("name", [Names.NET, Text("net")])
def test_texts_of_other_classes_are_names(url: str, tmp_path: Path, name: Any) -> None:
    with resume_or_start(name, name, database_url=url) as run:
        save(run, tmp_path)
        run.close("interrupted")
    with resume_or_start(name, name, database_url=url) as again:
        assert again.experiment_id == run.experiment_id


@pytest.mark.parametrize("name", [None, b"net", 5, "nul\0"])
def test_names_that_cannot_be_get_the_trackers_own_error(url: str, name: Any) -> None:
    with pytest.raises(UnsupportedValueError, match="experiment_name") as refused:
        resume_or_start(name, database_url=url)
    with pytest.raises(UnsupportedValueError, match="experiment_name") as own:
        ExperimentTracker(name, database_url=url)
    assert str(refused.value) == str(own.value)
