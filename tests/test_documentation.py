"""Every Python block of the documentation runs, word for word, and everything it names exists."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint.checkpoint import storage

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SPECIFICATION = ROOT / "docs" / "specification.md"
FRAMEWORKS = ROOT / "docs" / "frameworks.md"  # its blocks have tests of their own, in tests/frameworks
DOCUMENTS = [README, *sorted({*(ROOT / "docs").glob("*.md")} - {FRAMEWORKS})]
PAGES = [*DOCUMENTS, FRAMEWORKS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NEEDS_TORCH = re.compile(r"\bimport torch\b|storage_backend=\"pytorch\"")

Namespace = dict[str, Any]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path) -> list[tuple[int, str]]:
    """Return the number of the line before each Python block, and the block."""
    text = document.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


def run(document: Path, block: tuple[int, str], namespace: Namespace) -> None:
    line, code = block
    if NEEDS_TORCH.search(code):
        pytest.importorskip("torch")
    # The empty lines in front make a traceback name the document's own line.
    exec(compile("\n" * line + code, str(document), "exec"), namespace)


def left_to_the_user() -> Namespace:
    """Return the names that the specification uses and leaves to the user."""
    numbers = {"train_loss": 0.4, "val_loss": 0.5, "accuracy": 0.8, "val_acc": 0.8, "f1": 0.7}
    given: Namespace = {"__name__": "documentation", "epochs": 3, "epoch": 3, **numbers}
    if importlib.util.find_spec("torch") is None:
        return {**given, "model": {"weight": [0.5]}, "optimizer": {"lr": 0.1}}
    import torch

    model = torch.nn.Linear(4, 2)
    return {**given, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The names of one document, which runs in a folder of its own; what it leaves open is closed."""
    monkeypatch.chdir(tmp_path)
    ours = {name: home for name, home in storage._BACKENDS.items() if str(home).startswith("model_checkpoint.")}
    monkeypatch.setattr(storage, "_BACKENDS", ours)  # a page that registers a backend does so for itself alone
    names = left_to_the_user()
    yield names
    for value in names.values():
        if type(value).__name__ in ("EnhancedCheckpointManager", "ExperimentTracker"):
            value.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_python_block_runs(document: Path, namespace: Namespace) -> None:
    ran = [run(document, block, namespace) for block in blocks(document)]
    assert len(ran) == document.read_text(encoding="utf-8").count("```python")


def test_the_readme_needs_nothing_that_it_does_not_define(namespace: Namespace) -> None:
    for name in left_to_the_user().keys() - {"__name__"}:
        del namespace[name]
    for block in blocks(README):
        run(README, block, namespace)
    assert namespace["best_checkpoint"]["epoch"] == namespace["epochs"] - 1


@pytest.mark.parametrize("document", [README, SPECIFICATION], ids=name_of)
def test_there_are_blocks_to_run(document: Path) -> None:
    assert len(blocks(document)) >= 4


def test_the_quick_start_leaves_what_it_promises(namespace: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    run(SPECIFICATION, blocks(SPECIFICATION)[0], namespace)
    assert capsys.readouterr().out.count("Saved checkpoint: ") == namespace["epochs"]
    assert Path("experiments.db").is_file()
    assert len(list(Path("checkpoints").glob("*/*/checkpoint.pt"))) == namespace["epochs"]
    best = namespace["best_checkpoint"]
    assert best["_checkpoint_metadata"]["is_best_val_loss"]
    assert best["_checkpoint_metadata"]["epoch"] == 0, "of equal losses the earliest is best"
    for name, value in namespace["model"].state_dict().items():
        assert value.equal(best["model_state_dict"][name])


def test_the_failing_hook_of_the_specification_does_not_stop_the_run(
    namespace: Namespace, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ValidationHook reads ``self.max_loss_threshold``, which nothing sets: it fails, and the save goes on."""
    for block in blocks(SPECIFICATION)[:2]:
        run(SPECIFICATION, block, namespace)
    manager, tracker = namespace["manager"], namespace["tracker"]
    with caplog.at_level(logging.ERROR):
        saved = manager.save_checkpoint(namespace["model"], epoch=7, loss=0.1)
    assert manager.load_checkpoint(saved)["epoch"] == 7
    assert "ValidationHook" in caplog.text
    assert "max_loss_threshold" in caplog.text
    assert manager.hook_manager.get_performance_stats("ValidationHook")["failed_calls"] == 1
    assert f"Saving checkpoint for experiment {tracker.experiment_id}" in capsys.readouterr().out


@pytest.mark.parametrize("document", PAGES, ids=name_of)
def test_every_make_target_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(block or inline for block, inline in CODE.findall(document.read_text(encoding="utf-8")))
    named = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert named <= targets
    if document == README:
        assert {"demo", "test"} <= named


@pytest.mark.parametrize("document", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.slow
def test_the_demo_explains_its_options() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--epochs" in shown
    assert "--dir" in shown
