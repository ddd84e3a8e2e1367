"""The core needs nothing: one package in an empty environment, a light import, and states of the standard library."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow", "sqlalchemy", "safetensors", "zstandard", "ml_dtypes")

ROUND_TRIP = """
import json, sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

state = {
    "array": array("d", [1.5, -0.0, float("inf")]),
    "bytes": b"\\x00\\xff" * 1000,
    "bytearray": bytearray(b"abc"),
    "memoryview": memoryview(array("h", [1, -2, 3, 4])).cast("B").cast("h", (2, 2)),
    "numbers": [1, -2.5, 3 + 4j, 2**100, True, None],
    "strings": ("text", "\\u00fc\\u2603", ""),
    "nested": {"list": [[], [{}]], "tuple": ((),), 7: {(1, 2): "tuple key"}},
}
for backend_options in ({}, {"enable_compression": True}):
    with ExperimentTracker("bare", database_url="sqlite:///e.db", config={"lr": 0.1}) as tracker:
        manager = EnhancedCheckpointManager(tracker, "checkpoints", **backend_options)
        manager.save_checkpoint(state, epoch=1, loss=0.5)
        tracker.log_metric("loss", 0.5, step=1)
        loaded = manager.load_checkpoint(checkpoint_type="best_loss")["model_state_dict"]
        assert loaded == state, loaded
        assert repr(loaded["array"]) == repr(state["array"])
        assert loaded["memoryview"].shape == (2, 2) and loaded["memoryview"].format == "h"
        assert manager.verify_experiment_integrity()["verified"] == 1
        tracker.generate_report()
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment in which nothing but this package is installed."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build backend hatchling cannot be fetched: no package index is reachable")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_installing_brings_one_package(empty_environment: Path) -> None:
    listed = subprocess.run(
        [empty_environment, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    names = {package["name"] for package in json.loads(listed.stdout)} - {"pip", "setuptools", "wheel"}
    assert names == {"model-checkpoint"}


@pytest.mark.slow
def test_states_of_the_standard_library_round_trip_in_an_empty_environment(
    empty_environment: Path, tmp_path: Path
) -> None:
    done = subprocess.run([empty_environment, "-c", ROUND_TRIP], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & set(FRAMEWORKS)


@pytest.mark.slow
def test_a_missing_extra_is_named_with_the_command_that_installs_it(empty_environment: Path, tmp_path: Path) -> None:
    script = """
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
tracker = ExperimentTracker("bare", database_url="sqlite:///e.db")
try:
    EnhancedCheckpointManager(tracker, "c", storage_backend="pytorch").save_checkpoint({"n": 1})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([empty_environment, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "pip install 'model-checkpoint[torch]'" in done.stdout, done.stderr


def test_importing_takes_under_60_ms_and_imports_no_framework() -> None:
    """The median of seven fresh interpreters, each timing the import of every public name."""
    script = """
import json, sys, time
start = time.perf_counter()
import model_checkpoint
spent = time.perf_counter() - start
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, register_storage_backend
print(json.dumps([spent, sorted(sys.modules)]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment).stdout
        )
        for _ in range(7)
    ]
    assert statistics.median(spent for spent, _ in runs) < 0.060
    assert not set(runs[0][1]) & set(FRAMEWORKS)
