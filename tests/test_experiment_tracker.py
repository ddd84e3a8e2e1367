"""ExperimentTracker: what is logged comes back exactly, in order, from any process, and is never lost nor doubled."""

from __future__ import annotations

import enum
import gc
import math
import os
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import ExperimentTracker, Queries
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import (
    ConfigurationError,
    DatabaseError,
    ExperimentNotFoundError,
    ModelCheckpointError,
    UnsupportedValueError,
)

ROOT = Path(__file__).parents[1]
DEADLINE = 20.0  # seconds that anything may take before it counts as hung


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


@pytest.fixture
def run(url: str) -> Iterator[ExperimentTracker]:
    tracker = ExperimentTracker("run", database_url=url)
    yield tracker
    tracker.close()


def wait_until(condition: Callable[[], bool], deadline: float = DEADLINE) -> bool:
    """Poll ``condition``; other processes have no event that they could set for us."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def stored(url: str, experiment_id: str) -> list[tuple[str, float, int | None]]:
    """What another connection sees, without asking the tracker to flush first."""
    database = EnhancedDatabaseConnection(url)
    try:
        return [(name, value, step) for name, value, step, _ in database.metrics.points(experiment_id)]
    finally:
        database.close()


def experiments_in(url: str) -> int:
    path = url.removeprefix("sqlite:///")
    if not os.path.exists(path):
        return 0
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM experiments").fetchone()
    connection.close()
    return int(count)


def python(script: str, *arguments: str) -> str:
    """Run a script in a fresh interpreter and return what it printed; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- construction -----------------------------------------------------------------------------------------------


def test_the_experiment_id_is_a_uuid_and_every_run_has_its_own(url: str) -> None:
    with ExperimentTracker("a", database_url=url) as first, ExperimentTracker("a", database_url=url) as second:
        assert str(uuid.UUID(first.experiment_id)) == first.experiment_id
        assert first.experiment_id != second.experiment_id


def test_everything_given_at_construction_comes_back_from_another_connection(url: str) -> None:
    before = time.time()
    with ExperimentTracker(
        "resnet",
        project_name="images",
        tags=["baseline", "größe", 50],
        config={"lr": 0.001, "layers": [1, 2]},
        database_url=url,
        metadata={"host": "a"},
    ) as run:
        database = EnhancedDatabaseConnection(url)
        found = database.experiments.get(run.experiment_id)
        database.close()
    assert found is not None
    assert (found.name, found.project, found.parent_id, found.status) == ("resnet", "images", None, "running")
    assert found.tags == ("baseline", "größe", 50)
    assert found.config == {"lr": 0.001, "layers": [1, 2]}
    assert found.metadata == {"host": "a"}
    assert before <= found.created_at <= time.time()
    assert found.ended_at is None


def test_the_positional_order_of_the_arguments_is_name_project_tags_config_url(url: str) -> None:
    with ExperimentTracker("n", "p", ["t"], {"c": 1}, url) as run:
        found = run.record
    assert (found.name, found.project, found.tags, found.config) == ("n", "p", ("t",), {"c": 1})


def test_without_a_url_the_database_is_experiments_db_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ExperimentTracker("n").close()
    assert experiments_in(f"sqlite:///{tmp_path}/experiments.db") == 1


JSON_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**53 + 1,
    -(2**200),
    0.1,
    5e-324,
    1.7976931348623157e308,
    -0.0,
    math.inf,
    -math.inf,
    "",
    "naïve ☃ 🎉",
    'quotes " and \\ and \n\t\x1f\x7f',
    "nan",
    [],
    {},
    [[], [[1, [2.5, None]]], {"a": [True]}],
    {"": 1, " ": 2, "a.b": 3, "a": {"b": 4}},
    {"$float": "nan"},
    {"$float": math.inf, "$$": {"$": 1}, "$x": [{"$float": 1}]},
    {"deep": {"er": {"and": {"deeper": [{"still": "here"}]}}}},
]


@pytest.mark.parametrize("value", JSON_VALUES, ids=lambda value: repr(value)[:30])
def test_any_json_value_comes_back_exactly(url: str, value: Any) -> None:
    given = {"value": value}
    with ExperimentTracker("n", None, [value], given, url, metadata=given) as run:
        found = run.record
    for back in (found.config["value"], found.metadata["value"], found.tags[0]):
        assert back == value
        assert type(back) is type(value)
        if isinstance(value, float):
            assert struct.pack("d", back) == struct.pack("d", value)


def test_nan_in_the_config_comes_back_as_nan_at_every_level(url: str) -> None:
    with ExperimentTracker("n", database_url=url, config={"a": math.nan, "b": [{"c": math.nan}]}) as run:
        config = run.record.config
    assert math.isnan(config["a"])
    assert math.isnan(config["b"][0]["c"])


