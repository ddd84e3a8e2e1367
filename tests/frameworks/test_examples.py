"""The plain loops of ``examples/``: killed at any moment and run again, they end with the bits of an unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(example: str, folder: Path, until: int | None = None) -> list[str]:
    """Run an example in a folder and return its lines; with ``until``, kill it when there are as many checkpoints."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), "--steps", "24"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MODEL_CHECKPOINT_CAPTURE": "off"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=variables)
    while until is not None and process.poll() is None:
        if len(list(folder.glob("checkpoints/*/*/checkpoint.json"))) >= until:
            process.kill()
            break
        time.sleep(0.001)  # between two looks
    printed, _ = process.communicate(timeout=120)
    assert until is not None or process.returncode == 0
    return printed.splitlines()


@pytest.mark.parametrize("example", ["pytorch_loop", "jax_loop"])
def test_a_loop_that_is_killed_and_run_again_ends_as_an_unbroken_one(example: str, tmp_path: Path) -> None:
    pytest.importorskip(example.partition("_")[0].replace("pytorch", "torch"))
    pytest.importorskip("optax")
    unbroken = run(example, tmp_path / "unbroken")
    assert unbroken[0] == "at step 0"
    for until in (2, 7):  # the last may be published, and not committed
        folder = tmp_path / f"killed after {until}"
        run(example, folder, until)
        resumed = run(example, folder)
        assert resumed[0] != "at step 0"
        assert resumed[1] == unbroken[1]
