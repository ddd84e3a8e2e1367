"""Experiments under experiments: children, trees, totals, and where a run went on from."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, Queries
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    UnsupportedValueError,
)
from model_checkpoint.tracking.hierarchy import build_tree
from tests.servers import KINDS, new_database


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path) as url:
        yield url


def test_a_tree_has_children_below_their_parents_and_totals_of_all_below(url: str, tmp_path: Path) -> None:
    with ExperimentTracker("sweep", "vision", database_url=url, tags=["s"], metadata={"owner": "a"}) as sweep:
        for number in range(3):
            child = sweep.child(f"trial-{number}", tags=[number], config={"lr": number}, metadata={"seed": number})
            child.log_arrays("loss", [1.0] * (number + 1))
            with EnhancedCheckpointManager(child, tmp_path / "c") as manager:
                manager.save_checkpoint({"w": [1.0]})
            if number == 1:
                with child.child("restart") as below:
                    below.log_metric("loss", 0.5)
            child.close("failed" if number == 2 else "completed")
        alone = ExperimentTracker("alone", "text", database_url=url)
        with Queries(url) as queries:
            (tree,) = queries.tree("vision")
            whole = queries.tree()
            (part,) = queries.tree(root=tree.children[1].id)
            projects = queries.projects()
            found = queries.search_experiments(f"parent == '{sweep.experiment_id}'", order_by="name")
            with pytest.raises(ExperimentNotFoundError, match="nobody"):
                queries.tree(root="nobody")
    assert [node.name for node in tree.children] == ["trial-0", "trial-1", "trial-2"]
    assert [[node.name for node in child.children] for child in tree.children] == [[], ["restart"], []]
    totals = tree.totals
    assert (totals.experiments, totals.running, totals.completed, totals.failed) == (5, 1, 3, 1)
    assert (totals.points, totals.checkpoints) == (1 + 2 + 3 + 1, 3)
    assert totals.bytes > 0
    assert [node.name for node in whole] == ["sweep", "alone"]
    assert part.totals.experiments == 2
    assert part.lines()[1].startswith("  restart (completed")
    assert {name: project.totals.experiments for name, project in projects.items()} == {"vision": 5, "text": 1}
    assert [(each.tags, each.config, each.metadata, each.project) for each in found] == [
        ((number,), {"lr": number}, {"seed": number}, "vision") for number in range(3)
    ]
    alone.close()


def test_every_experiment_is_in_its_own_project_also_below_one_of_another(url: str) -> None:
    with ExperimentTracker("sweep", "A", database_url=url) as sweep:
        with ExperimentTracker("run", "B", parent=sweep, database_url=url) as run:
            run.log_arrays("loss", [1.0, 2.0])
            with run.child("restart"):
                pass
        with Queries(url) as queries:
            totals = {name: (of.totals.experiments, of.totals.points) for name, of in queries.projects().items()}
            trees = {name: [node.name for node in queries.tree(name)] for name in ("A", "B", None)}
    assert totals == {"A": (1, 0), "B": (2, 2)}
    assert trees == {"A": ["sweep"], "B": ["run"], None: ["sweep"]}


def test_a_tree_of_any_depth_has_lines() -> None:
    depth = 3_000
    rows = [(str(i), f"run-{i}", None, str(i - 1) if i else None, "completed", 0.0, 0, 1, 0) for i in range(depth)]
    lines = build_tree(rows)["0"].lines()
    assert lines[0] == f"run-0 (completed, {depth} checkpoints) 0"
    assert lines[-1].strip() == f"run-{depth - 1} (completed, 1 checkpoints) {depth - 1}"
    assert len(lines) == depth


def test_children_share_the_connection_of_their_parent_also_in_memory() -> None:
    parent = ExperimentTracker("parent", database_url="sqlite:///:memory:")
    child = parent.child("child")
    child.log_metric("loss", 1.0)
    child.close()
    parent.log_metric("loss", 2.0)
    assert [point["metric_value"] for point in parent.get_metrics()] == [2.0]
    assert child.experiment_id in {record.id for record in parent.queries.search_experiments()}
    late = parent.child("late")
    parent.close()
    with pytest.raises(DatabaseError, match="closed"):
        late.set_status("failed")


def test_what_children_have_logged_is_stored_when_their_parent_is_closed(url: str) -> None:
    parent = ExperimentTracker("parent", database_url=url)
    child = parent.child("child")
    grandchild = child.child("grandchild")
    for run in (child, grandchild):
        run.log_metric("loss", 1.0)
    parent.close("failed")
    with Queries(url) as queries:
        assert len(queries.search_experiments("metrics.loss == 1 and status == 'failed'")) == 2


def test_a_fork_notes_the_checkpoint_that_it_goes_on_from(url: str, tmp_path: Path) -> None:
    with ExperimentTracker("base", "text", database_url=url) as base:
        with EnhancedCheckpointManager(base, tmp_path / "c") as manager:
            saved = manager.save_checkpoint({"w": [1.0]})
        with base.fork_from(saved, "tuned", config={"lr": 1e-5}) as fork:
            assert (fork.record.forked_from, fork.record.parent_id, fork.record.project) == (saved, None, "text")
        (found,) = base.queries.search_experiments(f"forked_from == '{saved}'")
        assert found.name == "tuned"
        with pytest.raises(CheckpointNotFoundError, match="nothing"):
            base.fork_from("nothing", "tuned")


def test_each_level_has_tags_and_metadata(url: str) -> None:
    with ExperimentTracker("first", "vision", database_url=url) as first:
        first.describe_project(tags=["paper", 1, 1, True], metadata={"owner": "a", "budget": {"hours": 10}})
        first.update_metadata({"seed": 7})
        with ExperimentTracker("second", "vision", database_url=url) as second:
            second.describe_project(tags=["later", "paper"], metadata={"owner": "b"})
            assert second.record.metadata == {}
        found = first.queries.projects()["vision"]
        assert (found.name, repr(found.tags)) == ("vision", "('paper', 1, True, 'later')")
        assert found.metadata == {"owner": "b", "budget": {"hours": 10}}
        assert first.record.metadata == {"seed": 7}
        with pytest.raises(UnsupportedValueError, match=r"metadata\.odd"):
            first.describe_project(tags=["lost"], metadata={"odd": object()})
        assert first.queries.projects()["vision"] == found


def test_a_run_in_no_project_cannot_describe_it() -> None:
    with ExperimentTracker("alone", database_url="sqlite:///:memory:") as run:
        with pytest.raises(ConfigurationError, match="project_name"):
            run.describe_project(tags=["a"])
        found = run.queries.projects()[None]
        assert (found.name, found.tags, found.metadata, found.totals.experiments) == (None, (), {}, 1)


def test_many_describe_one_project_at_once_and_nothing_is_lost(url: str) -> None:
    runs = [ExperimentTracker(f"run-{number}", "shared", database_url=url) for number in range(4)]
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: run.describe_project([run.experiment_name], {run.experiment_name: 1}), runs))
    found = runs[0].queries.projects()["shared"]
    assert set(found.tags) == set(found.metadata) == {run.experiment_name for run in runs}
    for run in runs:
        run.close()
