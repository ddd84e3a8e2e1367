"""Background saves: what they hold, their order, their bound, hooks that run in them, and forks."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers_storage import exact, needs_numpy, needs_torch, needs_zstandard, np, torch

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, register_storage_backend
from model_checkpoint.checkpoint.background import SaveQueue
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    ExperimentNotFoundError,
    SaveFailedError,
)
from model_checkpoint.hooks import HookContext, HookEvent

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0  # seconds that anything may take before it counts as hung


class Gate:
    """Where saves of the ``gated`` backend stop while it is shut, and fail while there is an error.

    Attributes:
        opened: whether they go on.
        reached: set when one has come to it.
        error: raised by those that pass it.
    """

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.opened.set()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(DEADLINE)
        if self.error is not None:
            raise self.error


class GatedBackend(SafeTensorsBackend):
    """The standard format, behind a gate."""

    name: ClassVar[str] = "gated"
    gate: ClassVar[Gate] = Gate()

    def plan(self, *arguments: Any) -> Any:
        self.gate.pass_through()
        return super().plan(*arguments)


register_storage_backend("gated", GatedBackend)
Make = Callable[..., EnhancedCheckpointManager]


@pytest.fixture
def gate() -> Iterator[Gate]:
    GatedBackend.gate = Gate()
    yield GatedBackend.gate
    GatedBackend.gate.opened.set()


@pytest.fixture
def make(tracker: ExperimentTracker, tmp_path: Path, gate: Gate) -> Iterator[Make]:
    """Make managers on the test's directory, with background saves; their gate opens before they are closed."""
    made: list[EnhancedCheckpointManager] = []

    def make(storage_backend: str = "gated", **options: Any) -> EnhancedCheckpointManager:
        options = {"async_save": True, "max_checkpoints": None, **options}
        made.append(EnhancedCheckpointManager(tracker, tmp_path / "c", storage_backend, **options))
        return made[-1]

    yield make
    gate.opened.set()
    gate.error = None
    for manager in made:
        manager.wait()


def state_of(epoch: int) -> dict[str, Any]:
    return {"weight": array("d", [epoch] * 50), "epoch": epoch}


def epochs(manager: EnhancedCheckpointManager) -> list[int]:
    return [row["epoch"] for row in manager.list_checkpoints()]


# What it holds


def every_kind() -> dict[str, Any]:
    """Return a state of every kind of memory that can be changed, with ties, views and gaps."""
    state: dict[str, Any] = {
        "bytearray": bytearray(b"abc"),
        "array": array("f", [1, 2, 3]),
        "memoryview": memoryview(bytearray(b"xyz")),
        "bytes": b"never",
        "nested": [{"deep": (array("q", [7]), "text", 5)}],
    }
    state["tied"] = [state["array"], state["bytearray"]]
    if np is not None:
        base = np.arange(12.0)
        state["numpy"] = {"base": base, "view": base[2:8], "transposed": np.arange(6.0).reshape(2, 3).T}
    if torch is not None:
        base = torch.arange(20.0)
        state["torch"] = {"a": base[:12], "b": base[8:], "gaps": torch.arange(8.0)[::2], "half": torch.ones(3).half()}
        torch.manual_seed(0)
        state["module"] = torch.nn.Linear(3, 3)
        state["conj"] = torch.tensor([1 + 2j]).conj()
    return state


def change(value: Any) -> None:
    """Change every array of a state in its place, and the containers, too."""
    if isinstance(value, dict):
        for item in value.values():
            change(item)
        value["new"] = array("b", [1])
    elif isinstance(value, (list, tuple)):
        for item in value:
            change(item)
    elif isinstance(value, (bytearray, array, memoryview)):
        value[0] = 9
        if not isinstance(value, memoryview):
            value.extend(value)  # refused while anybody still borrows its memory
    elif torch is not None and isinstance(value, (torch.Tensor, torch.nn.Module)):
        with torch.no_grad():
            for tensor in [value] if isinstance(value, torch.Tensor) else list(value.parameters()):
                tensor.add_(100)
    elif np is not None and isinstance(value, np.ndarray):
        value += 100


