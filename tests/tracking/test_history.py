"""Reading metrics: curves whose peaks survive, summaries, bulk logging, and what other libraries get."""

from __future__ import annotations

import math
import random
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from model_checkpoint import ExperimentTracker
from model_checkpoint.errors import ConfigurationError, MissingDependencyError, UnsupportedValueError
from tests.servers import KINDS, new_database


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ExperimentTracker]:
    with new_database(request.param, tmp_path) as url, ExperimentTracker("run", database_url=url) as run:
        yield run


# --- curves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10_000, 1_500_000])
def test_every_peak_of_a_long_series_is_in_a_short_curve(run: ExperimentTracker, count: int) -> None:
    """The first length is read whole, the second one is drawn from what the blocks know."""
    values = np.sin(np.arange(count) / count * 20)
    peaks = {count // 7: 50.0, count // 3: -40.0, count // 2: 31.0, count - 5: -30.0}
    for place, value in peaks.items():
        values[place] = value
    run.log_arrays("loss", values, steps=np.arange(count) * 3)
    curve = run.metric_history("loss", max_points=200)
    assert len(curve) <= 200
    assert curve.total == count
    points = dict(zip(curve.steps, curve.values))
    for place, value in peaks.items():
        assert points[place * 3] == value
    assert (curve.steps[0], curve.steps[-1]) == (0, (count - 1) * 3)
    assert curve.steps == sorted(curve.steps)  # type: ignore[type-var]
    assert all(values[step // 3] == value for step, value in points.items())  # type: ignore[operator]


@pytest.mark.parametrize("max_points", [4, 5, 11, 100])
def test_the_lowest_and_the_highest_point_of_every_stretch_survive(
    run: ExperimentTracker, chance: random.Random, max_points: int
) -> None:
    values = [chance.gauss(0, 1) for _ in range(3000)]
    for value in values:
        run.log_metric("loss", value)
    curve = run.metric_history("loss", max_points)
    assert len(curve) <= max_points
    assert {min(values[1:-1]), max(values[1:-1]), values[0], values[-1]} <= set(curve.values)
    assert curve.steps == [None] * len(curve)
    whole = run.metric_history("loss", max_points=None)
    assert list(whole.values) == values
    assert whole.total == len(values)


def test_a_short_series_comes_whole_and_nan_is_no_peak(run: ExperimentTracker) -> None:
    for step, value in enumerate([math.nan, 1.0, math.inf, -1.0]):
        run.log_metric("loss", value, step)
    assert [value.hex() for value in run.metric_history("loss").values] == [
        "nan",
        "0x1.0000000000000p+0",
        "inf",
        "-0x1.0000000000000p+0",
    ]
    run.log_arrays("mixed", [math.nan, 3.0, math.nan, 9.0, -2.0, math.nan, 1.0, math.nan])
    assert {9.0, -2.0} <= set(run.metric_history("mixed", 4).values)
    run.log_arrays("nothing", [math.nan] * 100)
    assert 1 <= len(run.metric_history("nothing", 10)) <= 10


def test_a_metric_that_is_not_there_and_too_few_points_are_clear_errors(run: ExperimentTracker) -> None:
    run.log_metric("loss", 1.0)
    with pytest.raises(KeyError, match="'acc' was logged; there are loss"):
        run.metric_history("acc")
    for points in (3, 0, -1):
        with pytest.raises(ConfigurationError, match="at least 4"):
            run.metric_history("loss", points)


# --- summaries --------------------------------------------------------------------------------------------------


def test_summaries_are_those_of_all_points_however_they_were_written(
    run: ExperimentTracker, chance: random.Random
) -> None:
    values: list[float] = []
    for _ in range(30):
        some = [chance.choice([chance.gauss(0, 1), math.nan]) for _ in range(chance.randrange(1, 60))]
        if chance.random() < 0.5:
            run.log_arrays("loss", some, range(len(values), len(values) + len(some)))
        else:
            for step, value in enumerate(some, len(values)):
                run.log_metric("loss", value, step)
        values += some
        run.flush()
    found = run.metric_summaries()["loss"]
    numbers = [value for value in values if value == value]
    assert found["points"] == len(values)
    assert (found["min"], found["max"]) == (min(numbers), max(numbers))
    assert (found["min_step"], found["max_step"]) == (values.index(min(numbers)), values.index(max(numbers)))
    assert found["mean"] == pytest.approx(sum(numbers) / len(numbers))
    assert found["last_step"] == len(values) - 1
    assert found["last"] == (values[-1] if values[-1] == values[-1] else None)
    assert list(run.metric_history("loss", None).values) == pytest.approx(values, nan_ok=True)


def test_infinities_and_nan_in_summaries(run: ExperimentTracker) -> None:
    run.log_arrays("up", [1.0, math.inf])
    run.log_arrays("down", [-math.inf, 5.0], [3, 4])
    run.log_arrays("none", [math.nan])
    found = run.metric_summaries()
    assert (found["up"]["max"], found["up"]["min"], found["up"]["last"], found["up"]["mean"]) == (
        math.inf,
        1.0,
        math.inf,
        math.inf,
    )
    assert (found["down"]["min"], found["down"]["min_step"], found["down"]["last"]) == (-math.inf, 3, 5.0)
    assert found["none"] == {"points": 1} | dict.fromkeys(
        ["last", "last_step", "min", "min_step", "max", "max_step", "mean"]
    )


# --- bulk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1, -2.5],
        (0.5, 1, -2.5),
        array("d", [0.5, 1, -2.5]),
        np.array([0.5, 1, -2.5]),
        np.array([0.5, 1, -2.5], dtype=np.float16),
        [np.float32(0.5), torch.tensor(1), -2.5],
        torch.tensor([0.5, 1, -2.5], requires_grad=True),
        jnp.array([0.5, 1, -2.5]),
        (value for value in [0.5, 1, -2.5]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bulk_takes_sequences_and_arrays_of_every_library(values: object, tmp_path: Path) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        run.log_metric("other", 1.0)
        run.log_arrays("loss", values, steps=torch.tensor([5, 6, 9]))
        run.log_metric("loss", 7.0, step=10)
        found = [(p["metric_name"], p["metric_value"], p["step"]) for p in run.get_metrics()]
    assert found == [("other", 1.0, None), ("loss", 0.5, 5), ("loss", 1.0, 6), ("loss", -2.5, 9), ("loss", 7.0, 10)]


@pytest.mark.parametrize(
    ("values", "steps", "told"),
    [
        ([1.0, "a"], None, r"metrics.loss\[1\]"),
        (5.0, None, "sequence or array"),
        ("12345678", None, "sequence or array"),
        (b"12345678", None, "sequence or array"),
        (np.zeros((2, 2)), None, "one dimension"),
        ([1.0, 2.0], [1], "there are 1 of them, and 2 values"),
        ([1.0, 2.0], [1, 2.5], "must be an integer"),
        ([1.0, 2.0], [1, 2**63], "64 bits"),
    ],
)
def test_bulk_that_cannot_be_stored_says_why_and_stores_nothing(
    tmp_path: Path, values: object, steps: object, told: str
) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        with pytest.raises(UnsupportedValueError, match=told):
            run.log_arrays("loss", values, steps)
        run.log_arrays("empty", [])
        run.log_arrays("empty", np.array([]), np.array([], dtype=int))
        assert run.get_metrics() == []


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6.0),
        np.arange(6.0)[::-2],
        np.arange(6, dtype=">f8"),
        np.arange(6, dtype="f4"),
        np.arange(6, dtype="i8"),
        np.arange(6, dtype="u8"),
        array("d", [1.5, math.nan, -0.0]),
    ],
)
def test_arrays_of_any_memory_are_logged_as_their_numbers(tmp_path: Path, values: np.ndarray | array[float]) -> None:
    steps = np.arange(2 * len(values))[::2]  # not all in one piece
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        run.log_arrays("loss", values, steps)
        found = run.metric_history("loss")
        assert repr(list(found.values)) == repr([float(value) for value in values])
        assert found.steps == steps.tolist()


# --- other libraries --------------------------------------------------------------------------------------------


def test_dataframes_have_typed_columns_with_missing_steps(tmp_path: Path) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        run.log_arrays("loss", [0.5, 0.25], [2**62, 7])
        run.log_metric("loss", math.nan)
        history = run.metric_history("loss")
    frame = history.to_pandas()
    assert dict(frame.dtypes.astype(str)) == {"step": "Int64", "value": "float64", "timestamp": "float64"}
    assert list(frame["step"][:2]) == [2**62, 7]
    assert frame["step"].isna().tolist() == [False, False, True]
    polars = history.to_polars()
    assert polars["step"].to_list() == [2**62, 7, None]
    assert polars["value"].to_list()[:2] == [0.5, 0.25]
    table = history.to_arrow()
    assert table["step"].to_pylist() == [2**62, 7, None]
    assert [str(kind) for kind in table.schema.types] == ["int64", "double", "double"]
    assert np.frombuffer(history.values)[:2].tolist() == [0.5, 0.25]


def test_without_the_library_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        run.log_metric("loss", 1.0)
        history = run.metric_history("loss")
    for package, method in [("pandas", "to_pandas"), ("polars", "to_polars"), ("pyarrow", "to_arrow")]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match="dataframes"):
            getattr(history, method)()


