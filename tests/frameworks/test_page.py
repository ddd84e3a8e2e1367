"""Every Python block of the page on frameworks runs as it stands there, in a process and a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "frameworks.md"
TITLED = re.compile(r"^#+ ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = dict(TITLED.findall(PAGE.read_text(encoding="utf-8")))
OURS = re.compile(r"model_checkpoint|manager|tracker|resume")


def test_every_block_has_a_heading_of_its_own() -> None:
    assert len(BLOCKS) == PAGE.read_text(encoding="utf-8").count("```python")
    for name in ("PyTorch", "JAX", "Keras", "Lightning", "Accelerate", "Hugging Face's Trainer", "Optuna"):
        assert name in BLOCKS, name


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_runs(title: str, tmp_path: Path) -> None:
    for package in re.findall(r"^(?:import|from) (\w+)", BLOCKS[title], re.MULTILINE):
        if find_spec(package) is None:
            pytest.skip(f"{title}: {package} is not installed")
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[title])
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax", "MODEL_CHECKPOINT_CAPTURE": "off"}
    for _ in range(2):  # a script that is run again goes on, or finds that all is done
        done = subprocess.run(
            [sys.executable, script.name], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