def test_tuples_come_back_as_lists_and_the_callers_config_is_left_alone(url: str) -> None:
    config = {"betas": (0.9, 0.999), "nested": {"shape": (1, (2, 3))}}
    with ExperimentTracker("n", database_url=url, config=config) as run:
        config["betas"] = "changed later"
        assert run.record.config == {"betas": [0.9, 0.999], "nested": {"shape": [1, [2, 3]]}}
    assert config["nested"] == {"shape": (1, (2, 3))}


def test_enumerations_of_text_and_numbers_are_stored_as_their_values(url: str) -> None:
    class Mode(str, enum.Enum):
        FAST = "fast"

    class Level(enum.IntEnum):
        HIGH = 3

    with ExperimentTracker("n", database_url=url, config={"mode": Mode.FAST, "level": Level.HIGH}) as run:
        assert run.record.config == {"mode": "fast", "level": 3}


def test_numpy_scalars_in_config_tags_and_metadata_become_exact_python_numbers(url: str) -> None:
    np = pytest.importorskip("numpy")
    config = {
        "f64": np.float64(0.1),
        "f32": np.float32(0.1),
        "f16": np.float16(0.5),
        "i64": np.int64(2**62),
        "u64": np.uint64(2**64 - 1),
        "yes": np.bool_(True),
        "text": np.str_("abc"),
        "zero_d": np.array(7),
        "nan": np.float32("nan"),
    }
    with ExperimentTracker("n", database_url=url, config=config, tags=[np.int8(3)], metadata={"m": np.int16(4)}) as run:
        found = run.record
    assert math.isnan(found.config["nan"])
    assert {name: value for name, value in found.config.items() if name != "nan"} == {
        "f64": 0.1,
        "f32": float(np.float32(0.1)),
        "f16": 0.5,
        "i64": 2**62,
        "u64": 2**64 - 1,
        "yes": True,
        "text": "abc",
        "zero_d": 7,
    }
    assert found.config["yes"] is True
    assert (found.tags, found.metadata) == ((3,), {"m": 4})


def test_torch_scalars_in_config_become_exact_python_numbers(url: str) -> None:
    torch = pytest.importorskip("torch")
    config = {
        "f32": torch.tensor(0.1),
        "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
        "i64": torch.tensor(2**62),
        "yes": torch.tensor(True),
        "grad": torch.tensor(2.0, requires_grad=True),
    }
    with ExperimentTracker("n", database_url=url, config=config) as run:
        found = run.record.config
    assert found == {"f32": torch.tensor(0.1).item(), "bf16": 0.5, "i64": 2**62, "yes": True, "grad": 2.0}


def _cycle() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["self"] = [loop]
    return loop


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("object in a list", {"config": {"optimizer": {"betas": [0.9, object()]}}}, "config.optimizer.betas[1]"),
    ("object in a tuple", {"config": {"a": (1, 2, object())}}, "config.a[2]"),
    ("set", {"config": {"seeds": {1, 2}}}, "config.seeds"),
    ("bytes", {"config": {"raw": b"abc"}}, "config.raw"),
    ("complex", {"config": {"z": 1j}}, "config.z"),
    ("function", {"config": {"f": len}}, "config.f"),
    ("class", {"config": {"c": int}}, "config.c"),
    ("number as key", {"config": {"a": {1: "x"}}}, "config.a[1]"),
    ("None as key", {"config": {None: "x"}}, "config[None]"),
    ("tuple as key", {"config": {(1, 2): "x"}}, "config[(1, 2)]"),
    ("half a surrogate pair", {"config": {"a": "\ud800"}}, "config.a"),
    ("half a surrogate pair in a key", {"config": {"\udfff": 1}}, "config["),
    ("NUL", {"config": {"a": ["ok", "a\0b"]}}, "config.a[1]"),
    ("cycle", {"config": _cycle()}, "config"),
    ("object in a tag", {"tags": ["ok", object()]}, "tags[1]"),
    ("surrogate in a tag", {"tags": ["\ud800"]}, "tags[0]"),
    ("object in metadata", {"metadata": {"a": [{"b": object()}]}}, "metadata.a[0].b"),
]


