"""Keras on its three backends, each in a process of its own: training that is killed, and objects of all kinds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import Queries

pytest.importorskip("keras")
for needed in ("jax", "torch", "tensorflow"):
    pytest.importorskip(needed)

HERE = Path(__file__).parent


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def outcome(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["arrays", "dataset", "steps"])
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_training_that_is_killed_three_times_ends_with_the_bits_of_the_unbroken_one(
    tmp_path: Path, backend: str, form: str
) -> None:
    if (backend, form) == ("torch", "steps"):
        pytest.skip("PyTorch's backend knows no steps_per_execution")
    unbroken = outcome(run("keras_training.py", backend, tmp_path / "unbroken", 0, form))

    folder = tmp_path / "killed"
    # Calls at batches: in the first epoch, and after a resume that passes over what was trained, at the second batch
    # of a later epoch, and before anything new is saved.
    for kill_at in {"arrays": (4, 9, 5), "dataset": (3, 7, 6), "steps": (2, 3, 3)}[form]:
        killed = run("keras_training.py", backend, folder, kill_at, form)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    last = run("keras_training.py", backend, folder, 0, form)

    assert outcome(last) == unbroken
    assert "going on from checkpoint" in last.stderr
    with Queries(f"sqlite:///{folder}/experiments.db") as queries:
        (experiment,) = queries.search_experiments()
        points = queries.database.query("SELECT count(*) FROM checkpoints")
    assert experiment.status == "completed"
    assert points[0][0] > 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keras")


BACKENDS = ["torch", pytest.param("jax", marks=pytest.mark.slow), pytest.param("tensorflow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_of_all_kinds_are_restored_and_the_callback_keeps_its_word(folder: Path, backend: str) -> None:
    told = outcome(run("keras_checks.py", backend, folder))

    assert len(told) > 15
    failed = {name: text for name, text in told.items() if text is not None}
    assert not failed, "\n".join(failed.values())


@pytest.mark.slow
def test_what_one_backend_saved_another_one_restores(folder: Path) -> None:
    written = [name for name in ("torch", "jax", "tensorflow") if (folder / f"{name}.npz").exists()]
    assert written, "the test before this one leaves them"
    for backend in ("torch", "jax", "tensorflow"):
        done = run("keras_checks.py", backend, folder, ",".join(written))
        assert done.returncode == 0, done.stderr[-3000:]
