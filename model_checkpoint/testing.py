"""For your own tests: whether training that is killed and resumed ends as training that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from model_checkpoint.checkpoint.comparison import compare
from model_checkpoint.checkpoint.diff import CheckpointDiff
from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.checkpoint.reader import CheckpointReader
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.hooks import HookContext, HookEvent
from model_checkpoint.integrity.verification import read_manifest
from model_checkpoint.tracking import ExperimentTracker
from model_checkpoint.utils.checks import check_count, check_positive

__all__ = ["ResumeDiffersError", "assert_resume_equivalent"]

Train = Callable[[EnhancedCheckpointManager, int], object]
Saved = dict[tuple[int, int, str], list[str]]  # step, epoch and type -> folders of checkpoints


class ResumeDiffersError(AssertionError):
    """A resumed run is not what an unbroken one is.

    Attributes:
        kill_at: where it was killed.
        step: of the first checkpoint that differs; None where the runs saved different ones.
        diff: what differs there.
    """

    def __init__(self, text: str, kill_at: int, step: int | None = None, diff: CheckpointDiff | None = None) -> None:
        super().__init__(text)
        self.kill_at = kill_at
        self.step = step
        self.diff = diff


def assert_resume_equivalent(
    train_fn: Train, steps: int, kill_at: int | Iterable[int], *, timeout: float = 600.0
) -> int:
    """Train without interruption, then killed and resumed, and compare all that was saved, bit for bit.

    Each run is a process of its own, with a directory and a database of its own. All begin with the same random states
    of Python, NumPy and PyTorch, as far as the module of ``train_fn`` imports them. The killed one gets SIGKILL when it
    is about to save the first checkpoint whose ``step`` is ``kill_at`` or more, so that what it has trained since its
    last checkpoint is lost; then ``train_fn`` is called again, in another process.

    Args:
        train_fn: called with a manager and ``steps``. It makes its objects anew, restores them when
            ``manager.list_checkpoints()`` has any, trains up to ``steps``, and saves now and then with ``step=``. It is
            pickled by name for the new process, so it must stand at the top of a module.
        steps: passed on to ``train_fn``.
        kill_at: a step, or several, each of which is a run.
        timeout: seconds that each process may take.

    Returns:
        How many checkpoints were compared.

    Raises:
        ResumeDiffersError: a checkpoint of a resumed run differs from that of the unbroken one. The text names the
            first step and tensor or value that differs, and says which random states do.
        AssertionError: ``train_fn`` failed, took too long, saved nothing, or ended before it could be killed.
        ConfigurationError: an argument cannot be used.
    """
    points = [*kill_at] if isinstance(kill_at, Iterable) else [kill_at]
    if not callable(train_fn) or not points:
        raise ConfigurationError("assert_resume_equivalent() needs a function and at least one step to kill it at")
    try:
        ForkingPickler.dumps(train_fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"train_fn must be a function at the top of a module: {error}") from error
    for point in (steps, *points):
        check_count(**{"steps and kill_at": point})
    check_positive(timeout=timeout)
    compared = 0
    with tempfile.TemporaryDirectory() as folder:
        unbroken = Path(folder, "unbroken")
        _run(train_fn, steps, unbroken, None, timeout)
        expected = _checkpoints(unbroken)
        assert expected, "train_fn saved no checkpoint, so there is nothing to compare"
        for point in points:
            resumed = Path(folder, f"killed at {point}")
            _run(train_fn, steps, resumed, point, timeout)
            _run(train_fn, steps, resumed, None, timeout)
            _compare(expected, _checkpoints(resumed), point)
            compared += sum(map(len, expected.values()))
    return compared


def _run(train_fn: Train, steps: int, folder: Path, kill_at: int | None, timeout: float) -> None:
    folder.mkdir(exist_ok=True)
    error = folder / "error.txt"
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(train_fn, steps, folder, kill_at))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"train_fn took more than {timeout:g} seconds")
    if error.exists():
        raise AssertionError(f"train_fn failed:\n{error.read_text()}")
    if kill_at is not None:
        assert process.exitcode == -signal.SIGKILL, (
            f"train_fn ended before it could be killed at step {kill_at}; does it call save_checkpoint(step=...)?"
        )
    else:
        assert process.exitcode == 0, f"the process of train_fn ended with {process.exitcode}"


def _train(train_fn: Train, steps: int, folder: Path, kill_at: int | None) -> None:
    """Run in the new process."""
    try:
        _seed()
        url, noted = f"sqlite:///{folder}/experiments.db", folder / "experiment.json"
        if noted.exists():
            tracker = ExperimentTracker.resume(json.loads(noted.read_text()), url)
        else:
            tracker = ExperimentTracker("assert_resume_equivalent", database_url=url)
            noted.write_text(json.dumps(tracker.experiment_id))
        with tracker, EnhancedCheckpointManager(tracker, folder / "checkpoints", max_checkpoints=None) as manager:
            if kill_at is not None:
                manager.register_hook("kill", _Killer(kill_at), [HookEvent.BEFORE_CHECKPOINT_SAVE])
            train_fn(manager, steps)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        (folder / "error.txt").write_text(traceback.format_exc())
        raise


def _seed() -> None:
    """Make runs alike that seed nothing: their states would differ from the first step on, without any kill."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


class _Killer:
    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, context: HookContext) -> None:
        if context.data["step"] >= self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def _checkpoints(folder: Path) -> Saved:
    """Return (step, epoch, type) -> folders of the checkpoints of these, in the order in which they were saved."""
    tracker = ExperimentTracker.resume(
        json.loads((folder / "experiment.json").read_text()), f"sqlite:///{folder}/experiments.db"
    )
    with tracker, EnhancedCheckpointManager(tracker, folder / "checkpoints", max_checkpoints=None) as manager:
        found: Saved = {}
        for each in manager.list_checkpoints():
            found.setdefault((each["step"], each["epoch"], each["checkpoint_type"]), []).append(each["path"])
        return found


def _compare(expected: Saved, found: Saved, kill_at: int) -> None:
    told = f"killed at step {kill_at} and resumed, training"
    for key, paths in expected.items():
        again = found.get(key, [])[-len(paths) :]  # before them are those that the kill made training repeat
        if len(again) < len(paths):
            text = f"{told} saved no checkpoint of step {key[0]} and epoch {key[1]}, as unbroken training did"
            raise ResumeDiffersError(text, kill_at)
        for pair in zip(paths, again):
            before, after = (CheckpointReader(path, read_manifest(path)[0], True, 1) for path in pair)
            diff = compare(before, after)
            # Random states alone do not count: nobody may have seeded them, nor drawn from them.
            if not replace(diff, random=()).identical:
                raise ResumeDiffersError(_told(told, key[0], diff), kill_at, key[0], diff)
    more = [key for key in found if key not in expected]
    if more:
        raise ResumeDiffersError(f"{told} saved checkpoints of steps that unbroken training did not: {more}", kill_at)


def _told(told: str, step: int, diff: CheckpointDiff) -> str:
    first = next((path for path, tensor in diff.tensors.items() if tensor.status != "same"), None)
    first = first or next(iter((*diff.values, *diff.config, *diff.metrics, *diff.progress)))
    table = str(diff).partition("\n")[2]
    return f"{told} differs from unbroken training, first in step {step}, there first in {first}\n{table}"