@pytest.mark.parametrize(("given", "path"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_stored_is_a_type_error_that_names_its_path_and_stores_nothing(
    url: str, given: dict[str, Any], path: str
) -> None:
    with pytest.raises(TypeError) as caught:
        ExperimentTracker("n", database_url=url, **given)
    assert isinstance(caught.value, UnsupportedValueError)
    assert str(caught.value).startswith(path)
    assert caught.value.path.startswith(path)
    assert experiments_in(url) == 0


def test_an_array_in_the_config_is_refused_by_its_path(url: str) -> None:
    np = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"^config\.weights\[0\]"):
        ExperimentTracker("n", database_url=url, config={"weights": [np.zeros(2)]})
    assert experiments_in(url) == 0


def test_a_tensor_in_the_config_is_refused_by_its_path(url: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^config\.weights"):
        ExperimentTracker("n", database_url=url, config={"weights": torch.zeros(2, 2)})
    assert experiments_in(url) == 0


def test_an_integer_too_long_for_json_is_refused_by_its_path(url: str) -> None:
    with pytest.raises(TypeError, match=r"^config\.huge"):
        ExperimentTracker("n", database_url=url, config={"huge": 10**5000})
    assert experiments_in(url) == 0


@pytest.mark.parametrize("name", ["a\0b", "\ud800", 5, None], ids=repr)
def test_names_that_no_database_stores_are_refused(url: str, name: Any) -> None:
    with pytest.raises(TypeError, match="experiment_name"):
        ExperimentTracker(name, database_url=url)
    assert experiments_in(url) == 0


@pytest.mark.parametrize("config", [[1, 2], "lr=1", 5])
def test_a_config_that_is_no_mapping_is_refused(url: str, config: Any) -> None:
    with pytest.raises(ConfigurationError, match="config must be a dict"):
        ExperimentTracker("n", database_url=url, config=config)
    assert experiments_in(url) == 0


@pytest.mark.parametrize("depth", [50, 200, 400, 700, 2000])
def test_deep_config_is_either_stored_exactly_or_refused_by_type(url: str, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    try:
        run = ExperimentTracker("n", database_url=url, config={"deep": value})
    except UnsupportedValueError:
        assert depth > 50
        assert experiments_in(url) == 0
        return
    assert run.record.config == {"deep": value}
    run.close()


# --- metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0.5), (3, 3.0), (True, 1.0), (False, 0.0), (2**53, 2.0**53), (5e-324, 5e-324), (-1e308, -1e308)],
)
def test_a_metric_comes_back_as_the_float_that_it_is(run: ExperimentTracker, value: Any, expected: float) -> None:
    run.log_metric("m", value, step=7)
    (point,) = run.get_metrics()
    assert (point["metric_name"], point["metric_value"], point["step"]) == ("m", expected, 7)
    assert type(point["metric_value"]) is float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 0.0])
def test_special_floats_keep_their_kind_and_sign(run: ExperimentTracker, value: float) -> None:
    run.log_metric("m", value)
    (point,) = run.get_metrics()
    assert repr(point["metric_value"]) == repr(value)
    assert math.copysign(1, point["metric_value"]) == math.copysign(1, value)


def test_numpy_scalars_are_metrics(run: ExperimentTracker) -> None:
    np = pytest.importorskip("numpy")
    given = {"a": np.float32(0.1), "b": np.float64(0.1), "c": np.int64(3), "d": np.bool_(True), "e": np.array(2.5)}
    run.log_metrics(given, step=np.int64(4))
    assert [(p["metric_name"], p["metric_value"], p["step"]) for p in run.get_metrics()] == [
        ("a", float(np.float32(0.1)), 4),
        ("b", 0.1, 4),
        ("c", 3.0, 4),
        ("d", 1.0, 4),
        ("e", 2.5, 4),
    ]


def test_torch_scalars_are_metrics(run: ExperimentTracker) -> None:
    torch = pytest.importorskip("torch")
    run.log_metrics({"a": torch.tensor(0.25, requires_grad=True), "b": torch.tensor(3), "c": torch.tensor(math.nan)})
    first, second, third = (p["metric_value"] for p in run.get_metrics())
    assert (first, second) == (0.25, 3.0)
    assert math.isnan(third)


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 1j, object(), 10**400, {"a": 1}], ids=lambda v: repr(v)[:10])
def test_what_is_no_real_number_is_refused_by_name(run: ExperimentTracker, value: Any) -> None:
    with pytest.raises(TypeError, match=r"metrics\.m"):
        run.log_metric("m", value)
    assert run.get_metrics() == []


def test_an_array_is_no_metric(run: ExperimentTracker) -> None:
    np = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"metrics\.m.*mean"):
        run.log_metric("m", np.zeros(3))
    assert run.get_metrics() == []


def test_log_metrics_stores_all_or_none(run: ExperimentTracker) -> None:
    with pytest.raises(TypeError):
        run.log_metrics({"good": 1.0, "bad": "x", "late": 2.0})
    run.log_metric("after", 1.0)
    assert [p["metric_name"] for p in run.get_metrics()] == ["after"]


@pytest.mark.parametrize("name", [5, None, "a\0b", "\ud800"], ids=repr)
def test_a_name_that_cannot_be_stored_is_refused_and_what_follows_is_stored(run: ExperimentTracker, name: Any) -> None:
    with pytest.raises(TypeError):
        run.log_metric(name, 1.0)
    run.log_metric("fine", 2.0)
    assert [(p["metric_name"], p["metric_value"]) for p in run.get_metrics()] == [("fine", 2.0)]