@pytest.mark.parametrize("compressed", [False, pytest.param(True, marks=needs_zstandard)])
@pytest.mark.parametrize("backend", ["gated", pytest.param("pytorch", marks=needs_torch)])
def test_no_change_after_the_return_is_in_the_file(
    make: Make, gate: Gate, backend: str, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "pytorch":
        from model_checkpoint.checkpoint.storage.pytorch_backend import PyTorchBackend

        plan = PyTorchBackend.plan
        monkeypatch.setattr(PyTorchBackend, "plan", lambda *a: (gate.pass_through(), plan(*a))[1])
    manager = make(backend, enable_compression=compressed)
    blocking = manager.save_checkpoint(every_kind(), {"m": every_kind()}, blocking=True)
    gate.opened.clear()
    state, optimizer = every_kind(), {"m": every_kind()}
    config, metrics = {"list": [1]}, {"f1": 0.5}
    saved = manager.save_checkpoint(state, optimizer, config=config, metrics=metrics)
    change(state)
    change(optimizer)
    config["list"].append(2)
    metrics["f1"] = 0.9
    assert manager.pending() == [saved]
    gate.opened.set()
    loaded, expected = manager.load_checkpoint(saved), manager.load_checkpoint(blocking)
    for part in ("model_state_dict", "optimizer_state_dict"):
        assert exact(loaded[part]) == exact(expected[part])
    assert (loaded["config"], loaded["metrics"]) == ({"list": [1]}, {"f1": 0.5})
    tied = loaded["model_state_dict"]["tied"]
    assert tied[0] is loaded["model_state_dict"]["array"]


def test_large_arrays_that_many_threads_copy_are_whole(make: Make, gate: Gate) -> None:
    manager = make(io_threads=4)
    sizes = [(16 << 20) // 8 + 3, 5, (5 << 20) // 8, 0, 1]
    state = {str(i): array("d", [i + 1]) * size for i, size in enumerate(sizes)}
    gate.opened.clear()
    saved = manager.save_checkpoint(state)
    for values in state.values():
        values[:] = array("d", [-1]) * len(values)
    gate.opened.set()
    loaded = manager.load_checkpoint(saved)["model_state_dict"]
    assert loaded == {str(i): array("d", [i + 1]) * size for i, size in enumerate(sizes)}


def test_what_is_known_of_the_run_is_that_of_the_call(
    make: Make, gate: Gate, tracker: ExperimentTracker, tmp_path: Path
) -> None:
    manager = make()
    tracker.log_hyperparameters({"lr": 1})
    tracker.log_metric("loss", 1.0)
    gate.opened.clear()
    first = manager.save_checkpoint(state_of(1), epoch=1)
    for _ in range(3):
        tracker.log_metric("loss", 2.0)
    tracker.log_hyperparameters({"lr": 2})
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(manager.save_checkpoint, state_of(2), epoch=2)
        with pytest.raises(TimeoutError):
            second.result(0.2)  # waits for room
        gate.opened.set()
        second.result(DEADLINE)
    manager.wait()
    (manifest,) = (tmp_path / "c").glob(f"*/{first}/checkpoint.json")
    assert json.loads(manifest.read_bytes())["experiment"]["config"] == {"lr": 1}
    with sqlite3.connect(tmp_path / "experiments.db") as outside:
        positions = outside.execute("SELECT metric_position FROM checkpoints ORDER BY sequence").fetchall()
    outside.close()
    assert positions == [(1,), (4,)]


# Order, bound, memory


def test_the_id_is_returned_before_the_checkpoint_is_there(make: Make, gate: Gate) -> None:
    manager = make()
    gate.opened.clear()
    saved = manager.save_checkpoint(state_of(1), epoch=1)
    assert manager.pending() == [saved]
    assert manager.list_checkpoints() == []
    assert manager.wait(timeout=0) is False
    assert manager.wait(saved, timeout=0.01) is False
    gate.opened.set()
    assert manager.wait(saved, timeout=DEADLINE) is True
    assert (manager.pending(), epochs(manager)) == ([], [1])
    assert manager.wait() is True
    with pytest.raises(CheckpointNotFoundError):
        manager.wait("00000000-0000-4000-8000-000000000000")


@pytest.mark.parametrize("standard", [False, True])
def test_blocking_overrides_what_the_manager_says(make: Make, gate: Gate, standard: bool) -> None:
    manager = make(async_save=standard)
    manager.save_checkpoint(state_of(1), epoch=1, blocking=True)
    assert (manager.pending(), epochs(manager)) == ([], [1])
    gate.opened.clear()
    saved = manager.save_checkpoint(state_of(2), epoch=2, blocking=False)
    assert (manager.pending(), epochs(manager)) == ([saved], [1])
    gate.opened.set()
    manager.save_checkpoint(state_of(3), epoch=3)
    manager.wait()
    assert epochs(manager) == [1, 2, 3]


def test_commits_come_in_the_order_of_the_calls_whatever_their_kind(make: Make, gate: Gate) -> None:
    manager = make(max_pending_saves=4)
    committed: list[int] = []
    manager.register_hook("note", lambda c: committed.append(c.data["epoch"]), [HookEvent.AFTER_CHECKPOINT_SAVE])
    chance = random.Random(5)
    for epoch in range(40):
        manager.save_checkpoint(state_of(epoch), epoch=epoch, blocking=chance.random() < 0.3)
    manager.wait()
    assert committed == epochs(manager) == list(range(40))


def test_a_blocking_save_waits_for_what_its_own_hook_saved_in_the_background(make: Make) -> None:
    manager = make(async_save=False)
    inner: list[str] = []

    def save(context: HookContext) -> None:
        if context.data["epoch"] == 1:
            inner.append(manager.save_checkpoint(state_of(2), epoch=2, blocking=False))

    manager.register_hook("inner", save, [HookEvent.BEFORE_CHECKPOINT_SAVE])
    manager.save_checkpoint(state_of(1), epoch=1)
    assert manager.pending() == []
    assert epochs(manager) == [2, 1]  # that of the hook was called while this one had not begun to write


def test_a_save_beyond_the_bound_waits_and_only_that_one(make: Make, gate: Gate) -> None:
    manager = make(max_pending_saves=2)
    gate.opened.clear()
    first = [manager.save_checkpoint(state_of(epoch), epoch=epoch) for epoch in (1, 2)]
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(manager.save_checkpoint, state_of(3), epoch=3)
        gate.reached.wait(DEADLINE)
        with pytest.raises(TimeoutError):
            third.result(0.2)
        assert manager.pending() == first
        gate.opened.set()
        third.result(DEADLINE)
    manager.wait()
    assert epochs(manager) == [1, 2, 3]


def test_a_save_that_waits_for_room_has_not_taken_its_state_yet(make: Make, gate: Gate) -> None:
    """Its arrays may be a GPU's, whose copies in host memory would come on top of those that are pending."""

    class Model:
        def state_dict(self) -> dict[str, Any]:
            pending.append(manager.pending())
            return state_of(2)

    manager = make()
    pending: list[list[str]] = []
    gate.opened.clear()
    manager.save_checkpoint(state_of(1), epoch=1)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(manager.save_checkpoint, Model(), epoch=2)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        assert pending == []
        gate.opened.set()
        second.result(DEADLINE)
    assert pending == [[]]
    manager.wait()
    assert epochs(manager) == [1, 2]


def test_many_threads_that_save_at_once_lose_nothing(make: Make) -> None:
    manager = make(max_pending_saves=3)

    def save(thread: int) -> list[str]:
        return [manager.save_checkpoint(state_of(epoch), epoch=epoch) for epoch in range(thread * 10, thread * 10 + 6)]

    with ThreadPoolExecutor(8) as pool:
        ids = [task.result(DEADLINE) for task in [pool.submit(save, thread) for thread in range(8)]]
    manager.wait()
    rows = [row["checkpoint_id"] for row in manager.list_checkpoints()]
    assert sorted(rows) == sorted(saved for mine in ids for saved in mine)
    for mine in ids:
        assert [saved for saved in rows if saved in mine] == mine  # in the order of each thread
    for row in manager.list_checkpoints():
        assert manager.load_checkpoint(row["checkpoint_id"])["model_state_dict"] == state_of(row["epoch"])
    assert [thread for thread in threading.enumerate() if thread.name == "checkpoint saves"] == []


# Hooks in the background


def test_hooks_may_use_the_manager_they_are_called_by(make: Make, tracker: ExperimentTracker) -> None:
    manager = make(max_checkpoints=5)
    seen: list[str] = []
    inner: list[str] = []

    def act(context: HookContext) -> None:
        assert context.checkpoint_id is not None
        if context.get("checkpoint_type") == "inner":
            return
        manager.wait()
        manager.wait(context.checkpoint_id)
        inner.append(manager.save_checkpoint(state_of(-1), epoch=-1, checkpoint_type="inner"))
        assert manager.load_checkpoint(context.checkpoint_id)["epoch"] == context.data["epoch"]
        assert manager.load_checkpoint(inner[-1])["epoch"] == -1
        manager.delete_checkpoint(inner[-1])
        manager.recover()
        manager.rebuild_index()
        seen.append(context.checkpoint_id)

    manager.register_hook("act", act, [HookEvent.AFTER_CHECKPOINT_SAVE])
    ids = [manager.save_checkpoint(state_of(epoch), epoch=epoch) for epoch in range(3)]
    assert manager.wait(timeout=DEADLINE)
    assert manager.list_hooks()[0]["failures"] == 0
    assert seen == ids
    assert epochs(manager) == [0, 1, 2]


# Fork


def in_child(act: Callable[[], None]) -> None:
    """Fork, do it in the child, and check that it came to a good end in time."""
    child = multiprocessing.get_context("fork").Process(target=act)
    child.start()
    child.join(DEADLINE)
    hung = child.is_alive()
    child.kill()
    assert (hung, child.exitcode) == (False, 0)


def test_a_fork_while_a_save_is_pending_harms_neither_process(make: Make, gate: Gate) -> None:
    manager = make()
    first = manager.save_checkpoint(state_of(1), epoch=1, blocking=True)
    gate.opened.clear()
    pending = manager.save_checkpoint(state_of(2), epoch=2)
    gate.reached.wait(DEADLINE)

    def act() -> None:
        gate.opened.set()  # the child's copy
        assert (manager.pending(), manager.wait()) == ([], True)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert manager.load_checkpoint(first)["model_state_dict"] == state_of(1)
        manager.wait(manager.save_checkpoint(state_of(3), epoch=3))
        manager.close()

    in_child(act)
    assert manager.pending() == [pending]
    gate.opened.set()
    manager.wait()
    assert sorted(epochs(manager)) == [1, 2, 3]


def test_forks_at_any_moment_of_background_saves_hang_nobody(make: Make, gate: Gate) -> None:
    manager = make(max_pending_saves=2)
    for epoch in range(16):
        manager.save_checkpoint(state_of(epoch), epoch=epoch)
        if epoch % 2 == 0:
            in_child(lambda: manager.wait(manager.save_checkpoint(state_of(-1), epoch=-1)) or None)
    manager.wait()
    assert [epoch for epoch in epochs(manager) if epoch >= 0] == list(range(16))
    assert epochs(manager).count(-1) == 8


def test_a_fork_while_threads_use_the_manager_leaves_no_lock_taken_in_the_child(make: Make) -> None:
    manager = make()
    saved = manager.save_checkpoint(state_of(1), epoch=1, blocking=True)
    for number in range(300):
        manager.register_hook(f"hook {number}", print, [HookEvent.AFTER_INTEGRITY_CHECK])
    ended = threading.Event()

    def use(call: Callable[[], object]) -> None:
        while not ended.is_set():
            call()

    calls = [manager.list_hooks, lambda: manager.load_checkpoint(saved)]
    threads = [threading.Thread(target=use, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            in_child(lambda: [call() for call in calls] and None)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@needs_torch
def test_workers_of_a_data_loader_run_beside_a_background_save(make: Make, gate: Gate) -> None:
    manager = make()
    gate.opened.clear()
    manager.save_checkpoint(state_of(1), epoch=1)
    loader = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.arange(8.0))
    gate.opened.set()
    manager.wait()
    assert epochs(manager) == [1]


# Calls that need what is pending


def test_what_is_pending_can_be_pinned_deleted_and_brought_back(make: Make) -> None:
    manager = make()
    kept = manager.save_checkpoint(state_of(1), epoch=1)
    manager.pin(kept)
    gone = manager.save_checkpoint(state_of(2), epoch=2)
    assert manager.delete_checkpoint(gone)
    manager.save_checkpoint(state_of(3), epoch=3)
    manager.undelete(gone)
    assert epochs(manager) == [1, 2, 3]
    manager.unpin(gone)
    manager.save_checkpoint(state_of(4), epoch=4)
    manager.delete_checkpoint(gone)
    manager.save_checkpoint(state_of(5), epoch=5)
    assert manager.empty_trash() > 0
    assert epochs(manager) == [1, 3, 4, 5]


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), -1, "1", True, 1e300])
def test_a_timeout_that_is_none_is_refused_by_name(make: Make, timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout must be seconds"):
        make().wait(timeout=timeout)


@pytest.mark.parametrize(
    "option", [{"async_save": "no"}, {"async_save": 1}, {"max_pending_saves": True}, {"io_threads": True}]
)
def test_options_of_another_kind_are_refused_by_name(make: Make, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        make(**option)


@pytest.mark.parametrize("value", [0, 0.0, "", [], 1])
def test_what_only_counts_as_a_flag_is_none(make: Make, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="blocking must be True or False"):
        make().save_checkpoint(state_of(1), blocking=value)


@pytest.mark.parametrize("flag", ["save_optimizer", "save_scheduler", "compute_checksum", "update_best", "blocking"])
def test_a_text_in_place_of_a_flag_is_refused_by_name_and_saves_nothing(make: Make, flag: str) -> None:
    manager = make()
    with pytest.raises(ConfigurationError, match=f"{flag} must be True or False, not 'no'"):
        manager.save_checkpoint(state_of(1), **{flag: "no"})
    assert manager.list_checkpoints() == []


@pytest.mark.parametrize("flag", ["verify_integrity", "load_optimizer", "load_scheduler"])
def test_a_text_in_place_of_a_flag_of_a_load_is_refused_by_name(make: Make, flag: str) -> None:
    manager = make()
    saved = manager.save_checkpoint(state_of(1))
    with pytest.raises(ConfigurationError, match=f"{flag} must be True or False, not 'no'"):
        manager.load_checkpoint(saved, **{flag: "no"})
    with pytest.raises(ConfigurationError, match="include_metadata must be True or False"):
        manager.list_checkpoints(include_metadata="no")  # type: ignore[arg-type]


@needs_numpy
def test_what_a_comparison_of_numpy_returns_is_a_flag(make: Make) -> None:
    manager = make()
    manager.save_checkpoint(state_of(1), loss=1.0, update_best=np.float32(1) < np.float32(0), blocking=np.bool_(True))
    assert [told["is_best_loss"] for told in manager.list_checkpoints()] == [False]


def test_what_retention_has_removed_since_was_durable(make: Make) -> None:
    manager = make(max_checkpoints=1, save_best=False)
    ids = [manager.save_checkpoint(state_of(epoch), epoch=epoch) for epoch in range(4)]
    assert all(manager.wait(saved) for saved in ids)
    assert epochs(manager) == [3]


def test_the_interpreter_ends_while_a_daemon_goes_on_saving(tmp_path: Path) -> None:
    script = f"""
import threading
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
tracker = ExperimentTracker("run", database_url="sqlite:///{tmp_path}/experiments.db")
manager = EnhancedCheckpointManager(tracker, "{tmp_path}/c", async_save=True, max_pending_saves=3)
saved, enough = [], threading.Event()
def loop():
    while True:
        saved.append(manager.save_checkpoint({{"w": array("d", range(1000))}}))
        if len(saved) > 5:
            enough.set()
threading.Thread(target=loop, daemon=True).start()
assert enough.wait({DEADLINE})
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=DEADLINE, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_daemon_saves_on_while_a_thread_that_is_none_waits_for_it_at_the_end(tmp_path: Path) -> None:
    script = f"""
import threading
from array import array
from concurrent.futures import Future
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
tracker = ExperimentTracker("run", database_url="sqlite:///{tmp_path}/experiments.db")
manager = EnhancedCheckpointManager(tracker, "{tmp_path}/c", async_save=True)
saved, main = Future(), threading.main_thread()
def daemon():
    main.join()
    saved.set_result(manager.save_checkpoint({{"w": array("d", range(1000))}}))
def training():
    print(saved.result({DEADLINE}))
threading.Thread(target=daemon, daemon=True).start()
threading.Thread(target=training).start()
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=2 * DEADLINE, capture_output=True)
    assert (ended.returncode, len(ended.stdout.strip()), ended.stderr) == (0, 36, b"")


@pytest.mark.parametrize("wrong", [["a"], 7, b"a", "a", "../a"])
def test_what_is_no_id_is_refused_as_one_that_is_not_there(make: Make, wrong: Any) -> None:
    manager = make()
    with pytest.raises(CheckpointNotFoundError, match="UUIDs as text"):
        manager.wait(wrong)
    with pytest.raises(ExperimentNotFoundError):
        manager.save_checkpoint(state_of(1), experiment_id=wrong)


def test_a_thread_that_dies_of_its_logging_leaves_nobody_waiting(
    make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make(max_pending_saves=3)
    logger, died, dead = logging.getLogger("model_checkpoint.checkpoint.background"), threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", lambda hook: dead.append(str(hook.exc_value)))

    def refuse(record: logging.LogRecord) -> bool:
        dying.append(threading.current_thread())
        died.set()
        raise RuntimeError("a filter of the user's")

    dying: list[threading.Thread] = []

    gate.opened.clear()
    failed, sound = manager.save_checkpoint(state_of(1)), manager.save_checkpoint(state_of(2), epoch=2)
    gate.error = OSError(28, "No space left on device")
    manager.register_hook("mend", lambda _: setattr(gate, "error", None), [HookEvent.ON_CHECKPOINT_SAVE_FAILED])
    logger.addFilter(refuse)
    try:
        gate.opened.set()
        assert died.wait(DEADLINE)
        assert manager._queue.wait([sound], DEADLINE)
        dying[0].join(DEADLINE)
    finally:
        logger.removeFilter(refuse)
    assert dead == ["a filter of the user's"]
    with pytest.raises(SaveFailedError, match=failed):
        manager.wait()
    assert epochs(manager) == [2]


def test_a_thread_that_found_nothing_to_do_leaves_the_next_save_to_the_thread_that_took_it(
    make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread loses the processor between finding nothing and leaving, when a second one has a save."""
    manager = make(max_pending_saves=2)
    held, go_on, wait_until = threading.Event(), threading.Event(), SaveQueue._wait_until

    def slow(self: SaveQueue, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        found = wait_until(self, condition, timeout)
        if threading.current_thread().name == "checkpoint saves" and not self.jobs and not held.is_set():
            held.set()
            assert go_on.wait(DEADLINE)
        return found

    monkeypatch.setattr(SaveQueue, "_wait_until", slow)
    manager.save_checkpoint(state_of(1), epoch=1)
    assert held.wait(DEADLINE)
    (first,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint saves"]
    gate.opened.clear()
    gate.reached.clear()
    second = manager.save_checkpoint(state_of(2), epoch=2)
    assert gate.reached.wait(DEADLINE)
    go_on.set()
    first.join(DEADLINE)
    assert not first.is_alive()
    gate.opened.set()
    for epoch in (3, 4):
        manager.save_checkpoint(state_of(epoch), epoch=epoch)
    assert manager.wait()
    assert epochs(manager) == [1, 2, 3, 4]
    assert manager.load_checkpoint(second)["model_state_dict"] == state_of(2)


def test_a_blocking_save_that_waited_for_one_that_failed_says_so_and_saves_nothing(
    make: Make, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make()
    gate.opened.clear()
    failed = manager.save_checkpoint(state_of(1), epoch=1)
    assert gate.reached.wait(DEADLINE)
    gate.error = OSError(28, "No space left on device")
    manager.register_hook("mend", lambda _: setattr(gate, "error", None), [HookEvent.ON_CHECKPOINT_SAVE_FAILED])
    wait = manager._queue.wait
    monkeypatch.setattr(manager._queue, "wait", lambda: (gate.opened.set(), wait()))  # the save begins to wait
    with pytest.raises(SaveFailedError, match=failed):
        manager.save_checkpoint(state_of(2), epoch=2, blocking=True)
    assert epochs(manager) == []
    manager.save_checkpoint(state_of(3), epoch=3, blocking=True)
    assert epochs(manager) == [3]


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError("bad"), "that checkpoint does not exist"), (KeyboardInterrupt(), "exists if list_checkpoints")],
)
def test_a_failure_claims_no_more_than_is_known(make: Make, gate: Gate, error: BaseException, text: str) -> None:
    """An interrupt may come after the commit, too."""
    manager = make()
    gate.error = error
    manager.save_checkpoint(state_of(1), epoch=1)
    with pytest.raises(SaveFailedError, match=text):
        manager.wait()


def test_polling_leaves_nothing_behind(make: Make, gate: Gate) -> None:
    manager = make()
    gate.opened.clear()
    manager.save_checkpoint(state_of(1))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(500):
        assert not manager.wait(timeout=0)
    gc.collect()
    assert len(gc.get_objects()) < before + 250
