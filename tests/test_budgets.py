"""The budgets of the design: small files, short functions, few parameters, a short save path, a light import."""

from __future__ import annotations

import ast
import sys
from array import array
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest

import model_checkpoint
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

PACKAGE = Path(model_checkpoint.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
WIDE = {
    "__init__",
    "save_checkpoint",
    "load_checkpoint",
    "restore",
}  # public calls whose parameters the specification gives


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_functions_and_signatures_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            assert lines <= 40, f"{node.name} has a body of {lines} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            assert len(named) <= 7 or node.name in WIDE, f"{node.name} has {len(named)} parameters"


def test_a_plain_save_passes_through_few_files_and_calls(tracker: ExperimentTracker, tmp_path: Path) -> None:
    """At most 10 files of ours and 60 calls, counted on a warm save; comprehensions count where Python calls them."""
    manager = EnhancedCheckpointManager(tracker, str(tmp_path / "c"))
    state = {"weight": array("f", [1.0, 2.0]), "bias": array("f", [0.5])}
    manager.save_checkpoint(state, epoch=1, loss=0.5)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            calls[frame.f_code.co_filename] += 1

    sys.setprofile(count)
    try:
        manager.save_checkpoint(state, epoch=2, loss=0.25)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 10, calls
    assert 0 < sum(calls.values()) <= 60, calls