@pytest.mark.parametrize("step", [1.5, "1", 2**63, -(2**63) - 1], ids=repr)
def test_a_step_that_cannot_be_stored_is_refused_and_what_follows_is_stored(run: ExperimentTracker, step: Any) -> None:
    with pytest.raises((TypeError, ModelCheckpointError, OverflowError)):
        run.log_metric("m", 1.0, step=step)
    run.log_metric("fine", 2.0, step=2**63 - 1)
    assert [(p["metric_name"], p["step"]) for p in run.get_metrics()] == [("fine", 2**63 - 1)]


def test_points_come_back_in_the_order_logged_over_several_metrics(run: ExperimentTracker) -> None:
    expected = []
    for i in range(200):  # steps go down and repeat: the order is that of logging, not of steps
        run.log_metrics({"b": i, "a": -i}, step=100 - i // 2)
        expected += [("b", float(i), 100 - i // 2), ("a", float(-i), 100 - i // 2)]
        if i % 60 == 0:
            run.flush()
    points = run.get_metrics()
    assert [(p["metric_name"], p["metric_value"], p["step"]) for p in points] == expected
    stamps = [p["timestamp"] for p in points]
    assert stamps == sorted(stamps)


def test_get_metrics_filters_by_name(run: ExperimentTracker) -> None:
    for i in range(5):
        run.log_metrics({"loss": i, "loss2": -i, "Loss": 10 + i})
    assert [p["metric_value"] for p in run.get_metrics("loss")] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [p["metric_value"] for p in run.get_metrics("Loss")] == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert run.get_metrics("los%") == []
    assert run.get_metrics("' OR 1=1 --") == []


def test_a_point_has_exactly_the_four_documented_keys_and_the_time_of_logging(run: ExperimentTracker) -> None:
    before = time.time()
    run.log_metric("m", 1.0)
    after = time.time()
    (point,) = run.get_metrics()
    assert set(point) == {"metric_name", "metric_value", "step", "timestamp"}
    assert before <= point["timestamp"] <= after  # of the call, not of the write
    assert point["step"] is None


def test_two_runs_in_one_database_do_not_see_each_others_points(url: str) -> None:
    with ExperimentTracker("a", database_url=url) as a, ExperimentTracker("b", database_url=url) as b:
        a.log_metric("m", 1.0)
        b.log_metric("m", 2.0)
        assert [p["metric_value"] for p in a.get_metrics()] == [1.0]
        assert [p["metric_value"] for p in b.get_metrics("m")] == [2.0]


def test_many_threads_log_to_one_tracker_and_nothing_is_lost(run: ExperimentTracker) -> None:
    start = threading.Barrier(8)

    def log(worker: int) -> None:
        start.wait(DEADLINE)
        for i in range(300):
            run.log_metric(f"w{worker}", i, step=i)
            if i % 100 == 50:
                run.flush()

    threads = [threading.Thread(target=log, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(run.get_metrics()) == 2400
    for worker in range(8):
        assert [p["step"] for p in run.get_metrics(f"w{worker}")] == list(range(300))


LOG = """
import sys
from model_checkpoint import ExperimentTracker
experiment_id, url, worker = sys.argv[1:]
tracker = ExperimentTracker.resume(experiment_id, url)
for i in range(200):
    tracker.log_metric(f"w{worker}", i, step=i)
    if i % 50 == 0:
        tracker.flush()
tracker.close()
"""


def test_three_processes_log_to_one_experiment_and_nothing_is_lost(run: ExperimentTracker, url: str) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", LOG, run.experiment_id, url, str(worker)], cwd=ROOT)
        for worker in range(2)
    ]
    for i in range(200):
        run.log_metric("own", i, step=i)
        if i % 20 == 0:
            run.flush()
    assert [worker.wait(DEADLINE) for worker in workers] == [0, 0]
    assert len(run.get_metrics()) == 600
    for name in ("w0", "w1", "own"):
        assert [p["step"] for p in run.get_metrics(name)] == list(range(200))


# --- buffering --------------------------------------------------------------------------------------------------


def test_a_buffered_point_reaches_other_connections_without_a_flush(run: ExperimentTracker, url: str) -> None:
    run.log_metric("m", 1.0, step=3)
    assert wait_until(lambda: stored(url, run.experiment_id) == [("m", 1.0, 3)])
    run.log_metric("m", 2.0, step=4)  # the writer goes on after its first batch
    assert wait_until(lambda: len(stored(url, run.experiment_id)) == 2)


def test_flush_makes_points_visible_to_another_process_at_once(run: ExperimentTracker, url: str) -> None:
    run.log_metrics({"a": 1.0, "b": math.nan}, step=1)
    run.flush()
    seen = python(
        "import sys\n"
        "from model_checkpoint.database import EnhancedDatabaseConnection\n"
        "for point in EnhancedDatabaseConnection(sys.argv[2]).metrics.points(sys.argv[1]): print(point[:3])",
        run.experiment_id,
        url,
    )
    assert seen.splitlines() == ["('a', 1.0, 1)", "('b', nan, 1)"]


def test_a_full_buffer_is_written_before_its_age(url: str) -> None:
    with ExperimentTracker("n", database_url=url) as run:
        for i in range(25):
            run.log_metrics({f"m{j}": i for j in range(1000)})
        assert wait_until(lambda: len(stored(url, run.experiment_id)) == 25_000)


def test_a_process_that_ends_without_close_loses_no_point(url: str) -> None:
    experiment_id = python(
        "import sys\n"
        "from model_checkpoint import ExperimentTracker\n"
        "run = ExperimentTracker('n', database_url=sys.argv[1])\n"
        "print(run.experiment_id)\n"
        "for i in range(5000): run.log_metric('m', i, step=i)",
        url,
    ).strip()
    assert [step for _, _, step in stored(url, experiment_id)] == list(range(5000))


def test_a_process_that_dies_of_an_exception_loses_no_point(url: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from model_checkpoint import ExperimentTracker\n"
            "run = ExperimentTracker('n', database_url=sys.argv[1])\n"
            "print(run.experiment_id, flush=True)\n"
            "for i in range(100): run.log_metric('m', i, step=i)\n"
            "raise RuntimeError('training diverged')",
            url,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert len(stored(url, done.stdout.strip())) == 100


FORK = """
import os, sys
from model_checkpoint import ExperimentTracker
run = ExperimentTracker("n", database_url=sys.argv[1])
print(run.experiment_id, flush=True)
for i in range(50):
    run.log_metric("parent", i, step=i)
child = os.fork()
if child == 0:
    for i in range(int(sys.argv[2])):
        run.log_metric("child", i, step=i)
    if sys.argv[3] == "hard":
        run.flush()
        os._exit(0)
    sys.exit(0)  # runs the exit handlers, as a worker of os.fork() does
for i in range(50, 100):
    run.log_metric("parent", i, step=i)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""


@pytest.mark.parametrize("points", [0, 30])
@pytest.mark.parametrize("ending", ["hard", "soft"])
def test_a_forked_child_neither_doubles_nor_loses_the_parents_points(url: str, points: int, ending: str) -> None:
    experiment_id = python(FORK, url, str(points), ending).strip()
    found = stored(url, experiment_id)
    assert [step for name, _, step in found if name == "parent"] == list(range(100))
    assert [step for name, _, step in found if name == "child"] == list(range(points))


FORK_WHILE_WRITING = """
import os, sys, threading
from model_checkpoint import ExperimentTracker

runs = [ExperimentTracker("n", database_url=sys.argv[1]) for _ in range(8)]
stop, written = threading.Event(), [threading.Event() for _ in runs]

def log(number):
    run = runs[number]
    while not stop.is_set():
        run.log_metric("m", 1.0)
        run.flush()
        written[number].set()
        stop.wait(0.001)  # so that the fork has its turn

threads = [threading.Thread(target=log, args=(number,)) for number in range(len(runs))]
for thread in threads:
    thread.start()
for event in written:
    event.wait()
for _ in range(40):
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print("done")
"""


def test_forking_while_points_are_written_never_hangs(url: str) -> None:
    """A fork waits for what is being written: it must take the locks of the run and of its database in one order."""
    assert python(FORK_WHILE_WRITING, url).strip() == "done"


def test_points_of_a_locked_database_wait_in_a_file_and_are_stored_once_by_a_later_flush(
    run: ExperimentTracker, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The pool hands out its one idle connection: from here on it gives up on a lock after 20 ms.
    with run.database.transaction() as connection:
        connection.execute("PRAGMA busy_timeout=20")
    observer = EnhancedDatabaseConnection(url)
    blocker = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        run.log_metrics({"a": 1.0, "b": 2.0}, step=1)
        run.flush()
        run.log_metric("a", 3.0, step=2)
        run.flush()
        assert observer.metrics.points(run.experiment_id) == []
        (spool,) = tmp_path.glob("runs.db-spool/*")
        assert [str(spool) in record.message for record in caplog.records] == [True]  # warned once
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
        observer.close()
    run.flush()
    run.flush()
    assert stored(url, run.experiment_id) == [("a", 1.0, 1), ("b", 2.0, 1), ("a", 3.0, 2)]
    assert not spool.exists()


def test_close_that_fails_keeps_the_points_and_can_be_called_again(url: str) -> None:
    run = ExperimentTracker("n", database_url=url)
    with run.database.transaction() as connection:
        connection.execute("PRAGMA busy_timeout=20")
    blocker = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    run.log_metric("m", 1.0)
    with pytest.raises(DatabaseError):
        run.close()
    blocker.execute("ROLLBACK")
    blocker.close()
    run.close()
    database = EnhancedDatabaseConnection(url)
    found = database.experiments.get(run.experiment_id)
    database.close()
    assert found is not None
    assert found.status == "completed"
    assert stored(url, run.experiment_id) == [("m", 1.0, None)]


FULL_DISK = """
import os, resource, sys
from model_checkpoint import ExperimentTracker
from model_checkpoint.errors import DatabaseError
path = sys.argv[1]
run = ExperimentTracker("n", database_url="sqlite:///" + path)
run.log_metric("m", -1.0)
run.flush()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # for the database and for the file that would take its place
for i in range(5000):
    run.log_metric("m", i, step=i)
for _ in range(2):
    try:
        run.flush()
    except DatabaseError as error:
        print("refused", path in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
run.flush()
print([p["step"] for p in run.get_metrics()] == [None, *range(5000)])
run.close()
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no RLIMIT_FSIZE here")
def test_points_survive_a_full_disk_and_are_stored_once_when_there_is_space(tmp_path: Path) -> None:
    path = str(tmp_path / "runs.db")
    assert python(FULL_DISK, path).split() == ["refused", "True", "refused", "True", "True"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT SUM(points) FROM blocks").fetchone() == (5001,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


# --- config, tags, status ---------------------------------------------------------------------------------------


def test_log_hyperparameters_merges_into_the_config(url: str) -> None:
    with ExperimentTracker("n", database_url=url, config={"lr": 0.1, "optimizer": {"name": "adam"}}) as run:
        run.log_hyperparameters({"batch_size": 32, "lr": 0.01})
        run.log_hyperparameters({"optimizer": {"beta": 0.9}, "nan": math.inf})
        expected = {"lr": 0.01, "optimizer": {"beta": 0.9}, "batch_size": 32, "nan": math.inf}
        assert run.record.config == expected


def test_log_hyperparameters_refuses_by_path_and_changes_nothing(url: str) -> None:
    with ExperimentTracker("n", database_url=url, config={"lr": 0.1}) as run:
        with pytest.raises(TypeError, match=r"^config\.a\[0\]"):
            run.log_hyperparameters({"lr": 5, "a": [object()]})
        assert run.record.config == {"lr": 0.1}


def test_hyperparameters_logged_by_many_threads_are_all_there(run: ExperimentTracker) -> None:
    threads = [threading.Thread(target=run.log_hyperparameters, args=({f"p{i}": i},)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert run.record.config == {f"p{i}": i for i in range(12)}


def test_add_tags_is_idempotent_and_keeps_the_first_order(url: str) -> None:
    with ExperimentTracker("n", database_url=url, tags=["b", "a"]) as run:
        run.add_tags(["c", "a", "c"])
        run.add_tags("d")
        run.add_tags(["b", "d"])
        run.add_tags([])
        assert run.record.tags == ("b", "a", "c", "d")


def test_tags_that_only_look_alike_are_different(run: ExperimentTracker) -> None:
    run.add_tags([1, "1", True, 1.0])
    run.add_tags([True, "1", 1])
    found = run.record.tags
    assert [(type(tag), tag) for tag in found] == [(int, 1), (str, "1"), (bool, True), (float, 1.0)]


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted"])
def test_set_status_is_stored_with_the_time_of_the_end(run: ExperimentTracker, status: str) -> None:
    before = time.time()
    run.set_status(status)
    found = run.record
    assert found.status == status
    assert found.ended_at is not None
    assert before <= found.ended_at <= time.time()
    run.set_status("running")
    assert (run.record.status, run.record.ended_at) == ("running", None)


@pytest.mark.parametrize("status", ["done", "", "Running", None, 3])
def test_an_unknown_status_is_refused_with_those_that_there_are(run: ExperimentTracker, status: Any) -> None:
    with pytest.raises(ValueError, match="running, completed, failed, interrupted"):
        run.set_status(status)
    assert run.record.status == "running"


def status_of(url: str, experiment_id: str) -> str:
    database = EnhancedDatabaseConnection(url)
    try:
        found = database.experiments.get(experiment_id)
        assert found is not None
        return found.status
    finally:
        database.close()


def test_the_context_manager_ends_as_completed_with_every_point_stored(url: str) -> None:
    with ExperimentTracker("n", database_url=url) as run:
        run.log_metric("m", 1.0)
    assert status_of(url, run.experiment_id) == "completed"
    assert stored(url, run.experiment_id) == [("m", 1.0, None)]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(RuntimeError, "failed"), (SystemExit, "failed"), (KeyboardInterrupt, "interrupted")],
)
def test_the_context_manager_notes_how_it_ended_and_lets_the_exception_through(
    url: str, raised: type[BaseException], status: str
) -> None:
    run = ExperimentTracker("n", database_url=url)

    def train() -> None:
        with run:
            run.log_metric("m", 1.0)
            raise raised("stop")

    with pytest.raises(raised, match="stop"):
        train()
    assert status_of(url, run.experiment_id) == status
    assert stored(url, run.experiment_id) == [("m", 1.0, None)]


def test_close_takes_a_status_and_a_second_close_changes_nothing(url: str) -> None:
    run = ExperimentTracker("n", database_url=url)
    run.close("interrupted")
    run.close("completed")
    assert status_of(url, run.experiment_id) == "interrupted"


def test_close_with_an_unknown_status_is_refused_and_the_tracker_goes_on(run: ExperimentTracker) -> None:
    with pytest.raises(ValueError, match="finished"):
        run.close("finished")
    run.log_metric("m", 1.0)
    assert len(run.get_metrics()) == 1


def test_logging_after_close_is_an_error_that_says_what_to_do(url: str) -> None:
    run = ExperimentTracker("my run", database_url=url)
    run.close()
    for call in (lambda: run.log_metric("m", 1.0), lambda: run.log_metrics({"m": 1.0})):
        with pytest.raises(RuntimeError, match=r"'my run' was closed; ExperimentTracker\.resume"):
            call()
    assert stored(url, run.experiment_id) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.set_status("failed"),
        lambda run: run.add_tags(["x"]),
        lambda run: run.log_hyperparameters({"x": 1}),
    ],
    ids=["set_status", "add_tags", "log_hyperparameters"],
)
def test_other_changes_after_close_are_clear_errors_too(url: str, call: Callable[[ExperimentTracker], object]) -> None:
    run = ExperimentTracker("n", database_url=url)
    run.close()
    with pytest.raises(DatabaseError, match="closed"):
        call(run)
    assert status_of(url, run.experiment_id) == "completed"


# --- resume and hierarchy ---------------------------------------------------------------------------------------


def test_resume_goes_on_behind_the_points_that_there_are(url: str) -> None:
    with ExperimentTracker("n", "p", tags=["t"], config={"lr": 1}, database_url=url) as run:
        run.log_metrics({"a": 1.0, "b": 2.0}, step=1)
    assert status_of(url, run.experiment_id) == "completed"
    with ExperimentTracker.resume(run.experiment_id, url) as again:
        assert (again.experiment_id, again.experiment_name, again.project_name) == (run.experiment_id, "n", "p")
        assert (again.record.status, again.record.ended_at) == ("running", None)
        again.log_metrics({"a": 3.0, "c": 4.0}, step=0)
        again.add_tags(["u"])
        assert [(p["metric_name"], p["metric_value"]) for p in again.get_metrics()] == [
            ("a", 1.0),
            ("b", 2.0),
            ("a", 3.0),
            ("c", 4.0),
        ]
        assert (again.record.tags, again.record.config) == (("t", "u"), {"lr": 1})
    assert status_of(url, run.experiment_id) == "completed"
    assert experiments_in(url) == 1


def test_resume_of_an_unknown_experiment_is_a_value_error_that_names_it(run: ExperimentTracker, url: str) -> None:
    unknown = str(uuid.uuid4())
    with pytest.raises(ValueError, match=unknown) as caught:
        ExperimentTracker.resume(unknown, url)
    assert isinstance(caught.value, ExperimentNotFoundError)
    assert "runs.db" in str(caught.value)


def test_a_parent_is_given_as_a_tracker_or_an_id(url: str) -> None:
    with ExperimentTracker("sweep", database_url=url) as parent:
        with ExperimentTracker("a", database_url=url, parent=parent) as child:
            assert child.record.parent_id == parent.experiment_id
        with ExperimentTracker("b", database_url=url, parent=child.experiment_id) as grandchild:
            assert grandchild.record.parent_id == child.experiment_id
        assert parent.record.parent_id is None


def test_an_unknown_parent_is_refused_and_nothing_is_stored(url: str) -> None:
    unknown = str(uuid.uuid4())
    with pytest.raises(ExperimentNotFoundError, match=unknown):
        ExperimentTracker("n", database_url=url, parent=unknown)
    assert experiments_in(url) == 0


def test_repr_names_the_run(run: ExperimentTracker) -> None:
    assert "run" in repr(run)
    assert run.experiment_id in repr(run)


def test_a_tracker_on_memory_works_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ExperimentTracker("n", database_url="sqlite:///:memory:") as run:
        for i in range(10):
            run.log_metric("m", i)
        assert len(run.get_metrics()) == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (None, "completed"), (3, "failed"), ("no", "failed")])
def test_a_block_that_ends_in_an_exit_ends_as_the_exit_says(code: object, status: str) -> None:
    outer = ExperimentTracker("outer", database_url="sqlite:///:memory:")
    with pytest.raises(SystemExit), outer.child("run") as run:
        sys.exit(code)  # type: ignore[arg-type]
    assert run.record.status == status
    outer.close()


LEFT_OPEN = """
import code, multiprocessing, os, sys
from model_checkpoint import ExperimentTracker
from model_checkpoint.errors import Preempted

def local():
    run = ExperimentTracker("left", database_url=sys.argv[1])
    run.child("child").log_metric("loss", 1.0)

def work(run_id):
    global run
    run = ExperimentTracker.resume(run_id, sys.argv[1])
    run.log_metric("loss", 1.0)
    run.flush()
    sys.exit(0)

if __name__ == "__main__":
    if sys.argv[2] == "collected":
        sys.exit(local())
    run = ExperimentTracker("left", database_url=sys.argv[1])
    child = run.child("child")
    if sys.argv[2] == "spawned":
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(run.experiment_id,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        os._exit(0)
    if sys.argv[2].startswith("forked"):
        pid = os.fork()
        if pid == 0:
            if sys.argv[2] == "forked, and dropped there":
                del run, child
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        os._exit(0)
    if sys.argv[2] == "told":
        run.set_status("interrupted")
    elif sys.argv[2] == "typed below a prompt":
        code.InteractiveConsole().runsource("1 / 0")
    elif sys.argv[2] == "preempted":
        raise Preempted(143)
    elif sys.argv[2] not in ("ends", "second rank"):
        if sys.argv[2] == "worker ended":
            ExperimentTracker.resume(run.experiment_id, sys.argv[1]).close()
        raise {"stopped": KeyboardInterrupt}.get(sys.argv[2], RuntimeError)("no")
"""


@pytest.mark.parametrize(
    ("how", "status", "of_child"),
    [
        ("ends", "completed", "completed"),
        ("raises", "failed", "failed"),
        ("stopped", "interrupted", "interrupted"),
        ("told", "interrupted", "completed"),
        ("collected", "completed", "completed"),
        ("typed below a prompt", "completed", "completed"),
        ("preempted", "interrupted", "interrupted"),
        ("worker ended", "failed", "failed"),
        ("second rank", "running", "running"),
        ("spawned", "running", "running"),
        ("forked", "running", "running"),
        ("forked, and dropped there", "running", "running"),
    ],
)
def test_a_run_that_nobody_closed_ends_with_its_process(tmp_path: Path, how: str, status: str, of_child: str) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    (tmp_path / "train.py").write_text(LEFT_OPEN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "1" if how == "second rank" else "0"}
    subprocess.run([sys.executable, tmp_path / "train.py", url, how], env=environment, timeout=DEADLINE, check=False)
    with Queries(url) as queries:
        found = {record.name: record for record in queries.search_experiments()}
    assert (found["left"].status, found["child"].status) == (status, of_child)
    assert (found["left"].ended_at is None) == (status == "running")


def test_what_would_wait_for_the_transaction_that_it_is_in_is_refused(run: ExperimentTracker) -> None:
    run.log_metric("loss", 1.0)
    with run.database.transaction(durable=True):
        run.log_metric("loss", 2.0)
        with pytest.raises(DatabaseError, match="inside a transaction; leave it"):
            run.flush()
    assert [point["metric_value"] for point in run.get_metrics("loss")] == [1.0, 2.0]


def test_an_error_that_somebody_typed_does_not_end_a_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    typed = (
        f"from model_checkpoint import ExperimentTracker\nrun = ExperimentTracker('r', database_url='{url}')\n1 / 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-i"], input=typed, cwd=ROOT, text=True, capture_output=True, timeout=DEADLINE
    )
    assert "ZeroDivisionError" in done.stderr
    with Queries(url) as queries:
        assert [record.status for record in queries.search_experiments()] == ["completed"]


def test_a_child_keeps_the_connection_of_its_parent(tmp_path: Path) -> None:
    child = ExperimentTracker("parent", database_url=f"sqlite:///{tmp_path}/runs.db").child("child")
    gc.collect()
    child.log_metric("loss", 0.5)
    child.close()
    with ExperimentTracker.resume(child.experiment_id, f"sqlite:///{tmp_path}/runs.db") as child:
        assert [point["metric_value"] for point in child.get_metrics()] == [0.5]


def test_what_is_added_to_a_run_that_is_gone_is_an_error_that_names_it() -> None:
    run = ExperimentTracker("run", database_url="sqlite:///:memory:")
    with run.database.transaction() as connection:
        for table in ("tags", "parameters", "experiments"):
            column = "id" if table == "experiments" else "experiment_id"
            connection.execute(f"DELETE FROM {table} WHERE {column} = :id", {"id": run.experiment_id})
    for change in (run.log_hyperparameters, run.update_metadata):
        with pytest.raises(ExperimentNotFoundError, match=run.experiment_id):
            change({"a": 1})
    run.close()


def test_a_forked_child_counts_its_own_work_only(tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db")
    run.log_arrays("loss", range(1000))
    assert run.get_performance_statistics()["buffered_points"] in (0, 1000)
    run.flush()
    assert run.get_performance_statistics()["points"] == 1000
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(int("points" in run.get_performance_statistics()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run.close()


def test_a_tracker_that_was_closed_can_be_flushed_and_refuses_to_read(tmp_path: Path) -> None:
    run = ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db")
    run.log_metric("loss", 0.5)
    run.close()
    asked = threading.Thread(target=run.flush, daemon=True)
    asked.start()
    asked.join(60)
    assert not asked.is_alive()
    with pytest.raises(DatabaseError, match="closed"):
        run.get_metrics()
