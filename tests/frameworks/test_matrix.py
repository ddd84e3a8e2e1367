"""Framework x (save, load, cross-framework load, in-place restore, exact resume), each with a real small training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import rows

ROOT = Path(__file__).parents[2]


@cache
def own_process(row: str) -> dict[str, str | None]:
    """Return cell -> None or what went wrong, of a row that needs a process of its own."""
    variables = {**os.environ, "KERAS_BACKEND": row.partition("-")[2], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, rows.__file__, row]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.parametrize("cell", rows.CELLS)
@pytest.mark.parametrize("row", rows.ROWS)
def test_cell(row: str, cell: str, tmp_path: Path) -> None:
    missing = rows.missing(rows.ROWS[row])
    if missing:
        pytest.skip(f"{row} x {cell}: {', '.join(missing)} not installed")
    if row.startswith("keras"):
        problem = own_process(row)[cell]
        assert problem is None, problem
    else:
        rows.try_cell(row, cell, tmp_path)


def test_every_cell_is_tried() -> None:
    assert {row.partition("-")[0] for row in rows.ROWS} >= {"numpy", "torch", "jax", "tensorflow", "keras", "flax"}
    assert tuple(rows.TRIALS) == rows.CELLS
