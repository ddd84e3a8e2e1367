"""Statistics: what was done, by experiment and process, for people and for Prometheus."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, prometheus_text
from model_checkpoint.performance.statistics import KNOWN, quantiles


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ExperimentTracker]:
    gc.collect()  # trackers of earlier tests, which would be counted too
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        yield run


def exported() -> dict[tuple[str, str, str], float]:
    """(name, experiment, quantile) -> value, read by Prometheus' own parser."""
    return {
        (sample.name, sample.labels.get("experiment", ""), sample.labels.get("quantile", "")): sample.value
        for family in text_string_to_metric_families(prometheus_text())
        for sample in family.samples
    }


def test_percentiles_are_those_of_the_nearest_rank(chance: random.Random) -> None:
    for count in [1, 2, 3, 20, 100, 999]:
        values = [chance.random() for _ in range(count)]
        expected = [np.percentile(values, p, method="inverted_cdf") for p in (50, 95, 99)]
        assert quantiles(values) == pytest.approx(expected)
    assert quantiles([]) == []


def test_a_manager_tells_what_it_did_by_experiment(run: ExperimentTracker, tmp_path: Path) -> None:
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager, run.child("other") as other:
        saved = manager.save_checkpoint({"w": [1.0]})
        manager.save_checkpoint({"w": [2.0]}, blocking=False)
        manager.wait()
        manager.save_checkpoint({"w": [3.0]}, experiment_id=other.experiment_id)
        manager.load_checkpoint(saved)
        did = manager.get_performance_statistics()
        one = did["experiments"][run.experiment_id]
        assert (did["saves"], one["saves"], did["experiments"][other.experiment_id]["saves"]) == (3, 2, 1)
        sizes = [row["size"] for each in (run, other) for row in manager.list_checkpoints(each.experiment_id)]
        assert did["bytes_written"] == sum(sizes)
        assert (
            0 < did["stall_p50_seconds"] <= did["stall_p95_seconds"] <= did["stall_p99_seconds"] <= did["stall_seconds"]
        )
        assert did["save_p50_seconds"] <= did["save_p99_seconds"] < did["save_seconds"]
        assert did["load_p50_seconds"] == did["load_seconds"] == one["load_seconds"]
        assert did["write_gb_per_second"] == pytest.approx(did["bytes_written"] / did["save_seconds"] / 1e9)
        assert did["pending_saves"] == 0


def test_a_tracker_tells_what_it_stored(run: ExperimentTracker) -> None:
    assert run.get_performance_statistics() == {"buffered_points": 0}
    for _ in range(3):
        run.log_metrics({"a": 1.0, "b": 2.0})
        run.flush()
    did = run.get_performance_statistics()
    assert (did["flushes"], did["points"], did["buffered_points"]) == (3, 6, 0)
    assert 0 < did["flush_p50_seconds"] <= did["flush_p99_seconds"] < did["flush_seconds"]


def test_prometheus_reads_what_is_exported(run: ExperimentTracker, tmp_path: Path) -> None:
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager:
        saved = manager.save_checkpoint({"w": [1.0]}, loss=0.5)
        manager.load_checkpoint(saved)
        run.log_arrays("loss", [1.0] * 50)
        run.flush()
        found, did = exported(), manager.get_performance_statistics()
        own = run.experiment_id
        assert found["model_checkpoint_saves_total", own, ""] == 1
        assert found["model_checkpoint_bytes_written_total", own, ""] == did["bytes_written"]
        assert found["model_checkpoint_save_seconds_count", own, ""] == 1
        assert found["model_checkpoint_save_seconds_sum", own, ""] == did["save_seconds"]
        assert found["model_checkpoint_save_seconds", own, "0.95"] == did["save_p95_seconds"]
        assert found["model_checkpoint_points_total", own, ""] == 50
        assert found["model_checkpoint_pending_saves", "", ""] == 0
        assert found["model_checkpoint_cache_hits_total", "", ""] == did["cache"]["hits"]
    for line in prometheus_text().splitlines():
        if line.startswith("# HELP"):
            name = line.split()[2].removeprefix("model_checkpoint_").removesuffix("_total")
            assert line.endswith(KNOWN[name])


def test_what_is_gone_is_no_longer_exported(tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db")
    run.log_metric("loss", 1.0)
    run.flush()
    own = run.experiment_id
    assert ("model_checkpoint_points_total", own, "") in exported()
    run.close()
    del run
    gc.collect()
    assert ("model_checkpoint_points_total", own, "") not in exported()


def test_a_fork_while_something_is_counted_leaves_no_lock_taken(run: ExperimentTracker, tmp_path: Path) -> None:
    with EnhancedCheckpointManager(run, tmp_path / "c") as manager, manager._tally.lock:
        child = os.fork()
        if not child:
            status = 1
            try:
                prometheus_text()
                status = 0
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