def test_the_first_and_the_last_point_come_once_also_as_peaks_of_their_blocks(tmp_path: Path) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as run:
        run.log_arrays("loss", [1 - i / 300_000 for i in range(300_000)], steps=range(300_000))
        for points in (4, 10, 50, 100):
            found = run.metric_history("loss", points).steps
            assert (found[0], found[-1]) == (0, 299_999)
            assert len(set(found)) == len(found)


def test_a_dataframe_of_pandas_has_large_steps_beside_missing_ones() -> None:
    pytest.importorskip("pandas")
    with ExperimentTracker("run", database_url="sqlite:///:memory:") as run:
        for step in (None, 2**53 + 1, 2**63 - 1, -(2**63)):
            run.log_metric("loss", 0.5, step)
        frame = run.metric_history("loss").to_pandas()
    assert frame["step"].isna().tolist() == [True, False, False, False]
    assert frame["step"].dropna().tolist() == [2**53 + 1, 2**63 - 1, -(2**63)]
    assert str(frame["step"].dtype) == "Int64"


def test_the_mean_of_both_infinities_is_no_number() -> None:
    with ExperimentTracker("run", database_url="sqlite:///:memory:") as run:
        run.log_arrays("loss", [math.inf, -math.inf, 5.0])
        run.log_arrays("up", [math.inf, 5.0])
        found = run.metric_summaries()
    assert math.isnan(found["loss"]["mean"])
    assert found["up"]["mean"] == math.inf
